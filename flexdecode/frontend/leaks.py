"""Finds traced values that a mod stores in an object that outlives the trace, such as a list outside the mod."""

from __future__ import annotations

import gc
import linecache
import sys
from collections import deque
from collections.abc import Callable
from types import CellType, FrameType, FunctionType, GeneratorType
from typing import Any

from ..errors import TraceError, is_user_file
from .symbol import Symbol, TraceContext

_REMEDY = (
    "A mod is run on symbols when it is traced, not at every call: use a variable of its own, and compute what "
    "shall stay outside the mod."
)


def check_leaks(context: TraceContext, run_again: Callable[[], TraceContext]) -> None:
    """Refuses a mod whose symbols are still held after its run, and takes them out of lists and dicts.

    Args:
        context: of the finished run.
        run_again: runs the mod once more, to find the line that stores a symbol.

    Raises:
        TraceError: something holds a symbol.
    """
    if not _alive(context):
        return
    gc.collect()  # frees functions that contain themselves
    alive = _alive(context)
    holder = next((found for symbol in alive for found in gc.get_referrers(symbol) if _holds(found, alive)), None)
    if holder is None:
        return
    del alive
    _take_out(holder)  # else the next run would find a traced value among the mod's captures
    line = _line_that_stores(holder, run_again)
    _take_out(holder)
    place = f"  {line}\n" if line else ""
    raise TraceError(f"{context.kind} keeps a traced value in a {type(holder).__name__}\n{place}  {_REMEDY}")


def _alive(context: TraceContext) -> list[Symbol]:
    return [symbol for made in context.made if (symbol := made()) is not None]


def _holds(found: Any, alive: list[Symbol]) -> bool:
    """Whether an object that refers to a symbol is the user's, and not a frame, closure or list of this module."""
    return found is not alive and not isinstance(found, (FrameType, FunctionType, CellType, GeneratorType, Symbol))


def _line_that_stores(holder: Any, run_again: Callable[[], TraceContext]) -> str:
    """The user's line after which the holder has one more symbol."""
    found: list[str] = []
    last: tuple[str, int, str] | None = None
    before = [item for item in gc.get_referents(holder) if isinstance(item, Symbol)]

    def step(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal last
        code = frame.f_code
        if not is_user_file(code.co_filename) or code.co_filename == "<string>":  # methods of dataclasses
            return None
        held = [item for item in gc.get_referents(holder) if isinstance(item, Symbol)]
        if last is not None and not found and any(all(item is not b for b in before) for item in held):
            name, line, function = last
            found.append(f"{name}:{line}, in {function}: {linecache.getline(name, line).strip()}")
        last = code.co_filename, frame.f_lineno, code.co_name
        return step

    outer = sys.gettrace()
    sys.settrace(step)
    try:
        run_again()
    finally:
        sys.settrace(outer)
    return found[0] if found else ""


def _take_out(holder: Any) -> None:
    if isinstance(holder, (list, deque)):
        kept = [item for item in holder if not isinstance(item, Symbol)]
        holder.clear()
        holder.extend(kept)
    elif isinstance(holder, dict):
        for name in [name for name, item in holder.items() if isinstance(item, Symbol)]:
            del holder[name]
