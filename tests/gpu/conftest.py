"""Gives this tier a Triton cache of its own, and refuses the interpreter."""

import os

if os.environ.get("TRITON_INTERPRET") == "1":
    raise RuntimeError("tests/gpu needs Triton's compiler: run it without TRITON_INTERPRET, or `make test-unit`")
os.environ["TRITON_CACHE_DIR"] = os.path.join(os.environ["FLEXDECODE_CACHE_DIR"], "triton")
