"""The kernel walks over the live blocks of a mask: none is dropped, none is visited twice, no other one is read."""

import sys

import pytest
import torch
from interpret.decoding import check_decode, decode
from support import MODS, make_inputs

from flexdecode import mods
from flexdecode.reference import evaluate_mod

B, HQ, HKV, N, D, BLOCK_N = 3, 4, 2, 85, 16, 16
KV_LENS = torch.tensor([85, 33, 2])

FAR = torch.tensor([2**62, -(2**62), 2**63 - 1, -(2**63)])
STARTS = torch.tensor([70, 5, 40, 20])
FLAGS = torch.tensor([True, False, True])

MASKS = {
    "all": lambda b, h, q, k: k >= 0,
    "none": lambda b, h, q, k: k < 0,
    "one_key": lambda b, h, q, k: k == 31,
    "last_key_of_a_block": lambda b, h, q, k: (k == 15) | (k == 47),
    "two_intervals_in_one_block": lambda b, h, q, k: (k < 3) | ((k > 7) & (k < 12)),
    "overlapping_intervals": lambda b, h, q, k: (k < 40) | ((k > 20) & (k <= 60)) | ((k >= 60) & (k < 61)),
    "four_intervals_out_of_order": lambda b, h, q, k: (
        ((k > 65) & (k < 69)) | (k < 2) | ((k > 40) & (k < 52)) | ((k > 17) & (k < 20))
    ),
    "five_intervals": lambda b, h, q, k: (k < 1) | (k == 17) | (k == 33) | (k == 49) | (k > 80),
    "empty_interval": lambda b, h, q, k: ((k > 50) & (k < 30)) | (k == q),
    "everything_but_an_interval": lambda b, h, q, k: ~((k > 10) & (k < 60)),
    "per_head_intervals": lambda b, h, q, k: (k >= STARTS[h]) & (k < STARTS[h] + 9),
    "half_of_the_heads": lambda b, h, q, k: (h % 2 == 1) & (k <= q) & (k > q - 20),
    "one_row_only": lambda b, h, q, k: (h == 2) & (k == q),
    "one_sequence_only": lambda b, h, q, k: FLAGS[b] & (k < 50),
    "sequence_or_window": lambda b, h, q, k: FLAGS[b] | (q - k < 3),
    "far_captured_bounds": lambda b, h, q, k: (k < FAR[0]) & (k - q > FAR[1]) & (k + 1 < FAR[2]) & (q - k > FAR[3]),
    "no_window_on_either_side": lambda b, h, q, k: (k - sys.maxsize < q) & (k < q + sys.maxsize - 200),
    "negative_coefficient": lambda b, h, q, k: 100 - 3 * k > 2 * q - 90,
    "strict_and_not": lambda b, h, q, k: ~(k > q) & ~(q - k >= 30) & (k != q - 5),
    "chunks_of_the_past": lambda b, h, q, k: (q // 20 - k // 20 <= 1) & (k <= q),
    "every_third": lambda b, h, q, k: (k % 3 == 0) & (k <= q),
    "exclusive_or": lambda b, h, q, k: (k < 30) ^ (k <= q - 30),
    "equal_conditions": lambda b, h, q, k: (k < 30) == (q < 30),
    "choice": lambda b, h, q, k: torch.where(h < 2, k < 20, k > 60),
    "bounds_from_min_and_max": lambda b, h, q, k: (k >= torch.minimum(q, STARTS[h])) & (k < torch.clamp(q, 10, 50)),
    "half_integers": lambda b, h, q, k: (k.float() < 20.5) | (k * 0.5 > 40.0),
}


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("mask", MASKS)
def test_masks(mask, num_queries, num_splits):
    inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
    check_decode(*inputs, mods.alibi(HQ), MASKS[mask], num_splits=num_splits, kv_lens=KV_LENS)


@pytest.mark.parametrize("q_offset", [0, 40, 84, 200, -3])
@pytest.mark.parametrize("mask", [mods.causal(), mods.streaming(3, 20), mods.chunked(24)], ids=lambda m: m.__name__)
def test_queries_anywhere(mask, q_offset):
    check_decode(*make_inputs(1, 2, 1, 5, N, D), mask_mod=mask, q_offset=q_offset, num_splits=2)


def windowed_score(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx - kv_idx < 30, score, -float("inf"))


@pytest.mark.parametrize("mask", [None, "overlapping_intervals", "strict_and_not", "none"])
def test_a_score_that_hides_keys_beside_a_mask(mask):
    inputs = make_inputs(B, HQ, HKV, 5, N, D)
    check_decode(*inputs, windowed_score, MASKS.get(mask), num_splits=3, kv_lens=KV_LENS)


SOLVED = [
    "causal", "window", "streaming", "prefix_lm", "chunked", "document_offsets", "document_start", "head_window",
    "block_diffusion", "masking_score",
]  # fmt: skip


@pytest.mark.parametrize("num_queries", [1, 2])
@pytest.mark.parametrize("mods", [m for m in MODS if m.name in SOLVED], ids=lambda m: m.name)
def test_dead_blocks_are_not_read(mods, num_queries):
    """NaN in all blocks where no row of the tile attends leaves no trace; a read would, because 0 * NaN is NaN."""
    query, key, value = make_inputs(B, HQ, HKV, num_queries, N, D)
    score_mod, mask_mod = (make(B, HQ, N, num_queries, "cpu") for make in (mods.make_score_mod, mods.make_mask_mod))
    q_offset = 60
    grid = torch.arange(B), torch.arange(HQ), q_offset + torch.arange(num_queries), torch.arange(N)
    if mask_mod is None:
        live = evaluate_mod(score_mod, grid, torch.zeros(B, HQ, num_queries, N)) > -torch.inf
    else:
        live = evaluate_mod(mask_mod, grid)
    live = live.reshape(B, HKV, -1, N).any(dim=2)
    blocks = torch.nn.functional.pad(live, (0, -N % BLOCK_N)).unflatten(-1, (-1, BLOCK_N)).any(-1)
    assert not blocks.all(), "this mask has no dead block"

    expected = decode(query, key, value, score_mod, mask_mod, q_offset=q_offset, num_splits=2)
    dead = ~blocks.repeat_interleave(BLOCK_N, dim=-1)[..., :N]
    key[dead] = torch.nan
    value[dead] = torch.nan
    actual = decode(query, key, value, score_mod, mask_mod, q_offset=q_offset, num_splits=2)
    assert torch.equal(actual[0], expected[0]) and torch.equal(actual[1], expected[1])
