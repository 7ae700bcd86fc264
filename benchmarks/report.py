"""The Markdown page, the CSV records and the summary of a run, made from its `matrix.json`.

python -m benchmarks.report matrix.json --markdown performance.md --png performance.png
"""

import argparse
import datetime
import itertools
import json
import os
import pathlib
import sys
from statistics import geometric_mean

from .table import (
    OURS,
    SEED_COLUMNS,
    SEED_NOTE,
    bandwidth_tbps,
    empty_cells_text,
    floor_ratio,
    group_empty_cells,
    groups,
    median,
    render_tables,
)

__all__ = ["flat_records", "markdown", "summary", "summary_text"]

FAR_FROM_FLOOR = 1.25
BENCHMARK = "https://github.com/facebookresearch/xformers/blob/main/xformers/benchmarks/benchmark_attn_decoding.py"


def flat_records(document: dict) -> list[dict]:
    """One record for each result, as in `matrix.csv`; times in microseconds, None for an empty cell."""
    shape = ("B", "Mq", "Mkv", "Hq", "Hkv", "K", "dtype")
    return [
        {
            "label": result["label"],
            **{name: result["row"][name] for name in shape},
            "mod": result["mod"],
            "inputs": result["inputs"],
            **{f"{name}_us": _rounded(median(result["times_us"].get(name)), 3) for name in document["columns"]},
            "floor_us": _rounded(result["floor_us"], 3),
            "flexdecode_tbps": _rounded(bandwidth_tbps(result), 4),
            "flexdecode_over_floor": _rounded(floor_ratio(result), 4),
            **{f"seed_{name}": result["row"][name] for name in SEED_COLUMNS},
        }
        for result in document["results"]
    ]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def summary(document: dict) -> list[dict]:
    """Geometric means for each mod, kind of input and dtype, in order of appearance.

    Returns:
        Records with `mod`, `inputs`, `dtype`, `rows`, `over_floor` (None without a floor) and `peers`, which maps a
        column to (geometric mean of its time over flexdecode's, rows where flexdecode is faster, rows compared).
    """
    records = []
    dtypes = dict.fromkeys(result["row"]["dtype"] for result in document["results"])
    for (mod, inputs), dtype in itertools.product(groups(document), dtypes):
        key = (mod, inputs, dtype)
        results = [r for r in document["results"] if (r["mod"], r["inputs"], r["row"]["dtype"]) == key]
        ratios = [ratio for r in results if (ratio := floor_ratio(r))]
        peers = {}
        for column in (name for name in document["columns"] if name != OURS):
            gains = [gain for r in results if (gain := _gain(r, column))]
            if gains:
                peers[column] = (geometric_mean(gains), sum(gain > 1 for gain in gains), len(gains))
        over_floor = geometric_mean(ratios) if ratios else None
        records.append(
            {
                "mod": mod,
                "inputs": inputs,
                "dtype": dtype,
                "rows": len(results),
                "over_floor": over_floor,
                "peers": peers,
            }
        )
    return records


def _gain(result: dict, column: str) -> float | None:
    """A peer's time over flexdecode's; None where either is missing."""
    ours, theirs = median(result["times_us"].get(OURS)), median(result["times_us"].get(column))
    return theirs / ours if ours and theirs else None


def summary_text(document: dict) -> str:
    """The geometric means, for the terminal."""
    lines = ["Geometric means over the rows (peers: their time over flexdecode's, and where flexdecode is faster):"]
    for record in summary(document):
        parts = [f"{record['over_floor']:.2f}x of the practical floor"] if record["over_floor"] else []
        for column, (gain, ahead, compared) in record["peers"].items():
            parts.append(f"{document['columns'][column]} {gain:.2f}x ({ahead}/{compared})")
        lines.append(
            f"  {record['mod']}, {record['inputs']}, {record['dtype']}: {', '.join(parts) or 'nothing to compare'}"
        )
    return "\n".join(lines)


def speed_line(document: dict) -> str:
    """One sentence for the README: how much faster than others, on what, and when."""
    environment = document["environment"]
    name = environment["hardware"].split(",")[0].removeprefix("NVIDIA ")
    torch, triton = (environment[key].split("+")[0] for key in ("torch", "triton"))
    day = datetime.datetime.fromisoformat(document["timestamp"]).strftime("%d %B %Y").lstrip("0")
    found = next(r for r in summary(document) if (r["mod"], r["inputs"], r["dtype"]) == ("none", "cold", "bfloat16"))
    gains = {column: gain for column, (gain, _, _) in found["peers"].items()}
    fastest = all(ahead == compared for _, ahead, compared in found["peers"].values())
    fastest = ", and the fastest in every shape" if fastest else ""
    return (
        f"Measured on one {name} ({day}, torch {torch}, Triton {triton}), bfloat16, caches read from memory, "
        f"geometric means over {found['rows']} shapes of [xformers' flash-decoding benchmark]({BENCHMARK}): "
        f"{gains['sdpa']:.2f} times as fast as SDPA, {gains['flex']:.2f} times as fast as FlexAttention{fastest}."
    )


def markdown(document: dict, pictures: list[str]) -> str:
    """The page: what was measured, the means, what falls short, the tables.

    Args:
        document: What `matrix.json` holds.
        pictures: Addresses of the pictures, relative to the page.
    """
    hardware = document["environment"]["hardware"].split(",")[0]
    parts = [f"# Performance matrix: {hardware}", *(f"![Time of each row]({picture})" for picture in pictures)]
    parts += ["## Summary", _summary_table(document), "## What falls short", _shortcomings(document)]
    parts += ["## What was measured", _measured(document)]
    for mod, inputs in groups(document):
        parts.append(f"## Mods: {mod}, {inputs} inputs")
        results = [r for r in document["results"] if (r["mod"], r["inputs"]) == (mod, inputs)]
        for dtype in dict.fromkeys(r["row"]["dtype"] for r in results):
            parts += [f"### {dtype}", _result_table([r for r in results if r["row"]["dtype"] == dtype], document)]
    parts += ["## Empty cells", _empty_cells(document)]
    return "\n\n".join(parts) + "\n"


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---", *["---:"] * (len(header) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _summary_table(document: dict) -> str:
    peers = [name for name in document["columns"] if name != OURS]
    header = [
        "mods, inputs, dtype",
        "rows",
        "flexdecode / floor",
        *(f"{document['columns'][p]} / flexdecode" for p in peers),
    ]
    rows = []
    for record in summary(document):
        cells = [f"{record['mod']}, {record['inputs']}, {record['dtype']}", str(record["rows"])]
        cells.append(f"{record['over_floor']:.2f}" if record["over_floor"] else "–")
        for peer in peers:
            gain, ahead, compared = record["peers"].get(peer, (None, 0, 0))
            cells.append(f"{gain:.2f} ({ahead}/{compared})" if gain else "–")
        rows.append(cells)
    note = "Geometric means over the rows; in brackets, on how many of the rows compared flexdecode is the faster one."
    return f"{note}\n\n{_table(header, rows)}"


def _shortcomings(document: dict) -> str:
    """Rows where a peer is faster, rows far from the floor, and cells that are missing."""
    if document["device"] != "cuda":
        return "This run was made on a CPU, at small sizes: its times say that the library works, and nothing else."
    lines = []
    for mod, inputs in groups(document):
        results = [r for r in document["results"] if (r["mod"], r["inputs"]) == (mod, inputs)]
        for peer in (name for name in document["columns"] if name != OURS):
            behind = [(gain, r) for r in results if (gain := _gain(r, peer)) and gain < 1]
            if behind:
                named = "; ".join(
                    f"{_short_name(r)} ({gain:.2f})" for gain, r in sorted(behind, key=lambda pair: pair[0])
                )
                title = document["columns"][peer]
                lines.append(
                    f"- {mod}, {inputs}: {title} is faster on {len(behind)} rows (its time over ours): {named}."
                )
        far = [(ratio, r) for r in results if (ratio := floor_ratio(r)) and ratio > FAR_FROM_FLOOR]
        if far:
            named = "; ".join(
                f"{_short_name(r)} ({ratio:.2f})" for ratio, r in sorted(far, key=lambda pair: -pair[0])[:5]
            )
            lines.append(
                f"- {mod}, {inputs}: {len(far)} rows take over {FAR_FROM_FLOOR} times the floor, most of all {named}."
            )
    missing = sum(cell["column"] == OURS for cell in document["empty_cells"])
    lines += [f"- flexdecode has {missing} empty cells; see the end of the page."] if missing else []
    return "\n".join(lines) or f"Nothing: the fastest column on every row, and within {FAR_FROM_FLOOR} times the floor."


def _short_name(result: dict) -> str:
    row = result["row"]
    return f"{row['B']} x {row['Mkv']} Hkv={row['Hkv']} {row['dtype']}"


def _measured(document: dict) -> str:
    lines = [f"- {name}: {value}" for name, value in document["environment"].items()]
    flags = {name: value for name, value in document["flags"].items() if value not in (None, False) and name != "out"}
    shown = ", ".join(f"{name}={','.join(v) if isinstance(v, list) else v}" for name, v in flags.items())
    lines += [
        f"- options: {shown}",
        f"- time: {document['timestamp']}, the run took {document.get('seconds', 0):.0f} s",
    ]
    return "\n".join([*lines, "", document["protocol"]])


def _result_table(results: list[dict], document: dict) -> str:
    peers = {name: title for name, title in document["columns"].items() if name != OURS}
    seeds = {name: title for name, title in SEED_COLUMNS.items() if any(r["row"][name] for r in results)}
    header = ["B x Mkv, Hq/Hkv, K", "flexdecode", "TB/s", "x floor", "floor", *peers.values(), *seeds.values()]
    header = [name.replace("*", r"\*") for name in header]
    rows = []
    for result in results:
        row, times = result["row"], {name: median(result["times_us"].get(name)) for name in document["columns"]}
        fastest = min((time for time in times.values() if time), default=None)
        cells = [f"{row['B']} x {row['Mkv']}, {row['Hq']}/{row['Hkv']}, {row['K']}", _time(times.get(OURS), fastest)]
        cells += [_number(bandwidth_tbps(result), 2), _number(floor_ratio(result), 2), _number(result["floor_us"], 1)]
        cells += [_time(times[name], fastest) for name in peers] + [_number(row[name], 1) for name in seeds]
        rows.append(cells)
    note = "Microseconds per call; the fastest column in bold."
    return f"{note}{' ' + SEED_NOTE.replace('*', chr(92) + '*', 1) if seeds else ''}\n\n{_table(header, rows)}"


def _number(value: float | None, digits: int) -> str:
    return "–" if value is None else f"{value:.{digits}f}"


def _time(value: float | None, fastest: float | None) -> str:
    return f"**{value:.1f}**" if value is not None and value == fastest else _number(value, 1)


def _empty_cells(document: dict) -> str:
    lines = [f"- {note}" for note in document["notes"]]
    for title, reason, rows in group_empty_cells(document):
        where = "; ".join(f"`{row}`" for row in rows[:3]) + (f" and {len(rows) - 3} more" if len(rows) > 3 else "")
        lines.append(f"- {title}, {len(rows)} cell{'s' * (len(rows) > 1)}: {reason}. {where}")
    return "\n".join(lines) or "None."


def main(arguments: list[str] | None = None) -> int:
    """Write the page and the pictures of a recorded run, or print its tables."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.report", description=__doc__.split("\n")[0])
    parser.add_argument("results", type=pathlib.Path, help="a matrix.json")
    parser.add_argument("--markdown", type=pathlib.Path, help="write the page here")
    parser.add_argument("--png", type=pathlib.Path, help="write the picture here (more mods: beside it)")
    options = parser.parse_args(arguments)
    document = json.loads(options.results.read_text())
    pictures: list[pathlib.Path] = []
    if options.png:
        from .figure import draw_all

        pictures = draw_all(document, options.png)
    if options.markdown:
        addresses = [os.path.relpath(picture, options.markdown.parent) for picture in pictures]
        options.markdown.write_text(markdown(document, addresses))
    if not options.png and not options.markdown:
        print(render_tables(document), empty_cells_text(document), summary_text(document), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
