"""The slow path over the same traversal: names of the leaves for people, and copies with leaves replaced."""

from __future__ import annotations

import functools
import threading
from collections import defaultdict, deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, MemberDescriptorType, MethodType, ModuleType, SimpleNamespace
from typing import Any

from .facts import (
    _ABSENT,
    _DICTS,
    _TABLES,
    _At,
    _Type,
    uncompiled,
)
from .holders import _array_of, _holder, _is_numpy_array
from .reads import Reads
from .scan import (
    _code,
    _read_slot,
    _Scan,
    _type,
)


class CannotRebuild(Exception):
    """A captured number that cannot be replaced; the caller treats it as a constant.

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
        children: what it holds.
        where: how these are reached.
        refs: for each child that is a leaf its place among them, for one that was visited its node.
        path: how the owner is reached, for people.
        special: what a copy for tracing puts in its place.
    """

    owner: Any
    children: list
    where: list[_At]
    refs: list[int | _Node | None]
    path: tuple[str, str]
    special: str


class _Recorder(_Scan):
    """The same traversal, which also keeps what it visited."""

    path = ("", "")

    def __init__(self, names: frozenset[str]) -> None:
        super().__init__(names)
        self.nodes: list[_Node] = []
        self.leaf_names: list[str] = []

    def each(self, owner: Any, children: Sequence, where: Sequence[_At]) -> None:
        node = _Node(owner, [], [], [], self.path, self.special.get(len(self.nodes), ""))
        self.nodes.append(node)
        self.fill(node, children, where)

    def extend(self, number: int, at: _At) -> None:
        container, position = self.long[number]
        self.fill(self.nodes[position], *self.read(container, at))

    def fill(self, node: _Node, children: Sequence, where: Sequence[_At]) -> None:
        """Visits children and notes them in the node of their owner."""
        for child, at in zip(children, where, strict=False):
            self.path = _spell(node.path, node.owner, at)
            leaf = len(self.leaves)
            position = super().each(node.owner, (child,), (at,))
            node.children.append(child)
            node.where.append(at)
            if position is not None:
                node.refs.append(self.nodes[position])
            elif len(self.leaves) == leaf:
                node.refs.append(None)
            else:
                node.refs.append(leaf)
                base, inside = self.path
                self.leaf_names.append(f"{base} (in {inside})" if inside else base)
        self.path = node.path


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
    if how in ("mapping", "proxy", "call"):
        return path
    if how in ("get()", "factory", "key", "member"):
        return f"{base or 'self'}{'.get()' if how == 'get()' else ''}", inside
    if how == "import":
        return name, ", in ".join(filter(None, path))
    if how in ("index", "item"):
        return f"{base or 'self'}[{name!r}]", inside
    if how == "self":
        return f"{base}.__self__" if base else "self", inside
    if how == "func" or name == "forward" or (name.startswith("__") and name.endswith("__")):
        return path  # what runs when the owner is called or used with an operator
    return f"{base or (owner.__name__ if how == 'fattr' else 'self')}.{name}", inside


class _Rebuilder:
    """Copies the nodes from which a replaced leaf, or something that a trace shall not see, can be reached.

    Such things count as leaf -1 - n, where n is the position of their node.
    """

    def __init__(self, nodes: list[_Node], replacements: Mapping[int, object], reads: Reads | None = None) -> None:
        self.replacements = replacements
        self.reads = reads
        self.done: dict[int, Any] = {}
        self.below: dict[int, int] = {}  # by id of a node, a replaced leaf that can be reached from it
        if reads is not None:
            kept = reads.kept
            self.below = {id(n): -1 - i for i, n in enumerate(nodes) if n.special and i not in kept}
        self.own = dict(self.below)
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
        if uncompiled(owner) is not None:
            return self.build(node.children[0], node.refs[0])
        special = node.special if id(node) in self.own else ""
        if special == "refused":
            assert self.reads is not None
            return self.reads.refused(owner, node.path[0])
        holder = _holder(type(owner))
        if holder is not None and not special.startswith("long"):
            return holder.copy(owner, [*map(self.build, node.children, node.refs)][: len(node.children)])
        if _is_numpy_array(type(owner)):
            return _array_of(owner, [*map(self.build, node.children, node.refs)])
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
        changed = {how: {name for other, name, *_ in changes if other == how} for how in ("cell", "global", "import")}
        old_cells = dict(zip(fn.__code__.co_freevars, fn.__closure__ or (), strict=True))
        if node.special and id(node) in self.own:
            assert self.reads is not None
            changed["global"].add("")
        for how, _, _, _, leaf in changes:
            if how == "import":
                raise CannotRebuild(leaf, "it is read from a module that is imported inside a function")
        cells = {name: CellType() if name in changed["cell"] else cell for name, cell in old_cells.items()}
        scope = dict(fn.__globals__) if changed["global"] else fn.__globals__
        if "" in changed["global"] and self.reads is not None:
            self.reads.plant_builtins(scope, _code(fn))
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
        if id(node) in self.own and node.special.startswith("long"):
            return self.copy_long(node, obj, facts, leaf)
        if type(obj) is threading.local:
            changed = {name: self.build(child, ref) for _, name, child, ref, _ in changes}
            return SimpleNamespace(**{**vars(obj), **changed})
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
            elif how == "factory":
                new.default_factory = value
            elif how == "key":
                raise CannotRebuild(leaf, "it is in the key of a dict")
            elif not isinstance(new, tuple):
                facts.solid.__setitem__(new, name, value)
        return new

    def copy_long(self, node: _Node, obj: Any, facts: _Type, leaf: int) -> Any:
        assert self.reads is not None
        changes = self.changes(node)
        if any(how not in ("index", "item") for how, *_ in changes):
            raise CannotRebuild(leaf, f"a large {type(obj).__name__} has attributes of its own")
        changed = {name: self.build(child, ref) for _, name, child, ref, _ in changes}
        new = self.reads.recording(obj, int(node.special.split()[1]), node.path[0], changed)
        self.done[id(node)] = new
        if facts.has_dict:
            vars(new).update(vars(obj))
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
    elif facts.solid is deque:
        deque.__init__(new, obj, obj.maxlen)
    elif facts.solid in _DICTS:
        facts.solid.update(new, obj)
        if facts.solid is defaultdict:
            new.default_factory = obj.default_factory
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
