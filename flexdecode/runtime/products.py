"""The two products of attention in PyTorch operations: of a query with keys, and of weights with values.

A cache that is converted, scaled or gathered is read in pieces, so that what is made of a piece stays in a cache of the
CPU until it is multiplied.
"""

from __future__ import annotations

import functools
import math
from itertools import product
from typing import NamedTuple

import torch

from ..call.formats import WHOLE, Gather, Piece
from .evaluation import indexed

PIECE_ELEMENTS = 1 << 19  # numbers of a piece, for each thread of a CPU: 2 MiB in float32
_ON_OTHER_DEVICES = 1 << 24  # there, a piece takes several launches


class Chunk(NamedTuple):
    """Some slots of the cache, and who reads them.

    Attributes:
        gather: gives pieces of their rows.
        is_contiguous: whether it gives views of the cache, if each sequence has one row of query tokens.
        read: bool that broadcasts to [R, Hkv, n]; where it is false, the cache may hold anything. None if nowhere.
        owner: the sequence of each of the R rows of query tokens, int64 [R], if it is not its own number.
        num_rows: R.
        num_slots: n.
    """

    gather: Gather
    is_contiguous: bool
    read: torch.Tensor | None
    owner: torch.Tensor | None
    num_rows: int
    num_slots: int


class Cached:
    """Keys or values of a chunk, as a product reads them.

    Attributes:
        shape: R, Hkv, n, D. The first is 1 if all rows share them.
        dtype: of the product.
        is_stored: whether the product can take the cache as it is.
    """

    def __init__(
        self, chunk: Chunk, cache: torch.Tensor, scale: float | torch.Tensor | None, dtype: torch.dtype
    ) -> None:
        """Nothing is read yet.

        Args:
            chunk: which part of them.
            cache: keys or values of the call.
            scale: what they are multiplied by, as in the call.
            dtype: of the product.
        """
        gather, is_contiguous, read, owner, count, num_slots = chunk
        if isinstance(scale, torch.Tensor) and scale.dim() == 2:
            scale = scale if owner is None else scale[owner]
        elif is_contiguous and cache.shape[0] == 1 and read is None:
            count = 1
        self.cache, self.gather, self.read, self.scale, self.dtype = cache, gather, read, scale, dtype
        self.converted: torch.Tensor | None = None  # memory for pieces
        self.shape = count, cache.shape[1], num_slots, cache.shape[3]
        is_view = is_contiguous and (owner is None or cache.shape[0] == 1) and scale is None and read is None
        # PyTorch copies other batches of bfloat16 matrices.
        is_dense = dtype != torch.bfloat16 or (num_slots == cache.shape[2] and cache.is_contiguous())
        self.is_stored = is_view and cache.dtype == dtype and is_dense

    def pieces(self) -> list[Piece]:
        """What is read at one time."""
        if self.is_stored:
            return [WHOLE]
        *sizes, width = self.shape
        cpu = self.cache.device.type == "cpu"
        most = (PIECE_ELEMENTS * torch.get_num_threads() if cpu else _ON_OTHER_DEVICES) // max(1, width)
        if math.prod(sizes) <= most:
            return [WHOLE]
        steps = [0, 0, 0]
        if self.dtype == torch.bfloat16:  # each product is rounded, so it sums over all slots
            steps[2] = sizes[2]
            most //= sizes[2]
        for dim in sorted(range(3), key=self.cache.stride):  # what lies together is read together
            if not steps[dim]:
                steps[dim] = max(1, min(sizes[dim], most))
                most //= steps[dim]
        cuts = [
            [slice(start, start + step) for start in range(0, size, step)]
            for size, step in zip(sizes, steps, strict=True)
        ]
        return [Piece(*cut) for cut in product(*cuts)]

    def rows(self, piece: Piece) -> torch.Tensor:
        """A piece in the type of the product; 0 where nothing may be read. The next piece may overwrite it."""
        rows = indexed(self.cache, lambda cache: self.gather(cache, piece))
        if rows.dtype != self.dtype:
            if self.converted is None:  # the first piece is the largest
                self.converted = torch.empty(rows.numel(), dtype=self.dtype, device=rows.device)
            rows = self.converted[: rows.numel()].view(rows.shape).copy_(rows)
        scale = self.scale
        if isinstance(scale, torch.Tensor):
            if scale.dim() == 3:
                scale = self.gather(scale, piece)[..., None]
            elif scale.dim():
                scale = _part(scale, piece[2 - scale.dim() : 2])[..., None, None]
            scale = scale.to(self.dtype)
        if scale is not None:
            rows = rows * scale
        return rows if self.read is None else torch.where(_part(self.read, piece)[..., None], rows, 0.0)


def _part(tensor: torch.Tensor, piece: tuple[slice, ...]) -> torch.Tensor:
    """A piece of a tensor whose dimensions of size 1 stand for all sizes."""
    return tensor[tuple(slice(None) if size == 1 else cut for size, cut in zip(tensor.shape, piece, strict=True))]


def scores(query: torch.Tensor, keys: Cached) -> torch.Tensor:
    """The products of a query with keys.

    Args:
        query: [R, Hkv, M, D], in the type of the arithmetic.
        keys: of n slots.

    Returns:
        [R, Hkv, M, n]
    """
    rows = _together(query, keys)
    pieces = keys.pieces()
    if len(pieces) == 1:
        found = rows @ keys.rows(WHOLE).mT
    else:
        found = rows.new_empty(*rows.shape[:3], keys.shape[2])
        for piece in pieces:
            sequences, heads, slots = piece
            found[sequences, heads, :, slots] = rows[sequences, heads] @ keys.rows(piece).mT
    return _apart(found, query)


def weighted(weights: torch.Tensor, total: torch.Tensor, values: Cached) -> torch.Tensor:
    """The sums of values with some weights.

    If the product is in another type than the weights, these are rounded to it, relative to their sum. Its results are
    rounded once, too.

    Args:
        weights: [R, Hkv, M, n], in the type of the arithmetic.
        total: their sums, [R, Hkv, M, 1].
        values: of n slots.

    Returns:
        [R, Hkv, M, Dv], in the type of the arithmetic.
    """
    dtype = weights.dtype
    if dtype != values.dtype:
        weights = (weights / total.clamp(min=torch.finfo(dtype).tiny)).to(values.dtype)
    rows = _together(weights, values)
    pieces = values.pieces()
    if len(pieces) == 1:
        found = (rows @ values.rows(WHOLE)).to(dtype)
    else:
        found = rows.new_zeros(*rows.shape[:3], values.shape[3], dtype=dtype)
        for piece in pieces:
            sequences, heads, slots = piece
            found[sequences, heads] += rows[sequences, heads, :, slots] @ values.rows(piece)
    found = _apart(found, weights)
    return found if dtype == values.dtype else found * total


def product_dtype(query: torch.Tensor, value: torch.Tensor, dtype: torch.dtype) -> torch.dtype:
    """The type in which weights and values are multiplied.

    It is bfloat16 if both query and value are, the CPU has such products, and the values are more than half a piece.
    Fewer values are converted in less time than their weights.

    Args:
        query: of the call.
        value: of the call.
        dtype: of the arithmetic.
    """
    is_half = query.dtype == value.dtype == torch.bfloat16 and query.device.type == "cpu"
    return torch.bfloat16 if is_half and 2 * value.numel() > PIECE_ELEMENTS and _multiplies_bfloat16() else dtype


@functools.cache
def _multiplies_bfloat16() -> bool:
    """Whether PyTorch has products of bfloat16 for this CPU that sum in float32. Elsewhere it has slow loops."""
    return torch.backends.mkldnn.is_available() and "AVX512" in torch.backends.cpu.get_cpu_capability()


def _together(rows: torch.Tensor, cached: Cached) -> torch.Tensor:
    """Rows [R, Hkv, M, ...] as [1, Hkv, R * M, ...] if they share the cache; else PyTorch would copy it R times."""
    return rows if rows.shape[0] == cached.shape[0] else rows.transpose(0, 1).flatten(1, 2)[None]


def _apart(rows: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    """Undoes `_together`."""
    return rows if rows.shape[0] == like.shape[0] else rows[0].unflatten(1, (like.shape[0], -1)).transpose(0, 1)
