"""The oracle: attention as its definition says, in float64 on the CPU, from the user's own functions.

It calls `score_mod` and `mask_mod` themselves at every position (0-d indices under nested `torch.vmap`) and shares no
code with the tracer or the backends, so a result that agrees with it is right for the right reason.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["dequantized_rows", "evaluate_mod", "reference_decode"]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """PyTorch on the CPU, without gradients and whatever autocast or default device the caller has set."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


@_plainly()
def reference_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    kv_lens: int | torch.Tensor | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    page_table: torch.Tensor | None = None,
    q_lens: int | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    kv_starts: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `softmax(mask(score_mod(query @ key^T * scale))) @ value` over the live keys.

    Args:
        query: `[B, Hq, Q, D]`, any floating dtype and device.
        key: `[B or 1, Hkv, N, D]`, any dtype; query head `h` reads head `h // (Hq // Hkv)`.
        value: `[B or 1, Hkv, N, Dv]`.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`; natural-log units, absolute positions.
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`; where it is false the score becomes `-inf`.
        kv_lens: `[B]` integers, or one for all; the live keys of sequence `b` are rows `kv_starts[b] ..
            min(kv_lens[b], N) - 1`. Default: N.
        q_offset: position of query row 0, `[B]` or one for all. Default: the last token has the position of the last
            key, `kv_offset[b] + min(kv_lens[b], N) - q_lens[b]`.
        scale: factor on the dot products. Default: `1 / sqrt(D)`.
        page_table: `[B, max_pages]` integers. Then key is `[num_pages, Hkv, page_size, D]` and value likewise; row
            `n` of sequence `b` is row `n % page_size` of page `page_table[b, n // page_size]`, `N` is
            `max_pages * page_size`, and `kv_lens` is needed. Entries without a key that any row attends to are not
            read.
        q_lens: `[B]` integers, or one for all; the tokens of sequence `b` are query rows `0 .. min(q_lens[b], Q) - 1`.
            Default: Q.
        k_scale: factor on the stored keys: a number or 0-d tensor, `[Hkv]`, `[B, Hkv]`, or per key in the layout of
            `key` without its last dimension. Default: 1.
        v_scale: the same for the values.
        sinks: `[Hq]` logits, natural-log units, after scale and mods: the softmax denominator of head `h` gains
            `exp(sinks[h])`.
        kv_starts: `[B]` integers, or one for all; keys before this row of the cache are not live. Default: 0.
        kv_offset: `[B]` integers, or one for all; mods see row `n` of sequence `b` at position `n + kv_offset[b]`.
            Default: 0.
        return_lse: also return the natural log of the softmax denominator.

    Returns:
        The output `[B, Hq, Q, Dv]` and, if asked for, lse `[B, Hq, Q]`; float64 on the CPU. A row without a live key is
        0 with lse `-inf`, or `sinks[h]`; one past `q_lens[b]` is 0 with lse `-inf`. A row with a NaN score at a live
        position is NaN. Keys that the mask rules out for every row that shares them may hold anything.

    Raises:
        ValueError: a `page_table` without `kv_lens`.
        IndexError: an entry of `page_table` with such a key is not the number of a page.
    """
    if page_table is not None and kv_lens is None:
        raise ValueError("`page_table` needs `kv_lens`")
    (B, Hq, Q, D), (_, Hkv, N, Dv) = query.shape, value.shape
    N *= 1 if page_table is None else page_table.shape[1]
    rows = Hq // Hkv * Q  # The query rows that share a key head.
    scale = D**-0.5 if scale is None else scale
    lens = _per_sequence(N if kv_lens is None else kv_lens, B).clamp(0, N)
    tokens = _per_sequence(Q if q_lens is None else q_lens, B).clamp(0, Q)
    starts = _per_sequence(0 if kv_starts is None else kv_starts, B)
    shift = _per_sequence(0 if kv_offset is None else kv_offset, B)
    first = shift + lens - tokens if q_offset is None else _per_sequence(q_offset, B)

    out = torch.zeros(B, Hq, Q, Dv, dtype=torch.float64)
    lse = torch.full((B, Hq, Q), -torch.inf, dtype=torch.float64)
    for batch in range(B):
        # Nothing below can see what lies past these lengths.
        n, m = int(lens[batch]), int(tokens[batch])
        slots = torch.arange(n)
        grid = torch.tensor([batch]), torch.arange(Hq), first[batch] + torch.arange(Q), shift[batch] + slots
        live = (slots >= starts[batch]).expand(Hq, Q, n)
        if mask_mod is not None:
            live = live & evaluate_mod(mask_mod, grid)[0]
        read = live[:, :m].reshape(Hkv, Hq // Hkv * m, n).any(1)  # What no row attends to is not read: it may be NaN.
        q = query[batch].to("cpu", torch.float64).reshape(Hkv, rows, D)
        k = dequantized_rows(key, k_scale, batch, n, page_table, read=read)
        v = dequantized_rows(value, v_scale, batch, n, page_table, read=read)

        score = (q @ k.mT).reshape(Hq, Q, n) * scale
        if score_mod is not None:
            score = evaluate_mod(score_mod, grid, score[None])[0]
        score = score.where(live, -torch.inf)
        # The sink is one more score, without a value.
        sink = torch.full((Hq,), -torch.inf) if sinks is None else sinks.to("cpu")
        score = torch.cat([score, sink.double()[:, None, None].expand(Hq, Q, 1)], dim=-1)
        # Relative to the largest score: beside 1e30 even float64 has no digits left for the logarithm of a sum.
        largest = score.amax(dim=-1)
        # A row without a live key keeps finite arithmetic: exp(-inf - 0) = 0.
        weight = (score - largest.where(largest != -torch.inf, 0.0)[..., None]).exp()
        total = weight.sum(dim=-1)
        values = (weight[..., :n].reshape(Hkv, rows, n) @ v).reshape(Hq, Q, Dv)
        out[batch] = values / total.where(total != 0, 1.0)[..., None]
        lse[batch] = (largest + total.log()).where(largest != torch.inf, torch.inf)
        out[batch, :, m:], lse[batch, :, m:] = 0.0, -torch.inf
    return (out, lse) if return_lse else out


def _per_sequence(numbers: Any, batch: int) -> torch.Tensor:
    """Integers `[B]` or one for all as int64 `[B]`."""
    return torch.as_tensor(numbers).to("cpu", torch.int64).expand(batch)


def dequantized_rows(
    cache: torch.Tensor,
    scale: float | torch.Tensor | None,
    batch: int,
    length: int,
    page_table: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
    read: torch.Tensor | None = None,
) -> torch.Tensor:
    """Reads the first keys or values of one sequence as numbers: what is stored times its scale.

    Args:
        cache: `[B or 1, Hkv, N, D]`, or with a page table `[num_pages, Hkv, page_size, D]`; any dtype and device.
        scale: a number, `[Hkv]`, `[B, Hkv]`, or `cache.shape[:-1]` with a batch that may be 1. None: 1.
        batch: the sequence.
        length: how many rows to read.
        page_table: `[B, max_pages]` integers.
        dtype: the floating type of the arithmetic.
        read: `[Hkv, length]` bools, which rows to read; the others are 0, whatever the cache holds. None: all.

    Returns:
        `[Hkv, length, D]` of type `dtype`, on the CPU.

    Raises:
        IndexError: a page that is to be read does not exist.
    """
    read = torch.ones(cache.shape[1], length, dtype=torch.bool) if read is None else read
    used = read.any(0)
    rows = _sequence(cache, batch, used, page_table).to(dtype)
    if scale is not None:
        factor = torch.as_tensor(scale, dtype=dtype, device="cpu")
        if factor.ndim == 3:
            rows = rows * _sequence(factor, batch, used, page_table)[..., None]
        else:
            rows = rows * (factor[batch] if factor.ndim == 2 else factor).reshape(-1, 1, 1)
    return rows.where(read[..., None], 0.0)


def _sequence(cache: torch.Tensor, batch: int, used: torch.Tensor, page_table: torch.Tensor | None) -> torch.Tensor:
    """The first rows of one sequence of a cache `[B or 1, Hkv, N, ...]` or `[num_pages, Hkv, page_size, ...]`.

    Pages none of whose rows is `used` [length] are not followed.
    """
    length = len(used)
    if page_table is None:
        return cache[0 if len(cache) == 1 else batch, :, :length].cpu()
    page_size = cache.shape[2]
    pages = page_table[batch, : -(-length // page_size)].tolist()
    followed = [page if used[i * page_size :][:page_size].any() else None for i, page in enumerate(pages)]
    if not all(page is None or 0 <= page < len(cache) for page in followed):
        raise IndexError(f"sequence {batch} has pages {pages}, but there are {len(cache)}")
    unread = cache.new_zeros(cache.shape[1:])
    rows = [unread if page is None else cache[page] for page in followed]
    return torch.cat([unread[:, :0], *rows], dim=1)[:, :length].cpu()


def evaluate_mod(
    mod: Callable[..., Any],
    grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    score: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Calls a mod at every position of a grid, each argument a 0-d tensor.

    Args:
        mod: a score_mod if `score` is given, else a mask_mod.
        grid: the values of `b` [B], `h` [Hq], `q_idx` [Q] and `kv_idx` [N]; int64, on the CPU.
        score: scores `[B, Hq, Q, N]`, already scaled.
        dtype: the type that floating captures widen to and that `int / int` gives.

    Returns:
        `[B, Hq, Q, N]`: scores of type `dtype`, or bools.
    """
    result_dtype = torch.bool if score is None else dtype
    scores = () if score is None else (score.to(dtype),)
    if 0 in map(len, grid):  # torch.vmap takes no empty axis.
        return torch.empty([len(axis) for axis in grid], dtype=result_dtype)

    def at_one_position(*arguments: torch.Tensor) -> torch.Tensor:
        with _InMod(dtype):
            result = mod(*arguments)
        if isinstance(result, (bool, int, float)):
            return torch.as_tensor(result, dtype=result_dtype)
        return torch.as_tensor(result).to("cpu", result_dtype)

    over_grid: Callable[..., torch.Tensor] = at_one_position
    for axis in (3, 2, 1, 0):
        in_dims = [0] * len(scores) + [0 if i == axis else None for i in range(4)]
        over_grid = torch.vmap(over_grid, in_dims=tuple(in_dims))
    with _plainly():
        return over_grid(*scores, *grid)


_CONVERSIONS = {"to", "type", "type_as", "float", "half", "double", "bfloat16", "view", "_to_copy"}


class _InMod(TorchFunctionMode):
    """What differs from plain PyTorch inside a mod.

    Captures come to the CPU, widen, and are indexed without faults. `dtype` takes the place of PyTorch's default dtype,
    which belongs to the whole process.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.rounded: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # An attribute: shape, dtype, device, T.
            return func(*args)
        # `x.to(other)` takes its type from `other` as it is.
        args = (self._widen(args[0]), *args[1:]) if name in ("to", "type_as") else _mapped(self._widen, args)
        kwargs = _mapped(self._widen, kwargs or {})
        result = _read(*args) if name == "__getitem__" else self._call(func, name, args, kwargs)
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float16, torch.bfloat16):
            self.rounded.append(result)  # Only an explicit cast gives these: PyTorch's type rules hold from here on.
        return result

    def _call(self, func: Any, name: str, args: Any, kwargs: Any) -> Any:
        """Calls a function; where the default dtype decided the type of its result, again so that `dtype` does."""
        result = func(*args, **kwargs)
        leaves: list[Any] = []
        _mapped(leaves.append, (args, kwargs))
        typed = any(isinstance(x, torch.dtype) or (torch.is_tensor(x) and x.is_floating_point()) for x in leaves)
        by_default = isinstance(result, torch.Tensor) and result.is_floating_point() and result.dtype != self.dtype
        if typed or not by_default or name in _CONVERSIONS:
            return result
        with contextlib.suppress(TypeError, RuntimeError):  # what has no such argument
            made = func(*args, **kwargs, dtype=self.dtype)
            if isinstance(made, torch.Tensor):  # of Python numbers
                return made
        for kind in (torch.Tensor, float):  # the latter for Python numbers alone: torch.where(condition, 0.1, 0.2)
            args, kwargs = _mapped(functools.partial(self._as_floats, kind), (args, kwargs))
            result = func(*args, **kwargs)
            if result.dtype == self.dtype:
                break
        return result

    def _as_floats(self, kind: type, x: Any) -> Any:
        """Integer tensors or Python floats as tensors of type `dtype`."""
        if not isinstance(x, kind) or (isinstance(x, torch.Tensor) and x.dtype == torch.bool):
            return x
        return torch.as_tensor(x, dtype=self.dtype)

    def _widen(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor):
            return x
        wide = x.is_floating_point() and x.dtype != torch.float64 and not any(x is r for r in self.rounded)
        return x.to("cpu", self.dtype if wide else x.dtype)


def _mapped(function: Callable[[Any], Any], x: Any) -> Any:
    """Applies a function to what lies in nested tuples, lists and dictionaries."""
    if isinstance(x, dict):
        return {name: _mapped(function, item) for name, item in x.items()}
    return type(x)(_mapped(function, item) for item in x) if type(x) in (tuple, list) else function(x)


def _read(tensor: torch.Tensor, index: Any) -> torch.Tensor:
    """Indexes with integers, 0-d integer tensors, slices, None and `...`, dimension by dimension."""
    entries = list(index) if isinstance(index, tuple) else [index]
    missing = tensor.ndim - sum(e is not None and e is not Ellipsis for e in entries)
    dim = 0
    for entry in entries:
        if entry is Ellipsis:
            dim += missing
        elif entry is None or isinstance(entry, slice):
            tensor = tensor.unsqueeze(dim) if entry is None else tensor[(slice(None),) * dim + (entry,)]
            dim += 1
        else:
            tensor = _select(tensor, dim, torch.as_tensor(entry))
    return tensor


def _select(tensor: torch.Tensor, dim: int, index: torch.Tensor) -> torch.Tensor:
    """Reads `index` along `dim`: a negative index counts from the end, outside of the tensor the result is 0."""
    if index.ndim or index.dtype == torch.bool or index.is_floating_point():
        raise TypeError(f"a captured tensor is read at 0-d integer indices, got {index.dtype} of rank {index.ndim}")
    size = tensor.shape[dim]
    if size == 0:
        return tensor.new_zeros(tensor.shape[:dim] + tensor.shape[dim + 1 :])
    position = index.long()
    position = torch.where(position < 0, position + size, position)
    inside = (position >= 0) & (position < size)
    row = tensor.index_select(dim, torch.where(inside, position, 0).reshape(1)).squeeze(dim)
    return torch.where(inside, row, torch.zeros_like(row))
