"""Generated kernels on a GPU: results, CUDA graphs, streams, and what a call may not do."""

from __future__ import annotations

import itertools
import sys

import pytest
import torch
from support import MODS, assert_close_to_reference, make_inputs

import flexdecode
from flexdecode import DecodeOptions, mods

pytestmark = pytest.mark.gpu

HALVES = (torch.float16, torch.bfloat16)


def decode_and_check(q, k, v, score_mod=None, mask_mod=None, **kwargs):
    options = kwargs.pop("options", None)
    out, lse = flexdecode.flex_decode(q, k, v, score_mod, mask_mod, return_lse=True, options=options, **kwargs)
    assert_close_to_reference(out, lse, q, k, v, score_mod, mask_mod, **kwargs)
    return out


@pytest.mark.parametrize("family", MODS, ids=[name for name, *_ in MODS])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_every_mod_family(family, dtype):
    _, make_score_mod, make_mask_mod = family
    shape = (2, 8, 300, 3, "cuda")
    q, k, v = make_inputs(2, 8, 2, 3, 300, 64, dtype=dtype, device="cuda", layout="bnhd")
    lens = torch.tensor([300, 77], device="cuda", dtype=torch.int32)
    decode_and_check(q, k, v, make_score_mod(*shape), make_mask_mod(*shape), kv_lens=lens)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("group", "num_queries", "head_dim", "v_head_dim", "layout"),
    [
        (1, 1, 16, 16, "bhnd"),
        (7, 1, 59, 59, "bnhd"),
        (71, 1, 128, 128, "bhnd"),
        (5, 17, 80, 64, "strided"),
        (8, 128, 64, 64, "bhnd"),
        (3, 2, 256, 121, "bnhd"),
    ],
)
def test_shapes(dtype, group, num_queries, head_dim, v_head_dim, layout):
    q, k, v = make_inputs(
        2, 2 * group, 2, num_queries, 261, head_dim, v_head_dim, dtype=dtype, device="cuda", layout=layout
    )
    decode_and_check(q, k, v, None, mods.causal())


@pytest.mark.parametrize("num_kv", [0, 1, 16, 127, 129, 1000])
@pytest.mark.parametrize("num_splits", [None, 1, 7])
def test_lengths_and_splits(num_kv, num_splits):
    q, k, v = make_inputs(3, 8, 2, 1, num_kv, 128, dtype=torch.float16, device="cuda")
    lens = torch.tensor([0, num_kv // 2, num_kv], device="cuda")
    for n, row in zip(lens.tolist(), range(3), strict=True):  # what lies past a sequence must not matter
        k[row, :, n:] = float("nan")
        v[row, :, n:] = float("nan")
    decode_and_check(q, k, v, kv_lens=lens, options=DecodeOptions(num_splits=num_splits))


@pytest.mark.parametrize("num_kv", [16384, 65536])
def test_long_caches_against_float64_on_the_gpu(num_kv):
    q, k, v = make_inputs(1, 16, 2, 1, num_kv, 128, dtype=torch.bfloat16, device="cuda")
    out = flexdecode.flex_decode(q, k, v, mods.alibi(16, device="cuda"), mods.sliding_window(sys.maxsize))
    slopes = mods.alibi_slopes(16, device="cuda").double()
    distance = num_kv - 1 - torch.arange(num_kv, device="cuda", dtype=torch.float64)
    scores = (q.double().view(1, 2, 8, 128) @ k.double().transpose(-1, -2)).view(1, 16, 1, -1) / 128**0.5
    weights = (scores - slopes.view(1, -1, 1, 1) * distance).softmax(-1)
    expected = (weights.view(1, 2, 8, -1) @ v.double()).view(1, 16, 1, 128)
    assert (out.double() - expected).abs().max() <= 2 * (expected.bfloat16().double() - expected).abs().max() + 1e-3


def test_a_cache_of_more_than_2_to_the_31_elements():
    k = torch.randn(1, 2, 1 << 17, 128, device="cuda", dtype=torch.float16).expand(80, -1, -1, -1).contiguous()
    assert k.numel() > 1 << 31
    q = torch.randn(80, 2, 1, 128, device="cuda", dtype=torch.float16)
    out = flexdecode.flex_decode(q, k, k)
    alone = flexdecode.flex_decode(q[-1:], k[-1:], k[-1:])
    assert (out[-1:].float() - alone.float()).abs().max() < 1e-3
    masked = flexdecode.flex_decode(q, k, k, None, mods.sliding_window(300))  # pointer loads in partial blocks
    alone = flexdecode.flex_decode(q[-1:], k[-1:, :, -300:], k[-1:, :, -300:])
    assert (masked[-1:].float() - alone.float()).abs().max() < 2e-3


def test_a_cuda_graph_sees_new_lengths_and_captures():
    q, k, v = make_inputs(4, 8, 2, 1, 1024, 64, dtype=torch.float16, device="cuda")
    lens = torch.full((4,), 1024, device="cuda", dtype=torch.int32)
    bias = torch.zeros(8, 1024, device="cuda")

    def biased(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx]

    def call():
        return flexdecode.flex_decode(q, k, v, biased, mods.sliding_window(200), kv_lens=lens)

    call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call()
    for lengths in ([1024, 3, 500, 0], [1, 1, 1, 700]):
        lens.copy_(torch.tensor(lengths))
        bias.normal_()
        q.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close_to_reference(out, None, q, k, v, biased, mods.sliding_window(200), kv_lens=lens)


def test_calls_on_two_streams_and_a_growing_workspace():
    inputs = [make_inputs(1, 8, 1, 1, n, 64, dtype=torch.float16, device="cuda", seed=n) for n in (4096, 512, 16384)]
    expected = [flexdecode.flex_decode(*x, options=DecodeOptions(num_splits=1)) for x in inputs]
    streams = [torch.cuda.Stream() for _ in range(2)]
    torch.cuda.synchronize()
    for _ in range(10):
        results = []
        for i, x in enumerate(inputs):
            with torch.cuda.stream(streams[i % 2]):
                results.append(flexdecode.flex_decode(*x))
        torch.cuda.synchronize()
        for result, right in zip(results, expected, strict=True):
            assert (result.float() - right.float()).abs().max() < 1e-3


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
def test_a_call_launches_two_kernels_and_waits_for_nothing():
    q, k, v = make_inputs(1, 32, 8, 1, 32768, 128, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor([32768], device="cuda")
    window = mods.sliding_window(1024)
    flexdecode.flex_decode(q, k, v, None, window, kv_lens=lens)
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        flexdecode.flex_decode(q, k, v, None, window, kv_lens=lens)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        flexdecode.flex_decode(q, k, v, None, window, kv_lens=lens)
        torch.cuda.synchronize()
    kernels = [e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    assert sorted(name for name in kernels if "decode" in name) == ["decode_combine", "decode_split"]
    assert len([name for name in kernels if "Memcpy" not in name and "Memset" not in name]) == 2, kernels


def test_one_decode_loop_compiles_one_kernel_per_tile_choice():
    flexdecode.clear_cache()
    q, k, v = make_inputs(1, 8, 2, 1, 4096, 64, dtype=torch.float16, device="cuda")
    for step, n in enumerate([1, 2, 3, 100, 129, 1000, 1001, 2049, 4095, 4096]):
        window, cap = 16 + step, 20.0 + step
        out = flexdecode.flex_decode(
            q,
            k[:, :, :n],
            v[:, :, :n],
            lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap),
            lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window,
        )
        assert torch.isfinite(out).all()
    info = flexdecode.cache_info()
    assert info.traces == 2
    # One split, and up to 4, 32 and 128 of them for the combine pass; pointers or descriptors.
    assert info.compilations <= 8
    before = info.compilations
    for n in range(1, 4097, 37):
        flexdecode.flex_decode(
            q,
            k[:, :, :n],
            v[:, :, :n],
            lambda score, b, h, q_idx, kv_idx: cap * torch.tanh(score / cap),
            lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window,
        )
    assert flexdecode.cache_info().compilations - before <= 4


def test_bad_input_on_a_gpu():
    q, k, v = make_inputs(2, 4, 2, 1, 64, 64, dtype=torch.float16, device="cuda")
    table = torch.randn(64)
    with pytest.raises(ValueError, match=r"captured by score_mod is on cpu, but `query` is on cuda"):
        flexdecode.flex_decode(q, k, v, lambda s, b, h, q_idx, kv_idx: s + table[kv_idx])
    scalar = torch.tensor(2.0)
    decode_and_check(q, k, v, lambda s, b, h, q_idx, kv_idx: s * scalar)
    lens = torch.tensor([65, 3], device="cuda")
    with pytest.raises(ValueError, match="`kv_lens` must lie between 0 and N = 64"):
        flexdecode.flex_decode(q, k, v, kv_lens=lens, options=DecodeOptions(debug=True))
    short = torch.randn(10, device="cuda")
    with pytest.raises(flexdecode.FlexDecodeError, match="out of range"):
        flexdecode.flex_decode(
            q, k, v, lambda s, b, h, q_idx, kv_idx: s + short[kv_idx], options=DecodeOptions(debug=True)
        )


# --- Heads of any size, and dtypes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("D", "Dv"), [(1, 1), (2, 7), (7, 1024), (15, 16), (577, 31), (640, 512), (1000, 1000), (1024, 1), (1024, 1024)]
)
def test_head_dims_from_1_to_1024(D, Dv, dtype):
    """Groups of 1 to 8 and several tokens, one split and many, with a mask and without."""
    lens = torch.tensor([700, 333], device="cuda")
    for Hq, Hkv, Q, num_splits in ((2, 2, 1, None), (8, 2, 1, 1), (8, 1, 5, 3)):
        tensors = make_inputs(2, Hq, Hkv, Q, 700, D, Dv, dtype=dtype, device="cuda")
        options = DecodeOptions(num_splits=num_splits)
        for of in ((None, None), (mods.softcap(5.0), mods.sliding_window(300))):
            decode_and_check(*tensors, *of, kv_lens=lens, options=options)


@pytest.mark.parametrize(
    "dtypes", [types for types in itertools.product((*HALVES, torch.float32), repeat=3) if len(set(types)) > 1], ids=str
)
def test_caches_of_another_dtype(dtypes):
    """Loads by descriptors (no mask) and by pointers, whole heads and heads in parts."""
    for B, D, Dv, mask_mod in ((1, 128, 128, None), (4, 64, 80, mods.causal()), (2, 600, 16, None)):
        tensors = make_inputs(B, 8, 2, 2, 1000, D, Dv, device="cuda")
        tensors = [x.to(dtype) for x, dtype in zip(tensors, dtypes, strict=True)]
        assert decode_and_check(*tensors, None, mask_mod).dtype == dtypes[0]


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("D", [7, 16, 34, 128, 600])
def test_float8_without_scales(D, stored):
    query, key, value = make_inputs(2, 8, 2, 1, 500, D, dtype=torch.bfloat16, device="cuda")
    decode_and_check(query, key.to(stored), value.to(stored), mods.softcap(5.0))
    decode_and_check(query, key.to(stored), value, mods.softcap(5.0))
