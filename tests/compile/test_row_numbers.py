"""The numbers of rows that a call may ask for: a store each, and no more registers."""

import pytest
import torch
from compile.compiling import compile_call, meta_inputs, meta_lengths, resources
from compile.test_latent import latents

from flexdecode import DecodeOptions, mods
from flexdecode.call.signature import NO_AUX, ONLY_LSE, Aux

ONE_SPLIT = DecodeOptions(backend="triton", num_splits=1)
BALANCED = DecodeOptions(backend="triton", schedule="balanced")
INPUTS = meta_inputs(8, 32, 8, 1, 65536, 128, dtype=torch.bfloat16)
CALLS = {
    "one split": (INPUTS, {"mask_mod": mods.sliding_window(9000), "options": ONE_SPLIT}),
    "splits": (meta_inputs(1, 32, 8, 1, 65536, 128, dtype=torch.bfloat16), {}),
    "balanced": (INPUTS, {"kv_lens": meta_lengths(8), "options": BALANCED}),
    "latents": (latents(B=9)[0], {}),
}


def last_pass(call):
    """The kernel that writes the output."""
    return call.split if call.combine is None else call.combine


@pytest.mark.parametrize("name", CALLS)
def test_numbers_of_rows(name):
    inputs, arguments = CALLS[name]
    calls = [compile_call("sm_90", inputs, aux=aux, **arguments) for aux in (NO_AUX, ONLY_LSE, Aux(True, True))]
    assert (calls[0].combine is None) == (name == "one split")
    stores = [last_pass(call).asm["ptx"].count("st.global") for call in calls]
    assert stores[0] < stores[1] < stores[2]
    for kernels in ([call.split for call in calls], [last_pass(call) for call in calls]):
        registers, spilled = zip(*map(resources, kernels), strict=True)
        assert registers[2] <= registers[1] and spilled[2] <= spilled[1]
