"""What all pictures of recorded runs share: colours, marks, letters, and a digest of what they were drawn from."""

import hashlib
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # after the choice of a backend that needs no display

from .table import OURS

__all__ = ["ACCENT", "BEHIND", "FAINT", "INK", "MARKS", "QUIET", "STYLE", "digest", "read_digest", "save"]

ACCENT, BEHIND, INK, QUIET, FAINT = "#0b6e4f", "#c0392b", "#22262a", "#5a6168", "#c9ced3"
MARKS = {  # column -> (marker, colour): told apart by shape too
    OURS: ("o", ACCENT),
    "naive": ("X", "#8a9198"),
    "sdpa": ("s", "#d98e04"),
    "sdpa_cudnn": ("^", "#8e5bbf"),
    "flex": ("D", "#2f7fd0"),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SOURCES = ("picture.py", "figure.py", "speed.py", "table.py")
DPI = 160


def digest(document: dict) -> str:
    """A digest of a run and of the code that draws it: another one means that the pictures have to be drawn anew."""
    here = pathlib.Path(__file__).parent
    code = [(here / name).read_text() for name in SOURCES]
    return hashlib.sha256(json.dumps([document, code], sort_keys=True).encode()).hexdigest()


def save(figure: Figure, path: pathlib.Path, document: dict) -> None:
    """Write a picture of a run, with the digest among its texts. Its ground is white, on dark pages too."""
    metadata = {"Source": digest(document), "Software": None}
    figure.savefig(path, dpi=DPI, facecolor="white", metadata=metadata, pil_kwargs={"optimize": True})


def read_digest(path: pathlib.Path) -> str | None:
    """The digest that a picture holds; None if it holds none."""
    from PIL import Image  # matplotlib needs it too

    with Image.open(path) as picture:
        return picture.info.get("Source")
