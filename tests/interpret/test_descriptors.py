"""KV loads through tensor descriptors, which the interpreter has too: where a head lies, and what is read past it."""

import sys
from functools import partial

import pytest
import torch
from cache_cases import Pages
from interpret.decoding import check_decode, decode
from memory_cases import fenced
from support import assert_close_to_reference, make_inputs

import flexdecode
from flexdecode.call.descriptor import as_matrices
from flexdecode.call.device import DeviceFacts
from flexdecode.call.signature import kernel_strides
from flexdecode.codegen import kernels

B, HQ, HKV, Q, N, D = 3, 4, 2, 2, 37, 16
DTYPE = torch.float16


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Makes the interpreted kernels load by descriptors; gives the list of launches that did."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    seen = []
    plain_pass = kernels._pass

    def with_descriptors(module, spec, facts, combine):
        run = plain_pass(module, spec, facts, combine)
        if combine or not spec.tiles.descriptors:
            return run

        def launch(grid, stream, arguments):
            query, key, value, _, _, *rest = arguments
            owners = partial(spec.signature.format.owners, query.shape[0])
            descriptors = [
                TensorDescriptor(cache, [matrix.rows, matrix.columns], [matrix.pitch, 1], [spec.tiles.block_n, width])
                for cache, matrix, width in zip(
                    (key, value),
                    as_matrices(key, value, *(kernel_strides(cache, owners(cache)) for cache in (key, value))),
                    (spec.tiles.block_d, spec.tiles.block_dv),
                    strict=True,
                )
            ]
            seen.append(grid)
            run(grid, stream, (query, key, value, *descriptors, *rest))

        return launch

    monkeypatch.setattr(DeviceFacts, "has_descriptors", property(lambda facts: True))
    monkeypatch.setattr(kernels, "_pass", with_descriptors)
    flexdecode.clear_cache()
    yield seen
    flexdecode.clear_cache()


def heads_of_a_larger_cache(x):
    """The heads from 1 on of twice as many, two columns of tokens apart."""
    b, h, n, d = x.shape
    return x.new_full((b, 2 * h + 1, n + 5, 2 * d), torch.nan)[:, 1 : h + 1, :n, d:].copy_(x)


CACHES = {
    "bhnd": lambda x: x.contiguous(),
    "bnhd": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "nbhd": lambda x: x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3),
    "hbnd": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "heads_of_a_larger_cache": heads_of_a_larger_cache,
    "one_for_all_sequences": lambda x: x[:1],
    "expanded": lambda x: x[:1].expand_as(x),
}


def position_score(score, b, h, q_idx, kv_idx):
    return score + torch.sin(0.7 * b + 1.3 * h + 2.1 * q_idx + 3.7 * kv_idx)


@pytest.mark.parametrize("kv_lens", [None, torch.tensor([37, 0, 18])], ids=["full", "ragged"])
@pytest.mark.parametrize("cache", CACHES)
def test_caches(cache, kv_lens, launches):
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D, 2 * D, dtype=DTYPE)
    key, value = CACHES[cache](key), CACHES[cache](value)
    check_decode(query, key, value, position_score, num_splits=2, kv_lens=kv_lens)
    assert len(launches) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(("columns", "v_columns"), [(24, 40), (80, 16), (32, 24)])
def test_heads_with_fewer_columns_than_a_box(columns, v_columns, dtype, launches):
    """They are alone in their rows, and past the last column of a matrix the copy engine gives zeros."""
    query, key, value = make_inputs(B, HQ, HKV, Q, 150, columns, v_columns, dtype=dtype)
    kv_lens = torch.tensor([150, 0, 130])
    for b, length in enumerate(kv_lens):
        key[b, :, length:] = torch.nan
        value[b, :, length:] = torch.nan
    check_decode(query, key, value, position_score, num_splits=2, kv_lens=kv_lens)
    assert len(launches) == 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("columns", [32, 24])
@pytest.mark.parametrize("page_size", [64, 128])
def test_pages(page_size, columns, dtype, launches):
    """Free pages and the rest of the last page hold NaN, and the table names no page past the end."""
    query, key, value = make_inputs(B, HQ, HKV, Q, 300, columns, dtype=dtype)
    lengths = [300, 0, 141]
    pages = Pages(lengths, page_size, dead=(-1,))
    key_pages, value_pages = (pages.place(x) for x in (key, value))
    kv_lens = torch.tensor(lengths)
    found = decode(query, key_pages, value_pages, position_score, num_splits=2, kv_lens=kv_lens, page_table=pages.table)
    assert_close_to_reference(*found, query, key, value, position_score, kv_lens=kv_lens)
    assert len(launches) == 1


@pytest.mark.parametrize(("first", "last"), [(0, 17), (8, 32), (16, 40)])
def test_columns_of_a_larger_cache(first, last, launches):
    """The other columns are in no matrix, so it does not matter what they hold."""
    query, key, value = make_inputs(B, HQ, HKV, Q, N, last - first, dtype=DTYPE)
    key, value = (x.new_full((*x.shape[:3], 64), torch.nan)[..., first:last].copy_(x) for x in (key, value))
    check_decode(query, key, value, position_score, num_splits=2)
    assert len(launches) == 1


def test_key_and_value_interleaved_in_one_tensor(launches):
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D, dtype=DTYPE)
    cache = torch.stack([key, value], dim=2)
    check_decode(query, cache[:, :, 0], cache[:, :, 1], position_score)
    assert len(launches) == 1


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_past_the_length_is_not_seen(num_splits, launches):
    """A block also reads the rows of other heads and of other sequences."""
    query, key, value = make_inputs(B, HQ, HKV, Q, N, D, layout="bnhd", dtype=DTYPE)
    kv_lens = torch.tensor([21, 0, 36])
    for b, length in enumerate(kv_lens):
        key[b, :, length:] = torch.nan
        value[b, :, length:] = torch.nan
    check_decode(query, key, value, num_splits=num_splits, kv_lens=kv_lens)
    assert len(launches) == 1


@pytest.mark.parametrize("num_splits", [1, 3])
def test_nan_in_the_row_after_the_last_live_one_is_not_seen(num_splits, launches):
    """A tile may have more columns than a row. Where values are keys, those of the next row are no part of a score."""
    query, key, _ = make_inputs(B, HQ, HKV, 1, N, D, dtype=DTYPE)
    kv_lens = torch.tensor([21, 0, 36])
    for b, length in enumerate(kv_lens):
        key[b, :, length:] = torch.nan
    check_decode(query, key, key, num_splits=num_splits, kv_lens=kv_lens)
    assert len(launches) == 1


def test_nan_in_the_same_row_of_another_head_is_not_seen(launches):
    """Where heads lie side by side, the columns past a row are those of the next head, whose key may be dead."""
    query, key, _ = make_inputs(1, HQ, HKV, 1, 300, D, layout="bnhd", dtype=DTYPE)
    limits = torch.tensor([300, 300, 10, 10])
    key[:, 1, 10:] = torch.nan
    check_decode(query, key, key, None, lambda b, h, q_idx, kv_idx: kv_idx < limits[h])
    assert len(launches) == 1


@pytest.mark.skipif(sys.platform != "linux", reason="protects pages of memory by mprotect")
@pytest.mark.parametrize(("rows", "columns"), [(4, 16), (24, 32), (4, 24)])
def test_nothing_past_the_last_column_of_a_cache_is_read(rows, columns, launches):
    """The tile of values has more columns than a row, and past the last row lies memory that kills the process."""
    query, key, value = (fenced(x, "cpu") for x in make_inputs(1, rows, 1, 1, N, columns, dtype=DTYPE))
    check_decode(query, key, value)
    assert len(launches) == 1


UNFIT = {
    "odd head dim": lambda key, value: (key[..., :17].contiguous(), value),
    "fewer columns than a box, beside other heads": lambda key, value: (
        key[..., :24].transpose(1, 2).contiguous().transpose(1, 2),
        value,
    ),
    "odd address": lambda key, value: (key.flatten()[1:].as_strided(key.shape, key.stride()), value),
    "odd pitch": lambda key, value: (key, value.new_empty(*value.shape[:3], 33)[..., :32].copy_(value)),
    "strided columns": lambda key, value: (key, value.mT.contiguous().mT),
    "heads inside one another": lambda key, value: (key.as_strided(key.shape, (*key.stride()[:2], 16, 1)), value),
}


@pytest.mark.parametrize("cache", UNFIT)
def test_caches_without_a_descriptor_are_read_by_pointers(cache, launches):
    query, key, value = make_inputs(B, HQ, HKV, Q, N, 32, dtype=DTYPE)
    room = torch.zeros(key.numel() + 1, dtype=DTYPE)
    room[:-1] = key.flatten()
    key, value = UNFIT[cache](room[:-1].view_as(key), value)
    check_decode(query[..., : key.shape[3]], key, value)
    assert not launches
