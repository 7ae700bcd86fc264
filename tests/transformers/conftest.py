"""Skips this tier with a reason where transformers is not installed, and registers flexdecode."""

import pytest


@pytest.hookimpl(tryfirst=True)
def pytest_pycollect_makemodule(module_path, parent):
    pytest.importorskip("transformers.masking_utils", reason="needs transformers: `make test-transformers`")


@pytest.fixture(scope="session", autouse=True)
def registered():
    """`attn_implementation="flexdecode"`; transformers says less."""
    import transformers

    from flexdecode.integrations.transformers import register

    transformers.logging.set_verbosity_error()
    register()
