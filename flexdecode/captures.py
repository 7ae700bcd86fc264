"""What a mod captures, read afresh at every call in a few microseconds.

`walk` follows everything that the code of a callable can read: closure cells, defaults, `functools.partial` arguments,
the `self` of methods and callable objects, and the globals and attributes that the code names, through functions,
containers, objects and the user's own modules. Tensors and finite numbers are *leaves*; everything else goes into the
*key*. Equal keys mean equal behaviour as a function of the leaves.

    >>> W = 128
    >>> key, leaves = walk(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < W)
    >>> leaves
    [128]

Not seen, hence frozen at the first call: attributes whose name the code does not spell (`getattr(cfg, name)`, `vars`,
a class with `__getattr__`; such objects count by identity), modules imported inside a mod, what C objects (numpy
arrays, `lru_cache`, sets) hold, and containers of more than 64 entries.
"""

from __future__ import annotations

import dis
import functools
import numbers
import struct
import sys
from collections import OrderedDict
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from enum import Enum
from itertools import repeat
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
        steps = [step for step in dis.get_instructions(inner) if step.opname != "CACHE"]
        for step, after in zip(steps, steps[1:], strict=False):
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


@functools.lru_cache(maxsize=MAX_CACHED)
def _view(names: frozenset[str]) -> _View:
    attributes = tuple(sorted(name for name in names if not name.endswith("()")))
    return _View(attributes, not names.isdisjoint(_REFLECTION), "super()" in names)


@functools.lru_cache(maxsize=MAX_CACHED)
def _union(names: frozenset[str], more: frozenset[str]) -> frozenset[str]:
    return names if more <= names else names | more


# --- What a type says about its instances ----------------------------------------------------------------------------

_POINTER = struct.calcsize("P")
_HEAP, _MANAGED_DICT, _MANAGED_WEAKREF = 1 << 9, 1 << 4, 1 << 3  # type flags: made by a class statement, and layout
_SOLID = (object, SimpleNamespace, tuple, torch.Size, list, dict, OrderedDict)
_SEQUENCES, _DICTS = (tuple, torch.Size, list), (dict, OrderedDict)
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
        operators: methods that syntax alone reaches: `__call__`, `__getitem__`, ..., and `forward` of a module.
        solid: the built-in class that determines the layout.
        has_dict: whether instances have a `__dict__`.
        is_module: whether it is an `nn.Module`.
        dynamic: whether named attributes may not tell everything, so that instances count by identity.
        complete: whether an instance is its `__dict__`, slots and items, so that it can be copied.
    """

    lineage: tuple[type, ...]
    dicts: tuple[Mapping[str, Any], ...]
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
    operators = set(("forward", *_HOOKS) if is_module else ())
    for namespace in dicts:
        skipped = _NOT_OPERATORS | (_GENERATED if "__dataclass_fields__" in namespace else set())
        named = [name for name, value in namespace.items() if isinstance(_plain(value), FunctionType)]
        operators |= {name for name in named if name.startswith("__") and name.endswith("__")} - skipped
    slots = sum(isinstance(value, MemberDescriptorType) for namespace in dicts for value in namespace.values())
    in_dict = bool(kind.__dictoffset__) and not solid.__dictoffset__ and not kind.__flags__ & _MANAGED_DICT
    weak = bool(kind.__weakrefoffset__) and not solid.__weakrefoffset__ and not kind.__flags__ & _MANAGED_WEAKREF
    # Bytes that neither slots nor a `__dict__` explain are state that only C code can see.
    hidden = kind.__basicsize__ - solid.__basicsize__ - _POINTER * (slots + in_dict + weak)
    transparent = solid in _SOLID and hidden <= 0
    facts = _Type(
        lineage=mro,
        dicts=tuple(dicts),
        operators=tuple(sorted(operators)),
        solid=solid,
        has_dict=bool(kind.__dictoffset__),
        is_module=is_module,
        dynamic=not transparent or not operators.isdisjoint({"__getattr__", "__getattribute__"}),
        complete=transparent and not hasattr(kind, "__del__"),  # a copy would be finalised, too
    )
    return _remember(_TYPES, kind, facts)


def _plain(value: Any) -> Any:
    """Returns what runs when a class attribute is read: the function in a property, static or class method."""
    if isinstance(value, property):
        return value.fget
    if isinstance(value, (staticmethod, classmethod)):
        return value.__func__
    return value.func if isinstance(value, functools.cached_property) else value


_CODES: dict[int, _Code] = {}
_TYPES: dict[type, _Type] = {}


def _remember(cache: dict, key: Any, facts: Any) -> Any:
    if len(cache) >= MAX_CACHED:  # classes and code made in a loop: start over, the facts are cheap to find again
        cache.clear()
    cache[key] = facts
    return facts


# --- The walk --------------------------------------------------------------------------------------------------------


class _Absent:
    """Stands for an empty closure cell, an unset slot, and a global that is not there (a builtin)."""


_ABSENT = _Absent()
_ROOT: _At = ("root", None)
_FUNC: _At = ("func", None)
_INDEX: tuple[_At, ...] = tuple(("index", i) for i in range(MAX_ITEMS))
_METHODS: dict[bool, tuple[_At, ...]] = {bare: (_FUNC, ("self", bare)) for bare in (False, True)}
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
    scan = make(frozenset())
    if type(fn) is FunctionType:  # the common case, spared two calls
        scan.function(fn, _ROOT)
    else:
        _Scan.each(scan, None, (fn,), (_ROOT,))
    while scan.stale:  # a helper named attributes of an object that was visited before: look again with all names
        scan = make(scan.names)
        _Scan.each(scan, None, (fn,), (_ROOT,))
    return scan


class _Scan:
    """One traversal. A visited thing appends a marker and then a number of items that the marker fixes.

    So no two structures make the same key. Visits return the position of the visited function, container or object in
    the order of first visits, None for other things.
    """

    depth = 0
    count = 0
    looked = False  # whether attributes were looked up with the present names
    stale = False

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.key: list = []
        self.leaves: list = []
        self.pins: list = []
        self.seen: dict[int, int] = {}

    def each(self, owner: Any, children: Sequence, where: Sequence[_At]) -> int | None:
        """Visits the children of `owner`; returns what the last visit returned."""
        key, leaves, position = self.key, self.leaves, None
        for child, at in zip(children, where):  # noqa: B905 (equal lengths; `strict` costs time for each token)
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
        if self.depth >= MAX_DEPTH or self.count >= MAX_OBJECTS:
            return self.identity(value)
        handler = _HANDLERS.get(kind) or _remember(_HANDLERS, kind, _handler(kind))
        self.depth += 1
        position = handler(self, value, at)
        self.depth -= 1
        return position

    def enter(self, mark: int) -> int | None:
        """Returns None at the first visit; later writes a back reference and returns the position."""
        position = self.seen.get(mark)
        if position is None:
            self.seen[mark] = self.count
            self.count += 1
        else:
            self.key += ("back", position)
        return position

    def identity(self, value: Any) -> None:
        self.key += ("id", id(value))
        self.pins.append(value)

    def representation(self, value: Any, at: _At) -> None:
        """Of values for which == is not enough: inf and nan, complex numbers, numpy scalars that are not numbers."""
        self.key += (type(value), "repr", repr(value))

    def tensor(self, value: torch.Tensor, at: _At) -> None:
        self.key += ("tensor", id(type(value)), value.dtype, value.ndim, value.device, value.requires_grad)
        self.pins.append(type(value))
        self.leaves.append(value)

    def numpy_number(self, value: Any, at: _At) -> None:
        number = int(value) if isinstance(value, numbers.Integral) else float(value)
        if number - number != 0:
            return self.representation(value, at)
        self.key += (type(value), "number")
        self.leaves.append(number)

    def learn(self, names: frozenset[str]) -> None:
        union = _union(self.names, names)
        if union is not self.names:
            self.names = union
            self.stale = self.stale or self.looked

    def is_called(self, at: _At) -> bool:
        """Whether the code may use more of a thing than attributes that it names: call it, index it, compute with it.

        Otherwise `forward` of a whole model would be walked because a mod reads `self.window`.
        """
        how, name = at
        return name if how == "self" else how not in _NAMED or f"{name}()" in self.names

    def function(self, fn: FunctionType, at: _At) -> int | None:
        if at[0] in ("global", "module") and _opaque(fn.__module__):
            # What torch's own `and_masks` returns lives in torch and holds the user's mods.
            if fn.__closure__ is None or not fn.__module__.startswith("torch.nn.attention"):
                return self.identity(fn)
        if id(fn) in self.seen:
            return self.enter(id(fn))
        code = fn.__code__
        facts = _CODES.get(id(code)) or _read_code(code)
        position = self.seen[id(fn)] = self.count
        self.count += 1
        if not self.names:
            self.names = facts.names
        elif facts.names is not self.names:
            self.learn(facts.names)
        self.key += ("function", id(code))
        self.pins.append(code)
        cells, children = fn.__closure__, []
        if cells:
            try:
                children += map(_contents, cells)
            except ValueError:  # an empty cell
                children = [_read_cell(cell) for cell in cells]
        children += map(fn.__globals__.get, facts.global_names, repeat(_ABSENT))
        where: Sequence[_At] = facts.where
        if fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__:
            defaults, keywords, attributes = fn.__defaults__ or (), fn.__kwdefaults__ or {}, fn.__dict__
            named = [name for name in _view(self.names).attributes if name in attributes]
            self.looked = self.looked or bool(attributes)
            self.key.append((len(defaults), *keywords, None, *named))
            children += [*defaults, *keywords.values(), *[attributes[name] for name in named]]
            where = [*where, *[("default", i) for i in range(len(defaults))], *[("kwdefault", k) for k in keywords]]
            where += [("fattr", name) for name in named]
        self.each(fn, children, where)
        return position

    def method(self, method: MethodType, at: _At) -> int | None:
        position = self.enter(id(method))
        if position is None:
            position, function = self.count - 1, method.__func__
            self.key.append("method")
            bare = not isinstance(function, FunctionType) or _code(function).uses_self
            self.each(method, (function, method.__self__), _METHODS[bare])
        return position

    def partial(self, call: functools.partial, at: _At) -> int | None:
        position = self.enter(id(call))
        if position is None:
            position, keywords = self.count - 1, call.keywords
            self.key += ("partial", len(call.args), tuple(keywords))
            where = [_FUNC, *[("argument", i) for i in range(len(call.args))], *[("keyword", k) for k in keywords]]
            self.each(call, [call.func, *call.args, *keywords.values()], where)
        return position

    def sequence(self, items: Sequence, at: _At) -> int | None:
        if len(items) > MAX_ITEMS:
            return self.identity(items)
        position = self.enter(id(items))
        if position is None:
            position = self.count - 1
            self.key += (type(items), len(items))
            self.each(items, items, _INDEX)
        return position

    def dictionary(self, items: Mapping, at: _At) -> int | None:
        if len(items) > MAX_ITEMS or not _KEY_TYPES.issuperset(map(type, items)):
            return self.identity(items)
        position = self.enter(id(items))
        if position is None:
            position = self.count - 1
            self.key += (type(items), tuple(items))
            self.each(items, [*items.values()], [("item", key) for key in items])
        return position

    def module(self, module: ModuleType, at: _At) -> int | None:
        state = vars(module)
        if _opaque(state.get("__name__")):
            _LIBRARY[id(module)] = module
            self.key += (ModuleType, id(module))
            return None
        position = self.enter(id(module))
        if position is None:
            position, self.looked = self.count - 1, True
            where = [("module", name) for name in _view(self.names).attributes if name in state]
            self.pins.append(module)
            self.key += ("module", id(module), len(where), *where)
            self.each(module, [state[name] for _, name in where], where)
        return position

    def class_(self, kind: type, at: _At) -> int | None:
        if _opaque(kind.__module__) or issubclass(kind, Enum):
            return self.identity(kind)
        facts = _type(kind)
        extra = (*facts.operators, *_CONSTRUCTORS)
        return self.attributes(kind, kind, facts, {}, extra, at)

    def object(self, obj: Any, at: _At) -> int | None:
        facts = _type(type(obj))
        state = object.__getattribute__(obj, "__dict__") if facts.has_dict else {}
        return self.attributes(obj, type(obj), facts, state, facts.operators, at)

    def attributes(
        self, obj: Any, kind: type, facts: _Type, state: Mapping, operators: tuple[str, ...], at: _At
    ) -> int | None:
        """Visits what the code names of an object or class."""
        mark, called = id(obj), self.is_called(at)
        # One object is two things: used as a whole, and as a holder of attributes only (odd, as ids are even).
        position = self.seen.get(mark if called else mark + 1)
        if position is not None:
            self.key += ("back", position)
            return position
        while True:
            names, was_called = self.names, called
            view = _view(names)
            children, where = _members(obj, facts, state, view, operators if called else ())
            for child, (how, _) in zip(children, where, strict=True):
                if type(child) is FunctionType and how in ("class", "super"):
                    code = _code(child)
                    self.learn(code.names)
                    called = called or code.uses_self
            if names is self.names and called is was_called:
                break
        self.looked = True
        by_identity = facts.dynamic or view.reflective
        if obj is not kind:
            by_identity |= _add_items(obj, facts.solid, children, where)
        position = self.seen[mark + 1] = self.count
        if called:
            self.seen[mark] = position
        self.count += 1
        self.pins += (obj, kind) if by_identity else (kind,)
        self.key += ("object", id(kind), obj is kind, id(obj) if by_identity else 0, len(where), *where)
        self.each(obj, children, where)
        return position


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


def _members(
    obj: Any, facts: _Type, state: Mapping, view: _View, operators: tuple[str, ...]
) -> tuple[list[Any], list[_At]]:
    """Finds attributes as Python would, without running a property or `__getattr__`."""
    children: list[Any] = []
    where: list[_At] = []
    for name in (*operators, *view.attributes):
        found = [namespace[name] for namespace in facts.dicts if name in namespace]
        if found and isinstance(found[0], MemberDescriptorType) and not isinstance(obj, type):
            children.append(_read_slot(found[0], obj))
            where.append(("slot", name))
        elif name in state and not (found and hasattr(type(found[0]), "__set__")):  # properties go before the dict
            children.append(state[name])
            where.append(("attr", name))
        elif found:
            children.append(_plain(found[0]))
            where.append(("class", name))
        elif facts.is_module:
            for table in _TABLES:
                if name in state.get(table, ()):
                    children.append(state[table][name])
                    where.append((table, name))
                    break
        if view.uses_super:
            children += map(_plain, found[1:])
            where += [("super", name)] * len(found[1:])
    return children, where


def _add_items(obj: Any, solid: type, children: list[Any], where: list[_At]) -> bool:
    """Adds the items of an instance of a container class; returns whether there are items that cannot be listed."""
    if solid not in _SEQUENCES and solid not in _DICTS:
        return False
    if len(obj) > MAX_ITEMS or (solid in _DICTS and not _KEY_TYPES.issuperset(map(type, dict.keys(obj)))):
        return True
    children += solid.values(obj) if solid in _DICTS else solid.__iter__(obj)  # type: ignore[attr-defined]
    where += [("item", key) for key in solid.__iter__(obj)] if solid in _DICTS else _INDEX[: len(obj)]  # type: ignore[attr-defined]
    return False


def _identity(scan: _Scan, value: Any, at: _At) -> None:
    scan.identity(value)


def _handler(kind: type) -> Callable[[_Scan, Any, _At], int | None]:
    """Chooses how values of a type that is not in the table are visited."""
    if issubclass(kind, torch.Tensor):
        return _Scan.tensor
    if issubclass(kind, ModuleType):
        return _Scan.module
    if issubclass(kind, type):
        return _Scan.class_
    if kind.__module__ == "numpy" and issubclass(kind, numbers.Real):
        return _Scan.numpy_number
    if issubclass(kind, Enum) or not (kind.__flags__ & _HEAP or kind in _SOLID):
        return _identity
    return _Scan.object


_HANDLERS: dict[type, Callable[[_Scan, Any, _At], int | None]] = {
    FunctionType: _Scan.function,
    MethodType: _Scan.method,
    functools.partial: _Scan.partial,
    tuple: _Scan.sequence,
    list: _Scan.sequence,
    torch.Size: _Scan.sequence,
    dict: _Scan.dictionary,
    OrderedDict: _Scan.dictionary,
    float: _Scan.representation,
    complex: _Scan.representation,
}


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

    path = ""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.nodes: list[_Node] = []
        self.leaf_names: list[str] = []

    def each(self, owner: Any, children: Sequence, where: Sequence[_At]) -> int | None:
        node = _Node(owner, children, where, [])
        self.nodes.append(node)
        path = self.path
        for child, at in zip(children, where, strict=False):
            self.path = _spell(path, owner, at)
            leaf = len(self.leaves)
            position = super().each(owner, (child,), (at,))
            if position is not None:
                node.refs.append(self.nodes[position])
            else:
                is_leaf = len(self.leaves) > leaf
                node.refs.append(leaf if is_leaf else None)
                self.leaf_names += [self.path] * is_leaf
        self.path = path
        return None


def _spell(path: str, owner: Any, at: _At) -> str:
    how, name = at
    inside = f" (in {path})" if path else ""
    if how == "default":
        code = owner.__code__
        name = code.co_varnames[code.co_argcount - len(owner.__defaults__) + name]
    if how in ("cell", "global", "default", "kwdefault"):
        return f"{name}{inside}"
    if how in ("argument", "keyword"):
        return f"partial {how} {name!r}{inside}"
    if how in ("index", "item"):
        return f"{path or 'self'}[{name!r}]"
    if how == "self":
        return f"{path}.__self__" if path else "self"
    if how == "func" or name == "forward" or (name.startswith("__") and name.endswith("__")):
        return path  # what runs when the owner is called or used with an operator
    return f"{path or (owner.__name__ if how == 'fattr' else 'self')}.{name}"


class _Rebuilder:
    """Copies the nodes from which a replaced leaf can be reached."""

    def __init__(self, nodes: list[_Node], replacements: Mapping[int, object]) -> None:
        self.replacements = replacements
        self.done: dict[int, Any] = {}
        self.changed: dict[int, int] = {}  # by id of the node, a replaced leaf below it
        size = -1
        while size != len(self.changed):  # until nothing is added: cycles need more than one round
            size = len(self.changed)
            for node in reversed(nodes):
                for ref in node.refs:
                    leaf = self.leaf_below(ref)
                    if leaf is not None:
                        self.changed.setdefault(id(node), leaf)

    def leaf_below(self, ref: int | _Node | None) -> int | None:
        if isinstance(ref, int):
            return ref if ref in self.replacements else None
        return None if ref is None else self.changed.get(id(ref))

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
            return MethodType(*self.values(node))
        if type(owner) is functools.partial:
            function, *values = self.values(node)
            count = len(owner.args)
            copied = functools.partial(
                function, *values[:count], **dict(zip(owner.keywords, values[count:], strict=True))
            )
            vars(copied).update(vars(owner))
            return copied
        if isinstance(owner, FunctionType):
            return self.copy_function(node, owner)
        if isinstance(owner, ModuleType):
            if type(owner) is not ModuleType:
                raise CannotRebuild(leaf, f"module {owner.__name__} has a class of its own")
            module = self.done[id(node)] = ModuleType(owner.__name__)
            vars(module).update(vars(owner))
            for name, value, _ in self.changes(node):
                vars(module)[name[1]] = value
            return module
        if isinstance(owner, type):
            kind = self.done[id(node)] = _subclass(owner, leaf)
            for at, value, changed in self.changes(node):
                _set_on_class(kind, owner, at, value, changed)
            return kind
        return self.copy_object(node, owner, leaf)

    def values(self, node: _Node) -> list[Any]:
        return [self.build(child, ref) for child, ref in zip(node.children, node.refs, strict=True)]

    def changes(self, node: _Node) -> list[tuple[_At, Any, int]]:
        """Lists the children that change: how each is reached, what it becomes, and a leaf in it."""
        edges = zip(node.where, node.children, node.refs, strict=False)
        found = [(at, child, ref, self.leaf_below(ref)) for at, child, ref in edges]
        return [(at, self.build(child, ref), leaf) for at, child, ref, leaf in found if leaf is not None]

    def copy_function(self, node: _Node, fn: FunctionType) -> FunctionType:
        changed = {at: self.leaf_below(ref) for at, ref in zip(node.where, node.refs, strict=True)}
        leaf = changed.get(("cell", "__class__"))
        if leaf is not None:
            raise CannotRebuild(leaf, "`super()` needs the original class")
        cells = {
            name: CellType() if changed["cell", name] is not None else cell
            for name, cell in zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        }
        globals_changed = any(how == "global" and leaf is not None for (how, _), leaf in changed.items())
        scope = dict(fn.__globals__) if globals_changed else fn.__globals__
        new = FunctionType(fn.__code__, scope, fn.__name__, None, tuple(cells.values()))
        self.done[id(node)] = new  # before its children: it may call itself
        new.__qualname__ = fn.__qualname__
        vars(new).update(vars(fn))
        defaults, keywords = list(fn.__defaults__ or ()), dict(fn.__kwdefaults__ or {})
        for (how, name), value, _ in self.changes(node):
            if how == "cell":
                cells[name].cell_contents = value
            else:
                targets: dict[str, Any] = {"global": scope, "default": defaults, "kwdefault": keywords}
                targets.get(how, vars(new))[name] = value
        new.__defaults__, new.__kwdefaults__ = tuple(defaults) or None, keywords or None
        return new

    def copy_object(self, node: _Node, obj: Any, leaf: int) -> Any:
        original = type(obj)
        facts, kind = _type(original), original
        if not facts.complete:
            raise CannotRebuild(leaf, f"a {original.__name__} cannot be copied")
        if any(how in ("class", "super") and self.leaf_below(ref) is not None for (how, _), ref in _edges(node)):
            # A class of its own, because operators and properties are looked up on the class.
            kind = _subclass(original, leaf)
        if issubclass(original, tuple):
            items = [self.build(c, r) for c, at, r in zip(node.children, node.where, node.refs) if at[0] == "index"]
            try:
                new = facts.solid.__new__(kind, items)
            except TypeError:
                raise CannotRebuild(leaf, f"a {original.__name__} holds integers only") from None
        else:
            new = facts.solid.__new__(kind)
        self.done[id(node)] = new
        self.fill(node, obj, new, facts)
        return new

    def fill(self, node: _Node, obj: Any, new: Any, facts: _Type) -> None:
        state: MutableMapping = object.__getattribute__(new, "__dict__") if facts.has_dict else {}
        if facts.has_dict:
            state.update(object.__getattribute__(obj, "__dict__"))
        if facts.is_module:
            state.update({table: dict(state[table]) for table in _TABLES})
        if facts.solid is list:
            list.extend(new, obj)
        elif facts.solid in _DICTS:
            facts.solid.update(new, obj)
        slots = {}
        for namespace in reversed(facts.dicts):
            slots.update({n: slot for n, slot in namespace.items() if isinstance(slot, MemberDescriptorType)})
        for slot in slots.values():
            value = _read_slot(slot, obj)
            if value is not _ABSENT:
                slot.__set__(new, value)
        for (how, name), value, leaf in self.changes(node):
            if how == "slot":
                slots[name].__set__(new, value)
            elif how in ("class", "super"):
                _set_on_class(type(new), type(obj), (how, name), value, leaf)
            elif how in _TABLES:
                state[how][name] = value
            elif how == "attr":
                state[name] = value
            elif not isinstance(new, tuple):
                facts.solid.__setitem__(new, name, value)


def _edges(node: _Node) -> Any:
    return zip(node.where, node.refs, strict=False)


def _subclass(kind: type, leaf: int) -> type:
    """Makes a subclass that can hold changed class attributes, where that runs no code of the user's."""
    hook = getattr(kind.__init_subclass__, "__func__", None)
    if type(kind).__module__ not in ("builtins", "abc", "typing") or getattr(hook, "__module__", "typing") != "typing":
        raise CannotRebuild(leaf, f"class {kind.__name__} watches its subclasses")
    namespace = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), namespace)


def _set_on_class(kind: type, original: type, at: _At, value: Any, leaf: int) -> None:
    how, name = at
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
