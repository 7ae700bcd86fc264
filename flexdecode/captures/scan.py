"""The walk: one traversal of everything that a callable can read."""

from __future__ import annotations

import functools
import numbers
import sys
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import repeat
from operator import attrgetter
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

import torch

from .facts import (
    _CODES,
    _CONSTRUCTORS,
    _CONTAINERS,
    _DESCRIBE,
    _DICTS,
    _HEAP,
    _HOOKS,
    _SEQUENCES,
    _TABLES,
    _TYPES,
    MAX_CACHED,
    MAX_DEPTH,
    MAX_ITEMS,
    MAX_OBJECTS,
    _At,
    _Code,
    _is_plain,
    _plain,
    _read_code,
    _read_type,
    _remember,
    _Type,
    _union,
    _View,
    _view,
    uncompiled,
)


class _Absent:
    """Stands for an empty closure cell, an unset slot, and a global that is not there (a builtin)."""


_ABSENT = _Absent()
_NO_NAMES: frozenset[str] = frozenset()
_FUNC: _At = ("func", None)
_INDEX: tuple[_At, ...] = tuple(("index", i) for i in range(MAX_ITEMS))
_NAMED = {"cell", "global", "fattr", "attr", "slot", "class", "super", "module", *_TABLES}
_CONSTANTS = {bool, str, bytes, type(None), type(...), _Absent, torch.dtype, torch.device, torch.layout}
_KEY_TYPES = {str, int}
_LIBRARY: dict[int, ModuleType] = {}  # modules known to be opaque, kept alive
_OPAQUE = sys.stdlib_module_names | {"builtins", "torch", "numpy", "triton"}
_contents = attrgetter("cell_contents")
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter  # looked up for each captured value


@functools.lru_cache(maxsize=MAX_CACHED)
def _opaque(module: str | None) -> bool:
    """Whether a module, by its name, is one that users do not change."""
    return module is not None and module.partition(".")[0] in _OPAQUE


def _run(fn: Callable, make: Any) -> Any:
    scan, names = None, _NO_NAMES
    while scan is None or scan.stale:  # a helper names attributes of an object that was visited before: look again
        scan = make(names)
        parts = _function(scan, fn, _FUNC, True) if type(fn) is FunctionType else None
        if parts is None:
            scan.visit(fn, type(fn), _FUNC)
        else:  # the common case, without what matters only further down
            header, children, where = parts
            scan.seen[id(fn)] = 0
            scan.key += header
            scan.each(fn, children, where)
        names = scan.names
    return scan


class _Scan:
    """One traversal.

    What is visited appends a marker and then a number of items that the marker determines, so that no two structures
    make the same key. `visit` and `each` return the position of the last visited thing with children (a function,
    container or object) in the order of first visits, None for leaves and constants.
    """

    depth = 0
    looked = False  # whether attributes were looked up with the present names
    stale = False

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.key: list = []
        self.leaves: list = []
        self.pins: list = []
        self.seen: dict[int, int] = {}

    def each(self, owner: Any, children: Sequence, where: Sequence[_At]) -> int | None:
        """Visits the children of `owner`."""
        key, leaves, position = self.key, self.leaves, None
        for child, at in zip(children, where):  # noqa: B905 (`strict` costs time for each token)
            kind = type(child)
            if kind is _Tensor or kind is _Parameter:
                key += (child.dtype, child.ndim, child.device, child.requires_grad, child.layout)
                leaves.append(child)
            elif kind is int or (kind is float and child - child == 0.0):  # not for inf and nan
                key.append(kind)
                leaves.append(child)
            elif kind is ModuleType and id(child) in _LIBRARY:
                key += (kind, id(child))
            elif kind in _CONSTANTS:
                key += (kind, child)
            else:
                position = self.visit(child, kind, at)
        return position

    def visit(self, value: Any, kind: type, at: _At) -> int | None:
        describe = _DESCRIBE.get(kind) or _remember(_DESCRIBE, kind, _choose(kind))
        called = (describe is not _object and describe is not _class) or self.is_called(at)
        # One object is two things: used as a whole, and as a holder of attributes (an odd mark, as ids are even).
        mark = id(value) if called else id(value) + 1
        position = self.seen.get(mark)
        if position is not None:
            self.key += ("back", position)
            return position
        if self.depth >= MAX_DEPTH or len(self.seen) >= MAX_OBJECTS:
            describe = _identity
        parts = describe(self, value, at, called)
        if parts is None:
            return None
        header, children, where = parts
        position = self.seen[mark] = len(self.seen)
        self.key += header
        self.depth += 1
        self.each(value, children, where)
        self.depth -= 1
        return position

    def is_called(self, at: _At) -> bool:
        """Whether the code may use more of a thing than attributes that it names: call it, index it, compute with it.

        Otherwise `forward` of a whole model would be walked because a mod reads `self.window`.
        """
        how, name = at
        return name if how == "self" else how not in _NAMED or f"{name}()" in self.names

    def learn(self, names: frozenset[str]) -> None:
        """Adds to the attribute names that are looked up on objects."""
        if not names <= self.names:
            self.names = _union(self.names, names) if self.names else names
            self.stale = self.stale or self.looked


# Functions that describe a value by its part of the key, its children and how these are reached. For a value without
# children they write to the scan and return None.
_Parts = tuple[Sequence, Sequence, Sequence[_At]]
_Describe = Callable[[_Scan, Any, _At, bool], "_Parts | None"]


def _identity(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    scan.key += ("id", id(value))
    scan.pins.append(value)
    return None


def _representation(scan: _Scan, value: Any, at: _At, called: bool) -> None:
    """Writes a value for which `==` is not enough: inf and nan, complex numbers, ranges."""
    scan.key += (type(value), "repr", repr(value))


def _tensor(scan: _Scan, value: torch.Tensor, at: _At, called: bool) -> None:
    scan.key += ("tensor", id(type(value)), value.dtype, value.ndim, value.device, value.requires_grad, value.layout)
    scan.pins.append(type(value))
    scan.leaves.append(value)


def _numpy_number(scan: _Scan, value: Any, at: _At, called: bool) -> None:
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if number - number != 0:
        _representation(scan, value, at, called)
    else:
        scan.key += (type(value), "number")
        scan.leaves.append(number)


def _function(scan: _Scan, fn: FunctionType, at: _At, called: bool) -> _Parts | None:
    if fn.__dict__ and "_torchdynamo_orig_callable" in fn.__dict__:
        return _compiled(scan, fn, at, called)
    if (
        at is not _FUNC
        and at[0] in ("global", "module")
        and _opaque(fn.__module__)
        # What torch's own `and_masks` returns lives in torch and holds the user's mods.
        and not (fn.__closure__ and fn.__module__.startswith("torch.nn.attention"))
    ):
        return _identity(scan, fn, at, called)
    code, cells = fn.__code__, fn.__closure__
    facts = _CODES.get(id(code)) or _read_code(code)
    if facts.names is not scan.names:
        if scan.seen:
            scan.learn(facts.names)
        else:  # the root
            scan.names = scan.names or facts.names
    scan.pins.append(code)
    try:
        children = [*map(_contents, cells)] if cells else []
    except ValueError:  # an empty cell
        children = [_read_cell(cell) for cell in cells or ()]
    children += map(fn.__globals__.get, facts.global_names, repeat(_ABSENT))
    if not (fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__):
        return ("function", id(code)), children, facts.where
    defaults, keywords, attributes = fn.__defaults__ or (), fn.__kwdefaults__ or {}, fn.__dict__
    named = [name for name in _view(scan.names).attributes if name in attributes]
    scan.looked = scan.looked or bool(attributes)
    children += [*defaults, *keywords.values(), *[attributes[name] for name in named]]
    where = [*facts.where, *[("default", i) for i in range(len(defaults))], *[("kwdefault", k) for k in keywords]]
    where += [("fattr", name) for name in named]
    return ("function", id(code), (len(defaults), *keywords, None, *named)), children, where


def _compiled(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts:
    """What `torch.compile` gives counts as what it was made of."""
    return ("compiled",), (uncompiled(value),), (_FUNC,)


def _method(scan: _Scan, method: MethodType, at: _At, called: bool) -> _Parts:
    function = method.__func__
    bare = not isinstance(function, FunctionType) or _code(function).uses_self
    return ("method",), (function, method.__self__), (_FUNC, ("self", bare))


def _partial(scan: _Scan, call: functools.partial, at: _At, called: bool) -> _Parts:
    where = [_FUNC, *[("argument", i) for i in range(len(call.args))], *[("keyword", k) for k in call.keywords]]
    children = [call.func, *call.args, *call.keywords.values()]
    return ("partial", len(call.args), tuple(call.keywords)), children, where


def _sequence(scan: _Scan, items: Sequence, at: _At, called: bool) -> _Parts | None:
    if len(items) > MAX_ITEMS:
        return _identity(scan, items, at, called)
    return (type(items), len(items)), items, _INDEX


def _dictionary(scan: _Scan, items: Mapping, at: _At, called: bool) -> _Parts | None:
    if len(items) > MAX_ITEMS or not _KEY_TYPES.issuperset(map(type, items)):
        return _identity(scan, items, at, called)
    return (type(items), tuple(items)), [*items.values()], [("item", key) for key in items]


def _module(scan: _Scan, module: ModuleType, at: _At, called: bool) -> _Parts | None:
    state = vars(module)
    if _opaque(state.get("__name__")):
        _LIBRARY[id(module)] = module
        scan.key += (ModuleType, id(module))
        return None
    where = [("module", name) for name in _view(scan.names).attributes if name in state]
    scan.looked = True
    scan.pins.append(module)
    return ("module", id(module), len(where), *where), [state[name] for _, name in where], where


def _class(scan: _Scan, kind: type, at: _At, called: bool) -> _Parts | None:
    # `super()` holds its class in a cell; what it reaches is found on the object.
    is_super = at == ("cell", "__class__") and "super()" in scan.names
    if is_super or _opaque(kind.__module__) or issubclass(kind, Enum):
        return _identity(scan, kind, at, called)
    facts = _type(kind)
    return _attributes(scan, kind, kind, facts, {}, _CONSTRUCTORS, called)


def _object(scan: _Scan, obj: Any, at: _At, called: bool) -> _Parts:
    facts = _type(type(obj))
    state = object.__getattribute__(obj, "__dict__") if facts.has_dict else {}
    hooks = [name for name in _HOOKS if state.get(name)] if facts.is_module else ()
    return _attributes(scan, obj, type(obj), facts, state, hooks, called)


def _attributes(
    scan: _Scan, obj: Any, kind: type, facts: _Type, state: Mapping, extra: Sequence[str], called: bool
) -> _Parts:
    """Describes what the code names of an object or class, with what its methods name in turn."""
    while True:
        names, operators = scan.names, (*facts.operators, *extra) if called else facts.getters
        children, where = _members(obj, facts, state, _view(names), operators)
        methods = [(_code(c), how) for c, (how, _) in zip(children, where, strict=True) if type(c) is FunctionType]
        for code, _ in methods:
            scan.learn(code.names)
        if not called and any(code.uses_self and how in ("class", "super") for code, how in methods):
            called = True
        elif names is scan.names:
            break
    scan.looked = True
    by_identity = facts.dynamic or _view(names).reflective
    if obj is not kind and facts.solid in _CONTAINERS:
        by_identity |= _add_items(obj, facts.solid, children, where)
    scan.pins += (obj, kind) if by_identity else (kind,)
    return ("object", id(kind), obj is kind, id(obj) if by_identity else 0, len(where), *where), children, where


def _members(
    obj: Any, facts: _Type, state: Mapping, view: _View, operators: tuple[str, ...]
) -> tuple[list[Any], list[_At]]:
    """Finds attributes as Python would, without running a property or `__getattr__`."""
    children: list[Any] = []
    where: list[_At] = []
    uses_class, hidden = view.uses_class, {}
    for name in (*operators, *view.attributes):
        found = [namespace[name] for namespace in facts.dicts if name in namespace]
        if found and isinstance(found[0], MemberDescriptorType) and not isinstance(obj, type):
            children.append(_read_slot(found[0], obj))
            where.append(("slot", name))
        elif name in state and not (found and hasattr(type(found[0]), "__set__")):  # properties go before the dict
            children.append(state[name])
            where.append(("attr", name))
            if found:
                hidden[name] = found[0]
        elif found:
            children.append(_plain(found[0]))
            where.append(("class" if _is_plain(found[0]) else "descriptor", name))
            uses_class = uses_class or isinstance(found[0], classmethod)
        elif facts.is_module and not facts.is_container:
            for table in _TABLES:
                if name in state.get(table, ()):
                    children.append(state[table][name])
                    where.append((table, name))
                    break
        if view.uses_super:
            children += map(_plain, found[1:])
            where += [("super", name)] * len(found[1:])
    if facts.is_container:
        for table in _TABLES:
            children += state[table].values()
            where += [(table, name) for name in state[table]]
    if uses_class:
        children += map(_plain, hidden.values())
        where += [("class", name) for name in hidden]
    return children, where


def _add_items(obj: Any, solid: Any, children: list[Any], where: list[_At]) -> bool:
    """Adds the items of an instance of a container class; returns whether there are items that cannot be listed."""
    items = list(solid.__iter__(obj))
    if len(items) > MAX_ITEMS or (solid in _DICTS and not _KEY_TYPES.issuperset(map(type, items))):
        return True
    children += solid.values(obj) if solid in _DICTS else items
    where += [("item", key) for key in items] if solid in _DICTS else _INDEX[: len(items)]
    return False


def _code(fn: FunctionType) -> _Code:
    return _CODES.get(id(fn.__code__)) or _read_code(fn.__code__)


def _type(kind: type) -> _Type:
    facts = _TYPES.get(kind)
    return facts if facts is not None and facts.lineage is kind.__mro__ else _read_type(kind)


def _read_cell(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return _ABSENT


def _read_slot(slot: MemberDescriptorType, obj: Any) -> Any:
    try:
        return slot.__get__(obj)
    except AttributeError:
        return _ABSENT


_TABLE: dict[type, _Describe] = {
    FunctionType: _function,
    MethodType: _method,
    functools.partial: _partial,
    **dict.fromkeys(_SEQUENCES, _sequence),
    **dict.fromkeys(_DICTS, _dictionary),
    **dict.fromkeys((float, complex, range), _representation),
}


def _choose(kind: type) -> _Describe:
    if kind in _TABLE:
        return _TABLE[kind]
    if issubclass(kind, torch.Tensor):
        return _tensor
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return _compiled
    if issubclass(kind, ModuleType):
        return _module
    if issubclass(kind, type):
        return _class
    if kind.__module__ == "numpy" and issubclass(kind, numbers.Real):
        return _numpy_number
    if issubclass(kind, Enum) or not (kind.__flags__ & _HEAP or kind is SimpleNamespace):
        return _identity
    return _object
