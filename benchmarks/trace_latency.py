"""Milliseconds from two callables to the generated source, for typical mods; needs no GPU.

python -m benchmarks.trace_latency
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

REPEATS = 20
LIMIT_MS = 20.0


def main() -> int:
    """Print the latency of each mod; returns 1 if one takes longer than the limit."""
    started = time.perf_counter()
    import flexdecode

    print(f"import flexdecode, after torch: {1e3 * (time.perf_counter() - started):.0f} ms\n")
    print(f"{'score_mod + mask_mod':<36} {'first':>9} {'median':>9} {'lines':>6}")
    slowest = 0.0
    for name, score_mod, mask_mod in _typical_mods(flexdecode.mods):
        times, num_lines = _measure(score_mod, mask_mod)
        median = statistics.median(times)
        slowest = max(slowest, median)
        print(f"{name:<36} {times[0]:>6.1f} ms {median:>6.1f} ms {num_lines:>6}")
    print(f"\nfirst: in this process; median: of {REPEATS} from nothing; the limit on the median is {LIMIT_MS:.0f} ms.")
    return int(slowest > LIMIT_MS)


def _typical_mods(mods) -> list[tuple[str, Callable | None, Callable | None]]:
    table = torch.randn(16, 257)
    return [
        ("none + causal", None, mods.causal()),
        ("softcap", mods.softcap(30.0), None),
        ("alibi", mods.alibi(16), None),
        ("alibi + sliding_window", mods.alibi(16), mods.sliding_window(1024)),
        ("relative_bias + streaming", mods.relative_bias(table), mods.streaming(4, 1024)),
        ("softcap of alibi + chunked", mods.compose(mods.alibi(16), mods.softcap(30.0)), mods.chunked(8192)),
    ]


def _measure(score_mod: Callable | None, mask_mod: Callable | None) -> tuple[list[float], int]:
    """Milliseconds of each repeat with an empty cache, and the number of generated lines."""
    from flexdecode.analysis.proven import ProvenMods
    from flexdecode.codegen.kernels import generate_module
    from flexdecode.memos import forget_memos
    from flexdecode.runtime.identity import graph_of, identify

    times, text = [], ""
    for _ in range(REPEATS):
        forget_memos()
        started = time.perf_counter()
        graphs = [
            graph_of(kind, identify(kind, mod), torch.device("cpu"))[0]
            for kind, mod in (("score_mod", score_mod), ("mask_mod", mask_mod))
        ]
        text = generate_module(ProvenMods(*graphs))
        times.append(1e3 * (time.perf_counter() - started))
    return times, len(text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
