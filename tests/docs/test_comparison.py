"""docs/comparison.md: no cell is empty, and each that claims something has a source."""

import re
from pathlib import Path

import pytest

PAGE = Path(__file__).resolve().parents[2] / "docs" / "comparison.md"


def tables():
    found, inside = [], False
    for line in PAGE.read_text().splitlines():
        row = line.startswith("|")
        if row and not inside:
            found.append([])
        if row:
            found[-1].append([cell.strip() for cell in line.strip("|").split("|")])
        inside = row
    return found


def cells():
    """By library: what it offers, by row."""
    found = {}
    for table in tables()[1:]:
        for place, library in enumerate(table[0][1:], start=1):
            found.setdefault(library, {}).update({row[0]: row[place] for row in table[2:]})
    return found


def sources():
    """By library: the source, by row."""
    found, library = {}, ""
    for line in PAGE.read_text().splitlines():
        if line.startswith("#"):
            library = line.removeprefix("### Sources: ") if line.startswith("### Sources: ") else ""
        elif library and (item := re.match(r"- ([^:]+(?:: a logit for each head)?): (.+)", line)):
            found.setdefault(library, {})[item[1]] = item[2]
    return found


def test_every_library_has_the_same_rows_and_a_version():
    versions, *rest = tables()
    libraries = [row[0] for row in versions[2:]]
    assert set(cells()) == {"flexdecode", *libraries} == set(sources())
    assert len(rest) == 2 and [row[0] for row in rest[0]] == [row[0] for row in rest[1]]
    assert all(re.search(r"\d+\.\d+\.\d+", row[1]) for row in versions[2:])


@pytest.mark.parametrize("library", cells())
def test_every_claim_has_a_source(library):
    claims = {row: cell for row, cell in cells()[library].items() if cell not in ("–", "not checked")}
    assert all(cells()[library].values())
    assert claims.keys() == sources()[library].keys()
