"""Runs the matrix: for each row and mod, check every column against float64, then time it."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator

import torch

from .columns import COLUMNS, Unsupported, naive_attention
from .mod_cases import ModCase, make_case
from .rows import Row
from .timing import COLD_BYTES, time_cpu, time_graph

__all__ = ["EmptyCell", "Result", "WrongResult", "measure_row"]

MAX_INPUT_BYTES = 16_000_000_000  # of all input sets of one row; windows read little of what is allocated
SEED = 2024


class WrongResult(Exception):
    """A column's output is too far from the float64 result."""


@dataclasses.dataclass
class Result:
    """The figures of one row, mod and kind of input; `times_us` maps a column to its timings in microseconds."""

    label: str
    row: dict
    mod: str
    inputs: str
    compulsory_bytes: int
    live_kv_bytes: int
    floor_us: float | None = None
    floor_config: str | None = None
    times_us: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    relative_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def median_us(self, column: str) -> float | None:
        """Median microseconds of a column, None for an empty cell."""
        times = self.times_us.get(column)
        return statistics.median(times) if times else None


@dataclasses.dataclass(frozen=True)
class EmptyCell:
    """A column that could not run a row, and why; `wrong` if it ran and its result was wrong."""

    label: str
    mod: str
    inputs: str
    column: str
    reason: str
    wrong: bool = False


Inputs = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
FloorOf = Callable[[int, str], tuple[float | None, str | None]]


def measure_row(
    row: Row,
    mods: list[str],
    columns: list[str],
    inputs: list[str],
    window: int,
    device: torch.device,
    floor_of: FloorOf,
) -> Iterator[Result | EmptyCell]:
    """Measure one row with every mod, column and kind of input; yields results and empty cells as they come.

    Args:
        row: The shape.
        mods: Names from `mod_cases.MODS`.
        columns: Names from `columns.COLUMNS`.
        inputs: "cold", "warm" or both.
        window: Keys that a query of the sliding window sees.
        device: Where to run.
        floor_of: `(bytes, inputs) -> (microseconds, configuration)` of the practical floor; Nones without one.
    """
    cases = [make_case(name, row, device, window) for name in mods]
    sets = _input_sets(row, _num_sets(row, cases, inputs, device), device)
    for case in cases:
        results = [_new_result(row, case, kind, floor_of) for kind in inputs]
        yield from _measure_columns(row, case, columns, sets, results, device)
        yield from results


def _new_result(row: Row, case: ModCase, kind: str, floor_of: FloorOf) -> Result:
    live_bytes = row.live_kv_bytes(case.live_keys)
    floor_us, floor_config = floor_of(live_bytes, kind)
    compulsory = row.compulsory_bytes(case.live_keys)
    return Result(row.label, dataclasses.asdict(row), case.name, kind, compulsory, live_bytes, floor_us, floor_config)


def _measure_columns(
    row: Row, case: ModCase, columns: list[str], sets: list[Inputs], results: list[Result], device: torch.device
) -> Iterator[EmptyCell]:
    expected = naive_attention(*(tensor.double() for tensor in sets[0]), case)
    # The project's tolerance: at most twice the error of plain PyTorch in the input dtype, plus 1e-5.
    bound = 2 * _relative_error(naive_attention(*sets[0], case), expected) + 1e-5
    for column in columns:
        try:
            _measure_column(row, case, column, sets, results, device, expected, bound)
        except Exception as error:  # one cell must never end the run: the reason is kept and printed
            reason, wrong = _reason(error), isinstance(error, WrongResult)
            for result in results:
                if wrong:  # in one kind of input: the column is not to be trusted in the other
                    result.times_us.pop(column, None)
                if column not in result.times_us:
                    yield EmptyCell(row.label, case.name, result.inputs, column, reason, wrong)
        if device.type == "cuda":
            torch.cuda.empty_cache()


def _measure_column(
    row: Row,
    case: ModCase,
    column: str,
    sets: list[Inputs],
    results: list[Result],
    device: torch.device,
    expected: torch.Tensor,
    bound: float,
) -> None:
    if column == "flex":
        torch.compiler.reset()  # else the recompile limit is met after a few shapes
    attend = COLUMNS[column][1](row, case, device)
    error = _check(attend(*sets[0]), sets[0][0], expected, bound)
    for result in results:
        chosen = sets if result.inputs == "cold" else sets[:1]
        if device.type == "cuda":
            calls = [lambda tensors=tensors: attend(*tensors) for tensors in chosen]
            times, output = time_graph(calls)
            _check(output, sets[0][0], expected, bound, " in a CUDA graph")
        else:
            times = time_cpu(lambda: attend(*sets[0]))
        result.times_us[column], result.relative_errors[column] = times, error


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """`|output - expected| / |expected|` in the Frobenius norm."""
    return float((output.double() - expected).norm() / expected.norm())


def _check(output: torch.Tensor, query: torch.Tensor, expected: torch.Tensor, bound: float, where: str = "") -> float:
    if output.shape != query.shape or output.dtype != query.dtype:
        raise WrongResult(f"the output{where} is {output.dtype} {list(output.shape)}, not like the query")
    error = _relative_error(output, expected)
    if not error <= bound:  # written so that NaN fails
        raise WrongResult(f"wrong result{where}: relative error {error:.1e} is over the bound {bound:.1e}")
    return error


def _num_sets(row: Row, cases: list[ModCase], inputs: list[str], device: torch.device) -> int:
    """Input sets that together hold `COLD_BYTES` of live K/V, as far as memory allows; 1 if nothing is cold."""
    if "cold" not in inputs:
        return 1
    fewest_live = min(row.live_kv_bytes(case.live_keys) for case in cases)
    limit = min(MAX_INPUT_BYTES, torch.cuda.mem_get_info(device)[0] // 3)
    affordable = max(limit // row.kv_bytes, -(-COLD_BYTES // row.kv_bytes))
    return min(-(-COLD_BYTES // fewest_live), affordable)


def _input_sets(row: Row, count: int, device: torch.device) -> list[Inputs]:
    """`count` random normal `(query, key, value)`, never zeros: data moves at another speed when it is all zeros."""
    generator = torch.Generator(device).manual_seed(SEED)

    def normal(heads: int, length: int) -> torch.Tensor:
        return torch.randn(row.B, heads, length, row.K, dtype=row.torch_dtype, device=device, generator=generator)

    return [(normal(row.Hq, row.Mq), normal(row.Hkv, row.Mkv), normal(row.Hkv, row.Mkv)) for _ in range(count)]


def _reason(error: Exception) -> str:
    """One line that says why a cell is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no message"
    if isinstance(error, Unsupported | WrongResult):
        return text
    return f"{type(error).__name__}: {text[:200]}"
