"""The kernels that write into caches on every device: they compile, do not spill, and move 16 bytes at a time."""

import contextlib
import re
from unittest import mock

import pytest
import torch
from compile.compiling import DEVICES, assembly, resources

from flexdecode import CompilationForbiddenError, PagedKVCache, forbid_compilation, write_kv
from flexdecode.codegen.arguments import TYPE_NAMES
from flexdecode.codegen.template import template_folder
from flexdecode.kv import cache as cache_module
from flexdecode.kv import launching, writing
from flexdecode.kv.launching import compile_kernel, largest
from flexdecode.kv.steps import Step
from flexdecode.triton_api import standalone_kernel

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


# --- Launches ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def launches(monkeypatch):
    """Lets tensors of the CPU pass for those of an H200, and gives the kernels and arguments that would be launched."""
    found = {"compiled": [], "launched": []}

    class Recorder:
        def __init__(self, compiled, num_constants):
            self.compiled, self.num_constants = compiled, num_constants

        def __call__(self, grid, stream, arguments):
            found["launched"].append((self.compiled, grid, arguments, self.num_constants))

    def compile_only(*kernel):
        found["compiled"].append(kernel)
        return kernel

    launching._compiled.cache_clear()
    launching._prepared.clear()
    monkeypatch.setattr(launching, "Launch", Recorder)
    monkeypatch.setattr(launching, "compile_kernel", compile_only)
    monkeypatch.setattr(launching, "device_facts", lambda device: DEVICES["sm_90"])
    monkeypatch.setattr(writing, "by_kernel", lambda key: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 77, raising=False)
    monkeypatch.setattr(torch.Tensor, "get_device", lambda self: 0)
    yield found
    launching._compiled.cache_clear()
    launching._prepared.clear()


@pytest.fixture
def on_gpu(launches, monkeypatch):
    """The same; what asks tensors whether they are on a GPU hears that they are."""
    monkeypatch.setattr(torch.Tensor, "is_cuda", property(lambda self: True))
    return launches


def steps(batch, num_pages, page_size, width, stored=torch.bfloat16):
    """Appends of all forms to a cache of some sizes."""
    sizes = {"num_kv_heads": 2, "head_dim": width, "dtype": stored, "device": "cpu"}
    cache = PagedKVCache(batch=batch, num_layers=2, num_pages=num_pages, page_size=page_size, **sizes)
    for num_tokens in (1, 2, 16, 33):
        new = torch.zeros(2, batch, 2, num_tokens, width, dtype=torch.bfloat16)
        cache.reserve(min(1, num_tokens))
        for layer in (cache.layer(0), cache.layer(1)):
            layer.append(*new)
            layer.append(*new[:, :1], sequence=batch - 1)
            layer.append(*new.transpose(2, 3).flatten(1, 2))
            layer.append(*new.transpose(2, 3).flatten(1, 2), slot_mapping=torch.arange(num_tokens))


@pytest.mark.parametrize("width", [17, 72, 128])
def test_no_length_makes_another_kernel(width, on_gpu, monkeypatch):
    """Neither of the cache, nor of what is appended, nor the number of sequences or of the layer."""
    monkeypatch.setattr(Step, "begin", lambda self, lengths, counts: setattr(self, "counts", counts))
    monkeypatch.setattr(cache_module, "send", lambda *given: None)
    monkeypatch.setattr(PagedKVCache, "_take_pages", lambda self, counts: None)
    steps(1, 100, 1, width)
    before = len(on_gpu["compiled"])
    assert before == 3  # places of the batch, of packed tokens, and slots
    steps(3, 20, 16, width)
    steps(16, 17, 160, width)
    assert len(on_gpu["compiled"]) == before


def test_a_launch_has_the_arguments_of_the_kernel(launches):
    new = torch.zeros(2, 3, 2, 128, dtype=torch.bfloat16)
    key, value = torch.zeros(2, 5, 2, 16, 128, dtype=torch.int8)
    slots = torch.arange(3)
    scale = torch.ones(2)
    with mock.patch.object(torch.Tensor, "is_cuda", property(lambda self: True)):
        write_kv(*new, key, value, slots, 0.5, scale)
        write_kv(*new, key, value, slots + 1, 0.5, scale)
    assert len(launches["compiled"]) == 1
    (name, pointers, _, _), grid, arguments, num_constants = launches["launched"][-1]
    function = standalone_kernel(template_folder() / "append.py", name)
    given = dict(zip(function.arg_names[:-num_constants], arguments, strict=True))
    assert grid == (1, 1) and pointers[2:8] == ("*i8", "*i8", None, "*fp32", None, "*i64")
    assert (given["k"], given["key"], given["k_scale"]) == (new[0].data_ptr(), key.data_ptr(), None)
    assert (given["k_number"], given["v_number"], given["v_scale_head"]) == (0.5, 1.0, 1)
    assert [given[f"stride_k{d}"] for d in "bhtd"] == [0, 128, 256, 1]
    assert [given[f"key_{d}"] for d in ("page", "head", "position", "d")] == [4096, 2048, 128, 1]
    assert (given["num_items"], given["num_tokens"], given["num_pages"], given["page_size"]) == (3, 3, 5, 16)


def test_a_kernel_that_is_missing_is_an_error_where_compilation_is_forbidden(on_gpu):
    given = [torch.zeros(3, 2, 128), torch.zeros(3, 2, 128), *torch.zeros(2, 5, 2, 16, 128), torch.arange(3)]
    with forbid_compilation(), pytest.raises(CompilationForbiddenError, match=r"the kernel write of append\.py would"):
        write_kv(*given)
    write_kv(*given)
    with forbid_compilation():
        write_kv(*given)
    assert len(on_gpu["launched"]) == 2
