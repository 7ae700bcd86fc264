"""Paged, quantised, ragged and latent caches on every device: they compile, fit, and do not spill where it matters."""

import pytest
import torch
from compile.compiling import DEVICES, FULL, SPILLED_MORE, assembly, compile_call, meta_inputs, meta_lengths, resources
from support import MODS

from flexdecode import DecodeOptions, mods

BF16, INT8, E4M3, E5M2 = torch.bfloat16, torch.int8, torch.float8_e4m3fn, torch.float8_e5m2
SPLIT = DecodeOptions(backend="triton", schedule="split")
BALANCED = DecodeOptions(backend="triton", schedule="balanced")
INVARIANT = DecodeOptions(backend="triton", batch_invariant=True)


def meta(*shape, dtype=torch.float32):
    return torch.empty(*shape, dtype=dtype, device="meta")


def call(
    device, B=8, Hq=16, Hkv=2, Q=1, N=8192, D=128, Dv=None, page_size=None, stored=None, scale=None, shared=False,
    options=SPLIT, mod=None, dtype=BF16, **arguments,
):  # fmt: skip
    """Compiles a call on caches without content; `scale` is the shape class of both scales."""
    query, key, value = meta_inputs(B, Hq, Hkv, Q, N, D, Dv, dtype=dtype)
    stored = stored or dtype
    if page_size is not None:
        pages = B * N // page_size
        key, value = (meta(pages, Hkv, page_size, x.shape[3], dtype=stored) for x in (key, value))
        arguments["page_table"] = meta(B, N // page_size, dtype=torch.int32)
        arguments["kv_lens"] = meta_lengths(B)
    else:
        key, value = key.to(stored), value.to(stored)
    if shared:
        value = key[..., :Dv]
    if scale is not None:
        made = {"number": 0.5, "heads": meta(Hkv), "sequences": meta(B, Hkv), "tokens": meta(*key.shape[:3])}[scale]
        arguments |= {"k_scale": made, "v_scale": made}
    family = next((family for family in MODS if family.name == mod), None)
    of = (None, None) if family is None else [make(B, Hq, N, Q, "meta") for make in family[1:]]
    return compile_call(device, (query, key, value), *of, options=options, **arguments)


def lengths(B=8):
    return {"kv_lens": meta_lengths(B)}


FRAME = {"kv_starts": meta_lengths(8), "kv_offset": meta_lengths(8, torch.int64)}
CASES = {
    "pages_of_16": {"page_size": 16},
    "pages_of_128": {"page_size": 128, "mod": "causal"},
    "pages_of_1": {"page_size": 1, "mod": "window", "N": 4096},
    "int8": {"stored": INT8, "scale": "tokens", **lengths()},
    "int8_pages": {"stored": INT8, "scale": "tokens", "page_size": 16, "mod": "alibi"},
    "int8_heads": {"stored": INT8, "scale": "heads", "page_size": 128},
    "e5m2": {"stored": E5M2, "scale": "sequences", "page_size": 16, "dtype": torch.float16},
    "latent_16": {"Hq": 16, "Hkv": 1, "D": 576, "Dv": 512, "shared": True, "page_size": 64},
    "latent_128": {"Hq": 128, "Hkv": 1, "D": 576, "Dv": 512, "shared": True, **lengths()},
    "wide_key": {"Hq": 128, "Hkv": 128, "D": 192, "Dv": 128, "N": 1024, **lengths()},
    "balanced": {"options": BALANCED, "mod": "alibi", **lengths()},
    "balanced_many": {"options": BALANCED, "B": 2000, "N": 512, "mod": "streaming", "kv_lens": meta_lengths(2000)},
    "balanced_pages": {"options": BALANCED, "page_size": 16, "stored": INT8, "scale": "heads"},
    "ragged_and_sinks": {"Q": 4, "q_lens": meta_lengths(8), "sinks": meta(16), "mod": "causal", "page_size": 16},
    "balanced_ragged": {"options": BALANCED, "Q": 4, "q_lens": meta_lengths(8), "sinks": meta(16), **lengths()},
    "positions": {"mod": "combined", **lengths(), **FRAME},
    "positions_of_pages": {"page_size": 16, "mod": "streaming", "kv_starts": meta_lengths(8), "kv_offset": -3},
    "positions_by_descriptors": {"mod": "window", "Q": 4, **FRAME},
    "balanced_positions": {"options": BALANCED, "page_size": 16, "mod": "alibi", **FRAME},
    "balanced_many_positions": {
        "options": BALANCED, "B": 2000, "N": 512, "mod": "streaming", "kv_starts": meta_lengths(2000), "kv_offset": 5,
    },
}  # fmt: skip
TOO_WIDE = ("latent_16", "latent_128")  # an accumulator of 512 columns fills the registers
SPILLS = ("int8_pages", "gfx942")  # bytes that differ in page and scale: 852 bytes of local memory


def chosen():
    """A device for each in turn, and Hopper for every other."""
    for i, name in enumerate(CASES):
        for j, device in enumerate(DEVICES):
            if FULL or j == i % 4 or (j == 1 and i % 2 == 0):
                yield pytest.param(device, name, id=f"{name}-{device}")


@pytest.mark.parametrize(("device", "name"), list(chosen()))
def test_compiles(device, name):
    found = call(device, **CASES[name])
    for kernel in found.passes:
        assert kernel.metadata.shared <= DEVICES[device].shared_memory
    assert found.spec.tiles.shared == ("shared" in CASES[name])
    assert found.spec.tiles.balanced == name.startswith("balanced")
    # As in test_families.py: at most 16 registers' worth of local memory for a thread.
    if name not in TOO_WIDE and (name, device) != SPILLS:
        assert resources(found.split)[1] <= 64 + SPILLED_MORE


@pytest.mark.parametrize(("device", "page_size"), [("sm_90", 16), ("sm_100", None)])
def test_float8_e4m3(device, page_size):
    arguments = {"stored": E4M3, "scale": "tokens", "page_size": page_size} | ({} if page_size else lengths())
    found = call(device, **arguments)
    assert resources(found.split)[1] <= 64 + SPILLED_MORE


@pytest.mark.parametrize("stored", [INT8, E4M3, E5M2], ids=str)
def test_quantised_rows_that_are_too_short_for_two_columns_in_a_word(stored):
    """A product takes 16 columns at least."""
    found = call("sm_90", D=16, N=512, stored=stored, scale="tokens", **lengths())
    assert not found.spec.tiles.paired


@pytest.mark.parametrize("device", ["sm_80", "gfx942"])
def test_float8_e4m3_where_there_is_none(device):
    with pytest.raises(ValueError, match="float8_e4m3fn caches need an NVIDIA GPU"):
        call(device, stored=E4M3, scale="heads", **lengths())


def test_pages_that_hold_whole_blocks_are_copied_by_descriptors():
    for page_size in (64, 128):
        found = call("sm_90", page_size=page_size, B=1)
        assert found.spec.tiles.descriptors
        assert "cp.async.bulk.tensor.2d" in assembly(found.split)
    assert not call("sm_90", page_size=32, B=1).spec.tiles.descriptors


@pytest.mark.parametrize("block_n", [16, 256])
def test_blocks_that_are_no_page(block_n):
    """A block of several pages is no rectangle."""
    options = DecodeOptions(backend="triton", block_n=block_n, num_stages=2)
    found = call("sm_90", page_size=128, B=1, D=64, options=options)
    assert found.spec.tiles.descriptors == (block_n == 16)


def test_a_shared_value_is_loaded_once():
    options = DecodeOptions(backend="triton", block_n=32, num_stages=2, num_splits=4)
    shapes = {"Hq": 16, "Hkv": 1, "D": 288, "Dv": 256, "dtype": torch.float16, "options": options}
    shared, apart = (call("sm_80", shared=shared, **shapes) for shared in (True, False))
    assert shared.spec.tiles.shared and not apart.spec.tiles.shared
    loads = [assembly(x.split).count("cp.async.cg") for x in (shared, apart)]
    assert 0 < loads[0] < loads[1]


def test_positions_leave_loads_as_they_are():
    for mod in (None, "window"):
        plain, placed = (call("sm_90", mod=mod, **given) for given in (lengths(), lengths() | FRAME))
        assert plain.spec.tiles == placed.spec.tiles and placed.spec.tiles.descriptors
    text = placed.path.read_text()
    assert text.split("# --- KV ranges")[1] == plain.path.read_text().split("# --- KV ranges")[1]


def test_no_length_table_or_number_makes_another_kernel():
    """Scales that are numbers, other lengths of the table and other numbers of pages: run-time values."""
    first = call("sm_90", page_size=16, stored=INT8, scale="number", options=INVARIANT)
    for B, N in ((8, 4096), (3, 16384), (2, 160)):
        other = call("sm_90", B=B, N=N, page_size=16, stored=INT8, scale="number", options=INVARIANT)
        assert other.spec == first.spec and other.split.hash == first.split.hash
    both = [compile_with_mod(window) for window in (10, 1 << 40)]
    assert both[0].split.hash == both[1].split.hash


def compile_with_mod(window):
    query, *_ = meta_inputs(4, 16, 2, 1, 1, 128, dtype=BF16)
    cache = meta(100, 2, 16, 128, dtype=BF16)
    inputs = query, cache, torch.empty_like(cache)
    arguments = {"page_table": meta(4, 64, dtype=torch.int32), "kv_lens": meta_lengths(4)}
    return compile_call("sm_90", inputs, None, mods.sliding_window(window), **arguments)
