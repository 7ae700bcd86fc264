"""Reads a graph from its canonical text. The text is data: nothing of it is executed."""

from __future__ import annotations

import ast
import math
import re
from typing import Any, NoReturn

import torch

from ..errors import FlexDecodeError
from .graph import INDEX_NAMES, Graph, Node, Source, loops_around, topological
from .ops import DTYPES, FLOAT8, INT_LIMITS, OPS, operand_dtypes, widened

_CAPTURES = re.compile(r"captures ((?:[0-9]+(?:\.[0-9]+)? )*)\|((?: [0-9]+)*)")
_TENSOR = re.compile(r"tensor ([0-9]+): ([a-z0-9_]+) rank ([0-9]+)")
_NODE = re.compile(r"%([0-9]+) = ([a-z0-9_]+)\((.*)\): ([a-z0-9_]+)(\?)?")
_RETURN = re.compile(r"return %([0-9]+)")
_OPERAND = re.compile(r"%([0-9]+)")
_DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in (*DTYPES, *FLOAT8)}
# Steps are apart by this, not by new lines: compilers write the arguments of an op into comments of their code.
_BREAK = "; "
MAX_STEPS = 1 << 16  # of a loop; traced ones have at most 256
_FLOATS = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def write_graph(graph: Graph) -> str:
    """The canonical text of a graph in one line, after a step that says which captures it reads.

    Raises:
        ValueError: the graph has frozen tensors, which only the process that traced it has.
    """
    if graph.frozen:
        raise ValueError("a graph with frozen tensors has no text of its own")
    numbers = [f"{leaf}" if dim < 0 else f"{leaf}.{dim}" for leaf, dim in graph.numbers]
    return _BREAK.join([" ".join(["captures", *numbers, "|", *map(str, graph.tensors)]), *graph.text.split("\n")])


def parse_graph(text: str) -> Graph:
    """Makes the graph that `write_graph` wrote.

    Raises:
        FlexDecodeError: it is no such text.
    """
    first, *lines = text.split(_BREAK)
    found = _CAPTURES.fullmatch(first)
    if found is None or not text.isprintable():
        _refuse(text)
    pairs = [part.split(".") for part in found[1].split()]
    numbers = tuple(Source(int(leaf), int(dim[0]) if dim else -1) for leaf, *dim in pairs)
    tensors = tuple(map(int, found[2].split()))
    types: list[tuple[torch.dtype, int]] = []
    nodes: list[Node] = []
    output = None
    for line in lines:
        if output is not None:
            _refuse(line)
        elif found := _TENSOR.fullmatch(line):
            slot, dtype, rank = found.groups()
            if int(slot) != len(types) or dtype not in _DTYPES or nodes:
                _refuse(line)
            types.append((_DTYPES[dtype], int(rank)))
        elif found := _NODE.fullmatch(line):
            nodes.append(_node(line, found, nodes, types, len(numbers)))
        elif (found := _RETURN.fullmatch(line)) and int(found[1]) < len(nodes):
            output = nodes[int(found[1])]
        else:
            _refuse(line)
    if output is None or len(types) != len(tensors) or loops_around(topological(output))[output]:
        _refuse(text)
    return Graph(output, numbers, tensors, tuple(types))


def _node(line: str, found: re.Match, nodes: list[Node], types: list, num_numbers: int) -> Node:
    number, op, inside, dtype, weak = found.groups()
    if int(number) != len(nodes) or dtype not in _DTYPES:
        _refuse(line)
    parts = _split(inside)
    args: list[Node] = []
    while parts and (operand := _OPERAND.fullmatch(parts[-1])):
        if int(operand[1]) >= len(nodes):
            _refuse(line)
        args.insert(0, nodes[int(operand[1])])
        parts.pop()
    if len(parts) > 1:
        _refuse(line)
    attr = _value(line, parts[0]) if parts else None
    made = Node(op, tuple(args), _DTYPES[dtype], attr, weak is not None)
    if not _fits(made, types, num_numbers):
        _refuse(line)
    return made


def _split(inside: str) -> list[str]:
    """The operands of a line; an attribute in brackets is one of them."""
    if inside.startswith("("):
        end = inside.index(")") + 1 if ")" in inside else len(inside)
        rest = inside[end:].removeprefix(", ")
        return [inside[:end], *(rest.split(", ") if rest else [])]
    return inside.split(", ") if inside else []


def _value(line: str, text: str) -> Any:
    """An attribute: a number, a name, or a tuple of these."""
    if text in _FLOATS:
        return _FLOATS[text]
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        _refuse(line)


def _fits(node: Node, types: list[tuple[torch.dtype, int]], num_numbers: int) -> bool:
    """Whether a node can be: its attribute, its operands and its types. Proofs about indices rely on the types."""
    op, attr, args, dtype = node.op, node.attr, node.args, node.dtype
    whole = type(attr) is int
    if op in ("index", "score", "const", "number", "step"):
        known = {
            "index": attr in INDEX_NAMES and dtype == torch.int64,
            "score": attr is None and dtype == torch.float32,
            "const": type(attr) in (bool, int, float) and _holds(dtype, attr),
            "number": whole and 0 <= attr < num_numbers,
            "step": dtype == torch.int64 and _is_loop(attr, 2),
        }
        return known[op] and not args
    if op == "load":
        if not (whole and 0 <= attr < len(types) and len(args) == types[attr][1]):
            return False
        return dtype == widened(types[attr][0]) and not any(x.dtype.is_floating_point for x in args)
    if op == "fold":
        return _is_loop(attr, 3) and len(args) == 1 and _joins(attr[2], args[0], dtype) and _steps_of(node) <= {attr[1]}
    if op == "cast":
        return attr is None and len(args) == 1
    if op not in OPS or attr is not None or len(args) != OPS[op].arity:
        return False
    try:
        wanted, result, _ = operand_dtypes(OPS[op], args)
    except TypeError:
        return False
    return dtype == result and all(x.dtype == y for x, y in zip(args, wanted, strict=True))


def _is_loop(attr: Any, size: int) -> bool:
    """Whether an attribute is that of a loop: its number from 1 on, and its number of steps."""
    is_loop = type(attr) is tuple and len(attr) == size and all(type(x) is int for x in attr[:2])
    return is_loop and attr[0] >= 1 and 1 <= attr[1] <= MAX_STEPS


def _joins(row: Any, value: Node, dtype: torch.dtype) -> bool:
    """Whether an operation joins two values of a type to one of the same type."""
    if not isinstance(row, str) or row not in OPS or OPS[row].arity != 2:
        return False
    wanted, result, _ = operand_dtypes(OPS[row], (value, value))
    return (*wanted, result) == (dtype,) * 3


def _steps_of(fold: Node) -> set[int]:
    """How many steps the loop of a `fold` has, as its `step` nodes say. An inner loop that has ended is another one."""
    loop = fold.attr[0]
    inside = topological(fold.args[0], within=lambda node: node.op != "fold" or node.attr[0] != loop)
    return {node.attr[1] for node in inside if node.op == "step" and node.attr[0] == loop}


def _holds(dtype: torch.dtype, value: bool | int | float) -> bool:
    """Whether a constant is of a type."""
    if dtype.is_floating_point:
        return type(value) is float
    low, high = INT_LIMITS[dtype]
    return (type(value) is bool) == (dtype == torch.bool) and type(value) is not float and low <= value <= high


def _refuse(line: str) -> NoReturn:
    raise FlexDecodeError(f"this is not the text of a traced mod: {line[:100]!r}")


class CanonicalMod:
    """A mod that is known by the text of its graph, and by what it captures now. It is never called.

    Attributes:
        text: as `write_graph` gives it.
        leaves: what it captures: numbers and tensors.
        name: of the user's mod, for messages.
    """

    def __init__(self, text: str, leaves: list, name: str = "") -> None:
        self.text = text
        self.leaves = leaves
        self.__name__ = name or "mod"

    def __call__(self, *_: object) -> NoReturn:
        """Refuses: only its text says what it computes."""
        raise TypeError("a mod that is known by its text is not called")

    def place(self) -> tuple:
        """What identifies the graph, and the types of the captures: a plan is only right for these."""
        types = [(x.dtype, x.ndim) if isinstance(x, torch.Tensor) else x.__class__ for x in self.leaves]
        return CanonicalMod, self.text, tuple(types)

    def graph(self, kind: str) -> Graph:
        """The graph of the text.

        Args:
            kind: `score_mod` or `mask_mod`.

        Raises:
            FlexDecodeError: the text is no such text, or it describes other captures.
        """
        graph, leaves = parse_graph(self.text), self.leaves
        if (graph.output.dtype == torch.bool) != (kind == "mask_mod") or (
            kind == "mask_mod" and any(node.op == "score" for node in graph.nodes())
        ):
            raise FlexDecodeError(f"the text of {self.__name__} is not that of a {kind}")
        for slot, leaf in enumerate(graph.tensors):
            given = leaves[leaf] if leaf < len(leaves) else None
            dtype, rank = graph.tensor_types[slot]
            if not isinstance(given, torch.Tensor) or (given.dtype, given.ndim) != (dtype, rank):
                raise FlexDecodeError(f"capture {leaf} of {self.__name__} must be a {dtype} tensor of rank {rank}")
        for slot, (leaf, dim) in enumerate(graph.numbers):
            given = leaves[leaf] if leaf < len(leaves) else None
            dtypes = {node.dtype for node in graph.nodes() if node.op == "number" and node.attr == slot}
            if not dtypes <= _number_types(given, dim):
                raise FlexDecodeError(
                    f"capture {leaf} of {self.__name__} is no number, or has no size, of type {dtypes}"
                )
        return graph


def _number_types(given: object, dim: int) -> set[torch.dtype]:
    """The types that a number slot may have: for a captured number or 0-d tensor, or for the size of a tensor."""
    if isinstance(given, torch.Tensor):
        if dim >= 0:
            return {torch.int64} if dim < given.ndim else set()
        return {widened(given.dtype)} if given.ndim == 0 and given.device.type == "cpu" else set()
    if dim >= 0 or given.__class__ not in (int, float):
        return set()
    return {torch.int64} if given.__class__ is int else {torch.float32, torch.float64}
