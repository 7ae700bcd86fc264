"""Builds and imports the C helper, `launcher.c`."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from types import ModuleType

from ..errors import CompileError, KernelFolderError
from ..switch import check_allowed
from ..triton_api import cuda_headers

_MODULE = "flexdecode_launcher"


def system() -> str:
    """Operating system and processor."""
    return f"{platform.system()} {platform.machine()}"


def build_launcher() -> bytes:
    """Compiles the C helper for this kind of system. Neither a GPU nor its driver is needed.

    Returns:
        A shared object. It links nothing but libc, and serves CPython 3.10 and later.

    Raises:
        CompileError: there is no C compiler or no header of Python, or it failed.
    """
    check_allowed("the launcher of a folder of kernels", "", "Call flexdecode.allow_compilation() to write a folder.")
    compiler = os.environ.get("CC") or next(filter(None, map(shutil.which, ("cc", "gcc", "clang"))), None)
    if compiler is None:
        raise CompileError("a folder of kernels needs a C compiler: install gcc, or name one by the variable CC")
    source = Path(__file__).with_name("launcher.c")
    includes = [sysconfig.get_path("include"), sysconfig.get_path("platinclude"), str(cuda_headers())]
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder) / "launcher.so"
        command = [compiler, "-std=gnu11", "-O2", "-shared", "-fPIC", *(f"-I{place}" for place in includes)]
        try:
            done = subprocess.run([*command, str(source), "-o", str(made), "-ldl"], capture_output=True, text=True)
        except OSError as error:
            raise CompileError(f"the C compiler {compiler} cannot be started: {error.strerror}") from None
        if done.returncode or not made.exists():
            reason = next((line for line in done.stderr.splitlines() if "error" in line), done.stderr.strip())
            raise CompileError(f"the C compiler {compiler} did not compile {source}: {reason}")
        return made.read_bytes()


_imported: dict[str, ModuleType] = {}  # by checksum: folders of one version have the same helper


def import_launcher(path: Path, checksum: str) -> ModuleType:
    """Imports a C helper.

    Raises:
        KernelFolderError: this Python cannot import it.
    """
    if checksum not in _imported:
        if sysconfig.get_config_var("Py_GIL_DISABLED"):
            raise KernelFolderError(
                f"the launcher of {path.parent} needs a Python with a global interpreter lock, and this one has none"
            )
        loader = importlib.machinery.ExtensionFileLoader(_MODULE, str(path))
        spec = importlib.util.spec_from_loader(_MODULE, loader)
        assert spec is not None
        try:
            module = importlib.util.module_from_spec(spec)
        except ImportError as error:
            raise KernelFolderError(
                f"the launcher of {path.parent} does not work on this system ({error}): write the folder on one like it"
            ) from None
        loader.exec_module(module)
        _imported[checksum] = module
    return _imported[checksum]
