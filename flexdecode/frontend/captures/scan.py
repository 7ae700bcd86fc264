"""The walk: one traversal of everything that a callable can read."""

from __future__ import annotations

import array
import functools
import numbers
import operator
import sys
import threading
import types
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from enum import Enum
from itertools import repeat
from types import FunctionType, ModuleType
from typing import Any, NamedTuple

import torch

from . import classes, code, holders
from .classes import CONTAINERS, TABLES, is_plain, plain
from .code import ABSENT, CODES, MAX_DEPTH, MAX_ITEMS, MAX_OBJECTS, At, Edge, Parts, code_of, opaque, view
from .holders import FUNC, INDEX, MEMO, VIEWS

_NO_NAMES: frozenset[str] = frozenset()
_NAMED = {"cell", "global", "fattr", "attr", "slot", "class", "super", "module", "import", *TABLES}
_CONSTANTS = {bool, str, bytes, type(None), type(...), code.Absent, torch.dtype, torch.device, torch.layout}
_LIBRARY: dict[int, ModuleType] = {}  # modules known to be opaque, kept alive
_HOOKS = ("_forward_hooks", "_forward_pre_hooks")
_contents = operator.attrgetter("cell_contents")
_Tensor, _Parameter = torch.Tensor, torch.nn.Parameter  # module variables are faster than attributes


class Followed(NamedTuple):
    """Reads of a mod that its code does not show and that a trace found.

    Attributes:
        names: attributes that it reads by a computed name.
        reads: reads of large containers: the number of the container, and what is read: an entry, its length or all.
    """

    names: frozenset[str] = _NO_NAMES
    reads: tuple[tuple[int, At], ...] = ()


NOTHING = Followed()


class Scan:
    """One traversal.

    Each visited value appends a marker to the key, and then a number of items that the marker determines. So different
    structures never make the same key. `visit` and `each` return the position of the last visited value with children
    (a function, container or object) in the order of first visits; None for leaves and constants.

    Attributes:
        names: the names in the code that was visited so far, see `Code.names`.
        key: everything that is not a leaf.
        leaves: tensors and finite numbers.
        pins: the objects whose ids are in the key.
        seen: positions of the visited values, by id.
        special: by position, the values that a copy for tracing replaces: the place of a large container in `long`, or
            a word.
        long: large containers and their positions.
        depth: depth of the traversal.
        looked: whether attributes were looked up with `names`.
        stale: whether `names` grew after that. Visited objects may then have more attributes to visit.
        too_far: the first object that was too deep or beyond the limit of objects.
        path: how the current value is reached, for people; only a `_Recorder` keeps it.
    """

    depth = 0
    looked = stale = False
    too_far = ""
    path = ("", "")

    def __init__(self, names: frozenset[str]) -> None:
        self.names = names
        self.key: list = []
        self.leaves: list = []
        self.pins: list = []
        self.seen: dict[int, int] = {}
        self.special: dict[int, int | str] = {}
        self.long: list[tuple[Any, int]] = []

    def each(self, owner: Any, edges: Iterable[Edge], position: int) -> int | None:
        """Visits the children of `owner`, which has this position. A `_Recorder` notes them there."""
        key, leaves, last = self.key, self.leaves, None
        for at, child in edges:
            kind = type(child)
            if kind is _Tensor or kind is _Parameter:
                key += (child.dtype, child.ndim, child.device, child.requires_grad, child.layout)
                leaves.append(child)
            elif kind is int or (kind is float and child - child == 0.0):  # false for inf and nan
                key.append(kind)
                leaves.append(child)
            elif kind is ModuleType and id(child) in _LIBRARY:
                key += (kind, id(child))
            elif kind in _CONSTANTS:
                key += (kind, child)
            else:
                last = self.visit(child, kind, at)
        return last

    def visit(self, value: Any, kind: type, at: At) -> int | None:
        """Visits a value that may have children."""
        describe = _choose(kind)
        called = (describe is not _object and describe is not _class) or self.is_called(at)
        # An object has two marks: one if the code uses it as a whole, one if only its attributes (odd: ids are even).
        mark = id(value) if called else id(value) + 1
        position = self.seen.get(mark)
        if position is not None:
            self.key += ("back", position)
            return position
        if self.depth >= MAX_DEPTH or len(self.seen) >= MAX_OBJECTS:
            self.too_far = self.too_far or self.path[0] or "it"
            describe = _identity
        parts = describe(self, value, at, called)
        if parts is None:
            return None
        header, edges = parts
        position = self.seen[mark] = len(self.seen)
        self.key += header
        self.depth += 1
        self.each(value, edges, position)
        self.depth -= 1
        return position

    def mark(self, how: int | str) -> None:
        """Notes that a copy for tracing replaces the value that is described now."""
        self.special[len(self.seen)] = how

    def extend(self, number: int, at: At) -> None:
        """Visits the part of a large container that the mod reads."""
        container, position = self.long[number]
        header, edges = holders.part_of(container, at)
        self.key += header
        self.each(container, edges, position)

    def is_called(self, at: At) -> bool:
        """Whether the code may do more with a value than read attributes by name: call it, index it, compute with it.

        Without this check, a mod that reads `self.window` would lead into `forward` of a whole model.
        """
        how, name = at
        return name if how == "self" else how not in _NAMED or f"{name}()" in self.names

    def learn(self, names: frozenset[str]) -> None:
        """Adds to the attribute names that are looked up on objects."""
        if not names <= self.names:
            self.names = code.union(self.names, names) if self.names else names
            self.stale = self.stale or self.looked


def run(fn: Callable, make: Any, followed: Followed) -> Any:
    """Traverses `fn` with a scan from `make`. Repeats this while its code names attributes of values visited before."""
    kind: type = type(fn)
    describe: Any = _function if kind is FunctionType else _choose(kind)  # saves a call
    scan = make(followed.names)
    while True:
        parts = describe(scan, fn, FUNC, True)
        if parts is not None:  # as in `visit`, without the checks that only deeper levels need
            scan.key += parts[0]
            scan.seen[id(fn)] = 0
            scan.each(fn, parts[1], 0)
        if followed is not NOTHING:
            for number, at in followed.reads:
                scan.extend(number, at)
        if not scan.stale:
            return scan
        scan = make(scan.names)


def read(fn: Callable, followed: Followed = NOTHING) -> tuple[tuple, list, bool]:
    """Reads what `fn` captures.

    Returns:
        The key, the leaves, and whether `fn` may read more than its code shows, see `Followed`. The key is a hashable
        tuple. The leaves are captured tensors and finite numbers in a deterministic order. The key holds ids: code that
        stores it must also store `pins(fn)`, so that no id is used again.
    """
    scan = run(fn, Scan, followed)
    leaves = scan.leaves
    if len(leaves) > 1 and len(set(map(id, leaves))) < len(leaves):
        # Two names of one tensor are one value to the tracer, but may be two tensors at the next call. So the key
        # depends on it. Equal numbers may also be one object, but they stay separate.
        ids = [id(leaf) for leaf in leaves if leaf.__class__ is not int and leaf.__class__ is not float]
        if len(set(ids)) < len(ids):
            scan.key += ("alias", *map(ids.index, ids))
    return tuple(scan.key), leaves, bool(scan.special)


def pins(fn: Callable, followed: Followed = NOTHING) -> list:
    """Returns the objects whose ids are in the key of `fn` (code objects, types, objects that count by identity)."""
    return run(fn, Scan, followed).pins


# --- Descriptions ----------------------------------------------------------------------------------------------------
# Each function describes a value by its part of the key and its children. For a value without children it writes to
# the scan and returns None.

_Describe = Callable[[Scan, Any, At, bool], "Parts | None"]


def _identity(scan: Scan, value: Any, at: At, called: bool) -> Parts | None:
    scan.key += ("id", id(value))
    scan.pins.append(value)
    return None


def _refused(scan: Scan, value: Any, at: At, called: bool) -> Parts:
    """Describes a value whose changes cannot be followed. A mod that uses it is refused."""
    scan.mark("refused")
    scan.pins.append(value)
    return ("refused", id(value)), ()


def _representation(scan: Scan, value: Any, at: At, called: bool) -> None:
    """Writes a value that `==` alone does not identify: inf and nan, complex numbers, ranges."""
    scan.key += (type(value), "repr", repr(value))


def _tensor(scan: Scan, value: torch.Tensor, at: At, called: bool) -> None:
    scan.key += ("tensor", id(type(value)), value.dtype, value.ndim, value.device, value.requires_grad, value.layout)
    scan.pins.append(type(value))
    scan.leaves.append(value)


def _numpy_number(scan: Scan, value: Any, at: At, called: bool) -> None:
    number = int(value) if isinstance(value, numbers.Integral) else float(value)
    if number - number != 0:
        _representation(scan, value, at, called)
    else:
        scan.key += (type(value), "number")
        scan.leaves.append(number)


def _container(scan: Scan, container: Any, at: At, called: bool) -> Parts:
    if len(container) > MAX_ITEMS:
        return _refused(scan, container, at, called) if type(container) in VIEWS else _long(scan, container)
    return holders.contents(container)


def _long(scan: Scan, container: Any) -> Parts:
    """Describes a large container. Only the entries that the mod reads are followed, see `Followed`."""
    scan.mark(len(scan.long))
    scan.long.append((container, len(scan.seen)))
    return ("long", type(container)), ()


def _holder(scan: Scan, value: Any, at: At, called: bool) -> Parts | None:
    kind = type(value)  # a weak proxy shows the attributes of its target
    is_builtin = kind in holders.BUILTINS
    if is_builtin and not holders.is_bound(value):
        return _identity(scan, value, at, called)
    if kind is MEMO:
        if at[0] in ("global", "module") and opaque(value.__module__):
            return _identity(scan, value, at, called)
        scan.mark("memo")  # its remembered values may be older than the values that its function reads
    holder = holders.holder_of(kind)
    assert holder is not None
    return (kind, value.__name__ if is_builtin else None), ((holder.at, holder.read(value)),)


def _data(scan: Scan, value: Any, at: At, called: bool) -> Parts | None:
    """Describes arrays, buffers and the numbers of ctypes by their contents."""
    kind = type(value)
    if holders.is_numpy_array(kind) and value.size <= MAX_ITEMS and value.dtype.kind in "biuf":
        return (kind, value.shape, value.dtype), zip(INDEX, value.ravel().tolist(), strict=False)
    contents = holders.bytes_of(value)
    if contents is None:
        return _refused(scan, value, at, called)
    scan.key += (kind, contents)
    return None


def _getter(scan: Scan, getter: Any, at: At, called: bool) -> None:
    """Describes an `operator.attrgetter` or `methodcaller`, which names attributes."""
    names = {part for name in getter.__reduce__()[1] if isinstance(name, str) for part in name.split(".")}
    scan.learn(frozenset(names | {f"{name}()" for name in names}))
    _identity(scan, getter, at, called)


def _function(scan: Scan, fn: FunctionType, at: At, called: bool) -> Parts | None:
    if fn.__dict__ and "_torchdynamo_orig_callable" in fn.__dict__:
        return _compiled(scan, fn, at, called)
    if (
        at is not FUNC
        and at[0] in ("global", "module")
        and opaque(fn.__module__)
        # The function that torch's own `and_masks` returns belongs to torch, but holds the user's mods.
        and not (fn.__closure__ and fn.__module__.startswith("torch.nn.attention"))
    ):
        return _identity(scan, fn, at, called)
    known = CODES.get(id(fn.__code__)) or code_of(fn)  # saves a call
    if known.names is not scan.names:
        scan.learn(known.names)
    scan.pins.append(known.code)
    cells = fn.__closure__
    try:
        children = [*map(_contents, cells)] if cells else []
    except ValueError:  # an empty cell
        children = [_read_cell(cell) for cell in cells or ()]
    children += map(fn.__globals__.get, known.global_names, repeat(ABSENT))
    edges = zip(known.where, children)  # noqa: B905 (`strict` costs time for each token)
    if not (fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__ or known.imports or known.hides):
        return ("function", id(known.code)), edges
    if known.hides:
        scan.mark("function")
    scan.looked = scan.looked or bool(fn.__dict__)
    more = [
        *[(("import", n), sys.modules.get(n, ABSENT)) for given in known.imports for n in _import_names(fn, *given)],
        *[(("default", i), value) for i, value in enumerate(fn.__defaults__ or ())],
        *[(("kwdefault", name), value) for name, value in (fn.__kwdefaults__ or {}).items()],
        *[(("fattr", name), fn.__dict__[name]) for name in view(scan.names).attributes if name in fn.__dict__],
    ]
    return ("function", id(known.code), *[at for at, _ in more], None), [*edges, *more]


def _read_cell(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:
        return ABSENT


def _import_names(fn: FunctionType, name: str, dots: int) -> tuple[str, ...]:
    """The modules that an import inside a function reads: the named one, and its top package, which it may bind."""
    if dots:
        package = (fn.__globals__.get("__package__") or "").split(".")
        name = ".".join([*package[: len(package) - dots + 1], *filter(None, [name])])
    return (name,) if "." not in name else (name, name.partition(".")[0])


def _compiled(scan: Scan, value: Any, at: At, called: bool) -> Parts:
    """Describes the result of `torch.compile` by the function or module that it was made of."""
    return ("compiled",), ((FUNC, code.uncompiled(value)),)


def _method(scan: Scan, method: types.MethodType, at: At, called: bool) -> Parts:
    function = method.__func__
    bare = not isinstance(function, FunctionType) or code_of(function).uses_self
    return ("method",), ((FUNC, function), (("self", bare), method.__self__))


def _partial(scan: Scan, call: functools.partial, at: At, called: bool) -> Parts:
    arguments = [(("argument", i), value) for i, value in enumerate(call.args)]
    keywords = [(("keyword", name), value) for name, value in call.keywords.items()]
    return ("partial", len(call.args), tuple(call.keywords)), [(FUNC, call.func), *arguments, *keywords]


def _module(scan: Scan, module: ModuleType, at: At, called: bool) -> Parts | None:
    state = vars(module)
    if opaque(state.get("__name__")):
        _LIBRARY[id(module)] = module
        scan.key += (ModuleType, id(module))
        return None
    edges = [(("module", name), state[name]) for name in view(scan.names).attributes if name in state]
    scan.looked = True
    scan.pins.append(module)
    return ("module", id(module), len(edges), *[at for at, _ in edges]), edges


def _class(scan: Scan, kind: type, at: At, called: bool) -> Parts | None:
    # `super()` holds its class in a cell. The methods that it reaches are found on the object.
    is_super = at == ("cell", "__class__") and "super()" in scan.names
    if is_super or opaque(kind.__module__) or issubclass(kind, Enum):
        return _identity(scan, kind, at, called)
    return _attributes(scan, kind, kind, classes.class_of(kind.__mro__), {}, classes.CONSTRUCTORS, called)


def _object(scan: Scan, obj: Any, at: At, called: bool) -> Parts:
    known, state = classes.class_of(type(obj).__mro__), classes.state_of(obj)
    hooks = [name for name in _HOOKS if state.get(name)] if known.is_module else ()
    return _attributes(scan, obj, type(obj), known, state, hooks, called)


def _attributes(
    scan: Scan, obj: Any, kind: type, known: classes.Class, state: Mapping, extra: Sequence[str], called: bool
) -> Parts:
    """Describes the attributes of an object or class that the code names, and those that its methods name."""
    while True:
        names, operators = scan.names, (*known.operators, *extra) if called else known.getters
        looked_up = view(names)
        edges = _members(obj, known, state, looked_up, operators)
        if looked_up.whole and (called or "__dict__" in names) and obj is not kind and not known.is_module:
            unnamed = [("attr", name) for name in state if name not in known.slots] + [("slot", n) for n in known.slots]
            for how, name in unnamed:  # the code may read all attributes, e.g. `vars(cfg)`
                if name not in looked_up.attributes:
                    value = state[name] if how == "attr" else classes.read_slot(known.slots[name], obj)
                    edges.append(((how, name), value))
        methods = [(how, code_of(child)) for (how, _), child in edges if type(child) is FunctionType]
        for _, method in methods:
            scan.learn(method.names)
        if not called and any(method.uses_self and how in ("class", "super") for how, method in methods):
            called = True
        elif names is scan.names:
            break
    scan.looked = True
    by_identity = not known.transparent or bool(known.getters) or looked_up.reflective
    header: Sequence = ()
    if obj is not kind and known.solid in CONTAINERS:
        header, items = _long(scan, obj) if known.solid.__len__(obj) > MAX_ITEMS else holders.contents(obj)
        edges += items
    scan.pins += (obj, kind) if by_identity else (kind,)
    where = [at for at, _ in edges]
    return ("object", id(kind), obj is kind, id(obj) if by_identity else 0, len(where), *where, *header), edges


def _members(
    obj: Any, known: classes.Class, state: Mapping, looked_up: code.View, operators: tuple[str, ...]
) -> list[Edge]:
    """Finds attributes as Python would, without running a property or `__getattr__`."""
    edges: list[Edge] = []
    hidden: list[Edge] = []
    uses_class = looked_up.uses_class
    for name in (*operators, *looked_up.attributes):
        found = [namespace[name] for namespace in known.dicts if name in namespace]
        first = found[0] if found else ABSENT
        if isinstance(first, types.MemberDescriptorType) and not isinstance(obj, type):
            edges.append((("slot", name), classes.read_slot(first, obj)))
        elif name in state and not (found and hasattr(type(first), "__set__")):  # properties come before the dict
            edges.append((("attr", name), state[name]))
            if found:
                hidden.append((("class", name), plain(first)))
        elif found:
            edges.append((("class" if is_plain(first) else "descriptor", name), plain(first)))
            uses_class = uses_class or isinstance(first, classmethod)
        elif known.is_module and not known.is_indexed:
            edges += [((table, name), state[table][name]) for table in TABLES if name in state.get(table, ())]
        if looked_up.uses_super:
            edges += [(("super", name), plain(value)) for value in found[1:]]
    if known.is_indexed:
        edges += [((table, name), value) for table in TABLES for name, value in state[table].items()]
    return edges + hidden if uses_class else edges


# --- How each type is described --------------------------------------------------------------------------------------

_EXACT: dict[type, _Describe] = {
    FunctionType: _function,
    types.MethodType: _method,
    functools.partial: _partial,
    **dict.fromkeys((*CONTAINERS, types.MappingProxyType, *VIEWS), _container),
    **dict.fromkeys((float, complex, range), _representation),
    **dict.fromkeys((operator.attrgetter, operator.methodcaller), _getter),
    **dict.fromkeys(holders.HOLDERS, _holder),
}
_BASES: dict[type, _Describe] = {
    torch.Tensor: _tensor,
    ModuleType: _module,
    type: _class,
    weakref.ref: _holder,
    **dict.fromkeys((array.array, bytearray, memoryview, *holders.CTYPES), _data),
    threading.local: _object,
    Enum: _identity,
}


@functools.lru_cache(maxsize=code.MAX_KNOWN)
def _choose(kind: type) -> _Describe:
    """How values of a type are described."""
    if kind in _EXACT:
        return _EXACT[kind]
    for base, describe in _BASES.items():
        if issubclass(kind, base):
            return describe
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return _compiled
    if kind.__module__ == "numpy" and issubclass(kind, numbers.Real):
        return _numpy_number
    if holders.is_numpy_array(kind):
        return _data
    if isinstance(getattr(kind, "__next__", None), types.WrapperDescriptorType):  # generators, iterators, files
        return _refused
    is_users = kind.__flags__ & classes.HEAP or kind is types.SimpleNamespace
    return _object if is_users and kind.__module__ != "logging" else _identity
