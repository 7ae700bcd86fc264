"""How calls are timed, alone or in turn: CUDA graph replay on a GPU, `torch.utils.benchmark` on a CPU."""

import itertools
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.utils import benchmark

__all__ = ["CPU_PROTOCOL", "GPU_PROTOCOL", "IN_TURN", "Replay", "settle", "time_cpu", "time_graph", "time_in_turn"]

MIN_CALLS = 20
REPLAYS, SLOW_REPLAYS = 7, 3
SLOW_US = 100_000.0  # a replay that takes longer is not repeated often
COLD_BYTES = 400_000_000
TURNS = 2
AGREEMENT, SETTLE_SECONDS = 0.01, 0.5

GPU_PROTOCOL = (
    f"Device time: a CUDA graph of at least {MIN_CALLS} calls, median of {REPLAYS} back-to-back replays between CUDA"
    " events, in microseconds per call; host work is not in it. Inputs are random normal. cold = the calls of a graph"
    f" rotate over input sets that hold at least {COLD_BYTES // 10**6} MB of live K/V in all (with a cap on memory for"
    " sliding windows), so K/V comes from memory; warm = every call reads one and the same set, which may stay in L2."
    " The limit of a row is the best plain read-only stream of the bytes of its live K/V, found by a sweep"
    " over grid sizes, block sizes, warps and stages in the same run under the same protocol (no overlap of one launch"
    " with the next). TB/s counts live K/V, query and output once, over the flexdecode time. Every column is compared"
    " with a float64 result, once before it is timed and once inside the graph after it."
)
IN_TURN = (
    f"All columns of a row and its limit are checked and recorded first. Then the card settles: one of them is replayed"
    f" untimed until two medians agree within {AGREEMENT:.0%}, for at most {SETTLE_SECONDS} s. Then all are timed in"
    f" turn, {TURNS} times, and the lower median of each counts. The records hold both. A graph that takes"
    f" over {SLOW_US / 1e6:g} s is replayed {SLOW_REPLAYS} times instead of {REPLAYS}."
)
CPU_PROTOCOL = (
    "Wall time on one CPU thread, median of `torch.utils.benchmark` blocks, at shapes that are scaled down."
    " These figures only show that the library works without a GPU (its torch backend), not how fast it is."
)


class Replay:
    """A CUDA graph of calls, run in turn: at least `MIN_CALLS` of them.

    Args:
        calls: One callable per input set; a graph holds each equally often. Each has run before, untimed.
    """

    def __init__(self, calls: Sequence[Callable[[], Any]]):
        self._calls = list(calls)  # Triton unloads a kernel that nothing refers to, and the graph does not
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in calls:
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()

        rounds = -(-MIN_CALLS // len(calls))
        self._num_calls = rounds * len(calls)
        self._graph, self._first_result = torch.cuda.CUDAGraph(), None
        with torch.cuda.graph(self._graph, stream=stream):
            for index, call in enumerate(self._calls * rounds):
                result = call()
                if index == 0:
                    self._first_result = result

    def time(self) -> list[float]:
        """Microseconds per call of each replay.

        The replays are enqueued back to back behind an untimed one, so the GPU never waits for the host between events.
        """
        first, second = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        self._graph.replay()
        second.record()
        second.synchronize()
        replays = REPLAYS if 1e3 * first.elapsed_time(second) < SLOW_US else SLOW_REPLAYS
        events = [torch.cuda.Event(enable_timing=True) for _ in range(replays + 1)]
        self._graph.replay()
        events[0].record()
        for event in events[1:]:
            self._graph.replay()
            event.record()
        torch.cuda.synchronize()
        milliseconds = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
        return [1e3 * time / self._num_calls for time in milliseconds]

    def result(self) -> Any:
        """What the graph's first call returned, after a replay; a copy, since the graph's memory goes back with it."""
        result = self._first_result
        return result.clone() if isinstance(result, torch.Tensor) else result


def time_graph(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    """Time `calls`, run in turn, by replaying a CUDA graph of at least `MIN_CALLS` of them.

    Args:
        calls: One callable per input set; a graph holds each equally often.

    Returns:
        Microseconds per call of each replay, and what the graph's first call returned (valid after the replays).
    """
    replay = Replay(calls)
    return replay.time(), replay.result()


def settle(timer: Callable[[], list[float]]) -> None:
    """Runs a timer until two of its medians agree within 1%, for at most half a second.

    A card that has just computed a float64 reference runs slower for some milliseconds.
    """
    started, before = time.monotonic(), 0.0
    while time.monotonic() - started < SETTLE_SECONDS:
        now = statistics.median(timer())
        if abs(now - before) <= AGREEMENT * now:
            return
        before = now


def time_in_turn(timers: Mapping[str, Callable[[], list[float]]]) -> dict[str, list[list[float]]]:
    """Runs all timers one after another, twice.

    Returns:
        For each name its times in microseconds, turn by turn, the turn with the lowest median first.
    """
    turns: dict[str, list[list[float]]] = {name: [] for name in timers}
    for _ in range(TURNS):
        for name, timer in timers.items():
            turns[name].append(timer())
    return {name: sorted(of, key=statistics.median) for name, of in turns.items()}


def time_cpu(call: Callable[[], Any], min_run_time: float = 0.04) -> list[float]:
    """Time `call` on the CPU; returns microseconds per call, one figure per block of calls."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return [1e6 * seconds for seconds in timer.blocked_autorange(min_run_time=min_run_time).times]
