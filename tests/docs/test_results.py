"""The pages of measurements and their pictures are what the scripts make of the recorded runs: nobody writes numbers.

`python tests/docs/test_results.py` makes the pages and the pictures anew: read the difference.
"""

import json
import re
from pathlib import Path

import pytest

from benchmarks import (
    live_kv,
    packed_queries,
    performance_matrix,
    report,
    section_pages,
    server_caches,
    speed,
    table,
    transformers_decode,
)  # fmt: skip

ROOT = Path(__file__).resolve().parents[2]
DOCS, RESULTS = ROOT / "docs", ROOT / "benchmarks" / "results" / "h200"
SPEED, FIRST = DOCS / "images" / "speed.png", DOCS / "images" / "performance.png"
RECORDED = [live_kv, packed_queries, server_caches, transformers_decode]
ANEW = "run `python tests/docs/test_results.py` and look at the difference"


def name_of(benchmark):
    return benchmark.__name__.rpartition(".")[2]


def page_of(benchmark):
    return DOCS / f"{name_of(benchmark).replace('_', '-')}.md"


def matrix():
    return json.loads((RESULTS / "matrix.json").read_text())


def pictures():
    """The pictures of the performance page, in its order."""
    _, *others = table.subjects(matrix())
    return [FIRST, *(FIRST.with_name("-".join(("performance", *subject)) + ".png") for subject in others)]


def performance_page():
    return report.markdown(matrix(), [picture.relative_to(DOCS).as_posix() for picture in pictures()])


def make_page(benchmark, path):
    return benchmark.main(["--read", str(RESULTS / f"{name_of(benchmark)}.json"), "--page", str(path)])


def opening(page):
    """The paragraph after the title."""
    return page.split("\n\n")[1]


def test_performance_page():
    assert performance_page() == (DOCS / "performance.md").read_text(), ANEW


@pytest.mark.parametrize("benchmark", RECORDED, ids=name_of)
def test_page_of_a_recorded_run(benchmark, tmp_path):
    page = tmp_path / "page.md"
    assert make_page(benchmark, page) == 0
    assert page.read_text() == page_of(benchmark).read_text(), ANEW


@pytest.mark.parametrize("path", [SPEED, *pictures()], ids=lambda path: path.name)
def test_pictures_are_drawn_from_the_recorded_run(path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: `pip install flexdecode[bench]`")
    from benchmarks import picture

    assert picture.read_digest(path) == picture.digest(matrix()), ANEW


def test_another_run_needs_other_pictures():
    pytest.importorskip("matplotlib", reason="needs matplotlib: `pip install flexdecode[bench]`")
    from benchmarks import picture

    document = matrix()
    document["results"][0]["times_us"]["flexdecode"][0] += 0.1
    assert picture.read_digest(SPEED) != picture.digest(document)


def test_pictures_have_titles_and_texts_of_their_own():
    found = re.findall(r'\[!\[(.+)\]\((\S+) "(.+)"\)\]\((\S+)\)', performance_page())
    texts, addresses, titles, goals = zip(*found, strict=True)
    assert addresses == goals == tuple(picture.relative_to(DOCS).as_posix() for picture in pictures())
    assert len(set(texts)) == len(set(titles)) == len(pictures())


@pytest.mark.parametrize("page", ["performance.md", *(page_of(b).name for b in RECORDED)])
def test_a_page_of_measurements_begins_with_three_sentences(page):
    assert len(re.findall(r"\.(?: |$)", opening((DOCS / page).read_text()))) == 3


def test_the_index_tells_the_conditions_of_its_picture():
    index = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", (DOCS / "index.md").read_text())  # links as their texts
    assert speed.caption(matrix()) in " ".join(index.split())


def test_a_case_that_misses_its_goal_falls_short():
    document = json.loads((RESULTS / "live_kv.json").read_text())
    for record in document["results"]:
        record["bar_us"] = 1e6
    assert "Nothing: every case reaches its goal." in live_kv.markdown(document)
    assert "16 of 16 cases reach their goal." in live_kv.markdown(document)
    record["bar_us"] = 0.1
    assert "- prefix of each sequence, 2500 to 3000, B = 1, N = 131072:" in live_kv.markdown(document)
    assert "15 of 16 cases reach their goal; the others miss it by up to " in live_kv.markdown(document)


# --- The sections of the matrix: a record makes its page --------------------------------------------------------------

SECTIONS = RESULTS.parent, DOCS, ROOT / "mkdocs.yml"
NAVIGATION = "nav:\n  - Measurements:\n      - Performance: performance.md\n      - Long caches: live-kv.md\n"


def test_pages_of_sections_are_made_of_their_records():
    pytest.importorskip("matplotlib", reason="needs matplotlib: `pip install flexdecode[bench]`")
    assert section_pages.stale(*SECTIONS) == [], ANEW


def test_a_record_that_drops_in_makes_a_page(tmp_path):
    pytest.importorskip("matplotlib", reason="needs matplotlib: `pip install flexdecode[bench]`")
    results, docs, navigation = tmp_path / "results", tmp_path / "docs", tmp_path / "mkdocs.yml"
    docs.mkdir()
    navigation.write_text(NAVIGATION)
    words = [
        "--device",
        "cpu",
        "--sections",
        "masks,mla",
        "--rows",
        "2",
        "--columns",
        "flexdecode,sdpa",
        "--no-picture",
    ]
    assert performance_matrix.main([*words, "--out", str(results / "card")]) == 0
    assert section_pages.stale(results, docs, navigation) == [
        "sections-card.md", "mkdocs.yml", "sections-card-masks.png", "sections-card-mla.png",
    ]  # fmt: skip
    section_pages.make_pages(results, docs, navigation)
    assert section_pages.stale(results, docs, navigation) == []
    page = (docs / "sections-card.md").read_text()
    assert "## Masks" in page and "### Latents (MLA): bfloat16, warm inputs" in page
    assert "| 8 x 32768, sliding_window of 1024, scaled down |" in page and "(images/sections-card-mla.png " in page
    listed = navigation.read_text().splitlines()
    assert listed[3] == "      - Sections of the matrix, CARD: sections-card.md"
    section_pages.make_pages(results, docs, navigation)
    assert navigation.read_text().splitlines() == listed

    record = results / "card" / "sections.json"
    document = json.loads(record.read_text())
    document["results"][0]["times_us"]["flexdecode"] = [1.0]
    record.write_text(json.dumps(document))
    assert section_pages.stale(results, docs, navigation) == [
        "sections-card.md", "sections-card-masks.png", "sections-card-mla.png",
    ]  # fmt: skip


if __name__ == "__main__":
    from benchmarks import figure

    section_pages.make_pages(*SECTIONS)
    speed.draw(matrix(), SPEED)
    figure.draw_all(matrix(), FIRST)
    (DOCS / "performance.md").write_text(performance_page())
    for benchmark in RECORDED:
        make_page(benchmark, page_of(benchmark))
