"""What a mask that leaves few keys costs: windows, streaming, chunks and prefixes in long caches, on a GPU.

    python -m benchmarks.live_kv --out benchmarks/results/h200
    python -m benchmarks.live_kv --read benchmarks/results/h200/live_kv.json --page docs/live-kv.md

The first writes live_kv.json and live_kv.md, the second makes the page of a recorded run, without a GPU. Each case is
compared with a float64 result before and inside the timed graph.
"""

import argparse
import json
import pathlib
import statistics
import sys
from collections.abc import Callable, Iterator

import torch

from benchmarks.environment import describe_environment
from benchmarks.timing import COLD_BYTES, GPU_PROTOCOL, time_graph
from flexdecode import flex_decode, mods

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
READ_TBPS = 4.6  # read bandwidth of an H200 at 1 GB, as in flexdecode/schedule.py
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
    "bar, us": f"1.5 times what reading the live KV takes at {READ_TBPS} TB/s, and {SLACK_US:.0f} us",
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
    _check(call(*sets[0]), expected)
    times, output = time_graph([lambda tensors=tensors: call(*tensors) for tensors in sets])
    _check(output, expected)
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


def _check(output: torch.Tensor, expected: torch.Tensor) -> None:
    """Refuses an error above twice that of rounding the exact result."""
    error, rounding = (float((x.double() - expected).norm()) for x in (output, expected.to(output.dtype)))
    if not error <= 2 * rounding + 1e-5 * float(expected.norm()):
        raise SystemExit(f"wrong result: error {error:.2e}, rounding alone {rounding:.2e}")


def _input_sets(batch: int, num_keys: int, fewest_live: int) -> list:
    """Random sets whose live keys and values hold `COLD_BYTES` together, as far as memory allows."""
    per_key = batch * NUM_KV_HEADS * 2 * HEAD_DIM * 2
    count = min(-(-COLD_BYTES // (fewest_live * per_key)), MAX_INPUT_BYTES // (num_keys * per_key))

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(batch, heads, length, HEAD_DIM, dtype=torch.bfloat16, device="cuda")

    return [
        (normal(NUM_Q_HEADS, 1), normal(NUM_KV_HEADS, num_keys), normal(NUM_KV_HEADS, num_keys)) for _ in range(count)
    ]


def markdown(document: dict) -> str:
    """The page of a run."""
    parts = ["# Long caches, few live keys: " + document["environment"]["hardware"].split(",")[0]]
    parts.append(
        "A decode step of one token where the mask leaves few keys of a long cache. What it costs should follow from"
        " the live keys, not from the length of the cache; the last column says how far it does. Plain attention beside"
        f" the mask, {NUM_Q_HEADS} query heads, {NUM_KV_HEADS} KV heads, head dimension {HEAD_DIM}, bfloat16."
    )
    parts += [_result_table(document["results"]), "## What the columns mean"]
    parts.append("\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items()))
    parts += ["## What falls short", _shortcomings(document["results"]), "## What was measured"]
    parts.append("\n".join(f"- {name}: {text}" for name, text in document["environment"].items()))
    parts.append(GPU_PROTOCOL.split(" The practical floor")[0] + " Here all inputs are cold.")
    return "\n\n".join(parts) + "\n"


def _result_table(results: list[dict]) -> str:
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"]
    medians = {(r["case"], r["B"], r["N"]): statistics.median(r["times_us"]) for r in results}
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
    """The cases over their bar."""
    lines = [
        f"- {TITLES[r['case']]}, B = {r['B']}, N = {r['N']}: {median:.1f} us, over the bar of {r['bar_us']:.1f}."
        for r in results
        if (median := statistics.median(r["times_us"])) > r["bar_us"]
    ]
    return "\n".join(lines) or "Nothing: every case is under its bar."


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, which returns 1 if one is over its bar; or make the page of a recorded run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.live_kv", description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    parser.add_argument("--read", type=pathlib.Path, metavar="JSON", help="a live_kv.json to make --page from")
    parser.add_argument("--page", type=pathlib.Path, metavar="MD", help="with --read: where to write its page")
    options = parser.parse_args(arguments)
    if (options.read is None) != (options.page is None):
        parser.error("--read and --page belong together")
    if options.read:
        options.page.write_text(markdown(json.loads(options.read.read_text())))
        return 0
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")
    torch.manual_seed(2024)
    environment = describe_environment(torch.device("cuda"))
    if options.commit:
        environment["commit"] = options.commit
    document: dict = {"environment": environment, "results": []}
    options.out.mkdir(parents=True, exist_ok=True)
    for batch in (8, 1):
        for num_keys in (32768, 131072):
            sets = _input_sets(batch, num_keys, fewest_live=1024)
            for name, mask_mod, live in cases(batch, num_keys):
                record = measure(name, mask_mod, live, sets)
                document["results"].append(record)
                median = statistics.median(record["times_us"])
                print(f"{name} B={batch} N={num_keys}: {median:.1f} us, bar {record['bar_us']:.1f}", flush=True)
                (options.out / "live_kv.json").write_text(json.dumps(document, indent=1) + "\n")
            del sets
            torch.cuda.empty_cache()
    (options.out / "live_kv.md").write_text(markdown(document))
    print(f"\n{markdown(document)}")
    return int(any(statistics.median(r["times_us"]) > r["bar_us"] for r in document["results"]))


if __name__ == "__main__":
    sys.exit(main())
