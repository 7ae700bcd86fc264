"""Milliseconds of the first call of a mod in a new process: with nothing on disk, and with its kernels on disk.

    python -m benchmarks.first_call --out benchmarks/results/h200

It writes first_call.json and prints a table. PyTorch, Triton and flexdecode are imported and CUDA has started before
the clock does. Each number comes from a process of its own. "cold" has new, empty folders for both stores. "disk" is
the next process with the same folders. "second" is another mod, after the first one, in the same cold process.

Without a GPU it compiles for an H200, and the clock stops where the kernels would be loaded into the device.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

from .environment import describe_environment
from .progress import progress_bar

BATCH, NUM_Q_HEADS, NUM_KV_HEADS, NUM_KEYS, HEAD_DIM = 4, 32, 8, 8192, 128  # split, so there are two kernels
CASES = ("plain", "ALiBi", "four captures and a mask")
WAYS = ("cold", "disk", "second")
LIMITS_MS = {"cold": 900.0, "disk": 150.0}  # the largest medians that the project accepts on a GPU
REPEATS = 5
ROOT = pathlib.Path(__file__).resolve().parents[1]


def make_call(case: str, device: str) -> Callable[[], Any]:
    """The call of a case of `CASES`, or of `second`: another mod of the same shapes."""
    from flexdecode import DecodeOptions, flex_decode, mods

    def zeros(heads: int, length: int) -> torch.Tensor:
        return torch.zeros(BATCH, heads, length, HEAD_DIM, dtype=torch.bfloat16, device=device)

    query, key, value = zeros(NUM_Q_HEADS, 1), zeros(NUM_KV_HEADS, NUM_KEYS), zeros(NUM_KV_HEADS, NUM_KEYS)
    lens = torch.full((BATCH,), NUM_KEYS - 3, dtype=torch.int32, device=device)
    gain, offset, slopes = torch.rand(3, NUM_Q_HEADS, device=device)
    bias = torch.rand(NUM_Q_HEADS, NUM_KEYS, device=device)

    def four(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score * gain[h] + offset[h] + bias[h, kv_idx] - slopes[h] * (q_idx - kv_idx)

    given: dict[str, dict[str, Any]] = {
        "plain": {},
        "ALiBi": {"score_mod": mods.alibi(slopes)},
        "four captures and a mask": {
            "score_mod": four, "mask_mod": mods.sliding_window(NUM_KEYS // 2), "kv_lens": lens,
        },
        "second": {"score_mod": mods.softcap(30.0)},
    }  # fmt: skip
    options = DecodeOptions(backend="triton")
    return lambda: flex_decode(query, key, value, options=options, **given[case])


class _NotLoaded:
    """Takes the place of a kernel that is on no device."""

    source = pathlib.Path()

    def __call__(self, grid: tuple, stream: int, arguments: tuple) -> None:
        """Does nothing."""

    def encode_descriptors(self, key: object, value: object) -> tuple:
        """Leaves descriptors as they are."""
        return key, value


@contextlib.contextmanager
def no_device() -> Iterator[None]:
    """Lets calls on CPU tensors go the way of an H200, until machine code and C helper are there."""
    from flexdecode.call.device import KNOWN_DEVICES
    from flexdecode.codegen import binaries, kernels
    from flexdecode.runtime import prepare

    def launch_of(binary: object, device: int) -> _NotLoaded:
        binaries._helper().result()
        return _NotLoaded()

    with (
        mock.patch.object(prepare, "device_facts", lambda _: KNOWN_DEVICES["H200"][0]),
        mock.patch.object(kernels, "_gpu", lambda spec, facts: 0),
        mock.patch.object(kernels, "launch_of", launch_of),
        mock.patch.object(torch.cuda, "current_device", lambda: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
    ):
        yield


def child(case: str) -> dict[str, Any]:
    """Milliseconds of the first call of a case and of a second mod, in this process, and what the library counted."""
    import triton  # noqa: F401 (its import is not counted)

    import flexdecode

    has_gpu = torch.cuda.is_available()
    wait = torch.cuda.synchronize if has_gpu else lambda: None
    found: dict[str, Any] = {}
    with torch.inference_mode(), contextlib.nullcontext() if has_gpu else no_device():
        for name, of in (("first", case), ("second", "second")):
            call = make_call(of, "cuda" if has_gpu else "cpu")
            wait()
            start = time.perf_counter()
            call()
            wait()
            found[name] = 1e3 * (time.perf_counter() - start)
    return found | vars(flexdecode.cache_info())


def start(case: str, folder: str) -> dict[str, Any]:
    """Runs `child` in a new process whose stores lie in a folder.

    Raises:
        SystemExit: it fails.
    """
    stores = {"FLEXDECODE_CACHE_DIR": f"{folder}/flexdecode", "TRITON_CACHE_DIR": f"{folder}/triton"}
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "benchmarks.first_call", "--child", case]
    done = subprocess.run(command, env=os.environ | stores | {"PYTHONPATH": paths}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"the process for {case!r} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(case: str) -> dict[str, float]:
    """Milliseconds of each of `WAYS` for a case.

    Raises:
        SystemExit: the cold process did not compile both mods, or the other one did not find both on disk.
    """
    with tempfile.TemporaryDirectory() as folder:
        cold, disk = start(case, folder), start(case, folder)
    if (cold["disk_hits"], disk["disk_hits"], disk["generations"]) != (0, 2, 0):
        raise SystemExit(f"{case}: not what was to be measured: {cold}, {disk}")
    return {"cold": cold["first"], "disk": disk["first"], "second": cold["second"]}


def table(document: dict) -> str:
    """Median, fastest and slowest of each case and way."""
    title = f"first call, up to {document['until']}"
    lines = [f"{title:<44} {'median ms':>10} {'fastest':>8} {'slowest':>8} {'goal':>6}"]
    for record in document["results"]:
        times, goal = record["times_ms"], document["limits_ms"].get(record["way"])
        shown = f"{statistics.median(times):>10.0f} {min(times):>8.0f} {max(times):>8.0f}"
        lines.append(f"{record['case'] + ', ' + record['way']:<44} {shown} {'' if goal is None else f'{goal:.0f}':>6}")
    return "\n".join([*lines, "", document["environment"]["hardware"]])


def main(arguments: list[str] | None = None) -> int:
    """Writes a run as `first_call.json` and prints its table; on a GPU, returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.first_call", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    parser.add_argument("--repeats", type=int, default=REPEATS, help=f"processes of each kind, by default {REPEATS}")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.child:
        print(json.dumps(child(options.child)))
        return 0
    has_gpu = torch.cuda.is_available()
    environment = describe_environment(torch.device("cuda" if has_gpu else "cpu"))
    if options.commit:
        environment["commit"] = options.commit
    times: dict[tuple[str, str], list[float]] = {(case, way): [] for case in CASES for way in WAYS}
    with progress_bar(options.repeats * len(CASES)) as step:
        for _ in range(options.repeats):
            for case in CASES:
                found = measure(case)
                for way in WAYS:
                    times[case, way].append(found[way])
                step(case, ", ".join(f"{way} {found[way]:.0f} ms" for way in WAYS))
    results = [{"case": case, "way": way, "times_ms": of} for (case, way), of in times.items()]
    until = "the result" if has_gpu else "the load (no GPU)"
    document = {"environment": environment, "until": until, "limits_ms": LIMITS_MS, "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "first_call.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    missed = [r for r in results if statistics.median(r["times_ms"]) > LIMITS_MS.get(r["way"], float("inf"))]
    return int(has_gpu and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
