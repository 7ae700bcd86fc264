"""How a call is divided into tiles and programs. The signature and the facts about the device decide it."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

import torch

from ..memos import hashed_once
from ..triton_api import has_gluon
from .inputs import QUANTISED, DecodeOptions, Sizes
from .signature import Signature

MAX_SPLITS = 1024
# For smaller caches, finding the balanced shares takes longer than the time that they save.
BALANCED_BYTES = 64 << 20
BALANCED_LENGTH = 8192
BYTES_PER_US = 4.6e6  # read bandwidth of an H200; only its ratio to the cost of a combine matters
COMBINE_US = 2.0
ALL_ROWS = (1 << 31) - 1
SMALL_ROWS, LARGE_ROWS = 64, 128  # query rows of a tile: the most for few tokens, and those for a prompt
FEW_TOKENS = 8  # where sequences differ, those with up to so many tokens get small tiles, as far as these have the rows
MAX_WORKSPACE = 48 << 20  # bytes of partial results that a default schedule may need for one launch
# Larger heads are computed in parts of so many columns of keys, in a loop, and so many columns of values.
WHOLE_HEAD_DIM, WHOLE_V_HEAD_DIM = 576, 512
WIDE_BLOCK_D, WIDE_BLOCK_DV = 128, 256
# A float32 product is three products of tf32, so its operands fill the registers twice. For more columns they spill.
FLOAT32_HEAD_DIM, FLOAT32_COLUMNS = 256, 256
LATENT_BLOCK = 64  # keys per step of the kernel for latents: two such blocks and the query fill the shared memory


@hashed_once
@dataclass(frozen=True)
class DeviceFacts:
    """What the schedule needs to know about a device.

    Attributes:
        backend: `cuda`, `hip`, or `cpu` for the interpreter.
        arch: compute capability times 10 (90 for Hopper), or the name of an AMD architecture.
        num_sms: multiprocessors.
        shared_memory: bytes that one program may use.
    """

    backend: str
    arch: int | str
    num_sms: int
    shared_memory: int

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel can start before the previous one has finished."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def can_unpack(self) -> bool:
        """Whether the device converts pairs of float8 numbers."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 89

    @property
    def has_warpgroups(self) -> bool:
        """Whether products are those of Hopper: four warps compute one product together."""
        return self.backend == "cuda" and self.arch == 90

    @property
    def has_descriptors(self) -> bool:
        """Whether the device can copy tiles by tensor descriptors."""
        return self.has_pdl


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
    if `many`, for `block_b` sequences per step.
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


class Part(NamedTuple):
    """The sequences that one launch of the first pass computes, and their row tiles.

    Packed queries may need two launches: short and long sequences get tiles of different sizes. The host does not know
    which sequences are short, so `num_tiles` is an upper limit, and programs without a tile end at once.

    Attributes:
        block_m: query rows of a tile.
        num_tiles: tiles of all sequences, for each KV head.
        busy_tiles: how many of them have rows, as far as the host can guess.
        row_range: the fewest and the most query rows per KV head of the sequences.
        is_prompt: whether many rows of a sequence read the same keys, so that products take longer than loads.
    """

    block_m: int
    num_tiles: int
    busy_tiles: int
    row_range: tuple[int, int] = (0, ALL_ROWS)
    is_prompt: bool = False


@dataclass(frozen=True)
class Schedule:
    """Tiles and grid of one launch of the first pass.

    Attributes:
        tiles: compile-time sizes.
        num_items: (row tile of a sequence, KV head) pairs.
        num_splits: programs per item; if balanced, the number of workers that share all items.
        block_s: partial results that the combine pass merges per step.
        row_range: the fewest and the most query rows per KV head of the sequences that take part.
    """

    tiles: Tiles
    num_items: int
    num_splits: int
    block_s: int
    row_range: tuple[int, int] = (0, ALL_ROWS)

    @property
    def grid(self) -> tuple[int, int]:
        """Programs of the first pass."""
        return (self.num_splits, 1) if self.tiles.balanced else (self.num_items, self.num_splits)

    @property
    def num_programs(self) -> int:
        """The number of all programs of the first pass."""
        return self.grid[0] * self.grid[1]

    @property
    def num_places(self) -> int:
        """Tiles of partial results. A balanced worker has two: of an item that it continues, and one that it begins."""
        if not self.tiles.split:
            return 0
        return 2 * self.num_splits if self.tiles.balanced else self.num_programs


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


def find_parts(
    signature: Signature,
    sizes: Sizes,
    facts: DeviceFacts,
    options: DecodeOptions,
    latent: bool = False,
    is_bounded: bool = False,
) -> tuple[Part, ...]:
    """Divides the sequences of a call into one or two launches.

    Padded queries and packed queries of similar lengths need one. A sequence of packed queries gets small tiles if it
    fits into one, unless the caller's `max_q_len` or the number of tokens shows that small tiles suit all sequences.
    """
    group, tokens, batch = signature.group_size, sizes.num_queries, sizes.batch
    large = _most_rows(signature, facts, latent or is_bounded)
    most = min(large, SMALL_ROWS)
    if not signature.packed:
        rows = group * tokens
        is_prompt = rows > LARGE_ROWS
        block_m = min(max(16, next_power_of_2(rows)), large if is_prompt else most)
        num_tiles = batch * -(-rows // block_m)
        return (Part(block_m, num_tiles, num_tiles, is_prompt=is_prompt),)

    def all_sequences(block_m: int, is_prompt: bool) -> Part:
        busy = max(min(batch, tokens), -(-group * tokens // block_m))
        return Part(block_m, batch + group * tokens // block_m + 1, busy, is_prompt=is_prompt)

    longest = tokens if sizes.max_q_len is None else min(tokens, sizes.max_q_len)
    if sizes.max_q_len is None and tokens <= batch:
        longest = 1  # one token for each sequence, most likely
    few = group * longest <= LARGE_ROWS
    if latent or most == 16:
        return (all_sequences(most, False),)
    if few and not options.batch_invariant:
        return (all_sequences(min(max(16, next_power_of_2(group * longest)), most), False),)
    if batch == 1 and not options.batch_invariant:
        return (all_sequences(large, True),)
    # With `batch_invariant`, these sizes may not depend on the other sequences.
    small = min(max(16, next_power_of_2(group * FEW_TOKENS)), most, large // 2)
    tiles = group * tokens // large
    return (
        Part(small, batch, min(batch, tokens), (0, small)),
        Part(large, batch + tiles + 1, max(tiles, 1), (small + 1, ALL_ROWS), True),
    )


def _most_rows(signature: Signature, facts: DeviceFacts, small: bool) -> int:
    """Rows of the largest tile. Float32 products and wide values need many registers.

    Args:
        signature: of the call.
        facts: of the device.
        small: whether large tiles do not pay. If few keys are live, those of a small tile are fewer.
    """
    columns = _columns(signature, facts)
    if columns.wide:
        return 16
    if torch.float32 in signature.product_dtypes:
        return 32 if columns.loaded <= FLOAT32_COLUMNS else 16
    return LARGE_ROWS if columns.block_dv <= 128 and not small and not _is_narrow(signature) else SMALL_ROWS


def schedule(
    signature: Signature,
    sizes: Sizes,
    facts: DeviceFacts,
    options: DecodeOptions,
    loads: Loads = Loads.POINTERS,
    is_bounded: bool = False,
    fetches: bool = False,
    part: Part | None = None,
) -> Schedule:
    """Chooses tiles and splits for the longest sequence that the cache can hold.

    Args:
        signature: what the kernel is specialised to.
        sizes: batch, heads, longest sequence, query tokens.
        facts: of the device.
        options: choices of the caller.
        loads: how the caches can be loaded.
        is_bounded: whether few keys of a long cache may be live. Smaller blocks divide few keys better.
        fetches: whether the score_mod reads captured tensors for every key. A second program on each multiprocessor
            then works while the first one waits for these reads.
        part: the sequences of the launch; by default there is one launch.
    """
    columns, num_sms, latent = _columns(signature, facts), facts.num_sms, loads is Loads.LATENTS
    part = part or find_parts(signature, sizes, facts, options, latent, is_bounded)[0]
    num_items = part.num_tiles * sizes.num_kv_heads
    busy_items = part.busy_tiles * sizes.num_kv_heads
    total_bytes = busy_items * sizes.max_kv_len * columns.kv_bytes
    longest = -(-sizes.max_kv_len // (options.block_n or 64))
    balanced = _is_balanced(signature, part, sizes, facts, options, total_bytes, is_bounded)
    if options.num_splits:
        num_splits = options.num_splits
    elif balanced:
        num_splits = max(1, min((1 if latent else 2) * num_sms, busy_items * longest))
    elif options.batch_invariant:
        tiles_of_one = 1 if signature.packed else part.num_tiles // max(sizes.batch, 1)
        num_splits = 1 if part.row_range[0] > 0 else max(1, num_sms // max(sizes.num_kv_heads * tiles_of_one, 1))
    else:
        per_sm, fit = 2 if fetches and not is_bounded else 1, 1 if latent or part.block_m > SMALL_ROWS else 2
        num_splits = _num_splits(busy_items, longest, total_bytes, num_sms, per_sm, fit)
        if num_splits > 1:
            bytes_of_split = num_items * part.block_m * (signature.v_head_dim + 2) * 4
            num_splits = max(1, min(num_splits, MAX_WORKSPACE // bytes_of_split))
    crowded = balanced or (not options.batch_invariant and busy_items * num_splits > num_sms)
    # A latent cache has many query rows. Each row is wide and usually has few partial results.
    block_s = (4 if latent else 32) if balanced else _at_least(num_splits, (4, 32, 128))
    block_b = _at_least(sizes.batch, (32, 256, 1024)) if balanced else 0
    wanted = (
        signature, part.block_m, facts, options, is_bounded, crowded, balanced, num_splits > 1 or balanced,
        block_b, part.is_prompt,
    )  # fmt: skip
    tiles = _tiles(loads, *wanted, many=balanced and sizes.batch > 256)
    if tiles.loads is Loads.DESCRIPTORS and signature.page_size % tiles.block_n:
        tiles = _tiles(Loads.POINTERS, *wanted, many=balanced and sizes.batch > 256)
    return Schedule(tiles, num_items, num_splits, block_s, part.row_range)


def _at_least(number: int, choices: tuple[int, ...]) -> int:
    """The first of ascending choices that is at least the number; the last one if none is."""
    return next((choice for choice in choices if number <= choice), choices[-1])


def _is_balanced(
    signature: Signature,
    part: Part,
    sizes: Sizes,
    facts: DeviceFacts,
    options: DecodeOptions,
    total_bytes: int,
    is_bounded: bool,
) -> bool:
    """Whether all work is divided into equal runs. The caller can say so; by default it is if lengths may differ much.

    A second launch, for long sequences, has enough tiles to fill the device by itself.
    """
    if part.row_range[0] > 0:
        return False
    if options.schedule is not None or options.num_splits is not None or options.batch_invariant or is_bounded:
        return options.schedule == "balanced"
    return (
        any(signature.kind(name) is not None for name in ("kv_lens", "kv_starts", "cu_seqlens_k"))
        and sizes.batch > 1
        and total_bytes >= BALANCED_BYTES
        and sizes.max_kv_len >= BALANCED_LENGTH
        and 8 * part.busy_tiles <= facts.num_sms * sizes.batch
    )


class _Columns(NamedTuple):
    """What a signature says about the columns of tiles.

    Attributes:
        block_d, block_r, block_dv, shared: as in `Tiles`.
        kv_bytes: bytes of one key and its value in memory.
        tile_bytes: the same, where numbers are converted for the products.
        wide: whether columns are computed in parts.
    """

    block_d: int
    block_r: int
    block_dv: int
    shared: bool
    kv_bytes: int
    tile_bytes: int
    wide: bool

    @property
    def loaded(self) -> int:
        """Columns of a key and its value that a step has in registers."""
        return self.block_d + self.block_r + self.block_dv


@functools.lru_cache(maxsize=512)
def _columns(signature: Signature, facts: DeviceFacts) -> _Columns:
    block_d, block_r = _head_dim_blocks(signature.head_dim)
    block_dv = max(16, next_power_of_2(signature.v_head_dim))
    shared = signature.shared_kv and block_dv == block_d
    columns = block_d + block_r, 0 if shared else block_dv
    stored = signature.key_dtype, signature.value_dtype
    tiled = [x if x in QUANTISED else y for x, y in zip(stored, signature.product_dtypes, strict=True)]
    kv_bytes, tile_bytes = (
        sum(n * dtype.itemsize for n, dtype in zip(columns, of, strict=True)) for of in (stored, tiled)
    )
    is_float32 = torch.float32 in signature.product_dtypes
    wide = signature.head_dim > WHOLE_HEAD_DIM or signature.v_head_dim > WHOLE_V_HEAD_DIM
    if is_float32:
        wide = max(signature.head_dim, signature.v_head_dim) > FLOAT32_HEAD_DIM
    # Sixteen keys have to fit into the shared memory. Narrow products beside large ones would spill registers.
    wide = wide or 16 * tile_bytes >= facts.shared_memory or (_is_narrow(signature) and block_d + block_dv > 256)
    if wide:
        block_r, shared = 0, False
        block_d, block_dv = min(block_d, WIDE_BLOCK_D // (2 if is_float32 else 1)), min(block_dv, WIDE_BLOCK_DV)
    return _Columns(block_d, block_r, block_dv, shared, kv_bytes, tile_bytes, wide)


@functools.lru_cache(maxsize=512)
def _tiles(
    loads: Loads,
    signature: Signature,
    block_m: int,
    facts: DeviceFacts,
    options: DecodeOptions,
    is_bounded: bool,
    crowded: bool,
    balanced: bool,
    split: bool,
    block_b: int,
    is_prompt: bool,
    many: bool,
) -> Tiles:
    """The tiles of a call. Calls of many lengths share them.

    `crowded`: more programs than multiprocessors. `is_prompt`: as in `Part`.
    """
    is_float32, latent = torch.float32 in signature.product_dtypes, loads is Loads.LATENTS
    columns = _columns(signature, facts)
    block_d, block_r, block_dv, shared, _, tile_bytes, wide = columns
    # Measured on an H200: a crowded float32 kernel gains more from little shared memory.
    loads = Loads.POINTERS if is_float32 and crowded else loads
    paired = is_paired(signature, facts, options)
    num_warps = 8 if (block_m > SMALL_ROWS or block_m * block_dv >= 64 * 256) and not latent else 4
    if wide:
        # Triton pipelines the loop over the columns of a key. Without this loop it would keep whole values.
        num_stages = 2 if signature.head_dim > block_d else 1
        loads, block_n, num_warps = Loads.WIDE, 32 if is_float32 else 64, 8
    elif latent:
        block_n, num_stages = LATENT_BLOCK, 2  # one program fills a multiprocessor
    elif is_prompt and block_m >= SMALL_ROWS:
        block_n, num_stages = _prompt_pipeline(block_m, signature, tile_bytes, facts)
    else:
        block_n, num_stages = _pipeline(
            block_m, tile_bytes, is_float32, crowded, balanced, loads is not Loads.POINTERS, paired, facts
        )
        block_n = min(block_n, 64) if is_bounded else block_n
        # More keys would spill registers.
        if is_float32 and (_is_narrow(signature) or columns.loaded > FLOAT32_COLUMNS):
            block_n = min(block_n, 32)
        elif _is_narrow(signature):
            block_n = min(block_n, 64)
        if block_m < SMALL_ROWS:
            # Triton lets the four warps share the rows of a product that has no more columns than rows. Rows are too
            # few for that, and each warp would hold a whole tile of keys.
            block_dv = max(block_dv, 2 * block_m * (2 if paired else 1))
            block_d = max(block_d, block_dv) if shared else block_d
    return Tiles(
        block_m,
        options.block_n or block_n,
        block_d,
        block_r,
        block_dv,
        options.num_warps or num_warps,
        options.num_stages or num_stages,
        split=split,
        loads=loads,
        shared=shared,
        paired=paired,
        balanced=balanced,
        block_b=block_b,
        many=many,
    )


def is_paired(signature: Signature, facts: DeviceFacts, options: DecodeOptions) -> bool:
    """Whether the columns of a quantised cache are loaded two by two."""
    # Whether a cache is pairable may depend on where in memory a sequence lies, so batch_invariant forbids it.
    if not signature.pairable or not facts.can_unpack or options.batch_invariant:
        return False
    # A product takes at least 16 columns. A paired tile has two products of half the columns each.
    columns = _columns(signature, facts)
    return columns.block_r == 0 and columns.block_d >= 32 and not columns.wide and not _is_narrow(signature)


def _is_narrow(signature: Signature) -> bool:
    """Whether keys or values have fewer columns than the smallest product, which takes 16."""
    return min(signature.head_dim, signature.v_head_dim) < 16


def has_latent_kernel(signature: Signature, sizes: Sizes, facts: DeviceFacts, options: DecodeOptions) -> bool:
    """Whether `templates/latent.py` can compute a call: latents of 512 + 64 columns, many query rows per KV head."""
    widths = signature.shared_kv, signature.head_dim, signature.v_head_dim
    return (
        facts.has_warpgroups
        and has_gluon()
        and widths == (True, 576, 512)
        and (signature.packed or signature.group_size * sizes.num_queries > 32)
        and signature.key_dtype == signature.value_dtype == signature.dtype != torch.float32
        and signature.kind("k_scale") is signature.kind("v_scale") is None
        and signature.page_size % LATENT_BLOCK == 0
        and options.num_warps is None
        and options.num_stages is None
        and options.block_n in (None, LATENT_BLOCK)
    )


def _head_dim_blocks(head_dim: int) -> tuple[int, int]:
    """Columns of the first and the second load of a key, so that a large key is not padded to a power of two."""
    whole = max(16, next_power_of_2(head_dim))
    rest = head_dim - whole // 2
    if whole <= 128 or rest > whole // 4:
        return whole, 0
    return whole // 2, max(16, next_power_of_2(rest))


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
    # Seen in compiled kernels: shared memory holds stages - 1 tiles for pointer loads, half a tile or one tile more for
    # descriptors, and per row the query, the output and a few values per key.
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


def _num_splits(num_items: int, num_blocks: int, total_bytes: int, num_sms: int, per_sm: int, fit: int) -> int:
    """The number of splits with the shortest modelled time: bytes / reached bandwidth, plus the time of a combine.

    Up to `per_sm` programs per multiprocessor, the bandwidth grows with the number of programs. With more, programs run
    in waves of `fit` per multiprocessor, and a last wave that is not full wastes bandwidth.
    """
    if num_items == 0:
        return 1
    most = max(1, min(num_blocks, MAX_SPLITS, 4 * fit * num_sms // num_items + 1))
    best, reached = _best_split(num_items, most, num_sms, per_sm, fit)
    microseconds = total_bytes / BYTES_PER_US
    alone = microseconds / _reached(num_items, num_sms, per_sm, fit)
    return 1 if alone <= microseconds / reached + COMBINE_US else best


def _reached(programs: int, num_sms: int, per_sm: int, fit: int) -> float:
    """The share of the bandwidth that a number of programs reaches."""
    if programs <= per_sm * num_sms:
        return programs / (per_sm * num_sms)
    waves = -(-programs // (fit * num_sms))
    return 0.95 * (programs / (fit * num_sms * waves))


def forget_schedules() -> None:
    """Forgets the choices so far."""
    for choice in (_columns, _tiles, _best_split):
        choice.cache_clear()


@functools.lru_cache(maxsize=1024)
def _best_split(num_items: int, most: int, num_sms: int, per_sm: int, fit: int) -> tuple[int, float]:
    """The number of splits that reaches the largest share of the bandwidth, and that share."""
    # More programs are better until a wave is full. So the best number fills a wave, or is the largest possible.
    filling = [per_sm * num_sms, *[waves * fit * num_sms for waves in range(1, 6)]]
    tried = {most, *[min(max(1, programs // num_items), most) for programs in filling]}
    reached, splits = max((_reached(num_items * splits, num_sms, per_sm, fit), -splits) for splits in tried)
    return -splits, reached
