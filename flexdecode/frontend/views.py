"""Views of captured tensors inside a mod. They become index arithmetic; no value is read while tracing."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from ..errors import TraceError, UnsupportedOpError, at_user_line
from .build import cast, make
from .elementwise import as_dtype, expanded
from .factories import unpacked
from .graph import Node, const
from .handlers import handles, of_symbol
from .symbol import Symbol, TraceContext, checked_shape
from .torch_functions import PROPERTIES


def _replaced(values: tuple, dim: int, *new: Any, count: int = 1) -> tuple:
    """The tuple with `new` in place of the `count` values from `dim` on."""
    return (*values[:dim], *new, *values[dim + count :])


def _from_start(index: Node, size: Node) -> Node:
    """Counts a negative index from the end."""
    if index.is_const and index.attr >= 0:
        return index
    return make("where", make("lt", index, const(0)), make("add", index, size), index)


def _slice(symbol: Symbol, dim: int, part: slice) -> Symbol:
    """`x[..., start:stop:step, ...]`. An index outside the slice reads 0, as outside any tensor."""
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
        i = _from_start(index[dim], length)
        source = make("add", make("mul", i, const(step)), start)
        return _zero_outside(i, length, symbol.at(_replaced(index, dim, source)))

    sizes, guarded = _replaced(symbol.sizes, dim, length), _replaced(symbol.guarded, dim, True)
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


def _zero_outside(index: Node, size: Node, value: Node) -> Node:
    inside = make("logical_and", make("le", const(0), index), make("lt", index, size))
    return make("where", inside, value, cast(const(0), value.dtype))


def _element(symbol: Symbol, index: tuple[Node, ...], dim: int) -> Node:
    """The element at an index. In dimension `dim`, the index may be negative or outside the tensor."""
    if symbol.guarded[dim]:
        return symbol.at(index)
    chosen = _from_start(index[dim], symbol.sizes[dim])
    return _zero_outside(chosen, symbol.sizes[dim], symbol.at(_replaced(index, dim, chosen)))


def _select(symbol: Symbol, dim: int, index: Symbol) -> Symbol:
    """Indexes one dimension with an integer symbol. The dimensions of the symbol replace this dimension."""

    def at(rest: tuple[Node, ...]) -> Node:
        chosen = index.at(rest[dim : dim + index.rank])
        return _element(symbol, _replaced(rest, dim, chosen, count=index.rank), dim)

    sizes = _replaced(symbol.sizes, dim, *index.sizes)
    guarded = _replaced(symbol.guarded, dim, *[False] * index.rank)
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


@of_symbol("unsqueeze")
def _unsqueeze(symbol: Symbol, dim: int) -> Symbol:
    dim = _dim(symbol, dim, 1)

    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(_replaced(index, dim))

    sizes = _replaced(symbol.sizes, dim, const(1), count=0)
    return Symbol(symbol.context, sizes, at, symbol.dtype, _replaced(symbol.guarded, dim, False, count=0))


@of_symbol("getitem")
def _getitem(symbol: Symbol, index: Any) -> Symbol:
    """`x[index]` with integers, symbols, slices, None and Ellipsis. It may have fewer indices than dimensions."""
    context = symbol.context
    items = list(index) if isinstance(index, tuple) else [index]
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
            symbol, dim = _unsqueeze(symbol, dim), dim + 1
        elif isinstance(item, slice):
            if item != slice(None):
                symbol = _slice(symbol, dim, item)
            dim += 1
        else:
            chosen = _index_symbol(context, item)
            tables += chosen.rank > 0
            if tables > 1:
                _refuse_index(context, "two index tensors that have dimensions")
            symbol, dim = _select(symbol, dim, chosen), dim + chosen.rank
    return symbol


@handles("embedding")
def _embedding(context: TraceContext, x: Any, weight: Any, *_: Any, **__: Any) -> Symbol:
    return _getitem(context.symbol(weight), x)


def _index_symbol(context: TraceContext, item: Any) -> Symbol:
    if isinstance(item, bool):
        _refuse_index(context, "a bool")
    if not isinstance(item, (int, Symbol, torch.Tensor)) and getattr(item, "ndim", 1) != 0:
        _refuse_index(context, f"a {type(item).__name__}")
    chosen = context.symbol(item)
    if chosen.dtype == torch.bool or chosen.dtype.is_floating_point:
        _refuse_index(context, str(chosen.dtype))
    return as_dtype(context, chosen, torch.int64)


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


@of_symbol("select")
def _select_method(symbol: Symbol, dim: int, index: Any) -> Symbol:
    return _select(symbol, _dim(symbol, dim), _index_symbol(symbol.context, index))


@of_symbol("narrow")
def _narrow(symbol: Symbol, dim: int, start: int, length: int) -> Symbol:
    dim = _dim(symbol, dim)
    first = start if start >= 0 else start + symbol.context.python_int(symbol.sizes[dim])
    return _slice(symbol, dim, slice(first, first + length))


@of_symbol("squeeze")
def _squeeze(symbol: Symbol, dim: int | tuple[int, ...] | None = None) -> Symbol:
    chosen = range(symbol.rank) if dim is None else dim if isinstance(dim, tuple) else (dim,)
    for d in sorted({_dim(symbol, d) for d in chosen} if symbol.rank else (), reverse=True):
        if symbol.context.python_int(symbol.sizes[d]) == 1:
            symbol = _select(symbol, d, symbol.context.scalar(const(0)))
    return symbol


def _permuted(symbol: Symbol, order: Sequence[int]) -> Symbol:
    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(tuple(index[order.index(d)] for d in range(symbol.rank)))

    sizes, guarded = tuple(symbol.sizes[d] for d in order), tuple(symbol.guarded[d] for d in order)
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


@of_symbol("permute")
def _permute(symbol: Symbol, *order: Any, dims: Any = None) -> Symbol:
    order = tuple(_dim(symbol, d) for d in unpacked(order, dims))
    if sorted(order) != list(range(symbol.rank)):
        raise at_user_line(
            TraceError, f"permute{order} of a tensor of rank {symbol.rank}", "Name every dimension once."
        )
    return _permuted(symbol, order)


@of_symbol("transpose", "swapaxes", "swapdims", "mT")
def _transpose(symbol: Symbol, dim0: int = -2, dim1: int = -1) -> Symbol:
    order = list(range(symbol.rank))
    a, b = _dim(symbol, dim0), _dim(symbol, dim1)
    order[a], order[b] = order[b], order[a]
    return _permuted(symbol, order)


@of_symbol("T", "t")
def _reversed(symbol: Symbol) -> Symbol:
    return _permuted(symbol, range(symbol.rank)[::-1])


def _meta(symbol: Symbol) -> torch.Tensor:
    """A meta tensor of the symbol's shape. PyTorch can reshape it. The sizes become constants."""
    return torch.empty(symbol.extents(), device="meta")


def _python_ints(context: TraceContext, sizes: Sequence[Any]) -> list[int]:
    return [context.python_int(context.symbol(n).node) for n in sizes]


@of_symbol("expand", "broadcast_to")
def _expand(symbol: Symbol, *sizes: Any, size: Any = None) -> Symbol:
    asked = _python_ints(symbol.context, unpacked(sizes, size))
    return expanded(symbol, tuple(const(n) for n in checked_shape(_meta(symbol).expand, asked).shape))


@of_symbol("expand_as")
def _expand_as(symbol: Symbol, other: Any) -> Symbol:
    return _expand(symbol, symbol.context.symbol(other).extents())


# --- Other shapes -----------------------------------------------------------------------------------------------------


def _reshape(symbol: Symbol, shape: Sequence[Any]) -> Symbol:
    """The same elements in another shape. The sizes become constants."""
    old = symbol.extents()
    new = checked_shape(_meta(symbol).reshape, _python_ints(symbol.context, shape)).shape
    groups = _groups(old, new)

    def at(index: tuple[Node, ...]) -> Node:
        source: list[Node] = []
        for old_dims, new_dims in groups:
            flat = const(0)
            for dim in new_dims:
                flat = make("add", make("mul", flat, const(new[dim])), index[dim])
            if old_dims:
                source += unflattened(flat, [max(old[dim], 1) for dim in old_dims])
        return symbol.at(tuple(source))

    same = {n[0]: o[0] for o, n in groups if len(o) == len(n) == 1}
    guarded = tuple(d in same and symbol.guarded[same[d]] for d in range(len(new)))
    sizes = tuple(symbol.sizes[same[d]] if d in same else const(n) for d, n in enumerate(new))
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


def unflattened(flat: Node, sizes: Sequence[int]) -> list[Node]:
    """The index in each dimension of the element with the number `flat`."""
    places: list[Node] = []
    for size in reversed(sizes[1:]):
        places.insert(0, make("remainder", flat, const(size)))
        flat = make("floor_divide", flat, const(size))
    return [flat, *places]


def _groups(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The shortest groups of old and new dimensions that hold the same number of elements."""
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


@of_symbol("reshape", "view")
def _reshape_method(symbol: Symbol, *sizes: Any, shape: Any = None, size: Any = None) -> Symbol:
    if any(isinstance(n, torch.dtype) for n in sizes):
        raise at_user_line(
            UnsupportedOpError,
            f"view as another dtype is not supported in a {symbol.context.kind}",
            "Capture the view, `bits = x.view(torch.int16)`, or convert the values with .to(dtype).",
        )
    return _reshape(symbol, unpacked(sizes, size if shape is None else shape))


@of_symbol("view_as", "reshape_as")
def _reshape_as(symbol: Symbol, other: Any) -> Symbol:
    return _reshape(symbol, symbol.context.symbol(other).extents())


@of_symbol("flatten", "ravel")
def _flatten(symbol: Symbol, start_dim: int = 0, end_dim: int = -1) -> Symbol:
    if symbol.rank and _dim(symbol, start_dim) == _dim(symbol, end_dim):
        return symbol
    return _reshape(symbol, checked_shape(_meta(symbol).flatten, start_dim, end_dim).shape)


@of_symbol("unflatten")
def _unflatten(symbol: Symbol, dim: int, sizes: Any) -> Symbol:
    known = _python_ints(symbol.context, sizes)
    return _reshape(symbol, checked_shape(_meta(symbol).unflatten, _dim(symbol, dim), known).shape)


# --- Attributes -------------------------------------------------------------------------------------------------------


@of_symbol("shape")
def _shape(symbol: Symbol) -> tuple:
    return tuple(symbol.context.size_value(n) for n in symbol.sizes)


@of_symbol("size")
def _size(symbol: Symbol, dim: int | None = None) -> Any:
    shape = _shape(symbol)
    return shape if dim is None else shape[dim]


@of_symbol("numel", "nelement")
def _numel(symbol: Symbol) -> Any:
    return math.prod(_shape(symbol))


@of_symbol("dim", "ndimension", "ndim")
def _rank(symbol: Symbol) -> int:
    return symbol.rank


PROPERTIES |= {
    "shape": _shape,
    "ndim": _rank,
    "device": lambda x: x.context.device,
    "requires_grad": lambda x: False,
    "is_cuda": lambda x: x.context.device.type == "cuda",
    "is_cpu": lambda x: x.context.device.type == "cpu",
    "layout": lambda x: torch.strided,
    "itemsize": lambda x: x.dtype.itemsize,
    "T": _reversed,
    "mT": _transpose,
    "data": lambda x: x,
    "real": lambda x: x,
}
