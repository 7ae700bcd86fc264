"""What PyTorch functions, methods and attributes mean on symbols.

The name of a call is looked up among the functions that are written here and in `elementwise`, `activations`,
`factories`, `views`, `joins` and `reductions`, then among the rows of the op table. Everything else is refused with a
remedy.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import TraceError, at_user_line
from . import activations  # noqa: F401 its functions register themselves
from .elementwise import as_dtype, elementwise
from .handlers import HANDLERS, ROWS, handlers_of, handles, nearest, of_symbol, refuse, refuse_in_place, refuse_score
from .symbol import OPERATORS, Symbol, TraceContext

_REFLECTED = {"__rdiv__": "div", **{f"__r{name}__": row for name, row in OPERATORS.items()}}
PROPERTIES: dict[str, Callable[[Symbol], Any]] = {}  # attributes of tensors that are not methods


def dispatch(context: TraceContext, func: Any, args: tuple, kwargs: dict) -> Any:
    """Computes one PyTorch call that involves symbols or captured tensors."""
    name = _name_of(func)
    for option in ("out", "inplace"):
        value = kwargs.pop(option, None)
        if value is not None and value is not False:
            refuse_in_place(context, f"{name}(..., {option}=)")
    if name != "where":
        args = tuple(kwargs.pop(k) for k in ("input", "self") if k in kwargs) + args
    if name in HANDLERS:
        return HANDLERS[name](context, *args, **kwargs)
    if name in ROWS:
        args += tuple(kwargs.pop(k) for k in ("other", "exponent") if k in kwargs)
        if kwargs:
            refuse(context, f"{name}({', '.join(kwargs)}=)")
        return elementwise(context, ROWS[name], *args)
    if name in _REFLECTED:
        return elementwise(context, _REFLECTED[name], args[1], args[0])
    if name.endswith("_") or name.startswith("__i") or name == "setitem":
        refuse_in_place(context, name)
    if name == "_set_grad_enabled" or (type(func).__name__ == "method-wrapper" and name in _METADATA):
        return func(*args, **kwargs)
    if name in _OF_ROWS and args and isinstance(args[0], Symbol):
        refuse_score(args[0], name)
    refuse(context, name)


# Functions of whole rows, which are not supported. Of the score they would be meant for the row of all keys.
_OF_ROWS = {
    "softmax", "log_softmax", "softmin", "cumsum", "cumprod", "logcumsumexp", "cummax", "cummin", "sort", "argsort",
    "topk", "kthvalue", "median", "nanmedian", "quantile", "nanquantile", "nansum", "nanmean", "aminmax", "std_mean",
    "var_mean", "normalize", "layer_norm", "rms_norm",
}  # fmt: skip


_METADATA = {
    "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "layout", "is_leaf", "itemsize", "is_sparse",
    "is_quantized", "is_meta", "names", "grad",
}  # fmt: skip


def _name_of(func: Any) -> str:
    """`torch.Tensor.__sub__` is "sub", the getter of `torch.Tensor.shape` is "shape".

    A name keeps its underscores if it would be mistaken for a function without them: `__rand__` is not `torch.rand`.
    """
    name = getattr(func, "__name__", type(func).__name__).partition(".")[0]  # torch.ops.aten.add.Tensor is "add.Tensor"
    if func is torch.Tensor.where:
        return "Tensor.where"
    if name in ("__get__", "__set__"):
        return func.__self__.__name__ if name == "__get__" else "setattr_"
    if name.startswith("__") and name.endswith("__"):
        kept = name in HANDLERS or name in _REFLECTED or (name.startswith("__i") and name != "__invert__")
        return name if kept else name[2:-2]
    return name.removeprefix("special_")


def attribute(context: TraceContext, symbol: Symbol, name: str) -> Any:
    """A method or attribute of `torch.Tensor` on a symbol."""
    if name in PROPERTIES:
        return PROPERTIES[name](symbol)
    if name not in HANDLERS and name not in ROWS and not hasattr(torch.Tensor, name):
        close = nearest(name)
        hint = f", the nearest supported name is `{close}`" if close else ""
        raise AttributeError(f"'Tensor' object has no attribute {name!r}{hint}", name=name, obj=symbol)
    method = getattr(torch.Tensor, name)
    if not callable(method):
        refuse(context, f"Tensor.{name}")

    def call(*args: Any, **kwargs: Any) -> Any:
        return context.do("dispatch", method, (symbol, *args), kwargs)

    return call


# --- Types ------------------------------------------------------------------------------------------------------------


def _conversion(dtype: torch.dtype) -> Callable[..., Symbol]:
    return lambda context, x, memory_format=None: as_dtype(context, context.symbol(x), dtype)


for _name, _dtype in {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
    "bool": torch.bool,
}.items():  # fmt: skip
    HANDLERS[_name] = _conversion(_dtype)


@of_symbol("type")
def _type(x: Symbol, dtype: Any = None, **_: Any) -> Symbol:
    if not isinstance(dtype, torch.dtype):  # it is the name or the class of a tensor type
        refuse(x.context, f"Tensor.type({'' if dtype is None else repr(dtype)})")
    return as_dtype(x.context, x, dtype)


@of_symbol("to", "type_as", "_to_copy")
def _to(x: Symbol, *args: Any, dtype: Any = None, **_: Any) -> Symbol:
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (Symbol, torch.Tensor)):
            dtype = arg.dtype
    return x if dtype is None else as_dtype(x.context, x, dtype)


@handles("detach", "contiguous", "clone", "cpu", "cuda", "data", "alias", "positive", "pos", "real")
@handles("conj", "conj_physical", "resolve_conj", "resolve_neg")
def _same(context: TraceContext, x: Any, *_: Any, **__: Any) -> Symbol:
    return context.symbol(x)


@of_symbol("is_floating_point")
def _is_floating_point(x: Symbol) -> bool:
    return x.dtype.is_floating_point


@handles("result_type")
def _result_type(context: TraceContext, a: Any, b: Any) -> torch.dtype:
    return elementwise(context, "add", a, b).dtype


@handlers_of(None)(
    "item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__"
)
@handlers_of(None)("__format__", "__repr__", "__contains__")
def _item(context: TraceContext, x: Any, *_: Any, **__: Any) -> NoReturn:
    raise at_user_line(
        TraceError,
        f"the value of a tensor was read in a {context.kind} (.item(), .tolist(), .numpy(), float(), `if`)",
        "Use the tensor itself, and torch.where for `if`: it is read afresh at every call. A Python number may be "
        "captured outside the mod.",
    )


@of_symbol("len")
def _len(x: Symbol) -> int:
    return len(x)
