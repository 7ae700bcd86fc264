"""The first call of a process: the kernels that another process compiled are found on disk."""

import pytest

from benchmarks import first_call

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("case", first_call.CASES)
def test_another_process_finds_the_kernels(case):
    """`measure` refuses a process that compiled them again."""
    times = first_call.measure(case)
    assert times["disk"] < times["second"] and times["disk"] < times["cold"]
