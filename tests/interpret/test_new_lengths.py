"""One length for all sequences, scales in 0-d tensors, and caches that grow, through the generated kernel."""

import pytest
import torch
from cache_cases import Pages, quantise
from interpret.decoding import check_decode, decode
from support import make_inputs

from flexdecode import cache_info, clear_cache, mods

B, HQ, HKV, Q, N, D = 2, 4, 2, 2, 37, 16
SPLITS = pytest.mark.parametrize("num_splits", [1, 3])


@SPLITS
@pytest.mark.parametrize("paged", [False, True])
def test_one_length_for_all_sequences(num_splits, paged):
    """It is a bound of the kernel, not a tensor: another number makes no other kernel."""
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D)
    named = {}
    if paged:
        pages = Pages([N] * B, 8)
        key, value, named = pages.place(key), pages.place(value), {"page_table": pages.table}
    clear_cache()
    for length in (N, 20, 1, 0, 36, 16):
        for kv_lens in (length, torch.tensor(length)):
            inputs = query, key, value, mods.alibi(HQ), mods.causal()
            check_decode(*inputs, kv_lens=kv_lens, num_splits=num_splits, **named)
    assert cache_info().generations + cache_info().disk_hits == 1


@SPLITS
def test_what_lies_past_a_number_is_not_seen(num_splits):
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D)
    key[:, :, 21:], value[:, :, 21:] = torch.nan, torch.nan
    check_decode(query, key, value, mods.softcap(3.0), kv_lens=21, num_splits=num_splits)


def test_an_offset_in_a_0d_tensor():
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D)
    check_decode(query, key, value, mods.alibi(HQ), mods.causal(), q_offset=torch.tensor(9), q_lens=1)


@SPLITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_scales_in_0d_tensors(num_splits, dtype):
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D)
    key, value = (quantise(x, torch.int8, "number")[0] for x in (key, value))
    scales = {"k_scale": torch.tensor(0.25, dtype=dtype), "v_scale": torch.tensor(0.5, dtype=dtype)}
    out, _ = check_decode(query, key, value, **scales, num_splits=num_splits)
    numbers = decode(query, key, value, k_scale=0.25, v_scale=0.5, num_splits=num_splits)
    torch.testing.assert_close(out, numbers[0])
    scales["v_scale"].fill_(-2.0)
    check_decode(query, key, value, **scales, num_splits=num_splits)


def test_a_cache_that_grows():
    """Through the end of a table, by kernels of which each serves many lengths."""
    query, keys, values = make_inputs(B, HQ, HKV, 1, 80, D)
    table = torch.randn(HQ, 60)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[h, kv_idx]

    clear_cache()
    for length in (*range(1, 20), 31, 32, 33, 59, 60, 61, 80):
        kv = keys[:, :, :length].contiguous(), values[:, :, :length].contiguous()
        check_decode(query, *kv, score_mod, mods.sliding_window(40), block_n=None)
    assert cache_info().traces == 2
    assert cache_info().generations + cache_info().disk_hits <= 3
