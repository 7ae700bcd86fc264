"""Slower uses of the same traversal: names of the leaves for people, and copies of a callable with leaves replaced."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from types import CellType, FunctionType, MappingProxyType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from .classes import TABLES, class_of, read_slot, state_of
from .code import ABSENT, At, Edge, code_of, uncompiled
from .holders import VIEWS, filled, holder_of, is_numpy_array, objects_of
from .reads import Reads, recording_type
from .scan import NOTHING, Followed, Scan, run

_VARIABLES = {"cell", "global", "default", "kwdefault", "argument", "keyword", "import"}
_UNSPOKEN = {"call", "proxy", "func"}  # these run when the owner is used, so a name does not mention them
_SUFFIXES = {"get()": ".get()", "index": "[{!r}]", "item": "[{!r}]", "factory": "", "key": ""}
_ON_CLASS = {"class", "descriptor"}
_FIXED = {
    "import": "it is read from a module that is imported inside a function",
    "key": "it is in the key of a dict",
    "super": "it is reached through `super()`",
}


class CannotRebuild(Exception):
    """A captured number cannot be replaced. The caller treats it as a constant.

    Attributes:
        index: position of the number among the leaves.
    """

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"leaf {index} cannot be replaced: {reason}")
        self.index = index


@dataclass(slots=True, eq=False)
class _Node:
    """A visited function, container or object with its children.

    Attributes:
        owner: what was visited.
        path: how the owner is reached, for people.
        special: what a copy for tracing puts in its place, see `Scan.special`.
        edges: its children: how each is reached, the child, and its place among the leaves or its node.
    """

    owner: Any
    path: tuple[str, str]
    special: int | str | None
    edges: list[tuple[At, Any, int | _Node | None]]


_Change = tuple[str, Any, Any, "int | _Node | None", int]  # see `_Rebuilder.changes`


class _Recorder(Scan):
    """The same traversal. It also keeps what it visited."""

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.nodes: list[_Node] = []
        self.leaf_names: list[str] = []

    def each(self, owner: Any, edges: Iterable[Edge], position: int) -> None:
        if position == len(self.nodes):
            self.nodes.append(_Node(owner, self.path, self.special.get(position), []))
        node = self.nodes[position]
        for at, child in edges:
            self.path = _spell(node.path, owner, at)
            leaf = len(self.leaves)
            visited = super().each(owner, ((at, child),), position)
            ref: int | _Node | None = None
            if visited is not None:
                ref = self.nodes[visited]
            elif len(self.leaves) > leaf:
                ref = leaf
                base, inside = self.path
                self.leaf_names.append(f"{base} (in {inside})" if inside else base)
            node.edges.append((at, child, ref))
        self.path = node.path


def _spell(path: tuple[str, str], owner: Any, at: At) -> tuple[str, str]:
    """Extends an access path: a pair of text like `cfg.window` and the functions that contain it."""
    how, name = at
    base, inside = path
    if how in _VARIABLES:
        if how == "default":
            name = owner.__code__.co_varnames[owner.__code__.co_argcount - len(owner.__defaults__) + name]
        elif how in ("argument", "keyword"):
            name = f"partial {how} {name!r}"
        return name, ", in ".join(filter(None, path))
    if how in _SUFFIXES:
        return (base or "self") + _SUFFIXES[how].format(name), inside
    if how == "self":
        return f"{base}.__self__" if base else "self", inside
    if how in _UNSPOKEN or name == "forward" or (name.startswith("__") and name.endswith("__")):
        return path
    return f"{base or (owner.__name__ if how == 'fattr' else 'self')}.{name}", inside


def leaf_names(fn: Callable, followed: Followed = NOTHING) -> list[str]:
    """Returns how each leaf is reached, for people: `W`, `self.slope`, `partial argument 0`, `W (in mask_mods[0])`."""
    return run(fn, _Recorder, followed).leaf_names


def copy_for_trace(fn: Callable, replacements: Mapping[int, object], reads: Reads) -> Callable:
    """Copies `fn` with some leaves replaced. The copy also notes or refuses reads that the walk does not follow.

    `fn` itself stays as it is. The copy shares the parts in which nothing is replaced.

    Args:
        fn: the callable.
        replacements: new objects by position among the leaves of `walk(fn, reads.followed)`.
        reads: takes the notes.

    Raises:
        CannotRebuild: the object that holds a leaf cannot be copied.
    """
    record = run(fn, _Recorder, reads.followed)
    reads.too_far = record.too_far
    reads.known = record.names
    while True:
        try:
            return _Rebuilder(record.nodes, replacements, reads).build(fn, record.nodes[0] if record.nodes else None)
        except CannotRebuild as error:
            position = -1 - error.index
            if position < 0:
                raise
            reads.kept.add(position)
            number = record.nodes[position].special
            if isinstance(number, int):
                reads.note(number, ("all", None))


class _Rebuilder:
    """Copies the nodes that lead to a replaced leaf, or to a node that a copy for tracing replaces.

    A node that is replaced counts as leaf -1 - n, where n is its position.
    """

    def __init__(self, nodes: list[_Node], replacements: Mapping[int, object], reads: Reads) -> None:
        self.replacements = replacements
        self.reads = reads
        self.done: dict[int, Any] = {}
        special = [i for i, node in enumerate(nodes) if node.special is not None and i not in reads.kept]
        self.special = {id(nodes[i]): nodes[i].special for i in special}
        self.below = {id(nodes[i]): -1 - i for i in special}  # id of a node -> a replaced leaf in it
        size = -1
        while size != len(self.below):  # cycles need more than one round
            size = len(self.below)
            for node in reversed(nodes):
                for *_, leaf in self.changes(node):
                    self.below.setdefault(id(node), leaf)

    def leaf_below(self, ref: int | _Node | None) -> int | None:
        if isinstance(ref, int):
            return ref if ref in self.replacements else None
        return self.below.get(id(ref))

    def changes(self, node: _Node) -> list[_Change]:
        """Lists the children that change: how each is reached (two items), the child, its ref, a replaced leaf."""
        found = [(*at, child, ref, self.leaf_below(ref)) for at, child, ref in node.edges]
        return [(how, name, child, ref, leaf) for how, name, child, ref, leaf in found if leaf is not None]

    def build(self, original: Any, ref: int | _Node | None) -> Any:
        """Returns the copy of a child, or the child itself if nothing in it changes."""
        leaf = self.leaf_below(ref)
        if leaf is None:
            return original
        if not isinstance(ref, _Node):
            return self.replacements[leaf]
        if id(ref) not in self.done:
            self.done[id(ref)] = ABSENT
            self.done[id(ref)] = self.copy(ref, leaf)
        elif self.done[id(ref)] is ABSENT:
            raise CannotRebuild(leaf, f"a {type(original).__name__} contains itself")
        return self.done[id(ref)]

    def copy(self, node: _Node, leaf: int) -> Any:
        owner = node.owner
        if self.special.get(id(node)) == "refused":
            return self.reads.refused(owner, node.path[0])
        changes = self.changes(node)
        for how, _, _, _, changed in changes:
            if how in _FIXED:
                raise CannotRebuild(changed, _FIXED[how])
        make = _maker(owner)
        if make is not None:
            return make([self.build(child, ref) for _, child, ref in node.edges])
        if isinstance(owner, FunctionType):
            return self.copy_function(node, owner, changes)
        if isinstance(owner, type):
            kind = self.done[id(node)] = _subclass(owner, leaf)
            for _, name, child, ref, _ in changes:
                _set_on_class(kind, name, self.build(child, ref))
            return kind
        return self.copy_object(node, owner, changes, leaf)

    def copy_function(self, node: _Node, fn: FunctionType, changes: list[_Change]) -> FunctionType:
        hides = id(node) in self.special
        changed = {(how, name) for how, name, *_ in changes}
        old_cells = zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True)
        cells = {name: CellType() if ("cell", name) in changed else cell for name, cell in old_cells}
        scope = fn.__globals__
        if hides or any(how == "global" for how, _ in changed):
            scope = {**scope}
        if hides:
            self.reads.plant_builtins(scope, code_of(fn))
        new = FunctionType(fn.__code__, scope, fn.__name__, None, tuple(cells.values()))
        self.done[id(node)] = new  # before its children, because it may call itself
        new.__qualname__ = fn.__qualname__
        vars(new).update(vars(fn))
        defaults, keywords = list(fn.__defaults__ or ()), dict(fn.__kwdefaults__ or {})
        targets: dict[str, Any] = {"global": scope, "default": defaults, "kwdefault": keywords, "fattr": vars(new)}
        for how, name, child, ref, _ in changes:
            value = self.build(child, ref)
            if how == "cell":
                cells[name].cell_contents = value
            else:
                targets[how][name] = value
        new.__defaults__, new.__kwdefaults__ = tuple(defaults) or None, keywords or None
        return new

    def copy_object(self, node: _Node, owner: Any, changes: list[_Change], leaf: int) -> Any:
        """Copies an object, container or module, and runs no code of the user's. A large container notes its reads."""
        obj, view = owner, type(owner)
        if view in VIEWS or view is MappingProxyType:
            obj = {**(owner.mapping if view in VIEWS else owner)}
        elif view is threading.local:
            obj = SimpleNamespace(**vars(owner))
        kind: type = type(obj)
        known, number = class_of(kind.__mro__), self.special.get(id(node))
        if isinstance(number, int):
            kind = recording_type(kind)
        elif not (known.transparent or kind is ModuleType) or hasattr(kind, "__del__"):  # the copy would also run it
            raise CannotRebuild(leaf, f"a {kind.__name__} cannot be copied")
        if any(how in _ON_CLASS for how, *_ in changes):
            kind = _subclass(kind, leaf)  # operators and properties are looked up on the class
        items = obj
        if isinstance(obj, tuple):
            items = [*tuple.__iter__(obj)]
            for how, name, child, ref, _ in changes:
                if how == "index":
                    items[name] = self.build(child, ref)
        try:
            new = self.done[id(node)] = filled(kind, items)
        except TypeError:
            raise CannotRebuild(leaf, f"a {kind.__name__} holds integers only") from None
        state = state_of(new)
        state.update(state_of(obj))
        if known.is_module:
            state.update({table: dict(state[table]) for table in TABLES})
        for slot in known.slots.values():
            value = read_slot(slot, obj)
            if value is not ABSENT:
                slot.__set__(new, value)
        for how, name, child, ref, _ in changes:
            value = self.build(child, ref)
            if how in ("attr", "module"):
                state[name] = value
            elif how == "slot":
                known.slots[name].__set__(new, value)
            elif how in _ON_CLASS:
                _set_on_class(kind, name, value)
            elif how in TABLES:
                state[how][name] = value
            elif how == "factory":
                new.default_factory = value
            elif not isinstance(new, tuple):
                known.solid.__setitem__(new, name, value)
        if isinstance(number, int):
            self.reads.record(new, number, node.path[0])
        if view is MappingProxyType:
            return MappingProxyType(new)
        return getattr(new, view.__name__.removeprefix("dict_"))() if view in VIEWS else new


def _maker(owner: Any) -> Callable[[list], Any] | None:
    """A function that makes a copy from the copies of all children; None for an owner that may contain itself."""
    holder = holder_of(type(owner))
    if uncompiled(owner) is not None:
        return lambda values: values[0]
    if holder is not None:
        return lambda values: holder.copy(owner, *values)
    if is_numpy_array(type(owner)):
        return functools.partial(objects_of, owner)
    if isinstance(owner, MethodType):
        return lambda values: MethodType(*values)
    return functools.partial(_partial_of, owner) if type(owner) is functools.partial else None


def _partial_of(call: functools.partial, values: list) -> functools.partial:
    function, *values = values
    count = len(call.args)
    copied = functools.partial(function, *values[:count], **dict(zip(call.keywords, values[count:], strict=True)))
    vars(copied).update(vars(call))
    return copied


def _subclass(kind: type, leaf: int) -> type:
    """Makes a subclass that can hold changed class attributes. Refuses if this would run code of the user's."""
    hook = getattr(kind.__init_subclass__, "__func__", None)
    if type(kind).__module__ not in ("builtins", "abc", "typing") or getattr(hook, "__module__", "typing") != "typing":
        raise CannotRebuild(leaf, f"class {kind.__name__} watches its subclasses")
    namespace = {"__slots__": (), "__module__": kind.__module__, "__qualname__": kind.__qualname__}
    return type(kind)(kind.__name__, (kind,), namespace)


def _set_on_class(kind: type, name: str, value: Any) -> None:
    """Sets a class attribute and keeps its kind: a property, a static method, a class method, or a plain value."""
    old = next(vars(base)[name] for base in kind.__mro__ if name in vars(base))
    if isinstance(old, (property, functools.cached_property)):
        value = property(value)
    elif isinstance(old, (staticmethod, classmethod)):
        value = type(old)(value)
    type.__setattr__(kind, name, value)
