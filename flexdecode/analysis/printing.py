"""Graphs as people write them: a mod in infix form, and the intervals of its live keys.

    (kv_idx <= q_idx) & (q_idx - kv_idx < window)
    kv in [max(0, q_idx - window + 1), q_idx + 1)

The text of a mod shows the mod as it was traced. The solver builds the bounds, so their text is simplified. It leaves
overflow guards out, so it holds for captured integers up to 2**40.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Container, Sequence
from typing import NamedTuple

import torch

from ..frontend.graph import Graph, Node, Source, const, rewrite, topological
from ..frontend.ops import OPS, operand_dtypes
from .algebra import LONGEST, UNREAD, WHOLE, Ends, Parts, interval_texts, is_switch, widens
from .bounds import nodes_of
from .intervals import LIMIT, Region

# How tightly operators bind, as in Python.
_COMPARE, _OR, _XOR, _AND, _SHIFT, _SUM, _PRODUCT, _UNARY, _POWER, _ATOM = range(10)
_OPERATORS = {
    "lt": ("<", _COMPARE), "le": ("<=", _COMPARE), "eq": ("==", _COMPARE), "ne": ("!=", _COMPARE),
    "logical_or": ("|", _OR), "logical_xor": ("^", _XOR), "logical_and": ("&", _AND),
    "bitwise_or": ("|", _OR), "bitwise_xor": ("^", _XOR), "bitwise_and": ("&", _AND),
    "bitwise_left_shift": ("<<", _SHIFT), "bitwise_right_shift": (">>", _SHIFT),
    "add": ("+", _SUM), "sub": ("-", _SUM),
    "mul": ("*", _PRODUCT), "div": ("/", _PRODUCT), "floor_divide": ("//", _PRODUCT), "remainder": ("%", _PRODUCT),
    "pow": ("**", _POWER),
}  # fmt: skip
_PREFIXES = {"neg": "-", "logical_not": "~", "bitwise_not": "~"}
_FUNCTIONS = {  # also for the operators that join the values of a loop
    "add": "sum", "mul": "prod", "maximum": "max", "minimum": "min", "logical_or": "any", "logical_and": "all",
}  # fmt: skip
_TURNED = {"lt": ">", "le": ">=", "eq": "==", "ne": "!="}
_LONG = 40  # a repeated subexpression with at least this many characters gets a name


class Names(NamedTuple):
    """The names of a graph's captures: its number slots, its tensor slots, and the constants."""

    numbers: tuple[str, ...]
    tensors: tuple[str, ...]
    constants: tuple[str, ...] = ()


def name_captures(graph: Graph, leaf_names: Sequence[str], constants: Sequence[Source] = ()) -> Names:
    """Gives each capture the name that it has in its mod, short enough for a formula and different from the others.

    Args:
        graph: a traced mod.
        leaf_names: names of all leaves of the mod.
        constants: captured numbers whose values are in the graph.
    """
    taken: dict[str, int] = {}
    by_leaf: dict[int, str] = {}

    def name(leaf: int) -> str:
        if leaf < 0:
            return f"constant_{-1 - leaf}"
        if leaf not in by_leaf:
            short = re.sub(r"[^\w.\[\]']+", "_", leaf_names[leaf].partition(" (in ")[0]).strip("_")
            taken[short] = taken.get(short, 0) + 1
            by_leaf[leaf] = short if taken[short] == 1 else f"{short}_{taken[short]}"
        return by_leaf[leaf]

    def number(source: Source) -> str:
        return name(source.leaf) + (f".shape[{source.dim}]" if source.dim >= 0 else "")

    tensors = tuple(map(name, graph.tensors))
    return Names(tuple(map(number, graph.numbers)), tensors, tuple(map(number, constants)))


# --- Mods -------------------------------------------------------------------------------------------------------------


def formula(output: Node, names: Names) -> str:
    """A node in infix form. Long subexpressions that occur more than once stand in lines before it."""
    writer = _Infix(names, output)
    text = writer.text(output.args[0] if output.op == "cast" else output)
    return "\n".join([*(f"{name} = {value}" for name, value in writer.shared), text])


class _Infix:
    def __init__(self, names: Names, output: Node | None = None) -> None:
        self.names = names
        self.shared: list[tuple[str, str]] = []
        self.done: dict[Node, tuple[str, int]] = {}
        self.on_score: set[Node] = set()
        self.on_kv: set[Node] = set()
        self.named: set[Node] = set()  # nodes that have a name or are too long to read
        nodes = [] if output is None else topological(output)
        self.uses = Counter(operand for node in nodes for operand in node.args)

    def text(self, node: Node, level: int = 0) -> str:
        """The text of a node, in brackets if it binds less tightly than `level`."""
        for needed in topological(node):
            if needed in self.done:
                continue
            for found, leaf in ((self.on_score, "score"), (self.on_kv, "kv_idx")):
                if leaf in (needed.op, needed.attr) or not found.isdisjoint(needed.args):
                    found.add(needed)
            self.done[needed] = self._write(needed)
            text, _ = self.done[needed]
            name = None
            if len(text) >= LONGEST and not self.uses:  # a part of a bound
                name = UNREAD
            elif self.uses[needed] > 1 and len(text) >= _LONG:
                name = f"t{len(self.shared)}"
                self.shared.append((name, text))
            if name is not None:
                self.named.add(needed)
                self.done[needed] = name, _ATOM
        return self._at(node, level)

    def _at(self, node: Node, level: int) -> str:
        text, own = self.done[node]
        return text if own >= level else f"({text})"

    def _list(self, nodes: Sequence[Node]) -> str:
        return ", ".join(self.done[node][0] for node in nodes)

    def _write(self, node: Node) -> tuple[str, int]:
        op = node.op
        if op in ("score", "index"):
            return node.attr or "score", _ATOM
        if op == "const":
            return _number(node), _ATOM if node.attr >= 0 else _UNARY
        if op == "number":
            return self.names.numbers[node.attr], _ATOM
        if op == "load":
            indices = [a.args[0] if widens(a) else a for a in node.args]
            return self.names.tensors[node.attr] + (f"[{self._list(indices)}]" if indices else ""), _ATOM
        if op == "cast":
            return f"{str(node.dtype).removeprefix('torch.')}({self._list(node.args)})", _ATOM
        if op == "step":
            return _step_name(node), _ATOM
        if op == "fold":
            _, count, name = node.attr
            return f"{_FUNCTIONS[name]}({self._list(node.args)} for {_step_name(node)} in range({count}))", _ATOM
        operands = _unconverted(node)
        if op in _PREFIXES:
            return f"{_PREFIXES[op]}{self._at(operands[0], _UNARY)}", _UNARY
        if op == "minimum" and (clamped := self._clamp(*operands)):
            return clamped, _ATOM
        if op in ("logical_and", "logical_or"):
            return self._logical(node), _OPERATORS[op][1]
        if OPS[op].commutative:
            operands.sort(key=lambda operand: self._reading_order(op, operand))
        if op not in _OPERATORS:
            return f"{_FUNCTIONS.get(op, op)}({self._list(operands)})", _ATOM
        return self._binary(op, *operands)

    def _reading_order(self, op: str, operand: Node) -> tuple:
        """The order of commutative operands in the text: the score and simple operands come first."""
        number_last = operand.is_const != (op in ("mul", "maximum", "minimum"))
        return number_last, op == "add" and operand not in self.on_score, self._simplicity(operand)

    def _simplicity(self, node: Node) -> tuple:
        return len(self.done[node][0]) if node.op not in ("score", "index") else 0, self.done[node][0]

    def _binary(self, op: str, a: Node, b: Node) -> tuple[str, int]:
        sign, level = _OPERATORS[op]
        if op == "add" and (b.op == "neg" or (b.is_const and b.attr < 0)):
            taken = self._at(b.args[0], _PRODUCT) if b.op == "neg" else _number(b).removeprefix("-")
            return f"{self._at(a, level)} - {taken}", level
        if op in _TURNED and b in self.on_kv and a not in self.on_kv:
            sign, a, b = _TURNED[op], b, a
        # Comparisons must not chain, `a ** b ** c` means `a ** (b ** c)`, and some brackets help the reader.
        left = level + 1 if level in (_COMPARE, _POWER) or op in ("floor_divide", "remainder") else level
        right = level if op in ("add", "mul") and b.op == op else level + 1
        if level in (_AND, _OR, _XOR, _SHIFT):
            left = right = _UNARY
        if level == _COMPARE:
            left = right = _SUM
        return f"{self._at(a, left)} {sign} {self._at(b, right)}", level

    def _logical(self, node: Node) -> str:
        """`a & b & c`, without the brackets of its nesting."""
        ordered = sorted(set(_parts(node, node.op, self.named)), key=self._simplicity)
        return f" {_OPERATORS[node.op][0]} ".join(self._at(operand, _UNARY) for operand in ordered)

    def _clamp(self, *operands: Node) -> str | None:
        """`min(max(x, low), high)`, if only x depends on the position."""
        for inner, high in (operands, operands[::-1]):
            if inner.op == "maximum" and high not in self.on_kv and self.done[inner][1] == _ATOM:
                for x, low in (inner.args, inner.args[::-1]):
                    if x in self.on_kv and low not in self.on_kv:
                        return f"clamp({self._list((x, low, high))})"
        return None


def _step_name(node: Node) -> str:
    return "i" if node.attr[0] == 1 else f"i{node.attr[0]}"


def _unconverted(node: Node) -> list[Node]:
    """The operands without the conversions that PyTorch does by itself."""
    operands = list(node.args)
    for i, operand in enumerate(node.args):
        if operand.op == "cast" and (operand.dtype.is_floating_point or not operand.args[0].dtype.is_floating_point):
            plain = [*operands[:i], operand.args[0], *operands[i + 1 :]]
            if operand_dtypes(OPS[node.op], plain)[:2] == (tuple(a.dtype for a in node.args), node.dtype):
                operands = plain
    return operands


def _number(node: Node) -> str:
    """The shortest text that stands for the same constant."""
    value = node.attr
    if node.dtype == torch.float64 or not isinstance(value, float) or value - value != 0 or value == int(value):
        return repr(value)
    texts = (f"{value:.{digits}g}" for digits in range(1, 18))
    return next(text for text in texts if _rounded(float(text)) == _rounded(value))


def _rounded(value: float) -> float:
    """The nearest float32."""
    return torch.tensor(value, dtype=torch.float32, device="cpu").item()


# --- Bounds -----------------------------------------------------------------------------------------------------------


def region_text(
    region: Region, names: Names, values: Sequence[int | float | None] | None = None, ends: Ends = WHOLE
) -> list[str]:
    """The intervals of a region, as `kv in [lo, hi)` within the live positions. An empty list means no key.

    Args:
        region: bounds in nodes of one graph.
        names: of its captures.
        values: of its number slots. The text shows those that are known instead of their names.
        ends: of the live positions; by default 0 and kv_len.
    """

    def plain(node: Node, args: tuple[Node, ...]) -> Node:
        if node.op == "number" and values is not None and (value := values[node.attr]) is not None:
            return const(value, node.dtype)
        return _guarded(node, args) or Node(node.op, args, node.dtype, node.attr, node.weak)

    intervals = []
    for interval in region:
        parts = Parts([], [], [])
        for bound, op, parts_of in zip(interval, ("maximum", "minimum"), (parts.los, parts.his), strict=True):
            for part in [] if bound is None else _parts(rewrite(bound, plain), op):
                if is_switch(part):  # lower bound `where(c, -FAR, FAR)`: there is an interval if c is true
                    parts.conditions.append((part.args[0], (part.args[1].attr < 0) == (op == "maximum")))
                else:
                    parts_of.append(part)
        intervals.append(parts)
    return interval_texts(intervals, lambda node, brackets: _Infix(names).text(node, _ATOM if brackets else 0), ends)


def is_guarded(region: Region) -> bool:
    """Whether a bound holds only for captured values up to 2**40."""
    return any(_guarded(node, node.args) is not None for node in topological(*nodes_of(region)))


def _guarded(node: Node, args: tuple[Node, ...]) -> Node | None:
    """The value x or y of an overflow guard, `min(max(x, -LIMIT), LIMIT)` or `where(|x| <= LIMIT, y, ...)`, or None."""
    if node.op == "minimum" and args[1].is_const and args[1].attr == LIMIT and args[0].op == "maximum":
        inner, low = args[0].args
        return inner if low.is_const and low.attr == -LIMIT else None
    return args[1] if node.op == "where" and _is_guard(args[0]) else None


def _is_guard(condition: Node) -> bool:
    parts = _parts(condition, "logical_and")
    return all(part.op == "le" and any(a.is_const and abs(a.attr) == LIMIT for a in part.args) for part in parts)


def _parts(node: Node, op: str, whole: Container[Node] = ()) -> list[Node]:
    """All operands of a nested `op(op(a, b), c)`; nodes in `whole` are not taken apart."""
    parts: list[Node] = []
    pending = [node]
    while pending:
        node = pending.pop()
        if node.op == op and node not in whole:
            pending.extend(reversed(node.args))
        else:
            parts.append(node)
    return parts
