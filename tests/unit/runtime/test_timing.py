"""How launches are measured: in turns, after the cache is emptied, for a bounded time. A stand-in keeps the time."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from flexdecode.runtime import timing
from flexdecode.runtime.timing import time_launches

DEVICE = torch.device("cpu")


class Device:
    """A GPU on which the time is what launches add to it.

    Attributes:
        now: milliseconds.
        ran: what was launched, in order; "flush" for a write of the scratch memory.
    """

    def __init__(self, monkeypatch):
        self.now, self.ran = 0.0, []
        device = self

        class Event:
            def __init__(self, enable_timing):
                assert enable_timing

            def record(self):
                self.at = device.now

            def elapsed_time(self, other):
                return other.at - self.at

        class Scratch:
            def __init__(self, size):
                device.size = size

            def zero_(self):
                device.now += 1000.0
                device.ran.append("flush")

        monkeypatch.setattr(timing.torch, "empty", lambda size, **_: Scratch(size))
        monkeypatch.setattr(timing.torch.cuda, "Event", Event)
        monkeypatch.setattr(timing.torch.cuda, "device", lambda _: contextlib.nullcontext())
        monkeypatch.setattr(timing.torch.cuda, "current_stream", lambda: SimpleNamespace(synchronize=lambda: None))
        properties = SimpleNamespace(L2_cache_size=50 << 20)
        monkeypatch.setattr(timing.torch.cuda, "get_device_properties", lambda _: properties)
        self.properties = properties

    def run(self, name, *milliseconds):
        """A launch that takes these times, one after another, and then the last one."""
        times = list(milliseconds)

        def launch():
            self.ran.append(name)
            self.now += times.pop(0) if len(times) > 1 else times[0]

        return launch


@pytest.fixture
def device(monkeypatch):
    return Device(monkeypatch)


def test_launches_take_turns(device):
    found = time_launches([device.run("a", 0.25), device.run("b", 0.5)], 3, DEVICE)
    assert found == pytest.approx([250.0, 500.0])
    assert device.ran == ["flush", "flush", "a", "flush", "flush", "b"] * 5


def test_the_median_without_the_first_rounds(device):
    (found,) = time_launches([device.run("a", 9.0, 9.0, 1.0, 5.0, 2.0, 4.0, 3.0)], 5, DEVICE)
    assert found == pytest.approx(3000.0)


@pytest.mark.parametrize(("milliseconds", "counted"), [(0.01, 40), (0.0, 40), (25.0, 20), (400.0, 3)])
def test_long_launches_are_measured_less_often(device, milliseconds, counted):
    time_launches([device.run("a", milliseconds)], 40, DEVICE)
    assert device.ran.count("a") == timing.WARM_UP + counted


def test_the_memory_is_twice_the_cache(device):
    time_launches([device.run("a", 1.0)], 3, DEVICE)
    assert device.size == 100 << 20
    device.properties.L2_cache_size = 6 << 20
    time_launches([device.run("a", 1.0)], 3, DEVICE)
    assert device.size == 64 << 20
    del device.properties.L2_cache_size
    time_launches([device.run("a", 1.0)], 3, DEVICE)
    assert device.size == 64 << 20
