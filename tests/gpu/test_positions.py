"""`kv_starts` and `kv_offset` on a GPU: the cases of the interpreter, latents and descriptors, CUDA graphs."""

import pytest
import torch
from position_cases import (
    LENS,
    MASKS,
    OFFSETS,
    STARTS,
    bias,
    block_mask,
    cache,
    frames,
    per_sequence,
    positions,
    spoil_before,
)
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode, mods

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
OPTIONS = (
    DecodeOptions(num_splits=3, block_n=16), DecodeOptions(schedule="balanced", block_n=32), None,
    DecodeOptions(num_splits=1),
)  # fmt: skip


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("page_size", [None, 4, 32])
def test_frames_and_masks(page_size, name):
    for number, (starts, offset) in enumerate(frames()):
        first = ("newest", "given", "newest", "number")[number % 4]
        inputs, arguments = cache(
            starts, page_size, (1, 3)[number // 2 % 2], number % 5 == 2, 64, torch.bfloat16, DEVICE
        )
        arguments |= positions(starts, offset, first, (torch.int32, torch.int64)[number % 2], DEVICE)
        score_mod = bias(device=DEVICE) if number % 3 == 1 else None
        options = OPTIONS[number % 4]
        out, lse = flex_decode(*inputs, score_mod, MASKS[name], return_lse=True, options=options, **arguments)
        assert_close_to_reference(out, lse, *inputs, score_mod, MASKS[name], **arguments)


@pytest.mark.parametrize("size", [(16, 16), (64, 64), (50, 24)], ids=str)
@pytest.mark.parametrize("name", ["squares", "causal"])
def test_block_masks(name, size):
    mask, same = block_mask(MASKS[name], size, device=DEVICE)
    for number, (starts, offset) in enumerate(frames()):
        inputs, arguments = cache(
            starts, (None, 4, 16)[number % 3], (1, 3)[number % 2], False, 64, torch.float16, DEVICE
        )
        arguments |= positions(starts, offset, device=DEVICE)
        options = OPTIONS[number % 2]
        out, lse = flex_decode(*inputs, block_mask=mask, return_lse=True, options=options, **arguments)
        assert_close_to_reference(out, lse, *inputs, None, same, **arguments)


@pytest.mark.parametrize("latent", [False, True], ids=["heads", "latents"])
def test_long_caches_by_descriptors(latent):
    """NaN before the starts and past the lengths; whole blocks are copied where only a part of them is live."""
    N, D, Dv = 3000, 576 if latent else 128, 512 if latent else 128
    heads, kv_heads = (128, 1) if latent else (8, 2)
    query, key, value = make_inputs(3, heads, kv_heads, 1, N, D, Dv, dtype=torch.bfloat16, device=DEVICE)
    lens, starts, offset = [3000, 1500, 700], [100, 0, 650], [-100, 5000, 33]
    spoil_before(key, starts)
    spoil_before(value, starts)
    for row, length in zip(key, lens, strict=True):
        row[:, length:] = torch.nan
    value = key[..., :Dv] if latent else value
    given = zip(("kv_lens", "kv_starts", "kv_offset"), (lens, starts, offset), strict=True)
    arguments = {name: per_sequence(numbers, device=DEVICE) for name, numbers in given}
    if not latent:
        for row, length in zip(value, lens, strict=True):
            row[:, length:] = torch.nan
    for mask_mod in (None, mods.sliding_window(700), mods.streaming(200, 300)):
        for options in (None, DecodeOptions(schedule="balanced")):
            out, lse = flex_decode(query, key, value, None, mask_mod, return_lse=True, options=options, **arguments)
            assert_close_to_reference(out, lse, query, key, value, None, mask_mod, **arguments)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
@pytest.mark.parametrize("schedule", ["split", "balanced"])
def test_no_waiting_and_cuda_graphs(schedule):
    inputs, arguments = cache("none", None, 1, False, 64, torch.float16, DEVICE)
    del arguments["kv_lens"]
    inputs = [x.nan_to_num(1.0) for x in inputs]
    given = {
        "kv_lens": per_sequence(LENS, device=DEVICE),
        "kv_starts": per_sequence(STARTS["padded"], device=DEVICE),
        "kv_offset": per_sequence(OFFSETS["dropped"], device=DEVICE),
    }
    options, score_mod, mask_mod = DecodeOptions(schedule=schedule), bias(device=DEVICE), mods.sliding_window(40)

    def call():
        return flex_decode(*inputs, score_mod, mask_mod, return_lse=True, options=options, **given)

    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        call()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = call()
    given["kv_starts"].copy_(torch.tensor([0, 40, 95, 3]))
    given["kv_offset"].copy_(torch.tensor([-50, 2**30, 1, -(2**30)]))
    graph.replay()
    torch.cuda.synchronize()
    assert_close_to_reference(out, lse, *inputs, score_mod, mask_mod, **given)


def test_offsets_beyond_the_limit():
    inputs, arguments = cache("none", None, 1, False, 64, torch.float16, DEVICE)
    score_mod = lambda score, b, h, q, k: score + (k % 7).float()
    near, far = (torch.tensor(x, device=DEVICE) for x in ([2**30, -(2**30), 3, 0], [2**31, -(2**40), 3, 0]))
    expected, out = (flex_decode(*inputs, score_mod, kv_offset=offset, **arguments) for offset in (near, far))
    assert torch.equal(out, expected)
    with pytest.raises(ValueError, match="`kv_offset` must lie between -1073741824 and 1073741824, got"):
        flex_decode(*inputs, score_mod, kv_offset=far, options=DecodeOptions(debug=True), **arguments)
