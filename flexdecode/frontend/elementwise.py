"""Elementwise arithmetic on symbols: the rows of the op table, and functions that use several rows."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..errors import TraceError, at_user_line, raised
from .build import cast, make, sources, strong
from .graph import Node, Source, const
from .handlers import Handler, handlers_of, refuse
from .ops import CONSTANT_SECOND, DTYPES, HALF, OPS, STEPS
from .symbol import Consumed, Symbol, TraceContext, checked_shape

# --- Rows -------------------------------------------------------------------------------------------------------------


def elementwise(context: TraceContext, name: str, *operands: Any) -> Any:
    """Applies a row of the op table, with broadcasting over the symbols' remaining dimensions.

    The result is a `Symbol`. The annotation is `Any`, because type checkers do not see operators that a loop sets.
    """
    symbols = [context.symbol(x) for x in operands]
    arity = 2 if name not in OPS else OPS[name].arity
    if len(symbols) != arity:
        refuse(context, f"{name} with {len(symbols)} operand(s)")
    consumed = _consumed(name, symbols)
    if consumed:
        raise Consumed(consumed)
    return broadcast(context, lambda *nodes: _make(context, name, *nodes), *symbols)


def _consumed(name: str, symbols: list[Symbol]) -> set[Source]:
    """The captured numbers that this operation needs as constants."""
    if name in STEPS and not any(s.rank for s in symbols):
        nodes = [s.node for s in symbols]
        if all(n.weak for n in nodes) and any(n.dtype.is_floating_point for n in nodes):
            return set().union(*map(sources, nodes))
    last = symbols[-1]
    return sources(last.node) if name in CONSTANT_SECOND and last.rank == 0 and last.node.weak else set()


def _make(context: TraceContext, name: str, *nodes: Node) -> Node:
    try:
        return make(name, *nodes)
    except (TypeError, ZeroDivisionError, ValueError) as error:
        raise at_user_line(
            TraceError, f"{name} in a {context.kind}: {error}", "Check its operands and their types."
        ) from None


def broadcast(context: TraceContext, function: Callable[..., Node], *symbols: Symbol) -> Symbol:
    """Applies a function to symbols of any shapes. If two of them have dimensions, their sizes become constants."""
    shaped = [s for s in symbols if s.rank]
    if not shaped:
        return context.scalar(function(*(s.node for s in symbols)))
    if len(shaped) == 1:
        sizes = shaped[0].sizes
        views = list(symbols)
    else:
        sizes = tuple(const(n) for n in checked_shape(torch.broadcast_shapes, *(s.extents() for s in shaped)))
        views = [expanded(s, sizes) if s.rank else s for s in symbols]
    dtype = function(*(Node("axis", (), s.dtype) if s.rank else s.node for s in views)).dtype
    guarded = shaped[0].guarded if len(shaped) == 1 and _keeps_zero(function, symbols) else None
    return Symbol(
        context, sizes, lambda index: function(*(s.at(index if s.rank else ()) for s in views)), dtype, guarded
    )


def _keeps_zero(function: Callable[..., Node], symbols: Sequence[Symbol]) -> bool:
    """Whether the function maps zero, which a read outside a tensor gives, to zero."""
    try:
        result = function(*(cast(const(0), s.dtype) if s.rank else s.node for s in symbols))
    except TraceError:  # zero is not in the function's domain
        raised.error = None
        return False
    return result.is_const and result.attr == 0


def expanded(symbol: Symbol, sizes: tuple[Node, ...]) -> Symbol:
    """Repeats dimensions of size 1, and adds new dimensions at the front."""
    skip = len(sizes) - symbol.rank
    fixed = [n.is_const and n.attr == 1 for n in symbol.sizes]

    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(tuple(const(0) if one else i for one, i in zip(fixed, index[skip:], strict=True)))

    guarded = (*[False] * skip, *(g and not one for g, one in zip(symbol.guarded, fixed, strict=True)))
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


def as_dtype(context: TraceContext, x: Symbol, dtype: torch.dtype) -> Symbol:
    """Converts a symbol."""
    if dtype not in DTYPES:
        refuse(context, f"Tensor.to({dtype})")
    return broadcast(context, lambda node: strong(cast(node, dtype)), x)


def rounded_once(function: Handler) -> Handler:
    """Makes a function compute half types in float32 and round only the result, as in PyTorch."""

    @functools.wraps(function)
    def apply(context: TraceContext, *args: Any, **kwargs: Any) -> Symbol:
        tensors = [context.symbol(a) for a in (*args, *kwargs.values()) if isinstance(a, (Symbol, torch.Tensor))]
        dtypes = [s.dtype for s in tensors if s.rank or not s.node.weak]
        common = functools.reduce(torch.promote_types, dtypes) if dtypes else torch.float32
        if common not in HALF:
            return function(context, *args, **kwargs)

        def wide(value: Any) -> Any:
            is_half = isinstance(value, (Symbol, torch.Tensor)) and context.symbol(value).dtype in HALF
            return as_dtype(context, context.symbol(value), torch.float32) if is_half else value

        result = function(context, *map(wide, args), **{name: wide(value) for name, value in kwargs.items()})
        return as_dtype(context, result, common)

    return apply


# --- Arithmetic -------------------------------------------------------------------------------------------------------

_handles = handlers_of("Arithmetic")


@_handles("div", "divide", "true_divide")
def _div(context: TraceContext, x: Any, other: Any, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode is None:
        return elementwise(context, "div", x, other)
    if rounding_mode == "floor":
        return elementwise(context, "floor_divide", x, other)
    if rounding_mode != "trunc":
        refuse(context, f"div(rounding_mode={rounding_mode!r})")
    quotient = elementwise(context, "div", x, other)
    integer = elementwise(context, "fmod", x, other)
    if integer.dtype.is_floating_point:
        return elementwise(context, "trunc", quotient)
    return elementwise(context, "floor_divide", elementwise(context, "sub", x, integer), other)


def _scaled(context: TraceContext, x: Any, alpha: Any) -> Any:
    return x if isinstance(alpha, int) and alpha == 1 else elementwise(context, "mul", x, alpha)


@_handles("add")
def _add(context: TraceContext, x: Any, other: Any, alpha: Any = 1) -> Symbol:
    return elementwise(context, "add", x, _scaled(context, other, alpha))


@_handles("sub", "subtract")
def _sub(context: TraceContext, x: Any, other: Any, alpha: Any = 1) -> Symbol:
    return elementwise(context, "sub", x, _scaled(context, other, alpha))


@_handles("rsub")
def _rsub(context: TraceContext, x: Any, other: Any, alpha: Any = 1) -> Symbol:
    return elementwise(context, "sub", other, _scaled(context, x, alpha))


@_handles("float_power")
def _float_power(context: TraceContext, x: Any, exponent: Any) -> Symbol:
    return elementwise(context, "pow", as_dtype(context, context.symbol(x), torch.float64), exponent)


@_handles("square")
def _square(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "pow", x, 2)


@_handles("ldexp")
@rounded_once
def _ldexp(context: TraceContext, x: Any, other: Any) -> Symbol:
    return elementwise(context, "mul", x, elementwise(context, "exp2", other))


@_handles("lerp")
@rounded_once
def _lerp(context: TraceContext, x: Any, end: Any, weight: Any) -> Symbol:
    x, end, weight = context.symbol(x), context.symbol(end), context.symbol(weight)
    distance: Any = end - x
    return elementwise(context, "where", abs(weight) < 0.5, x + weight * distance, end - distance * (1 - weight))


@_handles("addcmul")
@rounded_once
def _addcmul(context: TraceContext, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Symbol:
    return elementwise(context, "add", x, elementwise(context, "mul", _scaled(context, tensor1, value), tensor2))


@_handles("addcdiv")
@rounded_once
def _addcdiv(context: TraceContext, x: Any, tensor1: Any, tensor2: Any, value: Any = 1) -> Symbol:
    return elementwise(context, "add", x, elementwise(context, "div", _scaled(context, tensor1, value), tensor2))


@_handles("nextafter")
def _nextafter(context: TraceContext, x: Any, other: Any) -> Symbol:
    for operand in (x, other):
        if context.symbol(operand).dtype in HALF:
            refuse(context, f"nextafter of {context.symbol(operand).dtype}")
    return elementwise(context, "nextafter", x, other)


# --- Rounding ---------------------------------------------------------------------------------------------------------

_handles = handlers_of("Rounding")


@_handles("round")
@rounded_once
def _round(context: TraceContext, x: Any, decimals: int = 0) -> Symbol:
    x = context.symbol(x)
    if decimals == 0 or not x.dtype.is_floating_point:
        return elementwise(context, "round", x)
    factor = 10.0 ** abs(decimals)
    if decimals > 0:
        return elementwise(context, "round", x * factor) / factor
    return elementwise(context, "round", x / factor) * factor


@_handles("frac")
def _frac(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "sub", x, elementwise(context, "trunc", x))


# --- Comparison and choice --------------------------------------------------------------------------------------------

_handles = handlers_of("Comparison and choice")


@_handles("where")
def _where(context: TraceContext, condition: Any, *choices: Any, **kwargs: Any) -> Symbol:
    choices += tuple(kwargs.pop(k) for k in ("input", "self", "other") if k in kwargs)
    if len(choices) != 2:
        refuse(context, "where with one operand")
    return elementwise(context, "where", condition, *choices)


@handlers_of(None)("Tensor.where")  # the method takes its operands in another order
def _tensor_where(context: TraceContext, x: Any, condition: Any, other: Any) -> Symbol:
    return elementwise(context, "where", condition, x, other)


@_handles("masked_fill")
def _masked_fill(context: TraceContext, x: Any, mask: Any, value: Any) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", mask, as_dtype(context, context.symbol(value), x.dtype), x)


@_handles("clamp", "clip")
def clamp(context: TraceContext, x: Any, min: Any = None, max: Any = None) -> Symbol:
    """`x.clamp(min, max)`."""
    if min is None and max is None:
        raise at_user_line(TraceError, "clamp needs `min` or `max`", "Give at least one bound.")
    if min is not None:
        x = elementwise(context, "maximum", x, min)
    return x if max is None else elementwise(context, "minimum", x, max)


@_handles("clamp_min")
def _clamp_min(context: TraceContext, x: Any, min: Any) -> Symbol:
    return elementwise(context, "maximum", x, min)


@_handles("clamp_max")
def _clamp_max(context: TraceContext, x: Any, max: Any) -> Symbol:
    return elementwise(context, "minimum", x, max)


def _larger_or_smaller(name: str) -> Handler:
    """torch.max and torch.min of two tensors. Those of one tensor are in `reductions`."""
    return lambda context, x, other: elementwise(context, name, x, other)


_handles("max")(_larger_or_smaller("maximum"))
_handles("min")(_larger_or_smaller("minimum"))


def _ignoring_nan(name: str, of_integers: str) -> Handler:
    def apply(context: TraceContext, x: Any, other: Any) -> Symbol:
        result = elementwise(context, of_integers, x, other)
        return elementwise(context, name, x, other) if result.dtype.is_floating_point else result

    return apply


_handles("fmax")(_ignoring_nan("fmax", "maximum"))
_handles("fmin")(_ignoring_nan("fmin", "minimum"))


@_handles("isclose")
def _isclose(
    context: TraceContext, x: Any, other: Any, rtol: float = 1e-5, atol: float = 1e-8, equal_nan: bool = False
) -> Symbol:
    x, other = context.symbol(x), context.symbol(other)
    close = elementwise(context, "eq", x, other)
    if equal_nan:
        close = close | (elementwise(context, "isnan", x) & elementwise(context, "isnan", other))
    if x.dtype.is_floating_point or other.dtype.is_floating_point:
        distance, bound = abs(x - other), abs(elementwise(context, "mul", other, rtol)) + atol
    else:
        distance = abs(elementwise(context, "sub", x + 0, other + 0))
        bound = abs(elementwise(context, "mul", as_dtype(context, other, torch.float64), rtol)) + atol
    return close | (elementwise(context, "isfinite", distance) & (distance <= bound))


@_handles("isreal")
def _isreal(context: TraceContext, x: Any) -> Symbol:
    return broadcast(context, lambda _: const(True, torch.bool), context.symbol(x))


@_handles("heaviside")
def _heaviside(context: TraceContext, x: Any, values: Any) -> Symbol:
    x, values = context.symbol(x), context.symbol(values)
    positive = as_dtype(context, elementwise(context, "gt", x, 0), x.dtype)
    return elementwise(context, "where", elementwise(context, "eq", x, 0), values, positive)


@_handles("nan_to_num")
def _nan_to_num(context: TraceContext, x: Any, nan: Any = None, posinf: Any = None, neginf: Any = None) -> Symbol:
    x = context.symbol(x)
    if not x.dtype.is_floating_point:
        return x
    limits = torch.finfo(x.dtype)
    for test, value in (
        ("isnan", 0.0 if nan is None else nan),
        ("isposinf", limits.max if posinf is None else posinf),
        ("isneginf", limits.min if neginf is None else neginf),
    ):
        x = _masked_fill(context, x, elementwise(context, test, x), value)
    return x


# --- Logarithms and angles --------------------------------------------------------------------------------------------


@handlers_of("Exponentials, logarithms and roots")("logit")
@rounded_once
def _logit(context: TraceContext, x: Any, eps: float | None = None) -> Symbol:
    return elementwise(context, "logit", x if eps is None else clamp(context, x, eps, 1 - eps))


_handles = handlers_of("Trigonometric and hyperbolic functions")


@_handles("rad2deg")
def _rad2deg(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "mul", x, 180 / math.pi)


@_handles("deg2rad")
def _deg2rad(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "mul", x, math.pi / 180)


@_handles("angle")
def _angle(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    angle = elementwise(context, "where", elementwise(context, "lt", x, 0), math.pi, 0.0)
    if not x.dtype.is_floating_point:
        return angle
    nan_kept = elementwise(context, "where", elementwise(context, "isnan", x), x, as_dtype(context, angle, x.dtype))
    return as_dtype(context, nan_kept, x.dtype)
