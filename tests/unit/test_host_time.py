"""`benchmarks/host_time.py` runs on a CPU, where its numbers mean nothing, and names all that it times."""

import json

import pytest
import torch

from benchmarks import host_time


def test_it_times_every_call_and_writes_what_it_prints(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert host_time.main(["--out", str(tmp_path), "--commit", "abc"]) == 0
    document = json.loads((tmp_path / "host_time.json").read_text())
    names = [record["case"] for record in document["results"]]
    kinds = ["", ", kv_lens", ", ALiBi", ", four captures and a mask", ", out", ", out, one pass"]
    assert names == ["add_", "SDPA", *[f"{of}{kind}" for kind in kinds for of in ("flex_decode", "prepared")]]
    assert {*host_time.LIMITS} <= {*names} and document["environment"]["commit"] == "abc"
    assert all(len(record["times_us"]) == host_time.ROUNDS["cpu"] for record in document["results"])
    assert all(time > 0 for record in document["results"] for time in record["times_us"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in names) and "SDPA takes " in printed
    assert "unknown" not in document["sdpa_backend"]


def test_the_table_compares_with_sdpa():
    results = [{"case": name, "times_us": times, "kernels": 1} for name, times in (
        ("add_", [5.0]), ("SDPA", [30.0, 40.0, 90.0]), ("prepared", [20.0]),
    )]  # fmt: skip
    document = {"results": results, "sdpa_backend": "flash", "environment": {"hardware": "H100"}}
    lines = host_time.table(document).splitlines()
    assert [line.split() for line in lines[1:4]] == [
        ["add_", "5.0", "0.12", "1"], ["SDPA", "40.0", "1.00", "1"], ["prepared", "20.0", "0.50", "0.65", "1"],
    ]  # fmt: skip
    assert lines[-2:] == ["SDPA takes flash.", "H100"]


@pytest.mark.gpu
def test_one_pass_and_two():
    calls, _ = host_time.make_calls("cuda")
    for of in ("flex_decode", "prepared"):
        assert host_time.kernels_of(calls[f"{of}, out, one pass"]) == 1
        assert host_time.kernels_of(calls[of]) == 2
