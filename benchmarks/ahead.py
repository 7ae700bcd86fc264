"""Milliseconds from a fresh process to the first decode: kernels of a folder, against kernels in the store.

`import torch, triton, flexdecode`, CUDA's start and the making of the tensors are not counted. An earlier process has
compiled the kernels in both cases. Needs a GPU.

python benchmarks/ahead.py
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

PROCESSES, CALLS = 5, 2000


def make_call() -> tuple[tuple, dict[str, Any]]:
    """The call that is measured: ALiBi and a window over ragged lengths."""
    import torch

    from flexdecode import mods

    query = torch.randn(4, 32, 1, 128, dtype=torch.bfloat16, device="cuda")
    key, value = (torch.randn(4, 8, 8192, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    lens = torch.tensor([8192, 6000, 3500, 700], dtype=torch.int32, device="cuda")
    return (query, key, value, mods.alibi(32, device="cuda"), mods.sliding_window(4096)), {"kv_lens": lens}


def child(folder: str, way: str) -> None:
    """Writes the folder, or prints milliseconds of `load` and of the first call, and microseconds of a later one."""
    import torch
    import triton  # noqa: F401 (its import is not counted)

    import flexdecode

    arguments, keywords = make_call()
    if way == "save":
        flexdecode.save_kernels(folder, *arguments, **keywords)
        return
    torch.cuda.synchronize()
    start = time.perf_counter()
    if way == "load":
        flexdecode.load(folder)
        flexdecode.forbid_compilation()
    loaded = time.perf_counter()
    flexdecode.flex_decode(*arguments, **keywords)
    torch.cuda.synchronize()
    first = time.perf_counter()
    for i in range(CALLS):
        flexdecode.flex_decode(*arguments, **keywords)
        if i % 100 == 99:
            torch.cuda.synchronize()
    later = time.perf_counter()
    print(1e3 * (loaded - start), 1e3 * (first - loaded), 1e6 * (later - first) / CALLS)


def main() -> None:
    """Prints medians over several processes."""
    with tempfile.TemporaryDirectory() as made:
        folder = str(Path(made) / "kernels")
        known = os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])}
        stores = known | {"TRITON_CACHE_DIR": f"{made}/triton", "FLEXDECODE_CACHE_DIR": f"{made}/flexdecode"}
        command = [sys.executable, __file__, "--child", folder]
        subprocess.run([*command, "save"], env=stores, check=True)
        subprocess.run([*command, "store"], env=stores, check=True, capture_output=True)
        print(f"{'':24}load ms  first decode ms  later us per call")
        empty = known | {"TRITON_CACHE_DIR": f"{made}/none", "FLEXDECODE_CACHE_DIR": f"{made}/none", "CC": "false"}
        for way, label, environment in (("load", "folder", empty), ("store", "kernels in the store", stores)):
            shown = [
                subprocess.run([*command, way], env=environment, check=True, capture_output=True, text=True).stdout
                for _ in range(PROCESSES)
            ]
            columns = zip(*(map(float, line.split()) for line in shown), strict=True)
            load, first, later = map(statistics.median, columns)
            print(f"{label:24}{load:7.1f}  {first:15.1f}  {later:17.1f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measures the time to the first decode.")
    parser.add_argument("--child", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    given = parser.parse_args()
    child(*given.child) if given.child else main()
