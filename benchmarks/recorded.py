"""What benchmarks with a recorded run and a page have in common: their command line, their JSON, their lists."""

import argparse
import json
import pathlib
import statistics
from collections.abc import Callable, Iterable, Iterator

import torch

from .environment import describe_environment
from .timing import GPU_PROTOCOL

__all__ = ["check", "goals_reached", "main", "median", "page", "span"]


def median(record: dict) -> float:
    """Microseconds of a record."""
    return statistics.median(record["times_us"])


def span(values: Iterable[float], digits: int = 2) -> str:
    """The smallest and the largest of some numbers: "0.97 to 1.02", or "1.02" where both are written the same."""
    known = sorted(values)
    ends = dict.fromkeys(f"{value:.{digits}f}" for value in (known[0], known[-1]))
    return " to ".join(ends)


def goals_reached(results: list[dict], cases: str = "cases") -> str:
    """A sentence: how many records reach their goal, and how far the others are from it."""
    over = [median(record) / record["bar_us"] for record in results if median(record) > record["bar_us"]]
    told = f"{len(results) - len(over)} of {len(results)} {cases} reach their goal"
    return f"{told}; the others miss it by up to {100 * (max(over) - 1):.1f}%." if over else f"{told}."


def check(output: torch.Tensor, expected: torch.Tensor, slack: float = 2.0) -> None:
    """Refuses an error above `slack` times that of rounding the exact result.

    Raises:
        SystemExit: it is larger.
    """
    error, rounding = (float((x.double() - expected).norm()) for x in (output, expected.to(output.dtype)))
    if not error <= slack * rounding + 1e-5 * float(expected.norm()):
        raise SystemExit(f"wrong result: error {error:.2e}, rounding alone {rounding:.2e}")


def page(document: dict, title: str, parts: Iterable[str], inputs: str = "Here all inputs are cold.") -> str:
    """The page of a run: a title with the hardware, its parts, and what it was measured on, with which inputs."""
    hardware = document["environment"]["hardware"].split(",")[0]
    measured = "\n".join(f"- {name}: {text}" for name, text in document["environment"].items())
    protocol = GPU_PROTOCOL.split(" The limit")[0] + f" {inputs}"
    return "\n\n".join([f"# {title}: {hardware}", *parts, "## What was measured", measured, protocol]) + "\n"


def main(
    name: str,
    description: str,
    run: Callable[[], Iterator[dict]],
    markdown: Callable[[dict], str],
    arguments: list[str] | None = None,
) -> int:
    """Records a run as `NAME.json` and `NAME.md`, or makes the page of a recorded run.

    Args:
        name: of the benchmark.
        description: for `--help`.
        run: measures; gives records with `case`, `times_us` and `bar_us`, the largest time that reaches the goal.
        markdown: the page of a document.
        arguments: of the command line.

    Returns:
        1 if a record misses its goal, else 0.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.{name}", description=description)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("flexdecode-results"), help="output directory")
    parser.add_argument("--commit", help="commit to record where there is no git repository")
    parser.add_argument("--read", type=pathlib.Path, metavar="JSON", help=f"a {name}.json to make --page from")
    parser.add_argument("--page", type=pathlib.Path, metavar="MD", help="with --read: where to write its page")
    options = parser.parse_args(arguments)
    if (options.read is None) != (options.page is None):
        parser.error("--read and --page belong together")
    if options.read:
        options.page.write_text(markdown(json.loads(options.read.read_text())))
        return 0
    if not torch.cuda.is_available():
        parser.error("this measures a GPU, and torch sees none")
    torch.manual_seed(2024)
    environment = describe_environment(torch.device("cuda"))
    if options.commit:
        environment["commit"] = options.commit
    results: list[dict] = []
    document = {"environment": environment, "results": results}
    options.out.mkdir(parents=True, exist_ok=True)
    for record in run():
        results.append(record)
        print(f"{record['case']}: {median(record):.1f} us, goal {record['bar_us']:.1f}", flush=True)
        (options.out / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    (options.out / f"{name}.md").write_text(markdown(document))
    return int(any(median(record) > record["bar_us"] for record in results))
