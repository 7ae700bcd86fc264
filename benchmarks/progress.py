"""A progress bar: rich when it is installed and the output is a terminal, else one plain line a step."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

__all__ = ["progress_bar"]


@contextlib.contextmanager
def progress_bar(total: int) -> Iterator[Callable[[str, str], None]]:
    """Show progress over `total` steps.

    Yields:
        `step(name, figures)`, to be called after each step.
    """
    bar = _rich_bar() if sys.stdout.isatty() else None
    if bar is None:
        yield _plain_lines(total)
        return
    with bar:
        task = bar.add_task("starting", total=total)
        yield lambda name, figures: bar.update(task, advance=1, description=f"{name}  {figures}")


def _rich_bar():
    try:
        from rich import progress
    except ImportError:
        return None
    return progress.Progress(
        progress.BarColumn(bar_width=24),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.description}", markup=False),
    )


def _plain_lines(total: int) -> Callable[[str, str], None]:
    started, done = time.monotonic(), 0

    def step(name: str, figures: str) -> None:
        nonlocal done
        done += 1
        print(f"[{done:>{len(str(total))}}/{total} {time.monotonic() - started:5.0f} s] {name}  {figures}", flush=True)

    return step
