"""The activation functions of torch.nn.functional, made of rows of the op table.

The formulas are PyTorch's own unless a comment says otherwise. A half type is computed in float32 and rounded once.
"""

from __future__ import annotations

import math
from typing import Any

from .elementwise import as_dtype, clamp, elementwise, rounded_once
from .graph import const
from .handlers import handles as _handles
from .handlers import refuse
from .symbol import Symbol, TraceContext


@_handles("relu")
def _relu(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "maximum", x, 0)


@_handles("relu6")
def _relu6(context: TraceContext, x: Any) -> Symbol:
    return clamp(context, x, 0, 6)


@_handles("hardtanh")
def _hardtanh(context: TraceContext, x: Any, min_val: Any = -1, max_val: Any = 1) -> Symbol:
    limits = [min_val, max_val]
    if not context.symbol(x).dtype.is_floating_point:  # PyTorch drops the fractions, so integers stay integers
        limits = [int(limit) if context.symbol(limit).dtype.is_floating_point else limit for limit in limits]
    return clamp(context, x, *limits)


@_handles("silu")
@rounded_once
def _silu(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    return x / (1.0 + elementwise(context, "exp", -x))


@_handles("leaky_relu")
@rounded_once
def _leaky_relu(context: TraceContext, x: Any, negative_slope: Any = 0.01) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", x > 0, x, x * negative_slope)


@_handles("rrelu")
def _rrelu(context: TraceContext, x: Any, lower: Any = 1 / 8, upper: Any = 1 / 3, training: bool = False) -> Symbol:
    if training:
        refuse(context, "rrelu(training=True)")
    return _leaky_relu(context, x, (lower + upper) / 2)


@_handles("prelu")
@rounded_once
def _prelu(context: TraceContext, x: Any, weight: Any) -> Symbol:
    x, weight = context.symbol(x), context.symbol(weight)
    if weight.rank:
        if weight.rank > 1 or context.python_int(weight.sizes[0]) != 1:
            refuse(context, "prelu with a weight for each channel")
        weight = context.scalar(weight.at((const(0),)))
    return elementwise(context, "where", x > 0, x, weight * x)


@_handles("elu")
@rounded_once
def _elu(context: TraceContext, x: Any, alpha: Any = 1.0, scale: Any = 1.0, input_scale: Any = 1.0) -> Symbol:
    x = context.symbol(x)
    below = elementwise(context, "expm1", x * input_scale) * (alpha * scale)
    return elementwise(context, "where", x > 0, x * scale, below)


@_handles("celu")
def _celu(context: TraceContext, x: Any, alpha: Any = 1.0) -> Symbol:
    return _elu(context, x, alpha, 1.0, 1.0 / alpha)


@_handles("selu")
def _selu(context: TraceContext, x: Any) -> Symbol:
    return _elu(context, x, 1.6732632423543772, 1.0507009873554805)


@_handles("gelu")
@rounded_once
def _gelu(context: TraceContext, x: Any, approximate: str = "none") -> Symbol:
    x = context.symbol(x)
    if approximate == "tanh":
        # 0.5 * (1 + tanh(y)) is the sigmoid of 2 y, which has no cancellation.
        inner = math.sqrt(8 / math.pi) * (x + 0.044715 * (x * x * x))
        return x * elementwise(context, "sigmoid", inner)
    return x * elementwise(context, "ndtr", x)


@_handles("mish")
@rounded_once
def _mish(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    # tanh(log(1 + e)) = n / (n + 2) with n = e * (e + 2), which has no cancellation.
    e = elementwise(context, "exp", x)
    n = e * (e + 2.0)
    return elementwise(context, "where", x > 20.0, x, x * (n / (n + 2.0)))


@_handles("softplus")
@rounded_once
def _softplus(context: TraceContext, x: Any, beta: Any = 1.0, threshold: Any = 20.0) -> Symbol:
    x = context.symbol(x)
    scaled = x * beta
    # log(1 + e^t) = max(t, 0) + log1p(e^-|t|) does not overflow.
    smooth = clamp(context, scaled, 0.0) + elementwise(context, "log1p", elementwise(context, "exp", -abs(scaled)))
    return elementwise(context, "where", scaled > threshold, x, smooth / beta)


@_handles("logsigmoid", "log_sigmoid")
@rounded_once
def _logsigmoid(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    return clamp(context, x, max=0.0) - elementwise(context, "log1p", elementwise(context, "exp", -abs(x)))


@_handles("softsign")
@rounded_once
def _softsign(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    return x / (abs(x) + 1)


@_handles("tanhshrink")
def _tanhshrink(context: TraceContext, x: Any) -> Symbol:
    return elementwise(context, "sub", x, elementwise(context, "tanh", x))


@_handles("hardsigmoid")
@rounded_once
def _hardsigmoid(context: TraceContext, x: Any) -> Symbol:
    return clamp(context, elementwise(context, "add", x, 3.0), 0.0, 6.0) / 6.0


@_handles("hardswish")
@rounded_once
def _hardswish(context: TraceContext, x: Any) -> Symbol:
    x = context.symbol(x)
    return x * clamp(context, x + 3.0, 0.0, 6.0) / 6.0


@_handles("hardshrink")
def _hardshrink(context: TraceContext, x: Any, lambd: Any = 0.5) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", (x >= -lambd) & (x <= lambd), as_dtype(context, x * 0, x.dtype), x)


@_handles("softshrink")
@rounded_once
def _softshrink(context: TraceContext, x: Any, lambd: Any = 0.5) -> Symbol:
    x = context.symbol(x)
    below = elementwise(context, "where", x < -lambd, x + lambd, x * 0)
    return elementwise(context, "where", x > lambd, x - lambd, below)


@_handles("threshold", "_threshold")
def _threshold(context: TraceContext, x: Any, threshold: Any, value: Any) -> Symbol:
    x = context.symbol(x)
    return elementwise(context, "where", x <= threshold, as_dtype(context, context.symbol(value), x.dtype), x)
