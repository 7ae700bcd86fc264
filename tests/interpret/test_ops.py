"""Every operation of the op table, element by element, through the kernel and through the torch backend."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from flexdecode import DecodeOptions, flex_decode
from flexdecode.frontend.ops import DTYPES, OPS

INF, NAN = float("inf"), float("nan")
CODES = {"nan": 1e30, "inf": 2e30, "-inf": 3e30}  # what lse can say only in this way

# A few units in the last place of float32: two for an operation, two for reading it out as a log-sum-exp.
PRECISION = 4 * 2.0**-23


def evaluate(mod, num_elements, backend="triton"):
    """Values of `mod(i, zero)` for i = 0, 1, ...; `zero` is 0 but known only in the KV loop.

    With one key, the log-sum-exp of a row is its score. Query token i stands for element i.
    """

    def score_mod(score, b, h, q_idx, kv_idx):
        y = mod(q_idx, kv_idx).to(torch.float32)
        y = torch.where(y == INF, CODES["inf"], torch.where(y == -INF, CODES["-inf"], y))
        return torch.where(y.isnan(), CODES["nan"], y)

    query, one = torch.zeros(1, 1, num_elements, 16), torch.zeros(1, 1, 1, 16)
    options = DecodeOptions(backend=backend, block_n=16)
    lse = flex_decode(query, one, one, score_mod, q_offset=0, return_lse=True, options=options)[1].flatten()
    for name, code in CODES.items():
        lse = torch.where((lse - code).abs() < 1e-5 * code, float(name), lse)
    return lse


def check(mod, expected, precision=PRECISION, atol=0.0):
    """Compares both backends with `expected`, relative to its size."""
    for backend in ("triton", "torch"):
        actual = evaluate(mod, len(expected), backend)
        torch.testing.assert_close(actual, expected.to(torch.float32), rtol=precision, atol=atol, equal_nan=True)


# --- Operands ---------------------------------------------------------------------------------------------------------

FLOATS = torch.tensor(
    [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, -3.25, 7.75, 1e-3, -1e-3, 0.2, 0.25, -0.3, 20.0, -20.0]
)
SPECIAL = torch.tensor([INF, -INF, NAN])
INTEGERS = torch.tensor([0, 1, -1, 2, -2, 3, 5, -5, 7, -7, 8, 100, -100, 12345, -54321])
SMALL = torch.tensor([1, 2, 3, 5, 17])
PREDICATES = {name for name, op in OPS.items() if op.rule == "predicate"}


def pairs(a, b):
    """Every combination of two lists of elements."""
    left, right = torch.meshgrid(a, b, indexing="ij")
    return left.flatten(), right.flatten()


def mod_of(function, *operands):
    """Reads the first operand once per row, the others in the KV loop."""

    def mod(i, zero):
        return function(*(x[i] if k == 0 else x[i + zero] for k, x in enumerate(operands)))

    return mod


# Where digits cancel, in PyTorch's function or in both; test_accuracy.py compares these with float64.
ATOL = {"logaddexp": 1e-7, "logaddexp2": 1e-7, "ndtr": 1e-7}


def of_torch(name):
    """PyTorch's function of a row."""
    return getattr(torch, name, None) or getattr(torch.special, name)


def expected(name, *operands):
    """PyTorch's values; of integers as float32 where it refuses them."""
    function = OPS[name].torch if name == "ndtr" else of_torch(name)  # its own is 0 in the lower tail
    try:
        return function(*operands)
    except RuntimeError:
        return function(*(x.float() for x in operands))


UNARY = sorted(name for name, op in OPS.items() if op.arity == 1)
BINARY = sorted(name for name, op in OPS.items() if op.arity == 2 and op.rule in ("promote", "float", "compare"))
BITWISE = sorted(name for name, op in OPS.items() if op.rule == "integer")
LOGICAL = sorted(name for name, op in OPS.items() if op.rule == "logical")


def test_every_row_of_the_table_is_tested_here():
    assert {*UNARY, *BINARY, *BITWISE, *LOGICAL, "where"} == set(OPS)


@pytest.mark.parametrize("name", sorted(set(UNARY) - {"bitwise_not", "logical_not"}))
def test_unary_of_floats(name):
    function = of_torch(name)
    x = torch.cat([FLOATS, SPECIAL])
    check(mod_of(function, x), expected(name, x), atol=ATOL.get(name, 0.0))
    check(lambda i, zero: function(x[i + zero]), expected(name, x), atol=ATOL.get(name, 0.0))


@pytest.mark.parametrize("name", sorted({*UNARY} - {"logical_not"}))
@pytest.mark.parametrize("dtype", [torch.int64, torch.int16])
def test_unary_of_integers(name, dtype):
    function = of_torch(name)
    x = (INTEGERS if OPS[name].rule != "float" else torch.arange(-5, 6)).to(dtype)
    check(mod_of(function, x), expected(name, x), atol=ATOL.get(name, 0.0))


@pytest.mark.parametrize("name", sorted(set(BINARY) - {"pow"}))
def test_binary_of_floats(name):
    function = of_torch(name)
    a, b = pairs(FLOATS, FLOATS)
    check(mod_of(function, a, b), function(a, b), atol=ATOL.get(name, 0.0))


@pytest.mark.parametrize("name", sorted(set(BINARY) - {"pow", "floor_divide", "nextafter"}))
def test_binary_of_infinities_and_nan(name):
    function = of_torch(name)
    a, b = pairs(torch.cat([SPECIAL, FLOATS[:4]]), torch.cat([SPECIAL, FLOATS[:4]]))
    check(mod_of(function, a, b), function(a, b), atol=ATOL.get(name, 0.0))


@pytest.mark.parametrize("name", BINARY)
def test_binary_with_a_scalar(name):
    """One value for the whole tile, from a captured tensor or a captured 0-d tensor, beside one per key."""
    function, scalar, number = of_torch(name), torch.tensor([[2.0]]), torch.tensor(0.75)
    check(lambda i, zero: function(scalar[0, 0], FLOATS[i + zero]), function(scalar[0], FLOATS), 2 * PRECISION)
    check(lambda i, zero: function(FLOATS[i + zero], number), function(FLOATS, number), 2 * PRECISION)
    check(lambda i, zero: function(scalar[0, 0], number), function(scalar[0], number).expand(3), 2 * PRECISION)


def test_logic_of_a_scalar_condition():
    """A comparison of scalars joins conditions of every shape."""
    scale = torch.tensor([0.5])
    row = torch.arange(5) % 2 == 0
    for limit in (0.4, 0.6):
        on = torch.tensor(limit < 0.5)
        check(lambda i, zero: (scale[0] > limit) & (i % 2 == 0), on & row)
        check(lambda i, zero: ((i + zero) % 2 == 0) | (scale[0] > limit), row | on)
        check(lambda i, zero: ((i + zero) % 2 == 0) ^ scale[0].isfinite() ^ (limit < scale[0]), row ^ True ^ on)


@pytest.mark.parametrize("name", sorted(set(BINARY) - {"pow"}))
@pytest.mark.parametrize("dtypes", [(torch.int64, torch.int64), (torch.int32, torch.int64), (torch.int8, torch.int32)])
def test_binary_of_integers(name, dtypes):
    function = of_torch(name)
    a, b = (x.to(dtype) for x, dtype in zip(pairs(INTEGERS, INTEGERS), dtypes, strict=True))
    if name in ("floor_divide", "remainder", "fmod"):
        b = torch.where(b == 0, 3, b)  # where PyTorch raises
    check(mod_of(function, a, b), expected(name, a, b), atol=ATOL.get(name, 0.0))


def test_pow_of_floats():
    a, b = pairs(torch.cat([FLOATS, SPECIAL]), torch.tensor([0.0, 1.0, 2.0, 3.0, -1.0, -2.0, 0.5, 1.5, 7.25]))
    check(mod_of(torch.pow, a, b), a**b)


@pytest.mark.parametrize("exponent", [1.0, 2.0, 3.0, -1.0, -2.0, 0.5, 4.0])
def test_constant_powers(exponent):
    x = torch.cat([FLOATS, SPECIAL])
    check(lambda i, zero: x[i + zero] ** exponent, x ** torch.tensor(exponent))


def test_powers_of_two():
    x = torch.cat([FLOATS, SPECIAL])
    check(lambda i, zero: 2.0 ** x[i + zero], torch.exp2(x))


def test_pow_of_integers():
    a, b = pairs(torch.arange(-3, 4), torch.arange(0, 12))
    check(mod_of(torch.pow, a, b), a**b)


@pytest.mark.parametrize("name", BITWISE)
def test_bitwise(name):
    function = of_torch(name)
    if OPS[name].arity == 1:
        check(mod_of(function, INTEGERS), function(INTEGERS))
        return
    a, b = pairs(INTEGERS, torch.arange(9) if "shift" in name else INTEGERS)
    check(mod_of(function, a, b), function(a, b))


@pytest.mark.parametrize("name", LOGICAL)
@pytest.mark.parametrize("x", [torch.tensor([False, True]), FLOATS, INTEGERS], ids=["bool", "float", "integer"])
def test_logical(name, x):
    function = of_torch(name)
    operands = (x,) if OPS[name].arity == 1 else pairs(x, x)
    check(mod_of(function, *operands), function(*operands))


@pytest.mark.parametrize(
    "name", ["add", "mul", "maximum", "minimum", "fmax", "bitwise_and", "bitwise_or", "bitwise_xor", "eq"]
)
def test_two_bools(name):
    function = of_torch(name)
    a, b = pairs(torch.tensor([False, True]), torch.tensor([False, True]))
    check(mod_of(function, a, b), function(a, b))


def test_where():
    condition = FLOATS > 0
    check(mod_of(torch.where, condition, FLOATS, -2.0 * FLOATS), torch.where(condition, FLOATS, -2.0 * FLOATS))
    check(lambda i, zero: torch.where(condition[i], 1, 2.5), torch.where(condition, 1.0, 2.5))
    check(lambda i, zero: torch.where(condition[i + zero], INTEGERS[0], i), torch.where(condition, 0, torch.arange(19)))


@pytest.mark.parametrize("name", ["floor_divide", "remainder", "fmod"])
def test_an_integer_divided_by_zero_gives_zero(name):
    """PyTorch raises on a CPU; positions that do not attend must be free to divide by zero."""
    zeros = torch.zeros_like(INTEGERS)
    check(mod_of(of_torch(name), INTEGERS, zeros), zeros)


@pytest.mark.parametrize("name", ["bitwise_left_shift", "bitwise_right_shift"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint8], ids=str)
def test_shifts_by_any_amount(name, dtype):
    function = of_torch(name)
    a, b = pairs(torch.tensor([0, 1, 5, 100]), torch.tensor([0, 1, 7, 8, 31, 32, 63, 64, 100]))
    a, b = a.to(dtype), b.to(dtype)
    check(mod_of(function, a, b), function(a, b))


# --- Functions made of several rows -----------------------------------------------------------------------------------

COMPOSED = {
    "clamp": lambda x: x.clamp(-1.0, 2.0),
    "clamp_min": lambda x: x.clamp(min=0.5),
    "div_floor": lambda x: torch.div(x, 0.75, rounding_mode="floor"),
    "div_trunc": lambda x: torch.div(x, 0.75, rounding_mode="trunc"),
    "rsub": lambda x: torch.rsub(x, 2.0),
    "round_decimals": lambda x: torch.round(x, decimals=1),
    "square": torch.square,
    "frac": torch.frac,
    "erfc": torch.erfc,
    "relu": F.relu,
    "relu6": F.relu6,
    "hardtanh": F.hardtanh,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "softplus": F.softplus,
    "logsigmoid": F.logsigmoid,
    "masked_fill": lambda x: x.masked_fill(x > 1, -7.0),
    "zeros_like": torch.zeros_like,
    "full_like": lambda x: torch.full_like(x, 3.5),
    "python_operators": lambda x: (1 - x) * 2 + (x // 0.75) - (x % 0.6) + abs(-x) + 2.0 / (abs(x) + 1),
    "python_power": lambda x: x**2 + 2**x,
}
# Differences of nearly equal numbers: as in PyTorch's own text, the error is that of the larger operand.
CANCELLING = {"erfc", "gelu", "gelu_tanh", "frac", "python_operators", "round_decimals"}


@pytest.mark.parametrize("name", COMPOSED)
def test_composed(name):
    function = COMPOSED[name]
    for backend in ("triton", "torch"):
        actual = evaluate(lambda i, zero: function(FLOATS[i + zero]), len(FLOATS), backend)
        atol = PRECISION if name in CANCELLING else 0.0
        torch.testing.assert_close(actual, function(FLOATS), rtol=2 * PRECISION, atol=atol)


# --- Types ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("source", DTYPES, ids=str)
def test_casts(source):
    """To every type but bfloat16, and on to float32; the values are in the range of all types."""
    values = torch.tensor([0.0, 1.0, 2.0, 100.0, 0.5, 3.75, 99.9])
    if source.is_signed:
        values = torch.cat([values, torch.tensor([-1.0, -2.5])])
    x = values.to(source)
    for target in sorted(set(DTYPES) - {torch.bfloat16}, key=str):  # the interpreter's bfloat16 has other bits
        if target == torch.uint8 and source.is_signed:
            continue  # negative numbers have no defined result there
        check(mod_of(lambda a, target=target: a.to(target), x), x.to(target))


def test_half_arithmetic_rounds_each_operation():
    x = torch.tensor([0.1, 1.1, 3.3, 1000.1, -7.7])

    def function(a):
        a = a.half()
        return (a * 1.7 + a / 3).float() - a.exp2().clamp(max=1.0)

    check(mod_of(function, x), function(x))


def test_promotion_of_captured_dtypes():
    """int8 and uint8 make int16, int and float32 make float32, as in PyTorch."""
    a, b = torch.tensor([100, 127, -128], dtype=torch.int8), torch.tensor([200, 255, 255], dtype=torch.uint8)
    check(mod_of(torch.add, a, b), a + b)
    check(mod_of(torch.mul, a, b), a * b)
    check(mod_of(torch.add, a, torch.tensor([0.5, 1.5, 2.5])), a + torch.tensor([0.5, 1.5, 2.5]))


def test_small_integers_wrap_around():
    a = torch.tensor([100, 127, -128], dtype=torch.int8)
    check(mod_of(torch.add, a, a), a + a)
    check(mod_of(torch.mul, a, a), a * a)
    check(mod_of(torch.neg, a), -a)


def test_int64_arithmetic_is_not_narrowed():
    big = torch.tensor([2**40, -(2**40), 2**31, 2**62])
    check(lambda i, zero: (big[i + zero] + i) // 2**20, (big + torch.arange(4)) // 2**20)
    check(lambda i, zero: (i + 2**31) * (zero + 2**20) // 2**30, (torch.arange(4) + 2**31) * 2**20 // 2**30)
    # Sums that leave int64 wrap around, as in PyTorch.
    check(lambda i, zero: (big[i + zero] * 2) // 2**40, (big * 2) // 2**40)


def test_every_handler_name_is_a_function_of_pytorch():
    """The table names PyTorch functions; a misspelt row would never be reached."""
    for name in OPS:
        assert inspect.isbuiltin(of_torch(name)), name
