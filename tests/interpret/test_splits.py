"""How the KV cache is cut into splits and blocks does not show in the result."""

import pytest
import torch
from interpret.decoding import check_decode, decode
from support import make_inputs

from flexdecode import mods

B, HQ, HKV, Q, N, D = 4, 4, 2, 2, 53, 16
KV_LENS = torch.tensor([53, 17, 1, 0])  # with 7 splits of blocks of 16 keys, most splits of the last three are empty


def bias(score, b, h, q_idx, kv_idx):
    return score * (1 + h % 3) - 0.1 * (q_idx - kv_idx)


@pytest.mark.parametrize("mask_mod", [None, mods.sliding_window(9)], ids=["no_mask", "window"])
@pytest.mark.parametrize("block_n", [16, 32, 64])
@pytest.mark.parametrize("num_splits", [1, 2, 3, 7])
def test_splits_and_blocks(num_splits, block_n, mask_mod):
    inputs = make_inputs(B, HQ, HKV, Q, N, D)
    check_decode(*inputs, bias, mask_mod, num_splits=num_splits, block_n=block_n, kv_lens=KV_LENS)


def test_blocks_longer_than_the_cache():
    check_decode(*make_inputs(B, HQ, HKV, Q, N, D), bias, block_n=256, num_splits=2)


def test_the_schedule_chooses():
    check_decode(*make_inputs(1, 2, 1, 1, 300, D), bias, block_n=None, num_splits=None)


@pytest.mark.parametrize("num_splits", [31, 32, 33, 70])
def test_more_splits_than_the_combine_reads_at_a_time(num_splits):
    """It reads 32 partials at a time; there are 70 blocks."""
    check_decode(*make_inputs(1, 2, 1, 1, 70 * 16, D), bias, num_splits=num_splits)


def test_one_block_per_split_with_all_but_one_masked():
    """Only the split in the middle holds a live key."""

    def one_key(b, h, q_idx, kv_idx):
        return kv_idx == 24

    check_decode(*make_inputs(1, 2, 1, 1, N, D), bias, one_key, num_splits=4)


@pytest.mark.parametrize("num_splits", [1, 4])
def test_no_live_key_at_all(num_splits):
    out, lse = check_decode(*make_inputs(2, 2, 1, 1, N, D), mask_mod=mods.or_masks(), num_splits=num_splits)
    assert (out == 0).all() and (lse == -torch.inf).all()


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's maximum of a row
def test_what_an_earlier_call_left_in_the_workspace_is_not_seen():
    inputs = make_inputs(B, HQ, HKV, Q, N, D)

    def nan(score, b, h, q_idx, kv_idx):
        return score * float("nan")

    clean = decode(*inputs, bias, num_splits=5, kv_lens=KV_LENS)
    assert decode(*inputs, nan, num_splits=7)[0].isnan().all()
    again = decode(*inputs, bias, num_splits=5, kv_lens=KV_LENS)
    assert torch.equal(clean[0], again[0]) and torch.equal(clean[1], again[1])
