"""docs/troubleshooting.md names texts that flexdecode really raises, and leads to the place that explains them."""

import re
from pathlib import Path

import pytest

from flexdecode import TritonVersionError, triton_api
from tests.docs.test_docs import read_blocks

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGE = DOCS / "troubleshooting.md"
ROW = re.compile(r"\| (`+)\s?(.+?)\s?\1 \| \[.+\]\(([\w-]+\.md)#([\w-]+)\) \|")
ROWS = [match.groups()[1:] for line in PAGE.read_text().splitlines() if (match := ROW.match(line))]


def sections(page):
    """The headings of a page, each with the text blocks below it."""
    found, inside, lines = [], False, page.read_text().splitlines()
    for number, line in enumerate(lines):
        inside ^= line.startswith("```")
        if not inside and line.startswith("#"):
            found.append((number, line.lstrip("# ")))
    ends = [number for number, _ in found[1:]] + [len(lines)]
    blocks = read_blocks(page)
    return {
        heading: [block for block in blocks if start < block.start < end and block.language == "text"]
        for (start, heading), end in zip(found, ends, strict=True)
    }


def raised_under(page, anchor):
    for heading, blocks in sections(page).items():
        if re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", heading).strip().lower()) == anchor:
            return [block.text for block in blocks if block.mark == "error"]
    raise AssertionError(f"{page.name} has no heading {anchor}")


def begins(text, beginning):
    """Whether a text begins so; "…" stands for anything."""
    return re.match(".*?".join(map(re.escape, beginning.split("…"))), text) is not None


def test_every_row_of_the_table_is_read():
    rows = [line for line in PAGE.read_text().splitlines() if line.startswith("| `")]
    assert len(rows) == len(ROWS) > 20


@pytest.mark.parametrize(("text", "page", "anchor"), ROWS, ids=[row[0] for row in ROWS])
def test_a_row_leads_to_a_block_that_raises_it(text, page, anchor):
    texts = raised_under(DOCS / page, anchor)
    assert any(begins(found, text) for found in texts), f"no block under {page}#{anchor} raises {text!r}"


def test_a_heading_is_the_beginning_of_what_its_block_raises():
    for heading, blocks in sections(PAGE).items():
        for block in blocks:
            if block.mark == "error":
                assert begins(block.text, heading), f"{heading!r} is not the beginning of {block.text!r}"


def shown(heading):
    (block,) = sections(PAGE)[heading]
    return block.text


def test_the_text_for_an_old_triton(monkeypatch):
    monkeypatch.setattr(triton_api, "triton_version", lambda: (3, 4))
    with pytest.raises(TritonVersionError) as caught:
        triton_api.check_version.__wrapped__()
    assert f"TritonVersionError: {caught.value}" == shown("TritonVersionError")
