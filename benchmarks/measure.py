"""Measures one case: every column is checked against float64 and recorded, then all are timed in turn."""

import dataclasses
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch

from .cases import Case, Tensors, attend_plain, make_tensors
from .columns import COLUMNS, Unsupported
from .mod_cases import ModCase, make_mod
from .timing import COLD_BYTES, Replay, settle, time_cpu, time_in_turn

__all__ = ["EmptyCell", "Ready", "Result", "SetUp", "WrongResult"]
__all__ += ["check_timed", "get_ready", "measure", "reason_of", "set_up"]

MAX_INPUT_BYTES = 16_000_000_000  # of all input sets of one case; windows read little of what is allocated
LIMIT = "limit"  # the name of the read-only stream among what is timed in turn


class WrongResult(Exception):
    """A column's output is too far from the float64 result."""


@dataclasses.dataclass
class Result:
    """The figures of one case and kind of input.

    Attributes:
        label: Name of the case.
        row: Its shape.
        mod: Its mod.
        inputs: "cold" or "warm".
        compulsory_bytes: Live keys and values, query and output.
        live_kv_bytes: Live keys and values.
        floor_us: The limit, microseconds to read the live keys and values once; None on a CPU.
        floor_config: How the stream that reached it is launched.
        times_us: Column to its timings in microseconds, of the turn with the lower median.
        turns_us: Column to the median of each turn, the lowest first.
        relative_errors: Column to its error against float64.
    """

    label: str
    row: dict
    mod: str
    inputs: str
    compulsory_bytes: int
    live_kv_bytes: int
    floor_us: float | None = None
    floor_config: str | None = None
    times_us: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    turns_us: dict[str, list[float]] = dataclasses.field(default_factory=dict)
    relative_errors: dict[str, float] = dataclasses.field(default_factory=dict)

    def median_us(self, column: str) -> float | None:
        """Median microseconds of a column, None for an empty cell."""
        times = self.times_us.get(column)
        return statistics.median(times) if times else None


@dataclasses.dataclass(frozen=True)
class EmptyCell:
    """A column that could not run a case, and why; `wrong` if it ran and its result was wrong."""

    label: str
    mod: str
    inputs: str
    column: str
    reason: str
    wrong: bool = False


class SetUp(NamedTuple):
    """A case as it is run.

    Attributes:
        case: What is decoded.
        mod: Its mod.
        sets: Its inputs, in several sets if some runs are cold.
        expected: The float64 result of the first set.
        bound: The largest relative error of a result.
        live_kv_bytes: Live keys and values.
    """

    case: Case
    mod: ModCase
    sets: list[Tensors]
    expected: torch.Tensor
    bound: float
    live_kv_bytes: int


def set_up(case: Case, kinds: list[str], device: torch.device) -> SetUp:
    """Makes the inputs of a case, and what its results are compared with.

    Args:
        case: What is decoded.
        kinds: "cold", "warm" or both.
        device: Where to run.
    """
    mod = make_mod(case, device)
    live_bytes = mod.live_keys * case.bytes_per_token
    count = _num_sets(case, live_bytes, kinds, device)
    sets = [make_tensors(case, device, number) for number in range(count)]
    expected = attend_plain(case, mod, sets[0], torch.float64)
    # The project's tolerance: at most twice the error of plain PyTorch in the input dtype, plus 1e-5.
    bound = 2 * _relative_error(attend_plain(case, mod, sets[0], case.torch_dtype), expected) + 1e-5
    return SetUp(case, mod, sets, expected, bound, live_bytes)


class Ready:
    """A column that was checked, with what times it for each kind of input.

    Args:
        calls: One call per input set.
        kinds: "cold", "warm" or both.
        error: Its relative error before it was recorded.
        on_gpu: Whether it is recorded in CUDA graphs.
    """

    def __init__(self, calls: list[Callable[[], torch.Tensor]], kinds: list[str], error: float, on_gpu: bool):
        self.error = error
        self._calls = calls
        self._replays = {kind: Replay(calls if kind == "cold" else calls[:1]) for kind in kinds if on_gpu}

    def timer(self, kind: str) -> Callable[[], list[float]]:
        """What times it once."""
        return self._replays[kind].time if self._replays else lambda: time_cpu(self._calls[0])

    def result(self, kind: str) -> torch.Tensor | None:
        """What it computed while it was timed; None on a CPU, where the call that was checked is the one timed."""
        return self._replays[kind].result() if self._replays else None


def get_ready(column: str, of: SetUp, kinds: list[str], device: torch.device) -> Ready:
    """Checks a column on a case, and records it.

    Raises:
        Unsupported: It cannot run the case.
        WrongResult: It runs, and its result is wrong.
    """
    bind = COLUMNS[column].make(of.case, of.mod, device)
    calls = [bind(tensors) for tensors in of.sets]
    error = _check(calls[0](), of)
    return Ready(calls, kinds, error, device.type == "cuda")


def measure(
    case: Case, columns: list[str], kinds: list[str], device: torch.device, meter=None
) -> Iterator[Result | EmptyCell]:
    """Measure one case with every column and kind of input; yields empty cells, then results.

    Args:
        case: The case.
        columns: Names from `columns.COLUMNS`.
        kinds: "cold", "warm" or both.
        device: Where to run.
        meter: A `FloorMeter`; None without a limit.
    """
    of = set_up(case, kinds, device)
    ready: dict[str, Ready] = {}
    if any(COLUMNS[column].compiled for column in columns):
        torch.compiler.reset()  # else the recompile limit is met after a few shapes
    for column in columns:
        try:
            ready[column] = get_ready(column, of, kinds, device)
        except Exception as failure:  # one cell must never end the run: the reason is kept and printed
            for kind in kinds:
                yield EmptyCell(
                    case.label, case.mod, kind, column, reason_of(failure), isinstance(failure, WrongResult)
                )
        if device.type == "cuda":
            torch.cuda.empty_cache()
    results = [_time(of, ready, kind, meter) for kind in kinds]
    for column, of_column in ready.items():
        yield from _check_timed(of, column, of_column, results)
    yield from results


def _time(of: SetUp, ready: dict[str, Ready], kind: str, meter) -> Result:
    """Times all columns that are ready, and the limit, in turn."""
    case, live_bytes = of.case, of.live_kv_bytes
    timers = {column: of_column.timer(kind) for column, of_column in ready.items()}
    config = None
    if meter is not None:
        stream, config = meter.stream(live_bytes, kind)
        timers[LIMIT] = stream.time
        settle(next(iter(timers.values())))
    turns = time_in_turn(timers)
    result = Result(case.label, case.shape, case.mod, kind, live_bytes + case.query_bytes, live_bytes)
    result.floor_config = config
    for name, times_us in turns.items():
        result.turns_us[name] = [statistics.median(times) for times in times_us]
        if name == LIMIT:
            result.floor_us = result.turns_us[name][0]
        else:
            result.times_us[name], result.relative_errors[name] = times_us[0], ready[name].error
    return result


def check_timed(of: SetUp, ready: Ready, kind: str) -> None:
    """Checks what a column computed while it was timed.

    Raises:
        WrongResult: It is wrong.
    """
    output = ready.result(kind)
    if output is not None:
        _check(output, of, " in a CUDA graph")


def _check_timed(of: SetUp, column: str, ready: Ready, results: list[Result]) -> Iterator[EmptyCell]:
    """Checks what a column computed while it was timed; a wrong one is taken out of the results of all inputs."""
    try:
        for result in results:
            check_timed(of, ready, result.inputs)
    except WrongResult as error:
        for result in results:  # what is wrong with one kind of input is not to be trusted with the other
            result.times_us.pop(column)
            yield EmptyCell(result.label, result.mod, result.inputs, column, str(error), wrong=True)


def _relative_error(output: torch.Tensor, expected: torch.Tensor) -> float:
    """`|output - expected| / |expected|` in the Frobenius norm."""
    return float((output.double() - expected).norm() / expected.norm())


def _check(output: torch.Tensor, of: SetUp, where: str = "") -> float:
    if output.shape != of.expected.shape or output.dtype != of.case.torch_dtype:
        raise WrongResult(f"the output{where} is {output.dtype} {list(output.shape)}, not like the query")
    error = _relative_error(output, of.expected)
    if not error <= of.bound:  # written so that NaN fails
        raise WrongResult(f"wrong result{where}: relative error {error:.1e} is over the bound {of.bound:.1e}")
    return error


def _num_sets(case: Case, live_bytes: int, kinds: list[str], device: torch.device) -> int:
    """Input sets that together hold `COLD_BYTES` of live K/V, as far as memory allows; 1 if nothing is cold."""
    if "cold" not in kinds:
        return 1
    whole = case.batch * case.max_len * case.bytes_per_token
    limit = min(MAX_INPUT_BYTES, torch.cuda.mem_get_info(device)[0] // 3)
    affordable = max(limit // whole, -(-COLD_BYTES // whole))
    return min(-(-COLD_BYTES // live_bytes), affordable)


def reason_of(error: Exception) -> str:
    """One line that says why a cell is empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, Unsupported | WrongResult):
        return lines[0]
    return f"{type(error).__name__}: {'; '.join(lines)[:200] or 'no message'}"
