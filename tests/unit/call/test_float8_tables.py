"""Captured float8 tensors widen to float32 when they are read (the torch backend, and what is refused)."""

import pytest
import torch
from float8_tables import FLOAT8, as_scores, finite_numbers, of_scalars
from support import assert_close_to_reference, make_inputs, trace_mod

from flexdecode import UnsupportedOpError, flex_decode


@pytest.mark.parametrize("make", [as_scores, of_scalars])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_number(dtype, make):
    table = finite_numbers(FLOAT8[dtype])
    inputs = make_inputs(1, 4, 2, 1, len(table), 16)
    out, lse = flex_decode(*inputs, make(table), return_lse=True)
    assert_close_to_reference(out, lse, *inputs, make(table))
    assert torch.equal(out, flex_decode(*inputs, make(table.float())))


def test_a_number_of_no_dimension():
    scale, inputs = torch.tensor(0.5).to(torch.float8_e4m3fn), make_inputs(1, 4, 2, 1, 20, 16)
    mod = lambda score, b, h, q_idx, kv_idx: score * scale
    assert_close_to_reference(flex_decode(*inputs, mod), None, *inputs, mod)


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.complex64])
def test_other_types_are_refused(dtype):
    table = torch.zeros(4).to(dtype)
    with pytest.raises(UnsupportedOpError, match=f"a captured tensor of {dtype} cannot be read in a score_mod"):
        trace_mod(lambda score, b, h, q_idx, kv_idx: score + table[h])
