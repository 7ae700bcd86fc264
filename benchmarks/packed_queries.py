"""What packed queries and prompts cost, against padded queries and PyTorch's flash attention, on a GPU.

    python -m benchmarks.packed_queries --out benchmarks/results/h200
    python -m benchmarks.packed_queries --read benchmarks/results/h200/packed_queries.json --page docs/packed-queries.md

The first writes packed_queries.json and packed_queries.md, the second makes the page of a recorded run, without a GPU.
Each call is compared with a float64 result before and inside the timed graph.
"""

import itertools
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right

from flexdecode import flex_decode, mods

from .cases import totals
from .recorded import check, goals_reached, median, page, span
from .recorded import main as recorded_main
from .timing import time_graph

NUM_Q_HEADS, NUM_KV_HEADS, HEAD_DIM, PAGE_SIZE, WINDOW = 32, 8, 128, 16, 1024
GROUP = NUM_Q_HEADS // NUM_KV_HEADS
WINDOW_US = 5.0
PROMPTS = {(512, 32768): 1.6, (2048, 32768): 1.5, (8192, 8192): 1.5}  # the newest tokens, all tokens: limit over SDPA
COLUMNS = {
    "call": "what is computed; the mask is causal unless it is a window",
    "us": "the whole call",
    "against": "what it is compared with, in the same run",
    "ratio": "the time over that of what it is compared with",
    "goal": "the largest ratio that the project accepts",
}


class Case(NamedTuple):
    """A call, its result in float64, and what its time is compared with.

    Attributes:
        case: name of the call.
        call: runs it.
        expected: its result.
        against: name of what it is compared with.
        other_us: microseconds of that.
        limit: the largest ratio.
        free_us: microseconds that do not count.
    """

    case: str
    call: Callable[[], torch.Tensor]
    expected: torch.Tensor
    against: str
    other_us: float
    limit: float
    free_us: float = 0.0


def normal(*shape: int) -> torch.Tensor:
    """Random bfloat16 numbers on the GPU."""
    return torch.randn(*shape, dtype=torch.bfloat16, device="cuda")


def in_float64(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, slopes: torch.Tensor | None = None, window: int = 0
) -> torch.Tensor:
    """The newest tokens `[Hq, Q, D]` over the keys of one sequence `[Hkv, N, D]`, by plain attention, head by head."""
    num_tokens, num_keys = query.shape[1], key.shape[1]
    distance = torch.arange(num_keys - num_tokens, num_keys, device="cuda")[:, None]
    distance = distance - torch.arange(num_keys, device="cuda")
    dead = (distance < 0) | (distance >= window) if window else distance < 0
    outputs = []
    for h in range(NUM_Q_HEADS):
        score = query[h].double() @ key[h // GROUP].double().mT / HEAD_DIM**0.5
        if slopes is not None:
            score -= slopes[h].double() * distance
        outputs.append(torch.softmax(score.masked_fill_(dead, -torch.inf), -1) @ value[h // GROUP].double())
    return torch.stack(outputs)


def timed(call: Callable[[], torch.Tensor], expected: torch.Tensor | None = None) -> list[float]:
    """Microseconds of a call that is checked before and after."""
    if expected is not None:
        check(call(), expected)
    times, output = time_graph([call])
    if expected is not None:
        check(output, expected)
    return times


def middle(times: list[float]) -> float:
    """The median."""
    return sorted(times)[len(times) // 2]


def decode_cases() -> Iterator[Case]:
    """Packed against padded queries, and a chunk beside decodes."""
    key, value = (normal(65, NUM_KV_HEADS, 8192, HEAD_DIM) for _ in range(2))
    lens = torch.full((65,), 8192, dtype=torch.int32, device="cuda")
    ragged = [1 + 5 * i % 8 for i in range(64)]
    for batch in (64, 8):
        of = key[:batch], value[:batch], lens[:batch]
        for num_tokens in (1, 2, 4, 8):
            yield from _few_tokens(f"{batch} sequences, tokens of each: {num_tokens}", *of, [num_tokens] * batch)
        yield from _few_tokens(f"{batch} sequences, tokens of each: 1 to 8", *of, ragged[:batch])
    yield _mixed(key, value, lens)


def _few_tokens(
    name: str, key: torch.Tensor, value: torch.Tensor, lens: torch.Tensor, q_lens: list[int]
) -> Iterator[Case]:
    starts, split = totals(q_lens, "cuda"), normal(sum(q_lens), NUM_Q_HEADS, HEAD_DIM).split(q_lens)
    packed, padded = torch.cat(split), torch.nn.utils.rnn.pad_sequence(list(split), batch_first=True)
    padded, given = padded.transpose(1, 2).contiguous(), {"kv_lens": lens, "mask_mod": mods.causal()}
    q_lens_of = {} if len(set(q_lens)) == 1 else {"q_lens": torch.tensor(q_lens, dtype=torch.int32, device="cuda")}
    expected = _packed_in_float64(split, key, value)
    other = middle(timed(lambda: flex_decode(padded, key, value, **given, **q_lens_of)))
    for hint in (max(q_lens), None):
        call = partial(flex_decode, packed, key, value, **given, cu_seqlens_q=starts, max_q_len=hint)
        what = name if hint is None else f"{name}, `max_q_len` given"
        yield Case(what, call, expected, "padded queries", other, 1.03)


def _packed_in_float64(split: Sequence[torch.Tensor], key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """The output `[T, Hq, D]` of packed queries, given as the tokens of each sequence."""
    results = [in_float64(x.transpose(0, 1), key[b], value[b]) for b, x in enumerate(split)]
    return torch.cat([x.transpose(0, 1) for x in results])


def _mixed(key: torch.Tensor, value: torch.Tensor, lens: torch.Tensor) -> Case:
    q_lens, causal = [1] * 64 + [512], mods.causal()
    query = normal(576, NUM_Q_HEADS, HEAD_DIM)

    def call(rows: slice, sequences: slice, **more: Any) -> torch.Tensor:
        of = key[sequences], value[sequences], None, causal
        return flex_decode(query[rows], *of, kv_lens=lens[sequences], **more)

    all_starts, one_each, chunk = totals(q_lens, "cuda"), totals([1] * 64, "cuda"), totals([512], "cuda")
    decodes, newest = (slice(0, 64), slice(0, 64)), (slice(64, 576), slice(64, 65))
    alone = middle(timed(lambda: call(*decodes, cu_seqlens_q=one_each, max_q_len=1)))
    alone += middle(timed(lambda: call(*newest, cu_seqlens_q=chunk, max_q_len=512)))
    expected = _packed_in_float64(query.split(q_lens), key, value)
    everything = slice(None), slice(None)
    name = "64 decodes and a chunk of 512, 8192 keys each"
    return Case(name, lambda: call(*everything, cu_seqlens_q=all_starts), expected, "both alone", alone, 1.15)


def prompt_cases() -> Iterator[Case]:
    """Prompts against flash attention, over pages, with ALiBi, and a window against the causal mask."""
    for (num_tokens, num_keys), limit in PROMPTS.items():
        yield from _prompt(num_tokens, num_keys, limit)


def _prompt(num_tokens: int, num_keys: int, limit: float) -> Iterator[Case]:
    causal, window = mods.causal(), mods.sliding_window(WINDOW)
    query = normal(1, NUM_Q_HEADS, num_tokens, HEAD_DIM)
    key, value = (normal(1, NUM_KV_HEADS, num_keys, HEAD_DIM) for _ in range(2))
    bias, alibi = causal_lower_right(num_tokens, num_keys), mods.alibi(NUM_Q_HEADS, device="cuda")
    order = torch.randperm(num_keys // PAGE_SIZE, device="cuda")
    pages = [torch.empty_like(x[0]).view(-1, NUM_KV_HEADS, PAGE_SIZE, HEAD_DIM) for x in (key, value)]
    for pool, x in zip(pages, (key, value), strict=True):
        pool[order] = x[0].view(NUM_KV_HEADS, -1, PAGE_SIZE, HEAD_DIM).transpose(0, 1)
    paged = {"page_table": order[None].int(), "kv_lens": torch.tensor([num_keys], device="cuda").int()}

    def flash() -> torch.Tensor:
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=bias, enable_gqa=True)

    def ours(score_mod: Any = None, mask_mod: Any = causal) -> Callable[[], torch.Tensor]:
        return lambda: flex_decode(query, key, value, score_mod, mask_mod)

    def over_pages(score_mod: Any = None) -> Callable[[], torch.Tensor]:
        return lambda: flex_decode(query, *pages, score_mod, causal, **paged)

    of = query[0], key[0], value[0]
    plain, sloped = in_float64(*of)[None], in_float64(*of, slopes=_slopes())[None]
    size = f"the newest {num_tokens} of {num_keys} tokens" if num_tokens < num_keys else f"all {num_keys} tokens"
    yield Case(size, ours(), plain, "flash SDPA", middle(timed(flash, plain)), limit)
    contiguous, in_pages = middle(timed(ours())), middle(timed(over_pages()))
    yield Case(f"{size}, pages of {PAGE_SIZE}", over_pages(), plain, "contiguous", contiguous, 1.2)
    yield Case(f"{size}, ALiBi", ours(alibi), sloped, "without ALiBi", contiguous, 1.1)
    yield Case(f"{size}, pages, ALiBi", over_pages(alibi), sloped, "pages without ALiBi", in_pages, 1.1)
    lived = torch.arange(num_keys - num_tokens + 1, num_keys + 1, dtype=torch.float64)
    share = float(lived.clamp(max=WINDOW).sum() / lived.sum())
    yield Case(
        f"{size}, window of {WINDOW}", ours(None, window), in_float64(*of, window=WINDOW)[None],
        "causal, per live pair", contiguous * share, 1.3, WINDOW_US,
    )  # fmt: skip


def _slopes() -> torch.Tensor:
    """ALiBi's slopes `[Hq]`, stated a second time: 2 ** (-8 * (h + 1) / Hq)."""
    return 2.0 ** (-8.0 * torch.arange(1, NUM_Q_HEADS + 1, device="cuda") / NUM_Q_HEADS)


def run() -> Iterator[dict]:
    """Records of all cases."""
    for case in itertools.chain(decode_cases(), prompt_cases()):
        yield {
            "case": case.case, "times_us": timed(case.call, case.expected), "against": case.against,
            "other_us": case.other_us, "limit": case.limit, "free_us": case.free_us,
            "bar_us": case.limit * case.other_us + case.free_us,
        }  # fmt: skip


def ratio(record: dict) -> float:
    """The time of a record over that of what it is compared with."""
    return (median(record) - record["free_us"]) / record["other_us"]


def found(results: list[dict]) -> str:
    """Three sentences that say what was found."""
    against = {name: [ratio(r) for r in results if r["against"] == name] for name in ("padded queries", "flash SDPA")}
    return (
        f"Packed queries take {span(against['padded queries'], 3)} times as long as the same queries, padded to one"
        f" length. A prompt takes {span(against['flash SDPA'])} times as long as PyTorch's flash attention."
        f" {goals_reached(results, 'calls')}"
    )


def markdown(document: dict) -> str:
    """The page of a run."""
    results = document["results"]
    intro = (
        "A call has query tokens of sequences of any length, packed one after another, or a prompt. Plain"
        f" attention beside the mask, {NUM_Q_HEADS} query heads, {NUM_KV_HEADS} KV heads, head dimension {HEAD_DIM},"
        f" bfloat16. Windows have {WINDOW_US:.0f} us for free, because few keys take less time than a launch."
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | --- | ---: | ---: |"]
    lines += [
        f"| {r['case']} | {median(r):.1f} | {r['against']}, {r['other_us']:.1f} us | {ratio(r):.3f} | {r['limit']} |"
        for r in results
    ]
    columns = "\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())
    over = "\n".join(
        f"- {r['case']}: {ratio(r):.3f} times {r['against']}, over {r['limit']}."
        for r in results
        if ratio(r) > r["limit"]
    )
    parts = [found(results), intro, "\n".join(lines), "## What the columns mean", columns, "## What falls short"]
    inputs = "Here every call reads one set of inputs. The caches of 8 and 64 sequences exceed the L2 cache."
    return page(
        document, "Packed queries and prompts", [*parts, over or "Nothing: every call reaches its goal."], inputs
    )


def main(arguments: list[str] | None = None) -> int:
    """Run all cases, which returns 1 if one misses its goal; or make the page of a recorded run."""
    return recorded_main("packed_queries", __doc__.split("\n")[0], run, markdown, arguments)


if __name__ == "__main__":
    sys.exit(main())
