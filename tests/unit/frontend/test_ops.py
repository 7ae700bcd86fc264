"""Every row of the op table through its torch column, under all of its PyTorch names, and its integer ranges."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import POINTS, assert_same_as_pytorch, trace_mod

from flexdecode import TraceError
from flexdecode.frontend.handlers import ROWS
from flexdecode.frontend.ops import CONSTANT_SECOND, DTYPES, FLOATS, INT_LIMITS, OPS
from flexdecode.frontend.torch_functions import _REFLECTED

INT8 = torch.tensor([-128, -7, -1, 0, 1, 3, 100, 127], dtype=torch.int8)
UINT8 = torch.tensor([0, 1, 2, 7, 100, 128, 200, 255], dtype=torch.uint8)
INT16 = torch.tensor([-32768, -300, -1, 0, 2, 7, 300, 32767], dtype=torch.int16)
INT32 = torch.tensor([-(2**31), -70000, -1, 0, 3, 70000, 2**30, 2**31 - 1], dtype=torch.int32)
INT64 = torch.tensor([-(2**63), -(2**40), -1, 0, 5, 2**31, 2**62, 2**63 - 1])
BOOL = torch.tensor([True, False, True, True, False, False, True, False])
FLOAT = torch.tensor([-1.5, 0.0, 0.25, 1.0, 2.0, 1e-3, 7.5, float("inf")])

# Operands from (score, h, q_idx, kv_idx).
OPERANDS = {
    "score": lambda s, h, q, k: s,
    "index": lambda s, h, q, k: q - k,
    "bool": lambda s, h, q, k: k > 3,
    "int8": lambda s, h, q, k: INT8[k % 8],
    "uint8": lambda s, h, q, k: UINT8[k % 8],
    "int16": lambda s, h, q, k: INT16[k % 8],
    "int32": lambda s, h, q, k: INT32[k % 8],
    "int64": lambda s, h, q, k: INT64[k % 8],
    "float": lambda s, h, q, k: FLOAT[(k + h) % 8],
    "double": lambda s, h, q, k: (s + k).double(),
}
INTEGERS = ("index", "int8", "uint8", "int16", "int32", "int64", "bool")
HALVES = {"half": lambda s, h, q, k: s.half(), "bfloat16": lambda s, h, q, k: (s * 1.7).bfloat16()}

EXCHANGED = ("gt", "ge", "greater", "greater_equal")  # lt and le with their operands exchanged
ARITIES = {name: 2 if name in EXCHANGED else OPS[row].arity for name, row in ROWS.items()}
UNARY = sorted(name for name, arity in ARITIES.items() if arity == 1)
BINARY = sorted(name for name, arity in ARITIES.items() if arity == 2)


def forms(name):
    """The function `name` in torch and in torch.special, and the Tensor method."""
    found = [getattr(space, name) for space in (torch, torch.special) if hasattr(space, name)]
    if hasattr(torch.Tensor, name):
        found.append(lambda x, *rest: getattr(x, name)(*rest))
    return found


def compute(function, *operands):
    """The result of PyTorch, or None where it has none."""
    try:
        return function(*operands)
    except (RuntimeError, TypeError):
        return None


def allows(function, *operands):
    """Whether PyTorch itself computes this on 0-d tensors."""
    probe = [operand(torch.tensor(0.5), *torch.tensor([1, 6, 4])) for operand in operands]
    return compute(function, *probe) is not None


def mod_of(function, *operands):
    return lambda score, b, h, q_idx, kv_idx: function(*(x(score, h, q_idx, kv_idx) for x in operands)).float()


def nonzero(operand):
    """The operand with 3 for zeros, of at least int64."""

    def replaced(s, h, q, k):
        x = operand(s, h, q, k)
        return torch.where(x == 0, 3, x)

    return replaced


# --- The table --------------------------------------------------------------------------------------------------------


def test_rows_name_pytorch_functions():
    for name, op in OPS.items():
        assert op.name == name and forms(name)
        assert op.rule in ("promote", "float", "integer", "compare", "logical", "where", "predicate")
        assert op.triton.count("{") >= op.arity or name in ("logical_not",)


def test_no_name_means_two_rows():
    names = [name for op in OPS.values() for name in (op.name, *op.names)]
    assert len(names) == len(set(names))


def test_constant_divisors_are_rows():
    assert set(OPS) >= CONSTANT_SECOND


def test_every_name_is_called_here():
    """A name that neither torch nor Tensor has is the inside of an operator, `__and__` or `__rsub__`."""
    spelled = {name for name in ROWS if not forms(name)}
    assert {f"__{name}__" for name in spelled} <= set(dir(torch.Tensor)) | {"__mod__", "__invert__"}
    assert set(UNARY) | set(BINARY) | {"where"} == set(ROWS)
    assert set(_REFLECTED) <= set(dir(torch.Tensor))


# --- Values -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", UNARY)
def test_unary(name):
    for function, operand in itertools.product(forms(name), OPERANDS.values()):
        if name == "ndtr":  # PyTorch's is 1 + erf, of which nothing is left for negative numbers
            operand = lambda *point, operand=operand: operand(*point) ** 2
        if allows(function, operand):
            assert_same_as_pytorch(mod_of(function, operand), rtol=2e-7 if name == "ndtr" else 0.0)


@pytest.mark.parametrize("name", BINARY)
def test_binary(name):
    kinds = OPERANDS if name in OPS else ("score", "index", "uint8")
    for function in forms(name):
        for first, second in itertools.product(kinds, kinds):
            pair = OPERANDS[first], OPERANDS[second]
            if second in INTEGERS and ROWS[name] in CONSTANT_SECOND - {"pow"}:
                pair = pair[0], nonzero(pair[1])
            if allows(function, *pair):
                assert_same_as_pytorch(mod_of(function, *pair), POINTS[::3])


OPERATORS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
    "//": lambda a, b: a // b,
    "%": lambda a, b: a % b,
    "**": lambda a, b: a**b,
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
    "<<": lambda a, b: a << b,
    ">>": lambda a, b: a >> b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
}
NUMBERS = (3, -5, 2**40, True, 0.5, -1e-3, float("inf"))


@pytest.mark.parametrize("symbol", OPERATORS)
def test_operators_with_python_numbers(symbol):
    """On either side, literal and captured (a float then has float32 precision)."""
    operator = OPERATORS[symbol]
    # A power of 0.5 is a square root in PyTorch, which differs at -inf.
    points, rtol = (POINTS[:8:3], 1e-6) if symbol == "**" else (POINTS[1::3], 0.0)
    for (name, operand), number in itertools.product(OPERANDS.items(), NUMBERS):
        if (symbol, name, number) == ("**", "bool", True):
            continue  # a bool in PyTorch alone
        literal = eval(f"lambda x: x {symbol} {str(number).replace('inf', '1e999')}")
        if allows(literal, operand):
            assert_same_as_pytorch(mod_of(literal, operand), points, rtol)
            assert_same_as_pytorch(mod_of(lambda x: operator(x, number), operand), points, max(rtol, 2e-7))
        reflected = lambda x, n=number: operator(n, x)
        if allows(reflected, nonzero(operand)):
            assert_same_as_pytorch(mod_of(reflected, nonzero(operand)), points, 1e-5 if symbol == "**" else 2e-7)


@pytest.mark.parametrize("number", NUMBERS)
def test_true_division_by_python_numbers(number):
    for operand in OPERANDS.values():
        if allows(lambda x: x / number, operand):
            assert_same_as_pytorch(mod_of(lambda x: x / number, operand), rtol=1e-7)


def test_true_division_of_python_numbers():
    """PyTorch multiplies by the reciprocal, which rounds twice."""
    graph, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: 3.0 / (kv_idx + 1))
    assert "div" in graph.text and "reciprocal" not in graph.text


@pytest.mark.parametrize("kind", HALVES)
def test_half_types_round_each_result(kind):
    """Two roundings of PyTorch's own, in some functions, may make one unit in the last place."""
    x, unit = HALVES[kind], 2.0 ** {"half": -10, "bfloat16": -7}[kind]
    for name in set(UNARY) - {"logit", "ndtr"}:  # which PyTorch rounds on the way
        for function in forms(name):
            if allows(function, x):
                assert_same_as_pytorch(mod_of(function, x), POINTS[:7], rtol=unit)
    for operator in (OPERATORS[s] for s in ("+", "-", "*", "<", "==")):
        assert_same_as_pytorch(mod_of(operator, x, lambda *args, x=x: x(*args) * x(*args)))
        assert_same_as_pytorch(mod_of(operator, x, OPERANDS["float"]))


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.parametrize("number", [3, 70000, 0.1, -1e-3])
def test_python_numbers_join_half_types_unrounded(kind, number):
    """Literal and captured alike; a tensor that is made of a number is rounded."""
    for function in (lambda x: x * number, lambda x, n=number: x * n, lambda x: x / number, lambda x, n=number: x / n):
        assert_same_as_pytorch(mod_of(function, HALVES[kind]))
    for function in (
        lambda x: x.float() * torch.tensor(number, dtype=x.dtype),
        lambda x: torch.full_like(x, number).float(),
        lambda x: x.new_full((), number).float(),
        lambda x: x.new_tensor(0.1).float() * torch.tensor(0.1, dtype=x.dtype),
    ):
        assert_same_as_pytorch(mod_of(function, HALVES[kind]))


def test_python_and_torch_agree_on_negative_integers():
    for a, b in itertools.product(range(-7, 8), (-3, -2, -1, 1, 2, 3)):
        for name in ("floor_divide", "remainder"):
            assert OPS[name].torch(torch.tensor(a), torch.tensor(b)).item() == OPS[name].python(a, b)


def test_integer_division_by_zero_gives_zero():
    """A masked pair may divide by zero; PyTorch would raise on a CPU."""
    a, zero = torch.tensor([7, -7, 0]), torch.tensor(0)
    for name in ("floor_divide", "remainder", "fmod"):
        assert OPS[name].torch(a, zero).tolist() == [0, 0, 0]
    assert OPS["floor_divide"].torch(torch.tensor(1.0), torch.tensor(0.0)) == float("inf")


def test_where():
    for first, second in itertools.product(OPERANDS.values(), OPERANDS.values()):
        assert_same_as_pytorch(mod_of(lambda a, b: torch.where(a > 0, a, b), first, second), POINTS[::3])
    for a, b in ((1, 0), (1.0, 0), (2, 0.5), (True, False), (1, float("-inf"))):
        assert_same_as_pytorch(mod_of(lambda x, a=a, b=b: torch.where(x > 0, a, b) / 2, OPERANDS["score"]))


@pytest.mark.parametrize("operator", ["-", "//", "%", "**", "<<", ">>"])
def test_arithmetic_on_two_bools_is_refused_as_in_pytorch(operator):
    mod = mod_of(OPERATORS[operator], OPERANDS["bool"], OPERANDS["bool"])
    with pytest.raises(TraceError, match=r"is not defined for bools; convert one with \.int\(\) first"):
        trace_mod(mod)


@pytest.mark.parametrize("name", ["neg", "abs", "floor", "ceil", "round", "trunc"])
def test_unary_arithmetic_on_a_bool_is_refused(name):
    with pytest.raises(TraceError, match=f"{name} is not defined for bools"):
        trace_mod(mod_of(getattr(torch, name), OPERANDS["bool"]))


@pytest.mark.parametrize("operator", ["&", "|", "^", "<<", ">>"])
def test_bits_of_floats_are_refused(operator):
    with pytest.raises(TraceError, match=r"takes integers or bools, got torch\.float32"):
        trace_mod(mod_of(OPERATORS[operator], OPERANDS["score"], OPERANDS["index"]))


@pytest.mark.parametrize("operator", ["//", "%"])
@pytest.mark.parametrize("zero", [0, False])
def test_division_by_the_constant_zero_is_refused(operator, zero):
    with pytest.raises(TraceError, match="an integer is divided by zero"):
        trace_mod(mod_of(lambda x: OPERATORS[operator](x, zero), OPERANDS["index"]))


def test_a_negative_constant_power_of_an_integer_is_refused():
    with pytest.raises(TraceError, match="integers to negative integer powers are not allowed"):
        trace_mod(mod_of(lambda x: x**-1, OPERANDS["index"]))


# --- Integer ranges ---------------------------------------------------------------------------------------------------

RANGED = sorted(name for name, op in OPS.items() if op.range is not None)
LOW, HIGH = INT_LIMITS[torch.int64]
BORDERS = [0, 1, -1, 2, -2, 63, 64, 2**31, -(2**31), 2**40, HIGH, LOW]
numbers = st.sampled_from(BORDERS) | st.integers(-9, 9) | st.integers(LOW, HIGH)
intervals = st.tuples(numbers, numbers).map(lambda pair: tuple(sorted(pair)))


@st.composite
def interval_and_member(draw):
    low, high = draw(intervals)
    return (low, high), draw(st.sampled_from([low, high]) | st.integers(low, high))


@pytest.mark.parametrize("name", RANGED)
@given(data=st.data())
def test_ranges_contain_the_results(name, data):
    """Unless the range leaves int64: then the analysis takes the whole type."""
    op = OPS[name]
    operands = [data.draw(interval_and_member()) for _ in range(op.arity)]
    if name == "where":
        operands[0] = (0, 1), data.draw(st.booleans())
    low, high = op.range(*(interval for interval, _ in operands))
    result = op.torch(*(torch.tensor(member) for _, member in operands)).item()
    assert low <= result <= high or low < LOW or high > HIGH


def test_dtypes():
    assert len(DTYPES) == len(set(DTYPES)) == len(INT_LIMITS) + len(FLOATS)
    assert INT_LIMITS[torch.bool] == (0, 1) and INT_LIMITS[torch.uint8] == (0, 255)


def test_lcm_of_the_smallest_integer():
    """PyTorch's own ends the process there."""
    values = torch.tensor([-(1 << 63), -(1 << 63) + 1, -12, -1, 0, 1, 18, (1 << 63) - 1])
    assert OPS["lcm"].torch(values[:, None], values).shape == (8, 8)
    assert torch.equal(OPS["lcm"].torch(values[2:7, None], values[2:7]), torch.lcm(values[2:7, None], values[2:7]))
