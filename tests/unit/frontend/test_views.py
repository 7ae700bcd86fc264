"""Views, joins and parts of captured tensors inside a mod."""

import pytest
import torch
from support import POINTS, assert_same_as_pytorch, evaluate_graph, trace_mod

from flexdecode import UnsupportedOpError
from flexdecode.errors import TraceError

GENERATOR = torch.Generator().manual_seed(0)
A, B = torch.randn(8, 6, generator=GENERATOR), torch.randn(4, 6, generator=GENERATOR)
INTEGERS = torch.randint(0, 5, (8, 4), generator=GENERATOR)
CUBE = torch.randn(4, 2, 3, generator=GENERATOR)
INSIDE = [point for point in POINTS if point[4] < 40]


def _parts(s, h):
    low, high, third, _ = INTEGERS[h]
    x, y = A[h].chunk(2)
    z, w = torch.split(A[h], [2, 4])
    (whole,) = A[h].split(6)
    first, second = CUBE[h].unbind(0)
    return s * low - high + third + x[1] + y[-1] + z[0] + w[3] + whole[2] + first[1] * second[2]


CASES = {
    "view": lambda s, b, h, q, k: (
        A.view(-1)[k] + CUBE.view(4, -1)[h][2] + A.view(2, 4, 6)[-1, h, 1] + A.view(8, 1, 6)[h, 0, 1]
    ),
    "flatten": lambda s, b, h, q, k: A.flatten()[-1] + CUBE.flatten(1)[h, 4] + A.ravel()[h] + s.flatten()[0],
    "reshape": lambda s, b, h, q, k: (
        A.reshape(3, 16)[2, q.clamp(-1, 15)] + CUBE.reshape(4, 6).reshape(4, 3, 2)[h, 2, 0]
    ),
    "unflatten": lambda s, b, h, q, k: A.unflatten(1, (2, 3))[h, 1, 0] + A.unflatten(1, (-1, 2))[h, 2, 1],
    "view_as": lambda s, b, h, q, k: A.view_as(A.reshape(4, 12))[h, 11] + A.reshape_as(A.T)[0, h],
    "gather": lambda s, b, h, q, k: torch.gather(A, 1, INTEGERS)[h, 2] + A.gather(0, INTEGERS)[h, 3],
    "take_along_dim": lambda s, b, h, q, k: (
        torch.take_along_dim(A, INTEGERS, 1)[h, 1] + torch.take_along_dim(A, A.argmax(1, keepdim=True), 1)[h, 0]
        + torch.take_along_dim(A, h.reshape(1))[0]
    ),
    "index_select": lambda s, b, h, q, k: torch.index_select(A, 0, h)[0, 2] + A.index_select(1, INTEGERS[h])[h, 0],
    "take": lambda s, b, h, q, k: torch.take(A, h),
    "stack": lambda s, b, h, q, k: (
        torch.stack([s, s + 1, s * 2])[h % 3] + torch.stack((A, A * 2), 1)[h, b, 3] + torch.stack([b, h])[-1]
    ),
    "cat": lambda s, b, h, q, k: (
        torch.cat([A, B])[h + 6, 1] + torch.cat([A[h], B[h] * 0, INTEGERS[h]])[k.clamp(0, 15)]
        + torch.cat((A, A), dim=-1)[h, 9]
    ),
    "parts": lambda s, b, h, q, k: _parts(s, h),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_views_give_what_pytorch_gives(name):
    assert_same_as_pytorch(CASES[name], INSIDE, rtol=1e-6)


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: A.view(-1)[q],
        lambda s, b, h, q, k: A.view(6, 8)[q, 1],
        lambda s, b, h, q, k: A.unflatten(0, (2, 4))[1, q, 1],
        lambda s, b, h, q, k: torch.cat([A, B])[q, 1],
        lambda s, b, h, q, k: torch.stack([A[h, 0], A[h, 1]])[q],
        lambda s, b, h, q, k: A.gather(0, INTEGERS)[q, 1],
        lambda s, b, h, q, k: A.split(4)[1][q, 0],
    ],
)
def test_an_index_outside_reads_0_and_a_negative_one_counts_from_the_end(mod):
    graph, leaves = trace_mod(mod)
    b, h, k = torch.tensor(0), torch.tensor(1), torch.tensor(0)
    for q in (-100, -49, -48, -13, -12, -9, -8, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 7, 8, 11, 12, 47, 48, 100):
        try:
            expected = mod(None, 0, 1, q, 0)
        except IndexError:
            expected = torch.tensor(0.0)
        found = evaluate_graph(graph, leaves, torch.tensor(0.5), b, h, torch.tensor(q), k)
        assert found == expected, q


def test_a_dimension_that_stays_keeps_its_size_and_its_check():
    graph, _ = trace_mod(lambda s, b, h, q, k: CUBE.flatten(1)[q, 2])
    assert not any(node.op == "where" for node in graph.nodes())


@pytest.mark.parametrize(
    ("mod", "text"),
    [
        (lambda s, b, h, q, k: A.view(5, -1)[h, 0], "shape '\\[5, -1\\]' is invalid for input of size 48"),
        (lambda s, b, h, q, k: A.view(torch.int32)[h, 0] + s, "view as another dtype is not supported in a score_mod"),
        (lambda s, b, h, q, k: torch.stack([A, B])[0, h, 0], "torch.stack of the shapes"),
        (lambda s, b, h, q, k: torch.cat([A, CUBE])[0, h, 0], "torch.cat of the shapes"),
        (lambda s, b, h, q, k: torch.stack([])[0], "torch.stack of no tensors"),
        (lambda s, b, h, q, k: A.split([1, 2])[0][h, 0], "a split of 8 elements into \\[1, 2\\]"),
        (lambda s, b, h, q, k: sum(torch.zeros(300)), "torch.unbind over 300 elements in a score_mod; at most 256"),
        (lambda s, b, h, q, k: A.gather(0, INTEGERS[h])[0, 0], "gather of a tensor of rank 2 with an index of rank 1"),
    ],
)
def test_errors(mod, text):
    with pytest.raises((TraceError, UnsupportedOpError), match=text) as found:
        trace_mod(mod)
    assert "test_views.py" in str(found.value)
