"""The Triton text of a mod: hoisting, one statement per value, narrow integers, loads, types. No Triton runs here."""

import ast
import re

import pytest
import torch
from support import trace_mod

from flexdecode.analysis.proofs import CallSizes, IndexCheck, LoadCheck, find_checks
from flexdecode.analysis.proven import ProvenMods
from flexdecode.codegen.lower import CaptureLayout, lower, lower_bounds
from flexdecode.frontend.graph import Graph, Node
from flexdecode.frontend.ops import OPS

slopes = torch.rand(4)
bias = torch.randn(2, 4, 9)
table = torch.arange(9, dtype=torch.int32)


def bodies(mod, kind="score_mod", q_idx_given=False, checks=None):
    """The bodies of the hooks of a mod: `_row`, then for a score_mod `_fetch`, then the mod itself."""
    hooks = lower(trace_mod(mod, kind)[0], kind, q_idx_given, checks)
    name = kind.removesuffix("_mod")
    names = [f"{name}_row", kind] if kind == "mask_mod" else [f"{name}_row", f"{name}_fetch", kind]
    assert set(hooks.bodies) == set(names)
    found = [hooks.bodies[n] for n in names]
    for body in found:
        assigned = re.findall(r"^(v\d+) = ", body, re.MULTILINE)
        assert len(assigned) == len(set(assigned)), "a name is assigned once"
        ast.parse("def hook():\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    for handed, body in zip(("row", "fetched"), found[:-1], strict=False):
        count = len(ast.parse(body.splitlines()[-1].removeprefix("return ")).body[0].value.elts)
        used = re.findall(rf"\b{handed}\[(\d+)\]", "\n".join(found[1:]))
        assert all(int(i) < count for i in used), f"{handed} has {count} values"
    return tuple(found)


def guards(body):
    """What masks each load of a body: None, the name of an argument, or the text of a condition."""
    tree = ast.parse(body.replace("return ", "result = "))
    assigned = {line.targets[0].id: ast.unparse(line.value) for line in tree.body}
    found = []
    for line in tree.body:
        for call in ast.walk(line):
            if isinstance(call, ast.Call) and ast.unparse(call.func) in ("tl.load", "fetch"):
                masks = [ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == "mask"]
                masks += [ast.unparse(call.args[1])] if ast.unparse(call.func) == "fetch" else []
                found.append(None if masks in ([], ["None"]) else assigned.get(masks[0], masks[0]))
    return found


# --- Hoisting ---------------------------------------------------------------------------------------------------------


def test_what_does_not_depend_on_kv_idx_is_hoisted():
    row, fetch, loop = bodies(lambda s, b, h, q, k: s * torch.exp(slopes[h]) + torch.sin(q * 0.5) * k)
    for text in ("tl.exp(", "tl.sin(", "tl.load("):
        assert text in row and text not in loop
    assert "row[0]" in loop and "row[1]" in loop and fetch == "return ()"


def test_an_identity_has_nothing_to_hoist():
    assert bodies(lambda s, b, h, q, k: s) == ("return ()", "return ()", "return score")


def test_a_result_that_depends_on_the_row_only():
    row, loop = bodies(lambda b, h, q, k: (h % 2 == 0) & (q > 3), "mask_mod")
    assert "floor" not in loop and loop == "return live & row[0]"
    assert row.splitlines()[-1].startswith("return (v")
    _, fetch, loop = bodies(lambda s, b, h, q, k: slopes[h])
    assert (fetch, loop) == ("return ()", "return row[0] + tl.zeros_like(score)")


def test_a_constant_score_gets_the_shape_of_the_tile():
    row, fetch, loop = bodies(lambda s, b, h, q, k: 1.0)
    assert row == fetch == "return ()"
    assert loop.splitlines() == ["v0 = tl.full((), 1.0, tl.float32)", "return v0 + tl.zeros_like(score)"]


def test_only_what_the_loop_needs_is_handed_over():
    row, _, loop = bodies(lambda s, b, h, q, k: s + torch.exp(torch.sin(slopes[h])) * k)
    assert row.splitlines()[-1].count("v") == 1
    assert set(re.findall(r"row\[\d\]", loop)) == {"row[0]"}


def test_indices_and_numbers_are_not_handed_over():
    window = 5
    row, loop = bodies(lambda b, h, q, k: q - k < window, "mask_mod")
    assert row == "return ()" and "captures[0]" in loop and "q_idx" in loop


def test_a_load_that_moves_with_kv_idx_is_fetched_but_not_its_row():
    row, fetch, loop = bodies(lambda s, b, h, q, k: s + bias[b, h, k] + bias[b, h, 3])
    assert [len(guards(body)) for body in (row, fetch, loop)] == [1, 1, 0]
    assert "fetched[0]" in loop and "row[0]" in loop


# --- Fetching ---------------------------------------------------------------------------------------------------------


def test_what_does_not_depend_on_the_score_is_fetched_before_it_is_known():
    row, fetch, loop = bodies(lambda s, b, h, q, k: s + slopes[k // 2] + slopes[s.long()])
    assert [len(guards(body)) for body in (row, fetch, loop)] == [0, 1, 1]
    assert "score" not in fetch and "floor_divide_int(" in fetch and "floor_divide_int(" not in loop


def test_fetching_uses_what_is_known_of_the_row():
    row, fetch, loop = bodies(lambda s, b, h, q, k: s + slopes[k + table[h] * 3])
    assert guards(row) and "row[0]" in fetch and "row[" not in loop


def test_only_what_is_read_is_fetched():
    """Arithmetic on it waits for the score, so that it is not kept alive in its wider type."""
    _, fetch, loop = bodies(lambda s, b, h, q, k: s + torch.exp(bias[b, h, k]))
    assert "tl.exp(" not in fetch and "tl.exp(" in loop


@pytest.mark.parametrize(
    "dtype, wide",
    [(torch.float16, ".to(tl.float32)"), (torch.float64, ""), (torch.bool, " != 0)"), (torch.int8, ""),
     (torch.float32, "")],
)  # fmt: skip
def test_what_is_fetched_widens_when_it_is_used(dtype, wide):
    captured = torch.zeros(9, dtype=dtype)
    _, fetch, loop = bodies(lambda s, b, h, q, k: torch.where(captured[k] != 0, s, -s))
    assert re.search(rf"fetched\[0\].*{re.escape(wide)}", loop)
    assert not wide or wide not in fetch.splitlines()[-2]


def test_a_fetched_index_of_another_fetch():
    _, fetch, loop = bodies(lambda s, b, h, q, k: s + bias[table[k], h, k] * table[k])
    assert len(guards(fetch)) == 2 and not guards(loop)
    assert set(re.findall(r"fetched\[\d\]", loop)) == {"fetched[0]", "fetched[1]"}


def test_a_mask_fetches_nothing_ahead():
    row, loop = bodies(lambda b, h, q, k: table[k] == table[q], "mask_mod")
    assert len(guards(row)) == len(guards(loop)) == 1


# --- One statement for each value -------------------------------------------------------------------------------------


def test_common_subexpressions_are_computed_once():
    def mod(score, b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx).abs().float()
        return score + torch.log1p(distance) * torch.exp(distance) + torch.log1p((q_idx - kv_idx).abs().float())

    row, fetch, loop = bodies(mod)
    assert row == fetch == "return ()"
    assert [loop.count(text) for text in ("tl.abs(", "log1p(", "tl.exp(", "q_idx", " - ")] == [1, 1, 1, 1, 1]


def test_score_and_mask_name_their_own_arguments():
    assert bodies(lambda s, b, h, q, k: s)[-1] == "return score"
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
    row, *_ = bodies(lambda s, b, h, q, k: s + (small[h] + small[h] * 3).float())
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
    _, fetch, _ = bodies(lambda s, b, h, q, k: s + bias[b, h, k])
    (guard,) = guards(fetch)
    assert guard.count("< captures[") == 3
    assert "where" not in fetch, "an index that is never negative is not counted from the end"
    row, *_ = bodies(lambda s, b, h, q, k: s + slopes[h])
    assert guards(row)[0].count("< captures[") == 1 and "other=0" in row


def test_negative_indices_count_from_the_end():
    _, fetch, _ = bodies(lambda s, b, h, q, k: s + slopes[k - 3])
    assert re.search(r"tl\.where\((\S+) < 0, \1 \+ captures\[1\], \1\)", fetch)
    assert ">= 0) &" in guards(fetch)[0]


def test_offsets_are_64_bits():
    _, fetch, _ = bodies(lambda s, b, h, q, k: s + slopes[k])
    assert "kv_idx.to(tl.int64) * captures[2]" in fetch


def test_loads_widen():
    for dtype, text in [(torch.float16, ".to(tl.float32)"), (torch.float64, ""), (torch.bool, " != 0")]:
        captured = torch.zeros(4, dtype=dtype)
        row, *_ = bodies(lambda s, b, h, q, k, c=captured: s + c[h])
        name = re.search(r"(v\d+) = tl\.load\(", row)[1]
        assert f"{name}{text}" in row


def test_nested_gathers():
    _, fetch, _ = bodies(lambda s, b, h, q, k: s + bias[table[k], h, k])
    assert len(guards(fetch)) == 2


def test_a_0d_tensor_has_nothing_to_check():
    graph = Graph.build(Node("load", (), torch.float32, 0), {0: (torch.float32, 0)}, [])
    assert "tl.load(captures[0])" in lower(graph, "score_mod").bodies["score_row"]


# --- Loads that are proven --------------------------------------------------------------------------------------------

PROVEN, BELOW, OUTSIDE, BOTH = (
    IndexCheck(b, o) for b, o in ((False, False), (True, False), (False, True), (True, True))
)


def checked(mod, *indices, attending=False, kind="score_mod"):
    """All bodies of a mod with one load, whose indices have these checks, and the guard of the load."""
    found = bodies(mod, kind, checks=(LoadCheck(indices, attending),))
    (guard,) = (guard for body in found for guard in guards(body))
    return "\n".join(found), guard


def test_a_proven_load_is_neither_masked_nor_counted_from_the_end():
    text, guard = checked(lambda s, b, h, q, k: s + slopes[k - 3], PROVEN)
    assert guard is None and "where" not in text and "captures[1]" not in text, "it does not even read the size"
    text, guard = checked(lambda s, b, h, q, k: s + slopes[h], PROVEN)
    assert guard is None and "where" not in text and "mask=" not in text
    text, guard = checked(lambda b, h, q, k: slopes[k - 3] > 0, PROVEN, kind="mask_mod")
    assert guard is None and "where" not in text


def test_each_index_has_the_checks_it_needs():
    mod = lambda s, b, h, q, k: s + slopes[k - 3]
    text, guard = checked(mod, BELOW)
    assert guard is None and text.count("tl.where(") == 1
    text, guard = checked(mod, OUTSIDE)
    assert guard.count("<") == 1 and ">=" not in guard and "where" not in text
    text, guard = checked(mod, BOTH)
    assert guard.count("<") == 1 and guard.count(">=") == 1 and text.count("tl.where(") == 1
    layout = CaptureLayout(0, (3,))
    for dim in range(3):
        one = [OUTSIDE if d == dim else PROVEN for d in range(3)]
        _, guard = checked(lambda s, b, h, q, k: s + bias[b, h, k], *one)
        assert re.findall(r"captures\[(\d+)\]", guard) == [str(layout.size(0, dim))]


def test_what_the_mask_proves_is_read_where_it_is_true():
    text, guard = checked(lambda s, b, h, q, k: s + slopes[k - 3], PROVEN, attending=True)
    assert guard == "live" and "where" not in text and "captures[1]" not in text
    text, guard = checked(lambda s, b, h, q, k: s + bias[b, h - 1, q - k], PROVEN, BELOW, PROVEN, attending=True)
    assert guard == "live" and text.count("tl.where(") == 1


def test_the_checks_are_in_the_order_of_the_graph():
    """An inner load comes before the one that it indexes."""
    graph, _ = trace_mod(lambda s, b, h, q, k: s + bias[table[k], h, k])
    inner, outer = LoadCheck((PROVEN,)), LoadCheck((BOTH, PROVEN, PROVEN))
    fetch = lower(graph, "score_mod", checks=(inner, outer)).bodies["score_fetch"]
    assert guards(fetch)[0] is None and guards(fetch)[1].count("captures[") == 1
    inner, outer = LoadCheck((OUTSIDE,)), LoadCheck((PROVEN, PROVEN, PROVEN))
    fetch = lower(graph, "score_mod", checks=(inner, outer)).bodies["score_fetch"]
    assert guards(fetch)[0].count("captures[") == 1 and guards(fetch)[1] is None


def test_bounds_are_lowered_with_their_checks():
    windows = torch.tensor([3, 5, 7, 9])
    graph, leaves = trace_mod(lambda b, h, q, k: q - k < windows[h], "mask_mod")
    for num_heads, expected in ((4, True), (5, False)):
        checks = find_checks(graph, leaves, CallSizes(2, num_heads, 1, 9), False)
        for proven, is_plain in (
            (ProvenMods(mask=graph, mask_checks=checks), expected),
            (ProvenMods(mask=graph), False),
        ):
            text = lower_bounds(proven).bodies["kv_bounds"]
            assert "tl.load(mask_captures[0]" in text and ("mask=" not in text) == is_plain


# --- Types and literals -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "value, text",
    [(0.5, "0.5"), (float("inf"), 'float("inf")'), (float("-inf"), 'float("-inf")'), (float("nan"), 'float("nan")')],
)
def test_float_literals(value, text):
    literal = eval(f"lambda s, b, h, q, k: torch.where(k < q, s, {text})", {"torch": torch, "float": float})
    assert f"tl.full((), {text}, tl.float32)" in bodies(literal)[-1]
    assert value != value or repr(value) in text or value in (float("inf"), float("-inf"))


def test_half_types_are_rounded_values_in_float32():
    *_, loop = bodies(lambda s, b, h, q, k: s.half() * 0.1)
    assert loop.splitlines()[0] == "v0 = score.to(tl.float16).to(tl.float32)"
    assert "tl.full((), 0.1, tl.float32)" in loop  # a Python number is not rounded
    assert re.search(r"\(v0 \* v1\)\.to\(tl\.float16\)\.to\(tl\.float32\)", loop)


def test_integers_become_half_types_through_float32():
    """As in PyTorch, which rounds twice; Triton's interpreter has no direct way to bfloat16."""
    *_, loop = bodies(lambda s, b, h, q, k: s + k.bfloat16())
    assert "kv_idx.to(tl.float32).to(tl.bfloat16).to(tl.float32)" in loop
    number = 3
    assert "bfloat16" not in bodies(lambda s, b, h, q, k: s + torch.tensor(number) * 1.0)[-1]


def test_captured_numbers():
    cap, window, flag = 0.5, 5, torch.tensor(True)
    row, _, loop = bodies(lambda s, b, h, q, k: torch.where(flag, s * cap, s + window))
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
        text = template.format(*(f"operand{i}" for i in range(op.arity)))
        used = {n.id for n in ast.walk(ast.parse(text)) if isinstance(n, ast.Name) and n.id.startswith("operand")}
        assert used == {f"operand{i}" for i in range(op.arity)}


def test_simple_powers_are_products_and_roots():
    texts = {2: "score * score", 3: "score * score * score", -1: "1.0 / score", -2: "1.0 / (score * score)"}
    for exponent, text in texts.items():
        assert f" = {text}\n" in bodies(lambda s, b, h, q, k, exponent=exponent: s**exponent)[-1]
    assert "tl.sqrt" in bodies(lambda s, b, h, q, k: s**0.5)[-1]
    assert "tl.exp2(score)" in bodies(lambda s, b, h, q, k: 2**s)[-1]
    assert "pow_float" in bodies(lambda s, b, h, q, k: s**4)[-1]
    assert "pow_int" in bodies(lambda s, b, h, q, k: s + k**2)[-1]


def test_equal_graphs_have_equal_text():
    W, other = 3, torch.rand(7)
    one = trace_mod(lambda s, b, h, q, k: s * W + slopes[h])[0]
    two = trace_mod(lambda s, b, h, q, k: other[h] + W * s)[0]
    assert isinstance(one, Graph) and one == two
    assert lower(one, "score_mod") == lower(two, "score_mod")


def test_floats_become_narrow_integers_by_way_of_int32():
    """A compiler may assume that a float fits the type that it is converted to."""
    row = bodies(lambda s, b, h, q, k: s + table[slopes[h].to(torch.uint8)])[0]
    assert ".to(tl.int32).to(tl.uint8)" in row
