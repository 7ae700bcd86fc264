"""Times checkouts of flexdecode in turn, on the cases of the matrix: what a change does to every row.

    git worktree add ../before HEAD~1
    python -m benchmarks.compare before=../before now=. --sections seed,shapes --dtypes bf16 --minutes 5

It prints the time of each checkout, and its ratio to that of the first one, and writes compare.json. The flags are
those of performance_matrix that choose cases and inputs, `--device`, `--minutes`, `--commit` and `--out`.

Each checkout runs in a process of its own with stores of its own, and with the benchmarks of this checkout. All are
checked against float64, and timed one after another, twice: what changes the speed of the card changes all of them.
"""

import argparse
import contextlib
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

from . import performance_matrix
from .cases import Case
from .environment import describe_environment
from .measure import Ready, get_ready, set_up
from .progress import progress_bar
from .table import OURS
from .timing import GPU_PROTOCOL, settle, time_in_turn

ROOT = pathlib.Path(__file__).resolve().parents[1]
# Imports flexdecode from a checkout, then the benchmarks from this one.
START = """import sys
checkout, root, *arguments = sys.argv[1:]
sys.path.insert(0, checkout)
import flexdecode
sys.path[0] = root
from benchmarks.compare import answer
answer(arguments)"""


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
        own = {"FLEXDECODE_CACHE_DIR": str(stores / "flexdecode"), "TRITON_CACHE_DIR": str(stores / "triton")}
        command = [sys.executable, "-c", START, str(folder.resolve()), str(ROOT), *arguments]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, env=os.environ | own)

    def ask(self, **question: int | str) -> None:
        """Asks something; the process answers while others are asked."""
        with contextlib.suppress(BrokenPipeError):  # there will be no answer either
            print(json.dumps(question), file=self.process.stdin, flush=True)

    def answer(self) -> dict:
        """Waits for the answer.

        Raises:
            SystemExit: the process has ended.
        """
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"compare: the process of {self.name} has ended; its reason is above")
        return json.loads(line)

    def time(self) -> list[float]:
        """Microseconds per call of each replay of the case that is ready."""
        self.ask()
        return self.answer()["times_us"]


def answer(arguments: list[str]) -> None:
    """What the process of a checkout does: answers the questions of its standard input, a line of JSON each."""
    answers, sys.stdout = sys.stdout, sys.stderr
    options = _parse(arguments)
    cases, device = _cases(options), torch.device(options.device)
    if device.type == "cpu":
        torch.set_num_threads(1)
    ready: Ready | None = None
    kind = ""
    for line in sys.stdin:
        question = json.loads(line)
        if "case" in question:
            kind, ready = question["kind"], None
            failure = None
            if device.type == "cuda":
                torch.cuda.empty_cache()
            try:
                ready = get_ready(OURS, set_up(cases[question["case"]], [kind], device), [kind], device)
            except Exception as error:  # one case must never end the run: its reason is shown
                failure = f"{type(error).__name__}: {error}".splitlines()[0]
            reply = {"failure": failure}
        else:
            assert ready is not None
            reply = {"times_us": ready.timer(kind)()}
        print(json.dumps(reply), file=answers, flush=True)


def _parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = performance_matrix.make_parser("python -m benchmarks.compare", __doc__.split("\n")[0])
    parser.add_argument(
        "checkouts", nargs="+", type=_checkout, metavar="name=folder", help="at least two; the first is the measure"
    )
    options = performance_matrix.parse(arguments, parser)
    options.checkouts = dict(options.checkouts)
    if len(options.checkouts) < 2:
        parser.error("name two checkouts, as in: before=../before now=.")
    return options


def _checkout(text: str) -> tuple[str, pathlib.Path]:
    name, _, folder = text.partition("=")
    if not folder or not (pathlib.Path(folder) / "flexdecode").is_dir():
        raise argparse.ArgumentTypeError(f"{text}: not name=folder with a checkout of flexdecode in the folder")
    return name, pathlib.Path(folder)


def _cases(options: argparse.Namespace) -> list[Case]:
    return [case for section in options.sections for case in performance_matrix.cases_of(section, options)]


@contextlib.contextmanager
def _started(folders: dict[str, pathlib.Path], arguments: list[str]) -> Iterator[list[Checkout]]:
    with tempfile.TemporaryDirectory() as stores:
        found = [Checkout(name, at, pathlib.Path(stores) / name, arguments) for name, at in folders.items()]
        try:
            yield found
        finally:
            for checkout in found:
                checkout.process.kill()
                checkout.process.communicate()


def compare(checkouts: list[Checkout], cases: list[Case], options: argparse.Namespace) -> list[dict]:
    """Times all cases with all checkouts.

    Returns:
        For each case and kind of input its `label`, `dtype` and `inputs`, the lower median of two in microseconds for
        each checkout (`us`), and why others could not run (`failures`).
    """
    results: list[dict] = []
    until = time.monotonic() + 60 * (options.minutes or float("inf"))
    with progress_bar(len(cases) * len(options.inputs)) as step:
        for index, case in enumerate(cases):
            for kind in options.inputs:
                if time.monotonic() > until:
                    step(case.label, "left out: the time is over")
                    continue
                for checkout in checkouts:
                    checkout.ask(case=index, kind=kind)
                failures = {checkout.name: checkout.answer()["failure"] for checkout in checkouts}
                timers = {checkout.name: checkout.time for checkout in checkouts if failures[checkout.name] is None}
                if timers:
                    settle(next(iter(timers.values())))
                us = {name: statistics.median(turns[0]) for name, turns in time_in_turn(timers).items()}
                failures = {name: reason for name, reason in failures.items() if reason}
                found = {"label": case.label, "dtype": case.dtype, "inputs": kind, "us": us, "failures": failures}
                results.append(found)
                step(f"{case.label} {case.dtype} {kind}", _figures(found))
    return results


def _figures(found: dict) -> str:
    first = next(iter(found["us"].values()), None)
    figures = [f"{name} {us:.2f} us ({us / first:.3f})" for name, us in found["us"].items()]
    return ", ".join([*figures, *(f"{name}: {reason}" for name, reason in found["failures"].items())])


def summary(results: list[dict], names: list[str]) -> str:
    """For each dtype and kind of input the geometric mean of the ratios to the first checkout, and the largest one."""
    lines = []
    for dtype, kind in dict.fromkeys((found["dtype"], found["inputs"]) for found in results):
        rows = [found for found in results if (found["dtype"], found["inputs"]) == (dtype, kind)]
        for name in names[1:]:
            ratios = {
                found["label"]: found["us"][name] / found["us"][names[0]]
                for found in rows
                if name in found["us"] and names[0] in found["us"]
            }
            if ratios:
                worst = max(ratios, key=ratios.__getitem__)
                mean = statistics.geometric_mean(ratios.values())
                lines.append(
                    f"{dtype} {kind}, {name} over {names[0]}: geometric mean {mean:.3f} of {len(ratios)} cases, "
                    f"from {min(ratios.values()):.3f} to {ratios[worst]:.3f} ({worst})"
                )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compares checkouts; returns 1 if one of them could not run a case or was wrong, else 0."""
    arguments = sys.argv[1:] if arguments is None else arguments
    options = _parse(arguments)
    cases, names = _cases(options), list(options.checkouts)
    if not cases:
        sys.exit(f"compare: no case of these sections matches --rows {options.rows!r}")
    with _started(options.checkouts, arguments) as checkouts:
        results = compare(checkouts, cases, options)
    environment = describe_environment(torch.device(options.device))
    if options.commit:
        environment["commit"] = options.commit
    document = {"environment": environment, "protocol": GPU_PROTOCOL, "checkouts": names, "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.json").write_text(json.dumps(document, indent=1) + "\n")
    print(f"\n{summary(results, names)}\n{environment['hardware']}")
    return int(any(found["failures"] for found in results))


if __name__ == "__main__":
    sys.exit(main())
