"""Attention over latents on Hopper's tensor cores: this `attend_run` takes the place of that of `decode.py`.

It is Gluon, Triton's language with explicit layouts, because 64 rows with an accumulator of 512 columns fill a
multiprocessor: its registers with the accumulator, its shared memory with the query and two blocks of latents. Each
latent is loaded once and used three times, by groups of warps that work side by side:

- one warp copies the next block while the present one is used (`_copy_blocks`),
- four warps compute the scores, the weights and the left half of the result (`_attend_left`),
- four warps compute its right half with the same weights (`_attend_right`).

A block has three parts: the columns of the left half, of the right half, and the rest, which only the scores need. Each
part has a place for even and one for odd steps. Barriers, and who passes them on:

- full (a part, a place): the copy has arrived; the left half waits, and the right half inherits it through `scaled`.
- empty (a part, a place): its last reader is done; the copying warp waits. That is the left half for its own part, the
  right half for the two others.
- scaled: the left half has computed the scores and written `factors`, by which the results so far are multiplied.
- ready: it has written the weights, at the end of a run the largest scores (`factors`) and the sums of weights.
- taken: the right half is done with both, so the next step may write them.

The last three are passed once per step, the others once in two steps, so that a wait names the parity of that count.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

try:
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_load
except ImportError:  # its name until Triton 3.6
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as async_load


@gluon.jit
def _find_block(runs, i, block_lists, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr):
    """The block with the number `i` of an item: first its full ones, then its partial ones."""
    block = partial_block(runs, i - runs[0], block_lists, NUM_LIVE)
    if NUM_FULL > 0:
        block = gl.where(i < runs[0], full_block(runs, i, block_lists, NUM_LIVE), block)
    return block


@gluon.jit
def _copy_blocks(
    wide, narrow, latents, full, empty, runs, first, last, origin, steps, page_table, block_lists, b, spans,
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr,
):  # fmt: skip
    """Keeps all places filled."""
    HALF: gl.constexpr = latents[0].shape[2]
    for i in range(first, last):
        place = (i - first) % 2
        start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
        pages = find_pages(page_table, b, start_n, spans, BLOCK_N, PAGE_SIZE)
        row, column = _rectangle(origin, pages, steps, start_n, PAGE_SIZE)
        phase = ((i - first) // 2 + 1) % 2
        left, right, rest = latents[0].index(place), latents[1].index(place), latents[2].index(place)
        _copy(narrow, row, column + 2 * HALF, rest, full[2].index(place), empty[2].index(place), phase)
        _copy(wide, row, column, left, full[0].index(place), empty[0].index(place), phase)
        _copy(wide, row, column + HALF, right, full[1].index(place), empty[1].index(place), phase)


@gluon.jit
def _copy(descriptor, row, column, tile, full, empty, phase):
    """Copies a part of a block once its place is empty."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, 2 * tile.shape[0] * tile.shape[1])
    async_load(descriptor, [row, column], full, tile)


@gluon.jit
def _clear_rows(tile, start_n, spans, LAYOUT: gl.constexpr):
    """Zeros in the rows of a tile whose keys lie outside of the spans, which may be NaN."""
    rows = start_n + gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    loaded = tile.load(LAYOUT)
    tile.store(gl.where(in_spans(rows, spans)[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _attend_block(
    acc, m_i, l_i, i, step, queries, latents, weights, factors, full, empty, scaled, ready, taken, runs, spans, scale,
    kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, CHECKED: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, and the left half of its result.

    No product stays under way at its end: beside the loads of some mods, ptxas then serialises all products.
    """
    place = step % 2
    start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
    kv_idx = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))[None, :]
    live = None
    if CHECKED:
        live = in_spans(kv_idx, spans)
        kv_idx = gl.minimum(kv_idx, kv_len - 1)
        live = mask_mod(live, b, h, q_idx, kv_idx, mask_rows, mask_captures)
    fetched = score_fetch(live, b, h, q_idx, kv_idx, score_rows, score_captures)
    left, right, rest = latents[0].index(place), latents[1].index(place), latents[2].index(place)
    phase = step // 2 % 2
    score = gl.full([queries[0].shape[0], BLOCK_N], 0.0, gl.float32, SCORES)
    mbarrier.wait(full[2].index(place), phase)
    score = warpgroup_mma(queries[2], rest.permute((1, 0)), score, use_acc=False, is_async=True)
    mbarrier.wait(full[0].index(place), phase)
    score = warpgroup_mma(queries[0], left.permute((1, 0)), score, is_async=True)
    mbarrier.wait(full[1].index(place), phase)
    score = warpgroup_mma(queries[1], right.permute((1, 0)), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score])
    # Without a score_mod the softmax is that of unscaled scores in other units: one operation less for each of them.
    unit = gl.maximum(scale * LOG2E, 1e-37)  # scale may be 0, and 0 times -inf is NaN
    if HAS_SCORE_MOD:
        score = score_mod(score * scale, b, h, q_idx, kv_idx, score_rows, fetched, score_captures)
        unit = LOG2E
    if CHECKED:
        score = gl.where(live, score, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m_i - m_safe) * unit)
    mbarrier.wait(taken, (step + 1) % 2)  # the other half has used the weights of the last step
    factors.store(alpha)
    mbarrier.arrive(scaled, count=1)
    p = gl.exp2((score - m_safe[:, None]) * unit)
    l_i = l_i * alpha + gl.sum(p, 1)
    weights.store(p.to(weights.dtype))
    fence_async_shared()
    mbarrier.arrive(ready, count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
    if CHECKED:
        if not inside_a_span(start_n, spans, BLOCK_N):
            _clear_rows(left, start_n, spans, ROWS)
    acc = warpgroup_mma(weights, left, acc, is_async=True)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty[0].index(place), count=1)
    return acc, m_new, l_i


@gluon.jit
def _attend_left(
    queries, latents, weights, factors, sums, full, empty, scaled, ready, taken, runs, spans, first, last, scale,
    kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, SCORES: gl.constexpr,
    OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Scores, weights and the left half of the result of a run; also the sums of the weights, for the right half."""
    BLOCK_M: gl.constexpr = queries[0].shape[0]
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = gl.full([BLOCK_M, latents[0].shape[2]], 0.0, gl.float32, OUTPUT)
    last_full = first
    if NUM_FULL > 0:
        last_full = gl.maximum(gl.minimum(last, runs[0]), first)
        for i in range(first, last_full):
            acc, m_i, l_i = _attend_block(
                acc, m_i, l_i, i, i - first, queries, latents, weights, factors, full, empty, scaled, ready, taken,
                runs, spans, scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures,
                block_lists, BLOCK_N, NUM_LIVE, NUM_FULL, False, SCORES, OUTPUT, ROWS,
            )  # fmt: skip
    for i in range(last_full, last):
        acc, m_i, l_i = _attend_block(
            acc, m_i, l_i, i, i - first, queries, latents, weights, factors, full, empty, scaled, ready, taken, runs,
            spans, scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
            BLOCK_N, NUM_LIVE, NUM_FULL, True, SCORES, OUTPUT, ROWS,
        )  # fmt: skip
    if not HAS_SCORE_MOD:
        m_i = gl.where(m_i == float("-inf"), m_i, m_i * scale)
    mbarrier.wait(taken, (last - first + 1) % 2)
    factors.store(m_i)  # in place of factors, for which there is no further use
    sums.store(l_i)
    mbarrier.arrive(ready, count=1)
    return acc, gl.convert_layout(m_i, gl.SliceLayout(1, OUTPUT)), gl.convert_layout(l_i, gl.SliceLayout(1, OUTPUT))


@gluon.jit
def _attend_right(
    latents, weights, factors, sums, empty, scaled, ready, taken, runs, spans, first, last, tile, b, kv_head,
    place, whole, num_tokens, out, lse, partial_out, partial_max, partial_sum, q_lens, sinks, block_lists, stride_ob,
    stride_oh, stride_om, stride_od, num_kv_heads, num_splits,
    GROUP_SIZE: gl.constexpr, NUM_QUERIES: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, SPLIT: gl.constexpr, BALANCED: gl.constexpr,
    OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The right half of the result of a run; also writes it."""
    BLOCK_M: gl.constexpr = weights.shape[0]
    COLUMNS: gl.constexpr = latents[1].shape[2]
    acc = gl.full([BLOCK_M, COLUMNS], 0.0, gl.float32, OUTPUT)
    for i in range(first, last):
        step = i - first
        spot = step % 2
        mbarrier.wait(scaled, spot)
        mbarrier.arrive(empty[2].index(spot), count=1)  # the scores are there
        acc = acc * factors.load(gl.SliceLayout(1, OUTPUT))[:, None]
        values = latents[1].index(spot)
        start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
        if not inside_a_span(start_n, spans, BLOCK_N):
            _clear_rows(values, start_n, spans, ROWS)
        mbarrier.wait(ready, spot)
        acc = warpgroup_mma(weights, values, acc)
        mbarrier.arrive(empty[1].index(spot), count=1)
        mbarrier.arrive(taken, count=1)
    mbarrier.wait(ready, (last - first) % 2)
    m_i = factors.load(gl.SliceLayout(1, OUTPUT))
    l_i = sums.load(gl.SliceLayout(1, OUTPUT))
    _store_half(
        acc, m_i, l_i, COLUMNS, tile, b, kv_head, place, whole, num_tokens, out, None, partial_out,
        partial_max, partial_sum, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits,
        GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM, SPLIT, BALANCED, OUTPUT,
    )  # fmt: skip


@gluon.jit
def _store_half(
    acc, m_i, l_i, COLUMN: gl.constexpr, tile, b, kv_head, place, whole, num_tokens, out, lse, partial_out,
    partial_max, partial_sum, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits,
    GROUP_SIZE: gl.constexpr, NUM_QUERIES: gl.constexpr, V_HEAD_DIM: gl.constexpr, SPLIT: gl.constexpr,
    BALANCED: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Writes the columns of a result from `COLUMN` on."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    lanes = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUTPUT))
    rows, row_valid, head, token = query_rows(tile * BLOCK_M + lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_dv = COLUMN + gl.arange(0, acc.shape[1], gl.SliceLayout(0, OUTPUT))
    store_run(
        acc, m_i, l_i, lanes, rows, row_valid, head, token, offs_dv, b, kv_head, place, whole, num_tokens,
        out, lse, partial_out, partial_max, partial_sum, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od,
        num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM, BLOCK_M, SPLIT, BALANCED,
    )  # fmt: skip


@gluon.jit
def _load_query(
    query, tile, b, kv_head, scale, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE: gl.constexpr,
    NUM_QUERIES: gl.constexpr, BLOCK_M: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr, LATENTS: gl.constexpr,
):  # fmt: skip
    """Columns from `COLUMN` on of the query rows of a tile, in shared memory, with the sign of the scale."""
    lanes = tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    _, _, head, token = query_rows(lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_d = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    row = query + b.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh + token.to(gl.int64) * stride_qm
    q = gl.load(row[:, None] + offs_d[None, :] * stride_qd)
    q = gl.where(scale < 0, -q, q)
    return gl.allocate_shared_memory(query.dtype.element_ty, [BLOCK_M, COLUMNS], LATENTS, q)


@gluon.jit
def _barriers(NUM: gl.constexpr):
    """Barriers at each of which one group of warps, or one copy, arrives."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _end_barriers(barriers):
    """Leaves their memory to others."""
    NUM: gl.constexpr = barriers.shape[0]
    for i in gl.static_range(NUM):
        mbarrier.invalidate(barriers.index(i))


@gluon.jit
def numbers(SIZE: gl.constexpr):
    """The numbers from 0 to SIZE, as rows of a matrix."""
    return gl.arange(0, SIZE, gl.SliceLayout(1, gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0])))


@gluon.jit
def sums_before(weights):
    """The sum of all weights in front of each."""
    flat = gl.convert_layout(weights, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.convert_layout(tl.cumsum(flat, 0), weights.type.layout) - weights


@gluon.jit
def attend_run(
    b, kv_head, tile, start, end, parts, place, whole,
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_max, partial_sum, kv_lens,
    q_lens, q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures, mask_captures, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, max_kv_len, num_splits, GROUP_SIZE: gl.constexpr,
    NUM_QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_DV: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SHARED: gl.constexpr, PACKED: gl.constexpr, NUM_LIVE: gl.constexpr,
    NUM_FULL: gl.constexpr, SPLIT: gl.constexpr, BALANCED: gl.constexpr, PRECISION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As in `decode.py`. The descriptors show the latents in boxes of BLOCK_DV // 2 and of BLOCK_R columns."""
    HALF: gl.constexpr = BLOCK_DV // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    ROWS: gl.constexpr = gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0])
    NARROW: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    LATENTS: gl.constexpr = gl.NVMMASharedLayout(128, 16)
    NUMBERS: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    if PDL and not BALANCED:
        gdc_wait()
        gdc_launch_dependents()

    lanes = tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, SCORES))
    _, _, head, token = query_rows(lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    kv_len, num_tokens, q_idx = positions(b, token, kv_lens, q_lens, q_offset, max_kv_len, NUM_QUERIES)
    h = head[:, None]
    score_rows = score_row(b, h, q_idx, score_captures)
    mask_rows = mask_row(b, h, q_idx, mask_captures)
    runs, spans = block_runs(
        b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N, NUM_LIVE, NUM_FULL
    )  # fmt: skip
    first, last = share_of(runs, start, end, parts, num_tokens, q_lens, SPLIT, BALANCED)

    q_left = _load_query(
        query, tile, b, kv_head, scale, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        0, HALF, ROWS, LATENTS,
    )  # fmt: skip
    q_right = _load_query(
        query, tile, b, kv_head, scale, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        HALF, HALF, ROWS, LATENTS,
    )  # fmt: skip
    q_rest = _load_query(
        query, tile, b, kv_head, scale, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        2 * HALF, BLOCK_R, NARROW, LATENTS,
    )  # fmt: skip
    queries = q_left, q_right, q_rest
    scale = gl.abs(scale)
    dtype: gl.constexpr = query.dtype.element_ty
    latents = (
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], LATENTS),
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], LATENTS),
        gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_R], LATENTS),
    )
    weights = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], LATENTS)
    factors = gl.allocate_shared_memory(gl.float32, [BLOCK_M], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [BLOCK_M], NUMBERS)
    full = _barriers(2), _barriers(2), _barriers(2)
    empty = _barriers(2), _barriers(2), _barriers(2)
    handed = _barriers(3)
    scaled, ready, taken = handed.index(0), handed.index(1), handed.index(2)
    fence_async_shared()

    origin = kv_origin(key, b, kv_head, key_steps)
    acc, m_i, l_i = gl.warp_specialize(
        [
            (
                _attend_left,
                (
                    queries, latents, weights, factors, sums, full, empty, scaled, ready, taken, runs, spans, first,
                    last, scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
                    BLOCK_N, NUM_LIVE, NUM_FULL, SCORES, OUTPUT, ROWS,
                ),
            ),
            (
                _attend_right,
                (
                    latents, weights, factors, sums, empty, scaled, ready, taken, runs, spans, first, last, tile, b,
                    kv_head, place, whole, num_tokens, out, lse, partial_out, partial_max, partial_sum, q_lens, sinks,
                    block_lists, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE,
                    NUM_QUERIES, V_HEAD_DIM, BLOCK_N, NUM_LIVE, NUM_FULL, SPLIT, BALANCED, OUTPUT, ROWS,
                ),
            ),
            (
                _copy_blocks,
                (
                    key_descriptor, value_descriptor, latents, full, empty, runs, first, last, origin,
                    key_steps, page_table, block_lists, b, spans, BLOCK_N, PAGE_SIZE, NUM_LIVE, NUM_FULL,
                ),
            ),
        ],
        [4, 1],
        [216, 40],
    )  # fmt: skip
    for part in gl.static_range(3):
        _end_barriers(full[part])
        _end_barriers(empty[part])
    _end_barriers(handed)
    _store_half(
        acc, m_i, l_i, 0, tile, b, kv_head, place, whole, num_tokens, out, lse, partial_out, partial_max, partial_sum,
        q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES,
        V_HEAD_DIM, SPLIT, BALANCED, OUTPUT,
    )  # fmt: skip
