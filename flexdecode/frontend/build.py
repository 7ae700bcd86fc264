"""Builds nodes: PyTorch's type promotion, constant folding and one canonical form.

Mods that compute the same in the same way become equal graphs, even if their callables differ.
"""

from __future__ import annotations

import torch

from .graph import Node, Source, const, rewrite, topological
from .ops import CONSTANT_SECOND, HALF, INT_LIMITS, OPS, Op, operand_dtypes

_EXCHANGED = {"gt": "lt", "ge": "le", "greater": "lt", "greater_equal": "le"}
_ON_BOOLS = {
    "bitwise_and": "logical_and",
    "bitwise_or": "logical_or",
    "bitwise_xor": "logical_xor",
    "bitwise_not": "logical_not",
    "mul": "logical_and",
    "add": "logical_or",
    "minimum": "logical_and",
    "maximum": "logical_or",
    "fmin": "logical_and",
    "fmax": "logical_or",
}
_NO_BOOLS = {
    "sub", "neg", "floor_divide", "remainder", "fmod", "pow", "abs", "bitwise_left_shift", "bitwise_right_shift",
    "floor", "ceil", "round", "trunc", "gcd", "lcm",
}  # fmt: skip


def make(name: str, *nodes: Node) -> Node:
    """Applies an operation of the table to nodes.

    Raises:
        TypeError: PyTorch's operation does not take these types.
        ZeroDivisionError: an integer is divided by the constant 0.
        ValueError: an integer is raised to a constant negative power, or a result of Python numbers is complex.
        OverflowError: an integer result of Python numbers does not fit into int64.
    """
    if name in _EXCHANGED:
        name, nodes = _EXCHANGED[name], nodes[::-1]
    op = OPS[name]
    in_dtypes, dtype, weak = operand_dtypes(op, nodes)
    if dtype == torch.bool and not (weak and op.rule == "promote"):
        if name in _NO_BOOLS:
            raise TypeError(f"{name} is not defined for bools; convert one with .int() first")
        if name == "sign":
            return nodes[0]
        if name in _ON_BOOLS:
            return make(_ON_BOOLS[name], *nodes)
    if weak and op.python is not None and all(n.is_const for n in nodes):
        return _in_python(op, nodes)
    if name in CONSTANT_SECOND and not dtype.is_floating_point and nodes[1].is_const:
        _check_second(name, nodes[1])
    args = tuple(cast(n, d) for n, d in zip(nodes, in_dtypes, strict=True))
    if all(n.is_const for n in args):
        value = op.torch(*(torch.tensor(n.attr, dtype=d, device="cpu") for n, d in zip(args, in_dtypes, strict=True)))
        return const(value.item(), dtype)
    if op.commutative:
        args = tuple(sorted(args, key=lambda n: (n.is_const, n.digest)))
    return _simplify(name, args) or Node(name, args, dtype, weak=weak)


def _in_python(op: Op, nodes: tuple[Node, ...]) -> Node:
    assert op.python is not None
    value = op.python(*(n.attr for n in nodes))
    if isinstance(value, complex):
        raise ValueError("the result is complex")
    check_constant(value)
    return const(value)


def _check_second(name: str, second: Node) -> None:
    """Refuses constants that PyTorch refuses as the second operand of integers."""
    if name in ("floor_divide", "remainder", "fmod") and second.attr == 0:
        raise ZeroDivisionError("an integer is divided by zero")
    if name == "pow" and second.weak and second.attr < 0:
        raise ValueError("integers to negative integer powers are not allowed; convert one with .float() first")


def _simplify(name: str, args: tuple[Node, ...]) -> Node | None:
    """Simplifies nodes like `a & True`, `where(True, a, b)` and `x + 0`; None if there is nothing to simplify."""
    if name == "where":
        condition, a, b = args
        if condition.is_const:
            return a if condition.attr else b
        return a if a == b else None
    if name in ("logical_and", "logical_or"):
        for this, other in (args, args[::-1]):
            if this.is_const:
                return other if bool(this.attr) == (name == "logical_and") else this
        return args[0] if args[0] == args[1] else None
    if name == "logical_not" and args[0].op == "logical_not":
        return args[0].args[0]
    if len(args) == 2 and args[1].is_const and not args[0].dtype.is_floating_point:
        value = args[1].attr
        if args[0].weak and not args[1].weak:  # the result is no longer a Python number
            return None
        if (name in ("add", "sub") and value == 0) or (name in ("mul", "floor_divide") and value == 1):
            return args[0]
        if name == "mul" and value == -1:
            return make("neg", args[0])
    return None


def cast(node: Node, dtype: torch.dtype) -> Node:
    """Converts a node. A conversion between equal types gives the node itself.

    A Python number that is converted to a half type is not rounded, as in PyTorch. The result stays weak to show this.
    """
    if node.dtype == dtype:
        return node
    if node.weak and node.dtype == torch.float32 and dtype == torch.float64:
        return _in_float64(node)
    unrounded = node.weak and dtype in HALF
    if node.is_const:
        if dtype.is_floating_point and node.weak:
            return Node("const", (), dtype, float(node.attr), weak=unrounded)
        exact = torch.float64 if node.weak and node.dtype.is_floating_point else node.dtype
        return const(torch.tensor(node.attr, dtype=exact, device="cpu").to(dtype).item(), dtype)
    if dtype == torch.bool:
        return Node("ne", (node, const(0, node.dtype)), torch.bool)
    return Node("cast", (node,), dtype, weak=unrounded)


def _in_float64(node: Node) -> Node:
    """Converts a float that Python numbers make to a float64 tensor, with all bits of Python's floats."""

    def visit(node: Node, args: tuple[Node, ...]) -> Node:
        if node.dtype != torch.float32:
            return node
        if node.is_const:
            return const(node.attr, torch.float64)
        if node.op == "number":
            return Node("number", (), torch.float64, node.attr)
        return cast(args[0], torch.float64) if node.op == "cast" else make(node.op, *args)

    return rewrite(node, visit)


def strong(node: Node) -> Node:
    """Makes a tensor of a Python number."""
    if not node.weak:
        return node
    if node.is_const and node.dtype in HALF:
        return const(torch.tensor(node.attr, dtype=node.dtype, device="cpu").item(), node.dtype)
    return Node(node.op, node.args, node.dtype, node.attr)


def remake(node: Node, args: tuple[Node, ...]) -> Node:
    """Builds `node` again from other operands. Constant results are folded."""
    if node.op == "cast":
        again = cast(args[0], node.dtype)
        return again if node.weak else strong(again)
    if node.op in OPS:
        op = OPS[node.op]
        if node.weak and op.python is not None and all(a.is_const for a in args):
            return _in_python(op, args)
        again = make(node.op, *args)
        return again if node.weak else strong(again)
    return Node(node.op, args, node.dtype, node.attr, node.weak)


def sources(node: Node) -> set[Source]:
    """The captured Python numbers and sizes that a value is computed from."""
    return {n.attr for n in topological(node) if n.op == "number" and n.weak}


def check_constant(value: int | float) -> None:
    """Refuses a Python integer that no 64-bit type holds.

    Raises:
        OverflowError: `value` is outside int64.
    """
    low, high = INT_LIMITS[torch.int64]
    if isinstance(value, int) and not low <= value <= high:
        raise OverflowError(f"the number {value} does not fit into int64")
