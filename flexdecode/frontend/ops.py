"""The op table: one row per elementwise operation.

A row has everything that the rest of the package knows about an operation: its type rule, how PyTorch computes it on
operands of that type, its Triton text, how Python computes it on two numbers, and the range of its integer results.
To add an operation, add a row and a test.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import ranges
from .graph import Node
from .ranges import IntRange

INT_LIMITS: dict[torch.dtype, IntRange] = {
    torch.bool: (0, 1),
    **{
        dtype: (torch.iinfo(dtype).min, torch.iinfo(dtype).max)
        for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
    },
}
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
HALF = (torch.float16, torch.bfloat16)
FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)  # captured tensors may have them; they are read as float32
DTYPES = (*INT_LIMITS, *FLOATS)


def widened(dtype: torch.dtype) -> torch.dtype:
    """The type that a mod sees for values stored as `dtype`: float32 for half and float8 types."""
    return torch.float32 if dtype.is_floating_point and dtype != torch.float64 else dtype


@dataclass(frozen=True)
class Op:
    """One elementwise operation.

    Attributes:
        name: the op of a `Node`, and the PyTorch function or method that makes it.
        arity: number of operands.
        rule: types of operands and result: `promote` (the common type), `float` (the common type, integers to float32),
            `integer` (the common type, which must not be floating), `compare` (common type in, bool out),
            `logical` (bool in, bool out), `where` (bool, then the common type), `predicate` (floating test, bool out).
        torch: computes it on operands of the type that the rule gives.
        triton: text for floating operands, with `{0}`, `{1}`, ... for the operands.
        triton_int: text for integer operands, if it differs.
        shortcuts: texts for floating operands if one of them is a constant: its position, its value, the text.
        python: computes it on Python numbers, for operators.
        range: computes the integer range of the result from the ranges of the operands.
        commutative: operands may change places.
        names: other names of the same function in PyTorch.
    """

    name: str
    arity: int
    rule: str
    torch: Callable[..., torch.Tensor]
    triton: str
    triton_int: str | None = None
    python: Callable | None = None
    range: Callable[..., IntRange] | None = None
    commutative: bool = False
    names: tuple[str, ...] = ()
    shortcuts: tuple[tuple[int, float, str], ...] = ()


# --- PyTorch twins that need more than one call -----------------------------------------------------------------------


def _zero_by_zero(function: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """Makes an integer division by 0 give 0, as in the kernel. On a CPU PyTorch would raise, even for masked pairs."""

    def divide(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        if a.dtype.is_floating_point:
            return function(a, b)
        return torch.where(b == 0, torch.zeros_like(b), function(a, torch.where(b == 0, torch.ones_like(b), b)))

    return divide


def _lcm(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """torch.lcm. For the smallest integer and -1 PyTorch's own divides by -1, which ends the process on a CPU."""
    divisor = torch.gcd(a, b).abs()
    return (torch.floor_divide(a, torch.where(divisor == 0, torch.ones_like(divisor), divisor)) * b).abs()


def _ndtr(x: torch.Tensor) -> torch.Tensor:
    """ndtr, also in the lower tail. There torch.special.ndtr gives 0, because it computes 1 + erf."""
    return 0.5 * torch.erfc(x * -(0.5**0.5))


def _row(name: str, arity: int, rule: str, triton: str, **rest: Any) -> Op:
    function = rest.pop("torch", None) or getattr(torch, name)
    return Op(name, arity, rule, function, triton, **rest)


_POWERS = (
    (0, 2.0, "tl.exp2({1})"),
    (1, 2.0, "{0} * {0}"),
    (1, 3.0, "{0} * {0} * {0}"),
    (1, 0.5, 'tl.where({0} == float("-inf"), float("inf"), tl.sqrt({0}))'),
    (1, -1.0, "1.0 / {0}"),
    (1, -2.0, "1.0 / ({0} * {0})"),
)

_TABLE: dict[str, tuple[Op, ...]] = {
    "Arithmetic": (
        _row("add", 2, "promote", "{0} + {1}", python=operator.add, commutative=True,
             range=lambda a, b: (a[0] + b[0], a[1] + b[1])),
        _row("sub", 2, "promote", "{0} - {1}", python=operator.sub, names=("subtract",),
             range=lambda a, b: (a[0] - b[1], a[1] - b[0])),
        _row("mul", 2, "promote", "{0} * {1}", python=operator.mul, commutative=True, names=("multiply",),
             range=ranges.mul),
        _row("div", 2, "float", "{0} / {1}", python=operator.truediv, names=("true_divide", "divide", "truediv")),
        _row("floor_divide", 2, "promote", "floor_divide_float({0}, {1})", triton_int="floor_divide_int({0}, {1})",
             torch=_zero_by_zero(torch.floor_divide), python=operator.floordiv, names=("floordiv",),
             range=ranges.floor_divide),
        _row("remainder", 2, "promote", "remainder_float({0}, {1})", triton_int="remainder_int({0}, {1})",
             torch=_zero_by_zero(torch.remainder), python=operator.mod, names=("mod",), range=ranges.remainder),
        _row("fmod", 2, "promote", "fmod_float({0}, {1})", triton_int="fmod_int({0}, {1})",
             torch=_zero_by_zero(torch.fmod)),
        _row("pow", 2, "promote", "pow_float({0}, {1})", triton_int="pow_int({0}, {1})", python=operator.pow,
             range=ranges.power, shortcuts=_POWERS),
        _row("neg", 1, "promote", "-{0}", python=operator.neg, names=("negative",),
             range=lambda a: (-a[1], -a[0])),
        _row("abs", 1, "promote", "tl.abs({0})", python=operator.abs, names=("absolute",), range=ranges.absolute),
        _row("sign", 1, "promote", "sign({0})", triton_int="sign({0})", names=("sgn",),
             range=lambda a: (max(-1, min(a[0], 1)), max(-1, min(a[1], 1)))),
        _row("reciprocal", 1, "float", "1.0 / {0}"),
        _row("hypot", 2, "float", "hypot({0}, {1})", commutative=True),
        _row("copysign", 2, "float", "copysign({0}, {1})"),
        _row("nextafter", 2, "float", "nextafter({0}, {1})"),
        _row("gcd", 2, "integer", "gcd({0}, {1})", commutative=True),
        _row("lcm", 2, "integer", "lcm({0}, {1})", torch=_lcm, commutative=True),
    ),
    "Comparison and choice": (  # `gt` and `ge` become `lt` and `le` with the operands exchanged
        _row("lt", 2, "compare", "{0} < {1}", python=operator.lt, names=("less",)),
        _row("le", 2, "compare", "{0} <= {1}", python=operator.le, names=("less_equal",)),
        _row("eq", 2, "compare", "{0} == {1}", python=operator.eq, commutative=True),
        _row("ne", 2, "compare", "{0} != {1}", python=operator.ne, commutative=True, names=("not_equal",)),
        _row("where", 3, "where", "tl.where({0}, {1}, {2})",
             range=lambda _, a, b: (min(a[0], b[0]), max(a[1], b[1]))),
        _row("maximum", 2, "promote", "maximum({0}, {1})", triton_int="tl.maximum({0}, {1})", commutative=True,
             range=lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
        _row("minimum", 2, "promote", "minimum({0}, {1})", triton_int="tl.minimum({0}, {1})", commutative=True,
             range=lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
        _row("fmax", 2, "promote", "fmax({0}, {1})", triton_int="tl.maximum({0}, {1})", commutative=True,
             range=lambda a, b: (max(a[0], b[0]), max(a[1], b[1]))),
        _row("fmin", 2, "promote", "fmin({0}, {1})", triton_int="tl.minimum({0}, {1})", commutative=True,
             range=lambda a, b: (min(a[0], b[0]), min(a[1], b[1]))),
        _row("isnan", 1, "predicate", "{0} != {0}"),
        _row("isinf", 1, "predicate", 'tl.abs({0}) == float("inf")'),
        _row("isposinf", 1, "predicate", '{0} == float("inf")'),
        _row("isneginf", 1, "predicate", '{0} == float("-inf")'),
        _row("isfinite", 1, "predicate", 'tl.abs({0}) < float("inf")'),
        _row("signbit", 1, "predicate", "signbit({0})"),
    ),
    "Logic and bits": (
        _row("logical_and", 2, "logical", "{0} & {1}", commutative=True),
        _row("logical_or", 2, "logical", "{0} | {1}", commutative=True),
        _row("logical_xor", 2, "logical", "{0} ^ {1}", commutative=True),
        _row("logical_not", 1, "logical", "{0} == 0"),
        _row("bitwise_and", 2, "integer", "{0} & {1}", python=operator.and_, commutative=True, names=("and",),
             range=ranges.bitwise_and),
        _row("bitwise_or", 2, "integer", "{0} | {1}", python=operator.or_, commutative=True, names=("or",),
             range=ranges.bitwise_or),
        _row("bitwise_xor", 2, "integer", "{0} ^ {1}", python=operator.xor, commutative=True, names=("xor",),
             range=ranges.bitwise_or),
        _row("bitwise_not", 1, "integer", "~{0}", names=("invert",), python=operator.invert,
             range=lambda a: (~a[1], ~a[0])),
        _row("bitwise_left_shift", 2, "integer", "shift_left({0}, {1})", python=operator.lshift, names=("lshift",),
             range=ranges.shift_left),
        _row("bitwise_right_shift", 2, "integer", "shift_right({0}, {1})", python=operator.rshift, names=("rshift",),
             range=ranges.shift_right),
    ),
    "Rounding": (
        _row("floor", 1, "promote", "tl.floor({0})", triton_int="{0}", range=lambda a: a),
        _row("ceil", 1, "promote", "tl.ceil({0})", triton_int="{0}", range=lambda a: a),
        _row("round", 1, "promote", "round_half_even({0})", triton_int="{0}", range=lambda a: a),
        _row("trunc", 1, "promote", "trunc({0})", triton_int="{0}", range=lambda a: a, names=("fix",)),
    ),
    "Exponentials, logarithms and roots": (
        _row("exp", 1, "float", "tl.exp({0})"),
        _row("exp2", 1, "float", "tl.exp2({0})"),
        _row("expm1", 1, "float", "expm1({0})"),
        _row("log", 1, "float", "tl.log({0})"),
        _row("log2", 1, "float", "tl.log2({0})"),
        _row("log10", 1, "float", "tl.log2({0}) * 0.30102999566398120"),
        _row("log1p", 1, "float", "log1p({0})"),
        _row("sqrt", 1, "float", "tl.sqrt({0})"),
        _row("rsqrt", 1, "float", "tl.rsqrt({0})"),
        _row("sigmoid", 1, "float", "1.0 / (1.0 + tl.exp(-{0}))", names=("expit",)),
        _row("logit", 1, "float", "logit({0})"),
        _row("logaddexp", 2, "float", "logaddexp({0}, {1})", commutative=True),
        _row("logaddexp2", 2, "float", "logaddexp2({0}, {1})", commutative=True),
        _row("xlogy", 2, "float", "xlogy({0}, {1})"),
        _row("xlog1py", 2, "float", "xlog1py({0}, {1})", torch=torch.special.xlog1py),
        _row("entr", 1, "float", "entr({0})", torch=torch.special.entr),
    ),
    "Trigonometric and hyperbolic functions": (
        _row("sin", 1, "float", "tl.sin({0})"),
        _row("cos", 1, "float", "tl.cos({0})"),
        _row("tan", 1, "float", "tl.sin({0}) / tl.cos({0})"),
        _row("asin", 1, "float", "asin({0})", names=("arcsin",)),
        _row("acos", 1, "float", "acos({0})", names=("arccos",)),
        _row("atan", 1, "float", "atan({0})", names=("arctan",)),
        _row("atan2", 2, "float", "atan2({0}, {1})", names=("arctan2",)),
        _row("sinc", 1, "float", "sinc({0})"),
        _row("sinh", 1, "float", "sinh({0})"),
        _row("cosh", 1, "float", "cosh({0})"),
        _row("tanh", 1, "float", "tanh({0})"),
        _row("asinh", 1, "float", "asinh({0})", names=("arcsinh",)),
        _row("acosh", 1, "float", "acosh({0})", names=("arccosh",)),
        _row("atanh", 1, "float", "atanh({0})", names=("arctanh",)),
    ),
    "The error function and its relatives": (
        _row("erf", 1, "float", "tl.erf({0})"),
        _row("erfc", 1, "float", "erfc({0})"),
        _row("erfcx", 1, "float", "erfcx({0})", torch=torch.special.erfcx),
        _row("erfinv", 1, "float", "erfinv({0})"),
        _row("ndtr", 1, "float", "ndtr({0})", torch=_ndtr),
        _row("log_ndtr", 1, "float", "log_ndtr({0})", torch=torch.special.log_ndtr),
        _row("ndtri", 1, "float", "ndtri({0})", torch=torch.special.ndtri),
    ),
}  # fmt: skip

OPS: dict[str, Op] = {row.name: row for rows in _TABLE.values() for row in rows}

# The heading under which the docs list a row.
GROUPS: dict[str, str] = {row.name: group for group, rows in _TABLE.items() for row in rows}

# In these operations, a captured number as the second operand becomes a constant of the kernel. A division by a
# constant is a multiplication, and its bounds can be solved.
CONSTANT_SECOND = {"floor_divide", "remainder", "fmod", "pow", "bitwise_left_shift", "bitwise_right_shift"}

# These functions have steps. In float32 a captured Python float may be on the other side of a step (0.3 // 0.1 is 2.0
# in Python).
STEPS = {"floor_divide", "remainder", "fmod", "round"}


def _category(dtype: torch.dtype) -> int:
    return 0 if dtype == torch.bool else 2 if dtype.is_floating_point else 1


def common_dtype(nodes: Sequence[Node]) -> tuple[torch.dtype, bool]:
    """PyTorch's result type for 0-d tensors and Python numbers (which are weak), and whether the result is weak."""
    strong = [n.dtype for n in nodes if not n.weak]
    weak = max((n.dtype for n in nodes if n.weak), key=_category, default=None)
    if not strong:
        assert weak is not None
        return weak, True
    dtype = strong[0]
    for other in strong[1:]:
        dtype = torch.promote_types(dtype, other)
    if weak is not None and _category(weak) > _category(dtype):
        dtype = weak
    return dtype, False


def operand_dtypes(op: Op, nodes: Sequence[Node]) -> tuple[tuple[torch.dtype, ...], torch.dtype, bool]:
    """Applies a type rule.

    Returns:
        The type that each operand is cast to, the type of the result, and whether the result is a weak Python number.

    Raises:
        TypeError: the rule is `integer` and an operand is floating.
    """
    if op.rule == "where":
        dtype, weak = common_dtype(nodes[1:])
        # torch.where on two Python numbers gives a tensor of the default type.
        return (torch.bool, dtype, dtype), dtype, False
    dtype, weak = common_dtype(nodes)
    if op.rule == "logical":
        return (torch.bool,) * op.arity, torch.bool, False
    if op.rule == "float" and not dtype.is_floating_point:
        dtype = torch.float32
    if op.rule == "predicate":
        dtype = dtype if dtype.is_floating_point else torch.float32
        return (dtype,), torch.bool, False
    if op.rule == "integer" and dtype.is_floating_point:
        raise TypeError(f"{op.name} takes integers or bools, got {dtype}")
    if op.rule == "compare":
        return (dtype,) * op.arity, torch.bool, weak
    if dtype == torch.bool and op.rule == "promote":
        # In arithmetic on two bools, PyTorch keeps bool for + and *, but Python gives integers.
        dtype = torch.int64 if weak else torch.bool
    return (dtype,) * op.arity, dtype, weak
