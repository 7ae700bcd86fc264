"""Functions that join symbols, split a symbol, or gather its elements."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

import torch

from ..errors import TraceError, UnsupportedOpError, at_user_line
from .build import cast, make
from .elementwise import expanded as _expanded
from .graph import Node, const
from .handlers import handles as _handles
from .handlers import of_symbol
from .ops import common_dtype
from .symbol import Symbol, TraceContext, checked_shape
from .views import _dim, _element, _index_symbol, _reshape, _select, _slice, _unsqueeze

MAX_PARTS = 256  # parts of one tensor inside a mod; each adds text to the kernel


def checked_count(context: TraceContext, what: str, count: int) -> int:
    """Refuses more than MAX_PARTS parts."""
    if count > MAX_PARTS:
        raise at_user_line(
            UnsupportedOpError,
            f"torch.{what} over {count} elements in a {context.kind}; at most {MAX_PARTS} are supported",
            "Compute it outside the mod and capture the result as a tensor.",
        )
    return count


def _operands(context: TraceContext, what: str, tensors: Any) -> tuple[list[Symbol], list[list[int]], torch.dtype]:
    """The symbols that are joined, their shapes and their common type."""
    symbols = [context.symbol(t) for t in tensors]
    if not symbols:
        raise at_user_line(TraceError, f"torch.{what} of no tensors", "Give at least one.")
    checked_count(context, what, len(symbols))
    elements = [s.node if s.rank == 0 else Node("axis", (), s.dtype) for s in symbols]
    return symbols, [s.extents() for s in symbols], common_dtype(elements)[0]


@_handles("stack")
def _stack(context: TraceContext, tensors: Any, dim: int = 0) -> Symbol:
    symbols, shapes, dtype = _operands(context, "stack", tensors)
    if any(shape != shapes[0] for shape in shapes):
        raise at_user_line(TraceError, f"torch.stack of the shapes {shapes}", "Stack tensors of one shape.")
    at_dim = _dim(symbols[0], dim, 1)
    return _joined([_unsqueeze(s, at_dim) for s in symbols], [1] * len(symbols), at_dim, dtype)


@_handles("cat", "concat", "concatenate")
def _cat(context: TraceContext, tensors: Any, dim: int = 0) -> Symbol:
    symbols, shapes, dtype = _operands(context, "cat", tensors)
    at_dim = _dim(symbols[0], dim)
    if any(s[:at_dim] + s[at_dim + 1 :] != shapes[0][:at_dim] + shapes[0][at_dim + 1 :] for s in shapes):
        raise at_user_line(TraceError, f"torch.cat of the shapes {shapes}", "They may differ in one dimension.")
    return _joined(symbols, [shape[at_dim] for shape in shapes], at_dim, dtype)


def _joined(symbols: list[Symbol], lengths: list[int], dim: int, dtype: torch.dtype) -> Symbol:
    """Concatenates symbols in a dimension in which they have these lengths."""
    context, starts = symbols[0].context, [0, *accumulate(lengths)]
    filled = [k for k, length in enumerate(lengths) if length]

    def at(index: tuple[Node, ...]) -> Node:
        place = index[dim]

        def part(k: int) -> Node:
            # In parts that are not chosen, the index is clamped into the part. The values that they read are not used.
            inside = make("maximum", make("sub", place, const(starts[k])), const(0))
            inside = make("minimum", inside, const(lengths[k] - 1))
            return cast(symbols[k].at((*index[:dim], inside, *index[dim + 1 :])), dtype)

        if not filled:
            return cast(const(0), dtype)
        if place.is_const:
            return part(max((k for k in filled if starts[k] <= place.attr), default=filled[0]))
        result = part(filled[-1])
        for k in reversed(filled[:-1]):
            result = make("where", make("lt", place, const(starts[k + 1])), part(k), result)
        return result

    sizes = [const(n) for n in symbols[0].extents()]
    return Symbol(context, (*sizes[:dim], const(starts[-1]), *sizes[dim + 1 :]), at, dtype)


# --- Parts of one tensor ----------------------------------------------------------------------------------------------


@of_symbol("unbind")
def _unbind(symbol: Symbol, dim: int = 0) -> tuple[Symbol, ...]:
    dim = _dim(symbol, dim)
    count = checked_count(symbol.context, "unbind", symbol.context.python_int(symbol.sizes[dim]))
    return tuple(_select(symbol, dim, symbol.context.scalar(const(k))) for k in range(count))


@of_symbol("__iter__")
def _iterate(symbol: Symbol) -> Iterator[Symbol]:
    return iter(_unbind(symbol))


@of_symbol("split", "split_with_sizes")
def _split(symbol: Symbol, split_size: Any = None, dim: int = 0, **names: Any) -> tuple[Symbol, ...]:
    given = names.get("split_size_or_sections", names.get("split_sizes", split_size))
    given = [int(n) for n in given] if isinstance(given, (list, tuple)) else int(given)
    dim = _dim(symbol, dim)
    size = symbol.context.python_int(symbol.sizes[dim])
    try:
        lengths = [len(part) for part in torch.empty(size, device="meta").split(given)]
    except RuntimeError:
        text = f"a split of {size} elements into {given}"
        raise at_user_line(TraceError, text, "The parts have to make the whole.") from None
    checked_count(symbol.context, "split", len(lengths))
    ends = accumulate(lengths)
    return tuple(_slice(symbol, dim, slice(b - n, b)) for b, n in zip(ends, lengths, strict=True))


@of_symbol("chunk")
def _chunk(symbol: Symbol, chunks: int, dim: int = 0) -> tuple[Symbol, ...]:
    size = symbol.context.python_int(symbol.sizes[_dim(symbol, dim)])
    return _split(symbol, max(1, -(-size // int(chunks))), dim)


# --- Elements by an index tensor --------------------------------------------------------------------------------------


@of_symbol("index_select")
def _index_select(symbol: Symbol, dim: int, index: Any) -> Symbol:
    chosen = _index_symbol(symbol.context, index)
    if chosen.rank > 1:
        raise at_user_line(TraceError, f"index_select with an index of rank {chosen.rank}", "Index with a vector.")
    if chosen.rank == 0:
        chosen = _unsqueeze(chosen, 0)
    return _select(symbol, _dim(symbol, dim), chosen)


@of_symbol("take")
def _take(symbol: Symbol, index: Any) -> Symbol:
    return _select(_reshape(symbol, (-1,)), 0, _index_symbol(symbol.context, index))


@of_symbol("gather")
def _gather(symbol: Symbol, dim: int, index: Any, sparse_grad: bool = False) -> Symbol:
    chosen = _index_symbol(symbol.context, index)
    if symbol.rank == 0:
        return symbol
    if chosen.rank != symbol.rank:
        raise at_user_line(
            TraceError,
            f"gather of a tensor of rank {symbol.rank} with an index of rank {chosen.rank}",
            "Both need the same rank; a single element is x[i].",
        )
    return _gathered(symbol, _dim(symbol, dim), chosen)


@of_symbol("take_along_dim")
def _take_along_dim(symbol: Symbol, indices: Any, dim: int | None = None) -> Symbol:
    chosen = _index_symbol(symbol.context, indices)
    if dim is None:
        return _select(_reshape(symbol, (-1,)), 0, _reshape(chosen, (-1,)))
    at_dim = _dim(symbol, dim)
    shapes = symbol.extents(), chosen.extents()
    ones = [[1 if d == at_dim else n for d, n in enumerate(shape)] for shape in shapes]
    common = checked_shape(torch.broadcast_shapes, *ones)
    wide = [tuple(const(s[at_dim] if d == at_dim else n) for d, n in enumerate(common)) for s in shapes]
    return _gathered(_expanded(symbol, wide[0]), at_dim, _expanded(chosen, wide[1]))


def _gathered(symbol: Symbol, dim: int, index: Symbol) -> Symbol:
    def at(place: tuple[Node, ...]) -> Node:
        return _element(symbol, (*place[:dim], index.at(place), *place[dim + 1 :]), dim)

    return Symbol(symbol.context, index.sizes, at, symbol.dtype)
