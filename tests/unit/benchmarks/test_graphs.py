"""How CUDA graphs are timed, with a GPU that is only a clock: a replay takes as long as its test says."""

import contextlib

import pytest
import torch

from benchmarks import floor, timing


class Clock:
    """Stands for the graph, the events and the streams of a GPU; `takes` are the milliseconds of each replay."""

    def __init__(self):
        self.now, self.replays, self.takes = 0.0, 0, iter(())

    def replay(self):
        self.replays += 1
        self.now += next(self.takes)

    def event(self, enable_timing):
        return Event(self)


class Event:
    def __init__(self, clock):
        self.clock = clock

    def record(self):
        self.at = self.clock.now

    def synchronize(self):
        pass

    def elapsed_time(self, later):
        return later.at - self.at


class Stream:
    def wait_stream(self, other):
        pass


@pytest.fixture
def gpu(monkeypatch):
    clock = Clock()
    fakes = {
        "CUDAGraph": lambda: clock, "Event": clock.event, "Stream": Stream, "current_stream": Stream,
        "stream": lambda stream: contextlib.nullcontext(), "synchronize": lambda: None,
        "graph": lambda graph, stream: contextlib.nullcontext(),
        "get_device_properties": lambda device: Properties,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    return clock


class Properties:
    multi_processor_count = 4


def test_time_per_call_without_the_first_two_replays(gpu):
    calls = []
    replay = timing.Replay([lambda: calls.append(0) or torch.zeros(1), lambda: calls.append(1) or torch.ones(1)])
    assert calls == [0, 1] * 11  # once before it is recorded, then 20 times in the graph
    gpu.takes = iter([90.0, 80.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0])
    assert replay.time() == pytest.approx([100.0, 150.0, 200.0, 250.0, 300.0, 350.0, 400.0])  # microseconds of 20 calls
    assert replay.result().tolist() == [0.0]


def test_a_slow_graph_is_replayed_less(gpu):
    gpu.takes = iter([200.0] * 5)
    replay = timing.Replay([lambda: torch.zeros(1)])
    assert replay.time() == pytest.approx([1e4] * 3) and gpu.replays == 5


def test_many_input_sets_are_all_in_the_graph(gpu):
    calls = []
    timing.Replay([lambda number=number: calls.append(number) for number in range(30)])
    assert calls == [*range(30)] * 2


def test_the_fastest_stream_is_found_once(gpu, monkeypatch):
    meter = floor.FloorMeter(torch.device("cpu"))
    monkeypatch.setattr(meter, "_check", lambda words, config: None)
    monkeypatch.setattr(meter, "_read", lambda words, result, config: None)
    best = 5
    gpu.takes = iter([10.0 if index // 9 == best else 20.0 for index in range(9 * len(floor.CONFIGS))] + [7.0] * 9)
    stream, config = meter.stream(4_000_000, "cold")
    assert config == str(floor.CONFIGS[best]) and gpu.replays == 9 * len(floor.CONFIGS)
    assert stream.time() == pytest.approx([70.0] * 7)  # 100 input sets, 7 ms
    assert meter.stream(4_000_000, "cold")[1] == config and gpu.replays == 9 * len(floor.CONFIGS) + 9
