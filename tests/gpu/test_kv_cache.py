"""KV caches on a GPU: the same as on the CPU to the last bit; launches, waiting, recompilation, CUDA graphs."""

import pytest
import torch
from unit.kv.test_kv_cache import Model, assert_same, captured, new_tokens

from flexdecode import flex_decode, mods, write_kv
from flexdecode.kv import launching
from flexdecode.kv.kv_cache import KVCache
from flexdecode.kv.paged import OutOfPagesError, PagedKVCache

pytestmark = pytest.mark.gpu

SIZES = {"batch": 3, "num_kv_heads": 4, "head_dim": 128, "v_head_dim": 64}
TOKENS = {"heads": 4, "D": 128, "Dv": 64}
FIXED = {"k_scale": torch.tensor([0.02, 0.3, 1.0, 7.0]), "v_scale": 0.01}
STORED = [torch.float16, torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def make(kind, device="cuda", dtype=torch.float16, **arguments):
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")
    if kind == "contiguous":
        return KVCache(max_kv_len=3000, dtype=dtype, device=device, **(SIZES | arguments))
    page_size = int(kind.removeprefix("pages of "))
    return PagedKVCache(num_pages=6000, page_size=page_size, dtype=dtype, device=device, **(SIZES | arguments))


def tokens(num_tokens, seed=0, dtype=torch.float16, device="cuda", **sizes):
    return new_tokens(num_tokens, seed=seed, dtype=dtype, device=device, **(TOKENS | sizes))


CACHES = pytest.mark.parametrize("kind", ["contiguous", "pages of 1", "pages of 3", "pages of 16"])


# --- Equal to the CPU -------------------------------------------------------------------------------------------------


@CACHES
@pytest.mark.parametrize(("dtype", "scales"), [(d, {}) for d in STORED] + [(d, FIXED) for d in STORED[3:]])
@pytest.mark.parametrize("new", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_the_same_bits_as_on_the_cpu(new, dtype, scales, kind):
    cache, other = make(kind, dtype=dtype, **scales), make(kind, "cpu", dtype=dtype, **scales)
    for step, counts in enumerate([[700, 1, 33], None, None, [0, 2, 1], None]):
        offered = 1 if counts is None else max(counts)
        cache.append(*tokens(offered, step, new), num_tokens=counts)
        other.append(*tokens(offered, step, new, "cpu"), num_tokens=counts)
    assert_same(cache, other)
    assert not cache._arrivals.any()


@pytest.mark.parametrize(("heads", "D", "Dv"), [(1, 16, 16), (3, 72, 40), (5, 17, 33), (1, 576, 512), (16, 256, 256)])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_head_dimensions(dtype, heads, D, Dv):
    sizes = {"num_kv_heads": heads, "head_dim": D, "v_head_dim": Dv}
    cache, other = (make("pages of 16", device, dtype, **sizes) for device in ("cuda", "cpu"))
    for step, counts in enumerate([[200, 77, 0], [1, 1, 1], [3, 0, 7]]):
        new = {"heads": heads, "D": D, "Dv": Dv}
        cache.append(*tokens(max(counts), step, **new), num_tokens=counts)
        other.append(*tokens(max(counts), step, device="cpu", **new), num_tokens=counts)
    assert_same(cache, other)


def test_any_strides():
    cache, other = make("pages of 16"), make("pages of 16", "cpu")
    for x, device in ((cache, "cuda"), (other, "cpu")):
        wide_k, wide_v = tokens(300, device=device, D=257, Dv=130)
        k = wide_k.transpose(1, 2).contiguous().transpose(1, 2)[..., 1::2]
        v = wide_v[:, :1, :, 66:].expand(-1, 4, -1, -1)
        x.append(k, v)
        x.append(k[:, :, :1], v[:, :, :1])
    assert_same(cache, other)


def test_many_programs_for_a_sequence_again_and_again():
    """Whichever program arrives last, every one reads the old length."""
    cache, other = make("contiguous", batch=3), make("contiguous", "cpu", batch=3)
    k, v = tokens(100)
    for _ in range(29):
        cache.append(k, v)
    k, v = k.cpu(), v.cpu()
    for _ in range(29):
        other.append(k, v)
    assert_same(cache, other)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_forks(dtype):
    caches = make("pages of 16", dtype=dtype), make("pages of 16", "cpu", dtype=dtype)
    for cache, device in zip(caches, ("cuda", "cpu"), strict=True):
        cache.append(*tokens(100, device=device), num_tokens=[100, 0, 0])
        cache.fork(0, 1)
        cache.fork(0, 2)
        for step in range(20):
            cache.append(*tokens(1, step + 1, device=device))
        cache.truncate(1, 50)
        cache.free(2)
        cache.fork(1, 2)
        cache.append(*tokens(3, 99, device=device), num_tokens=[1, 2, 3])
    assert_same(*caches)


def test_out_of_pages():
    cache = PagedKVCache(num_pages=4, page_size=16, device="cuda", **SIZES)
    cache.append(*tokens(16))
    with pytest.raises(OutOfPagesError, match="3 more pages of 16 tokens are needed, but 1 of 4 are free"):
        cache.append(*tokens(1))
    cache.append(*tokens(1), num_tokens=[0, 1, 0])
    assert cache.kv_lens.tolist() == cache.lengths == [16, 17, 16]


# --- Launches ---------------------------------------------------------------------------------------------------------


def events_of(call):
    """Names of what the GPU ran during a call."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA], acc_events=True) as profile:
        call()
        torch.cuda.synchronize()
    return sorted(e.name for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA)


@CACHES
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_an_append_is_one_kernel(dtype, kind):
    cache = make(kind, dtype=dtype)
    cache.append(*tokens(20))
    one, many = tokens(1), tokens(500)
    cache.append(*one)
    if kind in ("contiguous", "pages of 16"):  # no new page
        assert events_of(lambda: cache.append(*one)) == ["append"]
    if kind == "contiguous":
        assert events_of(lambda: cache.append(*many)) == ["append"]
    copies = events_of(lambda: cache.append(*many, num_tokens=[500, 1, 0]))
    copies.remove("append")
    assert not [name for name in copies if "Memcpy" not in name and "index" not in name]


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
@CACHES
def test_nothing_waits_for_the_gpu(kind):
    cache = captured(make(kind, dtype=torch.int8))
    one, many = tokens(1), tokens(50)

    def steps():
        cache.append(*many, num_tokens=[50, 7, 0])
        for _ in range(5):
            cache.append(*one)
        if cache.page_table is not None:
            cache.free(2)
            cache.fork(1, 2)
            cache.append(*one)
        cache.reserve(1)
        cache.truncate(0, 20)
        cache.free(1)
        cache.reset()

    steps()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("width", [17, 72, 128])
def test_no_length_makes_another_kernel(width):
    """Neither of the cache, nor of what is appended, nor the number of sequences."""
    sizes = {"num_kv_heads": 4, "head_dim": width, "v_head_dim": width}
    new = {"heads": 4, "D": width, "Dv": width}

    def appends(batch, page_size, num_pages):
        cache = PagedKVCache(batch=batch, num_pages=num_pages, page_size=page_size, device="cuda", **sizes)
        for num_tokens in (1, 2, 16, 33):
            k, v = tokens(num_tokens, batch=batch, **new)
            cache.append(k, v)
            cache.append(k, v, num_tokens=[min(1, num_tokens)] * batch)

    appends(1, 1, 100)
    before = launching._compiled.cache_info().currsize
    assert before
    appends(3, 16, 20)
    appends(16, 17, 160)
    assert launching._compiled.cache_info().currsize == before


def test_a_side_stream():
    """What is reserved and appended on a stream follows what was written on it."""
    cache, other = make("pages of 3"), make("pages of 3", "cpu")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(10):
            k, v = tokens(5, step)
            late_k, late_v = torch.full_like(k, torch.nan), torch.full_like(v, torch.nan)
            torch.cuda._sleep(2_000_000)
            late_k.copy_(k)
            late_v.copy_(v)
            cache.append(late_k, late_v, num_tokens=[5, step % 3, 1])
    torch.cuda.current_stream().wait_stream(stream)
    for step in range(10):
        other.append(*tokens(5, step, device="cpu"), num_tokens=[5, step % 3, 1])
    assert_same(cache, other)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_a_cache_on_another_device_than_the_current_one():
    cache, other = make("pages of 16", "cuda:1"), make("pages of 16", "cpu")
    with torch.cuda.device(0):
        cache.append(*tokens(30, device="cuda:1"), num_tokens=[30, 3, 17])
        cache.append(*tokens(1, device="cuda:1"))
        assert torch.cuda.current_device() == 0
    other.append(*tokens(30, device="cpu"), num_tokens=[30, 3, 17])
    other.append(*tokens(1, device="cpu"))
    assert_same(cache, other)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured_append(cache, num_tokens=1):
    """A graph of an append, and the tensors that it appends from."""
    new = tokens(num_tokens)
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        cache.append(*new)
    return graph, new


@CACHES
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8], ids=str)
def test_every_replay_appends_a_token(dtype, kind):
    cache, other = make(kind, dtype=dtype), make(kind, "cpu", dtype=dtype)
    cache.append(*tokens(37), num_tokens=[37, 5, 0])
    other.append(*tokens(37, device="cpu"), num_tokens=[37, 5, 0])
    graph, new = captured_append(cache)
    assert cache.lengths == cache.kv_lens.tolist() == [37, 5, 0]
    for step in range(60):
        on_cpu = tokens(1, step + 1, device="cpu")
        for x, y in zip(new, on_cpu, strict=True):
            x.copy_(y)
        counts = [1, step % 2, int(step > 20)]
        cache.reserve(counts)
        graph.replay()
        other.append(*on_cpu, num_tokens=counts)
    assert_same(cache, other)


def test_replays_between_forks_and_appends():
    """Pages move between replays; what was not reserved is not appended."""
    cache, model = make("pages of 16"), Model()
    prompt = tokens(20)
    cache.append(*prompt, num_tokens=[20, 0, 0])
    model.append(*prompt, [20, 0, 0])
    graph, new = captured_append(cache, 2)
    for step in range(40):
        if step % 10 == 3:
            cache.free(1)
            cache.fork(0, 1)
            model.tokens[1] = list(model.tokens[0])
        if step % 10 == 7:
            cache.truncate(0, 18)
            model.tokens[0] = model.tokens[0][:18]
        for x, y in zip(new, tokens(2, step), strict=True):
            x.copy_(y)
        graph.replay()  # nothing is reserved
        counts = [step % 3, (step + 1) % 3, 2]
        cache.reserve(counts)
        graph.replay()
        model.append(*(x.clone() for x in new), counts)
        extra = tokens(1, 1000 + step)
        cache.append(*extra)
        model.append(*extra)
    model.check(cache)


def test_what_the_host_does_is_refused_during_capture():
    cache = make("pages of 16")
    cache.append(*tokens(3))
    new = tokens(1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        with pytest.raises(RuntimeError, match="works on the host"):
            cache.reserve(1)
        with pytest.raises(RuntimeError, match="works on the host"):
            cache.fork(0, 1)
        with pytest.raises(ValueError, match="cannot keep `num_tokens`"):
            cache.append(*new, num_tokens=[1, 1, 0])
        cache.append(*new)
    cache.reserve(1)
    graph.replay()
    assert cache.kv_lens.tolist() == cache.lengths == [4, 4, 4]


# --- Layers, and other forms of tokens --------------------------------------------------------------------------------

LAYERS = 3


def packed(x, counts):
    return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)])


@pytest.mark.parametrize("kind", ["pages of 1", "pages of 3", "pages of 16"])
@pytest.mark.parametrize(("dtype", "scales"), [(d, {}) for d in STORED] + [(d, FIXED) for d in STORED[3:]])
def test_layers_hold_the_same_bits_as_on_the_cpu(dtype, scales, kind):
    cache, other = (make(kind, device, dtype, num_layers=LAYERS, **scales) for device in ("cuda", "cpu"))
    for step, counts in enumerate([[300, 1, 33], [1, 1, 1], [0, 2, 1], [0, 0, 0], [1, 0, 5]]):
        for x, device in ((cache, "cuda"), (other, "cpu")):
            x.reserve(counts)
            k, v = tokens(max(*counts, 1), step, device=device)
            x.layer(0).append(k, v)
            if sum(counts):
                x.layer(1).append(packed(k, counts), packed(v, counts))
            for b in [b for b in range(3) if counts[b]]:
                x.layer(2).append(k[b : b + 1], v[b : b + 1], sequence=b)
            if step == 1:
                x.fork(0, 1) if not x.lengths[1] else x.truncate(1, 1)
                x.free(2)
                x.fork(0, 2)
    assert_same(cache, other)
    assert cache.cu_seqlens_q.tolist() == other.cu_seqlens_q.tolist()


@pytest.mark.parametrize("kind", ["contiguous", "pages of 16"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e4m3fn], ids=str)
def test_one_sequence_and_packed_tokens(dtype, kind):
    cache, other = make(kind, dtype=dtype), make(kind, "cpu", dtype=dtype)
    for x, device in ((cache, "cuda"), (other, "cpu")):
        for step in range(6):
            k, v = tokens(50, step, device=device)
            x.append(k[:1], v[:1], 50 if step % 2 else 1, sequence=step % 3)
            x.append(packed(k, [3, 0, 1]), packed(v, [3, 0, 1]), [3, 0, 1])
            x.append(k[:, :, :1], v[:, :, :1])
    assert_same(cache, other)


@pytest.mark.parametrize("dtype", STORED, ids=str)
def test_slots(dtype):
    """Halves of one tensor, and scales of every kind."""
    if dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("this GPU has no float8_e4m3fn")
    slots = torch.randperm(40 * 16, generator=torch.Generator().manual_seed(0))[:70].int()
    slots[::7] = -1
    scales = [(None, None)]
    if dtype.itemsize == 1:
        scales = [(0.25, 2.0), (torch.tensor(0.25), torch.tensor([2.0])), (torch.tensor([0.5, 1, 2, 4]), 1.0)]
        scales.append((torch.ones(40, 4, 16), torch.ones(40, 16, 4).transpose(1, 2)))
    for k_scale, v_scale in scales:
        results = []
        for device in ("cuda", "cpu"):
            memory = torch.zeros(40, 16, 4, 192, device=device).to(dtype).transpose(1, 2)
            k, v = torch.randn(2, 80, 4, 128, generator=torch.Generator().manual_seed(1)).to(device)
            given = [x.clone().to(device) if isinstance(x, torch.Tensor) else x for x in (k_scale, v_scale)]
            write_kv(k, v[..., :64], memory[..., :128], memory[..., 128:], slots.to(device), *given)
            results.append([memory, *(x for x in given if isinstance(x, torch.Tensor))])
        for x, y in zip(*results, strict=True):
            assert torch.equal(x.cpu().reshape(-1).view(torch.uint8), y.reshape(-1).view(torch.uint8))


def test_latents():
    sizes = {"num_kv_heads": 1, "head_dim": 576, "v_head_dim": 512, "latent": True, "num_layers": LAYERS}
    cache, other = (make("pages of 16", device, torch.bfloat16, **sizes) for device in ("cuda", "cpu"))
    for x, device in ((cache, "cuda"), (other, "cpu")):
        for step, counts in enumerate([[200, 7, 64], [1, 1, 1]]):
            k, _ = tokens(max(counts), step, torch.bfloat16, device, heads=1, D=576)
            x.reserve(counts)
            for i in range(LAYERS):
                x.layer(i).append(k)
    assert_same(cache, other)


def test_a_layer_append_is_one_kernel_and_a_reservation_one_copy():
    cache = make("pages of 16", num_layers=LAYERS)
    k, v = tokens(1)
    cache.reserve(1)
    cache.layer(0).append(k, v)
    cache.layer(1).append(k[:, :, 0], v[:, :, 0])
    cache.reserve(1)
    assert events_of(lambda: [cache.layer(i).append(k, v) for i in range(LAYERS)]) == ["write"] * LAYERS
    assert events_of(lambda: cache.layer(0).append(k[:, :, 0], v[:, :, 0])) == ["write"]
    assert len(events_of(lambda: cache.reserve(1))) == 1  # no new page


@pytest.mark.filterwarnings("ignore:Synchronization debug mode")  # PyTorch calls the mode a prototype
def test_steps_of_layers_do_not_wait_for_the_gpu():
    cache = make("pages of 3", dtype=torch.int8, num_layers=LAYERS)
    k, v = tokens(5)
    rows = [packed(x, [5, 1, 2]) for x in (k, v)]
    pages = [torch.zeros(9, 4, 16, width, dtype=torch.int8, device="cuda") for width in (128, 64)]
    slots, scale = torch.arange(8, device="cuda"), torch.tensor(0.5, device="cuda")

    def steps():
        for _ in range(3):
            cache.reserve([5, 1, 2])
            for i in range(LAYERS):
                cache.layer(i).append(k, v)
                cache.layer(i).append(*rows)
        cache.free(2)
        cache.fork(0, 2)
        cache.reserve(1)
        cache.layer(0).append(k, v)
        cache.layer(0).append(*rows, slot_mapping=slots)
        write_kv(*rows, *pages, slots, scale, 0.5)
        cache.truncate(0, 2)
        cache.reset()

    steps()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for _ in range(3):
            steps()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("form", ["batch", "packed"])
def test_a_graph_of_all_layers(form):
    """The host reserves before each replay; sequences come and go between them."""
    cache, other = (make("pages of 16", device, num_layers=LAYERS) for device in ("cuda", "cpu"))
    query, (k, v) = torch.randn(3, 8, 128, device="cuda").half(), tokens(1)
    window = mods.sliding_window(20)

    def step(cache, query, k, v):
        outs = []
        for i in range(LAYERS):
            new = (k, v) if form == "batch" else (k[:, :, 0], v[:, :, 0])
            cache.layer(i).append(*(x * (i + 1) for x in new))
            mask = {"mask_mod": window if i % 2 else mods.causal()}
            outs.append(flex_decode(query, cache=cache.layer(i), cu_seqlens_q=cache.cu_seqlens_q, **mask))
        return torch.stack(outs)

    for x in (cache, other):
        x.reserve(1)
    step(cache, query, k, v), step(other, query.cpu(), *(x.cpu() for x in (k, v)))
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        out = step(cache, query, k, v)
    for turn in range(50):
        for x, y in zip((k, v), tokens(1, turn), strict=True):
            x.copy_(y)
        for x in (cache, other):
            if turn % 10 == 7:
                x.free(1)
                x.fork(0, 1)
            if turn % 10 == 9:
                x.truncate(0, 3)
            x.reserve(1)
        graph.replay()
        expected = step(other, query.cpu(), *(x.cpu() for x in (k, v)))
        assert torch.allclose(out.cpu().float(), expected.float(), atol=2e-2)
    assert_same(cache, other)


def test_a_cache_moves_between_devices():
    cache = make("pages of 16", dtype=torch.int8, num_layers=LAYERS)
    cache.reserve([20, 3, 0])
    cache.layer(1).append(*tokens(20))
    moved = cache.to("cpu")
    assert_same(cache, moved)
    back = moved.to("cuda")
    assert cache.to("cuda") is cache and back is not cache and back.device == cache.device
    back.reserve(1)
    back.layer(1).append(*tokens(1))
    assert cache.lengths == cache.kv_lens.tolist() == [20, 3, 0] and back.kv_lens.tolist() == [21, 4, 1]
