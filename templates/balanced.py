"""A balanced schedule: this `attend_items` takes the place of the one in `decode.py`.

The blocks of all sequences, KV heads and row tiles form one line; a *unit* of it stands for one block. The tiles of a
head follow one another. Each worker takes an equal run of the line: the end of one item, some whole items, the
beginning of another one. It has two places for partial results: one for an item that it continues, one for an item that
it begins. `item_parts` [tiles of all sequences, num_kv_heads, 2] tells the second pass which worker begins an item and
how many workers take part. An item has at most `max_weight` units, so that the number of all units fits into 32 bits.
MANY: the units are counted in chunks of BLOCK_B sequences, not all at once. Grid: (workers,).
"""

import triton
import triton.language as tl
from decode import (
    Item,
    attend_run,
    count_keys,
    first_position,
    gdc_launch_dependents,
    gdc_wait,
    kv_bounds,
    live_slots,
    numbers,
    read_offset,
    read_start,
    read_tokens,
    takes_part,
    tile_index,
    tiles_of,
)


@triton.jit
def _sums_before(weights):
    """For each weight, the sum of the weights before it."""
    return tl.cumsum(weights, 0) - weights


@triton.jit
def _sequence_weights(sequences, lengths, captures, last_head, schedule, C: tl.constexpr):
    """Estimates how many blocks the tiles of each sequence visit per KV head, int32; 0 for one that takes no part.

    The estimate uses the newest token and the first and last query head. It decides which worker visits a block. It
    does not decide whether a block is visited.
    """
    tokens = lengths.tokens
    b = tl.minimum(sequences, tokens.batch - 1)
    kv_len = count_keys(lengths.kv_lens, lengths.cu_seqlens_k, b, lengths.max_kv_len)
    q_len = read_tokens(tokens, b).used
    num_tokens = tl.maximum(q_len, 1)
    kv_start = read_start(lengths.kv_starts, b, kv_len)
    kv_offset = read_offset(lengths.kv_offset, b)
    newest = first_position(lengths.q_offset, b, kv_len + kv_offset, num_tokens) + num_tokens - 1
    h = (tl.arange(0, 2) * last_head)[None, :]
    live, _ = kv_bounds(b[:, None], h, (newest + tl.zeros_like(b))[:, None], captures.score, captures.mask)
    weight = tl.zeros([sequences.shape[0], 2], tl.int32)
    end = (kv_len + tl.zeros_like(b))[:, None]
    begin = (kv_start + tl.zeros_like(b))[:, None]
    shift = (kv_offset + tl.zeros_like(b))[:, None]
    for i in tl.static_range(C.NUM_LIVE):
        lo, hi = live_slots(live[i], begin, end, shift, C)
        lo = lo.to(tl.int32)
        hi = tl.maximum(hi, 0).to(tl.int32)
        weight += tl.where(lo < hi, (hi + C.BLOCK_N - 1) // C.BLOCK_N - lo // C.BLOCK_N, 0)
    rows = C.GROUP_SIZE * (q_len + tl.zeros_like(b))
    busy = (sequences < tokens.batch) & (kv_len > kv_start) & (rows > 0)
    if tokens.cu_seqlens_q is not None:
        busy = busy & takes_part(tokens, b, rows)
    weight = tl.minimum(tl.maximum(tl.max(weight, 1), 1), schedule.max_weight)
    return tl.where(busy, weight * tiles_of(rows, C.BLOCK_M), 0)


@triton.jit
def _find_unit(unit, sequences, starts, weights):
    """The sequence among `sequences` that holds a unit, its first unit and its units; zeros if none does."""
    here = (starts <= unit) & (unit < starts + weights)
    found = tl.sum(tl.where(here, sequences, 0), 0)
    return found, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, weights, 0), 0)


@triton.jit
def _find_in_chunks(unit, lengths, captures, last_head, schedule, C: tl.constexpr):
    """As _find_unit, but among all sequences; also gives the number of all units."""
    zero = tl.zeros((), tl.int32)
    found, first, weight, total = zero, zero, zero, zero
    for chunk in tl.range(0, lengths.tokens.batch, C.BLOCK_B):
        sequences = chunk + numbers(C.BLOCK_B)
        weights = _sequence_weights(sequences, lengths, captures, last_head, schedule, C)
        starts = total + _sums_before(weights)
        found_here, first_here, weight_here = _find_unit(unit, sequences, starts, weights)
        found += found_here
        first += first_here
        weight += weight_here
        total += tl.sum(weights, 0)
    return found, first, weight, total


@triton.jit
def _worker_of(unit, share, extra):
    """The worker whose run has a unit. Runs have `share` units; those of the first `extra` workers have one more."""
    worker = unit // (share + 1)
    if worker >= extra:
        worker = extra + (unit - extra * (share + 1)) // tl.maximum(share, 1)
    return worker


@triton.jit
def attend_items(keys, values, call, schedule, C: tl.constexpr):
    """Attends the run of units of one worker, item by item."""
    tl.static_assert(C.BALANCED)
    if C.PDL:
        gdc_launch_dependents()
        gdc_wait()
    num_kv_heads, tokens = call.outputs.num_kv_heads, call.lengths.tokens
    last_head = num_kv_heads * C.GROUP_SIZE - 1
    worker = tl.program_id(0)
    if C.MANY:
        _, _, _, total = _find_in_chunks(-1, call.lengths, call.captures, last_head, schedule, C)
    else:
        sequences = numbers(C.BLOCK_B)
        weights = _sequence_weights(sequences, call.lengths, call.captures, last_head, schedule, C)
        starts = _sums_before(weights)
        total = tl.sum(weights, 0)
    # Runs of `share` units; the first `extra` workers have one more.
    total *= num_kv_heads
    share = total // tl.num_programs(0)
    extra = total % tl.num_programs(0)
    unit = worker * share + tl.minimum(worker, extra)
    stop = unit + share + tl.where(worker < extra, 1, 0)
    b = tl.zeros((), tl.int32)
    weight = tl.full((), 1, tl.int32)
    num_tiles = weight
    first, past = unit, unit
    while unit < stop:
        if unit == past:
            if C.MANY:
                sequence = unit // num_kv_heads
                b, first, units, _ = _find_in_chunks(sequence, call.lengths, call.captures, last_head, schedule, C)
            else:
                b, first, units = _find_unit(unit // num_kv_heads, sequences, starts, weights)
            num_tiles = tiles_of(C.GROUP_SIZE * read_tokens(tokens, b).used, C.BLOCK_M)
            weight = units // num_tiles
            first *= num_kv_heads
            past = first + num_kv_heads * units
        span = read_tokens(tokens, b)
        item_of_b = (unit - first) // weight
        kv_head = item_of_b // num_tiles
        tile = item_of_b % num_tiles
        start = unit - first - item_of_b * weight
        end = tl.minimum(weight, start + stop - unit)
        if start == 0:
            index = tile_index(tokens, b, span.first, tile, C.GROUP_SIZE, C.BLOCK_M)
            shared_out = schedule.item_parts + 2 * (index.to(tl.int64) * num_kv_heads + kv_head)
            tl.store(shared_out, worker)
            tl.store(shared_out + 1, _worker_of(unit + weight - 1, share, extra) - worker + 1)
        place = (schedule.first_place + 2 * worker + tl.where(start == 0, 1, 0)).to(tl.int64) * C.BLOCK_M
        item = Item(b, kv_head, tile, span, start, end, weight, place, 1, (start == 0) & (end == weight))
        attend_run(item, keys, values, call, C)
        unit += tl.maximum(end - start, 1)  # 0 only if there are more units than 32 bits hold, see `max_weight`
