"""Mods in infix form, and the text of intervals: it reads as expected, and it says what the bounds compute."""

import itertools
import sys

import hypothesis
import pytest
import torch
from support import trace_mod
from unit import mask_graphs

from flexdecode import mods
from flexdecode.analysis.algebra import UNREAD
from flexdecode.analysis.analyze import analyze
from flexdecode.analysis.bounds import find_bounds, nodes_of
from flexdecode.analysis.printing import formula, is_guarded, name_captures, region_text
from flexdecode.frontend.captures import leaf_names
from flexdecode.frontend.graph import Node, topological
from flexdecode.frontend.ops import DTYPES, OPS

SLOPES = torch.ones(4)
WINDOWS = torch.tensor([3, 4, 5, 6], dtype=torch.int32)
TABLE = torch.ones(4, 9, dtype=torch.float16)
W = 16
STEP = 3


def formula_of(mod, kind="mask_mod"):
    graph, _ = trace_mod(mod, kind)
    return formula(graph.output, name_captures(graph, leaf_names(mod)))


def live_of(mod, present=False):
    graph, leaves = trace_mod(mod, "mask_mod")
    bounds = find_bounds(None, graph, q_idx_given=False)
    values = [leaves[source.leaf] for source in graph.numbers] if present else None
    return region_text(bounds.mask_live, name_captures(graph, leaf_names(mod)), values)


# --- Mods -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (lambda b, h, q, k: q >= k, "kv_idx <= q_idx"),
        (lambda b, h, q, k: (q - k < W) & (k <= q), "(kv_idx <= q_idx) & (q_idx - kv_idx < W)"),
        (lambda b, h, q, k: k >= W, "kv_idx >= W"),
        (lambda b, h, q, k: W < k, "kv_idx > W"),  # noqa: SIM300 - the order is what is tested
        (lambda b, h, q, k: ~((k < 4) | (k > q)), "~((kv_idx < 4) | (kv_idx > q_idx))"),
        (lambda b, h, q, k: (k < 4) & ((k > 2) & (k <= q)), "(kv_idx < 4) & (kv_idx > 2) & (kv_idx <= q_idx)"),
        (lambda b, h, q, k: (k < 4) ^ (k > q), "(kv_idx < 4) ^ (kv_idx > q_idx)"),
        (lambda b, h, q, k: q - (k - h) < -(k + 1), "q_idx - (kv_idx - h) < -(kv_idx + 1)"),
        (lambda b, h, q, k: (k // 7) * 2 % 3 == 0, "(2 * (kv_idx // 7)) % 3 == 0"),
        (lambda b, h, q, k: (k & 7) << 1 != (q | 1), "((kv_idx & 7) << 1) != (q_idx | 1)"),
        (lambda b, h, q, k: (k == q) == (h == 0), "(kv_idx == q_idx) == (h == 0)"),
        (lambda b, h, q, k: q - k < WINDOWS[h], "q_idx - kv_idx < WINDOWS[h]"),
        (lambda b, h, q, k: k.clamp(2, W) > q, "clamp(kv_idx, 2, W) > q_idx"),
        (lambda b, h, q, k: torch.minimum(k, q) > W, "min(kv_idx, q_idx) > W"),
        (lambda b, h, q, k: torch.where(h < 2, k < W, k <= q), "where(h < 2, kv_idx < W, kv_idx <= q_idx)"),
        (lambda b, h, q, k: b.new_ones((), dtype=torch.bool), "True"),
    ],
)
def test_masks_in_infix_form(mod, expected):
    def named(b, h, q_idx, kv_idx):
        return mod(b, h, q_idx, kv_idx)

    assert formula_of(named) == expected


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (lambda s, b, h, q, k: s, "score"),
        (lambda s, b, h, q, k: s - SLOPES[h] * (q - k), "score - SLOPES[h] * (q_idx - kv_idx)"),
        (lambda s, b, h, q, k: SLOPES[h] + s, "score + SLOPES[h]"),
        (lambda s, b, h, q, k: s / 3 + -0.5, "score / 3.0 - 0.5"),
        (lambda s, b, h, q, k: 0.1 * torch.tanh(-s) ** 2, "0.1 * tanh(-score) ** 2.0"),
        (lambda s, b, h, q, k: (-s) ** 2, "(-score) ** 2.0"),
        (lambda s, b, h, q, k: s + TABLE[h, -1], "score + TABLE[h, -1]"),
        (lambda s, b, h, q, k: torch.where(k > q, float("-inf"), s), "where(kv_idx > q_idx, -inf, score)"),
        (lambda s, b, h, q, k: s * (h % 2).float(), "score * (h % 2)"),
        (lambda s, b, h, q, k: torch.exp2((h % 2).float()), "exp2(h % 2)"),
        (lambda s, b, h, q, k: s.half().float(), "float16(score)"),
        (lambda s, b, h, q, k: s + (s * 3).long(), "score + int64(3.0 * score)"),
    ],
)
def test_scores_in_infix_form(mod, expected):
    def named(score, b, h, q_idx, kv_idx):
        return mod(score, b, h, q_idx, kv_idx)

    assert formula_of(named, "score_mod") == expected


def test_a_long_part_that_occurs_twice_gets_a_line_of_its_own():
    def mod(score, b, h, q_idx, kv_idx):
        distance = torch.log1p((q_idx - kv_idx).abs() * SLOPES[h] + SLOPES[0])
        return score - distance * distance

    assert formula_of(mod, "score_mod") == ("t0 = log1p(SLOPES[0] + SLOPES[h] * abs(q_idx - kv_idx))\nscore - t0 * t0")


def test_a_mod_of_many_shared_steps_stays_short():
    def mod(b, h, q_idx, kv_idx):
        row = q_idx
        for _ in range(40):
            row = torch.where(row < h, row + b, row - h)
        return kv_idx < row

    assert len(formula_of(mod)) < 4000
    assert len("".join(live_of(mod))) < 1000


def test_equal_names_are_told_apart():
    mod = mods.or_masks(mods.sliding_window(5), mods.sliding_window(7))
    text = formula_of(mod)
    assert "< window)" in text and "< window_2)" in text


def test_sizes_and_attributes_keep_their_spelling():
    class Mod:
        def __init__(self):
            self.windows = WINDOWS
            self.sink = 3

        def __call__(self, b, h, q_idx, kv_idx):
            return (kv_idx < self.sink) | (kv_idx > q_idx - self.windows.shape[0])

    assert formula_of(Mod()) == "(kv_idx < self.sink) | (kv_idx > q_idx - self.windows.shape[0])"


# --- Intervals --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mod", "expected"),
    [
        (lambda b, h, q, k: k <= q, ["kv in [0, q_idx + 1)"]),
        (lambda b, h, q, k: (k <= q) & (q - k < W), ["kv in [max(0, q_idx - W + 1), q_idx + 1)"]),
        (lambda b, h, q, k: (k - q).abs() < W, ["kv in [max(0, q_idx - W + 1), q_idx + W)"]),
        (lambda b, h, q, k: (k < W) | (k > q), ["kv in [0, W)", "kv in [max(0, q_idx + 1), kv_len)"]),
        (lambda b, h, q, k: (k // 8 == q // 8) & (k <= q), ["kv in [max(0, 8 * (q_idx // 8)), q_idx + 1)"]),
        (lambda b, h, q, k: k // 8 <= q // 8, ["kv in [0, 8 * (q_idx // 8) + 8)"]),
        (lambda b, h, q, k: (k <= q) & (h % 2 == 0), ["kv in [0, q_idx + 1) if h % 2 == 0"]),
        (lambda b, h, q, k: (k <= q) & (h < W), ["kv in [0, q_idx + 1) if h < W"]),
        (
            lambda b, h, q, k: torch.where(h < W, k < 10, k <= q),
            ["kv in [0, 10) if h < W", "kv in [0, q_idx + 1) if W <= h"],
        ),
        (lambda b, h, q, k: k >= WINDOWS[h], ["kv in [max(0, WINDOWS[h]), kv_len)"]),
        (lambda b, h, q, k: k % W == 0, ["kv in [0, kv_len)"]),
        (lambda b, h, q, k: k < 0, []),
        (lambda b, h, q, k: (k <= q) & (k > q), []),
    ],
)
def test_intervals(mod, expected):
    def named(b, h, q_idx, kv_idx):
        return mod(b, h, q_idx, kv_idx)

    assert live_of(named) == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        (1024, ["kv in [max(0, q_idx - 1023), q_idx + 1)"]),
        (1, ["kv in [max(0, q_idx), q_idx + 1)"]),
        (sys.maxsize, ["kv in [0, q_idx + 1)"]),
    ],
)
def test_intervals_with_present_values(window, expected):
    assert live_of(mods.sliding_window(window), present=True) == expected


def test_guards_are_hidden_and_noted():
    for mod, guarded in ((mods.causal(), False), (mods.sliding_window(3), True)):
        graph, _ = trace_mod(mod, "mask_mod")
        bounds = find_bounds(None, graph, q_idx_given=False)
        assert is_guarded(bounds.mask_live) == guarded
        assert str(2**40) not in "".join(region_text(bounds.mask_live, name_captures(graph, leaf_names(mod))))


# --- Property: the text says what the bounds compute ------------------------------------------------------------------


class Table:
    """A captured tensor of rank 1 that reads 0 outside."""

    def __init__(self, tensor):
        self.tensor = tensor

    def __getitem__(self, index):
        index = int(index) + (len(self.tensor) if int(index) < 0 else 0)
        return self.tensor[index] if 0 <= index < len(self.tensor) else self.tensor.new_zeros(())


LENGTH = 1 << 30
INDICES = [Node("index", (), torch.int64, name) for name in ("b", "h", "q_idx")]


def computed(op, *operands):
    """A row on operands of its own types."""
    real = op.rule == "float"
    return op.torch(*(x.float() if real and not x.is_floating_point() else x for x in operands))


def namespace(example, names, indices, row):
    """What the names in a text are at one row of an example."""
    known = {name: lambda *a, op=op: computed(op, *map(torch.as_tensor, a)) for name, op in OPS.items()}
    known |= {str(d).removeprefix("torch."): lambda x, d=d: torch.as_tensor(x).to(d) for d in DTYPES}
    known |= {
        "min": min, "max": max, "abs": abs, "clamp": lambda x, low, high: min(max(x, low), high), "kv_len": LENGTH,
        "ceil": lambda x: torch.ceil(torch.as_tensor(x)).long(),
        **{node.attr: indices[node][row, 0] for node in INDICES},
    }  # fmt: skip
    for name, source in zip(names.numbers, example.graph.numbers, strict=True):
        known[name] = torch.as_tensor(example.leaves[source.leaf])
    for name, leaf in zip(names.tensors, example.graph.tensors, strict=True):
        known[name] = Table(example.leaves[leaf]) if example.leaves[leaf].ndim else example.leaves[leaf]
    return known


def joined(intervals):
    """The same positions in ascending intervals with gaps between them."""
    result = []
    for lo, hi in sorted((max(0, lo), min(LENGTH, hi)) for lo, hi in intervals):
        if lo < hi and result and lo <= result[-1][1]:
            result[-1][1] = max(result[-1][1], hi)
        elif lo < hi:
            result.append([lo, hi])
    return result


def read(text, known):
    """The interval that `kv in [lo, hi) if condition` describes."""
    rest = text.removeprefix("kv in [")
    depths = itertools.accumulate((c in "([") - (c in ")]") for c in rest)
    end = next(place for place, depth in enumerate(depths) if depth < 0)
    condition = rest[end + 1 :].removeprefix(" if ")
    lo, hi = eval(f"({rest[:end]})", known)
    return (int(lo), int(hi)) if not condition or eval(condition, known) else (0, 0)


@hypothesis.settings(max_examples=150, database=None)
@hypothesis.given(mask_graphs.masks())
def test_texts_of_random_masks_say_what_their_bounds_compute(example):
    graph = example.graph
    mod_nodes = topological(graph.output)
    hypothesis.assume(not any(n.dtype in (torch.int8, torch.uint8, torch.int16) for n in mod_nodes))  # they wrap around
    names = name_captures(graph, [f"c{i}" for i in range(len(example.leaves))])
    assert formula(graph.output, names)
    facts = analyze([graph.output], example.q_idx_given)
    bounds = find_bounds(None, graph, example.q_idx_given)
    indices = example.evaluate(*INDICES)
    row_nodes = [n for n in mod_nodes if n not in facts.on_kv and not n.dtype.is_floating_point]
    for region in (bounds.mask_live, bounds.mask_full):
        present = [example.leaves[source.leaf] for source in graph.numbers]
        texts = region_text(region, names), region_text(region, names, present)
        nodes = [*row_nodes, *nodes_of(region)]
        found = example.evaluate(*nodes)
        values = {node: found[node].broadcast_to(mask_graphs.NUM_ROWS, 1)[:, 0].tolist() for node in nodes}
        for row in range(mask_graphs.NUM_ROWS):
            if any(abs(values[node][row]) > 1 << 22 for node in row_nodes):
                continue  # the text leaves out what happens to huge numbers
            expected = joined(
                (0 if lo is None else values[lo][row], LENGTH if hi is None else values[hi][row]) for lo, hi in region
            )
            known = namespace(example, names, indices, row)
            for lines in texts:
                if any(UNREAD in line for line in lines):
                    continue  # a part that is too long to be read
                try:
                    assert joined(read(line, known) for line in lines) == expected
                except RuntimeError as error:  # a mod has x // 0 = 0 and 3 ** -1 = 0, which PyTorch refuses on a CPU
                    assert "ZeroDivisionError" in str(error) or "negative integer powers" in str(error)
