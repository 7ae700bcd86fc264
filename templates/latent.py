"""Attention over latents on Hopper's tensor cores: this `attend_run` takes the place of the one in `decode.py`.

It needs the loads of kv_descriptor.py. It also replaces two functions that need layouts, `numbers` and one of
balanced.py.

The file is written in Gluon, Triton's language with explicit layouts, because one tile of 64 rows fills a
multiprocessor. The accumulator of 512 columns fills its registers. The query and two blocks of latents fill its shared
memory. Each latent is loaded once and used three times, by groups of warps that work side by side:

- one warp copies the next block while one is in use (`_copy_blocks`),
- four warps compute the scores, the weights and the left half of the result (`_attend_left`),
- four warps compute its right half with the same weights (`_attend_right`).

A block has three parts: the columns of the left half, the columns of the right half, and the rest, which only the
scores need. Each part has one place for even steps and one for odd steps. These are the barriers:

- full (for each part and place): the copy has arrived. The left half waits for it. The right half waits for `ready`,
  which comes later.
- empty (for each part and place): the last reader is done. The copying warp waits for it. The left half tells it about
  its own part, the right half about the two others.
- ready: the left half has written the weights and `factors`, by which the results so far are multiplied. At the end of
  a run it has written the largest scores (into `factors`) and the sums of weights.
- taken: the right half has used the factors and the weights, so the next step may overwrite them.

The last two barriers are passed once per step, the others once in two steps. A wait names the parity of that count.
"""

import types
from collections import namedtuple

import triton.language
from decode import (
    HAS_SCORE_MOD,
    LOG2E,
    Block,
    Visit,
    block_runs,
    find_pages,
    full_block,
    gdc_launch_dependents,
    gdc_wait,
    in_spans,
    inside_a_span,
    kv_start,
    make_tile,
    mask_mod,
    partial_block,
    query_rows,
    rectangle,
    row_start,
    score_fetch,
    score_mod,
    share_of,
    store_run,
)
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
except ImportError:  # the name until Triton 3.6
    from triton.experimental.gluon.language.nvidia.hopper.tma import async_copy_global_to_shared as async_load


def _gluon_language():
    """`triton.language` with the functions of Gluon that make tensors, for the other functions of the module.

    Triton recognises the module by its name and does not look at its content.
    """
    language = types.ModuleType("triton.language")
    makers = ("arange", "full", "zeros", "zeros_like")
    language.__dict__.update(vars(triton.language) | {name: getattr(gl, name) for name in makers})
    return language


tl = _gluon_language()

# Layouts: rows of wide parts, rows of the narrow part, parts in shared memory, float32 numbers in shared memory.
ROWS = gl.constexpr(gl.BlockedLayout([1, 8], [1, 32], [4, 1], [1, 0]))
NARROW = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))
LATENTS = gl.constexpr(gl.NVMMASharedLayout(128, 16))
NUMBERS = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
# The shared memory and the barriers of a program. `queries` [BLOCK_M, columns] and `latents` [2, BLOCK_N, columns] are
# tuples of parts, `weights` is [BLOCK_M, BLOCK_N], `factors` and `sums` are float32 [BLOCK_M].
Memory = namedtuple("Memory", "queries latents weights factors sums full empty ready taken")
# How scores, halves of the result, and weights in registers are spread over four warps.
Layouts = namedtuple("Layouts", "SCORES OUTPUT WEIGHTS")


@gluon.jit
def _find_block(visit, i, C: gl.constexpr):
    """The block with the number `i` of an item. The full blocks come first, then the partial ones."""
    block = partial_block(visit.runs, i - visit.runs.num_full)
    if C.NUM_FULL > 0:
        block = gl.where(i < visit.runs.num_full, full_block(visit.runs, i), block)
    return block


@gluon.jit
def _copy_blocks(wide, narrow, start, steps, memory, visit, b, C: gl.constexpr):
    """Copies all blocks of an item into shared memory, each as soon as its places are empty."""
    latents, full, empty = memory.latents, memory.full, memory.empty
    HALF: gl.constexpr = latents[0].shape[2]
    for i in range(visit.first, visit.last):
        step = i - visit.first
        place = step % 2
        start_n = _find_block(visit, i, C) * C.BLOCK_N
        pages = find_pages(visit.page_table, b, start_n, visit.spans, C)
        row, column = rectangle(start, Block(start_n, pages), steps, C)
        phase = (step // 2 + 1) % 2
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
def _clear_rows(tile, start_n, spans):
    """Writes zeros into the rows of a tile whose keys lie outside the spans. Those rows may hold NaN."""
    rows = start_n + gl.arange(0, tile.shape[0], gl.SliceLayout(1, ROWS))
    loaded = tile.load(ROWS)
    tile.store(gl.where(in_spans(rows, spans)[:, None], loaded, gl.zeros_like(loaded)))
    fence_async_shared()
    tl.debug_barrier()


@gluon.jit
def _sums_of_lanes(p):
    """Sums of the weights of each row over the keys that one lane holds [BLOCK_M, 4]."""
    return gl.sum(gl.sum(p.reshape([p.shape[0], p.shape[1] // 8, 4, 2]), 3), 1)


@gluon.jit
def _scores_of(memory, place, phase, C: gl.constexpr, L: gl.constexpr):
    """The products of the query and the latents of a block, part by part as they arrive."""
    queries, latents, full = memory.queries, memory.latents, memory.full
    left, right, rest = latents[0].index(place), latents[1].index(place), latents[2].index(place)
    score = gl.full([C.BLOCK_M, C.BLOCK_N], 0.0, gl.float32, L.SCORES)
    mbarrier.wait(full[2].index(place), phase)
    score = warpgroup_mma(queries[2], rest.permute((1, 0)), score, use_acc=False, is_async=True)
    mbarrier.wait(full[0].index(place), phase)
    score = warpgroup_mma(queries[0], left.permute((1, 0)), score, is_async=True)
    mbarrier.wait(full[1].index(place), phase)
    score = warpgroup_mma(queries[1], right.permute((1, 0)), score, is_async=True)
    return warpgroup_mma_wait(0, deps=[score])


@gluon.jit
def _add_weights(l_i, alpha, p):
    """Adds weights to sums of `_sums_of_lanes`, which are multiplied by the factors of their rows before."""
    return l_i * gl.convert_layout(alpha, gl.SliceLayout(1, l_i.type.layout))[:, None] + _sums_of_lanes(p)


@gluon.jit
def _attend_block(
    acc, m_i, l_i, i, memory, visit, scale, tile, captures, CHECKED: gl.constexpr, C: gl.constexpr, L: gl.constexpr
):
    """One step of the online softmax, and the left half of its result.

    Between the scores and the product with the weights the tensor cores have no work. So only what that product needs
    stands there, and the stores for the right half, for which nothing waits. The product takes the weights from
    registers. In full blocks the sums come while it runs.

    All products are complete when it returns. If one were still running, ptxas would serialise all products in kernels
    whose mods have certain loads.
    """
    b, h, q_idx = tile.b, tile.h, tile.q_idx
    step = i - visit.first
    place = step % 2
    start_n = _find_block(visit, i, C) * C.BLOCK_N
    kv_idx = start_n + gl.arange(0, C.BLOCK_N, gl.SliceLayout(0, L.SCORES))[None, :]
    live = None
    if CHECKED:
        live = in_spans(kv_idx, visit.spans)
        kv_idx = gl.minimum(kv_idx, tile.kv_len - 1)
    if C.SHIFTED:
        kv_idx = kv_idx + tile.kv_offset  # mods see positions
    if CHECKED:
        live = mask_mod(live, b, h, q_idx, kv_idx, tile.mask_row, captures.mask)
    fetched = score_fetch(live, b, h, q_idx, kv_idx, tile.score_row, captures.score)
    left = memory.latents[0].index(place)
    score = _scores_of(memory, place, step // 2 % 2, C, L)
    # Without a score_mod the scores stay unscaled, and `unit` contains the scale. This saves one operation per score.
    unit = gl.maximum(scale * LOG2E, 1e-37)  # scale may be 0, and 0 times -inf is NaN
    if HAS_SCORE_MOD:
        score = score_mod(score * scale, b, h, q_idx, kv_idx, tile.score_row, fetched, captures.score)
        unit = LOG2E
    if CHECKED:
        score = gl.where(live, score, float("-inf"))
    m_new = gl.maximum(m_i, gl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = gl.where(m_new == float("-inf"), 0.0, m_new)
    alpha = gl.exp2((m_i - m_safe) * unit)
    p = gl.exp2((score - m_safe[:, None]) * unit)
    weights = p.to(memory.weights.dtype)
    if CHECKED:  # later, `p` would be spilled
        l_i = _add_weights(l_i, alpha, p)
    acc = acc * gl.convert_layout(alpha, gl.SliceLayout(1, L.OUTPUT))[:, None]
    mbarrier.wait(memory.taken, (step + 1) % 2)  # the other half has used the weights of the last step
    memory.factors.store(alpha)
    memory.weights.store(weights)
    if CHECKED:
        if not inside_a_span(start_n, visit.spans, C.BLOCK_N):
            _clear_rows(left, start_n, visit.spans)
    acc = warpgroup_mma(gl.convert_layout(weights, L.WEIGHTS), left, acc, is_async=True)
    fence_async_shared()
    mbarrier.arrive(memory.ready, count=1)
    if not CHECKED:
        l_i = _add_weights(l_i, alpha, p)
    acc = warpgroup_mma_wait(0, deps=[acc])
    mbarrier.arrive(memory.empty[0].index(place), count=1)
    return acc, m_new, l_i


@gluon.jit
def _attend_left(memory, visit, scale, tile, captures, C: gl.constexpr, L: gl.constexpr):
    """Computes scores, weights and the left half of the result of a run, and the sums that the right half needs."""
    m_i = gl.full([C.BLOCK_M], float("-inf"), gl.float32, gl.SliceLayout(1, L.SCORES))
    l_i = _sums_of_lanes(gl.full([C.BLOCK_M, C.BLOCK_N], 0.0, gl.float32, L.SCORES))
    acc = gl.full([C.BLOCK_M, memory.latents[0].shape[2]], 0.0, gl.float32, L.OUTPUT)
    first_partial = visit.first
    if C.NUM_FULL > 0:
        first_partial = gl.maximum(gl.minimum(visit.last, visit.runs.num_full), visit.first)
        for i in range(visit.first, first_partial):
            acc, m_i, l_i = _attend_block(acc, m_i, l_i, i, memory, visit, scale, tile, captures, False, C, L)
    for i in range(first_partial, visit.last):
        acc, m_i, l_i = _attend_block(acc, m_i, l_i, i, memory, visit, scale, tile, captures, True, C, L)
    l_i = gl.convert_layout(gl.sum(l_i, 1), gl.SliceLayout(1, L.SCORES))
    if not HAS_SCORE_MOD:
        m_i = gl.where(m_i == float("-inf"), m_i, m_i * scale)
    mbarrier.wait(memory.taken, (visit.last - visit.first + 1) % 2)
    memory.factors.store(m_i)  # there are no more factors, so their place is free
    memory.sums.store(l_i)
    mbarrier.arrive(memory.ready, count=1)
    return acc, gl.convert_layout(m_i, gl.SliceLayout(1, L.OUTPUT)), gl.convert_layout(l_i, gl.SliceLayout(1, L.OUTPUT))


@gluon.jit
def _attend_right(memory, visit, item, call, C: gl.constexpr, L: gl.constexpr):
    """Computes and writes the right half of the result of a run."""
    latents, factors = memory.latents[1], memory.factors
    COLUMNS: gl.constexpr = latents.shape[2]
    acc = gl.full([C.BLOCK_M, COLUMNS], 0.0, gl.float32, L.OUTPUT)
    for i in range(visit.first, visit.last):
        spot = (i - visit.first) % 2
        values = latents.index(spot)
        start_n = _find_block(visit, i, C) * C.BLOCK_N
        mbarrier.wait(memory.ready, spot)
        mbarrier.arrive(memory.empty[2].index(spot), count=1)  # only the scores used the rest
        acc = acc * factors.load(gl.SliceLayout(1, L.OUTPUT))[:, None]
        if not inside_a_span(start_n, visit.spans, C.BLOCK_N):
            _clear_rows(values, start_n, visit.spans)
        acc = warpgroup_mma(memory.weights, values, acc)
        mbarrier.arrive(memory.empty[1].index(spot), count=1)
        mbarrier.arrive(memory.taken, count=1)
    mbarrier.wait(memory.ready, (visit.last - visit.first) % 2)
    m_i = factors.load(gl.SliceLayout(1, L.OUTPUT))
    l_i = memory.sums.load(gl.SliceLayout(1, L.OUTPUT))
    _store_half(acc, m_i, l_i, COLUMNS, item, call, C)


@gluon.jit
def _store_half(acc, m_i, l_i, COLUMN: gl.constexpr, item, call, C: gl.constexpr):
    """Writes the columns of a result from `COLUMN` on; the left half (COLUMN 0) also writes the numbers of rows."""
    OUTPUT: gl.constexpr = acc.type.layout
    lanes = gl.arange(0, C.BLOCK_M, gl.SliceLayout(1, OUTPUT))
    rows = query_rows(item, lanes, call.lengths.tokens, C)
    offs_dv = COLUMN + gl.arange(0, acc.shape[1], gl.SliceLayout(0, OUTPUT))
    store_run(acc, m_i, l_i, rows, offs_dv, COLUMN == 0, item, call, C)


@gluon.jit
def _load_query(call, item, COLUMN: gl.constexpr, WIDTH: gl.constexpr, C: gl.constexpr, LAYOUT: gl.constexpr):
    """Loads WIDTH columns from COLUMN on of the query rows of a tile into shared memory, with the sign of the scale."""
    rows = query_rows(item, gl.arange(0, C.BLOCK_M, gl.SliceLayout(1, LAYOUT)), call.lengths.tokens, C)
    offs_d = COLUMN + gl.arange(0, WIDTH, gl.SliceLayout(0, LAYOUT))
    queries = call.queries
    row = row_start(queries.start, queries, item.b, rows)
    q = gl.load(row[:, None] + offs_d[None, :] * queries.stride_d)
    q = gl.where(call.scale < 0, -q, q)
    return gl.allocate_shared_memory(queries.start.dtype.element_ty, [C.BLOCK_M, WIDTH], LATENTS, q)


@gluon.jit
def _barriers(NUM: gl.constexpr):
    """Makes barriers. One group of warps, or one copy, arrives at each of them."""
    barriers = gl.allocate_shared_memory(gl.int64, [NUM, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(NUM):
        mbarrier.init(barriers.index(i), count=1)
    return barriers


@gluon.jit
def _end_barriers(memory):
    """Ends all barriers, so that others can use their memory."""
    for part in gl.static_range(3):
        for i in gl.static_range(2):
            mbarrier.invalidate(memory.full[part].index(i))
        for i in gl.static_range(2):
            mbarrier.invalidate(memory.empty[part].index(i))
    mbarrier.invalidate(memory.ready)
    mbarrier.invalidate(memory.taken)


@gluon.jit
def numbers(SIZE: gl.constexpr):
    """The numbers from 0 to SIZE, in the layout of the rows of a matrix."""
    return gl.arange(0, SIZE, gl.SliceLayout(1, gl.BlockedLayout([1, 2], [32, 1], [4, 1], [1, 0])))


@gluon.jit
def _sums_before(weights):
    """For each weight, the sum of the weights before it."""
    flat = gl.convert_layout(weights, gl.BlockedLayout([1], [32], [4], [0]))
    return gl.convert_layout(tl.cumsum(flat, 0), weights.type.layout) - weights


@gluon.jit
def _share_memory(queries, C: gl.constexpr):
    """Makes the memory and the barriers that the groups of warps share; `queries` are the three parts of the query."""
    dtype: gl.constexpr = queries[0].dtype
    latents = (
        gl.allocate_shared_memory(dtype, [2, C.BLOCK_N, C.BLOCK_DV // 2], LATENTS),
        gl.allocate_shared_memory(dtype, [2, C.BLOCK_N, C.BLOCK_DV // 2], LATENTS),
        gl.allocate_shared_memory(dtype, [2, C.BLOCK_N, C.BLOCK_R], LATENTS),
    )
    weights = gl.allocate_shared_memory(dtype, [C.BLOCK_M, C.BLOCK_N], LATENTS)
    factors = gl.allocate_shared_memory(gl.float32, [C.BLOCK_M], NUMBERS)
    sums = gl.allocate_shared_memory(gl.float32, [C.BLOCK_M], NUMBERS)
    full = _barriers(2), _barriers(2), _barriers(2)
    empty = _barriers(2), _barriers(2), _barriers(2)
    handed = _barriers(2)
    return Memory(queries, latents, weights, factors, sums, full, empty, handed.index(0), handed.index(1))


@gluon.jit
def attend_run(item, keys, values, call, C: gl.constexpr):
    """As in `decode.py`. The descriptors copy boxes of the latents of BLOCK_DV // 2 and of BLOCK_R columns."""
    HALF: gl.constexpr = C.BLOCK_DV // 2
    SCORES: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, C.BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HALF, 16])
    L: gl.constexpr = Layouts(SCORES, OUTPUT, gl.DotOperandLayout(0, OUTPUT, 2))
    if C.PDL and not (C.BALANCED or C.RAGGED):
        gdc_launch_dependents()
        gdc_wait()

    rows = query_rows(item, gl.arange(0, C.BLOCK_M, gl.SliceLayout(1, SCORES)), call.lengths.tokens, C)
    tile = make_tile(item, rows, call.lengths, call.captures, C)
    runs, spans = block_runs(tile, call.block_lists, call.captures, C)
    first, last = share_of(item, runs, C)
    visit = Visit(runs, spans, call.page_table, first, last)

    q_left = _load_query(call, item, 0, HALF, C, ROWS)
    q_right = _load_query(call, item, HALF, HALF, C, ROWS)
    q_rest = _load_query(call, item, 2 * HALF, C.BLOCK_R, C, NARROW)
    scale = gl.abs(call.scale)
    memory = _share_memory((q_left, q_right, q_rest), C)
    fence_async_shared()

    start = kv_start(keys.base, item.b, item.kv_head, keys.steps)
    acc, m_i, l_i = gl.warp_specialize(
        [
            (_attend_left, (memory, visit, scale, tile, call.captures, C, L)),
            (_attend_right, (memory, visit, item, call, C, L)),
            (_copy_blocks, (keys.descriptor, values.descriptor, start, keys.steps, memory, visit, item.b, C)),
        ],
        [4, 1],
        [216, 40],
    )  # fmt: skip
    _end_barriers(memory)
    _store_half(acc, m_i, l_i, 0, item, call, C)
