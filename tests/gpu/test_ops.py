"""The op table on the hardware: many operations in one kernel, because compiling takes longer than running."""

import pytest
import torch
import torch.nn.functional as F

from flexdecode import DecodeOptions, flex_decode
from flexdecode.frontend.ops import DTYPES, OPS

pytestmark = pytest.mark.gpu

INF = float("inf")
CODES = {"nan": 1e30, "inf": 2e30, "-inf": 3e30}  # what lse can say only in this way

# Exponentials are ex2.approx of a rounded product: an argument of 20 is off by 20 / 2**24. The rest is a few units in
# the last place.
PRECISION = 2.0**-18

FLOATS = torch.tensor(
    [0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.25, 7.75, 1e-3, -1e-3, 0.2, 0.25, -0.3, 20.0, -20.0]
)
INTEGERS = torch.tensor([0, 1, -1, 2, -2, 3, 5, -5, 7, -7, 8, 100, -100, 12345, -54321])


CANCELLING = {"logaddexp", "logaddexp2", "ndtr", "sinc"}  # digits cancel in PyTorch's function, or in both


def evaluate(functions, *operands):
    """Values `[len(functions), n]` of each function at each element of its operands `[n]`.

    With one key, the log-sum-exp of a row is its score: head j stands for function j, query token i for element i. The
    first operand is read once per row, the others in the KV loop.
    """
    on_gpu = [x.cuda() for x in operands]

    def score_mod(score, b, h, q_idx, kv_idx):
        total = score
        for j, function in enumerate(functions):
            y = function(*(x[q_idx] if k == 0 else x[q_idx + kv_idx] for k, x in enumerate(on_gpu))).float()
            y = torch.where(y == INF, CODES["inf"], torch.where(y == -INF, CODES["-inf"], y))
            total = torch.where(h == j, torch.where(y.isnan(), CODES["nan"], y), total)
        return total

    heads = len(functions)
    query, one = torch.zeros(1, heads, len(operands[0]), 16).cuda(), torch.zeros(1, heads, 1, 16).cuda()
    lse = flex_decode(query, one, one, score_mod, q_offset=0, return_lse=True, options=DecodeOptions(block_n=16))[1]
    lse = lse[0].cpu()
    for name, code in CODES.items():
        lse = torch.where((lse - code).abs() < 1e-5 * code, float(name), lse)
    return lse


def check(functions, *operands):
    """Compares functions, by name, with PyTorch on the CPU."""
    actual = evaluate(functions.values(), *operands)
    for (name, function), values in zip(functions.items(), actual, strict=True):
        try:
            expected = function(*operands).float()
        except RuntimeError:  # PyTorch refuses integers here
            expected = function(*(x.float() for x in operands)).float()
        atol = 1e-7 if name in CANCELLING else 0.0
        wrong = ~torch.isclose(values, expected, rtol=PRECISION, atol=atol, equal_nan=True)
        found = [(*(x[i].item() for x in operands), values[i].item(), expected[i].item()) for i in wrong.nonzero()]
        assert not found, f"{name}: (operands, got, expected) = {found[:4]}"


def of_torch(names):
    return {name: getattr(torch, name, None) or getattr(torch.special, name) for name in names}


def pairs(a, b):
    left, right = torch.meshgrid(a, b, indexing="ij")
    return left.flatten(), right.flatten()


UNARY = {name for name, op in OPS.items() if op.arity == 1}
BINARY = {name for name, op in OPS.items() if op.arity == 2 and op.rule in ("promote", "float", "compare")}
BITWISE = {name for name, op in OPS.items() if op.arity == 2 and op.rule == "integer"}
DIVISIONS = {"floor_divide", "remainder", "fmod"}


def test_unary_of_floats():
    x = torch.cat([FLOATS, torch.tensor([INF, -INF, torch.nan])])
    check(of_torch(sorted(UNARY - {"bitwise_not", "logical_not"})), x)


def test_unary_of_integers():
    check(of_torch(sorted(name for name in UNARY if OPS[name].rule in ("promote", "integer", "logical"))), INTEGERS)


def test_binary_of_floats():
    check(of_torch(sorted(BINARY - {"pow"})), *pairs(FLOATS, FLOATS))


def test_binary_of_infinities_and_nan():
    x = torch.tensor([INF, -INF, torch.nan, 0.0, 1.0, -2.5])
    check(of_torch(sorted(BINARY - {"pow", "floor_divide", "nextafter"})), *pairs(x, x))


def test_pow():
    base = torch.cat([FLOATS, torch.tensor([INF, -INF, torch.nan])])
    check({"pow": torch.pow}, *pairs(base, torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, -2.0, 0.5, 1.5])))


@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64), (torch.int8, torch.int32)], ids=str)
def test_binary_of_integers(dtypes):
    a, b = (x.to(dtype) for x, dtype in zip(pairs(INTEGERS, INTEGERS), dtypes, strict=True))
    functions = of_torch(sorted(BINARY | BITWISE - {"bitwise_left_shift", "bitwise_right_shift"}))
    for name in DIVISIONS:
        functions[name] = lambda a, b, name=name: getattr(torch, name)(a, torch.where(b == 0, 3, b))
    functions["pow"] = lambda a, b: torch.pow(a, torch.clamp(b, 0, 3))
    check(functions, a, b)


def test_integers_divided_by_zero_give_zero():
    actual = evaluate([torch.floor_divide, torch.remainder, torch.fmod], INTEGERS, torch.zeros_like(INTEGERS))
    assert (actual == 0).all()


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8], ids=str)
def test_shifts_by_any_amount(dtype):
    a, b = pairs(torch.tensor([0, 1, 5, 100]), torch.tensor([0, 1, 7, 8, 31, 32, 63, 64, 100]))
    check(of_torch(["bitwise_left_shift", "bitwise_right_shift"]), a.to(dtype), b.to(dtype))


def test_composed_functions():
    """On a grid that avoids the points where the result is a difference of nearly equal numbers."""
    x = torch.tensor([0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, 3.0, 7.75, 0.2, 0.25, -0.3, 19.0, 21.0])
    functions = {
        "clamp": lambda x: x.clamp(-1.0, 2.0),
        "relu": F.relu,
        "leaky_relu": F.leaky_relu,
        "elu": F.elu,
        "silu": F.silu,
        "gelu": F.gelu,
        "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
        "mish": F.mish,
        "selu": F.selu,
        "hardswish": F.hardswish,
        "softsign": F.softsign,
        "nan_to_num": lambda x: torch.nan_to_num(1 / x),
        "lerp": lambda x: torch.lerp(x, -2 * x, 0.25),
        "ldexp": lambda x: torch.ldexp(x, torch.tensor(3)),
        "softplus": F.softplus,
        "logsigmoid": F.logsigmoid,
        "square": torch.square,
        "python": lambda x: (1 - x) * 2 + (x // 0.75) + abs(-x) + 2.0 / (abs(x) + 1) + x**2,
    }
    check(functions, x)


@pytest.mark.parametrize("source", [torch.float32, torch.bfloat16, torch.int64, torch.int8, torch.bool], ids=str)
def test_casts(source):
    """To every type, also to bfloat16, which the interpreter cannot round to."""
    values = torch.tensor([0.0, 1.0, 2.0, 100.0, 0.5, 3.75, 99.9])
    if source.is_signed:
        values = torch.cat([values, torch.tensor([-1.0, -2.5])])
    targets = [target for target in DTYPES if not (target == torch.uint8 and source.is_signed)]
    check({str(target): lambda x, target=target: x.to(target) for target in targets}, values.to(source))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_arithmetic_rounds_each_operation(dtype):
    x = torch.tensor([0.1, 1.1, 3.3, 1000.1, -7.7])

    def function(a):
        a = a.to(dtype)
        return (a * 1.7 + a * a).float() - a.abs().clamp(max=1.0)

    check({"half": function}, x)


def test_int64_arithmetic():
    big = torch.tensor([2**40, -(2**40), 2**31, 2**62])
    check(
        {
            "sum": lambda x: (x + 5) // 2**20,
            "product": lambda x: x * 2 // 2**40,  # wraps around, as in PyTorch
            "difference": lambda x: (x - 2**31) // 2**10,
        },
        big,
    )
