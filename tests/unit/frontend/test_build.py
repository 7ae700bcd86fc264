"""Type promotion, constant folding and the one form that equal mods share."""

import itertools
import warnings

import pytest
import torch

from flexdecode.frontend.build import cast, check_constant, make, remake, sources, strong
from flexdecode.frontend.graph import Node, Source, const
from flexdecode.frontend.ops import DTYPES, OPS

H, Q, KV = (Node("index", (), torch.int64, name) for name in ("h", "q_idx", "kv_idx"))
SCORE = Node("score", (), torch.float32)
NUMBER = Node("number", (), torch.int64, Source(0), weak=True)
SIZE = Node("number", (), torch.int64, Source(1, dim=2), weak=True)


def variable(dtype, leaf=0):
    return Node("load", (), dtype, leaf)


# --- Types ------------------------------------------------------------------------------------------------------------

OPERANDS = [*((variable(d), torch.tensor(1, dtype=d)) for d in DTYPES), *((const(x), x) for x in (True, 2, 1.5))]


def pytorch_dtype(name, operands):
    """PyTorch's result type, by the function or the operator; None where both refuse."""
    for function in (getattr(torch, name, None) or getattr(torch.special, name), OPS[name].python):
        try:
            return function(*operands).dtype
        except (TypeError, RuntimeError, AttributeError):
            pass
    return None


def dtype_of(name, nodes):
    try:
        return make(name, *nodes).dtype
    except (TypeError, ValueError):
        return None


@pytest.mark.parametrize("name", sorted(name for name in OPS if name != "where"))
def test_result_types_are_those_of_pytorch(name):
    """For all pairs of types and Python numbers; what PyTorch refuses may work here."""
    for operands in itertools.product(OPERANDS, repeat=OPS[name].arity):
        nodes, real = zip(*operands, strict=True)
        if any(isinstance(x, torch.Tensor) for x in real):
            expected = pytorch_dtype(name, real)
            if (name, expected) != ("pow", torch.bool):  # a bool to the power of True is refused here
                assert expected in (None, dtype_of(name, nodes)), real


def test_result_types_of_where_are_those_of_pytorch():
    for (a, real_a), (b, real_b) in itertools.product(OPERANDS, OPERANDS):
        expected = torch.where(torch.tensor(True), real_a, real_b).dtype
        assert make("where", variable(torch.bool, 9), a, b).dtype == expected, (real_a, real_b)


def test_python_numbers_stay_python_numbers_among_themselves():
    half = make("div", NUMBER, const(2))
    assert half.weak and half.dtype == torch.float32
    assert make("add", half, variable(torch.float16)).dtype == torch.float16
    assert make("add", make("mul", NUMBER, const(3)), variable(torch.int8)).dtype == torch.int8
    assert make("lt", NUMBER, const(3)).weak
    assert not make("where", make("lt", NUMBER, const(3)), const(1), const(0)).weak


def test_operands_are_converted_to_the_common_type():
    node = make("add", variable(torch.int8), variable(torch.uint8))
    assert node.dtype == torch.int16 and [a.op for a in node.args] == ["cast", "cast"]
    node = make("lt", KV, SCORE)
    assert {a.dtype for a in node.args} == {torch.float32}


# --- Constants --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, numbers, value",
    [
        ("add", (2, 3), 5),
        ("div", (1, 4), 0.25),
        ("floor_divide", (-7, 2), -4),
        ("remainder", (-7, 3), 2),
        ("pow", (2, -1), 0.5),
        ("pow", (2, 0.5), 2**0.5),
        ("mul", (2**31, 2**31), 2**62),
        ("lt", (2, 3.5), True),
        ("sub", (True, True), 0),
        ("add", (True, True), 2),
        ("div", (0.1, 3), 0.1 / 3),
    ],
)
def test_python_numbers_fold_as_in_python(name, numbers, value):
    node = make(name, *(const(n) for n in numbers))
    assert node == const(value) and node.weak


def test_typed_constants_fold_as_in_pytorch():
    a, b = const(200, torch.uint8), const(100, torch.uint8)
    assert make("add", a, b) == const(44, torch.uint8)
    assert make("exp", const(0.0, torch.float32)) == const(1.0, torch.float32)
    assert make("floor_divide", const(-7, torch.int64), const(2, torch.int64)) == const(-4, torch.int64)
    assert make("where", const(True, torch.bool), const(1), const(2.5)) == const(1.0, torch.float32)
    assert make("logical_not", const(0, torch.int64)) == const(True, torch.bool)


def test_casts():
    assert cast(H, torch.int64) is H
    assert cast(H, torch.float32) == Node("cast", (H,), torch.float32)
    assert cast(H, torch.bool) == Node("ne", (H, const(0, torch.int64)), torch.bool)
    assert cast(const(0.1), torch.float32).attr == 0.1  # rounds where it is used
    assert cast(const(300, torch.int64), torch.uint8) == const(44, torch.uint8)
    assert cast(const(-1.7, torch.float32), torch.int32) == const(-1, torch.int32)
    assert cast(const(2), torch.bool) == const(True, torch.bool)
    assert cast(const(0.1, torch.float32), torch.float16).attr == torch.tensor(0.1).half().item()


def test_python_numbers_join_half_types_unrounded():
    assert cast(const(0.1), torch.float16).attr == 0.1
    assert strong(cast(const(0.1), torch.float16)) == const(torch.tensor(0.1).half().item(), torch.float16)
    joined = cast(NUMBER, torch.bfloat16)
    assert joined.weak and not strong(joined).weak and joined != strong(joined)


# --- One form ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", sorted(name for name, op in OPS.items() if op.commutative))
def test_the_order_of_commuting_operands_does_not_matter(name):
    for other in (KV, const(3), NUMBER):
        assert make(name, H, other) == make(name, other, H)


@pytest.mark.parametrize("name", ["add", "mul"])
def test_a_constant_stands_second(name):
    assert make(name, const(3), H).args[1].is_const


def test_greater_is_less_exchanged():
    assert make("gt", Q, KV) == make("lt", KV, Q)
    assert make("ge", Q, KV) == make("greater_equal", Q, KV) == make("le", KV, Q)


def test_bits_and_sums_of_bools_are_logic():
    a, b = make("lt", Q, KV), make("lt", H, KV)
    for name, other in (("bitwise_and", "mul"), ("bitwise_or", "add"), ("bitwise_and", "minimum")):
        assert make(name, a, b) == make(other, a, b)
        assert make(name, a, b).op in ("logical_and", "logical_or")
    assert make("bitwise_not", a) == make("logical_not", a)
    assert make("sign", a) is a


def test_trivial_conditions_disappear():
    a, true, false = make("lt", Q, KV), const(True, torch.bool), const(False, torch.bool)
    assert make("logical_and", a, true) == a == make("logical_or", false, a) == make("logical_and", a, a)
    assert make("logical_and", false, a) == false and make("logical_or", a, true) == true
    assert make("logical_not", make("logical_not", a)) == a
    assert make("where", true, H, KV) is H and make("where", false, H, KV) is KV and make("where", a, H, H) is H


def test_trivial_arithmetic_on_integers_disappears():
    assert make("add", H, const(0)) is H and make("sub", H, const(0)) is H and make("mul", const(1), H) is H
    assert make("floor_divide", H, const(1)) is H
    assert make("mul", H, const(-1)) == make("neg", H)
    # -0.0 + 0 is 0.0: a float stays.
    assert make("add", SCORE, const(0)).op == "add"
    # A Python number that becomes a tensor is another value.
    assert not make("add", NUMBER, const(0, torch.int64)).weak
    assert make("sub", const(0), H).op == "sub"


def test_remake_folds_what_became_constant():
    node = make("floor_divide", make("add", H, NUMBER), const(2))
    inner = node.args[0]
    again = remake(inner, tuple(const(5, torch.int64) if a is H else const(3) for a in inner.args))
    assert remake(node, (again, node.args[1])) == const(4, torch.int64)
    assert remake(SCORE, ()) == SCORE
    assert remake(strong(cast(NUMBER, torch.float16)), (const(0.1),)) == strong(cast(const(0.1), torch.float16))
    assert remake(cast(NUMBER, torch.float16), (const(0.1),)) == cast(const(0.1), torch.float16)


def test_sources_are_the_python_numbers_below():
    tensor = Node("number", (), torch.float32, Source(7))  # a captured 0-d tensor
    assert sources(make("add", make("mul", NUMBER, H), make("add", SIZE, tensor))) == {Source(0), Source(1, 2)}
    assert sources(H) == set()


# --- Refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, nodes, error, message",
    [
        ("sub", (make("lt", Q, KV), make("lt", H, KV)), TypeError, "sub is not defined for bools"),
        ("floor", (make("lt", Q, KV),), TypeError, "floor is not defined for bools"),
        ("bitwise_and", (SCORE, H), TypeError, r"bitwise_and takes integers or bools, got torch\.float32"),
        ("floor_divide", (H, const(0)), ZeroDivisionError, "an integer is divided by zero"),
        ("remainder", (H, const(0, torch.int64)), ZeroDivisionError, "an integer is divided by zero"),
        ("pow", (H, const(-1)), ValueError, "integers to negative integer powers are not allowed"),
        ("pow", (NUMBER, const(-1)), ValueError, "integers to negative integer powers are not allowed"),
        ("pow", (const(-8), const(0.5)), ValueError, "the result is complex"),
        ("pow", (const(3), const(99)), OverflowError, "does not fit into int64"),
        ("div", (const(1), const(0)), ZeroDivisionError, "division by zero"),
    ],
)
def test_refusals(name, nodes, error, message):
    with pytest.raises(error, match=message):
        make(name, *nodes)


def test_floats_divide_by_zero():
    assert make("floor_divide", SCORE, const(0)).op == "floor_divide"
    assert make("pow", SCORE, const(-1)).op == "pow"


def test_large_python_integers():
    check_constant(2**63 - 1)
    check_constant(-(2**63))
    check_constant(1e300)
    with pytest.raises(OverflowError, match="the number 9223372036854775808 does not fit into int64"):
        check_constant(2**63)


def test_folding_does_not_warn():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert make("div", const(1.0, torch.float32), const(0.0, torch.float32)).attr == float("inf")
