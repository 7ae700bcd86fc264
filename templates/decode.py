"""Split-KV decode attention: every program attends one tile of query rows to one run of the KV cache.

This file is a complete Triton module: it imports, compiles and runs as it stands, and computes plain attention. The
first functions are hooks with identity bodies: the generator writes the text of a user's mods into them. Functions of
other files take the place of some functions here: for pages, descriptors, lists of blocks and another schedule.

A call has up to two kernels. `decode_split` keeps the online softmax (Milakov and Gimelshein, arXiv:1805.02867) of a
run of KV blocks. With one split it writes the output. With more it writes a partial output, and the largest score and
the sum of weights of each row. `decode_combine`, in combine.py, merges the partial results of a row. Both use
programmatic dependent launch if the target has it, so each program waits (`gdc_wait`) before it reads or writes memory.

Rows: the query rows of a sequence that share a KV head are packed. Row `r` is query token `r // GROUP_SIZE` and query
head `r % GROUP_SIZE` of the group. The number of tokens is a run-time value; ONE_TOKEN kernels are for calls in which
every sequence has one.

Tiles: BLOCK_M rows each. All tiles of a call are numbered (`tile_index`). If the queries are padded to
[B, Hq, Q, D], each sequence has the same number of tiles. If they are packed to [T, Hq, D], tile 0 of sequence `b` has
number `b`. The other tiles of `b` have numbers from `batch + GROUP_SIZE * first // BLOCK_M` on, where `first` counts
the tokens of earlier sequences: rounding down leaves room for all of them. The tokens that no sequence has count as one
more sequence, number `batch`, without keys: first those after the last sequence, then those before the first one.

Positions: a *slot* is a row of the cache (through pages). Mods and `kv_bounds` use positions; all else, such as spans,
blocks and lengths, is counted in slots. The position of a slot is the slot plus the offset of its sequence.

Which keys are read: a tile of rows has up to four *spans*, one for each interval of `kv_bounds`. A span goes from the
first to the last key that the interval has in any row of the tile. A block that meets no span is not visited. In a
partial block, keys outside the spans do not count: they may hold anything, and their page table entries are not read.
"""

from collections import namedtuple

import triton
import triton.language as tl

if hasattr(tl.extra, "cuda"):
    from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
HAS_SCORE_MOD = tl.constexpr(False)  # the generator writes True where there is one

# --- records ----------------------------------------------------------------------------------------------------------


# What a kernel is compiled for. The docstring of `decode_split` says what each field is. RAGGED: the numbers of query
# tokens of the sequences differ, and are in memory. STARTED, SHIFTED: the call has kv_starts, kv_offset.
Constants = namedtuple(
    "Constants",
    "GROUP_SIZE ONE_TOKEN HEAD_DIM V_HEAD_DIM BLOCK_M BLOCK_N BLOCK_D BLOCK_R BLOCK_DV PAGE_SIZE SHARED PAIRED "
    "NUM_LIVE NUM_FULL SPLIT BALANCED BLOCK_B MANY UNIT_OUT KEY_PRODUCT VALUE_PRODUCT PRECISION PDL PREFETCH RAGGED "
    "STARTED SHIFTED SUMS_LATE",
)
# Query rows: the address of the first one, and strides in elements.
Queries = namedtuple("Queries", "start stride_b stride_h stride_m stride_d")
# Keys or values: their address, where the rows of a KV head start, the descriptor or None, steps between sequences and
# heads, strides, and the scales.
Cache = namedtuple("Cache", "base start descriptor steps stride_n stride_d scales")
# Where results go: the output, the numbers of rows and the sinks of whole items, and the partial results.
Outputs = namedtuple(
    "Outputs",
    "out lse max_scores partial_out partial_max partial_sum sinks stride_b stride_h stride_m stride_d num_kv_heads",
)
# Lengths of all sequences, or where each begins in packed keys; positions of their first query tokens; their first live
# slots; positions of their first slots; the greatest length; and the tokens.
Lengths = namedtuple("Lengths", "kv_lens cu_seqlens_k q_offset kv_starts kv_offset max_kv_len tokens")
# Query tokens: of padded queries, the tokens in use of each sequence or None; of packed queries, where each sequence
# starts, else None; the tokens Q or T; the sequences; and which of the sequences take part, see `takes_part`.
Tokens = namedtuple("Tokens", "q_lens cu_seqlens_q num_queries batch row_range")
# The splits of an item, where partial results of this pass start, and two fields that balanced.py uses and describes.
Schedule = namedtuple("Schedule", "num_splits first_place item_parts max_weight")
# What the mods capture.
Captures = namedtuple("Captures", "score mask")
# What items are computed from, except keys and values, and where their results go.
Call = namedtuple("Call", "queries outputs lengths captures page_table block_lists scale")
# A tile of query rows of a KV head, and the share `start .. end` of `parts` of its KV blocks. A `whole` item writes the
# output. Another item writes partial results: that of row `lane` at `place + lane * step`.
Item = namedtuple("Item", "b kv_head tile span start end parts place step whole")
# The tokens of a sequence: where the first one lies in the query, how many there are, and how many are in use.
TokenSpan = namedtuple("TokenSpan", "first count used")
# The rows of a tile [BLOCK_M]: lanes, whether the row exists, its query head, its token of the sequence, and the place
# of that token in the query.
Rows = namedtuple("Rows", "lanes valid head token place")
# What mods see of a tile, what they computed for its rows, its first live slot and the position of slot 0.
Tile = namedtuple("Tile", "b kv_head h q_idx kv_len score_row mask_row kv_start kv_offset")
# Blocks `start .. end`, of which `full_start .. full_end` are full.
Range = namedtuple("Range", "start end full_start full_end")
# The blocks that a tile visits: the number of full ones and of partial ones, and the ranges in which they lie.
Runs = namedtuple("Runs", "num_full num_partial ranges")
# Which keys an item reads: the blocks of its tile, the spans, the page table, and its block numbers `first .. last`.
Visit = namedtuple("Visit", "runs spans page_table first last")
# A block of keys: its first key, and the pages on which the keys lie.
Block = namedtuple("Block", "start_n pages")
# The online softmax of a tile: largest score and sum of weights of each row, and the result so far. If SUMS_LATE, `l_i`
# is [BLOCK_M, BLOCK_N], a sum for each place in a block. `acc` is a tuple: the parts of BLOCK_DV columns, or the even
# and the odd columns if the cache is loaded in pairs. It is in units of `v_unit`: the largest weight of a row so far if
# each value has its own scale, else 1.
State = namedtuple("State", "m_i l_i v_unit acc")

# --- hooks ------------------------------------------------------------------------------------------------------------


@triton.jit
def kv_bounds(b, h, q_idx, score_captures, mask_captures):
    """Four intervals (lo, hi) of kv_idx that hold every attending key, and four in which no mask is needed.

    Bounds are int64 and may lie outside the sequence; an interval with lo >= hi is empty.
    """
    far = tl.full((), 1 << 62, tl.int64)
    return ((-far, far), (far, -far), (far, -far), (far, -far)), ((-far, far), (far, -far), (far, -far), (far, -far))


@triton.jit
def score_row(b, h, q_idx, captures):
    """Values that score_mod needs and that do not depend on kv_idx.

    b is a scalar; h and q_idx are [BLOCK_M, 1], but q_idx is a scalar if there is one query token.
    """
    return ()


@triton.jit
def score_fetch(live, b, h, q_idx, kv_idx, row, captures):
    """What score_mod reads from memory for each key. These loads run while the scores are computed.

    `live` is as in mask_mod, or None if every key attends.
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
    """Loads captured values where `inside`, and gives 0 elsewhere; if `inside` is None, it loads them everywhere.

    The condition of the branch is always true. The branch keeps Triton from pipelining the load: Triton would copy
    single values to shared memory some stages ahead, which costs more than it saves. Both sides of the branch load, so
    that the conversion to another layout stays outside the branch: the conversion waits for the value.
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
def find_pages(page_table, b, start_n, spans, C: tl.constexpr):
    """The pages of the keys from `start_n` on, read one step before the keys; a contiguous cache has none."""
    return ()


@triton.jit
def owner(b):
    """Index of a sequence in the first dimension of a cache. It is 0 for pages, which the page table finds."""
    return b


@triton.jit
def row_offsets(block, step, stride_n, C: tl.constexpr):
    """Where the keys of a block lie in a KV head, in elements [BLOCK_N]; `step`: stride of the first dimension."""
    return (block.start_n + tl.arange(0, C.BLOCK_N)).to(tl.int64) * stride_n


@triton.jit
def row_addresses(cache, block, C: tl.constexpr):
    """The addresses of the rows of a block in a KV head [BLOCK_N]."""
    return cache.start + row_offsets(block, cache.steps[0], cache.stride_n, C)


@triton.jit
def rectangle(start, block, steps, C: tl.constexpr):
    """Row and column of a block in the matrix of a descriptor; `start` is the row and column of the KV head."""
    return start[0] + block.start_n, start[1]


@triton.jit
def kv_start(base, b, kv_head, steps):
    """The address of the first row of one KV head; `steps` are (stride_b, stride_h)."""
    return base + owner(b).to(tl.int64) * steps[0] + kv_head.to(tl.int64) * steps[1]


@triton.jit
def load_kv(
    cache, block, spans, COLUMN: tl.constexpr, WIDTH: tl.constexpr, COLUMNS: tl.constexpr, CHECKED: tl.constexpr,
    C: tl.constexpr,
):  # fmt: skip
    """Loads columns `COLUMN .. COLUMN + COLUMNS` of the rows of a block; zeros from column WIDTH on.

    CHECKED gives zeros outside `spans`.
    """
    offs_d = COLUMN + tl.arange(0, COLUMNS)
    rows = row_offsets(block, cache.steps[0], cache.stride_n, C)
    pointers = cache.start + rows[:, None] + offs_d[None, :] * cache.stride_d
    if CHECKED:
        inside = in_spans(block.start_n + tl.arange(0, C.BLOCK_N), spans)
        return tl.load(pointers, mask=inside[:, None] & (offs_d[None, :] < WIDTH), other=0.0)
    elif WIDTH < COLUMN + COLUMNS:
        return tl.load(pointers, mask=offs_d[None, :] < WIDTH, other=0.0)
    else:
        return tl.load(pointers)


@triton.jit
def load_scales(scales, block, tile, spans, CHECKED: tl.constexpr, C: tl.constexpr):
    """Loads the scale of each key [BLOCK_N] from `scales` (pointer, stride_b, stride_h, stride_n); CHECKED as above."""
    start, stride_b, stride_h, stride_n = scales
    rows = row_offsets(block, stride_b, stride_n, C)
    pointers = start + owner(tile.b).to(tl.int64) * stride_b + tile.kv_head.to(tl.int64) * stride_h + rows
    if CHECKED:
        inside = in_spans(block.start_n + tl.arange(0, C.BLOCK_N), spans)
        return tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    else:
        return tl.load(pointers).to(tl.float32)


# --- KV ranges --------------------------------------------------------------------------------------------------------


@triton.jit
def live_slots(interval, kv_start, kv_len, kv_offset, C: tl.constexpr):
    """An interval of positions as one of slots, within the live slots of a sequence, int64; it may be empty."""
    lo, hi = interval
    if C.SHIFTED:
        lo = lo - kv_offset
        hi = hi - kv_offset
    if not C.STARTED:
        kv_start = 0
    return tl.minimum(tl.maximum(lo, kv_start), 1 << 30), tl.minimum(hi, kv_len)


@triton.jit
def live_span(interval, tile, C: tl.constexpr):
    """The keys from the first to the last one of an interval in any row of the tile, int32; (0, 0) if it is empty."""
    lo, hi = live_slots(interval, tile.kv_start, tile.kv_len, tile.kv_offset, C)
    if len((lo + hi).shape) > 0:
        # A row without a live key must not widen the span.
        hi = tl.where(lo < hi, hi, 0)
        lo = tl.min(tl.where(lo < hi, lo, 1 << 30))
        hi = tl.max(hi)
    return tl.where(lo < hi, lo, 0).to(tl.int32), tl.where(lo < hi, hi, 0).to(tl.int32)


@triton.jit
def live_spans(live, tile, C: tl.constexpr):
    """The spans (lo, hi) of a tile, in slots. They may overlap and may be in any order."""
    spans = (live_span(live[0], tile, C),)
    for i in tl.static_range(1, 4 if C.NUM_LIVE > 2 else C.NUM_LIVE):
        spans = spans + (live_span(live[i], tile, C),)  # noqa: RUF005
    return spans


@triton.jit
def in_spans(kv_idx, spans):
    """Which keys lie in a span."""
    inside = (kv_idx >= spans[0][0]) & (kv_idx < spans[0][1])
    for i in tl.static_range(1, len(spans)):
        inside = inside | ((kv_idx >= spans[i][0]) & (kv_idx < spans[i][1]))
    return inside


@triton.jit
def meets_spans(start_n, spans, BLOCK_N: tl.constexpr):
    """Whether a span has a key of the block at `start_n`."""
    meets = (start_n + BLOCK_N > spans[0][0]) & (start_n < spans[0][1])
    for i in tl.static_range(1, len(spans)):
        meets = meets | ((start_n + BLOCK_N > spans[i][0]) & (start_n < spans[i][1]))
    return meets


@triton.jit
def inside_a_span(start_n, spans, BLOCK_N: tl.constexpr):
    """Whether one span holds all keys of the block at `start_n`."""
    inside = (start_n >= spans[0][0]) & (start_n + BLOCK_N <= spans[0][1])
    for i in tl.static_range(1, len(spans)):
        inside = inside | ((start_n >= spans[i][0]) & (start_n + BLOCK_N <= spans[i][1]))
    return inside


@triton.jit
def span_blocks(span, BLOCK_N: tl.constexpr):
    """The blocks that meet a span, as a half-open range; (0, 0) if it is empty."""
    return span[0] // BLOCK_N, tl.cdiv(span[1], BLOCK_N)


@triton.jit
def full_blocks(interval, tile, C: tl.constexpr):
    """The blocks that lie inside an interval and the sequence in every row of the tile."""
    lo, hi = live_slots(interval, tile.kv_start, tile.kv_len, tile.kv_offset, C)
    hi = tl.maximum(hi, 0)
    if len(lo.shape) > 0:
        lo = tl.max(lo)
    if len(hi.shape) > 0:
        hi = tl.min(hi)
    return tl.cdiv(lo.to(tl.int32), C.BLOCK_N), hi.to(tl.int32) // C.BLOCK_N


@triton.jit
def order(a, b):
    """Sorts two ranges (start, end) by their starts."""
    swap = b[0] < a[0]
    first = tl.where(swap, b[0], a[0]), tl.where(swap, b[1], a[1])
    return first, (tl.where(swap, a[0], b[0]), tl.where(swap, a[1], b[1]))


@triton.jit
def after(a, b):
    """The part of range `b` after the end of range `a`; `a` starts first."""
    start = tl.maximum(b[0], a[1])
    return start, tl.maximum(start, b[1])


@triton.jit
def full_part(span, full, tile, C: tl.constexpr):
    """A range, and its longest piece inside one of the full intervals; an empty piece at its start if there is none."""
    start, end = span
    best_start = start
    best_end = start
    for i in tl.static_range(4 if C.NUM_FULL > 2 else C.NUM_FULL):
        lo, hi = full_blocks(full[i], tile, C)
        lo = tl.maximum(lo, start)
        hi = tl.minimum(hi, end)
        longer = hi - lo > best_end - best_start
        best_start = tl.where(longer, lo, best_start)
        best_end = tl.where(longer, hi, best_end)
    return Range(start, end, best_start, best_end)


@triton.jit
def next_run(block, end, start):
    """The block itself if it is before `end`, else the block as far after `start` as it is after `end`."""
    return tl.where(block < end, block, block - end + start)


@triton.jit
def block_runs(tile, block_lists, captures, C: tl.constexpr):
    """The blocks that a tile visits, and its spans.

    The ranges are disjoint and ascending. Each has partial blocks, then full blocks, then partial blocks.
    """
    live, full = kv_bounds(tile.b, tile.h, tile.q_idx, captures.score, captures.mask)
    spans = live_spans(live, tile, C)
    r0 = span_blocks(spans[0], C.BLOCK_N)
    if C.NUM_LIVE > 1:
        r1 = span_blocks(spans[1], C.BLOCK_N)
        r2 = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        r3 = tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        r0, r1 = order(r0, r1)
        if C.NUM_LIVE > 2:
            r2, r3 = order(span_blocks(spans[2], C.BLOCK_N), span_blocks(spans[3], C.BLOCK_N))
            r0, r2 = order(r0, r2)
            r1, r3 = order(r1, r3)
            r1, r2 = order(r1, r2)
        r1 = after(r0, r1)
        r2 = after(r1, r2)
        r3 = after(r2, r3)
        # There is no loop here because Triton 3.6 forgets the field names of records in a sum of tuples.
        ranges = (
            full_part(r0, full, tile, C),
            full_part(r1, full, tile, C),
            full_part(r2, full, tile, C),
            full_part(r3, full, tile, C),
        )
    else:
        ranges = (full_part(r0, full, tile, C),)
    num_full = 0
    num_partial = 0
    for i in tl.static_range(len(ranges)):
        num_full = num_full + ranges[i].full_end - ranges[i].full_start
        num_partial = num_partial + ranges[i].end - ranges[i].start
    return Runs(num_full, num_partial - num_full, ranges), spans


@triton.jit
def full_block(runs, number):
    """The full block with this number."""
    ranges = runs.ranges
    block = ranges[0].full_start + number
    for i in tl.static_range(1, len(ranges)):
        block = next_run(block, ranges[i - 1].full_end, ranges[i].full_start)
    return block


@triton.jit
def partial_block(runs, number):
    """The partial block with this number."""
    ranges = runs.ranges
    block = next_run(ranges[0].start + number, ranges[0].full_start, ranges[0].full_end)
    for i in tl.static_range(1, len(ranges)):
        block = next_run(block, ranges[i - 1].end, ranges[i].start)
        block = next_run(block, ranges[i].full_start, ranges[i].full_end)
    return block


# --- schedule ---------------------------------------------------------------------------------------------------------


@triton.jit
def read_length(lengths, b, limit):
    """Lengths of sequences `b`, between 0 and `limit`, int32."""
    if lengths is not None:
        limit = tl.maximum(tl.minimum(tl.load(lengths + b), limit), 0).to(tl.int32)
    return limit


@triton.jit
def count_keys(kv_lens, cu_seqlens_k, b, limit):
    """The keys of sequences `b`."""
    if cu_seqlens_k is not None:
        first = read_total(cu_seqlens_k, b, limit)
        return tl.maximum(read_total(cu_seqlens_k, b + 1, limit), first) - first
    else:
        return read_length(kv_lens, b, limit)


@triton.jit
def read_total(totals, b, limit):
    """The rows before sequences `b`, from running totals."""
    return tl.minimum(tl.maximum(tl.load(totals + b), 0), limit)


@triton.jit
def read_tokens(tokens, b):
    """The tokens (first, count, used) of sequences `b`. Sequence `batch` has the tokens that no sequence has."""
    if tokens.cu_seqlens_q is not None:
        totals, batch, limit = tokens.cu_seqlens_q, tokens.batch, tokens.num_queries
        first = read_total(totals, b, limit)
        end = tl.maximum(read_total(totals, tl.minimum(b + 1, batch), limit), first)
        count = tl.where(b < batch, end - first, limit - first + read_total(totals, 0, limit))
        return TokenSpan(first, count, tl.where(b < batch, count, 0))
    else:
        return TokenSpan(0, tokens.num_queries, read_length(tokens.q_lens, b, tokens.num_queries))


@triton.jit
def takes_part(tokens, b, rows):
    """Whether this pass computes sequences `b`, which have so many rows: those within `row_range`.

    Few rows get small tiles, many rows large tiles. Each pass has one size. The pass with the larger tiles has no upper
    limit. It also writes the rows that no sequence has, however few they are.
    """
    fewest, most = tokens.row_range
    return tl.where(b < tokens.batch, (rows >= fewest) & (rows <= most), most == 0x7FFFFFFF)


@triton.jit
def tiles_of(rows, BLOCK_M: tl.constexpr):
    """The number of tiles of some rows."""
    return (rows + BLOCK_M - 1) // BLOCK_M


@triton.jit
def tile_index(tokens, b, first, tile, GROUP_SIZE: tl.constexpr, BLOCK_M: tl.constexpr):
    """The number of a tile among all tiles of the call, as the head of this file says.

    `tile` counts the tiles of sequence `b`, and `first` is its first token. Tokens of no sequence have `b` = batch.
    """
    if tokens.cu_seqlens_q is not None:
        before = tl.maximum(first - read_total(tokens.cu_seqlens_q, 0, tokens.num_queries), 0)
        later = tokens.batch + GROUP_SIZE * before // BLOCK_M + tile - tl.where(b < tokens.batch, 1, 0)
        return tl.where((tile == 0) & (b < tokens.batch), b, later)
    else:
        return b * tiles_of(GROUP_SIZE * tokens.num_queries, BLOCK_M) + tile


@triton.jit
def numbers(SIZE: tl.constexpr):
    """The numbers from 0 to SIZE."""
    return tl.arange(0, SIZE)


@triton.jit
def find_sequence(tokens, number, FACTOR: tl.constexpr, DIVISOR: tl.constexpr):
    """The last sequence that starts at or before a number. The start is `FACTOR * tokens before it // DIVISOR`."""
    CHUNK: tl.constexpr = 256
    begin = read_total(tokens.cu_seqlens_q, 0, tokens.num_queries)
    found = tl.zeros((), tl.int32)
    for chunk in tl.range(0, tokens.batch, CHUNK):
        b = chunk + 1 + numbers(CHUNK)
        before = read_total(tokens.cu_seqlens_q, tl.minimum(b, tokens.batch), tokens.num_queries) - begin
        found += tl.sum(((b <= tokens.batch) & (FACTOR * before // DIVISOR <= number)).to(tl.int32), 0)
    return found


@triton.jit
def find_tile(tokens, number, C: tl.constexpr):
    """The tile (sequence, tile of the sequence, index) that the programs with this number compute.

    Late tiles of a sequence come first, because under a causal mask they see the most keys.
    """
    if tokens.cu_seqlens_q is not None:
        b = number
        tile = tl.zeros((), tl.int32)
        if number >= tokens.batch:
            later = C.GROUP_SIZE * tokens.num_queries // C.BLOCK_M - (number - tokens.batch)
            number = tokens.batch + later
            b = find_sequence(tokens, later, C.GROUP_SIZE, C.BLOCK_M)
            tile = number - tile_index(tokens, b, read_tokens(tokens, b).first, 1, C.GROUP_SIZE, C.BLOCK_M) + 1
        return b, tile, number
    else:
        num_tiles = tiles_of(C.GROUP_SIZE * tokens.num_queries, C.BLOCK_M)
        b = number // num_tiles
        tile = num_tiles - 1 - number % num_tiles
        return b, tile, b * num_tiles + tile


@triton.jit
def read_start(kv_starts, b, kv_len):
    """First live slots of sequences `b`, between 0 and their lengths, int32."""
    if kv_starts is not None:
        return read_length(kv_starts, b, kv_len)
    else:
        return kv_len * 0


@triton.jit
def read_offset(kv_offset, b):
    """Positions of slot 0 of sequences `b`, within +-2**30, so that positions fit into int32."""
    if kv_offset is not None:
        offset = tl.load(kv_offset + b) if kv_offset.dtype.is_ptr() else kv_offset
        return tl.maximum(tl.minimum(offset, 1 << 30), -(1 << 30)).to(tl.int32)
    else:
        return b * 0


@triton.jit
def first_position(q_offset, b, kv_end, q_len):
    """Position of the first query token: int64 from the caller, else such that the last query token is the last key.

    `kv_end` is the position after the last key.
    """
    if q_offset is not None:
        return (tl.load(q_offset + b) if q_offset.dtype.is_ptr() else q_offset).to(tl.int64)
    else:
        return kv_end - q_len


# --- quantised caches -------------------------------------------------------------------------------------------------


@triton.jit
def unpack(pairs, KIND: tl.constexpr):
    """The even and the odd columns of a quantised tile that was loaded as int16, two columns in one: exact float16.

    A tensor core takes pairs of rows of V. Words of two columns can be transposed on the way to it. Bytes cannot.
    """
    if KIND == "fp8e4nv":
        ASM: tl.constexpr = """{
            .reg .b16 lo, hi;
            .reg .b32 a, b;
            mov.b32 {lo, hi}, $2;
            cvt.rn.f16x2.e4m3x2 a, lo;
            cvt.rn.f16x2.e4m3x2 b, hi;
            prmt.b32 $0, a, b, 0x5410;
            prmt.b32 $1, a, b, 0x7632;
            }"""
    elif KIND == "fp8e5":  # the upper half of a float16
        ASM: tl.constexpr = """{
            .reg .b32 zero;
            mov.b32 zero, 0;
            prmt.b32 $0, $2, zero, 0x2404;
            and.b32 $1, $2, 0xFF00FF00;
            }"""
    else:  # int8: as the last bits of 1024 + 128 + x
        ASM: tl.constexpr = """{
            .reg .b32 bytes, high, less, a, b;
            mov.b32 high, 0x64646464;
            mov.b32 less, 0x64806480;
            xor.b32 bytes, $2, 0x80808080;
            prmt.b32 a, bytes, high, 0x4240;
            prmt.b32 b, bytes, high, 0x4341;
            sub.rn.f16x2 $0, a, less;
            sub.rn.f16x2 $1, b, less;
            }"""
    return tl.inline_asm_elementwise(ASM, "=r,=r,r", [pairs], dtype=(tl.float16, tl.float16), is_pure=True, pack=2)


@triton.jit
def power_of_two(x):
    """The largest power of two that is at most |x|; 1 where x is 0 or subnormal."""
    power = (x.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.where(power == 0.0, 1.0, power)


# --- kernels ----------------------------------------------------------------------------------------------------------


@triton.jit
def as_type(x, NAME: tl.constexpr):
    """Converts to the floating type of this name."""
    if NAME == "fp16":
        return x.to(tl.float16)
    elif NAME == "bf16":
        return x.to(tl.bfloat16)
    else:
        tl.static_assert(NAME == "fp32")
        return x.to(tl.float32)


@triton.jit
def leading_bits(x):
    """Float32 numbers rounded to what TF32 holds: 11 leading bits.

    What these lack is computed as a difference, which is NaN if `x` is. So it does not matter that a NaN of all bits
    becomes 0 here.
    """
    return ((x.to(tl.int32, bitcast=True) + (1 << 12)) & -(1 << 13)).to(tl.float32, bitcast=True)


@triton.jit
def product(a, b, acc, PRECISION: tl.constexpr):
    """`acc` (None: zeros) plus the product of two matrices, float32.

    PRECISION "tf32_parts" cuts float32 numbers into their leading bits and the rest, and adds the three larger ones of
    the four products, which the tensor cores compute in TF32. The leading bits are rounded: if they were cut off, all
    rests would have the sign of their number, and what is left out would have a sign, too. The rest of an infinite
    number is NaN, and does not count. Triton's own tf32x3 does the same with five instructions per number in place of
    three, but with one accumulator in place of two.
    """
    if PRECISION == "tf32_parts":
        a_leading = leading_bits(a)
        b_leading = leading_bits(b)
        added = tl.dot(a_leading, b_leading, input_precision="tf32")
        rest = tl.dot(a - a_leading, b_leading, input_precision="tf32")
        rest = tl.dot(a_leading, b - b_leading, rest, input_precision="tf32")
        added = tl.where(tl.abs(added) < float("inf"), added + rest, added)
        if acc is not None:
            added = acc + added
        return added
    else:
        return tl.dot(a, b, acc, input_precision=PRECISION)


@triton.jit
def scores_of(q, q_rest, keys, block, spans, CHECKED: tl.constexpr, C: tl.constexpr):
    """The products of all query rows and keys of a block, float32 [BLOCK_M, BLOCK_N], and the keys as loaded."""
    PER_WORD: tl.constexpr = 1 if C.PAIRED is None else 2
    k = load_kv(keys, block, spans, 0, C.HEAD_DIM // PER_WORD, C.BLOCK_D // PER_WORD, CHECKED, C)
    if C.PAIRED is not None:
        k_even, k_odd = unpack(k, C.PAIRED)
        score = tl.dot(q, tl.trans(k_even))
        score = tl.dot(q_rest, tl.trans(k_odd), score)
    else:
        k = as_type(k, C.KEY_PRODUCT)
        score = product(q, tl.trans(k), None, C.PRECISION)
    if C.BLOCK_R > 0:
        k_rest = load_kv(keys, block, spans, C.BLOCK_D, C.HEAD_DIM, C.BLOCK_R, CHECKED, C)
        k_rest = as_type(k_rest, C.KEY_PRODUCT)
        score = product(q_rest, tl.trans(k_rest), score, C.PRECISION)
    return score, k


@triton.jit
def exp2(x, C: tl.constexpr):
    """2 to the power of `x`, float32, by one instruction.

    For these GPUs, tl.exp2 becomes the same instruction, but by a function of a library that LLVM has to read first.
    """
    if C.PDL:
        return tl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], tl.float32, is_pure=True, pack=1)
    else:
        return tl.exp2(x)


@triton.jit
def attend_block(
    state, q, q_rest, keys, values, scale, block, spans, tile, captures, CHECKED: tl.constexpr, C: tl.constexpr
):
    """One step of the online softmax over a block of keys; CHECKED evaluates the mask and the spans."""
    b, h, q_idx = tile.b, tile.h, tile.q_idx
    kv_idx = block.start_n + tl.arange(0, C.BLOCK_N)[None, :]
    live = None
    if CHECKED:
        # Past the end of the sequence, mods see its last position: their reads are proven for positions of the cache.
        live = in_spans(kv_idx, spans)
        kv_idx = tl.minimum(kv_idx, tile.kv_len - 1)
    if C.SHIFTED:
        kv_idx = kv_idx + tile.kv_offset  # mods see positions
    if CHECKED:
        live = mask_mod(live, b, h, q_idx, kv_idx, tile.mask_row, captures.mask)
    fetched = score_fetch(live, b, h, q_idx, kv_idx, tile.score_row, captures.score)
    if len(keys.scales) == 4:
        key_scale = load_scales(keys.scales, block, tile, spans, CHECKED, C)
    if len(values.scales) == 4:
        value_scale = load_scales(values.scales, block, tile, spans, CHECKED, C)
    score, k = scores_of(q, q_rest, keys, block, spans, CHECKED, C)
    score = score * scale
    if len(keys.scales) == 4:
        score = score * key_scale[None, :]
    score = score_mod(score, b, h, q_idx, kv_idx, tile.score_row, fetched, captures.score)
    if CHECKED:
        score = tl.where(live, score, float("-inf"))
    m_new = tl.maximum(state.m_i, tl.max(score, 1))
    # A row without a live key keeps -inf; it must not meet -inf - -inf.
    m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
    # The difference is scaled, not the scores: these may be as large as float32 holds.
    p = exp2((score - m_safe[:, None]) * LOG2E, C)
    alpha = exp2((state.m_i - m_safe) * LOG2E, C)
    if C.SUMS_LATE:
        l_i = state.l_i * alpha[:, None] + p
    else:
        l_i = state.l_i * alpha + tl.sum(p, 1)
    v_unit = state.v_unit
    if len(values.scales) == 4:
        # Weights may be rounded to float16, whose range is small: a row keeps them relative to its largest one so far.
        p = p * value_scale[None, :]
        unit = v_unit * alpha
        v_unit = tl.maximum(tl.maximum(unit, tl.max(tl.abs(p), 1)), 1e-30)
        p = p / v_unit[:, None]
        alpha = unit / v_unit
    acc = add_values(state.acc, alpha, as_type(p, C.VALUE_PRODUCT), k, values, block, spans, CHECKED, C)
    return State(m_new, l_i, v_unit, acc)


@triton.jit
def add_values(acc, alpha, p, k, values, block, spans, CHECKED: tl.constexpr, C: tl.constexpr):
    """Scales the result so far by `alpha`, and adds the values of a block with weights `p`; `k`: the keys as loaded."""
    if C.PAIRED is not None:
        v = k
        if not C.SHARED:
            v = load_kv(values, block, spans, 0, C.V_HEAD_DIM // 2, C.BLOCK_DV // 2, CHECKED, C)
        v_even, v_odd = unpack(v, C.PAIRED)
        added = (tl.dot(p, v_even, acc[0] * alpha[:, None]), tl.dot(p, v_odd, acc[1] * alpha[:, None]))
    elif C.SHARED:
        added = (acc[0] * alpha[:, None] + product(p, k, None, C.PRECISION),)
    else:
        added = ()
        for part in tl.static_range(len(acc)):
            v = load_kv(values, block, spans, part * C.BLOCK_DV, C.V_HEAD_DIM, C.BLOCK_DV, CHECKED, C)
            rescaled = acc[part] * alpha[:, None]
            added = added + (rescaled + product(p, as_type(v, C.VALUE_PRODUCT), None, C.PRECISION),)  # noqa: RUF005
    return added


@triton.jit
def numbered_block(runs, number, CHECKED: tl.constexpr):
    """The full block with this number; if CHECKED, the partial block."""
    if CHECKED:
        return partial_block(runs, number)
    else:
        return full_block(runs, number)


@triton.jit
def attend_blocks(
    state, q, q_rest, keys, values, scale, first, last, visit, tile, captures, CHECKED: tl.constexpr, C: tl.constexpr
):
    """Attends the full blocks with the numbers `first .. last`; if CHECKED, the partial blocks."""
    place = numbered_block(visit.runs, first, CHECKED)
    pages = find_pages(visit.page_table, tile.b, place * C.BLOCK_N, visit.spans, C)
    for i in tl.range(first if CHECKED else tl.minimum(first, visit.runs.num_full), last):
        block = Block(place * C.BLOCK_N, pages)
        place = numbered_block(visit.runs, i + 1, CHECKED)
        pages = find_pages(visit.page_table, tile.b, place * C.BLOCK_N, visit.spans, C)
        state = attend_block(state, q, q_rest, keys, values, scale, block, visit.spans, tile, captures, CHECKED, C)
    return state


@triton.jit
def item_scale(scales, b, kv_head):
    """The scale that holds for all keys of one head of one sequence; 1 where each key has its own."""
    if len(scales) == 1:
        return scales[0]
    elif len(scales) == 3:
        start, stride_b, stride_h = scales
        return tl.load(start + b.to(tl.int64) * stride_b + kv_head.to(tl.int64) * stride_h).to(tl.float32)
    else:
        return 1.0


@triton.jit
def across(x):
    """Makes a column of the numbers of rows [BLOCK_M]; the number of one row stays as it is."""
    if len(x.shape) > 0:
        return x[:, None]
    else:
        return x


@triton.jit
def finish_rows(acc, m_i, l_i, sinks, head, used):
    """The output, the log-sum-exp and the largest score of rows, from all keys that they attend to.

    A sink adds a weight to the softmax, but no value, and is no score. Rows that are not `used` (None: all are), and
    rows with neither a live key nor a sink, have output 0 and log-sum-exp -inf. A score of +inf makes the log-sum-exp
    +inf and the output NaN.
    """
    largest = m_i
    if sinks is not None:
        sink = tl.load(sinks + head).to(tl.float32)
        m_new = tl.maximum(m_i, sink)
        m_safe = tl.where(m_new == float("-inf"), 0.0, m_new)
        alpha = tl.exp2((m_i - m_safe) * LOG2E)
        l_i = l_i * alpha + tl.exp2((sink - m_safe) * LOG2E)
        m_i = m_new
        acc = acc * across(alpha)
    result = acc / across(tl.where(l_i == 0.0, 1.0, l_i))
    lse = tl.where(m_i == float("inf"), m_i, m_i + tl.log2(l_i) * LN2)
    largest = tl.where(lse != lse, lse, largest)  # a maximum does not see NaN
    if used is not None:
        result = tl.where(across(used), result, 0.0)
        lse = tl.where(used, lse, float("-inf"))
        largest = tl.where(used, largest, float("-inf"))
    return result, lse, largest


@triton.jit
def query_rows(item, lanes, tokens, C: tl.constexpr):
    """The rows of the tile of an item, one per lane. A lane without a row computes what the last row computes."""
    rows = item.tile * C.BLOCK_M + lanes
    num_rows = C.GROUP_SIZE if C.ONE_TOKEN else C.GROUP_SIZE * item.span.count
    valid = rows < num_rows
    # All lanes now have valid rows, so what is proven of valid rows holds for all lanes.
    rows = tl.minimum(rows, num_rows - 1)
    first_head = item.kv_head * C.GROUP_SIZE
    if C.ONE_TOKEN:
        return Rows(lanes, valid, first_head + rows, tl.zeros_like(rows), tl.zeros_like(rows))
    else:
        token = rows // C.GROUP_SIZE
        place = item.span.first + token
        if tokens.cu_seqlens_q is not None:
            place = tl.where(place < tokens.num_queries, place, place - tokens.num_queries)
        return Rows(lanes, valid, first_head + rows % C.GROUP_SIZE, token, place)


@triton.jit
def make_tile(item, rows, lengths, captures, C: tl.constexpr):
    """What mods see of a tile."""
    b, h = item.b, rows.head[:, None]
    kv_len = count_keys(lengths.kv_lens, lengths.cu_seqlens_k, b, lengths.max_kv_len)
    kv_start = read_start(lengths.kv_starts, b, kv_len)
    kv_offset = read_offset(lengths.kv_offset, b)
    # With one query token the whole tile has one position. It is a scalar, so bounds need no reduction over rows.
    offset = 0 if C.ONE_TOKEN else rows.token[:, None]
    counted = item.span.used
    if C.RAGGED:
        counted = tl.maximum(counted, 1)
        offset = tl.minimum(offset, counted - 1)
    q_idx = first_position(lengths.q_offset, b, kv_len + kv_offset, counted) + offset
    score_values = score_row(b, h, q_idx, captures.score)
    mask_values = mask_row(b, h, q_idx, captures.mask)
    return Tile(b, item.kv_head, h, q_idx, kv_len, score_values, mask_values, kv_start, kv_offset)


@triton.jit
def equal_share(item, count):
    """The numbers (first, last) of an item's share of `count` blocks. Shares differ by one block at most."""
    share = count // item.parts
    extra = count % item.parts
    first = item.start * share + tl.minimum(item.start, extra)
    return first, first + share + tl.where(item.start < extra, 1, 0)


@triton.jit
def share_of(item, runs, C: tl.constexpr):
    """The numbers (first, last) of the blocks in an item's share. Full blocks have lower numbers than partial ones."""
    first = 0
    last = runs.num_full + runs.num_partial
    if C.RAGGED:
        last = tl.where(item.tile * C.BLOCK_M < C.GROUP_SIZE * item.span.used, last, 0)
    if C.BALANCED:
        if last == item.parts:
            first, last = item.start, item.end
        else:
            count = last.to(tl.int64)
            first = (count * item.start // item.parts).to(tl.int32)
            last = (count * item.end // item.parts).to(tl.int32)
    elif C.SPLIT:
        first, last = equal_share(item, last)
    return first, last


@triton.jit
def prefetch(pointers, inside):
    """Asks for the lines at some addresses, where `inside`. They come into the L2 cache; no register waits for them."""
    ASM: tl.constexpr = """{
        .reg .pred inside;
        setp.ne.s32 inside, $2, 0;
        @inside prefetch.global.L2 [$1];
        mov.u32 $0, 0;
        }"""
    pointers, inside = tl.broadcast(pointers.to(tl.int64), inside.to(tl.int32))
    tl.inline_asm_elementwise(ASM, "=r,l,r", [pointers, inside], dtype=tl.int32, is_pure=False, pack=1)


@triton.jit
def prefetch_columns(row, inside, stride_d, COLUMNS: tl.constexpr):
    """Asks for the first `COLUMNS` columns, `stride_d` apart, of the rows at some addresses, where `inside`."""
    LINE: tl.constexpr = 128 * 8 // row.dtype.element_ty.primitive_bitwidth  # elements
    lines = LINE * tl.arange(0, triton.next_power_of_2((COLUMNS + LINE - 1) // LINE))
    prefetch(row[:, None] + lines[None, :] * stride_d, inside[:, None] & (lines < COLUMNS)[None, :])


@triton.jit
def prefetch_share(item, keys, values, max_kv_len, C: tl.constexpr):
    """Asks for the first block of an item's share, if no length, mask or table decides where it lies."""
    PER_WORD: tl.constexpr = 1 if C.PAIRED is None else 2
    first = 0
    last = tl.cdiv(max_kv_len, C.BLOCK_N)
    if C.SPLIT:
        first, last = equal_share(item, last)
    block = Block(first * C.BLOCK_N, ())
    inside = block.start_n + tl.arange(0, C.BLOCK_N) < tl.minimum(last * C.BLOCK_N, max_kv_len)
    prefetch_columns(row_addresses(keys, block, C), inside, keys.stride_d, C.HEAD_DIM // PER_WORD)
    if not C.SHARED:
        prefetch_columns(row_addresses(values, block, C), inside, values.stride_d, C.V_HEAD_DIM // PER_WORD)


@triton.jit
def number_place(tokens, b, rows, num_q_heads):
    """Where the numbers of rows lie (log-sum-exp, largest score): [B, Hq, Q], or [T, Hq] if the queries are packed."""
    if tokens.cu_seqlens_q is not None:
        return rows.place.to(tl.int64) * num_q_heads + rows.head
    else:
        return (b.to(tl.int64) * num_q_heads + rows.head) * tokens.num_queries + rows.place


@triton.jit
def store_run(acc, m_i, l_i, rows, offs_dv, FIRST: tl.constexpr, item, call, C: tl.constexpr):
    """Writes columns `offs_dv` of a partial result, or of the output of a whole item: FIRST ones with row numbers."""
    outputs, tokens = call.outputs, call.lengths.tokens
    store = rows.valid[:, None] & (offs_dv[None, :] < C.V_HEAD_DIM)
    if C.SPLIT:
        partial_row = item.place + rows.lanes.to(tl.int64) * item.step
        if not item.whole:
            tl.store(outputs.partial_max + partial_row, m_i, mask=rows.valid)
            tl.store(outputs.partial_sum + partial_row, l_i, mask=rows.valid)
            tl.store(outputs.partial_out + partial_row[:, None] * C.V_HEAD_DIM + offs_dv[None, :], acc, mask=store)
    if C.BALANCED or not C.SPLIT:  # in Triton 3.6, `whole` is not a constant in a group of warps
        if item.whole:
            used = None
            if C.RAGGED:
                used = rows.token < item.span.used
            result, row_lse, largest = finish_rows(acc, m_i, l_i, outputs.sinks, rows.head, used)
            out_row = row_start(outputs.out, outputs, item.b, rows)
            # A stride of 1 in a record is no constant in a group of warps.
            pointers = out_row[:, None] + offs_dv[None, :] * (1 if C.UNIT_OUT else outputs.stride_d)
            tl.store(pointers, result.to(outputs.out.dtype.element_ty), mask=store)
            if FIRST:
                places = number_place(tokens, item.b, rows, outputs.num_kv_heads * C.GROUP_SIZE)
                if outputs.lse is not None:
                    tl.store(outputs.lse + places, row_lse, mask=rows.valid)
                if outputs.max_scores is not None:
                    tl.store(outputs.max_scores + places, largest, mask=rows.valid)


@triton.jit
def row_start(base, strides, b, rows):
    """The addresses of rows, of the query or of the output. Packed queries have stride_b 0."""
    row = base + b.to(tl.int64) * strides.stride_b + rows.head.to(tl.int64) * strides.stride_h
    return row + rows.place.to(tl.int64) * strides.stride_m


@triton.jit
def load_query(row, queries, C: tl.constexpr):
    """The query rows at addresses `row` in one or two parts [BLOCK_M, columns], and a factor for each row or 1.

    The parts are the first columns and the rest, or even and odd columns if the cache is loaded in pairs.
    """
    row = row[:, None]
    unit = 1.0
    if C.PAIRED is not None:
        offs_d = 2 * tl.arange(0, C.BLOCK_D // 2)[None, :]
        q = tl.load(row + offs_d * queries.stride_d, mask=offs_d < C.HEAD_DIM, other=0.0)
        q_rest = tl.load(row + (offs_d + 1) * queries.stride_d, mask=offs_d < C.HEAD_DIM, other=0.0)
        if q.dtype != tl.float16:
            # Each row gets its own unit, so that float16 can hold it.
            unit = power_of_two(tl.max(tl.maximum(tl.abs(q), tl.abs(q_rest)).to(tl.float32), 1))[:, None]
            q = (q.to(tl.float32) / unit).to(tl.float16)
            q_rest = (q_rest.to(tl.float32) / unit).to(tl.float16)
    else:
        offs_d = tl.arange(0, C.BLOCK_D)[None, :]
        q = tl.load(row + offs_d * queries.stride_d, mask=offs_d < C.HEAD_DIM, other=0.0)
        q_rest = q  # not used: a function cannot return None
    if C.BLOCK_R > 0:
        offs_r = C.BLOCK_D + tl.arange(0, C.BLOCK_R)[None, :]
        q_rest = tl.load(row + offs_r * queries.stride_d, mask=offs_r < C.HEAD_DIM, other=0.0)
    return as_type(q, C.KEY_PRODUCT), as_type(q_rest, C.KEY_PRODUCT), unit


@triton.jit
def state_without_keys(values, C: tl.constexpr):
    """The online softmax of a tile before the first block."""
    m_i = tl.full([C.BLOCK_M], float("-inf"), tl.float32)
    l_i = tl.zeros([C.BLOCK_M, C.BLOCK_N] if C.SUMS_LATE else [C.BLOCK_M], tl.float32)
    v_unit = 1.0
    if len(values.scales) == 4:
        v_unit = tl.zeros_like(m_i)
    if C.PAIRED is not None:
        acc = (tl.zeros([C.BLOCK_M, C.BLOCK_DV // 2], tl.float32), tl.zeros([C.BLOCK_M, C.BLOCK_DV // 2], tl.float32))
    else:
        acc = ()
        for _ in tl.static_range((C.V_HEAD_DIM + C.BLOCK_DV - 1) // C.BLOCK_DV):
            acc = acc + (tl.zeros([C.BLOCK_M, C.BLOCK_DV], tl.float32),)  # noqa: RUF005
    return State(m_i, l_i, v_unit, acc)


@triton.jit
def attend_run(item, keys, values, call, C: tl.constexpr):
    """Attends an item to its share of KV blocks, and writes the result."""
    lanes = tl.arange(0, C.BLOCK_M)
    rows = query_rows(item, lanes, call.lengths.tokens, C)
    row = row_start(call.queries.start, call.queries, item.b, rows)
    start = kv_start(keys.base, item.b, item.kv_head, keys.steps)
    keys = Cache(keys.base, start, keys.descriptor, keys.steps, keys.stride_n, keys.stride_d, keys.scales)
    start = kv_start(values.base, item.b, item.kv_head, values.steps)
    values = Cache(values.base, start, values.descriptor, values.steps, values.stride_n, values.stride_d, values.scales)
    if C.PDL and not (C.BALANCED or C.RAGGED):
        gdc_launch_dependents()
        # Nothing is read here, so it does not matter what the kernel before this one still writes. The lines come while
        # that kernel ends and few of its programs read memory.
        prefetch_columns(row, rows.valid & (item.start == 0), call.queries.stride_d, C.HEAD_DIM)
        if C.PREFETCH:
            prefetch_share(item, keys, values, call.lengths.max_kv_len, C)
        gdc_wait()

    tile = make_tile(item, rows, call.lengths, call.captures, C)
    scale = call.scale * item_scale(keys.scales, item.b, item.kv_head)
    q, q_rest, unit = load_query(row, call.queries, C)
    scale = scale * unit
    runs, spans = block_runs(tile, call.block_lists, call.captures, C)
    first, last = share_of(item, runs, C)
    visit = Visit(runs, spans, call.page_table, first, last)

    state = state_without_keys(values, C)
    if C.NUM_FULL > 0:
        end = tl.minimum(last, runs.num_full)
        state = attend_blocks(state, q, q_rest, keys, values, scale, first, end, visit, tile, call.captures, False, C)
    first = tl.maximum(first - runs.num_full, 0)
    last = tl.maximum(last - runs.num_full, 0)
    if first < last:
        state = attend_blocks(state, q, q_rest, keys, values, scale, first, last, visit, tile, call.captures, True, C)

    l_i = state.l_i
    if C.SUMS_LATE:
        l_i = tl.sum(l_i, 1)
    parts = state.acc
    if C.PAIRED is not None:
        parts = (tl.reshape(tl.join(parts[0], parts[1]), [C.BLOCK_M, C.BLOCK_DV]),)
    if len(values.scales) == 4:
        factor = state.v_unit[:, None]
    else:
        factor = item_scale(values.scales, item.b, item.kv_head)
    for part in tl.static_range(len(parts)):
        offs_dv = part * C.BLOCK_DV + tl.arange(0, C.BLOCK_DV)
        store_run(parts[part] * factor, state.m_i, l_i, rows, offs_dv, part == 0, item, call, C)


@triton.jit
def attend_items(keys, values, call, schedule, C: tl.constexpr):
    """Attends the share of one program: the share `program_id(1)` of an item."""
    tl.static_assert(not C.BALANCED, "that schedule is in balanced.py")
    tokens = call.lengths.tokens
    if C.PDL and C.RAGGED:  # the tokens of an item are in memory
        gdc_launch_dependents()
        gdc_wait()
    num_kv_heads = call.outputs.num_kv_heads
    kv_head = tl.program_id(0) % num_kv_heads
    b, tile, index = find_tile(tokens, tl.program_id(0) // num_kv_heads, C)
    span = read_tokens(tokens, b)
    part, parts = tl.program_id(1), schedule.num_splits
    # All parts of a row lie side by side.
    tile_of_call = (index * num_kv_heads + kv_head).to(tl.int64)
    place = (schedule.first_place + tile_of_call * parts) * C.BLOCK_M + part
    if tokens.cu_seqlens_q is not None:
        rows = C.GROUP_SIZE * span.count
        # A tile is negative if the running totals do not ascend.
        if takes_part(tokens, b, rows) & (tile >= 0) & (tile * C.BLOCK_M < rows):
            b = tl.minimum(b, tokens.batch - 1)
            item = Item(b, kv_head, tile, span, part, part + 1, parts, place, parts, not C.SPLIT)
            attend_run(item, keys, values, call, C)
    else:
        item = Item(b, kv_head, tile, span, part, part + 1, parts, place, parts, not C.SPLIT)
        attend_run(item, keys, values, call, C)


@triton.jit
def decode_split(
    query, key, value, key_descriptor, value_descriptor, out, lse, max_scores, partial_out, partial_max, partial_sum,
    item_parts, kv_lens, q_lens, cu_seqlens_q, cu_seqlens_k, q_offset, kv_starts, kv_offset, page_table, block_lists,
    key_scales, value_scales, sinks, score_captures, mask_captures, scale, stride_qb, stride_qh, stride_qm, stride_qd,
    key_steps, stride_kn, stride_kd, value_steps, stride_vn, stride_vd, stride_ob, stride_oh, stride_om, stride_od,
    batch, num_kv_heads, max_kv_len, num_queries, row_range, num_splits, first_place, max_weight,
    GROUP_SIZE: tl.constexpr, ONE_TOKEN: tl.constexpr, HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
    BLOCK_DV: tl.constexpr, BLOCK_B: tl.constexpr, PAGE_SIZE: tl.constexpr, SHARED: tl.constexpr, PAIRED: tl.constexpr,
    NUM_LIVE: tl.constexpr, NUM_FULL: tl.constexpr, SPLIT: tl.constexpr, BALANCED: tl.constexpr, MANY: tl.constexpr,
    UNIT_OUT: tl.constexpr, KEY_PRODUCT: tl.constexpr, VALUE_PRODUCT: tl.constexpr, PRECISION: tl.constexpr,
    PDL: tl.constexpr, PREFETCH: tl.constexpr, SUMS_LATE: tl.constexpr,
):  # fmt: skip
    """First pass. Grid: (tiles * num_kv_heads, num_splits), or the one of balanced.py if BALANCED.

    query [B, Hq, Q, D], key [B, Hkv, N, D], value [B, Hkv, N, Dv], out [B, Hq, Q, Dv], lse and max_scores
    [B, Hq, Q] or None, partial_out [places, Dv], partial_max and partial_sum [places], kv_lens [B] or None, q_lens [B]
    or None, q_offset a number, a [B] pointer or None, kv_starts [B] or None, kv_offset like q_offset, page_table empty
    or (pointer, stride_b, num_pages), block_lists empty or as in block_lists.py, key_scales and value_scales empty,
    (number,), (pointer, stride_b, stride_h) or (pointer, stride_b, stride_h, stride_n), sinks [Hq] or None. A row of
    max_scores is the largest score after the mods, in natural-log units, and -inf without a live key.

    Packed queries have cu_seqlens_q [B + 1], query [T, Hq, D], out [T, Hq, Dv], lse and max_scores [T, Hq]; num_queries
    is T, and row_range says which sequences take part. Packed keys have cu_seqlens_k [B + 1], also as the one element
    of page_table, key [1, Hkv, Tk, D] and value [1, Hkv, Tk, Dv]. first_place counts the tiles of partial results that
    belong to another launch.

    NUM_LIVE and NUM_FULL count the intervals that kv_bounds uses. The mask is evaluated in every block that is not
    proven full. SHARED: a value is the first columns of its key. PAIRED is the dtype of a quantised cache if its
    columns are loaded two by two, as int16. UNIT_OUT: stride_od is 1. PREFETCH: neither mask nor length nor table
    decides where a share begins, so its first block is asked for before the wait. SUMS_LATE: weights are summed over
    the keys of a block at the end only, so that the warps need not meet for that in each step. KEY_PRODUCT and
    VALUE_PRODUCT are the dtypes in which the query meets keys, and the weights meet values. If V_HEAD_DIM is more than
    BLOCK_DV, the columns of values are computed in parts of BLOCK_DV.

    An item is a tile of query rows of one KV head of one sequence. balanced.py says what item_parts, max_weight,
    BLOCK_B and MANY are.
    """
    C: tl.constexpr = Constants(
        GROUP_SIZE, ONE_TOKEN, HEAD_DIM, V_HEAD_DIM, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_R, BLOCK_DV, PAGE_SIZE, SHARED,
        PAIRED, NUM_LIVE, NUM_FULL, SPLIT, BALANCED, BLOCK_B, MANY, UNIT_OUT, KEY_PRODUCT, VALUE_PRODUCT, PRECISION,
        PDL, PREFETCH, q_lens is not None or cu_seqlens_q is not None, kv_starts is not None, kv_offset is not None,
        SUMS_LATE,
    )  # fmt: skip
    queries = Queries(query, stride_qb, stride_qh, stride_qm, stride_qd)
    keys = Cache(key, None, key_descriptor, key_steps, stride_kn, stride_kd, key_scales)
    values = Cache(value, None, value_descriptor, value_steps, stride_vn, stride_vd, value_scales)
    outputs = Outputs(
        out, lse, max_scores, partial_out, partial_max, partial_sum, sinks, stride_ob, stride_oh, stride_om, stride_od,
        num_kv_heads,
    )  # fmt: skip
    tokens = Tokens(q_lens, cu_seqlens_q, 1 if ONE_TOKEN else num_queries, batch, row_range)
    lengths = Lengths(kv_lens, cu_seqlens_k, q_offset, kv_starts, kv_offset, max_kv_len, tokens)
    captures = Captures(score_captures, mask_captures)
    schedule = Schedule(num_splits, first_place, item_parts, max_weight)
    call = Call(queries, outputs, lengths, captures, page_table, block_lists, scale)
    attend_items(keys, values, call, schedule, C)
