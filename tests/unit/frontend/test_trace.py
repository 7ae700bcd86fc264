"""What a mod may be and capture, captured numbers in Python code, results, and random mods against PyTorch."""

import collections
import enum
import functools
import math
import operator
import sys
import types

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import POINTS, assert_close_to_reference, assert_same_as_pytorch, evaluate_graph, make_inputs, trace_mod
from torch.nn.attention.flex_attention import and_masks, noop_mask, or_masks

from flexdecode import TraceError, UnsupportedOpError, flex_decode, mods
from flexdecode.frontend.captures import walk
from flexdecode.frontend.graph import Source
from flexdecode.frontend.trace import trace
from flexdecode.runtime import evaluation
from flexdecode.runtime.identity import graph_of, identify
from flexdecode.runtime.launch import CaptureReader

B, Hq, N, Q = 2, 4, 19, 2
QUERY, KEY, VALUE = make_inputs(B, Hq, 2, Q, N, 16)
LENS = torch.tensor([N, 11])

generator = torch.Generator().manual_seed(3)
slopes = torch.rand(Hq, generator=generator)
table = torch.randn(Hq, N, generator=generator)
keep = torch.rand(B, N, generator=generator) > 0.4
GLOBAL_WINDOW = 7


def check(score_mod=None, mask_mod=None):
    out, lse = flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS, return_lse=True)
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS)


def constants_of(mod, kind="score_mod"):
    """The captured numbers whose value is part of the graph (sizes of tensors apart), and the graph."""
    _, leaves = walk(mod)
    traced = trace(mod, kind, leaves, torch.device("cpu"))
    return [leaves[source.leaf] for source in sorted(traced.constants) if source.dim < 0], traced.graph


# --- Callables --------------------------------------------------------------------------------------------------------


def causal(b, h, q_idx, kv_idx):
    return kv_idx <= q_idx


def global_window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < GLOBAL_WINDOW


class Bias:
    """A callable object, a bound method, a static and a class method."""

    scale = 0.5

    def __init__(self):
        self.table = table

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.scale * self.table[h, kv_idx]

    def method(self, score, b, h, q_idx, kv_idx):
        return self(score, b, h, q_idx, kv_idx) * 2

    @staticmethod
    def static(score, b, h, q_idx, kv_idx):
        return score * 3

    @classmethod
    def of_class(cls, score, b, h, q_idx, kv_idx):
        return score * cls.scale


class Module(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(slopes.clone())
        self.register_buffer("bias", table.clone())
        self.activation = torch.nn.Tanh()
        self.classes = torch.nn.Embedding(5, Hq)
        self.cap = 3.0

    def forward(self, score, b, h, q_idx, kv_idx):
        score = self.activation(score / self.cap) * self.cap + self.classes(kv_idx % 5)[h]
        return score + self.weight[h] * self.bias[h, kv_idx]


def with_defaults(score, b, h, q_idx, kv_idx, slope=0.25, *, offset=2):
    return score - slope * (q_idx - kv_idx + offset)


def nested(score, b, h, q_idx, kv_idx):
    def inner(x):
        return x * slopes[h]

    return functools.reduce(lambda x, f: f(x), [inner, torch.tanh], score)


SCORE_MODS = {
    "object": Bias(),
    "method": Bias().method,
    "static_method": Bias.static,
    "class_method": Bias.of_class,
    "defaults": with_defaults,
    "partial": functools.partial(with_defaults, slope=0.5),
    "partial_keyword": functools.partial(with_defaults, offset=3),
    "nested": nested,
    "variadic": lambda *arguments: arguments[0] * 2,
    "partly_variadic": lambda score, *rest: score + slopes[rest[1]],
    "decorated": torch.no_grad()(nested),
}


@pytest.mark.parametrize("mod", SCORE_MODS.values(), ids=SCORE_MODS)
def test_score_mods_of_every_kind(mod):
    check(mod)


def test_a_module_as_mod():
    with torch.no_grad():
        check(Module())


@pytest.mark.parametrize(
    "mod",
    [
        causal, global_window, noop_mask, and_masks(), or_masks(), and_masks(causal, global_window),
        or_masks(lambda b, h, q, kv: kv < 2, and_masks(causal, lambda b, h, q, kv: keep[b, kv])),
        lambda b, h, q, kv: True, lambda b, h, q, kv: False, lambda b, h, q, kv: torch.tensor(True),
        lambda b, h, q, kv: b.new_ones((), dtype=torch.bool), lambda b, h, q, kv: keep[b, kv] | (kv > q),
        lambda b, h, q, kv: (kv % 2 == 0) & ~(kv > 12) ^ (h == 1), lambda b, h, q, kv: ((kv > 3) + (kv < 9)) * (h > 0),
    ],
)  # fmt: skip
def test_mask_mods_of_every_kind(mod):
    check(None, mod)


def test_both_mods():
    check(Bias(), and_masks(causal, global_window))


@pytest.mark.parametrize("value", [1.0, 0, 2, np.float32(0.5)])
def test_a_score_mod_may_return_a_number(value):
    check(lambda score, b, h, q_idx, kv_idx: float(value))
    check(lambda score, b, h, q_idx, kv_idx: kv_idx)


# --- Captured tensors -------------------------------------------------------------------------------------------------


class Wrapped(torch.Tensor):
    pass


LAYOUTS = {
    "stepped": torch.randn(Hq, 2 * N)[:, ::2],
    "transposed": torch.randn(N, Hq).t(),
    "expanded": torch.randn(1, N).expand(Hq, N),
    "offset": torch.randn(3, Hq, N)[1],
    "subclass": torch.randn(Hq, N).as_subclass(Wrapped),
    "parameter": torch.nn.Parameter(torch.randn(Hq, N), requires_grad=False),
    "double": torch.randn(Hq, N, dtype=torch.float64),
    "half": torch.randn(Hq, N).half(),
    "bfloat16": torch.randn(Hq, N).bfloat16(),
    "int8": torch.randint(-9, 9, (Hq, N), dtype=torch.int8),
    "int16": torch.randint(-9, 9, (Hq, N), dtype=torch.int16),
    "int32": torch.randint(-9, 9, (Hq, N), dtype=torch.int32),
    "uint8": torch.randint(0, 9, (Hq, N), dtype=torch.uint8),
    "bool": torch.rand(Hq, N) > 0.5,
    "too_small": torch.randn(2, 3),
    "empty": torch.zeros(0, N),
}


@pytest.mark.parametrize("captured", LAYOUTS.values(), ids=LAYOUTS)
def test_captured_tensors_of_every_layout(captured):
    check(lambda score, b, h, q_idx, kv_idx: score + 0.5 * captured[h, kv_idx] + captured[-1, kv_idx - 3] * 2)


SCALARS = [torch.tensor(x) for x in (0.7, 3, True)] + [torch.tensor(2, dtype=torch.int16), torch.tensor(0.7).half()]


@pytest.mark.parametrize("scalar", SCALARS)
def test_0d_tensors_are_read_as_numbers(scalar):
    check(lambda score, b, h, q_idx, kv_idx: score * scalar + scalar - (scalar + 1) * slopes[h])
    graph, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: score * scalar)
    assert graph.tensors == () and graph.numbers == (Source(0),)


def test_0d_integer_tensors_in_integer_arithmetic():
    three, wide = torch.tensor(3), torch.tensor(200, dtype=torch.uint8)
    check(lambda score, b, h, q_idx, kv_idx: score + kv_idx // three + kv_idx % three + (kv_idx << three) * 0.01)
    check(
        lambda score, b, h, q_idx, kv_idx: score + (2**three) + (three - kv_idx) + slopes[three] + (wide + wide) * 0.01
    )


def test_nothing_of_a_captured_tensor_is_frozen():
    """One trace, then other contents, strides, shapes: every value is read at the call."""
    captured = torch.randn(Hq, N)

    def mod(score, b, h, q_idx, kv_idx):
        return score + captured.exp()[h, kv_idx] + captured[1:, 2:][h, kv_idx] + captured.T[kv_idx, h]

    for other in (captured.mul_(0.5), torch.randn(Hq, N), torch.randn(N, Hq).T, torch.randn(2, 5)):
        captured = other
        check(mod)


def test_factories_of_numbers_are_constants():
    mod = lambda score, b, h, q_idx, kv_idx: score + torch.tensor(0.5) + torch.zeros(3)[h] + torch.arange(8)[h]
    check(mod)
    graph, _ = trace_mod(mod)
    assert graph.numbers == () and len(graph.frozen) == 1
    graph, _ = trace_mod(lambda s, b, h, q, k: s + torch.arange(4)[h] + torch.tensor([0, 1, 2, 3])[h])
    assert len(graph.frozen) == 1, "equal constants are one"


# --- Captured numbers -------------------------------------------------------------------------------------------------


def uses(W):
    """Mods of a captured number: those that read it when the kernel runs, and those that make it a constant."""
    run_time = {
        "difference": lambda s, b, h, q, k: s - W * h,
        "comparison": lambda s, b, h, q, k: torch.where(q - k < W, s, -1.0),
        "comparison_value": lambda s, b, h, q, k: s + (k < W) + (q >= W),
        "negation": lambda s, b, h, q, k: s + -W,
        "power": lambda s, b, h, q, k: s + W**2,
        "quotient": lambda s, b, h, q, k: s * (W / 3) + s / W + (W + 0.1) / 7,
        "half": lambda s, b, h, q, k: torch.where(k < W // 2, s, 0.0) + W % 2,
        "where": lambda s, b, h, q, k: torch.where(k < 3, W, -W) + s,
        "bounds": lambda s, b, h, q, k: s.clamp(-W, W),
        "tensor": lambda s, b, h, q, k: s + torch.tensor(W) * torch.full_like(s, W) + s.new_full((), W),
        "half_type": lambda s, b, h, q, k: s + torch.tensor(W, dtype=torch.bfloat16),
        "logic": lambda s, b, h, q, k: s + (k & W) + (W | 1) + (W ^ k),
        "index": lambda s, b, h, q, k: s + table[W - 5, k] + slopes[W % 4],
        "size": lambda s, b, h, q, k: s + torch.zeros(W)[k % 5],
        "sum": lambda s, b, h, q, k: s + sum([W, W, 1]) + math.prod([W, 2]),
        "default": lambda s, b, h, q, k, w=W: s * w,
        "narrow": lambda s, b, h, q, k: s + (k.to(torch.uint8) + W) * 0.01,
    }
    constant = {
        "divisor": lambda s, b, h, q, k: s + k // W,
        "modulus": lambda s, b, h, q, k: s + k % W,
        "shift": lambda s, b, h, q, k: s + (k << W) * 0.01 + (k >> W) + (1 << W) * 0.01,
        "exponent": lambda s, b, h, q, k: s.abs() ** W + s * 2**-W,
        "max": lambda s, b, h, q, k: s + max(W, 3) * min(W, 3),
        "range": lambda s, b, h, q, k: sum((s * 0.1 for _ in range(W)), s),
        "if": lambda s, b, h, q, k: s if W > 5 else s * 2,
        "conditional_chain": lambda s, b, h, q, k: s if 1 < W < 6 else s * 2,
        "not": lambda s, b, h, q, k: s * (W and 3) if W else s * 2,
        "isinstance": lambda s, b, h, q, k: s * 2 if isinstance(W, int) else s * 3,
        "type": lambda s, b, h, q, k: s * 2 if type(W) is int else s * 3,
        "in": lambda s, b, h, q, k: s if W in (5, 6) else s * 2,
        "math": lambda s, b, h, q, k: s * math.sqrt(W) + math.log2(W) + math.floor(W),
        "numpy": lambda s, b, h, q, k: s * float(np.sqrt(W)),
        "int": lambda s, b, h, q, k: s * int(W) + float(W),
        "round": lambda s, b, h, q, k: s * round(W / 3, 1) + round(W + 0.5),
        "float_divisor": lambda s, b, h, q, k: s + (W * 0.1) // 0.1 + (W * 0.06) % 0.1,
        "format": lambda s, b, h, q, k: s * float(f"{W}"),
        "string": lambda s, b, h, q, k: s * len(str(W)),
        "method": lambda s, b, h, q, k: s * W.bit_length() + W.real,
        "list": lambda s, b, h, q, k: s * [1, 2, 3, 4, 5, 6, 7, 8][W],
        "dict": lambda s, b, h, q, k: s * {5: 1, 7: 2}[W],
        "list_of_tensor": lambda s, b, h, q, k: s + torch.tensor([W, W])[k % 2],
        "arange": lambda s, b, h, q, k: s + torch.arange(W)[k % 5],
        "expand": lambda s, b, h, q, k: s + table[:, :1].expand(4, W)[h, k],
        "slice": lambda s, b, h, q, k: s + table[h, W:][k - W],
        "inverse": lambda s, b, h, q, k: s + W**-1,
        "invert": lambda s, b, h, q, k: s + ~(W > 3),
        "except": lambda s, b, h, q, k: s * attempt(lambda: int(W)),
    }
    return run_time, constant


def attempt(function):
    try:
        return function()
    except Exception:
        return 100


RUN_TIME, CONSTANT = (list(table) for table in uses(5))


@pytest.mark.parametrize("name", RUN_TIME)
def test_numbers_that_are_read_at_run_time(name):
    for W in (5, 7):
        mod = uses(W)[0][name]
        check(mod)
        assert constants_of(mod)[0] == []
    assert constants_of(uses(5)[0][name])[1] == constants_of(uses(7)[0][name])[1]


@pytest.mark.filterwarnings("ignore:Bitwise inversion:DeprecationWarning")
@pytest.mark.parametrize("name", CONSTANT)
def test_numbers_that_become_constants(name):
    for W in (5, 7):
        mod = uses(W)[1][name]
        check(mod)
        assert constants_of(mod)[0] == [W]


def test_only_the_number_that_is_consumed_becomes_constant():
    period, slope, window = 4, 0.5, 9

    def mod(score, b, h, q_idx, kv_idx):
        if slope > 0:
            score = score - slope * (q_idx // period)
        return torch.where(kv_idx < window, score, 0.0)

    constants, graph = constants_of(mod)
    assert sorted(constants) == [slope, period] and len(graph.numbers) == 1
    check(mod)


def test_a_number_in_a_branch_that_is_not_taken_stays_free():
    deep, limit = False, 3
    mod = lambda s, b, h, q, k: s * limit if not deep else s * range(limit)[0]
    assert constants_of(mod)[0] == []


VALUES = [sys.maxsize, -sys.maxsize - 1, 2**40, 0, -3, 1.5, 1e30, -0.0]


@pytest.mark.parametrize("W", VALUES)
def test_extreme_numbers(W):
    check(lambda s, b, h, q, k: torch.where((q - k < W) | (k * 1.0 < W), s, s * 0.5))
    check(None, lambda b, h, q, k: (k - W < q) | (k == 0) if isinstance(W, float) else (k <= q) & (q - k < W))


@pytest.mark.parametrize("W", [float("inf"), float("nan"), True, np.float64(0.5), np.int32(3), np.bool_(True)])
def test_unusual_numbers(W):
    check(lambda s, b, h, q, k: torch.where(k < W, s, s * 0.5))


def test_enums_and_subclasses_of_numbers():
    class Window(enum.IntEnum):
        SMALL = 5

    class Level(enum.Enum):
        LOW = 2

    class Meters(float):
        pass

    small, length = Window.SMALL, Meters(0.5)
    check(lambda s, b, h, q, k: s * Window.SMALL + small)
    check(lambda s, b, h, q, k: s * Level.LOW.value if small is Window.SMALL else s)
    check(lambda s, b, h, q, k: s * length)


@pytest.mark.parametrize("literal", [False, True])
def test_numbers_too_large_for_int64(literal):
    huge = 2**64
    mod = (lambda s, b, h, q, k: s + 18446744073709551616) if literal else (lambda s, b, h, q, k: s + huge)
    with pytest.raises(TraceError, match="the number 18446744073709551616 does not fit into int64"):
        flex_decode(QUERY, KEY, VALUE, mod)


def test_python_arithmetic_is_pythons():
    """`1 << W`, `W * W` and `1 / 3` before any tensor is involved."""
    check(lambda s, b, h, q, k: s + (1 << 5) + 7 // 2 + -7 % 3 + 2**-2 + 1 / 3)
    W, third = 7, 1 / 3
    check(lambda s, b, h, q, k: s + W * W - W // 2 + third * W)


# --- Equal mods -------------------------------------------------------------------------------------------------------


def test_equal_mods_are_equal_graphs():
    other = torch.rand(9)

    def spelled_out(score, batch, head, query, key):
        bias = other[head]
        doubled = bias * 2
        return doubled + score

    W = 3
    graph, _ = trace_mod(lambda s, b, h, q, k: s + 2 * slopes[h])
    assert graph == trace_mod(spelled_out)[0]
    assert graph != trace_mod(lambda s, b, h, q, k: s + W * slopes[h])[0]
    assert trace_mod(lambda b, h, q, k: q >= k, "mask_mod")[0] == trace_mod(causal, "mask_mod")[0]


def test_common_subexpressions_are_one_node():
    graph, _ = trace_mod(lambda s, b, h, q, k: s * torch.exp(slopes[h]) + torch.exp(slopes[h]) * (q - k) * (q - k))
    assert graph.text.count("exp(") == graph.text.count("sub(") == graph.text.count("load(") == 1


def test_the_mod_runs_only_while_it_is_traced(capsys):
    def mod(score, b, h, q_idx, kv_idx):
        print("run")
        return score * 2

    flex_decode(QUERY, KEY, VALUE, mod)
    assert "run" in capsys.readouterr().out
    flex_decode(QUERY, KEY, VALUE, mod)
    assert capsys.readouterr().out == ""


def test_a_mod_that_changes_a_captured_list_is_refused():
    runs = []

    def mod(score, b, h, q_idx, kv_idx):
        runs.append(1)
        return score * 2

    with pytest.raises(TraceError, match="score_mod 'mod' changes what it captures"):
        flex_decode(QUERY, KEY, VALUE, mod)


def test_the_arguments_look_like_0d_tensors():
    seen = []
    trace_mod(lambda *arguments: seen.append([(x.dtype, x.shape, x.ndim) for x in arguments]) or arguments[0])
    assert seen[0] == [(torch.float32, (), 0)] + [(torch.int64, (), 0)] * 4
    with pytest.raises(TraceError) as caught:
        trace_mod(lambda s, b, h, q, k: print(s) or s.item())
    assert "read" in str(caught.value)


# --- Results and parameters -------------------------------------------------------------------------------------------


def nothing(score, b, h, q_idx, kv_idx):
    score * 2


@pytest.mark.parametrize(
    "mod, message",
    [
        (nothing, r"score_mod 'nothing' returned None; it must return a score \(a float\) \(forgot `return`\?\)"),
        (lambda s, b, h, q, k: "x", r"score_mod '<lambda>' returned a str; it must return a score \(a float\)"),
        (lambda s, b, h, q, k: (s, s), "returned a tuple; it must return a score"),
        (lambda s, b, h, q, k: [s], "returned a list; it must return a score"),
        (lambda s, b, h, q, k: 1j, "returned a complex; it must return a score"),
        (lambda s, b, h, q, k: k < q, r"must return a score: use torch.where\(condition, score, -inf\)"),
        (lambda s, b, h, q, k: True, "returned a bool; it must return a score"),
        (lambda s, b, h, q, k: s + table[h], r"returned a tensor with 1 dimension\(s\); it must return one value for one \(query, key\) pair: index the captured tensor"),  # noqa: E501
        (lambda s, b, h, q, k: table, r"returned a tensor with 2 dimension\(s\)"),
    ],
)  # fmt: skip
def test_bad_results_of_a_score_mod(mod, message):
    with pytest.raises(TraceError, match=message):
        flex_decode(QUERY, KEY, VALUE, mod)


def halves(score, b, h, q_idx, kv_idx):
    yield score / 2


async def later(score, b, h, q_idx, kv_idx):
    return score


class Unindexed:
    bias = torch.zeros(4, 3)

    def __call__(self, score, b, h, q_idx, kv_idx):
        return score + self.bias[h] + slopes[h]


@pytest.mark.parametrize(
    "mod, problem, defined",
    [
        (halves, "'halves' returned a generator; it must return a score (a float) (use return, not yield)", halves),
        (later, "'later' returned a coroutine; it must return a score (a float) (use def, not async def)", later),
        (nothing, "'nothing' returned None; it must return a score (a float) (forgot `return`?)", nothing),
        (
            functools.partial(lambda s, b, h, q, k: (s, s)),
            "'partial' returned a tuple; it must return a score (a float) (return one value)",
            None,
        ),
        (
            Unindexed(),
            "'Unindexed' returned a tensor with 1 dimension(s); it must return one value for one (query, key) pair: "
            "index the captured tensor `self.bias` with b, h, q_idx or kv_idx",
            Unindexed.__call__,
        ),
    ],
)
def test_a_bad_result_names_the_definition(mod, problem, defined):
    with pytest.raises(TraceError) as caught:
        flex_decode(QUERY, KEY, VALUE, mod)
    first, place = str(caught.value).splitlines()
    assert first == f"score_mod {problem}"
    assert place.startswith(f"  {__file__}:{'' if defined is None else defined.__code__.co_firstlineno}")


@pytest.mark.parametrize(
    "mod, message",
    [
        (lambda b, h, q, k: None, r"mask_mod '<lambda>' returned None; it must return a bool \(forgot `return`\?\)"),
        (
            lambda b, h, q, k: 1,
            r"mask_mod '<lambda>' returned torch.int64; it must return a bool: compare it, e.g. `x != 0`",
        ),
        (lambda b, h, q, k: 0.5, "returned torch.float32; it must return a bool"),
        (lambda b, h, q, k: q - k, "returned torch.int64; it must return a bool"),
        (lambda b, h, q, k: slopes[h], "returned torch.float32; it must return a bool"),
        (lambda b, h, q, k: "yes", "returned a str; it must return a bool"),
        (lambda b, h, q, k: keep[b], r"returned a tensor with 1 dimension\(s\)"),
    ],
)
def test_bad_results_of_a_mask_mod(mod, message):
    with pytest.raises(TraceError, match=message):
        flex_decode(QUERY, KEY, VALUE, None, mod)


@pytest.mark.parametrize(
    "mod, signature",
    [
        (lambda s, b, h: s, r"\(s, b, h\)"),
        (lambda s, b, h, q, k, extra: s, r"\(s, b, h, q, k, extra\)"),
        (lambda s, b, h, q, k, *, extra: s, r"\(s, b, h, q, k, \*, extra\)"),
    ],
)
def test_wrong_parameters(mod, signature):
    expected = r"`score_mod` must take 5 positional parameters \(score, b, h, q_idx, kv_idx\), but '<lambda>' has the "
    with pytest.raises(TypeError, match=f"{expected}signature {signature}"):
        flex_decode(QUERY, KEY, VALUE, mod)


def test_a_score_mod_in_the_place_of_a_mask_mod():
    with pytest.raises(TypeError) as caught:
        flex_decode(QUERY, KEY, VALUE, None, nested)
    assert str(caught.value).splitlines() == [
        "`mask_mod` must take 4 positional parameters (b, h, q_idx, kv_idx), but 'nested' has the five parameters of a "
        "score_mod: (score, b, h, q_idx, kv_idx)",
        "  Pass it as `score_mod=`.",
    ]


def test_a_mask_mod_in_the_place_of_a_score_mod():
    with pytest.raises(TypeError) as caught:
        flex_decode(QUERY, KEY, VALUE, mods.causal())
    assert "'causal' has the four parameters of a mask_mod: (b" in str(caught.value)
    assert str(caught.value).endswith("\n  Pass it as `mask_mod=`.")


@pytest.mark.parametrize(
    "kind, shape, remedy",
    [
        ("mask_mod", (6, 6), "lambda b, h, q_idx, kv_idx: mask[q_idx, kv_idx]"),
        ("mask_mod", (2, 4, 6, 6), "lambda b, h, q_idx, kv_idx: mask[b, h, q_idx, kv_idx]"),
        ("mask_mod", (6,), "lambda b, h, q_idx, kv_idx: mask[kv_idx]"),
        ("score_mod", (4, 6, 6), "lambda score, b, h, q_idx, kv_idx: score + bias[h, q_idx, kv_idx]"),
    ],
)
def test_a_tensor_in_the_place_of_a_mod(kind, shape, remedy):
    tensor = torch.zeros(shape, dtype=torch.bool if kind == "mask_mod" else torch.float32)
    with pytest.raises(TypeError) as caught:
        flex_decode(QUERY, KEY, VALUE, **{kind: tensor})
    assert str(caught.value).splitlines() == [
        f"`{kind}` must be a callable or None, got Tensor",
        f"  Capture it: `{kind}={remedy}`",
    ]
    made = eval(remedy, {"mask": tensor, "bias": tensor})
    assert flex_decode(QUERY, KEY, VALUE, **{kind: made}).shape == QUERY.shape


@pytest.mark.parametrize("kind", ["score_mod", "mask_mod"])
def test_not_callable(kind):
    with pytest.raises(TypeError, match=f"`{kind}` must be a callable or None, got int"):
        flex_decode(QUERY, KEY, VALUE, **{kind: 3})


# --- What a traced function cannot do ---------------------------------------------------------------------------------

BRANCH = {
    "if": lambda s, b, h, q, k: s if k <= q else -s,
    "and": lambda s, b, h, q, k: s * (k <= q and k > 3),
    "or": lambda s, b, h, q, k: s * (k <= q or k > 3),
    "not": lambda s, b, h, q, k: s * (not k <= q),
    "chain": lambda s, b, h, q, k: s * (0 <= q - k < 3),
    "max": lambda s, b, h, q, k: max(s, 0),
    "min": lambda s, b, h, q, k: min(s, 0),
    "captured": lambda s, b, h, q, k: s if slopes[0] > 0 else -s,
    "while": lambda s, b, h, q, k: [s for _ in iter(lambda: bool(k), False)],
}


@pytest.mark.parametrize("mod", BRANCH.values(), ids=BRANCH)
def test_branches(mod):
    with pytest.raises(TraceError) as caught:
        trace_mod(mod)
    problem, line, remedy = str(caught.value).splitlines()
    assert problem == "the truth of a traced value was asked for in a score_mod"
    assert line.startswith(f"  {__file__}:")
    for advice in ("torch.where(cond, a, b) for if/else", "`&`, `|`, `~`", "torch.maximum/torch.minimum for max/min"):
        assert advice in remedy


@pytest.mark.parametrize(
    "mod",
    [
        lambda s, b, h, q, k: s if k in [1, 2, 3] else -s,
        lambda s, b, h, q, k: s if k not in {1, 2, 3} else -s,
        lambda s, b, h, q, k: s if k - q in (s, 2) else -s,
        lambda s, b, h, q, k: s if k in {1: 2} else -s,
        lambda s, b, h, q, k: s if 3 in k else -s,
    ],
)
def test_in(mod):
    with pytest.raises(TraceError) as caught:
        trace_mod(mod)
    problem, line, remedy = str(caught.value).splitlines()
    assert problem == "`in` was applied to a traced value in a score_mod"
    assert line.startswith(f"  {__file__}:")
    assert remedy.startswith(
        "  Compare with each value, `(kv_idx == 1) | (kv_idx == 2)`, or index a captured bool table"
    )


def loop(s, b, h, q, k):
    for _ in range(h):
        s = s * 2
    return s


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python does not say where on the line it is")
@pytest.mark.parametrize(
    "mod, called, advice",
    [
        (lambda s, b, h, q, k: s + int(k), "int()", "Use `x.long()`"),
        (lambda s, b, h, q, k: s + (1, float(h))[1], "float()", "Use `x.float()`"),
        (lambda s, b, h, q, k: math.exp(s), "math.exp()", "Use the function of torch: torch.exp for math.exp."),
        (loop, "range()", "A loop runs over Python numbers only"),
    ],
)
def test_functions_of_python_numbers_are_named(mod, called, advice):
    with pytest.raises(TraceError) as caught:
        trace_mod(mod)
    problem, line, remedy = str(caught.value).splitlines()
    assert problem == f"{called} was applied to a traced value in a score_mod"
    assert line.startswith(f"  {__file__}:")
    assert remedy.startswith(f"  {advice}")


def test_calls_without_source_are_refused_in_general():
    mod = eval("lambda s, b, h, q, k: s + int(k)", {"__name__": "nowhere"})
    with pytest.raises(TraceError, match="a traced value was used as a Python integer in a score_mod"):
        trace_mod(mod)


NUMBERS = {
    "complex": (lambda s, b, h, q, k: complex(s).real, "used as a Python number"),
    "index": (lambda s, b, h, q, k: s + operator.index(k), "used as a Python integer"),
    "list": (lambda s, b, h, q, k: s + [1, 2, 3][k], "used as a Python integer"),
    "list_slice": (lambda s, b, h, q, k: s + len([1, 2, 3][k:]), "used as a Python integer"),
    "tensor_slice": (lambda s, b, h, q, k: s + table[h, k:][0], "used as a Python integer"),
    "dict": (lambda s, b, h, q, k: s + {0: 1}[k], "used as a dict key or set member"),
    "set": (lambda s, b, h, q, k: s + len({k}), "used as a dict key or set member"),
    "numpy_index": (lambda s, b, h, q, k: s + np.arange(9)[k], "met numpy"),
    "iteration": (lambda s, b, h, q, k: s + sum(k), "iterated over"),
    "unpacking": (lambda s, b, h, q, k: torch.maximum(*k), "iterated over"),
    "len": (lambda s, b, h, q, k: s + len(k), r"len\(\) of a traced number"),
}


@pytest.mark.parametrize("name", NUMBERS)
def test_python_values(name):
    mod, problem = NUMBERS[name]
    with pytest.raises(TraceError, match=f"{problem}.* in a score_mod" if name != "len" else problem) as caught:
        trace_mod(mod)
    assert "use the torch function (torch.exp for math.exp), and capture a list, dict or numpy array" in str(
        caught.value
    )


@pytest.mark.parametrize(
    "mod, message",
    [
        (lambda s, b, h, q, k: s / [1.0], r"TypeError: unsupported operand type\(s\) for /: 'Tensor' and 'list'"),
        (lambda s, b, h, q, k: s + None, "unsupported operand type.*'Tensor' and 'NoneType'"),
        (lambda s, b, h, q, k: s + 1j, "unsupported operand type.*'Tensor' and 'complex'"),
        (lambda s, b, h, q, k: s + 1 // 0, "ZeroDivisionError"),
    ],
)
def test_exceptions_of_the_mod(mod, message):
    with pytest.raises(
        TraceError, match=f"score_mod raised .*{message}" if "Error" not in message else message
    ) as caught:
        trace_mod(mod)
    assert "use PyTorch's functions and operators on tensors and numbers" in str(caught.value)
    assert __file__ in str(caught.value)


@pytest.mark.parametrize(
    "mod, problem, remedy",
    [
        (
            lambda s, b, h, q, k: s + undefined,  # noqa: F821
            "NameError: name 'undefined' is not defined",
            "Define the name before the call, or correct it.",
        ),
        (
            lambda s, b, h, q, k: s.no_such_method(),
            "AttributeError: 'Tensor' object has no attribute 'no_such_method'",
            "Correct the name: the page Operations of the docs lists the methods of tensors.",
        ),
        (
            lambda s, b, h, q, k: s * math.no_such_name,
            "AttributeError: module 'math' has no attribute 'no_such_name'",
            "Correct the name of the attribute.",
        ),
    ],
)
def test_misspelt_names(mod, problem, remedy):
    with pytest.raises(TraceError) as caught:
        trace_mod(mod)
    first, line, last = str(caught.value).splitlines()
    assert (first, last) == (f"score_mod raised {problem}", f"  {remedy}")
    assert line.startswith(f"  {__file__}:")


def test_numpy_arrays_are_no_operands():
    with pytest.raises(UnsupportedOpError, match="a ndarray cannot be an operand in a score_mod") as caught:
        trace_mod(lambda s, b, h, q, k: s + np.arange(3.0))
    assert "Capture it as a torch.Tensor outside the mod." in str(caught.value)


def test_the_users_except_does_not_hide_that_a_number_is_consumed():
    window = 5
    mod = lambda s, b, h, q, k: s * attempt(lambda: range(window)[-1])
    assert constants_of(mod)[0] == [5]
    check(mod)


# --- Random mods ------------------------------------------------------------------------------------------------------

UNARY = [
    "abs", "neg", "sign", "exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "sqrt", "rsqrt", "reciprocal",
    "tanh", "sigmoid", "sin", "cos", "tan", "erf", "floor", "ceil", "round", "trunc", "square", "isnan", "isinf",
    "isfinite", "logical_not", "bitwise_not",
]  # fmt: skip
BINARY = [
    "add", "sub", "mul", "true_divide", "floor_divide", "remainder", "fmod", "pow", "maximum", "minimum", "lt", "le",
    "gt", "ge", "eq", "ne", "logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor",
]  # fmt: skip
DTYPES = [torch.float32, torch.float64, torch.float16, torch.int64, torch.int32, torch.int16, torch.int8, torch.bool]
TABLES = {
    "float": torch.randn(7, generator=generator),
    "int64": torch.tensor([2**62, -(2**63), 2**63 - 1, 0, -1]),
    "int32": torch.tensor([2**31 - 1, -(2**31), 7, 0, -1], dtype=torch.int32),
    "int8": torch.tensor([127, -128, 3, 0], dtype=torch.int8),
    "uint8": torch.tensor([255, 128, 3, 0], dtype=torch.uint8),
    "bool": torch.tensor([True, False]),
}
W, V, X = 4, -3, 0.75  # captured, through the globals of this module

leaf = st.one_of(
    st.tuples(st.just("argument"), st.integers(0, 4)),
    st.tuples(st.just("literal"), st.sampled_from([0, 1, -1, 3, -5, 2**40, 0.5, -0.25, 3.0, True])),
    st.tuples(st.just("captured"), st.sampled_from(["W", "V", "X"])),
)


def branches(children):
    return st.one_of(
        st.tuples(st.just("unary"), st.sampled_from(UNARY), children),
        st.tuples(st.just("binary"), st.sampled_from(BINARY), children, children),
        st.tuples(st.just("where"), children, children, children),
        st.tuples(st.just("cast"), st.sampled_from(DTYPES), children),
        st.tuples(st.just("load"), st.sampled_from(sorted(TABLES)), children),
        st.tuples(st.just("shift"), st.sampled_from([0, 1, 5, 40, 63, 64]), children),
        st.tuples(st.just("clamp"), st.sampled_from([-3, 0, 0.5]), children),
    )


expressions = st.recursive(leaf, branches, max_leaves=8)


def as_tensor(x):
    return torch.tensor(x) if isinstance(x, (bool, int, float)) else x


def compute(expression, arguments):
    """Evaluates an expression by PyTorch calls."""
    kind, what, *children = expression
    if kind == "argument":
        return arguments[what]
    if kind == "literal":
        return what
    if kind == "captured":
        return {"W": W, "V": V, "X": X}[what]
    if kind == "where":
        condition, a, b = (as_tensor(compute(c, arguments)) for c in (what, *children))
        return torch.where(condition.bool(), a, b)
    operands = [compute(c, arguments) for c in children]
    first = as_tensor(operands[0])
    if kind == "cast":
        return first.to(what)
    if kind == "load":
        return TABLES[what][first.long() % len(TABLES[what])]
    if kind == "shift":
        return first >> what
    if kind == "clamp":
        return first.clamp(min=what)
    return getattr(torch, what)(*map(as_tensor, operands))


@settings(max_examples=300)
@given(expression=expressions)
def test_random_mods(expression):
    """A graph gives what PyTorch gives, bit by bit; where PyTorch refuses, nothing but a TraceError is raised."""

    def mod(*arguments):
        return as_tensor(compute(expression, arguments)).to(torch.float32)

    try:
        for point in POINTS:
            mod(*map(torch.tensor, point))
    except (RuntimeError, TypeError):  # bits of floats, bool - bool, a division by zero
        try:
            graph, leaves = trace_mod(mod)
        except TraceError:
            return
        for point in POINTS:
            evaluate_graph(graph, leaves, *map(torch.tensor, point))
    else:
        assert_same_as_pytorch(mod)


def test_one_constant_among_many_numbers_is_found_in_few_runs():
    numbers = [float(n) for n in range(60)]
    runs = []

    def mod(score, b, h, q_idx, kv_idx):
        runs.append(1)
        for position, number in enumerate(numbers):
            score = score + (number if position != 37 or isinstance(number, float) else 0)
        return score

    assert constants_of(mod)[0] == [37.0]
    assert len(runs) < 20


def test_a_number_that_cannot_be_replaced_is_constant():
    """Here because its class watches its subclasses; the other number stays free."""

    class Watched:
        factor = 0.5

        def __init_subclass__(cls):
            raise TypeError("no subclasses")

        def scaled(self, score):
            return score * self.factor

    watched, offset = Watched(), 3.0
    mod = lambda s, b, h, q, k: watched.scaled(s) + offset
    constants, graph = constants_of(mod)
    assert constants == [0.5] and len(graph.numbers) == 1
    check(mod)


def test_arithmetic_that_python_refuses_and_pytorch_does_not():
    """Numbers that the mod makes tensors of: 1 / 0 is inf then, and the root of -1 is nan."""
    zero, one, root = 0, -1, 0.5
    for function in (
        lambda: torch.tensor(one) / torch.tensor(zero),
        lambda: torch.tensor(float(one)) ** torch.tensor(root),
        lambda: torch.tensor(one) << torch.tensor(62),
    ):
        check(lambda s, b, h, q, k, f=function: torch.where(f() > 0, s, s * 2))


# --- What a mod may not do --------------------------------------------------------------------------------------------

state = torch.ones(4)


def test_assignments_to_variables_outside_are_refused_before_they_happen():
    def mod(score, b, h, q_idx, kv_idx):
        global state
        state = state * 2
        return score + state[h]

    with pytest.raises(TraceError, match="score_mod assigns to `state`, a variable outside of it"):
        trace_mod(mod)
    assert torch.equal(state, torch.ones(4))


def test_an_error_that_the_mod_swallows_is_raised():
    def mod(score, b, h, q_idx, kv_idx):
        try:
            if h > 0:
                return score * 2
        except Exception:
            pass
        return score

    with pytest.raises(TraceError, match=r"torch\.where"):
        trace_mod(mod)


def test_numbers_beyond_int64_that_stay_in_python():
    big = 2**70
    assert_same_as_pytorch(lambda score, b, h, q_idx, kv_idx: score * (big / 2**69) + big % 7)


def test_tensors_that_no_name_leads_to_are_refused(monkeypatch):
    """Their later changes would not be seen."""
    monkeypatch.setitem(sys.modules, "hidden_tables", types.SimpleNamespace(table=torch.ones(4)))
    with pytest.raises(TraceError, match="reads a tensor that is in no variable, attribute, list, tuple or dict"):
        trace_mod(lambda score, b, h, q_idx, kv_idx: score + sys.modules["hidden_tables"].table[h])


def test_numbers_of_numpy_as_results():
    keep, weight = np.bool_(True), np.float32(0.5)
    assert trace_mod(lambda b, h, q_idx, kv_idx: keep, "mask_mod")[0].output.attr is True
    assert trace_mod(lambda score, b, h, q_idx, kv_idx: weight)[0].output.op == "number"


# --- Numbers and literals ---------------------------------------------------------------------------------------------


def test_literal_tables_are_compared_where_they_were_made():
    """Frozen tensors move to the device of the call: one there and one on the CPU cannot be compared."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + torch.tensor([1.0, 2.0])[h] * torch.tensor([1.0, 2.0])[b] + torch.tensor([3.0, 4.0])[h]

    graph = trace(score_mod, "score_mod", [], torch.device("meta")).graph
    assert [tensor.device.type for tensor in graph.frozen] == ["meta", "meta"]


@pytest.mark.parametrize("backend", ["torch", "triton"])
@pytest.mark.parametrize("use", ["argument", "divisor", "branch"])
def test_a_number_that_outgrows_int64_is_named(use, backend):
    width = 5

    def mask_mod(b, h, q_idx, kv_idx):
        if use == "argument":
            return q_idx - kv_idx < width
        if use == "divisor":
            return q_idx // width == kv_idx // width
        return q_idx - kv_idx < (width if width > 3 else 1)

    mod = identify("mask_mod", mask_mod)
    graph, mod = graph_of("mask_mod", mod, torch.device("cpu"))
    width = 1 << 63
    read = CaptureReader(graph, pointers=False)
    one = {name: torch.tensor(3) for name in ("b", "h", "q_idx", "kv_idx")}
    with pytest.raises(TraceError, match="number 9223372036854775808 does not fit into int64, in which a mod computes"):
        found = identify("mask_mod", mask_mod)
        if backend == "triton":
            read(found.leaves)
        else:
            evaluation.evaluate([graph.output], graph, found.leaves, one)


def test_a_first_number_beyond_int64_has_the_users_line():
    width = 1 << 63
    with pytest.raises(TraceError) as found:
        trace_mod(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < width, "mask_mod")
    lines = str(found.value).splitlines()
    assert lines[0] == "the number 9223372036854775808 does not fit into int64, in which a mask_mod computes"
    assert "q_idx - kv_idx < width" in lines[1]
    assert lines[2] == "  Use a smaller one: sys.maxsize fits."


# --- What people write ------------------------------------------------------------------------------------------------


def _compiled_module():
    class Bias(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("table", torch.arange(4.0))
            self.factor = 0.5

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.table[h] * self.factor

    return torch.compile(Bias(), backend="eager")


COMPILED_FACTOR = 0.5


def biased(score, h):
    return score + slopes[h] * COMPILED_FACTOR


compiled_helper = torch.compile(biased, backend="eager")


@pytest.mark.parametrize(
    "mod",
    [
        torch.compile(lambda s, b, h, q, k: biased(s, h), backend="eager"),
        lambda s, b, h, q, k: compiled_helper(s, h),
        _compiled_module(),
        torch.compile(lambda s, b, h, q, k: compiled_helper(s, h) + 1, backend="eager"),
    ],
    ids=["mod", "helper", "module", "both"],
)
def test_compiled_functions_are_traced_as_they_were_written(mod):
    graph, leaves = trace_mod(mod)
    assert len(leaves) == 2
    assert len(graph.numbers) == len(graph.tensors) == 1
    out, lse = flex_decode(QUERY, KEY, VALUE, mod, return_lse=True)
    plain = getattr(mod, "_orig_mod", lambda s, b, h, q, k: biased(s, h) + (1 if graph.text.count("add") == 2 else 0))
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, plain)


class Doubled(torch.autograd.Function):
    """Static methods that save and restore for a backward that decoding does not run."""

    @staticmethod
    def forward(ctx, x):
        return x * 2

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 2


class CappedWithSetup(torch.autograd.Function):
    """The newer form, whose context is filled apart."""

    @staticmethod
    def forward(x, cap):
        return cap * torch.tanh(x / cap)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.cap = 3.0

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_autograd_functions_run_in_a_mod():
    cap = 3.0
    assert_same_as_pytorch(lambda s, b, h, q, k: Doubled.apply(s) + Doubled.apply(slopes[h]), rtol=1e-6)
    assert_same_as_pytorch(lambda s, b, h, q, k: CappedWithSetup.apply(s, cap), rtol=1e-6)


@pytest.mark.parametrize(
    ("mod", "name", "remedy"),
    [
        (lambda s, b, h, q, k: np.exp(s), "exp", "Use torch.exp."),
        (lambda s, b, h, q, k: np.where(q > k, s, 0.0), "where", "Use torch.where."),
        (lambda s, b, h, q, k: np.maximum(s, 0), "maximum", "Use torch.maximum."),
        (lambda s, b, h, q, k: np.fabs(s), "fabs", "Use torch.abs."),
        (lambda s, b, h, q, k: np.clip(s, 0, 1), "clip", "Use torch.clip."),
        (lambda s, b, h, q, k: np.spacing(s), "spacing", "Use PyTorch's functions, or compute it outside the mod."),
    ],
)
def test_functions_of_numpy_are_named_with_their_twin(mod, name, remedy):
    with pytest.raises(UnsupportedOpError) as found:
        trace_mod(mod)
    lines = str(found.value).splitlines()
    assert lines[0] == f"numpy.{name} was applied to a traced value in a score_mod"
    assert f"np.{name}(" in lines[1] and __file__ in lines[1]
    assert lines[2] == f"  {remedy}"


def test_numbers_of_numpy_stand_on_either_side():
    assert_same_as_pytorch(lambda s, b, h, q, k: np.float32(2) * s + np.float64(0.5) - np.int64(3) // (h + 1))
    assert_same_as_pytorch(lambda s, b, h, q, k: torch.where(np.int64(3) > q, s, np.float32(1) / (s + np.int32(1))))


@pytest.mark.parametrize(
    ("mod", "problem"),
    [
        (torch.nn.ReLU(), r"'ReLU' has the signature \(input"),
        (torch.nn.functional.relu, r"'relu' has the signature \(input"),
        (torch.tanh, "'tanh' is a function of numbers"),
        (math.exp, r"'exp' has the signature \(x"),
    ],
)
def test_functions_of_one_number_are_no_score_mods(mod, problem):
    expected = r"`score_mod` must take 5 positional parameters \(score, b, h, q_idx, kv_idx\), but "
    with pytest.raises(TypeError, match=expected + problem) as found:
        trace_mod(mod)
    remedy = "Call it in a function that does: `def my_score_mod(score, b, h, q_idx, kv_idx): ...`"
    assert str(found.value).splitlines()[1] == f"  {remedy}"


# --- Traced values outside --------------------------------------------------------------------------------------------


class Store:
    """Something with attributes."""


LOG, NAMED, STORE, QUEUE = [], {"old": 1}, Store(), collections.deque()


def _append(s, b, h, q, k):
    s = s * 2
    LOG.append(s)
    return s


def _name(s, b, h, q, k):
    NAMED["score"] = s + 1
    return s


def _set(s, b, h, q, k):
    STORE.last = s - 1
    return s


def _keep(value):
    LOG.append(value * 2)
    return value


@pytest.mark.parametrize(
    ("mod", "line"),
    [
        (_append, "LOG.append(s)"),
        (_name, 'NAMED["score"] = s + 1'),
        (_set, "STORE.last = s - 1"),
        (lambda s, b, h, q, k: _keep(s) + q, "LOG.append(value * 2)"),
    ],
)
def test_a_traced_value_that_outlives_the_mod_is_refused_and_taken_out(mod, line):
    for _ in range(2):  # the second time in things that held one before
        with pytest.raises(TraceError, match=r"score_mod keeps a traced value in a (list|dict|Store)") as found:
            trace_mod(mod)
        lines = str(found.value).splitlines()
        assert lines[1].endswith(line) and __file__ in lines[1]
        assert "use a variable of its own, and compute what shall stay outside the mod" in lines[2]
        assert LOG == [] and list(NAMED) == ["old"]


def test_a_deque_keeps_no_traced_value():
    def mod(s, b, h, q, k):
        QUEUE.append(s)
        return s

    for _ in range(2):
        with pytest.raises(TraceError, match="score_mod keeps a traced value in a deque"):
            trace_mod(mod)
        assert not QUEUE


def test_what_a_mod_keeps_while_it_runs_is_its_own():
    def score_mod(s, b, h, q, k):
        def repeated(x, n):
            return x if n == 0 else repeated(x + 1, n - 1)

        values = [s, s * 2]
        values.append(values)
        try:
            raise ValueError
        except ValueError as error:
            kept = error
        return repeated(values[1], 3) + (kept is None)

    trace_mod(score_mod)
