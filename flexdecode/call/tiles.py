"""The tiles of a kernel: rows, keys and columns of a step, warps, and how keys and values are loaded."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from ..memos import hashed_once
from ..triton_api import has_gluon
from .columns import FLOAT32_COLUMNS, LARGE_ROWS, SMALL_ROWS, find_columns, is_narrow, is_paired, least_columns
from .copies import copied_bytes, copy_pipeline, steps_of
from .device import DeviceFacts
from .inputs import DecodeOptions
from .signature import Signature

LATENT_BLOCK = 64  # keys per step of the kernel for latents: two such blocks and the query fill the shared memory


class Loads(Enum):
    """How a kernel loads keys and values: the template files whose functions take the place of those of `decode.py`."""

    POINTERS = ()
    DESCRIPTORS = ("kv_descriptor.py",)
    LATENTS = ("kv_descriptor.py", "latent.py")
    WIDE = ("wide.py",)

    def __repr__(self) -> str:
        return self.name


@hashed_once
@dataclass(frozen=True)
class Tiles:
    """The compile-time half of a schedule. Each value has its own kernel.

    `split`: there are partial outputs and a combine pass. `loads`: how keys and values are loaded. A key is loaded as
    `block_d` columns and then `block_r` columns (0 if there are no more). A head of many columns is loaded as several
    parts of `block_d` columns of its key and `block_dv` columns of its value. `shared`: the first columns of a key are
    its value. `paired`: the columns of a quantised cache are loaded two by two. `balanced`: all work is divided into
    equal runs. This needs the number of blocks of every sequence. The kernel counts them for all sequences at once, or,
    if `many`, for `block_b` sequences per step. `per_sm` programs run on a multiprocessor at once, or as many as fit if
    it is 0.
    """

    block_m: int
    block_n: int
    block_d: int
    block_r: int
    block_dv: int
    num_warps: int
    num_stages: int
    split: bool
    loads: Loads
    shared: bool = False
    paired: bool = False
    balanced: bool = False
    block_b: int = 0
    many: bool = False
    per_sm: int = 0

    @property
    def descriptors(self) -> bool:
        """Whether keys and values are loaded through tensor descriptors."""
        return self.loads in (Loads.DESCRIPTORS, Loads.LATENTS)

    @property
    def latent(self) -> bool:
        """Whether this is the kernel of `templates/latent.py`."""
        return self.loads is Loads.LATENTS

    @property
    def key_columns(self) -> int:
        """Elements of a row that the first load of a key reads."""
        return self.block_d // 2 if self.paired or self.latent else self.block_d

    @property
    def value_columns(self) -> int:
        """Elements of a row that the load of a value reads; for latents, those that the last load of a key reads."""
        if self.latent:
            return self.block_r
        return self.block_dv // 2 if self.paired else self.block_dv


def most_rows(signature: Signature, facts: DeviceFacts, small: bool) -> int:
    """Rows of the largest tile. Float32 products and wide values need many registers.

    Args:
        signature: of the call.
        facts: of the device.
        small: whether large tiles do not pay. If few keys are live, those of a small tile are fewer.
    """
    columns = find_columns(signature, facts)
    if columns.wide:
        return 16
    if signature.is_float32:
        return 32 if columns.loaded <= FLOAT32_COLUMNS else 16
    return LARGE_ROWS if columns.block_dv <= 128 and not small and not is_narrow(signature) else SMALL_ROWS


class Use(NamedTuple):
    """What tiles are for, as far as the sizes of a call decide it.

    Attributes:
        block_m: query rows of a tile.
        is_prompt: whether many rows of a sequence read the same keys, so that products take longer than loads.
        copied: whether the copy engine loads the caches, if they have descriptors; see `is_copied`.
        per_sm: programs that are to run on a multiprocessor at once.
        is_short, is_long: whether a program attends to few keys, or to many.
        split, balanced, block_b, many: as in `Tiles`.
        limited: whether no more than `per_sm` programs may be on a multiprocessor, also where caches are not copied.
    """

    block_m: int
    is_prompt: bool
    copied: bool
    per_sm: int
    is_short: bool
    is_long: bool
    split: bool
    balanced: bool
    block_b: int
    many: bool
    limited: bool


def find_tiles(
    signature: Signature, facts: DeviceFacts, options: DecodeOptions, loads: Loads, use: Use, is_bounded: bool
) -> Tiles:
    """Chooses the tiles of a launch.

    Args:
        signature: of the call.
        facts: of the device.
        options: choices of the caller.
        loads: how the caches can be loaded.
        use: what the tiles are for.
        is_bounded: whether few keys of a long cache may be live. Smaller blocks divide few keys better.
    """
    block_m, is_prompt, per_sm = use.block_m, use.is_prompt, use.per_sm
    copied = use.copied and loads is Loads.DESCRIPTORS
    paired = is_paired(signature, facts, options)
    # Measured on an H200: with many keys of a quantised cache, long steps are faster than little shared memory.
    crowded = per_sm > 1 and not (paired and use.is_long and loads is Loads.DESCRIPTORS)
    is_float32, latent = signature.is_float32, loads is Loads.LATENTS
    columns = find_columns(signature, facts)
    block_d, block_r, block_dv, shared, _, tile_bytes, wide = columns
    # Measured on an H200: a crowded float32 kernel that is not copied gains more from little shared memory.
    loads = Loads.POINTERS if is_float32 and crowded and not copied else loads
    steps = steps_of(signature, facts, block_m)
    num_warps = 8 if (block_m > SMALL_ROWS or block_m * block_dv >= 64 * 256) and not latent else 4
    if wide:
        # Triton pipelines the loop over the columns of a key. Without this loop it would keep whole values.
        num_stages = 2 if signature.head_dim > block_d else 1
        loads, block_n, num_warps = Loads.WIDE, 32 if is_float32 else 64, 8
    elif latent:
        block_n, num_stages = LATENT_BLOCK, 2  # one program fills a multiprocessor
    elif is_prompt and block_m >= SMALL_ROWS:
        block_n, num_stages = _prompt_pipeline(block_m, signature, tile_bytes, facts)
    elif copied:
        most = min(steps.most_keys, 128) if use.is_short else steps.most_keys  # few keys are better divided
        if signature.page_size:  # a copy does not cross pages
            most = min(most, signature.page_size & -signature.page_size)
        of_tile = copied_bytes(signature, facts, block_m), steps
        block_n, num_stages = copy_pipeline(block_m, per_sm, *of_tile, options.block_n, most, facts)
    else:
        block_n, num_stages = _pipeline(
            block_m, tile_bytes, is_float32, crowded, use.balanced, loads is not Loads.POINTERS, paired, facts
        )
        block_n = min(block_n, 64) if is_bounded else block_n
        # More keys would spill registers. Measured on an H200: 64 keys of float32 that spill some are faster than 32.
        if is_float32 and block_m > 16:
            block_n = min(block_n, 64 if signature.key_dtype == torch.float32 else steps.most_keys)
        if is_float32 and (is_narrow(signature) or columns.loaded > FLOAT32_COLUMNS):
            block_n = min(block_n, 32)
        elif is_narrow(signature):
            block_n = min(block_n, 64)
    if not (wide or latent):
        block_dv = max(block_dv, least_columns(block_m, paired))
        block_d = max(block_d, block_dv) if shared else block_d
    return Tiles(
        block_m,
        options.block_n or block_n,
        block_d,
        block_r,
        block_dv,
        options.num_warps or num_warps,
        options.num_stages or num_stages,
        split=use.split,
        loads=loads,
        shared=shared,
        paired=paired,
        balanced=use.balanced,
        block_b=use.block_b,
        many=use.many,
        per_sm=per_sm if copied or (use.limited and not (wide or latent)) else 0,
    )


def has_latent_kernel(signature: Signature, facts: DeviceFacts, options: DecodeOptions) -> bool:
    """Whether `templates/latent.py` can compute calls: latents of 512 + 64 columns. It is for many query rows."""
    widths = signature.shared_kv, signature.head_dim, signature.v_head_dim
    return (
        facts.has_warpgroups
        and has_gluon()
        and widths == (True, 576, 512)
        and signature.key_dtype == signature.value_dtype == signature.dtype != torch.float32
        and signature.kind("k_scale") is signature.kind("v_scale") is None
        and signature.page_size % LATENT_BLOCK == 0
        and options.num_warps is None
        and options.num_stages is None
        and options.block_n in (None, LATENT_BLOCK)
    )


def _pipeline(
    block_m: int,
    kv_bytes: int,
    is_float32: bool,
    crowded: bool,
    balanced: bool,
    descriptors: bool,
    paired: bool,
    facts: DeviceFacts,
) -> tuple[int, int]:
    """Keys per step and pipeline depth.

    With at most one program per multiprocessor, a deep pipeline keeps enough bytes in flight. If there are more
    programs, each should use little shared memory: two of them can then share a multiprocessor, and one works while the
    other starts or ends.

    Args:
        block_m: rows of a tile.
        kv_bytes: bytes of one key and its value, as they are loaded.
        is_float32: whether the inputs are float32.
        crowded: more programs than multiprocessors.
        balanced: whether the schedule is balanced, with two workers on each multiprocessor.
        paired: whether the columns of a quantised cache are loaded two by two.
        descriptors: KV loads through tensor descriptors.
        facts: of the device.
    """
    stages = 2 if facts.backend == "hip" or (crowded and (descriptors or is_float32) and not paired) else 3
    block_n = 64 if crowded and (is_float32 or ((block_m > 16 or balanced) and not descriptors)) else 128
    if paired and block_m < SMALL_ROWS:  # with more rows, the scores of more keys would spill registers
        block_n *= 1 if crowded and descriptors else 2
    # Seen in compiled kernels: shared memory holds stages - 1 tiles, and per row the query, the output and a few values
    # per key. With descriptors, tiles that would only just fit are so large that they spill registers.
    tiles_kept = stages - 1 + (0.0 if not descriptors else 1.0 if is_float32 else 0.5)
    per_key = 8 if is_float32 else 2 if descriptors else 6
    while block_n > 16:
        needed = block_n * kv_bytes * tiles_kept + block_m * (kv_bytes + per_key * block_n)
        if needed <= facts.shared_memory:
            break
        if block_n == 64 and stages == 3:  # fewer stages rather than fewer keys: each step has a fixed cost
            stages, tiles_kept = 2, tiles_kept - 1
        else:
            block_n //= 2
    return block_n, stages


def _prompt_pipeline(block_m: int, signature: Signature, kv_bytes: int, facts: DeviceFacts) -> tuple[int, int]:
    """Keys per step and pipeline depth for tiles of a prompt: two groups of four warps take long steps, one short ones.

    Measured on an H200: three stages keep the tensor cores busier than two with more programs.
    """
    block_n, stages = 128 if block_m > SMALL_ROWS else 64, 2 if facts.backend == "hip" else 3
    query_bytes = block_m * signature.head_dim * signature.dtype.itemsize
    while block_n > 16 and query_bytes + stages * block_n * kv_bytes > facts.shared_memory:
        if block_n <= 64 and stages > 2:
            stages = 2
        else:
            block_n //= 2
    return block_n, stages
