"""Describes what a class defines for its instances."""

from __future__ import annotations

import functools
import struct
import threading
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from types import FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any, Generic, NamedTuple, Protocol

import torch

from .code import ABSENT, MAX_KNOWN

HEAP, _MANAGED_DICT, _MANAGED_WEAKREF = 1 << 9, 1 << 4, 1 << 3  # type flags: class statement, layout
SEQUENCES, DICTS, SETS = (tuple, torch.Size, list, deque), (dict, OrderedDict, defaultdict), (set, frozenset)
CONTAINERS = (*SEQUENCES, *DICTS, *SETS)
TABLES = ("_parameters", "_buffers", "_modules")
CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
_POINTER = struct.calcsize("P")
_INDEXED = (
    torch.nn.ParameterList, torch.nn.ParameterDict, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential,
)  # fmt: skip
# Methods that no operator and no call inside a mod runs.
_NOT_OPERATORS = {
    *CONSTRUCTORS,
    *("__del__", "__repr__", "__str__", "__format__", "__init_subclass__", "__class_getitem__", "__subclasshook__"),
    *("__set_name__", "__setattr__", "__delattr__", "__setitem__", "__delitem__", "__getstate__", "__setstate__"),
    *("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__", "__replace__", "__getnewargs__", "__dir__"),
    *("__sizeof__", "__annotate__", "__annotate_func__"),
}
_GENERATED = {"__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__"}  # dataclasses make these with all fields


class Class(NamedTuple):
    """What a class defines for its instances. The values of its attributes are looked up in `dicts` each time.

    Attributes:
        dicts: live namespaces of the classes in which named attributes are looked up.
        getters: `__getattr__` and `__getattribute__`, which run when an attribute is read.
        operators: methods that syntax alone reaches: `__call__`, `__getitem__`, ..., and `forward` of a module.
        slots: the slots of an instance.
        solid: the built-in class that determines the layout.
        is_module: whether it is an `nn.Module`.
        is_indexed: whether code reads its content by index, so that the code does not name what it reads.
        transparent: whether an instance has no state except its `__dict__`, slots and items.
    """

    dicts: tuple[Mapping[str, Any], ...]
    getters: tuple[str, ...]
    operators: tuple[str, ...]
    slots: dict[str, MemberDescriptorType]
    solid: Any
    is_module: bool
    is_indexed: bool
    transparent: bool


@functools.lru_cache(maxsize=MAX_KNOWN)
def layout(kind: type) -> Any:
    """The built-in class that determines the layout of a class."""
    return next(base for base in kind.__mro__ if not base.__flags__ & HEAP and base is not Generic)


@functools.lru_cache(maxsize=MAX_KNOWN)
def class_of(mro: tuple[type, ...]) -> Class:
    """Describes a class. It is given by its `__mro__`, because a user may change that."""
    kind = mro[0]
    library = (torch.nn.Module, Generic, Protocol)  # their methods read only what the walk visits
    dicts = [vars(base) for base in mro if base.__flags__ & HEAP and base not in library]
    solid = layout(kind)
    is_module = issubclass(kind, torch.nn.Module)
    operators = {"forward"} if is_module else set()
    for namespace in dicts:
        skipped = _NOT_OPERATORS | (_GENERATED if "__dataclass_fields__" in namespace else set())
        named = [name for name, value in namespace.items() if isinstance(plain(value), FunctionType)]
        operators |= {name for name in named if name.startswith("__") and name.endswith("__")} - skipped
    items = [item for namespace in reversed(dicts) for item in namespace.items()]
    slots = [(name, value) for name, value in items if isinstance(value, MemberDescriptorType)]
    in_dict = bool(kind.__dictoffset__) and not solid.__dictoffset__ and not kind.__flags__ & _MANAGED_DICT
    weak = bool(kind.__weakrefoffset__) and not solid.__weakrefoffset__ and not kind.__flags__ & _MANAGED_WEAKREF
    # Bytes beyond the slots and the `__dict__` are state that only C code can see.
    hidden = kind.__basicsize__ - solid.__basicsize__ - _POINTER * (len(slots) + in_dict + weak)
    return Class(
        dicts=tuple(dicts),
        getters=tuple(sorted(operators & {"__getattr__", "__getattribute__"})),
        operators=tuple(sorted(operators)),
        slots=dict(slots),
        solid=solid,
        is_module=is_module,
        is_indexed=issubclass(kind, _INDEXED),
        transparent=solid in (object, SimpleNamespace, *SEQUENCES, *DICTS) and hidden <= 0,
    )


def state_of(obj: Any) -> dict[str, Any]:
    """The `__dict__` of an object; empty if it has none. The read runs no code of the user's."""
    if isinstance(obj, threading.local):
        return vars(obj)  # of this thread
    return object.__getattribute__(obj, "__dict__") if type(obj).__dictoffset__ else {}


def read_slot(slot: MemberDescriptorType, obj: Any) -> Any:
    """The value of a slot; `ABSENT` if it is not set."""
    try:
        return slot.__get__(obj)
    except AttributeError:
        return ABSENT


def is_plain(value: Any) -> bool:
    """Whether a class attribute is data or takes `self`. Static and class methods and user descriptors do not count."""
    return isinstance(value, (FunctionType, property, functools.cached_property)) or not hasattr(type(value), "__get__")


def plain(value: Any) -> Any:
    """Returns the function in a property, static or class method, which runs when the class attribute is read."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.func if isinstance(value, functools.cached_property) else value
