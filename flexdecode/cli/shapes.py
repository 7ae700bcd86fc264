"""Shapes on the command line: `B=8,Hq=32,Hkv=8,N=32768,D=128`, and the arguments of a call that they stand for."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from .mistakes import Mistake

SHAPE = (
    "B sequences, Hq query heads, Hkv KV heads, N tokens of cache, D columns of a head; also Q query tokens "
    "(default 1), Dv columns of a value (default D)."
)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
KV_DTYPES = DTYPES | {"fp8_e4m3": torch.float8_e4m3fn, "fp8_e5m2": torch.float8_e5m2}
LENGTHS = {"int32": torch.int32, "int64": torch.int64}
MAX_SIZE, MAX_BYTES = (1 << 31) - 1, (1 << 63) - 1  # of a dimension, and of a tensor
_EXAMPLE = "B=8,Hq=32,Hkv=8,N=32768,D=128"


class Shape(NamedTuple):
    """Sizes of a call; `Dv` is 0 where values are as wide as keys."""

    B: int
    Hq: int
    Hkv: int
    N: int
    D: int
    Q: int = 1
    Dv: int = 0


def parse_shape(text: str) -> Shape:
    """Reads a shape.

    Raises:
        Mistake: it has another form.
    """
    sizes: dict[str, int] = {}
    for part in text.split(","):
        name, _, number = (word.strip() for word in part.partition("="))
        if name not in Shape._fields:
            raise _mistake(text, f"{part.strip()!r} is no NAME=NUMBER with a name of {', '.join(Shape._fields)}")
        if not number.isascii() or not number.isdigit() or not 1 <= int(number) <= MAX_SIZE:
            raise _mistake(text, f"{name} must be a number from 1 to {MAX_SIZE}, got {number!r}")
        if name in sizes:
            raise _mistake(text, f"{name} is given twice")
        sizes[name] = int(number)
    missing = [name for name in Shape._fields if name not in sizes and name not in Shape._field_defaults]
    if missing:
        raise _mistake(text, f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing")
    shape = Shape(**sizes)
    if 8 * shape.B * max(shape.Hq * shape.Q, shape.Hkv * shape.N) * max(shape.D, shape.Dv) > MAX_BYTES:
        raise _mistake(text, "these sizes are more than any memory holds")
    return shape


def _mistake(text: str, problem: str) -> Mistake:
    return Mistake(f"--shape {text!r}: {problem}; write for example {_EXAMPLE}")


def choose_dtype(option: str, name: str, known: dict[str, torch.dtype]) -> torch.dtype:
    """The dtype of a short or long name.

    Raises:
        Mistake: the name is not known.
    """
    long = {str(dtype).removeprefix("torch."): dtype for dtype in known.values()}
    found = known.get(name, long.get(name))
    if found is None:
        raise Mistake(f"{option} {name!r}: choose from {', '.join(known)}")
    return found


def make_arguments(
    shape: Shape, dtype: str, kv_dtype: str | None, kv_lens: str | None, page_size: int
) -> dict[str, Any]:
    """The arguments of a call, without memory: query, key and value are on the meta device.

    Args:
        shape: sizes.
        dtype: of the query.
        kv_dtype: of key and value; by default that of the query.
        kv_lens: a length for each sequence, one for all, or `int32` or `int64` for full sequences; None for none.
        page_size: tokens of a page; 0 for a cache without pages.

    Raises:
        Mistake: a word has another form.
    """
    query_dtype = choose_dtype("--dtype", dtype, DTYPES)
    cache_dtype = query_dtype if kv_dtype is None else choose_dtype("--kv-dtype", kv_dtype, KV_DTYPES)
    batch, tokens, paged = shape.B, shape.N, {}
    if page_size > shape.N:
        raise Mistake(f"--page-size {page_size}: a page has at most N = {shape.N} tokens")
    if page_size:
        pages = -(-shape.N // page_size)
        batch, tokens, kv_lens = shape.B * pages, page_size, kv_lens or "int32"
        paged = {"page_table": torch.empty(shape.B, pages, dtype=torch.int32, device="meta")}

    def cache(width: int) -> torch.Tensor:
        return torch.empty(batch, shape.Hkv, tokens, width, dtype=cache_dtype, device="meta")

    given: dict[str, Any] = {
        "query": torch.empty(shape.B, shape.Hq, shape.Q, shape.D, dtype=query_dtype, device="meta"),
        "key": cache(shape.D),
        "value": cache(shape.Dv or shape.D),
    }
    lengths = {} if kv_lens is None else {"kv_lens": _lengths(kv_lens, shape)}
    return given | lengths | paged


def _lengths(text: str, shape: Shape) -> torch.Tensor:
    if text in LENGTHS:
        return torch.full((shape.B,), shape.N, dtype=LENGTHS[text])
    words = [word.strip() for word in text.split(",")]
    if not all(word.isascii() and word.isdigit() for word in words):
        raise Mistake(f"--kv-lens {text!r}: write numbers with commas, or {' or '.join(LENGTHS)} for full sequences")
    if len(words) not in (1, shape.B):
        raise Mistake(f"--kv-lens {text!r}: there are {len(words)} lengths for B = {shape.B} sequences")
    for word in words:
        if int(word) > shape.N:
            raise Mistake(f"--kv-lens {text!r}: a length is at most N = {shape.N}, got {word}")
    return torch.tensor([int(word) for word in words], dtype=torch.int64).expand(shape.B).clone()
