"""Pages, quantised caches, ragged queries and sinks: every refusal word for word, and results of the torch backend."""

import fractions

import numpy as np
import pytest
import torch
from cache_cases import QUANTISED, SCALES, Pages, quantise, spoil
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODS, assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import (
    DecodeOptions,
    KVCache,
    PagedKVCache,
    cache_info,
    clear_cache,
    explain,
    flex_decode,
    merge_attention,
    mods,
)
from flexdecode.reference import reference_decode

B, HQ, HKV, Q, D, DV = 2, 4, 2, 3, 16, 24
LENS = torch.tensor([11, 3])
PAGES = Pages([11, 3], 4, 3)
QUERY, KEY, VALUE = make_inputs(B, HQ, HKV, Q, 11, D, DV)
CONTIGUOUS = {"key": KEY, "value": VALUE}
PAGED = {"key": PAGES.place(KEY), "value": PAGES.place(VALUE), "page_table": PAGES.table, "kv_lens": LENS}
INT8 = {"key": quantise(KEY, torch.int8, "number")[0], "value": quantise(VALUE, torch.int8, "number")[0]}
SCALED = INT8 | {"k_scale": 0.5, "v_scale": 0.5}
PAGED_INT8 = PAGED | {"key": PAGES.place(INT8["key"]), "value": PAGES.place(INT8["value"])}


def call(arguments, **changed):
    return flex_decode(QUERY, **(arguments | changed))


def refused(error, message, arguments, **changed):
    """Twice, because what has failed once must not be remembered as good."""
    for _ in range(2):
        with pytest.raises(error) as caught:
            call(arguments, **changed)
        assert str(caught.value) == message


def check(query, key, value, score_mod=None, mask_mod=None, **arguments):
    out, lse = flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, **arguments)
    arguments.pop("options", None)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
    return out, lse


# --- Page tables ------------------------------------------------------------------------------------------------------


def test_a_page_table_of_the_wrong_kind():
    form = "`page_table` must be an int32 or int64 tensor [B, max_pages], got {}"
    refused(TypeError, form.format("list"), PAGED, page_table=PAGES.table.tolist())
    refused(TypeError, form.format("ndarray"), PAGED, page_table=PAGES.table.numpy())
    for dtype in (torch.int16, torch.uint8, torch.float32, torch.bool):
        message = f"`page_table` must be int32 or int64, got {dtype}"
        refused(ValueError, message, PAGED, page_table=PAGES.table.to(dtype))
    message = "`page_table` must be on the device of `query`, cpu, got meta"
    refused(ValueError, message, PAGED, page_table=PAGES.table.to("meta"))


@pytest.mark.parametrize("table", [PAGES.table[0], PAGES.table[:1], PAGES.table[None], PAGES.table.repeat(2, 1)])
def test_a_page_table_of_the_wrong_shape(table):
    message = f"`page_table` must have shape [B, max_pages] with B = 2 (from query), got {list(table.shape)}"
    refused(ValueError, message, PAGED, page_table=table)


def test_a_page_table_needs_lengths():
    message = "`page_table` needs `kv_lens`: the pages of a sequence do not say where it ends"
    refused(ValueError, message, PAGED, kv_lens=None)


def test_pages_of_key_and_value():
    pages = PAGES.num_pages
    form = f"[num_pages, Hkv, page_size, Dv] with num_pages = {pages}, Hkv = 2 and page_size = 4 (from key)"
    for wrong in (PAGED["value"][:, :, :3], PAGED["value"][:, :1], PAGED["value"].transpose(1, 2)):
        message = f"`value` must have shape {form}, got {list(wrong.shape)}"
        refused(ValueError, message, PAGED, value=wrong)
    for number in (1, 3, pages - 1):
        message = f"`value` must have as many pages as `key`, {pages}, got {number}"
        refused(ValueError, message, PAGED, value=PAGED["value"][:number])
    wrong = PAGED["key"][..., :8]
    message = f"`key` must have shape [num_pages, Hkv, page_size, D] with D = 16 (from query), got {list(wrong.shape)}"
    refused(ValueError, message, PAGED, key=wrong)
    message = "`key` must have pages of at least one token, got page_size = 0"
    empty = {"key": PAGED["key"][:, :, :0], "value": PAGED["value"][:, :, :0], "kv_lens": 0 * LENS}
    refused(ValueError, message, PAGED, **empty)


def test_heads_of_pages_divide():
    message = (
        "`query` must have a multiple of the heads of `key`, got Hq = 4 and Hkv = 3; a [B, N, H, D] cache is passed as "
        "its view `cache.transpose(1, 2)`"
    )
    pages = {name: torch.zeros(5, 3, 4, width) for name, width in (("key", D), ("value", DV))}
    refused(ValueError, message, PAGED, **pages)


def test_lengths_beyond_the_table():
    """Also in a call that is known already."""
    lens = LENS.clone()
    call(PAGED, kv_lens=lens)
    for bad in ([13, 3], [4, -1]):
        lens.copy_(torch.tensor(bad))
        message = f"`kv_lens` must lie between 0 and max_pages * page_size = 12 (from page_table), got {min(bad)} to "
        refused(ValueError, message + str(max(bad)), PAGED, kv_lens=lens)
    call(PAGED, kv_lens=torch.tensor([11, 0]))


def test_a_table_that_reaches_too_far():
    table = PAGES.table[:, :1].expand(2, 1 << 28)
    message = f"`page_table` must reach fewer than {1 << 30} positions, got N = {1 << 30}"
    refused(ValueError, message, PAGED, page_table=table)


# --- Scales -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["k_scale", "v_scale"])
class TestScales:
    def test_a_missing_one(self, name):
        """An int8 number without a scale is rarely meant; a float8 number is what it says."""
        of = {"k_scale": "key", "v_scale": "value"}[name]
        message = f"`{name}` is missing: `{of}` is torch.int8; pass 1.0 if its numbers are not scaled"
        refused(ValueError, message, SCALED, **{name: None})
        for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            float8 = {which: SCALED[which].float().to(dtype) for which in ("key", "value")}
            scaled = SCALED | float8
            assert torch.equal(call(scaled, **{name: None}), call(scaled, **{name: 1.0}))
            check(QUERY, **float8)

    @pytest.mark.parametrize("scale", [1.0, 1, torch.ones(2)])
    def test_one_for_an_unquantised_cache(self, name, scale):
        of = {"k_scale": "key", "v_scale": "value"}[name]
        message = f"`{name}` is for caches in float8 or int8, but `{of}` is torch.float32"
        refused(ValueError, message, CONTIGUOUS, **{name: scale})

    @pytest.mark.parametrize("shape", [(1,), (3,), (4,), (2, 3), (3, 2), (2, 2, 10), (2, 11), (2, 2, 11, 1)])
    def test_the_wrong_shape(self, name, shape):
        form = "[Hkv], [B, Hkv] or [B, Hkv, N] = [2], [2, 2] or [2, 2, 11]"
        message = f"`{name}` must be a number or have shape {form}, got {list(shape)}"
        refused(ValueError, message, SCALED, **{name: torch.ones(shape)})

    @pytest.mark.parametrize("shape", [(2, 2, 12), (PAGES.num_pages, 4, 2), (PAGES.num_pages,)])
    def test_the_wrong_shape_of_pages(self, name, shape):
        pages = PAGES.num_pages
        form = f"[Hkv], [B, Hkv] or [num_pages, Hkv, page_size] = [2], [2, 2] or [{pages}, 2, 4]"
        message = f"`{name}` must be a number or have shape {form}, got {list(shape)}"
        refused(ValueError, message, PAGED_INT8 | {"k_scale": 1.0, "v_scale": 1.0}, **{name: torch.ones(shape)})

    @pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.int8, torch.float8_e4m3fn, torch.bool])
    def test_the_wrong_dtype(self, name, dtype):
        message = f"`{name}` must be float32, float16 or bfloat16, got {dtype}"
        refused(ValueError, message, SCALED, **{name: torch.ones(2).to(dtype)})

    def test_the_wrong_kind(self, name):
        for wrong in ("1", [1.0, 1.0], True, 1j):
            message = f"`{name}` must be a number or a tensor, got {type(wrong).__name__}"
            refused(TypeError, message, SCALED, **{name: wrong})

    def test_not_finite(self, name):
        """Also in a call that is known already."""
        call(SCALED, **{name: 2.0})
        for wrong in (float("nan"), float("inf"), -float("inf")):
            refused(ValueError, f"`{name}` must be finite, got {wrong}", SCALED, **{name: wrong})

    def test_the_wrong_place(self, name):
        message = f"`{name}` must be on the device of `query`, cpu, got meta"
        refused(ValueError, message, SCALED, **{name: torch.ones(2, device="meta")})
        message = f"`{name}` must be a dense tensor, got layout torch.sparse_coo"
        refused(ValueError, message, SCALED, **{name: torch.ones(2).to_sparse()})
        message = (
            f"`{name}` requires grad, but flex_decode is forward only: call it under torch.no_grad() or detach `{name}`"
        )
        refused(ValueError, message, SCALED, **{name: torch.ones(2, requires_grad=True)})

    def test_numbers_of_all_kinds(self, name):
        expected = call(SCALED, **{name: 0.25})
        for number in (np.float32(0.25), np.float64(0.25), fractions.Fraction(1, 4)):
            assert torch.equal(call(SCALED, **{name: number}), expected), type(number)
        assert torch.equal(call(SCALED, **{name: 2}), call(SCALED, **{name: 2.0}))
        assert torch.equal(call(SCALED, **{name: np.int64(2)}), call(SCALED, **{name: 2.0}))

    def test_a_number_may_change_between_calls(self, name):
        for number in (0.5, -2.0, 0.0, 1e-3):
            check(QUERY, **(SCALED | {name: number}))


def test_dtypes_of_quantised_caches():
    known = "float16, bfloat16, float32 or float64, or quantised in float8_e4m3fn, float8_e5m2 or int8"
    for dtype in (torch.uint8, torch.int16, torch.float8_e4m3fnuz, torch.complex64):
        for name in ("key", "value"):
            wrong = torch.zeros_like(SCALED[name], dtype=dtype)
            refused(ValueError, f"`{name}` must be {known}, got {dtype}", SCALED, **{name: wrong})
    message = "`query` must be float16, bfloat16, float32 or float64, got torch.int8"
    with pytest.raises(ValueError) as caught:
        flex_decode(QUERY.to(torch.int8), **SCALED)
    assert str(caught.value) == message


# --- Query lengths and sinks ------------------------------------------------------------------------------------------


def test_query_lengths():
    for wrong in ([1, 2], True, 1.0):
        message = f"`q_lens` must be an integer or an int32 or int64 tensor [B], got {type(wrong).__name__}"
        refused(TypeError, message, CONTIGUOUS, q_lens=wrong)
    for wrong in ([1], [1, 2, 3], [[1], [2]]):
        q_lens = torch.tensor(wrong)
        message = f"`q_lens` must have shape [B] = [2], got {list(q_lens.shape)}"
        refused(ValueError, message, CONTIGUOUS, q_lens=q_lens)
    for dtype in (torch.int16, torch.float32, torch.bool):
        message = f"`q_lens` must be int32 or int64, got {dtype}"
        refused(ValueError, message, CONTIGUOUS, q_lens=torch.ones(2, dtype=dtype))
    message = "`q_lens` must be on the device of `query`, cpu, got meta"
    refused(ValueError, message, CONTIGUOUS, q_lens=torch.ones(2, dtype=torch.int32, device="meta"))


def test_query_lengths_beyond_the_query():
    """Also in a call that is known already."""
    q_lens = torch.tensor([3, 0])
    call(CONTIGUOUS, q_lens=q_lens)
    for bad in ([4, 0], [1, -1]):
        q_lens.copy_(torch.tensor(bad))
        message = f"`q_lens` must lie between 0 and Q = 3 (from query), got {min(bad)} to {max(bad)}"
        refused(ValueError, message, CONTIGUOUS, q_lens=q_lens)


def test_sinks():
    refused(TypeError, "`sinks` must be a tensor [Hq], got list", CONTIGUOUS, sinks=[0.0] * 4)
    refused(TypeError, "`sinks` must be a tensor [Hq], got float", CONTIGUOUS, sinks=0.0)
    for shape in ((), (1,), (2,), (5,), (1, 4), (4, 1)):
        message = f"`sinks` must have shape [Hq] = [4] (from query), got {list(shape)}"
        refused(ValueError, message, CONTIGUOUS, sinks=torch.zeros(shape))
    for dtype in (torch.float64, torch.int32, torch.float8_e5m2):
        message = f"`sinks` must be float32, float16 or bfloat16, got {dtype}"
        refused(ValueError, message, CONTIGUOUS, sinks=torch.zeros(4).to(dtype))
    message = "`sinks` must be on the device of `query`, cpu, got meta"
    refused(ValueError, message, CONTIGUOUS, sinks=torch.zeros(4, device="meta"))
    message = "`sinks` requires grad, but flex_decode is forward only: call it under torch.no_grad() or detach `sinks`"
    refused(ValueError, message, CONTIGUOUS, sinks=torch.zeros(4, requires_grad=True))
    with torch.no_grad():
        check(QUERY, **CONTIGUOUS, sinks=torch.zeros(4, requires_grad=True))


# --- A cache in place of tensors --------------------------------------------------------------------------------------


def filled(paged):
    sizes = {"batch": B, "num_kv_heads": HKV, "head_dim": D, "v_head_dim": DV, "dtype": torch.float32}
    cache = PagedKVCache(num_pages=6, page_size=4, **sizes) if paged else KVCache(max_kv_len=12, **sizes)
    cache.append(KEY, VALUE, num_tokens=[11, 3])
    return cache


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("name", ["key", "value", "kv_lens", "page_table", "k_scale", "v_scale"])
def test_a_cache_and_what_it_has(name, paged):
    given = {"key": KEY, "value": VALUE, "kv_lens": LENS, "page_table": PAGES.table, "k_scale": 1.0, "v_scale": 0}
    message = f"`{name}` is given twice: `cache` has it already"
    refused(ValueError, message, {"cache": filled(paged)}, **{name: given[name]})


def test_a_key_by_position_beside_a_cache():
    with pytest.raises(ValueError) as caught:
        flex_decode(QUERY, KEY, VALUE, cache=filled(True))
    assert str(caught.value) == "`key` is given twice: `cache` has it already"


@pytest.mark.parametrize("more", [(), (torch.zeros(1),)])
def test_a_cache_in_the_place_of_the_key(more):
    cache = PagedKVCache(batch=2, num_kv_heads=2, head_dim=16, num_pages=4, page_size=16, dtype=torch.float32)
    with pytest.raises(TypeError, match=r"^`key` is a PagedKVCache: pass it as `cache=`, without `key` and `value`$"):
        flex_decode(torch.zeros(2, 2, 1, 16), cache, *more)


@pytest.mark.parametrize("wrong", [KEY, (KEY, VALUE), {"key": KEY, "value": VALUE}, 1])
def test_a_cache_of_the_wrong_type(wrong):
    message = f"`cache` must be a flexdecode.KVCache, PagedKVCache or CacheLayer, got {type(wrong).__name__}"
    refused(TypeError, message, {}, cache=wrong)
    with pytest.raises(TypeError, match=f"^{message}$"):
        reference_decode(QUERY, cache=wrong)


def test_neither_keys_nor_a_cache():
    message = "flex_decode needs `key` and `value`, or a `cache` that has them"
    refused(TypeError, message, {})
    refused(TypeError, message, {"key": KEY})


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_that_does_not_fit(paged):
    """It is refused in words about the cache: the caller gave no key."""
    cache = filled(paged)
    form = "[B, Hq, Q, D] with B = 2, Hq a multiple of Hkv = 2 and D = 16 (from cache)"
    wrong = {
        f"`query` must have shape {form}, got [1, 4, 3, 16]": QUERY[:1],
        f"`query` must have shape {form}, got [2, 3, 3, 16]": QUERY[:, :3],
        f"`query` must have shape {form}, got [2, 4, 3, 32]": torch.zeros(2, 4, 3, 32),
        "`query` must be on the device of `cache`, cpu, got meta": QUERY.to("meta"),
        "`query` must be float16, bfloat16, float32 or float64, got torch.int8": QUERY.to(torch.int8),
        "`query` must have 4 dimensions [B, H, tokens, head_dim], got shape [4, 3, 16]; a packed query [T, Hq, D] "
        "needs `cu_seqlens_q`": QUERY[0],
    }
    for message, query in wrong.items():
        for function in (flex_decode, explain):
            with pytest.raises(ValueError) as caught:
                function(query, cache=cache)
            assert str(caught.value) == message
    with pytest.raises(TypeError, match="`query` must be a torch"):
        flex_decode(QUERY.tolist(), cache=cache)


def test_a_quantised_cache_takes_queries_of_any_dtype():
    cache = KVCache(batch=2, num_kv_heads=2, max_kv_len=12, head_dim=16, dtype=torch.int8)
    cache.append(KEY, KEY)
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        assert flex_decode(QUERY.to(dtype), cache=cache).dtype == dtype


def test_the_lengths_of_a_cache_are_a_copy():
    for cache in (filled(False), filled(True)):
        before = cache.lengths
        cache.truncate(0, 5)
        assert (before, cache.lengths) == ([11, 3], [5, 3])
        cache.lengths[0] = 99
        cache.append(KEY[:, :, :1], VALUE[:, :, :1])
        assert cache.lengths == cache.kv_lens.tolist() == [6, 4]
        with pytest.raises(AttributeError):
            cache.lengths = [0, 0]


# --- One number for all sequences -------------------------------------------------------------------------------------

LONG_PAGES = Pages([11, 11], 4, 3)
LONG_PAGED = {"key": LONG_PAGES.place(KEY), "value": LONG_PAGES.place(VALUE), "page_table": LONG_PAGES.table}
NUMBERS = [int, np.int32, np.int64, np.uint8, lambda n: torch.tensor(n), lambda n: torch.tensor(n, dtype=torch.int32)]


@pytest.mark.parametrize("make", NUMBERS)
@pytest.mark.parametrize("given", [CONTIGUOUS, LONG_PAGED], ids=["contiguous", "paged"])
def test_one_number_for_all_sequences(make, given):
    """It is the same as a tensor that says it for each; the reference knows numbers, too."""
    mod = mods.alibi(HQ), mods.causal()
    for kv_len, q_offset, q_len in ((11, None, None), (3, 5, 2), (0, 0, 3), (7, None, 1)):
        numbers = {"kv_lens": make(kv_len)}
        tensors = {"kv_lens": torch.full((B,), kv_len)}
        for name, number in (("q_offset", q_offset), ("q_lens", q_len)):
            if number is not None:
                numbers[name], tensors[name] = make(number), torch.full((B,), number)
        expected = call(given | tensors, score_mod=mod[0], mask_mod=mod[1])
        assert torch.equal(call(given | numbers, score_mod=mod[0], mask_mod=mod[1]), expected)
        check(QUERY, **(given | numbers), score_mod=mod[0], mask_mod=mod[1])


def test_a_number_of_keys_makes_no_plan_from_nothing():
    clear_cache()
    for length in range(12):
        call(CONTIGUOUS, kv_lens=length, mask_mod=mods.causal())
    assert cache_info().traces == 1
    for _ in range(3):
        call(CONTIGUOUS, kv_lens=4, mask_mod=mods.causal())
    assert cache_info().hits == 3


def test_numbers_that_do_not_fit():
    for wrong in (12, -1, np.int64(12), torch.tensor(12)):
        message = f"`kv_lens` must lie between 0 and N = 11 (from key), got {int(wrong)}"
        refused(ValueError, message, CONTIGUOUS, kv_lens=wrong)
        call(CONTIGUOUS, kv_lens=4)  # so that calls with a number are known
    message = "`kv_lens` must lie between 0 and max_pages * page_size = 12 (from page_table), got 13"
    refused(ValueError, message, PAGED, kv_lens=13)
    refused(ValueError, "`q_lens` must lie between 0 and Q = 3 (from query), got 4 to 4", CONTIGUOUS, q_lens=4)
    for name in ("kv_lens", "q_lens", "q_offset"):
        for wrong in (torch.tensor(1.0), torch.tensor(1, dtype=torch.int16)):
            refused(ValueError, f"`{name}` must be int32 or int64, got {wrong.dtype}", CONTIGUOUS, **{name: wrong})
        message = f"`{name}` must be on the device of `query`, cpu, got meta"
        refused(ValueError, message, CONTIGUOUS, **{name: torch.tensor(1, device="meta")})


def test_an_explanation_of_numbers():
    long = {"key": torch.zeros(B, HKV, 1000, D), "value": torch.zeros(B, HKV, 1000, DV)}
    tensors = {"kv_lens": torch.full((B,), 600), "q_offset": torch.full((B,), 3), "q_lens": torch.full((B,), 2)}
    for make in NUMBERS:
        if make is np.uint8:
            continue
        numbers = {name: make(int(x[0])) for name, x in tensors.items()}
        one, other = (
            explain(QUERY, **long, mask_mod=mods.causal(), device="H200", **given) for given in (numbers, tensors)
        )
        assert one.used_bytes == other.used_bytes and one.read_bytes == other.read_bytes
        meta = {name: x.to("meta") for name, x in long.items()}
        found = explain(QUERY.to("meta"), **meta, mask_mod=mods.causal(), device="H200", **numbers)
        assert found.read_bytes == one.read_bytes


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_scale_in_a_0d_tensor(dtype):
    scales = {"k_scale": torch.tensor(0.25, dtype=dtype), "v_scale": torch.tensor(0.5, dtype=dtype)}
    expected = call(SCALED, k_scale=0.25, v_scale=0.5)
    assert torch.equal(call(SCALED, **scales), expected)
    check(QUERY, **(SCALED | scales))
    check(QUERY, **(PAGED_INT8 | scales))
    scales["k_scale"].fill_(2.0)  # it is read at every call
    check(QUERY, **(SCALED | scales))


def test_scales_of_a_cache_in_a_0d_tensor():
    sizes = {"batch": 2, "num_kv_heads": 2, "max_kv_len": 12, "head_dim": 16, "dtype": torch.int8}
    one = KVCache(**sizes, k_scale=torch.tensor(0.5), v_scale=torch.tensor(0.25))
    other = KVCache(**sizes, k_scale=0.5, v_scale=0.25)
    assert torch.equal(one.k_scale, other.k_scale) and torch.equal(one.v_scale, other.v_scale)


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_stands_for_its_tensors(paged):
    cache = filled(paged)
    for _ in range(3):
        held = {"kv_lens": cache.kv_lens, "page_table": cache.page_table}
        expected = flex_decode(QUERY, cache.key, cache.value, mods.alibi(HQ), mods.causal(), **held)
        assert torch.equal(flex_decode(QUERY, None, None, mods.alibi(HQ), mods.causal(), cache=cache), expected)
        assert_close_to_reference(expected, None, QUERY, cache.key, cache.value, mods.alibi(HQ), mods.causal(), **held)
        cache.truncate(0, cache.lengths[0] - 3)
        cache.append(KEY[:, :, :2], VALUE[:, :, :2], num_tokens=[1, 2])


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "even"}, '`options.schedule` must be "split", "balanced" or None, got \'even\''),
        ({"schedule": True}, '`options.schedule` must be "split", "balanced" or None, got True'),
        ({"batch_invariant": 1}, "`options.batch_invariant` must be a bool, got 1"),
        ({"batch_invariant": None}, "`options.batch_invariant` must be a bool, got None"),
        (
            {"schedule": "balanced", "batch_invariant": True},
            '`options.schedule="balanced"` and `options.batch_invariant=True` exclude one another',
        ),
    ],
)
def test_impossible_options(arguments, message):
    with pytest.raises(ValueError) as caught:
        DecodeOptions(**arguments)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    "options",
    [
        {"schedule": "balanced"}, {"schedule": "split", "num_splits": 2}, {"schedule": "balanced", "num_splits": 4},
        {"debug": True},
    ],
)  # fmt: skip
def test_options_do_not_change_the_result(options):
    expected = call(PAGED, q_lens=torch.tensor([1, 3]))
    assert torch.equal(call(PAGED, q_lens=torch.tensor([1, 3]), options=DecodeOptions(**options)), expected)


def test_batch_invariance_needs_generated_kernels():
    with pytest.raises(ValueError) as caught:
        call(PAGED, options=DecodeOptions(batch_invariant=True))
    needed = '`options.batch_invariant=True` needs backend="triton"'
    assert str(caught.value) == f"{needed}: PyTorch's products depend on the batch"


# --- The torch backend ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
def test_families_on_pages(family):
    """With ragged queries and sinks, in two dtypes and layouts."""
    lens, number = [45, 17, 0], MODS.index(family)
    pages = Pages(
        lens, (1, 3, 16, 24)[number % 4], dtype=(torch.int32, torch.int64)[number % 2], strided=number % 3 == 0
    )
    dtype = (torch.float32, torch.float16)[number // 2 % 2]
    query, key, value = make_inputs(3, 4, 2, 3, 45, D, dtype=dtype)
    score_mod, mask_mod = (make(3, 4, 48, 3, "cpu") for make in family[1:])
    arguments = {
        "page_table": pages.table, "kv_lens": torch.tensor(lens), "sinks": torch.linspace(-2, 2, 4),
        "q_lens": torch.tensor([3, 1, 2]),
    }  # fmt: skip
    check(query, pages.place(key), pages.place(value, "nhd"), score_mod, mask_mod, **arguments)


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("name", QUANTISED)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_quantised_caches(name, form, paged, scale_dtype):
    lens = [30, 7, 0]
    pages = Pages(lens, 4)
    query, *caches = make_inputs(3, 4, 2, 2, 30, D, DV, dtype=torch.float16)
    (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[name], form, scale_dtype) for x in caches)
    put = pages.place if paged else lambda tensor: spoil(tensor, lens)
    if form == "tokens":
        k_scale, v_scale = put(k_scale), put(v_scale)
    arguments = {"kv_lens": torch.tensor(lens), "k_scale": k_scale, "v_scale": v_scale}
    if paged:
        arguments["page_table"] = pages.table
    check(query, put(key), put(value), mods.softcap(5.0), mods.causal(), **arguments)


@pytest.mark.parametrize(("head_dim", "v_head_dim"), [(192, 128), (576, 512), (288, 256), (575, 511)])
@pytest.mark.parametrize("shared", [False, True])
def test_large_heads(head_dim, v_head_dim, shared):
    query, key, value = make_inputs(2, 3, 1, 2, 9, head_dim, v_head_dim, dtype=torch.float16)
    check(query, key, key[..., :v_head_dim] if shared else value, mods.alibi(3), kv_lens=torch.tensor([9, 4]))


@settings(max_examples=80)
@given(
    lens=st.lists(st.integers(0, 40), min_size=1, max_size=4), page_size=st.integers(1, 20), Hkv=st.integers(1, 2),
    group=st.integers(1, 3), Q=st.integers(1, 4), dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    stored=st.none() | st.sampled_from(sorted(QUANTISED)), forms=st.tuples(*[st.sampled_from(SCALES)] * 2),
    layout=st.sampled_from(["hnd", "nhd"]), shared=st.integers(0, 3), score=st.sampled_from(MODS),
    mask=st.sampled_from(MODS), data=st.data(),
)  # fmt: skip
def test_random_calls(lens, page_size, Hkv, group, Q, dtype, stored, forms, layout, shared, score, mask, data):
    """All that a server may pass, together and at random."""
    B, Hq, N = len(lens), Hkv * group, max(lens)
    pages = Pages(
        lens, page_size, max(1, -(-N // page_size)) + data.draw(st.integers(0, 2)), shared=shared,
        dtype=data.draw(st.sampled_from([torch.int32, torch.int64])), strided=data.draw(st.booleans()),
    )  # fmt: skip
    query, *caches = make_inputs(B, Hq, Hkv, Q, N, 16, 17, dtype=dtype)
    arguments = {"page_table": pages.table, "kv_lens": torch.tensor(lens)}
    if stored is not None and N:
        caches = [quantise(x, QUANTISED[stored], form) for x, form in zip(caches, forms, strict=True)]
        for name, form, (_, scale) in zip(("k_scale", "v_scale"), forms, caches, strict=True):
            arguments[name] = pages.place(scale) if form == "tokens" else scale
        caches = [x for x, _ in caches]
    numbers = lambda low, high: st.lists(st.integers(low, high), min_size=B, max_size=B).map(torch.tensor)
    arguments |= {
        "q_lens": data.draw(st.none() | numbers(0, Q)),
        "q_offset": data.draw(st.none() | st.integers(-3, 50) | numbers(-3, 50)),
        "sinks": data.draw(st.none() | st.just(torch.linspace(-3, 3, Hq))),
    }
    score_mod, mask_mod = score.make_score_mod(B, Hq, N, Q, "cpu"), mask.make_mask_mod(B, Hq, N, Q, "cpu")
    check(query, *(pages.place(x, layout) for x in caches), score_mod, mask_mod, **arguments)


@pytest.mark.parametrize("options", [None, DecodeOptions(debug=True)], ids=["plain", "debug"])
def test_dead_table_entries_and_rows_are_not_read(options):
    """Not by the checks of `debug` either."""
    seen = torch.zeros(11)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + seen[kv_idx]

    check(QUERY, PAGED["key"], PAGED["value"], score_mod, page_table=PAGES.table, kv_lens=LENS, options=options)


@pytest.mark.parametrize("q_lens", [[2, 5, 0], [0, 0, 1], [5, 5, 5]])
def test_ragged_queries_of_a_block_mask(q_lens):
    """The tokens that the mask must cover are those that a sequence has."""
    block_mask = create_block_mask(mods.causal(), None, None, 96, 96, device="cpu", BLOCK_SIZE=16)
    inputs = make_inputs(3, HQ, HKV, 5, 96, D)
    arguments = {"kv_lens": torch.tensor([96, 50, 96]), "q_lens": torch.tensor(q_lens)}
    out, lse = flex_decode(*inputs, block_mask=block_mask, return_lse=True, **arguments)
    assert_close_to_reference(out, lse, *inputs, None, mods.causal(), **arguments)


def test_a_block_mask_on_pages():
    mask_mod = lambda b, h, q, k: (k <= q) & (k // 16 % 2 == q // 16 % 2)
    block_mask = create_block_mask(mask_mod, None, None, 48, 48, device="cpu", BLOCK_SIZE=16)
    pages = Pages([45, 17, 0], 12)
    query, key, value = make_inputs(3, HQ, HKV, 1, 45, D)
    arguments = {"page_table": pages.table, "kv_lens": torch.tensor(pages.lens)}
    out, lse = flex_decode(
        query, pages.place(key), pages.place(value), block_mask=block_mask, return_lse=True, **arguments
    )
    assert_close_to_reference(out, lse, query, pages.place(key), pages.place(value), None, mask_mod, **arguments)


def test_a_shared_prefix_and_its_suffixes_make_the_whole():
    """Cascade: the prefix once for all queries, the suffixes from pages, and a sink in one part."""
    prefix, suffixes, sinks = 16, [11, 3, 0], torch.linspace(-1, 1, HQ)
    query, key, value = make_inputs(3, HQ, HKV, 1, prefix + 11, D)
    key[:, :, :prefix], value[:, :, :prefix] = key[:1, :, :prefix], value[:1, :, :prefix]
    slopes, ends = mods.alibi_slopes(HQ), torch.tensor(suffixes) + prefix
    at = lambda start: lambda s, b, h, q, k: s - slopes[h] * (q - k - start)
    pages = Pages(suffixes, 4)
    parts = [
        flex_decode(query, key[:1, :, :prefix], value[:1, :, :prefix], at(0), q_offset=ends - 1, return_lse=True),
        flex_decode(
            query, pages.place(key[:, :, prefix:]), pages.place(value[:, :, prefix:]), at(prefix), q_offset=ends - 1,
            page_table=pages.table, kv_lens=torch.tensor(suffixes), sinks=sinks, return_lse=True,
        ),
    ]  # fmt: skip
    out, lse = merge_attention(*zip(*parts, strict=True))
    assert_close_to_reference(out, lse, query, key, value, at(0), kv_lens=ends, sinks=sinks)


def test_the_inputs_are_not_changed():
    arguments = PAGED_INT8 | {"k_scale": torch.ones(2), "v_scale": torch.ones(2, 2), "sinks": torch.zeros(4)}
    arguments["q_lens"] = torch.tensor([1, 3])
    copies = {name: x.clone() for name, x in arguments.items()}
    call(arguments)
    assert all(torch.equal(x.view(torch.uint8), copies[name].view(torch.uint8)) for name, x in arguments.items())


# --- What a reading found ---------------------------------------------------------------------------------------------


def test_nan_in_a_value_does_not_reach_rows_past_q_lens():
    value = VALUE.clone()
    value[0, 0, 3] = torch.nan
    out = flex_decode(QUERY, KEY, value, q_lens=torch.tensor([1, 0]))
    assert (out[0, :, 1:] == 0).all() and (out[1] == 0).all()


@pytest.mark.parametrize("page", [-1, 4])
def test_live_pages_that_do_not_exist(page):
    key = torch.zeros(4, 2, 8, 16)
    with pytest.raises(ValueError, match=f"`page_table` names page {page} within a sequence, but `key` has 4 pages"):
        flex_decode(
            torch.zeros(1, 2, 1, 16), key, key.clone(), kv_lens=torch.tensor([8]), page_table=torch.tensor([[page]])
        )


def test_the_meta_device():
    query, key = torch.zeros(1, 2, 1, 16, device="meta"), torch.zeros(1, 2, 8, 16, device="meta")
    with pytest.raises(ValueError, match="flex_decode needs tensors with values, got the meta device"):
        flex_decode(query, key, key)


def test_sparse_lengths():
    with pytest.raises(ValueError, match="`kv_lens` must be a dense tensor, got layout"):
        flex_decode(QUERY, KEY, VALUE, kv_lens=torch.tensor([3, 4]).to_sparse())


@pytest.mark.parametrize("scale", [1e-60, 1e300])
def test_scales_of_a_cache_that_float32_does_not_hold(scale):
    with pytest.raises(ValueError, match="`k_scale` must be positive and finite, got"):
        KVCache(
            batch=1,
            num_kv_heads=1,
            max_kv_len=4,
            head_dim=16,
            dtype=torch.int8,
            device="cpu",
            k_scale=scale,
            v_scale=1.0,
        )


def test_a_cache_made_in_inference_mode_is_refused_before_it_changes():
    with torch.inference_mode():
        cache = KVCache(batch=1, num_kv_heads=1, max_kv_len=4, head_dim=16, dtype=torch.float32, device="cpu")
    new = torch.zeros(1, 1, 1, 16)
    with pytest.raises(RuntimeError, match="the cache was made in "):
        cache.append(new, new)
    assert list(cache.lengths) == [0]
