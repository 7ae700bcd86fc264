"""What Python's library holds values in besides plain containers: what is in there, and how it is copied."""

from __future__ import annotations

import array
import ctypes
import functools
import operator
import weakref
from collections.abc import Callable
from contextvars import ContextVar
from types import BuiltinFunctionType, BuiltinMethodType, MappingProxyType, MethodWrapperType, ModuleType
from typing import Any, NamedTuple

from .facts import _ABSENT, MAX_ITEMS, MAX_WHOLE, _At

_FUNC: _At = ("func", None)
_USED: _At = ("self", True)
_MEMO: type = type(functools.lru_cache(len))
_VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
_BUILTINS: tuple[type, ...] = (BuiltinFunctionType, BuiltinMethodType, MethodWrapperType)


class _Holder(NamedTuple):
    """How values of one type are followed.

    Attributes:
        read: gives what goes into the key, the children and how these are reached.
        copy: makes a copy of a holder with other children.
    """

    read: Callable[[Any], tuple[Any, list, list[_At]]]
    copy: Callable[[Any, list], Any]


class _FixedVar:
    """Stands for a ContextVar while a mod is traced."""

    def __init__(self, name: str, value: Any) -> None:
        self.name = name
        self.value = value

    def get(self, *_: Any) -> Any:
        return self.value


def _referent(proxy: Any) -> Any:
    try:
        return proxy.__dir__.__self__
    except ReferenceError:
        return _ABSENT


def _bound(method: Any) -> tuple[Any, list, list[_At]]:
    return method.__name__, [method.__self__], [_USED]


def _items(view: Any) -> tuple[Any, list, list[_At]]:
    """The items of a MappingProxyType, or of the keys, values or items of a dict; there may be many."""
    mapping = getattr(view, "mapping", view)
    return (*map(_spelled, mapping),), [*mapping.values()], [("item", key) for key in mapping]


def _copied_dict(view: Any, new: list) -> dict:
    return dict(zip(getattr(view, "mapping", view), new, strict=True))


def _spelled(key: Any) -> Any:
    """What tells one key of a dict from others; None for objects, which are visited themselves."""
    kind = type(key)
    if kind is tuple:
        parts = (*map(_spelled, key),)
        return None if None in parts else parts
    return (kind, repr(key) if kind is float else key) if kind in (str, int, float, bool, bytes, type(None)) else None


_HOLDERS: dict[type, _Holder] = {
    ContextVar: _Holder(
        lambda var: (None, [var.get(_ABSENT)], [("get()", None)]), lambda var, new: _FixedVar(var.name, *new)
    ),
    weakref.ref: _Holder(lambda ref: (None, [ref()], [("call", None)]), lambda ref, new: lambda: new[0]),
    weakref.ProxyType: _Holder(lambda proxy: (None, [_referent(proxy)], [("proxy", None)]), lambda proxy, new: new[0]),
    MappingProxyType: _Holder(_items, lambda proxy, new: MappingProxyType(_copied_dict(proxy, new))),
    BuiltinFunctionType: _Holder(_bound, lambda method, new: getattr(new[0], method.__name__)),
    _MEMO: _Holder(
        lambda memo: (None, [memo.__wrapped__], [_FUNC]),
        lambda memo, new: functools.lru_cache(**memo.cache_parameters())(*new),
    ),
    **dict.fromkeys(
        _VIEWS,
        _Holder(_items, lambda view, new: getattr(_copied_dict(view, new), type(view).__name__[len("dict_") :])()),
    ),
}
_HOLDERS[weakref.CallableProxyType] = _HOLDERS[weakref.ProxyType]
_HOLDERS.update(dict.fromkeys(_BUILTINS, _HOLDERS[BuiltinFunctionType]))


def _holder(kind: type) -> _Holder | None:
    """How values of a type are followed, if it is a holder."""
    return _HOLDERS.get(weakref.ref if issubclass(kind, weakref.ref) else kind)


def _is_bound(value: Any) -> bool:
    """Whether a builtin is a method of an object, which may change."""
    owner = value.__self__
    return owner is not None and not isinstance(owner, (ModuleType, type))


# --- What counts by its contents -------------------------------------------------------------------------------------


def _data_of(value: Any) -> Any:
    """The contents of a value whose numbers are constants of a mod; None if there are too many, or it points away."""
    if isinstance(value, (array.array, bytearray, memoryview)):
        return (len(value), bytes(value)) if len(value) <= MAX_WHOLE else None
    if isinstance(value, ctypes._SimpleCData):
        return value.value if not isinstance(value, (ctypes.py_object, ctypes.c_void_p)) else None
    if isinstance(value, (ctypes.Structure, ctypes.Union, ctypes.Array)):
        return bytes(value) if ctypes.sizeof(value) <= 8 * MAX_WHOLE and not _points(type(value)) else None
    if isinstance(value, ctypes._Pointer):
        return None
    # An array of NumPy.
    return (
        (value.shape, value.dtype, value.tobytes()) if value.size <= MAX_WHOLE and not value.dtype.hasobject else None
    )


def _points(kind: Any) -> bool:
    """Whether a type of ctypes holds pointers, whose targets its bytes do not tell."""
    if issubclass(kind, ctypes.Array):
        return _points(kind._type_)
    if issubclass(kind, (ctypes.Structure, ctypes.Union)):
        fields: list = [field for base in kind.__mro__ for field in vars(base).get("_fields_", ())]
        return any(_points(field[1]) for field in fields)
    return not issubclass(kind, ctypes._SimpleCData) or str(vars(kind).get("_type_")) in "zZPO"


def _is_data(kind: type) -> bool:
    of_ctypes = (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._Pointer)
    return issubclass(kind, (array.array, bytearray, memoryview, *of_ctypes)) or _is_numpy_array(kind)


def _is_numpy_array(kind: type) -> bool:
    return any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in kind.__mro__)


def _numbers_of(array: Any) -> list | None:
    """The elements of a small array of NumPy as Python numbers, which become arguments; None for other arrays."""
    return array.ravel().tolist() if array.size <= MAX_ITEMS and array.dtype.kind in "biuf" else None


def _array_of(array: Any, new: list) -> Any:
    """An array of the same shape that holds `new`."""
    import numpy as np

    made = np.empty(len(new), dtype=object)
    for place, value in enumerate(new):  # one by one: NumPy would look into symbols
        made[place] = value
    return made.reshape(array.shape)


def _names_in(getter: Any) -> frozenset[str]:
    """The attributes that an `operator.attrgetter` or `methodcaller` names."""
    if not isinstance(getter, (operator.attrgetter, operator.methodcaller)):
        return frozenset()
    found: Any = getter.__reduce__()[1]
    names = [part for name in found if isinstance(name, str) for part in name.split(".")]
    return frozenset([*names, *[f"{name}()" for name in names]])
