"""The pictures of a run: each row's time over its limit, flexdecode against its peers, one picture per dtype.

A picture is narrow and its letters are large, so that it can be read on a phone.
"""

import pathlib
import textwrap

from matplotlib import pyplot, ticker
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .picture import ACCENT, BEHIND, FAINT, INK, MARKS, QUIET, STYLE, save
from .table import OURS, Subject, limit_ratio, means, median, results_of, subjects

__all__ = ["draw", "draw_all", "draw_panels", "limit_axis"]

WIDTH, ROW = 5.4, 0.25  # inches
IN_LINE = 3  # entries of a legend
TICKS = (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128)
CLOSEST = 0.06  # of the axis, between two ticks


def draw_all(document: dict, path: pathlib.Path) -> list[pathlib.Path]:
    """Draw one picture per mod, kind of input and dtype; the first is `path`, the others lie beside it, with names."""
    written = []
    for subject in subjects(document):
        name = "-".join((path.stem, *subject))
        target = path.with_name(f"{name}{path.suffix}") if written else path
        draw(document, subject, target)
        written.append(target)
    return written


def draw(document: dict, subject: Subject, path: pathlib.Path) -> None:
    """Draw the results of one mod, kind of input and dtype: a panel for each number of KV heads.

    The axis is time over the limit, or microseconds where no limit was measured (on a CPU).
    """
    results = results_of(document, *subject)
    heads = list(dict.fromkeys((r["row"]["Hq"], r["row"]["Hkv"]) for r in results))
    panels = {}
    for head in heads:
        of_head = [r for r in results if (r["row"]["Hq"], r["row"]["Hkv"]) == head]
        title = f"{head[0]} query heads, {head[1]} KV head{'s' * (head[1] > 1)}{_panel_means(of_head)}"
        panels[title] = [(f"{r['row']['B']} × {r['row']['Mkv']}", r) for r in of_head]
    mod, inputs, dtype = subject
    title = f"{dtype}, {inputs} inputs" + ("" if mod == "none" else f", {mod}")
    draw_panels(document, title, panels, path, "sequences\n× tokens")


def draw_panels(
    document: dict,
    title: str,
    panels: dict[str, list[tuple[str, dict]]],
    path: pathlib.Path,
    names: str,
    left: float = 0.25,
    letters: float = 9.5,
) -> None:
    """Draw panels of results below one another, on one axis.

    Args:
        document: What the results are of.
        title: Of the picture.
        panels: Title to the results of a panel, each with its name.
        path: Where to write the picture.
        names: What the names are.
        left: Share of the width that they take.
        letters: Their size in points.
    """
    results = [result for panel in panels.values() for _, result in panel]
    ratios = [ROW * max(len(panel), 4) for panel in panels.values()]
    handles = _handles(document, results)
    above, below = 0.95, 1.25 + 0.2 * max(0, -(-len(handles) // IN_LINE) - 2)
    height = above + 0.4 + sum(ratios) + 0.7 * (len(panels) - 1) + below
    with pyplot.rc_context(STYLE):
        figure, axes = pyplot.subplots(
            len(panels), 1, figsize=(WIDTH, height), sharex=True, squeeze=False,
            gridspec_kw={"height_ratios": ratios, "hspace": 0.7 / (sum(ratios) / len(panels))},
        )  # fmt: skip
        figure.subplots_adjust(left=left, right=0.85, top=1 - (above + 0.4) / height, bottom=below / height)
        for axis, (name, panel) in zip(axes[:, 0], panels.items(), strict=True):
            _panel(axis, panel, document, name, letters)
        values = [value for r in results for name in document["columns"] if (value := _value(r, name))]
        limit_axis(axes[-1, 0], values, _has_limit(results))
        _texts(figure, document, title, height)
        _foot(figure, document, names, handles, (below - 0.42) / height)
        save(figure, path, document)
        pyplot.close(figure)


def _has_limit(results: list[dict]) -> bool:
    return any(result["floor_us"] for result in results)


def _value(result: dict, column: str) -> float | None:
    """Position of a column on the axis: its time over the limit, or its time."""
    return limit_ratio(result, column) if result["floor_us"] else median(result["times_us"].get(column))


def _panel(axis: Axes, panel: list[tuple[str, dict]], document: dict, title: str, letters: float) -> None:
    peers = [name for name in document["columns"] if name != OURS]
    results = [result for _, result in panel]
    for height, result in enumerate(results):
        ours = _value(result, OURS)
        others = {name: value for name in peers if (value := _value(result, name))}
        behind = bool(ours and others and min(others.values()) < ours)
        colour = BEHIND if behind else ACCENT
        if ours and others:
            axis.plot([ours, min(others.values())], [height, height], color=colour, lw=4, alpha=0.3, zorder=1)
        for name, value in others.items():
            marker, of_peer = MARKS[name]
            axis.plot(value, height, marker, color=of_peer, ms=6, mec="white", mew=0.6, zorder=2)
        if ours:
            axis.plot(ours, height, "o", color=ACCENT, ms=8, mec="white", mew=0.8, zorder=1.9 if behind else 3)
        microseconds = median(result["times_us"].get(OURS))
        text = f"{microseconds:.{0 if microseconds >= 1000 else 1}f} µs" if microseconds else "–"
        place = {"xy": (1.03, height), "xycoords": ("axes fraction", "data"), "va": "center"}
        axis.annotate(text, fontsize=9.5, color=colour, weight="bold", **place)
    axis.set_yticks(range(len(results)), [name for name, _ in panel], fontsize=letters)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.set_title(title, fontsize=10, loc="left", linespacing=1.3)
    axis.tick_params(length=0)
    axis.grid(axis="x", which="major", color=FAINT, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)
    if _has_limit(results):
        axis.axvline(1.0, color=INK, lw=1.6, zorder=0.9)


def _panel_means(results: list[dict]) -> str:
    """Means of flexdecode and of the fastest peer of each row; empty where there is none."""
    found = means(results)
    return f"\nmean {found[0]:.2f}×, fastest peer of each row {found[1]:.2f}×" if found else ""


def limit_axis(axis: Axes, values: list[float], has_limit: bool) -> None:
    """A log axis from the limit to the largest value, with ticks that do not touch."""
    high = 1.1 * max(values)
    low = min([0.96, *(0.96 * value for value in values)]) if has_limit else 0.8 * min(values)
    axis.set_xscale("log")
    axis.set_xlim(low, high)
    unit = "×" if has_limit else ""
    shown = ticker.FixedLocator(_apart([t for t in TICKS if t <= high], high / low))
    axis.xaxis.set_major_locator(shown if has_limit else ticker.LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}{unit}"))
    axis.xaxis.set_minor_formatter(ticker.NullFormatter())
    axis.xaxis.set_minor_locator(ticker.NullLocator())
    axis.tick_params(axis="x", labelsize=9.5, length=0)


def _apart(ticks: list[float], span: float) -> list[float]:
    """The ticks whose labels have room on a log axis over `span`."""
    kept: list[float] = []
    for tick in ticks:
        if not kept or (tick / kept[-1]) > span ** (1.5 * CLOSEST):
            kept.append(tick)
    return kept


def _texts(figure: pyplot.Figure, document: dict, title: str, height: float) -> None:
    """Title and conditions above."""
    environment, on_gpu = document["environment"], document["device"] == "cuda"
    conditions = [
        *textwrap.wrap(f"{environment['hardware']}, {document['timestamp'][:10]}", 62)[:1],
        f"torch {environment['torch']}, Triton {environment['triton']}, commit {environment['commit']}",
    ]
    if not on_gpu:
        conditions[1] = "a CPU, at small sizes: shows that it works, not how fast it is"
    figure.text(0.03, 1 - 0.28 / height, title, fontsize=14, weight="bold", va="center")
    figure.text(0.03, 1 - 0.48 / height, "\n".join(conditions), fontsize=8.5, color=QUIET, va="top", linespacing=1.4)


def _foot(figure: pyplot.Figure, document: dict, names: str, handles: list[Line2D], height: float) -> None:
    """Names of the axes and legend below."""
    axis_name = "time / limit (the keys and values read once)" if document["device"] == "cuda" else "microseconds"
    figure.text(0.55, height, axis_name, fontsize=10, ha="center", va="center")
    figure.text(0.03, height, names, fontsize=9, color=QUIET, va="center")
    figure.legend(
        handles=handles, loc="lower center", ncols=IN_LINE, frameon=False, fontsize=9.5, columnspacing=1.4,
        handletextpad=0.4,
    )  # fmt: skip


def _handles(document: dict, results: list[dict]) -> list[Line2D]:
    """The entries of the legend: columns that were drawn, and the limit."""
    drawn = {name for result in results for name in result["times_us"]}
    handles = [_handle(name, label) for name, label in document["columns"].items() if name in drawn]
    return handles + ([Line2D([], [], color=INK, lw=1.6, label="limit")] if document["device"] == "cuda" else [])


def _handle(name: str, label: str) -> Line2D:
    marker, colour = MARKS[name]
    text = f"{label} (and its time)" if name == OURS else label
    return Line2D([], [], marker=marker, color="none", mfc=colour, mec="white", ms=8, label=text)
