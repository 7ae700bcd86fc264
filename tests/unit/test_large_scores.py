"""The torch backend: every finite score gives what PyTorch computes; one of +inf gives NaN and an lse of +inf."""

import pytest
import torch
from large_scores import INFINITE, SCORES, SINKS, assert_infinite_rows
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode, merge_attention

TORCH = DecodeOptions(backend="torch")


@pytest.mark.parametrize("sinks", SINKS)
@pytest.mark.parametrize("score", SCORES)
def test_finite_scores(score, sinks):
    inputs, more = make_inputs(2, 4, 2, 2, 200, 16), {"sinks": SINKS[sinks]}
    out, lse = flex_decode(*inputs, SCORES[score], **more, return_lse=True, options=TORCH)
    assert_close_to_reference(out, lse, *inputs, SCORES[score], **more)


@pytest.mark.parametrize("score", INFINITE)
def test_infinite_scores(score):
    inputs = make_inputs(2, 4, 2, 2, 200, 16)
    assert_infinite_rows(*flex_decode(*inputs, INFINITE[score], return_lse=True, options=TORCH))


def test_an_infinite_sink():
    inputs, sinks = make_inputs(2, 4, 2, 2, 200, 16), torch.tensor([torch.inf, 0.0, torch.inf, torch.inf])
    assert_infinite_rows(*flex_decode(*inputs, sinks=sinks, return_lse=True, options=TORCH))


def test_merging_infinite_parts():
    outs, lses = torch.randn(3, 2, 4, 1, 16), torch.zeros(3, 2, 4, 1)
    lses[1, :, torch.tensor([0, 2, 3])] = torch.inf
    assert_infinite_rows(*merge_attention(outs, lses))


def test_merging_parts_of_large_scores():
    """What a float32 log-sum-exp holds of a part's size ends at 2**24: up to 1e5 it is right to 1%."""
    inputs = make_inputs(1, 4, 2, 1, 200, 16)
    parts = [(inputs[0], *(x[:, :, at] for x in inputs[1:])) for at in (slice(0, 50), slice(50, 200))]

    def shifted(score, b, h, q_idx, kv_idx):
        return score * 0.0 + 1e5

    outs, lses = zip(*[flex_decode(*part, shifted, return_lse=True, options=TORCH) for part in parts], strict=True)
    merged, _ = merge_attention(outs, lses)
    whole = flex_decode(*inputs, shifted, options=TORCH)
    torch.testing.assert_close(merged, whole, rtol=0.01, atol=0.01)
