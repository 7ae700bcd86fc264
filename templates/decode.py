"""Split-KV decode attention: every program attends one tile of query rows to one run of the KV cache.

This file is a complete Triton module: it imports, compiles and runs as it stands, and computes plain attention. The
functions between `hooks` and `kernels` have identity bodies; the generator replaces them by the text of a user's mods.

Two kernels make a call. `decode_split` keeps the online softmax (Milakov and Gimelshein, arXiv:1805.02867) of a run of
KV blocks; with one split it writes the output, else a normalised partial output and its log-sum-exp. `decode_combine`
merges the partials of a row. Both are launched with programmatic dependent launch where the target has it, so every
program waits (`gdc_wait`) before it touches any global memory.

Rows: the `GROUP_SIZE * NUM_QUERIES` query rows that share a KV head are packed, row `r` is query head
`r // NUM_QUERIES` of the group and query token `r % NUM_QUERIES`. Logits inside the loop are in base 2.
"""

import triton
import triton.language as tl

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# --- hooks ------------------------------------------------------------------------------------------------------------


@triton.jit
def score_row(b, h, q_idx, captures):
    """Values that score_mod needs and that do not depend on kv_idx; b is a scalar, h and q_idx are [BLOCK_M, 1]."""
    return ()


@triton.jit
def score_mod(score, b, h, q_idx, kv_idx, row, captures):
    """New logits from `score` [BLOCK_M, BLOCK_N], float32, natural-log units; kv_idx is [1, BLOCK_N]."""
    return score


@triton.jit
def mask_row(b, h, q_idx, captures):
    """Values that mask_mod needs and that do not depend on kv_idx."""
    return ()


@triton.jit
def mask_mod(live, b, h, q_idx, kv_idx, row, captures):
    """Narrows `live` [1, BLOCK_N] to the pairs that attend."""
    return live


@triton.jit
def kv_origin(base, b, kv_head, steps):
    """Where the rows of one KV head start, from `steps` (stride_b, stride_h): the address of its first row."""
    return base + b.to(tl.int64) * steps[0] + kv_head.to(tl.int64) * steps[1]


@triton.jit
def load_kv(
    base, descriptor, origin, start_n, kv_len, stride_n, stride_d, BLOCK_N: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, CHECKED: tl.constexpr,
):  # fmt: skip
    """Loads rows `start_n .. start_n + BLOCK_N` as [BLOCK_N, BLOCK_D]; CHECKED reads zeros from `kv_len` on."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    offs_d = tl.arange(0, BLOCK_D)
    pointers = origin + offs_n.to(tl.int64)[:, None] * stride_n + offs_d[None, :] * stride_d
    if CHECKED:
        return tl.load(pointers, mask=(offs_n[:, None] < kv_len) & (offs_d[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < BLOCK_D:
        return tl.load(pointers, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def attend_block(
    acc, m_i, l_i, q, start_n, kv_len, scale, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures,
    key, key_descriptor, key_origin, stride_kn, stride_kd,
    value, value_descriptor, value_origin, stride_vn, stride_vd,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, CHECKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the KV block at `start_n`; CHECKED evaluates the mask and the length."""
    k = load_kv(
        key, key_descriptor, key_origin, start_n, kv_len, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, CHECKED
    )  # fmt: skip
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    kv_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
    score = score_mod(score, b, h, q_idx, kv_idx, score_rows, score_captures) * LOG2E
    if CHECKED:
        live = mask_mod(kv_idx < kv_len, b, h, q_idx, kv_idx, mask_rows, mask_captures)
        score = tl.where(live, score, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    p = tl.exp2(score - m_safe[:, None])
    alpha = tl.exp2(m_i - m_safe)
    l_i = l_i * alpha + tl.sum(p, 1)
    v = load_kv(
        value, value_descriptor, value_origin, start_n, kv_len, stride_vn, stride_vd, BLOCK_N, V_HEAD_DIM, BLOCK_DV,
        CHECKED,
    )  # fmt: skip
    acc = acc * alpha[:, None]
    acc += tl.dot(p.to(v.dtype), v, input_precision=PRECISION)
    return acc, m_new, l_i


@triton.jit
def decode_split(
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_lse, kv_lens, q_offset,
    score_captures, mask_captures, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    num_kv_heads, max_kv_len, num_splits,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    SPLIT: tl.constexpr, ALL_CHECKED: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First pass. Grid: (batch * num_kv_heads * row tiles, num_splits).

    query [B, Hq, Q, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv], out [B, Hq, Q, Dv], lse [B, Hq, Q] or None,
    partial_out [B * Hq * Q, num_splits, Dv] and partial_lse [B * Hq * Q, num_splits] (base 2), kv_lens [B] or None,
    q_offset a number, a [B] pointer or None. ALL_CHECKED evaluates the mask in every block.
    """
    NUM_ROWS: tl.constexpr = GROUP_SIZE * NUM_QUERIES
    NUM_TILES: tl.constexpr = (NUM_ROWS + BLOCK_M - 1) // BLOCK_M
    item = tl.program_id(0) // NUM_TILES
    split = tl.program_id(1)
    b = item // num_kv_heads
    kv_head = item % num_kv_heads
    rows = (tl.program_id(0) % NUM_TILES) * BLOCK_M + tl.arange(0, BLOCK_M)
    row_valid = rows < NUM_ROWS
    # A padding row computes what the last row computes, so that whatever is proven of valid rows holds for it.
    rows = tl.minimum(rows, NUM_ROWS - 1)
    head = kv_head * GROUP_SIZE + rows // NUM_QUERIES
    token = rows % NUM_QUERIES
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    query_row = query + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qm
    key_origin = kv_origin(key, b, kv_head, key_steps)
    value_origin = kv_origin(value, b, kv_head, value_steps)
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    kv_len = max_kv_len
    if kv_lens is not None:
        kv_len = tl.maximum(tl.minimum(tl.load(kv_lens + b), max_kv_len), 0).to(tl.int32)
    q_idx = kv_len - NUM_QUERIES + token
    if q_offset is not None:
        first = tl.load(q_offset + b) if q_offset.dtype.is_ptr() else q_offset
        q_idx = first.to(tl.int64) + token
    q_idx = q_idx[:, None]
    h = head[:, None]
    score_rows = score_row(b, h, q_idx, score_captures)
    mask_rows = mask_row(b, h, q_idx, mask_captures)

    q = tl.load(query_row[:, None] + offs_d[None, :] * stride_qd, mask=offs_d[None, :] < HEAD_DIM, other=0.0)

    first_block = 0
    last_block = tl.cdiv(kv_len, BLOCK_N)
    if SPLIT:
        # Splits differ by one block at most; one that gets none contributes weight 0.
        share = last_block // num_splits
        extra = last_block % num_splits
        first_block = split * share + tl.minimum(split, extra)
        last_block = first_block + share + tl.where(split < extra, 1, 0)
    first_checked = first_block
    if not ALL_CHECKED:
        first_checked = tl.maximum(tl.minimum(last_block, kv_len // BLOCK_N), first_block)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if not ALL_CHECKED:
        for block in tl.range(first_block, first_checked):
            acc, m_i, l_i = attend_block(
                acc, m_i, l_i, q, block * BLOCK_N, kv_len, scale, b, h, q_idx, score_rows, score_captures, mask_rows,
                mask_captures, key, key_descriptor, key_origin, stride_kn, stride_kd,
                value, value_descriptor, value_origin, stride_vn, stride_vd,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, PRECISION,
            )  # fmt: skip
    if first_checked < last_block:
        for block in tl.range(first_checked, last_block):
            acc, m_i, l_i = attend_block(
                acc, m_i, l_i, q, block * BLOCK_N, kv_len, scale, b, h, q_idx, score_rows, score_captures, mask_rows,
                mask_captures, key, key_descriptor, key_origin, stride_kn, stride_kd,
                value, value_descriptor, value_origin, stride_vn, stride_vd,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, True, PRECISION,
            )  # fmt: skip

    # No live key: l_i is 0, the output is 0 and the log-sum-exp is -inf.
    acc = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    row_lse = m_i + tl.log2(l_i)
    store = row_valid[:, None] & (offs_dv[None, :] < V_HEAD_DIM)
    flat_row = (b.to(tl.int64) * num_kv_heads + kv_head) * NUM_ROWS + rows
    if SPLIT:
        place = flat_row * num_splits + split
        tl.store(partial_lse + place, row_lse, mask=row_valid)
        tl.store(partial_out + place[:, None] * V_HEAD_DIM + offs_dv[None, :], acc, mask=store)
    else:
        out_row = out + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_om
        tl.store(out_row[:, None] + offs_dv[None, :] * stride_od, acc.to(out.dtype.element_ty), mask=store)
        if lse is not None:
            tl.store(lse + flat_row, row_lse * LN2, mask=row_valid)


@triton.jit
def decode_combine(
    out, lse, partial_out, partial_lse, stride_ob, stride_oh, stride_om, stride_od, num_q_heads, num_splits,
    NUM_QUERIES: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Second pass: merges the partial outputs of one row. Grid: (B * Hq * Q, cdiv(Dv, BLOCK_DV))."""
    flat_row = tl.program_id(0)
    offs_s = tl.arange(0, BLOCK_S)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    b = flat_row // (num_q_heads * NUM_QUERIES)
    head = flat_row // NUM_QUERIES % num_q_heads
    token = flat_row % NUM_QUERIES
    out_row = out + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_om
    first = flat_row.to(tl.int64) * num_splits
    if PDL:
        gdc_wait()
        gdc_launch_dependents()

    m_i = float("-inf")
    l_i = 0.0
    acc = tl.zeros([BLOCK_DV], tl.float32)
    for start in tl.range(0, num_splits, BLOCK_S):
        valid = start + offs_s < num_splits
        part_lse = tl.load(partial_lse + first + start + offs_s, mask=valid, other=float("-inf"))
        part = tl.load(
            partial_out + (first + start + offs_s)[:, None] * V_HEAD_DIM + offs_dv[None, :],
            mask=valid[:, None] & (offs_dv[None, :] < V_HEAD_DIM),
            other=0.0,
        )
        m_new = tl.maximum(m_i, tl.max(part_lse, 0))
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        weight = tl.exp2(part_lse - m_safe)
        alpha = tl.exp2(m_i - m_safe)
        l_i = l_i * alpha + tl.sum(weight, 0)
        acc = acc * alpha + tl.sum(part * weight[:, None], 0)
        m_i = m_new

    merged = acc / tl.where(l_i == 0.0, 1.0, l_i)
    tl.store(out_row + offs_dv * stride_od, merged.to(out.dtype.element_ty), mask=offs_dv < V_HEAD_DIM)
    if lse is not None:
        if tl.program_id(1) == 0:
            tl.store(lse + flat_row, (m_i + tl.log2(l_i)) * LN2)
