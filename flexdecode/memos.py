"""What is remembered in memory: bounded dicts, and counters of what was made and found."""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

T = TypeVar("T")


@dataclass
class CacheInfo:
    """What happened since the start or the last `clear_cache()`.

    Attributes:
        calls: calls of `flex_decode`.
        hits: calls that found everything prepared (mods, shapes and strides seen before).
        traces: mods traced.
        generations: modules written from graphs.
        compilations: kernels compiled or found on disk. The second pass, which merges the parts of a row, is not
            counted: calls share it.
        disk_hits: kernels found on disk, with no compilation; and modules found there, with no analysis and no
            generation, for kernels that had to be compiled.
        loads: kernels taken from a folder that `load` registered, with no compilation.
    """

    calls: int = 0
    hits: int = 0
    traces: int = 0
    generations: int = 0
    compilations: int = 0
    disk_hits: int = 0
    loads: int = 0


counters = CacheInfo()
lock = threading.RLock()


def snapshot() -> CacheInfo:
    """A copy of the counters."""
    return replace(counters)


def reset() -> None:
    """Sets every counter to zero."""
    vars(counters).update(vars(CacheInfo()))


_memos: list[Bounded] = []


class Bounded(dict):
    """A dict that forgets its oldest entries; a lookup is a plain dict lookup."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.limit = limit

    @staticmethod
    def memo(limit: int) -> Bounded:
        """One for what can be computed again, which `clear_cache()` empties."""
        _memos.append(Bounded(limit))
        return _memos[-1]

    def add(self, key: Hashable, value: object) -> None:
        """Stores a value; the oldest entries make room."""
        with lock:
            self[key] = value
            while len(self) > self.limit:
                self.pop(next(iter(self)), None)


def forget_memos() -> None:
    """Empties every memo."""
    for memo in _memos:
        memo.clear()


def hashed_once(frozen: type[T]) -> type[T]:
    """Lets each object of a frozen dataclass remember its hash, which memos ask for at every call."""
    compute = frozen.__hash__

    def remembered(self: Any) -> int:
        found = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = compute(self)
        return found

    frozen.__hash__ = remembered  # type: ignore[method-assign, assignment]
    return frozen
