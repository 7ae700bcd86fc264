"""The traced form of a mod: a small graph of elementwise operations.

A `Node` is immutable, and nodes with equal content are equal, so a common subexpression is one node. A `Graph` is the
output node with the captures that it reads, numbered in order of first use. Its text identifies the mod.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from ..errors import TraceError

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
INDEX_NAMES = ("b", "h", "q_idx", "kv_idx")


class Source(NamedTuple):
    """A run-time number of the host: captured number `leaf`; if `dim >= 0`, a size of captured tensor `leaf`."""

    leaf: int
    dim: int = -1

    def read(self, leaves: list) -> int | float:
        """The current value, from the captures of a mod.

        Raises:
            TraceError: it is an integer that no 64-bit type holds.
        """
        value = leaves[self.leaf]
        if self.dim >= 0:
            return value.shape[self.dim]
        if isinstance(value, torch.Tensor):
            return +value.item()  # `+` makes an int of a bool: kernels take it as an integer
        if value.__class__ is int and not _INT64_MIN <= value <= _INT64_MAX:
            raise TraceError(
                f"the captured number {value} does not fit into int64, in which a mod computes\n"
                "  Use a smaller one: sys.maxsize fits."
            )
        return value


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a mod.

    Attributes:
        op: `index`, `score`, `const`, `number`, `load`, `step`, `fold`, or the name of a row of the op table.
        args: operands. For `load`: the indices, one per dimension. For `fold`: the value that it joins over the steps
            of a loop.
        dtype: the type that PyTorch gives to this value (floating captures widen to float32).
        attr: `index`: its name; `const`: the value; `number`: its `Source` or slot; `load`: leaf or slot of the tensor;
            `step`: the loop (1 or more; an inner loop has a larger number) and its number of steps; `fold`: the same,
            and the row that joins two values.
        weak: true for Python numbers, which do not take part in type promotion within their category.
        digest: 16 bytes that identify the content.
    """

    op: str
    args: tuple[Node, ...]
    dtype: torch.dtype
    attr: Any = None
    weak: bool = False
    digest: bytes = field(init=False, repr=False)

    def __post_init__(self) -> None:
        content = f"{self.op}|{self.attr!r}|{self.dtype}|{self.weak}".encode() + b"".join(a.digest for a in self.args)
        object.__setattr__(self, "digest", hashlib.blake2b(content, digest_size=16).digest())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Node) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)

    @property
    def is_const(self) -> bool:
        """Whether the value is known."""
        return self.op == "const"


def const(value: bool | int | float, dtype: torch.dtype | None = None) -> Node:
    """Makes a constant: of type `dtype`, or a weak Python number when `dtype` is None."""
    if dtype is None:
        kind = torch.bool if isinstance(value, bool) else torch.int64 if isinstance(value, int) else torch.float32
        return Node("const", (), kind, value, weak=True)
    convert = bool if dtype == torch.bool else float if dtype.is_floating_point else int
    return Node("const", (), dtype, convert(value))


def topological(*outputs: Node, within: Callable[[Node], bool] = lambda _: True) -> list[Node]:
    """Lists every node below `outputs` once, operands first, in a deterministic order.

    A node that is not `within` is left out. So are nodes that only such nodes need.
    """
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen and within(node):
            seen.add(node)
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return order


def rewrite(output: Node, visit: Any) -> Node:
    """Rebuilds a graph, operands first. `visit(node, args)` returns the new node for `node` with rebuilt operands."""
    done: dict[Node, Node] = {}
    for node in topological(output):
        done[node] = visit(node, tuple(done[a] for a in node.args))
    return done[output]


def loops_around(nodes: Iterable[Node]) -> dict[Node, frozenset[int]]:
    """Finds the loops in which each value changes. In `nodes`, operands come before the nodes that use them."""
    found: dict[Node, frozenset[int]] = {}
    for node in nodes:
        loops: frozenset[int] = frozenset().union(*(found[a] for a in node.args))
        found[node] = loops | {node.attr[0]} if node.op == "step" else loops
        if node.op == "fold":
            found[node] = loops - {node.attr[0]}
    return found


def changing(fold: Node, loops: dict[Node, frozenset[int]]) -> list[Node]:
    """Lists the nodes that each step of a loop computes again, operands first; `loops` comes from `loops_around`."""
    return topological(fold.args[0], within=lambda node: fold.attr[0] in loops[node])


@dataclass(frozen=True)
class Graph:
    """A traced mod.

    Attributes:
        output: float32 score or bool mask.
        numbers: the `Source` of each number slot (leaves of the mod's captures).
        tensors: the leaf of each tensor slot; a negative leaf `-1 - k` means `frozen[k]`.
        tensor_types: `(dtype, rank)` of each tensor slot.
        frozen: tensors that the mod makes of numbers, with their values from the trace.
    """

    output: Node
    numbers: tuple[Source, ...]
    tensors: tuple[int, ...]
    tensor_types: tuple[tuple[torch.dtype, int], ...]
    frozen: tuple[torch.Tensor, ...] = ()

    @staticmethod
    def build(output: Node, tensor_types: dict[int, tuple[torch.dtype, int]], frozen: list[torch.Tensor]) -> Graph:
        """Numbers the captures of `output` in order of first use.

        Args:
            output: a node; the `number` and `load` nodes below it name leaves.
            tensor_types: `(dtype, rank)` by leaf.
            frozen: tensors named by negative leaves.
        """
        numbers: dict[Source, int] = {}
        tensors: dict[int, int] = {}

        def visit(node: Node, args: tuple[Node, ...]) -> Node:
            attr = node.attr
            if node.op == "number":
                attr = numbers.setdefault(attr, len(numbers))
            elif node.op == "load":
                attr = tensors.setdefault(attr, len(tensors))
            return Node(node.op, args, node.dtype, attr, node.weak)

        # Equal mods may have different leaves. Their slots are equal, because slots follow the order of first use.
        renumbered = rewrite(output, visit)
        types = tuple(tensor_types[leaf] for leaf in tensors)
        return Graph(renumbered, tuple(numbers), tuple(tensors), types, tuple(frozen))

    def nodes(self) -> list[Node]:
        """Every node, operands first."""
        return topological(self.output)

    @functools.cached_property
    def text(self) -> str:
        """Canonical text. Graphs with equal texts are the same function of their slots."""
        lines = [
            f"tensor {slot}: {str(dtype).removeprefix('torch.')} rank {rank}"
            for slot, (dtype, rank) in enumerate(self.tensor_types)
        ]
        names: dict[Node, str] = {}
        for node in self.nodes():
            names[node] = f"%{len(names)}"
            operands = [names[a] for a in node.args]
            if node.attr is not None:
                operands.insert(0, repr(node.attr))
            kind = str(node.dtype).removeprefix("torch.") + ("?" if node.weak else "")
            lines.append(f"{names[node]} = {node.op}({', '.join(operands)}): {kind}")
        return "\n".join([*lines, f"return {names[self.output]}"])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)
