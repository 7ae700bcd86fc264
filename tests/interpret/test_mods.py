"""Every family of mods through the generated kernel, with and without lengths and offsets."""

import pytest
import torch
from interpret.decoding import check_decode
from support import MODS, make_inputs

B, HQ, HKV, Q, N, D = 3, 4, 2, 2, 37, 16

KV_LENS = {"full": None, "ragged": torch.tensor([0, 1, 30])}  # the second has fewer keys than queries
Q_OFFSETS = {"newest": None, "number": 5, "tensor": torch.tensor([36, 0, -1])}


@pytest.mark.parametrize("q_offset", Q_OFFSETS)
@pytest.mark.parametrize("kv_lens", KV_LENS)
@pytest.mark.parametrize("mods", MODS, ids=lambda m: m.name)
def test_mods(mods, kv_lens, q_offset):
    inputs = make_inputs(B, HQ, HKV, Q, N, D)
    score_mod, mask_mod = mods.make_score_mod(B, HQ, N, Q, "cpu"), mods.make_mask_mod(B, HQ, N, Q, "cpu")
    lengths = {"kv_lens": KV_LENS[kv_lens], "q_offset": Q_OFFSETS[q_offset]}
    check_decode(*inputs, score_mod, mask_mod, num_splits=2, **lengths)


@pytest.mark.parametrize("mods", MODS, ids=lambda m: m.name)
def test_mods_in_float16_and_one_split(mods):
    inputs = make_inputs(B, HQ, HKV, Q, N, D, dtype=torch.float16, seed=1)
    score_mod, mask_mod = mods.make_score_mod(B, HQ, N, Q, "cpu"), mods.make_mask_mod(B, HQ, N, Q, "cpu")
    check_decode(*inputs, score_mod, mask_mod, num_splits=1, kv_lens=torch.tensor([37, 17, 5]))
