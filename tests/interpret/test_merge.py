"""The kernel that merges attention over parts of the keys."""

import pytest
import torch
from unit.kv import test_merge as cases

from flexdecode.kv import merge
from flexdecode.kv.merge import merge_attention


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Counts the launches, and makes a test fail whose calls launched nothing."""
    made = []

    def launch(outs, lses, dtype, original=merge._launch):
        made.append(len(outs))
        return original(outs, lses, dtype)

    monkeypatch.setattr(merge, "_launch", launch)
    yield made
    assert made


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("cuts", cases.CUTS.values(), ids=cases.CUTS)
def test_parts_make_the_whole(cuts, dtype):
    cases.check_parts_make_the_whole(cuts, dtype, "cpu")


@pytest.mark.parametrize("place", [0, 2])
def test_a_sink_of_one_part(place):
    cases.check_a_sink_of_one_part(place, "cpu")


@pytest.mark.parametrize("dtype", cases.DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 8, 9, 17])
def test_numbers(num_parts, dtype):
    cases.check_numbers(num_parts, 20, dtype, "cpu")


@pytest.mark.parametrize("v_head_dim", [1, 16, 128, 300])
def test_head_dims(v_head_dim):
    cases.check_numbers(3, v_head_dim, torch.float16, "cpu")


@pytest.mark.parametrize("num_parts", [3, 10])
@pytest.mark.parametrize("layout", cases.LAYOUTS)
def test_layouts(layout, num_parts):
    cases.check_layouts(layout, num_parts, "cpu")


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize(("layout", "num_parts", "v_head_dim"), cases.PACKED)
def test_packed(layout, num_parts, v_head_dim, dtype):
    cases.check_packed(layout, num_parts, v_head_dim, dtype, "cpu")


def test_special_values():
    cases.check_special_values("cpu")


def test_magnitudes():
    cases.check_magnitudes("cpu")


@pytest.mark.parametrize(("num_parts", "expected"), [(8, [8]), (9, [8, 2]), (17, [8, 8, 3])])
def test_rounds(num_parts, expected, launches):
    merge_attention(*cases.random_parts(num_parts, (1, 2, 1, 16)))
    assert launches == expected


def test_parts_of_one_layout_are_not_copied(monkeypatch):
    outs, lses = (cases.in_layout(x.unbind(0), "bmhd") for x in cases.random_parts(3, (2, 4, 3, 16)))
    monkeypatch.setattr(torch.Tensor, "contiguous", None)
    merge_attention(outs, lses)
