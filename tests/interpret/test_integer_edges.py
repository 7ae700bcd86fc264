"""Integers where hardware and PyTorch part: shifts past the width, divisions by zero, negative powers, conversions."""

import pytest
import torch

from flexdecode import DecodeOptions, flex_decode

VALUES = torch.tensor([-(2**40), -100, -8, -1, 0, 1, 2, 3, 7, 200, 2**40])
TYPES = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]


def check(function, a, b):
    """Compares `function(a, b)` by both backends, for all pairs, with one operand per row and one per key."""
    a, b = (x.flatten() for x in torch.meshgrid(a, b, indexing="ij"))
    query, one = torch.zeros(1, 1, len(a), 16), torch.zeros(1, 1, 1, 16)
    mod = lambda s, batch, h, q, k: function(a[q], b[q + k]).to(torch.float32)
    run = lambda name: flex_decode(
        query, one, one, mod, q_offset=0, return_lse=True, options=DecodeOptions(backend=name, block_n=16)
    )[1].flatten()
    actual, expected = run("triton"), run("torch")
    wrong = (actual - expected).abs() > 1e-6 * expected.abs()
    assert not wrong.any(), list(zip(a[wrong].tolist(), b[wrong].tolist(), actual[wrong], expected[wrong], strict=True))


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_shifts_past_the_width(dtype):
    amounts = torch.tensor([0, 1, 7, 8, 15, 31, 32, 40, 63, 64, 100]).to(dtype)
    check(lambda a, b: a >> b, VALUES.to(dtype), amounts)
    check(lambda a, b: (a << b) % 1000, VALUES.to(dtype), amounts)
    if dtype.is_signed:
        check(lambda a, b: a >> b, VALUES.to(dtype), torch.tensor([-1, -5]).to(dtype))


@pytest.mark.parametrize("amount", [31, 32, 40, 63])
def test_positions_shift_past_32_bits(amount):
    """Positions fit into 32 bits, and would be shifted as such."""
    check(lambda a, b: (a + b) >> amount, torch.arange(5), torch.arange(5))
    query, key = torch.zeros(1, 1, 3, 16), torch.zeros(1, 1, 20, 16)
    mod = lambda s, b, h, q, k: s + (k >> amount) + ((q - k) >> amount)
    results = [flex_decode(query, key, key, mod, options=DecodeOptions(backend=name), return_lse=True) for name in ("triton", "torch")]  # fmt: skip # noqa: E501
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_divisions_by_zero_give_zero(dtype):
    divisors = torch.tensor([0, 1, 3, -3]).to(dtype)
    for function in (lambda a, b: a // b, lambda a, b: a % b, torch.fmod):
        check(lambda a, b, f=function: f(a, b) % 1000, VALUES.to(dtype), divisors)


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.int8])
def test_negative_powers(dtype):
    exponents = torch.tensor([-3, -2, -1, 0, 1, 2, 5]).to(dtype)
    check(lambda a, b: a**b, torch.tensor([-3, -2, -1, 0, 1, 2, 3]).to(dtype), exponents)
    check(lambda a, b: a**b, torch.tensor([-1, 0, 1]).to(dtype), torch.tensor([63, 64, 65, 100]).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_integers_become_half_types(dtype):
    check(lambda a, b: a.to(dtype) + b.to(dtype), torch.tensor([0, 1, 3, 257, 1000, -2049]), torch.tensor([0, 5]))
    check(lambda a, b: (a > b).to(dtype) * 3, torch.arange(3), torch.arange(3))


@pytest.mark.parametrize("number", [0.1, 3, -1e-3])
def test_captured_numbers_join_half_types_unrounded(number):
    check(lambda a, b: (a * 0.37).half() * number + b, torch.arange(5), torch.arange(2))
