"""KV blocks from the lists of a BlockMask: takes the place of the functions of the same name in decode.py.

`block_lists` is (tables, stride_b, stride_h, num_q, q_block, num_blocks). `tables` [B, Hkv, rows, 4 * num_blocks + 2]
int32 has for each row of the mask: how many full blocks come before each block (num_blocks + 1 numbers), how many
partial ones do, the full blocks in ascending order, and the partial ones. A stride of 0 shares them.
"""

import triton
import triton.language as tl


@triton.jit
def block_runs(
    b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr,
):  # fmt: skip
    """The blocks that a tile visits: the numbers of full and of partial ones, and what finds them; then its spans.

    A tile whose tokens lie in different rows of the mask visits all blocks within its bounds as partial ones.
    """
    q_low = q_idx
    q_high = q_idx
    if len(q_idx.shape) > 0:
        q_low = tl.min(q_idx)
        q_high = tl.max(q_idx)
    num_q = block_lists[3]
    num_blocks = block_lists[5]
    row = tl.minimum(tl.maximum(q_low, 0), num_q - 1) // block_lists[4]
    listed = (q_low >= 0) & (q_high < num_q) & (q_high // block_lists[4] == row)
    lists = b.to(tl.int64) * block_lists[1] + kv_head.to(tl.int64) * block_lists[2] + row * (4 * num_blocks + 2)

    bound = kv_bounds(b, h, q_idx, score_captures, mask_captures)  # noqa: F821 (of decode.py)
    spans = live_spans(bound, kv_len, NUM_LIVE)  # noqa: F821
    start, end = span_blocks(spans[0], spans[1], BLOCK_N)  # noqa: F821
    for i in tl.static_range(2, len(spans), 2):
        lo, hi = span_blocks(spans[i], spans[i + 1], BLOCK_N)  # noqa: F821
        start = tl.where(end > start, tl.where(hi > lo, tl.minimum(start, lo), start), lo)
        end = tl.maximum(end, hi)
    end = tl.where((q_high >= 0) & (q_low < num_q), tl.minimum(end, num_blocks.to(tl.int32)), 0)
    start = tl.minimum(start, end)
    # The block that the sequence ends in is not full, whatever the lists say.
    cut = tl.maximum(tl.minimum(kv_len // BLOCK_N, end), start)

    full_before = block_lists[0] + lists
    partial_before = full_before + num_blocks + 1
    first_full = tl.load(full_before + start)
    num_full = tl.load(full_before + cut) - first_full
    num_cut = tl.load(full_before + end) - tl.load(full_before + cut)
    first_partial = tl.load(partial_before + start)
    num_partial = tl.load(partial_before + end) - first_partial + num_cut
    num_full = tl.where(listed, num_full, 0)
    num_partial = tl.where(listed, num_partial, end - start)
    return (num_full, num_partial, listed, lists, first_full, first_partial, num_cut, cut, start), spans


@triton.jit
def full_block(runs, place, block_lists, NUM_LIVE: tl.constexpr):
    """The full block with the number `place`, asked for a step ahead, so `place` may be past the last one."""
    order = block_lists[0] + runs[3] + 2 * (block_lists[5] + 1) + runs[4]
    return tl.load(order + place, mask=place < runs[0], other=0)


@triton.jit
def partial_block(runs, place, block_lists, NUM_LIVE: tl.constexpr):
    """The partial block with the number `place`: the one that the sequence ends in comes first."""
    in_list = runs[2] & (place >= runs[6]) & (place < runs[1])
    order = block_lists[0] + runs[3] + 3 * block_lists[5] + 2
    block = tl.load(order + tl.where(in_list, runs[5] + place - runs[6], 0))
    return tl.where(in_list, block, tl.where(runs[2], runs[7], runs[8] + place))
