"""Packed queries and keys on the torch backend."""

import math

import packed_cases as cases
import pytest
import torch
from packed_cases import draw
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, KVCache, PagedKVCache, cache_info, clear_cache, flex_decode, mods
from flexdecode.call import checks
from flexdecode.call.inputs import Inputs
from flexdecode.call.packing import rows_of_sequences
from flexdecode.runtime import eager, plan

DEBUG = DecodeOptions(debug=True)


@pytest.mark.parametrize("case", cases.GRID, ids=lambda case: case.name)
def test_grid(case):
    cases.check_case(case)


@pytest.mark.parametrize("case", cases.GRID[:: len(cases.GRID) // 24], ids=lambda case: case.name)
def test_grid_in_chunks(case, monkeypatch):
    monkeypatch.setattr(eager, "CHUNK_ELEMENTS", 1)
    cases.check_case(case)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_half_types(kind, dtype):
    call = draw([1, 6, 0, 3], [14, 6, 2, 20], kind, dtype=dtype, Hkv=1 if "latent" in kind else 2)
    cases.check(call, mods.softcap(2.0), mods.causal())


@pytest.mark.parametrize("case", cases.peer_cases(), ids=str)
def test_peers(case):
    case.check(*case.arguments)


@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_is_padded(kind):
    cases.check_packed_is_padded(kind)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "int8", "paged_e4m3", "paged_latent", "keys", "keys_int8"])
@pytest.mark.parametrize("mask", cases.DEAD_MASKS)
def test_dead_keys(mask, kind):
    cases.check_dead_keys(mask, kind)


def test_out():
    cases.check_out()


def test_hint():
    cases.check_hint()


def test_other_splits():
    cases.check_other_splits(
        lambda call: flex_decode(call.query, mask_mod=mods.causal(), return_lse=True, **call.arguments)
    )


# --- Sizes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["contiguous", "paged", "keys"])
def test_no_token(kind):
    call = draw([0, 0], [3, 0], kind, after=0)
    out, lse = flex_decode(call.query, return_lse=True, **call.arguments)
    assert out.shape == (0, 4, 16) and lse.shape == (0, 4)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "keys"])
def test_no_sequence(kind):
    """All rows are rows of no sequence. With sinks too."""
    call = draw([], [], kind, after=3)
    for sinks in (None, torch.zeros(4)):
        out = torch.full((3, 4, 16), math.nan)
        out, lse = flex_decode(call.query, return_lse=True, out=out, sinks=sinks, **call.arguments)
        assert (out == 0).all() and lse.shape == (3, 4) and (lse == -math.inf).all()


def test_rows_of_no_sequence_have_no_sink():
    call = draw([2, 0, 1], [5, 3, 0], before=2, after=2)
    out, lse = cases.check(call, sinks=torch.tensor([0.0, 1.0, -1.0, 3.0]))
    for rows in (slice(0, 2), slice(5, 7)):
        assert (out[rows] == 0).all() and (lse[rows] == -math.inf).all()
    assert lse[4].tolist() == [0.0, 1.0, -1.0, 3.0], "a token without a key has its sink"


def test_one_number_for_all_sequences():
    call = draw([2, 0, 3], [8, 8, 8])
    arguments = call.arguments | {"kv_lens": 8, "q_offset": 2}
    expected = cases.check(call, None, mods.causal(), q_offset=torch.tensor([2, 2, 2]))
    for number in (8, torch.tensor(8)):
        arguments["kv_lens"] = number
        got = flex_decode(call.query, mask_mod=mods.causal(), return_lse=True, **arguments)
        assert all(map(torch.equal, got, expected))


def test_shares_are_as_many_as_any_division_needs():
    """The cut of T tokens among B sequences into rows of a batch."""
    for q_lens in ([1] * 7, [64, 1, 1, 1], [0, 0, 13], [5], [3, 3, 3, 3, 0], [17, 31, 1]):
        call = draw(q_lens, [4] * len(q_lens), before=1)
        rows = eager._packed_rows(inputs_of(call))
        assert len(rows.owner) == len(rows.live) == len(call.query) // rows.live.shape[1] + len(q_lens)
        placed = rows.place[rows.live]
        assert placed.tolist() == list(range(1, 1 + sum(q_lens))), "each token is in one row, in order"
        owners = rows.owner[:, None].expand_as(rows.live)[rows.live]
        assert owners.bincount(minlength=len(q_lens)).tolist() == q_lens


def inputs_of(call):
    return Inputs(call.query, **call.arguments)


def test_where_sequences_begin_is_clamped():
    """As the kernels clamp it, because they cannot raise: start = min(max(c[b], 0), T), end >= start."""
    for starts, most, expected in (
        ([0, 3, 7], 7, [(0, 3), (3, 7)]),
        ([-4, 3, 99], 7, [(0, 3), (3, 7)]),
        ([5, 3, 6], 7, [(5, 5), (3, 6)]),
        ([9, 12], 7, [(7, 7)]),
        ([-5, -2, 1], 7, [(0, 0), (0, 1)]),
        ([0, 4], 0, [(0, 0)]),
        ([4], 7, []),
    ):
        start, lens = rows_of_sequences(torch.tensor(starts, dtype=torch.int32), most)
        assert list(zip(start.tolist(), (start + lens).tolist(), strict=True)) == expected


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_totals_outside_are_clamped(name, monkeypatch):
    """As on a GPU, where nobody reads them before the call."""
    for module in (checks, plan):
        monkeypatch.setattr(module, "check_all_lens", lambda *_: None)
    cases.check_clamped(name)


# --- What else a call takes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True])
def test_cache_objects(dynamic):
    """A packed query over a KVCache and a PagedKVCache."""
    call = draw([2, 0, 1], [5, 0, 3], after=1)
    dtype = torch.int8 if dynamic else torch.float32
    key, value = (torch.randn(3, 2, 5, 16, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    for cache in (
        KVCache(batch=3, num_kv_heads=2, head_dim=16, max_kv_len=8, dtype=dtype),
        PagedKVCache(batch=3, num_kv_heads=2, head_dim=16, num_pages=9, page_size=2, dtype=dtype),
    ):
        cache.append(key, value, num_tokens=[5, 0, 3])
        starts = call.arguments["cu_seqlens_q"]
        out, lse = flex_decode(call.query, cache=cache, cu_seqlens_q=starts, mask_mod=mods.causal(), return_lse=True)
        names = ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale")
        given = {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}
        same = flex_decode(call.query, cu_seqlens_q=starts, mask_mod=mods.causal(), return_lse=True, **given)
        assert torch.equal(out, same[0]) and torch.equal(lse, same[1])
        cases.check(
            cases.Packed(call.query, given | {"cu_seqlens_q": starts}, [2, 0, 1], [5, 0, 3], 0), None, mods.causal()
        )


@pytest.mark.parametrize("kind", ["contiguous", "paged", "keys"])
@pytest.mark.parametrize("heads", [None, 4])
def test_block_mask(kind, heads):
    """Its rows are positions; sequences may differ."""
    call = draw([3, 0, 8, 1], [20, 9, 8, 33], kind)
    windows = torch.tensor([4, 9, 3, 17])

    def window(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < windows[b] + h)

    block_mask = create_block_mask(window, 4, heads or 4, 40, 40, device="cpu", BLOCK_SIZE=8)
    expected = cases.check(call, None, window)
    out, lse = flex_decode(call.query, block_mask=block_mask, return_lse=True, **call.arguments)
    torch.testing.assert_close(out, expected[0])
    torch.testing.assert_close(lse, expected[1])


def test_a_block_mask_that_is_too_short():
    call = draw([2, 1], [5, 20])
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, None, None, 16, 40, device="cpu", BLOCK_SIZE=8)
    with pytest.raises(ValueError, match="`block_mask` covers query positions 0 to 15, but the call has 3 to 19"):
        flex_decode(call.query, block_mask=block_mask, **call.arguments)
    block_mask = create_block_mask(lambda b, h, q, k: k <= q, 3, None, 40, 40, device="cpu", BLOCK_SIZE=8)
    with pytest.raises(ValueError, match="sequences and heads, but the call has 2 and 4"):
        flex_decode(call.query, block_mask=block_mask, **call.arguments)


def test_debug_names_the_sequence_of_an_index_out_of_range():
    call = draw([1, 4, 2], [3, 6, 4], before=1)
    bias = torch.zeros(3, 5)
    with pytest.raises(Exception, match=r"`bias\[b, kv_idx\]` out of range: at b = 1, h = 0, q_idx = 5, kv_idx = 5"):
        flex_decode(
            call.query, score_mod=lambda s, b, h, q, k: s + bias[b, k], mask_mod=mods.causal(), options=DEBUG,
            **call.arguments,
        )  # fmt: skip


def test_debug_changes_nothing():
    for kind in cases.KINDS:
        call = draw([1, 4, 0, 2], [3, 6, 2, 4], kind, Hkv=1 if "latent" in kind else 2)
        cases.check(call, mods.softcap(3.0), mods.causal(), options=DEBUG)


def test_a_bad_page_is_refused_by_the_sequence_that_reads_it():
    call = draw([2, 1], [9, 3], "paged")
    call.arguments["page_table"][0, 1] = -1
    with pytest.raises(ValueError, match="`page_table` names page -1 within a sequence"):
        flex_decode(call.query, **call.arguments)
    cases.check(call, None, lambda b, h, q, k: (k < 4) | (k > 7))


def test_other_contents_are_a_known_call():
    call = draw([3, 1], [9, 6])
    clear_cache()
    for new in ([3, 1], [0, 4], [2, 2], [6, 0]):
        call.arguments["cu_seqlens_q"].copy_(cases.totals(new))
        flex_decode(call.query, max_q_len=6, **call.arguments)
    assert cache_info().hits == 3


def test_nothing_is_read_on_the_host(monkeypatch):
    """The cut of the query needs only shapes: the same operations run on a device that nobody may wait for."""
    call = draw([3, 0, 5], [9, 4, 6])
    given = inputs_of(call)
    monkeypatch.setattr(torch.Tensor, "item", None)
    monkeypatch.setattr(torch.Tensor, "__int__", None)
    monkeypatch.setattr(torch.Tensor, "__bool__", None)
    monkeypatch.setattr(torch.Tensor, "tolist", None)
    rows = eager._packed_rows(given)
    monkeypatch.undo()
    assert int(rows.live.sum()) == 8


def test_a_long_chunk_among_many_decodes_takes_little_memory():
    """63 decodes and a chunk of 1000 tokens: the padded form would have 64000 tokens."""
    call = draw([1] * 40 + [1000] + [1] * 23, [3] * 64, Hq=1, Hkv=1)
    rows = eager._packed_rows(inputs_of(call))
    assert rows.live.numel() <= 4 * 1063


def test_numbers_that_no_tensor_holds_are_refused_in_known_calls_too():
    q, k = torch.randn(2, 4, 1, 8), torch.randn(2, 2, 16, 8)
    flex_decode(q, k, k, q_offset=3)
    for wrong in (1 << 63, -(10**20)):
        with pytest.raises(ValueError, match=f"`q_offset` must fit into int64, got {wrong}"):
            flex_decode(q, k, k, q_offset=wrong)
        with pytest.raises(ValueError, match="`q_lens` must lie between 0 and Q = 1"):
            flex_decode(q, k, k, q_lens=wrong)
