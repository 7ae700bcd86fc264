"""Split-KV decode attention: every program attends one tile of query rows to one run of the KV cache.

This file is a complete Triton module: it imports, compiles and runs as it stands, and computes plain attention. The
functions between `hooks` and `kernels` have identity bodies; the generator replaces them by the text of a user's mods.

Two kernels make a call. `decode_split` keeps the online softmax (Milakov and Gimelshein, arXiv:1805.02867) of a run of
KV blocks; with one split it writes the output, else a partial output with the largest score and the sum of weights of
each row. `decode_combine` merges the partials of a row. Both are launched with programmatic dependent launch where the
target has it, so every program waits (`gdc_wait`) before it touches any global memory.

Rows: the `GROUP_SIZE * NUM_QUERIES` query rows that share a KV head are packed, row `r` is query head
`r // NUM_QUERIES` of the group and query token `r % NUM_QUERIES`.

Which keys are read: a tile of rows has up to four *spans*, each from the first to the last key that an interval of
`kv_bounds` has in any of its rows. Blocks that no span meets are not visited. In a block that is not wholly live, keys
outside the spans are not loaded: they may hold anything, and no page entry leads to them.
"""

import triton
import triton.language as tl

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HAS_SCORE_MOD = tl.constexpr(False)  # the generator writes True where there is one

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
def find_pages(page_table, b, start_n, spans, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr):
    """Where in a paged cache the keys from `start_n` on lie; read a step ahead of the keys themselves."""
    return ()


@triton.jit
def kv_origin(base, b, kv_head, steps):
    """Where the rows of one KV head start, from `steps` (stride_b, stride_h): the address of its first row."""
    return base + b.to(tl.int64) * steps[0] + kv_head.to(tl.int64) * steps[1]


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
    pointers = cache[0] + offs_n.to(tl.int64)[:, None] * cache[3] + offs_d[None, :] * cache[4]
    if CHECKED:
        return tl.load(pointers, mask=in_spans(offs_n, spans)[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)
    elif HEAD_DIM < COLUMN + BLOCK_D:
        return tl.load(pointers, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_scales(
    scales, pages, b, kv_head, start_n, spans, BLOCK_N: tl.constexpr, PAGE_SIZE: tl.constexpr, CHECKED: tl.constexpr
):
    """Loads the scale of each key [BLOCK_N] from `scales` (pointer, stride_b, stride_h, stride_n); CHECKED as above."""
    offs_n = start_n + tl.arange(0, BLOCK_N)
    pointers = scales[0] + b.to(tl.int64) * scales[1] + kv_head.to(tl.int64) * scales[2] + offs_n * scales[3]
    if CHECKED:
        return tl.load(pointers, mask=in_spans(offs_n, spans), other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


# --- KV ranges --------------------------------------------------------------------------------------------------------


@triton.jit
def live_span(lo, hi, kv_len):
    """The keys from the first to the last one of [lo, hi) in any row of the tile, int32; (0, 0) if there is none."""
    lo = tl.minimum(tl.maximum(lo, 0), 1 << 30)
    hi = tl.minimum(hi, kv_len)
    if len((lo + hi).shape) > 0:
        # A row that attends nowhere must not stretch the span.
        hi = tl.where(lo < hi, hi, 0)
        lo = tl.min(tl.where(lo < hi, lo, 1 << 30))
        hi = tl.max(hi)
    return tl.where(lo < hi, lo, 0).to(tl.int32), tl.where(lo < hi, hi, 0).to(tl.int32)


@triton.jit
def live_spans(bound, kv_len, NUM_LIVE: tl.constexpr):
    """The spans of a tile: lo, hi, lo, hi, ... They may overlap, and come in any order."""
    spans = live_span(bound[0], bound[1], kv_len)
    if NUM_LIVE > 1:
        spans = spans + live_span(bound[2], bound[3], kv_len)
    if NUM_LIVE > 2:
        spans = spans + live_span(bound[4], bound[5], kv_len) + live_span(bound[6], bound[7], kv_len)
    return spans


@triton.jit
def in_spans(kv_idx, spans):
    """Which keys lie in a span."""
    inside = (kv_idx >= spans[0]) & (kv_idx < spans[1])
    for i in tl.static_range(2, len(spans), 2):
        inside = inside | ((kv_idx >= spans[i]) & (kv_idx < spans[i + 1]))
    return inside


@triton.jit
def meets_spans(start_n, spans, BLOCK_N: tl.constexpr):
    """Whether a span has a key of the block at `start_n`."""
    meets = (start_n + BLOCK_N > spans[0]) & (start_n < spans[1])
    for i in tl.static_range(2, len(spans), 2):
        meets = meets | ((start_n + BLOCK_N > spans[i]) & (start_n < spans[i + 1]))
    return meets


@triton.jit
def inside_a_span(start_n, spans, BLOCK_N: tl.constexpr):
    """Whether one span has all keys of the block at `start_n`."""
    inside = (start_n >= spans[0]) & (start_n + BLOCK_N <= spans[1])
    for i in tl.static_range(2, len(spans), 2):
        inside = inside | ((start_n >= spans[i]) & (start_n + BLOCK_N <= spans[i + 1]))
    return inside


@triton.jit
def span_blocks(lo, hi, BLOCK_N: tl.constexpr):
    """The blocks that meet a span, as a half-open range; (0, 0) if it is empty."""
    return lo // BLOCK_N, tl.cdiv(hi, BLOCK_N)


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
    """The blocks that a tile visits: the numbers of full and of partial ones, and what finds them; then its spans.

    These are live ranges, disjoint and ascending, each a run of partial blocks, one of full and one of partial ones.
    """
    bound = kv_bounds(b, h, q_idx, score_captures, mask_captures)
    spans = live_spans(bound, kv_len, NUM_LIVE)
    s0, e0 = span_blocks(spans[0], spans[1], BLOCK_N)
    a0, z0 = full_part(s0, e0, bound, kv_len, BLOCK_N, NUM_FULL)
    num_full = z0 - a0
    num_partial = e0 - s0 - num_full
    if NUM_LIVE > 1:
        s1, e1 = span_blocks(spans[2], spans[3], BLOCK_N)
        s2, e2 = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        s3, e3 = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        s0, e0, s1, e1 = order(s0, e0, s1, e1)
        if NUM_LIVE > 2:
            s2, e2 = span_blocks(spans[4], spans[5], BLOCK_N)
            s3, e3 = span_blocks(spans[6], spans[7], BLOCK_N)
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
        return (num_full, num_partial, s0, e0, a0, z0, s1, e1, a1, z1, s2, e2, a2, z2, s3, e3, a3, z3), spans
    else:
        return (num_full, num_partial, s0, e0, a0, z0), spans


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


# --- schedule ---------------------------------------------------------------------------------------------------------


@triton.jit
def read_length(lengths, b, limit):
    """Lengths of sequences `b`, between 0 and `limit`, int32."""
    if lengths is not None:
        limit = tl.maximum(tl.minimum(tl.load(lengths + b), limit), 0).to(tl.int32)
    return limit


@triton.jit
def first_position(q_offset, b, kv_len, q_len):
    """Position of the first query token: int64 if the caller gives it, else the end of the sequence."""
    if q_offset is not None:
        return (tl.load(q_offset + b) if q_offset.dtype.is_ptr() else q_offset).to(tl.int64)
    else:
        return kv_len - q_len


@triton.jit
def numbers(SIZE: tl.constexpr):
    """The numbers from 0 to SIZE."""
    return tl.arange(0, SIZE)


@triton.jit
def sums_before(weights):
    """The sum of all weights in front of each."""
    return tl.cumsum(weights, 0) - weights


@triton.jit
def sequence_weights(
    sequences, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures, max_kv_len, last_head, max_weight,
    NUM_QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, NUM_LIVE: tl.constexpr,
):  # fmt: skip
    """How many blocks an item of each sequence is about to visit, int32; 0 where there is none, which is exact.

    An estimate, from the newest token and the outer heads: it decides who does the work, never which work is done.
    """
    b = tl.minimum(sequences, batch - 1)
    kv_len = read_length(kv_lens, b, max_kv_len)
    q_len = read_length(q_lens, b, NUM_QUERIES)
    num_tokens = tl.maximum(q_len, 1)
    newest = first_position(q_offset, b, kv_len, num_tokens) + num_tokens - 1
    h = (tl.arange(0, 2) * last_head)[None, :]
    bound = kv_bounds(b[:, None], h, (newest + tl.zeros_like(b))[:, None], score_captures, mask_captures)
    weight = tl.zeros([sequences.shape[0], 2], tl.int32)
    end = (kv_len + tl.zeros_like(b))[:, None]
    for i in tl.static_range(NUM_LIVE):
        lo = tl.minimum(tl.maximum(bound[2 * i], 0), 1 << 30).to(tl.int32)
        hi = tl.maximum(tl.minimum(bound[2 * i + 1], end), 0).to(tl.int32)
        weight += tl.where(lo < hi, (hi + BLOCK_N - 1) // BLOCK_N - lo // BLOCK_N, 0)
    busy = (sequences < batch) & (kv_len > 0) & (q_len > 0)
    return tl.where(busy, tl.minimum(tl.maximum(tl.max(weight, 1), 1), max_weight), 0)


@triton.jit
def find_slot(slot, sequences, starts, weights):
    """The sequence among `sequences` that holds a slot, its first slot and its weight; zeros if none does."""
    here = (starts <= slot) & (slot < starts + weights)
    found = tl.sum(tl.where(here, sequences, 0), 0)
    return found, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, weights, 0), 0)


@triton.jit
def find_in_chunks(
    slot, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures, max_kv_len, last_head, max_weight,
    NUM_QUERIES: tl.constexpr, BLOCK_N: tl.constexpr, NUM_LIVE: tl.constexpr, BLOCK_B: tl.constexpr,
):  # fmt: skip
    """As find_slot, among all sequences; also how many slots there are in all."""
    found = tl.zeros((), tl.int32)
    first = tl.zeros((), tl.int32)
    weight = tl.zeros((), tl.int32)
    total = tl.zeros((), tl.int32)
    for chunk in tl.range(0, batch, BLOCK_B):
        sequences = chunk + numbers(BLOCK_B)
        weights = sequence_weights(
            sequences, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures, max_kv_len, last_head,
            max_weight, NUM_QUERIES, BLOCK_N, NUM_LIVE,
        )  # fmt: skip
        starts = total + sums_before(weights)
        found_here, first_here, weight_here = find_slot(slot, sequences, starts, weights)
        found += found_here
        first += first_here
        weight += weight_here
        total += tl.sum(weights, 0)
    return found, first, weight, total


# --- quantised caches -------------------------------------------------------------------------------------------------


@triton.jit
def unpack(pairs, KIND: tl.constexpr):
    """The even and the odd columns of a quantised tile whose columns were loaded two by two, as int16: exact float16.

    A tensor core takes pairs of rows of V. Words of two columns can be transposed on their way to it, bytes cannot.
    """
    if KIND == "fp8e4nv":
        return tl.inline_asm_elementwise(
            """{
            .reg .b16 lo, hi;
            .reg .b32 a, b;
            mov.b32 {lo, hi}, $2;
            cvt.rn.f16x2.e4m3x2 a, lo;
            cvt.rn.f16x2.e4m3x2 b, hi;
            prmt.b32 $0, a, b, 0x5410;
            prmt.b32 $1, a, b, 0x7632;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    elif KIND == "fp8e5":  # the upper half of a float16
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 zero;
            mov.b32 zero, 0;
            prmt.b32 $0, $2, zero, 0x2404;
            and.b32 $1, $2, 0xFF00FF00;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip
    else:  # int8: as the last bits of 1024 + 128 + x
        return tl.inline_asm_elementwise(
            """{
            .reg .b32 bytes, high, less, a, b;
            mov.b32 high, 0x64646464;
            mov.b32 less, 0x64806480;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 a, bytes, high, 0x4240;
            prmt.b32 b, bytes, high, 0x4341;
            sub.rn.f16x2 $0, a, less;
            sub.rn.f16x2 $1, b, less;
            }""",
            "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2,
        )  # fmt: skip


@triton.jit
def power_of_two(x):
    """The largest power of two that is not above |x|; 1 where x is 0 or too small for that."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power == 0.0, 1.0, power)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def attend_block(
    acc, m_i, l_i, v_unit, q, q_rest, keys, values, key_scales, value_scales, scale, start_n, pages, spans, kv_len, b,
    kv_head, h, q_idx, score_rows, score_captures, mask_rows, mask_captures,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, SHARED: tl.constexpr,
    PACKED: tl.constexpr, CHECKED: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One step of the online softmax over the KV block at `start_n`; CHECKED evaluates the mask and the spans.

    `acc` is a tuple: all columns, or even and odd columns where K and V are PACKED, in units of `v_unit`, which
    is the largest weight of a row so far where values have scales of their own.
    """
    PER_WORD: tl.constexpr = 1 if PACKED is None else 2
    kv_idx = start_n + tl.arange(0, BLOCK_N)[None, :]
    live = None
    if CHECKED:
        # Past the end of the sequence, mods see its last position: their reads are proven for positions of the cache.
        live = in_spans(kv_idx, spans)
        kv_idx = tl.minimum(kv_idx, kv_len - 1)
        live = mask_mod(live, b, h, q_idx, kv_idx, mask_rows, mask_captures)
    score_fetched = score_fetch(live, b, h, q_idx, kv_idx, score_rows, score_captures)
    if len(key_scales) == 4:
        key_scale = load_scales(key_scales, pages, b, kv_head, start_n, spans, BLOCK_N, PAGE_SIZE, CHECKED)
    if len(value_scales) == 4:
        value_scale = load_scales(value_scales, pages, b, kv_head, start_n, spans, BLOCK_N, PAGE_SIZE, CHECKED)
    k = load_kv(
        keys, pages, start_n, spans, BLOCK_N, 0, HEAD_DIM // PER_WORD, BLOCK_D // PER_WORD, PAGE_SIZE, CHECKED
    )  # fmt: skip
    if PACKED is not None:
        k_even, k_odd = unpack(k, PACKED)
        score = tl.dot(q, tl.trans(k_even))
        score = tl.dot(q_rest, tl.trans(k_odd), score)
    else:
        k = k.to(q.dtype)
        score = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if BLOCK_R > 0:
        k_rest = load_kv(keys, pages, start_n, spans, BLOCK_N, BLOCK_D, HEAD_DIM, BLOCK_R, PAGE_SIZE, CHECKED)
        score = tl.dot(q_rest, tl.trans(k_rest.to(q.dtype)), score, input_precision=PRECISION)
    score = score * scale
    if len(key_scales) == 4:
        score = score * key_scale[None, :]
    score = score_mod(score, b, h, q_idx, kv_idx, score_rows, score_fetched, score_captures)
    if CHECKED:
        score = tl.where(live, score, float("-inf"))
    m_new = tl.maximum(m_i, tl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    # The difference is scaled, not the scores: these may be as large as float32 holds.
    p = tl.exp2((score - m_safe[:, None]) * LOG2E)
    alpha = tl.exp2((m_i - m_safe) * LOG2E)
    l_i = l_i * alpha + tl.sum(p, 1)
    if len(value_scales) == 4:
        # Weights may be rounded to float16, whose range is small: a row keeps them relative to its largest one so far.
        p = p * value_scale[None, :]
        unit = v_unit * alpha
        v_unit = tl.maximum(tl.maximum(unit, tl.max(tl.abs(p), 1)), 1e-30)
        p = p / v_unit[:, None]
        alpha = unit / v_unit
    p = p.to(q.dtype)
    if SHARED:
        v = k
    else:
        v = load_kv(
            values, pages, start_n, spans, BLOCK_N, 0, V_HEAD_DIM // PER_WORD, BLOCK_DV // PER_WORD, PAGE_SIZE, CHECKED
        )  # fmt: skip
    if PACKED is not None:
        v_even, v_odd = unpack(v, PACKED)
        acc = (tl.dot(p, v_even, acc[0] * alpha[:, None]), tl.dot(p, v_odd, acc[1] * alpha[:, None]))
    else:
        acc = (acc[0] * alpha[:, None] + tl.dot(p, v.to(q.dtype), input_precision=PRECISION),)
    return acc, m_new, l_i, v_unit


@triton.jit
def item_scale(scales, b, kv_head):
    """The scale that holds for all keys of one head of one sequence; 1 where each key has its own."""
    if len(scales) == 1:
        return scales[0]
    elif len(scales) == 3:
        return tl.load(scales[0] + b.to(tl.int64) * scales[1] + kv_head.to(tl.int64) * scales[2]).to(tl.float32)
    else:
        return 1.0


@triton.jit
def add_sink(m_i, l_i, sink):
    """Lets a logit `sink` join a softmax without a value: the factor for what is accumulated, m_i and l_i."""
    m_new = tl.maximum(m_i, sink)
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = tl.exp2((m_i - m_safe) * LOG2E)
    return alpha, m_new, l_i * alpha + tl.exp2((sink - m_safe) * LOG2E)


@triton.jit
def log_sum_exp(m_i, l_i):
    """The log-sum-exp from the largest score and the sum of weights; +inf where a score is, whose weight is NaN."""
    return tl.where(m_i == float("inf"), m_i, m_i + tl.log2(l_i) * LN2)


@triton.jit
def query_rows(rows, kv_head, GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr):
    """The rows of a tile, which of them there are, and the query head and token of each."""
    NUM_ROWS: tl.constexpr = GROUP_SIZE * NUM_QUERIES
    row_valid = rows < NUM_ROWS
    # A padding row computes what the last row computes, so that whatever is proven of valid rows holds for it.
    rows = tl.minimum(rows, NUM_ROWS - 1)
    return rows, row_valid, kv_head * GROUP_SIZE + rows // NUM_QUERIES, rows % NUM_QUERIES


@triton.jit
def positions(b, token, kv_lens, q_lens, q_offset, max_kv_len, NUM_QUERIES: tl.constexpr):
    """Length of a sequence, how many query tokens it has, and their positions: a scalar if there is at most one."""
    kv_len = read_length(kv_lens, b, max_kv_len)
    # One query token: one position for the whole tile, a scalar, so that bounds need no reduction over rows.
    offset = token[:, None] if NUM_QUERIES > 1 else 0
    num_tokens = NUM_QUERIES
    if q_lens is not None:
        num_tokens = read_length(q_lens, b, NUM_QUERIES)
        offset = tl.minimum(offset, tl.maximum(num_tokens, 1) - 1)
        q_idx = first_position(q_offset, b, kv_len, tl.maximum(num_tokens, 1)) + offset
    else:
        q_idx = first_position(q_offset, b, kv_len, NUM_QUERIES) + offset
    return kv_len, num_tokens, q_idx


@triton.jit
def share_of(runs, start, end, parts, num_tokens, q_lens, SPLIT: tl.constexpr, BALANCED: tl.constexpr):
    """The share `start .. end` of `parts` of an item: its full blocks come first, then its partial ones."""
    first = 0
    last = runs[0] + runs[1]
    if q_lens is not None:
        last = tl.where(num_tokens > 0, last, 0)
    if BALANCED:
        if last == parts:
            first = start
            last = end
        else:
            count = last.to(tl.int64)
            first = (count * start // parts).to(tl.int32)
            last = (count * end // parts).to(tl.int32)
    elif SPLIT:  # shares differ by one block at most
        share = last // parts
        extra = last % parts
        first = start * share + tl.minimum(start, extra)
        last = first + share + tl.where(start < extra, 1, 0)
    return first, last


@triton.jit
def store_run(
    acc, m_i, l_i, lanes, rows, row_valid, head, token, offs_dv, b, kv_head, place, whole, num_tokens, out, lse,
    partial_out, partial_max, partial_sum, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads,
    num_splits, GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr, BALANCED: tl.constexpr,
):  # fmt: skip
    """Writes columns `offs_dv` of the output of a `whole` item, else of its partial result at `place`."""
    # No live key: l_i is 0, the output is 0 and the log-sum-exp is -inf.
    store = row_valid[:, None] & (offs_dv[None, :] < V_HEAD_DIM)
    flat_row = (b.to(tl.int64) * num_kv_heads + kv_head) * (GROUP_SIZE * NUM_QUERIES) + rows
    if SPLIT:
        if BALANCED:
            partial_row = (place.to(tl.int64) * tl.num_programs(1) + tl.program_id(1)) * BLOCK_M + lanes
        else:
            partial_row = flat_row * num_splits + place
        if not whole:
            tl.store(partial_max + partial_row, m_i, mask=row_valid)
            tl.store(partial_sum + partial_row, l_i, mask=row_valid)
            tl.store(partial_out + partial_row[:, None] * V_HEAD_DIM + offs_dv[None, :], acc, mask=store)
    if BALANCED or not SPLIT:
        if whole:
            if sinks is not None:
                alpha, m_i, l_i = add_sink(m_i, l_i, tl.load(sinks + head).to(tl.float32))
                acc = acc * alpha[:, None]
            result = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
            row_lse = log_sum_exp(m_i, l_i)
            if q_lens is not None:
                result = tl.where((token < num_tokens)[:, None], result, 0.0)
                row_lse = tl.where(token < num_tokens, row_lse, float("-inf"))
            out_row = out + b.to(tl.int64) * stride_ob + head.to(tl.int64) * stride_oh + token.to(tl.int64) * stride_om
            tl.store(out_row[:, None] + offs_dv[None, :] * stride_od, result.to(out.dtype.element_ty), mask=store)
            if lse is not None:
                tl.store(lse + flat_row, row_lse, mask=row_valid)


@triton.jit
def attend_run(
    b, kv_head, tile, start, end, parts, place, whole,
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_max, partial_sum, kv_lens,
    q_lens, q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures, mask_captures, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, max_kv_len, num_splits,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr, PAGE_SIZE: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr, SPLIT: tl.constexpr, BALANCED: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Attends one item, a tile of query rows, to the share `start .. end` of `parts` of its KV blocks.

    A `whole` item writes the output; otherwise its partial result goes to `place`.
    """
    lanes = tl.arange(0, BLOCK_M)
    rows, row_valid, head, token = query_rows(tile * BLOCK_M + lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_d = tl.arange(0, BLOCK_D)
    offs_dv = tl.arange(0, BLOCK_DV)
    query_row = query + b.to(tl.int64) * stride_qb + head.to(tl.int64) * stride_qh + token.to(tl.int64) * stride_qm
    keys = (kv_origin(key, b, kv_head, key_steps), key_descriptor, key_steps, stride_kn, stride_kd)
    values = (kv_origin(value, b, kv_head, value_steps), value_descriptor, value_steps, stride_vn, stride_vd)
    if PDL and not BALANCED:
        gdc_wait()
        gdc_launch_dependents()

    kv_len, num_tokens, q_idx = positions(b, token, kv_lens, q_lens, q_offset, max_kv_len, NUM_QUERIES)
    h = head[:, None]
    score_rows = score_row(b, h, q_idx, score_captures)
    mask_rows = mask_row(b, h, q_idx, mask_captures)
    scale = scale * item_scale(key_scales, b, kv_head)

    q_rest = None
    if PACKED is not None:
        offs_q = 2 * tl.arange(0, BLOCK_D // 2)[None, :]
        q = tl.load(query_row[:, None] + offs_q * stride_qd, mask=offs_q < HEAD_DIM, other=0.0)
        q_rest = tl.load(query_row[:, None] + (offs_q + 1) * stride_qd, mask=offs_q < HEAD_DIM, other=0.0)
        if q.dtype != tl.float16:
            # Each row in units of its own, so that float16 holds it.
            unit = power_of_two(tl.max(tl.maximum(tl.abs(q), tl.abs(q_rest)).to(tl.float32), 1))[:, None]
            q = (q.to(tl.float32) / unit).to(tl.float16)
            q_rest = (q_rest.to(tl.float32) / unit).to(tl.float16)
            scale = scale * unit
    else:
        q = tl.load(query_row[:, None] + offs_d[None, :] * stride_qd, mask=offs_d[None, :] < HEAD_DIM, other=0.0)
    if BLOCK_R > 0:
        offs_r = BLOCK_D + tl.arange(0, BLOCK_R)
        q_rest = tl.load(query_row[:, None] + offs_r[None, :] * stride_qd, mask=offs_r[None, :] < HEAD_DIM, other=0.0)

    runs, spans = block_runs(
        b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N, NUM_LIVE, NUM_FULL
    )  # fmt: skip
    num_full = runs[0]
    first, last = share_of(runs, start, end, parts, num_tokens, q_lens, SPLIT, BALANCED)

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([BLOCK_M], tl.float32)
    v_unit = 1.0
    if len(value_scales) == 4:
        v_unit = tl.zeros([BLOCK_M], tl.float32)
    if PACKED is not None:
        acc = (tl.zeros([BLOCK_M, BLOCK_DV // 2], tl.float32), tl.zeros([BLOCK_M, BLOCK_DV // 2], tl.float32))
    else:
        acc = (tl.zeros([BLOCK_M, BLOCK_DV], tl.float32),)
    if NUM_FULL > 0:
        last_full = tl.minimum(last, num_full)
        block = full_block(runs, first, block_lists, NUM_LIVE)
        pages = find_pages(page_table, b, block * BLOCK_N, spans, BLOCK_N, PAGE_SIZE)
        for i in tl.range(tl.minimum(first, num_full), last_full):
            start_n = block * BLOCK_N
            here = pages
            block = full_block(runs, i + 1, block_lists, NUM_LIVE)
            pages = find_pages(page_table, b, block * BLOCK_N, spans, BLOCK_N, PAGE_SIZE)
            acc, m_i, l_i, v_unit = attend_block(
                acc, m_i, l_i, v_unit, q, q_rest, keys, values, key_scales, value_scales, scale, start_n, here, spans,
                kv_len, b, kv_head, h, q_idx, score_rows, score_captures, mask_rows, mask_captures,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_DV, PAGE_SIZE, SHARED, PACKED, False, PRECISION,
            )  # fmt: skip
    first = tl.maximum(first - num_full, 0)
    last = tl.maximum(last - num_full, 0)
    if first < last:
        block = partial_block(runs, first, block_lists, NUM_LIVE)
        pages = find_pages(page_table, b, block * BLOCK_N, spans, BLOCK_N, PAGE_SIZE)
        for i in tl.range(first, last):
            start_n = block * BLOCK_N
            here = pages
            block = partial_block(runs, i + 1, block_lists, NUM_LIVE)
            pages = find_pages(page_table, b, block * BLOCK_N, spans, BLOCK_N, PAGE_SIZE)
            acc, m_i, l_i, v_unit = attend_block(
                acc, m_i, l_i, v_unit, q, q_rest, keys, values, key_scales, value_scales, scale, start_n, here, spans,
                kv_len, b, kv_head, h, q_idx, score_rows, score_captures, mask_rows, mask_captures,
                HEAD_DIM, V_HEAD_DIM, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_DV, PAGE_SIZE, SHARED, PACKED, True, PRECISION,
            )  # fmt: skip

    if PACKED is not None:
        acc = tl.reshape(tl.join(acc[0], acc[1]), [BLOCK_M, BLOCK_DV])
    else:
        acc = acc[0]
    if len(value_scales) == 4:
        acc = acc * v_unit[:, None]
    else:
        acc = acc * item_scale(value_scales, b, kv_head)
    store_run(
        acc, m_i, l_i, lanes, rows, row_valid, head, token, offs_dv, b, kv_head, place, whole, num_tokens, out, lse,
        partial_out, partial_max, partial_sum, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads,
        num_splits, GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM, BLOCK_M, SPLIT, BALANCED,
    )  # fmt: skip


@triton.jit
def decode_split(
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_max, partial_sum, item_parts,
    kv_lens, q_lens, q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures, mask_captures,
    scale, stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn,
    stride_vd, stride_ob, stride_oh, stride_om, stride_od, batch, num_kv_heads, max_kv_len, num_splits, max_weight,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, PAGE_SIZE: tl.constexpr, SHARED: tl.constexpr, PACKED: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr, SPLIT: tl.constexpr, BALANCED: tl.constexpr, MANY: tl.constexpr,
    PRECISION: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """First pass. Grid: (batch * num_kv_heads * row tiles, num_splits), or (workers, row tiles) if it is BALANCED.

    query [B, Hq, Q, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv], out [B, Hq, Q, Dv], lse [B, Hq, Q] or None,
    partial_out [places, Dv], partial_max and partial_sum [places], kv_lens [B] or None, q_lens [B] or None, q_offset a
    number, a [B] pointer or None, page_table empty or (pointer, stride_b, num_pages), block_lists empty (block_lists.py
    says what else), key_scales and value_scales empty, (number,), (pointer, stride_b, stride_h) or (pointer, stride_b,
    stride_h, stride_n), sinks [Hq] or None. NUM_LIVE and NUM_FULL count the intervals that kv_bounds uses; the mask is
    evaluated in every block that is not proven full. SHARED: a value is the first columns of its key. PACKED
    names the dtype of a quantised cache whose columns are loaded two by two, as int16.

    An item is a tile of query rows of one KV head of one sequence. In the closed form a program takes the share
    `program_id(1)` of an item. BALANCED, the blocks of all sequences and KV heads form one line of slots, the same for
    each row tile, so that the tiles of a head read the same keys at the same time. A worker takes an equal run of it:
    the end of one item, some whole items, the beginning of another one. It has two places for partial results, for an
    item that it continues and for one that it begins. item_parts [batch, num_kv_heads, 2] tells the second pass which
    worker begins an item and how many take part. A sequence has at most `max_weight` slots per head, which keeps their
    number in 32 bits. MANY: there are more than BLOCK_B sequences.
    """
    NUM_TILES: tl.constexpr = (GROUP_SIZE * NUM_QUERIES + BLOCK_M - 1) // BLOCK_M
    if BALANCED:
        if PDL:
            gdc_wait()
            gdc_launch_dependents()
        last_head = num_kv_heads * GROUP_SIZE - 1
        worker = tl.program_id(0)
        tile = tl.program_id(1)
        if MANY:
            _, _, _, total = find_in_chunks(
                -1, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures, max_kv_len, last_head, max_weight,
                NUM_QUERIES, BLOCK_N, NUM_LIVE, BLOCK_B,
            )  # fmt: skip
        else:
            sequences = numbers(BLOCK_B)
            weights = sequence_weights(
                sequences, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures, max_kv_len, last_head,
                max_weight, NUM_QUERIES, BLOCK_N, NUM_LIVE,
            )  # fmt: skip
            starts = sums_before(weights)
            total = tl.sum(weights, 0)
        # Runs of `share` slots; the first `extra` workers have one more.
        total *= num_kv_heads
        share = total // tl.num_programs(0)
        extra = total % tl.num_programs(0)
        slot = worker * share + tl.minimum(worker, extra)
        stop = slot + share + tl.where(worker < extra, 1, 0)
        b = tl.zeros((), tl.int32)
        weight = tl.full((), 1, tl.int32)
        first = slot
        past = slot
        while slot < stop:
            if slot == past:
                if MANY:
                    b, first, weight, _ = find_in_chunks(
                        slot // num_kv_heads, batch, kv_lens, q_lens, q_offset, score_captures, mask_captures,
                        max_kv_len, last_head, max_weight, NUM_QUERIES, BLOCK_N, NUM_LIVE, BLOCK_B,
                    )  # fmt: skip
                else:
                    b, first, weight = find_slot(slot // num_kv_heads, sequences, starts, weights)
                first *= num_kv_heads
                past = first + num_kv_heads * weight
            kv_head = (slot - first) // weight
            start = slot - first - kv_head * weight
            end = tl.minimum(weight, start + stop - slot)
            if start == 0:
                shared_out = item_parts + 2 * (b.to(tl.int64) * num_kv_heads + kv_head)
                last_slot = slot + weight - 1
                final = last_slot // (share + 1)
                if final >= extra:
                    final = extra + (last_slot - extra * (share + 1)) // tl.maximum(share, 1)
                tl.store(shared_out, worker)
                tl.store(shared_out + 1, final - worker + 1)
            attend_run(
                b, kv_head, tile, start, end, weight,
                2 * worker + tl.where(start == 0, 1, 0), (start == 0) & (end == weight),
                query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_max, partial_sum,
                kv_lens, q_lens, q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures,
                mask_captures, scale, stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd,
                value_steps, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads,
                max_kv_len, num_splits, GROUP_SIZE, NUM_QUERIES, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
                BLOCK_R, BLOCK_DV, PAGE_SIZE, SHARED, PACKED, NUM_LIVE, NUM_FULL, SPLIT, BALANCED, PRECISION, PDL,
            )  # fmt: skip
            slot += end - start
    else:
        item = tl.program_id(0) // NUM_TILES
        attend_run(
            item // num_kv_heads, item % num_kv_heads, tl.program_id(0) % NUM_TILES,
            tl.program_id(1), tl.program_id(1) + 1, num_splits, tl.program_id(1), not SPLIT,
            query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_max, partial_sum,
            kv_lens, q_lens, q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures,
            mask_captures, scale, stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd,
            value_steps, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads,
            max_kv_len, num_splits, GROUP_SIZE, NUM_QUERIES, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D,
            BLOCK_R, BLOCK_DV, PAGE_SIZE, SHARED, PACKED, NUM_LIVE, NUM_FULL, SPLIT, BALANCED, PRECISION, PDL,
        )  # fmt: skip


@triton.jit
def decode_combine(
    out, lse, partial_out, partial_max, partial_sum, item_parts, kv_lens, q_lens, sinks, stride_ob, stride_oh,
    stride_om, stride_od, num_kv_heads, max_kv_len, num_splits,
    GROUP_SIZE: tl.constexpr, NUM_QUERIES: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_S: tl.constexpr, BALANCED: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Second pass: merges the partial outputs of one row. Grid: (B * Hq * Q, cdiv(Dv, BLOCK_DV)).

    BALANCED, it leaves alone what one worker did as a whole, and writes the rows of sequences that nobody visits.
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
        busy = (read_length(kv_lens, b, max_kv_len) > 0) & (num_tokens > 0)
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

        if sinks is not None:
            alpha, m_i, l_i = add_sink(m_i, l_i, tl.load(sinks + head).to(tl.float32))
            acc = acc * alpha
        merged = acc / tl.where(l_i == 0.0, 1.0, l_i)
        row_lse = log_sum_exp(m_i, l_i)
        if q_lens is not None:
            merged = tl.where(token < num_tokens, merged, 0.0)
            row_lse = tl.where(token < num_tokens, row_lse, float("-inf"))
        tl.store(out_row + offs_dv * stride_od, merged.to(out.dtype.element_ty), mask=offs_dv < V_HEAD_DIM)
        if lse is not None:
            if tl.program_id(1) == 0:
                tl.store(lse + flat_row, row_lse)
