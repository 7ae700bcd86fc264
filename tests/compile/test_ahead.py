"""Kernels of folders: written without a GPU, launched exactly as Triton launches them, without a compiler."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from flexdecode.triton_api import cuda_headers, has_gluon

HERE = Path(__file__).parent
CALLS = ["plain", "mods", "quantised", "paged", *(["latents"] if has_gluon() else [])]


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """The folder of a `libcuda.so.1` that logs its calls."""
    folder = tmp_path_factory.mktemp("driver")
    subprocess.run(
        ["cc", "-shared", "-fPIC", f"-I{cuda_headers()}", HERE / "fake_driver.c", "-o", folder / "libcuda.so.1"],
        check=True,
    )
    (folder / "libcuda.so").symlink_to("libcuda.so.1")  # Triton 3.5 links it by this name
    return folder


def run(name, folder, way, driver=None, **variables):
    """What `ahead_process.py` prints, and what the driver logged."""
    log = folder.parent / f"{name}-{way}.log"
    log.touch()
    paths = {"LD_LIBRARY_PATH": str(driver), "TRITON_LIBCUDA_PATH": str(driver)} if driver else {}
    known = {"PYTHONPATH": str(HERE.parents[1]), "FAKE_DRIVER_LOG": str(log)}
    command = [sys.executable, str(HERE / "ahead_process.py"), name, str(folder), way]
    done = subprocess.run(command, env=os.environ | known | paths | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout, log.read_text().splitlines()


def without_addresses(lines):
    """Log lines with all addresses numbered in the order in which they occur, because processes differ in them."""
    numbers: dict = {}

    def number(match):
        value = int.from_bytes(bytes.fromhex(match[0]), "little")
        return f"<{numbers.setdefault(value, len(numbers))}>" if 1 << 32 <= value < 1 << 47 else match[0]

    return [re.sub(r"(?<![0-9a-z])[0-9a-f]{16}|(?<=[0-9a-f]{16})[0-9a-f]{16}", number, line) for line in lines]


@pytest.mark.parametrize("name", CALLS)
def test_a_folder_launches_what_triton_launches(name, driver, tmp_path):
    folder = tmp_path / "kernels"
    run(name, folder, "save")
    _, expected = run(name, folder, "triton", driver)
    nothing = {"CC": "false", "TRITON_CACHE_DIR": str(tmp_path / "empty"), "FLEXDECODE_CACHE_DIR": str(tmp_path / "no")}
    _, actual = run(name, folder, "folder", driver, **nothing)
    assert sum("decode_" in line for line in actual) >= 2
    assert without_addresses(actual) == without_addresses(expected)
    assert not (tmp_path / "empty").exists() and not (tmp_path / "no").exists()
