"""Compiles what a call would launch on a device that is not there."""

import re
import subprocess
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import torch
import triton

from flexdecode import compiled, plan
from flexdecode.identity import identify
from flexdecode.kernel import KernelSpec, compile_pass
from flexdecode.schedule import DeviceFacts

DEVICES = {
    "sm_80": DeviceFacts("cuda", 80, num_sms=108, shared_memory=163 * 1024),
    "sm_90": DeviceFacts("cuda", 90, num_sms=132, shared_memory=227 * 1024),
    "sm_100": DeviceFacts("cuda", 100, num_sms=148, shared_memory=227 * 1024),
    "gfx942": DeviceFacts("hip", "gfx942", num_sms=304, shared_memory=64 * 1024),
}


class Compiled(NamedTuple):
    """Both passes of a call; `combine` is None where one split writes the output."""

    spec: KernelSpec
    path: Path
    split: Any
    combine: Any

    @property
    def passes(self):
        return [x for x in (self.split, self.combine) if x is not None]


def meta_inputs(B, Hq, Hkv, Q, N, D, Dv=None, dtype=torch.float16, layout="bhnd"):
    """Tensors of any size without memory, hence aligned."""

    def make(H, length, width):
        if layout == "bnhd":
            return torch.empty(B, length, H, width, dtype=dtype, device="meta").transpose(1, 2)
        return torch.empty(B, H, length, width, dtype=dtype, device="meta")

    return make(Hq, Q, D), make(Hkv, N, D), make(Hkv, N, D if Dv is None else Dv)


def compile_call(device, inputs, score_mod=None, mask_mod=None, *, options=None, **arguments):
    """Prepares a call as `flex_decode` does, for a device of `DEVICES`, and compiles its kernels."""
    found = {}

    def compile_only(kernel, module, spec, combine):
        found[combine] = compile_pass(module, spec, kernel.facts, combine)
        found["spec"], found["path"] = spec, kernel.path

    compiled.forget_kernels()
    given = dict.fromkeys(("kv_lens", "q_offset", "scale", "out"), None) | {"return_lse": True} | arguments
    options = plan.DecodeOptions(backend="triton") if options is None else options
    with (
        mock.patch.object(plan, "device_facts", lambda _: DEVICES[device]),
        mock.patch.object(compiled.Kernel, "_pass", compile_only),
    ):
        mods = identify("score_mod", score_mod), identify("mask_mod", mask_mod)
        plan.prepare(*inputs, *mods, **given, options=options)
    return Compiled(found["spec"], found["path"], found[False], found.get(True))


def resources(kernel):
    """Registers per thread, and bytes of local memory (spills and stack) per thread."""
    if "amdgcn" in kernel.asm:
        count = {key: int(n) for key, n in re.findall(r"\.(\w+_count):\s+(\d+)", kernel.asm["amdgcn"])}
        return count["vgpr_count"], 4 * (count["vgpr_spill_count"] + count["sgpr_spill_count"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    cubin = Path(kernel.metadata_group[f"{kernel.name}.cubin"])
    report = subprocess.run([tool, "--dump-resource-usage", cubin], capture_output=True, text=True, check=True).stdout
    count = {key: int(n) for key, n in re.findall(r"\b([A-Z]+):(\d+)", report)}
    return count["REG"], count["STACK"] + count["LOCAL"]
