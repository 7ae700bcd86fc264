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
def row_addresses(cache, block, C: tl.constexpr):
    """The addresses of the rows of a block in a KV head [BLOCK_N]."""
    row, column = rectangle(cache.start, block, cache.steps, C)
    return cache.base + (row + tl.arange(0, C.BLOCK_N)).to(tl.int64) * cache.stride_n + column


@triton.jit
def load_kv(
    cache, block, spans, COLUMN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Loads the rows of a block as [BLOCK_N, COLUMNS]; CHECKED gives zeros outside `spans`.

    The copy engine reads whole blocks. The last block of a sequence may have few live rows, so the rows of a block that
    is CHECKED are loaded through pointers, and dead ones are not read.

    A tile may have more than WIDTH columns. Past the last column of its matrix the copy engine gives zeros. Columns of
    the next row or of another head, which may be dead, become no part of a result if they are of values. Those of keys
    do.
    """
    offs_d = tl.arange(0, COLUMNS)
    if CHECKED:
        pointers = row_addresses(cache, block, C)[:, None] + offs_d[None, :]
        inside = in_spans(block.start_n + tl.arange(0, C.BLOCK_N), spans)[:, None]
        if WIDTH < COLUMNS:
            inside = inside & (offs_d[None, :] < WIDTH)
        return tl.load(pointers, mask=inside, other=0.0)
    else:
        loaded = cache.descriptor.load(rectangle(cache.start, block, cache.steps, C))
        if C.SHARED and WIDTH < COLUMNS:
            loaded = tl.where(offs_d[None, :] < WIDTH, loaded, tl.zeros_like(loaded))
        return loaded
