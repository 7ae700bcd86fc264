"""The benchmark of decode steps, at sizes for a CPU: everything but the times."""

import pytest
import torch
import transformers

from benchmarks.recorded import check
from benchmarks.transformers_decode import (
    STEPS,
    Setting,
    Widths,
    compare_tokens,
    in_float64,
    main,
    markdown,
    record_step,
)

pytestmark = pytest.mark.skipif(
    not hasattr(transformers.AttentionInterface, "get_interface"),
    reason="in this transformers, models call eager attention by another way than the one that is recorded",
)
TINY = Setting(
    "cpu", torch.float32, Widths(64, 4, 2, 16), Widths(64, 4, 2, 32), 2, batch=3, context=200, shortest=50, window=32
)


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.case)
def test_all_implementations_compute_the_same(step):
    for implementation in ("flexdecode", *step.others):
        if implementation == "flex_attention":
            continue  # it compiles
        layers = record_step(TINY, step, implementation)
        assert len(layers) == TINY.layers
        with torch.no_grad():
            for layer in layers:
                check(layer.call(), in_float64(TINY, step, layer))
    N = layers[0].key.shape[2]
    assert (TINY.window if step.cache == "cropped" else TINY.context) == N


def test_tokens():
    compare_tokens(TINY, num_tokens=16)


def test_page():
    record = {
        "case": "a step", "times_us": [2.0, 1.0, 3.0], "against": "sdpa", "other_us": 5.0, "at_least": 2.0,
        "bar_us": 2.5, "transformers": "5.24.0",
    }  # fmt: skip
    plain = record | {"case": STEPS[0].case, "other_us": 8.0, "bar_us": 4.0}
    document = {"environment": {"hardware": "a GPU, 1 SM"}, "results": [plain, record]}
    assert "equal lengths is 4.00 times as fast as with sdpa." in markdown(document)
    assert "| a step | 2.0 | sdpa, 5.0 us | 2.50 | 2.0 |" in markdown(document)
    assert "Nothing: every step reaches its goal." in markdown(document)
    record["at_least"] = 3.0
    assert "- a step: 2.50 times as fast as with sdpa, not 3.0." in markdown(document)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys):
    with pytest.raises(SystemExit):
        main([])
    assert "this measures a GPU, and torch sees none" in capsys.readouterr().err
