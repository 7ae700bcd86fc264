"""Attention over latents on Hopper's tensor cores: this `attend_run` takes the place of that of `decode.py`.

The function is Gluon, Triton's language with explicit layouts, because 64 rows with an accumulator of 512 columns fill
a multiprocessor: its registers with the accumulator, its shared memory with the query and two blocks of latents. Each
latent is loaded once and used three times, by three groups of warps that work side by side:

- one warp copies the next block while the present one is used (`_copy_blocks`),
- four warps compute the scores, the weights and the left half of the result (`_attend_left`),
- four warps compute its right half from the same weights (`_attend_right`).

They hand one another blocks and weights through shared memory, each with a barrier for "full" and one for "empty".
"""

import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)


@gluon.jit
def _find_block(runs, i, block_lists, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr):
    """The block that step `i` of an item visits: full ones, then partial ones."""
    block = partial_block(runs, i - runs[0], block_lists, NUM_LIVE)
    if NUM_FULL > 0:
        block = gl.where(i < runs[0], full_block(runs, i, block_lists, NUM_LIVE), block)
    return block


@gluon.jit
def _copy_blocks(
    wide, narrow, left, right, rest, full, empty, runs, first, last, origin, steps, page_table, block_lists, b, kv_len,
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr,
):  # fmt: skip
    """Keeps both places for latents filled, as soon as both halves of a result are done with what lies there."""
    COLUMNS: gl.constexpr = left.shape[2]
    for i in range(first, last):
        place = (i - first) % 2
        start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
        pages = find_pages(page_table, b, start_n, kv_len, BLOCK_N, PAGE_SIZE)
        row, column = _rectangle(origin, pages, steps, start_n, PAGE_SIZE)
        mbarrier.wait(empty.index(place), ((i - first) // 2 + 1) % 2)
        arrived = full.index(place)
        mbarrier.expect(arrived, 2 * BLOCK_N * (2 * COLUMNS + rest.shape[2]))
        tma.async_copy_global_to_shared(wide, [row, column], arrived, left.index(place))
        tma.async_copy_global_to_shared(wide, [row, column + COLUMNS], arrived, right.index(place))
        tma.async_copy_global_to_shared(narrow, [row, column + 2 * COLUMNS], arrived, rest.index(place))


@gluon.jit
def _clear_rows(tile, count, LAYOUT: gl.constexpr):
    """Zeros in the rows of a tile from `count` on: what lies past a sequence may be NaN."""
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    loaded = tile.load(LAYOUT)
    tile.store(gl.where((rows < count)[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
    gl.thread_barrier()


@gluon.jit
def _attend_block(
    acc, m_i, l_i, i, step, queries, left, right, rest, weights, factors, full, empty, ready, taken, runs, scale,
    kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, CHECKED: gl.constexpr,
    SCORES: gl.constexpr, OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax, and the left half of its result; the last product is still under way after it."""
    place = step % 2
    start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
    kv_idx = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))[None, :]
    live = None
    if CHECKED:
        live = kv_idx < kv_len
        kv_idx = gl.minimum(kv_idx, kv_len - 1)
        live = mask_mod(live, b, h, q_idx, kv_idx, mask_rows, mask_captures)
    fetched = score_fetch(live, b, h, q_idx, kv_idx, score_rows, score_captures)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(empty.index(1 - place), count=1, pred=step > 0)
    mbarrier.wait(full.index(place), step // 2 % 2)
    score = gl.full([queries[0].shape[0], BLOCK_N], 0.0, gl.float32, SCORES)
    score = warpgroup_mma(queries[0], left.index(place).permute((1, 0)), score, use_acc=False, is_async=True)
    score = warpgroup_mma(queries[1], right.index(place).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma(queries[2], rest.index(place).permute((1, 0)), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score]) * scale
    score = score_mod(score, b, h, q_idx, kv_idx, score_rows, fetched, score_captures) * LOG2E
    if CHECKED:
        score = gl.where(live, score, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(score - m_safe[:, None])
    alpha = gl.exp2(m_i - m_safe)
    l_i = l_i * alpha + gl.sum(p, 1)
    mbarrier.wait(taken, (step + 1) % 2)
    weights.store(p.to(weights.dtype))
    factors.store(alpha)
    fence_async_shared()
    mbarrier.arrive(ready, count=1)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, OUTPUT))[:, None]
    if CHECKED:
        if start_n + BLOCK_N > kv_len:
            _clear_rows(left.index(place), kv_len - start_n, ROWS)
    acc = warpgroup_mma(weights, left.index(place), acc, is_async=True)
    return acc, m_new, l_i


@gluon.jit
def _attend_left(
    queries, left, right, rest, weights, factors, sums, full, empty, ready, taken, runs, first, last, scale, kv_len, b,
    h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, SCORES: gl.constexpr,
    OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """Scores, weights and the left half of the result of a run; also the sums of the weights, for the right half."""
    BLOCK_M: gl.constexpr = queries[0].shape[0]
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    acc = warpgroup_mma_init(gl.full([BLOCK_M, left.shape[2]], 0.0, gl.float32, OUTPUT))
    last_full = first
    if NUM_FULL > 0:
        last_full = gl.maximum(gl.minimum(last, runs[0]), first)
        for i in range(first, last_full):
            acc, m_i, l_i = _attend_block(
                acc, m_i, l_i, i, i - first, queries, left, right, rest, weights, factors, full, empty, ready, taken,
                runs, scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
                BLOCK_N, NUM_LIVE, NUM_FULL, False, SCORES, OUTPUT, ROWS,
            )  # fmt: skip
        acc = warpgroup_mma_init(warpgroup_mma_wait(0, deps=[acc]))
    for i in range(last_full, last):
        acc, m_i, l_i = _attend_block(
            acc, m_i, l_i, i, i - first, queries, left, right, rest, weights, factors, full, empty, ready, taken, runs,
            scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
            BLOCK_N, NUM_LIVE, NUM_FULL, True, SCORES, OUTPUT, ROWS,
        )  # fmt: skip
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.wait(taken, (last - first + 1) % 2)
    factors.store(m_i)
    sums.store(l_i)
    mbarrier.arrive(ready, count=1)
    return acc, gl.convert_layout(m_i, gl.SliceLayout(1, OUTPUT)), gl.convert_layout(l_i, gl.SliceLayout(1, OUTPUT))


@gluon.jit
def _attend_right(
    right, weights, factors, sums, empty, ready, taken, runs, first, last, kv_len, v_scale, tile, b, kv_head, place,
    whole, num_tokens, out, lse, partial_out, partial_lse, q_lens, sinks, block_lists, stride_ob, stride_oh, stride_om,
    stride_od, num_kv_heads, num_splits,
    GROUP_SIZE: gl.constexpr, NUM_QUERIES: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_N: gl.constexpr,
    NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, SPLIT: gl.constexpr, BALANCED: gl.constexpr,
    OUTPUT: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The right half of the result of a run, which it also writes."""
    BLOCK_M: gl.constexpr = weights.shape[0]
    COLUMNS: gl.constexpr = right.shape[2]
    acc = gl.full([BLOCK_M, COLUMNS], 0.0, gl.float32, OUTPUT)
    for i in range(first, last):
        step = i - first
        mbarrier.wait(ready, step % 2)
        acc = acc * factors.load(gl.SliceLayout(1, OUTPUT))[:, None]
        latents = right.index(step % 2)
        left_over = kv_len - _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
        if left_over < BLOCK_N:
            _clear_rows(latents, left_over, ROWS)
        acc = warpgroup_mma(weights, latents, acc)
        mbarrier.arrive(taken, count=1)
        mbarrier.arrive(empty.index(step % 2), count=1)
    mbarrier.wait(ready, (last - first) % 2)
    m_i = factors.load(gl.SliceLayout(1, OUTPUT))
    l_i = sums.load(gl.SliceLayout(1, OUTPUT))
    _store_half(
        acc, m_i, l_i, COLUMNS, v_scale, tile, b, kv_head, place, whole, num_tokens, out, None, partial_out, partial_lse,
        q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES,
        V_HEAD_DIM, SPLIT, BALANCED, OUTPUT,
    )  # fmt: skip


@gluon.jit
def _store_half(
    acc, m_i, l_i, COLUMN: gl.constexpr, v_scale, tile, b, kv_head, place, whole, num_tokens, out, lse, partial_out,
    partial_lse, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits,
    GROUP_SIZE: gl.constexpr, NUM_QUERIES: gl.constexpr, V_HEAD_DIM: gl.constexpr, SPLIT: gl.constexpr,
    BALANCED: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """Writes the columns of a result from `COLUMN` on."""
    BLOCK_M: gl.constexpr = acc.shape[0]
    lanes = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUTPUT))
    rows, row_valid, head, token = query_rows(tile * BLOCK_M + lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_dv = COLUMN + gl.arange(0, acc.shape[1], gl.SliceLayout(0, OUTPUT))
    store_run(
        acc * v_scale, m_i, l_i, lanes, rows, row_valid, head, token, offs_dv, b, kv_head, place, whole, num_tokens,
        out, lse, partial_out, partial_lse, q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads,
        num_splits, GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM, BLOCK_M, SPLIT, BALANCED,
    )  # fmt: skip


@gluon.jit
def _load_query(
    query, tile, b, kv_head, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE: gl.constexpr,
    NUM_QUERIES: gl.constexpr, BLOCK_M: gl.constexpr, COLUMN: gl.constexpr, COLUMNS: gl.constexpr,
    LAYOUT: gl.constexpr, LATENTS: gl.constexpr,
):  # fmt: skip
    """Columns `COLUMN .. COLUMN + COLUMNS` of the query rows of a tile, in shared memory."""
    lanes = tile * BLOCK_M + gl.arange(0, BLOCK_M, gl.SliceLayout(1, LAYOUT))
    _, _, head, token = query_rows(lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_d = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, LAYOUT))
    row = query + b.to(gl.int64) * stride_qb + head.to(gl.int64) * stride_qh + token.to(gl.int64) * stride_qm
    q = gl.load(row[:, None] + offs_d[None, :] * stride_qd)
    return gl.allocate_shared_memory(query.dtype.element_ty, [BLOCK_M, COLUMNS], LATENTS, q)


@gluon.jit
def attend_run(
    b, kv_head, tile, start, end, parts, place, whole,
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_lse, kv_lens, q_lens,
    q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures, mask_captures, scale,
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
    rows, row_valid, head, token = query_rows(lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    kv_len, num_tokens, q_idx = positions(b, token, kv_lens, q_lens, q_offset, max_kv_len, NUM_QUERIES)
    h = head[:, None]
    score_rows = score_row(b, h, q_idx, score_captures)
    mask_rows = mask_row(b, h, q_idx, mask_captures)
    runs = block_runs(
        b, h, q_idx, kv_head, kv_len, block_lists, score_captures, mask_captures, BLOCK_N, NUM_LIVE, NUM_FULL
    )  # fmt: skip
    first, last = share_of(runs, start, end, parts, num_tokens, q_lens, SPLIT, BALANCED)

    q_left = _load_query(
        query, tile, b, kv_head, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        0, HALF, ROWS, LATENTS,
    )  # fmt: skip
    q_right = _load_query(
        query, tile, b, kv_head, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        HALF, HALF, ROWS, LATENTS,
    )  # fmt: skip
    q_rest = _load_query(
        query, tile, b, kv_head, stride_qb, stride_qh, stride_qm, stride_qd, GROUP_SIZE, NUM_QUERIES, BLOCK_M,
        2 * HALF, BLOCK_R, NARROW, LATENTS,
    )  # fmt: skip
    queries = q_left, q_right, q_rest
    dtype: gl.constexpr = query.dtype.element_ty
    left = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], LATENTS)
    right = gl.allocate_shared_memory(dtype, [2, BLOCK_N, HALF], LATENTS)
    rest = gl.allocate_shared_memory(dtype, [2, BLOCK_N, BLOCK_R], LATENTS)
    weights = gl.allocate_shared_memory(dtype, [BLOCK_M, BLOCK_N], LATENTS)
    factors = gl.allocate_shared_memory(gl.float32, [BLOCK_M], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [BLOCK_M], NUMBERS)
    full = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    ready = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    taken = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    for i in gl.static_range(2):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=2)
    mbarrier.init(ready, count=1)
    mbarrier.init(taken, count=1)
    fence_async_shared()

    scale = scale * item_scale(key_scales, b, kv_head)
    v_scale = item_scale(value_scales, b, kv_head)
    origin = kv_origin(key, b, kv_head, key_steps)
    acc, m_i, l_i = gl.warp_specialize(
        [
            (
                _attend_left,
                (
                    queries, left, right, rest, weights, factors, sums, full, empty, ready, taken, runs, first, last,
                    scale, kv_len, b, h, q_idx, score_rows, score_captures, mask_rows, mask_captures, block_lists,
                    BLOCK_N, NUM_LIVE, NUM_FULL, SCORES, OUTPUT, ROWS,
                ),
            ),
            (
                _attend_right,
                (
                    right, weights, factors, sums, empty, ready, taken, runs, first, last, kv_len, v_scale, tile, b,
                    kv_head, place, whole, num_tokens, out, lse, partial_out, partial_lse, q_lens, sinks, block_lists,
                    stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES,
                    V_HEAD_DIM, BLOCK_N, NUM_LIVE, NUM_FULL, SPLIT, BALANCED, OUTPUT, ROWS,
                ),
            ),
            (
                _copy_blocks,
                (
                    key_descriptor, value_descriptor, left, right, rest, full, empty, runs, first, last, origin,
                    key_steps, page_table, block_lists, b, kv_len, BLOCK_N, PAGE_SIZE, NUM_LIVE, NUM_FULL,
                ),
            ),
        ],
        [4, 1],
        [216, 40],
    )  # fmt: skip
    _store_half(
        acc, m_i, l_i, 0, v_scale, tile, b, kv_head, place, whole, num_tokens, out, lse, partial_out, partial_lse,
        q_lens, sinks, stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES,
        V_HEAD_DIM, SPLIT, BALANCED, OUTPUT,
    )  # fmt: skip
