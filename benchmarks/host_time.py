"""Host microseconds of a call: PyTorch's SDPA, `flex_decode` and prepared calls, on a GPU.

    python -m benchmarks.host_time --out benchmarks/results/h200

It writes host_time.json and prints a table. On a CPU it only shows that it runs. A decode step takes 10 to 50 us of a
GPU, and whoever uses no CUDA graph waits for the host if that takes longer. Calls are timed in turns, in batches that
are short enough for the GPU's queue. The GPU is waited for outside of the timed part.
"""

import argparse
import json
import pathlib
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from flexdecode import flex_decode, mods, prepare

from .environment import describe_environment

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
# Sequences and keys of a call. Few sequences are split, which takes two kernels; many are not.
SIZES = {"cuda": {"few": (4, 8192), "many": (64, 1024)}, "cpu": {"few": (1, 64), "many": (2, 32)}}
BATCH, ROUNDS = {"cuda": 20, "cpu": 2}, {"cuda": 300, "cpu": 5}
WARM_CALLS = 10
# The largest ratios to SDPA that the project accepts.
LIMITS = {
    "flex_decode": 0.95,
    "flex_decode, four captures and a mask": 1.3,
    "prepared": 0.65,
    "prepared, out, one pass": 0.5,
}
Call = Callable[[], Any]


class Case:
    """Tensors of the calls that are timed.

    Attributes:
        query, key, value: of random numbers.
        lens: lengths of the sequences, less than the cache has room for.
    """

    def __init__(self, device: str, batch: int, num_keys: int) -> None:
        dtype = torch.bfloat16 if device == "cuda" else torch.float32

        def normal(heads: int, length: int) -> torch.Tensor:
            return torch.randn(batch, heads, length, HEAD_DIM, dtype=dtype, device=device)

        self.query, self.key, self.value = (
            normal(NUM_Q_HEADS, 1),
            normal(NUM_KV_HEADS, num_keys),
            normal(NUM_KV_HEADS, num_keys),
        )
        self.lens = torch.full((batch,), num_keys - 3, dtype=torch.int32, device=device)

    def calls(self) -> dict[str, dict[str, Any]]:
        """Arguments of calls, by what they have."""
        gain, offset, bias = (
            torch.rand(*shape, device=self.query.device) for shape in ((32,), (32,), (32, self.key.shape[2]))
        )
        slopes, window = torch.rand(NUM_Q_HEADS, device=self.query.device), self.key.shape[2] // 2

        def four(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
            return score * gain[h] + offset[h] + bias[h, kv_idx] - slopes[h] * (q_idx - kv_idx)

        return {
            "": {},
            ", kv_lens": {"kv_lens": self.lens},
            ", ALiBi": {"score_mod": mods.alibi(slopes)},
            ", four captures and a mask": {
                "score_mod": four, "mask_mod": mods.sliding_window(window), "kv_lens": self.lens,
            },
        }  # fmt: skip

    def sdpa(self) -> torch.Tensor:
        """PyTorch's attention, which chooses its backend."""
        return torch.nn.functional.scaled_dot_product_attention(self.query, self.key, self.value, enable_gqa=True)


def make_calls(device: str) -> tuple[dict[str, Call], str]:
    """What is timed, by name, and the backend that SDPA takes."""
    few, many = (Case(device, *size) for size in SIZES[device].values())
    counter = torch.zeros(16, device=device)
    calls: dict[str, Call] = {"add_": lambda: counter.add_(1), "SDPA": few.sdpa}
    out, out_of_many = torch.empty_like(few.query), torch.empty_like(many.query)
    for name, arguments in few.calls().items():
        calls |= _both(name, few, arguments)
    calls |= _both(", out", few, {"out": out})
    calls |= _both(", out, one pass", many, {"out": out_of_many})
    return calls, _backend(few)


def _both(name: str, case: Case, arguments: dict[str, Any]) -> dict[str, Call]:
    """A call of `flex_decode`, and the same prepared."""
    of, out = (case.query, case.key, case.value), arguments.get("out")
    step = prepare(*of, **{name: x for name, x in arguments.items() if name != "out"})
    return {
        f"flex_decode{name}": lambda: flex_decode(*of, **arguments),
        f"prepared{name}": lambda: step(case.query, out),
    }


def _backend(case: Case) -> str:
    """What SDPA runs: the name of the operation that PyTorch's profiler sees below it."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profile:
        case.sdpa()
    names = [event.name for event in profile.events()]
    found = [name for name in names if "attention" in name and name != "aten::scaled_dot_product_attention"]
    return found[0].removeprefix("aten::") if found else "unknown"


def kernels_of(call: Call) -> int:
    """How many kernels a call launches."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sum(event.device_type == torch.autograd.DeviceType.CUDA for event in profile.events())


def measure(calls: dict[str, Call], device: str) -> dict[str, list[float]]:
    """Host microseconds per call of each batch, in turns."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    batch, times = BATCH[device], {name: [] for name in calls}
    for call in calls.values():
        for _ in range(WARM_CALLS):
            call()
    for _ in range(ROUNDS[device]):
        for name, call in calls.items():
            wait()
            call()  # what was evicted by the other calls is read again
            wait()
            start = time.perf_counter()
            for _ in range(batch):
                call()
            times[name].append(1e6 * (time.perf_counter() - start) / batch)
    wait()
    return times


def table(document: dict) -> str:
    """The medians, beside SDPA's."""
    medians = {record["case"]: statistics.median(record["times_us"]) for record in document["results"]}
    lines = [f"{'host time of a call':<42} {'us':>7} {'of SDPA':>8} {'goal':>6} {'kernels':>8}"]
    for record in document["results"]:
        name, goal = record["case"], LIMITS.get(record["case"])
        kernels = "" if record["kernels"] is None else record["kernels"]
        ratio = medians[name] / medians["SDPA"]
        lines.append(f"{name:<42} {medians[name]:>7.1f} {ratio:>8.2f} {goal or '':>6} {kernels:>8}")
    return "\n".join([*lines, "", f"SDPA takes {document['sdpa_backend']}.", document["environment"]["hardware"]])


def main(arguments: list[str] | None = None) -> int:
    """Writes a run as `host_time.json` and prints its table; on a GPU, returns 1 if a goal is missed."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.host_time", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    options = parser.parse_args(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(2024)
    environment = describe_environment(torch.device(device))
    if options.commit:
        environment["commit"] = options.commit
    with torch.inference_mode():
        calls, backend = make_calls(device)
        times = measure(calls, device)
        kernels = {name: kernels_of(call) if device == "cuda" else None for name, call in calls.items()}
    results = [{"case": name, "times_us": times[name], "kernels": kernels[name]} for name in calls]
    document = {"environment": environment, "sdpa_backend": backend, "batch": BATCH[device], "limits": LIMITS}
    document["results"] = results
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "host_time.json").write_text(json.dumps(document, indent=1) + "\n")
    print(table(document))
    medians = {name: statistics.median(of) for name, of in times.items()}
    missed = [name for name, limit in LIMITS.items() if medians[name] > limit * medians["SDPA"]]
    return int(device == "cuda" and bool(missed))


if __name__ == "__main__":
    sys.exit(main())
