"""Live and full intervals against brute force: sound on random graphs, exact on the families that decoding uses."""

import dataclasses
import os
import statistics
import sys
import time

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from support import MODS, trace_mod
from unit import mask_graphs

from flexdecode import mods
from flexdecode.analysis.analyze import analyze
from flexdecode.analysis.bounds import find_bounds, nodes_of
from flexdecode.analysis.intervals import (
    ALWAYS,
    EVERYWHERE,
    MAX_INTERVALS,
    NEVER,
    NOWHERE,
    UNKNOWN,
    at_most,
    find_extent,
)
from flexdecode.frontend import build
from flexdecode.frontend.graph import Node, const, topological
from flexdecode.frontend.ops import OPS
from flexdecode.runtime import evaluation

EXAMPLES = int(os.environ.get("FLEXDECODE_EXAMPLES", "2500"))
EXAMPLES_PER_ROUND = 5000  # hypothesis remembers what it has tried, so a long run is cut into rounds


def in_region(region, values, kv_idx):
    """Where kv_idx lies in one of the intervals, whose bounds have these values."""
    inside = torch.zeros((), dtype=torch.bool)
    for lo, hi in region:
        here = torch.ones((), dtype=torch.bool)
        if lo is not None:
            here = here & (kv_idx >= values[lo])
        if hi is not None:
            here = here & (kv_idx < values[hi])
        inside = inside | here
    return inside


def for_random_graphs(graphs, check):
    """Runs `check` on FLEXDECODE_EXAMPLES random graphs, 2,500 where it is not set; gives what it returned."""
    results = []
    for number, start in enumerate(range(0, EXAMPLES, EXAMPLES_PER_ROUND)):

        @hypothesis.settings(max_examples=min(EXAMPLES_PER_ROUND, EXAMPLES - start), database=None)
        @hypothesis.given(graphs)
        def one_round(example):
            results.append(check(example))

        if number or os.environ.get("CI"):
            one_round = hypothesis.seed(number)(one_round)
        one_round()
    return results


# --- Random graphs: soundness -----------------------------------------------------------------------------------------


@dataclasses.dataclass
class Tried:
    """What an example was: whether keys are masked differently, and how much of that the intervals found."""

    depends_on_kv: bool
    live_is_proper: bool
    some_is_full: bool
    is_exact: bool


def check_ranges(example, values, outputs):
    """Every integer lies in the range that analysis gives it, which decides what the kernel holds in 32 bits."""
    facts = analyze(outputs, example.q_idx_given)
    for node, (low, high) in facts.ranges.items():
        least, greatest = values[node].long().aminmax()
        assert low <= least and greatest <= high, f"{node.op} is in {least} .. {greatest}, not in {low} .. {high}"


def check_mask_example(example):
    output = example.graph.output
    facts = analyze([output], example.q_idx_given)
    extent = find_extent(output, facts)
    bounds = [*nodes_of(extent.live), *nodes_of(extent.full)]
    values = example.evaluate(output, *bounds)
    shape = mask_graphs.NUM_ROWS, mask_graphs.KEYS.numel()
    mask = values[output].expand(shape)
    live, full = (in_region(region, values, mask_graphs.KEYS).expand(shape) for region in (extent.live, extent.full))

    assert not (mask & ~live).any(), f"live positions (row, key) are dropped: {(mask & ~live).nonzero().tolist()[:5]}"
    assert not (full & ~mask).any(), f"dead positions (row, key) are full: {(full & ~mask).nonzero().tolist()[:5]}"
    assert len(extent.live) <= MAX_INTERVALS and len(extent.full) <= MAX_INTERVALS
    assert all(bound.dtype == torch.int64 for bound in bounds)
    assert analyze(bounds, example.q_idx_given).on_kv.isdisjoint(bounds)
    check_ranges(example, values, [output, *bounds])
    return Tried(
        bool((mask != mask[:, :1]).any()),
        bool((~live).any()),
        bool(full.any()),
        torch.equal(live, full) and extent.live != EVERYWHERE,
    )


def test_no_live_key_is_dropped_and_no_dead_one_is_full():
    """Random masks over every operation that gives bools or integers, at rows and keys that make them wrap around.

    `FLEXDECODE_EXAMPLES=200000 pytest tests/unit/test_intervals.py -k dropped -s` tries as many.
    """
    tried = for_random_graphs(mask_graphs.masks(), check_mask_example)
    shares = {f.name: statistics.mean(getattr(t, f.name) for t in tried) for f in dataclasses.fields(Tried)}
    print(f"\n{len(tried)} masks: " + ", ".join(f"{name} {share:.0%}" for name, share in shares.items()))
    assert shares["depends_on_kv"] > 0.5 and shares["live_is_proper"] > 0.4, "the generator has become dull"


def check_score_example(example):
    output = example.graph.output
    region = find_extent(output, analyze([output], example.q_idx_given)).live
    values = example.evaluate(output, *nodes_of(region))
    live = in_region(region, values, mask_graphs.KEYS)
    dropped = (values[output] != -torch.inf) & ~live
    assert not dropped.any(), f"finite scores (row, key) are dropped: {dropped.nonzero().tolist()[:5]}"
    assert len(region) <= MAX_INTERVALS
    return bool((~live).any())


def test_no_finite_score_is_dropped():
    """Random scores with -inf in some branches; FLEXDECODE_EXAMPLES says how many."""
    tried = for_random_graphs(mask_graphs.scores(), check_score_example)
    print(f"\n{len(tried)} scores: live_is_proper {statistics.mean(tried):.0%}")
    assert statistics.mean(tried) > 0.2, "the generator has become dull"


def test_the_random_graphs_hold_every_operation():
    """All but those of floats alone, which no interval is made of."""
    seen = set()

    @hypothesis.settings(max_examples=600, database=None, derandomize=True)
    @hypothesis.given(mask_graphs.masks())
    def collect(example):
        seen.update(node.op for node in example.graph.nodes())

    collect()
    whole = {name for name, op in OPS.items() if op.rule not in ("float", "predicate")}
    missing = (whole | {"index", "const", "number", "load", "cast"}) - seen
    assert not missing, missing


# --- Families of masks: exactness -------------------------------------------------------------------------------------

B, H, N = 3, 4, 48
GRID = {
    "b": torch.arange(B).view(-1, 1, 1, 1),
    "h": torch.arange(H).view(1, -1, 1, 1),
    "q_idx": torch.arange(0, N, 5).view(1, 1, -1, 1),
    "kv_idx": torch.arange(N).view(1, 1, 1, -1),
}


def solve(mask_mod, q_idx_given=False, shifted=False):
    graph, leaves = trace_mod(mask_mod, "mask_mod")
    return graph, leaves, find_extent(graph.output, analyze([graph.output], q_idx_given, shifted=shifted))


def brute_force(mask_mod, grid=GRID, q_idx_given=False, shifted=False):
    """The mask, what the intervals call live, and what they call full: each [B, H, Q, N]."""
    graph, leaves, extent = solve(mask_mod, q_idx_given, shifted)
    nodes = topological(graph.output, *nodes_of(extent.live), *nodes_of(extent.full))
    values = dict(zip(nodes, evaluation.evaluate(nodes, graph, leaves, grid), strict=True))
    shape = torch.broadcast_shapes(*(index.shape for index in grid.values()))
    regions = (in_region(region, values, grid["kv_idx"]) for region in (extent.live, extent.full))
    return [x.expand(shape) for x in (values[graph.output], *regions)]


def check_exact(mask_mod, grid=GRID, q_idx_given=False, shifted=False):
    mask, live, full = brute_force(mask_mod, grid, q_idx_given, shifted)
    assert torch.equal(live, mask), (
        f"live differs from the mask at (b, h, q, kv) {(live != mask).nonzero().tolist()[:5]}"
    )
    assert torch.equal(full, mask), (
        f"full differs from the mask at (b, h, q, kv) {(full != mask).nonzero().tolist()[:5]}"
    )


class Numbers:
    """Random parameters of a family: three numbers, a size, and tables by sequence, head and position."""

    def __init__(self, data):
        self.x, self.y, self.z = (data.draw(st.integers(-8, N + 8)) for _ in range(3))
        self.size = data.draw(st.integers(1, 20))
        seed = data.draw(st.integers(0, 1 << 30))
        generator = torch.Generator().manual_seed(seed)
        dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
        shapes = {"by_batch": (B,), "by_head": (H,), "by_position": (B, N)}
        for name, shape in shapes.items():
            setattr(self, name, torch.randint(-4, N + 4, shape, generator=generator).to(dtype))
        self.flags = torch.randint(2, (B, H), generator=generator).bool()
        starts = torch.randint(2, (B, N), generator=generator).bool()
        self.document_starts = (starts * torch.arange(N)).cummax(dim=1).values.to(dtype)


def _captured(value):
    """A captured Python number, which stays a run-time value of the kernel."""
    return lambda mod: lambda b, h, q, k: mod(q, k, value)


FAMILIES = {
    "causal": lambda n: mods.causal(),
    "window": lambda n: mods.sliding_window(n.size),
    "streaming": lambda n: mods.streaming(max(0, n.x), n.size),
    "prefix_number": lambda n: mods.prefix_lm(max(0, n.x)),
    "prefix_table": lambda n: mods.prefix_lm(n.by_batch),
    "chunked": lambda n: mods.chunked(n.size),
    "two_chunks": lambda n: lambda b, h, q, k: (k <= q) & (q // n.size - k // n.size <= 1),
    "block_causal": lambda n: lambda b, h, q, k: k // n.size <= q // n.size,
    "block_diffusion": lambda n: lambda b, h, q, k: (k // n.size == q // n.size) | (k // n.size < q // n.size),
    "block_diffusion_after_a_prompt": lambda n: (
        lambda b, h, q, k: (k < n.by_batch[b]) | ((q - n.by_batch[b]) // n.size >= (k - n.by_batch[b]) // n.size)
    ),
    "document_start": lambda n: mods.document_offsets(n.by_batch),
    "document_starts": lambda n: mods.document_offsets(n.document_starts),
    "document_range": lambda n: lambda b, h, q, k: (k >= n.by_position[b, q]) & (k < n.by_position[b, q - 1]),
    "head_window": lambda n: lambda b, h, q, k: (k <= q) & (q - k < n.by_head[h]),
    "row_window": lambda n: lambda b, h, q, k: (k <= q) & (q - k < n.by_position[b, q] + n.by_head[h]),
    "some_heads": lambda n: lambda b, h, q, k: torch.where(n.flags[b, h], k <= q, (k <= q) & (q - k < n.size)),
    "heads_by_number": lambda n: lambda b, h, q, k: (k <= q) & ((h % 2 == 0) | (q - k < n.size)),
    "abs": lambda n: lambda b, h, q, k: (q - k).abs() < n.x,
    "abs_of_sum": lambda n: lambda b, h, q, k: abs(2 * k - q - n.x) >= n.y,
    "clamp": lambda n: lambda b, h, q, k: (k >= (q - n.size).clamp(min=0)) & (k < torch.clamp(q + n.x, n.y, n.z)),
    "clamp_of_kv": lambda n: lambda b, h, q, k: k.clamp(3, N - 3) < q + n.x,
    "minimum": lambda n: lambda b, h, q, k: torch.minimum(k, q - n.x) >= torch.minimum(n.by_batch[b], q),
    "maximum": lambda n: lambda b, h, q, k: torch.maximum(k - n.x, n.y - k) < n.size,
    "where_of_numbers": lambda n: lambda b, h, q, k: k < torch.where(h < 2, q - n.x, n.by_batch[b]),
    "where_of_masks": lambda n: lambda b, h, q, k: torch.where(k < n.x, k <= q, k >= q - n.y),
    "where_of_kv": lambda n: lambda b, h, q, k: torch.where(k < n.x, k + n.size, k) <= q,
    "doubled": lambda n: lambda b, h, q, k: (2 * k + n.x < 3 * q) & (k * 3 > q - n.y),
    "negative_coefficient": lambda n: lambda b, h, q, k: 100 - 3 * k >= 2 * q - n.x,
    "both_sides": lambda n: lambda b, h, q, k: 3 * k - q + n.x <= k + q,
    "shifts": lambda n: lambda b, h, q, k: (k >> 3 == q >> 3) | (k << 1 < n.x),
    "start_of_block": lambda n: lambda b, h, q, k: k - k % 8 == q - q % 8,
    "block_by_bits": lambda n: lambda b, h, q, k: (k <= q) & (k - (k & 7) >= q - (q & 7) - 8),
    "int32": lambda n: lambda b, h, q, k: (q.int() - k.int() < n.size) & (k.to(torch.int32) <= q),
    "equal_conditions": lambda n: lambda b, h, q, k: (k < n.x) == (k <= q),
    "unequal_conditions": lambda n: lambda b, h, q, k: (k < n.x) != (q < n.y),
    "implication": lambda n: lambda b, h, q, k: (k > q) <= (k < n.x),
    "exclusive_or": lambda n: lambda b, h, q, k: (k < n.x) ^ (k <= q),
    "not_in": lambda n: lambda b, h, q, k: ~((k > n.x) & (k < q)),
    "not_or": lambda n: lambda b, h, q, k: ~((k > q) | (q - k >= n.size)),
    "one_key": lambda n: lambda b, h, q, k: (k == q) | (k == n.x),
    "all_but_one_key": lambda n: lambda b, h, q, k: (k != q - n.size) & (k <= q),
    "count_of_conditions": lambda n: lambda b, h, q, k: (k < q).int() + (k < n.x).int() + (k >= n.y).int() >= 2,
    "product_of_conditions": lambda n: lambda b, h, q, k: ((k <= q) * (q - k < n.size)).bool(),
    "global_and_window": lambda n: lambda b, h, q, k: (k <= q) & ((k < n.x) | (q < n.x) | (q - k < n.size)),
    "contradiction": lambda n: lambda b, h, q, k: (k < q) & (k >= q),
    "tautology": lambda n: lambda b, h, q, k: (k < q + n.x) | (k >= q + n.x),
    "captured_number": lambda n: _captured(n.x)(lambda q, k, x: (q - k < x) & (k + x >= q)),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_are_exact(family):
    @hypothesis.settings(max_examples=15)
    @hypothesis.given(st.data())
    def check(data):
        check_exact(FAMILIES[family](Numbers(data)))

    check()


# A 32-bit difference of a q_idx that may be anything may wrap around.
@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"int32"}))
def test_families_stay_exact_where_the_caller_chooses_q_idx(family):
    @hypothesis.settings(max_examples=5)
    @hypothesis.given(st.data())
    def check(data):
        check_exact(FAMILIES[family](Numbers(data)), q_idx_given=True)

    check()


HUGE = [sys.maxsize, sys.maxsize - 1, 2**62, 2**40 + 1, 2**40, 2**40 - 1]


@pytest.mark.parametrize("w", [*HUGE, *(-x for x in HUGE), -sys.maxsize - 1, 0, -1])
def test_huge_and_negative_numbers(w):
    """No window in all spellings where nothing in the mask itself overflows: exact."""
    table = torch.tensor([w, 7, w, -w if w > -sys.maxsize - 1 else 0])
    for mask_mod in (
        lambda b, h, q, k: q - k < w,
        lambda b, h, q, k: (k <= q) & (q - k <= w),
        lambda b, h, q, k: (q - k >= w) | (k == q),
        lambda b, h, q, k: q - k < table[h],
        lambda b, h, q, k: 2 * k - q != w,
        lambda b, h, q, k: (k < w) & ((q - k).abs() <= table[b]),
        lambda b, h, q, k: torch.where(q - k < w, k <= q, k > q),
    ):
        check_exact(mask_mod)


@pytest.mark.parametrize("w", HUGE)
def test_where_the_mask_overflows_nothing_is_lost(w):
    """`k - w` and `q + w` are sums that may wrap around; what PyTorch makes of them is the mask."""
    far = {**GRID, "q_idx": torch.tensor([0, 7, w, -w, w - 3, -w - 1, 2**63 - 1, -(2**63)]).view(1, 1, -1, 1)}
    for mask_mod in (
        lambda b, h, q, k: k - w < q,
        lambda b, h, q, k: (k < q + w) & (k <= q),
        lambda b, h, q, k: q + k < q,
        lambda b, h, q, k: (k >= q - w) | (w * k < q),
        lambda b, h, q, k: torch.maximum(k, q) * 2 > k,
        lambda b, h, q, k: (k + w) // 8 <= q // 8,
    ):
        for grid, given in ((GRID, False), (GRID, True), (far, True)):
            mask, live, full = brute_force(mask_mod, grid, given)
            assert not (mask & ~live).any() and not (full & ~mask).any()


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: k.to(torch.int8) < 20,
        lambda b, h, q, k: (k.to(torch.int8) + 100) < q,
        lambda b, h, q, k: k.to(torch.uint8) * 2 >= 100,
        lambda b, h, q, k: (k.to(torch.int16) << 9) > 0,
        lambda b, h, q, k: -torch.where(k < 5, torch.tensor(-128, dtype=torch.int8), k.to(torch.int8)) < 0,
        lambda b, h, q, k: torch.where(k < 5, torch.tensor(-128, dtype=torch.int8), 3).abs() < 0,
        lambda b, h, q, k: torch.where(k < 5, torch.tensor(-(2**63)), k).abs() < 0,
        lambda b, h, q, k: (k - q).to(torch.uint8) < 10,
        lambda b, h, q, k: (k < 5).to(torch.uint8) - 1 == 255,
        lambda b, h, q, k: (k - q).bool() & ((k & 4).bool() | (k > 30)),
    ],
)
def test_narrow_types_that_wrap_around(mask_mod):
    mask, live, full = brute_force(mask_mod, {**GRID, "kv_idx": torch.arange(300).view(1, 1, 1, -1)})
    assert mask.any() and not mask.all()
    assert not (mask & ~live).any() and not (full & ~mask).any()


@pytest.mark.parametrize("prefix", [30, torch.tensor([30, 20, 0])], ids=["number", "table"])
def test_the_prefix_of_a_tree_is_full(prefix):
    ancestors = torch.rand(8, 8, generator=torch.Generator().manual_seed(0)) < 0.5
    lens = torch.as_tensor(prefix).expand(B).view(B, 1, 1, 1)
    mask, live, full = brute_force(
        mods.tree(ancestors, prefix), {**GRID, "q_idx": lens + torch.arange(8).view(1, 1, 8, 1)}
    )
    assert torch.equal(full, (GRID["kv_idx"] < lens).expand_as(mask))
    assert not (mask & ~live).any()


# --- What is known while tracing --------------------------------------------------------------------------------------


def constants_of(region):
    """Intervals whose bounds are known, as numbers; None where one is not."""
    if not all(node.is_const for node in nodes_of(region)):
        return None
    return {tuple(node and node.attr for node in interval) for interval in region}


@pytest.mark.parametrize(
    "mask_mod, expected",
    [
        (lambda b, h, q, k: k < 3 + 5, {(None, 8)}),
        (lambda b, h, q, k: 2 * k + 1 <= 20, {(None, 10)}),
        (lambda b, h, q, k: (k // 8 >= 1) & (k // 8 < 3), {(8, 24)}),
        (lambda b, h, q, k: (k - 10).abs() <= 2, {(8, 13)}),
        (lambda b, h, q, k: torch.where(k < 5, k + 10, k) >= 7, {(7, None), (None, 5)}),
        (lambda b, h, q, k: (k < 5) & (k > 7), set()),
        (lambda b, h, q, k: (k < 0) | (k >= 1 << 30), set()),
        (lambda b, h, q, k: (k >= -3) & (k <= 1 << 40), {(None, None)}),
        (lambda b, h, q, k: (k < 10) | (k >= 10), {(None, None)}),
        (lambda b, h, q, k: (k < 10) | ((k >= 10) & (k < 20)), {(None, 20)}),
        (lambda b, h, q, k: (k > q) | (k <= q), {(None, None)}),
        (lambda b, h, q, k: (k < 5) != (k < 5), set()),
        (lambda b, h, q, k: k * 0 == 0, {(None, None)}),
        (lambda b, h, q, k: k - k > 0, set()),
    ],
)
def test_constants_fold(mask_mod, expected):
    extent = solve(mask_mod)[2]
    assert constants_of(extent.live) == constants_of(extent.full) == expected


def test_trivial_masks():
    assert solve(lambda b, h, q, k: True)[2] == ALWAYS
    assert solve(lambda b, h, q, k: False)[2] == NEVER
    assert NEVER.live == NOWHERE and ALWAYS.full == EVERYWHERE


@pytest.mark.parametrize(
    "mask_mod",
    [
        mods.document(torch.arange(9)),
        lambda b, h, q, k: k % 2 == 0,
        lambda b, h, q, k: (k ^ q) & 5 != 0,
        lambda b, h, q, k: k * k < q,
        lambda b, h, q, k: k // (h + 1) < q,
        lambda b, h, q, k: torch.tensor([3, 1, 2])[k] < q,
    ],
)
def test_what_cannot_be_solved_is_live_everywhere(mask_mod):
    mask, live, full = brute_force(mask_mod)
    assert live.all() and not full.any() and mask.any()


def test_an_unknown_part_leaves_the_rest_bounded():
    _, live, full = brute_force(mods.and_masks(mods.causal(), mods.document(torch.arange(N) // 9)))
    assert torch.equal(live, (GRID["kv_idx"] <= GRID["q_idx"]).expand_as(live)) and not full.any()
    _, live, full = brute_force(mods.or_masks(mods.causal(), mods.document(torch.arange(N) // 9)))
    assert live.all() and torch.equal(full, (GRID["kv_idx"] <= GRID["q_idx"]).expand_as(full))


def test_a_new_number_is_no_new_graph():
    graphs = [solve(mods.streaming(sink, window))[0] for sink, window in ((4, 1024), (0, sys.maxsize))]
    assert graphs[0] == graphs[1]


# --- Unions -----------------------------------------------------------------------------------------------------------


def test_more_than_four_intervals_join_where_the_gap_is_smallest():
    extent = solve(lambda b, h, q, k: (k == 120) | (k == 40) | (k == 82) | (k == 80) | (k == 0))[2]
    assert constants_of(extent.live) == {(None, 1), (40, 41), (80, 83), (120, 121)}
    assert constants_of(extent.full) < {(None, 1), (40, 41), (80, 81), (82, 83), (120, 121)}
    assert len(extent.full) == MAX_INTERVALS


def test_a_window_beside_many_global_keys_stays_apart():
    mask_mod = lambda b, h, q, k: (k == 0) | (k == 9) | (k == 18) | (k == 20) | (q - k < 4) & (k <= q)
    mask, live, full = brute_force(mask_mod)
    allowed = mask | (GRID["kv_idx"] == 19)
    assert not (mask & ~live).any() and not (live & ~allowed).any() and not (full & ~mask).any()


def test_unions_of_extents_follow_the_laws_of_sets():
    """Where one side is unknown, everywhere or nowhere."""
    causal = solve(mods.causal())[2]
    for extent in (causal, ALWAYS, NEVER, UNKNOWN):
        assert extent.both(ALWAYS) == extent and extent.either(NEVER) == extent
        assert extent.both(NEVER) == NEVER and extent.either(ALWAYS) == ALWAYS
        assert extent.negated().negated() == extent
    assert UNKNOWN.negated() == UNKNOWN and ALWAYS.negated() == NEVER


# --- Time -------------------------------------------------------------------------------------------------------------


def test_every_mod_is_analysed_in_time(capsys):
    """The aim is 50 ms cold; the limit leaves room for a busy machine."""
    taken = {}
    for family in MODS:
        for kind, make in (("score_mod", family.make_score_mod), ("mask_mod", family.make_mask_mod)):
            mod = make(4, 8, 64, 2, "cpu")
            if mod is None:
                continue
            graph = trace_mod(mod, kind)[0]
            start = time.perf_counter()
            find_bounds(*((graph, None) if kind == "score_mod" else (None, graph)), q_idx_given=True)
            taken[f"{family.name} {kind}"] = 1e3 * (time.perf_counter() - start)
    with capsys.disabled():
        slowest = sorted(taken.items(), key=lambda item: -item[1])[:3]
        print(f"\nanalysis of {len(taken)} mods, slowest: " + ", ".join(f"{name} {ms:.1f} ms" for name, ms in slowest))
    assert max(taken.values()) < 250


def _repeated(step, times, result):
    def mask_mod(b, h, q, k):
        x = k
        for i in range(times):
            x = step(x, k, q, i)
        return result(x, q)

    return mask_mod


@pytest.mark.parametrize(
    "step",
    [
        lambda x, k, q, i: x + x - x,
        lambda x, k, q, i: x + (x // 2) - (x // 2),
        lambda x, k, q, i: torch.maximum(x, x - i),
        lambda x, k, q, i: torch.where(k < i, x, x + 1),
        lambda x, k, q, i: (x ^ (x >> 3)) + x,
    ],
)
def test_shared_parts_are_solved_once(step):
    """Each step uses the last one twice: 2**30 ways through the graph."""
    graph = trace_mod(_repeated(step, 30, lambda x, q: x < q), "mask_mod")[0]
    start = time.perf_counter()
    find_extent(graph.output, analyze([graph.output], False))
    assert time.perf_counter() - start < 2


@pytest.mark.parametrize(
    "mask_mod",
    [
        _repeated(lambda x, k, q, i: x + (q - i), 800, lambda x, q: x < 2 * q),
        _repeated(lambda x, k, q, i: torch.maximum(x, q - i), 800, lambda x, q: x < 2 * q),
        lambda b, h, q, k: mods.or_masks(*(lambda b, h, q, k, i=i: (k >= 3 * i) & (k < 3 * i + 2) for i in range(800)))(
            b, h, q, k
        ),
    ],
    ids=["sum", "maximum", "union"],
)
def test_deep_graphs(mask_mod):
    """A loop in a mod unrolls; Python's stack must not limit it."""
    mask, live, full = brute_force(mask_mod)
    assert not (mask & ~live).any() and not (full & ~mask).any()


# --- a <= b -----------------------------------------------------------------------------------------------------------


def test_at_most():
    q, h, narrow = (Node("index", (), dtype, name) for dtype, name in (
        (torch.int64, "q_idx"), (torch.int64, "h"), (torch.int8, "b")
    ))  # fmt: skip
    number = lambda value: const(value, torch.int64)
    add, sub, low, high = (
        lambda a, b, name=name: build.make(name, a, b) for name in ("add", "sub", "minimum", "maximum")
    )
    after = add(q, number(1))
    assert at_most(q, q) and at_most(q, after) and not at_most(after, q) and not at_most(q, h)
    assert at_most(sub(add(q, h), h), q) and at_most(build.make("neg", sub(h, q)), sub(q, h))
    assert at_most(build.make("mul", after, number(3)), build.make("mul", add(q, number(2)), number(3)))
    assert at_most(low(q, h), h) and not at_most(h, low(q, h)) and at_most(q, high(after, h))
    assert at_most(high(q, sub(q, h)), high(high(q, sub(q, h)), h)) and at_most(number(3), high(h, number(4)))
    assert not at_most(narrow, build.make("add", narrow, const(1, torch.int8))), "this sum may wrap around"


# --- Calls with kv_offset: positions may be negative, and beyond MAX_KV_LEN -------------------------------------------

_ENDS = [-(2**30), -(2**30) + 1, 2**30 - 1, 2**30, 2**31 - 3, 2**31 - 2]
SHIFTED_GRID = GRID | {
    "q_idx": torch.tensor([-(2**30) - 2**20, -9, 0, 13, 2**30 + 5, 2**31 - 2]).view(1, 1, -1, 1),
    "kv_idx": torch.tensor([*range(-40, 60), *_ENDS]).view(1, 1, 1, -1),
}


@pytest.mark.parametrize(
    "mask_mod",
    [
        lambda b, h, q, k: k >= 0,
        lambda b, h, q, k: k < -3,
        lambda b, h, q, k: (k >= -7) & (k < 0),
        lambda b, h, q, k: ~((k >= -7) & (k < 2)),
        lambda b, h, q, k: (k < 2**30) | (k == 2**31 - 2),
        lambda b, h, q, k: (k < -(2**30) + 1) | (k > 2**31 - 4),
        lambda b, h, q, k: (k <= q) & (q - k < 10),
        lambda b, h, q, k: k // 8 == q // 8,
        lambda b, h, q, k: (k - q).abs() < 5,
        lambda b, h, q, k: torch.where(h > 1, k < -1, k > 4),
    ],
)
def test_positions_of_calls_with_an_offset(mask_mod):
    check_exact(mask_mod, SHIFTED_GRID, shifted=True)


def test_bounds_that_no_position_reaches_depend_on_the_offset():
    beyond = lambda b, h, q, k: (k >= 0) & (k < 2**30)
    assert solve(beyond)[2].live == EVERYWHERE
    ((lo, hi),) = solve(beyond, shifted=True)[2].live
    assert (lo.attr, hi.attr) == (0, 2**30)
    never = lambda b, h, q, k: k < 0
    assert solve(never)[2].live == () and solve(never, shifted=True)[2].live != ()
    wider = lambda b, h, q, k: (k >= -(2**30)) & (k < 2**31 - 1)
    assert solve(wider, shifted=True)[2].live == EVERYWHERE


def check_shifted_example(example):
    output = example.graph.output
    extent = find_extent(output, analyze([output], example.q_idx_given, shifted=True))
    nodes = topological(output, *nodes_of(extent.live), *nodes_of(extent.full))
    queries = mask_graphs._FAR_QUERIES if example.q_idx_given else SHIFTED_GRID["q_idx"].flatten()[:, None]
    rows = len(queries)
    indices = {
        "b": mask_graphs._BATCHES[:rows], "h": mask_graphs._HEADS[:rows], "q_idx": queries,
        "kv_idx": SHIFTED_GRID["kv_idx"].view(1, -1),
    }  # fmt: skip
    values = dict(zip(nodes, evaluation.evaluate(nodes, example.graph, example.leaves, indices), strict=True))
    live, full = (in_region(region, values, indices["kv_idx"]) for region in (extent.live, extent.full))
    assert not (values[output] & ~live).any(), example
    assert not (full & ~values[output]).any(), example


def test_random_masks_of_calls_with_an_offset():
    for_random_graphs(mask_graphs.masks(), check_shifted_example)
