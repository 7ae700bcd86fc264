"""Work that runs in a thread of its own while the first call goes on, and what threads do to all the process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(threading.Thread, Generic[T]):
    """A function that has been started in a thread. The end of the process waits for it."""

    def __init__(self, function: Callable[[], T]) -> None:
        super().__init__(name="flexdecode")
        self._function = function
        self._value: T | None = None
        self._error: BaseException | None = None
        self.start()

    def run(self) -> None:
        """Calls the function."""
        try:
            self._value = self._function()
        except BaseException as error:
            self._error = error

    def result(self) -> T:
        """Waits for the function, and returns what it returned or raises what it raised."""
        self.join()
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it has returned


class Uncollected:
    """No garbage is collected while at least one thread is inside."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._was_enabled = False

    def __enter__(self) -> None:
        with self._lock:
            if self._inside == 0:
                self._was_enabled = gc.isenabled()
                gc.disable()
            self._inside += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._inside -= 1
            if self._inside == 0 and self._was_enabled:
                gc.enable()


uncollected = Uncollected()
