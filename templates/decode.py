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
def kv_bounds(b, h, q_idx, score_captures, mask_captures):
    """Four intervals of kv_idx that hold every attending key, then four in which no mask is needed: lo, hi, lo, hi, ...

    Bounds are int64 and may lie outside the sequence; an interval with lo >= hi is empty.
    """
    far = tl.full((), 1 << 62, tl.int64)
    return (-far, far, far, -far, far, -far, far, -far, -far, far, far, -far, far, -far, far, -far)


@triton.jit
def score_row(b, h, q_idx, captures):
    """Values that score_mod needs and that do not depend on kv_idx.

    b is a scalar; h and q_idx are [BLOCK_M, 1], but q_idx is a scalar if there is one query token.
    """
    return ()


@triton.jit
def score_fetch(live, b, h, q_idx, kv_idx, row, captures):
    """What score_mod reads from memory for each key: loads, whose latency passes while the scores are computed.

    `live` is as in mask_mod, None where every key attends.
    """
    return ()


@triton.jit
def score_mod(score, b, h, q_idx, kv_idx, row, fetched, captures):
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
def fetch(pointers, inside):
    """Loads captured values where `inside`, which may be None for everywhere; elsewhere what is loaded is 0.

    The branch is always taken. It keeps Triton from pipelining the load: single values would be copied to shared memory
    stages ahead, at a higher price than the latency that is saved. That there are two loads keeps the conversion to
    another layout, which waits for the value, out of the branch.
    """
    if inside is None:
        if tl.program_id(0) >= 0:
            value = tl.load(pointers)
        else:
            value = tl.load(pointers, cache_modifier=".cg")
    else:
        pointers, inside = tl.broadcast(pointers, inside)
        if tl.program_id(0) >= 0:
            value = tl.load(pointers, mask=inside, other=0)
        else:
            value = tl.load(pointers, mask=inside, other=0, cache_modifier=".cg")
    return value


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


# --- KV ranges --------------------------------------------------------------------------------------------------------


@triton.jit
def live_blocks(lo, hi, kv_len, BLOCK_N: tl.constexpr):
    """The blocks that meet [lo, hi) in any row of the tile, as a half-open range; (0, 0) if none does."""
    lo = tl.minimum(tl.maximum(lo, 0), 1 << 30)
    hi = tl.minimum(hi, kv_len)
    if len((lo + hi).shape) > 0:
        # A row that attends nowhere must not stretch the range.
        hi = tl.where(lo < hi, hi, 0)
        lo = tl.min(tl.where(lo < hi, lo, 1 << 30))
        hi = tl.max(hi)
    start = tl.where(lo < hi, lo, 0).to(tl.int32) // BLOCK_N
    return start, tl.cdiv(tl.where(lo < hi, hi, 0).to(tl.int32), BLOCK_N)


@triton.jit
def full_blocks(lo, hi, kv_len, BLOCK_N: tl.constexpr):
    """The blocks that lie inside [lo, hi) and the sequence in every row of the tile."""
    lo = tl.minimum(tl.maximum(lo, 0), 1 << 30)
    hi = tl.maximum(tl.minimum(hi, kv_len), 0)
    if len(lo.shape) > 0:
        lo = tl.max(lo)
    if len(hi.shape) > 0:
        hi = tl.min(hi)
    return tl.cdiv(lo.to(tl.int32), BLOCK_N), hi.to(tl.int32) // BLOCK_N


@triton.jit
def order(a_start, a_end, b_start, b_end):
    """Two ranges, the one that starts first in front."""
    swap = b_start < a_start
    return (
        tl.where(swap, b_start, a_start), tl.where(swap, b_end, a_end),
        tl.where(swap, a_start, b_start), tl.where(swap, a_end, b_end),
    )  # fmt: skip


@triton.jit
def longer_part(best_start, best_end, start, end, lo, hi):
    """The longer of a best piece so far and what [lo, hi) has inside [start, end)."""
    lo = tl.maximum(lo, start)
    hi = tl.minimum(hi, end)
    longer = hi - lo > best_end - best_start
    return tl.where(longer, lo, best_start), tl.where(longer, hi, best_end)


@triton.jit
def full_part(start, end, bound, kv_len, BLOCK_N: tl.constexpr, NUM_FULL: tl.constexpr):
    """The longest piece that one of the full intervals has inside [start, end); empty at `start` if there is none."""
    best_start = start
    best_end = start
    if NUM_FULL > 0:
        lo, hi = full_blocks(bound[8], bound[9], kv_len, BLOCK_N)
        best_start, best_end = longer_part(best_start, best_end, start, end, lo, hi)
    if NUM_FULL > 1:
        lo, hi = full_blocks(bound[10], bound[11], kv_len, BLOCK_N)
        best_start, best_end = longer_part(best_start, best_end, start, end, lo, hi)
    if NUM_FULL > 2:
        lo, hi = full_blocks(bound[12], bound[13], kv_len, BLOCK_N)
        best_start, best_end = longer_part(best_start, best_end, start, end, lo, hi)
        lo, hi = full_blocks(bound[14], bound[15], kv_len, BLOCK_N)
        best_start, best_end = longer_part(best_start, best_end, start, end, lo, hi)
    return best_start, best_end


@triton.jit
def next_run(block, end, start):
    """Continues at `start` with what goes past `end`."""
    return tl.where(block < end, block, block - end + start)


@triton.jit
def block_runs(
    b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr,
):  # fmt: skip
    """The blocks that a tile visits: the numbers of full and of partial ones, and what finds them.

    These are live ranges, disjoint and ascending, each a run of partial blocks, one of full and one of partial ones.
    """
    bound = kv_bounds(b, h, q_idx, score_captures, mask_captures)
    s0, e0 = live_blocks(bound[0], bound[1], kv_len, BLOCK_N)
    a0, z0 = full_part(s0, e0, bound, kv_len, BLOCK_N, NUM_FULL)
    num_full = z0 - a0
    num_partial = e0 - s0 - num_full
    if NUM_LIVE > 1:
        s1, e1 = live_blocks(bound[2], bound[3], kv_len, BLOCK_N)
        s2, e2 = live_blocks(bound[4], bound[5], kv_len, BLOCK_N)
        s3, e3 = live_blocks(bound[6], bound[7], kv_len, BLOCK_N)
        s0, e0, s1, e1 = order(s0, e0, s1, e1)
        if NUM_LIVE > 2:
            s2, e2, s3, e3 = order(s2, e2, s3, e3)
            s0, e0, s2, e2 = order(s0, e0, s2, e2)
            s1, e1, s3, e3 = order(s1, e1, s3, e3)
            s1, e1, s2, e2 = order(s1, e1, s2, e2)
        s1 = tl.maximum(s1, e0)
        e1 = tl.maximum(s1, e1)
        s2 = tl.maximum(s2, e1)
        e2 = tl.maximum(s2, e2)
        s3 = tl.maximum(s3, e2)
        e3 = tl.maximum(s3, e3)
        a0, z0 = full_part(s0, e0, bound, kv_len, BLOCK_N, NUM_FULL)
        a1, z1 = full_part(s1, e1, bound, kv_len, BLOCK_N, NUM_FULL)
        a2, z2 = full_part(s2, e2, bound, kv_len, BLOCK_N, NUM_FULL)
        a3, z3 = full_part(s3, e3, bound, kv_len, BLOCK_N, NUM_FULL)
        num_full = z0 - a0 + z1 - a1 + z2 - a2 + z3 - a3
        num_partial = e0 - s0 + e1 - s1 + e2 - s2 + e3 - s3 - num_full
        return num_full, num_partial, s0, e0, a0, z0, s1, e1, a1, z1, s2, e2, a2, z2, s3, e3, a3, z3
    else:
        return num_full, num_partial, s0, e0, a0, z0


@triton.jit
def full_block(runs, place, block_lists, NUM_LIVE: tl.constexpr):
    """The full block with the number `place`."""
    block = runs[4] + place
    if NUM_LIVE > 1:
        block = next_run(block, runs[5], runs[8])
        block = next_run(block, runs[9], runs[12])
        block = next_run(block, runs[13], runs[16])
    return block


@triton.jit
def partial_block(runs, place, block_lists, NUM_LIVE: tl.constexpr):
    """The partial block with the number `place`."""
    block = next_run(runs[2] + place, runs[4], runs[5])
    if NUM_LIVE > 1:
        block = next_run(block, runs[3], runs[6])
        block = next_run(block, runs[8], runs[9])
        block = next_run(block, runs[7], runs[10])
        block = next_run(block, runs[12], runs[13])
        block = next_run(block, runs[11], runs[14])
        block = next_run(block, runs[16], runs[17])
    return block


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
    kv_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
    live = None
    if CHECKED:
        # Past the end of the sequence, mods see its last position: their reads are proven for positions of the cache.
        live = kv_idx < kv_len
        kv_idx = tl.minimum(kv_idx, kv_len - 1)
        live = mask_mod(live, b, h, q_idx, kv_idx, mask_rows, mask_captures)
    score_fetched = score_fetch(live, b, h, q_idx, kv_idx, score_rows, score_captures)
    k = load_kv(
        key, key_descriptor, key_origin, start_n, kv_len, stride_kn, stride_kd, BLOCK_N, HEAD_DIM, BLOCK_D, CHECKED
    )  # fmt: skip
    score = tl.dot(q, tl.trans(k), input_precision=PRECISION) * scale
    score = score_mod(score, b, h, q_idx, kv_idx, score_rows, score_fetched, score_captures) * LOG2E
    if CHECKED:
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
    block_lists, score_captures, mask_captures, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od,
    num_kv_heads, max_kv_len, num_splits,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_DV: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr, SPLIT: tl.constexpr, PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First pass. Grid: (batch * num_kv_heads * row tiles, num_splits).

    query [B, Hq, Q, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv], out [B, Hq, Q, Dv], lse [B, Hq, Q] or None,
    partial_out [B * Hq * Q, num_splits, Dv] and partial_lse [B * Hq * Q, num_splits] (base 2), kv_lens [B] or None,
    q_offset a number, a [B] pointer or None, block_lists empty (block_lists.py says what else). NUM_LIVE and NUM_FULL
    count the intervals that kv_bounds uses; the mask is evaluated in every block that is not proven full.
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
    # One query token: one position for the whole tile, a scalar, so that bounds need no reduction over rows.
    offset = token[:, None] if NUM_QUERIES > 1 else 0
    q_idx = kv_len - NUM_QUERIES + offset
    if q_offset is not None:
        first_token = tl.load(q_offset + b) if q_offset.dtype.is_ptr() else q_offset
        q_idx = first_token.to(tl.int64) + offset
    h = head[:, None]
    score_rows = score_row(b, h, q_idx, score_captures)
    mask_rows = mask_row(b, h, q_idx, mask_captures)

    q = tl.load(query_row[:, None] + offs_d[None, :] * stride_qd, mask=offs_d[None, :] < HEAD_DIM, other=0.0)

    runs = block_runs(
        b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N, NUM_LIVE, NUM_FULL
    )  # fmt: skip
    num_full = runs[0]
    num_partial = runs[1]
    # The work of an item is its full blocks, then its partial ones; splits get shares that differ by one block at most.
    first = 0
    last = num_full + num_partial
    if SPLIT:
        share = last // num_splits
        extra = last % num_splits
        first = split * share + tl.minimum(split, extra)
        last = first + share + tl.where(split < extra, 1, 0)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    if NUM_FULL > 0:
        for place in tl.range(tl.minimum(first, num_full), tl.minimum(last, num_full)):
            block = full_block(runs, place, block_lists, NUM_LIVE)
            acc, m_i, l_i = attend_block(
                acc, m_i, l_i, q, block * BLOCK_N, kv_len, scale, b, h, q_idx, score_rows, score_captures, mask_rows,
                mask_captures, key, key_descriptor, key_origin, stride_kn, stride_kd,
                value, value_descriptor, value_origin, stride_vn, stride_vd,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_DV, False, PRECISION,
            )  # fmt: skip
    first = tl.maximum(first - num_full, 0)
    last = tl.maximum(last - num_full, 0)
    if first < last:
        for place in tl.range(first, last):
            block = partial_block(runs, place, block_lists, NUM_LIVE)
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
