"""Compiles what a call would launch on a device that is not there."""

import os
import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import triton

from flexdecode import DecodeOptions
from flexdecode.analysis.proven import Listed
from flexdecode.call.device import DeviceFacts
from flexdecode.call.inputs import Inputs
from flexdecode.call.signature import ONLY_LSE
from flexdecode.codegen import kernels as compiled
from flexdecode.codegen.arguments import KernelSpec
from flexdecode.codegen.compile import compile_pass
from flexdecode.runtime import prepare
from flexdecode.runtime.identity import identify
from flexdecode.triton_api import triton_version

DEVICES = {
    "sm_80": DeviceFacts("cuda", 80, num_sms=108, shared_memory=163 * 1024),
    "sm_90": DeviceFacts("cuda", 90, num_sms=132, shared_memory=227 * 1024),
    "sm_100": DeviceFacts("cuda", 100, num_sms=148, shared_memory=227 * 1024),
    "gfx942": DeviceFacts("hip", "gfx942", num_sms=304, shared_memory=64 * 1024),
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32]
# ptxas of Triton 3.8 spills 80 bytes of a thread more than those of 3.6 and 3.9, which spill 16 of the same kernels.
# For sm_100, that of 3.6 spills 48 bytes more than that of 3.9.
SPILLED_MORE = {(3, 6): 48, (3, 8): 80}.get(triton_version(), 0)
FULL = os.environ.get("FLEXDECODE_FULL") == "1"  # the whole cross product in place of a covering part of it


_compiled = {}  # what this process compiled already


class Compiled(NamedTuple):
    """Both passes of a call; `combine` is None where one split writes the output.

    `launches`: the specs and kernels of all launches of the first pass, of which `spec` and `split` are the last.
    """

    spec: KernelSpec
    path: Path
    split: Any
    combine: Any
    launches: list

    @property
    def passes(self):
        return [kernel for kernel in (self.split, self.combine) if kernel is not None]


def meta_inputs(B, Hq, Hkv, Q, N, D, Dv=None, dtype=torch.float16, layout="bhnd"):
    """Query, key and value of any size: they take no memory, and count as aligned."""

    def make(H, length, width):
        if layout == "bnhd":
            return torch.empty(B, length, H, width, dtype=dtype, device="meta").transpose(1, 2)
        return torch.empty(B, H, length, width, dtype=dtype, device="meta")

    return make(Hq, Q, D), make(Hkv, N, D), make(Hkv, N, D if Dv is None else Dv)


def meta_lengths(B, dtype=torch.int32):
    return torch.empty(B, dtype=dtype, device="meta")


def compile_call(device, inputs, score_mod=None, mask_mod=None, *, options=None, **arguments):
    """Prepares a call as `flex_decode` does, for a device of `DEVICES`, and compiles its kernels."""
    found: dict = {"launches": []}

    def compile_only(module, spec, facts, combine):
        key = module.__file__, spec, facts, combine
        if key not in _compiled:
            _compiled[key] = compile_pass(module, spec, facts, combine)
        found[combine] = _compiled[key]
        if not combine:
            found["spec"], found["path"] = spec, Path(module.__file__)
            found["launches"].append((spec, found[False]))

    compiled.forget_kernels()
    aux = arguments.pop("aux", ONLY_LSE)
    listed = arguments.pop("listed", Listed.NO)
    with (
        mock.patch.object(prepare, "device_facts", lambda _: DEVICES[device]),
        mock.patch.object(compiled, "_pass", compile_only),
    ):
        mods = identify("score_mod", score_mod), identify("mask_mod", mask_mod)
        options = options or DecodeOptions(backend="triton")
        prepare.prepare(Inputs(*inputs, **arguments), mods, aux, options, listed)
    return Compiled(found["spec"], found["path"], found[False], found.get(True), found["launches"])


def resources(kernel):
    """Registers of a thread, and bytes of local memory (spills and stack) of a thread."""
    if "amdgcn" in kernel.asm:
        count = {key: int(n) for key, n in re.findall(r"\.(\w+):\s+(\d+)", kernel.asm["amdgcn"])}
        return count["vgpr_count"], count["private_segment_fixed_size"]
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump beside its compiler")
    cubin = kernel.metadata_group[f"{kernel.name}.cubin"]
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    count = {key: int(n) for key, n in re.findall(r"\b([A-Z]+):(\d+)", report)}
    return count["REG"], count["STACK"] + count["LOCAL"]


def assembly(kernel):
    """The text nearest to the machine that Triton keeps."""
    return kernel.asm["amdgcn"] if "amdgcn" in kernel.asm else kernel.asm["ptx"]
