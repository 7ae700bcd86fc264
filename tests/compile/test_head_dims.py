"""Heads of 1 to 1024 columns, and caches of other dtypes, on every device: they fit, and do not spill much."""

import itertools

import pytest
import torch
from compile.compiling import DEVICES, FULL, SPILLED_MORE, assembly, compile_call, meta_inputs, resources
from compile.test_caches import BALANCED, E4M3, E5M2, INT8, call, lengths

from flexdecode import mods
from flexdecode.call.device import RESERVED_SHARED
from flexdecode.call.tiles import Loads
from flexdecode.triton_api import triton_version

HALF, BF16, SINGLE = torch.float16, torch.bfloat16, torch.float32
CASES = {
    "1024_1024": {"D": 1024},
    "1024_1024_rows": {"D": 1024, "Hq": 64, "Hkv": 1, "Q": 4, "mod": "causal"},
    "1000_1000_pages": {"D": 1000, "page_size": 16, "mod": "alibi"},
    "640_512": {"D": 640, "Dv": 512, "mod": "softcap"},
    "577_1": {"D": 577, "Dv": 1, "mod": "window"},
    "1_1024": {"D": 1, "Dv": 1024},
    "int8": {"D": 1024, "stored": INT8, "scale": "tokens", **lengths()},
    "e5m2_pages": {"D": 700, "Dv": 600, "stored": E5M2, "page_size": 128},
    "balanced": {"D": 640, "options": BALANCED, **lengths()},
}  # fmt: skip
SPILLED = 264  # bytes of a thread: small beside what a step of so many columns loads
SPILLED_LARGE = 384  # 256 columns of keys and of values


def chosen():
    """A device for each in turn, and both dtypes."""
    for i, (name, dtype) in enumerate(itertools.product(CASES, (BF16, SINGLE))):
        for j, device in enumerate(DEVICES):
            if FULL or j == i % 4 or (name == "1024_1024"):
                yield pytest.param(device, name, dtype, id=f"{name}-{device}-{dtype}".replace("torch.", ""))


@pytest.mark.parametrize(("device", "name", "dtype"), list(chosen()))
def test_wide_heads(device, name, dtype):
    found = call(device, dtype=dtype, **CASES[name])
    assert found.spec.tiles.loads is Loads.WIDE
    for kernel in found.passes:
        assert kernel.metadata.shared <= min(x.shared_memory for x in DEVICES.values())  # every device has that much
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


@pytest.mark.parametrize("dtype", [BF16, SINGLE], ids=str)
@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (2, 128), (15, 16), (128, 2), (512, 2), (1, 512)])
def test_narrow_heads(D, Dv, device, dtype):
    if not FULL and (D + Dv + list(DEVICES).index(device)) % 2:
        pytest.skip("part of FLEXDECODE_FULL=1")
    found = call(device, D=D, Dv=Dv, dtype=dtype, mod="alibi")
    assert found.spec.tiles.loads is (Loads.WIDE if D + Dv > 256 else Loads.POINTERS)
    assert found.split.metadata.shared <= DEVICES[device].shared_memory
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


@pytest.mark.parametrize("stored", [INT8, E4M3, E5M2], ids=str)
@pytest.mark.parametrize(("D", "Dv"), [(1, 1), (2, 2), (33, 33), (34, 18), (34, 2), (128, 6), (600, 2)])
def test_quantised_rows_of_any_size(D, Dv, stored):
    """Rows of an odd size are not loaded two columns at a time, and neither are those of few columns or over 576."""
    found = call("sm_90", D=D, Dv=Dv, N=512, stored=stored, scale="tokens", **lengths())
    assert found.spec.tiles.paired == ((D, Dv) == (34, 18))
    # Loads of two bytes need many registers. For one split, ptxas of Triton 3.6 then spills 720 to 768 bytes.
    more = 504 if found.spec.tiles.paired and triton_version() == (3, 6) else SPILLED_MORE
    assert resources(found.split)[1] <= SPILLED + more


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("D", "Dv", "Q", "B"), [(512, 512, 1, 8), (576, 512, 16, 128), (512, 32, 16, 8), (16, 257, 1, 8)]
)
def test_large_rows_of_float32(D, Dv, Q, B, device):
    """As a whole they would fill the registers, and some of them the shared memory."""
    found = call(device, D=D, Dv=Dv, Q=Q, B=B, dtype=SINGLE, mod="alibi")
    assert found.spec.tiles.loads is Loads.WIDE
    assert found.split.metadata.shared <= DEVICES[device].shared_memory
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


def test_the_largest_whole_rows_of_float32():
    for device in DEVICES:
        found = call(device, D=256, Q=16, B=128, dtype=SINGLE)  # more programs than multiprocessors, many rows
        assert found.spec.tiles.loads is not Loads.WIDE
        assert resources(found.split)[1] <= SPILLED_LARGE + SPILLED_MORE


@pytest.mark.parametrize(("device", "stored"), [("sm_80", None), ("sm_90", None), ("sm_90", E4M3), ("sm_100", INT8)])
@pytest.mark.parametrize(("D", "Dv", "Q"), [(64, 16, 1), (128, 32, 16), (256, 16, 4)])
def test_few_value_columns(D, Dv, Q, device, stored):
    """The warps divide the columns of the output, not the rows, or each would hold all keys (7 kB spilled)."""
    dtype, scales = (SINGLE, {}) if stored is None else (HALF, {"scale": "tokens", "stored": stored})
    found = call(device, D=D, Dv=Dv, Q=Q, dtype=dtype, **scales, **lengths())
    assert found.split.metadata.shared <= DEVICES[device].shared_memory
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


@pytest.mark.parametrize(("D", "Dv", "Q"), [(128, 16, 4), (128, 32, 4), (256, 16, 4)])
def test_few_value_columns_that_are_copied(D, Dv, Q):
    """As above, where the copy engine loads the values: 255 registers and 80 bytes of local memory before."""
    found = call("sm_90", D=D, Dv=Dv, Q=Q, dtype=HALF, **lengths())
    assert found.spec.tiles.descriptors and found.spec.tiles.block_dv >= 2 * found.spec.tiles.block_m
    registers, spilled = resources(found.split)
    assert registers <= 208 and spilled <= SPILLED_MORE


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
@pytest.mark.parametrize(("D", "Hq"), [(64, 8), (64, 32), (24, 32), (128, 32), (64, 256), (24, 256), (128, 256)])
def test_the_programs_of_float32_fit_into_a_multiprocessor(D, Hq, device):
    """So many sequences that three programs share one, as far as 65,536 registers and the shared memory allow."""
    found = compile_call(device, meta_inputs(44, Hq, 8, 1, 5000, D, dtype=SINGLE))
    per_sm, shared = found.spec.tiles.per_sm, DEVICES[device].shared_memory
    registers, spilled = resources(found.split)
    assert per_sm == (3 if Hq <= 128 else 2) and spilled <= 32 + SPILLED_MORE
    assert per_sm * 32 * found.spec.tiles.num_warps * (registers + -registers % 8) <= 65536
    assert per_sm * (found.split.metadata.shared + RESERVED_SHARED) <= shared + RESERVED_SHARED


@pytest.mark.parametrize("D", [24, 32])
def test_float32_of_few_columns_does_not_spill(D):
    """In steps of 256 keys it spilled 168 to 256 bytes."""
    found = compile_call("sm_90", meta_inputs(16, 64, 8, 1, 2048, D, dtype=SINGLE))
    assert found.spec.tiles.per_sm == 1 and resources(found.split)[1] <= SPILLED_MORE


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("D", [64, 80, 128])
def test_8_bit_caches_of_float32_queries_with_many_rows(D, layout):
    """Their bytes would allow steps of 128 keys, which spilled up to 14 KB where they are loaded through pointers."""
    query, *cache = meta_inputs(64, 32, 1, 1, 4096, D, dtype=SINGLE, layout=layout)
    found = compile_call("sm_90", (query, *(x.to(INT8) for x in cache)), k_scale=1.0, v_scale=1.0)
    assert found.spec.tiles.block_m == 32 and resources(found.split)[1] <= SPILLED_LARGE


@pytest.mark.parametrize(("D", "Dv"), [(64, 128), (32, 128), (16, 128), (40, 128), (80, 32)])
def test_keys_and_values_of_other_widths_in_float32(D, Dv):
    """Their bytes are no power of two, but the keys of a step are."""
    query, key, value = meta_inputs(128, 32, 1, 1, 512, D, Dv, dtype=SINGLE)
    assert compile_call("sm_90", (query, key, value)).spec.tiles.block_m == 32


def pairs():
    for i, types in enumerate(itertools.product((HALF, BF16, SINGLE), repeat=3)):
        if len(set(types)) > 1:
            for j, device in enumerate(DEVICES):
                if FULL or j == i % 4:
                    yield pytest.param(device, *types, id="-".join(map(str, (device, *types))).replace("torch.", ""))


@pytest.mark.parametrize(("device", "query_dtype", "key_dtype", "value_dtype"), list(pairs()))
def test_dtypes(device, query_dtype, key_dtype, value_dtype):
    """Without a mask, and few programs: by descriptors where the device has them."""
    query, key, value = meta_inputs(1, 16, 2, 1, 4096, 128)
    found = compile_call(device, (query.to(query_dtype), key.to(key_dtype), value.to(value_dtype)))
    assert found.spec.tiles.descriptors == DEVICES[device].has_descriptors
    assert found.split.metadata.shared <= DEVICES[device].shared_memory
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


def test_products_are_in_the_promoted_dtype():
    query, key, value = meta_inputs(8, 16, 2, 1, 4096, 64, dtype=BF16)
    half = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32", "m16n8k8.row.col.f32.tf32.tf32.f32"
    for key_dtype, value_dtype, expected in (
        (BF16, BF16, (True, False)), (BF16, SINGLE, (True, True)), (HALF, BF16, (True, True)),
        (HALF, HALF, (False, True)),
    ):  # fmt: skip
        tensors = query, key.to(key_dtype), value.to(value_dtype)
        text = assembly(compile_call("sm_80", tensors, None, mods.causal()).split)
        assert tuple(name in text for name in half) == expected


@pytest.mark.parametrize("types", [(E4M3, BF16), (BF16, E5M2), (INT8, E4M3)], ids=str)
def test_a_quantised_and_another_cache(types):
    query, key, value = meta_inputs(8, 16, 2, 1, 4096, 128, dtype=HALF)
    scales = {"k_scale": 0.5} if types[0] == INT8 else {}
    found = compile_call("sm_90", (query, key.to(types[0]), value.to(types[1])), None, mods.causal(), **scales)
    assert not found.spec.tiles.paired
    assert resources(found.split)[1] <= 64 + SPILLED_MORE


@pytest.mark.parametrize("D", [64, 128])
def test_a_quantised_cache_and_many_rows(D):
    found = call("sm_90", D=D, Q=8, stored=E4M3, scale="tokens", **lengths())
    assert found.spec.tiles.paired and found.spec.tiles.block_m == 64
    assert resources(found.split)[1] <= SPILLED + SPILLED_MORE


def test_float8_without_scales_is_loaded_in_pairs():
    found = call("sm_90", stored=E4M3, **lengths())
    assert found.spec.tiles.paired
