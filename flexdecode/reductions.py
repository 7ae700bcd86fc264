"""Reductions over small dimensions of captured tensors, such as one row.

The extents are constants of the kernel. A few elements become a tree of elementwise operations, more a loop.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from .build import cast, make
from .elementwise import as_dtype as _as_dtype
from .elementwise import broadcast as _broadcast
from .elementwise import elementwise
from .errors import TraceError, at_user_line
from .graph import Node, const
from .handlers import HANDLERS as _HANDLERS
from .handlers import handles as _handles
from .handlers import refuse as _refuse
from .joins import checked_count
from .ops import HALF
from .symbol import Symbol, TraceContext, innermost
from .views import _dim, _permuted, _reshape, _unsqueeze

_UNROLLED = 8  # elements up to which their text stands side by side, so that the bounds of a mask can see it


class _Elements(NamedTuple):
    """What is reduced: a node for each element, or one for the elements of all steps of a loop."""

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

    def join(self, name: str) -> Node:
        """Joins the elements by a row of the op table, pair by pair, so that no chain is longer than it has to be."""
        if self.step is not None:
            (body,) = self.nodes
            return Node("fold", (body,), body.dtype, (*self.step.attr, name))
        level = self.nodes
        while len(level) > 1:
            pairs = [make(name, *level[k : k + 2]) for k in range(0, len(level) - 1, 2)]
            level = pairs + level[len(level) - len(level) % 2 :]
        return level[0]


Combine = Callable[[_Elements], Node]


def _dims(symbol: Symbol, dim: Any) -> list[int]:
    """The dimensions to reduce, all if `dim` is None."""
    if dim is None or dim == () or dim == []:
        return list(range(symbol.rank))
    given = dim if isinstance(dim, (tuple, list)) else (dim,)
    if symbol.rank == 0 and set(given) <= {0, -1}:
        return []
    return sorted({_dim(symbol, d) for d in given})


def _reduced(
    context: TraceContext,
    what: str,
    x: Any,
    dim: Any,
    keepdim: bool,
    combine: Combine,
    empty: Any = None,
    unrolled: bool = False,
) -> Symbol:
    """Combines the elements along dimensions.

    Args:
        context: of the run.
        what: the function, for errors.
        x: what is reduced.
        dim: as in PyTorch.
        keepdim: as in PyTorch.
        combine: joins elements.
        empty: the result where there are none.
        unrolled: whether `combine` needs one node for each element.
    """
    symbol = context.symbol(x)
    dims = _dims(symbol, dim)
    counts = [context.python_int(symbol.sizes[d]) for d in dims]
    total = checked_count(context, what, math.prod(counts))
    if total == 0 and empty is None:
        raise at_user_line(TraceError, f"torch.{what} of no elements", "Give the dimension at least one element.")
    kept = [d for d in range(symbol.rank) if d not in dims]
    sizes = [const(1) if d in dims else symbol.sizes[d] for d in (range(symbol.rank) if keepdim else kept)]

    def at(index: tuple[Node, ...]) -> Node:
        rest = [i for d, i in enumerate(index) if d not in dims] if keepdim else index
        fixed = dict(zip(kept, rest, strict=True))

        def element(place: Sequence[Node]) -> Node:
            full = fixed | dict(zip(dims, place, strict=True))
            return symbol.at(tuple(full[d] for d in range(symbol.rank)))

        if total == 0:
            return const(empty, dtype)
        if total > _UNROLLED and not unrolled:
            step = Node("step", (), torch.int64, (innermost(index) + 1, total))
            return combine(_Elements([element(_place(step, counts))], step))
        places = itertools.product(*map(range, counts))
        return combine(_Elements([element([const(k) for k in place]) for place in places]))

    dtype = combine(_Elements([Node("axis", (), symbol.dtype)])).dtype
    return Symbol(context, tuple(sizes), at, dtype) if sizes else context.scalar(at(()))


def _place(step: Node, counts: list[int]) -> list[Node]:
    """The index of a step in each dimension."""
    place: list[Node] = []
    for count in reversed(counts[1:]):
        place.insert(0, make("remainder", step, const(count)))
        step = make("floor_divide", step, const(count))
    return [step, *place]


def _joined(row: str, dtype: torch.dtype | None) -> Combine:
    """A sum or product in PyTorch's type: int64 for integers and bools; half types in float32, rounded once."""

    def combine(elements: _Elements) -> Node:
        given = elements.dtype
        result = dtype or (given if given.is_floating_point else torch.int64)
        computed = torch.float32 if result in HALF else result
        return cast(elements.each(lambda n: cast(n, computed)).join(row), result)

    return combine


class _Options(NamedTuple):
    dim: Any
    keepdim: bool
    dtype: torch.dtype | None


def _options(context: TraceContext, what: str, args: tuple, named: dict) -> _Options:
    """`dim`, `keepdim` and `dtype` as PyTorch and numpy name them, by position in this order."""
    given = dict(named)
    dim = given.pop("dim", given.pop("axis", None))
    keepdim, dtype = given.pop("keepdim", given.pop("keepdims", False)), given.pop("dtype", None)
    if args:
        dim, *more = args
        if more:
            keepdim, *more = more
        if more:
            dtype, *more = more
        if more:
            _refuse(context, f"{what} with these arguments")
    if given:
        _refuse(context, f"{what}({', '.join(given)}=)")
    return _Options(dim, bool(keepdim), dtype)


@_handles("sum")
def _sum(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
    dim, keepdim, dtype = _options(context, "sum", args, named)
    return _reduced(context, "sum", x, dim, keepdim, _joined("add", dtype), empty=0)


@_handles("prod")
def _prod(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
    dim, keepdim, dtype = _options(context, "prod", args, named)
    return _reduced(context, "prod", x, dim, keepdim, _joined("mul", dtype), empty=1)


@_handles("mean")
def _mean(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
    dim, keepdim, dtype = _options(context, "mean", args, named)
    symbol = context.symbol(x)
    if not (dtype or symbol.dtype).is_floating_point:
        raise at_user_line(TraceError, f"the mean of {symbol.dtype} is not defined", "Convert it first, x.float().")

    def combine(elements: _Elements) -> Node:
        result = dtype or elements.dtype
        wide = torch.float32 if result in HALF else result
        return cast(make("div", _joined("add", wide)(elements), const(elements.extent)), result)

    return _reduced(context, "mean", symbol, dim, keepdim, combine)


def _truth(name: str, empty: bool) -> Callable[..., Symbol]:
    def reduce(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
        dim, keepdim, _ = _options(context, name, args, named)

        def combine(elements: _Elements) -> Node:
            bools = elements.each(lambda n: cast(n, torch.bool))
            found = bools.join("logical_or" if name == "any" else "logical_and")
            return cast(found, torch.uint8) if elements.dtype == torch.uint8 else found

        return _reduced(context, name, x, dim, keepdim, combine, empty)

    return reduce


_HANDLERS |= {"any": _truth("any", False), "all": _truth("all", True)}


@_handles("count_nonzero")
def _count_nonzero(context: TraceContext, x: Any, dim: Any = None) -> Symbol:
    nonzero = _as_dtype(context, context.symbol(x), torch.bool)
    return _reduced(context, "count_nonzero", nonzero, dim, False, _joined("add", None), empty=0)


# --- Extremes ---------------------------------------------------------------------------------------------------------


def _extreme(name: str, largest: bool) -> Callable[..., Symbol]:
    def reduce(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
        dim, keepdim, _ = _options(context, name, args, named)
        return _reduced(context, name, x, dim, keepdim, lambda elements: elements.join(_EXTREME[largest]))

    return reduce


_EXTREME = {True: "maximum", False: "minimum"}
_HANDLERS |= {"amax": _extreme("amax", True), "amin": _extreme("amin", False)}


def _first(largest: bool) -> Combine:
    """The position of the first extreme value, in which NaN counts as one."""

    def combine(elements: _Elements) -> Node:
        best, place = elements.nodes[0], const(0, torch.int64)
        for k, node in enumerate(elements.nodes[1:], start=1):
            better = make("lt", best, node) if largest else make("lt", node, best)
            if node.dtype.is_floating_point:
                nan = make("logical_and", make("isnan", node), make("logical_not", make("isnan", best)))
                better = make("logical_and", make("logical_or", better, nan), make("logical_not", make("isnan", best)))
            best, place = make("where", better, node, best), make("where", better, const(k, torch.int64), place)
        return place

    return combine


def _position(name: str, largest: bool) -> Callable[..., Symbol]:
    def reduce(context: TraceContext, x: Any, *args: Any, **named: Any) -> Symbol:
        dim, keepdim, _ = _options(context, name, args, named)
        return _reduced(context, name, x, dim, keepdim, _first(largest), unrolled=True)

    return reduce


_HANDLERS |= {"argmax": _position("argmax", True), "argmin": _position("argmin", False)}


class ValuesAndIndices(NamedTuple):
    """What `x.max(dim)` gives."""

    values: Symbol
    indices: Symbol


def _max_or_min(name: str) -> Callable[..., Any]:
    of_two = _HANDLERS[name]

    def reduce(context: TraceContext, x: Any, *args: Any, **named: Any) -> Any:
        if "other" in named or (args and isinstance(args[0], (Symbol, torch.Tensor))):
            return of_two(context, x, *args, **named)
        dim, keepdim, _ = _options(context, name, args, named)
        values = _HANDLERS["a" + name](context, x, dim=dim, keepdim=keepdim)
        if dim is None:
            return values
        return ValuesAndIndices(values, _HANDLERS["arg" + name](context, x, dim=dim, keepdim=keepdim))

    return reduce


_HANDLERS |= {name: _max_or_min(name) for name in ("max", "min")}


# --- Sums of other things ---------------------------------------------------------------------------------------------


@_handles("logsumexp")
def _logsumexp(context: TraceContext, x: Any, dim: Any, keepdim: bool = False) -> Symbol:
    def combine(elements: _Elements) -> Node:
        given = elements.dtype
        wide = given if given.is_floating_point and given not in HALF else torch.float32
        floats = elements.each(lambda n: cast(n, wide))
        largest = floats.join("maximum")
        shift = make("where", make("isinf", largest), cast(const(0), largest.dtype), largest)
        total = floats.each(lambda n: make("exp", make("sub", n, shift))).join("add")
        return cast(make("add", make("log", total), shift), given if given.is_floating_point else torch.float32)

    return _reduced(context, "logsumexp", x, dim, keepdim, combine)


def _spread(name: str) -> Callable[..., Symbol]:
    def reduce(
        context: TraceContext, x: Any, *args: Any, correction: Any = 1, unbiased: bool = True, **named: Any
    ) -> Symbol:
        # PyTorch's forms: (unbiased), (dim, unbiased, keepdim), (dim, *, correction, keepdim).
        if args and isinstance(args[0], bool):
            unbiased, args = args[0], args[1:]
        elif len(args) > 1:
            unbiased, args = bool(args[1]), (args[0], *args[2:])
        dim, keepdim, _ = _options(context, name, args, named)
        less = 0 if not unbiased else 1 if correction is None else correction

        def combine(elements: _Elements) -> Node:
            given = elements.dtype
            wide = elements.each(lambda n: cast(n, torch.float32 if given in HALF else given))
            mean = make("div", wide.join("add"), const(elements.extent))
            away = wide.each(lambda n: make("sub", n, mean))
            variance = make(
                "div", away.each(lambda d: make("mul", d, d)).join("add"), const(max(0, elements.extent - less))
            )
            return cast(make("sqrt", variance) if name == "std" else variance, given)

        return _reduced(context, name, x, dim, keepdim, combine)

    return reduce


_HANDLERS |= {"var": _spread("var"), "std": _spread("std")}


@_handles("linalg_norm")
def _linalg_norm(context: TraceContext, x: Any, ord: Any = None, dim: Any = None, **named: Any) -> Symbol:
    is_matrix = len(dim) == 2 if isinstance(dim, (tuple, list)) else dim is None and context.symbol(x).rank == 2
    if is_matrix and ord not in (None, "fro"):
        _refuse(context, f"linalg.norm of a matrix, ord={ord!r}")
    return _norm(context, x, 2 if ord is None else ord, dim, **named)


@_handles("norm", "linalg_vector_norm")
def _norm(
    context: TraceContext, x: Any, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **named: Any
) -> Symbol:
    order = named.pop("ord", p)
    order = 2.0 if order in (None, "fro") else order
    if named or not isinstance(order, (int, float)):
        _refuse(context, f"norm({', '.join(named) or f'p={order!r}'})")

    def combine(elements: _Elements) -> Node:
        given = elements.dtype
        result = dtype or (given if given.is_floating_point else torch.float32)
        sizes = elements.each(lambda n: make("abs", cast(n, torch.float32 if result in HALF else result)))
        if abs(order) == math.inf:
            return cast(sizes.join(_EXTREME[order > 0]), result)
        if order == 0:
            return cast(sizes.each(lambda n: cast(make("ne", n, const(0)), n.dtype)).join("add"), result)
        if order == 1:
            return cast(sizes.join("add"), result)
        if order == 2:
            return cast(make("sqrt", sizes.each(lambda n: make("mul", n, n)).join("add")), result)
        powers = sizes.each(lambda n: make("pow", n, const(float(order))))
        return cast(make("pow", powers.join("add"), const(1.0 / order)), result)

    return _reduced(context, "norm", x, dim, keepdim, combine, empty=0)


# --- Products ---------------------------------------------------------------------------------------------------------


@_handles("inner")
def _inner(context: TraceContext, x: Any, other: Any) -> Symbol:
    a, b = context.symbol(x), context.symbol(other)
    if not (a.rank and b.rank):
        return elementwise(context, "mul", a, b)
    for _ in range(b.rank - 1):  # every row of one with every row of the other
        a = _unsqueeze(context, a, a.rank - 1)
    return _dot(context, a, b)


@_handles("dot", "vdot", "linalg_vecdot")
def _dot(context: TraceContext, x: Any, other: Any, dim: int = -1) -> Symbol:
    product = elementwise(context, "mul", x, other)
    return _reduced(context, "dot", product, dim, False, _joined("add", product.dtype), empty=0)


@_handles("matmul", "mm", "mv", "bmm")
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
        order = list(range(b.rank))
        order[-2:] = order[:-3:-1]
        b = _permuted(b, order)
        if a.rank > 1:
            a, b = _unsqueeze(context, a, a.rank - 1), _unsqueeze(context, b, b.rank - 2)
    return _dot(context, a, b)


# --- Searches ---------------------------------------------------------------------------------------------------------


@_handles("isin")
def _isin(
    context: TraceContext, elements: Any, test_elements: Any, *, assume_unique: bool = False, invert: bool = False
) -> Symbol:
    symbol, tests = context.symbol(elements), _reshape(context, test_elements, (-1,))
    found = elementwise(context, "eq", _unsqueeze(context, symbol, symbol.rank), tests)
    inside = _HANDLERS["any"](context, found, dim=-1)
    return elementwise(context, "logical_not", inside) if invert else inside


@_handles("searchsorted")
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
    """A binary search: its steps are few however long the sequence is."""
    sequence = context.symbol(sorted_sequence)
    if sorter is not None or sequence.rank != 1:
        _refuse(context, "searchsorted in more than one sequence, or with `sorter`")
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

    return _broadcast(context, search, context.symbol(input))


@_handles("bucketize")
def _bucketize(
    context: TraceContext, input: Any, boundaries: Any, *, out_int32: bool = False, right: bool = False
) -> Symbol:
    return _searchsorted(context, boundaries, input, out_int32=out_int32, right=right)
