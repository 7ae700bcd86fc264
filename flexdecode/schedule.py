"""How a call is cut into tiles and programs: plain integers, from the signature and the facts of the device."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from .signature import DecodeOptions, Signature, Sizes

MAX_SPLITS = 1024


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
        """Whether a kernel can start before the one ahead of it has finished."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def has_descriptors(self) -> bool:
        """Whether the device copies tiles by tensor descriptors."""
        return self.has_pdl


@dataclass(frozen=True)
class Tiles:
    """The compile-time half of a schedule; one kernel per value.

    `descriptors` chooses KV loads through tensor descriptors instead of pointers.
    """

    block_m: int
    block_n: int
    block_d: int
    block_dv: int
    num_warps: int
    num_stages: int
    split: bool
    descriptors: bool


@dataclass(frozen=True)
class Schedule:
    """Tiles and grid of a call.

    Attributes:
        tiles: compile-time sizes.
        num_items: (sequence, KV head, row tile) triples.
        num_splits: programs per item.
    """

    tiles: Tiles
    num_items: int
    num_splits: int


def next_power_of_2(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def schedule(
    signature: Signature, sizes: Sizes, facts: DeviceFacts, options: DecodeOptions, describable: bool = False
) -> Schedule:
    """Chooses tiles and splits for the longest sequence that the cache can hold.

    Args:
        signature: what the kernel is specialised to.
        sizes: batch, heads, longest sequence.
        facts: of the device.
        options: choices of the caller.
        describable: whether both caches can be seen through tensor descriptors.
    """
    rows = signature.group_size * signature.num_queries
    itemsize = signature.dtype.itemsize
    wide = signature.dtype == torch.float32
    block_m = min(max(16, next_power_of_2(rows)), 32 if wide else 64)
    block_d, block_dv = max(16, next_power_of_2(signature.head_dim)), max(16, next_power_of_2(signature.v_head_dim))
    num_items = sizes.batch * sizes.num_kv_heads * -(-rows // block_m)
    block_n, num_stages = _pipeline(block_d + block_dv, itemsize, facts)
    block_n = options.block_n or block_n
    num_blocks = max(1, -(-sizes.max_kv_len // block_n))
    num_splits = options.num_splits or _num_splits(num_items, num_blocks, facts.num_sms)
    tiles = Tiles(
        block_m,
        block_n,
        block_d,
        block_dv,
        options.num_warps or 4,
        options.num_stages or num_stages,
        split=num_splits > 1,
        descriptors=facts.has_descriptors and describable,
    )
    return Schedule(tiles, num_items, num_splits)


def _pipeline(width: int, itemsize: int, facts: DeviceFacts) -> tuple[int, int]:
    """Keys per step and pipeline depth: the largest that leave shared memory for the rest."""
    stages = 3 if facts.backend == "cuda" else 2
    budget = facts.shared_memory - 16 * 1024
    block_n = 128
    while block_n > 16 and block_n * width * itemsize * stages > budget:
        block_n //= 2
    return block_n, stages


def _num_splits(num_items: int, num_blocks: int, num_sms: int) -> int:
    """Splits that give every multiprocessor about one program, and no program less than one block."""
    if num_items == 0 or num_items >= num_sms:
        return 1
    return max(1, min(num_sms // num_items, num_blocks, MAX_SPLITS))
