"""The texts of docs/troubleshooting.md that only a compiler raises."""

from unittest import mock

import pytest
from compile import compiling
from compile.compiling import DEVICES, compile_call, meta_inputs

from flexdecode import CompileError
from flexdecode.call.device import DeviceFacts
from flexdecode.errors import SharedMemoryError
from tests.docs.test_troubleshooting import shown

SHAPE = (2, 8, 2, 1, 512, 48)


def check_text(kind, device):
    with pytest.raises(kind) as caught:
        compile_call(device, meta_inputs(*SHAPE))
    text = f"{kind.__name__}: {caught.value}"
    assert text.startswith(shown(kind.__name__)), text
    assert "source: " in text


def test_compile_error():
    with (
        mock.patch.object(compiling, "_compiled", {}),  # another test may have compiled this kernel
        mock.patch("triton.compile", side_effect=OSError("ptxas was killed")),
    ):
        check_text(CompileError, "sm_90")


def test_shared_memory_error(monkeypatch):
    monkeypatch.setitem(DEVICES, "little memory", DeviceFacts("cuda", 90, num_sms=132, shared_memory=1000))
    check_text(SharedMemoryError, "little memory")
