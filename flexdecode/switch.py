"""The switch that turns compilations into errors."""

from __future__ import annotations

import os
from types import TracebackType

from .errors import CompilationForbiddenError

_chosen: bool | None = None  # None: `FLEXDECODE_NO_COMPILE` decides


class Switch:
    """What `forbid_compilation` and `allow_compilation` return: as a context manager, it restores what was before."""

    def __init__(self, forbidden: bool) -> None:
        global _chosen
        self._before = _chosen
        _chosen = forbidden

    def __enter__(self) -> Switch:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        global _chosen
        _chosen = self._before


def forbid_compilation() -> Switch:
    """From now on, a call that would have to compile raises a `CompilationForbiddenError`, in all threads.

        >>> flexdecode.load("kernels")
        >>> flexdecode.forbid_compilation()  # until allow_compilation()
        >>> with flexdecode.forbid_compilation():  # or only within the block
        ...     out = flexdecode.flex_decode(query, key, value)

    Kernels in memory and in folders that `load` registered still run. Everything else counts as a compilation, also
    what would be found on disk, so that a call fails or works whatever is there. Tracing a mod
    needs no compiler and is allowed. The variable `FLEXDECODE_NO_COMPILE=1` does the same from the start.

    Returns:
        A context manager that restores what was before. Without `with`, the switch stays.
    """
    return Switch(True)


def allow_compilation() -> Switch:
    """From now on, calls may compile again, also if `FLEXDECODE_NO_COMPILE=1` is set.

    Returns:
        A context manager that restores what was before. Without `with`, the switch stays.
    """
    return Switch(False)


def is_forbidden() -> bool:
    """Whether compilations are errors."""
    return os.environ.get("FLEXDECODE_NO_COMPILE") == "1" if _chosen is None else _chosen


def check_allowed(kernel: str, signature: str, remedy: str) -> None:
    """Refuses a compilation if they are forbidden.

    Args:
        kernel: what would be compiled.
        signature: of the kernel, in words; empty if it has none.
        remedy: what to do instead, a sentence.

    Raises:
        CompilationForbiddenError: compilations are forbidden.
    """
    if is_forbidden():
        of = f"\n  signature: {signature}" if signature else ""
        raise CompilationForbiddenError(
            f"{kernel} would have to be compiled, and compilation is forbidden: it is neither in memory nor in a "
            f"loaded folder{of}\n  {remedy}"
        )
