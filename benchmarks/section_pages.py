"""The pages of the documentation that are made from recorded runs of the sections: one for each card.

A record lies in `benchmarks/results/<card>/sections.json`. Its page is `docs/sections-<card>.md`, its pictures lie in
`docs/images`, and `mkdocs.yml` lists the page. `python tests/docs/test_results.py` makes all of them.
"""

import json
import pathlib

from . import section_report

__all__ = ["make_pages", "page_text", "records", "stale"]

AFTER = "      - Performance: performance.md\n"  # the line of mkdocs.yml behind which the pages are listed


def records(results: pathlib.Path) -> list[pathlib.Path]:
    """The recorded runs of the sections in a folder with one folder for each card."""
    return sorted(results.glob("*/sections.json"))


def _pictures(record: pathlib.Path, docs: pathlib.Path) -> list[pathlib.Path]:
    document = json.loads(record.read_text())
    name = f"sections-{record.parent.name}"
    return [docs / "images" / f"{name}-{section}.png" for section in section_report.sections_of(document)]


def page_text(record: pathlib.Path, docs: pathlib.Path) -> str:
    """What the page of a record says."""
    addresses = [picture.relative_to(docs).as_posix() for picture in _pictures(record, docs)]
    return section_report.markdown(json.loads(record.read_text()), addresses)


def make_pages(results: pathlib.Path, docs: pathlib.Path, navigation: pathlib.Path) -> None:
    """Writes the page and the pictures of each record, and lists the page.

    Args:
        results: The folder with one folder for each card.
        docs: The folder of the pages.
        navigation: `mkdocs.yml`.
    """
    from .section_figure import draw_all

    for record in records(results):
        name = f"sections-{record.parent.name}"
        (docs / "images").mkdir(exist_ok=True)
        draw_all(json.loads(record.read_text()), docs / "images" / f"{name}.png")
        (docs / f"{name}.md").write_text(page_text(record, docs))
        text = navigation.read_text()
        if f"{name}.md" not in text:
            line = f"      - Sections of the matrix, {record.parent.name.upper()}: {name}.md\n"
            navigation.write_text(text.replace(AFTER, AFTER + line))


def stale(results: pathlib.Path, docs: pathlib.Path, navigation: pathlib.Path) -> list[str]:
    """Names of what `make_pages` would write otherwise."""
    from .picture import digest, read_digest

    found = []
    for record in records(results):
        page = docs / f"sections-{record.parent.name}.md"
        if not page.exists() or page.read_text() != page_text(record, docs):
            found.append(page.name)
        if page.name not in navigation.read_text():
            found.append(navigation.name)
        drawn_from = digest(json.loads(record.read_text()))
        pictures = _pictures(record, docs)
        found += [picture.name for picture in pictures if not picture.exists() or read_digest(picture) != drawn_from]
    return found
