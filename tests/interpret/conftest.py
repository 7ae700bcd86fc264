"""Runs this tier under Triton's interpreter, which Triton chooses when it is imported."""

import os
import sys

if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError(
        "Triton was imported without TRITON_INTERPRET=1 before tests/interpret was collected. "
        "Run this tier in a process of its own: `TRITON_INTERPRET=1 pytest tests/interpret`, or `make test-interpret`."
    )
os.environ["TRITON_INTERPRET"] = "1"

from fast_interpreter import install

install()
