"""vLLM's caches through the generated kernels: three orders in memory, rows of no sequence, float8 as bytes."""

import pytest
import server_steps as steps
import torch

from flexdecode import DecodeOptions

TRITON = DecodeOptions(backend="triton")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("order", steps.ORDERS)
def test_orders(order, dtype):
    steps.check_turns(order, dtype, "cpu", TRITON)


@pytest.mark.parametrize("quantised", steps.DTYPES)
@pytest.mark.parametrize("order", ["LBHNC", "LBNHC"])
def test_float8_as_bytes(order, quantised):
    steps.check_turns(order, torch.float32, "cpu", TRITON, quantised)
