"""The torch backend and the reference: keys that no row attends to may hold anything."""

import pytest
import torch
from dead_keys import CACHES, MASKS, make_call
from support import assert_close_to_reference

from flexdecode import DecodeOptions, flex_decode
from flexdecode.reference import reference_decode

TORCH = DecodeOptions(backend="torch")


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("mask", MASKS)
def test_what_nobody_attends_to_does_not_matter(mask, cache, num_queries):
    clean, spoiled = make_call(mask, cache, num_queries)
    out, lse = flex_decode(**spoiled, return_lse=True, options=TORCH)
    assert_close_to_reference(out, lse, **spoiled)
    assert torch.equal(out, flex_decode(**clean, options=TORCH))
    assert torch.equal(reference_decode(**spoiled), reference_decode(**clean))
    assert out.isfinite().all()


def test_a_key_that_another_row_attends_to_is_read():
    """Only then, and the docs say so: it has to be finite."""
    query, key = torch.randn(1, 2, 1, 16), torch.randn(1, 1, 8, 16)
    key[..., 5, :] = torch.nan
    out = flex_decode(query, key, key, mask_mod=lambda b, h, q, k: (h == 0) | (k < 5), options=TORCH)
    assert out.isnan().all(-1).tolist() == [[[True], [True]]]


def test_an_entry_that_names_no_page_is_refused_where_the_host_sees_it():
    _, call = make_call("window", "pages of 16")
    table = call["page_table"]
    table[0, -1] = -1
    with pytest.raises(ValueError, match="`page_table` names page -1 within a sequence, but `key` has"):
        flex_decode(**call, options=TORCH)
