"""Types of Python's library that hold values: containers, holders of one value, and data that is compared by bytes."""

from __future__ import annotations

import ctypes
import functools
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Iterable
from contextvars import ContextVar
from operator import attrgetter
from types import BuiltinMethodType, MappingProxyType, MethodWrapperType, ModuleType, SimpleNamespace
from typing import Any, NamedTuple

from .classes import DICTS, SEQUENCES, SETS, layout
from .code import ABSENT, MAX_WHOLE, At, Edge, Parts

FUNC: At = ("func", None)
MEMO: type = type(functools.lru_cache(len))
VIEWS: tuple[type, ...] = (type({}.keys()), type({}.values()), type({}.items()))
BUILTINS: tuple[type, ...] = (BuiltinMethodType, MethodWrapperType)
INDEX: tuple[At, ...] = tuple([("index", i) for i in range(MAX_WHOLE)])
_PLAIN_KEYS = {str, int}
_SPELLED = {*_PLAIN_KEYS, bool, bytes, type(None)}


# --- Containers ------------------------------------------------------------------------------------------------------


def contents(container: Any) -> Parts:
    """A container with all its entries. Its keys, in order, are part of the mod's key, because a mod may iterate."""
    kind: type = type(container)
    solid = layout(kind)
    if solid in SEQUENCES:
        return (kind, solid.__len__(container)), zip(INDEX, solid.__iter__(container))  # noqa: B905 (takes time)
    keys = container.mapping if kind in VIEWS else container
    edges: Iterable[Edge] = ()
    if solid not in SETS:
        values = dict.values(container) if isinstance(container, dict) else keys.values()
        edges = zip([("item", key) for key in keys], values)  # noqa: B905
    if solid is defaultdict:
        edges = [*edges, (("factory", None), container.default_factory)]
    if _PLAIN_KEYS.issuperset(map(type, keys)):
        return (kind, (*keys,)), edges
    odd = [key for key in keys if _spell(key) is None]
    return (kind, (*map(_spell, keys),)), [*edges, *[(("key", i), key) for i, key in enumerate(odd)]]


def _spell(key: Any) -> Any:
    """What identifies a key of a dict; None for objects, because these are visited themselves."""
    kind = type(key)
    if kind is tuple:
        parts = (*map(_spell, key),)
        return None if None in parts else parts
    return (kind, repr(key)) if kind is float else (kind, key) if kind in _SPELLED else None


def part_of(container: Any, at: At) -> Parts:
    """The part of a large container that a mod reads: an entry, the length, the presence of a member, or all."""
    how, name = at
    if how == "len":
        return (len(container),), ()
    if how == "in":
        return (name in container,), ()
    if how == "all":
        return contents(container)
    if how == "item":
        mapping: Any = dict if isinstance(container, dict) else MappingProxyType
        return (), ((at, mapping.get(container, name, ABSENT)),)
    kind: type = type(container)
    try:
        return (), ((at, layout(kind).__getitem__(container, name)),)
    except IndexError:
        return (), ((at, ABSENT),)


def filled(kind: type, like: Any) -> Any:
    """Makes an instance of a class with the items of another instance of the same layout. `__init__` does not run."""
    solid = layout(kind)
    if issubclass(solid, (tuple, frozenset)):
        return solid.__new__(kind, like)
    new = solid.__new__(kind)
    if solid is deque:
        deque.__init__(new, like, like.maxlen)
    elif solid is defaultdict:
        defaultdict.__init__(new, like.default_factory, like)
    elif solid in (list, set, *DICTS):
        solid.__init__(new, like)
    return new


# --- Holders of one value --------------------------------------------------------------------------------------------


class Holder(NamedTuple):
    """How values of one type are followed.

    Attributes:
        at: how the value in a holder is reached.
        read: gives that value.
        copy: takes a holder and another value, and makes a holder of that value.
    """

    at: At
    read: Callable[[Any], Any]
    copy: Callable[[Any, Any], Any]


def _referent(proxy: Any) -> Any:
    try:
        return proxy.__dir__.__self__
    except ReferenceError:
        return ABSENT


def _fixed_var(var: ContextVar, value: Any) -> SimpleNamespace:
    return SimpleNamespace(name=var.name, get=lambda *_: value)


_PROXY = Holder(("proxy", None), _referent, lambda proxy, value: value)
_METHOD = Holder(("self", True), attrgetter("__self__"), lambda method, value: getattr(value, method.__name__))
HOLDERS: dict[type, Holder] = {
    ContextVar: Holder(("get()", None), lambda var: var.get(ABSENT), _fixed_var),
    weakref.ref: Holder(("call", None), lambda ref: ref(), lambda ref, value: lambda: value),
    MEMO: Holder(FUNC, attrgetter("__wrapped__"), lambda memo, fn: functools.lru_cache(**memo.cache_parameters())(fn)),
    **dict.fromkeys((weakref.ProxyType, weakref.CallableProxyType), _PROXY),
    **dict.fromkeys(BUILTINS, _METHOD),
}


def holder_of(kind: type) -> Holder | None:
    """How values of a type are followed; None if the type is not a holder."""
    return HOLDERS.get(weakref.ref if issubclass(kind, weakref.ref) else kind)


def is_bound(builtin: Any) -> bool:
    """Whether a builtin is a method of an object. Such an object may change."""
    owner = builtin.__self__
    return owner is not None and not isinstance(owner, (ModuleType, type))


# --- What counts by its bytes ----------------------------------------------------------------------------------------

CTYPES = (ctypes._SimpleCData, ctypes.Structure, ctypes.Union, ctypes.Array, ctypes._Pointer)


def is_numpy_array(kind: type) -> bool:
    """Whether a type is the type of NumPy's arrays. This does not import NumPy."""
    return any(base.__module__ == "numpy" and base.__name__ == "ndarray" for base in kind.__mro__)


def bytes_of(value: Any) -> tuple | None:
    """What identifies an array, a buffer or a value of ctypes; None if it is too large or holds pointers."""
    if is_numpy_array(type(value)):
        small = value.size <= MAX_WHOLE and not value.dtype.hasobject
        return (value.shape, value.dtype, value.tobytes()) if small else None
    if isinstance(value, CTYPES) and _holds_pointers(type(value)):
        return None
    data = memoryview(value)
    return (data.format, data.shape, data.tobytes()) if data.nbytes <= 8 * MAX_WHOLE else None


def _holds_pointers(kind: Any) -> bool:
    """Whether a type of ctypes holds pointers. Its bytes do not show their targets."""
    if issubclass(kind, ctypes.Array):
        return _holds_pointers(kind._type_)
    if issubclass(kind, (ctypes.Structure, ctypes.Union)):
        return any(_holds_pointers(field[1]) for base in kind.__mro__ for field in vars(base).get("_fields_", ()))
    return not issubclass(kind, ctypes._SimpleCData) or kind._type_ in "zZPO"


def objects_of(array: Any, values: list) -> Any:
    """An array of the same shape that holds other values."""
    import numpy as np

    return np.fromiter(values, dtype=object, count=len(values)).reshape(array.shape)  # np.array would look into symbols
