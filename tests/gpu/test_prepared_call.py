"""Prepared calls on a GPU: the same results as `flex_decode`, in graphs and threads too."""

import threading

import pytest
import torch
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, KVCache, flex_decode, mods, prepare

pytestmark = pytest.mark.gpu

SHAPE = (4, 8, 2, 1, 3000, 64)
SPLITS = pytest.mark.parametrize("num_splits", [None, 1, 4])


def inputs(seed=0):
    return make_inputs(*SHAPE, dtype=torch.bfloat16, device="cuda", seed=seed)


@SPLITS
@pytest.mark.parametrize("given", [False, True], ids=["new", "out"])
def test_everything_is_read_again(num_splits, given):
    query, key, value = inputs()
    lens, sinks = torch.tensor([3000, 17, 0, 2100], device="cuda"), torch.randn(8, device="cuda")
    slopes, window = torch.rand(8, device="cuda"), 500
    score_mod = lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx)
    mask_mod = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window
    arguments = {"kv_lens": lens, "sinks": sinks}
    options = DecodeOptions(num_splits=num_splits)
    step = prepare(query, key, value, score_mod, mask_mod, **arguments, return_lse=True, options=options)
    for seed in range(4):
        query, _, _ = inputs(seed)
        out, lse = step(query, out=torch.empty_like(query) if given else None)
        assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
        eager = flex_decode(query, key, value, score_mod, mask_mod, **arguments, return_lse=True, options=options)
        assert torch.equal(out, eager[0]) and torch.equal(lse, eager[1])
        lens.sub_(7).clamp_(min=0)
        key.neg_()
        sinks.add_(1)
        slopes, window = torch.rand(8, device="cuda"), window + 50


def test_layouts_are_checked_without_waiting_for_the_gpu():
    query, key, value = inputs()
    step = prepare(query, key, value, kv_lens=torch.tensor([3000, 17, 0, 2100], device="cuda"))
    step(query)
    try:
        torch.cuda.set_sync_debug_mode("error")
        step(query)
        with pytest.raises(ValueError, match="`query` was prepared with shape"):
            step(query[:2])
        with pytest.raises(ValueError, match=r"on cuda:0, and has .* on cpu now"):
            step(torch.zeros(query.shape, dtype=query.dtype))
    finally:
        torch.cuda.set_sync_debug_mode("default")


@SPLITS
def test_strides_of_dimensions_of_size_1_do_not_matter(num_splits):
    """The query of a step is a view of a projection `[B, 1, Hq * D]`, and its output too."""
    query, key, value = inputs()
    like = torch.empty_like(query)
    step = prepare(like, key, value, return_lse=True, options=DecodeOptions(num_splits=num_splits))
    expected = step(query)
    projected = query.flatten(1).unsqueeze(1).view(4, 1, 8, 64).transpose(1, 2)
    out = torch.empty_like(projected)
    assert projected.stride() != query.stride() and out.stride() != query.stride()
    for strange in (projected, query.as_strided(query.shape, (512, 64, 3, 1))):
        for place in (None, out):
            found = step(strange, out=place)
            assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@SPLITS
def test_in_a_graph(num_splits):
    """The recorded step is the kernels alone; lengths and contents may change between replays."""
    query, key, value = inputs()
    lens = torch.tensor([3000, 17, 5, 2100], device="cuda")
    step = prepare(
        query, key, value, mods.alibi(8, device="cuda"), kv_lens=lens, options=DecodeOptions(num_splits=num_splits)
    )
    out = torch.empty_like(query)
    step(query, out=out)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        new = step(query)
        step(query, out=out)
    for seed in range(3):
        query.copy_(inputs(seed)[0])
        lens.sub_(3)
        graph.replay()
        expected = step(query)
        assert torch.equal(new, expected) and torch.equal(out, expected)


def test_a_cache_grows_beneath_it():
    query, key, value = make_inputs(4, 8, 2, 1, 40, 64, dtype=torch.bfloat16, device="cuda")
    cache = KVCache(batch=4, num_kv_heads=2, head_dim=64, max_kv_len=4096, dtype=torch.bfloat16, device="cuda")
    cache.append(key, value)
    step = prepare(query, cache=cache, mask_mod=mods.causal())
    for n in range(40):
        cache.append(key[:, :, n : n + 1], value[:, :, n : n + 1])
        assert torch.equal(step(query), flex_decode(query, cache=cache, mask_mod=mods.causal()))


def test_several_threads_on_streams_of_their_own():
    query, key, value = inputs()
    step = prepare(query, key, value, options=DecodeOptions(num_splits=4))
    queries = [inputs(seed)[0] for seed in range(6)]
    expected = [flex_decode(x, key, value, options=DecodeOptions(num_splits=4)) for x in queries]
    torch.cuda.synchronize()
    wrong = []

    def work(number):
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(50):
                found = step(queries[number])
                stream.synchronize()
                if not torch.equal(found, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
