"""Checkouts that are timed in turn: on a CPU, with this one and with some that are broken."""

import json
import pathlib

import pytest

from benchmarks import compare

ROOT = pathlib.Path(__file__).resolve().parents[3]
SMALL = ["--sizes", "small", "--device", "cpu"]
ONE_CASE = ["--sections", "shapes", "--rows", "33 x 1999", *SMALL]
RIGHT = """
import torch
calls = []
def flex_decode(query, key, value, *others):
    calls.append(0)
    check(query)
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    return torch.nn.functional.scaled_dot_product_attention(query, key, value)
"""
BROKEN = {
    "refuses": ("def flex_decode(query, *others): raise ValueError('no such luck')", "ValueError: no such luck"),
    "is wrong": ("def flex_decode(query, *others): return query * 0", "wrong result: relative error"),
    "fails later": (f"{RIGHT}\ndef check(query): assert len(calls) == 1, 'too often'", "AssertionError: too often"),
}


def run(tmp_path, *arguments):
    status = compare.main([*arguments, "--commit", "4711", "--out", str(tmp_path / "out")])
    return status, json.loads((tmp_path / "out" / "compare.json").read_text())


def broken(tmp_path, text):
    package = tmp_path / "broken" / "flexdecode"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(text)
    return f"broken={package.parent}"


def test_two_checkouts(tmp_path, capsys):
    status, document = run(tmp_path, f"before={ROOT}", *ONE_CASE, f"now={ROOT}")
    (found,) = document["results"]
    assert status == 0 and document["environment"]["commit"] == "4711"
    assert list(document["checkouts"]) == list(found["us"]) == ["before", "now"] and not document["left_out"]
    assert document["checkouts"]["now"]["folder"] == str(ROOT) and document["protocol"].startswith("Wall time")
    assert found["label"] == "33 x 1999, 32/8, D=64, scaled down" and not found["failures"]
    ratio = found["us"]["now"] / found["us"]["before"]
    printed = capsys.readouterr().out
    assert f"now over before: geometric mean {ratio:.3f} of 1 cases" in printed
    assert f"{found['us']['before']:.2f} {found['us']['now']:>10.2f} {ratio:>6.3f}" in printed


def test_mods_are_told_apart(tmp_path, capsys):
    cases = ["--sections", "seed", "--rows", "1", "--dtypes", "fp32", "--mods", "none,softcap", *SMALL]
    _, document = run(tmp_path, f"before={ROOT}", f"now={ROOT}", *cases)
    assert [found["mod"] for found in document["results"]] == ["none", "softcap"]
    assert "of 2 cases" in capsys.readouterr().out


def test_no_time(tmp_path):
    status, document = run(tmp_path, f"before={ROOT}", f"now={ROOT}", *ONE_CASE, "--minutes", "-1")
    assert status == 0 and not document["results"]
    assert document["left_out"] == ["33 x 1999, 32/8, D=64, scaled down, none, bfloat16, warm"]


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkout(what, tmp_path, capsys):
    text, reason = BROKEN[what]
    checkout = broken(tmp_path, f"print('hello')\nmods = None\n{text}")
    status, document = run(tmp_path, checkout, f"good={ROOT}", *ONE_CASE)
    (found,) = document["results"]
    assert status == 1 and list(found["us"]) == ["good"] and list(found["failures"]) == ["broken"]
    printed = capsys.readouterr().out
    assert found["failures"]["broken"].startswith(reason) and f"broken: {reason}" in printed
    assert "geometric mean" not in printed


@pytest.mark.parametrize("text", ["import no_such_module", "import os\nos._exit(3)"])
def test_a_checkout_that_ends(text, tmp_path):
    with pytest.raises(SystemExit, match="the process of broken has ended with status"):
        run(tmp_path, broken(tmp_path, text), f"good={ROOT}", *ONE_CASE)


def test_an_interrupted_run_keeps_what_it_has(tmp_path):
    """A checkout ends at the second case, the first one of a single sequence."""
    text = f"{RIGHT}\nimport os\nmods = None\ndef check(query):\n    if len(query) == 1: os._exit(3)"
    cases = ["--sections", "shapes", "--rows", "33 x 1999|^1 x 131072", *SMALL]
    with pytest.raises(SystemExit, match="the process of broken has ended with status 3"):
        run(tmp_path, f"good={ROOT}", broken(tmp_path, text), *cases)
    document = json.loads((tmp_path / "out" / "compare.json").read_text())
    assert [found["label"] for found in document["results"]] == ["33 x 1999, 32/8, D=64, scaled down"]


HERE, NOW = f"before={ROOT}", f"now={ROOT}"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([NOW], "name two checkouts, as in: before=../before now=."),
        ([NOW, NOW], "two checkouts have the same name"),
        ([str(ROOT), NOW], "not name=folder with a checkout of flexdecode in the folder"),
        ([f"={ROOT}", NOW], "not name=folder with a checkout"),
        ([f"before={ROOT / 'tests'}", NOW], "not name=folder with a checkout"),
        ([HERE, NOW, "--rows", "nothing like this"], "no case of these sections matches --rows 'nothing like this'"),
        ([HERE, NOW, "--rows", "("], "compare: missing ), unterminated subpattern"),
        ([HERE, NOW, "--columns", "sdpa"], "unrecognized arguments: --columns"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([*ONE_CASE, *arguments])
    assert message in capsys.readouterr().err + str(stop.value)
