"""What all pictures of recorded runs share: colours, marks, letters, and a digest of what they were drawn from."""

import hashlib
import io
import json
import pathlib

import matplotlib

matplotlib.use("Agg")
from matplotlib.figure import Figure  # after the choice of a backend that needs no display
from PIL import Image, PngImagePlugin  # which matplotlib needs too

from .table import OURS

__all__ = ["ACCENT", "BEHIND", "FAINT", "INK", "MARKS", "QUIET", "STYLE", "digest", "read_digest", "save"]

ACCENT, BEHIND, INK, QUIET, FAINT = "#0b6e4f", "#c0392b", "#22262a", "#5a6168", "#c9ced3"
MARKS = {  # column -> (marker, colour): told apart by shape too
    OURS: ("o", ACCENT),
    "naive": ("X", "#8a9198"),
    "sdpa": ("s", "#d98e04"),
    "sdpa_cudnn": ("^", "#8e5bbf"),
    "flex": ("D", "#2f7fd0"),
    "flex_best": ("d", "#1d4f86"),
    "sdpa_flash": ("v", "#b8860b"),
    "flashinfer": ("P", "#c2477f"),
    "fa3": ("p", "#5f4bb6"),
    "xformers": ("h", "#3a9188"),
}
STYLE = {
    "font.family": "DejaVu Sans",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}
SOURCES = ("picture.py", "figure.py", "section_figure.py", "speed.py", "table.py")
DPI, COLOURS = 160, 256


def digest(document: dict) -> str:
    """A digest of a run and of the code that draws it: another one means that the pictures have to be drawn anew."""
    here = pathlib.Path(__file__).parent
    code = [(here / name).read_text() for name in SOURCES]
    return hashlib.sha256(json.dumps([document, code], sort_keys=True).encode()).hexdigest()


def save(figure: Figure, path: pathlib.Path, document: dict) -> None:
    """Write a picture of a run as PNG, with the digest among its texts. Its ground is white, on dark pages too."""
    drawn, texts = io.BytesIO(), PngImagePlugin.PngInfo()
    figure.savefig(drawn, dpi=DPI, facecolor="white")
    texts.add_text("Source", digest(document))
    few = Image.open(drawn).convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)  # a third of the bytes
    few.save(path, pnginfo=texts, optimize=True)


def read_digest(path: pathlib.Path) -> str | None:
    """The digest that a picture holds; None if it holds none."""
    with Image.open(path) as picture:
        return picture.info.get("Source")
