"""The second pass: merges the partial results of a row. It calls no mod, so its text is the same for all mods."""

import triton
import triton.language as tl
from decode import (
    LOG2E,
    Tokens,
    count_keys,
    find_sequence,
    finish_rows,
    gdc_launch_dependents,
    gdc_wait,
    read_tokens,
    read_total,
    takes_part,
    tile_index,
)


@triton.jit
def decode_combine(
    out, lse, partial_out, partial_max, partial_sum, item_parts, kv_lens, q_lens, cu_seqlens_q, cu_seqlens_k, sinks,
    stride_ob, stride_oh, stride_om, stride_od, batch, num_kv_heads, max_kv_len, num_queries, row_range, num_splits, first_place,
    large_splits,
    GROUP_SIZE: tl.constexpr, ONE_TOKEN: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    LARGE_M: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, BALANCED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Merges the partial outputs of one row. Grid: (B * Hq * Q or T * Hq, cdiv(Dv, BLOCK_DV)).

    Rows are counted as [B, Hkv, Q, GROUP_SIZE], or as [T, Hq] if the queries are packed. If BALANCED, the pass skips
    items that one worker computed alone, and writes the rows of sequences that no worker visits. LARGE_M: rows of the
    tiles of a second launch of the first pass, which has `large_splits` and whose partial results start at place 0; it
    is 0 if there was one launch. The other arguments are those of the first launch.
    """
    tokens = Tokens(q_lens, cu_seqlens_q, 1 if ONE_TOKEN else num_queries, batch, row_range)
    num_q_heads = num_kv_heads * GROUP_SIZE
    row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    if PDL and cu_seqlens_q is not None:
        gdc_wait()
        gdc_launch_dependents()
    if cu_seqlens_q is not None:
        place = row // num_q_heads
        head = row % num_q_heads
        kv_head = head // GROUP_SIZE
        begin = read_total(cu_seqlens_q, 0, num_queries)
        number = tl.where(place < begin, batch, find_sequence(tokens, place - begin, 1, 1))
        b = tl.minimum(number, batch - 1)
        lse_row = row.to(tl.int64)
        out_row = out
    else:
        rows_of_head = GROUP_SIZE * (1 if ONE_TOKEN else num_queries)
        place = row % rows_of_head // GROUP_SIZE
        kv_head = row // rows_of_head % num_kv_heads
        head = kv_head * GROUP_SIZE + row % rows_of_head % GROUP_SIZE
        number = row // rows_of_head // num_kv_heads
        b = number
        lse_row = (b.to(tl.int64) * num_q_heads + head) * (1 if ONE_TOKEN else num_queries) + place
        out_row = out + b.to(tl.int64) * stride_ob
    out_row += head.to(tl.int64) * stride_oh + place.to(tl.int64) * stride_om
    if PDL and cu_seqlens_q is None:
        gdc_wait()
        gdc_launch_dependents()

    span = read_tokens(tokens, number)
    token = place - span.first
    if cu_seqlens_q is not None:
        token = tl.where(token < 0, token + num_queries, token)
    row_of_b = token * GROUP_SIZE + head % GROUP_SIZE
    item = tile_index(tokens, number, span.first, row_of_b // BLOCK_M, GROUP_SIZE, BLOCK_M) * num_kv_heads + kv_head
    # The parts of a row lie side by side.
    count = num_splits
    first = (first_place + item.to(tl.int64) * num_splits) * BLOCK_M + row_of_b % BLOCK_M * num_splits
    small = tl.full((), True, tl.int1)
    if LARGE_M > 0:
        small = takes_part(tokens, number, GROUP_SIZE * span.count)
    if BALANCED:
        busy = small & (count_keys(kv_lens, cu_seqlens_k, b, max_kv_len) > 0) & (token < span.used)
        parts = item_parts + 2 * item.to(tl.int64)
        count = tl.load(parts + 1, mask=busy, other=0)
        # A worker has two places. It begins an item in the second one, and continues one in the first one.
        worker = tl.load(parts, mask=busy, other=0).to(tl.int64)
        first = (first_place + 2 * worker) * BLOCK_M + row_of_b % BLOCK_M
    if LARGE_M > 0:
        index = tile_index(tokens, number, span.first, row_of_b // LARGE_M, GROUP_SIZE, LARGE_M)
        in_large = ((index * num_kv_heads + kv_head).to(tl.int64) * LARGE_M + row_of_b % LARGE_M) * large_splits
        first = tl.where(small, first, in_large)
        count = tl.where(small, count, large_splits)
    if (not BALANCED and LARGE_M == 0) or count != 1:
        m_i = float("-inf")
        l_i = 0.0
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for start in tl.range(0, count, BLOCK_S):
            part = start + offs_s
            partial_row = first + part
            if BALANCED:
                of_worker = first + (2 * part + tl.where(part == 0, 1, 0)) * BLOCK_M
                partial_row = tl.where(small, of_worker, partial_row)
            part_max = tl.load(partial_max + partial_row, mask=part < count, other=float("-inf"))
            part_sum = tl.load(partial_sum + partial_row, mask=part < count, other=0.0)
            partial = tl.load(
                partial_out + partial_row[:, None] * V_HEAD_DIM + offs_dv[None, :],
                mask=(part < count)[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
                other=0.0,
            )
            m_new = tl.maximum(m_i, tl.max(part_max, 0))
            m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
            weight = tl.exp2((part_max - m_safe) * LOG2E)
            alpha = tl.exp2((m_i - m_safe) * LOG2E)
            l_i = l_i * alpha + tl.sum(part_sum * weight, 0)
            acc = acc * alpha + tl.sum(partial * weight[:, None], 0)
            m_i = m_new

        used = None
        if q_lens is not None or cu_seqlens_q is not None:
            used = token < span.used
        merged, row_lse = finish_rows(acc, m_i, l_i, sinks, head, used)
        tl.store(out_row + offs_dv * stride_od, merged.to(out.dtype.element_ty), mask=offs_dv < V_HEAD_DIM)
        if lse is not None:
            if tl.program_id(1) == 0:
                tl.store(lse + lse_row, row_lse)
