"""Heads of many columns: these functions replace those of `decode.py`.

The tiles of whole rows would fill the registers and the shared memory. So a key is loaded in parts of BLOCK_D columns,
in a loop, and the same columns of the query are loaded beside each part. The query is small and stays in the cache of
the multiprocessor. The columns of values are always computed in parts of BLOCK_DV, see `add_values` in `decode.py`.
"""

import triton
import triton.language as tl
from decode import as_type, in_spans, row_offsets


@triton.jit
def load_query(row, queries, C: tl.constexpr):
    """The addresses of the query rows [BLOCK_M, 1], the stride of their columns, and a factor of 1 for each row."""
    return row[:, None], queries.stride_d, 1.0


@triton.jit
def scores_of(q, q_rest, keys, block, spans, CHECKED: tl.constexpr, C: tl.constexpr):
    """The products of all query rows and keys of a block, float32 [BLOCK_M, BLOCK_N], twice: no key is kept."""
    score = tl.zeros([C.BLOCK_M, C.BLOCK_N], tl.float32)
    rows = keys.start + row_offsets(block, keys.steps[0], keys.stride_n, C)[:, None]
    for column in tl.range(0, C.HEAD_DIM, C.BLOCK_D):
        offs_d = column + tl.arange(0, C.BLOCK_D)[None, :]
        exists = offs_d < C.HEAD_DIM
        part = tl.load(q + offs_d * q_rest, mask=exists, other=0.0)
        if CHECKED:
            exists = exists & in_spans(block.start_n + tl.arange(0, C.BLOCK_N), spans)[:, None]
        k = tl.load(rows + offs_d * keys.stride_d, mask=exists, other=0.0)
        part, k = as_type(part, C.KEY_PRODUCT), as_type(k, C.KEY_PRODUCT)
        score = tl.dot(part, tl.trans(k), score, input_precision=C.PRECISION)
    return score, score
