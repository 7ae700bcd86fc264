"""Random calls in a region that torch.compile traces give the bits that they give without it."""

import pytest
import torch

from flexdecode import flex_decode
from flexdecode.call.device import interpreting
from fuzz.generate import random_case
from fuzz.tensors import Inputs

SEEDS = 40


@pytest.mark.skipif(interpreting(), reason="the calls are on the torch backend: they run with the unit tests")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_random_call(seed):
    call = Inputs(random_case(seed, "torch")).call
    call.pop("out", None)
    torch._dynamo.reset()

    def run():
        return flex_decode(**call, return_lse=True)

    call.pop("return_lse", None)
    for found, expected in zip(torch.compile(run, fullgraph=True, backend="eager")(), run(), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
