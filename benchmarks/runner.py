"""Runs cases into documents, the content of JSON files.

A document is saved after each case: an interrupted run keeps what it has.
"""

import argparse
import dataclasses
import datetime
import gc
import json
import pathlib
import time
import warnings
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .cases import Case
from .columns import COLUMNS, missing
from .environment import describe_environment
from .measure import EmptyCell, Result, measure
from .progress import progress_bar
from .timing import CPU_PROTOCOL, GPU_PROTOCOL, IN_TURN

__all__ = ["Job", "choose_columns", "new_document", "run_jobs"]


class Job(NamedTuple):
    """Some cases of one file.

    Attributes:
        document: What the file holds.
        path: The JSON file.
        cases: What is measured.
        section: Name of the section that the results belong to; None for the seed rows.
    """

    document: dict
    path: pathlib.Path
    cases: Sequence[Case]
    section: str | None = None


def choose_columns(options: argparse.Namespace) -> tuple[list[str], list[str]]:
    """The columns to run, and a note for each that is left out.

    A column that is not installed is left out even if it was named.
    """
    chosen, notes = [], []
    for name, column in COLUMNS.items():
        if options.columns and name not in options.columns:
            continue
        reason = missing(name)
        if reason is None and column.compiled and options.flex is False:
            reason = f"{column.title}: left out by --no-flex"
        if reason is None and not options.columns:
            reason = _not_by_default(name, options)
        if reason is None:
            chosen.append(name)
        else:
            notes.append(f"{reason}.")
    if options.device == "cpu":
        notes.append("The limit, which is the time to read the keys and values once: GPU only.")
    return chosen, notes


def _not_by_default(name: str, options: argparse.Namespace) -> str | None:
    """Why a column is left out of a run that names none."""
    column = COLUMNS[name]
    if options.device == "cpu" and not column.on_cpu:
        return f"{column.title}: GPU only"
    if not column.by_default:
        return f"{column.title}: left out (--columns names it; up to a minute of compilation a row)"
    if options.device == "cpu" and column.compiled and not options.flex:
        return f"{column.title}: left out (--flex adds it; seconds of compilation a row)"
    return None


def new_document(options: argparse.Namespace, device: torch.device) -> dict:
    """A document without results."""
    columns, notes = choose_columns(options)
    environment = describe_environment(device)
    if options.commit:
        environment["commit"] = options.commit
    return {
        "device": device.type,
        "timestamp": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "environment": environment,
        "protocol": f"{GPU_PROTOCOL} {IN_TURN}" if device.type == "cuda" else CPU_PROTOCOL,
        "flags": {**vars(options), "out": str(options.out)},
        "columns": {name: COLUMNS[name].title for name in columns},
        "notes": notes,
        "results": [],
        "empty_cells": [],
        "left_out": [],
        "seconds": 0,
    }


def run_jobs(jobs: Sequence[Job], options: argparse.Namespace, device: torch.device) -> None:
    """Measure all cases of all jobs into their documents, one after another, until the time limit is over.

    Args:
        jobs: What to run. Cases that were not begun in `options.minutes` are named in `left_out` of their document.
        options: The command line.
        device: Where to run.
    """
    meter = None
    if device.type == "cuda":
        from .floor import FloorMeter

        meter = FloorMeter(device)
    seconds = float("inf") if options.minutes is None else 60 * options.minutes
    started = time.monotonic()
    with progress_bar(sum(len(job.cases) for job in jobs)) as step, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # peers explain a refusal in warnings; the reason of an empty cell is kept
        for job in jobs:
            for case in job.cases:
                begun = time.monotonic()
                if begun - started > seconds:
                    job.document["left_out"].append(case.label)
                    step(case.label, "left out: the time is over")
                    continue
                figures = _run_case(job, case, options, device, meter)
                job.document["seconds"] = round(job.document["seconds"] + time.monotonic() - begun, 1)
                _save(job)
                step(case.label, figures)
                if device.type == "cuda":
                    gc.collect()
                    torch.cuda.empty_cache()
            _save(job)  # with what was left out


def _save(job: Job) -> None:
    job.path.write_text(json.dumps(job.document, indent=1) + "\n")


def _run_case(job: Job, case: Case, options: argparse.Namespace, device: torch.device, meter) -> str:
    document, figures = job.document, []

    def leave_empty(columns: Sequence[str], kinds: Sequence[str], reason: str) -> None:
        cells = [EmptyCell(case.label, case.mod, kind, column, reason) for kind in kinds for column in columns]
        document["empty_cells"] += [dataclasses.asdict(cell) for cell in cells]

    columns = [name for name in document["columns"] if name == "flexdecode" or name in case.columns]
    compiled = [name for name in columns if COLUMNS[name].compiled]
    if compiled and case.dtype not in options.flex_dtypes:
        columns = [name for name in columns if name not in compiled]
        reason = f"left out for {case.dtype}: --flex-dtypes adds it, about a minute a row"
        leave_empty(compiled, options.inputs, reason)
    done = set()
    try:
        for found in measure(case, columns, options.inputs, device, meter):
            record = dataclasses.asdict(found) | ({"section": job.section} if job.section else {})
            if isinstance(found, EmptyCell):
                document["empty_cells"].append(record)
                continue
            document["results"].append(record)
            done.add(found.inputs)
            figures.append(_figures(found))
    except (torch.OutOfMemoryError, ValueError, RuntimeError) as error:
        reason = f"the row could not be set up: {error}".splitlines()[0]
        leave_empty(columns, [kind for kind in options.inputs if kind not in done], reason)
    return "; ".join(figures)


def _figures(result: Result) -> str:
    fastest = result.median_us("flexdecode")
    floor = f", limit {result.floor_us:.1f}" if result.floor_us else ""
    return f"{result.mod} {result.inputs}: " + (f"{fastest:.1f} us{floor}" if fastest else "no flexdecode figure")
