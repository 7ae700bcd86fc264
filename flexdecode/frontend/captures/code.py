"""What the code of a function reads, and the words that all modules of the package use."""

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

MAX_ITEMS = 64  # entries of a container that are followed without a look at what the mod reads
MAX_WHOLE = 1024  # entries of a container that a mod may read all of
MAX_DEPTH = 64  # keeps far away from Python's recursion limit
MAX_OBJECTS = 1024  # a mod that reaches more has run into some framework's internals
MAX_KNOWN = 4096  # code objects and classes whose description is remembered

At = tuple[str, Any]  # how a child is reached from its owner: ("cell", "W"), ("attr", "slope"), ("index", 0), ...
Edge = tuple[At, Any]  # a child, after how it is reached
Parts = tuple[Sequence, Iterable[Edge]]  # what a value with children adds to the key, and its children


class Absent:
    """Stands for an empty closure cell, an unset slot, and a global that is not there (a builtin)."""


ABSENT = Absent()
_GLOBAL = {"LOAD_GLOBAL", "LOAD_NAME", "LOAD_FROM_DICT_OR_GLOBALS"}
_PADDING = {"CACHE", "EXTENDED_ARG"}
_ATTRIBUTE = {"LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER_ATTR"}
_WHOLE = {"vars()", "__dict__", "__getattribute__", "asdict", "asdict()", "astuple", "astuple()"}  # all attributes
_REFLECTION = {"getattr()", *_WHOLE}
_BY_NAME = {"getattr()", "hasattr()", "attrgetter", "attrgetter()", "globals()", *_WHOLE}  # names are strings there
_HIDING = {"getattr", "hasattr", "globals", "eval", "exec"}  # builtins that read what their argument says
_OPAQUE = sys.stdlib_module_names | {"builtins", "torch", "numpy", "triton"}


@functools.lru_cache(maxsize=MAX_KNOWN)
def opaque(module: str | None) -> bool:
    """Whether a module, by its name, is one that users do not change."""
    return module is not None and module.partition(".")[0] in _OPAQUE


@dataclass(slots=True)
class Code:
    """What a code object and the code nested in it read.

    Attributes:
        code: the code object, kept alive because this description is found by its id.
        global_names: the globals that it reads.
        names: attributes that it reads, as `slope`, and variables and attributes of which it uses more than an
            attribute (calls, indexes or passes them on), as `slope()`.
        uses_self: whether it uses more than attributes of its first parameter.
        where: how each closure cell and global is reached.
        imports: the modules that it imports, with the number of dots before their names.
        hides: whether it may read what none of these tell, through `getattr` and the like.
    """

    code: CodeType
    global_names: tuple[str, ...]
    names: frozenset[str]
    uses_self: bool
    where: tuple[At, ...]
    imports: tuple[tuple[str, int], ...]
    hides: bool


CODES = Bounded(limit=MAX_KNOWN)  # by id of the code object, whose hash and comparison take long


def code_of(fn: FunctionType) -> Code:
    """Describes the code of a function."""
    return CODES.get(id(fn.__code__)) or _read_code(fn.__code__)


def _read_code(code: CodeType) -> Code:
    global_names: dict[str, None] = {}  # a dict for its order
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
            if operation == "IMPORT_NAME":  # after its number of dots and its list of names
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
        reflective: whether the code may read attributes whose names it does not tell.
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
    """Both sets of names, as one object for equal arguments."""
    return names | more


def uncompiled(value: Any) -> Any:
    """The function or module that `torch.compile` wrapped in `value`; None if it wrapped none."""
    if type(value) is FunctionType:
        return value.__dict__.get("_torchdynamo_orig_callable")
    kind = type(value)
    if kind.__name__ == "OptimizedModule" and kind.__module__.startswith("torch."):
        return value.__dict__["_modules"]["_orig_mod"]
    return None
