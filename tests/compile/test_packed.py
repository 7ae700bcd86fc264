"""Packed queries on every device: small and large tiles fit, spill little, and the kernel for latents takes them."""

import pytest
import torch
from compile.compiling import DEVICES, SPILLED_MORE, compile_call, meta_lengths, resources

from flexdecode import mods

SPILLED = 304  # bytes of a thread; 280 on sm_100, whose tensor cores the general kernel does not use


def empty(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def packed(device, kind, D=128, Hq=32):
    key, value, more = empty(5, 8, 4096, D), empty(5, 8, 4096, D), {"kv_lens": meta_lengths(5)}
    if kind == "pages":
        key, value = empty(900, 8, 16, D), empty(900, 8, 16, D)
        more["page_table"] = empty(5, 256, dtype=torch.int32)
    elif kind == "keys":
        key, value, more = empty(1, 8, 9000, D), empty(1, 8, 9000, D), {"cu_seqlens_k": meta_lengths(6)}
    elif kind == "latents":
        key = empty(5, 1, 4096, 576)
        value, D, Hq = key[..., :512], 576, 64
    return compile_call(
        device, (empty(600, Hq, D), key, value), None, mods.causal(), cu_seqlens_q=meta_lengths(6), **more
    )


@pytest.mark.parametrize(
    ("device", "kind"),
    [("sm_90", "contiguous"), ("sm_80", "pages"), ("gfx942", "keys"), ("sm_100", "contiguous"), ("sm_90", "pages")],
)
def test_small_and_large_tiles(device, kind):
    found = packed(device, kind)
    assert [spec.tiles.block_m for spec, _ in found.launches] == [32, 128]
    for _, kernel in found.launches:
        assert kernel.metadata.shared <= DEVICES[device].shared_memory
        assert resources(kernel)[1] <= SPILLED + SPILLED_MORE
    assert found.combine is not None and resources(found.combine)[1] == 0


def test_latents():
    """The kernel for latents needs a layout for every tensor, also for those that find a tile."""
    found = packed("sm_90", "latents")
    ((spec, kernel),) = found.launches
    assert spec.tiles.latent and kernel.metadata.shared <= DEVICES["sm_90"].shared_memory
