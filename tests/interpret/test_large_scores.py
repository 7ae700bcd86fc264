"""The generated kernels: every finite score gives what PyTorch computes, whatever the split."""

import pytest
import torch
from interpret.decoding import check_decode, decode
from large_scores import INFINITE, SCORES, SINKS, assert_infinite_rows
from support import make_inputs

from flexdecode import merge_attention

SCHEDULES = {
    "one": {"num_splits": 1}, "split": {"num_splits": 3}, "balanced": {"schedule": "balanced", "num_splits": 5},
}  # fmt: skip
CASES = [
    (score, sinks, [*SCHEDULES][(i + j) % 3])
    for i, score in enumerate(SCORES)
    for j, sinks in enumerate(SINKS)
    if j == 0 or (i + j) % 2
]


@pytest.mark.parametrize(("score", "sinks", "schedule"), CASES)
def test_finite_scores(score, sinks, schedule):
    inputs = make_inputs(2, 4, 2, 2, 90, 16)
    check_decode(*inputs, SCORES[score], sinks=SINKS[sinks], **SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("score", INFINITE)
def test_infinite_scores(score, schedule):
    inputs = make_inputs(2, 4, 2, 2, 180, 16)
    assert_infinite_rows(*decode(*inputs, INFINITE[score], block_n=32, **SCHEDULES[schedule]))


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_an_infinite_sink(schedule):
    inputs, sinks = make_inputs(2, 4, 2, 2, 40, 16), torch.tensor([torch.inf, 0.0, torch.inf, torch.inf])
    assert_infinite_rows(*decode(*inputs, sinks=sinks, **SCHEDULES[schedule]))


def test_merging_infinite_parts():
    outs, lses = torch.randn(3, 2, 4, 1, 16), torch.zeros(3, 2, 4, 1)
    lses[1, :, torch.tensor([0, 2, 3])] = torch.inf
    assert_infinite_rows(*merge_attention(outs, lses))
