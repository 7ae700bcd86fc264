"""The canonical text of a graph can be read again, and only such text can."""

import pytest
import torch
from support import MODS, trace_mod

from flexdecode import FlexDecodeError, flex_decode
from flexdecode.frontend.parse import CanonicalMod, parse_graph, write_graph

B, HQ, N, Q = 2, 4, 19, 2
table = torch.randn(HQ, N)
sizes = torch.randn(3, 5)

OTHERS = {
    "reductions": ("score_mod", lambda s, b, h, q, k: s + table[h].amax() + sizes.sum(1)[b % 3]),
    "loops": (
        "score_mod",
        lambda s, b, h, q, k: s + (sizes[b % 3].sum() * table[h, :4]).sum() + (sizes @ sizes.mT)[b % 3].sum(),
    ),
    "floats": ("score_mod", lambda s, b, h, q, k: torch.where(k > q, -float("inf"), s * 1e-30 + 0.1)),
    "conversions": ("score_mod", lambda s, b, h, q, k: s + (q - k).to(torch.int8).half() + (k > 3)),
    "bools": ("mask_mod", lambda b, h, q, k: ~((k <= q) ^ (q == 3)) | (h < 0)),
}


def graphs():
    for family in MODS:
        for kind, make in (("score_mod", family.make_score_mod), ("mask_mod", family.make_mask_mod)):
            mod = make(B, HQ, N, Q, "cpu")
            if mod is not None:
                yield pytest.param(kind, mod, id=f"{family.name}-{kind}")
    for name, (kind, mod) in OTHERS.items():
        yield pytest.param(kind, mod, id=name)


@pytest.mark.parametrize(("kind", "mod"), list(graphs()))
def test_text_is_read_as_it_was_written(kind, mod):
    graph, _ = trace_mod(mod, kind)
    again = parse_graph(write_graph(graph))
    assert again == graph
    assert (again.numbers, again.tensors, again.tensor_types) == (graph.numbers, graph.tensors, graph.tensor_types)


TEXT = (
    "captures 0 | 1; tensor 0: float32 rank 1; %0 = score(): float32; %1 = index('h'): int64; "
    "%2 = load(0, %1): float32; %3 = number(0): float32?; %4 = mul(%2, %3): float32; "
    "%5 = add(%0, %4): float32; return %5"
)
OTHER_STEPS = (
    "%1 = step((1, 4)): int64; %2 = load(0, %1): float32; %3 = number(0): float32?; %4 = fold((1, 3, 'add'), %2)"
)


def test_a_text_and_its_captures_are_a_mod():
    query, key, value = torch.randn(B, HQ, 1, 16), torch.randn(B, 2, N, 16), torch.randn(B, 2, N, 16)
    slopes = torch.rand(HQ)
    for factor in (0.5, 0.25):
        out = flex_decode(query, key, value, CanonicalMod(TEXT, [factor, slopes]))
        expected = flex_decode(query, key, value, lambda s, b, h, q, k, f=factor: s + slopes[h] * f)
        assert torch.equal(out, expected)


@pytest.mark.parametrize(
    "change",
    [
        ("captures 0 | 1; ", ""),
        ("| 1", "| 1 2"),
        ("return %5", "return %6"),
        ("return %5", "return %5; return %5"),
        ("return %5", ""),
        ("%5 = add(%0, %4)", "%5 = __import__('os')"),
        ("%5 = add(%0, %4)", "%5 = open('x')"),
        ("%5 = add(%0, %4)", "%5 = add(%0)"),
        ("%5 = add(%0, %4)", "%5 = add(%0, %5)"),
        ("%5 = add(%0, %4): float32", "%5 = add(%0, %4): int64"),
        ("%4 = mul(%2, %3): float32", "%4 = lt(%2, %3): bool"),
        ("load(0, %1)", "load(1, %1)"),
        ("load(0, %1)", "load(0, %1, %1)"),
        ("load(0, %1)", "load(0, %0)"),
        ("index('h')", "index('x')"),
        ("index('h'): int64", "index('h'): int8"),
        ("number(0)", "number(1)"),
        ("number(0)", "const(float('nan'))"),
        (TEXT[TEXT.index("%1") : TEXT.index(": float32; %5")], OTHER_STEPS),
        ("%4 = mul(%2, %3): float32", "%4 = fold((1, 0, 'add'), %2): float32"),
        ("%4 = mul(%2, %3): float32", "%4 = fold((1, 10000000, 'add'), %2): float32"),
        ("%4 = mul(%2, %3): float32", "%4 = fold((1, 3, 'sin'), %2): float32"),
        ("%4 = mul(%2, %3): float32", "%4 = fold((1, 3, 'lt'), %2): float32"),
        ("%4 = mul(%2, %3): float32", "%4 = fold((1, 3, []), %2): float32"),
        ("%1 = index('h')", "%1 = step((1, 3))"),
        ("%4 = mul", "%\u0664 = mul"),
        ("; %4", ";\n%4"),
        ("number(0)", "number(0\r)"),
        ("float32 rank 1", "float31 rank 1"),
        ("float32 rank 1", "float32 rank 2"),
    ],
    ids=lambda change: " to ".join(map(repr, change)),
)
def test_other_text_is_refused(change):
    assert change[0] in TEXT
    with pytest.raises(FlexDecodeError, match="not the text of a traced mod"):
        parse_graph(TEXT.replace(*change))


@pytest.mark.parametrize(
    ("leaves", "message"),
    [
        ([0.5], "capture 1 of mod must be a torch.float32 tensor of rank 1"),
        ([0.5, torch.rand(HQ).half()], "capture 1 of mod must be a torch.float32 tensor of rank 1"),
        ([0.5, torch.rand(HQ, 2)], "capture 1 of mod must be a torch.float32 tensor of rank 1"),
        ([torch.rand(3), torch.rand(HQ)], "capture 0 of mod is no number"),
        ([True, torch.rand(HQ)], "capture 0 of mod is no number"),
        ([3, torch.rand(HQ)], "capture 0 of mod is no number"),
    ],
    ids=["none", "dtype", "rank", "no number", "bool", "integer"],
)
def test_captures_that_do_not_fit_are_refused(leaves, message):
    query, key = torch.randn(B, HQ, 1, 16), torch.randn(B, 2, N, 16)
    with pytest.raises(FlexDecodeError, match=message):
        flex_decode(query, key, key, CanonicalMod(TEXT, leaves))


def test_a_score_mod_is_no_mask_mod():
    query, key = torch.randn(B, HQ, 1, 16), torch.randn(B, 2, N, 16)
    with pytest.raises(FlexDecodeError, match="is not that of a mask_mod"):
        flex_decode(query, key, key, mask_mod=CanonicalMod(TEXT, [0.5, torch.rand(HQ)]))
