"""What a mod captures, read afresh at every call in a few microseconds.

`walk` follows everything that the code of a callable can read: closure cells, defaults, `functools.partial` arguments,
the `self` of methods and callable objects, and the globals and attributes that the code names, through functions,
containers, objects and the user's own modules. Tensors and finite numbers are *leaves*; everything else goes into the
*key*. Equal keys mean equal behaviour as a function of the leaves.

    >>> W = 128
    >>> key, leaves = walk(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < W)
    >>> leaves
    [128]

Not seen, hence frozen at the first call: attributes whose name the code does not spell (`getattr(cfg, name)`, `vars`;
such objects count by identity), modules imported inside a mod, what C objects (numpy
arrays, `lru_cache`, sets) hold, and containers of more than 64 entries.
"""

from __future__ import annotations

import dis
import functools
import numbers
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import pairwise, repeat
from operator import attrgetter
from types import CellType, CodeType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any, Generic, Protocol

import torch

__all__ = ["CannotRebuild", "leaf_names", "pins", "rebuild", "walk"]

MAX_ITEMS = 64  # larger containers are data, not parameters of a mod
MAX_DEPTH = 64  # keeps far away from Python's recursion limit
MAX_OBJECTS = 1024  # a mod that reaches more has run into some framework's internals
MAX_CACHED = 4096

_At = tuple[str, Any]  # how a child is reached from its owner: ("cell", "W"), ("attr", "slope"), ("index", 0), ...


class CannotRebuild(Exception):
    """A captured number that cannot be replaced; the caller treats it as a constant.

    Attributes:
        index: position of the number among the leaves.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"leaf {index} cannot be replaced: {reason}")
        self.index = index


def walk(fn: Callable) -> tuple[tuple, list]:
    """Reads what `fn` captures.

    Returns:
        The key, a hashable tuple, and the leaves: captured tensors and finite numbers in a deterministic order. The key
        holds ids: whoever stores it also stores `pins(fn)`, so that no id is used again.
    """
    scan = _run(fn, _Scan)
    return tuple(scan.key), scan.leaves


def pins(fn: Callable) -> list:
    """Returns the objects whose ids are in the key of `fn` (code objects, types, objects that count by identity)."""
    return _run(fn, _Scan).pins


def leaf_names(fn: Callable) -> list[str]:
    """Returns how each leaf is reached, for people: `W`, `self.slope`, `partial argument 0`, `W (in mask_mods[0])`."""
    return _run(fn, _Recorder).leaf_names


def rebuild(fn: Callable, replacements: Mapping[int, object]) -> Callable:
    """Copies `fn` with some leaves replaced; `fn` itself stays as it is, and parts without a replacement are shared.

    Args:
        fn: the callable.
        replacements: new objects by position among the leaves of `walk(fn)`.

    Raises:
        CannotRebuild: a replacement is not possible where that leaf is held.
        IndexError: there is no such leaf.
    """
    record = _run(fn, _Recorder)
    if any(not 0 <= index < len(record.leaves) for index in replacements):
        raise IndexError(f"leaves {sorted(replacements)} to be replaced, but there are {len(record.leaves)}")
    return _Rebuilder(record.nodes, replacements).build(fn, record.nodes[0] if record.nodes else None)


# --- What the code of a function reads -------------------------------------------------------------------------------

_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_PADDING = {"CACHE", "EXTENDED_ARG"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_REFLECTION = {"getattr()", "vars()", "__dict__", "__getattribute__", "asdict", "asdict()", "astuple", "astuple()"}


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
    """

    code: CodeType
    global_names: tuple[str, ...]
    names: frozenset[str]
    uses_self: bool
    where: tuple[_At, ...]


def _read_code(code: CodeType) -> _Code:
    global_names: dict[str, None] = {}  # a dict for its order
    names: set[str] = set()
    uses_self = False
    first = code.co_varnames[0] if code.co_varnames else ""
    pending, strings = [code], set()
    while pending:
        inner = pending.pop()
        pending += [const for const in inner.co_consts if isinstance(const, CodeType)]
        strings |= {const for const in inner.co_consts if isinstance(const, str) and const.isidentifier()}
        steps = [step for step in dis.get_instructions(inner) if step.opname not in _PADDING]
        for step, after in pairwise(steps):
            operation, name, bare = step.opname, step.argval, after.opname not in _ATTRIBUTE
            if operation in _GLOBAL:
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
    if "getattr()" in names:
        names |= strings | {f"{name}()" for name in strings}
    where = [("cell", name) for name in code.co_freevars] + [("global", name) for name in global_names]
    facts = _Code(code, tuple(global_names), frozenset(names), uses_self, tuple(where))
    return _remember(_CODES, id(code), facts)


@dataclass(slots=True)
class _View:
    """A set of `_Code.names`, prepared for looking up attributes."""

    attributes: tuple[str, ...]
    reflective: bool
    uses_super: bool
    uses_class: bool


@functools.lru_cache(maxsize=MAX_CACHED)
def _view(names: frozenset[str]) -> _View:
    attributes = tuple(sorted(name for name in names if not name.endswith("()")))
    uses_class = "type()" in names or "__class__" in names
    return _View(attributes, not names.isdisjoint(_REFLECTION), "super()" in names, uses_class)


@functools.lru_cache(maxsize=MAX_CACHED)
def _union(names: frozenset[str], more: frozenset[str]) -> frozenset[str]:
    return names | more


# --- What a type says about its instances ----------------------------------------------------------------------------

_POINTER = struct.calcsize("P")
_HEAP, _MANAGED_DICT, _MANAGED_WEAKREF = 1 << 9, 1 << 4, 1 << 3  # type flags: made by a class statement, and layout
_SEQUENCES, _DICTS = (tuple, torch.Size, list), (dict, OrderedDict)
_CONTAINERS = _SEQUENCES + _DICTS
_TABLES = ("_parameters", "_buffers", "_modules")
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
    dynamic: bool
    complete: bool


def _read_type(kind: type) -> _Type:
    mro = kind.__mro__
    library = (torch.nn.Module, Generic, Protocol)  # their methods read nothing of the user's that is not walked
    dicts = [vars(base) for base in mro if base.__flags__ & _HEAP and base not in library]
    solid: type = next(base for base in mro if not base.__flags__ & _HEAP and base is not Generic)
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


# --- The walk --------------------------------------------------------------------------------------------------------


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
                key += (child.dtype, child.ndim, child.device, child.requires_grad)
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
    scan.key += ("tensor", id(type(value)), value.dtype, value.ndim, value.device, value.requires_grad)
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
        elif facts.is_module:
            for table in _TABLES:
                if name in state.get(table, ()):
                    children.append(state[table][name])
                    where.append((table, name))
                    break
        if view.uses_super:
            children += map(_plain, found[1:])
            where += [("super", name)] * len(found[1:])
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
    if issubclass(kind, ModuleType):
        return _module
    if issubclass(kind, type):
        return _class
    if kind.__module__ == "numpy" and issubclass(kind, numbers.Real):
        return _numpy_number
    if issubclass(kind, Enum) or not (kind.__flags__ & _HEAP or kind is SimpleNamespace):
        return _identity
    return _object


# --- The slow path: names and copies ---------------------------------------------------------------------------------


@dataclass(slots=True, eq=False)
class _Node:
    """A visited function, container or object with its children; `refs` says where a child is a leaf or a node."""

    owner: Any
    children: Sequence
    where: Sequence[_At]
    refs: list[int | _Node | None]


class _Recorder(_Scan):
    """The same traversal, which also keeps what it visited."""

    path = ("", "")

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.nodes: list[_Node] = []
        self.leaf_names: list[str] = []

    def each(self, owner: Any, children: Sequence, where: Sequence[_At]) -> None:
        node = _Node(owner, children, where, [])
        self.nodes.append(node)
        path = self.path
        for child, at in zip(children, where, strict=False):
            self.path = _spell(path, owner, at)
            leaf = len(self.leaves)
            position = super().each(owner, (child,), (at,))
            if position is not None:
                node.refs.append(self.nodes[position])
            elif len(self.leaves) == leaf:
                node.refs.append(None)
            else:
                node.refs.append(leaf)
                base, inside = self.path
                self.leaf_names.append(f"{base} (in {inside})" if inside else base)
        self.path = path


def _spell(path: tuple[str, str], owner: Any, at: _At) -> tuple[str, str]:
    """Extends an access path, a pair of `cfg.window` and the functions in which that stands."""
    how, name = at
    base, inside = path
    if how == "default":
        code = owner.__code__
        name = code.co_varnames[code.co_argcount - len(owner.__defaults__) + name]
    elif how in ("argument", "keyword"):
        name = f"partial {how} {name!r}"
    if how in ("cell", "global", "default", "kwdefault", "argument", "keyword"):
        return name, ", in ".join(filter(None, path))
    if how in ("index", "item"):
        return f"{base or 'self'}[{name!r}]", inside
    if how == "self":
        return f"{base}.__self__" if base else "self", inside
    if how == "func" or name == "forward" or (name.startswith("__") and name.endswith("__")):
        return path  # what runs when the owner is called or used with an operator
    return f"{base or (owner.__name__ if how == 'fattr' else 'self')}.{name}", inside


class _Rebuilder:
    """Copies the nodes from which a replaced leaf can be reached."""

    def __init__(self, nodes: list[_Node], replacements: Mapping[int, object]) -> None:
        self.replacements = replacements
        self.done: dict[int, Any] = {}
        self.below: dict[int, int] = {}  # by id of a node, a replaced leaf that can be reached from it
        size = -1
        while size != len(self.below):  # cycles need more than one round
            size = len(self.below)
            for node in reversed(nodes):
                for *_, leaf in self.changes(node):
                    self.below.setdefault(id(node), leaf)

    def leaf_below(self, ref: int | _Node | None) -> int | None:
        if isinstance(ref, int):
            return ref if ref in self.replacements else None
        return None if ref is None else self.below.get(id(ref))

    def changes(self, node: _Node) -> list[tuple[str, Any, Any, int | _Node | None, int]]:
        """Lists the children that change: how each is reached (two items), it, its ref, and a replaced leaf in it."""
        edges = zip(node.where, node.children, node.refs, strict=False)
        found = [(how, name, child, ref, self.leaf_below(ref)) for (how, name), child, ref in edges]
        return [(*edge, leaf) for *edge, leaf in found if leaf is not None]

    def build(self, original: Any, ref: int | _Node | None) -> Any:
        leaf = self.leaf_below(ref)
        if leaf is None:
            return original
        if not isinstance(ref, _Node):
            return self.replacements[leaf]
        if id(ref) not in self.done:
            self.done[id(ref)] = _ABSENT
            self.done[id(ref)] = self.copy(ref, leaf)
        elif self.done[id(ref)] is _ABSENT:
            raise CannotRebuild(leaf, f"a {type(original).__name__} contains itself")
        return self.done[id(ref)]

    def copy(self, node: _Node, leaf: int) -> Any:
        owner = node.owner
        if isinstance(owner, MethodType):
            return MethodType(*map(self.build, node.children, node.refs))
        if type(owner) is functools.partial:
            function, *values = map(self.build, node.children, node.refs)
            count = len(owner.args)
            keywords = dict(zip(owner.keywords, values[count:], strict=True))
            copied = functools.partial(function, *values[:count], **keywords)
            vars(copied).update(vars(owner))
            return copied
        if isinstance(owner, FunctionType):
            return self.copy_function(node, owner)
        if isinstance(owner, ModuleType):
            if type(owner) is not ModuleType:
                raise CannotRebuild(leaf, f"module {owner.__name__} has a class of its own")
            module = self.done[id(node)] = ModuleType(owner.__name__)
            vars(module).update(vars(owner))
            vars(module).update({name: self.build(child, ref) for _, name, child, ref, _ in self.changes(node)})
            return module
        if isinstance(owner, type):
            kind = self.done[id(node)] = _subclass(owner, leaf)
            for how, name, child, ref, leaf in self.changes(node):
                _set_on_class(kind, owner, how, name, self.build(child, ref), leaf)
            return kind
        return self.copy_object(node, owner, leaf)

    def copy_function(self, node: _Node, fn: FunctionType) -> FunctionType:
        changes = self.changes(node)
        changed = {how: {name for other, name, *_ in changes if other == how} for how in ("cell", "global")}
        old_cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        cells = {name: CellType() if name in changed["cell"] else cell for name, cell in old_cells.items()}
        scope = dict(fn.__globals__) if changed["global"] else fn.__globals__
        new = FunctionType(fn.__code__, scope, fn.__name__, None, tuple(cells.values()))
        self.done[id(node)] = new  # before its children: it may call itself
        new.__qualname__ = fn.__qualname__
        vars(new).update(vars(fn))
        defaults, keywords = list(fn.__defaults__ or ()), dict(fn.__kwdefaults__ or {})
        targets = {"global": scope, "default": defaults, "kwdefault": keywords, "fattr": vars(new)}
        for how, name, child, ref, _ in changes:
            value = self.build(child, ref)
            if how == "cell":
                cells[name].cell_contents = value
            else:
                targets[how][name] = value  # type: ignore[index]
        new.__defaults__, new.__kwdefaults__ = tuple(defaults) or None, keywords or None
        return new

    def copy_object(self, node: _Node, obj: Any, leaf: int) -> Any:
        facts, kind, changes = _type(type(obj)), type(obj), self.changes(node)
        if not facts.complete:
            raise CannotRebuild(leaf, f"a {kind.__name__} cannot be copied")
        if any(how in ("class", "descriptor", "super") for how, *_ in changes):
            kind = _subclass(kind, leaf)  # operators and properties are looked up on the class
        if isinstance(obj, tuple):
            edges = zip(node.where, node.children, node.refs, strict=False)
            try:
                new = facts.solid.__new__(
                    kind, [self.build(child, ref) for (how, _), child, ref in edges if how == "index"]
                )
            except TypeError:
                raise CannotRebuild(leaf, f"a {kind.__name__} holds integers only") from None
        else:
            new = facts.solid.__new__(kind)
        self.done[id(node)] = new
        state, slots = _copy_state(obj, new, facts)
        for how, name, child, ref, leaf in changes:
            value = self.build(child, ref)
            if how == "slot":
                slots[name].__set__(new, value)
            elif how in ("class", "descriptor", "super"):
                _set_on_class(kind, type(obj), how, name, value, leaf)
            elif how in _TABLES:
                state[how][name] = value
            elif how == "attr":
                state[name] = value
            elif not isinstance(new, tuple):
                facts.solid.__setitem__(new, name, value)
        return new


def _copy_state(obj: Any, new: Any, facts: _Type) -> tuple[dict[str, Any], dict[str, MemberDescriptorType]]:
    """Copies `__dict__`, slots and items, without code of the user's; returns the new `__dict__` and the slots."""
    state: dict[str, Any] = {}
    if facts.has_dict:
        state = object.__getattribute__(new, "__dict__")
        state.update(object.__getattribute__(obj, "__dict__"))
    if facts.is_module:
        state.update({table: dict(state[table]) for table in _TABLES})
    if facts.solid is list:
        list.extend(new, obj)
    elif facts.solid in _DICTS:
        facts.solid.update(new, obj)
    slots: dict[str, MemberDescriptorType] = {}
    for namespace in reversed(facts.dicts):
        slots.update({name: slot for name, slot in namespace.items() if isinstance(slot, MemberDescriptorType)})
    for slot in slots.values():
        value = _read_slot(slot, obj)
        if value is not _ABSENT:
            slot.__set__(new, value)
    return state, slots


def _subclass(kind: type, leaf: int) -> type:
    """Makes a subclass that can hold changed class attributes, where that runs no code of the user's."""
    hook = getattr(kind.__init_subclass__, "__func__", None)
    if type(kind).__module__ not in ("builtins", "abc", "typing") or getattr(hook, "__module__", "typing") != "typing":
        raise CannotRebuild(leaf, f"class {kind.__name__} watches its subclasses")
    namespace = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), namespace)


def _set_on_class(kind: type, original: type, how: str, name: str, value: Any, leaf: int) -> None:
    if how == "super":
        raise CannotRebuild(leaf, f"{original.__name__}.{name} is reached through `super()`")
    old = next(vars(base)[name] for base in original.__mro__ if name in vars(base))
    if isinstance(old, property):
        value = property(value, old.fset, old.fdel)
    elif isinstance(old, (staticmethod, classmethod)):
        value = type(old)(value)
    elif isinstance(old, functools.cached_property):
        value = functools.cached_property(value)
        value.__set_name__(kind, name)
    type.__setattr__(kind, name, value)
