"""Captured float8 tensors in the generated kernel, which computes their numbers from their bits."""

import pytest
from float8_tables import FLOAT8, as_scores, finite_numbers, of_scalars
from interpret.decoding import check_decode
from support import make_inputs


@pytest.mark.parametrize("make", [as_scores, of_scalars])
@pytest.mark.parametrize("dtype", FLOAT8)
def test_every_number(dtype, make):
    table = finite_numbers(FLOAT8[dtype])
    check_decode(*make_inputs(1, 4, 2, 1, len(table), 16), make(table), block_n=64)
