"""What a call takes of the intervals of its mask and of its score."""

import dataclasses

import hypothesis
import pytest
import torch
from support import trace_mod
from unit import mask_graphs
from unit.analysis.test_intervals import in_region

from flexdecode import mods
from flexdecode.analysis.bounds import Bounds, find_bounds, nodes_of
from flexdecode.analysis.intervals import EVERYWHERE, NOWHERE, Interval

HIDDEN = float("-inf")


def window(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx - kv_idx < 7, score, HIDDEN)


def ends(score, b, h, q_idx, kv_idx):
    """Finite on both ends: two intervals."""
    return torch.where((kv_idx < 5) | (kv_idx >= 50), score, HIDDEN)


def hidden(score, b, h, q_idx, kv_idx):
    return torch.where(kv_idx < 0, score, HIDDEN)


def bounds_of(score_mod=None, mask_mod=None, q_idx_given=False):
    score = trace_mod(score_mod, "score_mod")[0] if score_mod is not None else None
    mask = trace_mod(mask_mod, "mask_mod")[0] if mask_mod is not None else None
    return find_bounds(score, mask, q_idx_given)


def test_without_mods_everything_is_live_and_full():
    assert bounds_of() == Bounds(EVERYWHERE, EVERYWHERE, EVERYWHERE)
    assert bounds_of().num_live == 1 and not bounds_of().is_bounded


def test_a_mask_has_live_and_full_intervals():
    bounds = bounds_of(mask_mod=mods.streaming(3, 10))
    assert bounds.mask_live == bounds.mask_full != EVERYWHERE
    assert bounds.score_live == EVERYWHERE
    assert bounds.num_live == 2


def test_a_mask_that_is_open_on_a_side_is_not_bounded():
    assert bounds_of(mask_mod=mods.sliding_window(9)).is_bounded
    assert bounds_of(mask_mod=mods.streaming(4, 9)).is_bounded
    assert not bounds_of(mask_mod=mods.causal()).is_bounded
    assert bounds_of(window, mods.sliding_window(9)).is_bounded and not bounds_of(window).is_bounded


def test_bounds_differ_if_the_sequence_decides_them():
    def padded(b, h, q_idx, kv_idx):
        return (kv_idx < lens[b]) & (q_idx >= kv_idx)

    def by_head(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < widths[h]

    lens, widths = torch.tensor([5, 7]), torch.tensor([16, 64])
    assert bounds_of(mask_mod=mods.document_offsets(lens)).differ and bounds_of(mask_mod=padded).differ
    for mask_mod in (None, mods.sliding_window(9), mods.streaming(4, 9), mods.causal(), by_head):
        assert not bounds_of(mask_mod=mask_mod).differ


def test_a_score_alone_has_all_its_intervals():
    bounds = bounds_of(ends)
    assert len(bounds.score_live) == bounds.num_live == 2
    assert bounds.mask_full == EVERYWHERE, "no element mask is needed: the score is -inf itself"


def test_a_score_beside_a_mask_has_one():
    assert bounds_of(window, mods.causal()).score_live == bounds_of(window).score_live
    assert bounds_of(ends, mods.causal()).score_live == EVERYWHERE
    assert bounds_of(ends, mods.streaming(3, 10)).num_live == 2


def test_a_mask_that_says_nothing_leaves_the_score():
    unsolved = lambda b, h, q, k: k % 2 == 0
    bounds = bounds_of(window, unsolved)
    assert bounds.mask_live == EVERYWHERE and bounds.mask_full == NOWHERE
    assert bounds.score_live == bounds_of(window).score_live and bounds.num_live == 1


def test_nothing_is_live():
    assert bounds_of(hidden).score_live == NOWHERE and bounds_of(hidden).num_live == 1
    assert bounds_of(mask_mod=mods.or_masks()).mask_live == NOWHERE


def test_q_idx_of_the_caller_is_guarded():
    """Without a guard, sums with it might overflow."""
    plain, given = (bounds_of(mask_mod=mods.sliding_window(9), q_idx_given=given) for given in (False, True))
    operations = [{node.op for bound in nodes_of(b.mask_live) for node in (bound, *bound.args)} for b in (plain, given)]
    assert "logical_and" not in operations[0] and "logical_and" in operations[1]


def test_nodes_of_a_region():
    lo, hi = nodes_of(bounds_of(mask_mod=mods.sliding_window(9)).mask_live)
    assert nodes_of((Interval(lo, None), Interval(None, hi), Interval(None, None))) == [lo, hi]
    assert nodes_of(EVERYWHERE) == nodes_of(NOWHERE) == []


def test_random_masks_beside_random_scores():
    @hypothesis.settings(max_examples=500, database=None)
    @hypothesis.given(mask_graphs.masks(), mask_graphs.scores())
    def check(mask, score):
        mask, score = (dataclasses.replace(e, q_idx_given=mask.q_idx_given) for e in (mask, score))
        bounds = find_bounds(score.graph, mask.graph, mask.q_idx_given)
        assert len(bounds.score_live) <= 1
        attends, live = torch.tensor(True), torch.tensor(True)
        for example, region in ((mask, bounds.mask_live), (score, bounds.score_live)):
            output = example.graph.output
            values = example.evaluate(output, *nodes_of(region))
            attends = attends & (values[output] if output.dtype == torch.bool else values[output] != HIDDEN)
            live = live & in_region(region, values, mask_graphs.KEYS)
        assert not (attends & ~live).any()

    check()


@pytest.mark.parametrize("given", [False, True])
def test_equal_graphs_give_equal_bounds(given):
    """They go into the text of the kernel, which is kept on disk by its content."""
    assert bounds_of(window, mods.streaming(3, 10), given) == bounds_of(window, mods.streaming(5, 11), given)
