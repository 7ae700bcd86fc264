"""Measures launches on a GPU."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch

WARM_UP = 2  # rounds that are not counted
FLUSHES = 2  # times that the scratch memory is written: meanwhile the host launches what is measured
LEAST_SCRATCH = 64 << 20  # bytes


def time_launches(runs: list[Callable[[], None]], rounds: int, device: torch.device) -> list[float]:
    """Measures launches on the current stream of a device, in turns, with their inputs out of the L2 cache.

    The clock of a GPU changes with time. In turns, all launches see the same changes. While a model decodes, the
    weights of a layer push the KV cache out of the L2 cache, so it is emptied before each launch here.

    Args:
        runs: each launches something and returns at once.
        rounds: measurements of each.
        device: a GPU.

    Returns:
        The median of each, in microseconds.
    """
    with torch.cuda.device(device):
        size = max(2 * getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0), LEAST_SCRATCH)
        scratch = torch.empty(size, dtype=torch.uint8, device=device)
        events: list[list[tuple[torch.cuda.Event, torch.cuda.Event]]] = [[] for _ in runs]
        for _ in range(WARM_UP + rounds):
            for run, measured in zip(runs, events, strict=True):
                begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                for _ in range(FLUSHES):
                    scratch.zero_()
                begin.record()
                run()
                end.record()
                measured.append((begin, end))
        torch.cuda.current_stream().synchronize()
        return [statistics.median(1e3 * a.elapsed_time(b) for a, b in of[WARM_UP:]) for of in events]
