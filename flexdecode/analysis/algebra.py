"""Simplifies intervals with integer bounds and writes them as text.

It uses sympy. The import of sympy takes a third of a second, so it happens only when a text is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from ..frontend.graph import INDEX_NAMES, Node, topological
from ..frontend.ops import INT_LIMITS, OPS
from .intervals import FAR, LIMIT

_ARITHMETIC = {"add", "sub", "mul", "neg", "abs", "floor_divide", "remainder", "maximum", "minimum"}
LONGEST = 400  # characters of the longest part of a bound that is written
UNREAD = "(...)"  # stands for a longer part
_LARGEST = 150  # operations in a part of a bound
_MOST = 16  # different parts of a max or min, after simplification
_TRIED = 64  # the same before simplification
_SUM, _PRODUCT, _POWER, _ATOM = range(4)  # how tightly an operator binds


class Parts(NamedTuple):
    """The interval `max(first, *los) <= kv < min(end, *his)` of a sequence. It exists if every condition holds.

    Attributes:
        los, his: integer nodes, without overflow guards. A value beyond +-FAR is not a bound.
        conditions: bool nodes, each with the value that it must have.
    """

    los: list[Node]
    his: list[Node]
    conditions: list[tuple[Node, bool]]


class _Interval(NamedTuple):
    """An interval whose ends are sympy expressions, and the texts of the conditions under which it exists."""

    lo: Any
    hi: Any
    conditions: tuple[str, ...]


class Ends(NamedTuple):
    """What the first live position of a sequence, and the one after the last, are the sums of, in words."""

    first: tuple[str, ...] = ()
    end: tuple[str, ...] = ("kv_len",)

    @property
    def everything(self) -> str:
        """The text of the interval that has every live position."""
        return f"kv in [{' + '.join(self.first) or '0'}, {' + '.join(self.end)})"


WHOLE = Ends()


def interval_texts(parts: Sequence[Parts], opaque: Callable[[Node, bool], str], ends: Ends = WHOLE) -> list[str]:
    """Writes intervals as `kv in [lo, hi) if condition`. Leaves out those that are empty or inside another one.

    Args:
        parts: the intervals.
        opaque: gives the text of a node that this algebra does not take apart. If its second argument is true, the text
            has brackets where they are needed.
        ends: of the sequence.
    """
    algebra = _Algebra(opaque, ends)
    intervals: list[_Interval] = []
    for new in filter(None, map(algebra.interval, parts)):
        if not any(algebra.holds(old, new) for old in intervals):
            intervals = [old for old in intervals if not algebra.holds(new, old)] + [new]
    texts = []
    for lo, hi, conditions in intervals:
        when = f" if {' and '.join(conditions)}" if conditions else ""
        texts.append((lo != algebra.first, f"kv in [{algebra.text(lo)}, {algebra.text(hi)}){when}"))
    return [text for _, text in sorted(texts)]


class _Algebra:
    def __init__(self, opaque: Callable[[Node, bool], str], ends: Ends) -> None:
        import sympy

        self.sympy = sympy
        self.opaque = opaque
        self.first = sympy.Add(*[sympy.Symbol(name, integer=True) for name in ends.first])
        self.texts = {-sympy.oo: " + ".join(ends.first) or "0", sympy.oo: " + ".join(ends.end)}
        self.done: dict[Node, Any] = {}
        self.sizes: dict[Node, int] = {}

    def interval(self, parts: Parts) -> _Interval | None:
        """Converts an interval to expressions; None if it is certainly empty."""
        lo = self._extreme("Max", [self.first, *self._few(parts.los)])
        hi = self._extreme("Min", [self.sympy.oo, *self._few(parts.his)])
        if len(parts.conditions) > _TRIED:
            return _Interval(lo, hi, (UNREAD,))
        conditions = [self._condition(*condition) for condition in parts.conditions]
        if "" in conditions or self._at_most(hi, lo):
            return None
        return _Interval(lo, hi, tuple(dict.fromkeys(c for c in conditions if c)))

    def _few(self, nodes: list[Node]) -> list[Any]:
        """Expressions of the parts of a max or min; one symbol if there are too many parts to read."""
        distinct = dict.fromkeys(nodes)
        return [self._symbol(UNREAD)] if len(distinct) > _TRIED else [self.convert(node) for node in distinct]

    def holds(self, outer: _Interval, inner: _Interval) -> bool:
        """Whether the inner interval is certainly inside the outer one."""
        always = set(outer.conditions) <= set(inner.conditions) and not any(UNREAD in c for c in outer.conditions)
        return always and self._at_most(outer.lo, inner.lo) and self._at_most(inner.hi, outer.hi)

    # --- Nodes to expressions -----------------------------------------------------------------------------------------

    def convert(self, node: Node) -> Any:
        """The expression of an integer node. A node that is not arithmetic becomes a symbol named by its text."""
        if node in self.done:
            return self.done[node]
        for needed in topological(node):  # operands first, so that no recursion is as deep as the graph
            self.sizes[needed] = 1 + sum(self.sizes[a] for a in needed.args)
            if needed not in self.done and is_integer(needed):
                small = self.sizes[needed] <= _LARGEST
                self.done[needed] = self._convert(needed) if small else self._symbol(UNREAD)
        return self.done[node]

    def _symbol(self, text: str) -> Any:
        """A symbol with a text as its name. If a part of the text is left out, each symbol is a new one."""
        kind = self.sympy.Dummy if UNREAD in text else self.sympy.Symbol
        return kind(text, integer=True)

    def _convert(self, node: Node) -> Any:
        s = self.sympy
        if node.is_const:
            return s.Integer(int(node.attr))
        if node.op == "where":
            return self._choice(node.args[0], *map(self.convert, node.args[1:]))
        if node.op in ("maximum", "minimum"):
            for switch, other in (node.args, node.args[::-1]):
                if is_switch(switch):  # it either has no effect, or it is the result
                    neutral = -1 if node.op == "maximum" else 1
                    ends = [self.convert(other if a.attr * neutral > 0 else a) for a in switch.args[1:]]
                    return self._choice(switch.args[0], *ends)
        if widens(node):
            return self.convert(node.args[0])
        value = None
        exact = node.op in _ARITHMETIC and node.dtype in (torch.int32, torch.int64)  # others wrap around
        # A divisor may be 0, unless it is a constant other than 0.
        divides = node.op in ("floor_divide", "remainder")
        if exact and (not divides or (node.args[1].is_const and node.args[1].attr != 0)):
            value = self._apply(node.op, [self.convert(a) for a in node.args])
        return self._symbol(self.opaque(node, True)) if value in (None, s.nan) else value

    def _choice(self, condition: Node, a: Any, b: Any) -> Any:
        when = self._condition(condition, True)
        if not when:
            return a if when is None else b
        a, b = self._reached(a), self._reached(b)
        text = f"({self.text(a)} if {when} else {self.text(b)})"
        return self._symbol(text if len(text) < LONGEST else UNREAD)

    def _apply(self, op: str, args: list[Any]) -> Any:
        if op in ("maximum", "minimum"):
            return self._extreme("Max" if op == "maximum" else "Min", args)
        value = OPS[op].python(*args)  # type: ignore[misc]
        return value if op in ("floor_divide", "remainder", "abs") else self.sympy.expand(value)

    # --- Simplification -----------------------------------------------------------------------------------------------

    def _reached(self, value: Any) -> Any:
        """Replaces a bound that no position reaches by infinity, such as FAR or that of a window of sys.maxsize."""
        number, rest = value.as_coeff_Add()
        near = all(symbol.name in INDEX_NAMES for symbol in rest.free_symbols)
        return self.sympy.oo * number if near and abs(number) >= LIMIT // 2 else value

    def _extreme(self, kind: str, values: list[Any]) -> Any:
        """Max or Min of values, without those that never decide it."""
        kept = list(dict.fromkeys(map(self._reached, values)))
        if len(kept) > _MOST:
            return self._symbol(UNREAD)
        for value in list(kept):
            others = [v for v in kept if v != value]
            if any(self._at_most(*((value, other) if kind == "Max" else (other, value))) for other in others):
                kept = others
        return getattr(self.sympy, kind)(*kept)

    def _at_most(self, a: Any, b: Any) -> bool:
        """Whether a <= b for all values of the symbols, as far as constants and `d * (x // d) = x - x % d` show it."""
        s = self.sympy
        if isinstance(a, s.Max) or isinstance(b, s.Min):
            return all(self._at_most(x, y) for x in _operands(a, s.Max) for y in _operands(b, s.Min))
        if isinstance(a, s.Min) or isinstance(b, s.Max):
            return any(self._at_most(x, y) for x in _operands(a, s.Min) for y in _operands(b, s.Max))
        if a in (s.oo, -s.oo) or b in (s.oo, -s.oo):
            return bool(a == -s.oo or b == s.oo)
        least = s.Integer(0)
        for term in s.Add.make_args(s.expand((b - a).replace(s.floor, self._by_remainder))):
            coefficient, rest = term.as_coeff_Mul()
            if rest == 1:
                least += coefficient
            elif isinstance(rest, s.Mod) and rest.args[1].is_positive:
                least += min(s.Integer(0), coefficient) * (rest.args[1] - 1)
            else:
                return False
        return bool(least >= 0)

    def _by_remainder(self, quotient: Any) -> Any:
        dividend, divisor = self._fraction(quotient)
        return (dividend - self.sympy.Mod(dividend, divisor)) / divisor

    def _fraction(self, quotient: Any) -> tuple[Any, Any]:
        numerator, denominator = self.sympy.together(quotient).as_numer_denom()
        return self.sympy.expand(numerator), denominator

    def _condition(self, node: Node, wanted: bool) -> str | None:
        """A condition as text: None if it always holds, empty if it never does."""
        if node.op not in ("lt", "le") or not all(map(is_integer, node.args)):
            text = self.opaque(node, False)
            return text if wanted else f"not ({text})"
        s = self.sympy
        a, b = map(self.convert, node.args if wanted else node.args[::-1])
        if (node.op == "lt") == wanted:
            a = a + 1
        if self._at_most(a, b) or self._at_most(b + 1, a):
            return None if self._at_most(a, b) else ""
        number, rest = s.expand(b - a).as_coeff_Add()
        factor, rest = rest.as_content_primitive()
        number = s.floor(number / factor)
        terms = s.Add.make_args(s.expand(rest))
        less = [-t for t in terms if t.as_coeff_Mul()[0] < 0]
        more = [t for t in terms if t.as_coeff_Mul()[0] > 0]
        strict = bool(number < 0)  # `a < b` reads better than `a <= b - 1`
        (more if number + strict > 0 else less).append(abs(number + strict))
        return f"{self.text(s.Add(*less))} {'<' if strict else '<='} {self.text(s.Add(*more))}"

    # --- Expressions to text ------------------------------------------------------------------------------------------

    def text(self, value: Any, level: int = _SUM) -> str:
        """An expression in Python's notation; infinities are the ends of the sequence."""
        text, own = self._write(value)
        return text if own >= level else f"({text})"

    def _write(self, value: Any) -> tuple[str, int]:
        s = self.sympy
        if value in (s.oo, -s.oo):
            return self.texts[value], _ATOM if value == s.oo or self.first.is_number else _SUM
        if isinstance(value, s.Add):
            return self._sum(value), _SUM
        if isinstance(value, s.Mul):
            coefficient, rest = value.as_coeff_Mul()
            if coefficient == -1 and isinstance(rest, s.floor):  # -x // d is a different number
                numerator, denominator = self._fraction(-rest.args[0])
                return f"ceil({self.text(numerator, _PRODUCT)} / {self.text(denominator, _POWER)})", _ATOM
            if coefficient < 0:
                return f"-{self.text(-value, _POWER if coefficient == -1 else _PRODUCT)}", _SUM
            factors = s.Mul.make_args(rest) if coefficient == 1 else (coefficient, *s.Mul.make_args(rest))
            return " * ".join(self.text(f, _POWER) for f in factors), _PRODUCT
        if isinstance(value, (s.Max, s.Min, s.Abs)):
            args = sorted(value.args, key=lambda a: (not a.is_number, *self._reading_order(a)))
            return f"{type(value).__name__.lower()}({', '.join(map(self.text, args))})", _ATOM
        if isinstance(value, (s.floor, s.Mod)):
            sign, pair = ("//", self._fraction(value.args[0])) if isinstance(value, s.floor) else ("%", value.args)
            return f" {sign} ".join(self.text(x, _POWER) for x in pair), _PRODUCT
        if isinstance(value, s.Pow):
            return " ** ".join(self.text(x, _ATOM) for x in value.args), _POWER
        if isinstance(value, s.Symbol):  # only the name: sympy marks its dummies
            return value.name, _ATOM
        return str(value), _ATOM if not value.is_number or value >= 0 else _SUM

    def _sum(self, value: Any) -> str:
        """Positive terms first, numbers last: `q_idx - window + 1`."""
        number, rest = value.as_coeff_Add()
        terms = sorted(self.sympy.Add.make_args(rest), key=self._sum_order)
        if number != 0:
            terms.insert(0 if terms[0].as_coeff_Mul()[0] < 0 < number else len(terms), number)
        text = self.text(terms[0])
        for term in terms[1:]:
            negative = term.as_coeff_Mul()[0] < 0
            text += f" - {self.text(-term, _PRODUCT)}" if negative else f" + {self.text(term, _PRODUCT)}"
        return text

    def _sum_order(self, term: Any) -> tuple[bool, int, str]:
        return bool(term.as_coeff_Mul()[0] < 0), *self._reading_order(term)

    def _reading_order(self, value: Any) -> tuple[int, str]:
        names = {symbol.name for symbol in value.free_symbols}
        return (0 if names <= set(INDEX_NAMES) else 1), self.text(value)


def widens(node: Node) -> bool:
    """Whether a node converts integers to a type that holds them all."""
    if node.op != "cast" or not (is_integer(node) and is_integer(node.args[0])):
        return False
    (low, high), (wide_low, wide_high) = INT_LIMITS[node.args[0].dtype], INT_LIMITS[node.dtype]
    return wide_low <= low and high <= wide_high


def is_switch(bound: Node) -> bool:
    """Whether a bound is `where(condition, -FAR, FAR)` or the opposite. It says whether there is an interval."""
    return bound.op == "where" and all(a.is_const and abs(a.attr) == FAR for a in bound.args[1:])


def is_integer(node: Node) -> bool:
    """Whether the value of a node is an integer and not a bool."""
    return node.dtype != torch.bool and not node.dtype.is_floating_point


def _operands(value: Any, kind: Any) -> tuple:
    return value.args if isinstance(value, kind) else (value,)
