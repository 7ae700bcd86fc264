"""Where a mask can be true: from its graph to a few half-open intervals of kv_idx with symbolic bounds.

Every bool of a graph has two unions of intervals. `live` holds every position where it may be true. `full` holds only
positions where it is certainly true. Bounds are themselves graphs, in b, h, q_idx and captured values. Comparisons
become linear forms in kv_idx over the integers. `//`, min, max, abs and where are taken apart until a form is linear.

Bounds must be right; they need not be tight. A value that is unknown before the call (a captured number, a table entry)
enters a bound only with a guard, |value| <= 2**40, which is evaluated when the kernel runs. If the guard holds, no sum
overflows. If not, the bound says nothing. A bool that cannot be solved is live everywhere and full nowhere.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from math import prod
from typing import Any, NamedTuple, TypeVar

import torch

from ..frontend.build import make
from ..frontend.graph import Node, const
from ..frontend.ops import INT_LIMITS
from ..frontend.ranges import IntRange
from .analyze import MAX_KV_LEN, Analysis

MAX_INTERVALS = 4
LIMIT = 1 << 40  # of guarded values
FAR = 1 << 62  # means "no bound", for bounds that are chosen at run time
_EXACT = 1 << 61  # sums below this do not overflow
_MAX_CASES = 64  # of min, max, abs and where in one comparison
_DEEPEST = 12  # nested min and max that `at_most` looks through
_POSITIONS = (0, MAX_KV_LEN)  # those of a call without kv_offset
_KV_IDX = Node("index", (), torch.int64, "kv_idx")


class Interval(NamedTuple):
    """Positions `lo <= kv_idx < hi`. None is no bound. An interval with `lo >= hi` is empty."""

    lo: Node | None
    hi: Node | None


Region = tuple[Interval, ...]

EVERYWHERE: Region = (Interval(None, None),)
NOWHERE: Region = ()


@dataclass(frozen=True)
class Extent:
    """Where a bool is true.

    Attributes:
        live: holds every position where it may be true.
        full: holds only positions where it is true.
        positions: the half-open range of all positions. A part without kv_idx may have a smaller one.
    """

    live: Region
    full: Region
    positions: IntRange = _POSITIONS

    def both(self, other: Extent) -> Extent:
        """The extent of `a & b`."""
        within = self._positions(other)
        live = _intersect(self.live, other.live, _hull, within)
        return Extent(live, _intersect(self.full, other.full, _first, within), within)

    def either(self, other: Extent) -> Extent:
        """The extent of `a | b`."""
        within = self._positions(other)
        live = _tidy((*self.live, *other.live), _hull, within)
        return Extent(live, _tidy((*self.full, *other.full), _first, within), within)

    def negated(self) -> Extent:
        """The extent of `~a`."""
        within = self.positions
        return Extent(_complement(self.full, _hull, within), _complement(self.live, _first, within), within)

    def _positions(self, other: Extent) -> IntRange:
        (a_lo, a_hi), (b_lo, b_hi) = self.positions, other.positions
        return min(a_lo, b_lo), max(a_hi, b_hi)


UNKNOWN = Extent(EVERYWHERE, NOWHERE)
ALWAYS = Extent(EVERYWHERE, EVERYWHERE)
NEVER = Extent(NOWHERE, NOWHERE)


def find_extent(output: Node, analysis: Analysis) -> Extent:
    """Finds where a mask is true, or where a score is more than -inf, as far as branches of `torch.where` show it."""
    return _Solver(analysis).extent(output)


def at_most(a: Node, b: Node, depth: int = 0) -> bool:
    """Whether a <= b for all values of their operands, as far as min, max and sums of int64 show it."""
    if depth > _DEEPEST:
        return False
    depth += 1
    if a.op == "maximum":
        return all(at_most(part, b, depth) for part in a.args)
    if b.op == "minimum":
        return all(at_most(a, part, depth) for part in b.args)
    if a.op == "minimum" and any(at_most(part, b, depth) for part in a.args):
        return True
    if b.op == "maximum" and any(at_most(a, part, depth) for part in b.args):
        return True
    constant, terms, pending = 0, Counter[Node](), [(a, 1), (b, -1)]
    while pending:
        node, factor = pending.pop()
        if node.is_const:
            constant += factor * int(node.attr)
        elif node.dtype == torch.int64 and (addends := _addends(node)):  # narrower sums may wrap around
            pending += [(part, factor * times) for part, times in addends]
        else:
            terms[node] += factor
    return constant <= 0 and not any(terms.values())


def _addends(node: Node) -> list[tuple[Node, int]]:
    """The nodes whose sum a node is, each with its constant factor; none if the node is not a sum."""
    args = node.args
    if node.op in ("add", "sub"):
        return [(args[0], 1), (args[1], 1 if node.op == "add" else -1)]
    if node.op == "neg":
        return [(args[0], -1)]
    if node.op == "mul" and args[1].is_const:
        return [(args[0], int(args[1].attr))]
    if node.op == "bitwise_left_shift" and args[1].is_const and 0 <= args[1].attr < 40:
        return [(args[0], 1 << int(args[1].attr))]
    return []


# --- Unions of intervals ----------------------------------------------------------------------------------------------

_Join = Callable[[Interval, Interval], Interval]


def _hull(a: Interval, b: Interval) -> Interval:
    """The smallest interval that holds both."""
    lo = None if a.lo is None or b.lo is None else make("minimum", a.lo, b.lo)
    hi = None if a.hi is None or b.hi is None else make("maximum", a.hi, b.hi)
    return Interval(lo, hi)


def _first(a: Interval, _: Interval) -> Interval:
    """An interval inside the union of both."""
    return a


def _overlap(a: Interval, b: Interval) -> Interval:
    """The positions that are in both intervals."""
    lo = b.lo if a.lo is None else a.lo if b.lo is None else make("maximum", a.lo, b.lo)
    hi = b.hi if a.hi is None else a.hi if b.hi is None else make("minimum", a.hi, b.hi)
    return Interval(lo, hi)


def _is_empty(i: Interval, within: IntRange) -> bool:
    """Whether an interval certainly has no position; all positions are `within` a half-open range."""
    lo, hi = _constants(i, within)
    return (within[1] if hi is None else hi) <= (within[0] if lo is None else lo)


def _constants(i: Interval, within: IntRange) -> tuple[int | None, int | None]:
    """The bounds as constants, None where they are not known."""
    lo = within[0] if i.lo is None else i.lo.attr if i.lo.is_const else None
    hi = within[1] if i.hi is None else i.hi.attr if i.hi.is_const else None
    return lo, hi


def _tidy(intervals: Region, join: _Join, within: IntRange) -> Region:
    """Joins intervals that share a bound, which is exact. Then joins the closest ones until few enough are left."""
    kept: list[Interval] = []
    for interval in intervals:
        if _is_empty(interval, within):
            continue
        for i, other in enumerate(kept):
            # For all bounds, the union of [a, x) and [a, y) is [a, max(x, y)), and the union of [a, x) and [x, y) is
            # [min(a, x), max(x, y)), even if one of them is empty.
            touch = (interval.lo and interval.lo == other.hi) or (interval.hi and interval.hi == other.lo)
            if touch or interval.lo == other.lo or interval.hi == other.hi:
                kept[i] = _hull(interval, other)
                break
        else:
            kept.append(interval)
    if len(kept) < len(intervals) and len(kept) > 1:
        return _tidy(tuple(kept), join, within)
    while len(kept) > MAX_INTERVALS:
        i, j = _closest(kept, within)
        kept[i] = join(kept[i], kept.pop(j))
    return tuple(kept)


def _closest(intervals: list[Interval], within: IntRange) -> tuple[int, int]:
    """The pair of constant intervals with the smallest gap; the last pair if no two are constant."""
    constants = [_constants(i, within) for i in intervals]

    def gap(pair: tuple[int, int]) -> int:
        (a_lo, a_hi), (b_lo, b_hi) = constants[pair[0]], constants[pair[1]]
        if a_lo is None or a_hi is None or b_lo is None or b_hi is None:
            return FAR
        return max(a_lo, b_lo) - min(a_hi, b_hi)

    return min(reversed([*combinations(range(len(intervals)), 2)]), key=gap)


def _intersect(a: Region, b: Region, join: _Join, within: IntRange) -> Region:
    return _tidy(tuple(_overlap(x, y) for x in a for y in b), join, within)


def _complement(region: Region, join: _Join, within: IntRange) -> Region:
    """Positions outside every interval. The two sides of an empty interval (lo >= hi) together are all positions."""
    result = EVERYWHERE
    for interval in region:
        sides = [Interval(None, interval.lo)] if interval.lo is not None else []
        sides += [Interval(interval.hi, None)] if interval.hi is not None else []
        result = _intersect(result, tuple(sides), join, within)
    return result


# --- Linear forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """`constant + sum(coefficient * node)`. It is exact over the integers if all `guards` are small.

    A guard stays even if its term cancels: in `q + kv < q` the sum may overflow, although the difference cannot.
    """

    constant: int
    terms: dict[Node, int]
    guards: tuple[Node, ...] = ()

    def plus(self, other: _Form, factor: int = 1) -> _Form:
        terms = dict(self.terms)
        for node, coefficient in other.terms.items():
            terms[node] = terms.get(node, 0) + factor * coefficient
        kept = {n: c for n, c in terms.items() if c}
        return _Form(self.constant + factor * other.constant, kept, _union(self.guards, other.guards))

    def times(self, factor: int) -> _Form:
        return _Form(0, {}).plus(self, factor)

    def shifted(self, constant: int) -> _Form:
        return _Form(self.constant + constant, self.terms, self.guards)

    def without(self, *nodes: Node) -> _Form:
        return _Form(self.constant, {n: c for n, c in self.terms.items() if n not in nodes}, self.guards)


def _union(*guards: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(node for some in guards for node in some))


def _integer(value: int) -> Node:
    return const(value, torch.int64)


class _Unsolved(Exception):
    """A comparison that has no linear form, or whose sums might overflow."""


_T = TypeVar("_T")


def _once(find: Callable[[_Solver, Node], _T]) -> Callable[[_Solver, Node], _T]:
    """Remembers what a method of the solver finds for a node, or that it is `_Unsolved`."""

    def found(solver: _Solver, node: Node) -> _T:
        key = find, node
        if key not in solver.found:
            solver.found[key] = _Unsolved
            with suppress(_Unsolved):
                solver.found[key] = find(solver, node)
        if solver.found[key] is _Unsolved:
            raise _Unsolved
        return solver.found[key]

    return found


class _Solver:
    def __init__(self, analysis: Analysis) -> None:
        self.analysis = analysis
        self.ranges = dict(analysis.ranges)
        self.on_kv = set(analysis.on_kv)
        self.cases = 0
        self.found: dict[tuple[Callable, Node], Any] = {}
        for node in analysis.nodes:  # operands first, so that no recursion below is as deep as the graph
            if node.dtype == torch.bool or node.dtype.is_floating_point:
                self.extent(node)
            elif node in analysis.on_kv:
                with suppress(_Unsolved):
                    self._size(self._linear(node))

    @_once
    def extent(self, node: Node) -> Extent:
        """Where a bool is true, or where a score is more than -inf, as far as constant branches show it."""
        args = node.args
        if node.dtype.is_floating_point and node.op != "where":
            if node.op == "cast" and args[0].dtype.is_floating_point:
                return self.extent(args[0])
            return NEVER if node.is_const and node.attr == float("-inf") else ALWAYS
        if node not in self.on_kv and node.dtype == torch.bool:
            return _when(node)
        if node.op == "logical_and":
            return self.extent(args[0]).both(self.extent(args[1]))
        if node.op == "logical_or":
            return self.extent(args[0]).either(self.extent(args[1]))
        if node.op == "logical_not":
            return self.extent(args[0]).negated()
        if node.op == "where":
            return self._choose(args[0], self.extent(args[1]), self.extent(args[2]))
        if node.op == "logical_xor" or (node.op in ("eq", "ne") and args[0].dtype == torch.bool):
            differ = self._choose(args[0], self.extent(args[1]).negated(), self.extent(args[1]))
            return differ.negated() if node.op == "eq" else differ
        if node.op in ("lt", "le") and args[0].dtype == torch.bool:
            a, b = self.extent(args[0]).negated(), self.extent(args[1])
            return a.both(b) if node.op == "lt" else a.either(b)
        if node.op in ("lt", "le", "eq", "ne") and not args[0].dtype.is_floating_point:
            return self._compare(node.op, *args)
        return UNKNOWN

    def _choose(self, condition: Node, yes: Extent, no: Extent) -> Extent:
        chosen = self.extent(condition)
        return chosen.both(yes).either(chosen.negated().both(no))

    def _compare(self, op: str, a: Node, b: Node) -> Extent:
        self.cases = 0
        try:
            a, b = self._clamped(a, self._linear(b)), self._clamped(b, self._linear(a))
            difference = self._linear(a).plus(self._linear(b), -1)
            less = self._negative(difference if op == "lt" else difference.shifted(-1))
            if op in ("lt", "le"):
                return less
            equal = less.both(self._negative(difference.times(-1).shifted(-1)))
            return equal if op == "eq" else equal.negated()
        except _Unsolved:
            return UNKNOWN

    def _clamped(self, side: Node, other: _Form) -> Node:
        """Clamps a side of a comparison that is one value. Beyond +-LIMIT, it compares like +-LIMIT."""
        if side in self.on_kv or self._size(other) >= LIMIT or max(map(abs, self.ranges[side])) <= LIMIT:
            return side
        clamped = make("minimum", make("maximum", side, _integer(-LIMIT)), _integer(LIMIT))
        self.ranges[clamped] = (-LIMIT, LIMIT)
        return clamped

    @_once
    def _linear(self, node: Node) -> _Form:
        """Takes an integer node apart. A part that does not depend on kv_idx stays whole, as the mod computes it."""
        form = self._take_apart(node)
        if node in self.on_kv and node not in form.terms:
            if self._size(form) >= _EXACT if node.dtype == torch.int64 else not self._proven(node):
                raise _Unsolved
            form = _Form(form.constant, form.terms, self._guards(form))
        return form

    def _proven(self, node: Node) -> bool:
        """Whether a value of a narrow type cannot have wrapped around."""
        limits = INT_LIMITS[node.dtype]
        low, high = self.ranges.get(node, limits)
        return limits[0] < low and high < limits[1]

    def _take_apart(self, node: Node) -> _Form:
        """The form of a node. `x % d` is `x - d * (x // d)`; shifts and masks of bits are `//` and `%`."""
        args = node.args
        if node.is_const:
            return _Form(int(node.attr), {})
        if node not in self.on_kv:
            return _Form(0, {node: 1}, self._reach(node)[1])
        if addends := _addends(node):
            return reduce(_Form.plus, [self._linear(part).times(factor) for part, factor in addends])
        if node.op == "cast" and args[0].dtype != torch.bool and not args[0].dtype.is_floating_point:
            low, high = self.ranges.get(args[0], INT_LIMITS[torch.int64])
            limits = INT_LIMITS[node.dtype]
            if node.dtype == torch.int64 or limits[0] <= low <= high <= limits[1]:
                return self._linear(args[0])
        if len(args) == 2 and args[1].is_const:
            x, by = args[0], int(args[1].attr)
            if node.op == "bitwise_right_shift" and 0 <= by < 40:
                return self._divided(x, 1 << by)
            if node.op == "remainder" and by > 0:
                return self._linear(x).plus(self._divided(x, by), -by)
            if node.op == "bitwise_and" and by > 0 and by & (by + 1) == 0:
                return self._linear(x).plus(self._divided(x, by + 1), -by - 1)
        return _Form(0, {node: 1})

    def _divided(self, x: Node, divisor: int) -> _Form:
        quotient = make("floor_divide", x, const(divisor, x.dtype))
        self.on_kv.add(quotient)
        return _Form(0, {quotient: 1})

    @_once
    def _reach(self, node: Node) -> tuple[int, tuple[Node, ...]]:
        """An upper bound of |node|, and the values that must be small for it to hold."""
        known = abs(int(node.attr)) if node.is_const else max(map(abs, self.ranges.get(node, (FAR, FAR))))
        if node.is_const or known <= LIMIT:
            return known, ()
        if node not in self.on_kv:
            return LIMIT, (node,)
        if node.op in ("maximum", "minimum", "abs", "floor_divide", "where"):
            forms = [self._linear(a) for a in node.args if a.dtype != torch.bool]
            return max(map(self._size, forms)), _union(*map(self._guards, forms))
        raise _Unsolved

    def _size(self, form: _Form) -> int:
        """An upper bound of |form| if its guards hold."""
        return abs(form.constant) + sum(abs(c) * self._reach(n)[0] for n, c in form.terms.items())

    def _guards(self, form: _Form) -> tuple[Node, ...]:
        """The values that must be small for `_size` to hold, also those inside min, max and quotients."""
        return _union(form.guards, *(self._reach(n)[1] for n in form.terms))

    def _nonlinear(self, form: _Form) -> list[Node]:
        """The terms that depend on kv_idx and are not linear in it."""
        return [node for node in form.terms if node in self.on_kv and node != _KV_IDX]

    # --- form < 0 -----------------------------------------------------------------------------------------------------

    def _negative(self, form: _Form) -> Extent:
        """Extent of `form < 0`."""
        self.cases += 1
        if self.cases > _MAX_CASES or self._size(form) >= _EXACT:
            raise _Unsolved
        nonlinear = self._nonlinear(form)
        for node in nonlinear:
            cases = self._cases(node, form.without(node), form.terms[node])
            if cases is not None:
                return cases
        if not nonlinear:
            return self._bound(form, _integer(0))
        if any(node.op != "floor_divide" or not node.args[1].is_const or node.args[1].attr <= 0 for node in nonlinear):
            raise _Unsolved
        if len(nonlinear) == 1 and _KV_IDX not in form.terms:
            return self._quotient(nonlinear[0], form.terms[nonlinear[0]], form.without(nonlinear[0]))
        above = self._negative(self._relaxed(form, nonlinear, lower=True))
        below = self._negative(self._relaxed(form, nonlinear, lower=False))
        return Extent(above.live, below.full, above.positions)

    def _cases(self, node: Node, rest: _Form, c: int) -> Extent | None:
        """Extent of `c * node + rest < 0` for a node that is one of two values: min, max, abs, where or a bool."""
        args = node.args
        if node.op in ("maximum", "minimum", "where"):
            values = [self._linear(x) for x in args[-2:]]
        elif node.op == "abs" and (node.dtype == torch.int64 or self._proven(node)):
            values = [self._linear(args[0]), self._linear(args[0]).times(-1)]
        elif node.op == "cast" and args[0].dtype == torch.bool:
            values = [_Form(1, {}), _Form(0, {})]
        else:
            return None
        a, b = (self._negative(rest.plus(value, c)) for value in values)
        if node.op in ("where", "cast"):
            return self._choose(args[0], a, b)
        return a.both(b) if (node.op == "minimum") == (c < 0) else a.either(b)

    def _quotient(self, node: Node, c: int, rest: _Form) -> Extent:
        """`c * (x // d) + rest < 0`: `x // d < e` is `x < d * e`, and `x // d >= e` is `x >= d * e`."""
        inner, d = self._linear(node.args[0]), int(node.args[1].attr)
        if self._size(rest) // abs(c) + 1 >= _EXACT // (4 * d):
            raise _Unsolved
        product = make("mul", self._edge(rest, c, _integer(0)), _integer(d))
        if c > 0:
            found = self._bound(inner, make("neg", product))
        else:
            found = self._bound(inner.times(-1).shifted(-1), product)
        return _guarded(found, rest.guards)

    def _relaxed(self, form: _Form, nonlinear: list[Node], lower: bool) -> _Form:
        """A form without `//` that is below (or above) a multiple of `form`; (x - d + 1) / d <= x // d <= x / d."""
        scale = prod(int(node.args[1].attr) for node in nonlinear)
        result = form.without(*nonlinear).times(scale)
        for node in nonlinear:
            c, d = form.terms[node], int(node.args[1].attr)
            inner = self._linear(node.args[0]).shifted(1 - d if (c > 0) == lower else 0)
            result = result.plus(inner, c * (scale // d))
        return result

    def _bound(self, form: _Form, extra: Node) -> Extent:
        """Extent of `form + extra < 0`, where `extra` does not depend on kv_idx."""
        if self._nonlinear(form):
            if extra.is_const:
                return self._negative(form.shifted(int(extra.attr)))
            return self._negative(form.plus(_Form(0, {extra: 1}, (extra,))))
        rest, a = form.without(_KV_IDX), form.terms.get(_KV_IDX)
        if a is None:
            found = _when(make("lt", make("add", self._sum(rest), extra), _integer(0)))
        else:
            edge = self._edge(rest, a, extra)
            found = _exactly(Interval(None, edge) if a > 0 else Interval(edge, None), self.analysis.positions)
        return _guarded(found, form.guards)

    def _edge(self, rest: _Form, a: int, extra: Node) -> Node:
        """`a * x + rest + extra < 0` is `x < edge` where a > 0, and `x >= edge` where a < 0."""
        if a > 0:  # the next integer from -(rest + extra) / a on
            total = make("sub", self._sum(rest.times(-1).shifted(a - 1)), extra)
        else:  # the first integer above (rest + extra) / -a
            total = make("add", self._sum(rest.shifted(-a)), extra)
        return make("floor_divide", total, _integer(abs(a)))

    def _sum(self, form: _Form) -> Node:
        """Makes a node of a form without kv_idx. Equal forms give equal nodes."""
        total = _integer(form.constant)
        for node, coefficient in sorted(form.terms.items(), key=lambda term: term[0].digest):
            value = node if node.dtype == torch.int64 else Node("cast", (node,), torch.int64)
            total = make("add", total, value if coefficient == 1 else make("mul", value, _integer(coefficient)))
        return total


def _exactly(interval: Interval, within: IntRange) -> Extent:
    """The extent of an interval. Bounds that no position `within` a half-open range reaches are left out."""
    lo, hi = _constants(interval, within)
    lo_node = None if lo is not None and lo <= within[0] else interval.lo
    hi_node = None if hi is not None and hi >= within[1] else interval.hi
    region = NOWHERE if _is_empty(interval, within) else (Interval(lo_node, hi_node),)
    return Extent(region, region, within)


def _when(condition: Node) -> Extent:
    """Everywhere or nowhere, depending on a bool that does not depend on kv_idx."""
    if condition.is_const:
        return ALWAYS if condition.attr else NEVER
    return _exactly(Interval(make("where", condition, _integer(-FAR), _integer(FAR)), None), _POSITIONS)


def _guarded(extent: Extent, guards: Sequence[Node]) -> Extent:
    """The extent if every guarded value is small; otherwise nothing is known."""
    if not guards:
        return extent
    limits = [make("logical_and", make("le", _integer(-LIMIT), g), make("le", g, _integer(LIMIT))) for g in guards]
    small = reduce(partial(make, "logical_and"), limits)

    def if_small(bound: Node | None, otherwise: int) -> Node | None:
        return bound and make("where", small, bound, _integer(otherwise))

    live = tuple(Interval(if_small(i.lo, -FAR), if_small(i.hi, FAR)) for i in extent.live)
    full = tuple(Interval(if_small(i.lo or _integer(-FAR), FAR), i.hi) for i in extent.full)
    return Extent(live or (Interval(if_small(_integer(FAR), -FAR), None),), full, extent.positions)
