"""The folders that `load` registered, and launches of their kernels."""

from __future__ import annotations

import hashlib
from pathlib import Path
from types import ModuleType
from typing import Any

from ..memos import lock
from .folder import LAUNCHER, Entry, Folder
from .helper import import_launcher

# How the driver numbers the element types 8, 9 and 10 of Triton. Source: Triton's backends/nvidia/driver.py
_ELEMENT_TYPES = {8: 10, 9: 8, 10: 9}


def hash_of(identity: str) -> str:
    """The name of a kernel in a manifest."""
    return hashlib.sha256(identity.encode()).hexdigest()[:32]


class HelperLaunch:
    """Launches a kernel by the C helper. It takes the place of `triton_api.Launch`.

    Attributes:
        entry: of the kernel.
        source: the module that it was compiled from.
    """

    def __init__(self, launcher: ModuleType, entry: Entry, image: bytes, backend: str, source: Path, device: int):
        """Loads machine code into a device.

        Args:
            launcher: the C helper.
            entry: of the kernel.
            image: the machine code.
            backend: `cuda` or `hip`.
            source: the module that it was compiled from.
            device: the number of the device.

        Raises:
            RuntimeError: the driver refuses it.
        """
        self.entry, self.source = entry, source
        self._kernel = launcher.load(
            backend, entry.kernel, image, entry.form, device, entry.num_threads, entry.shared, int(entry.pdl)
        )
        self._launch, self._encode = launcher.launch, launcher.encode

    def __call__(self, grid: tuple[int, int], stream: int, arguments: tuple) -> None:
        """Launches on a stream; returns at once."""
        self._launch(self._kernel, grid[0], grid[1], stream, arguments)

    def encode_descriptors(self, key: object, value: object) -> tuple:
        """The launch arguments of two of Triton's tensor descriptors."""
        return tuple(
            part
            for of, meta in zip((key, value), self.entry.descriptors, strict=True)
            for part in self._one_descriptor(of, meta)
        )

    def _one_descriptor(self, of: Any, meta: dict[str, Any]) -> tuple:
        kind = meta["elem_type"]
        (rows, columns), (pitch, _) = of.shape, of.strides
        block = tuple(meta["block_size"])
        encoded = self._encode(
            of.base.data_ptr(), meta["swizzle"], meta["elem_size"], _ELEMENT_TYPES.get(kind, kind), block, rows,
            columns, pitch,
        )  # fmt: skip
        return encoded, *of.shape, *of.strides


class LoadedFolder:
    """A registered folder."""

    def __init__(self, folder: Folder) -> None:
        self.folder = folder
        self.launcher = import_launcher(folder.path / LAUNCHER, folder.checksums[LAUNCHER])
        self._launches: dict[tuple[str, int], HelperLaunch] = {}  # these stay: a CUDA graph may hold any of them

    def launch(self, name: str, device: int) -> HelperLaunch:
        """The kernel with this name in the manifest, on a device.

        Raises:
            CompileError: it did not compile when the folder was written, and the same would happen again.
            KernelFolderError: the machine code is missing or changed.
        """
        entry, folder = self.folder.entries[name], self.folder
        entry.check()
        key = name, device
        if key not in self._launches:
            image, source = folder.read(entry.binary), folder.path / entry.source
            backend = folder.made_with.backend
            self._launches[key] = HelperLaunch(self.launcher, entry, image, backend, source, device)
        return self._launches[key]


_loaded: dict[Path, LoadedFolder] = {}


def register(folder: Folder) -> None:
    """Lets `find` see the kernels of a folder. A folder that is read again replaces its earlier state.

    Raises:
        KernelFolderError: its C helper does not work here.
    """
    found = LoadedFolder(folder)
    with lock:
        _loaded[folder.path] = found


def any_folder() -> bool:
    """Whether any folder is registered."""
    return bool(_loaded)


def find(target: tuple[str, int | str], identity: str) -> tuple[LoadedFolder, str] | None:
    """Finds a kernel in the registered folders.

    Args:
        target: backend and architecture.
        identity: the text that identifies it.

    Returns:
        The folder and the kernel's name there, or None.
    """
    name = hash_of(identity)
    for loaded in reversed(_loaded.values()):
        made_with = loaded.folder.made_with
        if (made_with.backend, made_with.arch) == target and name in loaded.folder.entries:
            return loaded, name
    return None
