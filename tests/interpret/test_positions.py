"""`kv_starts` and `kv_offset` through the kernel: mods see positions, dead slots are not read."""

import pytest
import torch
from interpret.decoding import check_decode, decode
from position_cases import (
    HKV,
    HQ,
    MASKS,
    D,
    N,
    bias,
    block_mask,
    cache,
    frames,
    positions,
    spoil_before,
)  # fmt: skip
from support import assert_close_to_reference, make_inputs

from flexdecode import mods

PAGE_SIZES = (None, 4, 32, None, 16)  # parts of a block, whole blocks
HALF = [(i, *frame, j) for i, frame in enumerate(frames()) for j in range(i % 2, len(MASKS), 2)]
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


@pytest.mark.parametrize("number, starts, offset, place", HALF, ids=str)
def test_frames_and_masks(number, starts, offset, place):
    """Half of all pairs of frames and masks; tests/unit has all of them on the torch backend."""
    name = [*MASKS][place]
    chosen = variants(number + place)
    inputs, arguments = cache(starts, chosen["page_size"], chosen["num_queries"], chosen["ragged"])
    arguments |= positions(starts, offset, chosen["first"], chosen["dtype"])
    if chosen["schedule"] == "split" or chosen["num_splits"] > 1:
        arguments |= {"schedule": chosen["schedule"], "num_splits": chosen["num_splits"]}
    score_mod = bias() if number % 2 else None
    check_decode(*inputs, score_mod, MASKS[name], **arguments)


@pytest.mark.parametrize("number, starts, offset", [(i, *frame) for i, frame in enumerate(frames())], ids=str)
@pytest.mark.parametrize("turn", [0, 1])
def test_block_masks(turn, number, starts, offset):
    size = [(16, 16), (50, 24), (8, 32), (7, 5)][(number + 2 * turn) % 4]
    chosen = variants(number)
    first = "newest" if chosen["first"] == "newest" and offset != "ends" else "number"  # others are refused
    name = ("squares", "causal", "window")[(number + size[0]) % 3]
    also = MASKS["streaming"] if number % 4 == 3 else None
    mask, same = block_mask(MASKS[name], size)
    inputs, arguments = cache(starts, chosen["page_size"], chosen["num_queries"], chosen["ragged"])
    arguments |= positions(starts, offset, first, chosen["dtype"])
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


def test_offsets_beyond_the_limit_are_clamped(monkeypatch):
    """On a GPU, offsets are not checked unless `options.debug` is set."""
    (query, key, value), arguments = cache("none")
    score_mod = lambda score, b, h, q, k: score + (k % 7).float()
    near, far = torch.tensor([2**30, -(2**30), 3, 2**30]), torch.tensor([2**31, -(2**40), 3, 2**62])
    expected = decode(query, key, value, score_mod, kv_offset=near, **arguments)
    monkeypatch.setattr("flexdecode.runtime.plan.check_all_lens", lambda *_: None)
    for one, other in zip(decode(query, key, value, score_mod, kv_offset=far, **arguments), expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("num_queries", [1, 3])
def test_left_padding_changes_nothing(num_queries):
    """`kv_offset=-kv_starts`: the result of each sequence is that of its live rows alone."""
    (query, key, value), arguments = cache("padded", num_queries=num_queries)
    mods_of = bias(), mods.sliding_window(9)
    out, lse = decode(query, key, value, *mods_of, **arguments, **positions("padded", "from_start"))
    for b, start, length in ((0, 7, 90), (1, 32, 33)):
        live = key[b : b + 1, :, start:length], value[b : b + 1, :, start:length]
        alone = decode(query[b : b + 1], *live, *mods_of)
        for one, other in zip((out[b], lse[b]), alone, strict=True):
            torch.testing.assert_close(one, other[0])


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
