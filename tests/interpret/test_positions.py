"""`kv_starts` and `kv_offset` through the kernel: mods see positions, dead slots are not read."""

import itertools

import pytest
import torch
from interpret.decoding import check_decode, decode
from position_cases import (
    B, D, HKV, HQ, LENS, MASKS, N, bias, block_mask, cache, frames, positions, spoil_before,
)  # fmt: skip
from support import assert_close_to_reference, make_inputs

from flexdecode import mods

PAGE_SIZES = (None, 4, 32, None, 16)  # parts of a block, whole blocks
FIRSTS = ("newest", "given", "newest", "number")


def variants(number):
    """The other properties of a call, all crossed with all over the numbers."""
    return {
        "page_size": PAGE_SIZES[number % 5],
        "first": FIRSTS[number % 4],
        "num_queries": (1, 3)[number // 2 % 2],
        "ragged": number % 7 in (2, 5),
        "dtype": (torch.int32, torch.int64)[number % 2],
        "schedule": ("split", "balanced")[number // 3 % 2],
        "num_splits": (3, 1, 2)[number % 3],
    }


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("number, frame", [*enumerate(frames())], ids=str)
def test_frames_and_masks(number, frame, name):
    starts, offset = frame
    chosen = variants(number + [*MASKS].index(name))
    inputs, arguments = cache(starts, chosen["page_size"], chosen["num_queries"], chosen["ragged"])
    arguments |= positions(starts, offset, chosen["first"], chosen["dtype"])
    if chosen["schedule"] == "split" or chosen["num_splits"] > 1:
        arguments |= {"schedule": chosen["schedule"], "num_splits": chosen["num_splits"]}
    score_mod = bias() if number % 2 else None
    check_decode(*inputs, score_mod, MASKS[name], **arguments)


@pytest.mark.parametrize("size", [(16, 16), (8, 32), (50, 24), (7, 5)], ids=str)
@pytest.mark.parametrize("number, frame", [*enumerate(frames())], ids=str)
def test_block_masks(number, frame, size):
    starts, offset = frame
    chosen = variants(number)
    name = ("squares", "causal", "window")[(number + size[0]) % 3]
    also = MASKS["streaming"] if number % 4 == 3 else None
    mask, same = block_mask(MASKS[name], size)
    inputs, arguments = cache(starts, chosen["page_size"], chosen["num_queries"], chosen["ragged"])
    arguments |= positions(starts, offset, "newest" if offset == "ends" else chosen["first"], chosen["dtype"])
    out, lse = decode(*inputs, None, also, block_mask=mask, num_splits=chosen["num_splits"], **arguments)
    expected = same if also is None else mods.and_masks(same, also)
    assert_close_to_reference(out, lse, *inputs, None, expected, **arguments)


@pytest.mark.parametrize("offset", [-16, -5, 0, 3, 32])
def test_dead_blocks_of_a_block_mask_are_not_read(offset):
    """NaN in every block of slots that meets no live block of the mask."""
    keep = lambda b, h, q, k: (k // 16 == 1) | ((k // 16 == 4) & (k % 2 == 0))
    mask, same = block_mask(keep, 16, 128)
    query, key, value = make_inputs(1, HQ, HKV, 1, N, D)
    arguments = {"kv_offset": offset, "q_offset": 5}
    expected = decode(query, key, value, block_mask=mask, num_splits=1, **arguments)
    assert_close_to_reference(*expected, query, key, value, None, same, **arguments)
    block = torch.arange(N) // 16
    live = [bool({1, 4} & {(16 * b + offset) // 16, (16 * b + offset + 15) // 16}) for b in range(N // 16)]
    dead = ~torch.tensor(live)[block]
    assert dead.any()
    for tensor in (key, value):
        tensor[:, :, dead] = torch.nan
    for one, other in zip(decode(query, key, value, block_mask=mask, num_splits=1, **arguments), expected, strict=True):
        assert torch.equal(one, other)


def test_full_blocks_of_a_block_mask_evaluate_no_mask():
    """Lists that say full where the mask function says never: what attends without it is in full blocks of slots."""
    for offset, slots in ((0, range(32, 80)), (16, range(16, 64)), (5, range(32, 64)), (-5, range(48, 80))):
        mask, _ = block_mask(lambda b, h, q, k: (k >= 32) & (k < 80), 16, 128)
        query, key, value = make_inputs(1, HQ, HKV, 1, N, D)
        score_mod = lambda score, b, h, q, k: score * 0.0
        _, lse = decode(query, key, value, score_mod, block_mask=mask, kv_offset=offset, q_offset=5, num_splits=1)
        assert lse.exp().allclose(torch.tensor(48.0))
        assert len(slots) >= 32


@pytest.mark.parametrize("schedule", ["split", "balanced"])
@pytest.mark.parametrize("sinks", [None, torch.tensor([0.5, -1.0, 2.0, 0.0])], ids=["plain", "sinks"])
def test_empty_sequences(schedule, sinks):
    (query, key, value), arguments = cache("none")
    arguments["kv_starts"] = torch.tensor([90, 100, 0, 2**31 - 1])
    spoil_before(key, [N, N, 0, N])
    spoil_before(value, [N, N, 0, N])
    out, lse = check_decode(query, key, value, schedule=schedule, sinks=sinks, **arguments)
    empty = torch.tensor([True, True, False, True])
    assert (out[empty] == 0).all()
    assert torch.equal(lse[empty, :, 0], (torch.full((HQ,), -torch.inf) if sinks is None else sinks).expand(3, HQ))


def test_offsets_beyond_the_limit_are_clamped():
    """The kernel cannot refuse them. Debug and tensors on the CPU are refused, so this hides where the tensor is."""
    (query, key, value), arguments = cache("none")
    score_mod = lambda score, b, h, q, k: score + (k % 7).float()
    near = torch.tensor([2**30, -(2**30), 3, 2**30])
    far = torch.tensor([2**31, -(2**40), 3, 2**62])
    expected = decode(query, key, value, score_mod, kv_offset=near, **arguments)
    offset = near.clone()
    decode(query, key, value, score_mod, kv_offset=offset, **arguments)
    from unittest.mock import patch

    with patch("flexdecode.runtime.plan.check_all_lens"):
        actual = decode(query, key, value, score_mod, kv_offset=far, **arguments)
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("starts, offset", itertools.product(["padded", "none"], ["from_start", "none"]))
def test_the_first_token_counts_from_the_first_live_slot(starts, offset):
    """Left padding: the result is that of sequences without padding."""
    if starts == offset == "none":
        pytest.skip("nothing to compare")
    inputs, arguments = cache(starts)
    check_decode(*inputs, bias(), mods.sliding_window(9), **arguments, **positions(starts, offset))


def test_a_batch_of_many_sequences_in_chunks():
    """More sequences than the balanced schedule counts at once."""
    many = 300
    query, key, value = make_inputs(many, 2, 1, 1, 32, D)
    lens, starts = torch.arange(many) % 33, torch.arange(many) * 7 % 40
    offset = torch.arange(many) - 150
    spoil_before(key, starts.tolist())
    spoil_before(value, starts.tolist())
    check_decode(
        query, key, value, None, MASKS["between"], kv_lens=lens, kv_starts=starts, kv_offset=offset, schedule="balanced"
    )


def test_lengths():
    assert len(LENS) == B
