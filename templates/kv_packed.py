"""Keys of all sequences one after another: these functions replace those of `decode.py`.

Keys are `[1, Hkv, Tk, D]`. Sequence `b` has the rows from `cu_seqlens_k[b]` on. Rows outside the spans are not read.
"""

import triton
import triton.language as tl


@triton.jit
def find_pages(page_table, b, start_n, spans, C: tl.constexpr):
    """The row of the first key of sequence `b`. If it is past the last row, the sequence has no keys."""
    return (tl.maximum(tl.load(page_table[0] + b), 0),)


@triton.jit
def owner(b):
    """Index of a sequence in the first dimension of a cache: 0, because all sequences share it."""
    return b * 0


@triton.jit
def row_offsets(block, step, stride_n, C: tl.constexpr):
    """Where the keys of a block lie in a KV head, in elements [BLOCK_N]."""
    return (block.pages[0] + block.start_n + tl.arange(0, C.BLOCK_N)).to(tl.int64) * stride_n
