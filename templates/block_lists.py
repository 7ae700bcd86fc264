"""KV blocks from the lists of a BlockMask: these functions take the place of those of the same name in decode.py.

`block_lists` is (tables, stride_b, stride_h, num_q, q_block, num_blocks). `tables` [B, Hkv, rows, 4 * num_blocks + 2]
int32 has four parts for each row of the mask: the number of full blocks before each block (num_blocks + 1 numbers), the
same of partial blocks, the full blocks in ascending order, and the partial blocks in ascending order. A stride of 0
means that sequences or heads share the tables.

If the call has offsets (SHIFTED), the tables describe places. Place `p` is block `p - 1` of positions: there is a place
before the first block. `num_blocks` counts places. Each row of the mask has two tables, so that `tables` is
[B, Hkv, rows, 2 * (4 * num_blocks + 2)]. The first one is for offsets that are multiples of BLOCK_N: a block of slots
is a block of positions. The second one is for other offsets: a block of slots meets two blocks of positions, so a place
stands for its block and the next one. It is live if one of the two is, and full if both are.
"""

from collections import namedtuple

import triton
import triton.language as tl
from decode import kv_bounds, live_spans, span_blocks

# The lists of all rows of a mask, as above.
BlockLists = namedtuple("BlockLists", "tables stride_b stride_h num_q q_block num_blocks")
# The blocks that a tile visits, in place of `Runs`. `whole_row`: the tokens of the tile lie in one row of the mask, so
# the lists of this row hold. They start at `lists` and describe `num_blocks` blocks. `start` is the first block within
# the bounds; `first_full` and `first_partial` count the blocks before those that are visited. The sequence ends in
# `end_block`. If that block is listed as full, it is visited first among the partial blocks and `num_end` is 1, else
# `num_end` is 0. If the call has starts (STARTED), `num_start` has one number, else none. The number is the same for
# `start` if the sequence starts inside it; that block is visited before `end_block`. All blocks are places; `shift` is
# the place of slot 0.
Listed = namedtuple(
    "Listed",
    "num_full num_partial whole_row lists num_blocks first_full first_partial num_start num_end end_block start shift",
)


@triton.jit
def block_runs(tile, block_lists, captures, C: tl.constexpr):
    """The blocks that a tile visits, and its spans.

    A tile whose tokens lie in different rows of the mask visits all blocks within its bounds as partial ones.
    """
    q_low = tile.q_idx
    q_high = tile.q_idx
    if len(q_low.shape) > 0:
        q_low = tl.min(tile.q_idx)
        q_high = tl.max(tile.q_idx)
    table = BlockLists(*block_lists)
    num_q, num_blocks = table.num_q, table.num_blocks
    row = tl.minimum(tl.maximum(q_low, 0), num_q - 1) // table.q_block
    whole_row = (q_low >= 0) & (q_high < num_q) & (q_high // table.q_block == row)
    lists = tile.b.to(tl.int64) * table.stride_b + tile.kv_head.to(tl.int64) * table.stride_h
    shift = 0
    if C.SHIFTED:
        remainder = tile.kv_offset & (C.BLOCK_N - 1)
        shift = (tile.kv_offset - remainder) // C.BLOCK_N + 1
        lists += row * (2 * (4 * num_blocks + 2)) + tl.where(remainder > 0, 4 * num_blocks + 2, 0)
    else:
        lists += row * (4 * num_blocks + 2)

    live, _ = kv_bounds(tile.b, tile.h, tile.q_idx, captures.score, captures.mask)
    spans = live_spans(live, tile, C)
    start, end = span_blocks(spans[0], C.BLOCK_N)
    for i in tl.static_range(1, len(spans)):
        lo, hi = span_blocks(spans[i], C.BLOCK_N)
        start = tl.where(end > start, tl.where(hi > lo, tl.minimum(start, lo), start), lo)
        end = tl.maximum(end, hi)
    starts_inside = start * C.BLOCK_N < tile.kv_start
    if C.SHIFTED:
        start = tl.maximum(start + shift, 0)
        end = tl.maximum(end + shift, 0)
    end = tl.where((q_high >= 0) & (q_low < num_q), tl.minimum(end, num_blocks.to(tl.int32)), 0)
    start = tl.minimum(start, end)
    # The sequence ends inside this block, so the block is not full even if the lists say so.
    end_block = tl.maximum(tl.minimum(tile.kv_len // C.BLOCK_N + shift, end), start)

    full_before = table.tables + lists
    partial_before = full_before + num_blocks + 1
    first_full = tl.load(full_before + start)
    num_start = ()
    if C.STARTED:
        inner = tl.load(full_before + tl.minimum(start + starts_inside.to(tl.int32), end_block))
        num_start = (inner - first_full,)
        first_full = inner
    num_full = tl.load(full_before + end_block) - first_full
    num_end = tl.load(full_before + end) - tl.load(full_before + end_block)
    first_partial = tl.load(partial_before + start)
    num_partial = tl.load(partial_before + end) - first_partial + num_end
    if C.STARTED:
        num_partial += num_start[0]
    num_full = tl.where(whole_row, num_full, 0)
    num_partial = tl.where(whole_row, num_partial, end - start)
    return Listed(
        num_full, num_partial, whole_row, full_before, num_blocks, first_full, first_partial, num_start, num_end,
        end_block, start, shift,
    ), spans  # fmt: skip


@triton.jit
def full_block(runs, number):
    """The full block with this number. The caller asks one step ahead, so `number` may be past the last one."""
    order = runs.lists + 2 * (runs.num_blocks + 1) + runs.first_full
    return tl.load(order + number, mask=number < runs.num_full, other=0) - runs.shift


@triton.jit
def partial_block(runs, number):
    """The partial block with this number. If `start` and `end_block` are listed as full, they may come first."""
    num_cut = runs.num_end
    cut = runs.end_block
    if len(runs.num_start) > 0:
        num_cut += runs.num_start[0]
        cut = tl.where(number < runs.num_start[0], runs.start, cut)
    in_list = runs.whole_row & (number >= num_cut) & (number < runs.num_partial)
    order = runs.lists + 3 * runs.num_blocks + 2
    block = tl.load(order + tl.where(in_list, runs.first_partial + number - num_cut, 0))
    return tl.where(in_list, block, tl.where(runs.whole_row, cut, runs.start + number)) - runs.shift
