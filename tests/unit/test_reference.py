"""The oracle against plain Python loops, against PyTorch, and on the semantics that everything else is tested by."""

import functools
import math
import warnings

import packed_cases
import pytest
import torch
import torch.nn.functional as F
from cache_cases import position_score
from support import MODS, assert_close_to_reference, make_inputs, paged, pytorch_decode
from torch.nn.attention import flex_attention as flex

from flexdecode import PagedKVCache, flex_decode, mods
from flexdecode.reference import evaluate_mod, reference_decode


def loop_decode(query, key, value, score_fn=None, mask_fn=None, kv_lens=None, q_offset=None, scale=None):
    """Attention by the definition, one number at a time; `score_fn` and `mask_fn` take Python numbers."""
    (B, Hq, Q, D), (Bk, Hkv, N, Dv) = query.shape, value.shape
    out, lse = torch.zeros(B, Hq, Q, Dv, dtype=torch.float64), torch.zeros(B, Hq, Q, dtype=torch.float64)
    query, key, value = query.tolist(), key.tolist(), value.tolist()
    for b in range(B):
        length = N if kv_lens is None else max(0, min(kv_lens[b], N))
        k_rows, v_rows = key[b if Bk > 1 else 0], value[b if Bk > 1 else 0]
        for h in range(Hq):
            for m in range(Q):
                position = (length - Q if q_offset is None else q_offset[b]) + m
                live = {}
                for n in range(length):
                    if mask_fn is not None and not mask_fn(b, h, position, n):
                        continue
                    score = sum(x * y for x, y in zip(query[b][h][m], k_rows[h // (Hq // Hkv)][n], strict=True))
                    score *= D**-0.5 if scale is None else scale
                    live[n] = score if score_fn is None else score_fn(score, b, h, position, n)
                total = sum(math.exp(s) for s in live.values())
                lse[b, h, m] = math.log(total) if live else -math.inf
                for n, score in live.items():
                    row = torch.tensor(v_rows[h // (Hq // Hkv)][n], dtype=torch.float64)
                    out[b, h, m] += math.exp(score) / total * row
    return out, lse


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64 and a.device.type == "cpu"
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)


def lse_of(score_mod=None, mask_mod=None, N=6, B=1, Hq=1, Q=1, **kw):
    """Lse `[B, Hq, Q]` where all dot products are 0."""
    zeros = torch.zeros(B, 1, N, 4)
    return reference_decode(torch.zeros(B, Hq, Q, 4), zeros, zeros, score_mod, mask_mod, return_lse=True, **kw)[1]


# --- Against plain loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Hq, Hkv", [(1, 1), (2, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("Q, N, Dv", [(1, 1, 4), (2, 5, 3), (4, 3, 5)])
def test_agrees_with_plain_loops(Hq, Hkv, Q, N, Dv):
    query, key, value = make_inputs(2, Hq, Hkv, Q, N, 4, Dv)
    slopes = torch.rand(Hq).tolist()
    actual = reference_decode(
        query,
        key,
        value,
        lambda s, b, h, q, k: 2 * torch.tanh(s) - torch.tensor(slopes)[h] * (q - k),
        lambda b, h, q, k: (k <= q) | (k == 2 * b),
        return_lse=True,
    )
    expected = loop_decode(
        query,
        key,
        value,
        lambda s, b, h, q, k: 2 * math.tanh(s) - slopes[h] * (q - k),
        lambda b, h, q, k: k <= q or k == 2 * b,
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
@pytest.mark.parametrize("kv_lens", [[5, 2, 0], [9, -4, 1]])
@pytest.mark.parametrize("q_offset", [None, 3, [0, 4, -1]])
def test_lengths_and_offsets_agree_with_plain_loops(layout, kv_lens, q_offset):
    query, key, value = make_inputs(3, 4, 2, 2, 5, 3, layout=layout)
    offsets = None if q_offset is None else [q_offset] * 3 if isinstance(q_offset, int) else q_offset
    for dtype in (torch.int32, torch.int64):
        actual = reference_decode(
            query,
            key,
            value,
            lambda s, b, h, q, k: s + 0.1 * q - 0.2 * k,
            lambda b, h, q, k: k <= q,
            kv_lens=torch.tensor(kv_lens, dtype=dtype),
            q_offset=torch.tensor(q_offset, dtype=dtype) if isinstance(q_offset, list) else q_offset,
            scale=0.3,
            return_lse=True,
        )
        expected = loop_decode(
            query,
            key,
            value,
            lambda s, b, h, q, k: s + 0.1 * q - 0.2 * k,
            lambda b, h, q, k: k <= q,
            kv_lens,
            offsets,
            scale=0.3,
        )
        assert_same(actual, expected)


def test_key_and_value_broadcast_over_the_batch():
    query, _, _ = make_inputs(3, 2, 1, 2, 4, 4)
    _, key, value = make_inputs(1, 2, 1, 2, 4, 4, seed=1)
    actual = reference_decode(query, key, value, kv_lens=torch.tensor([4, 1, 2]), return_lse=True)
    assert_same(actual, loop_decode(query, key, value, kv_lens=[4, 1, 2]))


# --- Against PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 8])
def test_agrees_with_scaled_dot_product_attention(group):
    query, key, value = make_inputs(2, 2 * group, 2, 4, 4, 16, dtype=torch.float64)
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        actual = reference_decode(query, key, value, None, (lambda b, h, q, k: k <= q) if causal else None)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["softcap", "alibi", "bias", "relative_bias", "t5"])
def test_agrees_with_eager_flex_attention(name):
    family = next(f for f in MODS if f.name == name)
    B, Hq, Q, N = 2, 4, 3, 6
    query, key, value = make_inputs(B, Hq, 2, Q, N, 8, dtype=torch.float64)
    score_mod = family.make_score_mod(B, Hq, N, Q, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that it was not compiled.
        expected, expected_lse = flex.flex_attention(
            query, key, value, score_mod=score_mod, enable_gqa=True, return_lse=True
        )
    out, lse = reference_decode(query, key, value, score_mod, q_offset=0, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.double(), rtol=1e-5, atol=1e-5)


def test_takes_pytorchs_own_mask_combinators():
    causal, odd = lambda b, h, q, k: k <= q, lambda b, h, q, k: k % 2 == 1
    both = lse_of(None, flex.and_masks(flex.noop_mask, causal, odd), Q=6)
    either = lse_of(None, flex.or_masks(causal, odd), Q=6)
    assert both[0, 0].exp().round().tolist() == [0, 1, 1, 2, 2, 3]
    assert either[0, 0].exp().round().tolist() == [4, 4, 5, 5, 6, 6]
    assert (lse_of(None, flex.noop_mask).exp() - 6).abs() < 1e-12


# --- Rows without a live key, NaN, empty sizes ------------------------------------------------------------------------


def test_nothing_past_the_length_is_seen():
    query, key, value = make_inputs(2, 2, 1, 1, 6, 4)
    lens = torch.tensor([2, 4])
    expected = reference_decode(query, key, value, lambda s, b, h, q, k: s * (k + 1), kv_lens=lens)
    for b, n in enumerate(lens):
        key[b, :, n:], value[b, :, n:] = math.nan, math.inf
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.append(score.ndim)
        return score * (kv_idx + 1)

    assert torch.equal(reference_decode(query, key, value, score_mod, kv_lens=lens), expected)
    assert seen == [0, 0]  # Once per sequence, on 0-d tensors.


@pytest.mark.parametrize("make_empty", ["mask", "score", "length"])
def test_row_without_live_key_is_zero(make_empty):
    query, key, value = make_inputs(2, 2, 2, 2, 3, 4)
    mods = {
        "mask": (None, lambda b, h, q, k: h == 1),
        "score": (lambda s, b, h, q, k: torch.where(h == 1, s, -torch.inf), None),
        "length": (None, None),
    }[make_empty]
    lens = torch.tensor([0, 3]) if make_empty == "length" else None
    out, lse = reference_decode(query, key, value, *mods, kv_lens=lens, return_lse=True)
    empty = torch.zeros(2, 2, dtype=torch.bool)
    empty[0 if make_empty == "length" else slice(None), slice(None) if make_empty == "length" else 0] = True
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    assert (out[~empty] != 0).all() and lse[~empty].isfinite().all()


def test_nan_of_a_mod_reaches_its_row_unless_masked():
    query, key, value = make_inputs(1, 2, 1, 2, 4, 4)
    nan_mod = lambda s, b, h, q, k: torch.where((h == 1) & (k == 3), torch.nan, s)
    out, lse = reference_decode(query, key, value, nan_mod, return_lse=True)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, 0].isfinite().all() and lse[0, 0].isfinite().all()
    out = reference_decode(query, key, value, nan_mod, lambda b, h, q, k: k < 3)
    assert out.isfinite().all()


def test_empty_sizes():
    query, key, value = make_inputs(2, 2, 1, 3, 0, 4)
    mods = (lambda s, b, h, q, k: s + 1, lambda b, h, q, k: k <= q)
    out, lse = reference_decode(query, key, value, *mods, return_lse=True)
    assert out.shape == (2, 2, 3, 4) and (out == 0).all() and (lse == -torch.inf).all()
    query, key, value = make_inputs(2, 2, 1, 0, 5, 4)
    out, lse = reference_decode(query, key, value, *mods, return_lse=True)
    assert out.shape == (2, 2, 0, 4) and lse.shape == (2, 2, 0)


# --- Pages, query lengths, quantised caches, sinks --------------------------------------------------------------------


def test_a_page_table_by_hand():
    key = torch.tensor([[30.0, 40.0], [50.0, 60.0], [10.0, 20.0]]).reshape(3, 1, 2, 1)  # 3 pages of 2 keys
    table = torch.tensor([[2, 0], [1, -7]], dtype=torch.int32)
    lens = torch.tensor([3, 1])
    for position, expected in enumerate([[10, 50], [20, None], [30, None], [None, None]]):
        one = lambda b, h, q, k, position=position: k == position
        out = reference_decode(torch.ones(2, 1, 1, 1), key, key, None, one, kv_lens=lens, page_table=table)
        assert out.flatten().tolist() == [x or 0 for x in expected]


@pytest.mark.parametrize("page_size", [1, 2, 6])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pages_hold_what_the_contiguous_cache_holds(page_size, dtype):
    query, key, value = make_inputs(3, 4, 2, 2, 6, 4, 3)
    mods = (lambda s, b, h, q, k: s - 0.3 * (q - k) + b, lambda b, h, q, k: k <= q)
    kw = {"kv_lens": torch.tensor([6, 3, 0]), "return_lse": True}
    (key_pages, table), (value_pages, _) = paged(key, page_size), paged(value, page_size)
    actual = reference_decode(query, key_pages, value_pages, *mods, page_table=table.to(dtype), **kw)
    assert_same(actual, reference_decode(query, key, value, *mods, **kw))


def test_what_no_live_key_needs_is_not_read():
    query, key, value = make_inputs(2, 2, 1, 1, 8, 4)
    lens = torch.tensor([3, 0])
    expected = reference_decode(query, key, value, kv_lens=lens)
    (key_pages, table), (value_pages, _) = paged(key, 2), paged(value, 2)
    key_pages[table[0, 1], :, 1], value_pages[table[0, 1], :, 1] = math.nan, math.inf
    for garbage in (-1, 2**31 - 1, -(2**31)):
        table[0, 2:], table[1, :] = garbage, garbage
        out = reference_decode(query, key_pages, value_pages, kv_lens=lens, page_table=table)
        assert torch.equal(out, expected)


def test_length_past_the_pages_is_cut():
    query, key, value = make_inputs(1, 1, 1, 1, 4, 4)
    (key_pages, table), (value_pages, _) = paged(key, 2), paged(value, 2)
    out = reference_decode(query, key_pages, value_pages, kv_lens=torch.tensor([9]), page_table=table)
    assert torch.equal(out, reference_decode(query, key, value))


def test_a_page_table_is_checked():
    query, key, value = make_inputs(1, 1, 1, 1, 2, 4)
    with pytest.raises(ValueError, match="`page_table` needs `kv_lens`"):
        reference_decode(query, key, value, page_table=torch.tensor([[0]]))
    for page in (-1, 1):
        with pytest.raises(IndexError, match=f"sequence 0 has pages \\[{page}\\], but there are 1"):
            reference_decode(query, key, value, kv_lens=torch.tensor([1]), page_table=torch.tensor([[page]]))


@pytest.mark.parametrize("q_offset, first", [(None, [3, 4, 5, 6]), (10, [10] * 4), ([9, 8, 7, 6], [9, 8, 7, 6])])
def test_q_lens_give_the_tokens_their_positions(q_offset, first):
    q_lens = [3, 2, 1, -1]  # of 3 query rows and 6 keys
    lse = lse_of(
        lambda s, b, h, q, k: torch.where(k == 0, q.double(), -torch.inf),
        B=4,
        Q=3,
        q_lens=torch.tensor(q_lens, dtype=torch.int32),
        q_offset=torch.tensor(q_offset) if isinstance(q_offset, list) else q_offset,
    )
    expected = [[first[b] + m if m < q_lens[b] else -math.inf for m in range(3)] for b in range(4)]
    assert lse[:, 0].tolist() == expected


@pytest.mark.parametrize("sinks", [None, torch.tensor([1.0, 2.0])])
def test_each_sequence_with_q_lens_is_a_call_of_its_own(sinks):
    query, key, value = make_inputs(4, 2, 1, 3, 5, 4)
    q_lens, kv_lens = torch.tensor([3, 1, 0, 7]), torch.tensor([5, 4, 3, 2])
    mods = (lambda s, b, h, q, k: s - 0.1 * (q - k), lambda b, h, q, k: k <= q)
    for b, n in enumerate(q_lens.tolist()):
        query[b, :, n:] = math.nan
    out, lse = reference_decode(query, key, value, *mods, kv_lens=kv_lens, q_lens=q_lens, sinks=sinks, return_lse=True)
    for b, n in enumerate(q_lens.clamp(0, 3).tolist()):
        one = [x[b : b + 1] for x in (query[:, :, :n], key, value)]
        alone = reference_decode(*one, *mods, kv_lens=kv_lens[b : b + 1], sinks=sinks, return_lse=True)
        assert_same((out[b, :, :n], lse[b, :, :n]), (alone[0][0], alone[1][0]))
        assert (out[b, :, n:] == 0).all() and (lse[b, :, n:] == -torch.inf).all()


def scales(B, Hkv, N):
    """Every shape of a scale of a contiguous cache, with the factor of each key `[B, Hkv, N, 1]`."""
    generator = torch.Generator().manual_seed(3)
    tensors = [torch.rand(*shape, generator=generator) for shape in [(Hkv,), (B, Hkv), (B, Hkv, N), (1, Hkv, N)]]
    views = [x.reshape((1, Hkv, 1) if x.ndim == 1 else (B, Hkv, 1) if x.ndim == 2 else x.shape) for x in tensors]
    return [(0.1, torch.tensor(0.1, dtype=torch.float64).expand(B, Hkv, N, 1))] + [
        (scale, view.double().expand(B, Hkv, N)[..., None]) for scale, view in zip(tensors, views, strict=True)
    ]


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, torch.float16])
@pytest.mark.parametrize("form", range(5), ids=["number", "head", "sequence", "key", "shared key"])
def test_scales_multiply_what_is_stored(form, dtype):
    B, Hkv, N = 3, 2, 6
    query, key, value = make_inputs(B, 4, Hkv, 2, N, 4)
    key, value = (4 * key).to(dtype), (4 * value).to(dtype)
    scale, factor = scales(B, Hkv, N)[form]
    kw = {"kv_lens": torch.tensor([6, 3, 0]), "return_lse": True}
    for k_scale, v_scale in ((scale, None), (None, scale), (scale, scale)):
        k = key.double() * (1 if k_scale is None else factor)
        v = value.double() * (1 if v_scale is None else factor)
        actual = reference_decode(query, key, value, k_scale=k_scale, v_scale=v_scale, **kw)
        assert_same(actual, reference_decode(query, k, v, **kw))


@pytest.mark.parametrize("form", range(5), ids=["number", "head", "sequence", "key", "shared key"])
def test_scales_of_pages(form):
    B, Hkv, N = 3, 2, 6
    query, key, value = make_inputs(B, 4, Hkv, 2, N, 4)
    key, value = (40 * key).to(torch.int8), (40 * value).to(torch.int8)
    scale, factor = scales(B, Hkv, N)[form]
    kw = {"kv_lens": torch.tensor([6, 3, 0]), "return_lse": True}
    expected = reference_decode(query, key.double() * factor, value.double() * factor, **kw)
    (key_pages, table), (value_pages, _) = paged(key, 2), paged(value, 2)
    if form >= 3:
        scale, _ = paged(factor[..., 0], 2)
    actual = reference_decode(query, key_pages, value_pages, k_scale=scale, v_scale=scale, page_table=table, **kw)
    assert_same(actual, expected)


def test_a_sink_by_hand():
    sinks = torch.tensor([math.log(2), -math.inf])
    query, zeros = torch.zeros(1, 2, 1, 1), torch.zeros(1, 1, 6, 1)
    value = torch.tensor([0.0, 8.0, 8.0, 8.0, 8.0, 8.0]).reshape(1, 1, 6, 1)
    mods = (lambda s, b, h, q, k: s + math.log(3), lambda b, h, q, k: k < 2)
    out, lse = reference_decode(query, zeros, value, *mods, sinks=sinks, return_lse=True)
    # Two keys of weight 3, of which one has a value; the sink of head 0 has weight 2 whatever the mods do.
    torch.testing.assert_close(out.flatten(), torch.tensor([24.0 / 8, 24.0 / 6]).double())
    torch.testing.assert_close(lse.flatten().exp(), torch.tensor([8.0, 6.0]).double())


@pytest.mark.parametrize("compute", [reference_decode, pytorch_decode], ids=["reference", "yardstick"])
def test_a_sink_is_a_key_without_a_value(compute):
    query, key, value = make_inputs(2, 4, 2, 2, 5, 4, 3)
    sinks = torch.tensor([-2.0, 0.0, 3.0, 90.0])
    more_keys, more_values = (F.pad(x, (0, 0, 1, 0)) for x in (key, value))
    kw = {"kv_lens": torch.tensor([5, 2])}
    actual = compute(query, key, value, lambda s, b, h, q, k: s * (k + 1), sinks=sinks, **kw)
    expected = compute(
        query,
        more_keys,
        more_values,
        lambda s, b, h, q, k: torch.where(k == 0, sinks[h], s * k),
        kv_lens=kw["kv_lens"] + 1,
    )
    torch.testing.assert_close(actual, expected, check_device=True)


@pytest.mark.parametrize("compute", [reference_decode, pytorch_decode], ids=["reference", "yardstick"])
def test_a_row_with_only_a_sink(compute):
    inputs = make_inputs(2, 2, 1, 2, 3, 4)
    kw = {"kv_lens": torch.tensor([0, 3]), "q_lens": torch.tensor([2, 1]), "sinks": torch.tensor([5.0, -math.inf])}
    more = {"return_lse": True} if compute is reference_decode else {}
    out, lse = compute(*inputs, None, lambda b, h, q, k: h == 0, **kw, **more)
    assert (out[0] == 0).all() and (out[1, 1] == 0).all() and (out[1, :, 1] == 0).all()
    assert lse[0].tolist() == [[5, 5], [-math.inf, -math.inf]]
    assert lse[1, 0, 0] > 5 and lse[1, 1, 0] == -math.inf and lse[1, :, 1].tolist() == [-math.inf] * 2


def test_nan_reaches_its_row_past_a_sink():
    inputs = make_inputs(1, 2, 1, 1, 3, 4)
    nan_mod = lambda s, b, h, q, k: torch.where(h == 1, torch.nan, s)
    out, lse = reference_decode(*inputs, nan_mod, sinks=torch.tensor([9.0, 9.0]), return_lse=True)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all() and out[0, 0].isfinite().all()


# --- Packed queries and keys ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", packed_cases.KINDS)
@pytest.mark.parametrize("offset", [None, [4, 0, 1, 9]])
def test_a_packed_call_is_the_padded_one(kind, offset):
    call = packed_cases.draw([2, 0, 5, 1], [7, 3, 4, 0], kind, before=1, Hkv=1 if "latent" in kind else 2)
    more = {"score_mod": position_score, "mask_mod": mods.causal(), "return_lse": True}
    more |= {"sinks": torch.tensor([0.0, -1.0, 2.0, 1.0]), "q_offset": offset and torch.tensor(offset)}
    out, lse = reference_decode(call.query, **call.arguments, **more)
    padded, padded_lse = reference_decode(**call.padded(), **more)
    torch.testing.assert_close(out, call.pack(padded, 0.0), rtol=0, atol=1e-12)
    torch.testing.assert_close(lse, call.pack(padded_lse, -math.inf), rtol=0, atol=1e-12)


def test_packed_keys_by_hand():
    """Sequence 0 has the last two keys of four, sequence 1 has none; a row of no sequence is 0."""
    key, value = torch.zeros(4, 1, 2), torch.tensor([1.0, 2.0, 3.0, 5.0])[:, None, None]
    starts = torch.tensor([0, 1, 2], dtype=torch.int32), torch.tensor([2, 4, 4], dtype=torch.int32)
    arguments = {"cu_seqlens_q": starts[0], "cu_seqlens_k": starts[1], "return_lse": True}
    out, lse = reference_decode(torch.ones(3, 1, 2), key, value, **arguments)
    assert out.flatten().tolist() == [4.0, 0.0, 0.0]
    assert lse.flatten().tolist() == [pytest.approx(math.log(2)), -math.inf, -math.inf]
    out, _ = reference_decode(torch.ones(3, 1, 2), key, value, None, lambda b, h, q, k: k == q, **arguments)
    assert out.flatten().tolist() == [5.0, 0.0, 0.0], "the token is at the last key, and keys count from 0"


@pytest.mark.parametrize("starts", [[0, 5, 3, 9], [-3, 2, 2, 100], [9, 12, 1, 4]])
def test_where_sequences_begin_is_clamped(starts):
    """start = min(max(c[b], 0), T), end = min(max(c[b + 1], start), T)."""
    query, key, value = torch.randn(7, 2, 4), torch.randn(3, 1, 6, 4), torch.randn(3, 1, 6, 4)
    out = reference_decode(query, key, value, cu_seqlens_q=torch.tensor(starts))
    expected = torch.zeros_like(out)
    for b in range(3):
        start = min(max(starts[b], 0), 7)
        end = min(max(starts[b + 1], start), 7)
        one = reference_decode(query[start:end].transpose(0, 1)[None], key[b : b + 1], value[b : b + 1])
        expected[start:end] = one[0].transpose(0, 1)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-12)


# --- How a mod is called ----------------------------------------------------------------------------------------------


def test_arguments_are_0d_positions_and_scores():
    seen = []

    def score_mod(score, *indices):
        seen.append([(x.ndim, x.dtype) for x in (score, *indices)])
        return score

    lse_of(score_mod, Q=2)
    assert seen == [[(0, torch.float64), *[(0, torch.int64)] * 4]]
    positions = lambda s, b, h, q, k: torch.where(k == 0, 1000.0 * b + 100 * h + q, -torch.inf)
    lse = lse_of(positions, B=2, Hq=2, Q=2)
    assert lse.flatten().tolist() == [4, 5, 104, 105, 1004, 1005, 1104, 1105]


def test_arithmetic_is_float64_and_the_default_dtype_comes_back():
    def score_mod(score, b, h, q_idx, kv_idx):
        third = 1 / (kv_idx + 3)
        assert third.dtype == torch.tensor(0.1).dtype == torch.float64
        return torch.where(kv_idx == 0, third + 1e-12, -torch.inf)

    assert lse_of(score_mod).item() == 1 / 3 + 1e-12
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ZeroDivisionError):
        lse_of(lambda *_: 1 / 0)
    assert torch.get_default_dtype() == torch.float32


def test_python_constants_as_results():
    assert (lse_of(lambda *_: 0.5, lambda *_: True) - math.log(6) - 0.5).abs().item() < 1e-12
    assert lse_of(None, lambda *_: False).item() == -math.inf
    with pytest.raises(RuntimeError):
        lse_of(None, lambda *_: None)


def test_python_control_flow_on_an_index_raises():
    with pytest.raises(
        TypeError, match=r"at one pair of query and key, where its arguments are 0-d tensors: .*\n  Use torch\.where"
    ):
        lse_of(None, lambda b, h, q, k: bool(k > 2))


def test_shapes_that_mean_nothing():
    q, k = torch.zeros(1, 4, 1, 8), torch.zeros(1, 2, 5, 8)
    for query, key, value, message in [
        (q[0], k, k, r"`query` must have shape \[B, Hq, Q, D\], got \[4, 1, 8\]"),
        (q, k[0], k, r"`key` must have shape \[B, Hkv, N, D\], got \[2, 5, 8\]"),
        (q[:, :3], k, k, "the 3 heads of `query` must be a multiple of the 2 heads of `key`"),
        (q[..., :4], k, k, "shapes do not fit together"),
        (q, k, k[:, :, :4], "shapes do not fit together"),
    ]:
        with pytest.raises(ValueError, match=message):
            reference_decode(query, key, value)
    with pytest.raises(TypeError, match="needs `key` and `value`, or a `cache`"):
        reference_decode(q)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_cache_stands_for_what_it_has(dtype):
    cache = PagedKVCache(batch=2, num_kv_heads=2, head_dim=8, num_pages=8, page_size=4, dtype=dtype)
    cache.append(*torch.randn(2, 2, 2, 7, 8), num_tokens=[7, 3])
    query = torch.randn(2, 4, 1, 8)
    given = {name: getattr(cache, name) for name in ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale")}
    assert torch.equal(reference_decode(query, cache=cache), reference_decode(query, **given))
    assert torch.allclose(flex_decode(query, cache=cache).double(), reference_decode(query, cache=cache), atol=1e-5)


def test_callables_of_every_kind():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([2.0]))

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.weight[h]

        def method(self, score, b, h, q_idx, kv_idx):
            return self(score, b, h, q_idx, kv_idx)

    module = Scale()
    bound = functools.partial(lambda bias, score, *indices: score + bias, 2.0)
    for score_mod in (module, module.method, bound):
        lse = lse_of(score_mod)
        assert abs(lse.item() - 2 - math.log(6)) < 1e-12 and not lse.requires_grad


# --- Captured tensors -------------------------------------------------------------------------------------------------


def read(index, table, **kw):
    """The values `index(table, b, h, q_idx, kv_idx)` as a mod reads them, `[B, Hq, Q, N]`."""
    sizes = {"B": 1, "Hq": 1, "Q": 1, "N": 4} | kw
    grid = tuple(torch.arange(sizes[name]) for name in ("B", "Hq", "Q", "N"))
    score = torch.zeros([len(axis) for axis in grid])
    return evaluate_mod(lambda s, *indices: s + index(table, *indices), grid, score)


def test_index_outside_reads_zero_and_negative_counts_from_the_end():
    table = torch.tensor([1.0, 2.0, 3.0])
    positions = lambda t, b, h, q, k: t[k - 5]
    assert read(positions, table, N=10).flatten().tolist() == [0, 0, 1, 2, 3, 1, 2, 3, 0, 0]
    assert read(lambda t, b, h, q, k: t[(k - 1) * 2**62], table, N=3).flatten().tolist() == [0, 1, 0]
    assert read(lambda t, b, h, q, k: t[3] + t[-4] + t[-3], table).flatten().tolist() == [1] * 4
    assert read(lambda t, b, h, q, k: t[k], torch.empty(0)).flatten().tolist() == [0] * 4
    grid = tuple(torch.arange(4) for _ in range(4))
    flags = torch.tensor([True, True])
    assert evaluate_mod(lambda b, h, q, k: flags[k], grid)[0, 0, 0].tolist() == [True, True, False, False]


def test_every_way_of_indexing_agrees():
    table = torch.randn(2, 3, 4, 5)
    sizes = {"B": 2, "Hq": 3, "Q": 4, "N": 5}
    ways = [
        lambda t, b, h, q, k: t[b, h, q, k],
        lambda t, b, h, q, k: t[b][h][q][k],
        lambda t, b, h, q, k: t[b, h][q, k],
        lambda t, b, h, q, k: t[b, :, q][h, k],
        lambda t, b, h, q, k: t[b, ..., k][h, q],
        lambda t, b, h, q, k: t[..., k][b, h][q],
        lambda t, b, h, q, k: t[:, h, None, :, k][b, 0, q],
        lambda t, b, h, q, k: t.transpose(0, 3)[k, h, q, b],
        lambda t, b, h, q, k: t[b.int(), h.to(torch.int16), q.to(torch.uint8), k],
        lambda t, b, h, q, k: t.exp()[b, h, q, k].log(),
    ]
    for way in ways:
        torch.testing.assert_close(read(way, table, **sizes), table.double(), rtol=1e-12, atol=1e-12)


def test_partial_read_outside_is_zero_all_the_way():
    table = torch.ones(2, 3)
    assert read(lambda t, b, h, q, k: t[k][1], table).flatten().tolist() == [1, 1, 0, 0]


def test_nested_gather_with_a_byte_table():
    classes, bias = torch.tensor([2, 0, 1, 2], dtype=torch.uint8), torch.tensor([5.0, 6.0, 7.0])
    assert read(lambda t, b, h, q, k: bias[t[k]], classes).flatten().tolist() == [7, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_captures_widen_before_any_arithmetic(dtype):
    table = torch.tensor([0.1, 0.7, 3.3, 1e-3]).to(dtype)
    exact = [x * (1 / 3) for x in table.tolist()]
    assert read(lambda t, b, h, q, k: t[k] * (1 / 3), table).flatten().tolist() == exact
    assert read(lambda t, b, h, q, k: (t * (1 / 3))[k], table).flatten().tolist() == exact
    number = table[1]
    assert read(lambda t, b, h, q, k: t * (1 / 3), number).flatten().tolist() == [exact[1]] * 4


def test_only_an_explicit_cast_rounds():
    table = torch.tensor([0.1, 0.7, 3.3, 1e-3])
    halves = table.half()
    rounded = (halves * 3.0).tolist()
    for cast in (
        lambda x: x.half(),
        lambda x: x.to(torch.float16),
        lambda x: x.to(halves),
        lambda x: x.type_as(halves),
    ):
        assert read(lambda t, b, h, q, k, cast=cast: cast(t[k]) * 3.0, table).flatten().tolist() == rounded
        assert read(lambda t, b, h, q, k, cast=cast: cast(t)[k] * 3.0, table).flatten().tolist() == rounded
    third = read(lambda t, b, h, q, k: (k + 1).float() / 3, table).flatten().tolist()
    assert third == [(k + 1) / 3 for k in range(4)]


def test_captures_are_read_at_call_time():
    table = torch.zeros(6)
    mod = lambda s, b, h, q, k: s + table[k]
    before = lse_of(mod)
    table += 1.0
    torch.testing.assert_close(lse_of(mod), before + 1.0)


def test_rank_of_an_index_is_checked():
    with pytest.raises(TypeError, match="0-d integer indices"):
        read(lambda t, b, h, q, k: t[torch.arange(2)], torch.ones(4))


@pytest.mark.gpu
def test_captures_and_inputs_on_a_gpu():
    query, key, value = make_inputs(2, 4, 2, 1, 5, 8)
    bias, cap = torch.randn(4, 5), torch.tensor(3.0)
    mod = lambda bias, cap: lambda s, b, h, q, k: cap * torch.tanh(s / cap) + bias[h, k]
    expected = reference_decode(query, key, value, mod(bias, cap))
    on_gpu = [x.cuda() for x in (query, key, value, bias)]
    assert torch.equal(reference_decode(*on_gpu[:3], mod(on_gpu[3], cap)), expected)
    assert torch.equal(reference_decode(*on_gpu[:3], mod(on_gpu[3], cap.cuda())), expected)


# --- The rule of comparison in tests/support.py -----------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_yardstick_meets_its_own_rule(family, dtype):
    B, Hq, N, Q = 2, 4, 19, 3
    query, key, value = make_inputs(B, Hq, 2, Q, N, 8, dtype=dtype, layout="bnhd")
    mods = [make(B, Hq, N, Q, "cpu") for make in family[1:]]
    kw = {"kv_lens": torch.tensor([N, 7])}
    out, lse = pytorch_decode(query, key, value, *mods, **kw)
    assert_close_to_reference(out, lse, query, key, value, *mods, **kw)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float8_e4m3fn, torch.float8_e5m2, torch.int8, None])
def test_the_yardstick_takes_every_argument_of_the_reference(stored, dtype):
    B, Hkv, N = 3, 2, 12
    query, key, value = make_inputs(B, 4, Hkv, 3, N, 8, 6, dtype=dtype)
    key, value = ((30 * x).to(stored or dtype) for x in (key, value))
    (key_pages, table), (value_pages, _) = paged(key, 4), paged(value, 4)
    per_key, _ = paged(torch.rand(B, Hkv, N), 4)
    mods = (lambda s, b, h, q, k: s - 0.1 * (q - k), lambda b, h, q, k: k <= q)
    kw = {
        "kv_lens": torch.tensor([12, 5, 0]),
        "q_lens": torch.tensor([3, 1, 2]),
        "page_table": table,
        "k_scale": torch.rand(Hkv) / 30,
        "v_scale": per_key / 30,
        "sinks": torch.randn(4),
    }
    out, lse = pytorch_decode(query, key_pages, value_pages, *mods, **kw)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert_close_to_reference(out, lse, query, key_pages, value_pages, *mods, **kw)
    for name, other in (("q_lens", 1 + kw["q_lens"]), ("k_scale", 0.5), ("v_scale", 0.5), ("sinks", None)):
        with pytest.raises(AssertionError):
            assert_close_to_reference(out, lse, query, key_pages, value_pages, *mods, **kw | {name: other})


def test_the_yardstick_rounds_scaled_keys_to_the_query_dtype():
    query, key, value = make_inputs(2, 4, 2, 1, 12, 8, dtype=torch.float16)
    key, value, scale = (40 * key).to(torch.int8), (40 * value).to(torch.int8), torch.rand(2, 2, 12)
    dequantised = [(x.float() * scale[..., None]).half() for x in (key, value)]
    actual = pytorch_decode(query, key, value, k_scale=scale, v_scale=scale)
    assert all(map(torch.equal, actual, pytorch_decode(query, *dequantised)))


def test_the_families_have_different_names_and_results():
    B, Hq, N, Q = 2, 4, 40, 3
    inputs = make_inputs(B, Hq, 2, Q, N, 8)
    results = {}
    for family in MODS:
        mods = [make(B, Hq, N, Q, "cpu") for make in family[1:]]
        results[family.name] = reference_decode(*inputs, *mods, q_offset=N // 2)
    assert len(results) == len(MODS)
    same = {frozenset((a, b)) for a in results for b in results if a != b and torch.equal(results[a], results[b])}
    # What these pairs hide, or how they write it, differs; the live keys are the same.
    assert same == {
        frozenset(("causal", "no_window")),
        frozenset(("document", "document_offsets")),
        frozenset(("window", "masking_score")),
    }


def test_the_rule_rejects_wrong_results():
    inputs = make_inputs(2, 2, 1, 1, 6, 4, dtype=torch.float16)
    mods = (lambda s, b, h, q, k: torch.where((h == 1) & (b == 1), torch.nan, s), lambda b, h, q, k: b == 1)
    out, lse = pytorch_decode(*inputs, *mods)
    assert_close_to_reference(out, lse, *inputs, *mods)
    assert_close_to_reference(out, None, *inputs, *mods)

    def rejected(match, out, lse):
        with pytest.raises(AssertionError, match=match):
            assert_close_to_reference(out, lse, *inputs, *mods)

    def changed(tensor, index, number):
        tensor = tensor.clone()
        tensor[index] = number
        return tensor

    rejected("out: largest error", changed(out, (1, 0, 0, 2), 9.0), lse)
    rejected("out is not 0", changed(out, (0, 0, 0, 1), 1e-7), lse)
    with pytest.raises(AssertionError, match="out is not 0"):
        assert_close_to_reference(changed(out, (0, 0, 0, 1), 1e-7), None, *inputs, *mods, sinks=torch.zeros(2))
    rejected("out is NaN in the wrong places", changed(out, (1, 0, 0, 1), math.nan), lse)
    rejected("out is NaN in the wrong places", changed(out, (1, 1, 0, 1), 0.0), lse)
    rejected("out has shape", out[..., :3], lse)
    rejected("lse: largest error", out, changed(lse, (1, 0), 9.0))
    rejected("lse is -inf in the wrong rows", out, changed(lse, (0, 0), -1e30))
    rejected("lse is NaN in the wrong rows", out, changed(lse, (1, 1), 0.0))
    rejected("lse has shape", out, lse[0])


def test_the_rule_bounds_the_mean_error_too():
    inputs = make_inputs(2, 2, 1, 1, 6, 4, dtype=torch.float16)
    exact, measure = reference_decode(*inputs), pytorch_decode(*inputs)[0].double()
    largest = (measure - exact).abs().max()
    assert_close_to_reference(exact, None, *inputs)
    with pytest.raises(AssertionError, match="out: mean error"):
        assert_close_to_reference(exact + 1.9 * largest, None, *inputs)
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_close_to_reference(exact + 2.1 * largest + 1e-5, None, *inputs)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
def test_layouts_hold_the_same_numbers(layout):
    expected = make_inputs(2, 4, 2, 3, 5, 8, 6)
    actual = make_inputs(2, 4, 2, 3, 5, 8, 6, layout=layout)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert actual[1].is_contiguous() == (layout == "bhnd")
    assert actual[1].transpose(1, 2).is_contiguous() == (layout == "bnhd")
    with pytest.raises(ValueError, match="unknown layout"):
        make_inputs(1, 1, 1, 1, 1, 1, layout="nhd")


def test_scores_beside_which_a_logarithm_has_no_digits():
    """The weights of a row sum to 1, whatever is added to its scores."""
    query, (key, value) = torch.randn(1, 2, 1, 16), torch.randn(2, 1, 1, 8, 16)
    mean = value.double().mean(2, keepdim=True).expand(1, 2, 1, 16)
    for far in (1e15, 1e30, 3e38, -3e38):
        out, lse = reference_decode(query, key, value, lambda s, b, h, q, k, far=far: s * 0.0 + far, return_lse=True)
        torch.testing.assert_close(out, mean)
        assert (lse == far).all() or far == 1e15
