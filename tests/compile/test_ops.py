"""Every row of the op table and every function made of rows goes through the compilers of NVIDIA and AMD."""

import re

import pytest
import triton
from compile.compiling import DEVICES
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from flexdecode.codegen.template import elementwise_functions
from flexdecode.frontend.ops import OPS
from flexdecode.triton_api import load_module

KERNEL = """
@triton.jit
def kernel(reals, integers, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    a, b = tl.load(reals + at), tl.load(reals + BLOCK + at)
    i, j = tl.load(integers + at), tl.load(integers + BLOCK + at)
    p, q = i > 0, j > 0
{stores}
"""


def stores():
    """One line for each text of the table, with tensors for its operands, of reals, integers or bools."""
    for op in OPS.values():
        operands = {"where": [("p", "a", "b")], "logical": [("p", "q")], "integer": [("i", "j")]}.get(op.rule)
        for names in operands or [("a", "b"), ("i", "j")]:
            integer = names[0] in "ij" and op.rule not in ("float", "predicate")
            if names[0] in "ij" and not integer:
                continue
            yield (op.triton_int if integer and op.triton_int else op.triton).format(*names)
        for *_, text in op.shortcuts:
            yield text.format("a", "b")


@pytest.mark.parametrize("dtype", ["fp32", "fp64"])
@pytest.mark.parametrize("device", ["sm_90", "gfx942"])
def test_all_texts_of_the_table_compile(device, dtype, tmp_path):
    texts = list(stores())
    assert len(texts) > len(OPS)
    functions = elementwise_functions({name for text in texts for name in re.findall(r"\w+", text)})
    lines = "".join(f"    tl.store(out + {n} * BLOCK + at, {text})\n" for n, text in enumerate(texts))
    path = tmp_path / "all_texts.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n{functions}{KERNEL.format(stores=lines)}")
    kernel = load_module(path).kernel
    signature = {"reals": f"*{dtype}", "integers": "*i64", "out": f"*{dtype}", "BLOCK": "constexpr"}
    facts = DEVICES[device]
    target = GPUTarget(facts.backend, facts.arch, 32 if facts.backend == "cuda" else 64)
    compiled = triton.compile(ASTSource(kernel, signature, {"BLOCK": 128}), target, {"enable_fp_fusion": False})
    assert "ptx" in compiled.asm or "amdgcn" in compiled.asm
