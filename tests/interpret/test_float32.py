"""Float32 products on tensor cores that ignore the last 13 bits, and weights that are summed at the end."""

import dataclasses

import numpy
import pytest
import torch
from interpret.decoding import check_decode
from support import make_inputs
from triton.runtime.interpreter import InterpreterBuilder

from flexdecode import mods
from flexdecode.codegen import compile as compiling
from flexdecode.codegen.kernels import forget_kernels

TF32 = numpy.uint32(0xFFFFE000)


@pytest.fixture
def products(monkeypatch):
    """Lets the interpreter's products of float32 numbers see what tensor cores see; gives the number of products."""
    dot, seen = InterpreterBuilder.create_dot, []

    def cut(self, a, b, *others):
        if a.data.dtype == numpy.float32:
            seen.append(a.data.shape)
            a, b = (dataclasses.replace(x, data=(x.data.view(numpy.uint32) & TF32).view(numpy.float32)) for x in (a, b))
        return dot(self, a, b, *others)

    monkeypatch.setattr(InterpreterBuilder, "create_dot", cut)
    return seen


@pytest.mark.parametrize(("mean", "deviation"), [(0, 1), (100, 30), (1000, 300), (-1e6, 1.0)])
@pytest.mark.parametrize("head_dim", [16, 64, 96])
def test_products_are_as_exact_as_float32(head_dim, mean, deviation, products):
    """Values of one sign show whether what a product leaves out has a sign."""
    query, key, value = make_inputs(2, 8, 2, 1, 300, head_dim)
    check_decode(query, key, mean + deviation * value, block_n=64)
    check_decode(query, 3 + key, mean + deviation * value, block_n=64, num_splits=2)
    check_decode(100 * query, 100 * key, value, block_n=64)
    assert products


@pytest.fixture
def late(monkeypatch):
    """Sums the weights of all kernels late, as some kernels for GPUs do."""
    forget_kernels()
    monkeypatch.setattr(compiling, "_sums_late", lambda *_: True)
    yield
    forget_kernels()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_weights_are_summed_at_the_end(dtype, num_splits, late):
    """With rows without a key, sinks, scales of each token, and a mask that empties whole blocks."""
    query, key, value = make_inputs(3, 4, 2, 2, 100, 16, dtype=dtype)
    arguments = {"kv_lens": torch.tensor([100, 37, 0]), "num_splits": num_splits, "sinks": torch.rand(4)}
    check_decode(query, key, value, mods.softcap(2.0), mods.sliding_window(20), **arguments)
    scales = torch.rand(2, 3, 2, 100) + 0.1
    key, value = (x.mul(20).round().clamp(-127, 127).to(torch.int8) for x in (key, value))
    check_decode(query, key, value, mods.alibi(4), **arguments, k_scale=scales[0] / 20, v_scale=scales[1] / 20)
