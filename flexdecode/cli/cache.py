"""`flexdecode cache`: the store of generated modules, compiled kernels and measured schedules on disk."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from ..codegen.store import SUFFIXES, clear_store, store_folder, stored_files
from ..codegen.tuned import read_record
from ..triton_api import triton_folder

# How the text of a module shows that it has a mod. The template has `return live` where there is no mask.
_HOOKS = {
    "score_mod": r"\nHAS_SCORE_MOD = tl\.constexpr\(True\)",
    "mask_mod": r'\ndef mask_mod\([^)]*\):\n    """[^"]*"""\n(?!    return live\n)',
}
COUNTED = ("modules", "kernels", "schedules")  # the kinds of files that people are told of
_AGES = ((86400, "d"), (3600, "h"), (60, "min"), (1, "s"))


def list_modules() -> None:
    """Lists generated modules and measured schedules, the newest first: name, size, age, and what each is."""
    for kind, describe in (("modules", _describe), ("schedules", _describe_record)):
        for path in sorted(stored_files(kind), key=lambda path: -path.stat().st_mtime):
            found = path.stat()
            age = _age(time.time() - found.st_mtime)
            typer.echo(f"{path.stem}  {size_text(found.st_size):>9}  {age:>6}  {describe(path)}")
    _say_where()


def show_size() -> None:
    """Says how many modules, kernels and schedules there are, how large they are, and where."""
    _say_where()


def clear(yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False) -> None:
    """Removes modules, kernels and schedules. Calls that come later make or measure them again."""
    stored = _say_where()
    if not stored:
        return
    if not yes and not typer.confirm("Remove them?"):
        typer.echo("Nothing was removed.")
        return
    clear_store()
    typer.echo(f"{stored} removed.")


COMMANDS: dict[str, Callable[..., Any]] = {"list": list_modules, "size": show_size, "clear": clear}


def size_text(number: int) -> str:
    """A number of bytes, for people."""
    return f"{number / 1024:.1f} KiB" if number < 1 << 20 else f"{number / (1 << 20):.1f} MiB"


def _say_where() -> str:
    """Says what is stored, and where.

    Returns:
        How many modules, kernels and schedules; empty if there is nothing.
    """
    files = {kind: stored_files(kind) for kind in SUFFIXES}
    total = sum(path.stat().st_size for paths in files.values() for path in paths)
    words = [_count(kind[:-1], len(files[kind])) for kind in COUNTED if files[kind] or kind == "modules"]
    counted = " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
    typer.echo(f"{counted}, {size_text(total)}, in {store_folder()}")
    folder = triton_folder()
    if folder:
        typer.echo(f"What Triton itself keeps is not part of it: that is in {folder}")
    return counted if any(files.values()) else ""


def _count(name: str, number: int) -> str:
    return f"{number} {name}{'' if number == 1 else 's'}"


def _age(seconds: float) -> str:
    size, unit = next(((size, unit) for size, unit in _AGES if seconds >= size), _AGES[-1])
    return f"{seconds // size:.0f} {unit}"


def _describe_record(path: Path) -> str:
    """What was measured."""
    found = read_record(path)
    return "A damaged schedule" if found is None else f"Schedule, {found}"


def _describe(path: Path) -> str:
    """What a module is, from its text: the first words of its docstring, and the mods that it has."""
    text = path.read_text(errors="replace")
    kind = text.removeprefix('"""').partition("\n")[0].partition(":")[0].rstrip('."')
    mods = [name for name, pattern in _HOOKS.items() if re.search(pattern, text)]
    return f"{kind}, with {' and '.join(mods)}" if mods else kind
