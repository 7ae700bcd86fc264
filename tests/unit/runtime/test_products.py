"""The products of the torch backend: what is read at one time, in which type it is multiplied, what is rounded."""

import itertools

import pytest
import torch
from support import assert_close_to_reference, make_inputs, paged

from flexdecode import flex_decode, mods
from flexdecode.call.formats import CONTIGUOUS
from flexdecode.runtime import products

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def check(query, key, value, score_mod=None, mask_mod=None, **arguments):
    out, lse = flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, **arguments)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)
    return out


CACHES = {
    "contiguous": lambda key, value: (key, value, {}),
    "bnhd": lambda key, value: (*(x.transpose(1, 2).contiguous().transpose(1, 2) for x in (key, value)), {}),
    "a part": lambda key, value: (key[:, :, 7:], value[:, :, 7:], {}),
    "lengths": lambda key, value: (key, value, {"kv_lens": torch.tensor([300, 120, 0])}),
    "a number of keys": lambda key, value: (key, value, {"kv_lens": 290}),
    "shared": lambda key, value: (key[:1], value[:1], {}),
    "pages": lambda key, value: _in_pages(key, value),
}


def _in_pages(key, value):
    (pages, table), (of_value, _) = paged(key, 10), paged(value, 10)
    return pages, of_value, {"page_table": table, "kv_lens": torch.tensor([300, 120, 31])}


@pytest.mark.parametrize("piece", [1, 1 << 9, 1 << 13])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", CACHES)
def test_pieces(layout, dtype, piece, monkeypatch):
    """A key, some keys of a head, or some heads at a time."""
    monkeypatch.setattr(products, "PIECE_ELEMENTS", piece)
    query, key, value = make_inputs(3, 6, 3, 1, 300, 16, 24, dtype=dtype)
    key, value, arguments = CACHES[layout](key, value)
    check(query, key, value, **arguments)
    check(query, key, value, mods.softcap(2.0), mods.dilated(3, 100), **arguments)


def test_pieces_lie_together():
    """Whatever the order of dimensions in memory, a piece is a run of it, and all pieces together are the whole."""
    key = torch.empty(3, 4, 100, 8, dtype=torch.float16)
    for order in itertools.permutations(range(3)):
        cache = key.permute(*order, 3).contiguous().permute(*(order.index(dim) for dim in range(3)), 3)
        gather = CONTIGUOUS.gather(cache, None, range(100), None, False)
        seen = torch.zeros(3, 4, 100, dtype=torch.int32)
        for piece in _pieces(cache, gather, torch.float32):
            seen[piece] += 1
            part = cache[piece]
            assert part.numel() <= 400 and part.numel() == 1 + sum(
                (size - 1) * step for size, step in zip(part.shape, part.stride(), strict=True)
            )
        assert (seen == 1).all()


def _pieces(cache, gather, dtype):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "PIECE_ELEMENTS", 400 // torch.get_num_threads())
        chunk = products.Chunk(gather, True, None, None, len(cache), cache.shape[2])
        return products.Cached(chunk, cache, None, dtype).pieces()


def test_where_bfloat16_is_multiplied(monkeypatch):
    """Weights are rounded only if query and values are bfloat16, and the CPU does not need float32 for them."""
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 100)
    query, _, value = make_inputs(1, 2, 2, 1, 20, 16)
    for fast in (False, True):
        monkeypatch.setattr(products, "_multiplies_bfloat16", lambda fast=fast: fast)
        for of_query, of_value in itertools.product(DTYPES, DTYPES):
            found = products.product_dtype(query.to(of_query), value.to(of_value), torch.float32)
            is_half = fast and of_query == of_value == torch.bfloat16
            assert found == (torch.bfloat16 if is_half else torch.float32)
    few = value[:, :, :1].bfloat16()
    assert products.product_dtype(few, few, torch.float32) == torch.float32


def test_a_product_of_bfloat16_rounds_once(monkeypatch):
    """Also if a piece could hold a few keys only: sums of rounded sums would be worse."""
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 64 // torch.get_num_threads())
    monkeypatch.setattr(products, "_multiplies_bfloat16", lambda: True)
    query, key, value = make_inputs(2, 4, 2, 1, 512, 32, dtype=torch.bfloat16)
    seen = []
    rows = products.Cached.rows
    monkeypatch.setattr(
        products.Cached, "rows", lambda self, piece: seen.append((self.dtype, found := rows(self, piece))) or found
    )
    check(query, key[:, :, 1:], value[:, :, 1:])
    assert {x.shape[2] for dtype, x in seen if dtype == torch.bfloat16} == {511}
    assert {x.shape[2] for dtype, x in seen if dtype == torch.float32} == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_one_sequence_may_not_see_of_a_shared_cache(dtype, monkeypatch):
    """NaN past the length of one sequence reaches another one, whose length includes it, and only that one."""
    monkeypatch.setattr(products, "PIECE_ELEMENTS", 100)
    query, key, value = make_inputs(2, 4, 2, 2, 600, 16, dtype=dtype)
    key, value = key[:1], value[:1]
    lens = torch.tensor([600, 300])
    clean = flex_decode(query, key, value, kv_lens=lens)
    key[:, :, 450] = value[:, :, 450] = torch.nan
    out = check(query, key, value, kv_lens=lens)
    assert out[0].isnan().all() and torch.equal(out[1], clean[1])
