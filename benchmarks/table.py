"""The matrix as text, rendered by `torch.utils.benchmark.Compare` as xformers' tables are; its results by subject."""

from statistics import geometric_mean

from torch.utils import benchmark
from torch.utils.benchmark.utils.common import TaskSpec

__all__ = [
    "bandwidth_tbps", "empty_cells_text", "fastest_peer", "gain_of", "gain_of_fastest", "group_empty_cells", "groups",
    "limit_ratio", "means", "median", "render_tables", "results_of", "subjects",
]  # fmt: skip

Subject = tuple[str, str, str]  # mod, kind of input, dtype: what one picture and one table of a page is about

OURS = "flexdecode"  # the column that is compared with the others
FAR_FROM_LIMIT = 1.25
ON_A_CPU = "This run was made on a CPU, at small sizes: its times say that the library works, and nothing else."
REPORTED = {"pytorch_us": "xformers: pytorch*", "optimized_us": "xformers: best*"}
REPORTED_BY = "xformers' flash-decoding benchmark"
REPORTED_NOTE = (
    f"* as reported for {REPORTED_BY}: other hardware, another way of timing (no best kernel was reported for float32)."
)


def render_tables(document: dict) -> str:
    """All tables of a run, one per mod and kind of input, in microseconds.

    Args:
        document: What `matrix.json` holds.
    """
    tables = []
    for mod, inputs in groups(document):
        results = results_of(document, mod, inputs)
        label = f"flexdecode performance matrix, mods={mod}, {inputs} inputs"
        measurements = [m for result in results for m in _measurements(result, document, label)]
        if measurements:
            tables.append(_append_ratios(str(benchmark.Compare(measurements)), results))
    reported = any(result["row"][name] for result in document["results"] for name in REPORTED)
    return "\n".join(tables + ([REPORTED_NOTE] if reported else []))


def short_table(document: dict) -> str:
    """The times of a run with one kind of mods and inputs, in milliseconds: a row for each shape."""
    titles = list(document["columns"].values())
    widths = [max(len(title), 9) for title in titles]
    lines = ["   ".join([f"{'shape':26}", *[f"{title:>{width}}" for title, width in zip(titles, widths, strict=True)]])]
    for result in document["results"]:
        row = result["row"]
        shape = f"{row['B']} x {row['Mkv']} keys, {row['dtype']}"
        times = [median(result["times_us"].get(name)) for name in document["columns"]]
        cells = [
            f"{'-' if x is None else f'{x / 1000:.2f} ms':>{width}}" for x, width in zip(times, widths, strict=True)
        ]
        lines.append("   ".join([f"{shape:26}", *cells]))
    return "\n".join(lines)


def groups(document: dict) -> list[tuple[str, str]]:
    """The (mod, inputs) pairs of a run, in order of first appearance."""
    return list(dict.fromkeys((result["mod"], result["inputs"]) for result in document["results"]))


def subjects(document: dict) -> list[Subject]:
    """The (mod, inputs, dtype) triples of a run: its groups in order, each with its dtypes in order."""
    return [
        (mod, inputs, dtype)
        for mod, inputs in groups(document)
        for dtype in dict.fromkeys(r["row"]["dtype"] for r in results_of(document, mod, inputs))
    ]


def results_of(document: dict, mod: str, inputs: str, dtype: str | None = None) -> list[dict]:
    """The results of a mod and a kind of input, of all dtypes or of one."""
    results = [r for r in document["results"] if (r["mod"], r["inputs"]) == (mod, inputs)]
    return [r for r in results if dtype in (None, r["row"]["dtype"])]


def means(results: list[dict]) -> tuple[float, float] | None:
    """Geometric means of time over the limit: of flexdecode, and of the fastest peer of each row.

    Only rows that have both count. None if there is no such row, as in a run without a limit.
    """
    pairs = []
    for result in results:
        peers = [ratio for name in result["times_us"] if name != OURS and (ratio := limit_ratio(result, name))]
        if peers and (ours := limit_ratio(result)):
            pairs.append((ours, min(peers)))
    return tuple(map(geometric_mean, zip(*pairs, strict=True))) if pairs else None


def _measurements(result: dict, document: dict, label: str) -> list[benchmark.Measurement]:
    cells = [(title, result["times_us"].get(name)) for name, title in document["columns"].items()]
    cells += [("limit", [result["floor_us"]] if result["floor_us"] else None)]
    reported = [(title, result["row"][name]) for name, title in REPORTED.items()]
    cells += [(title, [microseconds]) for title, microseconds in reported if microseconds]
    return [
        benchmark.Measurement(
            number_per_run=1,
            raw_times=[1e-6 * microseconds for microseconds in times],
            task_spec=TaskSpec("", "", label=label, sub_label=result["label"], description=title),
        )
        for title, times in cells
        if times
    ]


def _append_ratios(table: str, results: list[dict]) -> str:
    """Add the two columns that are no times, where a limit was measured: bandwidth, and time over the limit."""
    extra = {result["label"]: (bandwidth_tbps(result), limit_ratio(result)) for result in results if result["floor_us"]}
    lines = table.splitlines()
    width = max(map(len, lines))
    for index, line in enumerate(lines):
        name = line.split("  |  ")[0].strip()
        if index == 1 and extra:
            lines[index] = f"{line:<{width}}  |  TB/s  |  x limit"
        elif name in extra:
            bandwidth, ratio = extra[name]
            lines[index] = f"{line:<{width}}  |  {_cell(bandwidth, 4)}  |  {_cell(ratio, 7)}"
    return "\n".join(lines) + "\n"


def _cell(value: float | None, width: int) -> str:
    return " " * width if value is None else f"{value:{width}.2f}"


def median(times: list[float] | None) -> float | None:
    """Median of some timings in microseconds; None for an empty cell."""
    if not times:
        return None
    ordered = sorted(times)
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


def limit_ratio(result: dict, column: str = "flexdecode") -> float | None:
    """A column's time over the limit, which is the time to read its live K/V once; None where either is missing."""
    microseconds = median(result["times_us"].get(column))
    return microseconds / result["floor_us"] if microseconds and result["floor_us"] else None


def gain_of(result: dict, column: str) -> float | None:
    """A peer's time over flexdecode's; None where either is missing."""
    ours, theirs = median(result["times_us"].get(OURS)), median(result["times_us"].get(column))
    return theirs / ours if ours and theirs else None


def fastest_peer(result: dict) -> tuple[float, str] | None:
    """The smallest time of a peer over flexdecode's, and the peer; None where either is missing."""
    gains = [(gain, name) for name in result["times_us"] if name != OURS and (gain := gain_of(result, name))]
    return min(gains, default=None)


def gain_of_fastest(result: dict) -> float | None:
    """The time of the fastest peer over flexdecode's; None where either is missing."""
    found = fastest_peer(result)
    return found and found[0]


def bandwidth_tbps(result: dict, column: str = "flexdecode") -> float | None:
    """Live K/V, query and output bytes over a column's time, in TB/s."""
    microseconds = median(result["times_us"].get(column))
    return result["compulsory_bytes"] / microseconds / 1e6 if microseconds else None


def group_empty_cells(document: dict) -> list[tuple[str, str, list[str]]]:
    """Empty cells by cause: (column title, reason, the rows concerned)."""
    causes: dict[tuple[str, str], list[str]] = {}
    for cell in document["empty_cells"]:
        title = document["columns"].get(cell["column"], cell["column"])
        where = f"{cell['label']} ({cell['mod']}, {cell['inputs']})"
        causes.setdefault((title, cell["reason"]), []).append(where)
    return [(title, reason, rows) for (title, reason), rows in causes.items()]


def empty_cells_text(document: dict) -> str:
    """Why cells are empty, for the terminal: each reason with its first row; `matrix.json` lists all."""
    lines = []
    for title, reason, rows in group_empty_cells(document):
        lines.append(f"  {title}, {len(rows)} empty cell{'s' * (len(rows) > 1)}: {reason}")
        lines.append(f"    {rows[0]}" + (" and others" if len(rows) > 1 else ""))
    lines += [f"  {note}" for note in document["notes"]]
    return "\n".join(["Empty cells and columns left out:", *lines]) if lines else "No cell is empty."
