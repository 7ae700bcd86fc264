"""The store on disk: generated modules, compiled kernels, the C helper that launches them, and measured schedules.

The name of a file is the hash of its content. An index maps what a file is made from (graphs, templates, library
version) to its name, so a known module needs no analysis and no generation, and a known kernel needs no module. The
module of the second pass lies in the same folder as those of the first pass. No mod changes it. Files are published by
`os.replace`. A damaged file is written again.
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

# Of the files in each folder of the store.
SUFFIXES = {"modules": ".py", "kernels": ".kernel", "helpers": ".so", "schedules": ".json"}


def store_folder() -> Path:
    """`$FLEXDECODE_CACHE_DIR`, else `flexdecode` in the user's cache folder; `~` is the home folder."""
    chosen = os.environ.get("FLEXDECODE_CACHE_DIR")
    if chosen:
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "flexdecode"


def find(kind: str, identity: str) -> Path | None:
    """Finds a file on disk.

    Args:
        kind: of `SUFFIXES`.
        identity: everything that its content depends on, except the version of the library.

    Raises:
        PermissionError: other users could put code into the folder, and it would be executed.
    """
    folder = checked_folder()
    try:
        return _find(folder, kind, (folder / "index" / _entry(identity)).read_text())
    except (OSError, UnicodeDecodeError):
        return None


def keep(kind: str, identity: str | None, content: bytes) -> Path | None:
    """Writes a file, and lists it in the index if it has an identity; None if the folder cannot be written."""
    folder = store_folder()
    name = _name_of(content)
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = _publish(folder / kind / f"{name}{SUFFIXES[kind]}", content)
    except OSError:
        return None
    if identity is not None:
        with contextlib.suppress(OSError):
            _publish(folder / "index" / _entry(identity), name.encode())
    return path


def keep_anywhere(kind: str, identity: str | None, content: bytes) -> Path:
    """As `keep`. If the home is read-only, the file lives as long as the machine's temporary files."""
    found = keep(kind, identity, content)
    return found or _publish(_temporary_folder() / f"{_name_of(content)}{SUFFIXES[kind]}", content)


def stored_module(identity: str, generate: Callable[[], str]) -> Path:
    """Finds the file of the module for `identity` on disk, or generates and writes it.

    Args:
        identity: as for `find`.
        generate: makes the text.

    Raises:
        PermissionError: as for `find`.
    """
    found = find("modules", identity)
    if found is not None:
        counters.disk_hits += 1
        return found
    path = keep_anywhere("modules", identity, generate().encode())
    counters.generations += 1
    return path


def fixed_module(text: str) -> Path:
    """Finds the file of a module that depends on no mod on disk, or writes it.

    Raises:
        PermissionError: as for `find`.
    """
    content = text.encode()
    return _find(checked_folder(), "modules", _name_of(content)) or keep_anywhere("modules", None, content)


def module_file(name: str) -> Path:
    """Where the module of this name lies, if it is still there."""
    return store_folder() / "modules" / f"{name}.py"


def stored_files(kind: str) -> list[Path]:
    """All files of a kind on disk, also those that another version of the library made."""
    return sorted((store_folder() / kind).glob(f"*{SUFFIXES[kind]}"))


def clear_store() -> None:
    """Removes all files and their index from the disk. Calls that come later make them again."""
    for path in (*(path for kind in SUFFIXES for path in stored_files(kind)), *(store_folder() / "index").glob("*")):
        path.unlink(missing_ok=True)


def _name_of(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _entry(identity: str) -> str:
    """The file in the index."""
    return hashlib.sha256(f"{__version__}\n{identity}".encode()).hexdigest()


def _find(folder: Path, kind: str, name: str) -> Path | None:
    """The file of this name; None if there is none or its content does not match its name."""
    path = folder / kind / f"{name}{SUFFIXES[kind]}"
    try:
        return path if _name_of(path.read_bytes()) == name else None
    except (OSError, ValueError):  # a damaged index may hold a name that no file can have
        return None


def checked_folder() -> Path:
    """The folder of the store. It is refused if everybody can write into any part, because code is imported from it.

    Raises:
        PermissionError: everybody can.
    """
    folder = store_folder()
    for place in (folder, folder / "index", *(folder / kind for kind in SUFFIXES)):
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


def _publish(path: Path, content: bytes) -> Path:
    """Writes a file. Another process sees all of it or nothing."""
    path.parent.mkdir(mode=0o775, parents=True, exist_ok=True)  # with any umask, not everybody can write to it
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
    return path
