"""`kv_starts` and `kv_offset` on the torch backend: frames of positions, refusals, what `explain` says."""

import re

import numpy as np
import pytest
import torch
from position_cases import (
    FIRSTS,
    LENS,
    MASKS,
    OFFSETS,
    STARTS,
    B,
    bias,
    block_mask,
    cache,
    frames,
    per_sequence,
    positions,
    spoil_before,
)
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, FlexDecodeError, KVCache, PagedKVCache, cache_info, explain, flex_decode, mods

LIMIT = 2**30
QUERY, KEY, VALUE = make_inputs(2, 4, 2, 3, 11, 16)


def check(inputs, score_mod=None, mask_mod=None, **arguments):
    out, lse = flex_decode(*inputs, score_mod, mask_mod, return_lse=True, **arguments)
    assert_close_to_reference(out, lse, *inputs, score_mod, mask_mod, **arguments)
    return out, lse


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("starts, offset", frames())
def test_frames_and_masks(starts, offset, name):
    for number, (page_size, ragged, first) in enumerate(
        [(None, False, "newest"), (4, True, "newest"), (32, False, "given"), (None, True, "number")]
    ):
        inputs, arguments = cache(starts, page_size, 1 + number % 2 * 2, ragged)
        arguments |= positions(starts, offset, first, (torch.int32, torch.int64)[number % 2])
        check(inputs, bias() if number % 2 else None, MASKS[name], **arguments)


@pytest.mark.parametrize("size", [(16, 16), (50, 24)], ids=str)
@pytest.mark.parametrize("starts, offset", frames())
def test_block_masks(starts, offset, size):
    mask, same = block_mask(MASKS["squares"], size)
    inputs, arguments = cache(starts, 4, 3)
    arguments |= positions(starts, offset, "number" if offset == "ends" else "newest")
    out, lse = flex_decode(*inputs, block_mask=mask, return_lse=True, **arguments)
    assert_close_to_reference(out, lse, *inputs, None, same, **arguments)


@pytest.mark.parametrize("name", FIRSTS)
def test_a_mod_sees_positions(name):
    """Scores that are the positions themselves: the log-sum-exp is their sum, independent of the reference."""
    inputs, arguments = cache("padded")
    arguments |= positions("padded", "dropped", name)
    inputs = (torch.zeros_like(inputs[0]), *inputs[1:])
    score_mod = lambda score, b, h, q, k: 0.1 * (k - 60).float() - 0.01 * q
    lse = flex_decode(*inputs, score_mod, return_lse=True, **arguments)[1]
    for b, (start, offset, length) in enumerate(zip(STARTS["padded"], OFFSETS["dropped"], LENS, strict=True)):
        k = torch.arange(start, max(start, length)) + offset
        given = FIRSTS[name]
        q = offset + length - 1 if given is None else given if isinstance(given, int) else given[b]
        expected = (0.1 * (k - 60).double() - 0.01 * q).logsumexp(0)
        torch.testing.assert_close(lse[b].double(), expected.expand(4, 1), rtol=1e-5, atol=1e-5)


def test_numbers_of_any_kind_for_all():
    expected = flex_decode(QUERY, KEY, VALUE, bias(), kv_starts=torch.tensor([2, 2]), kv_offset=torch.tensor([5, 5]))
    for make in (int, np.int64, torch.tensor, lambda x: torch.tensor(x, dtype=torch.int32)):
        out = flex_decode(QUERY, KEY, VALUE, bias(), kv_starts=make(2), kv_offset=make(5))
        assert torch.equal(out, expected)
    for number in (11, 2**62, 2**80):
        assert (flex_decode(QUERY, KEY, VALUE, kv_starts=number) == 0).all()
    assert torch.equal(flex_decode(QUERY, KEY, VALUE, kv_starts=-(2**80)), flex_decode(QUERY, KEY, VALUE))


def test_an_offset_is_a_run_time_number():
    flex_decode(QUERY, KEY, VALUE, bias(), mods.causal(), kv_offset=5)
    before = cache_info()
    flex_decode(QUERY, KEY, VALUE, bias(), mods.causal(), kv_offset=-900)
    after = cache_info()
    assert (after.traces, after.hits) == (before.traces, before.hits + 1)


def test_strided_tensors():
    wide = torch.tensor([[1, 4], [-1, 3]])
    given = {"kv_starts": wide[:, 1], "kv_offset": wide[:, 0]}
    check((QUERY, KEY, VALUE), bias(), mods.causal(), **given)


@pytest.mark.parametrize("kind", [KVCache, PagedKVCache])
def test_beside_a_cache(kind):
    made = {"num_pages": 12, "page_size": 4} if kind is PagedKVCache else {"max_kv_len": 24}
    filled = kind(batch=2, num_kv_heads=2, head_dim=16, dtype=torch.float32, **made)
    filled.append(KEY, VALUE, num_tokens=[11, 6])
    given = {"kv_starts": torch.tensor([3, 8]), "kv_offset": torch.tensor([-3, 40])}
    out, lse = flex_decode(QUERY, cache=filled, mask_mod=mods.sliding_window(5), return_lse=True, **given)
    given["kv_lens"] = torch.tensor([11, 6])
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, None, mods.sliding_window(5), **given)


# --- Refusals ---------------------------------------------------------------------------------------------------------


def refused(error, message, **arguments):
    """Twice, because what has failed once must not be remembered as good."""
    for _ in range(2):
        with pytest.raises(error, match=f"^{re.escape(message)}$"):
            flex_decode(QUERY, KEY, VALUE, **arguments)


@pytest.mark.parametrize("name", ["kv_starts", "kv_offset"])
def test_wrong_shapes_dtypes_and_devices(name):
    refused(ValueError, f"`{name}` must have shape [B] = [2], got [3]", **{name: torch.tensor([1, 2, 3])})
    refused(ValueError, f"`{name}` must have shape [B] = [2], got [2, 1]", **{name: torch.tensor([[1], [2]])})
    for dtype in (torch.int16, torch.float32, torch.bool):
        message = f"`{name}` must be int32 or int64, got {dtype}"
        refused(ValueError, message, **{name: torch.ones(2, dtype=dtype)})
    message = f"`{name}` must be on the device of `query`, cpu, got meta"
    refused(ValueError, message, **{name: torch.ones(2, dtype=torch.int32, device="meta")})


@pytest.mark.parametrize("given", [1.0, True, [1, 2], "3"], ids=str)
def test_wrong_types(given):
    kind = type(given).__name__
    refused(TypeError, f"`kv_starts` must be an integer or an int32 or int64 tensor [B], got {kind}", kv_starts=given)
    refused(TypeError, f"`kv_offset` must be an integer or an integer tensor [B], got {kind}", kv_offset=given)


def test_offsets_beyond_the_limit():
    form = f"`kv_offset` must lie between {-LIMIT} and {LIMIT}, got {{}}"
    flex_decode(QUERY, KEY, VALUE, kv_offset=LIMIT)  # a known call with another number
    flex_decode(QUERY, KEY, VALUE, kv_offset=torch.tensor([LIMIT, -LIMIT]))
    for number in (LIMIT + 1, -LIMIT - 1, 2**70):
        refused(ValueError, form.format(number), kv_offset=number)
    refused(ValueError, form.format(f"{-LIMIT - 1} to 3"), kv_offset=torch.tensor([3, -LIMIT - 1]))
    refused(ValueError, form.format(f"0 to {2**62}"), kv_offset=torch.tensor([2**62, 0]))
    refused(ValueError, form.format(f"{LIMIT + 1}"), kv_offset=torch.tensor(LIMIT + 1))


def test_the_torch_backend_clamps_what_it_does_not_check(monkeypatch):
    """On a GPU, offsets are checked with `options.debug` only."""
    score_mod = bias()
    near = flex_decode(QUERY, KEY, VALUE, score_mod, kv_offset=torch.tensor([LIMIT, -LIMIT]))
    monkeypatch.setattr("flexdecode.runtime.plan.check_all_lens", lambda *_: None)
    far = flex_decode(QUERY, KEY, VALUE, score_mod, kv_offset=torch.tensor([2**40, -(2**62)]))
    assert torch.equal(far, near)


def test_starts_of_any_size_are_allowed():
    """A sequence whose start reaches its length is empty."""
    starts = torch.tensor([2**62, -(2**62)])
    out, lse = check((QUERY, spoil_before(KEY.clone(), [11, 0]), VALUE), kv_starts=starts, kv_lens=torch.tensor([4, 7]))
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all() and (out[1] != 0).all()


def test_a_block_mask_that_does_not_cover_the_positions():
    mask, _ = block_mask(mods.causal(), 16, 20)
    message = "`block_mask` covers 20 keys, but the cache has keys to position 20"
    refused(ValueError, message, block_mask=mask, kv_offset=10)
    flex_decode(QUERY, KEY, VALUE, block_mask=mask, kv_offset=9)
    message = (
        "`block_mask` covers query positions 0 to 19, but the call has 7 to 20: make it for the whole sequence, as in "
        "training, or pass q_offset=0 if its rows are the newest tokens"
    )
    refused(ValueError, message, block_mask=mask, kv_offset=torch.tensor([10, -1]))


def test_debug_names_the_position():
    table = torch.zeros(11)
    options = DecodeOptions(debug=True)
    with pytest.raises(FlexDecodeError, match=r"kv_idx = 11, which attends, the index is \[11\]"):
        flex_decode(QUERY, KEY, VALUE, lambda s, b, h, q, k: s + table[k], kv_offset=5, options=options)


# --- explain ----------------------------------------------------------------------------------------------------------


def explained(mask_mod, **arguments):
    options = DecodeOptions(block_n=16, num_splits=1)
    inputs = make_inputs(B, 4, 2, 1, 96, 16)
    return explain(*inputs, mask_mod=mask_mod, kv_lens=per_sequence(LENS), options=options, device="H200", **arguments)


def test_explain_speaks_of_positions():
    window = mods.sliding_window(20)
    both = positions("padded", "from_start")
    assert explained(window, **both).mask_mod.live == (
        "kv in [max(kv_offset + kv_start, q_idx - window + 1), q_idx + 1)",
    )
    padded = {"kv_starts": both["kv_starts"]}
    assert explained(window, **padded).mask_mod.live == ("kv in [max(kv_start, q_idx - window + 1), q_idx + 1)",)
    shifted = explained(lambda b, h, q, k: (k >= 0) | (k < -9), kv_offset=-20).mask_mod
    assert shifted.live == ("kv in [kv_offset, -9)", "kv in [max(0, kv_offset), kv_offset + kv_len)")
    assert not explained(lambda b, h, q, k: k % 3 == 0, kv_offset=-20).mask_mod.solved


def test_explain_counts_blocks_of_slots():
    """Sequences of 90, 33, 96 and 40 slots that start at 7, 32, 41 and 45: 6, 1, 4 and 0 blocks of 16."""
    found = explained(None, **positions("padded", "dropped"))
    assert found.step.counts == {1: 0, 2: 2 * 4, 3: 2 * 7}
    assert found.used_bytes == found.read_bytes == (83 + 1 + 55) * 2 * 2 * 16 * 4
    assert "in use    34.8 KiB" in str(found)


def test_explain_on_the_meta_device(tmp_path):
    query, key, value = (x.to("meta") for x in (QUERY, KEY, VALUE))
    there = torch.ones(2, dtype=torch.int32, device="meta")
    assert "`kv_starts` is on the meta device" in str(explain(query, key, value, kv_starts=there, device="H200"))
    assert "`kv_offset` is on the meta device" in str(explain(query, key, value, kv_offset=there, device="H200"))
    known = explain(query, key, value, kv_starts=3, kv_offset=torch.tensor([5, -3]), device="H200")
    assert known.step.starts.tolist() == [3, 3]
    pytest.importorskip("matplotlib")
    known.save_picture(tmp_path / "step.svg")
    assert "outside the sequence" in re.sub(r"\s+", " ", (tmp_path / "step.svg").read_text())
