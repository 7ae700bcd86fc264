"""The performance matrix: flexdecode and its peers on the 60 rows of xformers' flash-decoding benchmark.

    python -m benchmarks.performance_matrix
    python -m benchmarks.performance_matrix --mods none,alibi --inputs both --dtypes float16 --out results

Writes matrix.csv, matrix.json, matrix.md and matrix.png.
"""

import argparse
import csv
import dataclasses
import datetime
import gc
import importlib.util
import json
import pathlib
import sys
import time
import warnings

import torch

from . import report, table
from .columns import COLUMNS
from .environment import describe_environment
from .measure import EmptyCell, Result, measure_row
from .mod_cases import MODS
from .progress import progress_bar
from .rows import Row, load_rows, select_rows, shrink
from .table import OURS
from .timing import CPU_PROTOCOL, GPU_PROTOCOL

DTYPES = ("float16", "bfloat16", "float32")
SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix; returns 1 if a flexdecode cell is empty (it failed, or was wrong), else 0."""
    options = parse(arguments)
    document = run(options)
    print("\n" + table.render_tables(document))
    print(table.empty_cells_text(document))
    print("\n" + report.summary_text(document))
    written = ", ".join(sorted(path.name for path in options.out.glob("matrix*")))
    print(f"\n{document['protocol']}\n\nIn {options.out}: {written}")
    return int(has_failed(document))


def run(options: argparse.Namespace) -> dict:
    """Runs what `parse` gives, and writes the records, the page and the picture. Returns what `matrix.json` holds."""
    device = torch.device(options.device)
    try:
        rows = select_rows(load_rows(), options.rows, options.dtypes)
    except ValueError as error:
        sys.exit(f"performance_matrix: {error}")
    if options.sizes == "small":
        rows = [shrink(row) for row in rows]
    if device.type == "cpu":
        torch.set_num_threads(1)  # steadier figures, and no idle threads that spin beside other work
    options.out.mkdir(parents=True, exist_ok=True)
    document = _new_document(options, device)
    print(f"{len(rows)} rows on {document['environment']['hardware']}: {', '.join(document['columns'].values())}\n")
    _run(rows, options, device, document)
    _write_reports(document, options.out, not options.no_picture)
    return document


def has_failed(document: dict) -> bool:
    """Whether flexdecode failed in a row, or was wrong."""
    return any(cell["column"] == OURS for cell in document["empty_cells"])


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The command line, with its defaults for this machine."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.performance_matrix", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("--mods", type=_names(MODS), default=["none"], help=f"of {','.join(MODS)} (default: none)")
    parser.add_argument(
        "--dtypes", type=_names(DTYPES, SHORT_DTYPES), default=list(DTYPES), help="of fp16,bf16,fp32 (default: all)"
    )
    parser.add_argument("--inputs", choices=("warm", "cold", "both"), help="default: cold on a GPU, warm on a CPU")
    parser.add_argument(
        "--rows", help='a number ("6"), a range ("6:12") or a regular expression on the full-size label'
    )
    parser.add_argument("--sizes", choices=("full", "small"), help="default: full on a GPU, small on a CPU")
    parser.add_argument(
        "--columns", type=_names(COLUMNS), help=f"of {','.join(COLUMNS)} (default: what the device has)"
    )
    parser.add_argument(
        "--flex",
        action=argparse.BooleanOptionalAction,
        help="FlexAttention, seconds of compilation a row (default: GPU)",
    )
    parser.add_argument(
        "--flex-dtypes",
        type=_names(DTYPES, SHORT_DTYPES),
        default=["float16", "bfloat16"],
        help="dtypes that FlexAttention is run with (default: fp16,bf16; it takes about a minute for a row in fp32)",
    )
    parser.add_argument("--window", type=int, default=1024, help="keys that sliding_window sees (default: 1024)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--no-picture", action="store_true", help="draw nothing")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    options = parser.parse_args(arguments)
    options.device = options.device or ("cuda" if torch.cuda.is_available() else "cpu")
    on_gpu = options.device == "cuda"
    if on_gpu and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU")
    if not on_gpu and options.inputs in ("cold", "both"):
        parser.error("--inputs cold is a GPU measurement; a CPU run takes warm inputs")
    options.inputs = {None: ["cold" if on_gpu else "warm"], "both": ["cold", "warm"]}.get(
        options.inputs, [options.inputs]
    )
    options.sizes = options.sizes or ("full" if on_gpu else "small")
    return options


def _names(allowed, short=None):
    """An argparse type: comma-separated names out of `allowed`."""

    def parse(text: str) -> list[str]:
        names = [(short or {}).get(name, name) for name in text.split(",")]
        if unknown := [name for name in names if name not in allowed]:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown)}: choose from {', '.join(allowed)}")
        return list(dict.fromkeys(names))

    return parse


def _choose_columns(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The columns to run, and a note for each that the device's default leaves out."""
    if options.columns:
        return [name for name in options.columns if name != "flex" or options.flex is not False], []
    columns, notes = list(COLUMNS), []
    if options.device == "cpu":
        columns.remove("sdpa_cudnn")
        notes.append("SDPA (cuDNN) and the limit, which is the time to read the keys and values once: GPU only.")
    if options.flex is False or (options.flex is None and options.device == "cpu"):
        columns.remove("flex")
        notes.append("FlexAttention: left out (--flex adds it; seconds of compilation a row).")
    if options.sizes == "small":
        notes.append("What was reported for xformers' benchmark: it belongs to the full sizes.")
    return columns, notes


def _new_document(options: argparse.Namespace, device: torch.device) -> dict:
    columns, notes = _choose_columns(options)
    environment = describe_environment(device)
    if options.commit:
        environment["commit"] = options.commit
    return {
        "device": device.type,
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment,
        "protocol": GPU_PROTOCOL if device.type == "cuda" else CPU_PROTOCOL,
        "flags": {**vars(options), "out": str(options.out)},
        "columns": {name: COLUMNS[name][0] for name in columns},
        "notes": notes,
        "results": [],
        "empty_cells": [],
    }


def _run(rows: list[Row], options: argparse.Namespace, device: torch.device, document: dict) -> None:
    """Measure all rows into `document`, and save it after each, so that an interrupted run keeps what it has."""
    floor_of = _floor_source(device)
    started = time.monotonic()
    with progress_bar(len(rows)) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers explain a refusal in warnings; the reason of an empty cell is kept
        for row in rows:
            figures = _run_row(row, options, device, document, floor_of)
            document["seconds"] = round(time.monotonic() - started, 1)
            (options.out / "matrix.json").write_text(json.dumps(document, indent=1) + "\n")
            step(row.label, figures)
            if device.type == "cuda":
                gc.collect()
                torch.cuda.empty_cache()


def _run_row(row: Row, options: argparse.Namespace, device: torch.device, document: dict, floor_of) -> str:
    columns, figures = list(document["columns"]), []
    if "flex" in columns and row.dtype not in options.flex_dtypes:
        columns.remove("flex")
        reason = f"left out for {row.dtype}: --flex-dtypes adds it, about a minute a row"
        cells = [EmptyCell(row.label, mod, kind, "flex", reason) for mod in options.mods for kind in options.inputs]
        document["empty_cells"] += [dataclasses.asdict(cell) for cell in cells]
    try:
        for found in measure_row(row, options.mods, columns, options.inputs, options.window, device, floor_of):
            if isinstance(found, EmptyCell):
                document["empty_cells"].append(dataclasses.asdict(found))
                continue
            document["results"].append(dataclasses.asdict(found))
            figures.append(_figures(found))
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        reason = f"the row could not be set up: {error}".splitlines()[0]
        done = {(result["label"], result["mod"], result["inputs"]) for result in document["results"]}
        missing = [(mod, kind) for mod in options.mods for kind in options.inputs if (row.label, mod, kind) not in done]
        cells = [EmptyCell(row.label, mod, kind, column, reason) for mod, kind in missing for column in columns]
        document["empty_cells"] += [dataclasses.asdict(cell) for cell in cells]
    return "; ".join(figures)


def _figures(result: Result) -> str:
    fastest = result.median_us("flexdecode")
    floor = f", limit {result.floor_us:.1f}" if result.floor_us else ""
    return f"{result.mod} {result.inputs}: " + (f"{fastest:.1f} us{floor}" if fastest else "no flexdecode figure")


def _floor_source(device: torch.device):
    """`(bytes, inputs) -> (microseconds, configuration)`; Nones on a CPU."""
    if device.type != "cuda":
        return lambda num_bytes, inputs: (None, None)
    from .floor import FloorMeter

    meter = FloorMeter(device)
    return lambda num_bytes, inputs: dataclasses.astuple(meter.floor(num_bytes, inputs))


def _write_reports(document: dict, out: pathlib.Path, draws: bool) -> None:
    with (out / "matrix.csv").open("w", newline="") as file:
        records = report.flat_records(document)
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
    pictures = []
    if draws and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture (pip install matplotlib, then python -m benchmarks.report)")
    elif draws and document["results"]:
        from .figure import draw_all

        pictures = draw_all(document, out / "matrix.png")
    (out / "matrix.md").write_text(report.markdown(document, [picture.name for picture in pictures]))


if __name__ == "__main__":
    sys.exit(main())
