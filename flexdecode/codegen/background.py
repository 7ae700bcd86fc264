"""Work that runs in a thread of its own while the first call goes on, and what threads do to all the process."""

from __future__ import annotations

import gc
import threading
from collections.abc import Callable
from typing import Generic, TypeVar

T = TypeVar("T")


class Task(Generic[T]):
    """A function that runs once: in a thread of its own if that has begun, else where its result is asked for."""

    def __init__(self, function: Callable[[], T]) -> None:
        self._function = function
        self._lock = threading.Lock()
        self._is_started = self._is_done = False
        self._value: T | None = None
        self._error: Exception | None = None

    def start(self, delay: float = 0.0) -> Task[T]:
        """Begins in a thread, after `delay` seconds. The end of the process waits for it."""
        if not self._is_started:
            self._is_started = True
            thread = threading.Timer(delay, self.finish) if delay else threading.Thread(target=self.finish)
            thread.name = "flexdecode"
            thread.start()
        return self

    def finish(self) -> None:
        """Waits for the function, or calls it if no thread has begun."""
        with self._lock:
            if not self._is_done:
                try:
                    self._value = self._function()
                except Exception as error:  # what stops the process is for the thread that runs the function
                    self._error = error
                self._is_done = True

    def result(self) -> T:
        """Waits for the function, and returns what it returned or raises what it raised."""
        self.finish()
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
