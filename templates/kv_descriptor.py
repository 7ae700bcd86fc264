"""KV loads through tensor descriptors (the bulk copy engine of Hopper and later): they replace those of `decode.py`.

A descriptor shows the cache as a matrix whose rows are `stride_n` elements apart. One KV head of one sequence is a
rectangle in it, and the host divides the strides by `stride_n` to find where it starts. So a contiguous
`[B, H, N, D]` cache and a `[B, N, H, D]` cache both need one two-dimensional descriptor. In a paged cache each block
is a rectangle: its pages hold a whole number of blocks.
"""

import triton
import triton.language as tl
from decode import in_spans, owner, rectangle


@triton.jit
def kv_start(base, b, kv_head, steps):
    """Row and column where one KV head starts; `steps` are the rows and columns per sequence, then per head."""
    rows_of_b, columns_of_b, rows_of_head, columns_of_head = steps
    b = owner(b)
    return b * rows_of_b + kv_head * rows_of_head, b * columns_of_b + kv_head * columns_of_head


@triton.jit
def load_kv(
    cache, block, spans, COLUMN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Loads the rows of a block as [BLOCK_N, COLUMNS]; CHECKED replaces rows outside `spans` by zeros."""
    loaded = cache.descriptor.load(rectangle(cache.start, block, cache.steps, C))
    if CHECKED:
        inside = in_spans(block.start_n + tl.arange(0, C.BLOCK_N), spans)
        loaded = tl.where(inside[:, None], loaded, tl.zeros_like(loaded))
    return loaded
