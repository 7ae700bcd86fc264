"""How a call is timed: CUDA graph replay on a GPU, `torch.utils.benchmark` on a CPU."""

import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import benchmark

__all__ = ["CPU_PROTOCOL", "GPU_PROTOCOL", "time_cpu", "time_graph"]

MIN_CALLS = 20
REPLAYS = 7
COLD_BYTES = 400_000_000

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
CPU_PROTOCOL = (
    "Wall time on one CPU thread, median of `torch.utils.benchmark` blocks, at shapes scaled down from xformers'"
    " flash-decoding benchmark."
    " These figures only show that the library works without a GPU (its torch backend), not how fast it is."
)


def time_graph(calls: Sequence[Callable[[], Any]]) -> tuple[list[float], Any]:
    """Time `calls`, run in turn, by replaying a CUDA graph of at least `MIN_CALLS` of them.

    The replays are enqueued back to back behind an untimed one, so the GPU never waits for the host between the events.

    Args:
        calls: One callable per input set; a graph holds each equally often.

    Returns:
        Microseconds per call of each replay, and what the graph's first call returned (valid after the replays).
    """
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    torch.cuda.synchronize()

    rounds = -(-MIN_CALLS // len(calls))
    graph, first_result = torch.cuda.CUDAGraph(), None
    with torch.cuda.graph(graph, stream=stream):
        for index, call in enumerate(list(calls) * rounds):
            result = call()
            if index == 0:
                first_result = result

    events = [torch.cuda.Event(enable_timing=True) for _ in range(REPLAYS + 1)]
    graph.replay()
    events[0].record()
    for event in events[1:]:
        graph.replay()
        event.record()
    torch.cuda.synchronize()
    milliseconds = [start.elapsed_time(end) for start, end in itertools.pairwise(events)]
    if isinstance(first_result, torch.Tensor):
        first_result = first_result.clone()  # the graph's own memory goes back with the graph
    return [1e3 * time / (rounds * len(calls)) for time in milliseconds], first_result


def time_cpu(call: Callable[[], Any], min_run_time: float = 0.04) -> list[float]:
    """Time `call` on the CPU; returns microseconds per call, one figure per block of calls."""
    timer = benchmark.Timer("call()", globals={"call": call}, num_threads=torch.get_num_threads())
    return [1e6 * seconds for seconds in timer.blocked_autorange(min_run_time=min_run_time).times]
