"""The switch that turns compilations into errors."""

import pytest
import torch

import flexdecode
from flexdecode import CompilationForbiddenError, CompileError, allow_compilation, forbid_compilation, switch
from flexdecode.switch import check_allowed, is_forbidden


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    monkeypatch.delenv("FLEXDECODE_NO_COMPILE", raising=False)
    monkeypatch.setattr(switch, "_chosen", None)


def test_compilation_is_allowed_at_first():
    assert not is_forbidden()
    check_allowed("a kernel", "", "")


def test_as_functions_the_switches_stay():
    forbid_compilation()
    assert is_forbidden()
    allow_compilation()
    assert not is_forbidden()


def test_as_context_managers_they_restore_what_was():
    with forbid_compilation():
        assert is_forbidden()
        with allow_compilation():
            assert not is_forbidden()
        assert is_forbidden()
    assert not is_forbidden()
    with pytest.raises(KeyError), forbid_compilation():
        raise KeyError
    assert not is_forbidden()


def test_the_environment(monkeypatch):
    monkeypatch.setenv("FLEXDECODE_NO_COMPILE", "1")
    assert is_forbidden()
    with allow_compilation():
        assert not is_forbidden()
    assert is_forbidden()
    monkeypatch.setenv("FLEXDECODE_NO_COMPILE", "0")
    assert not is_forbidden()


def test_the_error_names_kernel_signature_and_remedy():
    with forbid_compilation(), pytest.raises(CompilationForbiddenError) as caught:
        check_allowed("decode_split", "query float16, D 128", "Write it ahead of time.")
    assert isinstance(caught.value, CompileError)
    assert str(caught.value) == (
        "decode_split would have to be compiled, and compilation is forbidden: it is neither in memory nor in a loaded "
        "folder\n  signature: query float16, D 128\n  Write it ahead of time."
    )


def test_the_torch_backend_needs_no_compiler():
    query, key = torch.ones(1, 2, 1, 16), torch.ones(1, 1, 8, 16)
    with forbid_compilation():
        assert flexdecode.flex_decode(query, key, key).shape == (1, 2, 1, 16)
