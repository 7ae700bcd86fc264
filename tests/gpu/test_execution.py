"""Memory, streams, threads, devices and CUDA graphs: what is around the kernels."""

import threading

import pytest
import torch
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode, mods

pytestmark = pytest.mark.gpu

SHAPE = (4, 8, 2, 1, 1000, 64)
SPLITS = pytest.mark.parametrize("num_splits", [1, 4])


def inputs(seed=0, shape=SHAPE, device="cuda"):
    return make_inputs(*shape, dtype=torch.float16, device=device, seed=seed)


def kernels_of(call):
    """Names of what the GPU ran during a call."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sorted(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)


# --- Memory -----------------------------------------------------------------------------------------------------------


@SPLITS
@pytest.mark.parametrize("layout", ["bhnd", "strided"])
def test_every_element_of_out_is_written_and_nothing_else(layout, num_splits):
    query, key, value = inputs()
    storage = torch.full((4, 9, 2, 128), torch.nan, dtype=torch.float16, device="cuda")
    out = storage[:, 1:, :1, ::2] if layout == "strided" else torch.full_like(query, torch.nan)
    kv_lens = torch.tensor([1000, 0, 1, 130], device="cuda")
    arguments = {"kv_lens": kv_lens, "out": out, "options": DecodeOptions(num_splits=num_splits), "return_lse": True}
    result, lse = flex_decode(query, key, value, **arguments)
    assert result is out
    assert_close_to_reference(out, lse, query, key, value, kv_lens=kv_lens)
    assert storage.isnan().sum() == storage.numel() - (out.numel() if layout == "strided" else 0)


@SPLITS
def test_memory_that_others_left_behind_is_not_read(num_splits):
    """New outputs and workspaces lie where NaN was."""
    torch.cuda.empty_cache()
    poison = [torch.full((1 << n,), torch.nan, device="cuda") for n in range(8, 24)]
    del poison
    query, key, value = inputs(shape=(4, 8, 2, 1, 3000, 64))
    kv_lens = torch.tensor([3000, 0, 1, 130], device="cuda")
    options = DecodeOptions(num_splits=num_splits)
    out, lse = flex_decode(query, key, value, kv_lens=kv_lens, return_lse=True, options=options)
    assert_close_to_reference(out, lse, query, key, value, kv_lens=kv_lens)


def test_the_workspace_grows_while_earlier_calls_run():
    """Calls of growing and shrinking size, without waiting in between."""
    sizes = [(1, 200), (3, 4000), (2, 1000), (4, 20000), (1, 64)]
    calls = [inputs(seed, (B, 8, 2, 1, N, 64)) for seed, (B, N) in enumerate(sizes)]
    alone = [flex_decode(*x, options=DecodeOptions(num_splits=7, block_n=64)) for x in calls]
    torch.cuda.synchronize()
    again = [flex_decode(*x, options=DecodeOptions(num_splits=7, block_n=64)) for _ in range(5) for x in calls]
    torch.cuda.synchronize()
    for i, out in enumerate(again):
        assert torch.equal(out, alone[i % len(calls)])


# --- Launches ---------------------------------------------------------------------------------------------------------


def test_one_split_is_one_kernel_and_more_are_two():
    x, alibi = inputs(), mods.alibi(8, device="cuda")
    for num_splits, expected in ((1, ["decode_split"]), (4, ["decode_combine", "decode_split"])):
        options = DecodeOptions(num_splits=num_splits)
        assert kernels_of(lambda options=options: flex_decode(*x, alibi, options=options)) == expected


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
def test_repeated_calls_do_not_wait_for_the_gpu():
    """Whatever a call may bring along: lengths, offsets, captures of all kinds, strided lengths."""
    x, bias, on_cpu = inputs(), torch.randn(8, 1000).cuda(), torch.tensor(0.5)
    kv_lens = torch.tensor([1000, 1, 5, 1, 2, 1, 7, 1], device="cuda")[::2]
    q_offset = torch.tensor([999, 0, 0, 5], device="cuda", dtype=torch.int32)

    def call():
        return flex_decode(
            *x, lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx] * on_cpu, mods.sliding_window(100),
            kv_lens=kv_lens, q_offset=q_offset, return_lse=True,
        )  # fmt: skip

    call()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            call()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_a_side_stream_sees_what_was_written_on_it():
    x = inputs()
    expected = flex_decode(*x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = [torch.full_like(t, torch.nan) for t in x]
        torch.cuda._sleep(20_000_000)  # the inputs arrive late
        for t, source in zip(late, x, strict=True):
            t.copy_(source)
        out = flex_decode(*late)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(out, expected)


def test_back_to_back_calls_that_feed_one_another():
    """A call reads what the one before it writes, into memory that this one has read: none may start too early."""
    query, *cache = inputs(shape=(2, 8, 2, 1, 3000, 64))
    other_cache = inputs(1, (2, 8, 2, 1, 300, 64))[1:]
    options = [DecodeOptions(num_splits=n) for n in (1, 5)]
    buffers = [torch.empty_like(query) for _ in range(2)]

    def chain(wait):
        x = query
        for step in range(40):
            key, value = other_cache if step % 3 else cache
            x = flex_decode(x, key, value, scale=4.0, out=buffers[step % 2], options=options[step // 2 % 2])
            if wait:
                torch.cuda.synchronize()
        return x.clone()

    expected = chain(wait=True)
    for _ in range(5):
        assert torch.equal(chain(wait=False), expected)


def test_two_threads():
    """Each on a stream of its own, with calls of different sizes."""
    calls = [inputs(seed, (B, 8, 2, 1, N, 64)) for seed, (B, N) in enumerate([(1, 4000), (3, 700)])]
    expected = [flex_decode(*x, options=DecodeOptions(num_splits=5)) for x in calls]
    torch.cuda.synchronize()
    wrong = []

    def work(number):
        with torch.cuda.stream(torch.cuda.Stream()):
            for _ in range(100):
                out = flex_decode(*calls[number], options=DecodeOptions(num_splits=5))
                if not torch.equal(out, expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number,)) for number in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_on_another_device_than_the_current_one():
    x = inputs(device="cuda:1")
    bias = torch.randn(8, 1000).to("cuda:1")
    with torch.cuda.device(0):
        out, lse = flex_decode(*x, lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx], return_lse=True)
        assert torch.cuda.current_device() == 0
    assert out.device == x[0].device
    assert_close_to_reference(out, lse, *x, lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx])


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured(call):
    """A graph of a call that ran before, and its result."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@SPLITS
def test_a_graph_sees_new_lengths_offsets_and_captures(num_splits):
    x = inputs()
    kv_lens, q_offset = torch.zeros(4, dtype=torch.int32).cuda(), torch.zeros(4, dtype=torch.int64).cuda()
    bias, window = torch.zeros(8, 1000).cuda(), torch.zeros(8, dtype=torch.int32).cuda()

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx]

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window[h])

    arguments = {"kv_lens": kv_lens, "q_offset": q_offset}
    options = DecodeOptions(num_splits=num_splits)
    graph, (out, lse) = captured(
        lambda: flex_decode(*x, score_mod, mask_mod, return_lse=True, options=options, **arguments)
    )
    for lengths, offsets in (([1000, 1, 500, 0], [999, 5, 100, 0]), ([3, 600, 999, 1000], [2, 599, 998, 2000])):
        kv_lens.copy_(torch.tensor(lengths))
        q_offset.copy_(torch.tensor(offsets))
        bias.normal_()
        window.random_(1, 1000)
        for t in x:
            t.normal_()
        graph.replay()
        torch.cuda.synchronize()
        assert_close_to_reference(out, lse, *x, score_mod, mask_mod, **arguments)


def test_graphs_and_eager_calls_do_not_share_memory():
    calls = [inputs(seed, (B, 8, 2, 1, N, 64)) for seed, (B, N) in enumerate([(1, 4000), (3, 700), (2, 9000)])]
    options = DecodeOptions(num_splits=6)
    expected = [flex_decode(*x, options=options) for x in calls]
    graphs = [captured(lambda x=x: flex_decode(*x, options=options)) for x in calls]
    for _ in range(3):
        for graph, out in graphs:
            out.fill_(torch.nan)
            graph.replay()
        eager = [flex_decode(*x, options=options) for x in calls]
        torch.cuda.synchronize()
        for i, (_, out) in enumerate(graphs):
            assert torch.equal(out, expected[i]) and torch.equal(eager[i], expected[i])
