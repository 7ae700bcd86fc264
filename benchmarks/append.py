"""What appending one token to all layers of a cache costs: host time and device time, on a GPU.

    python -m benchmarks.append --out benchmarks/results/h200

It compares `cache.layer(i).append(k, v)` with what a user would write in PyTorch: two `index_put_` for each layer, with
places that are computed once for each step. It prints a table and writes append.json. Before it times them, it checks
that all ways store the same.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from flexdecode import PagedKVCache, write_kv

from .environment import describe_environment
from .timing import time_graph

NUM_LAYERS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, LENGTH = 32, 8, 128, 16, 1000
BATCHES = (1, 8, 64)
ROUNDS, STEPS = 20, 20
Step = Callable[[], object]


def steps(batch: int, dtype: torch.dtype, device: str) -> tuple[PagedKVCache, dict[str, Step]]:
    """A cache with tokens in it, and each way to write one token of each sequence into all of its layers."""
    pages = -(-LENGTH // PAGE_SIZE) + 1
    cache = PagedKVCache(
        batch=batch, num_layers=NUM_LAYERS, num_kv_heads=NUM_KV_HEADS, head_dim=HEAD_DIM, num_pages=batch * pages,
        page_size=PAGE_SIZE, dtype=dtype, device=device,
    )  # fmt: skip
    k, v = torch.randn(2, batch, NUM_KV_HEADS, 1, HEAD_DIM, dtype=torch.bfloat16, device=device)
    rows_k, rows_v = k[:, :, 0], v[:, :, 0]
    cache.reserve(LENGTH)
    cache.reserve(1)
    position = cache.kv_lens - 1
    page = cache.page_table[torch.arange(batch, device=device), position // PAGE_SIZE].long()
    offset = (position % PAGE_SIZE).long()
    slots = page * PAGE_SIZE + offset
    head = torch.arange(NUM_KV_HEADS, device=device)[None]
    places = page[:, None], head, offset[:, None]
    layers = [cache.layer(i) for i in range(NUM_LAYERS)]

    def append() -> None:
        for layer in layers:
            layer.append(k, v)

    def append_packed() -> None:
        for layer in layers:
            layer.append(rows_k, rows_v)

    def write() -> None:
        for layer in layers:
            write_kv(rows_k, rows_v, layer.key, layer.value, slots, layer.k_scale, layer.v_scale)

    def put() -> None:
        for layer in layers:
            layer.key.index_put_(places, rows_k)
            layer.value.index_put_(places, rows_v)

    ways: dict[str, Step] = {"append": append, "append, packed": append_packed, "write_kv": write}
    return cache, ways | ({"two index_put_": put} if dtype == torch.bfloat16 else {})


def check(cache: PagedKVCache, ways: dict[str, Step]) -> None:
    """Refuses ways that store other bytes than the first one."""
    stored = []
    for way in ways.values():
        cache.key.zero_(), cache.value.zero_()
        way()
        stored.append([x.clone().view(torch.uint8) for x in (cache.key, cache.value)])
    for name, others in zip(ways, stored, strict=True):
        if not all(torch.equal(x, y) for x, y in zip(stored[0], others, strict=True)) or not others[0].any():
            raise SystemExit(f"`{name}` stores something else")


def host_us(step: Step) -> list[float]:
    """Microseconds of host time for each layer, in rounds of some steps; the GPU is idle when a round starts."""
    rounds = []
    for _ in range(ROUNDS):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(STEPS):
            step()
        rounds.append(1e6 * (time.perf_counter() - started) / STEPS / NUM_LAYERS)
    return rounds


def measure(batch: int, dtype: torch.dtype, device: str) -> list[dict]:
    """A record for each way: sizes, microseconds for each layer on the host and on the device; and for `reserve`."""
    cache, ways = steps(batch, dtype, device)
    check(cache, ways)
    records = []
    for name, way in ways.items():
        on_device = [us / NUM_LAYERS for us in time_graph([way])[0]]
        records.append({"way": name, "host_us": host_us(way), "device_us": on_device})

    cache.reset()
    cache.reserve(LENGTH)
    rounds = []
    for _ in range(PAGE_SIZE - LENGTH % PAGE_SIZE):  # no new page
        torch.cuda.synchronize()
        started = time.perf_counter()
        cache.reserve(1)
        rounds.append(1e6 * (time.perf_counter() - started))
    records.append({"way": "reserve, once for all layers", "host_us": rounds, "device_us": []})
    of_all = {"B": batch, "dtype": str(dtype).removeprefix("torch."), "num_layers": NUM_LAYERS}
    return [of_all | record for record in records]


def table(records: list[dict]) -> str:
    """The records in words."""
    lines = [f"{'B':>4} {'cache':<10} {'way':<30} {'host us a layer':>16} {'device us a layer':>18}"]
    for record in records:
        device = f"{statistics.median(record['device_us']):.2f}" if record["device_us"] else ""
        host = f"{statistics.median(record['host_us']):.1f}"
        lines.append(f"{record['B']:>4} {record['dtype']:<10} {record['way']:<30} {host:>16} {device:>18}")
    return "\n".join(lines)


def main() -> int:
    """Measures, prints, and writes append.json; returns 1 if an append costs the host more than two index_put_."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="folder of append.json")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    options = parser.parse_args()
    torch.manual_seed(0)
    records = [
        record
        for dtype in (torch.bfloat16, torch.int8, torch.float8_e4m3fn)
        for batch in BATCHES
        for record in measure(batch, dtype, "cuda")
    ]
    print(table(records))
    options.out.mkdir(parents=True, exist_ok=True)
    environment = describe_environment(torch.device("cuda"))
    if options.commit:
        environment["commit"] = options.commit
    document = {"environment": environment, "results": records}
    (options.out / "append.json").write_text(json.dumps(document, indent=1) + "\n")
    host = {(r["B"], r["dtype"], r["way"]): statistics.median(r["host_us"]) for r in records}
    return int(any(host[b, "bfloat16", "append"] > host[b, "bfloat16", "two index_put_"] for b in BATCHES))


if __name__ == "__main__":
    sys.exit(main())
