"""Host microseconds of a call with a length that was not seen before, over one with a known shape; needs no GPU.

A cache that grows by `torch.cat` has another N for every token, and packed queries have another T at every step.
Compiler and launch are stubbed: what is measured is all that `flex_decode` does before.

python -m benchmarks.new_length
"""

from __future__ import annotations

import contextlib
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch

LENGTHS, ROUNDS = 1000, 20
FIRST = 3000
LIMIT_US = 60.0


class _NoPass:
    """Takes the place of one compiled pass, and launches nothing."""

    def __call__(self, grid: tuple, stream: int, arguments: tuple) -> None:
        """Does nothing."""

    def encode_descriptors(self, key: object, value: object) -> tuple:
        """Leaves descriptors as they are."""
        return key, value


class _NoKernel:
    """Takes the place of either pass."""

    block_dv, of_small, run = 64, False, _NoPass()

    def __init__(self, *_: object) -> None:
        pass

    def pick(self, arguments: list) -> list:
        """Leaves the arguments of the second pass as they are."""
        return arguments


@contextlib.contextmanager
def no_launch() -> Iterator[None]:
    """Lets calls on CPU tensors go the way of an H200, up to the launch."""
    from flexdecode.call.device import KNOWN_DEVICES
    from flexdecode.runtime import prepare

    facts, _ = KNOWN_DEVICES["H200"]
    with (
        mock.patch.object(prepare, "device_facts", lambda _: facts),
        mock.patch.object(prepare, "find_kernel", _NoKernel),
        mock.patch.object(prepare, "find_combine", _NoKernel),
        mock.patch.object(torch.cuda, "current_device", lambda: None),
        mock.patch.object(torch.cuda, "is_current_stream_capturing", lambda: False),
        mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 0, create=True),
    ):
        yield


def main() -> int:
    """Prints both times of each case; returns 1 if a new length costs more than the limit."""
    most = 0.0
    print(f"{'microseconds of one call':<44} {'known':>8} {'new':>8} {'more':>8}")
    with no_launch():
        for name, call in _cases():
            known, new = _measure(call)
            most = max(most, new - known)
            print(f"{name:<44} {known:>8.1f} {new:>8.1f} {new - known:>8.1f}")
    print(f"\n{LENGTHS} lengths from {FIRST} on, the best of {ROUNDS} rounds; the limit on `more` is {LIMIT_US:.0f}.")
    return int(most > LIMIT_US)


def _cases() -> list[tuple[str, Callable[[int], Any]]]:
    from flexdecode import DecodeOptions, flex_decode, mods

    heads, batch, dim, page_size = 32, 4, 128, 16
    query = torch.randn(batch, heads, 1, dim, dtype=torch.bfloat16)
    longest = FIRST + 2 * LENGTHS
    pool = torch.randn(batch, 8, longest, dim, dtype=torch.bfloat16)
    bias_pool = torch.randn(heads * longest)
    pages = torch.randn(64, 8, page_size, dim, dtype=torch.bfloat16)
    lens = torch.full((batch,), FIRST // 2, dtype=torch.int32)
    triton = DecodeOptions(backend="triton")
    alibi, causal, window = mods.alibi(heads), mods.causal(), mods.sliding_window(1024)
    chunked = mods.chunked(512)
    document = mods.document(torch.zeros(batch, longest, dtype=torch.int32))

    starts = itertools.cycle((0, 64))

    def cache(length: int) -> torch.Tensor:
        """What `torch.cat` gives: another shape, other strides, another place."""
        return pool.view(-1)[next(starts) :][: batch * 8 * length * dim].view(batch, 8, length, dim)

    def dense(score: Any = None, mask: Any = None, options: Any = triton, **more: Any) -> Callable[[int], Any]:
        def call(length: int) -> Any:
            both = cache(length)
            return flex_decode(query, both, both.view_as(both), score, mask, options=options, **more)

        return call

    def growing(length: int) -> Any:
        bias = bias_pool[: heads * length].view(heads, length)
        both = cache(length)
        return flex_decode(query, both, both, lambda s, b, h, q, k: s + bias[h, k], causal, options=triton)

    def paged(length: int) -> Any:
        table = torch.zeros(batch, length, dtype=torch.int32)
        return flex_decode(query, pages, pages, alibi, window, kv_lens=lens, page_table=table, options=triton)

    packed_pool = torch.randn(longest, heads, dim, dtype=torch.bfloat16)
    starts_of = torch.arange(batch + 1, dtype=torch.int32)
    whole = cache(FIRST)

    def packed(hint: int | None, **more: Any) -> Callable[[int], Any]:
        def call(tokens: int) -> Any:
            return flex_decode(
                packed_pool[:tokens], whole, whole, alibi, causal, kv_lens=lens, cu_seqlens_q=starts_of,
                max_q_len=hint, options=triton, **more,
            )  # fmt: skip

        return call

    def padded(tokens: int) -> Any:
        queries = packed_pool.view(-1)[: heads * tokens * dim].view(1, heads, tokens, dim)
        return flex_decode(queries, whole[:1], whole[:1], alibi, causal, options=triton)

    return [
        ("packed tokens, few each, alibi + causal", packed(1)),
        ("packed tokens, any number, alibi + causal", packed(None)),
        ("padded tokens, alibi + causal", padded),
        ("no mods", dense()),
        ("causal", dense(None, causal)),
        ("alibi + causal", dense(alibi, causal)),
        ("alibi + sliding_window", dense(alibi, window)),
        ("softcap + chunked", dense(mods.softcap(30.0), chunked)),
        ("document + causal", dense(None, mods.and_masks(causal, document))),
        ("bias[h, kv_idx] that grows + causal", growing),
        ("kv_lens, alibi + sliding_window", dense(alibi, window, kv_lens=lens)),
        ("pages, alibi + sliding_window", paged),
    ]


def _measure(call: Callable[[int], Any]) -> tuple[float, float]:
    """Microseconds of a known length and of a new one, in turns: medians of the round that costs least."""
    for length in (FIRST - 3, FIRST - 2, FIRST - 1):
        call(length)
        call(length)
    rounds = []
    for start in range(FIRST, FIRST + LENGTHS, LENGTHS // ROUNDS):
        known: list[float] = []
        new: list[float] = []
        for length in range(start, start + LENGTHS // ROUNDS):
            for times in (new, known):
                started = time.thread_time()
                call(length)
                times.append(1e6 * (time.thread_time() - started))
        rounds.append((statistics.median(known), statistics.median(new)))
    return min(rounds, key=sum)


if __name__ == "__main__":
    sys.exit(main())
