"""What PyTorch functions, methods and attributes mean on symbols.

A call is looked up by its name among the functions that are written out here, in `elementwise` and in `activations`,
then among the rows of the op table; everything else is refused with a remedy.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from . import activations  # noqa: F401 its functions register themselves
from .build import cast, make, strong
from .elementwise import as_dtype as _as_dtype
from .elementwise import elementwise
from .elementwise import expanded as _expanded
from .errors import TraceError, at_user_line
from .graph import Node, const
from .handlers import HANDLERS as _HANDLERS
from .handlers import ROWS as _ELEMENTWISE
from .handlers import handlers_of, nearest, refuse_in_place
from .handlers import handles as _handles
from .handlers import refuse as _refuse
from .symbol import Symbol, TraceContext

_REFLECTED = {
    "__rsub__": "sub", "__rdiv__": "div", "__rtruediv__": "div", "__rfloordiv__": "floor_divide",
    "__rmod__": "remainder", "__rpow__": "pow", "__radd__": "add", "__rmul__": "mul", "__rand__": "bitwise_and",
    "__ror__": "bitwise_or", "__rxor__": "bitwise_xor", "__rlshift__": "bitwise_left_shift",
    "__rrshift__": "bitwise_right_shift",
}  # fmt: skip


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
        args += tuple(kwargs.pop(k) for k in ("other", "exponent") if k in kwargs)
        if kwargs:
            _refuse(context, f"{name}({', '.join(kwargs)}=)")
        return elementwise(context, _ELEMENTWISE[name], *args)
    if name in _REFLECTED:
        return elementwise(context, _REFLECTED[name], args[1], args[0])
    if name.endswith("_") or name.startswith("__i") or name == "setitem":
        refuse_in_place(context, name)
    if name == "_set_grad_enabled" or (type(func).__name__ == "method-wrapper" and name in _METADATA):
        return func(*args, **kwargs)
    _refuse(context, name, unknown=True)


_METADATA = {
    "dtype", "device", "ndim", "requires_grad", "is_cuda", "is_cpu", "layout", "is_leaf", "itemsize", "is_sparse",
    "is_quantized", "is_meta", "names", "grad",
}  # fmt: skip


def _name_of(func: Any) -> str:
    """`torch.Tensor.__sub__` is "sub", the getter of `torch.Tensor.shape` is "shape".

    Only what no function of PyTorch may be taken for keeps its underscores: `torch.rand` is not `__rand__`.
    """
    name = getattr(func, "__name__", type(func).__name__).partition(".")[0]  # torch.ops.aten.add.Tensor is "add.Tensor"
    if func is torch.Tensor.where:
        return "Tensor.where"
    if name in ("__get__", "__set__"):
        return func.__self__.__name__ if name == "__get__" else "setattr_"
    if name.startswith("__") and name.endswith("__"):
        kept = name in _HANDLERS or name in _REFLECTED or (name.startswith("__i") and name != "__invert__")
        return name if kept else name[2:-2]
    return name.removeprefix("special_")


def attribute(context: TraceContext, symbol: Symbol, name: str) -> Any:
    """A method or attribute of `torch.Tensor` on a symbol."""
    if name in _PROPERTIES:
        return _PROPERTIES[name](symbol)
    if name not in _HANDLERS and name not in _ELEMENTWISE and not hasattr(torch.Tensor, name):
        close = nearest(name)
        hint = f", the nearest supported one is `{close}`" if close else ""
        raise AttributeError(f"'Tensor' object has no attribute {name!r}{hint}")
    method = getattr(torch.Tensor, name)
    if not callable(method):
        _refuse(context, f"Tensor.{name}", unknown=True)

    def call(*args: Any, **kwargs: Any) -> Any:
        return context.do("dispatch", method, (symbol, *args), kwargs)

    return call


# --- Types ------------------------------------------------------------------------------------------------------------


for _name, _dtype in {
    "float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16,
    "int": torch.int32, "long": torch.int64, "short": torch.int16, "char": torch.int8, "byte": torch.uint8,
    "bool": torch.bool,
}.items():  # fmt: skip
    _HANDLERS[_name] = lambda context, x, memory_format=None, _dtype=_dtype: _as_dtype(
        context, context.symbol(x), _dtype
    )


@_handles("to", "type", "type_as", "_to_copy")
def _to(context: TraceContext, x: Any, *args: Any, dtype: Any = None, **_: Any) -> Symbol:
    x = context.symbol(x)
    for arg in args:
        if isinstance(arg, torch.dtype):
            dtype = arg
        elif isinstance(arg, (Symbol, torch.Tensor)):
            dtype = arg.dtype
    return x if dtype is None else _as_dtype(context, x, dtype)


@_handles("detach", "contiguous", "clone", "cpu", "cuda", "data", "alias", "positive", "pos", "real")
@_handles("conj", "conj_physical", "resolve_conj", "resolve_neg")
def _same(context: TraceContext, x: Any, *_: Any, **__: Any) -> Symbol:
    return context.symbol(x)


@_handles("is_floating_point")
def _is_floating_point(context: TraceContext, x: Any) -> bool:
    return context.symbol(x).dtype.is_floating_point


@_handles("result_type")
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


@_handles("len")
def _len(context: TraceContext, x: Any) -> int:
    return len(context.symbol(x))


# --- Factories --------------------------------------------------------------------------------------------------------


@_handles("tensor", "as_tensor", "asarray", "scalar_tensor")
def _tensor(context: TraceContext, data: Any, dtype: torch.dtype | None = None, *_: Any, **__: Any) -> Symbol:
    if isinstance(data, (Symbol, torch.Tensor)):
        x = context.symbol(data)
        return _as_dtype(context, x, dtype or x.dtype)
    if isinstance(data, (bool, int, float)):
        x = context.symbol(data)
        return context.scalar(strong(x.node if dtype is None else cast(x.node, dtype)))
    _check_data(data)
    return context.freeze(torch.tensor(data, dtype=dtype))


@_handles("new_tensor")
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


def _unpacked(args: tuple, given: Any = None) -> Any:
    """Sizes or dimensions, passed one by one, as one sequence, or by keyword."""
    args = args if given is None else (given,)
    return args[0] if len(args) == 1 and isinstance(args[0], (tuple, list)) else args


_HANDLERS |= {
    "full": lambda c, size, fill_value, dtype=None, **_: _filled(c, size, fill_value, dtype),
    "zeros": lambda c, *n, size=None, dtype=None, **_: _filled(c, _unpacked(n, size), 0.0, dtype),
    "ones": lambda c, *n, size=None, dtype=None, **_: _filled(c, _unpacked(n, size), 1.0, dtype),
    "new_full": lambda c, x, size, fill_value, dtype=None, **_: _filled(c, size, fill_value, dtype or x.dtype),
    "new_zeros": lambda c, x, *n, size=None, dtype=None, **_: _filled(c, _unpacked(n, size), 0, dtype or x.dtype),
    "new_ones": lambda c, x, *n, size=None, dtype=None, **_: _filled(c, _unpacked(n, size), 1, dtype or x.dtype),
    "full_like": lambda c, x, fill_value, dtype=None, **_: _like(c, x, fill_value, dtype),
    "fill": lambda c, x, value: _like(c, x, value, None),
    "zeros_like": lambda c, x, dtype=None, **_: _like(c, x, 0, dtype),
    "ones_like": lambda c, x, dtype=None, **_: _like(c, x, 1, dtype),
}


def _like(context: TraceContext, x: Any, value: Any, dtype: torch.dtype | None) -> Symbol:
    x = context.symbol(x)
    node = cast(context.symbol(value).node, dtype or x.dtype)
    return Symbol(context, x.sizes, lambda _: strong(node), node.dtype)


@_handles("arange")
def _arange(context: TraceContext, *args: Any, device: Any = None, **kwargs: Any) -> Symbol:
    return context.freeze(torch.arange(*args, **kwargs))


# --- Views and indexing -----------------------------------------------------------------------------------------------


def _where_in(index: Node, size: Node) -> Node:
    """Counts a negative index from the end."""
    if index.is_const and index.attr >= 0:
        return index
    return make("where", make("lt", index, const(0)), make("add", index, size), index)


def _slice(context: TraceContext, symbol: Symbol, dim: int, part: slice) -> Symbol:
    """`x[..., start:stop:step, ...]`; an index outside the slice reads 0, as outside any tensor."""
    size = symbol.sizes[dim]
    step = 1 if part.step is None else int(part.step)
    if step < 1:
        raise at_user_line(TraceError, "a slice step must be positive", "Flip the tensor outside the mod.")

    def bound(value: Any, default: Node) -> Node:
        if value is None:
            return default
        node = const(int(value))
        if node.attr < 0:
            return make("maximum", make("add", size, node), const(0))
        return make("minimum", node, size)

    start, stop = bound(part.start, const(0)), bound(part.stop, size)
    length = make("maximum", make("sub", stop, start), const(0))
    length = make("floor_divide", make("add", length, const(step - 1)), const(step))

    def at(index: tuple[Node, ...]) -> Node:
        i = _where_in(index[dim], length)
        source = make("add", make("mul", i, const(step)), start)
        return _zero_outside(i, length, symbol.at((*index[:dim], source, *index[dim + 1 :])))

    sizes = (*symbol.sizes[:dim], length, *symbol.sizes[dim + 1 :])
    return Symbol(context, sizes, at, symbol.dtype, (*symbol.guarded[:dim], True, *symbol.guarded[dim + 1 :]))


def _zero_outside(index: Node, size: Node, value: Node) -> Node:
    inside = make("logical_and", make("le", const(0), index), make("lt", index, size))
    return make("where", inside, value, cast(const(0), value.dtype))


def _select(context: TraceContext, symbol: Symbol, dim: int, index: Symbol) -> Symbol:
    """Indexes one dimension with an integer symbol; a shaped one puts its dimensions in place."""

    def at(rest: tuple[Node, ...]) -> Node:
        chosen = index.at(rest[dim : dim + index.rank])
        if symbol.guarded[dim]:
            return symbol.at((*rest[:dim], chosen, *rest[dim + index.rank :]))
        chosen = _where_in(chosen, symbol.sizes[dim])
        return _zero_outside(chosen, symbol.sizes[dim], symbol.at((*rest[:dim], chosen, *rest[dim + index.rank :])))

    sizes = (*symbol.sizes[:dim], *index.sizes, *symbol.sizes[dim + 1 :])
    guarded = (*symbol.guarded[:dim], *[False] * index.rank, *symbol.guarded[dim + 1 :])
    return Symbol(context, sizes, at, symbol.dtype, guarded)


def _unsqueeze(context: TraceContext, symbol: Symbol, dim: int) -> Symbol:
    sizes = (*symbol.sizes[:dim], const(1), *symbol.sizes[dim:])
    guarded = (*symbol.guarded[:dim], False, *symbol.guarded[dim:])
    return Symbol(context, sizes, lambda index: symbol.at((*index[:dim], *index[dim + 1 :])), symbol.dtype, guarded)


@_handles("getitem")
def getitem(context: TraceContext, x: Any, index: Any) -> Symbol:
    """`x[index]` with integers, symbols, slices, None and Ellipsis; a chain of indices may be partial."""
    symbol = context.symbol(x)
    items = list(index) if isinstance(index, tuple) else [index]
    if isinstance(index, list):
        _refuse_index(context, "a list")
    given = sum(item is not None and item is not Ellipsis for item in items)
    if given > symbol.rank:
        raise at_user_line(
            TraceError,
            f"too many indices in a {context.kind}: {given} for a tensor of {symbol.rank} dimension(s)",
            "Index a captured tensor with at most one index for each of its dimensions.",
        )
    dots = [i for i, item in enumerate(items) if item is Ellipsis]
    if dots:
        items[dots[0] : dots[0] + 1] = [slice(None)] * (symbol.rank - given)
    dim = tables = 0
    for item in items:
        if item is None:
            symbol, dim = _unsqueeze(context, symbol, dim), dim + 1
        elif isinstance(item, slice):
            if item != slice(None):
                symbol = _slice(context, symbol, dim, item)
            dim += 1
        else:
            chosen = _index_symbol(context, item)
            tables += chosen.rank > 0
            if tables > 1:
                _refuse_index(context, "two index tensors that have dimensions")
            symbol, dim = _select(context, symbol, dim, chosen), dim + chosen.rank
    return symbol


@_handles("embedding")
def _embedding(context: TraceContext, x: Any, weight: Any, *_: Any, **__: Any) -> Symbol:
    return getitem(context, weight, x)


def _index_symbol(context: TraceContext, item: Any) -> Symbol:
    if isinstance(item, bool):
        _refuse_index(context, "a bool")
    if not isinstance(item, (int, Symbol, torch.Tensor)) and getattr(item, "ndim", 1) != 0:
        _refuse_index(context, f"a {type(item).__name__}")
    chosen = context.symbol(item)
    if chosen.dtype == torch.bool or chosen.dtype.is_floating_point:
        _refuse_index(context, str(chosen.dtype))
    return _as_dtype(context, chosen, torch.int64)


def _refuse_index(context: TraceContext, what: str) -> NoReturn:
    raise at_user_line(
        TraceError,
        f"a captured tensor was indexed with {what} in a {context.kind}",
        "Index with integers: b, h, q_idx, kv_idx, arithmetic on them (.long() converts), integer tensors, or slices.",
    )


def _dim(symbol: Symbol, dim: int, extra: int = 0) -> int:
    rank = symbol.rank + extra
    if not -rank <= dim < rank:
        raise at_user_line(
            TraceError, f"dimension {dim} is out of range for rank {symbol.rank}", "Check the dimension."
        )
    return dim % rank


@_handles("select")
def _select_method(context: TraceContext, x: Any, dim: int, index: Any) -> Symbol:
    symbol = context.symbol(x)
    return _select(context, symbol, _dim(symbol, dim), _index_symbol(context, index))


@_handles("narrow")
def _narrow(context: TraceContext, x: Any, dim: int, start: int, length: int) -> Symbol:
    symbol = context.symbol(x)
    return _slice(context, symbol, _dim(symbol, dim), slice(start, start + length))


@_handles("unsqueeze")
def _unsqueeze_method(context: TraceContext, x: Any, dim: int) -> Symbol:
    symbol = context.symbol(x)
    return _unsqueeze(context, symbol, _dim(symbol, dim, 1))


@_handles("squeeze")
def _squeeze(context: TraceContext, x: Any, dim: int | None = None) -> Symbol:
    symbol = context.symbol(x)
    dims = range(symbol.rank) if dim is None else [_dim(symbol, dim)] if symbol.rank else []
    for d in reversed(dims):
        if context.python_int(symbol.sizes[d]) == 1:
            symbol = _select(context, symbol, d, context.scalar(const(0)))
    return symbol


def _permuted(symbol: Symbol, order: list[int]) -> Symbol:
    def at(index: tuple[Node, ...]) -> Node:
        return symbol.at(tuple(index[order.index(d)] for d in range(symbol.rank)))

    sizes = tuple(symbol.sizes[d] for d in order)
    return Symbol(symbol.context, sizes, at, symbol.dtype, tuple(symbol.guarded[d] for d in order))


@_handles("permute")
def _permute(context: TraceContext, x: Any, *order: Any, dims: Any = None) -> Symbol:
    symbol = context.symbol(x)
    order = tuple(_dim(symbol, d) for d in _unpacked(order, dims))
    if sorted(order) != list(range(symbol.rank)):
        raise at_user_line(
            TraceError, f"permute{order} of a tensor of rank {symbol.rank}", "Name every dimension once."
        )
    return _permuted(symbol, list(order))


@_handles("transpose", "swapaxes", "swapdims", "mT")
def _transpose(context: TraceContext, x: Any, dim0: int = -2, dim1: int = -1) -> Symbol:
    symbol = context.symbol(x)
    order = list(range(symbol.rank))
    a, b = _dim(symbol, dim0), _dim(symbol, dim1)
    order[a], order[b] = order[b], order[a]
    return _permuted(symbol, order)


@_handles("T", "t")
def _reversed(context: TraceContext, x: Any) -> Symbol:
    symbol = context.symbol(x)
    return _permuted(symbol, list(range(symbol.rank))[::-1])


@_handles("expand", "broadcast_to")
def _expand(context: TraceContext, x: Any, *sizes: Any, size: Any = None) -> Symbol:
    symbol = context.symbol(x)
    shape = [context.python_int(context.symbol(n).node) for n in _unpacked(sizes, size)]
    old = [context.python_int(n) for n in symbol.sizes]
    try:
        shape = list(torch.empty(old, device="meta").expand(shape).shape)
    except RuntimeError as error:
        raise at_user_line(TraceError, f"{error}", "Check the shapes of the captured tensors.") from None
    return _expanded(symbol, tuple(const(n) for n in shape))


@_handles("expand_as")
def _expand_as(context: TraceContext, x: Any, other: Any) -> Symbol:
    return _expand(context, x, *(context.size_value(n) for n in context.symbol(other).sizes))


# --- Attributes -------------------------------------------------------------------------------------------------------


@_handles("shape")
def _shape(context: TraceContext, x: Any) -> tuple:
    return tuple(context.size_value(n) for n in context.symbol(x).sizes)


@_handles("size")
def _size(context: TraceContext, x: Any, dim: int | None = None) -> Any:
    shape = _shape(context, x)
    return shape if dim is None else shape[dim]


@_handles("numel", "nelement")
def _numel(context: TraceContext, x: Any) -> Any:
    return math.prod(_shape(context, x))


@_handles("dim", "ndimension", "ndim")
def _rank(context: TraceContext, x: Any) -> int:
    return context.symbol(x).rank


_PROPERTIES: dict[str, Callable[[Symbol], Any]] = {
    "shape": lambda x: _shape(x.context, x),
    "ndim": lambda x: x.rank,
    "device": lambda x: x.context.device,
    "requires_grad": lambda x: False,
    "is_cuda": lambda x: x.context.device.type == "cuda",
    "is_cpu": lambda x: x.context.device.type == "cpu",
    "layout": lambda x: torch.strided,
    "itemsize": lambda x: x.dtype.itemsize,
    "T": lambda x: _reversed(x.context, x),
    "mT": lambda x: _transpose(x.context, x),
    "data": lambda x: x,
    "real": lambda x: x,
}
