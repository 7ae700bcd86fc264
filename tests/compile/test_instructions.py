"""What the machine code consists of: waits, vector loads, asynchronous copies, nothing for an absent mod."""

import ast
import re

import pytest
import torch
import triton
from compile.compiling import DEVICES, assembly, compile_call, meta_inputs, meta_lengths

from flexdecode import DecodeOptions, mods
from flexdecode.codegen.compile import compile_pass
from flexdecode.codegen.template import read_template
from flexdecode.triton_api import load_module

SPLIT_SHAPE = (1, 16, 2, 1, 32768, 128)
CROWDED_SHAPE = (256, 16, 1, 1, 1024, 128)
GLOBAL_ACCESS = re.compile(r"\b(ld\.global|st\.global|ld\.param\.global|cp\.async|atom|red\.|prefetch(?!\.global\.L2))")


# --- Programmatic dependent launch ------------------------------------------------------------------------------------


@pytest.mark.parametrize("device", DEVICES)
def test_programmatic_dependent_launch_where_the_device_has_it(device):
    call = compile_call(device, meta_inputs(*SPLIT_SHAPE), kv_lens=meta_lengths(1))
    has_it = device in ("sm_90", "sm_100")
    assert call.combine is not None
    for kernel in call.passes:
        text = assembly(kernel)
        assert ("griddepcontrol.wait" in text) == has_it
        assert ("griddepcontrol.launch_dependents" in text) == has_it
        assert getattr(kernel.metadata, "launch_pdl", False) == has_it


@pytest.mark.parametrize("descriptors", [True, False])
def test_no_memory_is_touched_before_the_wait(descriptors):
    """An earlier kernel may still be writing what this one reads, or reading what it writes."""
    layout = meta_inputs(*SPLIT_SHAPE) if descriptors else meta_inputs(*SPLIT_SHAPE[:5], 96, layout="bnhd")
    slopes = torch.empty(16, device="meta")
    call = compile_call("sm_90", layout, mods.alibi(slopes), kv_lens=meta_lengths(1), q_offset=meta_lengths(1))
    assert call.spec.tiles.descriptors == descriptors
    for kernel in call.passes:
        before, wait, after = assembly(kernel).partition("griddepcontrol.wait")
        assert wait
        assert not GLOBAL_ACCESS.search(before)
        assert GLOBAL_ACCESS.search(after)


@pytest.mark.parametrize("options", [{"num_splits": 2}, {"schedule": "balanced"}], ids=str)
@pytest.mark.parametrize("kind", ["q_lens", "positions", "packed", "packed keys"])
def test_lengths_are_not_read_before_the_wait(kind, options):
    """They say which rows and keys there are, and another kernel may still be writing them."""
    query, key, value = meta_inputs(4, 16, 2, 3, 4096, 64)
    lens = meta_lengths(4)
    more = {
        "q_lens": {"q_lens": lens, "kv_lens": lens},
        "positions": {"kv_lens": lens, "kv_starts": lens, "kv_offset": lens},
        "packed": {"cu_seqlens_q": meta_lengths(5), "kv_lens": lens},
        "packed keys": {"cu_seqlens_q": meta_lengths(5), "cu_seqlens_k": meta_lengths(5)},
    }[kind]
    if "cu_seqlens_q" in more:
        query = torch.empty(300, 16, 64, dtype=query.dtype, device="meta")
    if "cu_seqlens_k" in more:
        key, value = key[:1], value[:1]
    options = DecodeOptions(backend="triton", **options)
    call = compile_call("sm_90", (query, key, value), None, mods.causal(), options=options, **more)
    for kernel in (*(kernel for _, kernel in call.launches), call.combine):
        before, wait, _ = assembly(kernel).partition("griddepcontrol.wait")
        assert wait and not GLOBAL_ACCESS.search(before)


# --- Loads ------------------------------------------------------------------------------------------------------------


def widths_of_copies(kernel):
    """Bytes of each asynchronous copy from global to shared memory by a thread."""
    copies = re.findall(r"cp\.async\.c[ag]\.shared\.global \[[^]]*\], \[[^]]*\], (0x\w+|\d+)", assembly(kernel))
    return {int(width, 0) for width in copies}


@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_aligned_caches_are_copied_16_bytes_at_a_time(dtype, layout):
    for mask_mod in (None, mods.causal()):
        call = compile_call("sm_80", meta_inputs(*CROWDED_SHAPE, dtype=dtype, layout=layout), mask_mod=mask_mod)
        assert widths_of_copies(call.split) == {16}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
def test_aligned_caches_are_read_16_bytes_at_a_time_on_amd(dtype):
    call = compile_call("gfx942", meta_inputs(*CROWDED_SHAPE, dtype=dtype))
    loads = re.findall(r"\b(?:global|buffer)_load_(\w+)", assembly(call.split))
    assert loads.count("dwordx4") >= 2, loads


@pytest.mark.parametrize("device", ["sm_90", "sm_100"])
@pytest.mark.parametrize("layout", ["bhnd", "bnhd"])
def test_descriptors_on_hopper_and_later(device, layout):
    call = compile_call(device, meta_inputs(*SPLIT_SHAPE, layout=layout))
    assert call.spec.tiles.descriptors
    assert "cp.async.bulk.tensor.2d" in assembly(call.split)
    assert widths_of_copies(call.split) == {16}  # of the live rows of a block that has dead ones


def prefetched(shape, mask_mod=None, options=None, **more):
    """How often a thread asks for a line before the wait."""
    call = compile_call("sm_90", meta_inputs(*shape), mask_mod=mask_mod, options=options, **more)
    before, wait, after = assembly(call.split).partition("griddepcontrol.wait")
    assert wait and "prefetch" not in after
    return before.count("prefetch.global.L2")


def test_the_first_block_is_asked_for_before_the_wait_if_nothing_in_memory_decides_where_it_lies():
    """16 rows of the query are 32 lines, at most one for each thread; 128 keys and values are 512 lines."""
    for shape in (SPLIT_SHAPE, (128, 16, 1, 1, 512, 128)):  # several programs for a head, one program for a head
        assert prefetched(shape) == 1 + 4
        assert prefetched(shape, mods.sliding_window(200)) == 1
        assert prefetched(shape, kv_lens=meta_lengths(shape[0])) == 1
    assert prefetched(CROWDED_SHAPE) == 1
    assert prefetched((256, 16, 1, 1, 256, 128)) == 1  # two programs on a multiprocessor


def test_partial_outputs_are_read_16_bytes_at_a_time():
    call = compile_call("sm_90", meta_inputs(*SPLIT_SHAPE))
    assert "ld.global.v4.b32" in assembly(call.combine)


@pytest.mark.parametrize("shape", [(1, 6, 2, 1, 3000, 59), (1, 6, 2, 1, 3000, 17, 121)])
def test_odd_head_dims_compile_without_vectors(shape):
    call = compile_call("sm_90", meta_inputs(*shape))
    assert not call.spec.tiles.descriptors
    assert 16 not in widths_of_copies(call.split)


# --- Hooks that do nothing cost nothing -------------------------------------------------------------------------------


ROW_AND_FETCH = ("score_row", "score_fetch", "mask_row")


class _WithoutHooks(ast.NodeTransformer):
    """Replaces calls of the mods' hooks by what they mean if there are no mods."""

    def visit_Call(self, node):
        self.generic_visit(node)
        name = getattr(node.func, "id", None)
        if name in ("score_mod", "mask_mod"):
            return node.args[0]
        return ast.Tuple([], ast.Load()) if name in ROW_AND_FETCH else node

    def visit_FunctionDef(self, node):
        self.generic_visit(node)
        return None if node.name in ("score_mod", "mask_mod", *ROW_AND_FETCH) else node


@pytest.mark.parametrize("device", ["sm_80", "sm_90"])
def test_identity_hooks_leave_no_trace(device, tmp_path):
    """The template and the template without any call of a hook give the same PTX, byte for byte."""
    path = tmp_path / "without_hooks.py"
    path.write_text(ast.unparse(_WithoutHooks().visit(ast.parse(read_template("decode.py")))))
    assert "score_mod(" not in path.read_text() and "mask_row(" not in path.read_text()
    inputs = meta_inputs(*CROWDED_SHAPE[:-1], 96)  # by pointers
    with triton.knobs.compilation.scope():
        triton.knobs.compilation.disable_line_info = True
        spec = compile_call(device, inputs, kv_lens=meta_lengths(256)).spec
        texts = []
        for file in (path, _template_file(tmp_path)):
            texts.append(compile_pass(load_module(file), spec, DEVICES[device], combine=False).asm["ptx"])
    assert texts[0] == texts[1]


def _template_file(folder):
    path = folder / "with_hooks.py"
    path.write_text(read_template("decode.py"))
    return path


# --- Mods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_products_and_sums_in_half_precision_stay_apart(dtype):
    """A fused one would skip the rounding of the product."""

    def score_mod(score, b, h, q_idx, kv_idx):
        x = score.to(dtype)
        return score + (x * x + x)

    text = assembly(compile_call("sm_90", meta_inputs(*SPLIT_SHAPE), score_mod).split)
    assert "fma.rn.bf16" not in text and "fma.rn.f16" not in text


def test_captured_values_are_fetched_before_the_scores_are_computed():
    """Their latency passes while the program waits for the keys."""
    bias = torch.empty(8, 32, 4096, device="meta")
    call = compile_call(
        "sm_90", meta_inputs(*SPLIT_SHAPE), lambda score, b, h, q_idx, kv_idx: score + bias[b, h, kv_idx]
    )
    loop = assembly(call.split).split("wgmma" if "wgmma" in assembly(call.split) else "mma.sync")[0]
    assert re.findall(r"ld\.global\.b32", loop), "the bias comes first"
