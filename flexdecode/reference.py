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

from .kv.reading import checked_cache

__all__ = ["dequantized_rows", "evaluate_mod", "reference_decode"]


@contextlib.contextmanager
def _plainly() -> Iterator[None]:
    """PyTorch on the CPU, without gradients and whatever autocast or default device the caller has set."""
    with torch.no_grad(), torch.autocast("cpu", enabled=False), torch.device("cpu"):
        yield


@_plainly()
def reference_decode(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
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
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    max_q_len: int | None = None,
    kv_starts: int | torch.Tensor | None = None,
    kv_offset: int | torch.Tensor | None = None,
    cache: Any = None,
    return_lse: bool = False,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Computes `softmax(mask(score_mod(query @ key^T * scale))) @ value` over the live keys.

    Args:
        query: `[B, Hq, Q, D]`, any floating dtype and device. With `cu_seqlens_q`: `[T, Hq, D]`.
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
        cu_seqlens_q: `[B + 1]` integers c. The tokens of sequence `b` are rows `c[b] .. c[b + 1] - 1` of a packed
            query; what of them lies outside the query, or before `c[b]`, does not count.
        cu_seqlens_k: `[B + 1]` integers. Then key is `[Tk, Hkv, D]` and value `[Tk, Hkv, Dv]`, and the keys of sequence
            `b` are rows of them in the same way. It needs `cu_seqlens_q` and excludes `kv_lens` and `page_table`.
        max_q_len: not used; `flex_decode` takes it as a hint.
        kv_starts: `[B]` integers, or one for all; keys before this row of the cache are not live. Default: 0.
        kv_offset: `[B]` integers, or one for all; mods see row `n` of sequence `b` at position `n + kv_offset[b]`.
            Default: 0.
        cache: a KVCache, a PagedKVCache or a layer of one, in place of key, value, kv_lens, page_table, k_scale and
            v_scale.
        return_lse: also return the natural log of the softmax denominator.

    Returns:
        The output `[B, Hq, Q, Dv]` and, if asked for, lse `[B, Hq, Q]`; of a packed query `[T, Hq, Dv]` and `[T, Hq]`;
        float64 on the CPU. A row without a live key is 0 with lse `-inf`, or `sinks[h]`; one past `q_lens[b]`, or of no
        sequence, is 0 with lse `-inf`. A row with a NaN score at a live position is NaN. Keys that the mask rules out
        for every row that shares them may hold anything.

    Raises:
        TypeError: a mod does what no function of one pair can do, or `cache` is no cache.
        ValueError: shapes do not fit together, there is a `page_table` without `kv_lens`, or `cache` has layers.
        IndexError: an entry of `page_table` with such a key is not the number of a page.
    """
    if cache is not None:
        cache = checked_cache(cache)
        key, value, kv_lens, page_table = cache.key, cache.value, cache.kv_lens, cache.page_table
        k_scale, v_scale = cache.k_scale, cache.v_scale
    if key is None or value is None:
        raise TypeError("reference_decode needs `key` and `value`, or a `cache` that has them")
    _check_shapes(query, key, value, cu_seqlens_q is not None, cu_seqlens_k is not None)
    if page_table is not None and kv_lens is None:
        raise ValueError("`page_table` needs `kv_lens`")
    packed = cu_seqlens_q is not None
    B = len(query) if cu_seqlens_q is None else len(cu_seqlens_q) - 1
    T, N = query.shape[0 if packed else 2], value.shape[0 if cu_seqlens_k is not None else 2]
    N *= 1 if page_table is None else page_table.shape[1]
    lens = _per_sequence(N if kv_lens is None else kv_lens, B).clamp(0, N)
    tokens = _per_sequence(T if q_lens is None else q_lens, B).clamp(0, T)
    starts = _per_sequence(0 if kv_starts is None else kv_starts, B)
    shift = _per_sequence(0 if kv_offset is None else kv_offset, B)
    positions = None if q_offset is None else _per_sequence(q_offset, B)
    mods, factor = (score_mod, mask_mod), query.shape[-1] ** -0.5 if scale is None else scale

    out = torch.zeros(*query.shape[:-1], value.shape[-1], dtype=torch.float64)
    lse = torch.full(query.shape[:-1], -torch.inf, dtype=torch.float64)
    for batch in range(B):
        # Nothing below can see what lies past these lengths.
        n, m = int(lens[batch]), int(tokens[batch])
        k, v = key, value
        if cu_seqlens_k is not None:
            first, end = _rows_of(cu_seqlens_k, batch, N)
            n, k, v = end - first, key[None, first:end].transpose(1, 2), value[None, first:end].transpose(1, 2)
        if cu_seqlens_q is None:
            q = query[batch, :, :m]
        else:
            first, end = _rows_of(cu_seqlens_q, batch, T)
            m, q = end - first, query[first:end].transpose(0, 1)
        start = shift[batch] + n - m if positions is None else positions[batch]
        slots = torch.arange(n)
        grid = torch.tensor([batch]), torch.arange(query.shape[1]), start + torch.arange(m), shift[batch] + slots
        rows = functools.partial(dequantized_rows, batch=batch, length=n, page_table=page_table)
        caches = functools.partial(rows, k, k_scale), functools.partial(rows, v, v_scale)
        q, begun = q.to("cpu", torch.float64), slots >= starts[batch]
        result, total = _attend(q, key.shape[1], caches, mods, grid, begun, factor, sinks)
        if packed:
            out[first:end], lse[first:end] = result.transpose(0, 1), total.transpose(0, 1)
        else:
            out[batch, :, :m], lse[batch, :, :m] = result, total
    return (out, lse) if return_lse else out


def _check_shapes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, packed: bool, packed_k: bool) -> None:
    """Refuses tensors of which one cannot say what they mean.

    Raises:
        ValueError: a number of dimensions is wrong, the heads do not divide, or a width differs.
    """
    forms = {"query": "[T, Hq, D]" if packed else "[B, Hq, Q, D]"}
    forms |= {"key": "[Tk, Hkv, D]", "value": "[Tk, Hkv, Dv]"} if packed_k else {
        "key": "[B, Hkv, N, D]", "value": "[B, Hkv, N, Dv]"
    }  # fmt: skip
    for (name, form), tensor in zip(forms.items(), (query, key, value), strict=True):
        if tensor.dim() != form.count(",") + 1:
            raise ValueError(f"`{name}` must have shape {form}, got {list(tensor.shape)}")
    heads, kv_heads = query.shape[1], key.shape[1]
    if kv_heads == 0 or heads % kv_heads:
        raise ValueError(f"the {heads} heads of `query` must be a multiple of the {kv_heads} heads of `key`")
    of_keys, of_values = (x.shape[0 if packed_k else 1 : -1] for x in (key, value))  # one batch may be 1
    if query.shape[-1] != key.shape[-1] or of_keys != of_values:
        raise ValueError(f"shapes do not fit together: {[list(x.shape) for x in (query, key, value)]}")


def _attend(
    query: torch.Tensor,
    Hkv: int,
    caches: tuple[Callable[..., torch.Tensor], Callable[..., torch.Tensor]],
    mods: tuple[Callable[..., Any] | None, Callable[..., Any] | None],
    grid: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    begun: torch.Tensor,
    scale: float,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The attention of one sequence.

    Args:
        query: its tokens, float64 `[Hq, m, D]`.
        Hkv: heads of its keys.
        caches: give its keys `[Hkv, n, D]` and values `[Hkv, n, Dv]`; `read` `[Hkv, n]` says which rows to read.
        mods: the score_mod and the mask_mod.
        grid: the values of `b` [1], `h` [Hq], `q_idx` [m] and `kv_idx` [n].
        begun: which keys do not lie before the start of the sequence, bool [n].
        scale: factor on the dot products.
        sinks: `[Hq]` logits.

    Returns:
        Output `[Hq, m, Dv]` and lse `[Hq, m]`.
    """
    (score_mod, mask_mod), (_, Hq, m, n) = mods, map(len, grid)
    rows = Hq // Hkv * m  # The query rows that share a key head.
    live = begun.expand(Hq, m, n)
    if mask_mod is not None:
        live = live & evaluate_mod(mask_mod, grid)[0]
    read = live.reshape(Hkv, rows, n).any(1)  # What no row attends to is not read: it may be NaN.
    k, v = (cache(read=read) for cache in caches)

    score = (query.reshape(Hkv, rows, query.shape[-1]) @ k.mT).reshape(Hq, m, n) * scale
    if score_mod is not None:
        score = evaluate_mod(score_mod, grid, score[None])[0]
    score = score.where(live, -torch.inf)
    # The sink is one more score, without a value.
    sink = torch.full((Hq,), -torch.inf) if sinks is None else sinks.to("cpu")
    score = torch.cat([score, sink.double()[:, None, None].expand(Hq, m, 1)], dim=-1)
    # Relative to the largest score: beside 1e30 even float64 has no digits left for the logarithm of a sum.
    largest = score.amax(dim=-1)
    # A row without a live key keeps finite arithmetic: exp(-inf - 0) = 0.
    weight = (score - largest.where(largest != -torch.inf, 0.0)[..., None]).exp()
    total = weight.sum(dim=-1)
    values = (weight[..., :n].reshape(Hkv, rows, n) @ v).reshape(Hq, m, v.shape[-1])
    lse = (largest + total.log()).where(largest != torch.inf, torch.inf)
    return values / total.where(total != 0, 1.0)[..., None], lse


def _rows_of(cu_seqlens: torch.Tensor, batch: int, most: int) -> tuple[int, int]:
    """The first row of a sequence and the row after its last one, within `most` rows."""
    first = min(max(int(cu_seqlens[batch]), 0), most)
    return first, min(max(int(cu_seqlens[batch + 1]), first), most)


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

    Raises:
        TypeError: the mod does what no function of one pair can do.
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
        try:
            return over_grid(*scores, *grid)
        except RuntimeError as error:
            if "vmap" not in str(error):
                raise
            reason = str(error).strip().splitlines()[0]
            raise TypeError(
                f"the reference cannot call {getattr(mod, '__name__', 'the mod')!r} at one pair of query and key, "
                f"where its arguments are 0-d tensors: {reason}\n  Use torch.where for `if`, & and | for `and` and "
                "`or`, captured tensors for lists, and a formula where PyTorch takes only a number (`alpha`)."
            ) from error


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
