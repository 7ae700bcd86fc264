"""The pictures of the sections: each case's time over its limit, a picture for each section, an axis for each dtype."""

import pathlib
import textwrap

from .figure import draw_panels
from .section_report import panels_of, sections_of
from .sections import SECTIONS

__all__ = ["draw_all"]

LETTERS = 26  # of a name in a line
LEFT = 0.38  # of the width


def draw_all(document: dict, path: pathlib.Path) -> list[pathlib.Path]:
    """Draw one picture per section beside `path`, in the order of the record; returns their paths."""
    written = []
    for section in sections_of(document):
        target = path.with_name(f"{path.stem}-{section}{path.suffix}")
        panels = {
            f"{dtype}, {inputs} inputs": [(textwrap.fill(r["label"], LETTERS), r) for r in results]
            for (inputs, dtype), results in panels_of(document, section).items()
        }
        draw_panels(document, SECTIONS[section][0], panels, target, "cases", LEFT)
        written.append(target)
    return written
