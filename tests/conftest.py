"""Shared by all tiers: an empty kernel cache, the GPU skip, and the guard that keeps the tiers apart."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import settings

# Set before anything imports flexdecode, so that no test reads or writes the user's own cache.
_cache_dir = tempfile.TemporaryDirectory(prefix="flexdecode-tests-")
os.environ["FLEXDECODE_CACHE_DIR"] = _cache_dir.name
# Inductor would start as many processes as there are processors in every worker, and keep what others compiled.
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"
os.environ["TORCHINDUCTOR_CACHE_DIR"] = os.path.join(_cache_dir.name, "inductor")

# No deadline: the first example of a test pays for imports and compilation. Fixed examples where CI is set.
settings.register_profile("flexdecode", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("flexdecode")

_TESTS = Path(__file__).parent
_MIXED_TIERS = pytest.StashKey[bool]()


def pytest_collection_modifyitems(config, items):
    """Note whether interpreted and compiled kernels are mixed, and skip the `gpu` tests where there is no GPU."""
    tiers = {item.path.relative_to(_TESTS).parts[0] for item in items if item.path.is_relative_to(_TESTS)}
    config.stash[_MIXED_TIERS] = "interpret" in tiers and bool(tiers & {"compile", "gpu"})
    gpu_items = [item for item in items if item.get_closest_marker("gpu")]
    if gpu_items:
        import torch

        if not torch.cuda.is_available():
            for item in gpu_items:
                item.add_marker(pytest.mark.skip(reason="needs a CUDA GPU"))


def pytest_runtest_setup(item):
    """Fail where tiers are mixed; here and not at collection, because pytest-xdist would lose the message."""
    if item.config.stash[_MIXED_TIERS]:
        pytest.fail(
            "tests/interpret cannot share a process with tests/compile or tests/gpu, because Triton reads "
            "TRITON_INTERPRET when it is imported. Run one tier at a time, or all of them with `make test`.",
            pytrace=False,
        )


def pytest_unconfigure(config):
    """Remove the cache of this run."""
    _cache_dir.cleanup()
