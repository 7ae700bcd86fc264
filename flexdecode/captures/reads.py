"""What a mod reads while it is traced that its code does not tell: entries of large containers, computed names."""

from __future__ import annotations

import functools
import operator
from collections import defaultdict, deque
from collections.abc import Callable
from types import MappingProxyType, MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import Any

import torch

from ..errors import TraceError, at_user_line
from .facts import _DICTS, _SEQUENCES, MAX_ITEMS, MAX_WHOLE, _At, _Code, _type_of_layout
from .scan import NOTHING, Followed, _opaque

_UNSEEN = "in which changes would go unseen"
_OUTSIDE = "Read it outside the mod and capture what it gives: numbers as they are, arrays as a tensor."
_MARK = "_flexdecode_reads"
_SETS = (set, frozenset)


class Reads:
    """Notes what one trace of a mod reads.

    Attributes:
        kind: `score_mod` or `mask_mod`.
        followed: what was known before.
        kept: positions of nodes that cannot be replaced in a copy.
        known: the attribute names that the walk looks up.
        too_far: the first thing that the walk did not follow because it was too deep, or one object too many.
    """

    def __init__(self, kind: str, followed: Followed = NOTHING) -> None:
        self.kind = kind
        self.followed = followed
        self.kept: set[int] = set()
        self.known: frozenset[str] = frozenset()
        self.too_far = ""
        self.names: set[str] = set()
        self.entries: dict[tuple[int, _At], None] = {}
        self._followed = set(followed.reads)

    @property
    def pending(self) -> bool:
        """Whether the mod read something that is not followed."""
        return bool(self.names or self.entries)

    def more(self) -> Followed:
        """What to follow from now on."""
        if self.names:  # with them the walk finds other containers
            return Followed(self.followed.names | self.names)
        return Followed(self.followed.names, (*self.followed.reads, *self.entries))

    def note(self, number: int, at: _At) -> None:
        """Notes an entry of a large container."""
        if (number, at) not in self._followed and (number, ("all", None)) not in self._followed:
            self.entries[number, at] = None

    # --- What stands in a copy for tracing ---------------------------------------------------------------------------

    def refused(self, value: Any, name: str) -> Any:
        """Stands for something that cannot be followed: any use of it in the mod is an error."""
        return _Refused(f"the {self.kind} reads `{name}`, a {type(value).__name__}, {_UNSEEN}")

    def recording(self, container: Any, number: int, name: str, changed: dict[Any, Any]) -> Any:
        """Copies a large container, with some entries changed, as one that notes what is read of it."""
        proxy = isinstance(container, MappingProxyType)
        layout: Any = dict if proxy else type(container)
        kind = _recording_type(layout)
        solid: Any = _type_of_layout(kind)
        if solid in _DICTS:
            new = solid.__new__(kind)
            solid.update(new, {**container} if proxy else container)
            solid.update(new, changed)
            if solid is defaultdict:
                new.default_factory = container.default_factory
        elif solid in _SETS:
            new = solid.__new__(kind, container)
            if solid is set:
                set.update(new, container)
        else:
            items = [*solid.__iter__(container)]
            for index, value in changed.items():
                items[index] = value
            new = solid.__new__(kind, items) if issubclass(solid, tuple) else solid.__new__(kind)
            if solid is deque:
                deque.__init__(new, items, container.maxlen)
            elif solid is list:
                list.extend(new, items)
        object.__setattr__(new, _MARK, (self, number, name, len(container)))
        return MappingProxyType(new) if proxy else new

    def plant_builtins(self, scope: dict[str, Any], code: _Code) -> None:
        """Replaces builtins that read what their argument says, in the globals of a copied function."""
        planted: dict[str, Any] = {
            "getattr": functools.partial(self._attribute, getattr),
            "hasattr": functools.partial(self._attribute, hasattr),
            "globals": lambda: _Scope(self, {name: scope[name] for name in code.global_names if name in scope}),
            "eval": functools.partial(self._hidden, "eval"),
            "exec": functools.partial(self._hidden, "exec"),
        }
        scope.update({name: planted[name] for name in code.global_names if name in planted and name not in scope})

    def _attribute(self, read: Callable, obj: Any, name: Any, *default: Any) -> Any:
        library = isinstance(obj, torch.Tensor) or type(obj).__module__.startswith("flexdecode.")
        library = library or (isinstance(obj, ModuleType) and _opaque(obj.__name__))
        if type(name) is str and name not in self.known and not library:
            self.names.add(name)
        return read(obj, name, *default)

    def _hidden(self, name: str, *_: Any) -> Any:
        raise at_user_line(
            TraceError,
            f"the {self.kind} calls {name}(), which may read anything",
            "Call a function of your own, whose code says what it reads.",
        )


class _Scope(dict):
    """What `globals()` gives in a mod: the variables whose names are in its code."""

    def __init__(self, reads: Reads, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.reads = reads

    def __missing__(self, name: Any) -> Any:
        raise at_user_line(
            TraceError,
            f"the {self.reads.kind} reads globals()[{name!r}] by a computed name, {_UNSEEN}",
            "Write the name of the variable, or keep such values in a dict.",
        )

    def get(self, name: Any, default: Any = None) -> Any:
        return self[name]


class _Refused:
    """Something that a mod must not use; its methods are added below."""

    def __init__(self, problem: str) -> None:
        object.__setattr__(self, "problem", problem)

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return _Refused
        raise at_user_line(TraceError, object.__getattribute__(self, "problem"), _OUTSIDE)


def _refuse(self: Any, *_: Any, **__: Any) -> Any:
    raise at_user_line(TraceError, object.__getattribute__(self, "problem"), _OUTSIDE)


for _name in (
    *("call", "iter", "next", "getitem", "len", "contains", "bool", "int", "float", "index", "array", "reversed"),
    *("add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv", "rfloordiv", "mod", "rmod"),
    *("pow", "rpow", "lt", "le", "gt", "ge", "and", "rand", "or", "ror", "neg", "abs", "matmul", "rmatmul"),
):
    setattr(_Refused, f"__{_name}__", _refuse)


# --- Containers that note what is read --------------------------------------------------------------------------------

_UNRECORDED = {
    "__new__", "__init__", "__class__", "__getattribute__", "__setattr__", "__delattr__", "__doc__", "__dir__",
    "__init_subclass__", "__subclasshook__", "__repr__", "__str__", "__format__", "__class_getitem__", "__sizeof__",
}  # fmt: skip


@functools.lru_cache(maxsize=256)
def _recording_type(kind: type) -> type:
    """A subclass of a container class whose methods note what they read."""
    solid = _type_of_layout(kind)
    names = {name: method for name, method in vars(solid).items() if callable(method)}
    for base in reversed(kind.__mro__):  # `__getattr__ = dict.__getitem__`
        if base is not object:
            methods = (MethodDescriptorType, WrapperDescriptorType)
            names.update({name: method for name, method in vars(base).items() if isinstance(method, methods)})
    namespace = {
        name: _recorded(name, method, getattr(kind, name) is method)
        for name, method in names.items()
        if name not in _UNRECORDED
    }
    return type(kind.__name__, (kind,), namespace)


def _recorded(name: str, method: Any, is_own: bool) -> Callable:
    """A method that notes what it reads: all, if it is the user's."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            reads, number, spoken, length = object.__getattribute__(self, _MARK)
        except AttributeError:  # it is being made
            return method(self, *args, **keywords)
        for at in _what(method.__name__, self, args) if is_own and not keywords else (("all", None),):
            if at[0] == "all" and length > MAX_WHOLE:
                raise at_user_line(
                    TraceError,
                    f"the {reads.kind} reads all {length} entries of `{spoken}`, too many to read again at each call",
                    f"Read single entries, `{spoken}[i]`, or compute the result outside the mod and capture it.",
                )
            reads.note(number, at)
        return (
            method(self, *args)
            if is_own and not keywords
            else getattr(super(type(self), self), name)(*args, **keywords)
        )

    return call


def _what(name: str, container: Any, args: tuple) -> list[_At]:
    """What a method of a builtin container reads."""
    if name == "__len__":
        return [("len", None)]
    if isinstance(container, _SEQUENCES):
        if name != "__getitem__":
            return [("all", None)]
        if not isinstance(args[0], slice):
            return [("index", operator.index(args[0]))]
        found = range(len(container))[args[0]]
        return [("index", i) for i in found] if len(found) <= MAX_ITEMS else [("all", None)]
    try:
        hash(args[0] if args else container)
    except TypeError:  # the method itself will say so
        return []
    if name == "__contains__":
        return [("in", args[0])]
    if isinstance(container, _DICTS) and name in ("__getitem__", "get"):
        return [("item", args[0])]
    return [("all", None)]
