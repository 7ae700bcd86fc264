"""BlockMasks through the kernel: their blocks, their masks and other masks beside them."""

import pytest
import torch
from interpret.decoding import check_decode, decode
from mask_families import documents, sliding_window
from support import assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import flex_decode, mods

B, HQ, HKV, N, D = 3, 4, 2, 96, 16


def checkered(b, h, q, k):
    """Whole blocks of 8 by 24, in another order for each sequence and head."""
    return (q // 8 * 5 + k // 24 * 3 + h + b) % 3 == 0


def mixed(b, h, q, k):
    """Dead, partial and full blocks."""
    return ((k // 16 + q // 16) % 3 == 0) | ((k // 16 % 3 == 1) & (k % 5 != 2))


MASKS = {
    "causal": mods.causal(), "window": sliding_window(20), "checkered": checkered, "mixed": mixed,
    "documents": documents(),
}  # fmt: skip
SIZES = [(128, 128), (8, 24), (32, 8), (5, 7)]  # positions per row and column


def check(inputs, mask_mod, block_mask, also=None, num_splits=1, **arguments):
    out, lse = decode(*inputs, mask_mod=also, block_mask=block_mask, num_splits=num_splits, **arguments)
    expected = mask_mod if also is None else mods.and_masks(mask_mod, also)
    assert_close_to_reference(out, lse, *inputs, mask_mod=expected, **arguments)
    on_cpu = flex_decode(*inputs, mask_mod=also, block_mask=block_mask, **arguments)
    assert_close_to_reference(on_cpu, None, *inputs, mask_mod=expected, **arguments)


@pytest.mark.parametrize("size", SIZES, ids=str)
@pytest.mark.parametrize("name", MASKS)
def test_a_mask_for_training_fits(name, size):
    mask_mod = MASKS[name]
    num_queries, num_splits = (1, 3) if (len(name) + size[1]) % 2 else (7, 1)  # of both kinds for each mask and size
    block_mask = create_block_mask(mask_mod, B, HQ, N, N, device="cpu", BLOCK_SIZE=size)
    inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
    for kv_lens in (None, torch.tensor([95, 64, 0])):
        check(inputs, mask_mod, block_mask, num_splits=num_splits, kv_lens=kv_lens)
    q_offset = torch.tensor([30, 0, 96 - num_queries])
    check(inputs, mask_mod, block_mask, num_splits=num_splits, q_offset=q_offset)


@pytest.mark.parametrize("batch, heads", [(None, None), (B, None), (None, HQ)])
def test_shared_by_sequences_or_heads(batch, heads):
    mask_mod = lambda b, h, q, k: mixed(b, h, q, k) & (k <= q)
    block_mask = create_block_mask(mask_mod, batch, heads, N, N, device="cpu", BLOCK_SIZE=(16, 32))
    check(make_inputs(B, HQ, HKV, 2, N, D), mask_mod, block_mask, num_splits=2)


@pytest.mark.parametrize("also", [mods.sliding_window(30), mods.streaming(3, 20), lambda b, h, q, k: k % 3 != 1])
def test_both_masks_hold(also):
    block_mask = create_block_mask(mixed, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    for num_queries in (1, 5):
        check(make_inputs(B, HQ, HKV, num_queries, N, D), mixed, block_mask, also, num_splits=3)


def test_with_a_score_mod():
    block_mask = create_block_mask(mixed, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    inputs, bias = make_inputs(B, HQ, HKV, 1, N, D), torch.randn(HQ, N)
    score_mod = lambda score, b, h, q, k: torch.where(k > 20, score + bias[h, k], -float("inf"))
    out, lse = decode(*inputs, score_mod, block_mask=block_mask, num_splits=2)
    assert_close_to_reference(out, lse, *inputs, score_mod, mixed)


def test_rows_for_the_newest_tokens():
    """FlexAttention's own numbering for decoding: the first query token is position 0."""
    shifted = lambda b, h, q, k: mixed(b, h, q + N - 2, k)
    block_mask = create_block_mask(shifted, None, None, 2, N, device="cpu", BLOCK_SIZE=16)
    check(make_inputs(B, HQ, HKV, 2, N, D), shifted, block_mask, q_offset=0)


def test_dead_blocks_are_not_read():
    """NaN in the keys and values of dead blocks: a read would show."""
    mask_mod = lambda b, h, q, k: (k // 16 == 1) | ((k // 16 == 4) & (k % 2 == 0))
    block_mask = create_block_mask(mask_mod, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    query, key, value = make_inputs(1, HQ, HKV, 1, N, D)
    expected = decode(query, key, value, block_mask=block_mask, num_splits=1)
    dead = torch.arange(N) // 16
    for tensor in (key, value):
        tensor[:, :, (dead != 1) & (dead != 4)] = torch.nan
    out, lse = decode(query, key, value, block_mask=block_mask, num_splits=1)
    assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


def test_rows_that_attend_to_nothing():
    """Of the mask, and of positions outside of it that the host does not know."""
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    block_mask = create_block_mask(lambda b, h, q, k: k > q + 200, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    out, lse = decode(*inputs, block_mask=block_mask, num_splits=2)
    assert (out == 0).all() and (lse == -torch.inf).all()
    check_decode(*inputs, mask_mod=mods.causal())


def test_lists_that_are_reassigned():
    """In each step, so that the memory of old ones is used again."""
    inputs = make_inputs(1, HQ, HKV, 1, N, D)
    block_mask = create_block_mask(lambda b, h, q, k: k // 16 == 0, None, None, N, N, device="cpu", BLOCK_SIZE=16)
    for step in range(6):
        block_mask.full_kv_indices = torch.full_like(block_mask.full_kv_indices, step % 4)
        out, lse = decode(*inputs, block_mask=block_mask, num_splits=2)
        assert_close_to_reference(out, lse, *inputs, mask_mod=lambda b, h, q, k, block=step % 4: k // 16 == block)
