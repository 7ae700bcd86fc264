"""KV loads from pages: these functions replace those of `decode.py`.

A paged cache is `[num_pages, Hkv, page_size, D]`, and row b of `page_table` (pointer, stride_b, num_pages) lists the
pages of sequence b. The table is read one step ahead, while the block before is attended, so no step waits for it. Only
entries of keys within the spans are read. An entry that names no page of the pool counts as page 0, so a wrong table
never leads to a read outside the pool.
"""

import triton
import triton.language as tl
from decode import in_spans, meets_spans


@triton.jit
def _in_pool(page, num_pages):
    """The page itself if it is in the pool, else page 0."""
    UNSIGNED: tl.constexpr = tl.uint32 if page.dtype == tl.int32 else tl.uint64  # -1 becomes a large number
    return tl.where(page.to(UNSIGNED, bitcast=True) < num_pages.to(UNSIGNED), page, 0)


@triton.jit
def find_pages(page_table, b, start_n, spans, C: tl.constexpr):
    """The page of each key from `start_n` on [BLOCK_N], or one page for all, as offsets in the cache are counted."""
    entries, stride_b, num_pages = page_table
    row = entries + b.to(tl.int64) * stride_b
    if C.PAGE_SIZE % C.BLOCK_N == 0:
        page = tl.load(row + start_n // C.PAGE_SIZE, mask=meets_spans(start_n, spans, C.BLOCK_N), other=0)
        return (_in_pool(page, num_pages).to(tl.int64),)
    else:
        offs_n = start_n + tl.arange(0, C.BLOCK_N)
        page = tl.load(row + offs_n // C.PAGE_SIZE, mask=in_spans(offs_n, spans), other=0)
        return (_in_pool(page, num_pages),)


@triton.jit
def owner(b):
    """Index of a sequence in the first dimension of a cache: 0, because the page table finds the pages."""
    return b * 0


@triton.jit
def row_offsets(block, step, stride_n, C: tl.constexpr):
    """Where the keys of a block lie in a KV head, in elements [BLOCK_N]; `step` is the stride between pages."""
    if C.BLOCK_N % C.PAGE_SIZE == 0:  # all blocks have the same places
        place = tl.arange(0, C.BLOCK_N) % C.PAGE_SIZE
    else:
        place = (block.start_n + tl.arange(0, C.BLOCK_N)) % C.PAGE_SIZE
    return block.pages[0].to(tl.int64) * step + place.to(tl.int64) * stride_n


@triton.jit
def rectangle(start, block, steps, C: tl.constexpr):
    """Row and column of a block in the matrix of a descriptor; `start` is that of the KV head in page 0."""
    row, column = start
    rows_of_page, columns_of_page, _, _ = steps
    page = block.pages[0].to(tl.int32)
    return row + page * rows_of_page + block.start_n % C.PAGE_SIZE, column + page * columns_of_page
