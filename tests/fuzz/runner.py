"""Runs many cases in several processes, and counts."""

import multiprocessing.connection
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

from fast_interpreter import install

from .case import DEAD
from .generate import DRAWS, random_case

_CHUNK = 60  # cases that a process takes at a time


def run_cases(backend: str, seeds: range, finite: tuple = (), until: float = float("inf")) -> Iterator[dict]:
    """Runs cases in this process.

    Args:
        backend: as of `random_case`.
        seeds: of the cases.
        finite: dead places that are to hold numbers.
        until: time at which to stop.

    Yields:
        For each case that ran: `seed`, and `kind` and `error` of its failure or None.
    """
    from .check import check
    from .shrink import kind_of

    if backend == "interpret":
        install()
    for seed in seeds:
        if time.time() > until:
            break
        case = random_case(seed, backend)
        case = replace(case, dead=tuple(place for place in case.dead if place not in finite))
        result = {"seed": seed, "kind": None, "error": None}
        try:
            check(case)
        except Exception as error:
            result |= {"kind": kind_of(error), "error": (str(error).splitlines() or [""])[0][:300]}
        yield result


def run_parallel(
    backend: str, start: int, examples: int, jobs: int, minutes: float | None = None, finite: tuple = ()
) -> dict:
    """Runs cases in several processes, with a bar that shows how far it is.

    A case that ends its process (memory that is not there) is counted as "died", and another process goes on.

    Returns:
        `examples` that ran, `failed`, `kinds` (how many of each), `failures` (the results that failed), `seconds`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    began = time.time()
    until = began + 60 * minutes if minutes else float("inf")
    step = _CHUNK // DRAWS[backend] * DRAWS[backend]
    chunks = [range(first, min(first + step, start + examples)) for first in range(start, start + examples, step)]
    count, failures = 0, []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("0 failed", total=examples)
        for result in _results(backend, chunks, jobs, finite, until):
            count += 1
            if result["kind"] is not None:
                failures.append(result)
            progress.update(bar, completed=count, description=f"{len(failures)} failed")
    return {
        "backend": backend, "start": start, "examples": count, "failed": len(failures), "finite": list(finite),
        "seconds": round(time.time() - began, 1), "kinds": dict(Counter(f["kind"] for f in failures).most_common()),
        "failures": sorted(failures, key=lambda f: f["seed"]),
    }  # fmt: skip


class _Worker:
    """A process that runs chunks of cases, and its end of a pipe. A pool would wait for ever for one that died."""

    def __init__(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.left = range(0)  # what it has not answered

    def close(self) -> None:
        self.pipe.close()
        self.process.terminate()


def _serve(pipe: multiprocessing.connection.Connection) -> None:
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            os._exit(0)
        for result in run_cases(*job):
            pipe.send(result)
        pipe.send(None)


def _results(backend: str, chunks: list, jobs: int, finite: tuple, until: float) -> Iterator[dict]:
    """Yields results as they come."""
    waiting = chunks[::-1]
    idle: list[_Worker] = []
    busy: dict = {}
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker = idle.pop() if idle else _Worker()
                worker.left = waiting.pop()
                worker.pipe.send((backend, worker.left, finite, until))
                busy[worker.pipe] = worker
            for pipe in multiprocessing.connection.wait(list(busy)):
                worker = busy[pipe]
                try:
                    result = pipe.recv()
                except EOFError:
                    result = {"seed": worker.left[0], "kind": "died", "error": "the process died"}
                if result is None:
                    idle.append(busy.pop(pipe))
                    continue
                yield result
                worker.left = worker.left[1:]
                if result["kind"] == "died" or "CUDA error" in (result["error"] or ""):
                    busy.pop(pipe).close()  # what is left of it is of no use: a GPU's context is lost
                    waiting += [worker.left] if worker.left else []
    finally:
        for worker in [*idle, *busy.values()]:
            worker.close()


def checked_places(names: str) -> tuple:
    """Dead places from a text with commas."""
    places = tuple(filter(None, names.split(",")))
    unknown = set(places) - set(DEAD)
    if unknown:
        raise SystemExit(f"--finite takes {', '.join(DEAD)}, got {', '.join(sorted(unknown))}")
    return places
