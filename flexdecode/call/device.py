"""Facts about devices: those of this machine, and those known by name."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..memos import hashed_once

RESERVED_SHARED = 1 << 10  # bytes of the shared memory of a multiprocessor that CUDA keeps for each program
BYTES_PER_US = 4.6e6  # read bandwidth of an H200; only its ratio to the cost of a combine matters to a schedule


@hashed_once
@dataclass(frozen=True)
class DeviceFacts:
    """What the schedule needs to know about a device.

    Attributes:
        backend: `cuda`, `hip`, or `cpu` for the interpreter.
        arch: compute capability times 10 (90 for Hopper), or the name of an AMD architecture.
        num_sms: multiprocessors.
        shared_memory: bytes that one program may use.
    """

    backend: str
    arch: int | str
    num_sms: int
    shared_memory: int

    @property
    def has_pdl(self) -> bool:
        """Whether a kernel can start before the previous one has finished."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 90

    @property
    def can_unpack(self) -> bool:
        """Whether the device converts pairs of float8 numbers."""
        return self.backend == "cuda" and isinstance(self.arch, int) and self.arch >= 89

    @property
    def has_warpgroups(self) -> bool:
        """Whether products are those of Hopper: four warps compute one product together."""
        return self.backend == "cuda" and self.arch == 90

    @property
    def has_descriptors(self) -> bool:
        """Whether the device can copy tiles by tensor descriptors."""
        return self.has_pdl


# What can be compiled for without a GPU at hand. For other architectures, LLVM may end the whole process.
ARCHITECTURES: dict[str, tuple[int | str, ...]] = {
    "cuda": (75, 80, 86, 87, 89, 90, 100, 103, 110, 120, 121),
    "hip": ("gfx90a", "gfx942", "gfx950"),
}


def check_architecture(facts: DeviceFacts) -> None:
    """Refuses a device that nothing can be compiled for.

    Raises:
        ValueError: its architecture is not known.
    """
    if facts.arch not in ARCHITECTURES.get(facts.backend, ()):
        known = ", ".join(f"{backend} {arch}" for backend, archs in ARCHITECTURES.items() for arch in archs)
        raise ValueError(f"there is no architecture {facts.backend} {facts.arch!r}: known are {known}")


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def may_keep_memory() -> bool:
    """Whether memory that a call takes may outlive the call.

    CUDA graphs of torch.compile allow it neither while they are recorded nor in the run before, and do not say when
    that is. So from their first use in a process on it counts as forbidden.
    """
    return "torch._inductor.cudagraph_trees" not in sys.modules


def autocasts() -> list[str]:
    """The kinds of devices for which the caller has switched autocast on."""
    return [kind for kind in ("cpu", "cuda") if torch.is_autocast_enabled(kind)]


@contextlib.contextmanager
def without_autocast() -> Iterator[None]:
    """Switches the caller's autocast off, so that float32 computations stay in float32."""
    with contextlib.ExitStack() as stack:
        for kind in autocasts():
            stack.enter_context(torch.autocast(kind, enabled=False))
        yield


@functools.cache
def device_facts(device: torch.device) -> DeviceFacts:
    """Facts about a device, read once.

    Raises:
        ValueError: it is not a GPU, and Triton does not interpret.
    """
    if device.type != "cuda":
        if not interpreting():
            raise ValueError(
                f'`options.backend="triton"` needs CUDA tensors, got tensors on {device}; on a CPU use '
                'backend="torch", or set TRITON_INTERPRET=1 before Python starts'
            )
        return DeviceFacts("cpu", "interpreter", num_sms=4, shared_memory=227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch: int | str = properties.gcnArchName.split(":")[0]
        return DeviceFacts("hip", arch, properties.multi_processor_count, 64 * 1024)
    arch = properties.major * 10 + properties.minor
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]  # stubs lack it
    return DeviceFacts("cuda", arch, properties.multi_processor_count, shared_memory)


# --- Devices that are not at hand -------------------------------------------------------------------------------------


class Bandwidth(NamedTuple):
    """How fast a device reads its memory.

    Attributes:
        bytes_per_us: bytes in a microsecond.
        measured: whether it was measured; otherwise the fact sheet says so, and a kernel reaches less.
    """

    bytes_per_us: float
    measured: bool

    def __str__(self) -> str:
        source = "measured" if self.measured else "of the fact sheet; a kernel reaches less"
        return f"{self.bytes_per_us / 1e6:.2f}".removesuffix("0") + f" TB/s ({source})"


class Target(NamedTuple):
    """What a call is explained for.

    Attributes:
        name: the device in words.
        facts: of the device; None if no kernel is launched.
        bandwidth: of its memory; None if that is not known.
    """

    name: str
    facts: DeviceFacts | None
    bandwidth: Bandwidth | None


# Source: the data sheets of the makers. Shared memory: compute capability 8.0 gives one program 163 KiB; 9.0 and 10.0,
# 227 KiB; a compute unit of gfx942 has 64 KiB. A100 is the one with 80 GB, A100 and H100 are those for SXM.
KNOWN_DEVICES = {
    "H100": (DeviceFacts("cuda", 90, num_sms=132, shared_memory=232448), Bandwidth(3.35e6, measured=False)),
    "H200": (DeviceFacts("cuda", 90, num_sms=132, shared_memory=232448), Bandwidth(BYTES_PER_US, measured=True)),
    "A100": (DeviceFacts("cuda", 80, num_sms=108, shared_memory=166912), Bandwidth(2.039e6, measured=False)),
    "B200": (DeviceFacts("cuda", 100, num_sms=148, shared_memory=232448), Bandwidth(8e6, measured=False)),
    "MI300X": (DeviceFacts("hip", "gfx942", num_sms=304, shared_memory=65536), Bandwidth(5.3e6, measured=False)),
}
# What drivers call them. Other models of the same name (PCIe, NVL, 40 GB) have other bandwidths.
_DRIVER_NAMES = {
    "NVIDIA H100 80GB HBM3": "H100",
    "NVIDIA H200": "H200",
    "NVIDIA A100-SXM4-80GB": "A100",
    "NVIDIA B200": "B200",
    "AMD Instinct MI300X": "MI300X",
}


def find_target(device: torch.device, backend: str, chosen: str | DeviceFacts | None) -> Target:
    """Finds the device that a call would run on.

    Args:
        device: of the tensors.
        backend: `triton` or `torch`.
        chosen: another device: its name, its facts, or `cuda` for the present GPU.

    Raises:
        ValueError: there is no such device, or the call does not say for which device it is meant.
    """
    if chosen is not None and not isinstance(chosen, DeviceFacts):
        _check_name(chosen)
    if backend == "torch":
        return Target(f"{device}, by PyTorch operations", None, None)
    if chosen is None and device.type == "meta":
        raise ValueError('`query` is on the meta device: say for which GPU, e.g. `device="H200"`')
    bandwidth = None
    if isinstance(chosen, DeviceFacts):
        name, facts = "given by its facts", chosen
    elif chosen is not None and chosen != "cuda":
        name, (facts, bandwidth) = chosen, KNOWN_DEVICES[chosen]
    else:
        place = device if chosen is None else torch.device("cuda", torch.cuda.current_device())
        facts = device_facts(place)
        name = torch.cuda.get_device_name(place) if place.type == "cuda" else "Triton's interpreter"
        if name in _DRIVER_NAMES:
            bandwidth = KNOWN_DEVICES[_DRIVER_NAMES[name]][1]
    return Target(f"{name}: {facts.backend} {facts.arch}, {facts.num_sms} multiprocessors", facts, bandwidth)


def _check_name(name: object) -> None:
    """Refuses what names no device.

    Raises:
        ValueError: it is not known, or `cuda` on a machine without a GPU.
    """
    known = ", ".join(f'"{known}"' for known in KNOWN_DEVICES)
    if name == "cuda":
        if not torch.cuda.is_available():
            raise ValueError(f'`device="cuda"` is the present GPU, and PyTorch finds none: name one of {known}')
    elif not isinstance(name, str) or name not in KNOWN_DEVICES:
        raise ValueError(
            f'`device` must be {known} or "cuda" for the present GPU, or facts of your own (see explain), got {name!r}'
        )
