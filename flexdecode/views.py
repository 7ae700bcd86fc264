"""Views of captured tensors inside a mod: index arithmetic, of which nothing is read while tracing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from .build import cast, make
from .elementwise import as_dtype as _as_dtype
from .elementwise import expanded as _expanded
from .errors import TraceError, UnsupportedOpError, at_user_line
from .factories import _unpacked
from .graph import Node, const
from .handlers import handles as _handles
from .symbol import Symbol, TraceContext
from .torch_functions import _PROPERTIES


def _where_in(index: Node, size: Node) -> Node:
    """Counts a negative index from the end."""
    if index.is_const and index.attr >= 0:
        return index
    return make("where", make("lt", index, const(0)), make("add", index, size), index)


def _slice(context: TraceContext, symbol: Symbol, dim: int, part: slice) -> Symbol:
    """`x[..., start:stop:step, ...]`; an index outside the slice reads 0, as outside any tensor."""
    size = symbol.sizes[dim]
    step = 1 if part.step is None else int(part.step)
    if step < 1:
        raise at_user_line(TraceError, "a slice step must be positive", "Flip the tensor outside the mod.")

    def bound(value: Any, default: Node) -> Node:
        if value is None:
            return default
        node = const(int(value))
        if node.attr < 0:
            return make("maximum", make("add", size, node), const(0))
        return make("minimum", node, size)

    start, stop = bound(part.start, const(0)), bound(part.stop, size)
    length = make("maximum", make("sub", stop, start), const(0))
    length = make("floor_divide", make("add", length, const(step - 1)), const(step))

    def at(index: tuple[Node, ...]) -> Node:
        i = _where_in(index[dim], length)
        source = make("add", make("mul", i, const(step)), start)
        return _zero_outside(i, length, symbol.at((*index[:dim], source, *index[dim + 1 :])))

    sizes = (*symbol.sizes[:dim], length, *symbol.sizes[dim + 1 :])
    return Symbol(context, sizes, at, symbol.dtype, (*symbol.guarded[:dim], True, *symbol.guarded[dim + 1 :]))


def _zero_outside(index: Node, size: Node, value: Node) -> Node:
    inside = make("logical_and", make("le", const(0), index), make("lt", index, size))
    return make("where", inside, value, cast(const(0), value.dtype))


def _select(context: TraceContext, symbol: Symbol, dim: int, index: Symbol) -> Symbol:
    """Indexes one dimension with an integer symbol; a shaped one puts its dimensions in place."""

    def at(rest: tuple[Node, ...]) -> Node:
        chosen = index.at(rest[dim : dim + index.rank])
        if symbol.guarded[dim]:
            return symbol.at((*rest[:dim], chosen, *rest[dim + index.rank :]))
        chosen = _where_in(chosen, symbol.sizes[dim])
        return _zero_outside(chosen, symbol.sizes[dim], symbol.at((*rest[:dim], chosen, *rest[dim + index.rank :])))

    sizes = (*symbol.sizes[:dim], *index.sizes, *symbol.sizes[dim + 1 :])
    guarded = (*symbol.guarded[:dim], *[False] * index.rank, *symbol.guarded[dim + 1 :])
    return Symbol(context, sizes, at, symbol.dtype, guarded)


def _unsqueeze(context: TraceContext, symbol: Symbol, dim: int) -> Symbol:
    sizes = (*symbol.sizes[:dim], const(1), *symbol.sizes[dim:])
    guarded = (*symbol.guarded[:dim], False, *symbol.guarded[dim:])
    return Symbol(context, sizes, lambda index: symbol.at((*index[:dim], *index[dim + 1 :])), symbol.dtype, guarded)


@_handles("getitem")
def getitem(context: TraceContext, x: Any, index: Any) -> Symbol:
    """`x[index]` with integers, symbols, slices, None and Ellipsis; a chain of indices may be partial."""
    symbol = context.symbol(x)
    items = list(index) if isinstance(index, tuple) else [index]
    if isinstance(index, list):
        _refuse_index(context, "a list")
    given = sum(item is not None and item is not Ellipsis for item in items)
    if given > symbol.rank:
        raise at_user_line(
            TraceError,
            f"too many indices in a {context.kind}: {given} for a tensor of {symbol.rank} dimension(s)",
            "Index a captured tensor with at most one index for each of its dimensions.",
        )
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if dots:
        items[dots[0] : dots[0] + 1] = [slice(None)] * (symbol.rank - given)
    dim = tables = 0
    for item in items:
        if item is None:
            symbol, dim = _unsqueeze(context, symbol, dim), dim + 1
        elif isinstance(item, slice):
            if item != slice(None):
                symbol = _slice(context, symbol, dim, item)
            dim += 1
        else:
            chosen = _index_symbol(context, item)
            tables += chosen.rank > 0
            if tables > 1:
                _refuse_index(context, "two index tensors that have dimensions")
            symbol, dim = _select(context, symbol, dim, chosen), dim + chosen.rank
    return symbol


@_handles("embedding")
def _embedding(context: TraceContext, x: Any, weight: Any, *_: Any, **__: Any) -> Symbol:
    return getitem(context, weight, x)


def _index_symbol(context: TraceContext, item: Any) -> Symbol:
    if isinstance(item, bool):
        _refuse_index(context, "a bool")
    if not isinstance(item, (int, Symbol, torch.Tensor)) and getattr(item, "ndim", 1) != 0:
        _refuse_index(context, f"a {type(item).__name__}")
    chosen = context.symbol(item)
    if chosen.dtype == torch.bool or chosen.dtype.is_floating_point:
        _refuse_index(context, str(chosen.dtype))
    return _as_dtype(context, chosen, torch.int64)


def _refuse_index(context: TraceContext, what: str) -> NoReturn:
    raise at_user_line(
        TraceError,
        f"a captured tensor was indexed with {what} in a {context.kind}",
        "Index with integers: b, h, q_idx, kv_idx, arithmetic on them (.long() converts), integer tensors, or slices.",
    )


def _dim(symbol: Symbol, dim: int, extra: int = 0) -> int:
    rank = symbol.rank + extra
    if not -rank <= dim < rank:
        raise at_user_line(
            TraceError, f"dimension {dim} is out of range for rank {symbol.rank}", "Check the dimension."
        )
    return dim % rank


@_handles("select")
def _select_method(context: TraceContext, x: Any, dim: int, index: Any) -> Symbol:
    symbol = context.symbol(x)
    return _select(context, symbol, _dim(symbol, dim), _index_symbol(context, index))


@_handles("narrow")
def _narrow(context: TraceContext, x: Any, dim: int, start: int, length: int) -> Symbol:
    symbol = context.symbol(x)
    dim = _dim(symbol, dim)
    first = start if start >= 0 else start + context.python_int(symbol.sizes[dim])
    return _slice(context, symbol, dim, slice(first, first + length))


@_handles("unsqueeze")
def _unsqueeze_method(context: TraceContext, x: Any, dim: int) -> Symbol:
    symbol = context.symbol(x)
    return _unsqueeze(context, symbol, _dim(symbol, dim, 1))


@_handles("squeeze")
def _squeeze(context: TraceContext, x: Any, dim: int | tuple[int, ...] | None = None) -> Symbol:
    symbol = context.symbol(x)
    chosen = range(symbol.rank) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    for d in sorted({_dim(symbol, d) for d in chosen} if symbol.rank else (), reverse=True):
        if context.python_int(symbol.sizes[d]) == 1:
            symbol = _select(context, symbol, d, context.scalar(const(0)))
    return symbol


def _permuted(symbol: Symbol, order: list[int]) -> Symbol:
    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(tuple(index[order.index(d)] for d in range(symbol.rank)))

    sizes = tuple(symbol.sizes[d] for d in order)
    return Symbol(symbol.context, sizes, at, symbol.dtype, tuple(symbol.guarded[d] for d in order))


@_handles("permute")
def _permute(context: TraceContext, x: Any, *order: Any, dims: Any = None) -> Symbol:
    symbol = context.symbol(x)
    order = tuple(_dim(symbol, d) for d in _unpacked(order, dims))
    if sorted(order) != list(range(symbol.rank)):
        raise at_user_line(
            TraceError, f"permute{order} of a tensor of rank {symbol.rank}", "Name every dimension once."
        )
    return _permuted(symbol, list(order))


@_handles("transpose", "swapaxes", "swapdims", "mT")
def _transpose(context: TraceContext, x: Any, dim0: int = -2, dim1: int = -1) -> Symbol:
    symbol = context.symbol(x)
    order = list(range(symbol.rank))
    a, b = _dim(symbol, dim0), _dim(symbol, dim1)
    order[a], order[b] = order[b], order[a]
    return _permuted(symbol, order)


@_handles("T", "t")
def _reversed(context: TraceContext, x: Any) -> Symbol:
    symbol = context.symbol(x)
    return _permuted(symbol, list(range(symbol.rank))[::-1])


@_handles("expand", "broadcast_to")
def _expand(context: TraceContext, x: Any, *sizes: Any, size: Any = None) -> Symbol:
    symbol = context.symbol(x)
    shape = [context.python_int(context.symbol(n).node) for n in _unpacked(sizes, size)]
    old = [context.python_int(n) for n in symbol.sizes]
    try:
        shape = list(torch.empty(old, device="meta").expand(shape).shape)
    except RuntimeError as error:
        raise at_user_line(TraceError, f"{error}", "Check the shapes of the captured tensors.") from None
    return _expanded(symbol, tuple(const(n) for n in shape))


@_handles("expand_as")
def _expand_as(context: TraceContext, x: Any, other: Any) -> Symbol:
    return _expand(context, x, *(context.size_value(n) for n in context.symbol(other).sizes))


# --- Other shapes -----------------------------------------------------------------------------------------------------


def _reshape(context: TraceContext, x: Any, shape: Sequence[Any]) -> Symbol:
    """The same elements in another shape; the sizes become constants."""
    symbol = context.symbol(x)
    old = [context.python_int(n) for n in symbol.sizes]
    asked = [context.python_int(context.symbol(n).node) for n in shape]
    try:
        new = list(torch.empty(old, device="meta").reshape(asked).shape)
    except RuntimeError as error:
        raise at_user_line(TraceError, f"{error}", "Check the shapes of the captured tensors.") from None
    groups = _groups(old, new)

    def at(index: tuple[Node, ...]) -> Node:
        source: list[Node] = []
        for old_dims, new_dims in groups:
            flat = const(0)
            for dim in new_dims:
                flat = make("add", make("mul", flat, const(new[dim])), index[dim])
            places: list[Node] = []
            for dim in reversed(old_dims[1:]):
                places.insert(0, make("remainder", flat, const(max(old[dim], 1))))
                flat = make("floor_divide", flat, const(max(old[dim], 1)))
            source += [flat, *places] if old_dims else []
        return symbol.at(tuple(source))

    same = {n[0]: o[0] for o, n in groups if len(o) == len(n) == 1}
    guarded = tuple(d in same and symbol.guarded[same[d]] for d in range(len(new)))
    sizes = tuple(symbol.sizes[same[d]] if d in same else const(n) for d, n in enumerate(new))
    return Symbol(context, sizes, at, symbol.dtype, guarded)


def _groups(old: list[int], new: list[int]) -> list[tuple[list[int], list[int]]]:
    """Runs of old and of new dimensions, as short as possible, that hold the same number of elements."""
    if 0 in old:
        return [(list(range(len(old))), list(range(len(new))))]
    groups: list[tuple[list[int], list[int]]] = []
    a = b = 0
    while a < len(old) or b < len(new):
        olds, news = [a] if a < len(old) else [], [b] if b < len(new) else []
        a, b = a + len(olds), b + len(news)
        while math.prod(old[d] for d in olds) != math.prod(new[d] for d in news):
            if math.prod(old[d] for d in olds) < math.prod(new[d] for d in news):
                olds, a = [*olds, a], a + 1
            else:
                news, b = [*news, b], b + 1
        groups.append((olds, news))
    return groups


@_handles("reshape", "view")
def _reshape_method(context: TraceContext, x: Any, *sizes: Any, shape: Any = None, size: Any = None) -> Symbol:
    if any(isinstance(n, torch.dtype) for n in sizes):
        raise at_user_line(
            UnsupportedOpError,
            f"view as another dtype is not supported in a {context.kind}",
            "Capture the view, `bits = x.view(torch.int16)`, or convert the values with .to(dtype).",
        )
    return _reshape(context, x, _unpacked(sizes, size if shape is None else shape))


@_handles("view_as", "reshape_as")
def _reshape_as(context: TraceContext, x: Any, other: Any) -> Symbol:
    return _reshape(context, x, _shape(context, other))


@_handles("flatten", "ravel")
def _flatten(context: TraceContext, x: Any, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    symbol = context.symbol(x)
    if symbol.rank == 0:
        return _unsqueeze(context, symbol, 0)
    start, end = _dim(symbol, start_dim), _dim(symbol, end_dim)
    if start > end:
        raise at_user_line(TraceError, f"flatten from dimension {start} to {end}", "Start at the first of them.")
    shape = _shape(context, symbol)
    return _reshape(context, symbol, (*shape[:start], -1, *shape[end + 1 :])) if start < end else symbol


@_handles("unflatten")
def _unflatten(context: TraceContext, x: Any, dim: int, sizes: Any) -> Symbol:
    symbol = context.symbol(x)
    dim = _dim(symbol, dim)
    shape = [context.python_int(n) for n in symbol.sizes]
    known = [context.python_int(context.symbol(n).node) for n in sizes]
    if -1 in known:
        rest = math.prod(n for n in known if n != -1)
        known[known.index(-1)] = shape[dim] // rest if rest else 0
    return _reshape(context, symbol, (*shape[:dim], *known, *shape[dim + 1 :]))


# --- Attributes -------------------------------------------------------------------------------------------------------


@_handles("shape")
def _shape(context: TraceContext, x: Any) -> tuple:
    return tuple(context.size_value(n) for n in context.symbol(x).sizes)


@_handles("size")
def _size(context: TraceContext, x: Any, dim: int | None = None) -> Any:
    shape = _shape(context, x)
    return shape if dim is None else shape[dim]


@_handles("numel", "nelement")
def _numel(context: TraceContext, x: Any) -> Any:
    return math.prod(_shape(context, x))


@_handles("dim", "ndimension", "ndim")
def _rank(context: TraceContext, x: Any) -> int:
    return context.symbol(x).rank


_PROPERTIES |= {
    "shape": lambda x: _shape(x.context, x),
    "ndim": lambda x: x.rank,
    "device": lambda x: x.context.device,
    "requires_grad": lambda x: False,
    "is_cuda": lambda x: x.context.device.type == "cuda",
    "is_cpu": lambda x: x.context.device.type == "cpu",
    "layout": lambda x: torch.strided,
    "itemsize": lambda x: x.dtype.itemsize,
    "T": lambda x: _reversed(x.context, x),
    "mT": lambda x: _transpose(x.context, x),
    "data": lambda x: x,
    "real": lambda x: x,
}
