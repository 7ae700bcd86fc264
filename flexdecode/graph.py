"""The traced form of a mod: a small graph of elementwise operations.

A `Node` is immutable and its identity is its content, so a common subexpression is one node. A `Graph` is the output
node with the captures that it reads, numbered in order of first use; its text is the identity of the mod.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch

from .errors import TraceError

_INT64_MIN, _INT64_MAX = -(1 << 63), (1 << 63) - 1
INDEX_NAMES = ("b", "h", "q_idx", "kv_idx")


class Source(NamedTuple):
    """A run-time number of the host: captured number `leaf`, or, with `dim >= 0`, a size of captured tensor `leaf`."""

    leaf: int
    dim: int = -1

    def read(self, leaves: list) -> int | float:
        """The present value, from the captures of a mod.

        Raises:
            TraceError: it is an integer that no 64-bit type holds.
        """
        value = leaves[self.leaf]
        if self.dim >= 0:
            return value.shape[self.dim]
        if isinstance(value, torch.Tensor):
            return +value.item()  # `+` makes a bool an int: kernels take it as an integer
        if value.__class__ is int and not _INT64_MIN <= value <= _INT64_MAX:
            raise TraceError(
                f"the captured number {value} does not fit into int64, in which a mod computes\n"
                "  Capture a smaller one: sys.maxsize is the largest."
            )
        return value


@dataclass(frozen=True, eq=False)
class Node:
    """One value of a mod.

    Attributes:
        op: `index`, `score`, `const`, `number`, `load`, or the name of a row of the op table.
        args: operands; for `load` the indices, one per dimension.
        dtype: the type that PyTorch gives to this value (floating captures widen to float32).
        attr: `index`: its name; `const`: the value; `number`: its `Source` or slot; `load`: leaf or slot of the tensor.
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
        return Node("const", (), _python_dtype(value), value, weak=True)
    if dtype == torch.bool:
        value = bool(value)
    elif dtype.is_floating_point:
        value = float(value)
    else:
        value = int(value)
    return Node("const", (), dtype, value)


def _python_dtype(value: bool | int | float) -> torch.dtype:
    if isinstance(value, bool):
        return torch.bool
    return torch.int64 if isinstance(value, int) else torch.float32


def topological(*outputs: Node) -> list[Node]:
    """Lists every node below `outputs` once, operands first, in a deterministic order."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack = [(node, False) for node in reversed(outputs)]
    while stack:
        node, ready = stack.pop()
        if ready:
            order.append(node)
        elif node not in seen:
            seen.add(node)
            stack.append((node, True))
            stack.extend((arg, False) for arg in reversed(node.args))
    return order


def rewrite(output: Node, visit: Any) -> Node:
    """Rebuilds a graph bottom-up; `visit(node, args)` returns the new node for `node` with rebuilt operands."""
    done: dict[Node, Node] = {}
    for node in topological(output):
        done[node] = visit(node, tuple(done[a] for a in node.args))
    return done[output]


@dataclass(frozen=True)
class Graph:
    """A traced mod.

    Attributes:
        output: float32 score or bool mask.
        numbers: the `Source` of each number slot (leaves of the mod's captures).
        tensors: the leaf of each tensor slot; a negative leaf `-1 - k` means `frozen[k]`.
        tensor_types: `(dtype, rank)` of each tensor slot.
        frozen: tensors that cannot be reached through the mod's captures, kept as they were at trace time.
        text: canonical text; equal text means the same function of the slots.
    """

    output: Node
    numbers: tuple[Source, ...]
    tensors: tuple[int, ...]
    tensor_types: tuple[tuple[torch.dtype, int], ...]
    frozen: tuple[torch.Tensor, ...] = ()
    text: str = ""

    @staticmethod
    def build(output: Node, tensor_types: dict[int, tuple[torch.dtype, int]], frozen: list[torch.Tensor]) -> Graph:
        """Numbers the captures of `output` in order of first use and writes the canonical text.

        Args:
            output: a node whose `number` and `load` attributes name leaves.
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

        # A size names its tensor by leaf, which says nothing: the slot order makes equal mods equal.
        renumbered = rewrite(output, visit)
        graph = Graph(
            renumbered,
            tuple(numbers),
            tuple(tensors),
            tuple(tensor_types[leaf] for leaf in tensors),
            tuple(frozen),
        )
        object.__setattr__(graph, "text", graph._canonical_text())
        return graph

    def nodes(self) -> list[Node]:
        """Every node, operands first."""
        return topological(self.output)

    def _canonical_text(self) -> str:
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

    @property
    def digest(self) -> str:
        """Hexadecimal hash of the text."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Graph) and self.text == other.text

    def __hash__(self) -> int:
        return hash(self.text)
