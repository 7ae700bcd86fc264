"""Regions that torch.compile traces run the generated kernel, with the lists of a BlockMask too."""

import sys

import pytest
import torch
from support import make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, PagedKVCache, flex_decode, mods
from flexdecode.call import block_mask as block_mask_module
from flexdecode.runtime import launch

B, HQ, HKV, N, D = 2, 4, 2, 70, 16
TRITON = DecodeOptions(backend="triton", num_splits=2)
INPUTS = make_inputs(B, HQ, HKV, 1, N, D)


def documents(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) & (kv_idx // 33 == q_idx // 33)


@pytest.mark.parametrize("mask_mod", [None, mods.sliding_window(20)], ids=["alone", "with a mask"])
@pytest.mark.parametrize("kv_offset", [None, 7])
def test_a_block_mask(mask_mod, kv_offset):
    block_mask = create_block_mask(documents, None, None, 80, 80, device="cpu", BLOCK_SIZE=16)
    arguments = {"kv_lens": torch.tensor([41, N]), "kv_offset": kv_offset, "return_lse": True, "options": TRITON}

    def model(query, key, value, block_mask):
        return flex_decode(query, key, value, mods.alibi(HQ), mask_mod, block_mask=block_mask, **arguments)

    torch._dynamo.reset()
    found = torch.compile(model, fullgraph=True, backend="eager")(*INPUTS, block_mask)
    for part, expected in zip(found, model(*INPUTS, block_mask), strict=True):
        assert torch.equal(part, expected)


def test_nothing_is_kept_where_torch_compile_records_graphs(monkeypatch):
    """Its CUDA graphs allow no memory that outlives a call, and a replay sees other lists of blocks."""
    block_mask = create_block_mask(documents, None, None, 80, 80, device="cpu", BLOCK_SIZE=16)

    def model(query, key, value, block_mask):
        return flex_decode(query, key, value, block_mask=block_mask, options=TRITON)

    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    run(*INPUTS, block_mask)
    assert hasattr(block_mask.kv_num_blocks, "_flexdecode_lists") and launch._workspaces.kept
    launch.forget_workspaces()
    del block_mask.kv_num_blocks._flexdecode_lists
    monkeypatch.setitem(sys.modules, "torch._inductor.cudagraph_trees", None)
    known = len(block_mask_module._known)
    assert torch.equal(run(*INPUTS, block_mask), model(*INPUTS, block_mask))
    assert not hasattr(block_mask.kv_num_blocks, "_flexdecode_lists") and not launch._workspaces.kept
    assert len(block_mask_module._known) == known + 1  # that of the call outside


def test_numbers_and_tables_that_change():
    def model(query, key, value, table, window):
        def score_mod(score, b, h, q_idx, kv_idx):
            return score + table[h, kv_idx]

        def mask_mod(b, h, q_idx, kv_idx):
            return q_idx - kv_idx < window

        return flex_decode(query, key, value, score_mod, mask_mod, options=TRITON)

    torch._dynamo.reset()
    run = torch.compile(model, fullgraph=True, backend="eager")
    for window in (5, 9, 33):
        call = *INPUTS, torch.randn(HQ, N), window
        assert torch.equal(run(*call), model(*call))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_append_and_decode(dtype):
    caches = [
        PagedKVCache(batch=B, num_kv_heads=HKV, head_dim=D, num_pages=20, page_size=4, dtype=dtype) for _ in range(2)
    ]

    def step(query, k, v, cache, counts):
        cache.append(k, v, counts)
        return flex_decode(query, mask_mod=mods.causal(), cache=cache, options=TRITON)

    torch._dynamo.reset()
    run = torch.compile(step, fullgraph=True, backend="aot_eager")
    for counts in (5, 1, [0, 1], 1):
        k, v = torch.randn(2, B, HKV, max(counts) if isinstance(counts, list) else counts, D)
        found = run(INPUTS[0], k, v, caches[0], counts)
        caches[1].append(k, v, counts)
        assert torch.equal(found, flex_decode(INPUTS[0], mask_mod=mods.causal(), cache=caches[1], options=TRITON))
    assert caches[0].kv_lens.tolist() == caches[0].lengths == [7, 8]
