"""Finds what the code of a function reads. Also has the types and limits that all modules of the package use."""

from __future__ import annotations

import dis
import functools
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FunctionType
from typing import Any

from ...memos import Bounded

MAX_ITEMS = 64  # a container with at most this many entries is followed as a whole
MAX_WHOLE = 1024  # a mod may read all entries of a container with at most this many
MAX_DEPTH = 64  # far below Python's recursion limit
MAX_OBJECTS = 1024  # a mod that reaches more objects reaches the internals of some framework
MAX_KNOWN = 4096  # this many descriptions of code objects and classes are remembered

At = tuple[str, Any]  # how a child is reached from its owner: ("cell", "W"), ("attr", "slope"), ("index", 0), ...
Edge = tuple[At, Any]  # how a child is reached, and the child
Parts = tuple[Sequence, Iterable[Edge]]  # what a value with children adds to the key, and its children


class Absent:
    """Stands for an empty closure cell, an unset slot, and a global that does not exist (a builtin)."""


ABSENT = Absent()
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_PADDING = {"CACHE", "EXTENDED_ARG"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_WHOLE = {"vars()", "__dict__", "__getattribute__", "asdict", "asdict()", "astuple", "astuple()"}  # all attributes
_REFLECTION = {"getattr()", *_WHOLE}
_BY_NAME = {"getattr()", "hasattr()", "attrgetter", "attrgetter()", "globals()", *_WHOLE}  # these take names as strings
_HIDING = {"getattr", "hasattr", "globals", "eval", "exec"}  # builtins whose arguments decide what they read
_OPAQUE = sys.stdlib_module_names | {"builtins", "torch", "numpy", "triton"}


@functools.lru_cache(maxsize=MAX_KNOWN)
def opaque(module: str | None) -> bool:
    """Whether a module with this name is one that users do not change."""
    return module is not None and module.partition(".")[0] in _OPAQUE


@dataclass(slots=True)
class Code:
    """What a code object and the code nested in it read.

    Attributes:
        code: the code object. It is kept alive because this description is found by its id.
        global_names: the globals that it reads.
        names: `slope` for an attribute that it reads. `slope()` for a variable or attribute that it calls, indexes or
            passes on, so that it may use more than an attribute of it.
        uses_self: whether it uses more than attributes of its first parameter.
        where: how each closure cell and global is reached.
        imports: the modules that it imports, with the number of dots before their names.
        hides: whether it may read more than these fields say, through `getattr` and similar functions.
    """

    code: CodeType
    global_names: tuple[str, ...]
    names: frozenset[str]
    uses_self: bool
    where: tuple[At, ...]
    imports: tuple[tuple[str, int], ...]
    hides: bool


CODES = Bounded(limit=MAX_KNOWN)  # by id of the code object, because its hash and comparison are slow


def code_of(fn: FunctionType) -> Code:
    """Describes the code of a function."""
    return CODES.get(id(fn.__code__)) or _read_code(fn.__code__)


def _read_code(code: CodeType) -> Code:
    global_names: dict[str, None] = {}  # a dict keeps the order
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
            if operation == "IMPORT_NAME":  # the number of dots and the list of names come before it
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
                names.add(f"{name}()")
    if not names.isdisjoint(_BY_NAME):
        names |= strings | {f"{name}()" for name in strings}
    if "globals()" in names:
        global_names.update(dict.fromkeys(strings))
    where = [("cell", name) for name in code.co_freevars] + [("global", name) for name in global_names]
    hides = not _HIDING.isdisjoint(global_names)
    found = Code(code, (*global_names,), frozenset(names), uses_self, (*where,), (*imports,), hides)
    CODES.add(id(code), found)
    return found


@dataclass(slots=True)
class View:
    """A set of `Code.names`, prepared for looking up attributes.

    Attributes:
        attributes: the attributes among them.
        reflective: whether the code may read attributes that it does not name.
        whole: whether it may read all attributes of an object.
        uses_super: whether it calls `super()`.
        uses_class: whether it reads the class of an object.
    """

    attributes: tuple[str, ...]
    reflective: bool
    whole: bool
    uses_super: bool
    uses_class: bool


@functools.lru_cache(maxsize=MAX_KNOWN)
def view(names: frozenset[str]) -> View:
    """Prepares names for looking up attributes."""
    attributes = tuple(sorted(name for name in names if not name.endswith("()")))
    reflective, whole = not names.isdisjoint(_REFLECTION), not names.isdisjoint(_WHOLE)
    return View(attributes, reflective, whole, "super()" in names, not names.isdisjoint({"type()", "__class__"}))


@functools.lru_cache(maxsize=MAX_KNOWN)
def union(names: frozenset[str], more: frozenset[str]) -> frozenset[str]:
    """The union of both sets of names. Equal arguments give the same object."""
    return names | more


def uncompiled(value: Any) -> Any:
    """The function or module that `torch.compile` wrapped in `value`; None if it wrapped none."""
    if type(value) is FunctionType:
        return value.__dict__.get("_torchdynamo_orig_callable")
    kind = type(value)
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return value.__dict__["_modules"]["_orig_mod"]
    return None
