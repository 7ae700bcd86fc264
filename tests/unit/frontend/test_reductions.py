"""Reductions and products of rows of captured tensors, searches in them, and the limit of their extent."""

import pytest
import torch
from support import POINTS, assert_same_as_pytorch, make_inputs, trace_mod

from flexdecode import UnsupportedOpError, explain, mods
from flexdecode.errors import TraceError
from flexdecode.frontend import reductions

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(8, 6, generator=GENERATOR), torch.randn(4, 6, generator=GENERATOR)
P, R = A.abs(), B.abs()  # whose sums do not cancel
INTEGERS = torch.randint(0, 5, (8, 4), generator=GENERATOR)
BOOLS = torch.rand(8, 4, generator=GENERATOR) > 0.5
BYTES = INTEGERS.to(torch.uint8)
CUBE = torch.randn(4, 2, 3, generator=GENERATOR)
DOUBLES = A.double() + 1e6
EMPTY = torch.empty(8, 0)
SQUARES = torch.rand(4, 3, 3, generator=GENERATOR)
SORTED, SORTED_FLOATS = torch.tensor([0, 3, 3, 7, 8, 12]), torch.tensor([1.0, 2.0, 2.0, 5.0, 9.0])

# Pairs of which no position lies outside of the tables, where PyTorch would raise.
INSIDE = [point for point in POINTS if point[4] < 40]

CASES = {
    "sum": lambda s, b, h, q, k: (A[h] * B[h]).sum(-1),
    "sums of types": lambda s, b, h, q, k: (
        INTEGERS[h].sum() + BOOLS[h].sum() + A[h].sum(dtype=torch.float64) + A.sum(1)[h]
    ),
    "sums of dimensions": lambda s, b, h, q, k: CUBE.sum((1, 2))[h] + CUBE.sum(1, keepdim=True)[h, 0, 2],
    "sum of nothing": lambda s, b, h, q, k: EMPTY[h].sum() + EMPTY[h].prod(),
    "mean": lambda s, b, h, q, k: A[h].mean() + CUBE[h].mean(0)[1],
    "prod": lambda s, b, h, q, k: A[h].prod() + INTEGERS[h].prod(),
    "any": lambda s, b, h, q, k: torch.where((INTEGERS[h] == k).any(-1) | torch.any(BOOLS[h]), s, BYTES[h].any() + s),
    "all": lambda s, b, h, q, k: torch.where((INTEGERS[h] > 1).all(), s, -s) + BOOLS.all(-1)[h] + EMPTY[h].all(),
    "amax": lambda s, b, h, q, k: A[h].amax() - CUBE[h].amin((0, 1)) + INTEGERS[h].max() + A[h].min(),
    "max of a dimension": lambda s, b, h, q, k: CUBE[h].max(1).values[0] + CUBE[h].max(dim=1)[1][1],
    "argmax": lambda s, b, h, q, k: INTEGERS[h].argmax() + A[h].argmin(-1) + CUBE.argmax(2)[h, 1],
    "extremes of nan": lambda s, b, h, q, k: (
        torch.stack([s, s * 0, s * 2]).amax() + torch.stack([s * 0, s, s]).argmax()
    ),
    "norm": lambda s, b, h, q, k: A[h].norm() + A[h].norm(1) + A[h].norm(p=float("inf")) + A[h].norm(3),
    "linalg.norm": lambda s, b, h, q, k: torch.linalg.norm(A[h]) + torch.linalg.vector_norm(CUBE[h], ord=1, dim=1)[0],
    "dot": lambda s, b, h, q, k: torch.dot(A[h], B[h]) + torch.inner(A[h], B[h]) + torch.vdot(A[h], B[h]),
    "matmul": lambda s, b, h, q, k: (
        P[h] @ R[h] + (R @ P[h])[h] + (P[h] @ R.T)[h] + (R @ R.mT)[h, 0] + torch.mv(R, P[h])[2]
    ),
    "matmul of integers": lambda s, b, h, q, k: INTEGERS[h] @ INTEGERS[0],
    "count_nonzero": lambda s, b, h, q, k: INTEGERS[h].count_nonzero() + torch.count_nonzero(A[h] > 0) + s,
    "logsumexp": lambda s, b, h, q, k: torch.logsumexp(A[h], -1) + torch.logsumexp(torch.stack([s, s * 2]), 0),
    "var": lambda s, b, h, q, k: (
        A[h].std() + A[h].var(correction=0) + CUBE.var(2)[h, 1] + A[h].std(unbiased=False)
    ),
    "isin": lambda s, b, h, q, k: torch.where(torch.isin(k, INTEGERS[h]), s, -s) + torch.isin(k, SORTED, invert=True),
    "searchsorted": lambda s, b, h, q, k: (
        torch.searchsorted(SORTED, k) + torch.searchsorted(SORTED, q, right=True) * s.sign()
        + torch.searchsorted(SORTED_FLOATS, s, side="right", out_int32=True)
    ),
    "bucketize": lambda s, b, h, q, k: torch.bucketize(s, SORTED_FLOATS) + torch.bucketize(k, SORTED, right=True),
    "float64": lambda s, b, h, q, k: ((DOUBLES[h].sum() - DOUBLES[0].sum()) + DOUBLES[h].mean() - 1e6).float(),
    "products of batches": lambda s, b, h, q, k: (
        (SQUARES @ SQUARES.mT)[h, 0, 1] + torch.bmm(SQUARES, SQUARES)[h, 2, 1] + (P[:3, :3] @ SQUARES)[h, 1, 2]
        + (SQUARES @ P[:3, :3])[h, 2, 0] + (P[0, :3] @ SQUARES)[h, 1]
    ),
    "inner of rows": lambda s, b, h, q, k: torch.inner(P, R)[h, 2] + torch.inner(SQUARES, R[:, :3])[h, 1, 3],
    "var by position": lambda s, b, h, q, k: (
        A[h].var(0, False) + A[h].std(-1, False, True)[0] + CUBE[h].var((0, 1), False) + A[h].var(False)
        + A[h].var(correction=0.5) + A[h].var(0, correction=None)
    ),
    "Python's sum": lambda s, b, h, q, k: sum(A[h]) + sum(x * 2 for x in B[h]),
}  # fmt: skip


@pytest.mark.parametrize("unrolled", [1, 8])
@pytest.mark.parametrize("name", CASES)
def test_reductions_give_what_pytorch_gives(name, unrolled, monkeypatch):
    """As a loop, from two elements on, and as a tree of elements."""
    monkeypatch.setattr(reductions, "_UNROLLED", unrolled)
    assert_same_as_pytorch(CASES[name], INSIDE, rtol=2e-6)


def test_norms_of_matrices_are_refused():
    for order in (1, 2, float("inf"), "nuc"):
        with pytest.raises(UnsupportedOpError, match=r"linalg\.norm of a matrix"):
            trace_mod(lambda s, b, h, q, k, order=order: s + torch.linalg.norm(A, order))
    both = lambda s, b, h, q, k: s * 0.0 + torch.linalg.norm(P) + torch.linalg.norm(P, "fro")
    assert_same_as_pytorch(both, INSIDE[:1], rtol=1e-6)


@pytest.mark.parametrize("name", ["var", "std", "logsumexp"])
def test_spreads_of_half_types_are_computed_in_float32(name):
    big = (A * (300 if name != "logsumexp" else 3)).half()
    dim = (-1,) if name == "logsumexp" else ()
    assert_same_as_pytorch(lambda s, b, h, q, k: getattr(big[h].half(), name)(*dim).float(), INSIDE, rtol=2e-3)


def test_half_types_are_summed_in_float32():
    assert_same_as_pytorch(
        lambda s, b, h, q, k: A[h].half().sum().float() + A[h].half().mean() + A[h].bfloat16().norm(), INSIDE, rtol=4e-3
    )


def test_an_extent_is_a_constant_and_the_values_are_not():
    def over(row):
        return lambda score, b, h, q_idx, kv_idx: score + row[h].sum()

    first, second = trace_mod(over(A))[0], trace_mod(over(A + 1))[0]
    assert first == second
    assert first != trace_mod(over(A[:, :5]))[0]


def test_a_short_sum_is_a_tree_and_a_long_one_a_loop():
    short, long = torch.randn(8, 8), torch.randn(8, 256)
    tree, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: score + short[h].sum())
    assert len([node for node in tree.nodes() if node.op == "load"]) == 8
    loop, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: score + long[h].sum())
    assert len(loop.nodes()) < 10
    report = str(explain(*make_inputs(1, 8, 1, 1, 16, 16), lambda score, b, h, q_idx, kv_idx: score + long[h].sum()))
    assert "score + sum(long[h, i] for i in range(256))" in report
    assert "long[h, i]  proven in range, read once per row" in report


def test_loops_beside_and_inside_of_each_other():
    twenty, thirty = torch.rand(8, 20, generator=GENERATOR), torch.rand(8, 30, generator=GENERATOR)
    square = torch.rand(20, 20, generator=GENERATOR)

    def score_mod(s, b, h, q, k):
        closed = (twenty[h] * thirty[h].sum()).sum()
        nested = (twenty[h] * (square @ twenty[b])).sum()
        return closed + nested + (twenty.sum(1) * 2)[h] + twenty[h].amax()

    assert_same_as_pytorch(score_mod, INSIDE, rtol=2e-6)


def test_loops_in_rows_of_many_steps():
    """Elements that are computed once, for an index that is filled in later."""
    row, matrix = torch.rand(12, generator=GENERATOR), torch.rand(12, 12, generator=GENERATOR)

    def score_mod(s, b, h, q, k):
        x = row
        for _ in range(60):
            x = x * 1.01
        y = matrix @ x
        for _ in range(60):
            y = y * 1.01
        return (matrix[h] * y).sum()

    assert_same_as_pytorch(score_mod, INSIDE[:3], rtol=1e-5)


def test_equal_mods_with_loops_are_equal():
    row = torch.randn(8, 32)

    def first(score, b, h, q_idx, kv_idx):
        return score + row[h].sum() * row[b].amax()

    def second(score, b, h, q_idx, kv_idx):
        unused = row[b].prod()
        total = row[h].sum()
        del unused
        return score + total * row[b].amax()

    assert trace_mod(first)[0] == trace_mod(second)[0]


def test_more_than_256_elements_are_refused_with_the_limit_and_the_remedy():
    long = torch.zeros(8, 257)
    with pytest.raises(UnsupportedOpError) as found:
        trace_mod(lambda score, b, h, q_idx, kv_idx: score + long[h].sum())
    lines = str(found.value).splitlines()
    assert lines[0] == "torch.sum over 257 elements in a score_mod; at most 256 are supported"
    assert "score + long[h].sum()" in lines[1]
    assert lines[2] == "  Compute it outside the mod and capture the result as a tensor."
    with pytest.raises(UnsupportedOpError, match=r"torch.dot over 257 elements in a score_mod"):
        trace_mod(lambda score, b, h, q_idx, kv_idx: score + long[h] @ long[0])


def test_a_search_has_no_limit():
    long = torch.arange(0, 3000, 2)
    assert_same_as_pytorch(lambda s, b, h, q, k: torch.searchsorted(long, k + q), INSIDE)


@pytest.mark.parametrize(
    ("mod", "text"),
    [
        (lambda s, b, h, q, k: s + EMPTY[h].amax(), "torch.amax of no elements"),
        (lambda s, b, h, q, k: s + INTEGERS[h].mean(), "the mean of torch.int64 is not defined"),
        (lambda s, b, h, q, k: s + A[h] @ INTEGERS[h].float(), "a product `@` of 6 and 4 elements"),
        (lambda s, b, h, q, k: s + A[h] @ s, "a product `@` of a number"),
        (lambda s, b, h, q, k: s + A[h].cumsum(0)[1], "torch.cumsum is not supported in score_mod"),
        (lambda s, b, h, q, k: s + torch.searchsorted(INTEGERS, k)[0], "in more than one sequence"),
        (lambda s, b, h, q, k: s + A[h].sum(3), "dimension 3 is out of range"),
    ],
)
def test_errors(mod, text):
    with pytest.raises(TraceError, match=text.replace("(", r"\(")) as found:
        trace_mod(mod)
    assert "test_reductions.py" in str(found.value)


OF_THE_SCORE = {
    "max": lambda s, b, h, q, k: s - s.max(),
    "min": lambda s, b, h, q, k: s - (2 * s).min(-1).values,
    "amax": lambda s, b, h, q, k: s - s.amax(-1, keepdim=True),
    "mean": lambda s, b, h, q, k: s - s.mean(),
    "sum": lambda s, b, h, q, k: s / torch.exp(s + A[h, 0]).sum(),
    "std": lambda s, b, h, q, k: s / s.std(),
    "norm": lambda s, b, h, q, k: s / s.norm(),
    "argmax": lambda s, b, h, q, k: s + s.argmax(),
    "any": lambda s, b, h, q, k: torch.where((s > 3).any(), s, 0.0),
    "logsumexp": lambda s, b, h, q, k: s - torch.logsumexp(s, -1),
    "softmax": lambda s, b, h, q, k: torch.softmax(s, -1),
    "log_softmax": lambda s, b, h, q, k: torch.nn.functional.log_softmax(s, dim=-1),
    "cumsum": lambda s, b, h, q, k: s.cumsum(-1),
    "topk": lambda s, b, h, q, k: torch.where(s < s.topk(3).values[0], -torch.inf, s),
}


@pytest.mark.parametrize("name", OF_THE_SCORE)
def test_the_score_is_no_row(name):
    with pytest.raises(UnsupportedOpError) as found:
        trace_mod(OF_THE_SCORE[name])
    problem, line, remedy = str(found.value).splitlines()
    assert problem == f"torch.{name} of the score in a score_mod"
    assert f"{__file__}:" in line
    assert remedy == (
        "  A mod sees one pair of query and key: there is no row of scores to reduce. The softmax, which subtracts the "
        "maximum of the row, comes after the mod."
    )


def test_reductions_of_other_numbers_and_of_rows_with_the_score():
    assert_same_as_pytorch(lambda s, b, h, q, k: (q - k).max() + (P[h] * abs(s)).sum(), INSIDE, rtol=2e-6)
    with pytest.raises(UnsupportedOpError, match=r"torch\.softmax is not supported"):
        trace_mod(lambda s, b, h, q, k: s + torch.softmax(A[h], -1)[0])


def test_a_list_of_tiles_bounds_the_keys():
    tiles = torch.randint(0, 8, (2, 4, 8, 3), generator=GENERATOR)

    def video(b, h, q_idx, kv_idx):
        return (tiles[b, h, q_idx // 16] == (kv_idx // 16).unsqueeze(-1)).any(-1)

    graph, _ = trace_mod(mods.and_masks(video, mods.causal()), "mask_mod")
    assert sum(node.op == "load" for node in graph.nodes()) == 3
