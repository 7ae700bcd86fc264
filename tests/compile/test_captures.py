"""Captured values are run-time arguments of fixed types: no value of one makes another kernel."""

import sys

import pytest
import torch
from compile.compiling import DEVICES, FULL, compile_call, meta_inputs

from flexdecode.ops import DTYPES

SHAPE = (16, 16, 2, 1, 4096, 128)


def windowed(window, cap, bias):
    def score_mod(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / 30) + bias[h, kv_idx]

    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window

    return score_mod, mask_mod


def test_no_value_makes_another_kernel():
    """1, multiples of 16 and numbers from 2**31 on would each make one if Triton specialised them."""
    found = set()
    for window in (0, 1, 2, 16, 1 << 31, sys.maxsize, -1, -sys.maxsize - 1):
        for cap in (1.0, 16.0, -0.5):
            bias = torch.empty(16, 4096 + abs(window) % 32, device="meta")
            call = compile_call("sm_90", meta_inputs(*SHAPE), *windowed(window, cap, bias))
            found.add((call.spec, call.path, call.split.hash))
    assert len(found) == 1


def test_captures_have_the_types_i64_and_fp32():
    bias = torch.empty(16, 4096, dtype=torch.int16, device="meta").T.contiguous().T
    call = compile_call("sm_90", meta_inputs(*SHAPE), *windowed(1, 1.0, bias))
    assert call.spec.score_captures == ("fp32", "*i16", "i64", "i64", "i64", "i64")
    assert call.spec.mask_captures == ("i64",)
    signature = next(line for line in call.split.asm["ttir"].splitlines() if "tt.func public" in line)
    captured = [part for part in signature.split("%") if part.startswith(("score_captures", "mask_captures"))]
    assert len(captured) == 7, signature
    assert not any("divisibility" in part for part in captured)


def test_gathers_by_row_and_key_compile_for_amd():
    """Triton 3.6 cannot pipeline them there, and the kernel is compiled without a pipeline."""
    bias = torch.empty(16, 4096, device="meta")
    call = compile_call("gfx942", meta_inputs(*SHAPE), lambda score, b, h, q_idx, kv_idx: score + bias[h, kv_idx])
    assert call.split.metadata.num_stages in (1, call.spec.tiles.num_stages)


@pytest.mark.parametrize("device", DEVICES if FULL else ["sm_90", "gfx942"])
def test_captures_of_every_type_together(device):
    """Numbers and tensors of all dtypes and of ranks 1 to 4 in one tuple, beside an empty one."""
    tensors = [torch.empty((4096,) * (1 + i % 4), dtype=dtype, device="meta") for i, dtype in enumerate(DTYPES)]
    a, b_, on = 3, 0.5, torch.tensor(True)

    def score_mod(score, b, h, q_idx, kv_idx):
        for tensor in tensors:
            score = score + tensor[(kv_idx, h, b, q_idx)[: tensor.ndim]]
        return torch.where(on, score * b_ + a, score)

    call = compile_call(device, meta_inputs(*SHAPE), score_mod)
    assert len(call.spec.score_captures) == 3 + sum(1 + 2 * tensor.ndim for tensor in tensors)
    assert call.spec.mask_captures == ()
