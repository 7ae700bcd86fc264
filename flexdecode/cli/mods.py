"""Mods on the command line: `FILE:NAME`, `FILE:NAME(1, 2)` or `mods:NAME(...)`."""

from __future__ import annotations

import ast
import difflib
import inspect
import sys
from collections.abc import Callable, Sequence
from importlib.machinery import SourceFileLoader
from importlib.util import module_from_spec, spec_from_loader
from pathlib import Path
from types import ModuleType
from typing import Any

import flexdecode

from ..frontend.parameters import PARAMETERS, check_parameters
from .mistakes import Mistake, load_error, user_files

Mods = tuple[Callable | None, Callable | None]  # score_mod and mask_mod

MODS = (
    "FILE:NAME, where NAME is a mod, or a function without parameters that makes one; FILE:NAME(1, 2) calls NAME. "
    "`mods:NAME(...)` is one of flexdecode.mods. A function of 5 parameters is a score_mod, one of 4 a mask_mod."
)


def load_mods(places: Sequence[str], score: str | None, mask: str | None) -> Mods:
    """Loads the mods of a command line.

    Args:
        places: mods whose parameters say of which kind they are.
        score: a mod that is a score_mod.
        mask: a mod that is a mask_mod.

    Raises:
        Mistake: a file does not import, has no such name, or there are two mods of a kind.
    """
    modules: dict[str, Any] = {"mods": flexdecode.mods}
    found: dict[str, Callable] = {}
    given = [*((None, place) for place in places), ("score_mod", score), ("mask_mod", mask)]
    for kind, place in given:
        if place is None:
            continue
        mod, known = _find(place, kind, modules)
        if known in found:
            raise Mistake(
                f"{place} is a second {known}; a call takes one (flexdecode.mods has functions that combine two)"
            )
        found[known] = mod
    return found.get("score_mod"), found.get("mask_mod")


def _find(place: str, kind: str | None, modules: dict[str, Any]) -> tuple[Callable, str]:
    """A mod and its kind."""
    value = _look_up(place, modules)
    kinds = _kinds(value)
    if kind is None and len(kinds) == 2:
        raise Mistake(f"{place} takes 4 parameters and also 5: say --score-mod {place} or --mask-mod {place}")
    if not kinds or kind not in (None, *kinds):
        call = f"call it, `{place}(...)`" if place.startswith("mods:") and "(" not in place else _expected(kind)
        raise Mistake(f"{place} is no {kind or 'mod'}: it {_parameters(value)}; {call}")
    return value, kind or kinds[0]


def _look_up(place: str, modules: dict[str, Any]) -> Any:
    """What a place names, or what it makes; `modules` has the files that are already imported."""
    path, name, arguments = _parse(place)
    if path not in modules:
        modules[path] = _load_file(path)
    value = modules[path]
    for part in name.split("."):
        if not hasattr(value, part):
            near = difflib.get_close_matches(part, dir(value), 1, cutoff=0.75)
            raise Mistake(f"{path} has no {name!r}" + (f": did you mean {near[0]!r}?" if near else ""))
        value = getattr(value, part)
    if not callable(value):
        raise Mistake(f"{place} is no function, but {type(value).__name__}")
    if arguments is not None:
        return value(*arguments[0], **arguments[1])
    return value() if not _kinds(value) and _needs_nothing(value) else value


def _parse(place: str) -> tuple[str, str, tuple[list, dict[str, Any]] | None]:
    """File, dotted name, and the arguments of a call; None if nothing is called."""
    path, colon, text = place.partition(":") if place.startswith("mods:") else _split(place)
    if not path or not colon or not text:
        raise Mistake(f"{place!r} names no mod: write FILE:NAME, for example my_mods.py:alibi")
    try:
        node = ast.parse(text, mode="eval").body
        arguments = None
        if isinstance(node, ast.Call):
            keywords = {keyword.arg or "**": ast.literal_eval(keyword.value) for keyword in node.keywords}
            arguments, node = ([ast.literal_eval(argument) for argument in node.args], keywords), node.func
        name = ast.unparse(node)
    except (SyntaxError, ValueError):
        raise Mistake(f"{place!r}: what follows the colon is no name, and no call of one with plain values") from None
    if not all(part.isidentifier() for part in name.split(".")):
        raise Mistake(f"{place!r}: {name!r} is no name")
    return path, name, arguments


def _split(place: str) -> tuple[str, str, str]:
    """A place at the last colon before any bracket: paths and values may have colons of their own."""
    head, bracket, tail = place.partition("(")
    path, colon, name = head.rpartition(":")
    return path, colon, name + bracket + tail


def _load_file(path: str) -> ModuleType:
    """Imports a file as Python runs a script: what lies beside it can be imported, too."""
    file = Path(path).expanduser()
    if not file.is_file():
        raise Mistake(f"{path}: there is no such file")
    if file.suffix != ".py":
        raise Mistake(f"{path} is no Python file: its name must end in .py")
    name, full = f"flexdecode_file_{file.stem}", str(file.resolve())
    sys.path.insert(0, str(file.resolve().parent))
    user_files.add(full)
    loader = SourceFileLoader(name, full)
    spec = spec_from_loader(name, loader)
    assert spec is not None
    module = sys.modules[name] = module_from_spec(spec)
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise load_error(full, error) from None
    return module


def _kinds(value: object) -> list[str]:
    """The kinds of mod that a callable can be."""
    kinds = []
    for kind in PARAMETERS:
        try:
            check_parameters(value, kind)  # type: ignore[arg-type]  # it refuses what is not callable
        except TypeError:
            continue
        kinds.append(kind)
    return kinds


def _needs_nothing(value: Callable) -> bool:
    """Whether a callable can be called without arguments."""
    try:
        inspect.signature(value).bind()
    except (TypeError, ValueError):
        return False
    return True


def _parameters(value: object) -> str:
    try:
        signature = inspect.signature(value)  # type: ignore[arg-type]  # TypeError for what is not callable
        return f"takes ({', '.join(signature.parameters)})"
    except (TypeError, ValueError):
        return f"is of type {type(value).__name__}"


def _expected(kind: str | None) -> str:
    kinds = [kind] if kind else list(PARAMETERS)
    return ", ".join(f"a {kind} takes ({', '.join(PARAMETERS[kind])})" for kind in kinds)
