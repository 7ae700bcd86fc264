"""`flexdecode doctor`: versions, device, folders, known bad pairs, and what will be slow."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import pwd
import re
import shutil
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NamedTuple

import torch
import typer

from ..call.device import DeviceFacts, device_facts
from ..codegen.store import checked_folder, store_folder
from ..triton_api import NEWEST, OLDEST, triton_folder
from ..version import __version__
from .findings import OLDEST_TORCH, PAIRS, SLOW, Machine, Version

EXAMPLES = ("flexdecode doctor", "flexdecode doctor --json")


class Line(NamedTuple):
    """A line of the report.

    Attributes:
        part: of the report.
        name: what is looked at.
        text: what was found.
        state: `ok`, `note`, `slow` or `wrong`.
    """

    part: str
    name: str
    text: str
    state: str = "ok"


def doctor(as_json: Annotated[bool, typer.Option("--json", help="Print the lines as JSON.")] = False) -> int:
    """Says what is installed, what it runs on, and what will fail or be slow.

    The exit status is 1 if something is wrong, else 0.
    """
    lines = list(examine())
    if as_json:
        typer.echo(json.dumps([line._asdict() for line in lines], indent=1))
    else:
        _print(lines)
    return int(any(line.state == "wrong" for line in lines))


def examine() -> Iterator[Line]:
    """All lines of the report."""
    facts, name = _gpu()
    machine = Machine(_version_of("torch"), _version_of("triton"), _version_of("numpy"), facts, os.environ)
    yield from _versions(machine)
    yield from _device(facts, name)
    yield from _folders()
    yield _compiler(facts)
    found = [row for row in PAIRS if row.applies(machine)]
    yield from (Line("known bad pairs", row.name, row.text, "wrong" if row.wrong else "note") for row in found)
    if not found:
        yield Line("known bad pairs", "none", "nothing is known against these versions")
    slow = [row for row in SLOW if row.applies(machine)]
    yield from (Line("slow", row.name, row.text, "slow") for row in slow)
    if not slow:
        yield Line("slow", "nothing", "no known reason")


def _print(lines: list[Line]) -> None:
    width = max(len(line.name) for line in lines)
    marks = {"ok": "", "note": "note: ", "slow": "", "wrong": "WRONG: "}
    before = None
    for line in lines:
        if line.part != before:
            typer.echo(("" if before is None else "\n") + line.part)
            before = line.part
        typer.echo(f"  {line.name:<{width}}  {marks[line.state]}{line.text}")


def _version_of(package: str) -> Version | None:
    try:
        match = re.match(r"(\d+)\.(\d+)", importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return None
    return (int(match[1]), int(match[2])) if match else None


def _versions(machine: Machine) -> Iterator[Line]:
    yield Line("versions", "flexdecode", __version__)
    yield Line("versions", "python", platform.python_version())
    for package, number, first, last in (
        ("torch", machine.torch, OLDEST_TORCH, None),
        ("triton", machine.triton, OLDEST, NEWEST),
        ("numpy", machine.numpy, None, None),
    ):
        if number is None:
            yield Line("versions", package, "not installed", "note")
            continue
        inside = (first is None or number >= first) and (last is None or number <= last)
        state = "ok" if inside else "wrong" if first is not None and number < first else "note"
        yield Line("versions", package, importlib.metadata.version(package) + _range(inside, first, last), state)


def _range(inside: bool, first: Version | None, last: Version | None) -> str:
    if first is None:
        return ""
    spelled = f"{first[0]}.{first[1]}" + (f" to {last[0]}.{last[1]}" if last else " or later")
    return f"  ({'in' if inside else 'outside of'} the range {spelled})"


def _gpu() -> tuple[DeviceFacts | None, str]:
    """Facts and name of the present GPU."""
    if not torch.cuda.is_available():
        return None, "none that PyTorch finds"
    place = torch.device("cuda", torch.cuda.current_device())
    return device_facts(place), torch.cuda.get_device_name(place)


def _device(facts: DeviceFacts | None, name: str) -> Iterator[Line]:
    yield Line("device", "GPU", name)
    if facts is None:
        return
    yield Line("device", "architecture", f"{facts.backend} {facts.arch}")
    yield Line("device", "multiprocessors", str(facts.num_sms))
    yield Line("device", "shared memory", f"{facts.shared_memory // 1024} KiB for one program")


def _folders() -> Iterator[Line]:
    folder = store_folder()
    there = folder.exists()
    yield Line("folders", "store of modules", f"{folder}{'' if there else '  (made by the first kernel)'}")
    if there:
        found = folder.stat()
        mine = found.st_uid == os.getuid()
        owner = _user(found.st_uid) + ("" if mine else f", and this process is {_user(os.getuid())}")
        yield Line("folders", "owner", owner, "ok" if mine else "note")
        yield Line("folders", "mode", f"{stat.S_IMODE(found.st_mode):04o}")
    try:
        checked_folder()
    except PermissionError as error:
        yield Line("folders", "refused", str(error), "wrong")
    if not _is_writable(folder):
        yield Line("folders", "not writable", "modules go to the folder for temporary files instead", "note")
    yield Line("folders", "store of Triton", triton_folder() or "Triton is not installed")


def _is_writable(folder: Path) -> bool:
    """Whether a folder, or the nearest one above it that exists, can be written to."""
    nearest = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    return nearest.is_dir() and os.access(nearest, os.W_OK | os.X_OK)


def _user(number: int) -> str:
    try:
        return pwd.getpwuid(number).pw_name
    except KeyError:
        return f"user {number}"


def _compiler(facts: DeviceFacts | None) -> Line:
    """Triton builds its launcher with a C compiler, once for each kind of kernel."""
    asked = os.environ.get("CC")
    for name in [asked] if asked else ["gcc", "clang"]:
        if path := shutil.which(name):
            return Line("compiler", "C", path)
    missing = f"{asked} (from CC) is missing" if asked else "neither gcc nor clang is found"
    return Line("compiler", "C", f"{missing}; Triton needs one on a machine with a GPU", "wrong" if facts else "note")
