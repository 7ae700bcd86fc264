"""The kernel for latents of many heads: when it is chosen, that it compiles, and that its products overlap."""

import importlib
import re
import subprocess
import warnings
from pathlib import Path
from unittest import mock

import pytest
import torch
import triton
from compile import compiling
from compile.compiling import DEVICES, compile_call, meta_inputs, meta_lengths
from support import MODS

from flexdecode import CompileError, DecodeOptions, explain
from flexdecode.call import tiles
from flexdecode.call.signature import NO_AUX
from flexdecode.codegen import compile as kernel
from flexdecode.runtime import prepare

BALANCED = DecodeOptions(backend="triton", schedule="balanced")
SPLITS = DecodeOptions(backend="triton", schedule="split", num_splits=2)
LENGTHS, SINKS = {"kv_lens": meta_lengths(8)}, torch.empty(128, device="meta")


def latents(Hq=128, Q=1, dtype=torch.bfloat16, D=576, Dv=512, page_size=None, B=8, N=8192):
    """Query, key and value, and the table of a paged cache."""
    query, key, _ = meta_inputs(B, Hq, 1, Q, N, D, dtype=dtype)
    if page_size is None:
        return (query, key, key[..., :Dv]), {}
    pages = torch.empty(B * N // page_size, 1, page_size, D, dtype=dtype, device="meta")
    table = torch.empty(B, N // page_size, dtype=torch.int32, device="meta")
    return (query, pages, pages[..., :Dv]), {"page_table": table, "kv_lens": meta_lengths(B)}


def machine_code(compiled):
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    if not tool.exists():
        pytest.skip("this Triton has no cuobjdump beside its compiler")
    cubin = compiled.metadata_group[f"{compiled.name}.cubin"]
    return subprocess.run([tool, "-sass", cubin], capture_output=True, text=True, check=True).stdout


FRAME = {"kv_starts": meta_lengths(8), "kv_offset": meta_lengths(8)}
CASES = {
    "plain": ({}, "none", None, {}),
    "pages": ({"page_size": 64}, "alibi", SPLITS, {}),
    "float16": ({"dtype": torch.float16, "Hq": 40}, "streaming", SPLITS, LENGTHS),
    "balanced": ({}, "softcap", BALANCED, LENGTHS),
    "captures": ({}, "document", SPLITS, LENGTHS),
    "positions": ({"page_size": 64}, "window", SPLITS, FRAME),
    "balanced_positions": ({}, "document", BALANCED, LENGTHS | FRAME),
    "ragged": ({"Q": 2, "page_size": 128}, "causal", BALANCED, {"q_lens": meta_lengths(8), "sinks": SINKS}),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_three_groups_of_warps(name):
    shape, family, options, arguments = CASES[name]
    tensors, pages = latents(**shape)
    query = tensors[0]
    of = next(mods for mods in MODS if mods.name == family)
    score_mod, mask_mod = (make(8, query.shape[1], 8192, query.shape[2], "meta") for make in of[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        found = compile_call("sm_90", tensors, score_mod, mask_mod, options=options, **arguments, **pages)
    assert found.spec.tiles.latent and found.split.metadata.shared <= DEVICES["sm_90"].shared_memory
    assert "st.global.b16" not in found.split.asm["ptx"], "every group of warps has to know that rows are contiguous"
    code = machine_code(found.split)
    # The assembler may put a wait behind every single product; then nothing overlaps.
    products, waits = (len(re.findall(pattern, code)) for pattern in (r"\bHGMMA\b|\bHGMMA\.", r"WARPGROUP\.DEPBAR"))
    assert products >= 40 and waits <= products / 4, (products, waits)


@pytest.mark.parametrize(
    ("shape", "options", "device"),
    [
        ({"Hq": 16}, None, "sm_90"), ({"dtype": torch.float32}, None, "sm_90"), ({"page_size": 16}, None, "sm_90"),
        ({"D": 288, "Dv": 256}, None, "sm_90"), ({"Dv": 256}, None, "sm_90"), ({}, None, "sm_80"), ({}, None, "sm_100"),
        ({}, DecodeOptions(block_n=32), "sm_90"), ({}, DecodeOptions(num_warps=8), "sm_90"),
        ({}, DecodeOptions(batch_invariant=True), "sm_90"),
    ],
)  # fmt: skip
def test_the_general_kernel_does_the_rest(shape, options, device):
    tensors, pages = latents(**shape)
    assert not explain(*tensors, **pages, options=options, device=DEVICES[device]).schedule.tiles.latent


def test_what_explain_says():
    tensors, pages = latents(page_size=64)
    found = explain(*tensors, **(pages | {"kv_lens": torch.full((8,), 5000)}), device="H200")
    assert found.schedule.tiles.latent and "9 warps in three groups, for latents" in str(found)


def test_a_triton_without_gluon(monkeypatch):
    monkeypatch.setattr(tiles, "has_gluon", lambda: False)
    tensors, _ = latents()
    assert not explain(*tensors, device="H200").schedule.tiles.latent


@pytest.mark.parametrize(
    ("where", "name"),
    [
        ("language.nvidia.hopper", "warpgroup_mma"), ("_runtime", "GluonASTSource"), ("language", "warp_specialize"),
    ],
)  # fmt: skip
def test_a_triton_whose_gluon_is_another(where, name, monkeypatch, tmp_path):
    """Gluon is experimental: what a module imports, and what it uses, may be gone."""
    monkeypatch.setenv("FLEXDECODE_CACHE_DIR", str(tmp_path / "flexdecode"))
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(compiling, "_compiled", {})
    monkeypatch.setattr(prepare, "_refusals", {})
    monkeypatch.delattr(importlib.import_module(f"triton.experimental.gluon.{where}"), name)
    tensors, _ = latents()
    with pytest.warns(RuntimeWarning, match=rf"(?s)kernel for latents did not compile, .*{name}"):
        found = compile_call("sm_90", tensors)
    assert not found.spec.tiles.latent


def test_another_kernel_takes_over_where_this_one_does_not_compile(monkeypatch):
    """It is not tried again, and only the first call warns."""
    real = kernel.compile_pass
    monkeypatch.setattr(prepare, "_refusals", {})
    monkeypatch.setattr("compile.compiling._compiled", {})  # an earlier test may have compiled this kernel

    def refuse(module, spec, *rest):
        if spec.tiles.latent:
            raise CompileError("no such thing as a barrier")
        return real(module, spec, *rest)

    tensors, _ = latents()
    text = "flexdecode's kernel for latents did not compile, a slower one takes its place: no such thing as a barrier"
    with mock.patch("compile.compiling.compile_pass", refuse), pytest.warns(RuntimeWarning, match=text):
        found = compile_call("sm_90", tensors, aux=NO_AUX)
    assert not found.spec.tiles.latent and found.spec.tiles.num_warps == 8
    assert not compile_call("sm_90", latents(B=9)[0], aux=NO_AUX).spec.tiles.latent


def spills_of_loops(found):
    """For each loop over blocks, full ones first: how often registers go to memory or come back in the left half."""
    code = re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/\s+(.*?);", machine_code(found.split), re.MULTILINE)
    starts = [i for i, text in enumerate(code) if "HGMMA.64x64x16" in text and "!UPT" in text]
    ends = [i for i, text in enumerate(code) if "HGMMA.64x256x16" in text and "gsb0" in text]
    loops = [(start, min(end for end in ends if end > start)) for start in starts]
    return [sum(bool(re.search(r"\b(LDL|STL)\b", text)) for text in code[start:end]) for start, end in loops]


@pytest.mark.parametrize("Hq", [17, 32, 128])
def test_the_loop_over_full_blocks_spills_nothing(Hq):
    tensors, _ = latents(Hq=Hq)
    found = compile_call("sm_90", tensors)
    assert found.spec.tiles.latent and found.spec.tiles.block_m == 64
    assert spills_of_loops(found)[0] == 0


def test_a_loop_over_partial_blocks_does_not_spill_weights():
    """Where no block is full, as with documents that a table names for each key, it is the loop that counts."""
    documents = torch.empty(8, 8192, dtype=torch.int32, device="meta")

    def same_document(b, h, q_idx, kv_idx):
        return documents[b, kv_idx] == documents[b, q_idx]

    tensors, _ = latents()
    (spilled,) = spills_of_loops(compile_call("sm_90", tensors, None, same_document, options=SPLITS))
    assert spilled <= 16  # weights in memory are 32 of them, twice
