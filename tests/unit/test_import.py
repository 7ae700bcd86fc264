"""`import flexdecode` takes little beyond torch: below 0.2 s, and nothing that only some programs need."""

import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

import flexdecode

ROOT = Path(__file__).resolve().parents[2]
RUNS = 5  # the fastest one counts, because the machine may be busy
HEAVY = (
    "sympy", "matplotlib", "transformers", "vllm", "rich", "hypothesis", "numpy.testing", "triton", "torch._inductor",
    "torch._dynamo", "torch.fx.experimental.symbolic_shapes", "flexdecode.report", "flexdecode.reference",
    "flexdecode.integrations.drop_in", "flexdecode.integrations.transformers", "flexdecode.codegen.writer",
)  # fmt: skip


def python(code, **variables):
    """What code prints in a fresh process."""
    paths = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = [sys.executable, "-c", textwrap.dedent(code)]
    known = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    done = subprocess.run(command, env=known | {"PYTHONPATH": paths} | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_brings_nothing_heavy():
    names = python(
        """
        import sys, torch
        before = set(sys.modules)
        import flexdecode
        print(*set(sys.modules) - before)
        """
    ).split()
    found = [name for name in names if any(name == heavy or name.startswith(heavy + ".") for heavy in HEAVY)]
    assert "flexdecode.api" in names and found == []


def test_import_takes_less_than_a_fifth_of_a_second(tmp_path):
    code = """
        import time, torch
        start = time.process_time()
        import flexdecode
        print(time.process_time() - start)
        """
    seconds = [float(python(code, PYTHONPYCACHEPREFIX=str(tmp_path))) for _ in range(RUNS)]
    assert min(seconds) < 0.2, seconds


@pytest.mark.parametrize("name", flexdecode.__all__)
def test_every_public_name_is_there(name):
    assert getattr(flexdecode, name) is not None


def test_other_names_are_missing_as_usual():
    with pytest.raises(AttributeError, match="module 'flexdecode' has no attribute 'nothing'"):
        _ = flexdecode.nothing
    with pytest.raises(AttributeError, match=r"module 'flexdecode\.integrations' has no attribute 'nothing'"):
        _ = flexdecode.integrations.nothing
