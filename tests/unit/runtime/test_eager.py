"""The torch backend: chunks, empty sizes, layouts, NaN, the debug checks, and its memory."""

import math
import sys
import tracemalloc

import pytest
import torch
from support import MODS, assert_close_to_reference, assert_max_scores, make_inputs, paged
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, FlexDecodeError, flex_decode, mods
from flexdecode.call.inputs import Inputs
from flexdecode.call.signature import Aux
from flexdecode.runtime import eager, products
from flexdecode.runtime.request import read_request
from flexdecode.runtime.run import run_request

DEBUG = DecodeOptions(debug=True)
INF, NAN = float("inf"), float("nan")


def check(query, key, value, score_mod=None, mask_mod=None, **arguments):
    out, lse = flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, **arguments)
    arguments.pop("options", None)
    arguments.pop("out", None)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
    return out, lse


@pytest.fixture
def small_chunks(monkeypatch):
    """Chunks of 16 keys, the least that there is, whose keys are read one by one."""
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 1)
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 1)


# --- Chunks -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
def test_every_family_in_chunks(family, small_chunks):
    B, Hq, Hkv, Q, N = 2, 6, 2, 3, 53
    score_mod, mask_mod = (make(B, Hq, N, Q, "cpu") for make in family[1:])
    inputs = make_inputs(B, Hq, Hkv, Q, N, 16)
    check(*inputs, score_mod, mask_mod)
    check(*inputs, score_mod, mask_mod, kv_lens=torch.tensor([41, 2]))


@pytest.mark.parametrize("N", [1, 15, 16, 17, 32, 33])
def test_chunk_borders(N, small_chunks):
    check(*make_inputs(2, 2, 1, 1, N, 16), mods.alibi(2), mods.causal())


def test_results_do_not_depend_on_chunks(monkeypatch):
    inputs = make_inputs(2, 4, 2, 2, 100, 32)
    results = []
    for elements in (1, 500, 1 << 21):
        monkeypatch.setattr(eager, "CHUNK_ELEMENTS", elements)
        results.append(flex_decode(*inputs, mods.softcap(3.0), mods.sliding_window(40), return_lse=True))
    for out, lse in results[1:]:
        torch.testing.assert_close(out, results[0][0], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse, results[0][1], rtol=1e-5, atol=1e-6)


def test_keys_past_every_length_are_not_visited(monkeypatch):
    """The longest sequence bounds the loop, not the cache."""
    query, key, value = make_inputs(2, 2, 2, 1, 4096, 16)
    seen = []
    monkeypatch.setattr(
        eager.torch, "arange", lambda *a, _arange=torch.arange, **kw: seen.append(a) or _arange(*a, **kw)
    )
    flex_decode(query, key, value, kv_lens=torch.tensor([3, 20]))
    assert max(a[-1] for a in seen) == 20


def test_memory_stays_far_below_the_scores(monkeypatch):
    """128 queries of 32 heads on 8192 keys: 128 MiB of scores, and as much again for each value of a mod."""
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 1 << 16)
    sizes = []
    zeros, where = torch.zeros, torch.where

    def note(result):
        sizes.append(result.numel())
        return result

    monkeypatch.setattr(eager.torch, "where", lambda *a: note(where(*a)))
    monkeypatch.setattr(eager.torch, "zeros", lambda *a, **kw: note(zeros(*a, **kw)))
    query, key, value = make_inputs(1, 8, 1, 128, 2048, 16)
    flex_decode(query, key, value, lambda s, b, h, q, k: torch.where(k <= q, s * 2, s))
    assert max(sizes) <= 1 << 16 < 8 * 128 * 2048 // 16


def test_peak_of_python_objects_is_small():
    inputs = make_inputs(1, 2, 1, 1, 4096, 16)
    tracemalloc.start()
    flex_decode(*inputs, mods.softcap(3.0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 << 20


# --- Empty things -----------------------------------------------------------------------------------------------------


def test_no_keys():
    out, lse = check(*make_inputs(2, 4, 2, 3, 0, 16), mods.softcap(3.0), mods.causal())
    assert not out.any() and (lse == -INF).all()


def test_no_queries():
    query, key, value = make_inputs(2, 4, 2, 0, 7, 16, 32)
    out, lse = flex_decode(query, key, value, return_lse=True)
    assert out.shape == (2, 4, 0, 32) and lse.shape == (2, 4, 0)


def test_no_sequences_and_no_heads():
    query, key, value = make_inputs(0, 4, 2, 1, 7, 16)
    assert flex_decode(query, key, value, kv_lens=torch.tensor([], dtype=torch.int64)).shape == (0, 4, 1, 16)
    query, key, value = make_inputs(2, 0, 0, 1, 7, 16)
    assert flex_decode(query, key, value).shape == (2, 0, 1, 16)


def test_bad_mods_are_refused_for_empty_inputs_too():
    query, key, value = make_inputs(2, 4, 2, 0, 7, 16)
    with pytest.raises(FlexDecodeError):
        flex_decode(query, key, value, lambda s, b, h, q, k: s.item())


@pytest.mark.parametrize("lens", [[0, 0], [0, 5], [1, 2]])
def test_lengths_of_zero_and_below_the_queries(lens):
    """The first positions are negative then."""
    inputs = make_inputs(2, 4, 2, 3, 9, 16)
    for mask_mod in (None, mods.causal(), lambda b, h, q, k: q < 0):
        check(*inputs, mods.alibi(4), mask_mod, kv_lens=torch.tensor(lens, dtype=torch.int32))


def test_masked_rows():
    out, lse = check(*make_inputs(2, 4, 2, 3, 9, 16), None, lambda b, h, q, k: (h != 1) & (k < 4) & (b == 0))
    assert not out[:, 1].any() and (lse[:, 1] == -INF).all() and not out[1].any()


# --- Numbers ----------------------------------------------------------------------------------------------------------


def test_nothing_past_the_length_is_seen():
    query, key, value = make_inputs(2, 4, 2, 2, 9, 16)
    lens = torch.tensor([5, 0])
    clean = flex_decode(query, key, value, kv_lens=lens)
    for junk in (NAN, INF, -INF, 3e38):
        for b, n in enumerate(lens):
            key[b, :, n:] = value[b, :, n:] = junk
        assert torch.equal(flex_decode(query, key, value, kv_lens=lens), clean)
        poisoned = torch.full((9,), junk)
        check(query, key, value, lambda s, b, h, q, k: s + torch.where(k < lens[b], 0.0, poisoned[k]), kv_lens=lens)


def test_nan_of_a_mod():
    """At a live pair it reaches its row, and no other; at a masked pair nothing."""
    inputs = make_inputs(2, 4, 2, 2, 40, 16)
    nan_once = lambda s, b, h, q, k: torch.where((h == 1) & (k == 20), NAN, s)
    out, lse = check(*inputs, nan_once)
    assert out[:, 1].isnan().all() and not out[:, 0].isnan().any() and lse[:, 1].isnan().all()
    out, _ = check(*inputs, nan_once, lambda b, h, q, k: k != 20)
    assert not out.isnan().any()


def test_infinities_of_a_mod(small_chunks):
    inputs = make_inputs(2, 4, 2, 2, 40, 16)
    check(*inputs, lambda s, b, h, q, k: torch.where(k < 33, -INF, s))
    check(*inputs, lambda s, b, h, q, k: torch.where((h == 2) & (k == 18), INF, s))
    check(*inputs, lambda s, b, h, q, k: torch.where(h == 2, -INF, s))


def test_large_scores():
    query, key, value = make_inputs(2, 4, 2, 2, 40, 16)
    check(query * 50, key * 50, value)
    check(query, key, value, lambda s, b, h, q, k: s * 1e4 - 1e5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype):
    check(*make_inputs(2, 4, 2, 2, 40, 64, dtype=dtype), mods.softcap(3.0), mods.causal())


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 2, 3, 5, 6, 7, 8, 12, 16, 32, 71])
def test_groups(group):
    check(*make_inputs(1, 2 * group, 2, 2, 11, 16), mods.alibi(2 * group), mods.causal())


@pytest.mark.parametrize("D", [1, 2, 7, 16, 31, 59, 64, 256, 577, 640, 1000, 1024])
def test_head_dims(D):
    for Dv in (1, 2, 7, 16, 121, 577, 1024):
        check(*make_inputs(2, 2, 1, 2, 11, D, Dv))


# --- Dtypes -----------------------------------------------------------------------------------------------------------

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("query_dtype", DTYPES, ids=str)
def test_caches_of_another_dtype(query_dtype):
    query, key, value = make_inputs(2, 4, 2, 2, 21, 16, 24, dtype=torch.float64)
    for key_dtype in DTYPES:
        for value_dtype in DTYPES:
            tensors = query.to(query_dtype), key.to(key_dtype), value.to(value_dtype)
            out, _ = check(*tensors, mods.softcap(3.0), mods.causal())
            assert out.dtype == query_dtype


def test_a_quantised_and_another_cache():
    query, key, value = make_inputs(2, 4, 2, 2, 21, 16, dtype=torch.bfloat16)
    for stored in (torch.float8_e4m3fn, torch.float8_e5m2):
        check(query, key.to(stored), value, k_scale=0.5)
        check(query, key, value.float().to(stored))
        check(query, (20 * key).to(torch.int8), value.to(stored), k_scale=0.05)


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
def test_float64(family, small_chunks):
    """The rule of `assert_close` with the precision of float64: also what a mod computes is float64 then."""
    B, Hq, Hkv, Q, N = 2, 4, 2, 3, 40
    score_mod, mask_mod = (make(B, Hq, N, Q, "cpu") for make in family[1:])
    inputs = make_inputs(B, Hq, Hkv, Q, N, 16, dtype=torch.float64)
    arguments = {"kv_lens": torch.tensor([37, 2])}
    out, lse = check(*inputs, score_mod, mask_mod, **arguments)
    assert out.dtype == torch.float64 and lse.dtype == torch.float32
    check(*inputs, score_mod, mask_mod, sinks=torch.tensor([1.0, -2.0, 0.0, 3.0]), **arguments)


def test_float64_pages_and_out():
    query, key, value = make_inputs(2, 4, 2, 1, 32, 7, 3, dtype=torch.float64)
    (key, table), (value, _) = paged(key, 8), paged(value, 8)
    out = torch.empty(2, 4, 1, 3, dtype=torch.float64)
    found, _ = check(query, key, value, page_table=table, kv_lens=torch.tensor([32, 9]), out=out)
    assert found is out


@pytest.mark.parametrize("Q", [1, 2, 7, 128])
def test_query_lengths(Q):
    check(*make_inputs(1, 4, 2, Q, 130, 16), None, mods.causal())


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
def test_strides(layout):
    check(*make_inputs(2, 4, 2, 3, 21, 16, layout=layout), mods.softcap(2.0), mods.causal())


@pytest.mark.parametrize("which", ["key", "value", "both", "expanded"])
def test_batch_broadcast(which):
    query, key, value = make_inputs(3, 4, 2, 2, 11, 16)
    if which in ("key", "both"):
        key = key[:1]
    if which in ("value", "both"):
        value = value[:1]
    if which == "expanded":
        key, value = key[:1].expand(3, -1, -1, -1), value[:1].expand(3, -1, -1, -1)
    check(query, key, value, None, lambda b, h, q, k: k > b, kv_lens=torch.tensor([11, 3, 0]))


def test_out_and_lse():
    inputs = make_inputs(2, 4, 2, 3, 9, 16, 32)
    storage = torch.full((2, 3, 4, 64), NAN)
    out = storage.transpose(1, 2)[..., ::2]
    result, lse = flex_decode(*inputs, out=out, return_lse=True)
    assert result is out and torch.equal(out, flex_decode(*inputs)) and storage[..., 1::2].isnan().all()
    assert lse.dtype == torch.float32 and lse.shape == (2, 4, 3)
    half = flex_decode(*(x.half() for x in inputs))
    assert half.dtype == torch.float16 and half.is_contiguous()


# --- Arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_offset", [0, 7, -3, 2**40, torch.tensor([3, 11]), torch.tensor([0, -5], dtype=torch.int32)])
def test_q_offset(q_offset):
    inputs = make_inputs(2, 4, 2, 3, 21, 16)
    for lens in (None, torch.tensor([21, 9])):
        check(*inputs, mods.alibi(4), mods.sliding_window(8), q_offset=q_offset, kv_lens=lens)


def test_default_positions_are_the_end_of_each_sequence():
    query, key, value = make_inputs(2, 4, 2, 3, 21, 16)
    lens = torch.tensor([21, 9])
    given = flex_decode(query, key, value, None, mods.causal(), kv_lens=lens, q_offset=lens - 3)
    assert torch.equal(flex_decode(query, key, value, None, mods.causal(), kv_lens=lens), given)


def test_strided_lengths():
    inputs = make_inputs(2, 4, 2, 3, 21, 16)
    lens = torch.tensor([21, 0, 9, 0])[::2]
    check(*inputs, None, mods.causal(), kv_lens=lens, q_offset=lens)


@pytest.mark.parametrize("scale", [0.0, 1, -0.3, 2.5])
def test_scale(scale):
    check(*make_inputs(2, 4, 2, 3, 21, 16), mods.softcap(2.0), scale=scale)


def test_default_scale():
    inputs = make_inputs(1, 1, 1, 1, 9, 59)
    assert torch.equal(flex_decode(*inputs), flex_decode(*inputs, scale=1 / math.sqrt(59)))


def test_no_window():
    check(*make_inputs(2, 4, 2, 3, 21, 16), None, mods.sliding_window(sys.maxsize))


@pytest.mark.parametrize("packed", [False, True], ids=["padded", "packed"])
def test_largest_scores(packed, small_chunks):
    """Sinks are no scores; a token of no sequence has -inf, and so has one whose sequence has no key."""
    kv_lens, q_lens = [53, 0, 20], [2, 3, 1]
    query, key, value = make_inputs(3, 4, 2, 3, 53, 16)
    sequences = [
        (query[b : b + 1, :, :m], key[b : b + 1, :, :n]) for b, (n, m) in enumerate(zip(kv_lens, q_lens, strict=True))
    ]
    given = {"kv_lens": torch.tensor(kv_lens), "q_offset": torch.zeros(3, dtype=torch.int32)}
    given["sinks"] = torch.full((4,), 50.0)
    if packed:
        rows = torch.cat([part[0].transpose(0, 1) for part, _ in sequences] + [query[0].transpose(0, 1)])
        inputs = Inputs(rows, key, value, cu_seqlens_q=torch.tensor([0, 2, 5, 6], dtype=torch.int32), **given)
    else:
        inputs = Inputs(query, key, value, q_lens=torch.tensor(q_lens), **given)
    request = read_request(inputs, mods.softcap(2.0), mods.sliding_window(30))
    found = run_request(request, Aux(max_scores=True), None).max_scores
    if packed:
        assert (found[6:] == -INF).all()
        parts = [part.transpose(0, 1)[None] for part in found[:6].split(q_lens)]
    else:
        assert (found[0, :, 2:] == -INF).all() and (found[2, :, 1:] == -INF).all()
        parts = [found[b : b + 1, :, :m] for b, m in enumerate(q_lens)]
    assert (parts[1] == -INF).all()
    for part, (q, k) in zip(parts[::2], sequences[::2], strict=True):
        assert_max_scores(part, q, k, mods.softcap(2.0), mods.sliding_window(30))


# --- Debug checks -----------------------------------------------------------------------------------------------------

table = torch.randn(4, 9)


def test_an_index_out_of_range_is_found():
    inputs = make_inputs(2, 4, 2, 2, 21, 16)
    too_short = lambda s, b, h, q, k: s + table[h, k]
    check(*inputs, too_short)
    with pytest.raises(FlexDecodeError, match=r"score_mod reads `table\[h, kv_idx\]` out of range") as caught:
        flex_decode(*inputs, too_short, options=DEBUG)
    assert "at b = 0, h = 0, q_idx = 19, kv_idx = 9, which attends, the index is [0, 9]" in str(caught.value)
    assert "in a tensor of shape [4, 9]\n  Clamp the index, or let the mask rule" in str(caught.value)
    with pytest.raises(FlexDecodeError, match="out of range"):
        flex_decode(*inputs, None, lambda b, h, q, k: table[h, k - 30] > 0, options=DEBUG)


def test_indices_in_range_and_at_masked_pairs_are_fine():
    inputs = make_inputs(2, 4, 2, 2, 21, 16)
    check(*inputs, lambda s, b, h, q, k: s + table[h, k % 9] + table[-1, -(k % 9) - 1], options=DEBUG)
    check(*inputs, lambda s, b, h, q, k: s + table[h, k], lambda b, h, q, k: k < 9, options=DEBUG)
    check(*inputs, lambda s, b, h, q, k: s + table[h, k], kv_lens=torch.tensor([9, 3]), options=DEBUG)


GUARDED = {
    "where": lambda s, b, h, q, k: s + torch.where(k < 9, table[h, k], 0.0),
    "where of a value of it": lambda s, b, h, q, k: torch.where(k >= 9, s, s * table[h, k].exp() + 1),
    "never taken": lambda s, b, h, q, k: s + torch.where(k >= 0, 0.0, table[h, k]),
}
GUARDED_MASKS = {
    "and": lambda b, h, q, k: (k < 9) & (table[h, k] < 1),
    "or": lambda b, h, q, k: (table[h, k] + 1 > 1) | (k >= 9),
    "where": lambda b, h, q, k: torch.where(k < 9, table[h, k] < 1, False),
}


@pytest.mark.parametrize("name", [*GUARDED, *GUARDED_MASKS])
def test_what_a_mod_reads_and_does_not_use_may_be_out_of_range(name):
    mods_of_call = (GUARDED[name], None) if name in GUARDED else (None, GUARDED_MASKS[name])
    check(*make_inputs(2, 4, 2, 2, 21, 16), *mods_of_call, options=DEBUG)


UNGUARDED_MASKS = {
    "and": lambda b, h, q, k: (k < 10) & (table[h, k] < 1),
    "or": lambda b, h, q, k: (table[h, k] + 1 > 1) | (k >= 10),
    "not": lambda b, h, q, k: ~((k >= 10) | (table[h, k] < 1)),
    "any": lambda b, h, q, k: (table[h, k + torch.arange(2)] > 9).any(),
    "an index of an index": lambda b, h, q, k: table[0, table[h, k].long() * 0] < 9,
}


@pytest.mark.parametrize("name", UNGUARDED_MASKS)
def test_what_decides_about_a_pair_has_to_be_in_range(name):
    with pytest.raises(FlexDecodeError, match=r"mask_mod reads `table\[h, .*\]` out of range: .* kv_idx = (8|9), "):
        flex_decode(*make_inputs(2, 4, 2, 2, 21, 16), None, UNGUARDED_MASKS[name], options=DEBUG)


def test_a_step_of_a_loop_has_to_be_in_range():
    """Of twelve steps the first is out of range everywhere, the last one from key 9 on."""
    mask_mod = lambda b, h, q, k: (table[h, k + 11 - torch.arange(12)] > 9).any()
    with pytest.raises(FlexDecodeError, match=r"out of range: at .* kv_idx = 0, which attends, the index is \[0, 11\]"):
        flex_decode(*make_inputs(2, 4, 2, 2, 21, 16), None, mask_mod, options=DEBUG)


def test_blocks_before_the_first_position():
    inputs = make_inputs(1, 4, 2, 33, 15, 16)
    block_mask = create_block_mask(lambda b, h, q, k: q >= k, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    kv_lens = torch.tensor([12])  # the queries stand at -21 to 11
    out = flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens, options=DEBUG)
    assert torch.equal(out, flex_decode(*inputs, None, mods.causal(), kv_lens=kv_lens))


def test_contents_are_checked_at_every_call():
    inputs = make_inputs(1, 4, 2, 2, 21, 16)
    index = torch.zeros(21, dtype=torch.int64)
    mod = lambda s, b, h, q, k: s + table[h, index[k]]
    check(*inputs, mod, options=DEBUG)
    index[20] = 9
    with pytest.raises(FlexDecodeError, match="out of range"):
        flex_decode(*inputs, mod, options=DEBUG)
