"""`flexdecode bench`: the performance matrix of `benchmarks/`."""

from __future__ import annotations

import importlib
import importlib.util
import json
import re
import shutil
import sys
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

import flexdecode

from .mistakes import Mistake

EXAMPLES = (
    "flexdecode bench --rows 6 --mods none,alibi --peers naive,sdpa --dtypes bf16 --json matrix.json --plot matrix.png",
)


def bench(
    rows: Annotated[
        str | None, typer.Option(help="6, 6:12, or a regular expression on the label. Default: all 60.")
    ] = None,
    mods: Annotated[str, typer.Option(help="Names with commas; a wrong one lists them.")] = "none",
    peers: Annotated[str | None, typer.Option(help="Columns beside flexdecode; a wrong one lists them.")] = None,
    dtypes: Annotated[str, typer.Option(help="Of fp16,bf16,fp32.")] = "fp16,bf16,fp32",
    inputs: Annotated[str | None, typer.Option(help="warm, cold or both. Default: cold on a GPU, else warm.")] = None,
    sizes: Annotated[str | None, typer.Option(help="full or small. Default: full on a GPU, else small.")] = None,
    device: Annotated[str | None, typer.Option(help="cuda or cpu. Default: cuda if there is one.")] = None,
    window: Annotated[int, typer.Option(min=1, help="Keys that the mod sliding_window sees.")] = 1024,
    out: Annotated[Path, typer.Option(help="Folder of the results.")] = Path("flexdecode-results"),
    json_file: Annotated[Path | None, typer.Option("--json", help="Write the record here, too.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw here, too (.png); other mods and dtypes beside it.")] = None,
) -> int:
    """Measures flexdecode and its peers: progress, tables, means, files. On a CPU the shapes are small.

    The exit status is 1 if flexdecode itself failed on a row.
    """
    matrix = load_benchmark("performance_matrix")
    words = _words(matrix, mods, peers, dtypes)
    words |= {"inputs": _one_of("inputs", inputs, ("warm", "cold", "both")), "rows": rows, "window": str(window)}
    words |= {"sizes": _one_of("sizes", sizes, ("full", "small")), "out": str(out)}
    words |= {"device": _one_of("device", device, ("cuda", "cpu"))}
    _check_device(device, inputs)
    _check_rows(matrix, rows, words["dtypes"])
    _check_files(json_file, plot)
    status = matrix.main([f"--{name}={word}" for name, word in words.items() if word is not None])
    if json_file is not None:
        shutil.copyfile(out / "matrix.json", json_file)
    if plot is not None:
        _draw(out / "matrix.json", plot)
    return status


def load_benchmark(name: str) -> Any:
    """Imports a module of `benchmarks/`: inside the installed package, or next to it in a source checkout.

    Raises:
        Mistake: neither place has it.
    """
    package = Path(flexdecode.__file__).resolve().parent
    for folder in (package / "benchmarks", package.parent / "benchmarks"):
        if (folder / "performance_matrix.py").is_file():
            _load_package(folder)
            return importlib.import_module(f"flexdecode.benchmarks.{name}")
    raise Mistake("the benchmarks are missing: the installation is damaged, install it again")


def _load_package(folder: Path) -> None:
    """Makes a folder the package `flexdecode.benchmarks`, so that no other `benchmarks` is taken for it."""
    name = "flexdecode.benchmarks"
    if name not in sys.modules:
        places = [str(folder)]
        spec = importlib.util.spec_from_file_location(name, folder / "__init__.py", submodule_search_locations=places)
        assert spec is not None and spec.loader is not None
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])


def _words(matrix: Any, mods: str, peers: str | None, dtypes: str) -> dict[str, str | None]:
    """The lists of the command line, checked."""
    ours, *others = matrix.COLUMNS
    columns = None if peers is None else ",".join([ours, *_names("peers", peers, others)])
    chosen = [matrix.SHORT_DTYPES.get(name, name) for name in dtypes.split(",")]
    return {
        "mods": ",".join(_names("mods", mods, matrix.MODS)),
        "dtypes": ",".join(_names("dtypes", ",".join(chosen), matrix.DTYPES)),
        "columns": columns,
    }


def _names(option: str, text: str, known: Any) -> list[str]:
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in known:
            raise Mistake(f"--{option} {name!r}: choose from {', '.join(known)}")
    return list(dict.fromkeys(names))


def _one_of(option: str, name: str | None, known: tuple[str, ...]) -> str | None:
    return name if name is None else _names(option, name, known)[0]


def _check_device(device: str | None, inputs: str | None) -> None:
    has_gpu = torch.cuda.is_available()
    if device == "cuda" and not has_gpu:
        raise Mistake("--device cuda: PyTorch finds no GPU")
    if inputs in ("cold", "both") and (device == "cpu" or not has_gpu):
        raise Mistake(f"--inputs {inputs}: cold inputs are measured on a GPU; a run on a CPU has warm ones")


def _check_rows(matrix: Any, rows: str | None, dtypes: str | None) -> None:
    try:
        matrix.select_rows(matrix.load_rows(), rows, (dtypes or "").split(","))
    except re.error as error:
        raise Mistake(f"--rows {rows!r} is no number, no range and no regular expression: {error}") from None


def _check_files(json_file: Path | None, plot: Path | None) -> None:
    """Refuses before the run, which may be long, what could not be written after it."""
    for option, path in (("json", json_file), ("plot", plot)):
        if path is not None and not path.absolute().parent.is_dir():
            raise Mistake(f"--{option} {path}: there is no folder {path.parent}")
    if plot is not None and plot.suffix.lower() != ".png":
        raise Mistake(f"--plot {plot}: the name must end in .png")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise Mistake("--plot needs matplotlib: pip install 'flexdecode[bench]'")


def _draw(record: Path, plot: Path) -> None:
    document = json.loads(record.read_text())
    if not document["results"]:
        raise Mistake(f"--plot {plot}: the run has no result to draw; {record} says why")
    load_benchmark("figure").draw_all(document, plot)
