"""Integer ranges that hold for every call, and what changes inside the KV loop."""

import dataclasses
import operator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import evaluate_graph, trace_mod

from flexdecode import TraceError
from flexdecode.analysis.analyze import MAX_KV_LEN, analyze, analyze_graph
from flexdecode.frontend.graph import INDEX_NAMES
from flexdecode.frontend.ops import INT_LIMITS

INT32, INT64 = INT_LIMITS[torch.int32], INT_LIMITS[torch.int64]
TABLE = torch.arange(5)
SMALL = torch.tensor([127, -128, 5, 0], dtype=torch.int8)


def facts_of(expression, q_idx_given=False):
    """Analysis of a mod of (b, h, q, k), and the node of its value."""
    graph, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: score + expression(b, h, q_idx, kv_idx))
    (value,) = (a for a in graph.output.args if a.op != "score")
    if value.op == "cast":  # to the score's type
        (value,) = value.args
    return analyze([graph.output], q_idx_given), value


def range_of(expression, q_idx_given=False):
    facts, value = facts_of(expression, q_idx_given)
    return facts.ranges[value]


@pytest.mark.parametrize(
    "expression, expected",
    [
        (lambda b, h, q, k: k, (0, MAX_KV_LEN)),
        (lambda b, h, q, k: q, (-(1 << 20), MAX_KV_LEN)),
        (lambda b, h, q, k: q - k, (-(1 << 20) - MAX_KV_LEN, MAX_KV_LEN)),
        (lambda b, h, q, k: k % 7, (0, 6)),
        (lambda b, h, q, k: k // 64, (0, MAX_KV_LEN // 64)),
        (lambda b, h, q, k: (q - k).abs(), (0, MAX_KV_LEN + (1 << 20))),
        (lambda b, h, q, k: (q - k).clamp(-128, 128) + 128, (0, 256)),
        (lambda b, h, q, k: torch.where(k < q, k % 3, -1), (-1, 2)),
        (lambda b, h, q, k: TABLE[h], INT64),
        (lambda b, h, q, k: SMALL[h], INT_LIMITS[torch.int8]),
        (lambda b, h, q, k: SMALL[h] + 1, INT_LIMITS[torch.int8]),  # wraps around
        (lambda b, h, q, k: SMALL[h].long() + 1, (-127, 128)),
        (lambda b, h, q, k: k.to(torch.int8), INT_LIMITS[torch.int8]),
        (lambda b, h, q, k: (k % 100).to(torch.int8), (0, 99)),
        (lambda b, h, q, k: (k * 0.5).long(), INT64),
        (lambda b, h, q, k: k * k * k, INT64),
        (lambda b, h, q, k: (k < q) & (h > 1), (0, 1)),
        (lambda b, h, q, k: k & 63, (0, 63)),
        (lambda b, h, q, k: k >> 40, (0, 0)),
    ],
)
def test_ranges(expression, expected):
    assert range_of(expression) == expected


def test_captured_numbers_may_have_any_value():
    window, number = 5, torch.tensor(5)
    assert range_of(lambda b, h, q, k: q - window) == INT64
    assert range_of(lambda b, h, q, k: number * 1 + 0) == INT64
    assert range_of(lambda b, h, q, k: torch.minimum(k, torch.tensor(window))) == (INT64[0], MAX_KV_LEN)


def test_a_given_q_offset_may_have_any_value():
    assert range_of(lambda b, h, q, k: q, q_idx_given=True) == INT64
    assert range_of(lambda b, h, q, k: q - k, q_idx_given=True) == INT64
    assert range_of(lambda b, h, q, k: q % 8, q_idx_given=True) == (0, 7)


def test_an_offset_moves_positions():
    graph, _ = trace_mod(lambda score, b, h, q, k: score + q + k + (q - k), "score_mod")
    facts = analyze([graph.output], False, shifted=True)
    ranges = {node.attr: found for node, found in facts.ranges.items() if node.op == "index"}
    assert ranges == {"q_idx": (-(2**30) - 2**20, 2**31 - 1), "kv_idx": (-(2**30), 2**31 - 1)}
    (difference,) = (node for node in facts.nodes if node.op == "sub")
    assert all(facts.fits_int32(node) for node in facts.nodes if node.op == "index")
    assert not facts.fits_int32(difference)
    assert facts.positions == (-(2**30), 2**31 - 1)


def test_what_fits_into_32_bits():
    for expression, fits in [
        (lambda b, h, q, k: q - k, True),
        (lambda b, h, q, k: k + k, False),
        (lambda b, h, q, k: k * 64, False),
        (lambda b, h, q, k: k // 64 * 64, True),
        (lambda b, h, q, k: TABLE[h], False),
    ]:
        facts, value = facts_of(expression)
        assert facts.fits_int32(value) == fits


def test_what_changes_inside_the_loop():
    graph, _ = trace_mod(lambda s, b, h, q, k: s + torch.exp(TABLE[h] * 1.0) * (q - k) + q // 3)
    facts = analyze([graph.output], q_idx_given=False)
    assert {n.op for n in facts.on_kv} >= {"score", "add", "sub", "mul"}
    outside = {n.op for n in facts.nodes} - {n.op for n in facts.on_kv}
    assert outside >= {"load", "exp", "floor_divide"}
    assert [n.attr for n in facts.on_kv if n.op == "index"] == ["kv_idx"]


def test_nodes_come_operands_first():
    graph, _ = trace_mod(lambda s, b, h, q, k: s * (q - k) + TABLE[h])
    assert analyze([graph.output], False).nodes == graph.nodes()
    assert analyze([], False).nodes == []


def test_a_graph_is_analysed_once():
    one, other = (trace_mod(lambda s, b, h, q, k: s + TABLE[h] * (q - k))[0] for _ in range(2))
    assert one is not other and analyze_graph(one, False) is analyze_graph(other, False)
    assert analyze_graph(one, False) == analyze([one.output], False)
    assert analyze_graph(one, True).ranges != analyze_graph(one, False).ranges


# --- Soundness --------------------------------------------------------------------------------------------------------

OPERATORS = [operator.add, operator.sub, operator.mul, operator.floordiv, operator.mod, operator.and_, operator.or_,
             operator.xor, operator.lshift, operator.rshift, torch.minimum, torch.maximum, torch.pow, torch.fmod,
             operator.lt, operator.eq]  # fmt: skip
FUNCTIONS = [torch.neg, torch.abs, torch.sign, torch.bitwise_not, torch.square, torch.floor]
DTYPES = [torch.int8, torch.uint8, torch.int16, torch.int32, torch.int64, torch.bool]
WINDOW = 2**40 + 3

leaves = st.one_of(
    st.tuples(st.just("index"), st.integers(0, 3)),
    st.tuples(st.just("number"), st.sampled_from([0, 1, -1, 2, 3, 7, 40, 63, -5, 2**31 - 1, 2**31, -(2**31), 2**40])),
    st.tuples(st.just("captured"), st.none()),
)
expressions = st.recursive(
    leaves,
    lambda children: st.one_of(
        st.tuples(st.sampled_from(OPERATORS), children, children),
        st.tuples(st.sampled_from(FUNCTIONS), children),
        st.tuples(st.just("cast"), st.sampled_from(DTYPES), children),
        st.tuples(st.just("load"), children),
        st.tuples(st.just("where"), children, children, children),
    ),
    max_leaves=8,
)
positions = st.tuples(
    st.integers(0, 1 << 30),
    st.integers(0, 1 << 20),
    st.sampled_from([-(1 << 20), -1, 0, MAX_KV_LEN]) | st.integers(-(1 << 20), MAX_KV_LEN),
    st.sampled_from([0, 1, MAX_KV_LEN]) | st.integers(0, MAX_KV_LEN),
)


def build(expression, indices):
    kind, *rest = expression
    if kind == "index":
        return indices[rest[0]]
    if kind == "number":
        return torch.tensor(rest[0])
    if kind == "captured":
        return torch.tensor(WINDOW)
    if kind == "cast":
        return build(rest[1], indices).to(rest[0])
    operands = [build(e, indices) for e in rest]
    if kind == "load":
        return SMALL[operands[0].long()]
    if kind == "where":
        return torch.where(operands[0] != 0, operands[1], operands[2])
    return kind(*operands)


@settings(max_examples=300)
@given(expression=expressions, points=st.lists(positions, min_size=1, max_size=4), q_idx_given=st.booleans())
def test_every_value_lies_in_its_range(expression, points, q_idx_given):
    """At every node of a random graph of integers, for positions up to the limits."""

    def mod(score, *indices):
        return score + build(expression, indices)

    try:
        graph, leaves = trace_mod(mod)
    except TraceError:  # arithmetic on bools, a division by zero
        return
    facts = analyze([graph.output], q_idx_given)
    for point in points:
        if q_idx_given:
            point = (*point[:2], point[2] * 2**32, point[3])
        for node, (low, high) in facts.ranges.items():
            part = dataclasses.replace(graph, output=node)
            value = int(evaluate_graph(part, leaves, torch.tensor(0.0), *map(torch.tensor, point)))
            assert low <= value <= high, f"{value} at {point}, by\n{graph.text}"


def test_index_names():
    graph, _ = trace_mod(lambda s, b, h, q, k: s + b + h + q + k)
    assert {n.attr for n in analyze([graph.output], False).ranges if n.op == "index"} == set(INDEX_NAMES)
