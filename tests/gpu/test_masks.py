"""Mask families on a GPU: results, and what is not read."""

import pytest
import torch
from mask_families import FAMILIES, LONG, neighborhood, tiles
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode
from flexdecode.reference import evaluate_mod

pytestmark = pytest.mark.gpu


def on_gpu(family, **arguments):
    with torch.device("cuda"):
        return family(**arguments)


def check(inputs, mask_mod, options=None, **arguments):
    out, lse = flex_decode(*inputs, mask_mod=mask_mod, return_lse=True, options=options, **arguments)
    assert_close_to_reference(out, lse, *inputs, mask_mod=mask_mod, **arguments)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, num_queries):
    """One kernel of each kind for many lengths and offsets."""
    mask_mod = on_gpu(family)
    inputs = make_inputs(3, 4, 2, num_queries, 96, 64, dtype=torch.float16, device="cuda")
    for num_splits in (1, 3):
        options = DecodeOptions(num_splits=num_splits, block_n=16)
        for lengths in ([96, 96, 96], [96, 51, 7], [0, 95, 1]):
            kv_lens = torch.tensor(lengths, device="cuda")
            check(inputs, mask_mod, options, kv_lens=kv_lens)
            check(inputs, mask_mod, options, kv_lens=kv_lens, q_offset=torch.tensor([72, 3, -2], device="cuda"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("family", FAMILIES)
def test_families_in_long_caches(family, dtype):
    inputs = make_inputs(3, 4, 2, 1, 3000, 64, dtype=dtype, device="cuda")
    check(inputs, on_gpu(family, **LONG[family]), kv_lens=torch.tensor([3000, 2999, 1300], device="cuda"))


# The intervals of images are wider than their keys: they end with a row of pixels, or of tiles.
@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in (neighborhood, tiles)])
def test_keys_before_and_after_the_live_ones_are_not_read(family):
    """NaN in the blocks of 64 before the first and after the last live key: a read would show."""
    mask_mod, length = on_gpu(family, **LONG[family]), 3000
    query, key, value = make_inputs(1, 4, 2, 1, length, 64, dtype=torch.bfloat16, device="cuda")
    at = torch.tensor([length - 1])
    grid = torch.zeros(1, dtype=torch.long), torch.arange(4), at, torch.arange(length)
    live = evaluate_mod(family(**LONG[family]), grid).flatten(0, 2).any(0)
    first, last = live.nonzero()[0].item() // 64 * 64, -(-(live.nonzero()[-1].item() + 1) // 64) * 64
    for tensor in (key, value):
        tensor[:, :, :first] = torch.nan
        tensor[:, :, last:] = torch.nan
    out = flex_decode(query, key, value, mask_mod=mask_mod, options=DecodeOptions(block_n=64))
    assert out.isfinite().all()
