"""`benchmarks/autotune.py` runs its cases on a CPU, where nothing is measured, and makes the page of a record."""

import statistics

import pytest
import torch

from benchmarks import autotune
from benchmarks.sections import cases_of
from flexdecode import flex_decode


def test_a_run(monkeypatch):
    monkeypatch.setattr(autotune, "time_cpu", lambda call: [3.0, 1.0, 2.0])
    monkeypatch.setattr(
        autotune, "cases_of", lambda *given: cases_of(*given)[:2] if given[0] == "shapes" else cases_of(*given)[2:3]
    )
    records = list(autotune.run("cpu", small=True))
    assert len(records) == 3 and all(record["chosen"] is None for record in records)
    assert all(statistics.median(record["times_us"]) == 2.0 for record in records)
    assert all(record["bar_us"] == 2.04 for record in records)


def test_a_wrong_result_ends_the_run(monkeypatch):
    monkeypatch.setattr(autotune, "flex_decode", lambda *given, **more: 1.1 * flex_decode(*given, **more))
    with pytest.raises(SystemExit, match="wrong result"):
        next(autotune.run("cpu", small=True))


def test_the_page():
    records = [
        {
            "case": f"case {i}", "default_us": [100.0] * 3, "times_us": [us] * 3, "chosen": chosen, "bar_us": 102.0,
            "first_call_s": {"default": 1.0, "autotuned": 7.25},
        }
        for i, (us, chosen) in enumerate([(80.0, "num_warps=8"), (125.0, None)])
    ]  # fmt: skip
    text = autotune.markdown({"environment": {"hardware": "a GPU, 2 SMs"}, "results": records})
    assert "| case 0 | 100.0 | 80.0 | 0.800 | num_warps=8 | 7.2 |" in text
    assert "| case 1 | 100.0 | 125.0 | 1.250 | not measured | 7.2 |" in text
    assert "1.000 times as long as the default in the geometric mean, and from 0.800 to 1.250 times" in text


def test_a_gpu_is_needed(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        autotune.main([])
    assert "this measures a GPU" in capsys.readouterr().err
