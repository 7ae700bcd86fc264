"""Captured tensors and numbers through the generated kernel: every type, odd strides, read at call time."""

import contextvars
import sys
import threading
from collections import deque

import numpy as np
import pytest
import torch
from interpret.decoding import check_decode, decode
from support import make_inputs

import flexdecode
from flexdecode.frontend.ops import DTYPES

B, HQ, HKV, Q, N, D = 2, 4, 2, 2, 37, 16
WITHOUT_BFLOAT16 = [d for d in DTYPES if d != torch.bfloat16]  # whose bits the interpreter cannot convert


def inputs():
    return make_inputs(B, HQ, HKV, Q, N, D)


def numbers(*shape, dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    if dtype == torch.bool:
        return torch.rand(shape, generator=generator) < 0.5
    if dtype.is_floating_point:
        return torch.randn(shape, generator=generator).to(dtype)
    return torch.randint(0, 5, shape, generator=generator).to(dtype)


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "transposed": lambda x: x.mT.contiguous().mT,
    "every_third": lambda x: x.new_zeros(x.shape[0] + 2, 3 * x.shape[1] + 1)[1:-1, 1::3].copy_(x),
    "expanded": lambda x: x[:, :1].expand_as(x),
    "one_row": lambda x: x[:1].expand_as(x),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", WITHOUT_BFLOAT16, ids=str)
def test_captured_tensors(dtype, layout):
    bias = LAYOUTS[layout](numbers(HQ, N, dtype=dtype))

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[h, kv_idx]

    check_decode(*inputs(), score_mod)


@pytest.mark.parametrize("dtype", WITHOUT_BFLOAT16, ids=str)
def test_captured_0d_tensors(dtype):
    number = numbers(1, dtype=dtype)[0]

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx < q_idx, score + number, score)

    check_decode(*inputs(), score_mod)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8, torch.int64], ids=str)
def test_captured_tensors_in_a_mask(dtype):
    table = numbers(B, N, dtype=dtype).mT.contiguous().mT

    def mask_mod(b, h, q_idx, kv_idx):
        return (table[b, kv_idx] != 0) | (kv_idx == 0)

    check_decode(*inputs(), mask_mod=mask_mod)


@pytest.mark.parametrize("rank", [1, 2, 3, 4])
def test_ranks(rank):
    """One row of many dimensions; the first ones are indexed one at a time."""
    shape = (B, HQ, N, N)[4 - rank :]
    bias = numbers(*shape).movedim(0, -1).contiguous().movedim(-1, 0)

    def score_mod(score, b, h, q_idx, kv_idx):
        row = bias
        for index in (b, h, q_idx)[4 - rank :]:
            row = row[index]
        return score + row[kv_idx]

    check_decode(*inputs(), score_mod)


def test_empty_and_short_tensors_read_zero():
    empty, short = torch.empty(0), torch.ones(3, 2)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + empty[kv_idx] + short[kv_idx, h] + short[kv_idx - q_idx, -1] + short[0, 1]

    check_decode(*inputs(), score_mod)


def test_views_inside_a_mod():
    table = numbers(2, N + 3, HQ)

    def score_mod(score, b, h, q_idx, kv_idx):
        shifted = table[1, 3:].transpose(0, 1)
        return score + shifted[h][kv_idx] + table[:, ::2, 1][b, kv_idx // 2] * table.exp()[0, -1, h]

    check_decode(*inputs(), score_mod)


def test_sizes_of_captured_tensors_are_read_at_call_time():
    flexdecode.clear_cache()
    for length in (5, 9, 40):
        table = numbers(length)

        def score_mod(score, b, h, q_idx, kv_idx, table=table):
            return score + table[torch.clamp(kv_idx, max=table.shape[0] - 1)]

        check_decode(*inputs(), score_mod)
    assert flexdecode.cache_info().compilations == 1


def test_indices_beyond_32_bits():
    """An index that wraps around at 32 bits would be in range."""
    table = numbers(N)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + table[kv_idx + 2**32] + table[(kv_idx + 2**40) % 2**40]

    check_decode(*inputs(), score_mod)


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("window", [0, 1, 16, 2**31, 2**31 - 1, -(2**31) - 1, sys.maxsize, -sys.maxsize - 1])
def test_captured_integers_of_any_size(window):
    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window

    check_decode(*inputs(), mask_mod=mask_mod)


@pytest.mark.parametrize("number", [0.0, -1.5, 1e30, float("-inf"), float("inf"), float("nan")])
def test_captured_floats_of_any_size(number):
    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where(kv_idx == 3, number, score)

    check_decode(*inputs(), score_mod)


def test_new_values_are_seen_without_a_new_kernel():
    """Numbers and tensors, in a closure cell and written in place."""
    window, cap, bias = 5, 2.0, numbers(HQ)

    def score_mod(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / 2) + bias[h] * (kv_idx - q_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window

    check_decode(*inputs(), score_mod, mask_mod)
    before = flexdecode.cache_info().compilations
    window, cap = 2**40, 7.5
    check_decode(*inputs(), score_mod, mask_mod)
    bias.mul_(-3)
    check_decode(*inputs(), score_mod, mask_mod)
    bias = numbers(HQ, 2)[:, 0]
    check_decode(*inputs(), score_mod, mask_mod)
    assert flexdecode.cache_info().compilations == before


def test_both_mods_have_captures_of_their_own():
    a, b_, c = numbers(HQ), numbers(N), numbers(B, N, dtype=torch.bool)
    shift, limit = 0.5, 30

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * shift + a[h] + b_[kv_idx]

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx < limit) & (c[b, kv_idx] | (kv_idx < shift))

    check_decode(*inputs(), score_mod, mask_mod, num_splits=3)


def test_same_graph_from_another_function_gives_the_same_bits():
    slopes = numbers(HQ)
    first = decode(*inputs(), lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx))
    again = decode(*inputs(), lambda s, b, head, q, k: s - slopes[head] * (q - k))
    assert torch.equal(first[0], again[0])


# --- Host state -------------------------------------------------------------------------------------------------------


def test_numbers_in_other_containers():
    """Each changes; one kernel for all values."""
    var, ring, layers = contextvars.ContextVar("slope"), deque([0.5, 1.0], maxlen=2), [0.1 * i for i in range(80)]
    local, table = threading.local(), np.arange(3, dtype=np.float32)

    def score_mod(score, b, h, q_idx, kv_idx):
        bias = layers[7] * (q_idx - kv_idx) + ring[-1] * h + local.shift
        return score * var.get() + bias * table[1]

    flexdecode.clear_cache()
    for step in (1.0, -0.5, 2.0):
        var.set(step)
        ring.append(step + 1)
        layers[7] = local.shift = 0.25 * step
        table[1] = step
        check_decode(*inputs(), score_mod)
    info = flexdecode.cache_info()
    assert (info.traces, info.compilations) == (1, 1)


def test_layers_share_a_kernel():
    slopes, tables = (
        [0.1 * i for i in range(80)],
        [torch.randn(HQ, generator=torch.Generator().manual_seed(i)) for i in range(80)],
    )
    flexdecode.clear_cache()
    for layer in (3, 70):
        check_decode(*inputs(), lambda score, b, h, q_idx, kv_idx: score + slopes[layer] * kv_idx + tables[layer][h])
    info = flexdecode.cache_info()
    assert (info.traces, info.compilations) == (2, 1)
