"""The performance matrix: flexdecode and its peers on the 60 rows of xformers' flash-decoding benchmark, and more.

    python -m benchmarks.performance_matrix
    python -m benchmarks.performance_matrix --mods none,alibi --inputs both --dtypes float16 --out results
    python -m benchmarks.performance_matrix --sections shapes,mla,ragged --minutes 5

Writes matrix.csv, matrix.json, matrix.md and matrix.png for the 60 rows (the section `seed`), and the same files with
the name `sections` for all other sections.
"""

import argparse
import csv
import importlib.util
import pathlib
import re
import sys

import torch

from . import report, section_report, sections, table
from .columns import COLUMNS
from .mod_cases import MODS
from .rows import load_rows, select, select_rows, shrink
from .runner import Job, new_document, run_jobs
from .table import OURS

DTYPES = ("float16", "bfloat16", "float32")
SHORT_DTYPES = {"fp16": "float16", "bf16": "bfloat16", "fp32": "float32"}
SEED = "seed"
SECTIONS = (SEED, *sections.SECTIONS)


def main(arguments: list[str] | None = None) -> int:
    """Run the matrix; returns 1 if a flexdecode cell is empty (it failed, or was wrong), else 0."""
    options = parse(arguments)
    documents = run(options)
    for name, document in documents.items():
        if name == "matrix":
            print("\n" + table.render_tables(document))
            print(table.empty_cells_text(document))
            print("\n" + report.summary_text(document))
        else:
            print("\n" + section_report.text(document))
        written = ", ".join(sorted(path.name for path in options.out.glob(f"{name}*")))
        print(f"\n{document['protocol']}\n\nIn {options.out}: {written}")
        if document["left_out"]:
            print(f"Left out, because the {options.minutes:g} minutes were over: {'; '.join(document['left_out'])}")
    return int(has_failed(documents))


def run(options: argparse.Namespace) -> dict[str, dict]:
    """Runs what `parse` gives, and writes the records, the pages and the pictures.

    Returns:
        What `matrix.json` and `sections.json` hold, by the names of these files; only those that were asked for.
    """
    device = torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)  # steadier figures, and no idle threads that spin beside other work
    documents: dict[str, dict] = {}
    jobs = []
    try:
        for section in options.sections:
            cases, name = cases_of(section, options), "matrix" if section == SEED else "sections"
            if name not in documents:
                documents[name] = new_document(options, device)
            document, given = documents[name], None if section == SEED else section
            if section == SEED and options.sizes == "small":
                document["notes"].append("What was reported for xformers' benchmark: it belongs to the full sizes.")
            jobs.append(Job(document, options.out / f"{name}.json", cases, given))
        if not any(job.cases for job in jobs):
            raise ValueError(f"no case of these sections matches --rows {options.rows!r}")
    except (ValueError, re.error) as error:
        sys.exit(f"performance_matrix: {error}")
    options.out.mkdir(parents=True, exist_ok=True)
    shown = ", ".join(dict.fromkeys(title for document in documents.values() for title in document["columns"].values()))
    environment = jobs[0].document["environment"]
    print(f"{sum(len(job.cases) for job in jobs)} rows on {environment['hardware']}: {shown}")
    print("\n".join(jobs[0].document["notes"]) + "\n")
    run_jobs(jobs, options, device)
    for name, document in documents.items():
        _write_reports(name, document, options.out, not options.no_picture)
    return documents


def cases_of(section: str, options: argparse.Namespace) -> list:
    """The cases of a section that a command line chooses."""
    small = options.sizes == "small"
    if section == SEED:
        rows = select_rows(load_rows(), options.rows, options.dtypes or list(DTYPES))
        rows = [shrink(row) for row in rows] if small else rows
        others = tuple(name for name in COLUMNS if name != OURS)
        return [row.case(mod, options.window, others) for row in rows for mod in options.mods]
    dtypes = options.dtypes or ["bfloat16"]
    cases = [case for dtype in dtypes for case in sections.cases_of(section, dtype, small)]
    return select(cases, options.rows)


def has_failed(documents: dict[str, dict]) -> bool:
    """Whether flexdecode failed in a row, or was wrong."""
    return any(cell["column"] == OURS for document in documents.values() for cell in document["empty_cells"])


def make_parser(program: str, description: str) -> argparse.ArgumentParser:
    """The flags that choose cases of the matrix, and how they are measured."""
    parser = argparse.ArgumentParser(prog=program, description=description, allow_abbrev=False)
    parser.add_argument(
        "--sections",
        type=_names(SECTIONS),
        default=[SEED],
        help=f"of {','.join(SECTIONS)}, run in this order (default: seed)",
    )
    parser.add_argument("--minutes", type=float, help="begin no row after so many minutes, and say what was left out")
    parser.add_argument(
        "--mods", type=_names(MODS), default=["none"], help=f"of {','.join(MODS)}, of the seed rows (default: none)"
    )
    parser.add_argument(
        "--dtypes",
        type=_names(DTYPES, SHORT_DTYPES),
        help="of fp16,bf16,fp32 (default: all of the seed rows, else bf16)",
    )
    parser.add_argument("--inputs", choices=("warm", "cold", "both"), help="default: cold on a GPU, warm on a CPU")
    parser.add_argument(
        "--rows", help='a number ("6"), a range ("6:12") or a regular expression on the full-size label'
    )
    parser.add_argument("--sizes", choices=("full", "small"), help="default: full on a GPU, small on a CPU")
    parser.add_argument("--window", type=int, default=1024, help="keys that sliding_window sees (default: 1024)")
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: cuda if there is one")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    return parser


def _own_parser() -> argparse.ArgumentParser:
    parser = make_parser("python -m benchmarks.performance_matrix", __doc__.split("\n")[0])
    parser.add_argument(
        "--columns",
        type=_names(COLUMNS),
        help=f"of {','.join(COLUMNS)} (default: what is installed, without flex_best)",
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
    parser.add_argument("--no-picture", action="store_true", help="draw nothing")
    return parser


def parse(arguments: list[str] | None, parser: argparse.ArgumentParser | None = None) -> argparse.Namespace:
    """The command line, with its defaults for this machine.

    Args:
        arguments: Its words; None for those of this process.
        parser: What `make_parser` made; None for that of this program.
    """
    parser = parser or _own_parser()
    options = parser.parse_intermixed_args(arguments)
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


def _write_reports(name: str, document: dict, out: pathlib.Path, draws: bool) -> None:
    with (out / f"{name}.csv").open("w", newline="") as file:
        records = report.flat_records(document)
        writer = csv.DictWriter(file, fieldnames=list(records[0]) if records else [])
        writer.writeheader()
        writer.writerows(records)
    pictures = []
    if draws and importlib.util.find_spec("matplotlib") is None:
        print("matplotlib is not installed: no picture (pip install matplotlib, then python -m benchmarks.report)")
    elif draws and document["results"]:
        from . import figure, section_figure

        draw_all = figure.draw_all if name == "matrix" else section_figure.draw_all
        pictures = draw_all(document, out / f"{name}.png")
    page = report.markdown if name == "matrix" else section_report.markdown
    (out / f"{name}.md").write_text(page(document, [picture.name for picture in pictures]))


if __name__ == "__main__":
    sys.exit(main())
