"""The errors that flexdecode raises about mods.

Wrong tensors and options raise `ValueError` or `TypeError`; a mod that cannot become a kernel raises one of these.
"""

from __future__ import annotations

import contextlib
import dis
import linecache
import os
import sys
import threading
import warnings
from collections.abc import Iterator
from traceback import walk_stack, walk_tb
from types import TracebackType
from typing import Any, NamedTuple

import torch

_HIDDEN = (os.path.dirname(os.path.abspath(__file__)) + os.sep, os.path.dirname(torch.__file__) + os.sep)
# What a prepared call says in a region, and torch.compile where it must not end one.
IN_REGION = (
    "a prepared call works on the host: in a region that torch.compile or torch.export traces, call "
    "flexdecode.flex_decode, which becomes one operation there"
)


class FlexDecodeError(Exception):
    """Base of every error about a mod."""


class TraceError(FlexDecodeError):
    """The mod does something that a traced function cannot do, such as an `if` on an index."""


class UnsupportedOpError(TraceError):
    """The mod calls an operation that has no row in the op table."""


class CompileError(FlexDecodeError):
    """The generated kernel did not compile; the message names the source file."""


class CompilationForbiddenError(CompileError):
    """A kernel would have to be compiled after `forbid_compilation()`; the message names its signature."""


class KernelFolderError(FlexDecodeError):
    """A folder of kernels is damaged, or was written for something else; the message is one line with the remedy."""


class TritonVersionError(FlexDecodeError):
    """The installed Triton is one that flexdecode cannot launch kernels with; the message names it and the remedy."""


class SharedMemoryError(CompileError):
    """A compiled kernel needs more shared memory than the device gives one program."""


class IndexRangeError(FlexDecodeError):
    """A captured tensor is read out of range at a pair that attends (found by `DecodeOptions(debug=True)`).

    Attributes:
        graph: of the mod.
        load: its node.
        found: where, in words.
    """

    def __init__(self, graph: Any, load: Any, found: str) -> None:
        super().__init__(found)
        self.graph = graph
        self.load = load
        self.found = found


def is_user_file(name: str) -> bool:
    """Whether code of a file is the user's: not of this package, PyTorch or Python's import system."""
    return not name.startswith((*_HIDDEN, "<frozen"))


def user_line(traceback: TracebackType | None = None) -> str:
    """Returns the innermost line of the user's code, as `file:line, in function: text`.

    Args:
        traceback: where an exception came from; by default the stack of the caller.
    """
    if lines.known:
        return lines.known
    steps = walk_stack(sys._getframe(1)) if traceback is None else reversed(list(walk_tb(traceback)))
    for frame, line in steps:
        name = frame.f_code.co_filename
        if is_user_file(name):
            text = linecache.getline(name, line).strip()
            where = f"{name}:{line}, in {frame.f_code.co_name}"
            return f"{where}: {text}" if text else where
    return "<unknown line>"


class UserStep(NamedTuple):
    """The operation that the user's code is at: its name in bytecode, and its text if Python knows where it is."""

    operation: str
    text: str


def user_step() -> UserStep:
    """The operation of the innermost frame of the user's code."""
    for frame, _ in walk_stack(sys._getframe(1)):
        if is_user_file(frame.f_code.co_filename):
            steps = dis.get_instructions(frame.f_code)
            step = next((step for step in steps if step.offset == frame.f_lasti), None)
            if step is None:
                break
            place = getattr(step, "positions", None)  # since Python 3.11
            if place is None or place.lineno is None or place.col_offset is None:
                return UserStep(step.opname, "")
            line = linecache.getline(frame.f_code.co_filename, place.lineno).encode()
            return UserStep(step.opname, line[place.col_offset :].decode(errors="replace").strip())
    return UserStep("", "")


def warn_user(text: str) -> None:
    """Gives a RuntimeWarning that shows the line of the user's code that called flexdecode."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and not is_user_file(frame.f_code.co_filename):
        level, frame = level + 1, frame.f_back
    warnings.warn(text, RuntimeWarning, stacklevel=level)


class _Lines(threading.local):
    """The user's line, where it is known otherwise than from the stack: while a recorded mod is replayed."""

    known = ""

    @contextlib.contextmanager
    def at(self, line: str) -> Iterator[None]:
        """Errors of this thread name `line`."""
        before, self.known = self.known, line
        try:
            yield
        finally:
            self.known = before


lines = _Lines()


class _Raised(threading.local):
    """The last error of a thread that `at_user_line` built, so that a mod cannot swallow it unseen."""

    error: TraceError | None = None


raised = _Raised()


def at_user_line(kind: type[TraceError], problem: str, remedy: str) -> TraceError:
    """Builds an error of three lines: the problem, the user's own line, the remedy."""
    raised.error = kind(f"{problem}\n  {user_line()}\n  {remedy}")
    return raised.error
