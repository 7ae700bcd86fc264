"""Symbols from several ones and several from one: stack, cat, split, gather."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from .build import cast, make
from .elementwise import expanded as _expanded
from .errors import TraceError, UnsupportedOpError, at_user_line
from .graph import Node, const
from .handlers import handles as _handles
from .ops import common_dtype
from .symbol import Symbol, TraceContext, checked_shape
from .views import _dim, _element, _index_symbol, _reshape, _select, _slice, _unsqueeze

MAX_PARTS = 256  # of one tensor inside a mod: each is text of the kernel


def checked_count(context: TraceContext, what: str, count: int) -> int:
    """Refuses more parts than a kernel should spell out."""
    if count > MAX_PARTS:
        raise at_user_line(
            UnsupportedOpError,
            f"torch.{what} over {count} elements in a {context.kind}; at most {MAX_PARTS} are supported",
            "Compute it outside the mod and capture the result as a tensor.",
        )
    return count


def _clamped(index: Node, size: int) -> Node:
    """An index moved inside, for the parts that are not chosen: what they read is thrown away."""
    return make("minimum", make("maximum", index, const(0)), const(max(size - 1, 0)))


def _chosen(parts: Sequence[Node], is_part: Callable[[int], Node]) -> Node:
    """The part of which `is_part` is true; the last one if none is."""
    result = parts[-1]
    for number in reversed(range(len(parts) - 1)):
        result = make("where", is_part(number), parts[number], result)
    return result


def _operands(context: TraceContext, what: str, tensors: Any) -> tuple[list[Symbol], torch.dtype]:
    symbols = [context.symbol(t) for t in tensors]
    if not symbols:
        raise at_user_line(TraceError, f"torch.{what} of no tensors", "Give at least one.")
    checked_count(context, what, len(symbols))
    elements = [s.node if s.rank == 0 else Node("axis", (), s.dtype) for s in symbols]
    return symbols, common_dtype(elements)[0]


@_handles("stack")
def _stack(context: TraceContext, tensors: Any, dim: int = 0) -> Symbol:
    symbols, dtype = _operands(context, "stack", tensors)
    shapes = [[context.python_int(n) for n in s.sizes] for s in symbols]
    if any(shape != shapes[0] for shape in shapes):
        raise at_user_line(TraceError, f"torch.stack of the shapes {shapes}", "Stack tensors of one shape.")
    at_dim = _dim(symbols[0], dim, 1)
    sizes = [const(n) for n in shapes[0]]

    def at(index: tuple[Node, ...]) -> Node:
        which, rest = index[at_dim], (*index[:at_dim], *index[at_dim + 1 :])
        if which.is_const and 0 <= which.attr < len(symbols):
            return cast(symbols[which.attr].at(rest), dtype)
        return _chosen([cast(s.at(rest), dtype) for s in symbols], lambda k: make("eq", which, const(k)))

    return Symbol(context, (*sizes[:at_dim], const(len(symbols)), *sizes[at_dim:]), at, dtype)


@_handles("cat", "concat", "concatenate")
def _cat(context: TraceContext, tensors: Any, dim: int = 0) -> Symbol:
    symbols, dtype = _operands(context, "cat", tensors)
    shapes = [[context.python_int(n) for n in s.sizes] for s in symbols]
    at_dim = _dim(symbols[0], dim)
    if any(s[:at_dim] + s[at_dim + 1 :] != shapes[0][:at_dim] + shapes[0][at_dim + 1 :] for s in shapes):
        raise at_user_line(TraceError, f"torch.cat of the shapes {shapes}", "They may differ in one dimension.")
    lengths = [shape[at_dim] for shape in shapes]
    starts = [sum(lengths[:k]) for k in range(len(lengths))]

    def at(index: tuple[Node, ...]) -> Node:
        which = index[at_dim]

        def part(k: int) -> Node:
            inside = _clamped(make("sub", which, const(starts[k])), lengths[k])
            return cast(symbols[k].at((*index[:at_dim], inside, *index[at_dim + 1 :])), dtype)

        filled = [k for k, length in enumerate(lengths) if length]
        if which.is_const:
            return part(max((k for k in filled if starts[k] <= which.attr), default=0))
        parts = [part(k) for k in filled] or [cast(const(0), dtype)]
        return _chosen(parts, lambda k: make("lt", which, const(starts[filled[k]] + lengths[filled[k]])))

    sizes = [const(n) for n in shapes[0]]
    return Symbol(context, (*sizes[:at_dim], const(sum(lengths)), *sizes[at_dim + 1 :]), at, dtype)


# --- Parts of one tensor ----------------------------------------------------------------------------------------------


@_handles("unbind")
def _unbind(context: TraceContext, x: Any, dim: int = 0) -> tuple[Symbol, ...]:
    symbol = context.symbol(x)
    dim = _dim(symbol, dim)
    count = checked_count(context, "unbind", context.python_int(symbol.sizes[dim]))
    return tuple(_select(symbol, dim, context.scalar(const(k))) for k in range(count))


@_handles("__iter__")
def _iterate(context: TraceContext, x: Any) -> Iterator[Symbol]:
    return iter(_unbind(context, x))


@_handles("split", "split_with_sizes")
def _split(context: TraceContext, x: Any, split_size: Any = None, dim: int = 0, **names: Any) -> tuple[Symbol, ...]:
    given = names.get("split_size_or_sections", names.get("split_sizes", split_size))
    symbol = context.symbol(x)
    dim = _dim(symbol, dim)
    size = context.python_int(symbol.sizes[dim])
    if isinstance(given, (list, tuple)):
        lengths = [int(n) for n in given]
    else:
        step = int(given)
        lengths = [min(step, size - start) for start in range(0, size, step)] if step > 0 else []
    if sum(lengths) != size or not lengths:
        raise at_user_line(TraceError, f"a split of {size} elements into {given}", "The parts have to make the whole.")
    checked_count(context, "split", len(lengths))
    starts = [sum(lengths[:k]) for k in range(len(lengths))]
    return tuple(_slice(symbol, dim, slice(a, a + n)) for a, n in zip(starts, lengths, strict=True))


@_handles("chunk")
def _chunk(context: TraceContext, x: Any, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    symbol = context.symbol(x)
    size = context.python_int(symbol.sizes[_dim(symbol, dim)])
    return _split(context, symbol, max(1, -(-size // int(chunks))), dim)


# --- Elements by an index tensor --------------------------------------------------------------------------------------


@_handles("index_select")
def _index_select(context: TraceContext, x: Any, dim: int, index: Any) -> Symbol:
    symbol, chosen = context.symbol(x), _index_symbol(context, index)
    if chosen.rank > 1:
        raise at_user_line(TraceError, f"index_select with an index of rank {chosen.rank}", "Index with a vector.")
    if chosen.rank == 0:
        chosen = _unsqueeze(chosen, 0)
    return _select(symbol, _dim(symbol, dim), chosen)


@_handles("take")
def _take(context: TraceContext, x: Any, index: Any) -> Symbol:
    return _select(_reshape(context.symbol(x), (-1,)), 0, _index_symbol(context, index))


@_handles("gather")
def _gather(context: TraceContext, x: Any, dim: int, index: Any, sparse_grad: bool = False) -> Symbol:
    symbol, chosen = context.symbol(x), _index_symbol(context, index)
    if symbol.rank == 0:
        return symbol
    if chosen.rank != symbol.rank:
        raise at_user_line(
            TraceError,
            f"gather of a tensor of rank {symbol.rank} with an index of rank {chosen.rank}",
            "Both need the same rank; a single element is x[i].",
        )
    return _gathered(context, symbol, _dim(symbol, dim), chosen)


@_handles("take_along_dim")
def _take_along_dim(context: TraceContext, x: Any, indices: Any, dim: int | None = None) -> Symbol:
    symbol, chosen = context.symbol(x), _index_symbol(context, indices)
    if dim is None:
        return _select(_reshape(symbol, (-1,)), 0, _reshape(chosen, (-1,)))
    at_dim = _dim(symbol, dim)
    shapes = [[context.python_int(n) for n in s.sizes] for s in (symbol, chosen)]
    ones = [[1 if d == at_dim else n for d, n in enumerate(shape)] for shape in shapes]
    common = checked_shape(torch.broadcast_shapes, *ones)
    wide = [tuple(const(s[at_dim] if d == at_dim else n) for d, n in enumerate(common)) for s in shapes]
    return _gathered(context, _expanded(symbol, wide[0]), at_dim, _expanded(chosen, wide[1]))


def _gathered(context: TraceContext, symbol: Symbol, dim: int, index: Symbol) -> Symbol:
    def at(place: tuple[Node, ...]) -> Node:
        return _element(symbol, (*place[:dim], index.at(place), *place[dim + 1 :]), dim)

    return Symbol(context, index.sizes, at, symbol.dtype)
