"""What a mask that leaves few keys costs: windows, streaming, chunks and prefixes in long caches, on a GPU.

    python -m benchmarks.live_kv --out benchmarks/results/h200
    python -m benchmarks.live_kv --read benchmarks/results/h200/live_kv.json --page docs/live-kv.md

The first writes live_kv.json and live_kv.md, the second makes the page of a recorded run, without a GPU. Each case is
compared with a float64 result before and inside the timed graph.
"""

import sys
from collections.abc import Callable, Iterator

import torch

from flexdecode import flex_decode, mods

from .recorded import check, goals_reached, median, page, span
from .recorded import main as recorded_main
from .timing import COLD_BYTES, time_graph

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
READ_TBPS = 4.6  # read bandwidth of an H200 at 1 GB, as in flexdecode/call/device.py
SLACK_US = 5.0
MAX_INPUT_BYTES = 60_000_000_000
TITLES = {
    "window": "window of 1024",
    "streaming": "streaming, 4 + 1024",
    "chunked": "chunks of 4096",
    "prefix": "prefix of each sequence, 2500 to 3000",
}
COLUMNS = {
    "mask": "which keys a token attends to",
    "B": "sequences",
    "N": "tokens in the cache of each sequence, all in use",
    "live KV, MB": f"keys and values that the mask leaves, of all sequences and {NUM_KV_HEADS} KV heads, in bfloat16",
    "us": "the whole call",
    "goal, us": f"at most 1.5 times what reading the live KV takes at {READ_TBPS} TB/s, and {SLACK_US:.0f} us",
    "long / short": "the time with the longest cache over that with the shortest one: 1 where only live keys count",
}


def cases(batch: int, num_keys: int) -> Iterator[tuple[str, Callable | None, torch.Tensor]]:
    """Name, mask_mod and the live keys `[B, N]` of the last token, stated a second time without the mask."""
    at, last = torch.arange(num_keys, device="cuda"), num_keys - 1
    lengths = 3000 - 500 * torch.arange(batch, device="cuda") // max(batch - 1, 1)

    def all_of(live: torch.Tensor) -> torch.Tensor:
        return live.expand(batch, num_keys)

    yield "window", mods.sliding_window(1024), all_of(last - at < 1024)
    yield "streaming", mods.streaming(4, 1024), all_of((at < 4) | (last - at < 1024))
    yield "chunked", mods.chunked(4096), all_of(at // 4096 == last // 4096)
    yield "prefix", lambda b, h, q_idx, kv_idx: kv_idx < lengths[b], at < lengths[:, None]


def measure(name: str, mask_mod: Callable | None, live: torch.Tensor, sets: list) -> dict:
    """One record: sizes, microseconds of each replay, what they are compared with."""
    batch, num_keys = live.shape
    live_bytes = int(live.sum()) * NUM_KV_HEADS * 2 * HEAD_DIM * 2

    def call(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flex_decode(query, key, value, mask_mod=mask_mod)

    expected = _in_float64(*sets[0], live)
    check(call(*sets[0]), expected)
    times, output = time_graph([lambda tensors=tensors: call(*tensors) for tensors in sets])
    check(output, expected)
    bar = 1.5 * live_bytes / READ_TBPS / 1e6 + SLACK_US
    return {
        "case": name, "B": batch, "N": num_keys, "live_kv_bytes": live_bytes, "input_sets": len(sets),
        "times_us": times, "bar_us": bar,
    }  # fmt: skip


def _in_float64(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, live: torch.Tensor) -> torch.Tensor:
    """The output by plain attention, one sequence at a time."""
    outputs = []
    for q, k, v, alive in zip(query, key, value, live, strict=True):
        k, v = (x[:, alive].double().repeat_interleave(NUM_Q_HEADS // NUM_KV_HEADS, 0) for x in (k, v))
        outputs.append(torch.softmax(q.double() @ k.mT / HEAD_DIM**0.5, -1) @ v)
    return torch.stack(outputs)


def _input_sets(batch: int, num_keys: int, fewest_live: int) -> list:
    """Random sets whose live keys and values hold `COLD_BYTES` together, as far as memory allows."""
    per_key = batch * NUM_KV_HEADS * 2 * HEAD_DIM * 2
    count = min(-(-COLD_BYTES // (fewest_live * per_key)), MAX_INPUT_BYTES // (num_keys * per_key))

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    return [
        (normal(NUM_Q_HEADS, 1), normal(NUM_KV_HEADS, num_keys), normal(NUM_KV_HEADS, num_keys)) for _ in range(count)
    ]


def found(results: list[dict]) -> str:
    """Three sentences that say what was found."""
    times = {(r["case"], r["B"], r["N"]): median(r) for r in results}
    shortest, longest = (pick(r["N"] for r in results) for pick in (min, max))
    growth = [time / times[case, batch, shortest] for (case, batch, n), time in times.items() if n == longest]
    batch = max(r["B"] for r in results)
    speeds = [r["live_kv_bytes"] / median(r) / 1e6 for r in results if r["B"] == batch]
    return (
        f"A decode step over {longest} tokens takes {span(growth)} times as long as one over {shortest} tokens, when"
        f" the mask leaves the same number of keys. With {batch} sequences it reads these keys and their values at"
        f" {span(speeds)} TB/s, where the GPU reads one large tensor at {READ_TBPS} TB/s. {goals_reached(results)}"
    )


def markdown(document: dict) -> str:
    """The page of a run."""
    intro = (
        "Each case is a decode step of one token where the mask leaves few keys of a long cache. What it costs should"
        " follow from the live keys, not from the length of the cache; the last column says how far it does. Plain"
        f" attention beside the mask, {NUM_Q_HEADS} query heads, {NUM_KV_HEADS} KV heads, head dimension {HEAD_DIM},"
        " bfloat16."
    )
    columns = "\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())
    parts = [found(document["results"]), intro, _result_table(document["results"]), "## What the columns mean", columns]
    return page(
        document, "Long caches, few live keys", [*parts, "## What falls short", _shortcomings(document["results"])]
    )


def _result_table(results: list[dict]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    medians = {(r["case"], r["B"], r["N"]): median(r) for r in results}
    for record in results:
        case, batch, num_keys = record["case"], record["B"], record["N"]
        of_case = {n: t for (c, b, n), t in medians.items() if (c, b) == (case, batch)}
        shortest, longest = min(of_case), max(of_case)
        ratio = f"{of_case[longest] / of_case[shortest]:.2f}" if num_keys == longest > shortest else ""
        lines.append(
            f"| {TITLES[case]} | {batch} | {num_keys} | {record['live_kv_bytes'] / 1e6:.1f} "
            f"| {medians[case, batch, num_keys]:.1f} | {record['bar_us']:.1f} | {ratio} |"
        )
    return "\n".join(lines)


def _shortcomings(results: list[dict]) -> str:
    """The cases that miss their goal."""
    lines = [
        f"- {TITLES[r['case']]}, B = {r['B']}, N = {r['N']}: {median(r):.1f} us, over the goal of {r['bar_us']:.1f}."
        for r in results
        if median(r) > r["bar_us"]
    ]
    return "\n".join(lines) or "Nothing: every case reaches its goal."


def run() -> Iterator[dict]:
    """Records of all cases."""
    for batch in (8, 1):
        for num_keys in (32768, 131072):
            sets = _input_sets(batch, num_keys, fewest_live=1024)
            for name, mask_mod, live in cases(batch, num_keys):
                yield measure(name, mask_mod, live, sets)
            del sets
            torch.cuda.empty_cache()


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, which returns 1 if one misses its goal; or make the page of a recorded run."""
    return recorded_main("live_kv", __doc__.split("\n")[0], run, markdown, arguments)


if __name__ == "__main__":
    sys.exit(main())
