"""Measures launches on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP = 2  # rounds that are not counted; the last of them says how long a round takes
FEWEST, MOST_MS = 3, 500.0  # rounds that are measured in any case; milliseconds that more of them may take
FLUSHES = 2  # times that the scratch memory is written: meanwhile the host launches what is measured
LEAST_SCRATCH = 64 << 20  # bytes

Run = Callable[[], None]  # launches something and returns at once


def time_launches(runs: list[Run], rounds: int, device: torch.device) -> list[float]:
    """Measures launches on the current stream of a device, in turns, with their inputs out of the L2 cache.

    The clock of a GPU changes with time. In turns, all launches see the same changes. While a model decodes, the
    weights of a layer push the KV cache out of the L2 cache, so it is emptied before each launch here.

    Args:
        runs: what is measured.
        rounds: the most measurements of each.
        device: a GPU.

    Returns:
        The median of each, in microseconds.
    """
    with torch.cuda.device(device):
        size = max(2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0), LEAST_SCRATCH)
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        took = _measure(runs, WARM_UP, scratch)
        round_ms = sum(times[-1] for times in took) / 1e3
        rounds = max(FEWEST, min(rounds, int(MOST_MS / max(round_ms, 1e-3))))
        return [statistics.median(times) for times in _measure(runs, rounds, scratch)]


def _measure(runs: list[Run], rounds: int, scratch: torch.Tensor) -> list[list[float]]:
    """Microseconds of each launch in each round."""
    events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, measured in zip(runs, events, strict=True):
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            for _ in range(FLUSHES):
                scratch.zero_()
            begin.record()
            run()
            end.record()
            measured.append((begin, end))
    torch.cuda.current_stream().synchronize()
    return [[1e3 * begin.elapsed_time(end) for begin, end in of] for of in events]
