"""The second pass: merges the partial results of a row. It calls no mod, so its text is the same for all mods."""

import triton
import triton.language as tl
from decode import LOG2E, finish_rows, gdc_launch_dependents, gdc_wait, read_length, read_start


@triton.jit
def decode_combine(
    out, lse, partial_out, partial_max, partial_sum, item_parts, kv_lens, q_lens, kv_starts, sinks, stride_ob,
    stride_oh, stride_om, stride_od, num_kv_heads, max_kv_len, num_splits,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, BALANCED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second pass: merges the partial outputs of one row. Grid: (B * Hq * Q, cdiv(Dv, BLOCK_DV)).

    If BALANCED, it skips items that one worker computed alone, and writes the rows of sequences that no worker visits.
    """
    NUM_ROWS: tl.constexpr = GROUP_SIZE * NUM_QUERIES
    NUM_TILES: tl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    flat_row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    group = flat_row // NUM_ROWS
    row = flat_row % NUM_ROWS
    b = group // num_kv_heads
    head = group % num_kv_heads * GROUP_SIZE + row // NUM_QUERIES
    token = row % NUM_QUERIES
    out_row = out + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_om
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    count = num_splits
    first = flat_row.to(tl.int64) * num_splits
    num_tokens = read_length(q_lens, b, NUM_QUERIES)
    if BALANCED:
        parts = item_parts + 2 * group.to(tl.int64)
        kv_len = read_length(kv_lens, b, max_kv_len)
        busy = (kv_len > read_start(kv_starts, b, kv_len)) & (num_tokens > 0)
        count = tl.load(parts + 1, mask=busy, other=0)
        first = 2 * tl.load(parts, mask=busy, other=0).to(tl.int64)
    if (not BALANCED) or count != 1:
        m_i = float("-inf")
        l_i = 0.0
        acc = tl.zeros([BLOCK_DV], tl.float32)
        for start in tl.range(0, count, BLOCK_S):
            part = start + offs_s
            if BALANCED:
                place = (first + 2 * part + tl.where(part == 0, 1, 0)) * (NUM_TILES * BLOCK_M) + row
            else:
                place = first + part
            part_max = tl.load(partial_max + place, mask=part < count, other=float("-inf"))
            part_sum = tl.load(partial_sum + place, mask=part < count, other=0.0)
            partial = tl.load(
                partial_out + place[:, None] * V_HEAD_DIM + offs_dv[None, :],
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

        merged, row_lse = finish_rows(acc, m_i, l_i, sinks, head, token, num_tokens, q_lens)
        tl.store(out_row + offs_dv * stride_od, merged.to(out.dtype.element_ty), mask=offs_dv < V_HEAD_DIM)
        if lse is not None:
            if tl.program_id(1) == 0:
                tl.store(lse + flat_row, row_lse)
