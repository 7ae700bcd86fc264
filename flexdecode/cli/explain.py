"""`flexdecode explain`: what a call reads, checks and launches."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import torch
import typer

import flexdecode

from .mods import MODS, load_mods
from .shapes import SHAPE, make_arguments, parse_shape

WITHOUT_GPU = "H200"  # the device of the report on a machine without a GPU: its bandwidth was measured
EXAMPLES = (
    'flexdecode explain "mods:sliding_window(1024)" --shape B=8,Hq=32,Hkv=8,N=32768,D=128 --device H100',
    "flexdecode explain my_mods.py:alibi my_mods.py:window --shape B=1,Hq=8,Hkv=2,N=4096,D=64 --html step.html",
)


def explain(
    mods: Annotated[list[str] | None, typer.Argument(metavar="FILE:MOD", help=MODS)] = None,
    *,
    shape: Annotated[str, typer.Option(help=SHAPE)],
    device: Annotated[
        str | None, typer.Option(help=f"H100, H200, A100, B200, MI300X or cuda. Default: cuda, else {WITHOUT_GPU}.")
    ] = None,
    dtype: Annotated[str, typer.Option(help="Of the query: fp16, bf16 or fp32.")] = "bf16",
    kv_dtype: Annotated[str | None, typer.Option(help="Of the cache: also fp8_e4m3, fp8_e5m2.")] = None,
    kv_lens: Annotated[str | None, typer.Option(help="Live keys: 8192, or 8192,700,... Default: N.")] = None,
    page_size: Annotated[int, typer.Option(min=0, help="Tokens of a page; 0: the cache has no pages.")] = 0,
    score_mod: Annotated[str | None, typer.Option(metavar="FILE:MOD", help="A mod that is a score_mod.")] = None,
    mask_mod: Annotated[str | None, typer.Option(metavar="FILE:MOD", help="A mod that is a mask_mod.")] = None,
    png: Annotated[Path | None, typer.Option(help="Draw the blocks here; also .svg and .pdf.")] = None,
    html: Annotated[Path | None, typer.Option(help="Write report and picture here, as one file.")] = None,
) -> None:
    """Says what a call reads, checks and launches. Nothing is compiled, and no GPU is needed."""
    score, mask = load_mods(mods or (), score_mod, mask_mod)
    call = make_arguments(parse_shape(shape), dtype, kv_dtype, kv_lens, page_size)
    chosen = device or ("cuda" if torch.cuda.is_available() else WITHOUT_GPU)
    found = flexdecode.explain(score_mod=score, mask_mod=mask, device=chosen, **call)
    if png is not None:
        found.save_picture(png)
    if html is not None:
        found.save_page(html)
    typer.echo(str(found))
    if device is None and chosen == WITHOUT_GPU:
        typer.echo(f"\nThere is no GPU here, so this is for {WITHOUT_GPU}. `--device` names another one.")
