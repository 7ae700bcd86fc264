"""The second pass: merges the partial results of a row. It calls no mod, so its text is the same for all mods."""

from collections import namedtuple

import triton
import triton.language as tl
from decode import (
    LOG2E,
    Tokens,
    TokenSpan,
    count_keys,
    find_sequence,
    finish_rows,
    gdc_launch_dependents,
    gdc_wait,
    number_place,
    read_length,
    read_start,
    read_tokens,
    read_total,
    takes_part,
    tile_index,
)

# A row of the query: its sequence (`batch` if it has none), its heads, its place among the tokens of the query, its
# token of the sequence, and the tokens of the sequence.
Row = namedtuple("Row", "b kv_head head place token span")
# The partial results of a row: how many there are, where the first one lies, whether they are those of a small tile.
Parts = namedtuple("Parts", "count first small")


@triton.jit
def _packed_row(row, tokens, num_kv_heads, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr, OF_SMALL: tl.constexpr):
    """The row with this number among the rows [T, Hq] of packed queries, or [B, Hkv, BLOCK_M] if OF_SMALL."""
    if OF_SMALL:
        lane = row % BLOCK_M
        b = row // BLOCK_M // num_kv_heads
        kv_head = row // BLOCK_M % num_kv_heads
        head = kv_head * GROUP_SIZE + lane % GROUP_SIZE
        span = read_tokens(tokens, b)
        token = lane // GROUP_SIZE
        place = span.first + token
    else:
        place = row // (num_kv_heads * GROUP_SIZE)
        head = row % (num_kv_heads * GROUP_SIZE)
        kv_head = head // GROUP_SIZE
        begin = read_total(tokens.cu_seqlens_q, 0, tokens.num_queries)
        b = tl.where(place < begin, tokens.batch, find_sequence(tokens, place - begin, 1, 1))
        span = read_tokens(tokens, b)
        token = place - span.first
        token = tl.where((token < 0) & (b == tokens.batch), token + tokens.num_queries, token)
    return Row(b, kv_head, head, place, token, span)


@triton.jit
def _padded_row(row, tokens, num_kv_heads, GROUP_SIZE: tl.constexpr):
    """The row with this number among the rows [B, Hkv, Q, GROUP_SIZE] of padded queries. It reads no memory."""
    rows_of_head = GROUP_SIZE * tokens.num_queries
    token = row % rows_of_head // GROUP_SIZE
    kv_head = row // rows_of_head % num_kv_heads
    head = kv_head * GROUP_SIZE + row % rows_of_head % GROUP_SIZE
    span = TokenSpan(0, tokens.num_queries, tokens.num_queries)
    return Row(row // rows_of_head // num_kv_heads, kv_head, head, token, token, span)


@triton.jit
def _tile_of(row, tokens, num_kv_heads, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The item and the lane of a row if tiles have BLOCK_M rows."""
    row_of_head = row.token * GROUP_SIZE + row.head % GROUP_SIZE
    tile = tile_index(tokens, row.b, row.span.first, row_of_head // BLOCK_M, GROUP_SIZE, BLOCK_M)
    return (tile * num_kv_heads + row.kv_head).to(tl.int64), row_of_head % BLOCK_M


@triton.jit
def _parts_of_splits(
    row, tokens, num_kv_heads, num_splits, first_place, large_splits, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
    LARGE_M: tl.constexpr, OF_SMALL: tl.constexpr,
):  # fmt: skip
    """The partial results of a row if all items have the same number of splits. They lie side by side."""
    item, lane = _tile_of(row, tokens, num_kv_heads, GROUP_SIZE, BLOCK_M)
    count = num_splits
    first = (first_place + item * num_splits) * BLOCK_M + lane * num_splits
    small = tl.full((), True, tl.int1)
    if LARGE_M > 0 or OF_SMALL:
        small = takes_part(tokens, row.b, GROUP_SIZE * row.span.count)
    if LARGE_M > 0:
        item, lane = _tile_of(row, tokens, num_kv_heads, GROUP_SIZE, LARGE_M)
        first = tl.where(small, first, (item * LARGE_M + lane) * large_splits)
        count = tl.where(small, count, large_splits)
    if tokens.cu_seqlens_q is not None:  # if the running totals do not ascend, a token may lie outside its sequence
        count = tl.where((row.token >= 0) & (row.token < row.span.count), count, 0)
    return Parts(count, first, small)


@triton.jit
def _parts_of_workers(
    row, used, parts, tokens, item_parts, kv_len, kv_starts, num_kv_heads, first_place, num_workers,
    GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """The partial results of a row if workers have equal runs; `parts` if the row has a large tile."""
    b = tl.minimum(row.b, tokens.batch - 1)
    item, lane = _tile_of(row, tokens, num_kv_heads, GROUP_SIZE, BLOCK_M)
    busy = parts.small & (kv_len > read_start(kv_starts, b, kv_len)) & (row.token >= 0) & (row.token < used)
    # The limits matter only if the running totals do not ascend. Then some items may have no worker.
    worker = tl.minimum(tl.maximum(tl.load(item_parts + 2 * item, mask=busy, other=0), 0), num_workers - 1)
    count = tl.minimum(tl.load(item_parts + 2 * item + 1, mask=busy, other=0), num_workers - worker)
    # A worker has two places. It begins an item in the second one, and continues one in the first one.
    worker = worker.to(tl.int64)
    first = (first_place + 2 * worker) * BLOCK_M + lane
    return Parts(tl.where(parts.small, count, parts.count), tl.where(parts.small, first, parts.first), parts.small)


@triton.jit
def _merge(
    parts, partial_out, partial_max, partial_sum, offs_dv, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Columns `offs_dv` of the merged results of a row, its largest score and its sum of weights."""
    offs_s = tl.arange(0, BLOCK_S)
    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, parts.count, BLOCK_S):
        part = start + offs_s
        partial_row = parts.first + part
        if BALANCED:
            of_worker = parts.first + (2 * part + tl.where(part == 0, 1, 0)) * BLOCK_M
            partial_row = tl.where(parts.small, of_worker, partial_row)
        part_max = tl.load(partial_max + partial_row, mask=part < parts.count, other=float("-inf"))
        part_sum = tl.load(partial_sum + partial_row, mask=part < parts.count, other=0.0)
        partial = tl.load(
            partial_out + partial_row[:, None] * V_HEAD_DIM + offs_dv[None, :],
            mask=(part < parts.count)[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
            other=0.0,
        )
        m_new = tl.maximum(m_i, tl.max(part_max, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2((part_max - m_safe) * LOG2E)
        alpha = tl.exp2((m_i - m_safe) * LOG2E)
        l_i = l_i * alpha + tl.sum(part_sum * weight, 0)
        acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
        m_i = m_new
    return acc, m_i, l_i


@triton.jit
def decode_combine(
    out, lse, max_scores, partial_out, partial_max, partial_sum, item_parts, kv_lens, q_lens, cu_seqlens_q,
    cu_seqlens_k, kv_starts, sinks, stride_ob, stride_oh, stride_om, stride_od, batch, num_kv_heads, max_kv_len,
    num_queries, row_range, num_splits, first_place, large_splits,
    GROUP_SIZE: tl.constexpr, ONE_TOKEN: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    LARGE_M: tl.constexpr, OF_SMALL: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
    BALANCED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merges the partial outputs of one row. Grid: (rows, cdiv(Dv, BLOCK_DV)).

    Rows are counted as [B, Hkv, Q, GROUP_SIZE], or as [T, Hq] if the queries are packed. If BALANCED, the pass skips
    items that one worker computed alone, and writes the rows of sequences that no worker visits.

    The first pass may have been two launches. The arguments are those of the launch with small tiles. If only that one
    was split, OF_SMALL is true and rows are counted as [B, Hkv, BLOCK_M]: those of sequences that had a small tile.
    Otherwise LARGE_M is the number of rows of the other tiles, which had `large_splits` and whose partial results start
    at place 0. It is 0 if there was one launch.
    """
    tokens = Tokens(q_lens, cu_seqlens_q, 1 if ONE_TOKEN else num_queries, batch, row_range)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    if cu_seqlens_q is not None:
        if PDL:
            gdc_launch_dependents()
            gdc_wait()
        row = _packed_row(tl.program_id(0), tokens, num_kv_heads, GROUP_SIZE, BLOCK_M, OF_SMALL)
        out_row = out
    else:
        row = _padded_row(tl.program_id(0), tokens, num_kv_heads, GROUP_SIZE)
        out_row = out + row.b.to(tl.int64) * stride_ob
    number = number_place(tokens, row.b, row, num_kv_heads * GROUP_SIZE)
    out_row += row.head.to(tl.int64) * stride_oh + row.place.to(tl.int64) * stride_om
    parts = _parts_of_splits(
        row, tokens, num_kv_heads, num_splits, first_place, large_splits, GROUP_SIZE, BLOCK_M, LARGE_M, OF_SMALL
    )
    if PDL and cu_seqlens_q is None:  # what is above reads no memory
        gdc_launch_dependents()
        gdc_wait()
    used = row.span.used
    if q_lens is not None:
        used = read_length(q_lens, row.b, num_queries)
    if BALANCED:
        b = tl.minimum(row.b, batch - 1)
        kv_len = count_keys(kv_lens, cu_seqlens_k, b, max_kv_len)
        parts = _parts_of_workers(
            row, used, parts, tokens, item_parts, kv_len, kv_starts, num_kv_heads, first_place, num_splits, GROUP_SIZE,
            BLOCK_M,
        )  # fmt: skip
    # Where rows differ, those with one part are not merged: the first pass has written the output.
    ALIKE: tl.constexpr = not BALANCED and LARGE_M == 0 and not OF_SMALL
    count = parts.count
    if OF_SMALL:
        lane = row.token * GROUP_SIZE + row.head % GROUP_SIZE
        count = tl.where(parts.small & (lane < GROUP_SIZE * row.span.count), count, 1)
    if ALIKE or count != 1:
        acc, m_i, l_i = _merge(
            parts, partial_out, partial_max, partial_sum, offs_dv, V_HEAD_DIM, BLOCK_M, BLOCK_DV, BLOCK_S, BALANCED
        )
        in_use = None
        if q_lens is not None or cu_seqlens_q is not None:
            in_use = row.token < used
        merged, row_lse, largest = finish_rows(acc, m_i, l_i, sinks, row.head, in_use)
        tl.store(out_row + offs_dv * stride_od, merged.to(out.dtype.element_ty), mask=offs_dv < V_HEAD_DIM)
        if tl.program_id(1) == 0:
            if lse is not None:
                tl.store(lse + number, row_lse)
            if max_scores is not None:
                tl.store(max_scores + number, largest)
