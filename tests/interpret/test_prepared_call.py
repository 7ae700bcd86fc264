"""Prepared calls, through the generated kernels: they give what `flex_decode` gives."""

import pytest
import torch
from support import assert_close_to_reference, make_inputs, paged

from flexdecode import DecodeOptions, flex_decode, mods, prepare

B, HQ, HKV, N, D = 2, 4, 2, 70, 16
SPLITS = pytest.mark.parametrize("num_splits", [1, 3])


@SPLITS
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_everything_is_read_again(num_splits, given):
    query, key, value = make_inputs(B, HQ, HKV, 2, N, D)
    lens, sinks, slopes, window = torch.tensor([N, 31]), torch.randn(HQ), torch.rand(HQ), 20
    score_mod = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)
    mask_mod = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window
    options = DecodeOptions(backend="triton", block_n=16, num_splits=num_splits)
    arguments = {"kv_lens": lens, "sinks": sinks, "q_offset": 40}
    step = prepare(query, key, value, score_mod, mask_mod, **arguments, return_lse=True, options=options)
    for seed in range(3):
        query, _, _ = make_inputs(B, HQ, HKV, 2, N, D, seed=seed)
        out, lse = step(query, out=torch.empty_like(query) if given else None)
        assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
        lens.sub_(7)
        key.neg_()
        sinks.add_(1)
        slopes, window = torch.rand(HQ), window + 5


def test_pages_and_scales():
    query, key, value = make_inputs(B, HQ, HKV, 1, 64, D)
    key = (key * 20).to(torch.int8)
    (keys, table), (values, _) = paged(key, 16), paged(value, 16)
    arguments = {"page_table": table, "kv_lens": torch.tensor([64, 20]), "k_scale": 0.05, "mask_mod": mods.causal()}
    options = DecodeOptions(backend="triton", block_n=16)
    step = prepare(query, keys, values, **arguments, options=options)
    for _ in range(3):
        assert torch.equal(step(query), flex_decode(query, keys, values, **arguments, options=options))
        table.copy_(table.flip(0))


@SPLITS
@pytest.mark.parametrize("heads", [1, HKV])
def test_strides_of_dimensions_of_size_1_do_not_matter(num_splits, heads):
    """Also not where the query of the step has other alignments of such strides than the one that was prepared."""
    query, key, value = make_inputs(B, HQ, heads, 1, N, D)
    lens = torch.tensor([N, 31])
    options = DecodeOptions(backend="triton", block_n=16, num_splits=num_splits)
    for prepared, given in ((D, HQ * D), (HQ * D, D), (D, 0), (1, 3), (3, 1 << 40)):
        like = torch.empty(query.shape).as_strided(query.shape, (HQ * D, D, prepared, 1))
        step = prepare(like, key, value, kv_lens=lens, return_lse=True, options=options)
        one = query.as_strided(query.shape, (HQ * D, D, given, 1))
        place = torch.full(query.shape, 7.0).as_strided(query.shape, (HQ * D, D, given, 1))
        for out in (None, place):
            result, lse = step(one, out=out)
            assert_close_to_reference(result, lse, query, key, value, kv_lens=lens)
