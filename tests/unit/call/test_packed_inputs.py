"""Packed queries and keys: every refusal word for word."""

import numpy as np
import pytest
import torch
from packed_cases import draw, totals

from flexdecode import KVCache, PagedKVCache, explain, flex_decode

CALL = draw([2, 0, 3], [5, 4, 7], Hq=4, Hkv=2)  # T = 7
PAGED, KEYS = draw([2, 0, 3], [5, 4, 7], "paged"), draw([2, 0, 3], [5, 4, 7], "keys")
KEYS_INT8 = draw([2, 0, 3], [5, 4, 7], "keys_int8")
STARTS, STARTS_K = CALL.arguments["cu_seqlens_q"], KEYS.arguments["cu_seqlens_k"]
PADDED = torch.zeros(3, 4, 2, 16)
EXCLUDE = "`{}` and `{}` exclude one another: {}"


def refused(error, message, call=CALL, **changed):
    """Twice, because what has failed once must not be remembered as good; and by `explain`."""
    arguments = {"query": call.query} | call.arguments | changed
    for function in (flex_decode, flex_decode, explain):
        with pytest.raises(error) as caught:
            function(**arguments)
        assert str(caught.value) == message


# --- The query --------------------------------------------------------------------------------------------------------


def test_a_packed_query_needs_its_totals():
    message = (
        "`query` must have 4 dimensions [B, H, tokens, head_dim], got shape [7, 4, 16]; a packed query [T, Hq, D] "
        "needs `cu_seqlens_q`"
    )
    refused(ValueError, message, cu_seqlens_q=None)


def test_a_padded_query_with_totals():
    message = (
        "`query` must have 3 dimensions [T, Hq, D] beside `cu_seqlens_q`, got shape [3, 4, 2, 16]; "
        "`query.transpose(1, 2).flatten(0, 1)` packs [B, Hq, Q, D], and without `cu_seqlens_q` it passes as it is"
    )
    refused(ValueError, message, query=PADDED)
    message = "`query` must have 3 dimensions [T, Hq, D] beside `cu_seqlens_q`, got shape [7, 4]"
    refused(ValueError, message, query=CALL.query[..., 0])
    refused(TypeError, "`query` must be a torch.Tensor, got list", query=CALL.query.tolist())


def test_the_remedy_for_a_padded_query():
    padded = torch.randn(3, 4, 2, 16)
    packed = flex_decode(padded.transpose(1, 2).flatten(0, 1), **CALL.arguments | {"cu_seqlens_q": totals([2, 2, 2])})
    arguments = {name: x for name, x in CALL.arguments.items() if name != "cu_seqlens_q"}
    expected = flex_decode(padded, **arguments)
    torch.testing.assert_close(packed, expected.transpose(1, 2).flatten(0, 1))


def test_lengths_beside_totals():
    message = EXCLUDE.format("q_lens", "cu_seqlens_q", "`cu_seqlens_q` says which tokens a sequence has")
    for q_lens in (2, torch.tensor([2, 0, 3])):
        refused(ValueError, message, q_lens=q_lens)


# --- The totals -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_totals(name):
    good = KEYS.arguments[name]
    for wrong in (good.tolist(), good.numpy(), 7):
        message = f"`{name}` must be an int32 tensor [B + 1], got {type(wrong).__name__}"
        refused(TypeError, message, KEYS, **{name: wrong})
    for wrong in (good[:0], good[None], good[0]):
        message = f"`{name}` must have shape [B + 1], at least one entry, got {list(wrong.shape)}"
        refused(ValueError, message, KEYS, **{name: wrong})
    for dtype in (torch.int64, torch.int16, torch.uint8, torch.float32):
        message = f"`{name}` must be int32, got {dtype}: convert it, `{name}.to(torch.int32)`"
        refused(ValueError, message, KEYS, **{name: good.to(dtype)})
    refused(ValueError, f"`{name}` must be on the device of `query`, cpu, got meta", KEYS, **{name: good.to("meta")})


@pytest.mark.parametrize(
    ("name", "most"), [("cu_seqlens_q", "T = 7 (from query)"), ("cu_seqlens_k", "Tk = 21 (from key)")]
)
def test_totals_must_ascend(name, most):
    """Also in a call that is known already."""
    starts = KEYS.arguments[name].clone()
    arguments = KEYS.arguments | {name: starts}
    flex_decode(KEYS.query, **arguments)
    for wrong, message in (
        ([0, 2, 1, 7], "ascend, got 2 and then 1 at entry 2: it holds the running total of the lengths"),
        ([3, 2, 1, 0], "ascend, got 3 and then 2 at entry 1: it holds the running total of the lengths"),
        ([0, 2, 2, 99], f"lie between 0 and {most}, got 0 to 99"),
        ([-1, 2, 2, 7], f"lie between 0 and {most}, got -1 to 7"),
        ([0, 2, 2, (1 << 31) - 1], f"lie between 0 and {most}, got 0 to 2147483647"),
    ):
        starts.copy_(torch.tensor(wrong))
        refused(ValueError, f"`{name}` must {message}", KEYS, **{name: starts})


# --- What has B entries -----------------------------------------------------------------------------------------------


def test_sizes_that_come_from_the_totals():
    lens, two = CALL.arguments["kv_lens"], {"key": CALL.arguments["key"][:2], "value": CALL.arguments["value"][:2]}
    refused(ValueError, "`kv_lens` must have shape [B] = [3], got [2]", kv_lens=lens[:2])
    refused(ValueError, "`kv_lens` must have shape [B] = [3], got [7]", kv_lens=torch.ones(7, dtype=torch.int32))
    refused(ValueError, "`q_offset` must have shape [B] = [3], got [4]", q_offset=torch.zeros(4, dtype=torch.int64))
    message = "`key` must have shape [B, Hkv, N, D] with B = 3 (from cu_seqlens_q) or 1 to broadcast, got [2, 2, 9, 16]"
    refused(ValueError, message, **two)
    message = "`page_table` must have shape [B, max_pages] with B = 3 (from cu_seqlens_q), got [2, 3]"
    refused(ValueError, message, PAGED, page_table=PAGED.arguments["page_table"][:2])
    message = "`sinks` must have shape [Hq] = [4] (from query), got [3]"
    refused(ValueError, message, sinks=torch.zeros(3))
    message = "`key` must have shape [B, Hkv, N, D] with D = 16 (from query), got [3, 2, 9, 8]"
    refused(ValueError, message, key=CALL.arguments["key"][..., :8])
    refused(ValueError, "`query` must have at most 1048576 tokens, got T = 1048577", query=torch.zeros(1, 4, 16).expand(
        (1 << 20) + 1, 4, 16
    ))  # fmt: skip


@pytest.mark.parametrize("shape", [(7, 4, 24), (6, 4, 16), (7, 16, 4)])
def test_out(shape):
    message = f"`out` must have shape [T, Hq, Dv] = [7, 4, 16], got {list(shape)}"
    with pytest.raises(ValueError) as caught:
        flex_decode(CALL.query, **CALL.arguments, out=torch.zeros(shape))
    assert str(caught.value) == message


def test_an_out_of_the_padded_form():
    message = "`out` must have 3 dimensions [T, Hq, Dv], got shape [1, 7, 4, 16]"
    refused(ValueError, message, out=torch.zeros(1, 7, 4, 16))
    with pytest.raises(ValueError, match="`out` must not share memory with `query`"):
        flex_decode(CALL.query, **CALL.arguments, out=CALL.query)


# --- The hint ---------------------------------------------------------------------------------------------------------


def test_the_hint():
    for wrong in (2.0, "2", True, torch.tensor(2)):
        message = f"`max_q_len` must be an integer or None, got {type(wrong).__name__}"
        refused(TypeError, message, max_q_len=wrong)
    for wrong in (0, -1):
        refused(ValueError, f"`max_q_len` must be at least 1, got {wrong}", max_q_len=wrong)
    message = "`max_q_len` is for a packed query: it needs `cu_seqlens_q`"
    refused(ValueError, message, query=PADDED, cu_seqlens_q=None, max_q_len=2)
    flex_decode(CALL.query, **CALL.arguments, max_q_len=np.int64(3))
    flex_decode(CALL.query, **CALL.arguments, max_q_len=2)
    refused(ValueError, "`max_q_len` must be at least 1, got 0", max_q_len=0)  # also in a call that is known


# --- Packed keys ------------------------------------------------------------------------------------------------------


def test_packed_keys_exclude_caches():
    where = "`cu_seqlens_k` says where the keys of a sequence lie"
    refused(ValueError, EXCLUDE.format("kv_lens", "cu_seqlens_k", where), KEYS, kv_lens=CALL.arguments["kv_lens"])
    refused(ValueError, EXCLUDE.format("kv_lens", "cu_seqlens_k", where), KEYS, kv_lens=5)
    table = PAGED.arguments["page_table"]
    refused(ValueError, EXCLUDE.format("page_table", "cu_seqlens_k", where), KEYS, page_table=table)
    shapes = {"batch": 3, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    message = EXCLUDE.format("cu_seqlens_k", "cache", "`cu_seqlens_k` is for keys without a cache")
    for cache in (KVCache(max_kv_len=8, **shapes), PagedKVCache(num_pages=4, page_size=4, **shapes)):
        refused(ValueError, message, KEYS, cache=cache, key=None, value=None)


def test_packed_keys_need_a_packed_query():
    message = "`cu_seqlens_k` needs `cu_seqlens_q`, which says where the query tokens of a sequence lie"
    refused(ValueError, message, KEYS, query=PADDED, cu_seqlens_q=None)


@pytest.mark.parametrize(("name", "form"), [("key", "[Tk, Hkv, D]"), ("value", "[Tk, Hkv, Dv]")])
def test_the_shape_of_packed_keys(name, form):
    message = (
        f"`{name}` must have shape {form} beside `cu_seqlens_k`, got [3, 2, 9, 16]; a cache [B, Hkv, N, D] takes "
        "`kv_lens` instead"
    )
    refused(ValueError, message, KEYS, **{name: CALL.arguments[name]})
    refused(TypeError, f"`{name}` must be a torch.Tensor, got list", KEYS, **{name: [1.0]})
    message = (
        f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got shape [21, 2, 16]; packed keys [Tk, Hkv, D]"
    )
    tensor = KEYS.arguments[name]
    refused(ValueError, f"{message} need `cu_seqlens_k`", **{name: tensor})


def test_sizes_of_packed_keys():
    key, value = KEYS.arguments["key"], KEYS.arguments["value"]
    refused(
        ValueError,
        "`key` must have shape [Tk, Hkv, D] with D = 16 (from query), got [21, 2, 8]",
        KEYS,
        key=key[..., :8],
    )
    form = "`value` must have shape [Tk, Hkv, Dv] with Hkv = 2 and Tk = 21 (from key)"
    refused(ValueError, f"{form}, got [20, 2, 16]", KEYS, value=value[1:])
    refused(ValueError, f"{form}, got [21, 1, 16]", KEYS, value=value[:, :1])
    message = "`cu_seqlens_k` must have shape [B + 1] = [4] (from cu_seqlens_q), got [3]"
    refused(ValueError, message, KEYS, cu_seqlens_k=STARTS_K[:3])


def test_scales_of_packed_keys():
    for shape in ([3, 2], [21, 2], [1, 2, 21], [1]):
        message = f"`k_scale` must be a number or have shape [Hkv] = [2], got {shape}"
        refused(ValueError, message, KEYS_INT8, k_scale=torch.ones(shape))
    flex_decode(KEYS_INT8.query, **KEYS_INT8.arguments | {"k_scale": 0.5, "v_scale": torch.tensor(0.5)})


# --- Cache objects ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("paged", [False, True])
def test_a_cache_object_of_other_sizes(paged):
    shapes = {"batch": 2, "num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    cache = PagedKVCache(num_pages=4, page_size=4, **shapes) if paged else KVCache(max_kv_len=8, **shapes)
    query, starts = torch.zeros(5, 4, 16), totals([2, 3])
    form = "[T, Hq, D] with Hq a multiple of Hkv = 2 and D = 16 (from cache)"
    wrong = {
        "`cu_seqlens_q` must have shape [B + 1] = [3] (from cache), got [4]": (query, STARTS),
        f"`query` must have shape {form}, got [5, 3, 16]": (query[:, :3], starts),
        f"`query` must have shape {form}, got [5, 4, 8]": (query[..., :8], starts),
    }
    for message, (packed, cu_seqlens_q) in wrong.items():
        for function in (flex_decode, explain):
            with pytest.raises(ValueError) as caught:
                function(packed, cache=cache, cu_seqlens_q=cu_seqlens_q)
            assert str(caught.value) == message
    with pytest.raises(ValueError, match="`query` must have 3 dimensions"):
        flex_decode(PADDED[:2], cache=cache, cu_seqlens_q=starts)
