"""The Triton text of a mod: hoisting, one statement per value, narrow integers, loads, types. No Triton runs here."""

import ast
import re

import pytest
import torch
from support import trace_mod

from flexdecode.graph import Graph
from flexdecode.lower import CaptureLayout, lower
from flexdecode.ops import OPS

slopes = torch.rand(4)
bias = torch.randn(2, 4, 9)
table = torch.arange(9, dtype=torch.int32)


def bodies(mod, kind="score_mod", q_idx_given=False):
    """The hoisted statements, and those of the loop."""
    hooks = lower(trace_mod(mod, kind)[0], kind, q_idx_given)
    name = kind.removesuffix("_mod")
    assert set(hooks.bodies) == {f"{name}_row", kind}
    for body in hooks.bodies.values():
        names = re.findall(r"^(v\d+) = ", body, re.MULTILINE)
        assert len(names) == len(set(names)), "a name is assigned once"
        ast.parse("def hook():\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    return hooks.bodies[f"{name}_row"], hooks.bodies[kind]


# --- Hoisting ---------------------------------------------------------------------------------------------------------


def test_what_does_not_depend_on_kv_idx_is_hoisted():
    row, loop = bodies(lambda s, b, h, q, k: s * torch.exp(slopes[h]) + torch.sin(q * 0.5) * k)
    for text in ("tl.exp(", "tl.sin(", "tl.load("):
        assert text in row and text not in loop
    assert "row[0]" in loop and "row[1]" in loop


def test_an_identity_has_nothing_to_hoist():
    assert bodies(lambda s, b, h, q, k: s) == ("return ()", "return score")


def test_a_result_that_depends_on_the_row_only():
    row, loop = bodies(lambda b, h, q, k: (h % 2 == 0) & (q > 3), "mask_mod")
    assert "floor" not in loop and loop == "return live & row[0]"
    assert row.splitlines()[-1].startswith("return (v")
    row, loop = bodies(lambda s, b, h, q, k: slopes[h])
    assert loop == "return row[0] + tl.zeros_like(score)"


def test_a_constant_score_gets_the_shape_of_the_tile():
    row, loop = bodies(lambda s, b, h, q, k: 1.0)
    assert row == "return ()"
    assert loop.splitlines() == ["v0 = tl.full((), 1.0, tl.float32)", "return v0 + tl.zeros_like(score)"]


def test_only_what_the_loop_needs_is_handed_over():
    row, loop = bodies(lambda s, b, h, q, k: s + torch.exp(torch.sin(slopes[h])) * k)
    assert row.splitlines()[-1].count("v") == 1
    assert set(re.findall(r"row\[\d\]", loop)) == {"row[0]"}


def test_indices_and_numbers_are_not_handed_over():
    window = 5
    row, loop = bodies(lambda b, h, q, k: q - k < window, "mask_mod")
    assert row == "return ()" and "captures[0]" in loop and "q_idx" in loop


def test_a_load_that_moves_with_kv_idx_stays_but_not_its_row():
    row, loop = bodies(lambda s, b, h, q, k: s + bias[b, h, k] + bias[b, h, 3])
    assert row.count("tl.load(") == loop.count("tl.load(") == 1


# --- One statement for each value -------------------------------------------------------------------------------------


def test_common_subexpressions_are_computed_once():
    def mod(score, b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx).abs().float()
        return score + torch.log1p(distance) * torch.exp(distance) + torch.log1p((q_idx - kv_idx).abs().float())

    row, loop = bodies(mod)
    assert row == "return ()"
    assert [loop.count(text) for text in ("tl.abs(", "log1p(", "tl.exp(", "q_idx", " - ")] == [1, 1, 1, 1, 1]


def test_score_and_mask_name_their_own_arguments():
    assert bodies(lambda s, b, h, q, k: s)[1] == "return score"
    assert bodies(lambda b, h, q, k: k <= q, "mask_mod")[1].splitlines() == ["v0 = kv_idx <= q_idx", "return live & v0"]


# --- Integers ---------------------------------------------------------------------------------------------------------


def test_positions_and_their_differences_are_32_bits():
    row, loop = bodies(lambda b, h, q, k: (q - k < 128) & (k // 64 == q // 64), "mask_mod")
    assert "int64" not in row + loop


def test_a_given_q_offset_is_64_bits():
    _, loop = bodies(lambda b, h, q, k: q - k < 128, "mask_mod", q_idx_given=True)
    assert "kv_idx.to(tl.int64)" in loop and "q_idx - " in loop


def test_what_may_overflow_is_64_bits():
    window = 5
    _, loop = bodies(lambda b, h, q, k: k + k < q, "mask_mod")
    assert "kv_idx.to(tl.int64) + kv_idx.to(tl.int64)" in loop
    _, loop = bodies(lambda b, h, q, k: k - window < q, "mask_mod")
    assert "kv_idx.to(tl.int64) - " in loop


def test_wide_operands_of_a_narrow_result():
    """`x % 8` fits, x may not: it is computed wide and made narrow then."""
    _, loop = bodies(lambda b, h, q, k: (k * 2**20) % 8 == q % 8, "mask_mod")
    assert re.search(r"\(remainder_int\(v\d+, v\d+\.to\(tl\.int64\)\)\)\.to\(tl\.int32\)", loop)


def test_small_types_keep_their_width():
    small = torch.zeros(4, dtype=torch.int8)
    row, _ = bodies(lambda s, b, h, q, k: s + (small[h] + small[h] * 3).float())
    assert "tl.full((), 3, tl.int8)" in row


# --- Loads ------------------------------------------------------------------------------------------------------------


def test_layout_of_captures():
    layout = CaptureLayout(num_numbers=2, ranks=(3, 0, 1))
    assert [layout.pointer(slot) for slot in range(3)] == [2, 9, 10]
    assert [layout.size(0, d) for d in range(3)] == [3, 4, 5]
    assert [layout.stride(0, d) for d in range(3)] == [6, 7, 8]
    assert (layout.size(2, 0), layout.stride(2, 0)) == (11, 12)
    graph, _ = trace_mod(lambda s, b, h, q, k: s + bias[b, h, k] * torch.tensor(0.5) + slopes[h])
    assert CaptureLayout.of(graph) == CaptureLayout(0, (3, 1))


def test_loads_are_guarded():
    _, loop = bodies(lambda s, b, h, q, k: s + bias[b, h, k])
    assert loop.count("< captures[") == 3 and "other=0" in loop
    assert "where" not in loop, "an index that is never negative is not counted from the end"


def test_negative_indices_count_from_the_end():
    _, loop = bodies(lambda s, b, h, q, k: s + slopes[k - 3])
    assert re.search(r"tl\.where\((\S+) < 0, \1 \+ captures\[1\], \1\)", loop)
    assert ">= 0) &" in loop


def test_offsets_are_64_bits():
    _, loop = bodies(lambda s, b, h, q, k: s + slopes[k])
    assert "kv_idx.to(tl.int64) * captures[2]" in loop


def test_loads_widen():
    for dtype, text in [(torch.float16, ".to(tl.float32)"), (torch.float64, ".to(tl.float32)"), (torch.bool, " != 0")]:
        captured = torch.zeros(4, dtype=dtype)
        row, _ = bodies(lambda s, b, h, q, k, c=captured: s + c[h])
        assert re.search(rf"tl\.load\(.*\){re.escape(text)}", row)


def test_nested_gathers():
    _, loop = bodies(lambda s, b, h, q, k: s + bias[table[k], h, k])
    assert loop.count("tl.load(") == 2


# --- Types and literals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.5, "0.5"), (float("inf"), 'float("inf")'), (float("-inf"), 'float("-inf")'), (float("nan"), 'float("nan")')],
)
def test_float_literals(value, text):
    literal = eval(f"lambda s, b, h, q, k: torch.where(k < q, s, {text})", {"torch": torch, "float": float})
    assert f"tl.full((), {text}, tl.float32)" in bodies(literal)[1]
    assert value != value or repr(value) in text or value in (float("inf"), float("-inf"))


def test_half_types_are_rounded_values_in_float32():
    _, loop = bodies(lambda s, b, h, q, k: s.half() * 0.1)
    assert loop.splitlines()[0] == "v0 = score.to(tl.float16).to(tl.float32)"
    assert "tl.full((), 0.1, tl.float32)" in loop  # a Python number is not rounded
    assert re.search(r"\(v0 \* v1\)\.to\(tl\.float16\)\.to\(tl\.float32\)", loop)


def test_integers_become_half_types_through_float32():
    """As in PyTorch, which rounds twice; Triton's interpreter has no direct way to bfloat16."""
    _, loop = bodies(lambda s, b, h, q, k: s + k.bfloat16())
    assert "kv_idx.to(tl.float32).to(tl.bfloat16).to(tl.float32)" in loop
    number = 3
    assert "bfloat16" not in bodies(lambda s, b, h, q, k: s + torch.tensor(number) * 1.0)[1]


def test_captured_numbers():
    cap, window, flag = 0.5, 5, torch.tensor(True)
    row, loop = bodies(lambda s, b, h, q, k: torch.where(flag, s * cap, s + window))
    assert re.search(r"captures\[\d\] != 0", loop) and re.search(r"v1 = captures\[\d\]\n", loop)
    assert re.search(r"v1 = v0\.to\(tl\.float32\)", row), "the window is converted once"


def test_functions_that_are_called_are_named():
    hooks = lower(trace_mod(lambda s, b, h, q, k: torch.tanh(s) + k // 3 + torch.log1p(slopes[h]))[0], "score_mod")
    assert hooks.functions == {"tanh", "floor_divide_int", "log1p"}
    assert lower(trace_mod(lambda s, b, h, q, k: s * 2 + torch.exp(s))[0], "score_mod").functions == frozenset()


@pytest.mark.parametrize("name", sorted(OPS))
def test_every_row_has_text_for_floats_and_for_integers(name):
    """Valid Python with as many operands as the row says."""
    op = OPS[name]
    for template in filter(None, (op.triton, op.triton_int)):
        text = template.format(*(f"x{i}" for i in range(op.arity)))
        used = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and n.id.startswith("x")}
        assert used == {f"x{i}" for i in range(op.arity)}


def test_equal_graphs_have_equal_text():
    W, other = 3, torch.rand(7)
    one = trace_mod(lambda s, b, h, q, k: s * W + slopes[h])[0]
    two = trace_mod(lambda s, b, h, q, k: other[h] + W * s)[0]
    assert isinstance(one, Graph) and one == two
    assert lower(one, "score_mod") == lower(two, "score_mod")
