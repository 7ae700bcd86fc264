"""KV loads through tensor descriptors (the bulk copy engine of Hopper and later): they replace those of `decode.py`.

A descriptor shows the cache as a matrix whose rows are `stride_n` elements apart. One KV head of one sequence is a
rectangle in it, and the host divides the strides by `stride_n` to find where it starts. So a contiguous
`[B, H, N, D]` cache and a `[B, N, H, D]` cache both need one two-dimensional descriptor.
"""

import triton
import triton.language as tl


@triton.jit
def kv_origin(base, b, kv_head, steps):
    """Row and column where the rows of one KV head start; `steps` are the rows and columns per b, then per head."""
    return b * steps[0] + kv_head * steps[2], b * steps[1] + kv_head * steps[3]


@triton.jit
def _rectangle(origin, pages, steps, start_n, PAGE_SIZE: tl.constexpr):
    """Row and column where the keys from `start_n` on lie."""
    return origin[0] + start_n, origin[1]


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
