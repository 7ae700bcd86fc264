"""A few random cases in each run, the same ones every time; FLEXDECODE_EXAMPLES and FLEXDECODE_SEED give others.

The process decides what they run on: the generated kernels where `TRITON_INTERPRET=1`, else the torch backend, and the
GPU if there is one.
"""

import os
from dataclasses import replace

import pytest

from flexdecode.runtime import eager
from fuzz.case import Captured, Case
from fuzz.check import check
from fuzz.generate import random_case
from fuzz.runner import run_cases
from fuzz.shrink import failure, shrink

EXAMPLES = {"torch": 400, "interpret": 20, "gpu": 40}
PARTS = 4  # tests that share the examples, for several processes


@pytest.mark.filterwarnings("ignore:All-NaN slice encountered:RuntimeWarning")  # the interpreter's maximum of a row
@pytest.mark.parametrize("part", range(PARTS))
@pytest.mark.parametrize("backend", ["torch", "interpret", pytest.param("gpu", marks=pytest.mark.gpu)])
def test_random_cases(backend, part):
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    if (backend == "interpret") != interpreted:
        pytest.skip(f"{'make test-interpret' if backend == 'interpret' else 'make test-unit'} runs these")
    examples = int(os.environ.get("FLEXDECODE_EXAMPLES", EXAMPLES[backend])) // PARTS
    start = int(os.environ.get("FLEXDECODE_SEED", 0)) + part * examples
    results = run_cases(backend, range(start, start + examples))
    failed = [f"python -m tests.fuzz {r['seed']} --backend {backend}: {r['error']}" for r in results if r["kind"]]
    assert not failed, f"{len(failed)} of {examples} cases failed:\n" + "\n".join(failed[:20])


# --- The fuzzer itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", ["torch", "interpret", "gpu"])
def test_a_case_is_its_own_program(backend):
    for seed in range(100):
        case = random_case(seed, backend)
        assert case == random_case(seed, backend)
        arguments = case.source().split("\n\n", 1)[1].removesuffix("check(case)")
        names = {"Case": Case, "Captured": Captured}
        exec(arguments, names)
        assert names["case"] == case


def test_a_defect_is_found_and_made_small(monkeypatch):
    """A torch backend that takes every length for one more is wrong, and few arguments show it."""

    def longer(inputs, sequences=eager._sequences):
        found = sequences(inputs)
        if inputs.kv_lens is None:
            return found
        if isinstance(found.lens, int):
            return found._replace(lens=min(found.lens + 1, inputs.max_kv_len))
        return found._replace(lens=(found.lens + 1).clamp(max=inputs.max_kv_len))

    monkeypatch.setattr(eager, "_sequences", longer)
    kinds = {r["kind"] for r in run_cases("torch", range(60))}
    assert "AssertionError: out is NaN in the wrong places" in kinds
    case = Case(
        B=3, Hq=4, Hkv=2, Q=2, N=30, kv_lens=(20, 7, 30), score_mod="score + torch.tanh(score) * 0.5", layout="strided",
        sinks="float32", dead=("lengths", "queries"),
    )  # fmt: skip
    small = shrink(case)
    assert failure(small) == failure(case) is not None
    assert (small.B, small.Hq, small.Q, small.score_mod, small.sinks, small.dead) == (1, 1, 1, None, None, ("lengths",))
    with pytest.raises(AssertionError):
        check(small)
    monkeypatch.undo()
    check(small)
    check(replace(small, kv_lens=(small.N,)))
