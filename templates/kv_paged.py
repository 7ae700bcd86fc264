"""KV loads from pages: these functions replace those of `decode.py`.

A paged cache is `[num_pages, Hkv, page_size, D]`, and row b of `page_table` (pointer, stride_b, num_pages) lists the
pages of sequence b. The table is read a step ahead, so that its latency passes while the block before is attended. Only
entries of keys within the spans are read. One that names no page of the pool counts as page 0: whatever the table
holds, nothing outside the pool is read.
"""

import triton
import triton.language as tl


@triton.jit
def _place_in_page(start_n, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where in its page each key from `start_n` on lies [BLOCK_N]; the same for all blocks if they hold whole pages."""
    if BLOCK_N % PAGE_SIZE == 0:
        return tl.arange(0, BLOCK_N) % PAGE_SIZE
    else:
        return (start_n + tl.arange(0, BLOCK_N)) % PAGE_SIZE


@triton.jit
def _in_pool(page, num_pages):
    """A page of the pool, in place of a number that names none."""
    UNSIGNED: tl.constexpr = tl.uint32 if page.dtype == tl.int32 else tl.uint64  # in which -1 is large
    return tl.where(page.to(UNSIGNED, bitcast=True) < num_pages.to(UNSIGNED), page, 0)


@triton.jit
def find_pages(page_table, b, start_n, spans, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """The page of each key from `start_n` on [BLOCK_N], or one page for all, as offsets in the cache are counted."""
    row = page_table[0] + b.to(tl.int64) * page_table[1]
    if PAGE_SIZE % BLOCK_N == 0:
        meets = meets_spans(start_n, spans, BLOCK_N)  # noqa: F821 (of decode.py)
        page = tl.load(row + start_n // PAGE_SIZE, mask=meets, other=0)
        return (_in_pool(page, page_table[2]).to(tl.int64),)
    else:
        offs_n = start_n + tl.arange(0, BLOCK_N)
        page = tl.load(row + offs_n // PAGE_SIZE, mask=in_spans(offs_n, spans), other=0)  # noqa: F821
        return (_in_pool(page, page_table[2]),)


@triton.jit
def kv_origin(base, b, kv_head, steps):
    """Where the rows of one KV head start in page 0, from `steps` (stride_page, stride_h)."""
    return base + kv_head.to(tl.int64) * steps[1]


@triton.jit
def load_kv(
    cache, pages, start_n, spans, BLOCK_N: tl.constexpr, COLUMN: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PAGE_SIZE: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Loads columns `COLUMN .. COLUMN + BLOCK_D` of rows `start_n .. start_n + BLOCK_N`; zeros past HEAD_DIM.

    `cache` is (origin, descriptor, steps, stride_n, stride_d); CHECKED reads zeros outside of `spans`.
    """
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = COLUMN + tl.arange(0, BLOCK_D)
    rows = pages[0].to(tl.int64) * cache[2][0] + _place_in_page(start_n, BLOCK_N, PAGE_SIZE).to(tl.int64) * cache[3]
    pointers = cache[0] + rows[:, None] + offs_d[None, :] * cache[4]
    if CHECKED:
        inside = in_spans(offs_n, spans)[:, None]  # noqa: F821
        return tl.load(pointers, mask=inside & (offs_d[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < COLUMN + BLOCK_D:
        return tl.load(pointers, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_scales(
    scales, pages, b, kv_head, start_n, spans, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, CHECKED: tl.constexpr
):
    """Loads the scale of each key [BLOCK_N] from `scales` (pointer, stride_page, stride_h, stride_n)."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    rows = pages[0].to(tl.int64) * scales[1] + _place_in_page(start_n, BLOCK_N, PAGE_SIZE) * scales[3]
    pointers = scales[0] + kv_head.to(tl.int64) * scales[2] + rows
    if CHECKED:
        return tl.load(pointers, mask=in_spans(offs_n, spans), other=0.0).to(tl.float32)  # noqa: F821
    else:
        return tl.load(pointers).to(tl.float32)
