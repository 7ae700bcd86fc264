"""Long mods: nothing in the pipeline recurses once for each step of a mod."""

import inspect
import sys

import pytest
import torch
from support import make_inputs, trace_mod

from flexdecode import DecodeOptions, explain, flex_decode
from flexdecode.analysis.proven import ProvenMods
from flexdecode.codegen.lower import lower, lower_bounds

TABLE = torch.arange(48)
ROW = torch.rand(8)


def remainders(steps):
    def mask_mod(b, h, q_idx, kv_idx):
        x = kv_idx
        for _ in range(steps):
            x = (x + x // 2 + q_idx) % 1009
        return x > 300

    return mask_mod


def extremes(steps):
    def mask_mod(b, h, q_idx, kv_idx):
        x = kv_idx
        for i in range(steps):
            x = torch.maximum(x - 1, q_idx * i - x) if i % 2 else torch.minimum(x + 1, q_idx - x * 2)
        return x <= q_idx

    return mask_mod


def conjunction(steps):
    def mask_mod(b, h, q_idx, kv_idx):
        live = kv_idx <= q_idx
        for i in range(steps):
            live = live & (kv_idx >= q_idx // (i + 2) - i * 7)
        return live

    return mask_mod


def row_bound(steps):
    def mask_mod(b, h, q_idx, kv_idx):
        x = q_idx
        for i in range(steps):
            x = torch.minimum(x + 1, TABLE[i % 48] + x // 3)
        return kv_idx <= x + 20

    return mask_mod


def shaped(steps):
    def score_mod(score, b, h, q_idx, kv_idx):
        row = ROW
        for _ in range(steps):
            row = row + row * 0.001  # doubles the element's text, but not its graph
        return score + row[h]

    return score_mod


MAKERS = [remainders, extremes, conjunction, row_bound, shaped]


@pytest.mark.parametrize("make", MAKERS, ids=lambda make: make.__name__)
def test_200_steps_run_within_few_frames(make):
    mod = make(200)
    kind = "score_mod" if make is shaped else "mask_mod"
    inputs = make_inputs(1, 2, 1, 1, 48, 16)
    before = sys.getrecursionlimit()
    sys.setrecursionlimit(len(inspect.stack(0)) + 450)  # a step that costs a frame does not fit
    try:
        graph, _ = trace_mod(mod, kind)
        program = ProvenMods(*((graph, None) if make is shaped else (None, graph)))
        assert lower(graph, kind).bodies and lower_bounds(program).bodies
        assert isinstance(program.bounds.is_bounded, bool)
        flex_decode(*inputs, **{kind: mod}, options=DecodeOptions(backend="torch"))
    finally:
        sys.setrecursionlimit(before)
    assert "graph" in str(explain(*inputs, **{kind: mod}))


def test_2000_remainders():
    mod = remainders(2000)
    inputs = make_inputs(1, 2, 1, 1, 48, 16)
    flex_decode(*inputs, mask_mod=mod, options=DecodeOptions(backend="torch"))
    assert "not solved" in str(explain(*inputs, mask_mod=mod))
