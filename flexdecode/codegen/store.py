"""The store of generated modules and of measured schedules on disk.

The name of a file is the hash of its text. An index maps what a module is generated from (graphs, templates, library
version) to its file, so a known module needs no analysis and no generation. The module of the second pass lies in the
same folder. No mod changes it. Triton keeps the machine code in its own store. Records are what `codegen.tuned` has
measured; no code is in them. Files are published by `os.replace`. A damaged file is written again.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import stat
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..memos import counters
from ..version import __version__


def store_folder() -> Path:
    """`$FLEXDECODE_CACHE_DIR`, else `flexdecode` in the user's cache folder; `~` is the home folder."""
    chosen = os.environ.get("FLEXDECODE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "flexdecode"


def stored_module(identity: str, generate: Callable[[], str]) -> Path:
    """Finds the file of the module for `identity` on disk, or generates and writes it.

    Args:
        identity: everything that the text depends on, except the library itself.
        generate: makes the text.

    Raises:
        PermissionError: other users could put code into the folder, and it would be imported.
    """
    entry = hashlib.sha256(f"{__version__}\n{identity}".encode()).hexdigest()
    folder = checked_folder()
    index = folder / "index" / entry
    with contextlib.suppress(OSError, UnicodeDecodeError):
        found = _find_module(folder, index.read_text())
        if found is not None:
            counters.disk_hits += 1
            return found
    path = _publish_module(folder, generate())
    counters.generations += 1
    if path.parent == folder / "modules":
        with contextlib.suppress(OSError):
            _publish(index, path.stem)
    return path


def fixed_module(text: str) -> Path:
    """Finds the file of a module that depends on no mod on disk, or writes it.

    Raises:
        PermissionError: as for `stored_module`.
    """
    folder = checked_folder()
    return _find_module(folder, _name_of(text.encode())) or _publish_module(folder, text)


def stored_modules() -> list[Path]:
    """The files of all modules on disk, also those that another version of the library made."""
    return sorted((store_folder() / "modules").glob("*.py"))


def record_path(identity: str) -> Path:
    """Where a record lies that was measured for `identity`, if there is one."""
    return store_folder() / "schedules" / f"{_name_of(identity.encode())}.json"


def keep_record(identity: str, text: str) -> None:
    """Writes a record. In a folder that cannot be written to, nothing is kept."""
    with contextlib.suppress(OSError):
        store_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        _publish(record_path(identity), text)


def stored_records() -> list[Path]:
    """The files of all records on disk, also those that another version of the library made."""
    return sorted((store_folder() / "schedules").glob("*.json"))


def clear_store() -> None:
    """Removes modules, their index and records from the disk. Calls that come later make them again."""
    for path in (*stored_modules(), *(store_folder() / "index").glob("*"), *stored_records()):
        path.unlink(missing_ok=True)


def _name_of(text: bytes) -> str:
    return hashlib.sha256(text).hexdigest()[:32]


def _find_module(folder: Path, name: str) -> Path | None:
    """The module of this name; None if there is none or its text does not match its name."""
    path = folder / "modules" / f"{name}.py"
    try:
        return path if _name_of(path.read_bytes()) == name else None
    except (OSError, ValueError):  # a damaged index may hold a name that no file can have
        return None


def _publish_module(folder: Path, text: str) -> Path:
    name = f"{_name_of(text.encode())}.py"
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        return _publish(folder / "modules" / name, text)
    except OSError:  # a read-only home: the module lives as long as the machine's temporary files
        return _publish(_temporary_folder() / name, text)


def checked_folder() -> Path:
    """The folder of the store. It is refused if everybody can write into any part, because code is imported from it.

    Raises:
        PermissionError: everybody can.
    """
    folder = store_folder()
    for place in (folder, folder / "index", folder / "modules"):
        try:
            mode = place.stat().st_mode
        except OSError:  # it does not exist yet, or cannot be read
            continue
        if mode & stat.S_IWOTH:
            raise PermissionError(
                f"everybody can write into the cache folder {place}, and flexdecode imports code from there: "
                "`chmod o-w` it, or choose another one by FLEXDECODE_CACHE_DIR"
            )
    return folder


def _temporary_folder() -> Path:
    """A folder of this user alone, in the machine's folder for temporary files. Others can write to the latter.

    Raises:
        PermissionError: the folder with this name belongs to somebody else, or is open to others.
    """
    folder = Path(tempfile.gettempdir()) / f"flexdecode-{os.getuid()}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        reason = "is no folder"
    elif found.st_uid != os.getuid():
        reason = "belongs to another user"
    elif found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        reason = "is open to others"
    else:
        return folder
    raise PermissionError(
        f"{folder} {reason}, and flexdecode imports code from there: remove it, or choose a folder of your own by "
        "FLEXDECODE_CACHE_DIR"
    )


def _publish(path: Path, text: str) -> Path:
    """Writes a file. Another process sees all of it or nothing."""
    path.parent.mkdir(mode=0o775, parents=True, exist_ok=True)  # with any umask, not everybody can write to it
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "w") as file:
            file.write(text)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
