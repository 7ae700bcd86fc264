"""The demonstration: decode steps timed, then attention of your own with its check, its report and its picture.

python -m benchmarks.demo
"""

import contextlib
import io
import os
import pathlib
import re
import shutil
import sys

import torch

import flexdecode
from flexdecode.reference import reference_decode

from . import my_mod, performance_matrix, table
from .report import XFORMERS

OUT = pathlib.Path("flexdecode-results")
MODS = pathlib.Path(my_mod.__file__)
PICTURE = "explain.png"
SMALL = ["--rows", "Mkv=(256|2048|16384|131072) .*Hkv=2", "--dtypes", "fp16,fp32", "--no-picture"]  # on a CPU


def main() -> int:
    """Runs the demonstration; returns 1 if a result was wrong, else 0."""
    print(f"flexdecode {flexdecode.__version__}\n")
    right = _matrix()
    right &= _own_mod()
    _explain()
    script = OUT / MODS.name
    kept = script.exists() and script.read_text() != MODS.read_text()
    if not kept:
        shutil.copy(MODS, script)
    print(f"\n4. Written\n\n{_indented(_written(kept))}")
    python = os.path.relpath(sys.executable) if pathlib.Path(sys.executable).is_relative_to(os.getcwd()) else "python"
    print(f"\nNext: change the functions in {script}, and run them:\n\n   {python} {script}")
    return int(not right)


def _matrix() -> bool:
    """Times decode steps, and shows the times."""
    print(f"1. One decode step, at shapes of xformers' flash-decoding benchmark\n   {XFORMERS}\n")
    if torch.cuda.is_available():
        return performance_matrix.main(["--out", str(OUT)]) == 0
    print("   This machine has no GPU, so the shapes are scaled down, and flexdecode computes by PyTorch operations.")
    print("   The times show that it works. They say nothing about its speed on a GPU.\n")
    with contextlib.redirect_stdout(io.StringIO()):
        documents = performance_matrix.run(performance_matrix.parse(["--out", str(OUT), *SMALL]))
    print(_indented(table.short_table(documents["matrix"])))
    return not performance_matrix.has_failed(documents)


def _own_mod() -> bool:
    """Shows a mod, and compares its result with the reference."""
    text = MODS.read_text()
    print(
        f"\n2. Attention of your own\n\n{_indented(text[text.index('slopes =') : text.index('if __name__')].strip())}\n"
    )
    tensors = my_mod.query, my_mod.key, my_mod.value, my_mod.score_mod, my_mod.mask_mod
    out = flexdecode.flex_decode(*tensors, kv_lens=my_mod.kv_lens)
    expected = reference_decode(*tensors, kv_lens=my_mod.kv_lens)
    error = float((out.cpu() - expected.cpu()).abs().max())
    right = error < 1e-5
    print("   The reference calls the functions at every single pair of query and key, in float64.")
    print(f"   Largest difference: {error:.1e}. " + ("The result is right." if right else "THE RESULT IS WRONG."))
    return right


def _explain() -> None:
    """Prints what the call does, and draws it if matplotlib is there."""
    on_gpu = torch.cuda.is_available()
    found = flexdecode.explain(
        my_mod.query, my_mod.key, my_mod.value, my_mod.score_mod, my_mod.mask_mod, kv_lens=my_mod.kv_lens,
        device=None if on_gpu else "H200",
    )  # fmt: skip
    print(f"\n3. What this call does{'' if on_gpu else ' on an H200'}, by flexdecode.explain\n")
    print(_indented(_short(str(found))))
    print("\n   docs/explain.md explains each line. The graphs of the two functions are left out here.")
    with contextlib.suppress(ImportError):
        found.save_picture(OUT / PICTURE)


def _short(report: str) -> str:
    """A report without the graphs of the mods."""
    return re.sub(r"\n  graph\n(?:    .*\n?)+", "\n", report)


def _written(kept: bool) -> str:
    """The files in the folder of results, and what they hold; `kept`: whether the user has changed the mod."""
    own = "your own mods, from before: kept" if kept else "the mod, ready to run and to change"
    lines = []
    for path in sorted(OUT.iterdir()):
        holds = {PICTURE: "which blocks of the cache the mod reads", MODS.name: own}
        is_times = path.name.startswith("matrix")
        if is_times or path.name in holds:
            lines.append(f"{path!s:40}  {'the times' if is_times else holds[path.name]}")
    return "\n".join(lines)


def _indented(text: str) -> str:
    return "\n".join(f"   {line}".rstrip() for line in text.splitlines())


if __name__ == "__main__":
    sys.exit(main())
