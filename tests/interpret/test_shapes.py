"""Sizes and layouts through the generated kernel, with mods that need every index to be right."""

import pytest
import torch
from interpret.decoding import check_decode
from support import make_inputs

from flexdecode import mods


def position_score(score, b, h, q_idx, kv_idx):
    """Another number for every (b, h, q_idx, kv_idx)."""
    return score + torch.sin(0.7 * b + 1.3 * h + 2.1 * q_idx + 3.7 * kv_idx)


def check(*shape, num_splits=2, mask_mod=None, **how):
    check_decode(*make_inputs(*shape, **how), position_score, mask_mod or mods.causal(), num_splits=num_splits)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 6, 7, 8, 12, 16, 32, 71])
def test_group_sizes(group_size, dtype):
    check(2, 2 * group_size, 2, 1, 20, 16, dtype=dtype)


@pytest.mark.parametrize("num_queries", [1, 2, 3, 5, 17, 64, 128])
def test_query_lengths(num_queries):
    """Packed rows fill up to five tiles."""
    check(1, 2, 2, num_queries, 140, 16)


@pytest.mark.parametrize(("group_size", "num_queries"), [(3, 5), (7, 11), (5, 40), (71, 2)])
def test_packed_rows(group_size, num_queries):
    """Rows of several heads share a tile, and heads cross from one tile to the next."""
    check(1, 2 * group_size, 2, num_queries, 45, 16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [1, 2, 7, 16, 17, 31, 59, 64, 80, 96, 121, 128, 256, 577, 640, 1000, 1024])
def test_head_dims(head_dim, dtype):
    check(1, 3, 1, 2, 20, head_dim, dtype=dtype)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim"),
    [
        (64, 16),
        (16, 64),
        (59, 121),
        (256, 17),
        (24, 200),
        (1, 1024),
        (1024, 1),
        (2, 31),
        (7, 577),
        (640, 2),
        (577, 512),
    ],
)
def test_another_head_dim_for_the_value(head_dim, v_head_dim):
    check(2, 4, 2, 1, 20, head_dim, v_head_dim)


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_keys", [0, 1, 15, 16, 17, 127, 128, 129, 300])
def test_numbers_of_keys(num_keys, num_splits):
    check(2, 2, 1, 1, num_keys, 16, num_splits=num_splits)


@pytest.mark.parametrize("shape", [(0, 4, 2, 1, 20, 16), (2, 4, 2, 0, 20, 16), (2, 0, 2, 1, 20, 16)])
def test_nothing_to_do(shape):
    out, lse = check_decode(*make_inputs(*shape))
    assert out.numel() == lse.numel() == 0


LAYOUTS = ["bhnd", "bnhd", "strided"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("kv_layout", LAYOUTS)
@pytest.mark.parametrize("q_layout", LAYOUTS)
def test_layouts(q_layout, kv_layout, dtype):
    query = make_inputs(2, 6, 2, 3, 20, 17, dtype=dtype, layout=q_layout)[0]
    key, value = make_inputs(2, 6, 2, 3, 20, 17, dtype=dtype, layout=kv_layout)[1:]
    check_decode(query, key, value, position_score, mods.causal(), num_splits=2)


def test_key_and_value_of_different_layouts():
    query, key, _ = make_inputs(2, 6, 2, 3, 20, 16, layout="bnhd")
    value = make_inputs(2, 6, 2, 3, 20, 16, 32, layout="strided")[2]
    check_decode(query, key, value, position_score, mods.causal(), num_splits=2)


def test_key_and_value_interleaved_in_one_tensor():
    query, key, value = make_inputs(2, 4, 2, 1, 20, 16)
    cache = torch.stack([key, value], dim=2)
    check_decode(query, cache[:, :, 0], cache[:, :, 1], position_score)


@pytest.mark.parametrize("broadcast", [lambda x: x[:1], lambda x: x[:1].expand(3, -1, -1, -1)], ids=["one", "expanded"])
def test_key_and_value_shared_by_the_batch(broadcast):
    query, key, value = make_inputs(3, 4, 2, 2, 20, 16)
    check_decode(query, broadcast(key), broadcast(value), position_score, kv_lens=torch.tensor([20, 3, 0]))


def test_heads_and_tokens_of_stride_zero():
    """One head, or one token, seen many times."""
    query, key, value = make_inputs(2, 4, 2, 2, 20, 16)
    check_decode(query, key[:, :1].expand_as(key), value[:, :, :1].expand_as(value), position_score)


def test_a_batch_of_one_sequence():
    check(1, 4, 2, 1, 20, 16, num_splits=3)
