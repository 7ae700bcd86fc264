"""What a user did wrong, in one line: the one place that turns exceptions into messages."""

from __future__ import annotations

from traceback import walk_tb
from types import TracebackType

import typer

from ..errors import FlexDecodeError

_UsageError = typer.BadParameter.__mro__[1]  # newer versions of typer have a class of their own for it
user_files: set[str] = set()  # files of users that this process has imported
_EXPECTED = (ValueError, TypeError, ImportError, OSError)  # what the library raises for wrong arguments


class Mistake(Exception):
    """A user's mistake; the message is what to say about it."""


def explain_mistake(error: Exception) -> str | None:
    """Says what is wrong, or returns None if an exception is not the user's mistake."""
    if isinstance(error, Mistake | FlexDecodeError):
        return str(error)  # an error about a mod has lines of its own: the problem, the user's line, the remedy
    if isinstance(error, typer.Abort):
        return "nothing was confirmed; `--yes` answers beforehand"
    if isinstance(error, _UsageError):
        context = getattr(error, "ctx", None)
        more = f" (`{context.command_path} --help` has an example)" if context is not None else ""
        return f"{error.format_message()}{more}"  # type: ignore[attr-defined]  # the class is found at run time
    place = _place_in(error.__traceback__)
    if place is not None:
        return f"{place}: {describe(error)}"
    if isinstance(error, OSError) and error.strerror:
        return f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return (str(error) or type(error).__name__) if isinstance(error, _EXPECTED) else None


def describe(error: BaseException) -> str:
    """An exception as one line: its type and the first line of its message."""
    lines = str(error).splitlines()
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__


def _place_in(traceback: TracebackType | None) -> str | None:
    """The innermost line of a user's file in a traceback, as `file:line`; None without one."""
    found = None
    for frame, line in walk_tb(traceback):
        if frame.f_code.co_filename in user_files:
            found = f"{frame.f_code.co_filename}:{line}"
    return found


def load_error(path: str, error: BaseException) -> Mistake:
    """The mistake of a file that does not import: file, line and exception."""
    if isinstance(error, SyntaxError) and error.filename == path:
        return Mistake(f"{path}:{error.lineno}: {type(error).__name__}: {error.msg}")
    return Mistake(f"{_place_in(error.__traceback__) or path}: {describe(error)}")
