"""Outputs that lie over themselves or over an input are refused, and no other ones."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_close_to_reference, make_inputs

from flexdecode import flex_decode
from flexdecode.call.overlap import extent, overlaps_itself, share_memory

QUERY, KEY, VALUE = make_inputs(2, 4, 2, 3, 20, 16)


def bytes_of(tensor):
    """Addresses of all bytes, one by one."""
    places = torch.zeros(1, dtype=torch.int64)
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        places = (places[:, None] + torch.arange(size) * stride).flatten()
    starts = tensor.data_ptr() + places * tensor.element_size()
    return [start + byte for start in starts.tolist() for byte in range(tensor.element_size())]


@st.composite
def views(draw, storage):
    rank = draw(st.integers(0, 4))
    shape = draw(st.lists(st.integers(0, 4), min_size=rank, max_size=rank))
    strides = draw(st.lists(st.integers(0, 12), min_size=rank, max_size=rank))
    typed = storage.view(draw(st.sampled_from([torch.int8, torch.int16, torch.int32])))
    return typed.as_strided(shape, strides, draw(st.integers(0, 40)))


@settings(max_examples=1000)
@given(st.data())
def test_random_views(data):
    storage = torch.zeros(1024, dtype=torch.int8)
    one, other = data.draw(views(storage)), data.draw(views(storage))
    places = bytes_of(one)
    assert overlaps_itself(one) == (len(set(places)) < len(places))
    assert share_memory(one, other) == share_memory(other, one) == bool({*places} & {*bytes_of(other)})
    assert extent(one) == (max(places) + 1 - one.data_ptr() if places else 0)


# --- Calls ------------------------------------------------------------------------------------------------------------


def refused(message, **arguments):
    """Twice, since the second call is known."""
    for _ in range(2):
        with pytest.raises(ValueError) as caught:
            flex_decode(**({"query": QUERY, "key": KEY, "value": VALUE} | arguments))
        assert str(caught.value) == message


def test_an_out_over_itself():
    form = "`out` must have a place of its own for each element, got strides {} for shape [2, 4, 3, 16]"
    expanded = torch.zeros(2, 4, 1, 16).expand(2, 4, 3, 16)
    refused(form.format([64, 16, 0, 1]), out=expanded)
    sliding = torch.zeros(1000).as_strided((2, 4, 3, 16), (192, 48, 8, 1))
    refused(form.format([192, 48, 8, 1]), out=sliding)


def test_an_out_over_an_input():
    message = "`out` must not share memory with `{0}`: it is written while `{0}` is read"
    refused(message.format("query"), query=(query := QUERY.clone()), out=query)
    storage = torch.zeros(2000)
    refused(message.format("key"), key=storage[: KEY.numel()].view_as(KEY), out=storage[8:392].view_as(QUERY))
    refused(
        message.format("value"),
        value=storage[300 : 300 + VALUE.numel()].view_as(VALUE),
        out=storage[:384].view_as(QUERY),
    )
    for name, given_as in (("kv_lens", torch.int64), ("q_lens", torch.int32), ("q_offset", torch.int64)):
        storage = torch.zeros(400)
        lens = storage[100:104].view(given_as)[:2]
        refused(message.format(name), **{name: lens}, out=storage[:384].view_as(QUERY))
    storage = torch.zeros(400)
    refused(message.format("sinks"), sinks=storage[380:384], out=storage[:384].view_as(QUERY))
    pages = torch.zeros(400)
    table = pages[:10].view(torch.int32).view(2, 5)
    paged = {"key": KEY[:, :, :4], "value": VALUE[:, :, :4], "kv_lens": torch.tensor([3, 3]), "page_table": table}
    refused(message.format("page_table"), **paged, out=pages[:384].view_as(QUERY))


def test_an_address_is_looked_at_in_every_call():
    """A known plan, and another `out` of the same layout."""
    storage = torch.zeros(3000)
    query = storage[1000:1384].view_as(QUERY).copy_(QUERY)
    flex_decode(query, KEY, VALUE, out=storage[:384].view_as(QUERY))
    for start in (1000, 1016, 632):
        with pytest.raises(ValueError, match="`out` must not share memory with `query`"):
            flex_decode(query, KEY, VALUE, out=storage[start : start + 384].view_as(QUERY))
    flex_decode(query, KEY, VALUE, out=storage[616:1000].view_as(QUERY))
    flex_decode(query, KEY, VALUE, out=storage[1384:1768].view_as(QUERY))


def test_interleaved_slices_are_fine():
    """A query and its output in the columns, heads or tokens of one tensor."""
    for dim in range(4):
        shape = list(QUERY.shape)
        shape[dim] *= 2
        both = torch.zeros(shape)
        query, out = both.chunk(2, dim)
        query.copy_(QUERY)
        for _ in range(2):
            result, lse = flex_decode(query, KEY, VALUE, out=out, return_lse=True)
            assert result is out
            assert_close_to_reference(out, lse, QUERY, KEY, VALUE)
        assert torch.equal(query, QUERY)


def test_a_tensor_that_a_mod_captures():
    out = torch.randn(QUERY.shape)
    message = "`out` must not share memory with a tensor that {} captures: it is written while that is read"
    for kind, mod in (
        ("score_mod", lambda score, b, h, q_idx, kv_idx: score * out[0, 0, 0, 0]),
        ("mask_mod", lambda b, h, q_idx, kv_idx: out[0, 0, 0, kv_idx % 4] < 9.0),
    ):
        with pytest.raises(ValueError, match=message.format(kind)):
            flex_decode(QUERY, KEY, VALUE, **{kind: mod}, out=out)
        flex_decode(QUERY, KEY, VALUE, **{kind: mod}, out=torch.empty_like(out))
