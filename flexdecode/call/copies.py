"""Tiles of caches that the copy engine loads. Programs share the shared memory of a multiprocessor."""

from __future__ import annotations

from typing import NamedTuple

import torch

from .columns import find_columns, is_narrow, is_paired, least_columns
from .device import RESERVED_SHARED, DeviceFacts
from .inputs import DecodeOptions
from .signature import Signature

# What is on its way while a step is computed, by programs per multiprocessor.
BYTES_AHEAD = {1: 128 << 10, 2: 64 << 10, 3: 64 << 10, 4: 32 << 10}
MOST_STAGES = 5  # of those that were measured
LEAST_PAGE = 64  # tokens: a copy does not cross pages, and shorter steps take longer than loads through pointers


class Steps(NamedTuple):
    """What the steps of a program take, as far as registers and shared memory allow it.

    Attributes:
        bytes_by: what the copy engine loads in a step, by the number of programs on a multiprocessor. There are never
            more than that.
        fewest_keys, most_keys: of a step, powers of two.
        query_parts: in how many parts the query lies in shared memory. Its weights take two bytes each for each part.
    """

    bytes_by: dict[int, int]
    fewest_keys: int
    most_keys: int
    query_parts: int


HALF_STEPS = Steps({1: 64 << 10, 2: 64 << 10, 3: 32 << 10, 4: 32 << 10}, 1, 256, 1)
# A step of float32 numbers takes long, so shorter ones end sooner. Each of four warps has the eight keys that a product
# takes.
FLOAT32_STEPS = Steps({1: 64 << 10, 2: 32 << 10, 3: 32 << 10}, 32, 128, 2)
# With more than 16 rows, more scores would spill registers.
HALF_STEPS_OF_ROWS = HALF_STEPS._replace(most_keys=128)
FLOAT32_STEPS_OF_ROWS = Steps({1: 32 << 10, 2: 32 << 10}, 32, 64, 2)


def steps_of(signature: Signature, facts: DeviceFacts, block_m: int) -> Steps:
    """What the steps of a call with tiles of so many rows take, if `is_copied` is true of it."""
    if not signature.is_float32:
        return HALF_STEPS if block_m <= 16 else HALF_STEPS_OF_ROWS
    if block_m <= 16:
        return FLOAT32_STEPS
    is_wide = find_columns(signature, facts).loaded > 128
    return FLOAT32_STEPS_OF_ROWS._replace(most_keys=32) if is_wide else FLOAT32_STEPS_OF_ROWS


def is_copied(signature: Signature, facts: DeviceFacts, options: DecodeOptions, is_special: bool) -> bool:
    """Whether the copy engine loads many numbers in a step, if keys and values have descriptors.

    Args:
        signature: of the call.
        facts: of the device.
        options: choices of the caller.
        is_special: whether few keys are live, or many rows read the same keys.
    """
    columns = find_columns(signature, facts)
    with_keys, with_values = (dtype == torch.float32 for dtype in signature.product_dtypes)
    return (
        not is_special
        and not columns.wide
        and not is_narrow(signature)
        and not is_paired(signature, facts, options)
        and with_keys == with_values
        and 256 <= columns.tile_bytes <= 2048
        and signature.page_size % (options.block_n or LEAST_PAGE) == 0
    )


def copied_bytes(signature: Signature, facts: DeviceFacts, block_m: int) -> int:
    """The bytes of a key and its value in a tile with so many rows."""
    columns = find_columns(signature, facts)
    more = max(0, least_columns(block_m) - columns.block_dv)
    return columns.tile_bytes + more * signature.product_dtypes[0 if columns.shared else 1].itemsize


def most_copied(signature: Signature, facts: DeviceFacts, options: DecodeOptions, block_m: int) -> int:
    """How many programs of kernels that `is_copied` is true of can run on a multiprocessor at once."""
    tile_bytes, steps = copied_bytes(signature, facts, block_m), steps_of(signature, facts, block_m)
    fitting = [
        per_sm
        for per_sm in steps.bytes_by
        if _copies_bytes(block_m, options.block_n or _copied_keys(per_sm, tile_bytes, steps), 2, tile_bytes, steps)
        <= _share(per_sm, facts)
    ]
    return max(fitting, default=1)


def _copied_keys(per_sm: int, tile_bytes: int, steps: Steps) -> int:
    """The keys of a step, a power of two."""
    return max(steps.fewest_keys, 1 << ((steps.bytes_by[per_sm] // tile_bytes).bit_length() - 1))


def _copies_bytes(block_m: int, block_n: int, stages: int, tile_bytes: int, steps: Steps) -> int:
    """The shared memory of a program, as seen in compiled kernels: keys and values, the query and its weights."""
    return block_n * tile_bytes * (stages - 1) + block_m * steps.query_parts * (tile_bytes // 2 + 2 * block_n)


def _share(per_sm: int, facts: DeviceFacts) -> int:
    """The shared memory that each of some programs on a multiprocessor can have."""
    return (facts.shared_memory + RESERVED_SHARED) // per_sm - RESERVED_SHARED


def copy_pipeline(
    block_m: int, per_sm: int, tile_bytes: int, steps: Steps, block_n: int | None, most_keys: int, facts: DeviceFacts
) -> tuple[int, int]:
    """Keys per step and pipeline depth for caches that the copy engine loads. The programs share the shared memory.

    Args:
        block_m: rows of a tile.
        per_sm: programs that are to run on a multiprocessor at once.
        tile_bytes: of one key and its value.
        steps: of the kernel.
        block_n: keys per step, if the caller chose them.
        most_keys: a limit for them otherwise, a power of two.
        facts: of the device.
    """
    if block_n is None:
        block_n = min(_copied_keys(per_sm, tile_bytes, steps), most_keys)
    stages = min(max(2, 1 + BYTES_AHEAD[per_sm] // (block_n * tile_bytes)), MOST_STAGES)
    while stages > 2 and _copies_bytes(block_m, block_n, stages, tile_bytes, steps) > _share(per_sm, facts):
        stages -= 1
    return block_n, stages
