"""The picture of a run: each row's time over the practical floor, flexdecode against its peers."""

import pathlib
from statistics import geometric_mean

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot, ticker  # after the choice of a backend that needs no display
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from .table import OURS, groups, median

__all__ = ["draw", "draw_all"]

ACCENT, BEHIND, INK, FAINT = "#0b6e4f", "#c0392b", "#22262a", "#c9ced3"
MARKS = {  # column -> (marker, colour): told apart by shape too
    "naive": ("X", "#9aa1a8"),
    "sdpa": ("s", "#d98e04"),
    "sdpa_cudnn": ("^", "#8e5bbf"),
    "flex": ("D", "#2f7fd0"),
}


def draw_all(document: dict, path: pathlib.Path) -> list[pathlib.Path]:
    """Draw one picture per mod and kind of input; the first is `path`, the others carry their names beside it."""
    written = []
    for mod, inputs in groups(document):
        target = path if not written else path.with_name(f"{path.stem}-{mod}-{inputs}{path.suffix}")
        draw(document, mod, inputs, target)
        written.append(target)
    return written


def draw(document: dict, mod: str, inputs: str, path: pathlib.Path) -> None:
    """Draw the results of one mod and kind of input: a column of panels per dtype, a row per number of KV heads.

    The axis is time over the practical floor, or microseconds where no floor was measured (on a CPU).
    """
    results = [r for r in document["results"] if (r["mod"], r["inputs"]) == (mod, inputs)]
    dtypes = list(dict.fromkeys(r["row"]["dtype"] for r in results))
    heads = list(dict.fromkeys((r["row"]["Hq"], r["row"]["Hkv"]) for r in results))
    panels = {(h, d): [r for r in results if _key(r) == (h, d)] for h in heads for d in dtypes}
    tallest = max(len(panel) for panel in panels.values())
    height = len(heads) * (0.33 * max(tallest, 4) + 0.9) + 1.9
    width = 5.0 * len(dtypes) + 1.4 if len(dtypes) > 1 else 9.0
    style = {
        "font.family": "DejaVu Sans",
        "text.color": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    }
    shapes = [[(r["row"]["B"], r["row"]["Mkv"]) for r in panel] for panel in panels.values()]
    grid = {"sharex": True, "sharey": all(shape == shapes[0] for shape in shapes), "squeeze": False}
    with pyplot.rc_context(style):
        figure, axes = pyplot.subplots(len(heads), len(dtypes), figsize=(width, height), layout="constrained", **grid)
        for (head, dtype), panel in panels.items():
            title = f"{dtype}, {head[0]} query heads, {head[1]} KV head{'s' * (head[1] > 1)}"
            _panel(axes[heads.index(head)][dtypes.index(dtype)], panel, document, title)
        _share_limits(axes, results, document)
        for axis in axes[-1]:
            axis.set_xlabel("time / practical floor" if _has_floor(results) else "microseconds")
        _titles(figure, document, mod, inputs, height)
        figure.savefig(path, dpi=130, facecolor="white")
        pyplot.close(figure)


def _key(result: dict) -> tuple[tuple[int, int], str]:
    return (result["row"]["Hq"], result["row"]["Hkv"]), result["row"]["dtype"]


def _has_floor(results: list[dict]) -> bool:
    return any(result["floor_us"] for result in results)


def _value(result: dict, column: str) -> float | None:
    """Position of a column on the axis: its time over the floor, or its time."""
    microseconds = median(result["times_us"].get(column))
    return microseconds / (result["floor_us"] or 1.0) if microseconds else None


def _panel(axis: Axes, results: list[dict], document: dict, title: str) -> None:
    axis.set_visible(bool(results))
    peers = [name for name in document["columns"] if name != OURS]
    for height, result in enumerate(results):
        ours = _value(result, OURS)
        others = {name: value for name in peers if (value := _value(result, name))}
        behind = bool(ours and others and min(others.values()) < ours)
        if ours and others:
            ends, colour = [ours, min(others.values())], BEHIND if behind else ACCENT
            axis.plot(ends, [height, height], color=colour, lw=5, alpha=0.3, zorder=1)
        for name, value in others.items():
            marker, colour = MARKS[name]
            axis.plot(value, height, marker, color=colour, ms=6.5, mec="white", mew=0.7, zorder=2)
        if ours:
            axis.plot(ours, height, "o", color=ACCENT, ms=9, mec="white", mew=1.0, zorder=1.9 if behind else 3)
        text, colour = f"{median(result['times_us'][OURS]):.1f} µs" if ours else "–", BEHIND if behind else ACCENT
        place = {"xy": (1.02, height), "xycoords": ("axes fraction", "data"), "va": "center"}
        axis.annotate(text, fontsize=9, color=colour, weight="bold", **place)
    axis.set_yticks(range(len(results)), [f"B={r['row']['B']}  Mkv={r['row']['Mkv']}" for r in results], fontsize=9)
    axis.set_ylim(len(results) - 0.4, -0.6)
    axis.set_title(f"{title}{_panel_means(results, peers)}", fontsize=10.5, loc="left")
    axis.tick_params(length=0)
    axis.grid(axis="x", which="major", color=FAINT, lw=0.6)
    axis.set_axisbelow(True)
    axis.spines[["top", "right", "left"]].set_visible(False)


def _panel_means(results: list[dict], peers: list[str]) -> str:
    """Geometric means of flexdecode and of the best peer, over the rows that have both; empty without a floor."""
    if not _has_floor(results):
        return ""
    pairs = [(_value(r, OURS), [value for name in peers if (value := _value(r, name))]) for r in results]
    pairs = [(ours, min(others)) for ours, others in pairs if ours and others]
    if not pairs:
        return ""
    ours, best = (geometric_mean([pair[index] for pair in pairs]) for index in (0, 1))
    return f"\nmean {ours:.2f}x of the floor; best peer per row {best:.2f}x"


def _share_limits(axes, results: list[dict], document: dict) -> None:
    """One log axis for all panels, with the floor as its left edge."""
    values = [value for r in results for name in document["columns"] if (value := _value(r, name))]
    floor = _has_floor(results)
    low, high = (min([0.94, *[0.94 * v for v in values]]) if floor else 0.8 * min(values)), 1.1 * max(values)
    for axis in axes.flat:
        axis.set_xscale("log")
        axis.set_xlim(low, high)
        if floor:
            axis.axvline(1.0, color=INK, lw=1.4, zorder=0)
            ticks = [t for t in (1, 1.2, 1.5, 2, 3, 4, 6, 8, 12, 16, 24, 32, 64, 128) if t <= high]
            axis.xaxis.set_major_locator(ticker.FixedLocator(ticks))
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}x"))
        else:
            axis.xaxis.set_major_formatter(ticker.FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(ticker.NullFormatter())
        axis.xaxis.set_minor_locator(ticker.NullLocator())


def _titles(figure, document: dict, mod: str, inputs: str, height: float) -> None:
    environment = document["environment"]
    versions = f"torch {environment['torch']}, Triton {environment['triton']}, commit {environment['commit']}"
    if document["device"] == "cuda":
        title = "One decode step, against the time to merely read its live K/V once"
    else:
        title = "One decode step on a CPU, at small sizes: shows that it works, not how fast it is"
    subtitle = f"mods: {mod}; {inputs} inputs; {environment['hardware']}; {versions}"
    handles = [
        Line2D(
            [],
            [],
            marker="o",
            color="none",
            mfc=ACCENT,
            mec="white",
            ms=11,
            label="flexdecode (time at the right; red: a peer is faster)",
        )
    ]
    for name, title_of_column in document["columns"].items():
        if name in MARKS:
            marker, colour = MARKS[name]
            handles.append(
                Line2D([], [], marker=marker, color="none", mfc=colour, mec="white", ms=8, label=title_of_column)
            )
    if document["device"] == "cuda":
        handles.append(Line2D([], [], color=INK, lw=1.4, label="practical floor"))
    figure.get_layout_engine().set(rect=(0, 0, 1, 1 - 0.8 / height))  # room for the two lines of text above
    figure.text(0.01, 1 - 0.3 / height, title, fontsize=15, weight="bold", va="center")
    figure.text(0.01, 1 - 0.62 / height, subtitle, fontsize=9.5, color="#5a6168", va="center")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=10)
