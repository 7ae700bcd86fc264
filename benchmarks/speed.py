"""The picture of the front page: the time of a decode step over its limit, flexdecode and its peers.

python -m benchmarks.speed benchmarks/results/h200/matrix.json docs/images/speed.png
"""

import argparse
import json
import pathlib
import sys
import textwrap
from statistics import geometric_mean

from .table import OURS, REPORTED_BY, limit_ratio, results_of

__all__ = ["MOD", "caption", "draw", "ratios"]

MOD, INPUTS, DTYPE = "none", "cold", "bfloat16"
READ = "caches read from memory"  # what cold inputs are


def ratios(document: dict) -> dict[str, list[float]]:
    """By column, fastest first: its time over the limit, for each row that it has."""
    results = results_of(document, MOD, INPUTS, DTYPE)
    found = {name: [x for r in results if (x := limit_ratio(r, name))] for name in document["columns"]}
    return dict(sorted(((n, v) for n, v in found.items() if v), key=lambda item: geometric_mean(item[1])))


def caption(document: dict) -> str:
    """What was measured, where and when, in one sentence."""
    environment, of_rows = document["environment"], len(ratios(document)[OURS])
    return (
        f"{environment['hardware'].split(',')[0]}, {document['timestamp'][:10]}, {DTYPE}, {of_rows} shapes of"
        f" {REPORTED_BY}, {READ}, torch {environment['torch'].partition('+')[0]},"
        f" Triton {environment['triton']}, commit {environment['commit']}"
    )


def draw(document: dict, path: pathlib.Path) -> None:
    """Draw each column as its rows, with their geometric mean."""
    from matplotlib import pyplot

    from .figure import limit_axis
    from .picture import FAINT, INK, MARKS, QUIET, STYLE, save

    found = ratios(document)
    with pyplot.rc_context(STYLE):
        figure, axis = pyplot.subplots(figsize=(5.4, 4.0))
        figure.subplots_adjust(left=0.275, right=0.85, top=0.74, bottom=0.19)
        for height, (name, values) in enumerate(found.items()):
            marker, colour = MARKS[name]
            mean = geometric_mean(values)
            axis.plot([min(values), max(values)], [height] * 2, color=colour, lw=2, alpha=0.25, zorder=1)
            axis.plot(values, [height] * len(values), "|", color=colour, ms=11, mew=1.3, alpha=0.55, zorder=2)
            axis.plot(mean, height, marker, color=colour, ms=11, mec="white", mew=1.0, zorder=3)
            place = {"xy": (1.02, height), "xycoords": ("axes fraction", "data"), "va": "center"}
            letters = {"color": colour, "weight": "bold"} if name == OURS else {"color": INK}
            axis.annotate(f"{mean:.2f}×", fontsize=12, **letters, **place)
        labels = axis.set_yticks(range(len(found)), [document["columns"][name] for name in found], fontsize=11)
        for label, name in zip(labels, found, strict=True):
            label.label1.set_fontweight("bold" if name == OURS else "normal")
        axis.set_ylim(len(found) - 0.4, -0.6)
        limit_axis(axis, [value for values in found.values() for value in values], has_limit=True)
        axis.tick_params(axis="both", length=0)
        axis.tick_params(axis="x", labelsize=10.5)
        axis.grid(axis="x", color=FAINT, lw=0.6)
        axis.set_axisbelow(True)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.axvline(1.0, color=INK, lw=1.8, zorder=0.9)
        figure.text(0.02, 0.075, "time / limit; the limit is reading the keys and values once", fontsize=10)
        figure.text(0.02, 0.02, "lines: the shapes; marks and numbers: geometric means", fontsize=9, color=QUIET)
        figure.text(0.02, 0.95, "Time of a decode step over its limit", fontsize=14, weight="bold", va="center")
        lines = textwrap.fill(caption(document), 66, break_on_hyphens=False)
        figure.text(0.02, 0.9, lines, fontsize=9, color=QUIET, va="top", linespacing=1.4)
        save(figure, path, document)
        pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    """Draw the picture of a recorded run."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, help="a matrix.json")
    parser.add_argument("png", type=pathlib.Path, help="write the picture here")
    options = parser.parse_args(arguments)
    draw(json.loads(options.results.read_text()), options.png)
    return 0


if __name__ == "__main__":
    sys.exit(main())
