"""The errors that flexdecode raises about mods.

Wrong tensors and options raise `ValueError` or `TypeError`; a mod that cannot become a kernel raises one of these.
"""

from __future__ import annotations

import linecache
import os
import sys
from types import FrameType

import torch

_HIDDEN = (os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)


class FlexDecodeError(Exception):
    """Base of every error about a mod."""


class TraceError(FlexDecodeError):
    """The mod does something that a traced function cannot do, such as an `if` on an index."""


class UnsupportedOpError(TraceError):
    """The mod calls an operation that has no row in the op table."""


class CompileError(FlexDecodeError):
    """The generated kernel did not compile; the message names the source file."""


def user_line() -> str:
    """Returns the innermost line of the user's code on the stack, as `file:line, in function: text`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        if not name.startswith(_HIDDEN) and not name.startswith("<frozen"):
            text = linecache.getline(name, frame.f_lineno).strip()
            where = f"{name}:{frame.f_lineno}, in {frame.f_code.co_name}"
            return f"{where}: {text}" if text else where
        frame = frame.f_back
    return "<unknown line>"


def at_user_line(kind: type[TraceError], problem: str, remedy: str) -> TraceError:
    """Builds an error of three lines: the problem, the user's own line, the remedy."""
    return kind(f"{problem}\n  {user_line()}\n  {remedy}")
