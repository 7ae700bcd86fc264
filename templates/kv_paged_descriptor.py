"""KV loads from pages through tensor descriptors: these functions replace those of `kv_paged.py`.

A page holds a whole number of blocks, so each block is one rectangle in the matrix that kv_descriptor.py describes,
with pages in the place of sequences.
"""

import triton
import triton.language as tl


@triton.jit
def kv_origin(base, b, kv_head, steps):
    """Row and column where one KV head starts in page 0; `steps` are the rows and columns per page, then per head."""
    return kv_head * steps[2], kv_head * steps[3]


@triton.jit
def _rectangle(origin, pages, steps, start_n, PAGE_SIZE: tl.constexpr):
    """Row and column where the keys from `start_n` on lie."""
    page = pages[0].to(tl.int32)
    return origin[0] + page * steps[0] + start_n % PAGE_SIZE, origin[1] + page * steps[1]


@triton.jit
def load_kv(
    cache, pages, start_n, spans, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Loads rows `start_n .. start_n + BLOCK_N` as [BLOCK_N, BLOCK_D]; CHECKED makes zeros of those outside `spans`."""
    block = cache[1].load(_rectangle(cache[0], pages, cache[2], start_n, PAGE_SIZE))
    if CHECKED:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        inside = in_spans(offs_n, spans)  # noqa: F821 (of decode.py)
        block = tl.where(inside[:, None], block, tl.zeros_like(block))
    return block
