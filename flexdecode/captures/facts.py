"""What the code of a function reads, and what a type says about its instances: found once, kept by id."""

from __future__ import annotations

import dis
import functools
import struct
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FunctionType, MemberDescriptorType, SimpleNamespace
from typing import Any, Generic, Protocol

import torch

MAX_ITEMS = 64  # of larger containers only the entries are followed that the mod reads
MAX_WHOLE = 1024  # entries of a container that a mod may read all of
MAX_DEPTH = 64  # keeps far away from Python's recursion limit
MAX_OBJECTS = 1024  # a mod that reaches more has run into some framework's internals
MAX_CACHED = 4096

_At = tuple[str, Any]  # how a child is reached from its owner: ("cell", "W"), ("attr", "slope"), ("index", 0), ...
# The header of a value in the key, its children, and how these are reached; None for a value that has no children.
_Parts = tuple[Sequence, Sequence, Sequence[_At]]


class _Absent:
    """Stands for an empty closure cell, an unset slot, and a global that is not there (a builtin)."""


_ABSENT = _Absent()


# --- What the code of a function reads -------------------------------------------------------------------------------

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_PADDING = {"CACHE", "EXTENDED_ARG"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_WHOLE = {"vars()", "__dict__", "__getattribute__", "asdict", "asdict()", "astuple", "astuple()"}  # all attributes
_REFLECTION = {"getattr()", *_WHOLE}
_BY_NAME = {"getattr()", "hasattr()", "attrgetter", "attrgetter()", "globals()", *_WHOLE}  # names are strings there
_HIDING = {"getattr()", "hasattr()", "globals()", "eval()", "exec()"}  # builtins that read what their argument says


@dataclass(slots=True)
class _Code:
    """Static facts about a code object and the code nested in it.

    Attributes:
        code: the code object, kept alive because the facts are found by its id.
        global_names: the globals that it reads.
        names: attributes that it reads, as `slope`, and variables and attributes of which it uses more than an
            attribute (calls, indexes or passes them on), as `slope()`.
        uses_self: whether it uses more than attributes of its first parameter.
        where: how each closure cell and global is reached.
        imports: the modules that it imports, with the number of dots before their names.
        hides: whether it may read what none of these tell, through `getattr` and the like.
        is_odd: whether it imports or hides.
    """

    code: CodeType
    global_names: tuple[str, ...]
    names: frozenset[str]
    uses_self: bool
    where: tuple[_At, ...]
    imports: tuple[tuple[str, int], ...]
    hides: bool
    is_odd: bool


def _read_code(code: CodeType) -> _Code:
    global_names: dict[str, None] = {}  # a dict for its order
    names: set[str] = set()
    uses_self = False
    imports: dict[tuple[str, int], None] = {}
    first = code.co_varnames[0] if code.co_varnames else ""
    pending, strings = [code], set()
    while pending:
        inner = pending.pop()
        pending += [const for const in inner.co_consts if isinstance(const, CodeType)]
        strings |= {const for const in inner.co_consts if isinstance(const, str) and const.isidentifier()}
        steps = [step for step in dis.get_instructions(inner) if step.opname not in _PADDING]
        for place, (step, after) in enumerate(pairwise(steps)):
            operation, name, bare = step.opname, step.argval, after.opname not in _ATTRIBUTE
            if operation == "IMPORT_NAME":  # after its number of dots and its list of names
                imports[name, steps[place - 2].argval or 0] = None
                names |= set(name.split(".")[1:])
            elif operation == "IMPORT_FROM":
                names |= {name, f"{name}()"}
            elif operation in _GLOBAL:
                global_names[name] = None
            elif operation in _ATTRIBUTE:
                names.add(name)
            elif "LOAD" in operation and "DEREF" in operation:
                uses_self |= bare and name == first
            else:
                if "LOAD_FAST" in operation and inner is code and first not in code.co_cellvars:
                    loaded = name if isinstance(name, tuple) else (name,)
                    uses_self |= first in loaded[:-1] or (bare and first == loaded[-1])
                continue
            if bare:
                names.add(name + "()")
    if not names.isdisjoint(_BY_NAME):
        names |= strings | {f"{name}()" for name in strings}
    if "globals()" in names:
        global_names.update(dict.fromkeys(strings))
    where = [("cell", name) for name in code.co_freevars] + [("global", name) for name in global_names]
    hides = any(f"{name}()" in _HIDING for name in global_names)
    facts = _Code(
        code,
        tuple(global_names),
        frozenset(names),
        uses_self,
        tuple(where),
        tuple(imports),
        hides,
        hides or bool(imports),
    )
    return _remember(_CODES, id(code), facts)


@dataclass(slots=True)
class _View:
    """A set of `_Code.names`, prepared for looking up attributes."""

    attributes: tuple[str, ...]
    reflective: bool
    whole: bool
    uses_super: bool
    uses_class: bool


@functools.lru_cache(maxsize=MAX_CACHED)
def _view(names: frozenset[str]) -> _View:
    attributes = tuple(sorted(name for name in names if not name.endswith("()")))
    uses_class = "type()" in names or "__class__" in names
    whole = not names.isdisjoint(_WHOLE)
    return _View(attributes, not names.isdisjoint(_REFLECTION), whole, "super()" in names, uses_class)


@functools.lru_cache(maxsize=MAX_CACHED)
def _union(names: frozenset[str], more: frozenset[str]) -> frozenset[str]:
    return names | more


def uncompiled(value: Any) -> Any:
    """The function or module that `torch.compile` wrapped in `value`; None if it wrapped none."""
    if type(value) is FunctionType:
        return value.__dict__.get("_torchdynamo_orig_callable")
    kind = type(value)
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return value.__dict__["_modules"]["_orig_mod"]
    return None


# --- What a type says about its instances ----------------------------------------------------------------------------

_POINTER = struct.calcsize("P")
_HEAP, _MANAGED_DICT, _MANAGED_WEAKREF = 1 << 9, 1 << 4, 1 << 3  # type flags: made by a class statement, and layout
_SEQUENCES, _DICTS = (tuple, torch.Size, list, deque), (dict, OrderedDict, defaultdict)
_CONTAINERS = _SEQUENCES + _DICTS
_TABLES = ("_parameters", "_buffers", "_modules")
_MODULE_CONTAINERS = (
    torch.nn.ParameterList, torch.nn.ParameterDict, torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential,
)  # fmt: skip
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_CONSTRUCTORS = ("__init__", "__new__", "__post_init__")
# Methods that neither an operator nor a call inside a mod runs.
_NOT_OPERATORS = {
    *_CONSTRUCTORS,
    *("__del__", "__repr__", "__str__", "__format__", "__init_subclass__", "__class_getitem__", "__subclasshook__"),
    *("__set_name__", "__setattr__", "__delattr__", "__setitem__", "__delitem__", "__getstate__", "__setstate__"),
    *("__reduce__", "__reduce_ex__", "__copy__", "__deepcopy__", "__replace__", "__getnewargs__", "__dir__"),
    *("__sizeof__", "__annotate__", "__annotate_func__"),
}
_GENERATED = {"__eq__", "__hash__", "__lt__", "__le__", "__gt__", "__ge__"}  # by dataclasses: they name all fields


@dataclass(slots=True)
class _Type:
    """Static facts about a class; what its attributes *are* is looked up in `dicts` at every walk.

    Attributes:
        lineage: the `__mro__` that the facts were read from.
        dicts: live namespaces of the classes in which named attributes are looked up.
        getters: `__getattr__` and `__getattribute__`, which run when an attribute is read.
        operators: methods that syntax alone reaches: `__call__`, `__getitem__`, ..., and `forward` of a module.
        solid: the built-in class that determines the layout.
        has_dict: whether instances have a `__dict__`.
        is_module: whether it is an `nn.Module`.
        is_container: whether it is one that is indexed, so that the code does not name what it holds.
        dynamic: whether named attributes may not tell everything, so that instances count by identity.
        complete: whether an instance is its `__dict__`, slots and items, so that it can be copied.
    """

    lineage: tuple[type, ...]
    dicts: tuple[Mapping[str, Any], ...]
    getters: tuple[str, ...]
    operators: tuple[str, ...]
    solid: Any
    has_dict: bool
    is_module: bool
    is_container: bool
    dynamic: bool
    complete: bool


def _type_of_layout(kind: type) -> type:
    """The built-in class that determines the layout of a class."""
    return next(base for base in kind.__mro__ if not base.__flags__ & _HEAP and base is not Generic)


def _read_type(kind: type) -> _Type:
    mro = kind.__mro__
    library = (torch.nn.Module, Generic, Protocol)  # their methods read nothing of the user's that is not walked
    dicts = [vars(base) for base in mro if base.__flags__ & _HEAP and base not in library]
    solid = _type_of_layout(kind)
    is_module = issubclass(kind, torch.nn.Module)
    operators = {"forward"} if is_module else set()
    for namespace in dicts:
        skipped = _NOT_OPERATORS | (_GENERATED if "__dataclass_fields__" in namespace else set())
        named = [name for name, value in namespace.items() if isinstance(_plain(value), FunctionType)]
        operators |= {name for name in named if name.startswith("__") and name.endswith("__")} - skipped
    slots = sum(isinstance(value, MemberDescriptorType) for namespace in dicts for value in namespace.values())
    in_dict = bool(kind.__dictoffset__) and not solid.__dictoffset__ and not kind.__flags__ & _MANAGED_DICT
    weak = bool(kind.__weakrefoffset__) and not solid.__weakrefoffset__ and not kind.__flags__ & _MANAGED_WEAKREF
    # Bytes that neither slots nor a `__dict__` explain are state that only C code can see.
    hidden = kind.__basicsize__ - solid.__basicsize__ - _POINTER * (slots + in_dict + weak)
    getters = sorted(operators & {"__getattr__", "__getattribute__"})
    transparent = solid in (object, SimpleNamespace, *_CONTAINERS) and hidden <= 0
    facts = _Type(
        lineage=mro,
        dicts=tuple(dicts),
        getters=tuple(getters),
        operators=tuple(sorted(operators)),
        solid=solid,
        has_dict=bool(kind.__dictoffset__),
        is_module=is_module,
        is_container=issubclass(kind, _MODULE_CONTAINERS),
        dynamic=not transparent or bool(getters),
        complete=transparent and not hasattr(kind, "__del__"),  # a copy would be finalised, too
    )
    return _remember(_TYPES, kind, facts)


def _is_plain(value: Any) -> bool:
    """Whether a class attribute is data or takes `self`, not a static or class method or a descriptor of the user's."""
    return isinstance(value, (FunctionType, property, functools.cached_property)) or not hasattr(type(value), "__get__")


def _plain(value: Any) -> Any:
    """Returns what runs when a class attribute is read: the function in a property, static or class method."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.func if isinstance(value, functools.cached_property) else value


_CODES: dict[int, _Code] = {}
_TYPES: dict[type, _Type] = {}
_DESCRIBE: dict[type, Callable] = {}  # how values of a type are described


def _remember(cache: dict, key: Any, facts: Any) -> Any:
    if len(cache) >= MAX_CACHED:  # classes and code made in a loop: start over, the facts are cheap to find again
        cache.clear()
    cache[key] = facts
    return facts
