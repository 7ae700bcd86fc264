"""docs/comparison.md: every cell has a source, and nothing is left empty."""

from pathlib import Path

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


def test_every_cell_has_a_source():
    _, cells, sources = tables()
    assert cells[0] == sources[0] and [row[0] for row in cells] == [row[0] for row in sources]
    for row, source in zip(cells[2:], sources[2:], strict=True):
        assert len(row) == len(source) == len(cells[0])
        for name, cell, where in zip(cells[0], row, source, strict=True):
            assert cell and where, f"{row[0]}, {name}: an empty cell"
            known = cell not in ("–", "not checked")
            assert (where != "–") == known, f"{row[0]}, {name}: {cell!r} has the source {where!r}"


def test_every_column_names_its_version():
    versions, cells, _ = tables()
    assert [row[0] for row in versions[2:]] == cells[0][2:]
    assert all(any(c.isdigit() for c in row[1]) for row in versions[2:])
