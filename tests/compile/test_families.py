"""Every family of mods, dtype and device, across the shapes and arguments that change the kernel."""

import pytest
import torch
from compile.compiling import DEVICES, DTYPES, FULL, SPILLED_MORE, compile_call, meta_inputs, meta_lengths, resources
from support import MODS

from flexdecode.call.signature import NO_AUX

SHAPES = {  # B, Hq, Hkv, Q, N, D, Dv
    "crowded": (64, 16, 2, 1, 1024, 128, None),
    "split": (1, 32, 8, 1, 65536, 128, None),
    "rows_of_several_heads_and_tokens": (2, 21, 3, 5, 300, 64, None),
    "many_rows": (1, 71, 1, 2, 4096, 128, None),
    "odd_head_dims": (3, 6, 2, 1, 1000, 59, 17),
    "wide_key": (2, 8, 1, 1, 8192, 192, 128),
    "wide": (1, 12, 1, 3, 2048, 256, None),
    "narrow": (4, 8, 8, 1, 129, 16, 80),
}
ARGUMENTS = {
    "plain": lambda B: {},
    "lengths": lambda B: {"kv_lens": meta_lengths(B, torch.int32)},
    "long_lengths_and_offsets": lambda B: {
        "kv_lens": meta_lengths(B, torch.int64), "q_offset": meta_lengths(B, torch.int64), "aux": NO_AUX,
    },
    "offset_number": lambda B: {"q_offset": 17},
    "offsets": lambda B: {"kv_lens": meta_lengths(B, torch.int64), "q_offset": meta_lengths(B, torch.int32)},
}  # fmt: skip
LAYOUTS = ["bhnd", "bnhd"]


def cases():
    """Devices x dtypes x families, or a device for each family and a second one for every other; the rest rotates."""
    count = 0
    for i, mods in enumerate(MODS):
        for j, device in enumerate(DEVICES):
            for k, dtype in enumerate(DTYPES):
                chosen = j == i % 4 or (i % 2 == 0 and j == 1)
                if FULL or (chosen and k == (i + i // 4 + j) % len(DTYPES)):
                    shape = list(SHAPES)[count % len(SHAPES)]
                    arguments = list(ARGUMENTS)[count % len(ARGUMENTS)]
                    layout = LAYOUTS[count // 3 % 2]
                    count += 1
                    name = f"{mods.name}-{device}-{dtype}-{shape}-{arguments}-{layout}".replace("torch.", "")
                    yield pytest.param(mods, device, dtype, shape, arguments, layout, id=name)


@pytest.mark.parametrize(("mods", "device", "dtype", "shape", "arguments", "layout"), list(cases()))
def test_compiles(mods, device, dtype, shape, arguments, layout):
    B, Hq, Hkv, Q, N, D, Dv = SHAPES[shape]
    inputs = meta_inputs(B, Hq, Hkv, Q, N, D, Dv, dtype=dtype, layout=layout)
    score_mod, mask_mod = (make(B, Hq, N, Q, "meta") for make in (mods.make_score_mod, mods.make_mask_mod))
    call = compile_call(device, inputs, score_mod, mask_mod, **ARGUMENTS[arguments](B))
    for kernel in call.passes:
        assert kernel.metadata.shared <= DEVICES[device].shared_memory
    # Local memory of a thread: at most 16 registers' worth, when decoding in half types. The seed shapes have none.
    if dtype != torch.float32 and Hq // Hkv * Q <= 32:
        assert resources(call.split)[1] <= 64 + SPILLED_MORE


@pytest.mark.parametrize("dtype", DTYPES if FULL else [torch.float32], ids=str)
@pytest.mark.parametrize("device", DEVICES)
def test_the_largest_tiles_fit(device, dtype):
    """A kernel that needs more shared memory than the device has is cut smaller."""
    inputs = meta_inputs(1, 64, 1, 2, 32768, 256, dtype=dtype)
    call = compile_call(device, inputs)
    assert call.split.metadata.shared <= DEVICES[device].shared_memory
