"""Tensors that a mod makes: from numbers, from one value, or like another tensor."""

from __future__ import annotations

from typing import Any

import torch

from .build import cast, strong
from .elementwise import as_dtype
from .handlers import HANDLERS, handles
from .symbol import Symbol, TraceContext


@handles("tensor", "as_tensor", "asarray", "scalar_tensor")
def _tensor(context: TraceContext, data: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Symbol:
    if isinstance(data, (bool, int, float)):
        return _filled(context, (), data, dtype)
    if isinstance(data, (Symbol, torch.Tensor)):
        x = context.symbol(data)
        return as_dtype(context, x, dtype or x.dtype)
    _check_data(data)
    return context.freeze(_literal(torch.tensor, data, dtype=dtype))


def _literal(make: Any, *args: Any, dtype: torch.dtype | None = None, **kwargs: Any) -> torch.Tensor:
    """A tensor of Python numbers. It is float32 where PyTorch would use its default dtype."""
    made = make(*args, **kwargs, dtype=dtype, device="cpu")
    if dtype is None and made.is_floating_point() and made.dtype != torch.float32:
        made = make(*args, **kwargs, dtype=torch.float32, device="cpu")
    return made


@handles("new_tensor")
def _new_tensor(context: TraceContext, x: Any, data: Any, dtype: torch.dtype | None = None, **_: Any) -> Symbol:
    return _tensor(context, data, dtype or x.dtype)


def _check_data(data: Any) -> None:
    """Refuses traced values in a list."""
    if isinstance(data, Symbol):
        data.python_value("a list of traced values became a tensor", "Use torch.where to choose between values.")
    for item in data if isinstance(data, (list, tuple)) else ():
        _check_data(item)


def _filled(context: TraceContext, shape: Any, value: Any, dtype: torch.dtype | None) -> Symbol:
    sizes = tuple(context.symbol(n).node for n in shape)
    x = context.symbol(value)
    node = strong(x.node if dtype is None else cast(x.node, dtype))
    return Symbol(context, sizes, lambda _: node, node.dtype)


def unpacked(args: tuple, given: Any = None) -> Any:
    """Sizes or dimensions that are passed one by one, as one sequence, or by keyword."""
    args = args if given is None else (given,)
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


HANDLERS |= {
    "full": lambda c, size, fill_value, dtype=None, **_: _filled(c, size, fill_value, dtype),
    "zeros": lambda c, *n, size=None, dtype=None, **_: _filled(c, unpacked(n, size), 0.0, dtype),
    "ones": lambda c, *n, size=None, dtype=None, **_: _filled(c, unpacked(n, size), 1.0, dtype),
    "new_full": lambda c, x, size, fill_value, dtype=None, **_: _filled(c, size, fill_value, dtype or x.dtype),
    "new_zeros": lambda c, x, *n, size=None, dtype=None, **_: _filled(c, unpacked(n, size), 0, dtype or x.dtype),
    "new_ones": lambda c, x, *n, size=None, dtype=None, **_: _filled(c, unpacked(n, size), 1, dtype or x.dtype),
    "full_like": lambda c, x, fill_value, dtype=None, **_: _like(c, x, fill_value, dtype),
    "fill": lambda c, x, value: _like(c, x, value, None),
    "zeros_like": lambda c, x, dtype=None, **_: _like(c, x, 0, dtype),
    "ones_like": lambda c, x, dtype=None, **_: _like(c, x, 1, dtype),
}


def _like(context: TraceContext, x: Any, value: Any, dtype: torch.dtype | None) -> Symbol:
    x = context.symbol(x)
    return _filled(context, map(context.size_value, x.sizes), value, dtype or x.dtype)


@handles("arange")
def _arange(context: TraceContext, *args: Any, device: Any = None, **kwargs: Any) -> Symbol:
    return context.freeze(_literal(torch.arange, *args, **kwargs))
