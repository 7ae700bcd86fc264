"""Checkouts that are timed in turn: on a CPU, with this one and with some that are broken."""

import json
import pathlib

import pytest

from benchmarks import compare

ROOT = pathlib.Path(__file__).resolve().parents[3]
ONE_CASE = ["--sections", "shapes", "--rows", "33 x 1999", "--sizes", "small", "--device", "cpu"]
BROKEN = {
    "refuses": "def flex_decode(query, *others): raise ValueError('no such luck')",
    "is wrong": "def flex_decode(query, *others): return query * 0",
}


def run(tmp_path, *checkouts):
    status = compare.main([*checkouts, *ONE_CASE, "--commit", "4711", "--out", str(tmp_path / "out")])
    return status, json.loads((tmp_path / "out" / "compare.json").read_text())


def test_two_checkouts(tmp_path, capsys):
    status, document = run(tmp_path, f"before={ROOT}", f"now={ROOT}")
    (found,) = document["results"]
    assert status == 0 and document["environment"]["commit"] == "4711"
    assert document["checkouts"] == list(found["us"]) == ["before", "now"]
    assert found["label"] == "33 x 1999, 32/8, D=64, scaled down" and not found["failures"]
    ratio = found["us"]["now"] / found["us"]["before"]
    assert f"now over before: geometric mean {ratio:.3f} of 1 cases" in capsys.readouterr().out


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_checkout(what, tmp_path, capsys):
    package = tmp_path / "broken" / "flexdecode"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(f"mods = None\n{BROKEN[what]}")
    status, document = run(tmp_path, f"good={ROOT}", f"broken={package.parent}")
    (found,) = document["results"]
    assert status == 1 and list(found["us"]) == ["good"]
    reason = {"refuses": "ValueError: no such luck", "is wrong": "WrongResult: wrong result"}[what]
    assert found["failures"]["broken"].startswith(reason) and reason in capsys.readouterr().out


def test_a_checkout_that_cannot_be_imported(tmp_path):
    package = tmp_path / "flexdecode"
    package.mkdir()
    (package / "__init__.py").write_text("import no_such_module")
    with pytest.raises(SystemExit, match="the process of broken has ended"):
        run(tmp_path, f"broken={tmp_path}", f"good={ROOT}")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([f"now={ROOT}"], "name two checkouts, as in: before=../before now=."),
        ([str(ROOT), f"now={ROOT}"], "not name=folder with a checkout of flexdecode in the folder"),
        ([f"before={ROOT / 'tests'}", f"now={ROOT}"], "not name=folder with a checkout"),
        ([f"before={ROOT}", f"now={ROOT}", "--rows", "nothing like this"], "--rows"),
        ([f"before={ROOT}", f"now={ROOT}", "--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_bad_command_lines(arguments, message, capsys):
    with pytest.raises(SystemExit) as stop:
        compare.main([*ONE_CASE, *arguments])
    assert message in capsys.readouterr().err + str(stop.value)
