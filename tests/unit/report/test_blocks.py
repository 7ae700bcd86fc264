"""The blocks of a decode step, found on the host, against the masks at every position."""

import math

import pytest
import torch
from support import MODS, make_inputs

from flexdecode import DecodeOptions, explain, mods
from flexdecode.reference import evaluate_mod
from flexdecode.report.blocks import DEAD, FULL, PARTIAL, UNUSED

EXACT = {"causal", "window", "streaming", "prefix_lm", "chunked", "document_offsets", "document_start", "head_window"}
MASKS = [family for family in MODS if family.make_mask_mod(2, 4, 32, 1, "cpu") is not None]


def step_of(family, B, Hq, Hkv, Q, N, kv_lens, block_n=16, num_splits=3):
    mask = family.make_mask_mod(B, Hq, N, Q, "cpu")
    score = family.make_score_mod(B, Hq, N, Q, "cpu")
    options = DecodeOptions(block_n=block_n, num_splits=num_splits)
    found = explain(*make_inputs(B, Hq, Hkv, Q, N, 16), score, mask, kv_lens=kv_lens, options=options, device="H200")
    return found.step, mask


def live_pairs(mask, Hq, Q, N, kv_lens):
    """Whether each pair attends: bool [B, Hq, Q, N]."""
    found = []
    for b, length in enumerate(kv_lens.tolist()):
        grid = torch.tensor([b]), torch.arange(Hq), length - Q + torch.arange(Q), torch.arange(N)
        found.append(evaluate_mod(mask, grid)[0] & (torch.arange(N) < length))
    return torch.stack(found)


@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("family", MASKS, ids=[family.name for family in MASKS])
def test_every_live_pair_is_in_a_block_that_is_read_and_full_blocks_need_no_mask(family, Q):
    B, Hq, Hkv, N, block_n = 3, 4, 2, 100, 16
    kv_lens = torch.tensor([100, 37, 3])
    step, mask = step_of(family, B, Hq, Hkv, Q, N, kv_lens)
    pairs = live_pairs(mask, Hq, Q, N, kv_lens).view(B * Hkv, -1, N)
    pairs = torch.nn.functional.pad(pairs, (0, step.num_blocks * block_n - N)).unflatten(-1, (-1, block_n))
    for item in range(step.num_items):
        states, _ = step.blocks(item)
        needed, complete = pairs[item].any(2).any(0), pairs[item].all(2).all(0)
        assert not (needed & (states < PARTIAL)).any()
        assert not (~complete & (states == FULL)).any()
        if family.name in EXACT and Q == 1:
            assert torch.equal(needed, states >= PARTIAL)
            assert torch.equal(complete, states == FULL)


def test_states_tell_dead_blocks_from_unused_ones():
    family = next(f for f in MASKS if f.name == "window")
    step, _ = step_of(family, 2, 2, 1, 1, 96, torch.tensor([96, 40]))
    assert [step.blocks(0)[0].tolist(), step.blocks(1)[0].tolist()] == [
        [DEAD, DEAD, DEAD, DEAD, FULL, FULL],
        [PARTIAL, FULL, PARTIAL, UNUSED, UNUSED, UNUSED],
    ]
    assert step.counts == {DEAD: 4, PARTIAL: 2, FULL: 3}


@pytest.mark.parametrize("num_splits", [1, 2, 3, 7, 20])
@pytest.mark.parametrize("name", ["streaming", "head_window", "combined", "document"])
def test_splits_share_the_work_as_the_kernel_does(name, num_splits):
    family = next(f for f in MASKS if f.name == name)
    step, _ = step_of(family, 2, 4, 2, 1, 200, torch.tensor([200, 77]), num_splits=num_splits)
    for item in range(step.num_items):
        states, splits = step.blocks(item)
        assert torch.equal(splits >= 0, states >= PARTIAL)
        order = [*(states == FULL).nonzero()[:, 0], *(states == PARTIAL).nonzero()[:, 0]]
        assert [int(splits[block]) for block in order] == sorted(int(splits[block]) for block in order)
        shares = torch.bincount(splits[splits >= 0], minlength=num_splits)
        assert int(shares.max() - shares.min()) <= 1 and shares.sum() == step.work[item]
        assert shares.tolist() == sorted(shares.tolist(), reverse=True)


@pytest.mark.parametrize("window", [1, 7, 16, 17, 50, 1000])
def test_keys_read_by_a_window(window):
    kv_lens, block_n, num_kv_heads = [100, 64, 33, 1, 0], 16, 2
    inputs = make_inputs(5, 4, num_kv_heads, 1, 128, 16)
    found = explain(
        *inputs, mask_mod=mods.sliding_window(window), kv_lens=torch.tensor(kv_lens),
        options=DecodeOptions(block_n=block_n), device="H200",
    )  # fmt: skip
    expected = 0
    for length in kv_lens:
        first = max(0, length - window) // block_n * block_n
        expected += length - first
    assert found.step.keys_read() == num_kv_heads * expected
    assert found.read_bytes == num_kv_heads * expected * (16 + 16) * 4


def test_keys_that_sequences_share_are_counted_once():
    query = make_inputs(3, 2, 1, 1, 64, 16)[0]
    _, key, value = make_inputs(1, 2, 1, 1, 64, 16)
    options, kv_lens = DecodeOptions(block_n=16), torch.tensor([64, 16, 40])
    found = explain(
        query, key, value, mask_mod=mods.sliding_window(16), kv_lens=kv_lens, options=options, device="H200"
    )  # fmt: skip
    assert found.step.keys_read() == 16 + 16 + 24
    assert found.step.keys_read(shared=True) == 16 + 16 + 24  # [48, 64), [0, 16), [16, 40)
    assert found.cache_bytes == found.used_bytes == 64 * (16 + 16) * 4


def test_row_tiles_of_a_head_read_the_same_keys():
    inputs = make_inputs(1, 32, 1, 8, 256, 16, dtype=torch.float16)
    found = explain(*inputs, mask_mod=mods.causal(), device="H200")
    assert found.step.num_tiles == math.ceil(32 * 8 / found.schedule.tiles.block_m) > 1
    assert found.step.keys_read() == 256
    assert found.step.work.sum() > found.step.num_blocks


def test_q_offset_moves_the_window():
    inputs = make_inputs(2, 2, 1, 1, 128, 16)
    options = DecodeOptions(block_n=16)
    for offset, blocks in ((31, [1, 1]), (torch.tensor([31, 127]), [1, 7])):
        found = explain(*inputs, mask_mod=mods.sliding_window(16), q_offset=offset, options=options, device="H200")
        assert [(found.step.blocks(i)[0] == FULL).nonzero()[:, 0].tolist() for i in (0, 1)] == [[b] for b in blocks]


def test_a_score_that_hides_keys_bounds_the_step():
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx - kv_idx < 16, score, -float("inf"))

    inputs = make_inputs(1, 2, 1, 1, 128, 16)
    options = DecodeOptions(block_n=16)
    alone = explain(*inputs, score_mod, options=options, device="H200")
    both = explain(*inputs, score_mod, mods.sliding_window(64), options=options, device="H200")
    assert alone.step.work.tolist() == both.step.work.tolist() == [1]


@pytest.mark.parametrize("family", MASKS, ids=[family.name for family in MASKS])
def test_blocks_are_of_slots_and_masks_see_positions(family):
    B, Hq, Hkv, Q, N, block_n = 3, 4, 2, 2, 100, 16
    kv_lens, starts, offset = torch.tensor([100, 60, 3]), torch.tensor([-4, 21, 50]), torch.tensor([30, -21, 7])
    mask = family.make_mask_mod(B, Hq, N, Q, "cpu")
    options = DecodeOptions(block_n=block_n, num_splits=3)
    given = {"kv_lens": kv_lens, "kv_starts": starts, "kv_offset": offset}
    score = family.make_score_mod(B, Hq, N, Q, "cpu")
    step = explain(*make_inputs(B, Hq, Hkv, Q, N, 16), score, mask, **given, options=options, device="H200").step
    slots = torch.arange(step.num_blocks * block_n)
    for item in range(step.num_items):
        b = step.sequence(item)
        grid = torch.tensor([b]), torch.arange(Hq), offset[b] + kv_lens[b] - Q + torch.arange(Q), offset[b] + slots
        inside = (slots >= starts[b]) & (slots < kv_lens[b])
        heads = slice(item % Hkv * 2, item % Hkv * 2 + 2)
        pairs = (evaluate_mod(mask, grid)[0] & inside)[heads].reshape(-1, step.num_blocks, block_n)
        states, _ = step.blocks(item)
        needed, complete = pairs.any(2).any(0), pairs.all(2).all(0)
        assert not (needed & (states < PARTIAL)).any()
        assert not (~complete & (states == FULL)).any()
        assert torch.equal(states != UNUSED, inside.view(-1, block_n).any(1))
