"""The kernels that write into caches on every device: they compile, do not spill, and move 16 bytes at a time."""

import re

import pytest
import torch
from compile.compiling import DEVICES, assembly, resources

from flexdecode.codegen.arguments import TYPE_NAMES
from flexdecode.kv.launching import compile_kernel, largest

BF16, FP32, INT8, E4M3, E5M2 = torch.bfloat16, torch.float32, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2


def compiled(device, name, stored=BF16, new=BF16, form="slots", D=128, Dv=128, scales=None, align=16, unit=True):
    """A kernel for caches of a dtype; `form` says what the kernel `write` finds the places by."""
    of_new, of_cache = "*" + TYPE_NAMES[new], "*" + TYPE_NAMES[stored]
    scale, values = None if scales in (None, "number") else "*fp32", Dv is not None
    books = {
        "slots": (None, "*i64", None, None, None), "batch": ("*i32", None, "*i32", "*i32", None),
        "packed": ("*i32", None, "*i32", "*i32", "*i32"), "append": ("*i32",) * 4,
    }[form]  # fmt: skip
    tensors = (of_new, of_new if values else None, of_cache, of_cache if values else None, scale, scale, *books)
    widths = D, Dv or 1
    blocks = [1 << (width - 1).bit_length() for width in widths]
    constants = {
        "HEAD_DIM": D, "V_HEAD_DIM": widths[1], "BLOCK_R": max(1, 2048 // max(blocks)), "BLOCK_D": blocks[0],
        "BLOCK_DV": blocks[1], "DYNAMIC_K": scales == "tokens", "DYNAMIC_V": scales == "tokens",
        "LARGEST": largest(stored), "ALIGN": align, "UNIT": unit,
    }  # fmt: skip
    facts = DEVICES[device]
    return compile_kernel(name, tensors, constants, (facts.backend, facts.arch))


CASES = {
    "append": ("append", {"form": "append"}),
    "append int8": ("append", {"form": "append", "stored": INT8, "scales": "tokens"}),
    "slots": ("write", {}),
    "slots, any strides": ("write", {"align": 1, "unit": False, "D": 72, "Dv": 40, "new": FP32}),
    "slots e5m2": ("write", {"stored": E5M2, "scales": "number"}),
    "slots int8": ("write", {"stored": INT8, "scales": "tokens"}),
    "latents": ("write", {"D": 576, "Dv": None}),
    "batch": ("write", {"form": "batch", "stored": INT8, "scales": "heads"}),
    "packed": ("write", {"form": "packed"}),
    "packed int8": ("write", {"form": "packed", "stored": INT8, "scales": "tokens", "D": 64, "Dv": 256}),
}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_it_compiles_and_does_not_spill(name, device):
    kernel, arguments = CASES[name]
    registers, spilled = resources(compiled(device, kernel, **arguments))
    assert registers <= (255 if name == "slots, any strides" else 128) and spilled == 0


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
def test_float8_e4m3fn(device):
    assert resources(compiled(device, "write", stored=E4M3, scales="heads"))[1] == 0


@pytest.mark.parametrize("form", ["append", "slots", "batch", "packed"])
def test_rows_are_read_and_written_16_bytes_at_a_time(form):
    text = assembly(compiled("sm_90", "append" if form == "append" else "write", form=form))
    assert len(re.findall(r"ld\.global\.v4\.b32", text)) >= 2
    assert len(re.findall(r"st\.global\.v4\.b32", text)) >= 2


def test_no_number_of_a_launch_is_a_constant_of_the_kernel():
    """So neither lengths nor sizes of the cache or of what is appended compile another kernel."""
    kernel = compiled("sm_90", "write", form="packed")
    numbers = [name for name, kind in kernel.src.signature.items() if kind in ("i32", "i64", "fp32")]
    assert {"num_items", "num_tokens", "num_pages", "page_size", "max_pages", "batch", "key_page"} <= set(numbers)
    assert set(kernel.src.constants.values()) <= {None, 128, 16, False, True}
