"""Paged, quantised and ragged caches, sinks, large heads, balanced work and batch invariance through the kernel."""

import itertools
from dataclasses import replace

import pytest
import torch
from cache_cases import QUANTISED, SCALES, Pages, position_score, quantise, spoil
from interpret.decoding import check_decode, decode
from support import MODS, assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import KVCache, PagedKVCache, clear_cache, flex_decode, mods
from flexdecode.call.device import DeviceFacts
from flexdecode.call.schedule import Scheduler
from flexdecode.runtime import prepare

B, HQ, HKV, N, D = 3, 4, 2, 48, 16
LENS = [45, 17, 0]
SCHEDULES = {"one": {"num_splits": 1}, "splits": {"num_splits": 3}, "balanced": {"schedule": "balanced"}}
PAGE_SIZES = [1, 3, 4, 16, 24, 32]
FULL = ([48, 1, 30], [17, 0, 48], [0, 0, 5])  # lengths that share a kernel with LENS


def tensor(numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype)


def paged_inputs(pages, Q=1, D=D, Dv=None, dtype=torch.float32, layout="hnd", Hq=HQ, Hkv=HKV):
    query, key, value = make_inputs(len(pages.lens), Hq, Hkv, Q, max(pages.lens), D, Dv, dtype=dtype)
    return query, pages.place(key, layout), pages.place(value, layout)


@pytest.fixture
def chosen(monkeypatch):
    """The schedules of the plans that a test makes; none is known from before."""
    made = []

    def choose(*arguments, original=Scheduler.choose):
        launches = original(*arguments)
        made.extend(launch.schedule for launch in launches)
        return launches

    clear_cache()
    monkeypatch.setattr(Scheduler, "choose", choose)
    yield made
    clear_cache()


def on_device(monkeypatch, num_sms):
    """Lets the schedule see another number of multiprocessors than the 4 of this tier."""
    facts = DeviceFacts("cpu", "interpreter", num_sms=num_sms, shared_memory=227 * 1024)
    clear_cache()
    monkeypatch.setattr(prepare, "device_facts", lambda device: facts)


# --- Pages ------------------------------------------------------------------------------------------------------------


def paged_cases():
    """Every family with a page size and a schedule, every other with two; what else there is to choose rotates."""
    for i, family in enumerate(MODS):
        for j in range(1 + i % 2):
            page_size = PAGE_SIZES[(i + 3 * j + i // 6) % 6]
            schedule = list(SCHEDULES)[(i + i // 3 + j) % 3]
            dtype = torch.float16 if (i + j) % 3 == 0 else torch.float32
            num_queries = 1 + 2 * ((i // 2 + j) % 2)
            name = f"{family.name}-{page_size}-{schedule}-{dtype}-{num_queries}".replace("torch.", "")
            yield pytest.param(family, page_size, schedule, dtype, num_queries, id=name)


@pytest.mark.parametrize(("family", "page_size", "schedule", "dtype", "num_queries"), list(paged_cases()))
def test_families_on_pages(family, page_size, schedule, dtype, num_queries):
    pages = Pages(LENS, page_size, seed=page_size)
    shape = (B, HQ, N, num_queries, "cpu")
    score_mod, mask_mod = family.make_score_mod(*shape), family.make_mask_mod(*shape)
    inputs = paged_inputs(pages, num_queries, dtype=dtype)
    arguments = {"page_table": pages.table, "kv_lens": tensor(LENS)}
    check_decode(*inputs, score_mod, mask_mod, **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("page_size", PAGE_SIZES)
def test_page_sizes(page_size, schedule):
    """Layouts, shared pages, and tables of all kinds rotate."""
    number = PAGE_SIZES.index(page_size) + 2 * list(SCHEDULES).index(schedule)
    lens = FULL[number % 3]
    dtype = (torch.int32, torch.int64)[number % 2]
    pages = Pages(lens, page_size, dtype=dtype, strided=number % 3 == 1, shared=number % 4, seed=number)
    inputs = paged_inputs(pages, 1 + number % 2, layout=("nhd", "hnd")[number // 2 % 2])
    arguments = {"page_table": pages.table, "kv_lens": tensor(lens, dtype)}
    check_decode(*inputs, position_score, mods.causal(), **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize("block_n", [16, 64])
@pytest.mark.parametrize("page_size", [4, 24, 64])
def test_pages_change_no_bit(page_size, block_n):
    """Pages smaller and larger than a block, and none."""
    pages = Pages([130, 64, 3], page_size)
    query, key, value = make_inputs(B, HQ, HKV, 1, 130, D, dtype=torch.float16)
    arguments = {"kv_lens": tensor(pages.lens), "num_splits": 2, "block_n": block_n}
    expected = decode(query, key, value, mods.alibi(HQ), mods.sliding_window(50), **arguments)
    arguments |= {"page_table": pages.table}
    found = decode(query, pages.place(key), pages.place(value), mods.alibi(HQ), mods.sliding_window(50), **arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_one_table_row_for_all_sequences(schedule):
    pages = Pages([40, 40, 40], 8, shared=5)
    table = pages.table[:1].expand(3, -1)
    arguments = {"page_table": table, "kv_lens": tensor([40, 9, 0])}
    check_decode(*paged_inputs(pages), position_score, **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize("table", [torch.zeros(2, 0, dtype=torch.int32), torch.zeros(2, 3, dtype=torch.int64)])
@pytest.mark.parametrize("num_pages", [0, 2])
def test_sequences_without_pages(num_pages, table):
    query = make_inputs(2, HQ, HKV, 1, 1, D)[0]
    cache = torch.full((num_pages, HKV, 4, D), torch.nan)
    for schedule in SCHEDULES.values():
        out, lse = decode(query, cache, cache.clone(), page_table=table, kv_lens=tensor([0, 0]), **schedule)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_a_table_that_changes_between_calls():
    """A server moves sequences from place to place; the plan stays."""
    moved = [Pages([20, 35, 0], 4, 10, seed=seed) for seed in range(3)]
    query, key, value = make_inputs(B, HQ, HKV, 1, 35, D)
    results = []
    for pages in moved:
        arguments = {"page_table": pages.table, "kv_lens": tensor(pages.lens)}
        results.append(check_decode(query, pages.place(key), pages.place(value), mods.alibi(HQ), **arguments))
    assert all(torch.equal(out, results[0][0]) for out, _ in results)


@pytest.mark.parametrize(("schedule", "size"), [("splits", 16), ("balanced", 8)])
def test_a_block_mask_on_pages(size, schedule):
    """Its blocks are those of the sequence, not of the cache."""

    def mixed(b, h, q, k):
        return ((k // 16 + q // 16) % 3 == 0) | ((k // 16 % 3 == 1) & (k % 5 != 2))

    block_mask = create_block_mask(mixed, B, HQ, 96, 96, device="cpu", BLOCK_SIZE=size)
    pages = Pages([96, 50, 0], 12, seed=size)
    inputs = paged_inputs(pages, 2)
    arguments = {"page_table": pages.table, "kv_lens": tensor(pages.lens)}
    out, lse = decode(*inputs, mods.alibi(HQ), block_mask=block_mask, **arguments, **SCHEDULES[schedule])
    assert_close_to_reference(out, lse, *inputs, mods.alibi(HQ), mixed, **arguments)


# --- Ragged queries ---------------------------------------------------------------------------------------------------


Q_LENS = {1: ([1, 0, 1],), 4: ([4, 1, 0], [0, 0, 3]), 6: ([6, 1, 3], [0, 5, 2])}
OFFSETS = {"newest": None, "number": 20, "tensor": tensor([41, 3, -2], torch.int64)}


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's maximum of a row
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("group", [1, 3, 7])
@pytest.mark.parametrize("num_queries", Q_LENS)
def test_ragged_queries(num_queries, group, schedule):
    """NaN in query rows that no sequence has. Seven heads of six tokens fill two tiles of rows."""
    number = list(Q_LENS).index(num_queries) + group + list(SCHEDULES).index(schedule)
    offset = list(OFFSETS.values())[number % 3]
    mask_mod = (mods.causal(), mods.sliding_window(9), None)[number // 2 % 3]
    query, key, value = make_inputs(B, group, 1, num_queries, N, D, dtype=(torch.float32, torch.float16)[number % 2])
    q_lens = Q_LENS[num_queries][number % len(Q_LENS[num_queries])]
    spoil(query, q_lens)
    arguments = {"kv_lens": tensor(LENS), "q_lens": tensor(q_lens, torch.int64), "q_offset": offset}
    check_decode(query, key, value, position_score, mask_mod, **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize(
    ("schedule", "kv_lens", "q_lens"),
    [("splits", None, [4, 2, 1]), ("balanced", [2, 48, 0], [4, 2, 1]), ("one", [2, 48, 0], [3, 0, 4])],
)
def test_the_newest_token_of_each_sequence_ends_it(schedule, kv_lens, q_lens):
    inputs = make_inputs(B, 2, 1, 4, N, D)
    kv_lens = None if kv_lens is None else tensor(kv_lens)
    mask_mod = mods.or_masks(mods.sliding_window(3), lambda b, h, q, k: k == q // 2)
    check_decode(*inputs, None, mask_mod, kv_lens=kv_lens, q_lens=tensor(q_lens), **SCHEDULES[schedule])


def test_ragged_queries_change_no_bit_of_a_sequence():
    """A sequence of two tokens in a batch of four gets what it gets in a batch of two."""
    query, key, value = make_inputs(B, HQ, HKV, 4, N, D)
    arguments = {"kv_lens": tensor([45, 30, 9]), "num_splits": 2}
    out, lse = decode(query, key, value, mods.alibi(HQ), mods.causal(), q_lens=tensor([2, 2, 2]), **arguments)
    expected = decode(query[:, :, :2], key, value, mods.alibi(HQ), mods.causal(), **arguments)
    assert torch.equal(out[:, :, :2], expected[0]) and torch.equal(lse[:, :, :2], expected[1])
    assert (out[:, :, 2:] == 0).all() and (lse[:, :, 2:] == -torch.inf).all()


def test_ragged_queries_of_a_block_mask():
    """The tokens that the mask must cover are those that a sequence has."""
    mask_mod = mods.causal()
    block_mask = create_block_mask(mask_mod, None, None, 96, 96, device="cpu", BLOCK_SIZE=16)
    inputs = make_inputs(B, HQ, HKV, 5, 96, D)
    arguments = {"kv_lens": tensor([96, 50, 96]), "q_lens": tensor([2, 5, 0])}
    out, lse = decode(*inputs, block_mask=block_mask, num_splits=2, **arguments)
    assert_close_to_reference(out, lse, *inputs, None, mask_mod, **arguments)


# --- Sinks ------------------------------------------------------------------------------------------------------------

SINKS = {
    "ordinary": [0.5, -2.0, 1.5, 0.0],
    "absent_and_large": [-torch.inf, 40.0, -60.0, 3.0],
}


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(
    ("name", "dtype"),
    [("ordinary", torch.float32), ("ordinary", torch.float16), ("absent_and_large", torch.bfloat16)],
)
def test_sinks(name, dtype, schedule):
    """Also in rows and sequences without a live key, and past the tokens of a sequence."""
    inputs = make_inputs(B, HQ, 1, 3, N, D, dtype=torch.float16 if dtype == torch.float16 else torch.float32)

    def mask_mod(b, h, q, k):
        return (h != 3) & (k <= q)

    q_lens = None if dtype == torch.float16 else tensor([3, 1, 2])
    arguments = {"kv_lens": tensor(LENS), "q_lens": q_lens, "sinks": torch.tensor(SINKS[name], dtype=dtype)}
    check_decode(*inputs, mods.alibi(HQ), mask_mod, **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_sinks_of_minus_infinity_change_nothing(schedule):
    inputs = make_inputs(B, HQ, 1, 1, N, D)
    arguments = {"kv_lens": tensor(LENS)} | SCHEDULES[schedule]
    expected = decode(*inputs, mods.alibi(HQ), mods.sliding_window(20), **arguments)
    found = decode(*inputs, mods.alibi(HQ), mods.sliding_window(20), sinks=torch.full((HQ,), -torch.inf), **arguments)
    assert torch.equal(found[0], expected[0]) and torch.equal(found[1], expected[1])


def test_sinks_that_are_a_view():
    sinks = torch.tensor([[0.5, 9.0], [-1.0, 9.0], [2.0, 9.0], [0.0, 9.0]])[:, 0]
    check_decode(*make_inputs(B, HQ, HKV, 1, N, D), sinks=sinks, num_splits=2)


# --- Quantised caches -------------------------------------------------------------------------------------------------


def quantised_cases():
    for i, (name, form, paged) in enumerate(itertools.product(QUANTISED, SCALES, [False, True])):
        schedule = list(SCHEDULES)[(i + i // 3) % 3]
        dtype = (torch.float16, torch.float32)[(i + i // 8) % 2]
        label = f"{name}-{form}-{'pages' if paged else 'contiguous'}-{schedule}-{dtype}"
        yield pytest.param(name, form, paged, schedule, dtype, id=label.replace("torch.", ""))


@pytest.mark.parametrize(("name", "form", "paged", "schedule", "dtype"), list(quantised_cases()))
def test_quantised_caches(name, form, paged, schedule, dtype):
    """Past the sequences are NaN, in the caches and in their scales."""
    query, key, value = make_inputs(B, HQ, HKV, 2, N, D, 24, dtype=dtype)
    scale_dtype = torch.float16 if form == "tokens" and name == "int8" else torch.float32
    (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[name], form, scale_dtype) for x in (key, 3 * value))
    arguments = {"kv_lens": tensor(LENS)}
    pages = Pages(LENS, 4, seed=len(form))
    if paged:
        arguments["page_table"] = pages.table
        key, value = pages.place(key), pages.place(value, "nhd")
        if form == "tokens":
            k_scale, v_scale = pages.place(k_scale), pages.place(v_scale)
    else:
        key, value = spoil(key, LENS), spoil(value, LENS)
        if form == "tokens":
            k_scale, v_scale = spoil(k_scale, LENS), spoil(v_scale, LENS)
    arguments |= {"k_scale": k_scale, "v_scale": v_scale}
    check_decode(query, key, value, mods.softcap(20.0), mods.causal(), **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize(("k_form", "v_form"), [("tokens", "number"), ("heads", "tokens"), ("sequences", "heads")])
def test_scales_of_different_forms(k_form, v_form):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D, dtype=torch.float16)
    key, k_scale = quantise(key, torch.int8, k_form)
    value, v_scale = quantise(value, torch.int8, v_form)
    check_decode(query, key, value, position_score, k_scale=k_scale, v_scale=v_scale, num_splits=2)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_scales_that_are_views(schedule):
    """Transposed, and of a cache that all sequences share."""
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    key, k_scale = quantise(key[:1], torch.int8, "tokens")
    value, v_scale = quantise(value[:1], torch.int8, "tokens")
    k_scale, v_scale = k_scale.transpose(1, 2).contiguous().transpose(1, 2), v_scale.repeat_interleave(2, 2)[..., ::2]
    arguments = {"k_scale": k_scale, "v_scale": v_scale, "kv_lens": tensor(LENS)}
    check_decode(query, key, value, mods.alibi(HQ), **arguments, **SCHEDULES[schedule])


@pytest.mark.parametrize("name", QUANTISED)
def test_scales_of_peaked_attention(name):
    """A few keys hold most of the weight; what the many others add must not be lost in float16."""
    query, key, value = make_inputs(1, 2, 1, 1, 600, 64, dtype=torch.float16)
    (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[name], "tokens") for x in (key, value))
    check_decode(3.0 * query, key, value, k_scale=k_scale, v_scale=v_scale, block_n=64)


def test_unsigned_and_signed_ends_of_int8():
    key = torch.tensor([-128, -127, -1, 0, 1, 127], dtype=torch.int8).repeat(1, 1, 8, 8)
    query = make_inputs(1, 2, 1, 1, 8, 48)[0]
    check_decode(query, key, key.flip(2), k_scale=-0.01, v_scale=torch.tensor([0.5]))


# --- Head dimensions --------------------------------------------------------------------------------------------------

HEAD_DIMS = [(192, 128), (288, 256), (576, 512), (59, 33), (300, 200), (130, 130), (320, 64), (560, 500), (512, 512)]


@pytest.mark.parametrize("how", ["apart", "shared", "shared_pages"])
@pytest.mark.parametrize(("head_dim", "v_head_dim"), HEAD_DIMS, ids=str)
def test_head_dims(head_dim, v_head_dim, how):
    """A value that is the first columns of its key, and one that is not."""
    number = HEAD_DIMS.index((head_dim, v_head_dim))
    lens = [21, 9]
    dtype = (torch.float32, torch.float16)[(number + len(how)) % 2]
    query, key, value = make_inputs(2, 3, 1, 1, 21, head_dim, v_head_dim, dtype=dtype)
    arguments = {"kv_lens": tensor(lens)}
    if how == "shared_pages":
        pages = Pages(lens, 4)
        key, arguments["page_table"] = pages.place(key), pages.table
    else:
        spoil(key, lens), spoil(value, lens)
    value = value if how == "apart" else key[..., :v_head_dim]
    schedule = list(SCHEDULES.values())[(number + len(how)) % 3]
    check_decode(query, key, value, mods.alibi(3), mods.causal(), **arguments, **schedule)


@pytest.mark.parametrize("num_heads", [16, 128])
def test_multi_head_latent_attention(num_heads):
    pages = Pages([35, 2], 16)
    query, key, _ = make_inputs(2, num_heads, 1, 1, 35, 576, 512, dtype=torch.float16)
    key = pages.place(key)
    arguments = {"page_table": pages.table, "kv_lens": tensor(pages.lens), "scale": 192**-0.5}
    check_decode(query, key, key[..., :512], None, mods.sliding_window(20), **arguments, num_splits=2)


@pytest.mark.parametrize("name", QUANTISED)
def test_a_shared_quantised_cache(name):
    """One load, two scales."""
    query, key, _ = make_inputs(2, 3, 1, 1, 21, 96, dtype=torch.float16)
    key, scale = quantise(key, QUANTISED[name], "tokens")
    for v_scale in (scale, 0.25, torch.tensor([[0.5], [2.0]])):
        check_decode(query, key, key[..., :80], k_scale=scale, v_scale=v_scale, num_splits=2)


def test_sharing_is_told_by_memory_not_by_shape():
    """The plan of a call whose value is in its key does not fit one whose value is not."""
    query, key, _ = make_inputs(1, 2, 1, 1, 20, 48)
    wide = torch.randn_like(key)
    for x in (key[..., :32], wide[..., :32], key[..., :32], key[..., 16:], key.flip(2)[..., :32]):
        check_decode(query, key, x)


# --- Balanced work ----------------------------------------------------------------------------------------------------

RAGGED = [
    [0, 40, 3], [40, 3, 0], [0, 0, 0], [0, 0, 70], [1, 1, 130], [130, 1, 1], [50, 50, 50], [16, 17, 15], [0, 90, 0],
]  # fmt: skip


@pytest.mark.parametrize("lens", RAGGED, ids=str)
@pytest.mark.parametrize("num_sms", [1, 3, 20])
def test_balanced(num_sms, lens, monkeypatch):
    """Two, six or many workers, up to one for each block."""
    on_device(monkeypatch, num_sms)
    inputs = make_inputs(3, 2, 1, 1, 130, D)
    check_decode(*inputs, position_score, mods.causal(), schedule="balanced", kv_lens=tensor(lens))


@pytest.mark.parametrize("batch", [1, 2, 40, 300, 4096])
def test_balanced_batches(batch):
    """Most sequences are empty, some are short, and the last one is long."""
    lens = [(0, 3, 0, 0, 20, 0, 0)[b % 7] if b < 40 else 0 for b in range(batch)]
    lens[-1] = 100
    inputs = make_inputs(batch, 1, 1, 1, 100, D)
    slopes = torch.linspace(0.1, 1, batch)
    check_decode(
        *inputs, lambda s, b, h, q, k: s - slopes[b] * (q - k), mods.causal(), schedule="balanced", kv_lens=tensor(lens)
    )


@pytest.mark.parametrize("batch", [32, 33, 65])
def test_more_sequences_than_are_summed_at_a_time(batch, monkeypatch):
    """The sums run over chunks of 32 sequences here, of 1024 in a large batch."""

    def choose(*arguments, original=Scheduler.choose):
        (launch,) = original(*arguments)
        tiles = replace(launch.schedule.tiles, block_b=32, many=batch > 32)
        return [launch._replace(schedule=launch.schedule._replace(tiles=tiles))]

    clear_cache()
    monkeypatch.setattr(Scheduler, "choose", choose)
    lens = [0] * batch
    for b in (0, 30, 31, 32, 63, 64):
        if b < batch:
            lens[b] = 5 + b
    inputs = make_inputs(batch, 1, 1, 1, 70, D)
    check_decode(*inputs, position_score, schedule="balanced", kv_lens=tensor(lens))
    clear_cache()


WINDOWS = tensor([5, 60, 1, 200])
BALANCED_MASKS = {
    "per_sequence": lambda b, h, q, k: (k <= q) & (q - k < WINDOWS[b]),
    "per_head": lambda b, h, q, k: (k <= q) & (q - k < WINDOWS[h]),
    "per_inner_head": lambda b, h, q, k: (k <= q) & ((q - k < 4) | (h == 1)),  # what the outer heads do not show
    "sinks_and_window": mods.streaming(3, 20),
    "chunks": mods.chunked(48),
    "dead_head": lambda b, h, q, k: (h != 2) & (k <= q),
    "all_dead": lambda b, h, q, k: k < 0,
    "early_keys": lambda b, h, q, k: k < 20,
    "four_intervals": lambda b, h, q, k: (k < 5) | ((k > 30) & (k < 40)) | ((k > 60) & (k < 90)) | (k > q - 3),
    "unsolved": lambda b, h, q, k: (k * 7 + q) % 3 != 0,
}


@pytest.mark.parametrize("mask", BALANCED_MASKS)
def test_balanced_masks(mask):
    num_queries = 1 + 4 * (len(mask) % 2)
    inputs = make_inputs(4, 4, 2, num_queries, 110, D)
    kv_lens = tensor([110, 7, 0, 64])
    check_decode(*inputs, mods.alibi(4), BALANCED_MASKS[mask], schedule="balanced", kv_lens=kv_lens)


@pytest.mark.parametrize("q_offset", [None, 3, tensor([129, 0, 500, -7])], ids=["newest", "number", "tensor"])
@pytest.mark.parametrize("q_lens", [None, tensor([5, 0, 1, 3])], ids=["all", "ragged"])
def test_balanced_positions(q_lens, q_offset):
    """Several tiles of rows: 35 per head of the cache, in tiles of 32."""
    inputs = make_inputs(4, 7, 1, 5, 130, D)
    arguments = {"kv_lens": tensor([130, 40, 77, 0]), "q_lens": q_lens, "q_offset": q_offset}
    check_decode(*inputs, position_score, mods.sliding_window(40), schedule="balanced", **arguments)


def test_balanced_with_everything():
    pages = Pages([90, 0, 5, 33], 24, shared=1)
    query, key, value = make_inputs(4, 6, 2, 3, 90, 40, 33, dtype=torch.float16)
    (key, k_scale), (value, v_scale) = (quantise(x, torch.float8_e4m3fn, "tokens") for x in (key, value))
    key, value, k_scale, v_scale = (pages.place(x) for x in (key, value, k_scale, v_scale))
    arguments = {
        "page_table": pages.table, "kv_lens": tensor(pages.lens), "q_lens": tensor([3, 3, 0, 2]), "k_scale": k_scale,
        "v_scale": v_scale, "sinks": torch.linspace(-1, 1, 6), "scale": 0.2,
    }  # fmt: skip
    check_decode(query, key, value, mods.alibi(6), mods.streaming(2, 50), schedule="balanced", **arguments)


def test_without_lengths_balanced_is_even():
    check_decode(*make_inputs(3, 4, 2, 2, 75, D), position_score, mods.causal(), schedule="balanced")


def test_a_kernel_of_other_lengths_leaves_nothing_behind():
    """Partial results and their places are those of the call, not of the one before."""
    inputs = make_inputs(3, 2, 1, 1, 130, D)
    once = {}
    for lens in ([1, 1, 130], [130, 1, 1], [0, 90, 0], [50, 50, 50], [1, 1, 130], [0, 90, 0], [130, 1, 1]):
        result = decode(*inputs, mods.alibi(2), schedule="balanced", kv_lens=tensor(lens))
        expected = once.setdefault(tuple(lens), result)
        assert torch.equal(result[0], expected[0]) and torch.equal(result[1], expected[1])


# --- Batch invariance -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "paged"), [("none", False), ("alibi", True), ("head_window", False), ("combined", True)]
)
def test_a_sequence_does_not_see_its_batch(family, paged, chosen):
    """The same bits alone, beside others of any length, at any place, and in a cache of any size."""
    family = next(mods for mods in MODS if mods.name == family)
    query, key, value = make_inputs(4, 2, 1, 2, 150, D, dtype=torch.float16)
    score_mod, mask_mod = (make(1, 2, 150, 2, "cpu") for make in family[1:])
    expected = None
    for order, lens, size in (
        ([0], [100], 150), ([0], [100], 101), ([3, 0, 1], [150, 100, 0], 150), ([1, 0, 0], [1, 100, 100], 120),
    ):  # fmt: skip
        arguments = {"kv_lens": tensor(lens), "batch_invariant": True}
        cache = [x[order, :, :size] for x in (key, value)]
        if paged:
            pages = Pages(lens, 8, -(-size // 8), seed=size)
            cache, arguments["page_table"] = [pages.place(x) for x in cache], pages.table
        # Captures of one sequence serve all.
        score = score_mod and (lambda s, b, h, q, k: score_mod(s, b * 0, h, q, k))
        mask = mask_mod and (lambda b, h, q, k: mask_mod(b * 0, h, q, k))
        result = check_decode(query[order], *cache, score, mask, **arguments)
        at = [i for i, sequence in enumerate(order) if sequence == 0]
        expected = [x[at[0]] for x in result] if expected is None else expected
        for i in at:
            assert torch.equal(result[0][i], expected[0]) and torch.equal(result[1][i], expected[1])
    assert {cut.num_splits for cut in chosen} == {4} and all(cut.tiles.split for cut in chosen)
    assert not any(cut.tiles.balanced for cut in chosen)


def test_batch_invariance_with_ragged_queries_and_sinks():
    query, key, value = make_inputs(3, 4, 1, 4, 90, D)
    sinks = torch.linspace(-1, 2, 4)
    shared = {"sinks": sinks, "batch_invariant": True, "num_splits": 3}
    alone = check_decode(query[:1], key[:1], value[:1], kv_lens=tensor([70]), q_lens=tensor([3]), **shared)
    for lens, q_lens in (([70, 90, 1], [3, 4, 0]), ([70, 0, 33], [3, 1, 2])):
        out, lse = check_decode(query, key, value, kv_lens=tensor(lens), q_lens=tensor(q_lens), **shared)
        assert torch.equal(out[:1], alone[0]) and torch.equal(lse[:1], alone[1])


# --- Caches that grow -------------------------------------------------------------------------------------------------


def make_caches(batch, max_kv_len, **arguments):
    sizes = {"batch": batch, "num_kv_heads": HKV, "head_dim": D, "v_head_dim": 24}
    yield KVCache(max_kv_len=max_kv_len, **sizes, **arguments)
    yield PagedKVCache(num_pages=batch * max_kv_len // 8, page_size=8, **sizes, **arguments)


def check_cache(query, cache, score_mod=None, mask_mod=None, schedule="splits", **arguments):
    out, lse = decode(query, None, None, score_mod, mask_mod, cache=cache, **arguments, **SCHEDULES[schedule])
    names = ("kv_lens", "page_table", "k_scale", "v_scale")
    held = {name: getattr(cache, name) for name in names}
    assert_close_to_reference(out, lse, query, cache.key, cache.value, score_mod, mask_mod, **held, **arguments)
    return out


@pytest.mark.parametrize(
    ("dtype", "schedule"),
    [(torch.float16, "balanced"), (torch.int8, "splits"), (torch.float8_e4m3fn, "one")],
)
def test_a_few_steps(dtype, schedule):
    """Contiguous and paged caches of the same tokens give the same."""
    outs = []
    for cache in make_caches(2, 32, dtype=dtype):
        generator = torch.Generator().manual_seed(0)
        results = []
        for step, counts in enumerate([[17, 5], [1, 0], [3, 1]]):
            k, v = (torch.randn(2, HKV, max(counts), width, generator=generator).half() for width in (D, 24))
            cache.append(k, v, num_tokens=counts)
            query = torch.randn(2, HQ, 1, D, generator=generator).half()
            results.append(check_cache(query, cache, mods.alibi(HQ), mods.sliding_window(12 + step), schedule))
        outs.append(torch.stack(results))
    assert torch.equal(outs[0], outs[1])


def test_fork_and_truncate():
    """Beams that share a prompt, grow apart, and lose tokens that were rejected."""
    generator = torch.Generator().manual_seed(0)
    cache = PagedKVCache(
        batch=3, num_kv_heads=HKV, num_pages=24, page_size=4, head_dim=D, v_head_dim=24, dtype=torch.float32
    )

    def step(counts, num_queries=1):
        k, v = (torch.randn(3, HKV, max(counts), width, generator=generator) for width in (D, 24))
        cache.append(k, v, num_tokens=counts)
        query = torch.randn(3, HQ, num_queries, D, generator=generator)
        check_cache(query, cache, mods.alibi(HQ), mods.causal(), "one")
        return query

    step([10, 0, 3])
    cache.fork(0, 1)
    query = step([0, 0, 1])
    same = flex_decode(query[[0, 0, 0]], cache=cache)
    assert torch.equal(same[0], same[1]) and not torch.equal(same[0], same[2])
    step([1, 1, 1], num_queries=2)
    cache.truncate(1, 9)
    check_cache(query, cache, mods.alibi(HQ), schedule="balanced")
    cache.free(2)
    cache.fork(1, 2)
    step([2, 4, 0], num_queries=3)
    check_cache(query, cache, mods.alibi(HQ), mods.sliding_window(6), q_lens=tensor([1, 0, 1]))


# --- The same call twice ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_same_call_gives_the_same_bits(schedule):
    pages = Pages([100, 3, 47], 8)
    inputs = paged_inputs(pages, 2, dtype=torch.float16, Hkv=1)
    arguments = {"page_table": pages.table, "kv_lens": tensor(pages.lens)} | SCHEDULES[schedule]
    expected = decode(*inputs, mods.alibi(HQ), **arguments)
    for other in ([1, 1, 1], [100, 0, 0]):
        decode(*inputs, mods.alibi(HQ), **(arguments | {"kv_lens": tensor(other)}))
        out, lse = decode(*inputs, mods.alibi(HQ), **arguments)
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


# --- What a reading found ---------------------------------------------------------------------------------------------


def test_weights_of_a_sequence_without_query_tokens():
    """Its newest token is not one past the end of the cache, where a captured tensor has no element."""
    storage = torch.full((65,), 1000, dtype=torch.int64)  # the last one is not in `starts`
    starts = storage[:64].zero_()
    inputs = make_inputs(2, 2, 1, 1, 64, D)
    mask = lambda b, h, q, k: (k >= starts[q.clamp(min=0)]) & (k <= q)
    starts[-1] = 60
    check_decode(*inputs, mask_mod=mask, schedule="balanced", kv_lens=tensor([64, 64]), q_lens=tensor([0, 1]))


@pytest.mark.parametrize("outlier", [1e5, 1e8])
def test_a_masked_key_with_a_large_scale_does_not_round_the_others(outlier):
    query, key, value = make_inputs(1, 2, 1, 1, 40, D, dtype=torch.float16)
    stored = (value.float() * 20).round().clamp(-127, 127).to(torch.int8)
    keys = (key.float() * 20).round().clamp(-127, 127).to(torch.int8)
    v_scale = torch.full((1, 1, 40), 0.05)
    v_scale[:, :, 3] = 0.05 * outlier
    check_decode(query, keys, stored, mask_mod=lambda b, h, q, k: k > 3, k_scale=0.05, v_scale=v_scale, num_splits=1)


def test_subnormal_scales_of_values_give_no_nan():
    query, keys, stored = (x.to(torch.int8) for x in make_inputs(1, 2, 1, 1, 40, D))
    out, lse = decode(query.half(), keys, stored, k_scale=0.05, v_scale=torch.full((1, 1, 40), 1e-39))
    assert (out == 0).all() and lse.isfinite().all()
