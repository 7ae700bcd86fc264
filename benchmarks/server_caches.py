"""What decoding costs over the caches of servers: ragged, paged, quantised, latent, and with several query tokens.

    python -m benchmarks.server_caches --out benchmarks/results/h200
    python -m benchmarks.server_caches --read benchmarks/results/h200/server_caches.json --page docs/server-caches.md

The first writes server_caches.json and server_caches.md, the second makes the page of a recorded run, without a GPU.
Each case is compared with plain attention in float64 before it is timed, and within its timed graph.
"""

import sys
from collections.abc import Callable, Iterator, Sequence

import torch

from flexdecode import flex_decode, merge_attention

from .cases import into_pages
from .recorded import check, goals_reached, median, page, span
from .recorded import main as recorded_main
from .sections import RAGGED
from .timing import COLD_BYTES, time_graph

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM = 32, 8, 128
READ_TBPS, TENSOR_TFLOPS = 4.6, 989.0  # of an H200: reads at 1 GB as in flexdecode/call/device.py, dense bfloat16
COLUMNS = {
    "case": "what is decoded",
    "KV, MB": "keys, values and scales that have to be read",
    "us": "the whole call; cold inputs, in a CUDA graph, with no plan on the host",
    "TB/s": "these bytes over the time",
    "goal, us": "the longest time that the project accepts",
    "the goal is": "where it comes from",
}


def normal(*shape: int) -> torch.Tensor:
    """Random bfloat16 on the GPU."""
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, live: torch.Tensor | None) -> torch.Tensor:
    """Plain attention of one sequence in float64: [Hq, Q, D], [Hkv, n, D], [Hkv, n, Dv], live [Q, n] or None."""
    heads, tokens, head_dim = query.shape
    rows = query.double().reshape(key.shape[0], -1, tokens, head_dim)
    score = torch.einsum("hgqd,hnd->hgqn", rows, key.double()) / head_dim**0.5
    if live is not None:
        score = score.where(live, -torch.inf)
    return torch.einsum("hgqn,hnd->hgqd", score.softmax(-1), value.double()).reshape(heads, tokens, -1)


def expect(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lens: Sequence[int] | None = None,
    live: torch.Tensor | None = None,
) -> torch.Tensor:
    """Plain attention of all sequences in float64."""
    lengths = [key.shape[2]] * len(query) if lens is None else lens
    caches = zip(query, key, value, lengths, strict=True)
    return torch.stack([attend(q, k[:, :n], v[:, :n], live) for q, k, v, n in caches])


def measure(
    case: str, calls: Sequence[Callable[[], torch.Tensor]], expected: torch.Tensor, num_bytes: float, slack: float = 2.0
) -> dict:
    """One record without its goal; a cold cache asks for one call per input set."""
    check(calls[0](), expected, slack)
    times, output = time_graph(calls)
    check(output, expected, slack)
    return {"case": case, "kv_bytes": int(num_bytes), "input_sets": len(calls), "times_us": times}


def copies(num_bytes: float) -> int:
    """Input sets of so many bytes that hold `COLD_BYTES` together."""
    return max(1, -(-COLD_BYTES // int(num_bytes)))


EARLIER = "the time of an earlier experiment, improved"
OLD_SOURCES = {"the prototype's time, improved": EARLIER}  # what older runs call it
RAGGED_BARS = {  # microseconds
    "1 of 32768 and 15 of 512 tokens": 48.0,
    "16 lengths, 512 x 1.32^i": 132.0,
    "1 of 131072 and 63 of 1024 tokens": 190.0,
}


def ragged() -> Iterator[dict]:
    """Lengths that differ by far."""
    for case, bar in RAGGED_BARS.items():
        lens = RAGGED[case]
        num_bytes, kv_lens = sum(lens) * NUM_KV_HEADS * HEAD_DIM * 4, torch.tensor(lens, device="cuda")
        query = normal(len(lens), NUM_Q_HEADS, 1, HEAD_DIM)
        shape = (len(lens), NUM_KV_HEADS, max(lens), HEAD_DIM)
        caches = [(normal(*shape), normal(*shape)) for _ in range(copies(num_bytes))]
        calls = [lambda kv=kv: flex_decode(query, *kv, kv_lens=kv_lens) for kv in caches]  # noqa: B023
        record = measure(case, calls, expect(query, *caches[0], lens), num_bytes)
        yield record | {"bar_us": bar, "source": EARLIER}
        del caches, calls
        torch.cuda.empty_cache()


def paged() -> Iterator[dict]:
    """Pages against a contiguous cache, and quantised caches against bfloat16."""
    batch, tokens = 16, 8192
    num_bytes = batch * tokens * NUM_KV_HEADS * HEAD_DIM * 4
    query = normal(batch, NUM_Q_HEADS, 1, HEAD_DIM)
    key, value = (normal(batch, NUM_KV_HEADS, tokens, HEAD_DIM) for _ in range(2))
    kv_lens, expected = torch.full((batch,), tokens, device="cuda"), expect(query, key, value)
    base = measure("16 of 8192 tokens, contiguous", [lambda: flex_decode(query, key, value)], expected, num_bytes)
    floor = 1.5 * num_bytes / READ_TBPS / 1e6
    yield base | {"bar_us": floor, "source": f"1.5 times the bytes at {READ_TBPS} TB/s"}
    call = lambda: flex_decode(query, key, value, kv_lens=kv_lens)  # noqa: E731
    whole = measure("16 of 8192 tokens, contiguous, with kv_lens", [call], expected, num_bytes)
    yield whole | {"bar_us": floor, "source": f"1.5 times the bytes at {READ_TBPS} TB/s"}
    for page_size, factor in ((256, 1.05), (128, 1.05), (64, 1.05), (16, 1.05), (4, 1.15), (1, 1.15)):
        order = torch.randperm(batch * tokens // page_size, device="cuda")
        pages = into_pages(key, page_size, order), into_pages(value, page_size, order)
        table = order.view(batch, -1).int()
        calls = [lambda: flex_decode(query, *pages, kv_lens=kv_lens, page_table=table)]  # noqa: B023
        record = measure(f"the same in pages of {page_size}", calls, expected, num_bytes)
        yield record | {"bar_us": factor * median(whole), "source": f"{factor} x contiguous with kv_lens"}
    for dtype, unit in ((torch.float8_e4m3fn, 1.0), (torch.float8_e5m2, 1.0), (torch.int8, 1 / 32)):
        stored = [(x.float() / unit).round().clamp(-127, 127) if dtype == torch.int8 else x for x in (key, value)]
        caches = [x.to(dtype) for x in stored]
        expected = expect(query, *(x.float() * unit for x in caches))
        per_token = torch.full(key.shape[:3], unit, device="cuda")
        for form, scale in (("one scale", unit), ("a scale per token and head", per_token)):
            calls = [lambda: flex_decode(query, *caches, k_scale=scale, v_scale=scale)]  # noqa: B023
            extra = 0 if form == "one scale" else 8 * per_token.numel()
            name = str(dtype).removeprefix("torch.")
            record = measure(f"the same in {name}, {form}", calls, expected, num_bytes / 2 + extra)
            yield record | {"bar_us": median(base) / 1.8, "source": "bfloat16 / 1.8"}


def latent() -> Iterator[dict]:
    """Multi-head latent attention: values are the first 512 columns of keys."""
    batch, tokens = 64, 8192
    cache = normal(batch, 1, tokens, 576)
    num_bytes = cache.numel() * 2
    for heads in (16, 128):
        query = normal(batch, heads, 1, 576)
        calls = [lambda: flex_decode(query, cache, cache[..., :512])]  # noqa: B023
        expected = expect(query, cache, cache[..., :512])
        record = measure(f"MLA 576/512, {heads} heads, 64 of 8192 tokens", calls, expected, num_bytes)
        flops = 2 * batch * heads * tokens * (576 + 512)
        limits = num_bytes / READ_TBPS / 1e6, flops / TENSOR_TFLOPS / 1e6
        source = "60% of the read bandwidth" if limits[0] > limits[1] else "60% of the tensor cores' rate"
        yield record | {"bar_us": max(limits) / 0.6, "source": source}


def several_tokens() -> Iterator[dict]:
    """A tree of 8 draft tokens against one token."""
    tokens, prefix = 32768, 32760
    ancestor = torch.ones(8, 8, dtype=torch.bool, device="cuda").tril()
    ancestor[3, 2] = ancestor[5, 4] = ancestor[6, 5] = False

    def tree(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return (kv_idx < prefix) | ancestor[q_idx - prefix, kv_idx - prefix]

    live = torch.ones(8, tokens, dtype=torch.bool, device="cuda")
    live[:, prefix:] = ancestor
    for batch in (1, 8):
        num_bytes = batch * tokens * NUM_KV_HEADS * HEAD_DIM * 4
        one, eight = (normal(batch, NUM_Q_HEADS, n, HEAD_DIM) for n in (1, 8))
        shape = (batch, NUM_KV_HEADS, tokens, HEAD_DIM)
        caches = [(normal(*shape), normal(*shape)) for _ in range(copies(num_bytes))]
        calls = [lambda kv=kv: flex_decode(one, *kv) for kv in caches]  # noqa: B023
        base = measure(f"1 token, {batch} of {tokens} tokens", calls, expect(one, *caches[0]), num_bytes)
        yield base | {"bar_us": 1.5 * num_bytes / READ_TBPS / 1e6 + 5, "source": "1.5 times the bytes, and 5 us"}
        calls = [lambda kv=kv: flex_decode(eight, *kv, mask_mod=tree) for kv in caches]  # noqa: B023
        expected = expect(eight, *caches[0], live=live)
        record = measure(f"a tree of 8 tokens, {batch} of {tokens} tokens", calls, expected, num_bytes)
        yield record | {"bar_us": 1.15 * median(base), "source": "1.15 x one token"}


def shared_prefix() -> Iterator[dict]:
    """A prefix that 32 sequences share: in their pages, or decoded once and merged."""
    batch, prefix, suffix, page_size = 32, 16384, 512, 64
    query = normal(batch, NUM_Q_HEADS, 1, HEAD_DIM)
    common = [normal(1, NUM_KV_HEADS, prefix, HEAD_DIM) for _ in range(2)]
    own = [normal(batch, NUM_KV_HEADS, suffix, HEAD_DIM) for _ in range(2)]
    pools, shared = [], prefix // page_size
    for first, rest in zip(common, own, strict=True):
        parts = [
            x.view(len(x), NUM_KV_HEADS, -1, page_size, HEAD_DIM).transpose(1, 2).flatten(0, 1) for x in (first, rest)
        ]
        pools.append(torch.cat(parts).contiguous())
    private = shared + torch.arange(batch * suffix // page_size, device="cuda").view(batch, -1)
    table = torch.cat([torch.arange(shared, device="cuda").expand(batch, -1), private], 1).int()
    kv_lens = torch.full((batch,), prefix + suffix, device="cuda")
    caches = [torch.cat([c.expand(batch, -1, -1, -1), o], 2) for c, o in zip(common, own, strict=True)]
    expected = expect(query, *caches)
    num_bytes = (prefix + batch * suffix) * NUM_KV_HEADS * HEAD_DIM * 4
    packed = query.transpose(0, 2).contiguous()  # [1, Hq, 32, D]: tokens of one sequence

    def cascade() -> torch.Tensor:
        out, lse = flex_decode(packed, *common, return_lse=True)
        parts = [(out.transpose(0, 2), lse.transpose(0, 2)), flex_decode(query, *own, return_lse=True)]
        return merge_attention(*zip(*parts, strict=True))[0]

    calls = [lambda: flex_decode(query, *pools, kv_lens=kv_lens, page_table=table)]
    whole = measure("32 sequences with 16384 shared and 512 own tokens, each whole", calls, expected, num_bytes)
    yield whole | {"bar_us": 1e3 * batch, "source": "none"}
    once = measure("the same, the shared tokens once, then merged", [cascade], expected, num_bytes, slack=3.0)
    yield once | {"bar_us": median(whole), "source": "each sequence whole"}


def run() -> Iterator[dict]:
    """Records of all cases."""
    for part in (ragged, paged, latent, several_tokens, shared_prefix):
        yield from part()
        torch.cuda.empty_cache()


def found(results: list[dict]) -> str:
    """Three sentences that say what was found."""
    times = {r["case"]: median(r) for r in results}
    whole, plain = (times[f"16 of 8192 tokens, contiguous{more}"] for more in (", with kv_lens", ""))
    paged = [time / whole for case, time in times.items() if case.startswith("the same in pages of")]
    stored = [
        plain / time for case, time in times.items() if case.startswith(("the same in float8", "the same in int8"))
    ]
    return (
        f"A cache in pages takes {span(paged)} times as long as the same tokens without pages. Caches of 8 bits are"
        f" decoded {span(stored)} times as fast as the same tokens in bfloat16."
        f" {goals_reached([r for r in results if r['source'] != 'none'], 'cases with a goal')}"
    )


def markdown(document: dict) -> str:
    """The page of a run."""
    results = document["results"]
    intro = (
        "Each case is a decode step over a cache that servers have. Where nothing else is said: bfloat16, one query"
        f" token, {NUM_Q_HEADS} query heads, {NUM_KV_HEADS} KV heads, head dimension {HEAD_DIM}."
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | ---: | ---: | ---: | --- |"]
    for record in results:
        speed = record["kv_bytes"] / median(record) / 1e6
        goal = "–" if record["source"] == "none" else f"{record['bar_us']:.1f}"
        lines.append(
            f"| {record['case']} | {record['kv_bytes'] / 1e6:.0f} | {median(record):.1f} | {speed:.2f} | {goal} "
            f"| {OLD_SOURCES.get(record['source'], record['source'])} |"
        )
    columns = "\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())
    short = [
        f"- {r['case']}: {median(r):.1f} us, {median(r) / r['bar_us']:.2f} times the goal of {r['bar_us']:.1f}."
        for r in results
        if median(r) > r["bar_us"]
    ]
    shortcomings = "\n".join(short) or "Nothing: every case reaches its goal."
    parts = [found(results), intro, "\n".join(lines), "## What the columns mean", columns]
    return page(document, "Caches of servers", [*parts, "## What falls short", shortcomings])


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, which returns 1 if one misses its goal; or make the page of a recorded run."""
    return recorded_main("server_caches", __doc__.split("\n")[0], run, markdown, arguments)


if __name__ == "__main__":
    sys.exit(main())
