"""Work that runs in a thread of its own while the first call goes on."""

from __future__ import annotations

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
