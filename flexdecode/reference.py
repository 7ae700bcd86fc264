"""The oracle: attention as its definition says, in float64 on the CPU, from the user's own functions.

It calls `score_mod` and `mask_mod` themselves at every position (0-d indices under nested `torch.vmap`) and shares no
code with the tracer or the backends, so a result that agrees with it is right for the right reason.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

__all__ = ["dequantized_rows", "evaluate_mod", "reference_decode"]


@torch.no_grad()
def reference_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable[..., Any] | None = None,
    mask_mod: Callable[..., Any] | None = None,
    *,
    kv_lens: torch.Tensor | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    page_table: torch.Tensor | None = None,
    q_lens: torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `softmax(mask(score_mod(query @ key^T * scale))) @ value` over the live keys.

    Args:
        query: `[B, Hq, Q, D]`, any floating dtype and device.
        key: `[B or 1, Hkv, N, D]`, any dtype; query head `h` reads head `h // (Hq // Hkv)`.
        value: `[B or 1, Hkv, N, Dv]`.
        score_mod: `(score, b, h, q_idx, kv_idx) -> score`; natural-log units, absolute positions.
        mask_mod: `(b, h, q_idx, kv_idx) -> bool`; where it is false the score becomes `-inf`.
        kv_lens: `[B]` integers; the live keys of sequence `b` are `0 .. min(kv_lens[b], N) - 1`. Default: N.
        q_offset: position of query row 0, a number or `[B]`. Default: `min(kv_lens[b], N) - q_lens[b]`.
        scale: factor on the dot products. Default: `1 / sqrt(D)`.
        page_table: `[B, max_pages]` integers. Then key is `[num_pages, Hkv, page_size, D]` and value likewise; position
            `n` of sequence `b` is row `n % page_size` of page `page_table[b, n // page_size]`, `N` is
            `max_pages * page_size`, and `kv_lens` is needed. Entries without a live key are not read.
        q_lens: `[B]` integers; the tokens of sequence `b` are query rows `0 .. min(q_lens[b], Q) - 1`. Default: Q.
        k_scale: factor on the stored keys: a number, `[Hkv]`, `[B, Hkv]`, or per key in the layout of `key` without its
            last dimension. Default: 1.
        v_scale: the same for the values.
        sinks: `[Hq]` logits, natural-log units, after scale and mods: the softmax denominator of head `h` gains
            `exp(sinks[h])`.
        return_lse: also return the natural log of the softmax denominator.

    Returns:
        The output `[B, Hq, Q, Dv]` and, if asked for, lse `[B, Hq, Q]`; float64 on the CPU. A row without a live key is
        0 with lse `-inf`, or `sinks[h]`; one past `q_lens[b]` is 0 with lse `-inf`. A row with a NaN score at a live
        position is NaN.

    Raises:
        ValueError: a `page_table` without `kv_lens`.
        IndexError: an entry of `page_table` with a live key is not the number of a page.
    """
    if page_table is not None and kv_lens is None:
        raise ValueError("`page_table` needs `kv_lens`")
    (B, Hq, Q, D), (_, Hkv, N, Dv) = query.shape, value.shape
    N *= 1 if page_table is None else page_table.shape[1]
    rows = Hq // Hkv * Q  # The query rows that share a key head.
    scale = D**-0.5 if scale is None else scale
    lens = torch.full((B,), N) if kv_lens is None else kv_lens.to("cpu", torch.int64).clamp(0, N)
    tokens = torch.full((B,), Q) if q_lens is None else q_lens.to("cpu", torch.int64).clamp(0, Q)
    first = lens - tokens if q_offset is None else torch.as_tensor(q_offset).to("cpu", torch.int64).expand(B)

    out = torch.zeros(B, Hq, Q, Dv, dtype=torch.float64)
    lse = torch.full((B, Hq, Q), -torch.inf, dtype=torch.float64)
    for batch in range(B):
        # What lies past the length is cut off here: nothing below can see it.
        n = int(lens[batch])
        q = query[batch].to("cpu", torch.float64).reshape(Hkv, rows, D)
        k = dequantized_rows(key, k_scale, batch, n, page_table)
        v = dequantized_rows(value, v_scale, batch, n, page_table)
        grid = torch.tensor([batch]), torch.arange(Hq), first[batch] + torch.arange(Q), torch.arange(n)

        score = (q @ k.mT).reshape(Hq, Q, n) * scale
        if score_mod is not None:
            score = evaluate_mod(score_mod, grid, score[None])[0]
        if mask_mod is not None:
            score = score.where(evaluate_mod(mask_mod, grid)[0], -torch.inf)
        lse[batch] = score.logsumexp(dim=-1)
        if sinks is not None:
            lse[batch] = lse[batch].logaddexp(sinks.to("cpu", torch.float64)[:, None])
        # A row without a live key keeps finite arithmetic: exp(-inf - 0) = 0.
        shift = lse[batch].where(lse[batch] != -torch.inf, 0.0)
        weight = (score - shift[..., None]).exp()
        out[batch] = (weight.reshape(Hkv, rows, n) @ v).reshape(Hq, Q, Dv)
        out[batch, :, tokens[batch] :], lse[batch, :, tokens[batch] :] = 0.0, -torch.inf
    return (out, lse) if return_lse else out


def dequantized_rows(
    cache: torch.Tensor,
    scale: float | torch.Tensor | None,
    batch: int,
    length: int,
    page_table: torch.Tensor | None = None,
    dtype: torch.dtype = torch.float64,
) -> torch.Tensor:
    """Reads the first keys or values of one sequence as numbers: what is stored times its scale.

    Args:
        cache: `[B or 1, Hkv, N, D]`, or with a page table `[num_pages, Hkv, page_size, D]`; any dtype and device.
        scale: a number, `[Hkv]`, `[B, Hkv]`, or `cache.shape[:-1]` with a batch that may be 1. None: 1.
        batch: the sequence.
        length: how many rows to read.
        page_table: `[B, max_pages]` integers.
        dtype: the floating type of the arithmetic.

    Returns:
        `[Hkv, length, D]` of type `dtype`, on the CPU.

    Raises:
        IndexError: a page that is to be read does not exist.
    """
    rows = _sequence(cache, batch, length, page_table).to(dtype)
    if scale is None:
        return rows
    factor = torch.as_tensor(scale, dtype=dtype, device="cpu")
    if factor.ndim == 3:
        return rows * _sequence(factor, batch, length, page_table)[..., None]
    per_head = factor[batch] if factor.ndim == 2 else factor
    return rows * per_head.reshape(-1, 1, 1)


def _sequence(cache: torch.Tensor, batch: int, length: int, page_table: torch.Tensor | None) -> torch.Tensor:
    """The first rows of one sequence of a cache `[B or 1, Hkv, N, ...]` or `[num_pages, Hkv, page_size, ...]`."""
    if page_table is None:
        return cache[0 if len(cache) == 1 else batch, :, :length].cpu()
    page_size = cache.shape[2]
    pages = page_table[batch, : -(-length // page_size)].tolist()
    if not all(0 <= page < len(cache) for page in pages):
        raise IndexError(f"sequence {batch} has pages {pages}, but there are {len(cache)}")
    return cache[pages].cpu().transpose(0, 1).flatten(1, 2)[:, :length]


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
        with _CapturedReads(dtype):
            result = mod(*arguments)
        return torch.as_tensor(result).to("cpu", result_dtype)

    over_grid: Callable[..., torch.Tensor] = at_one_position
    for axis in (3, 2, 1, 0):
        in_dims = [0] * len(scores) + [0 if i == axis else None for i in range(4)]
        over_grid = torch.vmap(over_grid, in_dims=tuple(in_dims))
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        return over_grid(*scores, *grid)
    finally:
        torch.set_default_dtype(default)


class _CapturedReads(TorchFunctionMode):
    """What differs from plain PyTorch inside a mod: captures come to the CPU, widen, and are indexed without faults."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.rounded: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name == "__get__":  # An attribute: shape, dtype, device, T.
            return func(*args)
        # `x.to(other)` takes its type from `other` as it is.
        args = (self._widen(args[0]), *args[1:]) if name in ("to", "type_as") else self._widen(args)
        result = _read(*args) if name == "__getitem__" else func(*args, **self._widen(kwargs or {}))
        if isinstance(result, torch.Tensor) and result.dtype in (torch.float16, torch.bfloat16):
            self.rounded.append(result)  # Only an explicit cast gives these: PyTorch's type rules hold from here on.
        return result

    def _widen(self, x: Any) -> Any:
        if isinstance(x, torch.Tensor):
            wide = x.is_floating_point() and not any(x is r for r in self.rounded)
            return x.to("cpu", torch.promote_types(x.dtype, self.dtype)) if wide else x.to("cpu")
        if isinstance(x, dict):
            return {name: self._widen(item) for name, item in x.items()}
        return type(x)(self._widen(item) for item in x) if type(x) in (tuple, list) else x


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
