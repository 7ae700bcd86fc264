"""The walk: one traversal of everything that a callable can read."""

from __future__ import annotations

import functools
import numbers
import operator
import sys
import threading
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from enum import Enum
from itertools import repeat
from operator import attrgetter
from types import (
    CellType,
    FunctionType,
    MappingProxyType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
    SimpleNamespace,
    WrapperDescriptorType,
)
from typing import Any, NamedTuple

import torch

from .facts import (
    _ABSENT,
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
    _Absent,
    _At,
    _Code,
    _is_plain,
    _Parts,
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
from .holders import (
    _BUILTINS,
    _FUNC,
    _MEMO,
    _VIEWS,
    _data_of,
    _holder,
    _is_bound,
    _is_data,
    _is_numpy_array,
    _names_in,
    _numbers_of,
    _spelled,
)

_NO_NAMES: frozenset[str] = frozenset()
_INDEX: tuple[_At, ...] = tuple(("index", i) for i in range(MAX_ITEMS))
_NAMED = {"cell", "global", "fattr", "attr", "slot", "class", "super", "module", "import", *_TABLES}
_CONSTANTS = {bool, str, bytes, type(None), type(...), _Absent, torch.dtype, torch.device, torch.layout}
_KEY_TYPES = {str, int}
_LIBRARY: dict[int, ModuleType] = {}  # modules known to be opaque, kept alive
_OPAQUE = sys.stdlib_module_names | {"builtins", "torch", "numpy", "triton"}
_contents = attrgetter("cell_contents")
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter  # looked up for each captured value


class Followed(NamedTuple):
    """What a mod was seen to read that its code does not tell.

    Attributes:
        names: attributes that it reads by a computed name.
        reads: what it reads of large containers: the container's place among them, and an entry, its length or all.
    """

    names: frozenset[str] = frozenset()
    reads: tuple[tuple[int, _At], ...] = ()


NOTHING = Followed()


@functools.lru_cache(maxsize=MAX_CACHED)
def _opaque(module: str | None) -> bool:
    """Whether a module, by its name, is one that users do not change."""
    return module is not None and module.partition(".")[0] in _OPAQUE


def _run(fn: Callable, make: Any, followed: Followed = NOTHING) -> Any:
    scan, names = None, _NO_NAMES if followed is NOTHING else followed.names
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
        if followed is not NOTHING:
            for number, at in followed.reads:
                scan.extend(number, at)
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
    special: dict[int, str] = {}  # noqa: RUF012 (positions of what a copy for tracing replaces, and by what)
    too_far = ""  # the first thing that was too deep, or one object too many
    long: list[tuple[Any, int]] = []  # noqa: RUF012 (large containers and their positions)

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
            describe = _too_far
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

    def mark(self, how: str) -> None:
        """Notes that a copy for tracing puts something else in the place of what is described now."""
        if not self.special:
            self.special = {}
        self.special[len(self.seen)] = how

    def extend(self, number: int, at: _At) -> None:
        """Visits what the mod reads of a large container."""
        container, _ = self.long[number]
        children, where = self.read(container, at)
        self.each(container, children, where)

    def read(self, container: Any, at: _At) -> tuple[Sequence, Sequence[_At]]:
        """An entry of a large container, or all; what are not children goes into the key."""
        how, name = at
        if how == "len":
            self.key.append(len(container))
        elif how == "in":
            self.key.append(name in container)
        elif how == "all":
            return self.read_all(container)
        else:
            return (_entry(container, at),), (at,)
        return (), ()

    def read_all(self, container: Any) -> tuple[Sequence, Sequence[_At]]:
        """All entries of a large container."""
        if isinstance(container, (set, frozenset)):
            parts = _members_of(self, container)
        elif isinstance(container, (*_DICTS, MappingProxyType)):
            parts = _dict_parts(container)
        else:
            parts = (len(container),), [*container], [("index", i) for i in range(len(container))]
        header, children, where = parts
        self.key += header
        return children, where

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
_Describe = Callable[[_Scan, Any, _At, bool], "_Parts | None"]


def _identity(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    scan.key += ("id", id(value))
    scan.pins.append(value)
    return None


def _too_far(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    scan.too_far = scan.too_far or f"{getattr(scan, 'path', ('', ''))[0] or 'it'}"
    return _identity(scan, value, at, called)


def _refused(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    """What changes in ways that cannot be followed: a mod that uses it is refused."""
    scan.mark("refused")
    scan.pins.append(value)
    return ("refused", id(value)), (), ()


def _held(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    kind = type(value)  # a weak proxy has the attributes of what it stands for
    holder = _holder(kind)
    assert holder is not None
    if kind in _BUILTINS and not _is_bound(value):
        return _identity(scan, value, at, called)
    if kind is MappingProxyType and len(value) > MAX_ITEMS:
        return _long(scan, value)
    if kind in _VIEWS and len(value) > MAX_ITEMS:
        return _refused(scan, value, at, called)
    if kind is _MEMO:
        if at[0] in ("global", "module") and _opaque(value.__module__):
            return _identity(scan, value, at, called)
        scan.mark("memo")  # what it remembers may be older than what its function reads
    header, children, where = holder.read(value)
    return (kind, header), children, where


def _data(scan: _Scan, value: Any, at: _At, called: bool) -> _Parts | None:
    """Describes arrays, buffers and the numbers of ctypes by their contents."""
    elements = _numbers_of(value) if _is_numpy_array(type(value)) else None
    if elements is not None:
        return (type(value), value.shape, value.dtype), elements, _INDEX
    contents = _data_of(value)
    if contents is None:
        return _refused(scan, value, at, called)
    scan.key += (type(value), repr(contents) if type(contents) is float else contents)
    return None


def _set(scan: _Scan, items: set | frozenset, at: _At, called: bool) -> _Parts:
    if len(items) > MAX_ITEMS:
        return _long(scan, items)
    header, children, where = _members_of(scan, items)
    return (type(items), *header), children, where


def _members_of(scan: _Scan, items: set | frozenset) -> _Parts:
    """Numbers and strings in a set are constants; their order is part of the key, as a mod may iterate."""
    spelled = (*map(_spelled, items),)
    odd = [item for item, known in zip(items, spelled, strict=True) if known is None] if None in spelled else []
    return (spelled,), odd, [("member", i) for i in range(len(odd))]


def _long(scan: _Scan, container: Any) -> _Parts:
    """A container of which only those entries are followed that the mod reads, see `Followed`."""
    if not scan.long:
        scan.long = []
    scan.mark(f"long {len(scan.long)}")
    scan.long.append((container, len(scan.seen)))
    return ("long", type(container)), [], []


def _entry(container: Any, at: _At) -> Any:
    how, name = at
    if how == "item":
        try:
            return container[name] if isinstance(container, MappingProxyType) else dict.get(container, name, _ABSENT)
        except KeyError:
            return _ABSENT
    try:
        return next(kind for kind in _SEQUENCES if isinstance(container, kind)).__getitem__(container, name)
    except IndexError:
        return _ABSENT


def _getter(scan: _Scan, getter: Any, at: _At, called: bool) -> None:
    scan.learn(_names_in(getter))
    _identity(scan, getter, at, called)


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
    if not (fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__ or facts.is_odd):
        return ("function", id(code)), children, facts.where
    if facts.hides:
        scan.mark("function")
    imports = [name for given in facts.imports for name in _import_names(fn, *given)]
    children += [sys.modules.get(name, _ABSENT) for name in imports]
    defaults, keywords, attributes = fn.__defaults__ or (), fn.__kwdefaults__ or {}, fn.__dict__
    named = [name for name in _view(scan.names).attributes if name in attributes]
    scan.looked = scan.looked or bool(attributes)
    children += [*defaults, *keywords.values(), *[attributes[name] for name in named]]
    where = [
        *facts.where,
        *[("import", name) for name in imports],
        *[("default", i) for i in range(len(defaults))],
        *[("kwdefault", k) for k in keywords],
    ]
    where += [("fattr", name) for name in named]
    return ("function", id(code), (len(defaults), *keywords, None, *named)), children, where


def _import_names(fn: FunctionType, name: str, dots: int) -> tuple[str, ...]:
    """The modules that an import inside a function reads: the one it names, and the one above, which it may bind."""
    if dots:
        package = (fn.__globals__.get("__package__") or "").split(".")
        name = ".".join([*package[: len(package) - dots + 1], *filter(None, [name])])
    return (name,) if "." not in name else (name, name.partition(".")[0])


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


def _sequence(scan: _Scan, items: Sequence, at: _At, called: bool) -> _Parts:
    if len(items) > MAX_ITEMS:
        return _long(scan, items)
    return (type(items), len(items)), items, _INDEX


def _dictionary(scan: _Scan, items: Mapping, at: _At, called: bool) -> _Parts:
    if len(items) > MAX_ITEMS:
        return _long(scan, items)
    if _KEY_TYPES.issuperset(map(type, items)) and type(items) is not defaultdict:
        return (type(items), tuple(items)), [*items.values()], [("item", key) for key in items]
    header, children, where = _dict_parts(items)
    return (type(items), *header), children, where


def _dict_parts(items: Mapping) -> _Parts:
    """The entries of a dict with keys of any type: what a key does not spell is visited as well."""
    spelled = (*map(_spelled, items),)
    odd = [key for key, known in zip(items, spelled, strict=True) if known is None] if None in spelled else []
    children = [*dict.values(items)] if isinstance(items, dict) else [*items.values()]
    where: list[_At] = [("item", key) for key in items]
    where += [("key", i) for i in range(len(odd))]
    if isinstance(items, defaultdict):
        odd.append(items.default_factory)
        where.append(("factory", None))
    return (spelled,), [*children, *odd], where


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
    if isinstance(obj, threading.local):
        state = obj.__dict__  # of this thread
    hooks = [name for name in _HOOKS if state.get(name)] if facts.is_module else ()
    return _attributes(scan, obj, type(obj), facts, state, hooks, called)


def _attributes(
    scan: _Scan, obj: Any, kind: type, facts: _Type, state: Mapping, extra: Sequence[str], called: bool
) -> _Parts:
    """Describes what the code names of an object or class, with what its methods name in turn."""
    while True:
        names, operators = scan.names, (*facts.operators, *extra) if called else facts.getters
        view = _view(names)
        children, where = _members(obj, facts, state, view, operators)
        if view.whole and (called or "__dict__" in names) and obj is not kind and not facts.is_module:
            _add_attributes(obj, facts, state, view, children, where)
        methods = [(_code(c), how) for c, (how, _) in zip(children, where, strict=True) if type(c) is FunctionType]
        for code, _ in methods:
            scan.learn(code.names)
        if not called and any(code.uses_self and how in ("class", "super") for code, how in methods):
            called = True
        elif names is scan.names:
            break
    scan.looked = True
    by_identity = facts.dynamic or view.reflective
    if obj is not kind and facts.solid in _CONTAINERS:
        _add_items(scan, obj, facts.solid, children, where)
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


def _add_attributes(obj: Any, facts: _Type, state: Mapping, view: _View, children: list[Any], where: list[_At]) -> None:
    """Adds the attributes of an instance that the code does not name, where it may read all (`vars(cfg)`)."""
    slots = {
        name: slot
        for namespace in facts.dicts
        for name, slot in namespace.items()
        if isinstance(slot, MemberDescriptorType)
    }
    for name in state:
        if name not in view.attributes and name not in slots:
            children.append(state[name])
            where.append(("attr", name))
    for name, slot in slots.items():
        if name not in view.attributes:
            children.append(_read_slot(slot, obj))
            where.append(("slot", name))


def _add_items(scan: _Scan, obj: Any, solid: Any, children: list[Any], where: list[_At]) -> None:
    """Adds the items of an instance of a container class, or those that the mod reads if there are many."""
    if solid.__len__(obj) > MAX_ITEMS:
        _long(scan, obj)
    elif solid in _DICTS:
        _, values, places = _dict_parts(obj)
        children += values
        where += places
    else:
        children += solid.__iter__(obj)
        where += _INDEX[: solid.__len__(obj)]


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
    **dict.fromkeys((set, frozenset), _set),
    **dict.fromkeys((operator.attrgetter, operator.methodcaller), _getter),
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
    if _holder(kind) is not None:
        return _held
    if _is_data(kind):
        return _data
    if isinstance(getattr(kind, "__next__", None), WrapperDescriptorType):  # generators, iterators, files
        return _refused
    if kind.__module__ == "logging":
        return _identity
    if issubclass(kind, threading.local):
        return _object
    if issubclass(kind, Enum) or not (kind.__flags__ & _HEAP or kind is SimpleNamespace):
        return _identity
    return _object
