"""A folder of kernels on disk: its manifest, its files and their checksums.

    manifest.json           what the folder was made with, all kernels, and the checksum of every file
    launcher.abi3.so        the C helper that loads and launches the kernels
    kernels/*.cubin         machine code (`.hsaco` for AMD)
    sources/*.py            the generated modules that it was compiled from, for people

The manifest is published last and by `os.replace`, so another process sees all of a kernel or nothing.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import re
import stat
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import CompileError, KernelFolderError, SharedMemoryError

FORMAT = 1
MANIFEST = "manifest.json"
LAUNCHER = "launcher.abi3.so"
_FILE_NAME = re.compile(r"(?:(?:kernels|sources)/)?\w[\w.]*")


class MadeWith(NamedTuple):
    """What a folder is good for only.

    Attributes:
        flexdecode: version of the library.
        sources: hash of its files, because a checkout changes without a new version.
        triton: version of Triton.
        system: operating system and processor, of the C helper.
        backend: `cuda` or `hip`.
        arch: architecture of the GPU: 90 for sm_90, or a name.
    """

    flexdecode: str
    sources: str
    triton: str
    system: str
    backend: str
    arch: int | str

    @property
    def target(self) -> str:
        """The architecture as its vendor calls it."""
        return f"sm_{self.arch}" if self.backend == "cuda" else str(self.arch)


@dataclass(frozen=True)
class Entry:
    """One kernel of a folder, or why there is none.

    Attributes:
        kernel: `decode_split` or `decode_combine`.
        signature: in words.
        refusal: the name and the message of the error that compiling raised, where another kernel takes its place.
        binary, source: files of the folder.
        form: the arguments, see `launcher.c`.
        num_threads: of a program.
        shared: bytes of shared memory.
        pdl: whether the kernel may start before the previous one has finished.
        descriptors: how Triton encodes each tensor descriptor.
        arguments: names of the parameters, without those known at compile time.
    """

    kernel: str
    signature: str
    refusal: tuple[str, str] | None = None
    binary: str = ""
    source: str = ""
    form: str = ""
    num_threads: int = 0
    shared: int = 0
    pdl: bool = False
    descriptors: list[dict[str, Any]] = field(default_factory=list)
    arguments: list[str] = field(default_factory=list)

    def check(self) -> None:
        """Raises again what compiling the kernel raised.

        Raises:
            CompileError: there is no machine code.
        """
        if self.refusal is not None:
            kind, message = self.refusal
            raise (SharedMemoryError if kind == SharedMemoryError.__name__ else CompileError)(message)


class Folder(NamedTuple):
    """What is known of a folder.

    Attributes:
        path: of the folder.
        made_with: versions.
        entries: kernels by the hash of what identifies them.
        checksums: SHA-256 of every file by its name.
    """

    path: Path
    made_with: MadeWith
    entries: dict[str, Entry]
    checksums: dict[str, str]

    def read(self, name: str) -> bytes:
        """The content of a file.

        Raises:
            KernelFolderError: it is missing, or not what was written.
        """
        try:
            content = (self.path / name).read_bytes()
        except OSError as error:
            raise damaged(self.path, f"{name} cannot be read: {error.strerror}") from None
        if hashlib.sha256(content).hexdigest() != self.checksums.get(name):
            raise damaged(self.path, f"{name} has another checksum")
        return content


def damaged(path: Path, what: str) -> KernelFolderError:
    """The error for a folder whose content is wrong."""
    return KernelFolderError(
        f"the folder of kernels {path} is damaged, {what}: delete it and write it again with flexdecode.save_kernels"
    )


def read_folder(path: Path, here: MadeWith) -> Folder:
    """Reads the manifest of a folder.

    Args:
        path: of the folder.
        here: what it has to be made with. Its architecture is not compared.

    Raises:
        KernelFolderError: there is no such folder, it is damaged, or it was made with something else.
        PermissionError: everybody can write into it.
    """
    if not path.is_dir():
        raise KernelFolderError(f"there is no folder {path}: write it with flexdecode.save_kernels")
    if not (path / MANIFEST).is_file():
        raise KernelFolderError(
            f"{path} is no folder of kernels, or a damaged one: it has no {MANIFEST}; flexdecode.save_kernels writes it"
        )
    _refuse_open(path)
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        claimed = manifest.pop("checksum", None)
        written = dict(manifest["made_with"])
    except OSError as error:
        raise damaged(path, f"{MANIFEST} cannot be read: {error.strerror}") from None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise damaged(path, f"{MANIFEST} is no manifest") from None
    check_made_with(path, written, here)  # before all else: another version may write other things
    if manifest.get("format") != FORMAT or claimed != _checksum(manifest):
        raise damaged(path, f"{MANIFEST} has another checksum")
    entries = {identity: Entry(**entry) for identity, entry in manifest["entries"].items()}
    checksums = manifest["checksums"]
    if not all(map(_FILE_NAME.fullmatch, checksums)):
        raise damaged(path, f"{MANIFEST} names files outside of it")
    return Folder(path, MadeWith(**written), entries, checksums)


def check_files(folder: Folder) -> None:
    """Checks that every file of a folder is as it was written.

    Raises:
        KernelFolderError: one is missing or changed.
        PermissionError: everybody can write to one.
    """
    for name in folder.checksums:
        folder.read(name)
        _refuse_open(folder.path / name)
    for name in {"", *(os.path.dirname(name) for name in folder.checksums)}:
        _refuse_open(folder.path / name)


def check_made_with(path: Path, written: Mapping[str, Any], here: MadeWith) -> None:
    """Refuses a folder of other versions. Those of the folder are not checked yet.

    Raises:
        KernelFolderError: a version or the system differs.
    """
    again = "write it again with flexdecode.save_kernels"
    for name, spelled in (("flexdecode", "flexdecode {}"), ("triton", "Triton {}"), ("system", "{}")):
        theirs, ours = spelled.format(written.get(name)), spelled.format(getattr(here, name))
        if theirs != ours:
            raise KernelFolderError(f"the folder {path} was written with {theirs}, this is {ours}: {again}")
    if written.get("sources") != here.sources:
        raise KernelFolderError(
            f"the folder {path} was written by flexdecode {here.flexdecode} with other source files: {again}"
        )


def check_target(path: Path, made_with: MadeWith, here: MadeWith, remedy: str) -> None:
    """Refuses a folder for another architecture.

    Raises:
        KernelFolderError: the architecture differs.
    """
    if made_with.target != here.target:
        raise KernelFolderError(
            f"the folder {path} was compiled for {made_with.target}, this GPU is {here.target}: {remedy}"
        )


def add_to_folder(path: Path, made_with: MadeWith, entries: Mapping[str, Entry], files: Mapping[str, bytes]) -> None:
    """Writes kernels into a folder, which may have others; makes it if there is none.

    Raises:
        KernelFolderError: the folder is damaged, or was made with something else.
        PermissionError: everybody can write into it.
    """
    path.mkdir(mode=0o775, parents=True, exist_ok=True)  # with any umask, not everybody can write to it
    _refuse_open(path)
    with _locked(path):
        known = Folder(path, made_with, {}, {})
        if (path / MANIFEST).exists():
            known = read_folder(path, made_with)
        checksums = known.checksums | {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        for name, content in files.items():
            _publish(path / name, content)
        merged = {identity: asdict(entry) for identity, entry in {**known.entries, **entries}.items()}
        manifest = {
            "format": FORMAT,
            "made_with": made_with._asdict(),
            "entries": merged,
            "checksums": checksums,
        }
        manifest["checksum"] = _checksum(manifest)
        _publish(path / MANIFEST, json.dumps(manifest, indent=1).encode())


def _checksum(manifest: dict) -> str:
    """The hash of a manifest without its own checksum."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def _refuse_open(path: Path) -> None:
    """Refuses a place that everybody can write to, because code is loaded from there.

    Raises:
        PermissionError: everybody can write to it.
    """
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mode & stat.S_IWOTH:
            raise PermissionError(f"everybody can write to {path}, and flexdecode loads code from it: `chmod o-w` it")


@contextlib.contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lets one process at a time change a folder."""
    with open(path / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _publish(path: Path, content: bytes) -> None:
    """Writes a file that everybody may read. Another process sees all of it or nothing."""
    path.parent.mkdir(mode=0o775, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=".new")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
