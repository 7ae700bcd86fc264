"""Runs many cases in several processes, and counts."""

import multiprocessing.connection
import os
import time
from collections import Counter
from dataclasses import replace

from .case import DEAD
from .generate import DRAWS, random_case

_CHUNK = 50  # cases that a process takes at a time


def run_cases(backend: str, seeds: range, finite: tuple = (), until: float = float("inf")) -> list[dict]:
    """Runs cases in this process.

    Args:
        backend: as of `random_case`.
        seeds: of the cases.
        finite: dead places that are to hold numbers.
        until: time at which to stop.

    Returns:
        For each case that ran: `seed`, and `kind` and `error` of its failure or None.
    """
    from .check import check
    from .shrink import kind_of

    found = []
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
        found.append(result)
    return found


def _job(job: tuple) -> list[dict]:
    return run_cases(*job)


def _start() -> None:
    import torch

    torch.set_num_threads(1)


def run_parallel(
    backend: str, start: int, examples: int, jobs: int, minutes: float | None = None, finite: tuple = ()
) -> dict:
    """Runs cases in several processes, with a bar that shows how far it is.

    A process that dies (a GPU whose context is lost) takes its chunk with it; the chunk is counted as a failure "died".

    Returns:
        `examples` that ran, `failed`, `kinds` (how many of each), `failures` (the results that failed), `seconds`.
    """
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    step = -(-_CHUNK // DRAWS[backend]) * DRAWS[backend]
    began = time.time()
    until = began + 60 * minutes if minutes else float("inf")
    chunks = [range(first, min(first + step, start + examples)) for first in range(start, start + examples, step)]
    count, failures = 0, []
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns) as progress:
        bar = progress.add_task("0 failed", total=examples)
        for chunk, results in _outcomes(backend, chunks, jobs, finite, until):
            if results is None:
                results = [{"seed": s, "kind": "died", "error": "the process died"} for s in chunk]
            count += len(results)
            failures += [result for result in results if result["kind"] is not None]
            progress.update(bar, completed=count, description=f"{len(failures)} failed")
    return {
        "backend": backend, "start": start, "examples": count, "failed": len(failures), "finite": list(finite),
        "seconds": round(time.time() - began, 1), "kinds": dict(Counter(f["kind"] for f in failures).most_common()),
        "failures": sorted(failures, key=lambda f: f["seed"]),
    }  # fmt: skip


def _outcomes(backend: str, chunks: list, jobs: int, finite: tuple, until: float):
    """Yields each chunk with its results, or None where its process died."""
    if jobs == 1:
        for chunk in chunks:
            yield chunk, run_cases(backend, chunk, finite, until)
        return
    # One process per slot, fed by a pipe: a pool would hang for ever on a worker that died.
    context = multiprocessing.get_context("spawn")
    waiting, running = list(reversed(chunks)), {}
    workers: list = []
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                worker = workers.pop() if workers else _Worker(context)
                chunk = waiting.pop()
                worker.pipe.send((backend, chunk, finite, until))
                running[worker.pipe] = worker, chunk
            for pipe in multiprocessing.connection.wait(list(running)):
                worker, chunk = running.pop(pipe)
                try:
                    results = pipe.recv()
                except EOFError:
                    yield chunk, None
                    continue
                if any("CUDA error" in (r["error"] or "") for r in results):
                    worker.close()  # its context is lost
                else:
                    workers.append(worker)
                yield chunk, results
    finally:
        for worker in [*workers, *(w for w, _ in running.values())]:
            worker.close()


class _Worker:
    def __init__(self, context):
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()

    def close(self):
        self.pipe.close()
        self.process.join(timeout=5)
        self.process.terminate()


def _serve(pipe) -> None:
    _start()
    while True:
        try:
            job = pipe.recv()
        except (EOFError, OSError):
            os._exit(0)
        pipe.send(_job(job))


def checked_places(names: str) -> tuple:
    """Dead places from a text with commas."""
    places = tuple(filter(None, names.split(",")))
    unknown = set(places) - set(DEAD)
    if unknown:
        raise SystemExit(f"--finite takes {', '.join(DEAD)}, got {', '.join(sorted(unknown))}")
    return places
