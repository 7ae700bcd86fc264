"""Packed queries through the generated kernels: every cache, mod and schedule, and the grids of others."""

import itertools

import packed_cases as cases
import pytest

from flexdecode import DecodeOptions

SCHEDULES = {
    "default": DecodeOptions(backend="triton"),
    "splits": DecodeOptions(backend="triton", num_splits=3, block_n=16),
    "balanced": DecodeOptions(backend="triton", schedule="balanced", num_splits=5, block_n=16),
    "invariant": DecodeOptions(backend="triton", batch_invariant=True),
}
TURNS = list(zip(cases.GRID, itertools.cycle(SCHEDULES), strict=False))


@pytest.mark.parametrize(("case", "schedule"), TURNS, ids=[f"{case.name}-{name}" for case, name in TURNS])
def test_grid(case, schedule):
    cases.check_case(case, options=SCHEDULES[schedule])
