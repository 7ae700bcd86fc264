"""Arguments of a call, and values that must not spread: through the generated kernel."""

import math
import sys

import pytest
import torch
from interpret.decoding import check_decode, decode
from support import make_inputs

from flexdecode import DecodeOptions, FlexDecodeError, flex_decode, mods
from flexdecode.reference import reference_decode

B, HQ, HKV, Q, N, D = 2, 4, 2, 2, 37, 16
SPLITS = pytest.mark.parametrize("num_splits", [1, 3])


def inputs(**how):
    return make_inputs(B, HQ, HKV, Q, N, D, **how)


# --- Arguments --------------------------------------------------------------------------------------------------------


def test_bfloat16_is_refused_where_it_would_be_wrong():
    with pytest.raises(ValueError, match="`query` is bfloat16, which Triton's interpreter computes wrongly"):
        decode(*inputs(dtype=torch.bfloat16))


@pytest.mark.parametrize("scale", [None, 1.0, 0.0, -0.5, 2, 1e-4])
def test_scale(scale):
    check_decode(*inputs(), mods.softcap(3.0), scale=scale)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_lengths_and_offsets_of_both_integer_types_and_any_stride(dtype):
    kv_lens = torch.tensor([20, -1, 7], dtype=dtype)[::2]
    q_offset = torch.tensor([18, 0, 0, 30], dtype=dtype)[::3]
    check_decode(*inputs(), mods.alibi(HQ), mods.causal(), kv_lens=kv_lens, q_offset=q_offset)


@pytest.mark.parametrize("q_offset", [2**40, -(2**40), 0, N, -1])
def test_far_offsets(q_offset):
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + torch.where(q_idx - kv_idx < 2**40 - 20, 0.25, 0.5) * (q_idx // 2**38)

    check_decode(*inputs(), score_mod, mods.not_mask(mods.dilated(2**20, 3)), q_offset=q_offset)


def test_offsets_of_a_tensor_beyond_32_bits():
    check_decode(*inputs(), mask_mod=mods.sliding_window(2**41), q_offset=torch.tensor([2**41 + 10, 3]))


@SPLITS
@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
def test_out_is_written_and_returned(layout, num_splits):
    """What surrounds it in memory stays as it is."""
    storage = torch.full((B, HQ + 1, Q + 1, 2 * D), torch.nan)
    out = {
        "bhnd": torch.full((B, HQ, Q, D), torch.nan),
        "bnhd": torch.full((B, Q, HQ, D), torch.nan).transpose(1, 2),
        "strided": storage[:, 1:, :-1, ::2],
    }[layout]
    result, _ = check_decode(*inputs(), mods.softcap(3.0), num_splits=num_splits, out=out)
    assert result is out
    assert storage.isnan().sum() == storage.numel() - (out.numel() if layout == "strided" else 0)


@SPLITS
def test_without_lse(num_splits):
    options = DecodeOptions(backend="triton", num_splits=num_splits, block_n=16)
    out = flex_decode(*inputs(), mods.softcap(3.0), options=options)
    assert torch.equal(out, decode(*inputs(), mods.softcap(3.0), num_splits=num_splits)[0])


def test_debug_checks_come_before_the_kernel():
    """The triton backend with `debug` gives the errors of the torch backend."""
    bias = torch.randn(N)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[kv_idx + 1]

    options = DecodeOptions(backend="triton", debug=True)
    with pytest.raises(FlexDecodeError, match=r"`bias\[kv_idx \+ 1\]` out of range"):
        flex_decode(*inputs(), score_mod, options=options)
    flex_decode(*inputs(), score_mod, lambda b, h, q_idx, kv_idx: kv_idx < N - 1, options=options)


# --- Rows without a live key, and values that must stay where they are ------------------------------------------------


@SPLITS
def test_fully_masked_rows(num_splits):
    """Of one head, of one query token, and of one sequence; the others are not affected."""

    def mask_mod(b, h, q_idx, kv_idx):
        return (h != 1) & ((q_idx < N - 1) | (h != 2)) & ((b == 0) | (h < 3))

    _, lse = check_decode(*inputs(), mask_mod=mask_mod, num_splits=num_splits)
    assert (lse == -torch.inf).sum() == B * Q + B + Q


@pytest.mark.parametrize("window", [N, N + 1, 1000, 2**33, sys.maxsize])
def test_windows_longer_than_the_cache_change_nothing(window):
    causal = decode(*inputs(), mask_mod=mods.causal())
    windowed = check_decode(*inputs(), mask_mod=mods.sliding_window(window), kv_lens=torch.tensor([N, N]))
    assert torch.equal(windowed[0], causal[0]) and torch.equal(windowed[1], causal[1])


@SPLITS
@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_what_lies_past_the_length_is_not_seen(dtype, poison, num_splits):
    query, key, value = inputs(dtype=dtype)
    kv_lens = torch.tensor([21, 0])
    for b, length in enumerate(kv_lens):
        key[b, :, length:] = poison
        value[b, :, length:] = poison
    check_decode(query, key, value, mods.softcap(3.0), mods.causal(), num_splits=num_splits, kv_lens=kv_lens)


@SPLITS
@pytest.mark.parametrize("head_dim", [16, 40])  # a key in one load and in two
def test_infinite_keys_and_values(head_dim, num_splits):
    """A score of -inf hides its key, +inf has no softmax, and an infinite value reaches its column only."""
    query, key, value = make_inputs(1, 4, 2, 1, N, head_dim)
    query[..., 3], query[:, ::2, :, 3] = -1.3, 1.3  # not numbers that TF32 holds
    key[0, 0, 5, 3], key[0, 0, 9, 3] = -torch.inf, 0.0
    value[0, 1, 7, 2], value[0, 1, 20, 4] = torch.inf, -torch.inf
    out, lse = decode(query, key, value, num_splits=num_splits)
    expected, expected_lse = reference_decode(query, key, value, return_lse=True)
    assert expected[0, 0].isfinite().all() and expected[0, 1].isnan().all()
    assert expected[0, 2:].isinf().any() and not expected[0, 2:].isnan().any()
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5, equal_nan=True)
    torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-5, atol=1e-5, equal_nan=True)


@SPLITS
def test_nan_of_a_mod_reaches_its_row_only(num_splits):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where((h == 1) & (kv_idx == 20) & (q_idx == N - 1), float("nan"), score)

    out, _ = check_decode(*inputs(), score_mod, num_splits=num_splits)
    assert out.isnan().any(-1).sum() == B


@SPLITS
def test_nan_of_a_mod_at_a_masked_position_is_not_seen(num_splits):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx > q_idx - 3, torch.log(score * 0 - 1), score)

    def mask_mod(b, h, q_idx, kv_idx):
        return kv_idx <= q_idx - 3

    out, _ = check_decode(*inputs(), score_mod, mask_mod, num_splits=num_splits)
    assert out.isfinite().all()


@SPLITS
def test_infinite_scores(num_splits):
    """-inf hides a key, +inf has no softmax."""

    def score_mod(score, b, h, q_idx, kv_idx):
        hidden = torch.where(kv_idx % 2 == 0, score, -float("inf"))
        return torch.where((h == 3) & (kv_idx == 4), float("inf"), hidden)

    check_decode(*inputs(), score_mod, num_splits=num_splits)


def test_large_scores_do_not_overflow():
    query, key, value = inputs()
    check_decode(100 * query, 100 * key, value, num_splits=2)
