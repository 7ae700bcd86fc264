"""Notes reads that a mod's code does not show: entries of large containers, attributes with computed names."""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from types import MethodDescriptorType, ModuleType, WrapperDescriptorType
from typing import Any, NoReturn

import torch

from ...errors import TraceError, at_user_line
from .classes import DICTS, SEQUENCES
from .code import MAX_ITEMS, MAX_WHOLE, At, Code, opaque
from .scan import NOTHING, Followed

_UNSEEN = "in which changes would go unseen"
_OUTSIDE = "Read it outside the mod and capture what it gives: numbers as they are, arrays as a tensor."
_MARK = "_flexdecode_reads"
_ALL: At = ("all", None)


class Reads:
    """Notes what one trace of a mod reads.

    Attributes:
        kind: `score_mod` or `mask_mod`.
        followed: what the walk already follows.
        kept: positions of nodes that cannot be replaced in a copy.
        known: the attribute names that the walk looks up.
        too_far: the first object that the walk did not follow because it was too deep or beyond the limit of objects.
    """

    def __init__(self, kind: str, followed: Followed = NOTHING) -> None:
        self.kind = kind
        self.followed = followed
        self.kept: set[int] = set()
        self.known: frozenset[str] = frozenset()
        self.too_far = ""
        self.names: set[str] = set()
        self.entries: dict[tuple[int, At], None] = {}

    @property
    def pending(self) -> bool:
        """Whether the mod read something that the walk does not follow yet."""
        return bool(self.names or self.entries)

    def more(self) -> Followed:
        """What the walk shall follow from now on."""
        if self.names:  # new names change which containers the walk finds
            return Followed(self.followed.names | self.names)
        return Followed(self.followed.names, (*self.followed.reads, *self.entries))

    def note(self, number: int, at: At) -> None:
        """Notes an entry of a large container."""
        if (number, at) not in self.followed.reads and (number, _ALL) not in self.followed.reads:
            self.entries[number, at] = None

    # --- Stand-ins in a copy for tracing -----------------------------------------------------------------------------

    def refused(self, value: Any, name: str) -> Any:
        """A stand-in for an object that cannot be followed. Any use of it in the mod is an error."""
        return _Refused(f"the {self.kind} reads `{name}`, a {type(value).__name__}, {_UNSEEN}")

    def record(self, container: Any, number: int, name: str) -> None:
        """Makes a container of a `recording_type` note its reads from now on."""
        object.__setattr__(container, _MARK, (self, number, name, len(container)))

    def plant_builtins(self, scope: dict[str, Any], code: Code) -> None:
        """Replaces, in the globals of a copied function, the builtins whose arguments decide what they read."""
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
        library = library or (isinstance(obj, ModuleType) and opaque(obj.__name__))
        if type(name) is str and name not in self.known and not library:
            self.names.add(name)
        return read(obj, name, *default)

    def _hidden(self, name: str, *_: Any) -> NoReturn:
        raise at_user_line(
            TraceError,
            f"the {self.kind} calls {name}(), which may read anything",
            "Call a function of your own, whose code says what it reads.",
        )


class _Scope(dict):
    """The result of `globals()` in a mod: the variables whose names are in its code."""

    def __init__(self, reads: Reads, given: dict[str, Any]) -> None:
        super().__init__(given)
        self.reads = reads

    def __missing__(self, name: Any) -> NoReturn:
        raise at_user_line(
            TraceError,
            f"the {self.reads.kind} reads globals()[{name!r}] by a computed name, {_UNSEEN}",
            "Write the name of the variable, or keep such values in a dict.",
        )

    def get(self, name: Any, default: Any = None) -> Any:
        return self[name]


def _refuse(self: _Refused, *_: Any, **__: Any) -> NoReturn:
    raise at_user_line(TraceError, object.__getattribute__(self, "problem"), _OUTSIDE)


class _Refused:
    """An object that a mod must not use. Its other methods are added below."""

    def __init__(self, problem: str) -> None:
        object.__setattr__(self, "problem", problem)

    def __getattribute__(self, name: str) -> Any:
        return _Refused if name == "__class__" else _refuse(self)


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
def recording_type(kind: type) -> type:
    """A subclass of a container class. Its methods note what they read, after `Reads.record` has set the `Reads`."""
    methods: dict[str, Any] = {}
    for base in reversed(kind.__mro__[:-1]):  # also `__getattr__ = dict.__getitem__`
        found = [
            item for item in vars(base).items() if isinstance(item[1], (MethodDescriptorType, WrapperDescriptorType))
        ]
        methods.update({name: method for name, method in found if name not in _UNRECORDED})
    return type(kind.__name__, (kind,), {name: _recorded(getattr(kind, name), m) for name, m in methods.items()})


def _recorded(original: Any, method: Any) -> Callable:
    """A method that notes what it reads. If it is the user's and not the builtin `method`, it notes all entries."""

    def call(self: Any, *args: Any, **keywords: Any) -> Any:
        try:
            reads, number, spoken, length = object.__getattribute__(self, _MARK)
        except AttributeError:  # the container is still being made
            return method(self, *args, **keywords)
        for at in _what(method.__name__, self, args) if original is method and not keywords else [_ALL]:
            if at == _ALL and length > MAX_WHOLE:
                raise at_user_line(
                    TraceError,
                    f"the {reads.kind} reads all {length} entries of `{spoken}`, too many to read again at each call",
                    f"Read single entries, `{spoken}[i]`, or compute the result outside the mod and capture it.",
                )
            reads.note(number, at)
        return original(self, *args, **keywords)

    return call


def _what(name: str, container: Any, args: tuple) -> list[At]:
    """The parts that a method of a builtin container reads."""
    if name == "__len__":
        return [("len", None)]
    if isinstance(container, SEQUENCES):
        if name != "__getitem__":
            return [_ALL]
        if not isinstance(args[0], slice):
            return [("index", operator.index(args[0]))]
        found = range(len(container))[args[0]]
        return [("index", i) for i in found] if len(found) <= MAX_ITEMS else [_ALL]
    try:
        hash(args[0] if args else container)
    except TypeError:  # the method itself will raise
        return []
    if name == "__contains__":
        return [("in", args[0])]
    if isinstance(container, DICTS) and name in ("__getitem__", "get"):
        return [("item", args[0])]
    return [_ALL]
