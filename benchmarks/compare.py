"""Times checkouts of flexdecode in turn, on the cases of the matrix: what a change does to every row.

    git worktree add ../before HEAD~1
    python -m benchmarks.compare before=../before now=. --sections seed,shapes --dtypes bf16 --minutes 5

It prints the time of each checkout, and its ratio to that of the first one, and writes compare.json. The flags that
choose cases are those of performance_matrix.

Each checkout runs in a process of its own with stores of its own, and with the benchmarks of this checkout. All are
checked against float64, before they are timed and in a CUDA graph after it. They are timed one after another, twice:
what changes the speed of the card changes all of them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from typing import TextIO

import torch

from . import performance_matrix
from .cases import Case
from .environment import describe_environment, git_commit
from .measure import Ready, SetUp, check_timed, get_ready, reason_of, set_up
from .progress import progress_bar
from .table import OURS
from .timing import CPU_PROTOCOL, GPU_PROTOCOL, settle, time_in_turn

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imports flexdecode from a checkout, then the benchmarks from this one. What these print goes to standard error.
START = """import os, sys
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
checkout, root, *arguments = sys.argv[1:]
sys.path.insert(0, checkout)
import flexdecode
sys.path[0] = root
from benchmarks.compare import work
work(arguments, answers)"""


class Checkout:
    """A process that times a checkout.

    Args:
        name: What it is called in the tables.
        folder: Where it lies.
        stores: A folder for what it compiles.
        arguments: The command line.
    """

    def __init__(self, name: str, folder: pathlib.Path, stores: pathlib.Path, arguments: list[str]):
        self.name = name
        self.failure: str | None = None
        own = {"FLEXDECODE_CACHE_DIR": str(stores / "flexdecode"), "TRITON_CACHE_DIR": str(stores / "triton")}
        command = [sys.executable, "-c", START, str(folder.resolve()), str(ROOT), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | own)

    def ask(self, do: str, **question: int | str) -> None:
        """Asks for something; the process works while others are asked."""
        with contextlib.suppress(BrokenPipeError):  # there will be no answer either
            print(json.dumps(question | {"do": do}), file=self.process.stdin, flush=True)

    def answer(self) -> list[float] | str | None:
        """Waits for what the process gives: times, or why it failed.

        Raises:
            SystemExit: It has ended.
        """
        line = self.process.stdout.readline()
        if not line:
            status = self.process.wait()
            raise SystemExit(f"compare: the process of {self.name} has ended with status {status}; see above")
        return json.loads(line)

    def time(self) -> list[float]:
        """Microseconds per call of each replay of the case that is ready. If it fails, `failure` says why."""
        self.ask("time")
        found = self.answer()
        if isinstance(found, list):
            return found
        self.failure = found
        return [float("inf")]


def work(arguments: list[str], answers: TextIO) -> None:
    """What the process of a checkout does: a line of JSON on its standard input asks, and one gives the answer."""
    options = _parse(arguments)
    cases, device = _cases(options), torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    at_work = _Worker(cases, device)
    for line in sys.stdin:
        question = json.loads(line)
        try:
            found = getattr(at_work, question.pop("do"))(**question)
        except Exception as error:  # one case must never end the run: its reason is shown
            found = reason_of(error)
        print(json.dumps(found), file=answers, flush=True)


class _Worker:
    """Answers questions about one case after another."""

    def __init__(self, cases: list[Case], device: torch.device):
        self.cases, self.device = cases, device
        self.ready: tuple[SetUp, Ready, str] | None = None

    def prepare(self, index: int, kind: str) -> None:
        self.ready = None
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        of = set_up(self.cases[index], [kind], self.device)
        self.ready = of, get_ready(OURS, of, [kind], self.device), kind

    def time(self) -> list[float]:
        assert self.ready is not None
        _, ready, kind = self.ready
        return ready.timer(kind)()

    def check(self) -> None:
        assert self.ready is not None
        check_timed(*self.ready)


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = performance_matrix.make_parser("python -m benchmarks.compare", __doc__.split("\n")[0])
    parser.add_argument(
        "checkouts", nargs="+", type=_checkout, metavar="name=folder", help="at least two; the first is the measure"
    )
    options = performance_matrix.parse(arguments, parser)
    if len(options.checkouts) < 2:
        parser.error("name two checkouts, as in: before=../before now=.")
    if len({name for name, _ in options.checkouts}) < len(options.checkouts):
        parser.error("two checkouts have the same name")
    options.checkouts = dict(options.checkouts)
    return options


def _checkout(text: str) -> tuple[str, pathlib.Path]:
    name, _, folder = text.partition("=")
    if not name or not folder or not (pathlib.Path(folder) / "flexdecode" / "__init__.py").is_file():
        raise argparse.ArgumentTypeError(f"{text}: not name=folder with a checkout of flexdecode in the folder")
    return name, pathlib.Path(folder)


def _cases(options: argparse.Namespace) -> list[Case]:
    try:
        cases = [case for section in options.sections for case in performance_matrix.cases_of(section, options)]
    except (ValueError, re.error) as error:
        sys.exit(f"compare: {error}")
    if not cases:
        sys.exit(f"compare: no case of these sections matches --rows {options.rows!r}")
    return cases


@contextlib.contextmanager
def _started(folders: dict[str, pathlib.Path], arguments: list[str]) -> Iterator[list[Checkout]]:
    with tempfile.TemporaryDirectory() as stores:
        found = [
            Checkout(name, folder, pathlib.Path(stores) / str(number), arguments)
            for number, (name, folder) in enumerate(folders.items())
        ]
        try:
            yield found
        finally:
            for checkout in found:
                checkout.process.kill()
                checkout.process.communicate()


def compare(
    checkouts: list[Checkout], cases: list[Case], options: argparse.Namespace, document: dict, path: pathlib.Path
) -> None:
    """Times all cases with all checkouts, into a document that is saved after each case.

    Args:
        checkouts: What is timed.
        cases: What it is timed on.
        options: The command line.
        document: Gets `results`: for each case and kind of input its `label`, `mod`, `dtype` and `inputs`, the lower
            median of two in microseconds for each checkout (`us`), and why others have none (`failures`). Cases that
            were not begun in `options.minutes` are in `left_out`.
        path: The JSON file.
    """
    until = float("inf") if options.minutes is None else time.monotonic() + 60 * options.minutes
    with progress_bar(len(cases) * len(options.inputs)) as step:
        for index, case in enumerate(cases):
            for kind in options.inputs:
                name = f"{case.label}, {case.mod}, {case.dtype}, {kind}"
                if time.monotonic() > until:
                    document["left_out"].append(name)
                    step(name, "left out: the time is over")
                    continue
                us, failures = _time(checkouts, index, kind)
                found = {"label": case.label, "mod": case.mod, "dtype": case.dtype, "inputs": kind}
                document["results"].append(found | {"us": us, "failures": failures})
                _save(document, path)
                step(name, ", ".join(f"{checkout} {time:.2f} us" for checkout, time in us.items()))


def _save(document: dict, path: pathlib.Path) -> None:
    path.write_text(json.dumps(document, indent=1) + "\n")


def _time(checkouts: list[Checkout], index: int, kind: str) -> tuple[dict[str, float], dict[str, str]]:
    """The times of a case in all checkouts that can compute it, and why others cannot."""

    def failed(asked: list[Checkout]) -> dict:
        return {each.name: reason for each in asked if (reason := each.answer()) is not None}

    for checkout in checkouts:
        checkout.failure = None
        checkout.ask("prepare", index=index, kind=kind)
    failures = failed(checkouts)
    able = [checkout for checkout in checkouts if checkout.name not in failures]
    if able:
        settle(able[0].time)
    turns = time_in_turn({checkout.name: checkout.time for checkout in able})
    for checkout in able:
        checkout.ask("check")
    failures |= failed(able) | {checkout.name: checkout.failure for checkout in able if checkout.failure}
    return {name: statistics.median(of[0]) for name, of in turns.items() if name not in failures}, failures


def table(document: dict) -> str:
    """The times of each case, and their ratios to those of the first checkout; the reasons of cells without a time."""
    first, *others = document["checkouts"]
    rows = [(_name(found), found["us"], found["failures"]) for found in document["results"]]
    width = max([4, *(len(name) for name, _, _ in rows)])
    lines = [f"{'us':<{width}} {first:>10}" + "".join(f" {name:>10} {'ratio':>6}" for name in others)]
    for name, us, failures in rows:
        cells = [f"{us[first]:>10.2f}" if first in us else f"{'-':>10}"]
        for other in others:
            ratio = f"{us[other] / us[first]:.3f}" if {first, other} <= set(us) else "-"
            cells.append(f"{us[other]:>10.2f} {ratio:>6}" if other in us else f"{'-':>10} {ratio:>6}")
        lines.append(f"{name:<{width}} {' '.join(cells)}")
        lines += [f"  {checkout}: {reason}" for checkout, reason in failures.items()]
    return "\n".join(lines)


def summary(document: dict) -> str:
    """For each dtype and kind of input the geometric mean of the ratios to the first checkout, and the extremes."""
    lines = []
    first, *others = document["checkouts"]
    for dtype, kind in dict.fromkeys((found["dtype"], found["inputs"]) for found in document["results"]):
        rows = [found for found in document["results"] if (found["dtype"], found["inputs"]) == (dtype, kind)]
        for name in others:
            ratios = [
                (found["us"][name] / found["us"][first], _name(found))
                for found in rows
                if {name, first} <= set(found["us"])
            ]
            if ratios:
                mean = statistics.geometric_mean(ratio for ratio, _ in ratios)
                (least, _), (most, worst) = min(ratios), max(ratios)
                lines.append(
                    f"{dtype} {kind}, {name} over {first}: geometric mean {mean:.3f} of {len(ratios)} cases, "
                    f"from {least:.3f} to {most:.3f} ({worst})"
                )
    return "\n".join(lines)


def _name(found: dict) -> str:
    return ", ".join(found[part] for part in ("label", "mod", "dtype", "inputs"))


def main(arguments: list[str] | None = None) -> int:
    """Compares checkouts; returns 1 if one of them could not compute a case or was wrong, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    cases = _cases(options)
    environment = describe_environment(torch.device(options.device))
    if options.commit:
        environment["commit"] = options.commit
    folders = options.checkouts
    document: dict = {
        "environment": environment,
        "protocol": GPU_PROTOCOL if options.device == "cuda" else CPU_PROTOCOL,
        "checkouts": {name: {"folder": str(at), "commit": git_commit(at)} for name, at in folders.items()},
        "results": [],
        "left_out": [],
    }
    options.out.mkdir(parents=True, exist_ok=True)
    path = options.out / "compare.json"
    with _started(folders, arguments) as checkouts:
        compare(checkouts, cases, options, document, path)
    _save(document, path)  # with what was left out
    print(f"\n{table(document)}\n\n{summary(document)}\n{environment['hardware']}")
    return int(any(found["failures"] for found in document["results"]))


if __name__ == "__main__":
    sys.exit(main())
