"""`flex_decode` in regions that torch.compile and torch.export trace: one custom op for each call, the same result."""

import copy
import functools
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from support import MODS, OF_INDUCTOR, assert_close_to_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import (
    DecodeOptions,
    FlexDecodeError,
    KVCache,
    PagedKVCache,
    flex_decode,
    merge_attention,
    mods,
    write_kv,
)
from flexdecode.kv.cache import TENSORS

OF_RECORDER = pytest.mark.filterwarnings("ignore:While (compiling|exporting), we found certain side effects")
B, HQ, HKV, N, D = 2, 4, 2, 40, 16
torch.manual_seed(0)
QUERY = torch.randn(B, HQ, 1, D)
KEY, VALUE = torch.randn(B, HKV, N, D), torch.randn(B, HKV, N, D)
SLOPES, TABLE, WINDOW = torch.rand(HQ), torch.randn(HQ, N), 7
CACHE = QUERY, KEY, VALUE


def compiled(model, backend="eager"):
    """The model as one graph, and a counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(model, fullgraph=True, backend=counter), counter


def check(model, calls, compilations=1, backend="eager"):
    """Every call gives the bits that it gives without compilation; at most so many graphs are compiled."""
    run, counter = compiled(model, backend)
    for call in calls:
        assert torch.equal(run(*call), model(*call))
    assert counter.frame_count <= compilations
    return counter


# --- Mods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
def test_families(family):
    score_mod, mask_mod = (make(B, HQ, N, 1, "cpu") for make in family[1:])
    check(lambda q, k, v: flex_decode(q, k, v, score_mod, mask_mod), [CACHE])
    assert_close_to_reference(*flex_decode(*CACHE, score_mod, mask_mod, return_lse=True), *CACHE, score_mod, mask_mod)


class Model(torch.nn.Module):
    """Mods that are methods and read buffers, parameters and numbers of a module."""

    def __init__(self):
        super().__init__()
        self.register_buffer("slopes", SLOPES)
        self.cap = torch.nn.Parameter(torch.tensor(20.0), requires_grad=False)
        self.window = 9

    def score(self, score, b, h, q_idx, kv_idx):
        return self.cap * torch.tanh(score / self.cap) - (q_idx - kv_idx) * self.slopes[h]

    def mask(self, b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < self.window)

    def forward(self, q, k, v):
        return flex_decode(q, k, v, self.score, self.mask)


class Cap:
    def __init__(self, cap):
        self.cap = cap

    def __call__(self, score, b, h, q_idx, kv_idx):
        return self.cap * torch.tanh(score / self.cap)


def within(window, b, h, q_idx, kv_idx):
    return q_idx - kv_idx < window


CATALOGUE = {
    "alibi": lambda: (mods.alibi(HQ), None),
    "softcap": lambda: (mods.softcap(30.0), None),
    "window": lambda: (None, mods.sliding_window(9)),
    "streaming": lambda: (None, mods.streaming(2, 7)),
    "chunked": lambda: (None, mods.chunked(8)),
    "dilated": lambda: (None, mods.dilated(5, 3)),
    "prefix": lambda: (None, mods.prefix_lm(torch.tensor([3, 5]))),
    "document": lambda: (None, mods.document(torch.zeros(B, N, dtype=torch.int32))),
    "and": lambda: (None, mods.and_masks(mods.causal(), mods.sliding_window(9))),
    "or": lambda: (None, mods.or_masks(mods.causal(), mods.sliding_window(9))),
}


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_catalogue_inside_a_region(name):
    check(lambda q, k, v: flex_decode(q, k, v, *CATALOGUE[name]()), [CACHE])


CHANGING = {
    "softcap": (lambda n: (mods.softcap(10.5 + n), None), 2),
    "window": (lambda n: (None, mods.sliding_window(n)), 2),
    "streaming": (lambda n: (None, mods.streaming(2, n)), 2),
    "prefix": (lambda n: (None, mods.prefix_lm(n)), 2),
    "chunked": (lambda n: (None, mods.chunked(n)), 4),
    "dilated": (lambda n: (None, mods.dilated(5, n)), 4),
}


@pytest.mark.parametrize("name", CHANGING)
def test_the_catalogue_with_a_number_that_changes(name):
    make, compilations = CHANGING[name]
    check(lambda q, k, v, n: flex_decode(q, k, v, *make(n)), [(*CACHE, n) for n in (5, 6, 7, 8)], compilations)


def test_methods_of_a_module():
    check(Model(), [CACHE])


def test_an_object():
    check(lambda q, k, v: flex_decode(q, k, v, Cap(3.0)), [CACHE])


def test_a_module_as_a_mod():
    class Bias(torch.nn.Module):
        def forward(self, score, b, h, q_idx, kv_idx):
            return score + SLOPES[h]

    bias = Bias()
    check(lambda q, k, v: flex_decode(q, k, v, bias), [CACHE])


def test_globals_and_pytorch_functions():
    def score_mod(score, b, h, q_idx, kv_idx):
        kept = torch.where(q_idx - kv_idx < WINDOW, score, -float("inf"))
        return torch.nn.functional.silu(kept.clamp(min=-9.0)) + torch.stack([SLOPES[h], SLOPES[0]]).amax() + (2 - h)

    check(lambda q, k, v: flex_decode(q, k, v, score_mod), [CACHE])


def test_rows_of_tables():
    def score_mod(score, b, h, q_idx, kv_idx):
        row = TABLE[h]
        return score + row[kv_idx] + row[-1] + TABLE[h, :3].sum() + torch.split(row, 20)[1].mean() + row.shape[0]

    run, _ = compiled(lambda q, k, v: flex_decode(q, k, v, score_mod))
    torch.testing.assert_close(run(*CACHE), flex_decode(*CACHE, score_mod))


def test_several_calls_in_a_region():
    def model(q, k, v, window):
        first = flex_decode(q, k, v, None, functools.partial(within, window))
        second = flex_decode(first, k, v, mods.softcap(20.0), mods.causal(), kv_lens=torch.tensor([20, 30]))
        return second + flex_decode(second, k, v)

    counter = check(model, [(*CACHE, window) for window in range(3, 9)], 2)
    ops = [node.target for node in counter.graphs[0].graph.nodes if "flexdecode" in str(node.target)]
    assert ops == [torch.ops.flexdecode.decode] * 3


# --- What changes from step to step -----------------------------------------------------------------------------------


def grows(q, k, v):
    return flex_decode(q, k, v, lambda s, b, h, q_idx, kv_idx: s - (q_idx - kv_idx) * SLOPES[h], mods.causal())


def numbers(q, k, v, window, factor):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(q_idx - kv_idx < window, score * factor, -float("inf"))

    return flex_decode(q, k, v, score_mod)


def tables(q, k, v, table):
    return flex_decode(q, k, v, lambda s, b, h, q_idx, kv_idx: s + table[h, kv_idx])


CHANGES = {
    "numbers": (numbers, lambda i: (*CACHE, 5 + i, 0.3 + i / 7)),
    "length of the cache": (grows, lambda i: (QUERY, KEY[:, :, : 20 + i], VALUE[:, :, : 20 + i])),
    "batch": (grows, lambda i: [x[:1].repeat(2 + i, 1, 1, 1) for x in CACHE]),
    "table": (tables, lambda i: (*CACHE, torch.randn(HQ, N))),
    "growing table": (
        tables, lambda i: (QUERY, KEY[:, :, : 20 + i], VALUE[:, :, : 20 + i], torch.randn(HQ, 20 + i)),
    ),
    "kv_lens": (lambda q, k, v, n: flex_decode(q, k, v, kv_lens=n), lambda i: (*CACHE, 10 + i)),
    "q_offset": (
        lambda q, k, v, n: flex_decode(q, k, v, None, mods.causal(), q_offset=n), lambda i: (*CACHE, 10 + i),
    ),
    "argument": (
        lambda q, k, v, w: flex_decode(q, k, v, None, functools.partial(within, w)), lambda i: (*CACHE, 3 + i),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_what_changes_compiles_twice_at_most(name, backend):
    model, call = CHANGES[name]
    check(model, [call(i) for i in range(9)], 2, backend)


@OF_INDUCTOR
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_a_hundred_steps(backend):
    """Everything changes at once: lengths, a captured tensor, numbers in a closure and in arguments."""
    if backend == "inductor" and not any(map(shutil.which, ("g++", "c++", "clang++"))):
        pytest.skip("inductor needs a C++ compiler")

    def model(q, k, v, lens, table, window, cap):
        def score_mod(score, b, h, q_idx, kv_idx):
            return cap * torch.tanh(score / cap) + table[h, kv_idx]

        return flex_decode(q * 2, k, v, score_mod, functools.partial(within, window), kv_lens=lens) + 1

    steps = [
        (*CACHE, torch.tensor([5 + i % 30, 9 + i % 31]), torch.randn(HQ, N), 3 + i, 2.0 + i / 3) for i in range(100)
    ]
    check(model, steps, 2, backend)


def test_a_divisor_is_a_constant():
    """As without compilation: another value is another kernel."""

    def model(q, k, v, step):
        return flex_decode(q, k, v, None, lambda b, h, q_idx, kv_idx: (kv_idx // step) % 2 == 0)

    check(model, [(*CACHE, 2 + i // 2) for i in range(6)], 3)


def test_a_divisor_that_is_read_twice():
    """Its first place makes a constant of it, which in PyTorch's eyes it then is everywhere."""

    def model(q, k, v, size):
        return flex_decode(q, k, v, None, lambda b, h, q_idx, kv_idx: q_idx // size == kv_idx // size)

    check(model, [(*CACHE, size) for size in (8, 9, 10)], 3)


def test_a_divisor_in_both_mods():
    def model(q, k, v, size):
        def score_mod(score, b, h, q_idx, kv_idx):
            return score * (kv_idx % size)

        return flex_decode(q, k, v, score_mod, lambda b, h, q_idx, kv_idx: kv_idx // size < 3)

    check(model, [(*CACHE, size) for size in (8, 9, 10)], 3)


def test_many_divisors():
    """Each of them becomes a constant in a round of its own."""

    def model(q, k, v, *steps):
        def mask_mod(b, h, q_idx, kv_idx):
            alive = kv_idx >= 0
            for step in steps:
                alive = alive & ((kv_idx + 1) // step != 3)
            return alive

        return flex_decode(q, k, v, None, mask_mod)

    check(model, [(*CACHE, *range(first, first + 12)) for first in (2, 3, 4)], 3)


# --- Arguments --------------------------------------------------------------------------------------------------------

LENS = torch.tensor([20, 33], dtype=torch.int32)
PACKED = torch.randn(5, HQ, D)
ARGUMENTS = {
    "numbers": {"scale": 0.5, "kv_starts": 3, "kv_offset": 4, "kv_lens": 30},
    "tensors": {"kv_lens": LENS, "kv_starts": torch.tensor([1, 4]), "sinks": SLOPES, "q_offset": LENS.long()},
    "options": {"options": DecodeOptions(backend="torch")},
}


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments(name):
    check(lambda q, k, v: flex_decode(q, k, v, None, mods.causal(), **ARGUMENTS[name]), [CACHE])


def test_pages_scales_and_packed_tokens():
    pages = torch.randint(-99, 99, (6, HKV, 8, D), dtype=torch.int8)
    arguments = {
        "kv_lens": torch.tensor([11, 23], dtype=torch.int32), "page_table": torch.tensor([[2, 0, 5], [1, 3, 4]]).int(),
        "cu_seqlens_q": torch.tensor([0, 2, 5], dtype=torch.int32), "max_q_len": 3, "k_scale": 0.01,
        "v_scale": torch.rand(HKV),
    }  # fmt: skip
    check(lambda q: flex_decode(q, pages, pages, mods.alibi(HQ), mods.causal(), **arguments), [(PACKED,)])


def test_a_scale_beside_scales():
    key = torch.randint(-99, 99, (B, HKV, N, D), dtype=torch.int8)
    check(lambda q, k: flex_decode(q, k, k, k_scale=0.01, v_scale=0.02, scale=0.7), [(QUERY, key)])


def test_an_empty_table():
    empty = torch.empty(0, 3)
    keep = torch.zeros(B, dtype=torch.bool)

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(keep[b], score + empty[h, 1], score)

    check(lambda q, k, v: flex_decode(q, k, v, score_mod), [CACHE])


def test_log_sum_exp_and_out():
    def model(q, k, v, out):
        _, lse = flex_decode(q, k, v, mods.softcap(9.0), return_lse=True, out=out)
        return lse

    out = torch.empty_like(QUERY)
    check(model, [(*CACHE, out)])
    assert torch.equal(out, flex_decode(*CACHE, mods.softcap(9.0)))


def test_a_cache_object():
    cache = KVCache(batch=B, num_kv_heads=HKV, max_kv_len=32, head_dim=D, dtype=torch.float32, device="cpu")
    cache.append(KEY[:, :, :9], VALUE[:, :, :9])
    check(lambda q: flex_decode(q, cache=cache, mask_mod=mods.causal()), [(QUERY,)])


def prefix(b, h, q_idx, kv_idx):
    return (kv_idx <= q_idx) | (kv_idx < 5 + b)


@pytest.mark.parametrize("mask_mod", [None, mods.sliding_window(9)], ids=["alone", "with a mask"])
@pytest.mark.parametrize("arguments", [{}, {"kv_offset": 3, "kv_lens": 30}, {"kv_lens": LENS}], ids=str)
def test_a_block_mask(mask_mod, arguments):
    block_mask = create_block_mask(prefix, B, None, N, N, device="cpu", BLOCK_SIZE=16)

    def model(q, k, v, block_mask):
        return flex_decode(q, k, v, mods.softcap(9.0), mask_mod, block_mask=block_mask, **arguments)

    check(model, [(*CACHE, block_mask)])


def test_a_block_mask_that_changes():
    def model(q, k, v, block_mask):
        return flex_decode(q, k, v, block_mask=block_mask)

    masks = [create_block_mask(mods.sliding_window(3 + i), None, None, N, N, "cpu", BLOCK_SIZE=8) for i in range(4)]
    check(model, [(*CACHE, block_mask) for block_mask in [*masks, masks[0]]], 2)


def test_lists_of_a_block_mask_that_are_written_in_place():
    block_mask = create_block_mask(mods.causal(), None, None, N, N, "cpu", BLOCK_SIZE=8)
    run, _ = compiled(lambda q, k, v, m: flex_decode(q, k, v, block_mask=m))
    for changed in (False, True):
        if changed:
            block_mask.kv_num_blocks.zero_()
            block_mask.full_kv_num_blocks.fill_(1)
        assert torch.equal(run(*CACHE, block_mask), flex_decode(*CACHE, block_mask=block_mask))


def test_threads_that_share_a_block_mask():
    """Each call has its own mask and captures, even where the lists are the same."""
    block_mask = create_block_mask(prefix, B, None, N, N, device="cpu", BLOCK_SIZE=16)

    def model(q, k, v, window):
        return flex_decode(q, k, v, None, functools.partial(within, window), block_mask=block_mask)

    run, _ = compiled(model)
    windows = [3, 30]
    expected = [model(*CACHE, window) for window in windows]
    for window in windows:
        run(*CACHE, window)
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(2) as pool:
            outs = list(pool.map(lambda i: (i % 2, run(*CACHE, windows[i % 2])), range(300)))
    finally:
        sys.setswitchinterval(before)
    assert all(torch.equal(out, expected[i]) for i, out in outs)


@pytest.mark.parametrize("stacked", [False, True])
def test_merge_attention(stacked):
    """Every call of a region is an op of its own, and so is the merge of their results."""

    def model(q, k, v):
        first = flex_decode(q, k[:, :, :15], v[:, :, :15], return_lse=True)
        second = flex_decode(q, k[:, :, 15:], v[:, :, 15:], return_lse=True)
        outs, lses = zip(first, second, strict=True)
        if stacked:
            outs, lses = torch.stack(outs), torch.stack(lses)
        return merge_attention(outs, lses)[0]

    counter = check(model, [CACHE], backend="aot_eager")
    ops = [str(node.target) for node in counter.graphs[0].graph.nodes if "flexdecode" in str(node.target)]
    assert ops == ["flexdecode.decode_with_lse"] * 2 + ["flexdecode.merge_attention"]


# --- Caches that grow in the region -----------------------------------------------------------------------------------

SIZES = {"batch": B, "num_kv_heads": HKV, "head_dim": D}
CACHES = {
    "contiguous": lambda: KVCache(max_kv_len=40, dtype=torch.float32, **SIZES),
    "int8": lambda: KVCache(max_kv_len=40, dtype=torch.int8, **SIZES),
    "int8 of one scale": lambda: KVCache(max_kv_len=40, dtype=torch.int8, k_scale=0.1, v_scale=0.1, **SIZES),
    "pages": lambda: PagedKVCache(num_pages=30, page_size=4, dtype=torch.float32, **SIZES),
    "float8 pages": lambda: PagedKVCache(num_pages=30, page_size=4, dtype=torch.float8_e5m2, **SIZES),
}


@pytest.mark.parametrize("kind", CACHES)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_append_and_decode_in_one_region(kind, backend):
    """A step of a model."""
    cache, other = CACHES[kind](), CACHES[kind]()

    def step(query, k, v, cache):
        cache.append(k, v)
        return flex_decode(query * 2, None, None, mods.alibi(HQ), mods.causal(), cache=cache)

    run, counter = compiled(step, backend)
    generator = torch.Generator().manual_seed(1)
    for count in (5, 3, 1, 1, 1, 1):
        k, v = torch.randn(2, B, HKV, count, D, generator=generator)
        other.append(k, v)
        found = run(QUERY, k, v, cache)
        assert torch.equal(found, flex_decode(QUERY * 2, None, None, mods.alibi(HQ), mods.causal(), cache=other))
        assert cache.lengths == other.lengths == cache.kv_lens.tolist()
    assert torch.equal(cache.key.float(), other.key.float()) and torch.equal(cache.value.float(), other.value.float())
    assert counter.frame_count == 3  # 5 tokens, any number of tokens, one token


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_appends_of_every_kind(backend):
    """Two caches in one region, one of them twice; numbers of tokens; calls beside the region; a copy."""
    caches = [CACHES["pages"](), CACHES["int8"]()]
    others = [CACHES["pages"](), CACHES["int8"]()]

    def step(k, v, one, other, counts):
        one.append(k, v, counts)
        other.append(k, v)
        other.append(v, k, 1)

    run, _ = compiled(step, backend)
    for turn in range(3):
        k, v = torch.randn(2, B, HKV, 2, D)
        run(k, v, *caches, [turn % 2, 2])
        step(k, v, *others, [turn % 2, 2])
        caches[0].append(k, v), others[0].append(k, v)
        caches[0].truncate(1, 3), others[0].truncate(1, 3)
    copied = copy.deepcopy(caches[0])
    run(k, v, copied, caches[1], [1, 1])
    assert all(cache.kv_lens.tolist() == cache.lengths for cache in caches)
    assert caches[0].lengths == others[0].lengths and torch.equal(caches[0].key, others[0].key)
    assert copied.lengths == copied.kv_lens.tolist() == [n + 1 for n in caches[0].lengths]


LAYERED = {
    "layers": lambda: PagedKVCache(num_layers=3, num_pages=30, page_size=4, dtype=torch.float32, **SIZES),
    "int8 layers": lambda: PagedKVCache(num_layers=3, num_pages=30, page_size=4, dtype=torch.int8, **SIZES),
    "latent layers": lambda: PagedKVCache(
        num_layers=3, num_pages=30, page_size=4, latent=True, v_head_dim=D // 2, dtype=torch.float32, **SIZES
    ),
}


@pytest.mark.parametrize("kind", LAYERED)
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_the_layers_of_a_cache_in_one_region(kind, backend):
    """A step of a model: the host reserves outside of the region, the layers append and decode in it."""
    cache, other = LAYERED[kind](), LAYERED[kind]()

    def step(query, k, v, cache):
        new = (k,) if "latent" in kind else (k, v)
        for i in range(3):
            layer = cache.layer(i)
            layer.append(*[x * (i + 1) for x in new])
            out = flex_decode(query, None, None, mods.alibi(HQ), cache=layer)
            query = torch.nn.functional.pad(out, (0, D - out.shape[-1]))
        return query

    run, counter = compiled(step, backend)
    generator = torch.Generator().manual_seed(1)
    for counts in ([5, 2], [3, 3], [1, 1], [0, 1], [1, 1]):
        k, v = torch.randn(2, B, HKV, max(counts), D, generator=generator)
        for x in (cache, other):
            x.reserve(counts)
        assert torch.equal(run(QUERY, k, v, cache), step(QUERY, k, v, other))
        assert torch.equal(cache.key, other.key) and torch.equal(cache.value, other.value)
    assert counter.frame_count == 3  # 5 tokens, any number of tokens, one token


def test_packed_tokens_and_slots_in_a_region():
    cache, other, single = LAYERED["layers"](), LAYERED["layers"](), CACHES["pages"]()

    def step(k, v, slots, cache, single):
        cache.layer(0).append(k, v)
        cache.layer(1).append(k, v, sequence=1)
        cache.layer(2).append(k, v, slot_mapping=slots)
        single.append(k, v, slot_mapping=slots)
        single.append(k, v, 2, sequence=0)
        single.append(k, v, [1, 2])

    run, _ = compiled(step, "aot_eager")
    alone = CACHES["pages"]()
    for turn in range(2):
        k, v = torch.randn(2, 4, HKV, D)
        slots = torch.tensor([9, -1, 30 + turn, 2])
        for x in (cache, other):
            x.reserve([1, 3])
        run(k, v, slots, cache, single)
        step(k, v, slots, other, alone)
    assert torch.equal(cache.key, other.key) and torch.equal(cache.value, other.value)
    assert torch.equal(single.key, alone.key) and single.lengths == single.kv_lens.tolist() == alone.lengths == [6, 4]


@pytest.mark.parametrize("scales", [(), (0.5, 2.0), (torch.tensor(0.5), torch.ones(9, HKV, 4))], ids=str)
def test_slots_of_a_server_in_a_region(scales):
    """Keys and values are halves of one tensor."""
    dtype = torch.int8 if scales else torch.float32
    pages, other = torch.zeros(2, 9, HKV, 4, 2 * D, dtype=dtype)
    k, v = torch.randn(2, 3, HKV, D)

    def step(k, v, key, value, slots):
        write_kv(k * 2, v * 2, key, value, slots, *scales)

    slots = torch.tensor([9, -1, 30])
    run, _ = compiled(step, "aot_eager")
    run(k, v, pages[..., :D], pages[..., D:], slots)
    step(k, v, other[..., :D], other[..., D:], slots)
    assert torch.equal(pages, other) and pages.any()


def test_a_layer_in_a_region_refuses_what_it_refuses_elsewhere():
    cache = LAYERED["layers"]()
    for call, message in (
        (lambda: cache.layer(3), r"`index` must be between 0 and num_layers - 1 = 2, got 3"),
        (lambda: cache.layer(0).append(KEY[:, :, :2], VALUE[:, :, :2]), r"nothing is reserved: call reserve\(\)"),
        (lambda: cache.append(KEY, VALUE), "this cache has layers"),
        (lambda: flex_decode(QUERY, cache=cache), "`cache` has 3 layers: pass one of them"),
    ):
        with pytest.raises(Exception, match=message):
            compiled(call)[0]()
    cache.reserve(3)
    with pytest.raises(Exception, match="`k` has T = 2 tokens, but a sequence takes 3"):
        compiled(lambda: cache.layer(0).append(KEY[:, :, :2], VALUE[:, :, :2]))[0]()


def test_a_region_that_is_run_without_compilation_appends_as_often():
    cache = CACHES["contiguous"]()
    run, _ = compiled(lambda k, v: cache.append(k, v))
    run(KEY[:, :, :2], VALUE[:, :, :2])
    with torch.compiler.set_stance("force_eager"):
        run(KEY[:, :, :2], VALUE[:, :, :2])
    assert cache.lengths == cache.kv_lens.tolist() == [4, 4]


def test_an_append_in_a_region_refuses_what_it_refuses_elsewhere():
    cache = CACHES["contiguous"]()
    for call, message in (
        (lambda: cache.append(KEY, VALUE, [2, 99]), r"`num_tokens` must be at most T = 40 \(from k\), got \[2, 99\]"),
        (lambda: cache.append(KEY, VALUE[:, :, 1:]), "`v` must have as many tokens as `k`, T = 40, got 39"),
        (lambda: cache.append(KEY[:1], VALUE), r"`k` must have shape \[B, Hkv, T, D\] = \[2, 2, T, 16\], got \[1, 2,"),
        (lambda: cache.append(KEY[:, :, :9], VALUE[:, :, :9]), "sequence 0 has 33 tokens, and 9 more do not fit"),
    ):
        for run in (compiled(call)[0], call):
            cache.reset()
            cache.append(KEY[:, :, :33], VALUE[:, :, :33])
            with pytest.raises(Exception, match=message):
                run()
            assert cache.lengths == cache.kv_lens.tolist() == [33, 33]


@pytest.mark.parametrize("name", ["reserve", "truncate", "reset"])
def test_what_works_on_the_host_is_refused(name):
    cache = CACHES["pages"]()
    given = {"reserve": (1,), "truncate": (0, 0), "reset": ()}[name]
    with pytest.raises(Exception, match=r"\(\) works on the host: call it outside of a compiled region"):
        compiled(lambda: getattr(cache, name)(*given))[0]()
    with pytest.raises(Exception, match="make it outside of the region"):
        compiled(CACHES["pages"])[0]()


def test_an_append_is_not_exported():
    """A loaded program would have a copy of the cache that nothing on the host knows."""

    class Step(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cache = CACHES["contiguous"]()

        def forward(self, q, k, v):
            self.cache.append(k, v)
            return flex_decode(q, cache=self.cache)

    for strict in (True, False):
        with pytest.raises(Exception, match=r"append\(\) cannot be exported"):
            torch.export.export(Step(), (QUERY, KEY[:, :, :1], VALUE[:, :, :1]), strict=strict)


def test_the_op_of_append_is_what_pytorch_wants():
    for kind in CACHES:
        cache = CACHES[kind]()
        if cache.key.dtype.itemsize == 1 and cache.key.is_floating_point():
            continue  # PyTorch's check has no products of float8
        tensors = [getattr(cache, name) for name in TENSORS]
        for counts in (None, [2, 0]):
            new = KEY[:, :, :2], VALUE[:, :, :2]
            torch.library.opcheck(torch.ops.flexdecode.append.default, (*new, *tensors, cache._number, counts, None))


# --- Export, tensors without values -----------------------------------------------------------------------------------


@OF_RECORDER
@pytest.mark.parametrize("strict", [True, False])
def test_an_export_runs_where_its_mods_are_unknown(strict, tmp_path):
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=4096)
    sizes = {0: batch}, {0: batch, 2: length}, {0: batch, 2: length}
    exported = torch.export.export(Model().eval(), CACHE, strict=strict, dynamic_shapes=sizes)
    torch.export.save(exported, tmp_path / "model.pt2")
    other = torch.randn(3, HQ, 1, D), torch.randn(3, HKV, 77, D), torch.randn(3, HKV, 77, D)
    torch.save((other, Model()(*other)), tmp_path / "expected.pt")
    code = (
        "import torch, flexdecode\n"
        "inputs, expected = torch.load('expected.pt')\n"
        "with torch.no_grad():  # in torch 2.9 a parameter is loaded as one that requires grad\n"
        "    assert torch.equal(torch.export.load('model.pt2').module()(*inputs), expected)\n"
    )
    path = os.pathsep.join([*filter(None, sys.path)])
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env={**os.environ, "PYTHONPATH": path}, check=True)


def test_tensors_without_values():
    with FakeTensorMode():
        q, k = torch.empty(B, HQ, 1, D, dtype=torch.float16), torch.empty(B, HKV, N, D, dtype=torch.float16)
        out, lse = flex_decode(q, k, k, mods.softcap(3.0), mods.causal(), return_lse=True)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)


TEXT = (
    "captures | 0; tensor 0: float32 rank 1; %0 = score(): float32; %1 = index('h'): int64; %2 = load(0, %1): float32; "
    "%3 = add(%0, %2): float32; return %3"
)


@pytest.mark.parametrize(
    "rest",
    [
        ("", [], [], [], "kv_lens|", [LENS], [], [], [], None, ""),
        ("", [], [], [], "|kv_lens", [], [20], [], [], 0.5, ""),
    ],
    ids=["tensor", "number"],
)
def test_the_op_is_what_pytorch_wants(rest):
    for op in (torch.ops.flexdecode.decode, torch.ops.flexdecode.decode_with_lse):
        torch.library.opcheck(op.default, (*CACHE, TEXT, [], [], [SLOPES], *rest))


OPTIONS = '{"batch_invariant": true}'


@pytest.mark.parametrize("line", [TEXT, "kv_lens|", OPTIONS])
def test_texts_of_an_op_are_one_line(line):
    """Inductor writes them into comments of the code that it makes, and a second line of a comment would be code."""
    rest = [TEXT, [], [], [SLOPES], "", [], [], [], "kv_lens|", [LENS], [], [], [], None, OPTIONS]
    rest[rest.index(line)] = line.replace(" ", "\n", 1) if " " in line else line + "\n"
    ops = torch.ops.flexdecode
    for op, more in ((ops.decode, ()), (ops.decode_with_lse, ()), (ops.flex_attention, (True, True))):
        with FakeTensorMode(allow_non_fake_inputs=True), pytest.raises(FlexDecodeError, match="are one line each"):
            op(*CACHE, *rest, *more)


def test_the_op_of_merge_attention_is_what_pytorch_wants():
    outs, lses = [QUERY, QUERY + 1], [QUERY[..., 0], QUERY[..., 1]]
    torch.library.opcheck(torch.ops.flexdecode.merge_attention.default, (outs, lses))


# --- Errors -----------------------------------------------------------------------------------------------------------


def reads_a_value(score, b, h, q_idx, kv_idx):
    return score + TABLE[h, kv_idx].item()


def writes_in_place(score, b, h, q_idx, kv_idx):
    return score.add_(1)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"score_mod": "x"}, "`score_mod` must be a callable or None, got str"),
        ({"mask_mod": SLOPES}, "`mask_mod` must be a callable or None, got Tensor"),
        ({"kv_lens": [3, 4]}, "`kv_lens` must be a number or a tensor, got list"),
        ({"scale": "a"}, "`scale` must be a number or None, got str"),
        ({"scale": torch.tensor(0.1)}, "`scale` must be a number or None, got Tensor"),
        ({"block_mask": 3}, "`block_mask` must be a BlockMask, got int"),
        ({"options": "x"}, "`options` must be a flexdecode.DecodeOptions, got str"),
        ({"key": None}, "`key` must be a torch.Tensor, got NoneType"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_arguments_of_a_wrong_type(given, message):
    inputs = dict(zip(("query", "key", "value"), CACHE, strict=True))
    run, _ = compiled(lambda: flex_decode(**(inputs | given)))
    with pytest.raises(Exception, match=message) as caught:
        run()
    assert str(caught.value).startswith(f"TypeError: {message}")


def draws_a_number(score, b, h, q_idx, kv_idx):
    return torch.where(torch.rand(()) < 0.5, -float("inf"), score)


def gives_a_row(score, b, h, q_idx, kv_idx):
    return TABLE[h] + score


def gives_nothing(score, b, h, q_idx, kv_idx):
    pass


def unknown_function(score, b, h, q_idx, kv_idx):
    return torch.special.bessel_j0(score)


@pytest.mark.parametrize(
    ("mod", "message"),
    [
        (reads_a_value, r"the value of a tensor was read in a score_mod[\s\S]*in reads_a_value: return score \+ TABLE"),
        pytest.param(
            draws_a_number,
            r"rand gives other numbers at each call[\s\S]*in draws_a_number: return torch.where",
            marks=pytest.mark.skipif(
                torch.__version__ < "2.13", reason="older torch does not show a call without a tensor to a recorder"
            ),
        ),
        (writes_in_place, r"add_ writes in place[\s\S]*in writes_in_place: return score.add_\(1\)"),
        (gives_a_row, "score_mod 'gives_a_row' returned a tensor with 1 dimension"),
        (gives_nothing, r"score_mod 'gives_nothing' returned None"),
        (unknown_function, r"bessel_j0[\s\S]*in unknown_function: return torch.special"),
    ],
    ids=lambda x: getattr(x, "__name__", ""),
)
def test_errors_come_with_the_users_line_when_the_region_is_compiled(mod, message):
    run, _ = compiled(lambda q, k, v: flex_decode(q, k, v, mod))
    with pytest.raises(Exception, match=message):
        run(*CACHE)


def by_abs(score, b, h, q_idx, kv_idx):
    return abs(score)


def by_attribute(score, b, h, q_idx, kv_idx):
    return score + (TABLE * 2).T[kv_idx, h] + TABLE.T[kv_idx, h]


def by_data(score, b, h, q_idx, kv_idx):
    return score.data * kv_idx


def by_iteration(score, b, h, q_idx, kv_idx):
    return score + sum(TABLE[h, :3]) * kv_idx


def into_a_row(score, b, h, q_idx, kv_idx):
    row = torch.zeros(3)
    row[1] = score
    return score + row.sum() * kv_idx


def into_a_capture(score, b, h, q_idx, kv_idx):
    SLOPES.add_(1)
    return score + SLOPES[h]


def augmented(score, b, h, q_idx, kv_idx):
    score += kv_idx
    return score


@OF_RECORDER
@pytest.mark.parametrize("strict", [None, True, False])
@pytest.mark.parametrize(
    "mod",
    [
        by_abs, by_attribute, by_data, by_iteration, into_a_row, into_a_capture, augmented,
        reads_a_value,
    ],
)  # fmt: skip
def test_what_cannot_be_seen_is_right_or_refused(mod, strict):
    """Never another result: what PyTorch does not show to a recorder is refused where it is used."""
    before = SLOPES.clone()

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return flex_decode(q, k, v, mod)

    try:
        if strict is None:
            out = compiled(Attention())[0](*CACHE)
        else:
            out = torch.export.export(Attention(), CACHE, strict=strict).module()(*CACHE)
    except Exception as error:
        text = str(error)
        if "Cannot copy out of meta tensor" not in text:  # torch 2.14 does not show `row[1] = score`
            assert any(word in text for word in ("writes in place", "does not show", "was read", "not supported"))
            assert f"in {mod.__name__}" in text or "in forward" in text  # the result itself
    else:
        assert torch.equal(out, flex_decode(*CACHE, mod))
    assert torch.equal(SLOPES, before)


def test_half_tables_are_computed_as_without_compilation():
    half, brain = TABLE.half(), TABLE.bfloat16()

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + (half * 3.3)[h, kv_idx] + (brain[1] * brain[2])[:9].sum() + half[0, 3] * half[1, :7].mean()

    check(lambda q, k, v: flex_decode(q, k, v, score_mod), [CACHE])


def test_comparisons_of_numbers():
    def model(q, k, v, x):
        return flex_decode(q, k, v, lambda s, b, h, q_idx, kv_idx: s * (x > 3) + kv_idx * (x == 6))

    check(model, [(*CACHE, x) for x in (2, 5, 6, 2, 5)], 4)


def test_an_index_that_changes():
    def model(q, k, v, at):
        return flex_decode(q, k, v, lambda s, b, h, q_idx, kv_idx: s + TABLE[h, at])

    check(model, [(*CACHE, at) for at in range(4, 9)], 2)


@pytest.mark.parametrize("first", [0.1, 2])
def test_a_scale_that_changes(first):
    check(lambda q, k, v, scale: flex_decode(q, k, v, scale=scale), [(*CACHE, first * i) for i in range(1, 6)], 2)


def test_gradients_are_refused():
    run, _ = compiled(lambda q, k, v: flex_decode(q, k, v))
    with pytest.raises(Exception, match="requires grad, but flex_decode is forward only"):
        run(QUERY.clone().requires_grad_(), KEY, VALUE)
    with torch.no_grad():
        assert torch.equal(run(QUERY.clone().requires_grad_(), KEY, VALUE), flex_decode(*CACHE))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("kind", ["score_mod", "mask_mod"])
def test_gradients_of_captured_tensors_are_refused(kind, backend):
    slopes = torch.rand(HQ, requires_grad=True)
    mod = {
        "score_mod": lambda score, b, h, q_idx, kv_idx: score * slopes[h],
        "mask_mod": lambda b, h, q_idx, kv_idx: slopes[h] > kv_idx / N,
    }[kind]
    run, _ = compiled(lambda *cache: flex_decode(*cache, **{kind: mod}), backend)
    with pytest.raises(Exception, match=f"a tensor that the {kind} captures requires grad"):
        run(*CACHE)
    with torch.no_grad():
        assert torch.equal(run(*CACHE), flex_decode(*CACHE, **{kind: mod}))


def test_vmap_is_refused_with_a_remedy():
    with pytest.raises(ValueError, match="make the mapped dimension part of the batch"):
        torch.vmap(lambda q: flex_decode(q, KEY, VALUE))(torch.stack([QUERY, QUERY]))
