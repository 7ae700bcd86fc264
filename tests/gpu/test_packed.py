"""Packed queries and keys on a GPU, on the torch backend."""

import packed_cases as cases
import pytest
import torch
from packed_cases import draw

from flexdecode import DecodeOptions, flex_decode, mods

pytestmark = pytest.mark.gpu

BACKENDS = {"torch": DecodeOptions(backend="torch")}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def options(request):
    return request.param


@pytest.mark.parametrize("case", cases.GRID[::3], ids=lambda case: case.name)
def test_grid(case, options):
    cases.check_case(case, "cuda", options)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_half_types(kind, dtype, options):
    call = draw([1, 6, 0, 3], [14, 6, 2, 20], kind, dtype=dtype, device="cuda", Hkv=1 if "latent" in kind else 2)
    cases.check(call, mods.softcap(2.0), mods.causal(), options=options)


@pytest.mark.parametrize("arguments", cases.UNIFIED[::5], ids=str)
def test_unified(arguments, options):
    cases.check_unified(*arguments, "cuda", options, torch.bfloat16)


@pytest.mark.parametrize("arguments", cases.CASCADE[::5], ids=str)
def test_cascade(arguments, options):
    cases.check_cascade(*arguments, "cuda", options)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "paged_e4m3", "paged_latent", "keys"])
@pytest.mark.parametrize("mask", cases.DEAD_MASKS)
def test_dead_keys(mask, kind, options):
    cases.check_dead_keys(mask, kind, "cuda", options)


def test_other_splits(options):
    cases.check_other_splits(
        lambda call: flex_decode(
            call.query, mask_mod=mods.causal(), return_lse=True, options=options, **call.arguments
        ),
        "cuda",
    )


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_totals_outside_are_clamped(name, options):
    """Their values are not checked on a GPU, except for debug."""
    call = cases.check_clamped(name, "cuda", options)
    with pytest.raises(ValueError, match=f"`{name}` must lie between 0 and"):
        flex_decode(call.query, **call.arguments, options=DecodeOptions(backend=options.backend, debug=True))
