"""float64 stays float64 in the generated kernel."""

import pytest
from interpret.decoding import check_decode
from support import make_inputs
from unit.test_float64 import MODS, NOW, TIMES


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.__name__)
def test_the_kernel_computes_in_float64(mod):
    check_decode(*make_inputs(2, 2, 1, 2, 48, 16), mod)


def test_masks_and_bounds_of_float64():
    inputs = make_inputs(2, 2, 1, 1, 48, 16)
    check_decode(*inputs, mask_mod=lambda b, h, q_idx, kv_idx: TIMES[b, kv_idx] - NOW < 5.5)
    check_decode(*inputs, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx <= (TIMES[b, h] - NOW).long() + 20)
