"""Attention over latents on Hopper's tensor cores: this `attend_run` takes the place of that of `decode.py`.

The function is Gluon, Triton's language with explicit layouts, because 64 rows with an accumulator of 512 columns fill
a multiprocessor: its registers with the accumulator, its shared memory with the query and two blocks of latents. Each
latent is loaded once and used three times. Four groups of warps work side by side:

- one warp copies blocks of latents as soon as their places are free (`_copy_blocks`),
- four warps compute scores and weights (`_weigh_keys`),
- twice four warps compute one half of the columns of the result each (`_sum_values`).

So the scores of a block are computed while the values of the one before it are summed. A block is 64 columns wide for
the scores alone; when these are computed, the weights take that part's place. What one group hands to another has a
barrier for "full" or "ready", and one for "empty". There are two places; step i uses place i % 2, for the i // 2-th time.
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
def _copy(descriptor, row, column, tile, full, empty, phase):
    """Copies a part of a block once its place is empty."""
    mbarrier.wait(empty, phase)
    mbarrier.expect(full, 2 * tile.shape[0] * tile.shape[1])
    async_load(descriptor, [row, column], full, tile)


@gluon.jit
def _copy_blocks(
    wide, narrow, latents, full, empty, runs, first, last, origin, steps, page_table, block_lists, b, kv_len,
    BLOCK_N: gl.constexpr, PAGE_SIZE: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr,
):  # fmt: skip
    """Keeps both places filled."""
    HALF: gl.constexpr = latents[0].shape[2]
    for i in range(first, last):
        place = (i - first) % 2
        phase = ((i - first) // 2 + 1) % 2
        start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
        pages = find_pages(page_table, b, start_n, kv_len, BLOCK_N, PAGE_SIZE)
        row, column = _rectangle(origin, pages, steps, start_n, PAGE_SIZE)
        left, right, rest = latents[0].index(place), latents[1].index(place), latents[2].index(place)
        _copy(narrow, row, column + 2 * HALF, rest, full[2].index(place), empty[2].index(place), phase)
        _copy(wide, row, column, left, full[0].index(place), empty[0].index(place), phase)
        _copy(wide, row, column + HALF, right, full[1].index(place), empty[1].index(place), phase)


@gluon.jit
def _clear_rows(tile, count, LAYOUT: gl.constexpr):
    """Zeros in the rows of a tile from `count` on: what lies past a sequence may be NaN."""
    rows = gl.arange(0, tile.shape[0], gl.SliceLayout(1, LAYOUT))
    loaded = tile.load(LAYOUT)
    tile.store(gl.where((rows < count)[:, None], loaded, gl.zeros_like(loaded)))


@gluon.jit
def _weigh_block(
    m_i, l_i, i, step, queries, latents, factors, full, ready, runs, scale, kv_len, b, h, q_idx, score_rows,
    score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, CHECKED: gl.constexpr,
    SCORES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """One step of the online softmax; CHECKED evaluates the mask and the length."""
    place = step % 2
    phase = step // 2 % 2
    start_n = _find_block(runs, i, block_lists, NUM_LIVE, NUM_FULL) * BLOCK_N
    kv_idx = start_n + gl.arange(0, BLOCK_N, gl.SliceLayout(0, SCORES))[None, :]
    live = None
    if CHECKED:
        live = kv_idx < kv_len
        kv_idx = gl.minimum(kv_idx, kv_len - 1)
        live = mask_mod(live, b, h, q_idx, kv_idx, mask_rows, mask_captures)
    fetched = score_fetch(live, b, h, q_idx, kv_idx, score_rows, score_captures)
    left, right, rest = latents[0].index(place), latents[1].index(place), latents[2].index(place)
    score = gl.full([queries[0].shape[0], BLOCK_N], 0.0, gl.float32, SCORES)
    mbarrier.wait(full[2].index(place), phase)
    score = warpgroup_mma(queries[2], rest.permute((1, 0)), score, use_acc=False, is_async=True)
    mbarrier.wait(full[0].index(place), phase)
    score = warpgroup_mma(queries[0], left.permute((1, 0)), score, is_async=True)
    mbarrier.wait(full[1].index(place), phase)
    score = warpgroup_mma(queries[1], right.permute((1, 0)), score, is_async=True)
    score = warpgroup_mma_wait(0, deps=[score]) * scale
    score = score_mod(score, b, h, q_idx, kv_idx, score_rows, fetched, score_captures) * LOG2E
    if CHECKED:
        score = gl.where(live, score, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    p = gl.exp2(score - m_safe[:, None])
    alpha = gl.exp2(m_i - m_safe)
    factors.index(place).store(alpha)
    rest.store(p.to(rest.dtype))
    if CHECKED:
        if start_n + BLOCK_N > kv_len:
            _clear_rows(left, kv_len - start_n, ROWS)
            _clear_rows(right, kv_len - start_n, ROWS)
    fence_async_shared()
    mbarrier.arrive(ready.index(place), count=1)
    return m_new, l_i * alpha + gl.sum(p, 1)


@gluon.jit
def _weigh_keys(
    queries, latents, factors, sums, full, ready, runs, first, last, scale, kv_len, b, h, q_idx, score_rows,
    score_captures, mask_rows, mask_captures, block_lists,
    BLOCK_N: gl.constexpr, NUM_LIVE: gl.constexpr, NUM_FULL: gl.constexpr, SCORES: gl.constexpr, ROWS: gl.constexpr,
):  # fmt: skip
    """The weights of a run, and at its end each row's largest score and the sum of its weights."""
    BLOCK_M: gl.constexpr = queries[0].shape[0]
    m_i = gl.full([BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, SCORES))
    l_i = gl.full([BLOCK_M], 0.0, gl.float32, gl.SliceLayout(1, SCORES))
    last_full = first
    if NUM_FULL > 0:
        last_full = gl.maximum(gl.minimum(last, runs[0]), first)
        for i in range(first, last_full):
            m_i, l_i = _weigh_block(
                m_i, l_i, i, i - first, queries, latents, factors, full, ready, runs, scale, kv_len, b, h, q_idx,
                score_rows, score_captures, mask_rows, mask_captures, block_lists,
                BLOCK_N, NUM_LIVE, NUM_FULL, False, SCORES, ROWS,
            )  # fmt: skip
    for i in range(last_full, last):
        m_i, l_i = _weigh_block(
            m_i, l_i, i, i - first, queries, latents, factors, full, ready, runs, scale, kv_len, b, h, q_idx,
            score_rows, score_captures, mask_rows, mask_captures, block_lists,
            BLOCK_N, NUM_LIVE, NUM_FULL, True, SCORES, ROWS,
        )  # fmt: skip
    sums.index(0).store(m_i)
    sums.index(1).store(l_i)
    mbarrier.arrive(ready.index(2), count=1)


@gluon.jit
def _sum_values(
    values, weights, factors, sums, empty, weights_empty, ready, count, COLUMN: gl.constexpr, v_scale, tile, b, kv_head,
    place, whole, num_tokens, out, lse, partial_out, partial_lse, q_lens, sinks, stride_ob, stride_oh, stride_om,
    stride_od, num_kv_heads, num_splits,
    GROUP_SIZE: gl.constexpr, NUM_QUERIES: gl.constexpr, V_HEAD_DIM: gl.constexpr, SPLIT: gl.constexpr,
    BALANCED: gl.constexpr, OUTPUT: gl.constexpr,
):  # fmt: skip
    """The columns of the result from `COLUMN` on, over the `count` steps of a run."""
    BLOCK_M: gl.constexpr = factors.shape[1]
    COLUMNS: gl.constexpr = values.shape[2]
    acc = gl.full([BLOCK_M, COLUMNS], 0.0, gl.float32, OUTPUT)
    for step in range(count):
        spot = step % 2
        mbarrier.wait(ready.index(spot), step // 2 % 2)
        acc = acc * factors.index(spot).load(gl.SliceLayout(1, OUTPUT))[:, None]
        acc = warpgroup_mma(weights.index(spot), values.index(spot), acc)
        mbarrier.arrive(empty.index(spot), count=1)
        mbarrier.arrive(weights_empty.index(spot), count=1)
    mbarrier.wait(ready.index(2), 0)
    m_i = sums.index(0).load(gl.SliceLayout(1, OUTPUT))
    l_i = sums.index(1).load(gl.SliceLayout(1, OUTPUT))
    lanes = gl.arange(0, BLOCK_M, gl.SliceLayout(1, OUTPUT))
    rows, row_valid, head, token = query_rows(tile * BLOCK_M + lanes, kv_head, GROUP_SIZE, NUM_QUERIES)
    offs_dv = COLUMN + gl.arange(0, COLUMNS, gl.SliceLayout(0, OUTPUT))
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
def _barriers(NUM: gl.constexpr, COUNT: gl.constexpr):
    """Barriers that are passed when `COUNT` groups of warps, or one copy, arrived."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=COUNT)
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
    query, key, value, key_descriptor, value_descriptor, out, lse, partial_out, partial_lse, kv_lens, q_lens,
    q_offset, page_table, block_lists, key_scales, value_scales, sinks, score_captures, mask_captures, scale,
    stride_qb, stride_qh, stride_qm, stride_qd, key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd,
    stride_ob, stride_oh, stride_om, stride_od, num_kv_heads, max_kv_len, num_splits, GROUP_SIZE: gl.constexpr,
    NUM_QUERIES: gl.constexpr, HEAD_DIM: gl.constexpr, V_HEAD_DIM: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_R: gl.constexpr, BLOCK_DV: gl.constexpr,
    PAGE_SIZE: gl.constexpr, SHARED: gl.constexpr, PACKED: gl.constexpr, NUM_LIVE: gl.constexpr,
    NUM_FULL: gl.constexpr, SPLIT: gl.constexpr, BALANCED: gl.constexpr, PRECISION: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """As in `decode.py`. The descriptors show the latents in boxes of BLOCK_DV // 2 and of BLOCK_R columns.

    BLOCK_M, BLOCK_N and BLOCK_R are the same.
    """
    HALF: gl.constexpr = BLOCK_DV // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF // 2, 16])
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
    latents = left, right, rest
    factors = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [2, BLOCK_M], NUMBERS)
    full = _barriers(2, 1), _barriers(2, 1), _barriers(2, 1)
    empty = _barriers(2, 1), _barriers(2, 1), _barriers(2, 2)
    ready = _barriers(3, 1)
    fence_async_shared()

    scale = scale * item_scale(key_scales, b, kv_head)
    v_scale = item_scale(value_scales, b, kv_head)
    origin = kv_origin(key, b, kv_head, key_steps)
    gl.warp_specialize(
        [
            (
                _weigh_keys,
                (
                    queries, latents, factors, sums, full, ready, runs, first, last, scale, kv_len, b, h, q_idx,
                    score_rows, score_captures, mask_rows, mask_captures, block_lists,
                    BLOCK_N, NUM_LIVE, NUM_FULL, SCORES, ROWS,
                ),
            ),
            (
                _sum_values,
                (
                    left, rest, factors, sums, empty[0], empty[2], ready, last - first, 0, v_scale, tile, b, kv_head,
                    place, whole, num_tokens, out, lse, partial_out, partial_lse, q_lens, sinks, stride_ob, stride_oh,
                    stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM, SPLIT,
                    BALANCED, OUTPUT,
                ),
            ),
            (
                _sum_values,
                (
                    right, rest, factors, sums, empty[1], empty[2], ready, last - first, HALF, v_scale, tile, b,
                    kv_head, place, whole, num_tokens, out, None, partial_out, partial_lse, q_lens, sinks, stride_ob,
                    stride_oh, stride_om, stride_od, num_kv_heads, num_splits, GROUP_SIZE, NUM_QUERIES, V_HEAD_DIM,
                    SPLIT, BALANCED, OUTPUT,
                ),
            ),
            (
                _copy_blocks,
                (
                    key_descriptor, value_descriptor, latents, full, empty, runs, first, last, origin, key_steps,
                    page_table, block_lists, b, kv_len, BLOCK_N, PAGE_SIZE, NUM_LIVE, NUM_FULL,
                ),
            ),
        ],
        [4, 4, 1],
        [168, 168, 24],
    )  # fmt: skip
    for i in gl.static_range(3):
        _end_barriers(full[i])
        _end_barriers(empty[i])
    _end_barriers(ready)
