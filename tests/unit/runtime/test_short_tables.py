"""A table with too few entries for the heads or sequences of a call gives a warning, once."""

import warnings

import pytest
import torch

from flexdecode import DecodeOptions, clear_cache, flex_decode, mods
from flexdecode.call.device import KNOWN_DEVICES
from flexdecode.call.signature import NO_AUX
from flexdecode.runtime import ahead
from flexdecode.runtime.prepare import Target
from flexdecode.runtime.request import Inputs, read_request

H200, _ = KNOWN_DEVICES["H200"]
QUERY = torch.zeros(2, 16, 1, 16)
KEY = torch.zeros(2, 2, 128, 16)


@pytest.fixture(autouse=True)
def _forget():
    clear_cache()


def warned(*args, **named):
    """The texts of the warnings of a call."""
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        flex_decode(*args, **named)
    return [str(w.message) for w in found]


def by_head(rows):
    table = torch.ones(rows, 65)
    return lambda score, b, h, q_idx, kv_idx: score + table[h, torch.clamp(q_idx - kv_idx, 0, 64)]


def test_a_table_that_is_shorter_than_the_heads():
    assert warned(QUERY, KEY, KEY, by_head(8)) == [
        "score_mod: `table` has 8 entries in dimension 0, which is indexed by `h` from 0 to 15; reads out of range "
        "give 0. Make it longer, or guard the read with torch.where."
    ]
    assert warned(QUERY, KEY, KEY, by_head(16)) == []


def test_the_warning_shows_the_line_of_the_call():
    with pytest.warns(RuntimeWarning, match="indexed by `h`") as found:
        flex_decode(QUERY, KEY, KEY, by_head(1))
    assert found[0].filename == __file__
    assert "`table` has 1 entry" in str(found[0].message)


def test_a_table_that_is_shorter_than_the_batch():
    lengths = torch.ones(1)
    (text,) = warned(QUERY, KEY, KEY, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx < lengths[b])
    assert text.startswith("mask_mod: `lengths` has 1 entry in dimension 0, which is indexed by `b` from 0 to 1;")


def test_the_same_mod_warns_once():
    mod = by_head(8)
    assert len(warned(QUERY, KEY, KEY, mod)) == 1
    assert warned(QUERY, KEY, KEY, mod) == []
    assert warned(QUERY, KEY[:, :, :100], KEY[:, :, :100], mod) == []  # another length shares what is prepared


def test_a_table_that_becomes_shorter():
    class Bias:
        table = torch.ones(16)

        def __call__(self, score, b, h, q_idx, kv_idx):
            return score + self.table[h]

    bias = Bias()
    assert warned(QUERY, KEY, KEY, bias) == []
    bias.table = torch.ones(12)
    (text,) = warned(QUERY, KEY, KEY, bias)
    assert "12 entries" in text


@pytest.mark.parametrize(
    "guard",
    [
        lambda score, bias, h: torch.where(h < 8, score + bias, score),
        lambda score, bias, h: score + torch.where(h < 8, bias, 1.0),
        lambda score, bias, h: torch.where((h < 8) & (bias > 0), score, 0.0),
    ],
)
def test_a_guarded_read_is_not_warned_of(guard):
    table = torch.ones(8)
    assert warned(QUERY, KEY, KEY, lambda score, b, h, q_idx, kv_idx: guard(score, table[h], h)) == []


def test_a_computed_index_is_not_warned_of():
    table = torch.ones(2)
    assert warned(QUERY, KEY, KEY, lambda score, b, h, q_idx, kv_idx: score + table[h // 8]) == []
    assert warned(QUERY, KEY, KEY, lambda score, b, h, q_idx, kv_idx: score + table[h % 2], mods.causal()) == []


def test_a_read_beside_a_guarded_one():
    table = torch.ones(8)
    (text,) = warned(
        QUERY, KEY, KEY, lambda score, b, h, q_idx, kv_idx: torch.where(h < 8, table[h], 0.0) + score * table[h]
    )
    assert "`table`" in text


def test_kernels_for_another_device():
    request = read_request(Inputs(QUERY.to("meta"), KEY.to("meta"), KEY.to("meta")), by_head(8))
    target = Target(H200, lambda *_: None, lambda *_: None)
    with pytest.warns(RuntimeWarning, match="`table` has 8 entries"):
        ahead._prepare_shapes(request, NO_AUX, DecodeOptions(backend="triton"), target)
