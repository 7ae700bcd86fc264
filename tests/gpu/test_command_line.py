"""The command line on a machine with a GPU."""

import json

import pytest
import torch

from flexdecode.call.device import device_facts
from flexdecode.cli import main

pytestmark = pytest.mark.gpu
SHAPE = "B=2,Hq=8,Hkv=2,N=1024,D=64"


def test_explain_is_for_the_present_gpu(capsys):
    facts = device_facts(torch.device("cuda", torch.cuda.current_device()))
    for words in ([], ["--device", "cuda"]):
        assert main(["explain", "mods:causal", "--shape", SHAPE, *words]) == 0
        out = capsys.readouterr().out
        assert f"  device    {torch.cuda.get_device_name()}: {facts.backend} {facts.arch}, {facts.num_sms} " in out
        assert "There is no GPU" not in out


def test_doctor_names_the_gpu(capsys):
    assert main(["doctor", "--json"]) == 0
    lines = {(line["part"], line["name"]): line["text"] for line in json.loads(capsys.readouterr().out)}
    assert lines["device", "GPU"] == torch.cuda.get_device_name()
    assert ("slow", "no GPU") not in lines


def test_bench_measures_cold_inputs(capsys, tmp_path):
    words = ["--rows", "1", "--dtypes", "fp16", "--peers", "naive,sdpa", "--sizes", "small", "--out", str(tmp_path)]
    assert main(["bench", *words]) == 0
    (result,) = json.loads((tmp_path / "matrix.json").read_text())["results"]
    assert result["inputs"] == "cold" and set(result["times_us"]) == {"flexdecode", "naive", "sdpa"}
    assert result["floor_us"] > 0
