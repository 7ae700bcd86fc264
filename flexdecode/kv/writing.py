"""Writes new keys and values into a cache on the device: by a kernel, or by PyTorch operations that do the same."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ..call.device import interpreting, without_autocast
from ..call.inputs import DTYPES
from ..call.packing import rows_of_sequences
from .launching import Sizes, is_dynamic, largest, launch


class Stored(NamedTuple):
    """The tensors of one layer that new tokens are written into.

    Attributes:
        key: `[num_pages, Hkv, page_size, D]`, any strides; a contiguous cache counts as pages of N tokens.
        value: `[num_pages, Hkv, page_size, Dv]`; None if values are the first columns of keys.
        k_scale, v_scale: None, or float32: a 0-d tensor, `[Hkv]`, or `[num_pages, Hkv, page_size]`, where the scales of
            new tokens are written.
        k_number, v_number: the scales of a quantised cache without such tensors.
    """

    key: torch.Tensor
    value: torch.Tensor | None
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    k_number: float = 1.0
    v_number: float = 1.0


class Growing(NamedTuple):
    """What the device knows about sequences that an append lengthens.

    Attributes:
        page_table: int32 `[B, max_pages]`; None if sequence b has page b.
        kv_lens: int32 `[B]`, the lengths.
        limits: int32 `[B]`, how long each sequence may become by a bounded append.
        arrivals: int32 `[B]`, zeros, with which the programs of a sequence find out which of them is the last.
    """

    page_table: torch.Tensor | None
    kv_lens: torch.Tensor
    limits: torch.Tensor
    arrivals: torch.Tensor


class Reserved(NamedTuple):
    """Where the new tokens of a step go.

    Attributes:
        page_table: as in `Growing`.
        starts, ends: int32 `[B]`, the positions of the new tokens of each sequence.
        cu_seqlens: int32 `[B + 1]`, where each sequence begins among the packed new tokens, and how many there are.
    """

    page_table: torch.Tensor | None
    starts: torch.Tensor
    ends: torch.Tensor
    cu_seqlens: torch.Tensor


def is_packed(k: object) -> bool:
    """Whether new tokens follow one another: `[T, Hkv, D]`."""
    return isinstance(k, torch.Tensor) and k.dim() == 3


def has_tokens(k: object) -> bool:
    """Whether new keys have as many dimensions as one of the forms of new tokens."""
    return isinstance(k, torch.Tensor) and k.dim() in (3, 4)


def by_kernel(key: torch.Tensor) -> bool:
    """Whether the kernels write into a cache; otherwise PyTorch operations do."""
    return key.is_cuda or interpreting()


def append_rows(
    stored: Stored, growing: Growing, k: torch.Tensor, v: torch.Tensor | None, bounded: bool, counts: list[int]
) -> None:
    """Appends tokens, and lengthens the sequences on the device.

    Args:
        stored: the cache.
        growing: its sequences.
        k: `[B, Hkv, T, D]`, checked.
        v: `[B, Hkv, T, Dv]`, checked; None if values are columns of keys.
        bounded: whether the device knows how many tokens each sequence takes, by `growing.limits`. Otherwise all.
        counts: how many tokens each sequence takes, for PyTorch operations.
    """
    key = stored.key
    if by_kernel(key):
        tensors = (k, v, *stored[:4], *growing)
        launch("append", tensors, (*stored[4:], bounded), lambda: _sizes_of_append(stored, growing, k, bounded))
        return
    added = torch.tensor(counts, dtype=torch.int32, device=key.device)
    b, token = (torch.arange(k.shape[2], device=key.device) < added[:, None]).nonzero(as_tuple=True)
    page, position = _find(stored, growing.page_table, b, growing.kv_lens[b] + token)
    _store(stored, k[b, :, token], None if v is None else v[b, :, token], page, position)
    growing.kv_lens.add_(added)


def _sizes_of_append(stored: Stored, growing: Growing, k: torch.Tensor, bounded: bool) -> Sizes:
    num_pages, heads, page_size, _ = stored.key.shape
    max_pages = 1 if growing.page_table is None else growing.page_table.shape[1]
    last = (k.shape[2], heads, num_pages, page_size, max_pages, int(bounded))
    return Sizes(stored[4:], len(growing.kv_lens), heads * k.shape[2], last)


def write_reserved(
    stored: Stored,
    reserved: Reserved,
    k: torch.Tensor,
    v: torch.Tensor | None,
    check: Callable[[], None],
    sequence: int | None = None,
) -> None:
    """Writes the tokens of a step to their positions.

    Args:
        stored: the cache.
        reserved: the positions.
        k: `[B, Hkv, T, D]`, or packed `[T, Hkv, D]`. Tokens that nothing is reserved for are not written.
        v: likewise; None if values are columns of keys.
        check: raises an error if the tensors do not match. It is called for tensors of a new layout.
        sequence: the sequence that all the tokens are of; `[1, Hkv, T, D]` or `[T, Hkv, D]`. By default, all sequences.
    """
    by_totals = k.dim() == 3 and sequence is None
    page_table, starts, ends, cu_seqlens = reserved
    if by_kernel(stored.key):
        tensors = (k, v, *stored[:4], page_table, None, starts, ends, cu_seqlens if by_totals else None)

        def sizes() -> Sizes:
            check()
            return _sizes_of_write(stored, page_table, k, len(starts), sequence)

        launch("write", tensors, (*stored[4:], sequence), sizes)
        return
    check()
    if by_totals:
        first, count = rows_of_sequences(cu_seqlens, len(k))
        new = torch.arange(int(first[0]), int(first[0] + count.sum()), device=k.device)
        b = torch.searchsorted(first + count, new, right=True)
        token = new - first[b]
    else:
        num_sequences, num_tokens = (1, len(k)) if k.dim() == 3 else (len(k), k.shape[2])
        new = torch.arange(num_sequences * num_tokens, device=k.device)
        b, token = new // max(num_tokens, 1) + (sequence or 0), new % max(num_tokens, 1)
    position = starts[b] + token
    taken = position < ends[b]
    page, position = _find(stored, page_table, b[taken], position[taken])
    _store(stored, _rows(k)[new[taken]], None if v is None else _rows(v)[new[taken]], page, position)


def _sizes_of_write(
    stored: Stored, page_table: torch.Tensor | None, k: torch.Tensor, batch: int, sequence: int | None
) -> Sizes:
    num_pages, heads, page_size, _ = stored.key.shape
    max_pages = 1 if page_table is None else page_table.shape[1]
    num_tokens, num_items = (len(k), len(k)) if k.dim() == 3 else (k.shape[2], len(k) * k.shape[2])
    halvings = (batch - 1).bit_length()
    last = (num_items, num_tokens, heads, num_pages, page_size, max_pages, sequence or 0, batch, halvings)
    return Sizes(stored[4:], 1, num_items * heads, last)


def write_to_slots(
    stored: Stored, slots: torch.Tensor, k: torch.Tensor, v: torch.Tensor | None, check: Callable[[], None]
) -> None:
    """Writes tokens to slots of the cache.

    Args:
        stored: the cache.
        slots: int32 or int64 `[T]`, page * page_size + offset. What is no slot of the cache is skipped.
        k: `[T or more, Hkv, D]`.
        v: likewise; None if values are columns of keys.
        check: raises an error if the tensors do not match. It is called for tensors of a new layout.
    """
    if by_kernel(stored.key):

        def sizes() -> Sizes:
            check()
            return _sizes_of_write(stored, None, k[: len(slots)], 1, None)

        launch("write", (k, v, *stored[:4], None, slots, None, None, None), stored[4:], sizes)
        return
    check()
    num_pages, _, page_size, _ = stored.key.shape
    inside = ((slots >= 0) & (slots < num_pages * page_size)).nonzero(as_tuple=True)[0]
    taken = slots[inside].long()
    _store(stored, k[inside], None if v is None else v[inside], taken // page_size, taken % page_size)


# --- In PyTorch operations --------------------------------------------------------------------------------------------


def _find(
    stored: Stored, page_table: torch.Tensor | None, b: torch.Tensor, position: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The pages of positions, and the positions in them."""
    if page_table is None:
        return b, position
    page_size = stored.key.shape[2]
    return page_table[b, position // page_size], position % page_size


def _rows(new: torch.Tensor) -> torch.Tensor:
    """New tokens as rows [n, Hkv, D], sequence by sequence."""
    return new if new.dim() == 3 else new.transpose(1, 2).flatten(0, 1)


@without_autocast()
def _store(stored: Stored, k: torch.Tensor, v: torch.Tensor | None, page: torch.Tensor, position: torch.Tensor) -> None:
    """Stores rows [n, Hkv, D] like `store_rows` of the kernels."""
    key, value, k_scale, v_scale, k_number, v_number = stored
    for x, cache, scale, number in ((k, key, k_scale, k_number), (v, value, v_scale, v_number)):
        if x is None or cache is None:  # values are columns of keys
            continue
        most = largest(cache.dtype)
        if most:
            x = x.float()
            if scale is None:
                divisor = torch.tensor(number, dtype=torch.float32, device=x.device)
            elif is_dynamic(scale):
                divisor = (x.abs().amax(-1) + (x * 0).sum(-1)) / most
                divisor = divisor.where(divisor != 0, 1.0)
                scale[page, :, position] = divisor
            else:
                divisor = scale
            x = (x / divisor[..., None]).clamp(-most, most)
            x = x.round() if cache.dtype == torch.int8 else x
        cache[page, :, position] = x.to(cache.dtype)


# --- Checks -----------------------------------------------------------------------------------------------------------


def check_new(
    k: torch.Tensor, v: torch.Tensor | None, key: torch.Tensor, value: torch.Tensor | None, batch: int | None
) -> int:
    """Refuses new keys or values that do not match those in a cache; returns how many tokens there are.

    Args:
        k: the new keys.
        v: the new values; None if the cache has none.
        key: the keys in the cache, of one layer.
        value: the values there; None if they are columns of the keys.
        batch: the sequences that new tokens `[B, Hkv, T, D]` are of; None if the tokens are packed.

    Raises:
        TypeError: one is no tensor.
        ValueError: a shape, a dtype or a device does not match.
    """
    if value is None and v is not None:
        raise ValueError("`v` must be left out: the values of this cache are the first columns of its keys")
    for name, new, cache in (("k", k, key), ("v", v, value)):
        if cache is None:
            continue
        if not isinstance(new, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(new).__name__}")
        (_, heads, _, width), D = cache.shape, "D" if name == "k" else "Dv"
        if batch is None:
            fits, form = new.dim() == 3 and new.shape[1:] == (heads, width), f"[T, Hkv, {D}] = [T, {heads}, {width}]"
        else:
            fits = new.dim() == 4 and (*new.shape[:2], new.shape[3]) == (batch, heads, width)
            form = f"[B, Hkv, T, {D}] = [{batch}, {heads}, T, {width}]"
        if not fits:
            raise ValueError(f"`{name}` must have shape {form}, got {list(new.shape)}")
        if new.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be float16, bfloat16 or float32, got {new.dtype}")
        if new.device != cache.device or new.layout != torch.strided:
            raise ValueError(f"`{name}` must be a dense tensor on {cache.device}, got {new.layout} on {new.device}")
        check_gradient(name, new)
    at = 2 if k.dim() == 4 else 0
    if v is not None and v.shape[at] != k.shape[at]:
        raise ValueError(f"`v` must have as many tokens as `k`, T = {k.shape[at]}, got {v.shape[at]}")
    return k.shape[at]


def check_gradient(name: str, new: object) -> None:
    """Refuses a tensor whose gradient would be lost."""
    if isinstance(new, torch.Tensor) and new.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"`{name}` requires grad, but a cache keeps none: append under torch.no_grad()")
