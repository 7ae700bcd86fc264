"""Caches as servers have them, on a GPU: the grids of the peers' own tests, CUDA graphs, and bits that must not change.

Values that change at run time (lengths, tables, windows, batches) vary within a test: they need no other kernel.
"""

import sys

import pytest
import torch
from cache_cases import QUANTISED, SCALES, Pages, position_score, quantise, spoil
from support import MODS, assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, KVCache, PagedKVCache, flex_decode, merge_attention, mods

pytestmark = pytest.mark.gpu

DEVICE = "cuda"
HALVES = (torch.float16, torch.bfloat16)
SPLITS, BALANCED = DecodeOptions(num_splits=3), DecodeOptions(schedule="balanced")
ONE = DecodeOptions(num_splits=1)
FAMILIES = [next(family for family in MODS if family.name == name) for name in (
    "alibi", "softcap", "relative_bias", "window", "document",
)]  # fmt: skip


def tensor(numbers, dtype=torch.int32):
    return torch.tensor(numbers, dtype=dtype, device=DEVICE)


def pages_for(lens, page_size, max_pages=None, **how):
    """No entry of the table points far away: a read there would end the process, and all its tests."""
    return Pages(lens, page_size, max_pages, dead=(-1, None, 0), device=DEVICE, **how)


def of_family(family, B, Hq, N, Q=1):
    return tuple(make(B, Hq, N, Q, DEVICE) for make in (family.make_score_mod, family.make_mask_mod))


def on_cpu(arguments):
    return {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}


def check(query, key, value, score_mod=None, mask_mod=None, options=None, **arguments):
    out, lse = flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, options=options, **arguments)
    tensors = query.cpu(), key.cpu(), value.cpu()
    assert_close_to_reference(out, lse, *tensors, score_mod, mask_mod, **on_cpu(arguments))
    return out, lse


# --- One token of many sequences --------------------------------------------------------------------------------------

HEADS = {"1": (4, 4), "8": (32, 4), "7": (28, 4)}  # by the size of the group


def batch_cases():
    """Groups x head dimensions x dtypes, with a page size and a family each."""
    count = 0
    for group in HEADS:
        for head_dim in (64, 128, 256):
            for dtype in HALVES:
                page_size, family = (1, 8, 16)[(count + count // 6) % 3], FAMILIES[count % 5]
                count += 1
                name = f"{group}-{head_dim}-{dtype}-{page_size}-{family.name}".replace("torch.", "")
                yield pytest.param(HEADS[group], head_dim, dtype, page_size, family, id=name)


@pytest.mark.parametrize(("heads", "head_dim", "dtype", "page_size", "family"), list(batch_cases()))
def test_batch_decode(heads, head_dim, dtype, page_size, family):
    for lens in ([2048], [54] * 17, [97, 512, 1, 54, 0, 513, 96, 98, 2, 511, 16, 17]):
        pages = pages_for(lens, page_size, 2048 // page_size, seed=len(lens))
        query, key, value = make_inputs(len(lens), *heads, 1, max(lens), head_dim, dtype=dtype, device=DEVICE)
        arguments = {"page_table": pages.table, "kv_lens": tensor(lens)}
        layout = ("hnd", "nhd")[len(lens) % 2]
        of = of_family(family, len(lens), heads[0], max(lens))
        check(query, pages.place(key, layout), pages.place(value, layout), *of, **arguments)


@pytest.mark.parametrize("family", FAMILIES, ids=lambda family: family.name)
@pytest.mark.parametrize("options", [ONE, SPLITS, BALANCED], ids=["one", "splits", "balanced"])
def test_families_on_pages(options, family):
    """Pages of 16 in any order, some of them shared, and a table of every kind."""
    lens = [300, 77, 0, 128]
    for table_dtype, strided, shared in ((torch.int32, False, 0), (torch.int64, True, 4)):
        pages = pages_for(lens, 16, dtype=table_dtype, strided=strided, shared=shared)
        query, key, value = make_inputs(4, 8, 2, 3, 300, 64, dtype=torch.float16, device=DEVICE)
        arguments = {"page_table": pages.table, "kv_lens": tensor(lens, table_dtype), "options": options}
        check(query, pages.place(key), pages.place(value), *of_family(family, 4, 8, 300, 3), **arguments)


# --- Quantised caches -------------------------------------------------------------------------------------------------


def quantised_cases():
    """Types x scales x query types; pages, head dimensions and families rotate."""
    count = 0
    for name in QUANTISED:
        for form in SCALES:
            for dtype in HALVES:
                page_size, head_dim = (None, 16, 128)[count % 3], (128, 64, 256)[(count + count // 8) % 3]
                family, options = FAMILIES[count % 5], (None, SPLITS, BALANCED, ONE)[(count + count // 4) % 4]
                count += 1
                label = f"{name}-{form}-{dtype}-{page_size}-{head_dim}-{family.name}".replace("torch.", "")
                yield pytest.param((name, form, dtype, page_size, head_dim, family, options), id=label)


@pytest.mark.parametrize("case", list(quantised_cases()))
def test_quantised(case):
    """Past the sequences are NaN, in the caches and in their scales."""
    name, form, dtype, page_size, head_dim, family, options = case
    lens = [512, 97, 0, 54, 300]
    query, *caches = make_inputs(5, 32, 4, 1, 512, head_dim, dtype=dtype, device=DEVICE)
    (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[name], form) for x in caches)
    arguments = {"kv_lens": tensor(lens), "options": options}
    put = lambda x: spoil(x, lens)
    if page_size is not None:
        pages = pages_for(lens, page_size)
        put, arguments["page_table"] = pages.place, pages.table
    if form == "tokens":
        k_scale, v_scale = put(k_scale), put(v_scale)
    arguments |= {"k_scale": k_scale, "v_scale": v_scale}
    check(query, put(key), put(value), *of_family(family, 5, 32, 512), **arguments)


@pytest.mark.parametrize("dtype", [*HALVES, torch.float32], ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_every_number_of_a_quantised_type(name, dtype):
    """All 256 bytes but those of NaN and infinity, in the keys and in the values, are what PyTorch reads."""
    numbers = torch.arange(256, dtype=torch.uint8)
    numbers = numbers[numbers.view(QUANTISED[name]).float().isfinite()].view(QUANTISED[name])
    query = make_inputs(1, 8, 1, 1, 64, 64, dtype=dtype, device=DEVICE)[0]
    largest = float(numbers.float().abs().max())
    for start in (0, 101):
        key, value = (numbers[(torch.arange(64 * 64) + x) % len(numbers)].view(1, 1, 64, 64) for x in (start, 77))
        check(query, key.to(DEVICE), value.to(DEVICE), k_scale=4.0 / largest, v_scale=1.0 / largest)


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("name", QUANTISED)
def test_scales_of_peaked_attention(name, dtype):
    """A few keys hold most of the weight; scales of all magnitudes lose nothing of what the others add."""
    query, key, value = make_inputs(2, 8, 2, 1, 2048, 64, dtype=dtype, device=DEVICE)
    for size in (1.0, 1e-3, 1e3):
        (k, k_scale), (v, v_scale) = (quantise(x, QUANTISED[name], "tokens") for x in (key, size * value))
        check(3.0 * query, k, v, k_scale=k_scale, v_scale=v_scale)
    v_scale = v_scale * torch.logspace(-3, 3, 2048, device=DEVICE).flip(0)
    check(query, k, v, k_scale=k_scale, v_scale=1e-3 * v_scale)
    check(query, k, v, k_scale=k_scale, v_scale=torch.zeros_like(v_scale))


@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize(("head_dim", "v_head_dim", "how"), [(59, 33, None), (80, 80, "odd"), (192, 128, None)])
def test_quantised_shapes(head_dim, v_head_dim, how, name):
    """Columns that cannot be read in pairs, and a second load of columns."""
    query, key, value = make_inputs(3, 12, 2, 2, 200, head_dim, v_head_dim, dtype=torch.float16, device=DEVICE)
    (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[name], "heads") for x in (key, value))
    if how == "odd":
        place = torch.empty(3, 2, 200, head_dim + 1, dtype=key.dtype, device=DEVICE)
        place[..., 1:] = key
        key = place[..., 1:]
    arguments = {"kv_lens": tensor([200, 131, 5]), "k_scale": k_scale, "v_scale": v_scale}
    check(query, key, value, mods.alibi(12, device=DEVICE), mods.causal(), **arguments)


# --- Ragged lengths ---------------------------------------------------------------------------------------------------

RAGGED = {
    "one_long": [1] * 100 + [2000],
    "long_first": [8190, 7, 0, 1],
    "alternating": [1, 1000] * 16,
    "two_long": [0, 5000, 0, 4999, 3, 0],
    "none": [0] * 7,
}


@pytest.mark.parametrize("page_size", [None, 16])
@pytest.mark.parametrize("options", [None, BALANCED, SPLITS], ids=["chosen", "balanced", "splits"])
@pytest.mark.parametrize("family", [FAMILIES[0], FAMILIES[3]], ids=lambda family: family.name)
def test_ragged_lengths(family, options, page_size):
    for lens in RAGGED.values():
        query, key, value = make_inputs(len(lens), 8, 2, 1, max(1, *lens), 64, dtype=torch.bfloat16, device=DEVICE)
        arguments = {"kv_lens": tensor(lens), "options": options}
        if page_size is None:
            spoil(key, lens), spoil(value, lens)
        else:
            pages = pages_for(lens, page_size)
            key, value, arguments["page_table"] = pages.place(key), pages.place(value), pages.table
        check(query, key, value, *of_family(family, len(lens), 8, max(1, *lens)), **arguments)


@pytest.mark.parametrize("batch", [33, 257, 1100, 4096])
def test_more_sequences_than_are_weighed_at_a_time(batch):
    lens, longest = [0] * batch, 400 if batch < 4096 else 50
    for b in {0, 31, 32, batch // 2, batch - 1}:
        lens[b] = 3 + 5 * b % (longest - 3)
    query, key, value = make_inputs(batch, 4, 2, 1, longest, 64, dtype=torch.float16, device=DEVICE)
    slopes = torch.linspace(0.01, 1, batch, device=DEVICE)
    windows = torch.arange(batch, device=DEVICE) % 300 + 1
    for mask_mod in (mods.causal(), lambda b, h, q, k: (k <= q) & (q - k < windows[b])):
        score_mod = lambda s, b, h, q, k: s - slopes[b] * (q - k)
        check(query, key, value, score_mod, mask_mod, BALANCED, kv_lens=tensor(lens))


@pytest.mark.parametrize("family", ["head_window", "streaming", "prefix_lm", "chunked", "no_key", "combined"])
@pytest.mark.parametrize("num_queries", [1, 5])
def test_balanced_masks(num_queries, family):
    family = next(mods for mods in MODS if mods.name == family)
    query, key, value = make_inputs(6, 28, 4, num_queries, 3000, 64, dtype=torch.float16, device=DEVICE)
    of = of_family(family, 6, 28, 3000, num_queries)
    for lens in ([3000, 0, 1, 2999, 64, 65], [0, 0, 0, 0, 0, 3000]):
        check(query, key, value, *of, BALANCED, kv_lens=tensor(lens))


# --- Windows and sinks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [1, 16, 128])
@pytest.mark.parametrize("num_queries", [1, 4])
def test_windows_over_pages(num_queries, page_size):
    """Of any size, next to page and block borders; one kernel for all."""
    lens = [1030, 128, 0, 17, 256]
    pages = pages_for(lens, page_size)
    query, key, value = make_inputs(5, 8, 2, num_queries, 1030, 128, dtype=torch.bfloat16, device=DEVICE)
    key, value = pages.place(key), pages.place(value)
    arguments = {"page_table": pages.table, "kv_lens": tensor(lens)}
    for window in (1, 2, 15, 16, 17, 63, 64, 65, 127, 128, 129, 1000, sys.maxsize):
        check(query, key, value, None, mods.sliding_window(window), **arguments)
    windows = tensor([1, 16, 17, 300, 5, 128, 2000, 64])
    check(query, key, value, None, lambda b, h, q, k: (k <= q) & (q - k < windows[h]), **arguments)
    check(query, key, value, None, lambda b, h, q, k: (k <= q) & (q - k < windows[b]), **arguments)


@pytest.mark.parametrize("options", [ONE, SPLITS, BALANCED], ids=["one", "splits", "balanced"])
@pytest.mark.parametrize("page_size", [None, 16])
def test_sinks(page_size, options):
    """Absent ones, large ones, and sequences without a key."""
    lens = [300, 0, 17, 129]
    query, key, value = make_inputs(4, 8, 2, 2, 300, 64, dtype=torch.bfloat16, device=DEVICE)
    arguments = {"kv_lens": tensor(lens), "options": options}
    if page_size is not None:
        pages = pages_for(lens, page_size)
        key, value, arguments["page_table"] = pages.place(key), pages.place(value), pages.table
    numbers = torch.tensor([-torch.inf, 0.5, 30.0, -40.0, 1.0, -1.0, 0.0, 2.0], device=DEVICE)
    mask_mod = lambda b, h, q, k: (k <= q) & (h != 3)
    for sinks in (numbers, torch.full_like(numbers, -torch.inf)):
        for q_lens in ([2, 1, 0, 2], [2, 2, 2, 2]):
            check(query, key, value, None, mask_mod, sinks=sinks, q_lens=tensor(q_lens), **arguments)
    check(query, key, value, mods.alibi(8, device=DEVICE), sinks=numbers.bfloat16(), **arguments)


# --- Multi-head latent attention and other large heads ----------------------------------------------------------------

MLA_LENS = [0, 17, 33, 96, 97, 114, 514, 1024]


@pytest.mark.parametrize(
    ("num_heads", "page_size", "dtype", "num_queries", "options"),
    [
        (16, None, torch.bfloat16, 1, None), (16, 1, torch.float16, 1, BALANCED), (16, 64, torch.bfloat16, 2, SPLITS),
        (128, None, torch.float16, 1, BALANCED), (128, 64, torch.bfloat16, 1, None),
    ],
)  # fmt: skip
def test_multi_head_latent_attention(num_heads, page_size, dtype, num_queries, options):
    """A value is the first 512 of the 576 columns of its key."""
    query, key, _ = make_inputs(8, num_heads, 1, num_queries, 1024, 576, dtype=dtype, device=DEVICE)
    arguments = {"kv_lens": tensor(MLA_LENS), "scale": 192**-0.5, "options": options}
    if page_size is None:
        spoil(key, MLA_LENS)
    else:
        pages = pages_for(MLA_LENS, page_size)
        key, arguments["page_table"] = pages.place(key), pages.table
    for score_mod, mask_mod in ((None, None), (mods.softcap(20.0), mods.sliding_window(100))):
        check(query, key, key[..., :512], score_mod, mask_mod, **arguments)


FEW = DecodeOptions(schedule="balanced", num_splits=3)  # workers, each with several items


def of_latents(num_heads, num_queries, dtype, page_size=None, lens=MLA_LENS):
    """Query, keys and arguments for the kernel for latents of many heads."""
    query, key, _ = make_inputs(len(lens), num_heads, 1, num_queries, 1024, 576, dtype=dtype, device=DEVICE)
    arguments = {"kv_lens": tensor(lens), "scale": 192**-0.5}
    if page_size is None:
        return query, spoil(key, lens), arguments
    pages = pages_for(lens, page_size)
    return query, pages.place(key), arguments | {"page_table": pages.table}


@pytest.mark.parametrize(
    ("num_heads", "num_queries", "dtype", "page_size", "family", "options"),
    [
        (128, 1, torch.bfloat16, None, "streaming", SPLITS), (128, 1, torch.float16, 128, "alibi", BALANCED),
        (40, 1, torch.bfloat16, 64, "combined", ONE), (33, 3, torch.float16, None, "document", BALANCED),
        (128, 2, torch.bfloat16, 256, "tree", None), (64, 1, torch.bfloat16, None, "no_key", SPLITS),
        (36, 2, torch.float16, 64, "head_window", BALANCED), (128, 1, torch.bfloat16, None, "none", FEW),
        (40, 2, torch.float16, 64, "causal", FEW),
    ],
)  # fmt: skip
def test_latents_of_many_heads(num_heads, num_queries, dtype, page_size, family, options):
    """Three groups of warps share the work of a tile; numbers of heads that fill it and that do not."""
    family = next(mods for mods in MODS if mods.name == family)
    query, key, arguments = of_latents(num_heads, num_queries, dtype, page_size)
    of = of_family(family, len(MLA_LENS), num_heads, 1024, num_queries)
    sinks = torch.linspace(-3, 3, num_heads, device=DEVICE)
    q_lens = tensor([num_queries, 0, 1, num_queries, 1, num_queries, num_queries, 1])
    check(query, key, key[..., :512], *of, options, **arguments)
    check(query, key, key[..., :512], *of, options, sinks=sinks, q_lens=q_lens, **arguments)


@pytest.mark.parametrize("options", [ONE, SPLITS, BALANCED, FEW], ids=["one", "splits", "balanced", "few"])
@pytest.mark.parametrize("family", ["none", "window", "document"])
def test_latents_of_every_small_number_of_blocks(family, options):
    """Blocks have two places, so a run of none, of one, or of an even or odd number of blocks ends in its own way."""
    lens = [0, 1, 64, 65, 128, 129, 192, 256, 257, 320, 400, 448]
    query, key, arguments = of_latents(128, 1, torch.bfloat16, None, lens)
    of = of_family(next(mods for mods in MODS if mods.name == family), len(lens), 128, 1024, 1)
    check(query, key, key[..., :512], *of, options, **arguments)


@pytest.mark.parametrize("options", [SPLITS, BALANCED, FEW], ids=["splits", "balanced", "few"])
def test_a_graph_of_latents_of_many_heads(options):
    """Lengths change between replays, and the same call gives the same bits."""
    query, key, arguments = of_latents(128, 1, torch.bfloat16, None, [1024] * 8)
    call = lambda: flex_decode(query, key, key[..., :512], return_lse=True, options=options, **arguments)
    graph, (out, lse) = captured(call)
    for lens in (MLA_LENS, [0] * 8, [1, 1024, 63, 64, 65, 0, 128, 999]):
        arguments["kv_lens"].copy_(tensor(lens))
        graph.replay()
        first = out.clone()
        assert_close_to_reference(
            out, lse, query.cpu(), key.cpu(), key[..., :512].cpu(), None, None, **on_cpu(arguments)
        )
        for _ in range(20):
            graph.replay()
            assert torch.equal(out, first)


@pytest.mark.parametrize("name", ["e4m3", "int8"])
def test_quantised_latent_attention(name):
    query, key, _ = make_inputs(8, 16, 1, 1, 1024, 576, dtype=torch.bfloat16, device=DEVICE)
    key, scale = quantise(key, QUANTISED[name], "tokens")
    pages = pages_for(MLA_LENS, 64)
    key, scale = pages.place(key), pages.place(scale)
    arguments = {"page_table": pages.table, "kv_lens": tensor(MLA_LENS), "k_scale": scale, "v_scale": scale}
    check(query, key, key[..., :512], None, None, **arguments)


@pytest.mark.parametrize(
    ("head_dim", "v_head_dim", "dtype"),
    [
        (192, 128, torch.bfloat16), (192, 128, torch.float32), (288, 256, torch.float16), (300, 200, torch.float16),
        (130, 130, torch.bfloat16), (576, 512, torch.float32), (512, 512, torch.bfloat16), (59, 33, torch.float16),
    ],
)  # fmt: skip
def test_head_dims(head_dim, v_head_dim, dtype):
    query, key, value = make_inputs(3, 8, 2, 1, 300, head_dim, v_head_dim, dtype=dtype, device=DEVICE)
    arguments = {"kv_lens": tensor([300, 97, 1])}
    for v in (value, key[..., :v_head_dim]):
        check(query, key, v, mods.alibi(8, device=DEVICE), mods.causal(), **arguments)


# --- Prompts beside tokens --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("page_size", "num_queries", "heads", "head_dim", "family"),
    [
        (None, 1, (6, 6), 64, 0), (None, 64, (6, 2), 128, 3), (1, 3, (6, 1), 128, 1), (1, 17, (4, 4), 64, 4),
        (4, 256, (2, 1), 64, 0), (4, 1, (6, 2), 59, 2), (128, 7, (8, 1), 128, 3), (128, 256, (4, 2), 128, 4),
    ],
)  # fmt: skip
def test_ragged_queries(page_size, num_queries, heads, head_dim, family):
    """Up to 256 tokens of a sequence beside one token of another; NaN past them."""
    lens = [339, 400, 3, 0, 256]
    query, key, value = make_inputs(5, *heads, num_queries, 400, head_dim, dtype=torch.bfloat16, device=DEVICE)
    arguments = {"kv_lens": tensor(lens)}
    if page_size is None:
        spoil(key, lens), spoil(value, lens)
    else:
        pages = pages_for(lens, page_size)
        key, value, arguments["page_table"] = pages.place(key), pages.place(value), pages.table
    score_mod, mask_mod = of_family(FAMILIES[family], 5, heads[0], 400, num_queries)
    mask_mod = mods.causal() if mask_mod is None else mask_mod
    for q_lens in ([num_queries] * 5, [1, num_queries, min(2, num_queries), 0, 0]):
        arguments["q_lens"] = tensor(q_lens, torch.int64)
        part = spoil(query.clone(), q_lens)
        for options in (None, BALANCED):
            check(part, key, value, score_mod, mask_mod, options, **arguments)
        check(part, key, value, score_mod, mask_mod, q_offset=tensor([0, 300, -1, 7, 255]), **arguments)


# --- Descriptors on pages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stored", ["float16", "int8", "e4m3"])
@pytest.mark.parametrize("block_n", [None, 16, 256])
def test_pages_that_descriptors_can_load(block_n, stored):
    """Blocks smaller and larger than a page, with and without a partial one."""
    lens = [1000, 128, 0, 384, 129]
    query, key, value = make_inputs(5, 8, 2, 1, 1000, 64, dtype=torch.float16, device=DEVICE)
    pages = pages_for(lens, 128)
    arguments = {"page_table": pages.table, "kv_lens": tensor(lens), "options": DecodeOptions(block_n=block_n)}
    if stored != "float16":
        (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[stored], "tokens") for x in (key, value))
        arguments |= {"k_scale": pages.place(k_scale), "v_scale": pages.place(v_scale)}
    for layout in ("hnd", "nhd"):
        check(query, pages.place(key, layout), pages.place(value, layout), position_score, **arguments)


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def captured(call):
    """A graph of a call that ran before, and its result."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("options", [None, SPLITS, BALANCED], ids=["chosen", "splits", "balanced"])
@pytest.mark.parametrize("stored", ["float16", "int8"])
def test_a_graph_sees_all_that_changes(stored, options):
    """Lengths, tables, query lengths, sinks, scales, captures."""
    all_lens = ([1000, 1, 130, 64], [5, 700, 0, 999], [0, 0, 0, 0], [16, 1000, 1000, 3])
    query, key, value = make_inputs(4, 8, 2, 3, 1000, 64, dtype=torch.float16, device=DEVICE)
    scales = {}
    if stored == "int8":
        (key, k_scale), (value, v_scale) = (quantise(x, torch.int8, "tokens") for x in (key, value))
        scales = {"k_scale": k_scale, "v_scale": v_scale}
    tables = [Pages(lens, 16, 64, dead=(-1, None, 0), device=DEVICE, seed=i) for i, lens in enumerate(all_lens)]
    table, kv_lens, q_lens = tables[0].table.clone(), tensor(all_lens[0]), tensor([3, 1, 2, 3])
    pool = {name: torch.zeros_like(tables[0].place(x)).repeat(4, *[1] * (x.dim() - 1)) for name, x in (
        ("key", key), ("value", value), *scales.items(),
    )}  # fmt: skip
    bias, window, sinks = torch.zeros(8, 1024, device=DEVICE), tensor([2000] * 4), torch.zeros(8, device=DEVICE)
    score_mod = lambda s, b, h, q, k: s + bias[h, k]
    mask_mod = lambda b, h, q, k: (k <= q) & (q - k < window[b])
    arguments = {
        "page_table": table, "kv_lens": kv_lens, "q_lens": q_lens, "sinks": sinks, **{n: pool[n] for n in scales},
    }  # fmt: skip

    def call():
        more = {"return_lse": True, "options": options} | arguments
        return flex_decode(query, pool["key"], pool["value"], score_mod, mask_mod, **more)

    kv_lens.zero_()
    graph, (out, lse) = captured(call)
    for pages, new_q_lens in zip(tables, ([3, 1, 2, 0], [0, 3, 3, 1], [1, 1, 1, 1], [3, 3, 3, 3]), strict=True):
        for name, x in (("key", key), ("value", value), *scales.items()):
            placed = pages.place(x)
            pool[name].view(torch.uint8).fill_(0x7F)
            pool[name][: len(placed)] = placed
        table.copy_(pages.table)
        kv_lens.copy_(tensor(pages.lens))
        q_lens.copy_(tensor(new_q_lens))
        bias.normal_(), sinks.normal_(), query.normal_(), window.random_(1, 1000)
        graph.replay()
        torch.cuda.synchronize()
        tensors = query.cpu(), pool["key"].cpu(), pool["value"].cpu()
        assert_close_to_reference(out, lse, *tensors, score_mod, mask_mod, **on_cpu(arguments))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float8_e4m3fn], ids=str)
def test_a_decode_loop_in_a_graph(dtype):
    """A captured append and a captured decode, on pages that sequences take as they grow."""
    cache = PagedKVCache(
        batch=3, num_kv_heads=2, num_pages=40, page_size=16, max_pages=16, head_dim=64, dtype=dtype, device=DEVICE
    )
    k, v = (torch.randn(3, 2, 30, 64, device=DEVICE, dtype=torch.float16) for _ in range(2))
    cache.append(k, v, num_tokens=[30, 5, 0])
    new_k, new_v = k[:, :, :1].clone(), v[:, :, :1].clone()
    query = torch.randn(3, 8, 1, 64, device=DEVICE, dtype=torch.float16)
    alibi = mods.alibi(8, device=DEVICE)
    warm = KVCache(batch=3, num_kv_heads=2, max_kv_len=8, head_dim=64, dtype=dtype, device=DEVICE)
    warm.append(new_k, new_v)
    flex_decode(query, None, None, alibi, mods.sliding_window(20), cache=cache)
    cache.append(new_k, new_v, num_tokens=0)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    cache.append(new_k, new_v)
    with torch.cuda.graph(graph):
        cache.append(new_k, new_v)
        out = flex_decode(query, None, None, alibi, mods.sliding_window(20), cache=cache)
    for step in range(40):
        for x in (new_k, new_v, query):
            x.normal_()
        cache.reserve([1, 1, step % 2])
        graph.replay()
        if step in (0, 1, 15, 16, 39):
            torch.cuda.synchronize()
            held = {name: getattr(cache, name) for name in ("kv_lens", "page_table", "k_scale", "v_scale")}
            tensors = query.cpu(), cache.key.cpu(), cache.value.cpu()
            assert_close_to_reference(out, None, *tensors, alibi, mods.sliding_window(20), **on_cpu(held))
    assert cache.lengths == cache.kv_lens.tolist() == [71, 46, 21]


# --- Large caches -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [16, 128])
def test_a_paged_cache_of_more_than_2_to_the_31_elements(page_size):
    """Pages at its end, which 32-bit offsets do not reach."""
    num_pages = (1 << 31) // (2 * page_size * 128) + 64
    pool = torch.empty(num_pages, 2, page_size, 128, dtype=torch.float16, device=DEVICE)
    assert pool.numel() > 1 << 31
    lens = [500, 77, 0]
    pages = pages_for(lens, page_size)
    query, key, _ = make_inputs(3, 8, 2, 1, 500, 128, dtype=torch.float16, device=DEVICE)
    pool[num_pages - pages.num_pages :] = pages.place(key)
    table = pages.table.clone()
    for row, own in zip(table, pages.pages, strict=True):
        row[: len(own)] += num_pages - pages.num_pages
    small = pages.place(key)
    for mask_mod in (None, mods.sliding_window(100)):
        for options in (SPLITS, BALANCED):
            arguments = {"kv_lens": tensor(lens), "options": options, "return_lse": True}
            out, lse = flex_decode(query, pool, pool, None, mask_mod, page_table=table, **arguments)
            expected = flex_decode(query, small, small, None, mask_mod, page_table=pages.table, **arguments)
            assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])
    check(query, small, small, page_table=pages.table, kv_lens=tensor(lens))


# --- Bits -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [None, SPLITS, BALANCED], ids=["chosen", "splits", "balanced"])
def test_20_runs_give_the_same_bits(options):
    """Also while other calls run before and after."""
    lens = [3000, 1, 0, 1777, 64]
    query, key, value = make_inputs(5, 32, 4, 2, 3000, 128, dtype=torch.bfloat16, device=DEVICE)
    pages = pages_for(lens, 16)
    key, value, others = pages.place(key), pages.place(value), tensor([1, 700, 3000, 0, 5])
    others = torch.minimum(others, tensor(lens))
    arguments = {"page_table": pages.table, "options": options, "return_lse": True}
    score_mod, mask_mod = of_family(FAMILIES[2], 5, 32, 3000, 2)
    expected = flex_decode(query, key, value, score_mod, mask_mod, kv_lens=tensor(lens), **arguments)
    results = []
    for _ in range(20):
        flex_decode(query, key, value, score_mod, mask_mod, kv_lens=others, **arguments)
        results.append(flex_decode(query, key, value, score_mod, mask_mod, kv_lens=tensor(lens), **arguments))
    for out, lse in results:
        assert torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


INVARIANT = DecodeOptions(batch_invariant=True)


@pytest.mark.parametrize("page_size", [None, 16, 128])
@pytest.mark.parametrize(
    ("dtype", "family"), [(torch.bfloat16, "none"), (torch.float16, "window"), (torch.float32, "alibi")]
)
def test_a_sequence_does_not_see_its_batch(dtype, family, page_size):
    """The same bits alone, beside others of any length, at any place, and in a cache of any size."""
    family = next(mods for mods in MODS if mods.name == family)
    query, key, value = make_inputs(40, 16, 2, 1, 2000, 128, dtype=dtype, device=DEVICE)
    score_mod, mask_mod = of_family(family, 1, 16, 1500)
    expected = None
    for batch, place, length, size in (
        (1, 0, 1500, 2000), (1, 0, 1500, 1500), (2, 1, 3, 1501), (40, 17, 2000, 2000), (40, 39, 1, 1600),
        (3, 0, 0, 1999),
    ):  # fmt: skip
        order = [b for b in range(batch + 1) if b != 0][:batch]
        order[place] = 0
        lens = [min(length, size)] * batch
        lens[place] = 1500
        arguments = {"kv_lens": tensor(lens), "options": INVARIANT, "return_lse": True}
        cache = [x[[b % 40 for b in order], :, :size] for x in (key, value)]
        if page_size is not None:
            pages = pages_for(lens, page_size, -(-size // page_size), seed=batch)
            cache, arguments["page_table"] = [pages.place(x) for x in cache], pages.table
        out, lse = flex_decode(query[[b % 40 for b in order]], *cache, score_mod, mask_mod, **arguments)
        expected = (out[place], lse[place]) if expected is None else expected
        assert torch.equal(out[place], expected[0]) and torch.equal(lse[place], expected[1])
    check(query[:1], key[:1, :, :1500], value[:1, :, :1500], score_mod, mask_mod, INVARIANT, kv_lens=tensor([1500]))


def test_the_layout_of_a_batch_is_no_part_of_a_sequence():
    """With such strides two sequences have no tensor descriptor, one has."""
    query, key, value = make_inputs(2, 8, 1, 1, 1200, 128, dtype=torch.float32, device=DEVICE)
    padded = [torch.zeros(2, 1200 * 128 + 8, device=DEVICE)[:, : 1200 * 128].view(2, 1, 1200, 128) for _ in range(2)]
    for place, x in zip(padded, (key, value), strict=True):
        place.copy_(x)
    out = flex_decode(query, *padded, options=INVARIANT)
    for b in range(2):
        alone = flex_decode(query[b : b + 1], *(x[b : b + 1] for x in padded), options=INVARIANT)
        assert torch.equal(out[b : b + 1], alone)


# --- Parts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_a_shared_prefix_and_its_suffixes_make_the_whole(dtype):
    """The prefix is attended once for all sequences, the suffixes lie on pages, a sink joins one of the parts."""
    prefix, suffixes = 512, [300, 1, 0, 77]
    query, key, value = make_inputs(4, 8, 2, 1, prefix + 300, 64, dtype=dtype, device=DEVICE)
    key[:, :, :prefix], value[:, :, :prefix] = key[:1, :, :prefix], value[:1, :, :prefix]
    slopes, sinks = mods.alibi_slopes(8, device=DEVICE), torch.linspace(-1, 3, 8, device=DEVICE)
    ends = tensor(suffixes) + prefix
    at = lambda start: lambda s, b, h, q, k: s - slopes[h] * (q - k - start)
    pages = pages_for(suffixes, 16)
    parts = [
        flex_decode(query, key[:1, :, :prefix], value[:1, :, :prefix], at(0), q_offset=ends - 1, return_lse=True),
        flex_decode(
            query, pages.place(key[:, :, prefix:]), pages.place(value[:, :, prefix:]), at(prefix), q_offset=ends - 1,
            page_table=pages.table, kv_lens=tensor(suffixes), sinks=sinks, return_lse=True,
        ),
    ]  # fmt: skip
    out, lse = merge_attention(*zip(*parts, strict=True))
    # The parts are rounded to the dtype before they are merged: that much is no error of the merge.
    whole, whole_lse = check(query, key, value, at(0), kv_lens=ends, sinks=sinks)
    rounding = torch.finfo(dtype).eps * max(part[0].abs().max().item() for part in parts)
    assert (out.float() - whole.float()).abs().max() <= 2 * rounding
    assert (lse - whole_lse).abs().max() <= 1e-5
