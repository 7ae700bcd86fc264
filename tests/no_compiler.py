"""Replaces Triton's compiler and the C compiler by failures."""

import contextlib
from unittest import mock

import triton
import triton.compiler
import triton.runtime.build

from flexdecode.ahead import helper
from flexdecode.codegen import kernels


def _fails(*arguments, **keywords):
    raise AssertionError("a compiler was started")


@contextlib.contextmanager
def no_compiler():
    """Whoever starts a compiler, or any other process, fails."""
    places = (
        (triton, "compile"),
        (triton.compiler, "compile"),
        (triton.runtime.build, "_build"),
        (kernels, "compile_pass"),
        (helper, "build_launcher"),
    )
    with contextlib.ExitStack() as stack:
        for place, name in places:
            stack.enter_context(mock.patch.object(place, name, _fails))
        stack.enter_context(mock.patch("subprocess.Popen", _fails))
        yield
