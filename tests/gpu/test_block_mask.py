"""BlockMasks on a GPU: results, no waiting, CUDA graphs."""

import weakref

import pytest
import torch
from support import assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, flex_decode, mods
from flexdecode.runtime import launch

pytestmark = pytest.mark.gpu


def scattered(b, h, q, k):
    """Dead, partial and full blocks of 64."""
    return ((k // 64 * 7 + q // 64 + h) % 5 == 0) | ((k // 64 % 5 == 1) & (k % 3 != 2))


@pytest.mark.parametrize("size", [(128, 128), (64, 64), (50, 30)], ids=str)
@pytest.mark.parametrize("num_queries", [1, 6])
@pytest.mark.parametrize("also", [None, mods.sliding_window(700)], ids=["alone", "combined"])
def test_results(also, num_queries, size):
    block_mask = create_block_mask(scattered, None, 8, 2000, 2000, device="cuda", BLOCK_SIZE=size)
    inputs = make_inputs(3, 8, 2, num_queries, 2000, 64, dtype=torch.bfloat16, device="cuda")
    mask_mod = scattered if also is None else mods.and_masks(scattered, also)
    for lengths in (None, [2000, 1027, 0]):
        kv_lens = None if lengths is None else torch.tensor(lengths, device="cuda")
        out, lse = flex_decode(*inputs, mask_mod=also, block_mask=block_mask, kv_lens=kv_lens, return_lse=True)
        assert_close_to_reference(out, lse, *inputs, mask_mod=mask_mod, kv_lens=kv_lens)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
def test_no_waiting_and_cuda_graphs():
    block_mask = create_block_mask(scattered, None, 8, 2000, 2000, device="cuda", BLOCK_SIZE=64)
    inputs = make_inputs(3, 8, 2, 1, 2000, 64, dtype=torch.float16, device="cuda")
    kv_lens = torch.tensor([2000, 1, 64], device="cuda")

    def call():
        return flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens, return_lse=True)

    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    kv_lens.copy_(torch.tensor([700, 1999, 128]))
    graph.replay()
    torch.cuda.synchronize()
    assert_close_to_reference(out, lse, *inputs, mask_mod=scattered, kv_lens=kv_lens)


@pytest.mark.parametrize("captured", [False, True], ids=["fresh", "captured"])
def test_workspaces_that_are_not_kept_live_until_the_launch(captured, monkeypatch):
    """The first tables of a mask are made after the workspace, and must not be put into it."""
    inputs = make_inputs(2, 8, 2, 1, 500, 64, dtype=torch.float16, device="cuda")
    options = DecodeOptions(num_splits=3, block_n=16)

    def call():
        block_mask = create_block_mask(mods.causal(), None, None, 500, 500, device="cuda", BLOCK_SIZE=(16, 16))
        return flex_decode(*inputs, block_mask=block_mask, options=options, return_lse=True)

    call()  # compiles the kernel
    take, start, taken = launch.TritonLauncher._memory, launch.FirstPass.launch, []

    def taking(self, stream):
        memory = take(self, stream)
        taken.append(weakref.ref(memory))
        return memory

    def starting(self, *arguments):
        picked = start(self, *arguments)
        assert taken[-1]() is not None
        return picked

    monkeypatch.setattr(launch, "may_keep_memory", lambda: captured)
    monkeypatch.setattr(launch.TritonLauncher, "_memory", taking)
    monkeypatch.setattr(launch.FirstPass, "launch", starting)
    if captured:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            out, lse = call()
        graph.replay()
    else:
        out, lse = call()
    assert taken[-1]() is None
    assert_close_to_reference(out, lse, *inputs, mask_mod=mods.causal())


def test_positions_that_the_host_does_not_know():
    """Outside of its rows nothing attends."""
    block_mask = create_block_mask(mods.causal(), None, None, 1000, 1000, device="cuda", BLOCK_SIZE=64)
    inputs = make_inputs(2, 8, 2, 1, 1000, 64, dtype=torch.float16, device="cuda")
    q_offset = torch.tensor([999, 1000], device="cuda")
    out, lse = flex_decode(*inputs, block_mask=block_mask, q_offset=q_offset, return_lse=True)
    assert lse[0].isfinite().all() and (lse[1] == -torch.inf).all() and (out[1] == 0).all()
