"""Reductions over small dimensions of captured tensors, such as one row.

The sizes are constants of the kernel. A few elements become a tree of elementwise operations. More become a loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..errors import TraceError, at_user_line
from .build import cast, make
from .elementwise import as_dtype, broadcast, elementwise
from .graph import Node, const
from .handlers import HANDLERS, Handler, handles, of_symbol, refuse, refuse_score
from .joins import checked_count
from .ops import HALF
from .symbol import Symbol, TraceContext, innermost
from .views import _dim, _reshape, _transpose, _unsqueeze, unflattened

_UNROLLED = 8  # up to this many elements are written out, so that the bounds of a mask can see them


class _Elements(NamedTuple):
    """The elements that are reduced: a node for each element, or one node for all steps of a loop."""

    nodes: list[Node]
    step: Node | None = None

    @property
    def extent(self) -> int:
        return len(self.nodes) if self.step is None else self.step.attr[1]

    @property
    def dtype(self) -> torch.dtype:
        return self.nodes[0].dtype

    def each(self, function: Callable[[Node], Node]) -> _Elements:
        """Applies a function to every element."""
        return _Elements(list(map(function, self.nodes)), self.step)

    def to(self, dtype: torch.dtype) -> _Elements:
        """Converts every element."""
        return self.each(lambda node: cast(node, dtype))

    def join(self, name: str) -> Node:
        """Joins the elements by a row of the op table, in pairs, so that chains of operations stay short."""
        if self.step is not None:
            (body,) = self.nodes
            return Node("fold", (body,), body.dtype, (*self.step.attr, name))
        level = self.nodes
        while len(level) > 1:
            pairs = [make(name, *level[k : k + 2]) for k in range(0, len(level) - 1, 2)]
            level = pairs + level[len(level) - len(level) % 2 :]
        return level[0]


Combine = Callable[[_Elements, torch.dtype | None], Node]  # joins elements; the type is the dtype argument of the call


def _dims(symbol: Symbol, dim: Any) -> list[int]:
    """The dimensions to reduce, all if `dim` is None."""
    if dim is None or dim == () or dim == []:
        return list(range(symbol.rank))
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    if symbol.rank == 0 and set(given) <= {0, -1}:
        return []
    return sorted({_dim(symbol, d) for d in given})


def _reduced(
    symbol: Symbol,
    what: str,
    combine: Combine,
    dim: Any = None,
    keepdim: bool = False,
    dtype: torch.dtype | None = None,
    *,
    empty: Any = None,
    unrolled: bool = False,
    **named: Any,
) -> Symbol:
    """Combines the elements along dimensions.

    Args:
        symbol: what is reduced.
        what: the function, for errors.
        combine: joins elements.
        dim: as in PyTorch.
        keepdim: as in PyTorch.
        dtype: as in PyTorch.
        empty: the result if there are no elements; None: this is an error.
        unrolled: whether `combine` needs one node for each element.
        named: `axis` and `keepdims`, which are numpy's names.
    """
    context = symbol.context
    refuse_score(symbol, what)
    dim, keepdim = named.pop("axis", dim), named.pop("keepdims", keepdim)
    if named:
        refuse(context, f"{what}({', '.join(named)}=)")
    dims = _dims(symbol, dim)
    counts = [context.python_int(symbol.sizes[d]) for d in dims]
    total = checked_count(context, what, math.prod(counts))
    if total == 0 and empty is None:
        raise at_user_line(TraceError, f"torch.{what} of no elements", "Give the dimension at least one element.")
    kept = [d for d in range(symbol.rank) if d not in dims]
    sizes = [const(1) if d in dims else symbol.sizes[d] for d in (range(symbol.rank) if keepdim else kept)]
    result = combine(_Elements([Node("axis", (), symbol.dtype)]), dtype).dtype

    def at(index: tuple[Node, ...]) -> Node:
        rest = [i for d, i in enumerate(index) if d not in dims] if keepdim else index
        fixed = dict(zip(kept, rest, strict=True))

        def element(place: Sequence[Node]) -> Node:
            full = fixed | dict(zip(dims, place, strict=True))
            return symbol.at(tuple(full[d] for d in range(symbol.rank)))

        if total == 0:
            return const(empty, result)
        if total > _UNROLLED and not unrolled:
            step = Node("step", (), torch.int64, (innermost(index) + 1, total))
            return combine(_Elements([element(unflattened(step, counts))], step), dtype)
        places = itertools.product(*map(range, counts))
        return combine(_Elements([element([const(k) for k in place]) for place in places]), dtype)

    return Symbol(context, tuple(sizes), at, result) if sizes else context.scalar(at(()))


def _reduction(name: str, combine: Combine, empty: Any = None, unrolled: bool = False) -> Handler:
    """Makes and registers the function `name` of PyTorch. The arguments are those of `_reduced`."""

    @of_symbol(name)
    def reduce(x: Symbol, *args: Any, **options: Any) -> Symbol:
        return _reduced(x, name, combine, *args, empty=empty, unrolled=unrolled, **options)

    return reduce


def _wide(dtype: torch.dtype) -> torch.dtype:
    """The type in which PyTorch computes: float32 for half types, which are rounded once at the end."""
    return torch.float32 if dtype in HALF else dtype


def _joined(row: str) -> Combine:
    """A sum or product in PyTorch's type: int64 for integers and bools."""

    def combine(elements: _Elements, dtype: torch.dtype | None) -> Node:
        result = dtype or (elements.dtype if elements.dtype.is_floating_point else torch.int64)
        return cast(elements.to(_wide(result)).join(row), result)

    return combine


_SUM = _joined("add")


def _mean(elements: _Elements, dtype: torch.dtype | None) -> Node:
    result = dtype or elements.dtype
    if not result.is_floating_point:
        raise at_user_line(TraceError, f"the mean of {elements.dtype} is not defined", "Convert it first, x.float().")
    return cast(make("div", _SUM(elements, _wide(result)), const(elements.extent)), result)


def _truth(row: str) -> Combine:
    def combine(elements: _Elements, _: torch.dtype | None) -> Node:
        found = elements.to(torch.bool).join(row)
        return cast(found, torch.uint8) if elements.dtype == torch.uint8 else found

    return combine


_reduction("sum", _SUM, empty=0)
_reduction("prod", _joined("mul"), empty=1)
_reduction("mean", _mean)
_any = _reduction("any", _truth("logical_or"), empty=False)
_reduction("all", _truth("logical_and"), empty=True)


@of_symbol("count_nonzero")
def _count_nonzero(x: Symbol, dim: Any = None) -> Symbol:
    return _reduced(as_dtype(x.context, x, torch.bool), "count_nonzero", _SUM, dim, empty=0)


# --- Extremes ---------------------------------------------------------------------------------------------------------


def _first(largest: bool) -> Combine:
    """The position of the first extreme value. NaN counts as an extreme value."""

    def combine(elements: _Elements, _: torch.dtype | None) -> Node:
        best, place = elements.nodes[0], const(0, torch.int64)
        for k, node in enumerate(elements.nodes[1:], start=1):
            better = make("lt", best, node) if largest else make("lt", node, best)
            if node.dtype.is_floating_point:
                nan = make("logical_and", make("isnan", node), make("logical_not", make("isnan", best)))
                better = make("logical_and", make("logical_or", better, nan), make("logical_not", make("isnan", best)))
            best, place = make("where", better, node, best), make("where", better, const(k, torch.int64), place)
        return place

    return combine


class ValuesAndIndices(NamedTuple):
    """The result of `x.max(dim)`."""

    values: Symbol
    indices: Symbol


def _extreme(name: str, row: str) -> None:
    """Registers `amax`, `argmax` and `max`, or `amin`, `argmin` and `min`."""
    of_two = HANDLERS[name]
    values_of = _reduction(f"a{name}", lambda elements, _: elements.join(row))
    indices_of = _reduction(f"arg{name}", _first(largest=name == "max"), unrolled=True)

    @handles(name)
    def reduce(context: TraceContext, x: Any, *args: Any, **named: Any) -> Any:
        if "other" in named or (args and isinstance(args[0], (Symbol, torch.Tensor))):
            return of_two(context, x, *args, **named)
        symbol = context.symbol(x)
        refuse_score(symbol, name)
        values = values_of(symbol, *args, **named)
        dim = args[0] if args else named.get("dim", named.get("axis"))
        return values if dim is None else ValuesAndIndices(values, indices_of(symbol, *args, **named))


_extreme("max", "maximum")
_extreme("min", "minimum")


# --- Sums of other things ---------------------------------------------------------------------------------------------


def _log_of_sum(elements: _Elements, _: torch.dtype | None) -> Node:
    result = elements.dtype if elements.dtype.is_floating_point else torch.float32
    floats = elements.to(_wide(result))
    largest = floats.join("maximum")
    shift = make("where", make("isinf", largest), cast(const(0), largest.dtype), largest)
    total = floats.each(lambda n: make("exp", make("sub", n, shift))).join("add")
    return cast(make("add", make("log", total), shift), result)


@of_symbol("logsumexp")
def _logsumexp(x: Symbol, dim: Any, keepdim: bool = False) -> Symbol:
    return _reduced(x, "logsumexp", _log_of_sum, dim, keepdim)


def _variance(elements: _Elements, less: Any) -> Node:
    wide = elements.to(_wide(elements.dtype))
    mean = make("div", wide.join("add"), const(elements.extent))
    squares = wide.each(lambda n: make("sub", n, mean)).each(lambda d: make("mul", d, d))
    return make("div", squares.join("add"), const(max(0, elements.extent - less)))


def _spread(name: str) -> None:
    @of_symbol(name)
    def reduce(x: Symbol, *args: Any, correction: Any = 1, unbiased: bool = True, **named: Any) -> Symbol:
        # PyTorch's forms: (unbiased), (dim, unbiased, keepdim), (dim, *, correction, keepdim).
        if args and isinstance(args[0], bool):
            unbiased, args = args[0], args[1:]
        elif len(args) > 1:
            unbiased, args = bool(args[1]), (args[0], *args[2:])
        less = 0 if not unbiased else 1 if correction is None else correction

        def combine(elements: _Elements, _: torch.dtype | None) -> Node:
            variance = _variance(elements, less)
            return cast(make("sqrt", variance) if name == "std" else variance, elements.dtype)

        return _reduced(x, name, combine, *args, **named)


_spread("var")
_spread("std")


@of_symbol("linalg_norm")
def _linalg_norm(x: Symbol, ord: Any = None, dim: Any = None, **named: Any) -> Symbol:
    is_matrix = len(dim) == 2 if isinstance(dim, (tuple, list)) else dim is None and x.rank == 2
    if is_matrix and ord not in (None, "fro"):
        refuse(x.context, f"linalg.norm of a matrix, ord={ord!r}")
    return _norm(x, 2 if ord is None else ord, dim, **named)


@of_symbol("norm", "linalg_vector_norm")
def _norm(x: Symbol, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **named: Any) -> Symbol:
    order = named.pop("ord", p)
    order = 2.0 if order in (None, "fro") else order
    if named or not isinstance(order, (int, float)):
        refuse(x.context, f"norm({', '.join(named) or f'p={order!r}'})")

    def combine(elements: _Elements, dtype: torch.dtype | None) -> Node:
        result = dtype or (elements.dtype if elements.dtype.is_floating_point else torch.float32)
        sizes = elements.to(_wide(result)).each(lambda n: make("abs", n))
        if abs(order) == math.inf:
            return cast(sizes.join("maximum" if order > 0 else "minimum"), result)
        if order == 0:
            return cast(sizes.each(lambda n: cast(make("ne", n, const(0)), n.dtype)).join("add"), result)
        if order == 1:
            return cast(sizes.join("add"), result)
        if order == 2:
            return cast(make("sqrt", sizes.each(lambda n: make("mul", n, n)).join("add")), result)
        powers = sizes.each(lambda n: make("pow", n, const(float(order))))
        return cast(make("pow", powers.join("add"), const(1.0 / order)), result)

    return _reduced(x, "norm", combine, dim, keepdim, dtype, empty=0)


# --- Products ---------------------------------------------------------------------------------------------------------


@handles("inner")
def _inner(context: TraceContext, x: Any, other: Any) -> Symbol:
    a, b = context.symbol(x), context.symbol(other)
    if not (a.rank and b.rank):
        return elementwise(context, "mul", a, b)
    for _ in range(b.rank - 1):  # every row of a with every row of b
        a = _unsqueeze(a, a.rank - 1)
    return _dot(context, a, b)


@handles("dot", "vdot", "linalg_vecdot")
def _dot(context: TraceContext, x: Any, other: Any, dim: int = -1) -> Symbol:
    product = elementwise(context, "mul", x, other)
    return _reduced(product, "dot", _SUM, dim, dtype=product.dtype, empty=0)


@handles("matmul", "mm", "mv", "bmm")
def _matmul(context: TraceContext, x: Any, other: Any) -> Symbol:
    a, b = context.symbol(x), context.symbol(other)
    if not (a.rank and b.rank):
        raise at_user_line(TraceError, "a product `@` of a number", "Multiply numbers with `*`.")
    inner = context.python_int(a.sizes[-1]), context.python_int(b.sizes[max(b.rank - 2, 0)])
    if inner[0] != inner[1]:
        raise at_user_line(
            TraceError,
            f"a product `@` of {inner[0]} and {inner[1]} elements",
            "Check the shapes of the captured tensors.",
        )
    if b.rank > 1:  # [..., m, 1, k] times [..., 1, n, k]
        b = _transpose(b)
        if a.rank > 1:
            a, b = _unsqueeze(a, a.rank - 1), _unsqueeze(b, b.rank - 2)
    return _dot(context, a, b)


# --- Searches ---------------------------------------------------------------------------------------------------------


@handles("isin")
def _isin(
    context: TraceContext, elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> Symbol:
    symbol, tests = context.symbol(elements), _reshape(context.symbol(test_elements), (-1,))
    inside = _any(elementwise(context, "eq", _unsqueeze(symbol, symbol.rank), tests), -1)
    return elementwise(context, "logical_not", inside) if invert else inside


@handles("searchsorted")
def _searchsorted(
    context: TraceContext,
    sorted_sequence: Any,
    input: Any,
    *,
    out_int32: bool = False,
    right: bool = False,
    side: str | None = None,
    sorter: Any = None,
) -> Symbol:
    """A binary search. It has few steps even if the sequence is long."""
    sequence = context.symbol(sorted_sequence)
    if sorter is not None or sequence.rank != 1:
        refuse(context, "searchsorted in more than one sequence, or with `sorter`")
    size = context.python_int(sequence.sizes[0])
    after = "gt" if right or side == "right" else "ge"
    dtype = torch.int32 if out_int32 else torch.int64

    def search(value: Node) -> Node:
        found = const(0, torch.int64)
        for bit in reversed(range(size.bit_length())):
            step = make("add", found, const(1 << bit))
            element = sequence.at((make("minimum", make("sub", step, const(1)), const(size - 1)),))
            before = make("logical_not", make(after, element, value))
            found = make("where", make("logical_and", make("le", step, const(size)), before), step, found)
        return cast(found, dtype)

    return broadcast(context, search, context.symbol(input))


@handles("bucketize")
def _bucketize(
    context: TraceContext, input: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False
) -> Symbol:
    return _searchsorted(context, boundaries, input, out_int32=out_int32, right=right)
