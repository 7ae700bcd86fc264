"""`flexdecode compile`: kernels for another machine, compiled without a GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

import flexdecode

from .cache import size_text
from .mods import MODS, load_mods
from .shapes import SHAPE, make_arguments, parse_shape

EXAMPLES = (
    'flexdecode compile "mods:sliding_window(1024)" --shape B=8,Hq=32,Hkv=8,N=32768,D=128 --kv-lens int32 '
    "--device H100 -o kernels",
)


def compile_kernels(
    mods: Annotated[list[str] | None, typer.Argument(metavar="FILE:MOD", help=MODS)] = None,
    *,
    shapes: Annotated[list[str], typer.Option("--shape", "--shapes", help=f"{SHAPE} May be given again.")],
    device: Annotated[str, typer.Option(help="H100, H200, A100, B200, MI300X or cuda.")],
    output: Annotated[Path, typer.Option("-o", "--output", help="The folder; what it has stays.")],
    dtype: Annotated[str, typer.Option(help="Of the query: fp16, bf16 or fp32.")] = "bf16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache: also fp8_e4m3, fp8_e5m2.")] = None,
    kv_lens: Annotated[
        str | None, typer.Option(help="int32 or int64 if the call will have lengths; their dtype is part of a kernel.")
    ] = None,
    page_size: Annotated[int, typer.Option(min=0, help="Tokens of a page; 0: the cache has no pages.")] = 0,
    return_lse: Annotated[bool, typer.Option("--return-lse", help="For calls with return_lse=True.")] = False,
    score_mod: Annotated[str | None, typer.Option(metavar="FILE:MOD", help="A mod that is a score_mod.")] = None,
    mask_mod: Annotated[str | None, typer.Option(metavar="FILE:MOD", help="A mod that is a mask_mod.")] = None,
) -> None:
    """Compiles the kernels of calls into a folder. The machine that runs them needs no compiler."""
    score, mask = load_mods(mods or (), score_mod, mask_mod)
    calls = [make_arguments(parse_shape(shape), dtype, kv_dtype, kv_lens, page_size) for shape in shapes]
    more = {"return_lse": True} if return_lse else {}
    for shape, call in zip(shapes, calls, strict=True):
        tensors = (call.pop(name) for name in ("query", "key", "value"))
        saved = flexdecode.save_kernels(output, *tensors, score, mask, device=device, **call, **more)
        typer.echo("\n".join([shape, *(_describe(kernel) for kernel in saved)]))
    typer.echo(f"In {output}")


def _describe(kernel: Any) -> str:
    """A line about a record of `save_kernels`."""
    if not kernel.files:
        return f"  {kernel.kernel:<15} did not compile; another kernel takes its place"
    state = "was there" if kernel.was_there else "compiled"
    return f"  {kernel.kernel:<15} {size_text(kernel.num_bytes):>9}  {state:<9}  {kernel.files[0].name}"
