"""What is proven of the indices of a call: by sizes, by captured captured_integers, by the mask, and never too much."""

import random
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from support import trace_mod
from unit import gather_graphs

from flexdecode import mods
from flexdecode.analysis.analyze import MAX_QUERIES, analyze
from flexdecode.analysis.proofs import (
    CallSizes,
    IndexCheck,
    LoadCheck,
    captured_integers,
    find_checks,
    proof_sources,
    unproven,
)
from flexdecode.frontend.graph import Graph, Node
from flexdecode.runtime import evaluation

B, HQ, N = 2, 6, 20
SIZES = CallSizes(B, HQ, True, N)

WORDS = {(False, False): "proven", (True, False): "wraps", (False, True): "beyond", (True, True): "unknown"}


def found(mod, mask_mod=None, *, kind="score_mod", sizes=SIZES, q_idx_given=False):
    """A word for each index of each load, in the order of the graph, after `mask:` where the mask proves them.

    proven: nothing is checked; wraps: counts from the end, stays inside; beyond: may be too large; unknown: both.
    """
    graph, leaves = trace_mod(mod, kind)
    mask = None if mask_mod is None else trace_mod(mask_mod, "mask_mod")
    checks = find_checks(graph, leaves, sizes, q_idx_given, mask)
    assert len(checks) == sum(node.op == "load" for node in graph.nodes())
    return [" ".join(["mask:"] * load.attending + [WORDS[check] for check in load.indices]) for load in checks]


def indexed(index, *shape, mask_mod=None, **arguments):
    """What is found of one load: `index(b, h, q, k)` in a tensor of a shape."""
    table = torch.zeros(shape)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[index(b, h, q_idx, kv_idx)]

    (words,) = found(score_mod, mask_mod, **arguments)
    return words


# --- Sizes of the call ------------------------------------------------------------------------------------------------


def test_heads():
    assert indexed(lambda b, h, q, k: h, HQ) == "proven"
    assert indexed(lambda b, h, q, k: h, HQ - 1) == "beyond"
    assert indexed(lambda b, h, q, k: h, HQ + 1) == "proven"


def test_sequences():
    assert indexed(lambda b, h, q, k: b, B) == "proven"
    assert indexed(lambda b, h, q, k: b, B - 1) == "beyond"


def test_keys():
    assert indexed(lambda b, h, q, k: k, N) == "proven"
    assert indexed(lambda b, h, q, k: k, N - 1) == "beyond"
    assert indexed(lambda b, h, q, k: k + 1, N) == "beyond"


def test_queries_are_negative_where_the_sequence_is_shorter():
    """Also with one query: an empty sequence has its query at -1."""
    assert indexed(lambda b, h, q, k: q, N) == "wraps"
    assert indexed(lambda b, h, q, k: q, N - 1) == "unknown"
    assert indexed(lambda b, h, q, k: q + 1, N + 1) == "proven"
    assert indexed(lambda b, h, q, k: q + 1, N) == "beyond"
    assert indexed(lambda b, h, q, k: q.clamp(min=0), N) == "proven"


def test_the_number_of_queries_is_not_part_of_a_proof():
    """It is a run-time value, so a position may be as negative as the longest query allows."""
    sizes = SIZES._replace(one_token=False)
    assert indexed(lambda b, h, q, k: q, N, sizes=sizes) == "unknown"
    assert indexed(lambda b, h, q, k: q + MAX_QUERIES - 1, N + MAX_QUERIES, sizes=sizes) == "wraps"
    assert indexed(lambda b, h, q, k: q + MAX_QUERIES, N + MAX_QUERIES, sizes=sizes) == "proven"
    assert indexed(lambda b, h, q, k: q.clamp(min=0), N, sizes=sizes) == "proven"


def test_queries_may_be_anywhere_if_the_caller_says_where():
    assert indexed(lambda b, h, q, k: q, N, q_idx_given=True) == "unknown"
    assert indexed(lambda b, h, q, k: q.clamp(min=0), N, q_idx_given=True) == "beyond"
    assert indexed(lambda b, h, q, k: q.clamp(max=3), N, q_idx_given=True) == "unknown"
    assert indexed(lambda b, h, q, k: q.clamp(0, N - 1), N, q_idx_given=True) == "proven"
    assert indexed(lambda b, h, q, k: k, N, q_idx_given=True) == "proven"


def test_positions_may_be_anywhere_if_the_caller_gives_an_offset():
    shifted = SIZES._replace(shifted=True)
    for index in (lambda b, h, q, k: k, lambda b, h, q, k: q):
        assert indexed(index, N, sizes=shifted) == "unknown"
        assert indexed(lambda b, h, q, k: index(b, h, q, k).clamp(min=0), N, sizes=shifted) == "beyond"
        assert indexed(lambda b, h, q, k: index(b, h, q, k).clamp(0, N - 1), N, sizes=shifted) == "proven"
    assert indexed(lambda b, h, q, k: q - k, N, mask_mod=mods.sliding_window(N), sizes=shifted) == "mask: proven"
    inside = lambda b, h, q, k: (k >= 0) & (k < N)
    assert indexed(lambda b, h, q, k: k, N, mask_mod=inside, sizes=shifted) == "mask: proven"
    below = lambda b, h, q, k: k < N
    assert indexed(lambda b, h, q, k: k, N, mask_mod=below, sizes=shifted) == "unknown"
    assert indexed(lambda b, h, q, k: k, N - 1, mask_mod=lambda b, h, q, k: k < N - 1) == "mask: proven"


def test_each_index_is_judged_by_its_own_size():
    index = lambda b, h, q, k: (b, h, k)
    assert indexed(index, B, HQ, N) == "proven proven proven"
    assert indexed(index, B, HQ, N - 1) == "proven proven beyond"
    assert indexed(index, B - 1, HQ, N) == "beyond proven proven"
    assert indexed(lambda b, h, q, k: (h, q), HQ - 1, N) == "beyond wraps"
    assert indexed(lambda b, h, q, k: (k, h), HQ, N) == "beyond proven", "the sizes are not exchanged"


def test_loads_of_a_mask():
    table = torch.zeros(B, N, dtype=torch.bool)
    mask_mod = lambda b, h, q, k: table[b, k] & table[b, q]
    assert found(mask_mod, kind="mask_mod") == ["proven proven", "proven wraps"]
    table = table[:, 1:]
    assert found(mask_mod, kind="mask_mod") == ["proven beyond", "proven unknown"]


def test_no_loads():
    assert found(lambda s, b, h, q, k: s * 2) == []


def test_a_0d_tensor_has_no_index():
    graph = Graph.build(Node("load", (), torch.float32, 0), {0: (torch.float32, 0)}, [])
    assert find_checks(graph, [torch.tensor(1.0)], SIZES, False) == (LoadCheck(()),)


def test_nothing_known_of_the_call():
    table = torch.zeros(9, 9)
    graph, _ = trace_mod(lambda s, b, h, q, k: s + table[h, q])
    (load,) = (node for node in graph.nodes() if node.op == "load")
    checks = unproven(load, analyze([graph.output], False))
    assert checks == LoadCheck((IndexCheck(False, True), IndexCheck(True, True)))


# --- Arithmetic -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "index, size",
    [
        (lambda b, h, q, k: k.clamp(max=4), 5),
        (lambda b, h, q, k: (q - k).clamp(0, 7), 8),
        (lambda b, h, q, k: torch.clamp(k - q, -3, 3) + 3, 7),
        (lambda b, h, q, k: torch.minimum(k, h), HQ),
        (lambda b, h, q, k: torch.maximum(h, b), HQ),
        (lambda b, h, q, k: torch.where(q < k, h, b), HQ),
        (lambda b, h, q, k: torch.where(k < 3, 3, 8), 9),
        (lambda b, h, q, k: (q - k).abs(), N + 1),
        (lambda b, h, q, k: (q - k) % 5, 5),
        (lambda b, h, q, k: k // 4, 5),
        (lambda b, h, q, k: k >> 2, 5),
        (lambda b, h, q, k: (q - k) & 7, 8),
        (lambda b, h, q, k: (k < q).long(), 2),
        (lambda b, h, q, k: N - 1 - k, N),
        (lambda b, h, q, k: h * N + k, HQ * N),
        (lambda b, h, q, k: k.to(torch.int8), N),
        (lambda b, h, q, k: (k.float() * 0.5).long().clamp(0, 9), 10),
    ],
)
def test_the_largest_index_just_fits(index, size):
    assert indexed(index, size) == "proven"
    assert indexed(index, size - 1) == "beyond"


def test_conditions_are_not_looked_at():
    assert indexed(lambda b, h, q, k: torch.where(k < 3, k, 0), 3) == "beyond"


def test_what_wraps_around_in_its_type_is_unknown():
    sizes = SIZES._replace(max_kv_len=200)
    assert indexed(lambda b, h, q, k: k.to(torch.int8), 200, sizes=sizes) == "wraps"  # down to -128
    assert indexed(lambda b, h, q, k: k.to(torch.int8), 127, sizes=sizes) == "unknown"
    assert indexed(lambda b, h, q, k: k.to(torch.uint8), 256, sizes=sizes) == "proven"
    assert indexed(lambda b, h, q, k: k + (2**63 - 1), N, sizes=sizes) == "unknown"


def test_floats_are_unknown():
    assert indexed(lambda b, h, q, k: (k.float() * 0.5).long(), N) == "unknown"
    assert indexed(lambda b, h, q, k: torch.log2(k.float()).long(), N) == "unknown"


def test_negative_constants():
    assert indexed(lambda b, h, q, k: -1, 5) == "wraps"
    assert indexed(lambda b, h, q, k: (h, -5), HQ, 5) == "proven wraps"
    assert indexed(lambda b, h, q, k: k - N, N) == "wraps"
    assert indexed(lambda b, h, q, k: k - N - 1, N) == "unknown"
    assert indexed(lambda b, h, q, k: 4, 5) == "proven"


# --- Captured numbers and sizes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("W, words", [(4, "proven"), (3, "proven"), (5, "beyond"), (0, "proven"), (-1, "wraps"),
                                      (-5, "wraps"), (-6, "unknown"), (2**62, "beyond")])  # fmt: skip
def test_a_captured_integer_below_an_index(W, words):
    assert indexed(lambda b, h, q, k: torch.clamp(k, W, W), 5) == words


def test_a_captured_integer_of_another_value():
    """One graph, two results."""
    W, table = 3, torch.zeros(N + 3)
    mod = lambda s, b, h, q, k: s + table[k + W]
    graph, leaves = trace_mod(mod)
    place = next(i for i, leaf in enumerate(leaves) if leaf == 3 and isinstance(leaf, int))
    results = {}
    for W in (0, 3, 4, -1, 2**63 - 1, -(2**63)):
        leaves[place] = W
        ((check,),) = (load.indices for load in find_checks(graph, leaves, SIZES, False))
        results[W] = WORDS[check]
    assert results == {
        0: "proven", 3: "proven", 4: "beyond", -1: "wraps", 2**63 - 1: "unknown", -(2**63): "unknown",
    }  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8, torch.uint8], ids=str)
def test_a_captured_0d_tensor_below_an_index(dtype):
    for value, words in ((0, "proven"), (3, "proven"), (4, "beyond")):
        shift = torch.tensor(value, dtype=dtype)
        assert indexed(lambda b, h, q, k: k + shift, N + 3) == words


@pytest.mark.parametrize("W", [2**63 - 1, 2**62, -(2**62) - 1])
def test_arithmetic_on_captured_integers_that_leaves_int64(W):
    """In a kernel it wraps around, as in PyTorch; Python's own numbers would not."""
    window, table = W, torch.zeros(8)
    W = 3
    score_mod = lambda s, b, h, q, k: s + table[q - k]
    masks = [
        lambda b, h, q, k: (q >= k) & (q - k < W + W),
        lambda b, h, q, k: (q >= k) & (q - k < W * 4 - 3),
        lambda b, h, q, k: (q >= k) & (q - k < 8) & (k < W * W),
    ]
    traced = [trace_mod(mask_mod, "mask_mod") for mask_mod in masks]
    score = trace_mod(score_mod)
    for graph, leaves in traced:
        leaves[graph.numbers[0].leaf] = window
        find_checks(*score, SIZES, False, (graph, leaves))
    graph, leaves = trace_mod(lambda s, b, h, q, k: s + table[q - k + W * 8])
    leaves[graph.numbers[0].leaf] = window
    assert find_checks(graph, leaves, SIZES, False, trace_mod(mods.sliding_window(8), "mask_mod")) == (
        LoadCheck((IndexCheck(True, True),)),
    )


def test_a_captured_divisor_of_zero():
    """As a number of the code it would be refused; as a tensor it gives 0, as in the kernel."""
    table, divisor = torch.zeros(8), torch.tensor(0)
    window = lambda b, h, q, k: (q >= k) & (q - k < 8) & (k // divisor == 0)
    assert indexed(lambda b, h, q, k: q - k, 8, mask_mod=window) in ("mask: proven", "unknown")
    by_zero = found(lambda s, b, h, q, k: s + table[(q - k) // divisor], mods.sliding_window(8))
    assert by_zero in (["unknown"], ["mask: proven"])


def test_a_captured_float_below_an_index_is_unknown():
    ratio = 0.5
    assert indexed(lambda b, h, q, k: (k * ratio).long(), N) == "unknown"


def test_a_captured_bool_below_an_index():
    for flag in (torch.tensor(True), torch.tensor(False)):
        assert indexed(lambda b, h, q, k: k + flag, N + 1) == "proven"
        assert indexed(lambda b, h, q, k: k + flag, N) == ("beyond" if flag else "proven")


def test_sizes_of_captured_tensors():
    for size in (1, 4, N + 7):
        table = torch.zeros(size)
        assert found(lambda s, b, h, q, k: s + table[k.clamp(max=table.shape[0] - 1)]) == ["proven"]
        assert found(lambda s, b, h, q, k: s + table[k % table.shape[0]]) == ["proven"]
        assert found(lambda s, b, h, q, k: s + table[k.clamp(max=table.shape[0])]) == [
            "proven" if size > N else "beyond"
        ]
    one, other = torch.zeros(4), torch.zeros(6)
    assert found(lambda s, b, h, q, k: s + one[k.clamp(max=other.shape[0] - 1)]) == ["beyond"]
    assert found(lambda s, b, h, q, k: s + other[k.clamp(max=one.shape[0] - 1)]) == ["proven"]
    assert found(lambda s, b, h, q, k: s + one[k - N] + other[(k + one.numel()) % 6]) == ["unknown", "proven"]


def test_views_of_captured_tensors():
    """What is outside a view reads as 0, but is read, so that it must be inside the tensor."""
    table = torch.zeros(2, N + 3)
    assert found(lambda s, b, h, q, k: s + table[1][k]) == ["proven proven"]
    assert found(lambda s, b, h, q, k: s + table.T[k, 1]) == ["proven proven"]
    table = torch.zeros(2, N + 2)
    assert found(lambda s, b, h, q, k: s + table[1, 3:][k]) in (["proven beyond"], ["proven unknown"])
    assert found(lambda s, b, h, q, k: s + table[1, ::2][k]) in (["proven beyond"], ["proven unknown"])


def test_empty_tensors():
    assert indexed(lambda b, h, q, k: k, 0) == "beyond"
    assert indexed(lambda b, h, q, k: k - q, 0) == "unknown"
    assert indexed(lambda b, h, q, k: (h, k), HQ, 0) == "proven beyond"
    empty = torch.zeros(0)
    assert found(lambda s, b, h, q, k: s + empty[k.clamp(max=empty.shape[0] - 1)]) == ["unknown"]


def test_a_call_without_sequences_or_keys():
    """Nothing is read for sequences and keys that are not there; a query is before the first position then."""
    nobody, nothing = SIZES._replace(batch=0), SIZES._replace(max_kv_len=0)
    assert indexed(lambda b, h, q, k: b, 1, sizes=nobody) == "proven"
    assert indexed(lambda b, h, q, k: k, 1, sizes=nothing) == "proven"
    assert indexed(lambda b, h, q, k: q, 1, sizes=nothing) == "wraps"
    assert indexed(lambda b, h, q, k: q, 0, sizes=nothing) == "unknown"
    assert indexed(lambda b, h, q, k: h, HQ - 1, sizes=nothing) == "beyond"
    window = lambda b, h, q, k: (k <= q) & (q - k < 4)
    for sizes in (nothing, nobody):
        assert indexed(lambda b, h, q, k: q - k, 4, mask_mod=window, sizes=sizes) in ("mask: proven", "wraps")
        for index in (lambda b, h, q, k: h // b, lambda b, h, q, k: q // k, lambda b, h, q, k: q % k + h % b):
            assert indexed(index, 3, sizes=sizes) in WORDS.values(), "it says something"


def test_constants_of_a_mod():
    """Tensors made inside a mod are known as well."""
    assert found(lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0])[h % 2]) == ["proven"]
    assert found(lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0])[h % 3]) == ["beyond"]


# --- Nested gathers ---------------------------------------------------------------------------------------------------


def test_what_a_tensor_holds_is_not_known_but_its_type_is():
    bias = torch.zeros(5)
    for dtype, words in {
        torch.int64: "unknown", torch.int32: "unknown", torch.uint8: "beyond", torch.int8: "unknown",
    }.items():  # fmt: skip
        table = torch.zeros(N, dtype=dtype)
        assert found(lambda s, b, h, q, k: s + bias[table[k].long()]) == ["proven", words]
        assert found(lambda s, b, h, q, k: s + bias[table[k].long().clamp(0, 4)]) == ["proven", "proven"]
        assert found(lambda s, b, h, q, k: s + bias[table[k].long() % 5]) == ["proven", "proven"]
        assert found(lambda s, b, h, q, k: s + bias[table[k].long() % 6]) == ["proven", "beyond"]
    table, flags = torch.zeros(N, dtype=torch.int8), torch.zeros(N, dtype=torch.bool)
    assert found(lambda s, b, h, q, k: s + bias[flags[k].long() + 3]) == ["proven", "proven"]
    assert found(lambda s, b, h, q, k: s + bias[flags[k].long() + 4]) == ["proven", "beyond"]
    bias = torch.zeros(128)
    assert found(lambda s, b, h, q, k: s + bias[table[k].long()]) == ["proven", "wraps"]
    assert found(lambda s, b, h, q, k: s + bias[table[k].long() + 128]) == ["proven", "beyond"]


def test_an_inner_index_has_checks_of_its_own():
    table, bias = torch.zeros(N - 1, dtype=torch.int64), torch.zeros(5)
    assert found(lambda s, b, h, q, k: s + bias[table[k].clamp(0, 4)]) == ["beyond", "proven"]
    assert found(lambda s, b, h, q, k: s + bias[table[table[h]]]) == ["proven", "unknown", "unknown"]


# --- Indices that depend on the score ---------------------------------------------------------------------------------


def test_scores():
    table = torch.zeros(4)
    assert found(lambda s, b, h, q, k: s + table[s.long()]) == ["unknown"]
    assert found(lambda s, b, h, q, k: s + table[s.long().clamp(0, 3)]) == ["proven"]
    assert found(lambda s, b, h, q, k: s + table[(s > 0).long() + 3]) == ["beyond"]


def test_what_depends_on_the_score_is_not_proven_by_the_mask():
    """It is read where the score is known, not where the mask is."""
    table, mask_mod = torch.zeros(8), mods.sliding_window(8)
    free = lambda s, b, h, q, k: s + table[torch.where(k % 2 == 0, q - k, 0)]
    bound = lambda s, b, h, q, k: s + table[torch.where(s > 0, q - k, 0)]
    assert found(free, mask_mod) == ["mask: proven"]
    assert found(bound, mask_mod) == ["unknown"]


# --- What the mask proves ---------------------------------------------------------------------------------------------


def relative(size, mask_mod, **arguments):
    """What is found of a bias by distance."""
    return indexed(lambda b, h, q, k: q - k, size, mask_mod=mask_mod, **arguments)


def test_a_window_of_the_code():
    mask_mod = lambda b, h, q, k: (q - k >= 0) & (q - k < 8)
    assert relative(8, mask_mod) == "mask: proven"
    assert relative(9, mask_mod) == "mask: proven"
    assert relative(7, mask_mod) == "unknown"


def test_a_captured_window():
    for window, words in ((7, "mask: proven"), (8, "mask: proven"), (9, "unknown"), (1, "mask: proven")):
        assert relative(8, lambda b, h, q, k: (q >= k) & (q - k < window)) == words
        limit = torch.tensor(window)
        assert relative(8, lambda b, h, q, k: (q >= k) & (q - k < limit)) == words
        assert relative(8, mods.sliding_window(window)) == words
    for far in (2**40, 2**62, 2**63 - 1, -(2**63)):
        assert relative(8, lambda b, h, q, k: (q >= k) & (q - k < far)) in ("unknown", "mask: proven")
        assert far < 0 or relative(8, lambda b, h, q, k: (q >= k) & (q - k < far)) == "unknown"


def test_a_captured_window_of_the_bias_itself():
    """The mask reads the size of a tensor, and the score the tensor."""
    table = torch.zeros(8)
    score_mod = lambda s, b, h, q, k: s + table[q - k]
    mask_mod = lambda b, h, q, k: (q >= k) & (q - k < table.shape[0])
    assert found(score_mod, mask_mod) == ["mask: proven"]
    mask_mod = lambda b, h, q, k: (q >= k) & (q - k <= table.shape[0])
    assert found(score_mod, mask_mod) == ["unknown"]


def test_both_sides_are_needed():
    assert relative(8, lambda b, h, q, k: q - k < 8) == "unknown"
    assert relative(8, lambda b, h, q, k: q >= k) == "unknown"
    near = lambda b, h, q, k: (q - k).abs() <= 8
    assert indexed(lambda b, h, q, k: k - q + 8, 17, mask_mod=near) == "mask: proven"
    assert indexed(lambda b, h, q, k: k - q + 8, 16, mask_mod=near) == "unknown"
    assert indexed(lambda b, h, q, k: k - q + 7, 17, mask_mod=near) == "unknown"
    assert indexed(lambda b, h, q, k: k - q + 9, 17, mask_mod=near) == "unknown"


def test_one_side_may_be_proven_otherwise():
    causal = mods.causal()
    assert indexed(lambda b, h, q, k: (q - k).clamp(max=7), 8, mask_mod=causal) == "mask: proven"
    assert indexed(lambda b, h, q, k: (q - k).clamp(min=0), 8, mask_mod=mods.sliding_window(8)) == "mask: proven"
    assert indexed(lambda b, h, q, k: (q - k).clamp(max=8), 8, mask_mod=causal) == "unknown"


def test_without_a_mask_or_with_an_empty_one():
    assert relative(8, None) == "unknown"
    assert relative(8, lambda b, h, q, k: k >= 0) == "unknown"
    assert relative(8, lambda b, h, q, k: (q - k < 0) & (q - k > 0)) == "mask: proven", "no pair attends"


def test_masks_joined_by_or():
    assert relative(8, lambda b, h, q, k: ((q >= k) & (q - k < 8)) | (k < 1)) == "unknown"
    assert relative(8, mods.or_masks(mods.sliding_window(8), mods.sliding_window(9))) == "unknown"
    either = lambda b, h, q, k: (k < 3) | ((k >= 5) & (k < 8))
    assert indexed(lambda b, h, q, k: k, 8, mask_mod=either) == "mask: proven"
    assert indexed(lambda b, h, q, k: k, 7, mask_mod=either) == "beyond"


def test_streaming():
    """The sinks are farther away than the window."""
    mask_mod = mods.streaming(4, 8)
    assert relative(8, mask_mod) == "unknown"
    assert indexed(lambda b, h, q, k: torch.where(k < 4, 0, q - k), 8, mask_mod=mask_mod) == "mask: proven"
    assert indexed(lambda b, h, q, k: torch.where(k < 3, 0, q - k), 8, mask_mod=mask_mod) == "unknown"


def test_masks_that_read_tensors():
    ids = torch.zeros(B, N, dtype=torch.int32)
    assert relative(8, mods.document(ids)) == "unknown"
    assert relative(8, mods.and_masks(mods.document(ids), mods.sliding_window(8))) == "mask: proven"
    assert relative(8, mods.or_masks(mods.document(ids), mods.sliding_window(8))) == "unknown"
    windows = torch.full((HQ,), 8)
    per_head = lambda b, h, q, k: (q >= k) & (q - k < windows[h])
    assert relative(8, per_head) == "unknown", "what the tensor holds is not known"
    clamped = lambda b, h, q, k: (q >= k) & (q - k < windows[h]) & (q - k < 8)
    assert relative(8, clamped) == "mask: proven"


def test_several_indices_at_once():
    index = lambda b, h, q, k: (b, h, q - k)
    mask_mod = mods.sliding_window(8)
    assert indexed(index, B, HQ, 8, mask_mod=mask_mod) == "mask: proven proven proven"
    assert indexed(index, B, HQ, 7, mask_mod=mask_mod) == "proven proven unknown"
    assert indexed(index, B, HQ - 1, 8, mask_mod=mask_mod) == "proven beyond unknown", "all of them or none"
    assert indexed(lambda b, h, q, k: (q - k, k - q + 7), 8, 7, mask_mod=mask_mod) == "unknown unknown"


def test_what_counts_from_the_end_still_does():
    """The mask proves the distance; the other index is inside but may be negative."""
    words = indexed(lambda b, h, q, k: (q, q - k), N, 8, mask_mod=mods.sliding_window(8))
    assert words == "mask: wraps proven"
    assert indexed(lambda b, h, q, k: (-1, q - k), 3, 8, mask_mod=mods.sliding_window(8)) == "mask: wraps proven"


def test_a_proven_load_needs_no_mask():
    assert indexed(lambda b, h, q, k: k, N, mask_mod=mods.sliding_window(8)) == "proven"
    assert indexed(lambda b, h, q, k: q + k - q, N, mask_mod=mods.causal()) in ("proven", "mask: proven", "unknown")


def test_loads_of_the_row_are_not_masked():
    """They are read before a key is known."""
    assert indexed(lambda b, h, q, k: q, 8, mask_mod=lambda b, h, q, k: (q >= 0) & (q < 8) & (k >= 0)) == "unknown"


def test_positions_of_the_caller_are_not_bounded_by_a_window():
    """`q_idx - kv_idx` may wrap around."""
    assert relative(8, mods.sliding_window(8), q_idx_given=True) == "unknown"
    keys = lambda b, h, q, k: (k >= 3) & (k < 11)
    assert indexed(lambda b, h, q, k: k - 3, 8, mask_mod=keys, q_idx_given=True) == "mask: proven"


def test_nested_gathers_below_a_mask():
    table, bias, plane = torch.zeros(8, dtype=torch.int64), torch.zeros(5), torch.zeros(5, 8)
    nested = lambda s, b, h, q, k: s + bias[table[q - k]]
    assert found(nested, mods.sliding_window(8)) == ["mask: proven", "unknown"]
    clamped = lambda s, b, h, q, k: s + bias[table[q - k].clamp(0, 4)]
    assert found(clamped, mods.sliding_window(8)) == ["mask: proven", "proven"]
    both = lambda s, b, h, q, k: s + plane[table[k].clamp(0, 4), q - k]
    assert found(both, mods.sliding_window(8)) == ["beyond", "mask: proven proven"]


def test_captures_of_the_two_mods_are_told_apart():
    """Both capture something in their first slot that they index alike; if it were one tensor, the mask would do."""
    starts, ends, bias = torch.zeros(HQ, dtype=torch.int64), torch.full((HQ,), 3), torch.zeros(8)
    score_mod = lambda s, b, h, q, k: bias[(q - k) - starts[h]] + s
    mask_mod = lambda b, h, q, k: ((q - k) - ends[h] >= 0) & ((q - k) - ends[h] < 8)
    slots = [[g.tensor_types[0], g.tensors[0]] for g in (trace_mod(score_mod)[0], trace_mod(mask_mod, "mask_mod")[0])]
    assert slots[0][0] == slots[1][0] == (torch.int64, 1)
    assert found(score_mod, mask_mod)[1] == "unknown"


def test_captured_numbers_of_the_two_mods_are_told_apart():
    near, far, bias = 3, 5, torch.zeros(8)
    score_mod = lambda s, b, h, q, k: s + bias[q - k - near]
    same = lambda b, h, q, k: (q - k - near >= 0) & (q - k - near < 8)
    other = lambda b, h, q, k: (q - k - far >= 0) & (q - k - far < 8)
    assert found(score_mod, same) == ["mask: proven"]
    assert found(score_mod, other) == ["unknown"]
    low, high = 3.5, 5.5
    score_mod = lambda s, b, h, q, k: s + bias[q - k - (h + low).long()]
    other = lambda b, h, q, k: (q - k - (h + high).long() >= 0) & (q - k - (h + high).long() < 8)
    assert found(score_mod, other) == ["unknown"]


# --- What a proof looks at --------------------------------------------------------------------------------------------


def names_of(sources, leaves, **captures):
    """Sources by the names of what they read."""
    known = {id(value): name for name, value in captures.items()}
    return {known[id(leaves[s.leaf])] + (f".shape[{s.dim}]" if s.dim >= 0 else "") for s in sources}


def test_witnesses():
    W, cap, shift = 300, 400, torch.tensor(500)
    table, bias = torch.zeros(7, dtype=torch.int64), torch.zeros(5, 6)
    mod = lambda s, b, h, q, k: s * cap + bias[h, table[k + W]] + bias[0, k + shift]
    graph, leaves = trace_mod(mod)
    captures = {"W": W, "cap": cap, "shift": shift, "table": table, "bias": bias}
    expected = {"bias.shape[0]", "bias.shape[1]", "table.shape[0]", "W", "shift"}
    assert names_of(proof_sources(graph), leaves, **captures) == expected
    assert names_of(captured_integers(graph), leaves, **captures) == {"W", "cap", "shift"}


def test_witnesses_of_sizes():
    one, other = torch.zeros(4), torch.zeros(6)
    graph, leaves = trace_mod(lambda s, b, h, q, k: s + one[k.clamp(max=other.shape[0] - 1)] * one.shape[0])
    assert names_of(proof_sources(graph), leaves, one=one, other=other) == {"one.shape[0]", "other.shape[0]"}


def test_no_witnesses_without_an_index():
    cap = 400
    for mod in (lambda s, b, h, q, k: s * cap, lambda s, b, h, q, k: s + torch.tensor([1.0, 2.0])[h]):
        assert proof_sources(trace_mod(mod)[0]) == ()


# --- Never too much ---------------------------------------------------------------------------------------------------


class _Evaluation(evaluation.Evaluation):
    """Keeps the indices of each load, and reads garbage where a load proven by the mask is not read."""

    def __init__(self, mod, indices, checks, live):
        super().__init__(mod, indices, torch.tensor(0.0), live, check_indices=False)
        self.checks = dict(zip((n for n in self.graph.nodes() if n.op == "load"), checks, strict=True))
        self.reached = {}

    def _load(self, node, args):
        self.reached[node] = args
        value = super()._load(node, args)
        if not self.checks[node].attending:
            return value
        generator = torch.Generator().manual_seed(0)
        garbage = torch.randint(-(1 << 62), 1 << 62, torch.broadcast_shapes(value.shape, self.live.shape),
                                generator=generator)  # fmt: skip
        return torch.where(self.live, value, garbage.to(value.dtype))


def positions(call):
    """Every b, h, q_idx and kv_idx of a call, for every length of a sequence, and which of them are pairs of it."""
    (batch, heads, _, length, shifted), queries = call.sizes, call.queries
    lens = torch.arange(length + 1).repeat_interleave(queries)
    first = lens - queries
    if call.q_idx_given:
        lens = torch.full((13,), length)
        first = torch.tensor([-(2**63), -(2**40), -9, -2, -1, 0, 1, 3, 8, 17, 2**31, 2**62, 2**63 - 9])
    offset = torch.zeros_like(lens)
    if shifted:  # all of the above at each offset
        offsets = torch.tensor([0, -1, 3, -5, 11, 2**30, -(2**30)])
        offset = offsets.repeat_interleave(len(lens))
        lens, first = lens.repeat(len(offsets)), first.repeat(len(offsets)) + (0 if call.q_idx_given else offset)
    token = torch.arange(len(lens)) % queries
    indices = {
        "b": torch.arange(batch).view(-1, 1, 1, 1),
        "h": torch.arange(heads).view(1, -1, 1, 1),
        "q_idx": (first + token).view(1, 1, -1, 1),
        "kv_idx": (torch.arange(length) + offset[:, None])[None, None],
    }
    return indices, (torch.arange(length) < lens[:, None])[None, None]


def check_proofs(call):
    """Asserts that whatever is proven is so, by looking at every pair; gives the checks of the score_mod."""
    score, mask = call.graphs()
    indices, pairs = positions(call)
    shape = torch.broadcast_shapes(*(x.shape for x in indices.values()))
    nothing = find_checks(*mask, call.sizes, call.q_idx_given)
    run = _Evaluation(mask, indices, nothing, pairs.expand(shape))
    live = (run.result() & pairs).expand(shape)
    check_reached(run, mask, nothing, live, call)
    checks = find_checks(*score, call.sizes, call.q_idx_given, mask)
    run = _Evaluation(score, indices, checks, live)
    run.result()
    check_reached(run, score, checks, live, call, pairs=pairs.expand(shape))
    return checks


def check_reached(run, mod, checks, live, call, pairs=None):
    graph, leaves = mod
    facts = analyze([graph.output], call.q_idx_given)
    loads = [node for node in graph.nodes() if node.op == "load"]
    for load, check in zip(loads, checks, strict=True):
        tensor = leaves[graph.tensors[load.attr]]
        read = live if check.attending else run.live if pairs is None else pairs
        if load not in facts.on_kv:  # of the row: whatever keys there are
            assert not check.attending
            read = torch.ones((*run.live.shape[:3], 1), dtype=torch.bool)
        for index, size, (below, outside) in zip(run.reached[load], tensor.shape, check.indices, strict=True):
            assert not (outside and check.attending)
            values = index.expand(read.shape)[read]
            low, high = -size if below and not outside else 0, size
            wrong = values[(values < low) & (not (below and outside)) | (values >= high) & (not outside)]
            assert not len(wrong), (
                f"{check} of a tensor of shape {list(tensor.shape)}, but the index is {wrong[:5].tolist()}{call!r}"
            )


@settings(max_examples=500)
@given(gather_graphs.calls())
def test_whatever_is_proven_is_so(call):
    check_proofs(call)


def test_random_calls_are_of_all_kinds():
    """The test above would be empty if nothing was proven."""
    source, counts = random.Random(0), Counter()
    for _ in range(600):
        checks = check_proofs(gather_graphs.Call(source.randbytes(gather_graphs.TAPE)))
        counts.update({("attending", load.attending) for load in checks})
        counts.update({WORDS[check] for load in checks for check in load.indices if not load.attending})
    assert min(counts[kind] for kind in (*WORDS.values(), ("attending", True))) >= 40, counts


@pytest.mark.parametrize("window", [1, 3, 4, 5])
@pytest.mark.parametrize("size", [3, 4, 5, 9])
def test_all_that_fits_is_proven_for_a_window(window, size):
    expected = size >= window
    for queries, length in ((1, 12), (3, 7)):
        words = relative(size, mods.sliding_window(window), sizes=CallSizes(1, 1, queries == 1, length))
        assert (words == "mask: proven") == expected or length + queries - 1 <= size


# --- Arithmetic that wraps around -------------------------------------------------------------------------------------


def test_sums_of_narrow_integers_are_not_taken_apart():
    def index(b, h, q, k):
        return k - (q.to(torch.int8) + 100).long()

    def mask_mod(b, h, q, k):
        start = q.to(torch.int8).long() + 100
        return (k >= start) & (k < start + 50)

    assert "mask:" not in indexed(index, 50, mask_mod=mask_mod)
    same = lambda b, h, q, k: (k >= q.long() + 100) & (k < q.long() + 150)
    assert indexed(lambda b, h, q, k: k - (q.long() + 100), 50, mask_mod=same) == "mask: proven"
