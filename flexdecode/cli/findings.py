"""What `flexdecode doctor` knows: bad pairs of versions, and what makes calls slow, each as a row of a table."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

from ..call.device import DeviceFacts
from ..triton_api import NEWEST, OLDEST

Version = tuple[int, int]
OLDEST_TORCH: Version = (2, 9)
FULL_SHARED_MEMORY = 227 * 1024  # of Hopper and Blackwell; the tiles were chosen for it


class Machine(NamedTuple):
    """What is installed, and on what.

    Attributes:
        torch, triton, numpy: major and minor version; None if not installed or not known.
        device: facts of the GPU; None without one.
        environment: variables of the process.
    """

    torch: Version | None
    triton: Version | None
    numpy: Version | None
    device: DeviceFacts | None
    environment: Mapping[str, str]

    @property
    def interprets(self) -> bool:
        """Whether Triton interprets kernels on the CPU."""
        return self.environment.get("TRITON_INTERPRET") == "1"


class Row(NamedTuple):
    """Something that is known to matter.

    Attributes:
        name: in words.
        applies: to this machine.
        text: what it does.
        wrong: whether flexdecode fails because of it; otherwise it is slow, limited or untested.
    """

    name: str
    applies: Callable[[Machine], bool]
    text: str
    wrong: bool = False


def _triton_is(machine: Machine, first: Version, last: Version) -> bool:
    return machine.triton is not None and first <= machine.triton <= last


def _spelled(version: Version) -> str:
    return f"{version[0]}.{version[1]}"


# What docs/versions.md and flexdecode/triton_api.py say.
PAIRS = (
    Row(
        "torch is too old",
        lambda m: m.torch is not None and m.torch < OLDEST_TORCH,
        f"flexdecode needs torch {_spelled(OLDEST_TORCH)} or later",
        wrong=True,
    ),
    Row(
        "Triton is missing",
        lambda m: m.triton is None,
        "no package named triton is installed, so its version is not known; calls on a GPU need it",
    ),
    Row(
        "Triton is too old",
        lambda m: m.triton is not None and m.triton < OLDEST,
        f"flexdecode needs Triton {_spelled(OLDEST)} or later; calls on a GPU raise TritonVersionError",
        wrong=True,
    ),
    Row(
        "Triton is newer than tested",
        lambda m: m.triton is not None and m.triton > NEWEST,
        f"the tests ran with Triton up to {_spelled(NEWEST)}; where this one differs, TritonVersionError says so",
    ),
    Row(
        "Triton 3.5 and latent caches",
        lambda m: _triton_is(m, (3, 5), (3, 5)),
        "the kernel for latents needs the Gluon of Triton 3.6; the ordinary kernel takes its place",
    ),
    Row(
        "Triton 3.8 on an NVIDIA GPU",
        lambda m: _triton_is(m, (3, 8), (3, 8)) and (m.device is None or m.device.backend == "cuda"),
        "its ptxas spills up to 144 bytes of a thread where those of 3.6 and 3.9 spill 16",
    ),
    Row(
        "Triton 3.6 on an AMD GPU",
        lambda m: _triton_is(m, (3, 6), (3, 6)) and m.device is not None and m.device.backend == "hip",
        "it cannot pipeline some reads of captured tensors; such kernels are compiled without pipelining",
    ),
    Row(
        "Triton up to 3.6 interprets with NumPy below 2.4 only",
        lambda m: m.interprets and _triton_is(m, OLDEST, (3, 6)) and m.numpy is not None and m.numpy >= (2, 4),
        "interpreted kernels fail: pip install 'numpy<2.4'",
        wrong=True,
    ),
    Row(
        "Triton interprets bfloat16 wrongly",
        lambda m: m.interprets,
        "a bfloat16 query is refused while TRITON_INTERPRET=1; a GPU and the torch backend take it",
    ),
)

SLOW = (
    Row(
        "no GPU",
        lambda m: m.device is None,
        "calls run as PyTorch operations on the CPU: right, and far slower than a kernel on a GPU",
    ),
    Row(
        "TRITON_INTERPRET=1",
        lambda m: m.interprets,
        "kernels are interpreted on the CPU: good for tests, and far slower than anything else",
    ),
    Row(
        "no tensor descriptors",
        lambda m: m.device is not None and not m.device.has_descriptors,
        "keys and values are loaded by pointers; NVIDIA GPUs from compute capability 9.0 on copy whole tiles",
    ),
    Row(
        "no dependent launch",
        lambda m: m.device is not None and not m.device.has_pdl,
        "the second kernel of a call cannot start before the first one has finished",
    ),
    Row(
        "little shared memory",
        lambda m: m.device is not None and m.device.shared_memory < FULL_SHARED_MEMORY,
        f"a program may use less than the {FULL_SHARED_MEMORY // 1024} KiB of Hopper, so wide heads get smaller tiles",
    ),
    Row(
        "not tuned",
        lambda m: m.device is not None and m.device.arch != 90,
        "tiles and splits were tuned on Hopper (compute capability 9.0)",
    ),
    Row(
        "TRITON_ALWAYS_COMPILE is set",
        lambda m: m.environment.get("TRITON_ALWAYS_COMPILE", "0") not in ("", "0"),
        "Triton compiles each kernel again in each process",
    ),
    Row(
        "CUDA_LAUNCH_BLOCKING is set",
        lambda m: m.environment.get("CUDA_LAUNCH_BLOCKING", "0") not in ("", "0"),
        "the host waits for each kernel",
    ),
)
