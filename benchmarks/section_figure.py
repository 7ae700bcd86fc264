"""The pictures of the sections: each case's time over its limit, a picture for each section, an axis for each dtype."""

import pathlib

from .figure import draw_panels
from .section_report import panels_of, sections_of
from .sections import SCALED_DOWN, SECTIONS

__all__ = ["draw_all"]

LEFT, LETTERS = 0.45, 8.5  # what the longest name takes of the width, at this size of letters


def draw_all(document: dict, path: pathlib.Path) -> list[pathlib.Path]:
    """Draw one picture per section beside `path`, in the order of the record; returns their paths."""
    written = []
    for section in sections_of(document):
        target = path.with_name(f"{path.stem}-{section}{path.suffix}")
        panels = {
            f"{dtype}, {inputs} inputs": [(r["label"].removesuffix(SCALED_DOWN), r) for r in results]
            for (inputs, dtype), results in panels_of(document, section).items()
        }
        draw_panels(document, SECTIONS[section][0], panels, target, "cases", LEFT, LETTERS)
        written.append(target)
    return written
