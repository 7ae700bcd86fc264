"""A balanced schedule: this `attend_items` takes the place of the one in `decode.py`.

The blocks of all sequences and KV heads form one line of slots. Each row tile has the same line, so the tiles of a head
read the same keys at the same time. Each worker takes an equal run of the line: the end of one item, some whole items,
the beginning of another one. It has two places for partial results: one for an item that it continues, one for an item
that it begins. `item_parts` [batch, num_kv_heads, 2] tells the second pass which worker begins an item and how many
workers take part. A sequence has at most `max_weight` slots per head, so that the number of all slots fits into 32
bits. MANY: the slots are counted in chunks of BLOCK_B sequences, not all at once. Grid: (workers, row tiles).
"""

import triton
import triton.language as tl
from decode import (
    Item,
    attend_run,
    first_position,
    gdc_launch_dependents,
    gdc_wait,
    kv_bounds,
    live_slots,
    read_length,
    read_offset,
    read_start,
)


@triton.jit
def _numbers(SIZE: tl.constexpr):
    """The numbers from 0 to SIZE."""
    return tl.arange(0, SIZE)


@triton.jit
def _sums_before(weights):
    """For each weight, the sum of the weights before it."""
    return tl.cumsum(weights, 0) - weights


@triton.jit
def _sequence_weights(sequences, lengths, captures, last_head, schedule, C: tl.constexpr):
    """Estimates how many blocks an item of each sequence visits, int32; 0 only for one without keys or query tokens.

    The estimate uses the newest token and the first and last query head. It decides which worker visits a block. It
    does not decide whether a block is visited.
    """
    b = tl.minimum(sequences, schedule.batch - 1)
    kv_len = read_length(lengths.kv_lens, b, lengths.max_kv_len)
    q_len = read_length(lengths.q_lens, b, C.NUM_QUERIES)
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
    busy = (sequences < schedule.batch) & (kv_len > kv_start) & (q_len > 0)
    return tl.where(busy, tl.minimum(tl.maximum(tl.max(weight, 1), 1), schedule.max_weight), 0)


@triton.jit
def _find_slot(slot, sequences, starts, weights):
    """The sequence among `sequences` that holds a slot, its first slot and its weight; zeros if none does."""
    here = (starts <= slot) & (slot < starts + weights)
    found = tl.sum(tl.where(here, sequences, 0), 0)
    return found, tl.sum(tl.where(here, starts, 0), 0), tl.sum(tl.where(here, weights, 0), 0)


@triton.jit
def _find_in_chunks(slot, lengths, captures, last_head, schedule, C: tl.constexpr):
    """As _find_slot, but among all sequences; also gives the number of all slots."""
    zero = tl.zeros((), tl.int32)
    found, first, weight, total = zero, zero, zero, zero
    for chunk in tl.range(0, schedule.batch, C.BLOCK_B):
        sequences = chunk + _numbers(C.BLOCK_B)
        weights = _sequence_weights(sequences, lengths, captures, last_head, schedule, C)
        starts = total + _sums_before(weights)
        found_here, first_here, weight_here = _find_slot(slot, sequences, starts, weights)
        found += found_here
        first += first_here
        weight += weight_here
        total += tl.sum(weights, 0)
    return found, first, weight, total


@triton.jit
def attend_items(keys, values, call, schedule, C: tl.constexpr):
    """Attends the run of slots of one worker, item by item."""
    tl.static_assert(C.BALANCED)
    if C.PDL:
        gdc_wait()
        gdc_launch_dependents()
    num_kv_heads = call.outputs.num_kv_heads
    last_head = num_kv_heads * C.GROUP_SIZE - 1
    worker = tl.program_id(0)
    tile = tl.program_id(1)
    if C.MANY:
        _, _, _, total = _find_in_chunks(-1, call.lengths, call.captures, last_head, schedule, C)
    else:
        sequences = _numbers(C.BLOCK_B)
        weights = _sequence_weights(sequences, call.lengths, call.captures, last_head, schedule, C)
        starts = _sums_before(weights)
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
            if C.MANY:
                sequence = slot // num_kv_heads
                b, first, weight, _ = _find_in_chunks(sequence, call.lengths, call.captures, last_head, schedule, C)
            else:
                b, first, weight = _find_slot(slot // num_kv_heads, sequences, starts, weights)
            first *= num_kv_heads
            past = first + num_kv_heads * weight
        kv_head = (slot - first) // weight
        start = slot - first - kv_head * weight
        end = tl.minimum(weight, start + stop - slot)
        if start == 0:
            shared_out = schedule.item_parts + 2 * (b.to(tl.int64) * num_kv_heads + kv_head)
            last_slot = slot + weight - 1
            final = last_slot // (share + 1)
            if final >= extra:
                final = extra + (last_slot - extra * (share + 1)) // tl.maximum(share, 1)
            tl.store(shared_out, worker)
            tl.store(shared_out + 1, final - worker + 1)
        place = 2 * worker + tl.where(start == 0, 1, 0)
        item = Item(b, kv_head, tile, start, end, weight, place, (start == 0) & (end == weight))
        attend_run(item, keys, values, call, C)
        slot += end - start
