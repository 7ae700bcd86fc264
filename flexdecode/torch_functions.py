"""What PyTorch functions, methods and attributes mean on symbols.

Every row of the op table is a function here under its PyTorch names. Functions that are made of rows (silu, softplus)
and conversions are written out below; `factories`, `views`, `joins` and `reductions` add theirs. Everything else is
refused with a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import torch

from .build import cast, make, sources, strong
from .errors import TraceError, UnsupportedOpError, at_user_line, raised
from .graph import Node, Source, const
from .ops import CONSTANT_SECOND, DTYPES, OPS, STEPS
from .symbol import Consumed, Symbol, TraceContext

_REFLECTED = {
    "__rsub__": "sub", "__rdiv__": "div", "__rtruediv__": "div", "__rfloordiv__": "floor_divide",
    "__rmod__": "remainder", "__rpow__": "pow", "__radd__": "add", "__rmul__": "mul", "__rand__": "bitwise_and",
    "__ror__": "bitwise_or", "__rxor__": "bitwise_xor", "__rlshift__": "bitwise_left_shift",
    "__rrshift__": "bitwise_right_shift",
}  # fmt: skip
_ELEMENTWISE = {name: op.name for op in OPS.values() for name in (op.name, *op.names)}
_ELEMENTWISE |= {name: name for name in ("gt", "ge", "greater", "greater_equal")}

Handler = Callable[..., Any]
_HANDLERS: dict[str, Handler] = {}
_PROPERTIES: dict[str, Callable[[Symbol], Any]] = {}  # attributes of tensors that are no methods


def _handles(*names: str) -> Callable[[Handler], Handler]:
    def register(handler: Handler) -> Handler:
        _HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def dispatch(context: TraceContext, func: Any, args: tuple, kwargs: dict) -> Any:
    """Computes one PyTorch call that involves symbols or captured tensors."""
    name = _name_of(func)
    for option in ("out", "inplace"):
        value = kwargs.pop(option, None)
        if value is not None and value is not False:
            refuse_in_place(context, f"{name}(..., {option}=)")
    if name != "where":
        args = tuple(kwargs.pop(k) for k in ("input", "self") if k in kwargs) + args
    if name in _HANDLERS:
        return _HANDLERS[name](context, *args, **kwargs)
    if name in _ELEMENTWISE:
        if kwargs:
            args, kwargs = args + tuple(kwargs.pop(k) for k in ("other", "exponent") if k in kwargs), kwargs
        if kwargs:
            _refuse(context, f"{name}({', '.join(kwargs)}=)")
        return elementwise(context, _ELEMENTWISE[name], *args)
    if name in _REFLECTED:
        return elementwise(context, _REFLECTED[name], args[1], args[0])
    if name.endswith("_") or name.startswith("__i") or name == "setitem":
        refuse_in_place(context, name)
    if name == "_set_grad_enabled" or (type(func).__name__ == "method-wrapper" and name in _METADATA):
        return func(*args, **kwargs)
    _refuse(context, name)


_METADATA = {
    "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "layout", "is_leaf", "itemsize", "is_sparse",
    "is_quantized", "is_meta", "names", "grad",
}  # fmt: skip


def _name_of(func: Any) -> str:
    """`torch.Tensor.__sub__` is "sub", the getter of `torch.Tensor.shape` is "shape".

    Only what no function of PyTorch may be taken for keeps its underscores: `torch.rand` is not `__rand__`.
    """
    name = getattr(func, "__name__", type(func).__name__)
    if func is torch.Tensor.where:
        return "Tensor.where"
    if name in ("__get__", "__set__"):
        return func.__self__.__name__ if name == "__get__" else "setattr_"
    if name.startswith("__") and name.endswith("__"):
        kept = name in _HANDLERS or name in _REFLECTED or (name.startswith("__i") and name != "__invert__")
        return name if kept else name[2:-2]
    return name.removeprefix("special_")


def call(context: TraceContext, name: str, *args: Any) -> Any:
    """Calls the function of PyTorch that is registered as `name`."""
    return _HANDLERS[name](context, *args)


def attribute(context: TraceContext, symbol: Symbol, name: str) -> Any:
    """A method or attribute of `torch.Tensor` on a symbol."""
    if name in _PROPERTIES:
        return _PROPERTIES[name](symbol)
    if name not in _HANDLERS and name not in _ELEMENTWISE and not hasattr(torch.Tensor, name):
        raise AttributeError(f"'Tensor' object has no attribute {name!r}")
    method = getattr(torch.Tensor, name)
    if not callable(method):
        _refuse(context, f"Tensor.{name}")

    def call(*args: Any, **kwargs: Any) -> Any:
        return context.do("dispatch", method, (symbol, *args), kwargs)

    return call


def _refuse(context: TraceContext, name: str) -> NoReturn:
    raise at_user_line(
        UnsupportedOpError,
        f"torch.{name} is not supported in {context.kind}",
        "Write it with supported operations, or compute it outside the mod and capture the result as a tensor.",
    )


def refuse_in_place(context: TraceContext, name: str) -> NoReturn:
    """Raises the error for a write."""
    raise at_user_line(
        UnsupportedOpError,
        f"{name} writes in place, which a {context.kind} must not do",
        "Use the operation that returns a new value (x = x + y, torch.where for a masked write).",
    )


# --- Elementwise operations -------------------------------------------------------------------------------------------


def elementwise(context: TraceContext, name: str, *operands: Any) -> Symbol:
    """Applies a row of the op table, with broadcasting over the symbols' remaining dimensions."""
    symbols = [context.symbol(x) for x in operands]
    arity = 2 if name not in OPS else OPS[name].arity
    if len(symbols) != arity:
        _refuse(context, f"{name} with {len(symbols)} operand(s)")
    consumed = _consumed(name, symbols)
    if consumed:
        raise Consumed(consumed)
    return _broadcast(context, lambda *nodes: _make(context, name, *nodes), *symbols)


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


def _broadcast(context: TraceContext, function: Callable[..., Node], *symbols: Symbol) -> Symbol:
    """Joins symbols of any shapes; two shaped symbols make their sizes constants."""
    shaped = [s for s in symbols if s.rank]
    if not shaped:
        return context.scalar(function(*(s.node for s in symbols)))
    if len(shaped) == 1:
        sizes = shaped[0].sizes
        views = list(symbols)
    else:
        shapes = [[context.python_int(n) for n in s.sizes] for s in shaped]
        try:
            sizes = tuple(const(n) for n in torch.broadcast_shapes(*shapes))
        except RuntimeError as error:
            raise at_user_line(TraceError, f"{error}", "Check the shapes of the captured tensors.") from None
        views = [_expanded(s, sizes) if s.rank else s for s in symbols]
    zero = tuple(const(0) for _ in sizes)
    dtype = function(*(s.at(zero if s.rank else ()) for s in views)).dtype
    guarded = shaped[0].guarded if len(shaped) == 1 and _keeps_zero(function, symbols) else None
    return Symbol(
        context, sizes, lambda index: function(*(s.at(index if s.rank else ()) for s in views)), dtype, guarded
    )


def _keeps_zero(function: Callable[..., Node], symbols: Sequence[Symbol]) -> bool:
    """Whether a zero that a read outside of a tensor gives is still zero after the function."""
    try:
        result = function(*(cast(const(0), s.dtype) if s.rank else s.node for s in symbols))
    except TraceError:  # zero is not in its domain
        raised.error = None
        return False
    return result.is_const and result.attr == 0


def _expanded(symbol: Symbol, sizes: tuple[Node, ...]) -> Symbol:
    skip = len(sizes) - symbol.rank
    fixed = [n.is_const and n.attr == 1 for n in symbol.sizes]

    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(tuple(const(0) if one else i for one, i in zip(fixed, index[skip:], strict=True)))

    guarded = (*[False] * skip, *(g and not one for g, one in zip(symbol.guarded, fixed, strict=True)))
    return Symbol(symbol.context, sizes, at, symbol.dtype, guarded)


@_handles("where")
def _where(context: TraceContext, condition: Any, *choices: Any, **kwargs: Any) -> Symbol:
    choices += tuple(kwargs.pop(k) for k in ("input", "self", "other") if k in kwargs)
    if len(choices) != 2:
        _refuse(context, "where with one operand")
    return elementwise(context, "where", condition, *choices)


@_handles("Tensor.where")
def _tensor_where(context: TraceContext, x: Any, condition: Any, other: Any) -> Symbol:
    return elementwise(context, "where", condition, x, other)


@_handles("masked_fill")
def _masked_fill(context: TraceContext, x: Any, mask: Any, value: Any) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", mask, _as_dtype(context, context.symbol(value), x.dtype), x)


@_handles("clamp", "clip")
def _clamp(context: TraceContext, x: Any, min: Any = None, max: Any = None) -> Symbol:
    if min is None and max is None:
        raise at_user_line(TraceError, "clamp needs `min` or `max`", "Give at least one bound.")
    if min is not None:
        x = elementwise(context, "maximum", x, min)
    return x if max is None else elementwise(context, "minimum", x, max)


_HANDLERS["clamp_min"] = lambda context, x, min: elementwise(context, "maximum", x, min)
_HANDLERS["clamp_max"] = lambda context, x, max: elementwise(context, "minimum", x, max)


@_handles("max", "min")
def _no_reduction(context: TraceContext, *args: Any, **_: Any) -> NoReturn:
    raise at_user_line(
        UnsupportedOpError,
        f"torch.max and torch.min reduce, which a {context.kind} cannot do",
        "Use torch.maximum(a, b) or torch.minimum(a, b); compute a reduction outside the mod and capture its result.",
    )


@_handles("div", "divide", "true_divide")
def _div(context: TraceContext, x: Any, other: Any, rounding_mode: str | None = None) -> Symbol:
    if rounding_mode is None:
        return elementwise(context, "div", x, other)
    if rounding_mode == "floor":
        return elementwise(context, "floor_divide", x, other)
    if rounding_mode != "trunc":
        _refuse(context, f"div(rounding_mode={rounding_mode!r})")
    quotient = elementwise(context, "div", x, other)
    integer = elementwise(context, "fmod", x, other)
    if integer.dtype.is_floating_point:
        return elementwise(context, "trunc", quotient)
    return elementwise(context, "floor_divide", elementwise(context, "sub", x, integer), other)


def _with_alpha(name: str) -> Handler:
    def apply(context: TraceContext, x: Any, other: Any, alpha: Any = 1) -> Symbol:
        scaled = other if isinstance(alpha, int) and alpha == 1 else elementwise(context, "mul", other, alpha)
        return elementwise(context, name, x, scaled)

    return apply


_HANDLERS |= {"add": _with_alpha("add"), "sub": _with_alpha("sub"), "subtract": _with_alpha("sub")}
_HANDLERS["rsub"] = lambda context, x, other, alpha=1: _HANDLERS["sub"](context, other, x, alpha)


@_handles("float_power")
def _float_power(context: TraceContext, x: Any, exponent: Any) -> Symbol:
    return elementwise(context, "pow", _as_dtype(context, context.symbol(x), torch.float64), exponent)


@_handles("round")
def _round(context: TraceContext, x: Any, decimals: int = 0) -> Symbol:
    if decimals == 0:
        return elementwise(context, "round", x)
    factor = 10.0**decimals
    return elementwise(context, "div", elementwise(context, "round", elementwise(context, "mul", x, factor)), factor)


@_handles("square")
def _square(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "mul", x, x)


@_handles("frac")
def _frac(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "sub", x, elementwise(context, "trunc", x))


@_handles("erfc")
def _erfc(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "sub", 1.0, elementwise(context, "erf", x))


# --- torch.nn.functional ----------------------------------------------------------------------------------------------


@_handles("relu")
def _relu(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "maximum", x, 0)


@_handles("relu6")
def _relu6(context: TraceContext, x: Any) -> Symbol:
    return _clamp(context, x, 0.0, 6.0)


@_handles("hardtanh")
def _hardtanh(context: TraceContext, x: Any, min_val: Any = -1.0, max_val: Any = 1.0) -> Symbol:
    return _clamp(context, x, min_val, max_val)


@_handles("silu")
def _silu(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "mul", x, elementwise(context, "sigmoid", x))


@_handles("leaky_relu")
def _leaky_relu(context: TraceContext, x: Any, negative_slope: Any = 0.01) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", x > 0, x, x * negative_slope)


@_handles("elu")
def _elu(context: TraceContext, x: Any, alpha: Any = 1.0) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", x > 0, x, alpha * elementwise(context, "expm1", x))


@_handles("gelu")
def _gelu(context: TraceContext, x: Any, approximate: str = "none") -> Symbol:
    x = context.symbol(x)
    one: Any = 1.0
    if approximate == "tanh":
        inner = math.sqrt(2 / math.pi) * (x + 0.044715 * (x * x * x))
        return 0.5 * x * (one + elementwise(context, "tanh", inner))
    return 0.5 * x * (one + elementwise(context, "erf", x * math.sqrt(0.5)))


@_handles("softplus")
def _softplus(context: TraceContext, x: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Symbol:
    x = context.symbol(x)
    scaled = x * beta
    # log(1 + e^t) = max(t, 0) + log1p(e^-|t|) does not overflow.
    smooth = _clamp(context, scaled, 0.0) + elementwise(context, "log1p", elementwise(context, "exp", -abs(scaled)))
    return elementwise(context, "where", scaled > threshold, x, smooth / beta)


@_handles("logsigmoid", "log_sigmoid")
def _logsigmoid(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    return _clamp(context, x, max=0.0) - elementwise(context, "log1p", elementwise(context, "exp", -abs(x)))


# --- Types ------------------------------------------------------------------------------------------------------------


def _as_dtype(context: TraceContext, x: Symbol, dtype: torch.dtype) -> Symbol:
    if dtype not in DTYPES:
        _refuse(context, f"Tensor.to({dtype})")
    return _broadcast(context, lambda node: strong(cast(node, dtype)), x)


for _name, _dtype in {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
    "bool": torch.bool,
}.items():  # fmt: skip
    _HANDLERS[_name] = lambda context, x, memory_format=None, _dtype=_dtype: _as_dtype(
        context, context.symbol(x), _dtype
    )


@_handles("to", "type", "type_as")
def _to(context: TraceContext, x: Any, *args: Any, dtype: Any = None, **_: Any) -> Symbol:
    x = context.symbol(x)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (Symbol, torch.Tensor)):
            dtype = arg.dtype
    return x if dtype is None else _as_dtype(context, x, dtype)


@_handles("detach", "contiguous", "clone", "cpu", "cuda", "data", "alias", "positive", "pos")
def _same(context: TraceContext, x: Any, *_: Any, **__: Any) -> Symbol:
    return context.symbol(x)


@_handles("is_floating_point")
def _is_floating_point(context: TraceContext, x: Any) -> bool:
    return context.symbol(x).dtype.is_floating_point


@_handles("result_type")
def _result_type(context: TraceContext, a: Any, b: Any) -> torch.dtype:
    return elementwise(context, "add", a, b).dtype


@_handles("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__")
@_handles("__format__", "__repr__", "__contains__")
def _item(context: TraceContext, x: Any, *_: Any, **__: Any) -> NoReturn:
    raise at_user_line(
        TraceError,
        f"the value of a tensor was read in a {context.kind} (.item(), .tolist(), .numpy(), float(), `if`)",
        "Use the tensor itself, and torch.where for `if`: it is read afresh at every call. A Python number may be "
        "captured outside the mod.",
    )


@_handles("len")
def _len(context: TraceContext, x: Any) -> int:
    return len(context.symbol(x))
