"""How the matrix is run: its command line, its protocol, its time limit, and runs that are joined."""

import argparse
import json

import pytest
import torch

from benchmarks import measure, performance_matrix, runner, section_report, sections, timing
from benchmarks.cases import Case

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(measure, "time_cpu", lambda call: [2.0])


def run(out, *words):
    options = ["--device", "cpu", "--columns", "flexdecode", "--no-picture", "--out", str(out), *words]
    return performance_matrix.main(options)


# --- Protocol ---------------------------------------------------------------------------------------------------------


def test_columns_are_timed_in_turn_and_the_lower_median_counts():
    order, times = [], {"a": iter([[5.0, 5.0, 1.0], [3.0, 4.0, 4.0]]), "b": iter([[2.0], [3.0]])}

    def timer(name):
        return lambda: order.append(name) or next(times[name])

    turns = timing.time_in_turn({"a": timer("a"), "b": timer("b")})
    assert order == ["a", "b", "a", "b"]
    assert turns == {"a": [[3.0, 4.0, 4.0], [5.0, 5.0, 1.0]], "b": [[2.0], [3.0]]}


def test_the_card_settles_before_anything_counts():
    times = iter([209.0, 195.0, 179.0, 178.0, 170.0])
    timing.settle(lambda: [next(times)])
    assert next(times) == 170.0


def test_settling_ends(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr(timing.time, "monotonic", lambda: 0.2 * next(clock))
    times = iter(range(1, 100))
    timing.settle(lambda: [10.0 * next(times) ** 2])
    assert next(times) == 3


class Meter:
    """A FloorMeter whose stream takes 5 us, then 4, then 3 ..."""

    def __init__(self, order):
        self.order, self.left = order, 6.0

    def stream(self, num_bytes, inputs):
        self.asked = num_bytes, inputs
        return self, "how"

    def time(self):
        self.order.append("limit")
        self.left -= 1.0
        return [self.left]


def test_the_limit_is_timed_in_the_same_turns(monkeypatch):
    order = []
    monkeypatch.setattr(measure, "time_cpu", lambda call: order.append("column") or [8.0])
    case, meter = Case("case", (20, 20), 4, 2, 16, dtype="float32"), Meter(order)
    (result,) = measure.measure(case, ["flexdecode"], ["warm"], CPU, meter)
    assert order == ["column", "column", "column", "limit", "column", "limit"]  # the first two: until it has settled
    assert meter.asked == (40 * 2 * 2 * 16 * 4, "warm")
    assert (result.floor_us, result.floor_config) == (4.0, "how")
    assert result.turns_us == {"flexdecode": [8.0, 8.0], "limit": [4.0, 5.0]} and list(result.times_us) == [
        "flexdecode"
    ]


def test_a_result_that_is_wrong_while_it_is_timed_is_taken_out(quick, monkeypatch):
    monkeypatch.setattr(
        measure.Ready, "result", lambda self, kind: torch.zeros(2, 4, 1, 16) if kind == "cold" else None
    )
    monkeypatch.setattr(measure, "_num_sets", lambda *args: 1)
    case = Case("case", (20, 20), 4, 2, 16, dtype="float32")
    *cells, cold, warm = measure.measure(case, ["flexdecode"], ["cold", "warm"], CPU)
    assert [(cell.inputs, cell.wrong) for cell in cells] == [("cold", True), ("warm", True)]
    assert cells[0].reason.startswith("wrong result in a CUDA graph: relative error 1.0e+00")
    assert cold.times_us == warm.times_us == {}


# --- Command line and records -----------------------------------------------------------------------------------------


def test_seed_rows_are_the_default():
    assert performance_matrix.parse(["--device", "cpu"]).sections == ["seed"]


def test_sections_have_records_of_their_own(quick, tmp_path, capsys):
    assert run(tmp_path, "--sections", "mla,seed,masks", "--rows", "2", "--dtypes", "fp32") == 0
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{ending}" for name in ("matrix", "sections") for ending in ("csv", "json", "md")
    }
    matrix, others = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("matrix", "sections"))
    assert len(matrix["results"]) == 2 and "section" not in matrix["results"][0]
    assert [r["section"] for r in others["results"]] == ["mla", "mla", "masks", "masks"]
    first = others["results"][0]
    assert first["label"] == "64 x 8192, 128 heads, scaled down" and first["row"]["dtype"] == "float32"
    assert first["turns_us"] == {"flexdecode": [2.0, 2.0]} and first["relative_errors"]["flexdecode"] < 1e-5
    assert (tmp_path / "sections.csv").read_text().startswith("section,label,B,Mq,Mkv,")
    shown = capsys.readouterr().out
    assert "Latents (MLA), float32, warm inputs (microseconds)" in shown and "flexdecode performance matrix" in shown


def test_labels_of_cases_differ():
    for section in sections.SECTIONS:
        labels = [case.label for case in sections.cases_of(section, "bfloat16", small=False)]
        assert len(labels) == len(set(labels))


def test_a_peer_that_is_not_installed_is_left_out_with_one_line(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(
        runner, "missing", lambda name: "xformers split-K: not installed here" if name == "xformers" else None
    )
    words = ["--sections", "ragged", "--rows", "1", "--columns", "flexdecode,xformers"]
    assert run(tmp_path, *words) == 0
    assert capsys.readouterr().out.count("xformers split-K: not installed here.") == 2  # at the start and at the end
    assert json.loads((tmp_path / "sections.json").read_text())["columns"] == {"flexdecode": "flexdecode"}


def test_no_case_is_a_mistake(tmp_path):
    with pytest.raises(SystemExit, match="no case of these sections matches --rows 'zzz'"):
        run(tmp_path, "--sections", "mla", "--rows", "zzz")


def test_a_wrong_flexdecode_fails_the_run(quick, tmp_path, monkeypatch):
    column = measure.COLUMNS["flexdecode"]
    wrong = column._replace(make=lambda *case: lambda tensors: lambda: torch.zeros_like(tensors.query))
    monkeypatch.setitem(measure.COLUMNS, "flexdecode", wrong)
    assert run(tmp_path, "--sections", "shapes", "--rows", "1") == 1


# --- The time limit ---------------------------------------------------------------------------------------------------


def test_the_row_at_hand_is_finished_and_the_rest_is_named(quick, tmp_path, monkeypatch, capsys):
    clock = [0.0]
    monkeypatch.setattr(runner.time, "monotonic", lambda: clock[0])
    plain = runner.measure

    def slow(*args):
        clock[0] += 40.0
        return plain(*args)

    monkeypatch.setattr(runner, "measure", slow)
    assert run(tmp_path, "--sections", "mla,packed", "--minutes", "1") == 0
    document = json.loads((tmp_path / "sections.json").read_text())
    labels = [case.label for name in ("mla", "packed") for case in sections.cases_of(name, "bfloat16", small=True)]
    assert [r["label"] for r in document["results"]] == labels[:2] and document["left_out"] == labels[2:]
    told = "; ".join(labels[2:])
    assert f"Left out, because the 1 minutes were over: {told}" in capsys.readouterr().out
    assert f"- Left out, because the time was over: {told}." in (tmp_path / "sections.md").read_text()


# --- Pages ------------------------------------------------------------------------------------------------------------


def on_a_gpu(times_of, columns=("flexdecode", "sdpa", "fa3")):
    """A document as of a GPU: for each case its limit and times, in the section `mods`."""
    results = [
        {
            "section": "mods", "label": label, "mod": mod, "inputs": "cold", "row": {"dtype": "bfloat16", "B": 1},
            "live_kv_bytes": 1, "floor_us": limit,
            "times_us": {name: [time] for name, time in zip(columns, times, strict=False) if time},
        }
        for label, mod, limit, *times in times_of
    ]  # fmt: skip
    return {
        "device": "cuda", "timestamp": "2026-11-30T00:00:00+00:00", "environment": {"hardware": "Card, 1 SM"},
        "protocol": "How.", "flags": {}, "columns": {"flexdecode": "flexdecode", "sdpa": "SDPA", "fa3": "FA3"},
        "notes": [], "results": results, "empty_cells": [], "left_out": [],
    }  # fmt: skip


def test_a_page_says_what_falls_short_by_name():
    document = on_a_gpu([("plain", "none", 100.0, 110.0, 121.0, 99.0), ("sloped", "alibi", 100.0, 121.0, 242.0, None)])
    page = section_report.markdown(document, ["images/mods.png"])
    opening = page.split("\n\n")[1]
    assert opening.startswith("A decode step takes 1.15 times its limit (geometric mean over 2 results).")
    assert "the fastest column on 1 of the 2 results with a peer" in opening and opening.endswith(
        "0.90 times at least."
    )
    assert "- Mods, bfloat16, cold: a peer is faster on 1 case (its time over ours): plain (FA3 0.90)." in page
    assert "without a mod, at most: alibi +10.0%." in page and "(images/mods.png " in page
    assert "| plain | 100.0 | 110.0 | 1.10 | 0.90 (FA3) | 121.0 | **99.0** | – |" in page
    assert "| sloped | 100.0 | **121.0** | 1.21 | 2.00 (SDPA) | 242.0 | – | +10.0% |" in page


def test_a_page_shows_a_wrong_peer():
    document = on_a_gpu([("plain", "none", 100.0, 110.0, None, 150.0), ("more", "none", 100.0, 110.0, 120.0, 150.0)])
    cell = {
        "label": "plain",
        "mod": "none",
        "inputs": "cold",
        "column": "sdpa",
        "reason": "wrong result",
        "wrong": True,
    }
    document["empty_cells"].append(cell)
    page = section_report.markdown(document, [])
    assert "| plain | 100.0 | **110.0** | 1.10 | 1.36 (FA3) | wrong | 150.0 |" in page
    assert "- Wrong results: SDPA; see the end of the page." in page


def test_a_mod_whose_mask_leaves_other_bytes_has_no_share():
    document = on_a_gpu([("plain", "none", 100.0, 110.0), ("some", "documents", 50.0, 60.0)])
    document["results"][1]["live_kv_bytes"] = 2
    assert "without a mod" not in section_report.markdown(document, [])


def test_runs_of_one_machine_are_joined(tmp_path):
    first = on_a_gpu([("plain", "none", 100.0, 110.0)])
    second = on_a_gpu([("wide", "none", 100.0, 120.0)])
    second["results"][0]["section"], second["notes"], second["left_out"] = "shapes", ["a note"], ["late"]
    paths = [tmp_path / "first.json", tmp_path / "second.json"]
    for path, document in zip(paths, (first, second), strict=True):
        path.write_text(json.dumps(document))
    joined = tmp_path / "sections.json"
    assert section_report.main([*map(str, paths), "--json", str(joined)]) == 0
    document = json.loads(joined.read_text())
    assert [r["label"] for r in document["results"]] == ["wide", "plain"]
    assert (document["notes"], document["left_out"]) == (["a note"], ["late"])
    second["environment"] = {"hardware": "Other"}
    with pytest.raises(ValueError, match="different machines"):
        section_report.join([first, second])


def test_every_peer_is_a_column_by_default_on_a_gpu():
    options = argparse.Namespace(columns=None, device="cuda", flex=None, sizes="full")
    chosen, notes = runner.choose_columns(options)
    assert chosen[:5] == ["flexdecode", "naive", "sdpa", "sdpa_cudnn", "flex"] and "sdpa_flash" in chosen
    assert notes[0].startswith("FlexAttention (best): left out (--columns names it;")
