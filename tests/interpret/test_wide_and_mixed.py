"""Heads of 1 to 1024 columns, and caches in other dtypes than the query, crossed with what else a call may have.

Triton's interpreter computes products of bfloat16 wrongly, and truncates where it converts to bfloat16. So keys and
values are in bfloat16 here, but no query and no output is.
"""

import itertools

import pytest
import torch
from cache_cases import QUANTISED, Pages, position_score, quantise, spoil
from interpret.decoding import check_decode
from support import MODS, make_inputs

from flexdecode import KVCache, PagedKVCache, flex_decode, merge_attention, mods

HEAD_DIMS = [1, 2, 7, 16, 31, 64, 577, 640, 1000, 1024]
HEADS = [(2, 2), (4, 2), (7, 1)]
FAMILIES = [family for family in MODS if family.name != "masking_score"]
SCHEDULES = {"one": {"num_splits": 1}, "splits": {"num_splits": 3}, "balanced": {"schedule": "balanced"}}
HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
LENS = [45, 17, 0]


def tensor(numbers):
    return torch.tensor(numbers, dtype=torch.int32)


def cases():
    """Every D with three Dv; what else there is to choose rotates."""
    for i, D in enumerate(HEAD_DIMS):
        for j in range(3):
            number = 3 * i + j
            Dv, family = HEAD_DIMS[(i + 3 * j + 1) % 10], FAMILIES[(5 * number) % len(FAMILIES)]
            heads, Q = HEADS[number % 3], (1, 3, 2, 9)[number // 2 % 4]
            schedule, page_size = list(SCHEDULES)[(i + j) % 3], (None, 4, 16, 24)[number % 4]
            stored = (None, None, "int8", "e5m2", None, "e4m3")[number % 6]
            name = f"{D}-{Dv}-{heads[0]}/{heads[1]}-{Q}-{family.name}-{schedule}-{page_size}-{stored}"
            yield pytest.param(D, Dv, heads, Q, family, schedule, page_size, stored, id=name)


@pytest.mark.parametrize(("D", "Dv", "heads", "Q", "family", "schedule", "page_size", "stored"), list(cases()))
def test_head_dims(D, Dv, heads, Q, family, schedule, page_size, stored):
    B, N = 3, 48
    shape = (B, heads[0], N, Q, "cpu")
    dtype = (HALF, SINGLE)[(D + Dv) % 2]
    query, key, value = make_inputs(B, *heads, Q, N, D, Dv, dtype=dtype)
    arguments = {"kv_lens": tensor(LENS)}
    scales = {}
    if stored is not None:
        (key, scales["k_scale"]), (value, scales["v_scale"]) = (
            quantise(x, QUANTISED[stored], form) for x, form in ((key, "tokens"), (value, ("tokens", "heads")[D % 2]))
        )
    spoil(key, LENS), spoil(value, LENS)
    if page_size is not None:
        pages = Pages(LENS, page_size, seed=D)
        key, value = pages.place(key), pages.place(value)
        scales = {name: pages.place(x) if x.dim() == 3 else x for name, x in scales.items()}
        arguments["page_table"] = pages.table
    of = family.make_score_mod(*shape), family.make_mask_mod(*shape)
    check_decode(query, key, value, *of, **arguments, **scales, **SCHEDULES[schedule])


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (1, 2), (700, 600), (1024, 1)])
def test_layouts(D, Dv, layout):
    inputs = make_inputs(2, 6, 2, 2, 30, D, Dv, dtype=HALF, layout=layout)
    check_decode(*inputs, position_score, mods.causal(), num_splits=2)


def test_one_column_of_any_stride():
    """A dimension of one element may have any stride; what lies between is never read."""
    query, key, value = make_inputs(2, 2, 1, 1, 20, 1, layout="strided")
    strides = *key.stride()[:3], 7
    key, value = (x.as_strided(x.shape, strides) for x in (key, value))
    check_decode(query, key, value, position_score, num_splits=2)


def test_wide_heads_that_no_key_reaches():
    """NaN where no row attends, sinks, ragged queries, and an output in another layout."""
    query, key, value = make_inputs(3, 4, 2, 3, 48, 600, 520, dtype=HALF)
    spoil(key, LENS), spoil(value, LENS), spoil(query, [3, 1, 2])
    out = torch.full((3, 4, 520, 3), torch.nan, dtype=HALF).transpose(2, 3)
    arguments = {"kv_lens": tensor(LENS), "q_lens": tensor([3, 1, 2]), "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])}
    for schedule in SCHEDULES.values():
        check_decode(query, key, value, None, mods.sliding_window(9), out=out, **arguments, **schedule)


def test_batch_invariance_of_wide_heads():
    query, key, value = make_inputs(3, 4, 2, 1, 48, 600, dtype=HALF)
    arguments = {"kv_lens": tensor([45, 17, 3]), "batch_invariant": True}
    out, lse = check_decode(query, key, value, mods.alibi(4), **arguments)
    arguments["kv_lens"] = tensor([17])
    alone = check_decode(query[1:2], key[1:2], value[1:2], mods.alibi(4), **arguments)
    assert torch.equal(alone[0], out[1:2]) and torch.equal(alone[1], lse[1:2])


# --- Dtypes -----------------------------------------------------------------------------------------------------------


def pairs():
    """All that differ."""
    dtypes = HALF, SINGLE, BF16
    for query, key, value in itertools.product(dtypes[:2], dtypes, dtypes):
        if not query == key == value:
            yield pytest.param(query, key, value, id=f"{query}-{key}-{value}".replace("torch.", ""))


@pytest.mark.parametrize(("query_dtype", "key_dtype", "value_dtype"), list(pairs()))
def test_caches_of_another_dtype(query_dtype, key_dtype, value_dtype):
    """Both kernels for tokens, one tile of rows and several; with pages every other time."""
    number = [HALF, BF16, SINGLE].index(key_dtype)
    for i, (Q, D, Dv) in enumerate(((1, 16, 24), (2, 17, 600), (9, 700, 16))):
        query, key, value = make_inputs(3, 4, 2, Q, 48, D, Dv)
        key, value = spoil(key.to(key_dtype), LENS), spoil(value.to(value_dtype), LENS)
        arguments = {"kv_lens": tensor(LENS)}
        if (number + i) % 2:
            pages = Pages(LENS, 8)
            key, value, arguments["page_table"] = pages.place(key), pages.place(value), pages.table
        of = position_score, (None, mods.causal())[i % 2]
        out, _ = check_decode(query.to(query_dtype), key, value, *of, **arguments, **list(SCHEDULES.values())[i])
        assert out.dtype == query_dtype


@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("D", [7, 16, 64, 600])
def test_float8_without_scales(D, stored):
    query, key, value = make_inputs(2, 4, 2, 2, 30, D, dtype=HALF)
    check_decode(query, key.to(stored), value.to(stored), position_score, num_splits=2)
    check_decode(query, key.to(stored), value.to(stored), position_score, num_splits=2, v_scale=0.5)


@pytest.mark.parametrize(("key_dtype", "value_dtype"), [
    (torch.float8_e5m2, HALF), (SINGLE, torch.float8_e4m3fn), (torch.int8, torch.float8_e5m2), (torch.int8, BF16),
])  # fmt: skip
def test_a_quantised_and_another_cache(key_dtype, value_dtype):
    query, *caches = make_inputs(2, 4, 2, 2, 30, 32, dtype=HALF)
    scales = {}
    for i, (name, dtype) in enumerate((("k_scale", key_dtype), ("v_scale", value_dtype))):
        if dtype == torch.int8:
            caches[i], scales[name] = quantise(caches[i], dtype, "tokens")
        caches[i] = caches[i].to(dtype)
    check_decode(query, *caches, position_score, mods.causal(), num_splits=2, **scales)


# --- Caches and merges ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [HALF, SINGLE, torch.float8_e5m2, torch.int8], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (2, 7), (1024, 1000), (577, 3)])
@pytest.mark.parametrize("paged", [False, True])
def test_caches_that_grow(paged, D, Dv, dtype):
    query, key, value = make_inputs(2, 4, 2, 1, 11, D, Dv, dtype=HALF)
    sizes = {"batch": 2, "num_kv_heads": 2, "head_dim": D, "v_head_dim": Dv, "dtype": dtype}
    cache = PagedKVCache(**sizes, num_pages=8, page_size=4) if paged else KVCache(**sizes, max_kv_len=16)
    cache.append(key[:, :, :9], value[:, :, :9])
    cache.append(key[:, :, 9:], value[:, :, 9:], num_tokens=[2, 1])
    names = ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale")
    held = {name: getattr(cache, name) for name in names}
    out, _ = check_decode(query, held.pop("key"), held.pop("value"), mods.alibi(4), num_splits=2, **held)
    found = flex_decode(query, cache=cache, score_mod=mods.alibi(4))  # PyTorch operations
    torch.testing.assert_close(found, out, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("Dv", [1, 7, 577, 1024])
def test_merges(Dv):
    query, key, value = make_inputs(2, 4, 2, 2, 30, 3, Dv)
    parts = [check_decode(query, key[:, :, at], value[:, :, at]) for at in (slice(0, 11), slice(11, 30))]
    out, lse = merge_attention(*zip(*parts, strict=True))
    whole = check_decode(query, key, value)
    torch.testing.assert_close(out, whole[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, whole[1], rtol=1e-5, atol=1e-5)
