"""The parts of the cache that the torch backend reads: all that attends is in one; a whole one needs no mask."""

import pytest
import torch
from support import MODS, assert_close_to_reference, make_inputs

from flexdecode import flex_decode, mods
from flexdecode.reference import evaluate_mod
from flexdecode.runtime import eager
from flexdecode.runtime.parts import _cut, _joined, find_parts


@pytest.fixture
def parts_of(monkeypatch):
    """Calls `flex_decode` and gives the parts that it read, as (start, end, whole)."""
    found = []

    def finding(*arguments):
        found[:] = find_parts(*arguments)
        return found

    monkeypatch.setattr(eager, "find_parts", finding)

    def call(*arguments, **keywords):
        found.clear()
        flex_decode(*arguments, **keywords)
        return [tuple(part) for part in found]

    return call


def inputs(N=8192, B=1, Q=1):
    return make_inputs(B, 4, 2, Q, N, 16)


def test_what_masks_leave(parts_of):
    q, k, v = inputs()
    assert parts_of(q, k, v) == [(0, 8192, True)]
    assert parts_of(q, k, v, None, mods.causal()) == [(0, 8192, True)]
    assert parts_of(q, k, v, None, mods.sliding_window(512)) == [(7680, 8192, True)]
    assert parts_of(q, k, v, None, mods.streaming(4, 512)) == [(0, 4, False), (7680, 8192, True)]
    assert parts_of(q, k, v, None, lambda b, h, i, j: j % 2 == 0) == [(0, 8192, False)]
    assert parts_of(q, k, v, None, mods.sliding_window(512), kv_lens=1000, kv_starts=900) == [(900, 1000, False)]
    assert parts_of(q, k, v, None, mods.causal(), kv_lens=0) == []


def test_a_score_that_rules_out(parts_of):
    near = lambda s, b, h, i, j: torch.where(i - j < 300, s, -float("inf"))
    assert parts_of(*inputs(), near) == [(7892, 8192, True)]
    assert parts_of(*inputs(), near, mods.sliding_window(512)) == [(7892, 8192, True)]


def test_sequences_of_several_lengths(parts_of):
    q, k, v = inputs(B=2)
    lens = torch.tensor([8192, 5000])
    assert parts_of(q, k, v, kv_lens=lens) == [(0, 5000, True), (5000, 8192, False)]
    assert parts_of(q, k, v, None, mods.sliding_window(512), kv_lens=lens) == [(4488, 8192, False)]
    assert parts_of(q, k, v, kv_lens=lens, q_lens=torch.tensor([1, 0])) == [(0, 8192, False)]


def test_cut():
    assert _joined([(0, 4), (2, 3), (4, 9), (12, 13)]) == [(0, 9), (12, 13)]
    assert [tuple(part) for part in _cut([(0, 10), (20, 40)], [(5, 25), (30, 35)])] == [
        (0, 5, False), (5, 10, True), (20, 25, True), (25, 30, False), (30, 35, True), (35, 40, False),
    ]  # fmt: skip


@pytest.mark.parametrize("whole", [1, 8, 256])
@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
def test_every_pair_that_attends_is_in_a_part(family, whole, parts_of, monkeypatch):
    monkeypatch.setattr("flexdecode.runtime.parts.MIN_WHOLE", whole)
    B, Hq, N, Q = 2, 4, 77, 3
    score_mod, mask_mod = (make(B, Hq, N, Q, "cpu") for make in family[1:])
    tensors = make_inputs(B, Hq, 2, Q, N, 16)
    lens = torch.tensor([77, 40])
    parts = parts_of(*tensors, score_mod, mask_mod, kv_lens=lens)
    out, lse = flex_decode(*tensors, score_mod, mask_mod, kv_lens=lens, return_lse=True)
    assert_close_to_reference(out, lse, *tensors, score_mod, mask_mod, kv_lens=lens)
    for b, length in enumerate(lens.tolist()):
        q_idx, kv_idx = torch.arange(length - Q, length), torch.arange(length)
        attends = torch.ones(1, Hq, Q, length, dtype=torch.bool)
        if mask_mod is not None:
            attends = evaluate_mod(mask_mod, (torch.tensor([b]), torch.arange(Hq), q_idx, kv_idx))
        read, whole_keys = torch.zeros(2, length, dtype=torch.bool)
        for start, end, is_whole in parts:
            read[start:end] = True
            whole_keys[start:end] |= is_whole
        assert score_mod is not None or not (attends & ~read).any()
        assert attends[..., whole_keys].all() and int(whole_keys.sum()) <= length
        assert not any(is_whole and end > length for _, end, is_whole in parts)
