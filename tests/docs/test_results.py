"""The pages of measurements are what the scripts make of the recorded runs: nobody writes their numbers."""

import json
from pathlib import Path

import pytest

from benchmarks import live_kv, packed_queries, report, server_caches, transformers_decode

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "h200"


def test_performance_page():
    document = json.loads((RESULTS / "matrix.json").read_text())
    page = report.markdown(document, ["performance.png", "performance-none-warm.png"])
    assert page == (ROOT / "docs" / "performance.md").read_text()


@pytest.mark.parametrize(
    "benchmark", [live_kv, packed_queries, server_caches, transformers_decode], ids=lambda module: module.__name__
)
def test_page_of_a_recorded_run(benchmark, tmp_path):
    name = benchmark.__name__.rpartition(".")[2]
    page = tmp_path / "page.md"
    assert benchmark.main(["--read", str(RESULTS / f"{name}.json"), "--page", str(page)]) == 0
    assert page.read_text() == (ROOT / "docs" / f"{name.replace('_', '-')}.md").read_text()


def test_a_case_over_its_bar_falls_short():
    document = json.loads((RESULTS / "live_kv.json").read_text())
    for record in document["results"]:
        record["bar_us"] = 1e6
    assert "Nothing: every case is under its bar." in live_kv.markdown(document)
    record["bar_us"] = 0.1
    assert "- prefix of each sequence, 2500 to 3000, B = 1, N = 131072:" in live_kv.markdown(document)
