"""Tiles of caches that the copy engine loads. Programs share the shared memory of a multiprocessor."""

from __future__ import annotations

import torch

from .columns import find_columns, is_narrow, is_paired
from .device import RESERVED_SHARED, DeviceFacts
from .inputs import DecodeOptions
from .signature import Signature

# What the copy engine loads in a step, and what is on its way while a step is computed, by programs per multiprocessor.
STEP_BYTES = {1: 64 << 10, 2: 64 << 10, 3: 32 << 10, 4: 32 << 10}
BYTES_AHEAD = {1: 128 << 10, 2: 64 << 10, 3: 64 << 10, 4: 32 << 10}
MOST_STAGES = 5  # of those that were measured


def is_copied(signature: Signature, facts: DeviceFacts, options: DecodeOptions, is_special: bool) -> bool:
    """Whether keys and values that have descriptors are many 16-bit numbers, beside which products take little time.

    Args:
        signature: of the call.
        facts: of the device.
        options: choices of the caller.
        is_special: whether few keys are live, or many rows read the same keys.
    """
    columns = find_columns(signature, facts)
    return (
        not is_special
        and not columns.wide
        and not is_narrow(signature)
        and not is_paired(signature, facts, options)
        and torch.float32 not in signature.product_dtypes
        and 256 <= columns.tile_bytes <= 2048
    )


def most_copied(signature: Signature, facts: DeviceFacts, options: DecodeOptions, block_m: int) -> int:
    """How many programs of kernels that `is_copied` is true of can run on a multiprocessor at once."""
    tile_bytes = find_columns(signature, facts).tile_bytes
    fitting = [
        per_sm
        for per_sm in STEP_BYTES
        if _copies_bytes(block_m, options.block_n or _copied_keys(per_sm, tile_bytes), 2, tile_bytes)
        <= _share(per_sm, facts)
    ]
    return max(fitting, default=1)


def _copied_keys(per_sm: int, kv_bytes: int) -> int:
    """The keys of a step, a power of two."""
    return 1 << ((STEP_BYTES[per_sm] // kv_bytes).bit_length() - 1)


def _copies_bytes(block_m: int, block_n: int, stages: int, kv_bytes: int) -> int:
    """The shared memory of a program, as seen in compiled kernels: keys and values, the query and its weights."""
    return block_n * kv_bytes * (stages - 1) + block_m * (kv_bytes // 2 + 2 * block_n)


def _share(per_sm: int, facts: DeviceFacts) -> int:
    """The shared memory that each of some programs on a multiprocessor can have."""
    return (facts.shared_memory + RESERVED_SHARED) // per_sm - RESERVED_SHARED


def copy_pipeline(
    block_m: int, per_sm: int, kv_bytes: int, block_n: int | None, most_keys: int, facts: DeviceFacts
) -> tuple[int, int]:
    """Keys per step and pipeline depth for caches that the copy engine loads. The programs share the shared memory.

    Args:
        block_m: rows of a tile.
        per_sm: programs that are to run on a multiprocessor at once.
        kv_bytes: bytes of one key and its value.
        block_n: keys per step, if the caller chose them.
        most_keys: a limit for them otherwise, a power of two.
        facts: of the device.
    """
    if block_n is None:
        block_n = min(_copied_keys(per_sm, kv_bytes), most_keys)
    stages = min(max(2, 1 + BYTES_AHEAD[per_sm] // (block_n * kv_bytes)), MOST_STAGES)
    while stages > 2 and _copies_bytes(block_m, block_n, stages, kv_bytes) > _share(per_sm, facts):
        stages -= 1
    return block_n, stages
