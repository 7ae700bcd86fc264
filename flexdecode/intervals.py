"""Where a mask can be true: from its graph to a few half-open intervals of kv_idx with symbolic bounds.

For every bool of a graph two unions of intervals are computed: `live` holds every position where it may be true, `full`
only positions where it is certainly true. Bounds are graphs themselves, in b, h, q_idx and captured values. Comparisons
become linear forms in kv_idx over the integers; `//`, min, max, abs and where are taken apart until a form is linear.

Soundness comes before tightness. A value that is unknown before the call (a captured number, a table entry) enters a
bound only under a guard, |value| <= 2**40, evaluated when the kernel runs: inside it no sum overflows, outside it the
bound says nothing. What cannot be solved is live everywhere and full nowhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations
from typing import NamedTuple

import torch

from .analyze import MAX_KV_LEN, Facts
from .build import make
from .graph import Node, const
from .ops import INT_LIMITS

MAX_INTERVALS = 4
LIMIT = 1 << 40  # of guarded values
FAR = 1 << 62  # stands for no bound where a bound is chosen at run time
_EXACT = 1 << 61  # sums below this do not overflow
_MAX_CASES = 64  # of min, max, abs and where in one comparison


class Interval(NamedTuple):
    """Positions `lo <= kv_idx < hi`; None is no bound, and `lo >= hi` is empty."""

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
    """

    live: Region
    full: Region

    def both(self, other: Extent) -> Extent:
        """The extent of `a & b`."""
        return Extent(_intersect(self.live, other.live, _hull), _intersect(self.full, other.full, _drop))

    def either(self, other: Extent) -> Extent:
        """The extent of `a | b`."""
        return Extent(_tidy((*self.live, *other.live), _hull), _tidy((*self.full, *other.full), _drop))

    def negated(self) -> Extent:
        """The extent of `~a`."""
        return Extent(_complement(self.full, _hull), _complement(self.live, _drop))


UNKNOWN = Extent(EVERYWHERE, NOWHERE)
ALWAYS = Extent(EVERYWHERE, EVERYWHERE)
NEVER = Extent(NOWHERE, NOWHERE)


def solve_mask(output: Node, facts: Facts) -> Extent:
    """Finds the extent of the bool `output`."""
    return _Solver(facts).extent(output)


def solve_score(output: Node, facts: Facts) -> Region:
    """Finds where the score `output` may be anything but -inf: the branches of `torch.where` tell."""
    return _Solver(facts).finite(output).live


# --- Unions of intervals ----------------------------------------------------------------------------------------------

_Reduce = Callable[[Interval, Interval], Interval]


def _hull(a: Interval, b: Interval) -> Interval:
    """One interval that holds both."""
    lo = None if a.lo is None or b.lo is None else make("minimum", a.lo, b.lo)
    hi = None if a.hi is None or b.hi is None else make("maximum", a.hi, b.hi)
    return Interval(lo, hi)


def _drop(a: Interval, _: Interval) -> Interval:
    """One interval that both hold, at least in part."""
    return a


def _cut(a: Interval, b: Interval) -> Interval:
    lo = b.lo if a.lo is None else a.lo if b.lo is None else make("maximum", a.lo, b.lo)
    hi = b.hi if a.hi is None else a.hi if b.hi is None else make("minimum", a.hi, b.hi)
    return Interval(lo, hi)


def _is_empty(i: Interval) -> bool:
    lo, hi = _constants(i)
    return (MAX_KV_LEN if hi is None else hi) <= (0 if lo is None else lo)


def _constants(i: Interval) -> tuple[int | None, int | None]:
    """The bounds as far as they are known; positions are from 0 to MAX_KV_LEN - 1."""
    lo = 0 if i.lo is None else i.lo.attr if i.lo.is_const else None
    hi = MAX_KV_LEN if i.hi is None else i.hi.attr if i.hi.is_const else None
    return lo, hi


def _tidy(intervals: Region, reduce: _Reduce) -> Region:
    """Joins intervals that share a bound, which is exact, and then the closest ones until few enough are left."""
    kept: list[Interval] = []
    for interval in intervals:
        if _is_empty(interval):
            continue
        for i, other in enumerate(kept):
            # Whatever their bounds are, [a, x) and [a, y) make [a, max(x, y)), and [a, x) and [x, y) make
            # [min(a, x), max(x, y)), also when one of them is empty.
            touch = (interval.lo and interval.lo == other.hi) or (interval.hi and interval.hi == other.lo)
            if touch or interval.lo == other.lo or interval.hi == other.hi:
                kept[i] = _hull(interval, other)
                break
        else:
            kept.append(interval)
    if len(kept) < len(intervals) and len(kept) > 1:
        return _tidy(tuple(kept), reduce)
    while len(kept) > MAX_INTERVALS:
        i, j = _closest(kept)
        kept[i] = reduce(kept[i], kept.pop(j))
    return tuple(kept)


def _closest(intervals: list[Interval]) -> tuple[int, int]:
    """The pair of constant intervals with the smallest gap; the last pair where there is none."""
    constants = [_constants(i) for i in intervals]

    def gap(pair: tuple[int, int]) -> int:
        (a_lo, a_hi), (b_lo, b_hi) = constants[pair[0]], constants[pair[1]]
        if a_lo is None or a_hi is None or b_lo is None or b_hi is None:
            return FAR
        return max(a_lo, b_lo) - min(a_hi, b_hi)

    return min(reversed([*combinations(range(len(intervals)), 2)]), key=gap)


def _intersect(a: Region, b: Region, reduce: _Reduce) -> Region:
    return _tidy(tuple(_cut(x, y) for x in a for y in b), reduce)


def _complement(region: Region, reduce: _Reduce) -> Region:
    """Positions outside every interval; of an empty interval (lo >= hi) both sides together are everything."""
    result = EVERYWHERE
    for interval in region:
        sides = [Interval(None, interval.lo)] if interval.lo is not None else []
        sides += [Interval(interval.hi, None)] if interval.hi is not None else []
        result = _intersect(result, tuple(sides), reduce)
    return result


# --- Linear forms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Form:
    """`constant + sum(coefficient * node)`, over the integers while every one of `guards` is small.

    A guard stays when its term cancels: in `q + kv < q` the sum on the left may overflow, though the difference cannot.
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

    def without(self, *nodes: Node) -> _Form:
        return _Form(self.constant, {n: c for n, c in self.terms.items() if n not in nodes}, self.guards)


def _union(*guards: tuple[Node, ...]) -> tuple[Node, ...]:
    return tuple(dict.fromkeys(node for some in guards for node in some))


def _integer(value: int) -> Node:
    return const(value, torch.int64)


class _Unsolved(Exception):
    """A comparison that has no linear form, or one whose sums might overflow."""


class _Solver:
    def __init__(self, facts: Facts) -> None:
        self.facts = facts
        self.cases = 0
        self.known: dict[Node, Extent] = {}
        self.forms: dict[Node, _Form | None] = {}  # None where there is none
        self.reaches: dict[Node, tuple[int, tuple[Node, ...]] | None] = {}
        for node in facts.nodes:  # operands first, so that no recursion below is as deep as the graph
            self._visit(node)

    def _visit(self, node: Node) -> None:
        if node.dtype == torch.bool:
            self.extent(node)
        elif node.dtype.is_floating_point:
            self.finite(node)
        elif node in self.facts.on_kv:
            with suppress(_Unsolved):
                self._size(self._linear(node))

    def extent(self, node: Node) -> Extent:
        """Extent of a bool node."""
        found = self.known.get(node)
        if found is None:
            found = self.known[node] = self._extent(node)
        return found

    def finite(self, node: Node) -> Extent:
        """Extent of `node > -inf` for a score, as far as constant branches show it."""
        found = self.known.get(node)
        if found is None:
            found = self.known[node] = self._finite(node)
        return found

    def _finite(self, node: Node) -> Extent:
        if node.op == "where":
            condition = self.extent(node.args[0])
            chosen = condition.both(self.finite(node.args[1]))
            return chosen.either(condition.negated().both(self.finite(node.args[2])))
        if node.op == "cast" and node.args[0].dtype.is_floating_point:
            return self.finite(node.args[0])
        if node.is_const and node.attr == float("-inf"):
            return NEVER
        return ALWAYS

    def _extent(self, node: Node) -> Extent:
        if node not in self.facts.on_kv:
            return _when(node)
        args = node.args
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
            less = self._negative(difference) if op == "lt" else self._negative(difference.plus(_Form(-1, {})))
            if op in ("lt", "le"):
                return less
            equal = less.both(self._negative(difference.times(-1).plus(_Form(-1, {}))))
            return equal if op == "eq" else equal.negated()
        except _Unsolved:
            return UNKNOWN

    def _clamped(self, side: Node, other: _Form) -> Node:
        """A side of a comparison that is one value: beyond +-LIMIT it compares with the other side like +-LIMIT."""
        if side in self.facts.on_kv or self._size(other) >= LIMIT or max(map(abs, self.facts.ranges[side])) <= LIMIT:
            return side
        clamped = make("minimum", make("maximum", side, _integer(-LIMIT)), _integer(LIMIT))
        self.facts.ranges[clamped] = (-LIMIT, LIMIT)
        return clamped

    def _linear(self, node: Node) -> _Form:
        """Takes an integer node apart; what does not depend on kv_idx stays whole, as the mod computes it."""
        if node not in self.forms:
            self.forms[node] = None
            self.forms[node] = self._find_linear(node)
        form = self.forms[node]
        if form is None:
            raise _Unsolved
        return form

    def _find_linear(self, node: Node) -> _Form:
        form = self._apart(node)
        if node in self.facts.on_kv and node not in form.terms:
            if self._size(form) >= _EXACT if node.dtype == torch.int64 else not self._proven(node):
                raise _Unsolved
            form = _Form(form.constant, form.terms, self._guards(form))
        return form

    def _proven(self, node: Node) -> bool:
        """Whether a value of a narrow type cannot have wrapped around."""
        low, high = self.facts.ranges.get(node, INT_LIMITS[node.dtype])
        limits = INT_LIMITS[node.dtype]
        return limits[0] < low and high < limits[1]

    def _apart(self, node: Node) -> _Form:
        if node.is_const:
            return _Form(int(node.attr), {})
        whole = _Form(0, {node: 1})
        if node not in self.facts.on_kv:
            return _Form(0, {node: 1}, self._reach(node)[1])
        args = node.args
        if node.op == "add":
            return self._linear(args[0]).plus(self._linear(args[1]))
        if node.op == "sub":
            return self._linear(args[0]).plus(self._linear(args[1]), -1)
        if node.op == "neg":
            return self._linear(args[0]).times(-1)
        constant = next((int(a.attr) for a in reversed(args) if a.is_const), None)
        if node.op == "mul" and constant is not None:
            return self._linear(args[0] if args[1].is_const else args[1]).times(constant)
        if node.op == "cast" and args[0].dtype != torch.bool and not args[0].dtype.is_floating_point:
            low, high = self.facts.ranges.get(args[0], INT_LIMITS[torch.int64])
            limits = INT_LIMITS[node.dtype]
            if node.dtype == torch.int64 or limits[0] <= low <= high <= limits[1]:
                return self._linear(args[0])
        if len(args) == 2 and args[1].is_const and constant is not None:
            return self._divided(node, args[0], constant) or whole
        return whole

    def _divided(self, node: Node, dividend: Node, by: int) -> _Form | None:
        """`x // d`, `x % d` and their twins in bits, for a constant d > 0; `x % d` is `x - d * (x // d)`."""
        if node.op in ("bitwise_right_shift", "bitwise_left_shift") and 0 <= by < 40:
            if node.op == "bitwise_left_shift":
                return self._linear(dividend).times(1 << by)
            return _Form(0, {make("floor_divide", dividend, const(1 << by, dividend.dtype)): 1})
        if node.op == "bitwise_and" and by > 0 and by & (by + 1) == 0:
            quotient = make("floor_divide", dividend, const(by + 1, dividend.dtype))
            return self._linear(dividend).plus(_Form(0, {quotient: 1}), -(by + 1))
        if node.op == "remainder" and by > 0:
            quotient = make("floor_divide", dividend, const(by, dividend.dtype))
            return self._linear(dividend).plus(_Form(0, {quotient: 1}), -by)
        return None

    def _reach(self, node: Node) -> tuple[int, tuple[Node, ...]]:
        """A bound of |node|, and the values that must be small for it to hold."""
        if node not in self.reaches:
            self.reaches[node] = None
            self.reaches[node] = self._find_reach(node)
        found = self.reaches[node]
        if found is None:
            raise _Unsolved
        return found

    def _find_reach(self, node: Node) -> tuple[int, tuple[Node, ...]]:
        known = abs(int(node.attr)) if node.is_const else max(map(abs, self.facts.ranges.get(node, (FAR, FAR))))
        if node.is_const or known <= LIMIT:
            return known, ()
        if not self._on_kv(node):
            return LIMIT, (node,)
        if node.op in ("maximum", "minimum", "abs", "floor_divide", "where"):
            forms = [self._linear(a) for a in node.args if a.dtype != torch.bool]
            return max(map(self._size, forms)), _union(*map(self._guards, forms))
        raise _Unsolved

    def _size(self, form: _Form) -> int:
        """A bound of |form|, under its guards."""
        return abs(form.constant) + sum(abs(c) * self._reach(n)[0] for n, c in form.terms.items())

    def _guards(self, form: _Form) -> tuple[Node, ...]:
        """What must be small for the form to be within its size; also what its min, max and quotients hold."""
        return _union(form.guards, *(self._reach(n)[1] for n in form.terms))

    def _on_kv(self, node: Node) -> bool:
        """Also of nodes made here, which the facts do not list."""
        pending, seen = [node], {node}
        while pending:
            node = pending.pop()
            if node in self.facts.on_kv:
                return True
            if node not in self.facts.ranges:
                pending += [a for a in node.args if a not in seen]
                seen.update(node.args)
        return False

    # --- form < 0 -----------------------------------------------------------------------------------------------------

    def _negative(self, form: _Form) -> Extent:
        """Extent of `form < 0`."""
        self.cases += 1
        if self.cases > _MAX_CASES or self._size(form) >= _EXACT:
            raise _Unsolved
        bent = [node for node in form.terms if self._on_kv(node) and node.op != "index"]
        for node in bent:
            cases = self._cases(node, form.without(node), form.terms[node])
            if cases is not None:
                return cases
        if not bent:
            return self._bound(form, _integer(0))
        if any(node.op != "floor_divide" or not node.args[1].is_const or node.args[1].attr <= 0 for node in bent):
            raise _Unsolved
        coefficient_of_kv = sum(c for n, c in form.terms.items() if n.op == "index" and n.attr == "kv_idx")
        if len(bent) == 1 and coefficient_of_kv == 0:
            return self._quotient(bent[0], form.terms[bent[0]], form.without(bent[0]))
        above = self._negative(self._relaxed(form, bent, lower=True))
        below = self._negative(self._relaxed(form, bent, lower=False))
        return Extent(above.live, below.full)

    def _cases(self, node: Node, rest: _Form, c: int) -> Extent | None:
        """Replaces `c * node` by what it may be: min, max, abs, where and bools."""
        if node.op in ("maximum", "minimum"):
            a, b = (self._negative(rest.plus(self._linear(x), c)) for x in node.args)
            return a.both(b) if (node.op == "maximum") == (c > 0) else a.either(b)
        if node.op == "abs" and (node.dtype == torch.int64 or self._proven(node)):
            inner = self._linear(node.args[0])
            a, b = self._negative(rest.plus(inner, c)), self._negative(rest.plus(inner, -c))
            return a.both(b) if c > 0 else a.either(b)
        if node.op == "where":
            a, b = (self._negative(rest.plus(self._linear(x), c)) for x in node.args[1:])
            return self._choose(node.args[0], a, b)
        if node.op == "cast" and node.args[0].dtype == torch.bool:
            a, b = self._negative(rest.plus(_Form(c, {}))), self._negative(rest)
            return self._choose(node.args[0], a, b)
        return None

    def _quotient(self, node: Node, c: int, rest: _Form) -> Extent:
        """`c * (x // d) + rest < 0`: `x // d < e` is `x < d * e`, and `x // d >= e` is `x >= d * e`."""
        inner, d = self._linear(node.args[0]), int(node.args[1].attr)
        if self._size(rest) // abs(c) + 1 >= _EXACT // (4 * d):
            raise _Unsolved
        product = make("mul", self._edge(rest, c, _integer(0)), _integer(d))
        if c > 0:
            found = self._bound(inner, make("neg", product))
        else:
            found = self._bound(inner.times(-1).plus(_Form(-1, {})), product)
        return _guarded(found, rest.guards)

    def _relaxed(self, form: _Form, bent: list[Node], lower: bool) -> _Form:
        """A multiple of a form below (or above) `form`, without `//`: x // d is between (x - d + 1) / d and x / d."""
        scale = 1
        for node in bent:
            scale *= int(node.args[1].attr)
        result = form.without(*bent).times(scale)
        for node in bent:
            c, d = form.terms[node], int(node.args[1].attr)
            inner = self._linear(node.args[0])
            if (c > 0) == lower:
                inner = inner.plus(_Form(1 - d, {}))
            result = result.plus(inner, c * (scale // d))
        return result

    def _bound(self, form: _Form, extra: Node) -> Extent:
        """Extent of `form + extra < 0`, where `extra` does not depend on kv_idx."""
        if any(self._on_kv(n) and n.op != "index" for n in form.terms):
            if extra.is_const:
                return self._negative(form.plus(_Form(int(extra.attr), {})))
            return self._negative(form.plus(_Form(0, {extra: 1}, (extra,))))
        kv = [n for n in form.terms if n.op == "index" and n.attr == "kv_idx"]
        rest = form.without(*kv)
        if not kv:
            found = _when(make("lt", make("add", self._sum(rest), extra), _integer(0)))
        else:
            edge = self._edge(rest, form.terms[kv[0]], extra)
            found = _exactly(Interval(None, edge) if form.terms[kv[0]] > 0 else Interval(edge, None))
        return _guarded(found, form.guards)

    def _edge(self, rest: _Form, a: int, extra: Node) -> Node:
        """`a * x + rest + extra < 0` is `x < edge` where a > 0, and `x >= edge` where a < 0."""
        if a > 0:  # the next integer from -(rest + extra) / a on
            total = make("sub", self._sum(rest.times(-1).plus(_Form(a - 1, {}))), extra)
        else:  # the first integer above (rest + extra) / -a
            total = make("add", self._sum(rest.plus(_Form(-a, {}))), extra)
        return make("floor_divide", total, _integer(abs(a)))

    def _sum(self, form: _Form) -> Node:
        """A form without kv_idx as a node; equal forms give equal nodes."""
        total = _integer(form.constant)
        for node, coefficient in sorted(form.terms.items(), key=lambda term: term[0].digest):
            value = node if node.dtype == torch.int64 else Node("cast", (node,), torch.int64)
            total = make("add", total, value if coefficient == 1 else make("mul", value, _integer(coefficient)))
        return total


def _exactly(interval: Interval) -> Extent:
    """An interval without the bounds that no position reaches."""
    lo, hi = _constants(interval)
    lo_node = None if lo is not None and lo <= 0 else interval.lo
    hi_node = None if hi is not None and hi >= MAX_KV_LEN else interval.hi
    region = NOWHERE if _is_empty(interval) else (Interval(lo_node, hi_node),)
    return Extent(region, region)


def _when(condition: Node) -> Extent:
    """Everywhere or nowhere, by a bool that does not depend on kv_idx."""
    if condition.is_const:
        return ALWAYS if condition.attr else NEVER
    return _exactly(Interval(make("where", condition, _integer(-FAR), _integer(FAR)), None))


def _guarded(extent: Extent, guards: Sequence[Node]) -> Extent:
    """The extent while every guarded value is small; else nothing is known."""
    if not guards:
        return extent
    limits = [make("logical_and", make("le", _integer(-LIMIT), g), make("le", g, _integer(LIMIT))) for g in guards]
    small = limits[0]
    for other in limits[1:]:
        small = make("logical_and", small, other)

    def opened(bound: Node | None, otherwise: int) -> Node | None:
        return None if bound is None else make("where", small, bound, _integer(otherwise))

    def closed(interval: Interval) -> Interval:
        lo = interval.lo if interval.lo is not None else _integer(-FAR)
        return Interval(make("where", small, lo, _integer(FAR)), interval.hi)

    live = tuple(Interval(opened(i.lo, -FAR), opened(i.hi, FAR)) for i in extent.live)
    return Extent(
        live or (Interval(make("where", small, _integer(FAR), _integer(-FAR)), None),),
        tuple(closed(i) for i in extent.full),
    )
