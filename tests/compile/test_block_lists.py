"""Kernels that walk over the lists of a BlockMask."""

import pytest
import torch
from compile.compiling import DEVICES, assembly, compile_call, meta_inputs, meta_lengths
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import mods
from flexdecode.call.block_mask import BlockLists, Listed


def mask_of_lists(inner, shifted=False):
    block_mask = create_block_mask(inner, None, None, 256, 256, device="cpu", BLOCK_SIZE=64)
    lists = BlockLists(block_mask, 4, 16, torch.device("cpu"))
    lists.kinds = lists.kinds.to("meta")
    return lists.mask_mod(inner, shifted)


@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("device", DEVICES)
def test_on_every_target(device, num_queries):
    inputs = meta_inputs(4, 16, 2, num_queries, 8192, 128)
    call = compile_call(device, inputs, None, mask_of_lists(mods.causal()), listed=Listed.ALONE)
    assert call.spec.block_lists and call.spec.num_full == 1
    # Listed blocks may all be partial, and where the mask is evaluated descriptors cost more than they gain.
    assert not call.spec.tiles.descriptors
    if device != "gfx942":
        assert "cp.async" in assembly(call.split)


@pytest.mark.parametrize("starts", [None, meta_lengths(4)], ids=["offset", "offset_and_starts"])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_with_offsets(num_queries, starts):
    inputs = meta_inputs(4, 16, 2, num_queries, 8192, 128)
    given = {"kv_offset": meta_lengths(4), "kv_starts": starts}
    call = compile_call("sm_90", inputs, None, mask_of_lists(mods.causal(), True), listed=Listed.ALONE, **given)
    assert call.spec.block_lists and call.spec.num_full == 1


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_beside_another_mask_no_block_is_full(device):
    one = mask_of_lists(mods.causal())
    both = lambda b, h, q, k: one(b, h, q, k) & (q - k < 100)
    call = compile_call(device, meta_inputs(4, 16, 2, 1, 8192, 128), None, both, listed=Listed.WITH_MASK)
    assert call.spec.num_full == 0
