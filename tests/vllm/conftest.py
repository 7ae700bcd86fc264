"""Runs a real vLLM on the CPU, in this process; skips this tier with a reason where there is none."""

import os

import pytest

QUIET = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, so that counters and errors can be seen
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # tests run side by side
    "VLLM_LOGGING_LEVEL": "WARNING",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
}
os.environ.update(QUIET)


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path, parent):
    pytest.importorskip("vllm.v1.attention.backend", reason="needs vLLM: `make test-vllm`", exc_type=ImportError)


def pytest_collection_modifyitems(items):
    for item in items:
        item.add_marker(pytest.mark.filterwarnings("ignore"))  # vLLM and what it imports warn of many things


@pytest.fixture(scope="session", autouse=True)
def plugins():
    """What vLLM loads at its start: the entry point of flexdecode."""
    from vllm.plugins import load_general_plugins

    load_general_plugins()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """The folder of a tiny model by its kind; each is made once."""
    from tests.vllm.tiny import save_model

    made = {}

    def folder(kind, **changes):
        key = kind, *changes.items()
        if key not in made:
            made[key] = save_model(kind, tmp_path_factory.mktemp(kind), **changes)
        return made[key]

    return folder
