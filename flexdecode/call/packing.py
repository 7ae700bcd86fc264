"""Packed rows: the tokens of all sequences one after another, and the running totals that say where each begins."""

from __future__ import annotations

import torch


def rows_of_sequences(cu_seqlens: torch.Tensor, most: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The first row of each sequence and its number of rows, int64 [B].

    Sequence b owns the rows from `start = min(max(cu_seqlens[b], 0), most)` up to
    `min(max(cu_seqlens[b + 1], start), most)`. Kernels clamp in the same way, so nothing outside is accessed.

    Args:
        cu_seqlens: int32 [B + 1], at least one entry.
        most: all rows.
    """
    cu_seqlens = cu_seqlens.long()
    start = cu_seqlens[:-1].clamp(0, most)
    return start, cu_seqlens[1:].maximum(start).clamp(max=most) - start


def check_ascending(name: str, cu_seqlens: torch.Tensor) -> None:
    """Checks that no sequence ends before it begins. This reads the tensor.

    Raises:
        ValueError: one does.
    """
    falls = (cu_seqlens.diff() < 0).nonzero()
    if len(falls):
        at = int(falls[0])
        before, after = cu_seqlens[at : at + 2].tolist()
        raise ValueError(
            f"`{name}` must ascend, got {before} and then {after} at entry {at + 1}: it holds the running "
            "total of the lengths"
        )
