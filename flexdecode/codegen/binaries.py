"""Compiled kernels in the store, which the C helper launches.

Triton has a store of its own. To look there, a new process has to hash all files of Triton and to read the source of
every function of the kernel. Both take longer than everything else that a call does. So a kernel is kept together with
what `launcher.c` has to know of it, by the identity of what it was compiled from.
"""

from __future__ import annotations

import functools
import hashlib
import json
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import torch

from ..ahead.folder import Entry
from ..ahead.helper import build_launcher, import_launcher, system
from ..ahead.loaded import HelperLaunch
from ..call.device import DeviceFacts
from ..errors import CompileError, KernelFolderError
from ..triton_api import ask_for_version, compiler_text
from . import store
from .background import Task
from .identity import target_of
from .template import sources_digest


class Binary(NamedTuple):
    """A compiled kernel.

    Attributes:
        entry: what the C helper has to know of it. Its source is the name of a module in the store.
        image: the machine code; empty if the kernel needs more shared memory than the device has.
    """

    entry: Entry
    image: bytes


def binary_identity(text: str, facts: DeviceFacts) -> str | None:
    """What identifies a kernel in the store; None if a setting asks Triton to do more than to compile.

    Args:
        text: what it is compiled from.
        facts: about the device that it is compiled for.
    """
    compiler = compiler_text((*target_of(facts), 32))
    if compiler is None:
        return None
    return f"{sources_digest()}\n{compiler}\n{facts.shared_memory}\n{text}"


def find_binary(identity: str | None) -> Binary | None:
    """Finds a kernel on disk.

    Raises:
        CompileError: it did not fit into the shared memory of the device.
        PermissionError: other users could put code into the store.
    """
    path = None if identity is None else store.find("kernels", identity)
    if path is None:
        return None
    try:
        head, _, image = path.read_bytes().partition(b"\n")
        entry = Entry(**json.loads(head))
    except (OSError, ValueError, TypeError):
        return None
    entry.check()
    return Binary(entry, image)


def keep_binary(identity: str | None, binary: Binary) -> None:
    """Writes a kernel to the disk, if the store can be written."""
    if identity is not None:
        store.keep("kernels", identity, json.dumps(asdict(binary.entry)).encode() + b"\n" + binary.image)


@functools.cache
def _helper() -> Task[Path]:
    return Task(_helper_file).start()


def _helper_file() -> Path:
    """The C helper on disk. It is built if it is not there."""
    identity = f"{sources_digest()}\n{system()}"
    return store.find("helpers", identity) or store.keep_anywhere("helpers", identity, build_launcher())


@functools.cache
def _asked(target: tuple[str, int | str, int]) -> Task[None]:
    return Task(lambda: ask_for_version(target)).start()


def start_tools(facts: DeviceFacts) -> Task[None]:
    """Begins to look for the C helper or to build it, and to ask the assembler for its version.

    That happens in other processes, so it costs the caller no time.

    Returns:
        The question for the version. If Triton compiles before it is answered, Triton asks as well.
    """
    _helper()
    return _asked((*target_of(facts), 32))


# These stay, as in folders: a CUDA graph may hold any of them, and nothing unloads machine code that was loaded.
_launches: dict[tuple[str, bytes, int], HelperLaunch] = {}


def launch_of(binary: Binary, device: int) -> HelperLaunch | None:
    """Loads a kernel into a device. None if there is no C helper, because no C compiler works or Python has no GIL.

    Raises:
        RuntimeError: the driver refuses the machine code.
    """
    key = repr(binary.entry), hashlib.sha256(binary.image).digest(), device
    found = _launches.get(key)
    if found is None:
        try:
            path = _helper().result()
            launcher = import_launcher(path, path.stem)
        except (CompileError, KernelFolderError):
            return None
        source = store.module_file(binary.entry.source)
        with torch.cuda.device(device):
            found = _launches[key] = HelperLaunch(launcher, binary.entry, binary.image, "cuda", source, device)
    return found
