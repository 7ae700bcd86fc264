"""The Triton text of every row of real numbers, against float64: at most twice PyTorch's own error, and 4 ulp.

The text runs alone in a kernel, so that nothing but itself rounds. Errors are counted in units in the last place of
float32. PyTorch's error is the largest of its float32 function on a CPU among the points whose operand (of two
operands: whose result) has nearly the same binary exponent, because one point may be exact by luck. Where float32 has
subnormal numbers only, a unit is that of the smallest normal one: a GPU flushes them. Where two terms cancel, 4 units
of the larger operand are allowed in any case.

On float64 operands a row is at least as exact: 4 ulp of float32, beside the rounding of float64 itself.
"""

import re

import pytest
import torch
import triton

from flexdecode.codegen.template import elementwise_functions
from flexdecode.frontend.ops import OPS
from flexdecode.triton_api import load_module

ROWS = sorted(name for name, op in OPS.items() if op.rule == "float" or name in ("floor", "ceil", "round", "trunc"))
ROWS += ["pow", "fmod", "remainder", "floor_divide", "maximum", "minimum", "fmax", "fmin"]

KERNEL = """
@triton.jit
def kernel(operands, out, n, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < n
    x = tl.load(operands + at, mask=inside, other=1)
    y = tl.load(operands + n + at, mask=inside, other=1)
    tl.store(out + at, {text}, mask=inside)
"""


def run(name, folder, *operands):
    """What the Triton text of a row gives."""
    text = OPS[name].triton.format("x", "y")
    functions = elementwise_functions(re.findall(r"\w+", text))
    path = folder / f"{name}.py"
    path.write_text(f"import triton\nimport triton.language as tl\n\n\n{functions}{KERNEL.format(text=text)}")
    stacked, out = torch.stack([operands[0], operands[-1]]), torch.empty_like(operands[0])
    block = 1024
    load_module(path).kernel[(triton.cdiv(len(out), block),)](stacked, out, len(out), BLOCK=block)
    return out


# --- Points -----------------------------------------------------------------------------------------------------------

INF, NAN = float("inf"), float("nan")
SMALLEST, LARGEST = torch.finfo(torch.float32).smallest_normal, torch.finfo(torch.float32).max
EDGES = [
    0.0, 1e-45, 1e-40, SMALLEST, 1e-20, 1e-4, 0.25, 0.5, 0.7, 0.75, 1.0, 1.5, 2.0, 2.5, 3.0, 5.0, 8.0, 9.3, 10.0, 13.0,
    20.0, 24.0, 64.0, 88.7, 89.4, 100.0, 103.9, 127.0, 128.0, 255.5, 8388607.5, 2.0**24, 1e9, 1e19, 1e30, LARGEST, INF,
]  # fmt: skip


def points():
    """Both signs of all sizes; every border of a domain with its neighbours; NaN."""
    generator = torch.Generator().manual_seed(0)
    edges = torch.tensor(EDGES)
    edges = torch.cat([edges, edges.nextafter(torch.tensor(0.0)), edges.nextafter(torch.tensor(INF))])
    sizes = torch.exp2(torch.rand(4000, generator=generator) * 40 - 30)
    unit = torch.rand(4000, generator=generator)
    near_one = 1 - torch.exp2(-torch.arange(1, 25).float())
    size = torch.cat([edges, sizes, unit, near_one, 2 - near_one])
    return torch.cat([size, -size, torch.tensor([NAN])])


def pairs():
    """Edges with edges, sizes with sizes, numbers with their neighbours, of all signs; logarithms that add to 1."""
    generator = torch.Generator().manual_seed(1)
    edges = torch.tensor([0.0, 1e-45, SMALLEST, 0.1, 0.5, 1.0, 2.0, 3.0, 10.0, 100.0, 1e19, LARGEST, INF])
    edges = torch.cat([edges, -edges, torch.tensor([NAN])])
    left, right = (x.flatten() for x in torch.meshgrid(edges, edges, indexing="ij"))
    a, b = torch.exp2(torch.rand(2, 8000, generator=generator) * 16 - 10)
    signs = torch.randint(0, 2, (2, 8000), generator=generator) * 2 - 1
    a, b = a * signs[0], b * signs[1]
    # e**x + e**y is nearly 1: the logarithm of the sum cancels.
    x = torch.rand(8000, generator=generator).clamp(0.05, 0.95)
    y = torch.log(1 - x) * (1 + torch.exp2(torch.rand(8000, generator=generator) * -24))
    return torch.cat([left, a, a, x.log(), x.log2()]), torch.cat([right, b, a * (1 + b * 1e-3), y, y / 0.6931472])


# --- The rule ---------------------------------------------------------------------------------------------------------


def ulp(truth):
    """The distance of float32 numbers at `truth`, float64."""
    exponent = torch.frexp(truth.abs().clamp(min=SMALLEST)).exponent - 24
    return torch.ldexp(torch.ones_like(truth), exponent)


def errors(values, truth):
    """In ulp; none where both are infinite or NaN alike."""
    values, rounded = values.double(), truth.float().double()
    error = (values - truth).abs() / ulp(truth)
    same = (values == rounded) | (values.isnan() & truth.isnan())
    return torch.where(same & ~truth.float().isfinite(), 0.0, error).nan_to_num(INF, INF)


def in_groups(error, key):
    """The largest error among the points whose binary exponent of `key` differs by at most 1."""
    exponent = torch.frexp(key.abs().nan_to_num(0.0, 1e300)).exponent.long() + 2000
    largest = torch.zeros(4000, dtype=torch.float64).scatter_reduce(0, exponent, error, "amax")
    return torch.stack([largest[exponent - 1], largest[exponent], largest[exponent + 1]]).amax(0)


CANCELS = ("logaddexp", "logaddexp2")  # a sum of the larger operand and of a logarithm
STEPS = ("fmod", "remainder", "floor_divide")  # which count how often the divisor fits


@pytest.fixture(scope="module")
def operands():
    """By the number of operands."""
    return {1: (points(),), 2: pairs()}


def of_row(name, operands, most):
    """The operands of a row; a divisor may fit `most` times, as the docs say."""
    chosen = operands[OPS[name].arity]
    if name in STEPS:
        fits = (chosen[0] / chosen[1]).abs()
        keep = ~((fits >= most) & fits.isfinite()) & ~((fits == INF) & (chosen[1] != 0) & chosen[0].isfinite())
        chosen = tuple(x[keep] for x in chosen)
    return chosen


def found(wrong, operands, *columns):
    """The first wrong points, in words."""
    return [tuple(x[i].item() for x in (*operands, *columns)) for i in wrong.nonzero()[:4, 0]]


@pytest.mark.parametrize("name", ROWS)
def test_float32(name, operands, tmp_path):
    x = of_row(name, operands, 2.0**29)
    truth = OPS[name].torch(*(part.double() for part in x))
    own, measure = (errors(values, truth) for values in (run(name, tmp_path, *x), OPS[name].torch(*x)))
    # Where PyTorch's function itself has another infinity or NaN there is nothing to compare with.
    finite = torch.where(measure.isfinite(), measure, 0.0)
    allowed = 2 * in_groups(finite, x[0] if len(x) == 1 else truth) + 4
    if name in CANCELS:  # the last place of what cancels, also where PyTorch was lucky: that depends on the processor
        largest = torch.maximum(x[0].abs(), x[1].abs()).double()
        allowed = torch.maximum(allowed, 4 * ulp(largest) / ulp(truth))
    wrong = ~(own <= allowed) & measure.isfinite()
    assert not wrong.any(), f"(operands, error, allowed, truth) = {found(wrong, x, own, allowed, truth)}"


@pytest.mark.parametrize("name", ROWS)
def test_float64(name, operands, tmp_path):
    x = tuple(part.double() for part in of_row(name, operands, 2.0**26))
    truth = OPS[name].torch(*x)
    own = errors(run(name, tmp_path, *x), truth)
    rounding = 2.0**-50 * torch.stack([part.abs() for part in x]).amax(0) / ulp(truth)
    wrong = ~(own <= 4 + rounding.nan_to_num(0.0, 0.0)) & ~truth.abs().gt(LARGEST)
    assert not wrong.any(), f"(operands, error, truth) = {found(wrong, x, own, truth)}"


def test_every_row_of_real_numbers_is_here():
    assert {name for name, op in OPS.items() if op.rule == "float"} <= set(ROWS)
    assert {name for name, op in OPS.items() if op.rule == "promote"} - set(ROWS) == {
        "abs", "add", "mul", "neg", "sign", "sub",
    }  # fmt: skip
