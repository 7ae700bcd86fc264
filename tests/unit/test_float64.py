"""float64 stays float64: captured tensors and numbers of a size where float32 knows no fractions."""

import pytest
import torch
from support import assert_close_to_reference, evaluate_graph, make_inputs, trace_mod

from flexdecode import DecodeOptions, flex_decode
from flexdecode.analysis.printing import formula, name_captures
from flexdecode.codegen.compile import capture_types
from flexdecode.codegen.lower import lower

NOW = 1.7e9 + 3.25  # seconds: neighbours in float32 are 128 apart
TIMES = NOW + 10 * torch.rand(2, 48, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
NOW_TENSOR = torch.tensor(NOW, dtype=torch.float64)
THREE = 3


def difference(score, b, h, q_idx, kv_idx):
    return score - 0.5 * (TIMES[b, q_idx] - TIMES[b, kv_idx]).abs().float()


def number(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (TIMES[b, kv_idx] - NOW)


def computed_number(score, b, h, q_idx, kv_idx):
    """Python's arithmetic on floats has 53 bits, and the same number meets float32 too."""
    return score * (NOW * 1e-9) - 0.1 * (TIMES[b, kv_idx] - (NOW * 2 - NOW - THREE / 2))


def number_on_the_cpu(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (TIMES[b, kv_idx] - NOW_TENSOR)


def tensor_of_a_number(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (TIMES[b, kv_idx] - torch.tensor(NOW, dtype=torch.float64))


def literal(score, b, h, q_idx, kv_idx):
    return score - 0.1 * (TIMES[b, kv_idx] - 1700000003.25)


def converted_score(score, b, h, q_idx, kv_idx):
    return ((score.double() + TIMES[b, kv_idx]) - TIMES[b, q_idx]).to(score.dtype)


def comparison(score, b, h, q_idx, kv_idx):
    return torch.where(TIMES[b, kv_idx] > NOW + 4, score, -float("inf"))


def limits(score, b, h, q_idx, kv_idx):
    return score + TIMES[b, kv_idx] / torch.finfo(TIMES.dtype).max * torch.finfo(TIMES.dtype).max / NOW


def float_power(score, b, h, q_idx, kv_idx):
    return (torch.float_power(TIMES[b, kv_idx], 2) - NOW * NOW) * 1e-10


MODS = [
    difference, number, computed_number, number_on_the_cpu, tensor_of_a_number, literal, converted_score, comparison,
    limits, float_power,
]  # fmt: skip


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.__name__)
def test_the_torch_backend_computes_in_float64(mod):
    inputs = make_inputs(2, 2, 1, 2, 48, 16)
    out, lse = flex_decode(*inputs, mod, return_lse=True, options=DecodeOptions(backend="torch"))
    assert_close_to_reference(out, lse, *inputs, mod)


@pytest.mark.parametrize("mod", MODS, ids=lambda mod: mod.__name__)
def test_the_graph_gives_what_pytorch_gives(mod):
    graph, leaves = trace_mod(mod)
    for point in ((0.3, 0, 0, 5, 3), (-2.5, 1, 3, 36, 0)):
        arguments = [torch.tensor(x) for x in point]
        expected = torch.as_tensor(mod(*arguments)).float()
        assert evaluate_graph(graph, leaves, *arguments).item() == pytest.approx(expected.item(), rel=1e-6)


def test_a_number_travels_as_float64_only_where_it_meets_float64():
    assert capture_types(trace_mod(number)[0])[0] == "fp64"
    assert capture_types(trace_mod(computed_number)[0])[0] == "fp64"
    assert capture_types(trace_mod(number_on_the_cpu)[0])[0] == "fp64"
    assert capture_types(trace_mod(lambda score, b, h, q_idx, kv_idx: score - NOW)[0]) == ("fp32",)
    assert capture_types(trace_mod(lambda score, b, h, q_idx, kv_idx: score.double() - THREE)[0]) == ("i64",)


def test_no_value_of_a_number_that_meets_float64_is_in_the_graph():
    def made(now):
        return lambda score, b, h, q_idx, kv_idx: score - (TIMES[b, kv_idx] - (now * 2 - 1)).float()

    assert trace_mod(made(NOW))[0] == trace_mod(made(1.5))[0]


def test_only_what_meets_float64_is_computed_in_it():
    hooks = lower(trace_mod(difference)[0], "score_mod")
    assert hooks.bodies["score_mod"].count("float64") == 0, hooks.bodies
    assert hooks.bodies["score_mod"].count(".to(tl.float32)") == 1

    def in_float32(score, b, h, q_idx, kv_idx):
        return score - 0.5 * TIMES.float()[b, kv_idx]

    graph, _ = trace_mod(in_float32)
    assert [str(node.dtype) for node in graph.nodes()].count("torch.float64") == 1  # the load


def test_half_types_widen_to_float32():
    for dtype in (torch.float16, torch.bfloat16):
        table = torch.ones(4, dtype=dtype)
        graph, _ = trace_mod(lambda score, b, h, q_idx, kv_idx: score + table[h])
        assert all(node.dtype != torch.float64 for node in graph.nodes())


def test_a_float64_constant_is_printed_with_all_its_digits():
    graph, _ = trace_mod(literal)
    assert "1700000003.25" in formula(graph.output, name_captures(graph, ["TIMES"]))
