"""The Markdown page, the CSV records and the summary of a run, made from its `matrix.json`.

python -m benchmarks.report matrix.json --markdown performance.md --png performance.png
"""

import argparse
import datetime
import json
import os
import pathlib
import sys
from statistics import geometric_mean

from .pages import empty_cells, listed, measured, number, time
from .pages import table as markdown_table
from .table import (
    FAR_FROM_LIMIT,
    ON_A_CPU,
    OURS,
    REPORTED,
    REPORTED_BY,
    REPORTED_NOTE,
    Subject,
    bandwidth_tbps,
    empty_cells_text,
    gain_of,
    gain_of_fastest,
    groups,
    limit_ratio,
    means,
    median,
    render_tables,
    results_of,
    subjects,
)

__all__ = ["flat_records", "markdown", "summary", "summary_text"]

XFORMERS = "https://github.com/facebookresearch/xformers/blob/main/xformers/benchmarks/benchmark_attn_decoding.py"


def flat_records(document: dict) -> list[dict]:
    """One record for each result, as in `matrix.csv`; times in microseconds, None for an empty cell."""
    shape = ("B", "Mq", "Mkv", "Hq", "Hkv", "K", "dtype")
    return [
        {
            **({"section": result["section"]} if "section" in result else {}),
            "label": result["label"],
            **{name: result["row"][name] for name in shape},
            "mod": result["mod"],
            "inputs": result["inputs"],
            **{f"{name}_us": _rounded(median(result["times_us"].get(name)), 3) for name in document["columns"]},
            "limit_us": _rounded(result["floor_us"], 3),
            "flexdecode_tbps": _rounded(bandwidth_tbps(result), 4),
            "flexdecode_over_limit": _rounded(limit_ratio(result), 4),
            **{f"xformers_{name}": result["row"][name] for name in REPORTED},
        }
        for result in document["results"]
    ]


def _rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def summary(document: dict) -> list[dict]:
    """Geometric means for each mod, kind of input and dtype, in order of appearance.

    Returns:
        Records with `mod`, `inputs`, `dtype`, `rows`, `over_limit` (None without a limit) and `peers`, which maps a
        column to (geometric mean of its time over flexdecode's, rows where flexdecode is faster, rows compared).
    """
    records = []
    for mod, inputs, dtype in subjects(document):
        results = results_of(document, mod, inputs, dtype)
        ratios = [ratio for r in results if (ratio := limit_ratio(r))]
        peers = {}
        for column in (name for name in document["columns"] if name != OURS):
            gains = [gain for r in results if (gain := gain_of(r, column))]
            if gains:
                peers[column] = (geometric_mean(gains), sum(gain > 1 for gain in gains), len(gains))
        over_limit = geometric_mean(ratios) if ratios else None
        records.append(
            {
                "mod": mod,
                "inputs": inputs,
                "dtype": dtype,
                "rows": len(results),
                "over_limit": over_limit,
                "peers": peers,
            }
        )
    return records


def summary_text(document: dict) -> str:
    """The geometric means, for the terminal."""
    lines = ["Geometric means over the rows (peers: their time over flexdecode's, and where flexdecode is faster):"]
    for record in summary(document):
        parts = [f"{record['over_limit']:.2f}x of the limit"] if record["over_limit"] else []
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
        f"geometric means over {found['rows']} shapes of [xformers' flash-decoding benchmark]({XFORMERS}): "
        f"{gains['sdpa']:.2f} times as fast as SDPA, {gains['flex']:.2f} times as fast as FlexAttention{fastest}."
    )


def markdown(document: dict, pictures: list[str]) -> str:
    """The page: what was found, the pictures, the means, what falls short, what was measured, the tables.

    Args:
        document: What `matrix.json` holds.
        pictures: Addresses of the pictures, relative to the page, in the order of `subjects`; none if there are none.
    """
    hardware = document["environment"]["hardware"].split(",")[0]
    links = {s: _picture(document, s, p) for s, p in zip(subjects(document), pictures, strict=False)}
    first, *_ = groups(document) or [None]
    parts = [f"# Performance matrix: {hardware}", _found(document), _pictures(links, first)]
    parts += ["## Summary", _summary_table(document), "## What falls short", _shortcomings(document)]
    parts += ["## What was measured", _measured(document)]
    for group in groups(document):
        mod, inputs = group
        parts += [f"## Mods: {mod}, {inputs} inputs", "" if group == first else _pictures(links, group)]
        for subject in (s for s in subjects(document) if s[:2] == group):
            parts += [f"### {subject[2]}", _result_table(results_of(document, *subject), document)]
    parts += ["## Empty cells", empty_cells(document)]
    return "\n\n".join(part for part in parts if part) + "\n"


def _found(document: dict) -> str:
    """Three sentences that say what was found with the inputs of the first group; two if there is no peer."""
    (mod, inputs), *_ = groups(document) or [(None, None)]
    results = [result for result in results_of(document, mod, inputs) if limit_ratio(result)]
    if not results:
        return ON_A_CPU if document["device"] == "cpu" else ""
    by_dtype = [(d, [r for r in results if r["row"]["dtype"] == d]) for d in {r["row"]["dtype"]: None for r in results}]
    takes = [f"{geometric_mean(map(limit_ratio, of)):.2f} times its limit in {dtype}" for dtype, of in by_dtype]
    sentences = [
        f"With {inputs} inputs, a decode step takes {listed(takes)} (geometric means over {len(results)} rows).",
        "The limit is the time to read the keys and values of the row once, by the fastest plain read of as many bytes"
        " that was found on the same GPU in the same run.",
    ]
    found = [(dtype, mean) for dtype, of in by_dtype if (mean := means(of))]
    others = [f"{peer / ours:.2f} times as long in {dtype}" for dtype, (ours, peer) in found]
    gains = [gain for result in results if (gain := gain_of_fastest(result))]
    if gains:
        first = f"flexdecode is the fastest column on {sum(gain > 1 for gain in gains)} of {len(gains)} rows"
        sentences.append(f"{first}; the fastest of the others takes {listed(others)}.")
    return " ".join(sentences)


def _picture(document: dict, subject: Subject, address: str) -> str:
    """A picture that leads to itself in full size, with a text for those who do not see it."""
    mod, inputs, dtype = subject
    title = f"{dtype}, {inputs} inputs" + ("" if mod == "none" else f", {mod}")
    found, quantity = means(results_of(document, *subject)), "Time over the limit"
    if found is None:
        return f'[![Microseconds of each row: {title}]({address} "{title}")]({address})'
    told = f"flexdecode {found[0]:.2f} times, the fastest peer of each row {found[1]:.2f} times in the geometric mean"
    return f'[![{quantity} of each row, {title}: {told}]({address} "{title}")]({address})'


def _pictures(links: dict[Subject, str], group: tuple[str, str] | None) -> str:
    """The pictures of a group, in one paragraph."""
    return "\n".join(link for subject, link in links.items() if subject[:2] == group)


def _summary_table(document: dict) -> str:
    peers = [name for name in document["columns"] if name != OURS]
    header = [
        "mods, inputs, dtype",
        "rows",
        "flexdecode / limit",
        *(f"{document['columns'][p]} / flexdecode" for p in peers),
    ]
    rows = []
    for record in summary(document):
        cells = [f"{record['mod']}, {record['inputs']}, {record['dtype']}", str(record["rows"])]
        cells.append(f"{record['over_limit']:.2f}" if record["over_limit"] else "–")
        for peer in peers:
            gain, ahead, compared = record["peers"].get(peer, (None, 0, 0))
            cells.append(f"{gain:.2f} ({ahead}/{compared})" if gain else "–")
        rows.append(cells)
    note = "Geometric means over the rows; in brackets, on how many of the rows compared flexdecode is the faster one."
    return f"{note}\n\n{markdown_table(header, rows)}"


def _shortcomings(document: dict) -> str:
    """Rows where a peer is faster, rows far from the limit, and cells that are missing."""
    if document["device"] != "cuda":
        return ON_A_CPU
    lines = []
    for mod, inputs in groups(document):
        results = results_of(document, mod, inputs)
        for peer in (name for name in document["columns"] if name != OURS):
            behind = [(gain, r) for r in results if (gain := gain_of(r, peer)) and gain < 1]
            if behind:
                named = "; ".join(
                    f"{_short_name(r)} ({gain:.2f})" for gain, r in sorted(behind, key=lambda pair: pair[0])
                )
                title = document["columns"][peer]
                lines.append(
                    f"- {mod}, {inputs}: {title} is faster on {len(behind)} rows (its time over ours): {named}."
                )
        far = [(ratio, r) for r in results if (ratio := limit_ratio(r)) and ratio > FAR_FROM_LIMIT]
        if far:
            named = "; ".join(
                f"{_short_name(r)} ({ratio:.2f})" for ratio, r in sorted(far, key=lambda pair: -pair[0])[:5]
            )
            lines.append(
                f"- {mod}, {inputs}: {len(far)} rows take over {FAR_FROM_LIMIT} times the limit, most of all {named}."
            )
    missing = sum(cell["column"] == OURS for cell in document["empty_cells"])
    lines += [f"- flexdecode has {missing} empty cells; see the end of the page."] if missing else []
    return "\n".join(lines) or f"Nothing: the fastest column on every row, and within {FAR_FROM_LIMIT} times the limit."


def _short_name(result: dict) -> str:
    row = result["row"]
    return f"{row['B']} × {row['Mkv']} Hkv={row['Hkv']} {row['dtype']}"


def _measured(document: dict) -> str:
    rows = (
        f"The rows are those of [{REPORTED_BY}]({XFORMERS}). A row has B sequences of Mkv cached tokens, one query"
        " token each, Hq query heads, Hkv KV heads and head dimension K. The column limit has microseconds, and × limit"
        " the time of flexdecode over it."
    )
    return measured(document, rows)


def _result_table(results: list[dict], document: dict) -> str:
    peers = {name: title for name, title in document["columns"].items() if name != OURS}
    peers = {name: title for name, title in peers.items() if any(r["times_us"].get(name) for r in results)}
    reported = {name: title for name, title in REPORTED.items() if any(r["row"][name] for r in results)}
    header = ["B × Mkv, Hq/Hkv, K", "flexdecode", "TB/s", "× limit", "limit", *peers.values(), *reported.values()]
    header = [name.replace("*", r"\*") for name in header]
    rows = []
    for result in results:
        row, times = result["row"], {name: median(result["times_us"].get(name)) for name in document["columns"]}
        fastest = min((us for us in times.values() if us), default=None)
        cells = [
            f"{row['B']} × {row['Mkv']}, {row['Hq']}/{row['Hkv']}, {row['K']}",
            time(times.get(OURS), fastest),
        ]
        cells += [
            number(bandwidth_tbps(result), 2),
            number(limit_ratio(result), 2),
            number(result["floor_us"], 1),
        ]
        cells += [time(times[name], fastest) for name in peers] + [number(row[name], 1) for name in reported]
        rows.append(cells)
    note = "Microseconds per call; the fastest column in bold."
    if reported:
        note += " " + REPORTED_NOTE.replace("*", r"\*", 1).replace(REPORTED_BY, f"[{REPORTED_BY}]({XFORMERS})")
    return f"{note}\n\n{markdown_table(header, rows)}"


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
