"""`flexdecode bench`: a small run, the words that reach the matrix, and what is refused before it."""

import json
import sys
from pathlib import Path

import pytest
import torch

import flexdecode
from flexdecode.cli import bench

SMALL = ("bench", "--device", "cpu", "--rows", "2", "--dtypes", "fp32", "--peers", "naive")


@pytest.fixture
def words(monkeypatch):
    """Notes the words that the matrix is run with, in place of a run."""
    found = []
    matrix = bench.load_benchmark("performance_matrix")
    monkeypatch.setattr(matrix, "main", lambda arguments: found.extend(arguments) or 0)
    return found


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_a_small_run(run, tmp_path, threads):
    pytest.importorskip("matplotlib")
    record, plot = tmp_path / "record.json", tmp_path / "plot.png"
    more = ("--mods", "alibi", "--window", "7", "--sizes", "small", "--inputs", "warm")
    done = run(*SMALL, *more, "--out", tmp_path / "out", "--json", record, "--plot", plot)
    assert (done.status, done.err) == (0, "")
    assert "[1/2 " in done.out and "[2/2 " in done.out and "naive PyTorch" in done.out and "SDPA" not in done.out
    document = json.loads(record.read_text())
    assert document["columns"] == {"flexdecode": "flexdecode", "naive": "naive PyTorch"}
    flags = document["flags"]
    assert (flags["rows"], flags["window"], flags["sizes"], flags["inputs"]) == ("2", 7, "small", ["warm"])
    assert [result["mod"] for result in document["results"]] == ["alibi", "alibi"]
    assert all(set(result["times_us"]) == {"flexdecode", "naive"} for result in document["results"])
    assert record.read_text() == (tmp_path / "out" / "matrix.json").read_text()
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert {"matrix.csv", "matrix.md"} <= {path.name for path in (tmp_path / "out").iterdir()}


def test_words_of_the_matrix(run, words, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert run("bench", "--out", tmp_path).status == 0
    assert words == ["--mods=none", "--dtypes=float16,bfloat16,float32", "--window=1024", f"--out={tmp_path}"]
    words.clear()
    more = ("--mods", "none, causal,none", "--peers", "sdpa,flex", "--dtypes", "bf16,float32", "--rows", "6:12")
    more += ("--inputs", "both", "--sizes", "small", "--device", "cuda", "--window", "7", "--out", tmp_path)
    assert run("bench", *more).status == 0
    assert words == [
        "--mods=none,causal", "--dtypes=bfloat16,float32", "--columns=flexdecode,sdpa,flex", "--inputs=both",
        "--rows=6:12", "--window=7", "--sizes=small", f"--out={tmp_path}", "--device=cuda",
    ]  # fmt: skip


def test_the_status_of_the_matrix(run, monkeypatch, tmp_path):
    monkeypatch.setattr(bench.load_benchmark("performance_matrix"), "main", lambda arguments: 1)
    assert run(*SMALL, "--out", tmp_path).status == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--rows", "["), "--rows '[' is no number, no range and no regular expression: "),
        (("--rows", "zzz"), "no row "),
        (("--mods", "none,frob"), "--mods 'frob': choose from none, alibi, softcap, relative_bias, causal, "),
        (("--peers", "naive,frob"), "--peers 'frob': choose from naive, sdpa, sdpa_cudnn, flex"),
        (("--peers", "flexdecode"), "--peers 'flexdecode': choose from naive, sdpa, sdpa_cudnn, flex"),
        (("--dtypes", "fp8"), "--dtypes 'fp8': choose from float16, bfloat16, float32"),
        (("--inputs", "frozen"), "--inputs 'frozen': choose from warm, cold, both"),
        (("--inputs", "cold"), "--inputs cold: cold inputs are measured on a GPU; a run on a CPU has warm ones"),
        (("--sizes", "huge"), "--sizes 'huge': choose from full, small"),
        (("--device", "tpu"), "--device 'tpu': choose from cuda, cpu"),
        (("--window", "0"), "Invalid value for '--window': "),
        (("--json", "/no/such/folder/a.json"), "--json /no/such/folder/a.json: there is no folder /no/such/folder"),
        (("--plot", "/no/such/folder/a.png"), "--plot /no/such/folder/a.png: there is no folder /no/such/folder"),
        (("--plot", "a.gif"), "--plot a.gif: the name must end in .png"),
    ],
)
def test_words_that_are_wrong(run, words, more, message):
    assert run(*SMALL, *more).mistake().startswith(message)
    assert not words


def test_cuda_without_a_gpu(run, words, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert run("bench", "--device", "cuda").mistake() == "--device cuda: PyTorch finds no GPU"
    assert run("bench", "--inputs", "both").mistake().startswith("--inputs both: cold inputs are measured on a GPU")
    assert not words


def test_a_plot_without_matplotlib(run, words, monkeypatch):
    known = bench.importlib.util.find_spec
    monkeypatch.setattr(
        bench.importlib.util, "find_spec", lambda name: None if name == "matplotlib" else known(name)
    )  # fmt: skip
    message = run(*SMALL, "--plot", "a.png").mistake()
    assert message == "--plot needs matplotlib: pip install 'flexdecode[bench]'" and not words


# --- Where the benchmarks are -----------------------------------------------------------------------------------------


@pytest.fixture
def forget(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("flexdecode.benchmarks")]:
        monkeypatch.delitem(sys.modules, name)


def test_no_other_package_of_this_name_is_taken(forget, monkeypatch):
    monkeypatch.setitem(sys.modules, "benchmarks", None)
    rows = bench.load_benchmark("rows")
    assert rows.__name__ == "flexdecode.benchmarks.rows" and len(rows.load_rows()) == 60


def test_inside_an_installed_package(forget, monkeypatch, tmp_path):
    inside = tmp_path / "flexdecode" / "benchmarks"
    inside.mkdir(parents=True)
    for name in ("__init__", "performance_matrix"):
        (inside / f"{name}.py").write_text("here = True\n")
    monkeypatch.setattr(flexdecode, "__file__", str(tmp_path / "flexdecode" / "__init__.py"))
    assert bench.load_benchmark("performance_matrix").here


def test_nowhere(run, forget, monkeypatch, tmp_path):
    monkeypatch.setattr(flexdecode, "__file__", str(tmp_path / "flexdecode" / "__init__.py"))
    assert run("bench").mistake() == "the benchmarks are missing: the installation is damaged, install it again"


def test_a_wheel_holds_them():
    text = (Path(flexdecode.__file__).parents[1] / "pyproject.toml").read_text()
    wheel = text.partition("[tool.hatch.build.targets.wheel]")[2].partition("\n[")[0]
    assert '"benchmarks" = "flexdecode/benchmarks"' in wheel and "/benchmarks/results" in wheel
