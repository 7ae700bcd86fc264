"""The default schedule against the one that `DecodeOptions(autotune=True)` finds, on a GPU.

    python -m benchmarks.autotune --out benchmarks/results/h200

It writes autotune.json and autotune.md. The cases are the sections `shapes` and `ragged` of the performance matrix.
Nothing that was measured before is used. Both results of a case are compared with a float64 result, and both are timed
in turn.
"""

import math
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from unittest import mock

import torch

from flexdecode import DecodeOptions, clear_cache, explain, flex_decode

from .cases import Case, attend_plain, make_tensors
from .mod_cases import make_mod
from .recorded import check, median, page
from .recorded import main as recorded_main
from .sections import cases_of
from .timing import COLD_BYTES, Replay, settle, time_cpu, time_in_turn

SECTIONS = ("shapes", "ragged")
SLACK = 1.02  # of the goal: a schedule that was measured is not slower than the default, but for noise


def measure(case: Case, device: torch.device) -> dict:
    """One record: microseconds of both schedules, what was chosen, and how long the first call took."""
    on_gpu = device.type == "cuda"
    live_bytes = sum(case.lens) * case.bytes_per_token
    count = -(-COLD_BYTES // live_bytes) if on_gpu else 1
    sets = [make_tensors(case, device, number) for number in range(count)]
    options = {"default": DecodeOptions(), "autotuned": DecodeOptions(autotune=True)}
    lens = [{"kv_lens": of.kv_lens} if case.is_ragged else {} for of in sets]

    def calls(name: str) -> list[Callable[[], torch.Tensor]]:
        return [
            lambda of=of, more=more: flex_decode(of.query, of.key, of.value, **more, options=options[name])
            for of, more in zip(sets, lens, strict=True)
        ]

    expected = attend_plain(case, make_mod(case, device), sets[0], torch.float64)
    timers, seconds = {}, {}
    for name in options:
        of = calls(name)
        started = time.perf_counter()
        check(of[0](), expected)
        seconds[name] = time.perf_counter() - started
        timers[name] = Replay(of).time if on_gpu else lambda call=of[0]: time_cpu(call)
    if on_gpu:
        settle(timers["default"])
    turns = time_in_turn(timers)
    tuned = explain(*sets[0][:3], **lens[0], options=options["autotuned"]).tuned
    return {
        "case": case.label, **case.shape, "input_sets": count,
        "times_us": turns["autotuned"][0], "default_us": turns["default"][0],
        "bar_us": SLACK * statistics.median(turns["default"][0]),
        "chosen": None if tuned is None else str(tuned.choice),
        "measured": [] if tuned is None else tuned.tried,
        "first_call_s": seconds,
    }  # fmt: skip


def run(device: str = "cuda", small: bool = False) -> Iterator[dict]:
    """Measures all cases, with a store of its own. `small`: they are scaled to a CPU."""
    with tempfile.TemporaryDirectory() as folder, mock.patch.dict(os.environ, FLEXDECODE_CACHE_DIR=folder):
        clear_cache()
        for section in SECTIONS:
            for case in cases_of(section, "float32" if small else "bfloat16", small):
                yield measure(case, torch.device(device))
                if device == "cuda":
                    torch.cuda.empty_cache()
    clear_cache()


def markdown(document: dict) -> str:
    """The page of a run."""
    lines = [
        "| case | default, us | autotuned, us | autotuned / default | chosen | first call, s |",
        "| --- | ---: | ---: | ---: | --- | ---: |",
    ]
    ratios = []
    for record in document["results"]:
        default = statistics.median(record["default_us"])
        ratios.append(median(record) / default)
        lines.append(
            f"| {record['case']} | {default:.1f} | {median(record):.1f} | {ratios[-1]:.3f} |"
            f" {record['chosen'] or 'not measured'} | {record['first_call_s']['autotuned']:.1f} |"
        )
    mean = math.exp(statistics.fmean(map(math.log, ratios)))
    found = (
        f"Over {len(ratios)} cases, the autotuned schedule takes {mean:.3f} times as long as the default in the"
        f" geometric mean, and from {min(ratios):.3f} to {max(ratios):.3f} times. The first call measures and compiles."
    )
    return page(document, "Measured schedules", [found, "\n".join(lines)])


def main(arguments: list[str] | None = None) -> int:
    """Command line; returns 1 if an autotuned schedule is slower than the default, else 0."""
    return recorded_main("autotune", (__doc__ or "").partition("\n")[0], run, markdown, arguments)


if __name__ == "__main__":
    sys.exit(main())
