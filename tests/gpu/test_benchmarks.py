"""The matrix on a GPU: columns and the limit are recorded in CUDA graphs, checked in them, and timed in turn."""

import pytest
import torch

from benchmarks.cases import Case
from benchmarks.floor import FloorMeter
from benchmarks.measure import Result, measure

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")
CASES = [
    Case("plain", (1024, 1024), 8, 2, 128),
    Case("window", (4096, 4096), 8, 2, 128, mod="sliding_window", window=256),
    Case("ragged", (2000, 17, 900), 8, 2, 128),
    Case("pages", (2000, 17, 900), 8, 2, 128, page_size=16),
    Case("stored", (1024, 1024), 8, 2, 128, cache_dtype="float8_e4m3fn"),
    Case("latent", (1024, 1024), 16, 1, 576, latent_dim=512),
    Case("packed", (1024, 900), 8, 2, 128, mod="causal", q_lens=(1, 7)),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.label)
def test_a_case_is_measured(case):
    cold, warm = measure(case, ["flexdecode"], ["cold", "warm"], GPU, FloorMeter(GPU))
    for result in (cold, warm):
        assert isinstance(result, Result), result
        assert len(result.turns_us["flexdecode"]) == len(result.turns_us["limit"]) == 2
        assert result.floor_us == min(result.turns_us["limit"]) > 0
        assert result.median_us("flexdecode") == result.turns_us["flexdecode"][0] > 0
