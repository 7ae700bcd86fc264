"""The 60 shapes of the performance matrix on every device: what they need of it."""

import pytest
import torch
from compile.compiling import DEVICES, DTYPES, FULL, SPILLED_MORE, assembly, compile_call, meta_inputs, resources

from benchmarks.rows import load_rows
from flexdecode import mods

# Bytes of local memory per thread. Half types must not spill, but for an address of the last block. Three TF32 products
# per float32 product need more operands at a time than there are registers on NVIDIA devices, and a few spill.
SPILLS = {torch.float16: 8, torch.bfloat16: 8, torch.float32: 72}
# Registers per thread of the first pass; the combine pass has one warp and may use more.
REGISTERS = {torch.float16: 208, torch.bfloat16: 208, torch.float32: 256}
AMD_REGISTERS = 256  # from 169 to 256 of them a multiprocessor holds as many waves, and Triton 3.6 takes 212
MODS = {"none": (None, None), "alibi_and_window": (mods.alibi(16, device="meta"), mods.sliding_window(1024))}
CASES = [
    (device, dtype, mod)
    for i, device in enumerate(DEVICES)
    for j, dtype in enumerate(DTYPES)
    for k, mod in enumerate(MODS)
    if FULL or ((i + j + k) % 2 == 0 and (dtype != torch.bfloat16 or device == "sm_90"))
]


def kernels_of(device, dtype, score_mod=None, mask_mod=None):
    """The kernels of all rows of a dtype, each once, with the label of the first row that needs it."""
    found = {}
    for row in load_rows():
        if row.torch_dtype == dtype:
            inputs = meta_inputs(row.B, row.Hq, row.Hkv, row.Mq, row.Mkv, row.K, dtype=dtype)
            call = compile_call(device, inputs, score_mod, mask_mod)
            found.setdefault(call.spec, (row.label, call))
    return found.values()


@pytest.mark.parametrize(("device", "dtype", "mod"), CASES, ids=str)
def test_resources(device, dtype, mod):
    for label, call in kernels_of(device, dtype, *MODS[mod]):
        for kernel in call.passes:
            registers, spilled = resources(kernel)
            what = f"{kernel.name} of {label} with {call.spec.tiles}"
            assert kernel.metadata.shared <= DEVICES[device].shared_memory, what
            assert spilled <= SPILLS[dtype] + SPILLED_MORE, f"{spilled} bytes spilled in {what}"
            allowed = 256 if kernel is call.combine else AMD_REGISTERS if device == "gfx942" else REGISTERS[dtype]
            assert registers <= allowed, f"{registers} registers in {what}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_row_with_few_programs_is_copied_by_descriptors_on_hopper(dtype):
    """The bulk copy engine reads whole blocks. Threads read the live rows of a block that has dead ones."""
    call = compile_call("sm_90", meta_inputs(1, 16, 1, 1, 65536, 128, dtype=dtype))
    assert call.spec.tiles.descriptors
    text = assembly(call.split)
    assert "cp.async.bulk.tensor.2d" in text
    assert text.index("cp.async.bulk.tensor.2d") < text.index("cp.async.cg")
