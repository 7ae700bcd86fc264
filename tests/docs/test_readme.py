"""The README: short, and its line of speed is what the recorded run says."""

import json
from pathlib import Path

from benchmarks import report

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def test_it_is_short():
    assert len(README.splitlines()) < 120


def test_the_line_of_speed_is_that_of_the_record():
    document = json.loads((ROOT / "benchmarks" / "results" / "h200" / "matrix.json").read_text())
    assert report.speed_line(document) in " ".join(README.split())


def test_first_come_an_example_with_a_mod_and_a_picture():
    above = README[: README.index("## Install")]
    assert above.index("def alibi(score") < above.index("speed.png") < above.index("times as fast as")
