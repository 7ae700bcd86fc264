"""Captured values are run-time arguments of fixed types: no value of one makes another kernel."""

import re
import sys

import pytest
import torch
from compile.compiling import DEVICES, FULL, assembly, compile_call, meta_inputs

from flexdecode import mods
from flexdecode.frontend.ops import DTYPES

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


# --- Loads that are proven in range -----------------------------------------------------------------------------------

B, HQ, _, _, N, _ = SHAPE
NVIDIA = pytest.mark.parametrize("device", ["sm_80", "sm_90"])


def predicates(call):
    """Of each load of one float32 from global memory, whether a predicate guards it; K, V and the query are half."""
    return [
        bool(guard) for guard in re.findall(r"^\s*(@!?%p\d+ +)?ld\.global\.b32\b", assembly(call.split), re.MULTILINE)
    ]


def compiled_gather(device, index, *shape, mask_mod=None, **arguments):
    """The kernel of a score_mod that adds `table[index(b, h, q, k)]`, with a float32 table of a shape."""
    table = torch.empty(shape, device="meta")
    score_mod = lambda s, b, h, q, k: s + table[index(b, h, q, k)]
    return compile_call(device, meta_inputs(*SHAPE), score_mod, mask_mod, **arguments)


GATHERS = {
    "head": (lambda b, h, q, k: h, (HQ,)),
    "key": (lambda b, h, q, k: (b, h, k), (B, HQ, N)),
    "clamped_distance": (lambda b, h, q, k: (h, (q - k).clamp(0, 99)), (HQ, 100)),
    "query": (lambda b, h, q, k: q + 1, (N + 1,)),
}


@NVIDIA
@pytest.mark.parametrize("name", GATHERS)
def test_a_proven_load_has_no_predicate(device, name):
    index, (*rows, last) = GATHERS[name]
    proven, checked = (compiled_gather(device, index, *rows, size) for size in (last, last - 1))
    assert predicates(proven) and not any(predicates(proven))
    assert predicates(checked) and all(predicates(checked))
    assert assembly(proven.split).count("setp") < assembly(checked.split).count("setp")


@NVIDIA
def test_an_index_that_counts_from_the_end_has_no_predicate_if_it_stays_inside(device):
    wraps, checked = (compiled_gather(device, lambda b, h, q, k: k - 7, size) for size in (N, N - 8))
    assert predicates(wraps) and not any(predicates(wraps))
    assert all(predicates(checked))


@NVIDIA
def test_a_load_that_the_mask_proves_has_its_predicate_only(device):
    """None where the mask is true for a whole block, and no comparison with a size anywhere."""
    by_mask, checked = (
        compiled_gather(device, lambda b, h, q, k: (h, q - k), HQ, size, mask_mod=mods.sliding_window(1024))
        for size in (1024, 1023)
    )
    assert {True, False} == set(predicates(by_mask)), "partial blocks, and full ones"
    assert predicates(checked) and all(predicates(checked))
    assert assembly(by_mask.split).count("setp") < assembly(checked.split).count("setp")


def test_sizes_that_prove_as_much_share_a_kernel():
    """Another kernel for another outcome, not for another size."""
    sizes = (N, N + 1, 2 * N, N - 1, N - 100, 1)
    calls = [compiled_gather("sm_90", lambda b, h, q, k: k, size) for size in sizes]
    assert len({call.path for call in calls[:3]}) == len({call.path for call in calls[3:]}) == 1
    assert calls[0].path != calls[3].path


def test_windows_that_prove_as_much_share_a_kernel():
    index = lambda b, h, q, k: q - k
    calls = [compiled_gather("sm_90", index, 64, mask_mod=mods.sliding_window(w)) for w in (1, 63, 64, 65, 2**62)]
    assert len({call.path for call in calls[:3]}) == len({call.path for call in calls[3:]}) == 1
    assert calls[0].path != calls[3].path
