"""Writes the keys and values of new tokens into a KV cache, and quantises them on the way.

This file is a complete Triton module without hooks: it is used as it stands. `append` also lengthens the sequences of
a cache. `write` only writes: to places that the host has reserved, or to given slots. A contiguous cache counts as a
paged one: sequence b has one page, the page b, which holds as many tokens as the cache.

Both kernels are compiled from declared types, so no number specialises them. What they may assume is in two constants.
UNIT: the last strides of new tokens and of the cache are 1. ALIGN: all their other strides are multiples of ALIGN, and
the addresses are multiples of 16 bytes.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 numbers of this size are integers


@triton.jit
def column_offsets(stride_d, BLOCK_D: tl.constexpr, UNIT: tl.constexpr):
    """Offsets [1, BLOCK_D] of the elements of a row."""
    offs_d = tl.arange(0, BLOCK_D)[None, :]
    if not UNIT:
        offs_d = offs_d.to(tl.int64) * stride_d
    return offs_d


@triton.jit
def load_rows(
    new, b, head, token, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr
):
    """Loads rows of new tokens as [BLOCK_R, BLOCK_D]; zeros where not `inside`.

    `new` is (pointer, stride_b, stride_h, stride_t, stride_d).
    """
    base, stride_b, stride_h, stride_t, stride_d = new
    offsets = b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t
    offsets = tl.multiple_of(offsets, ALIGN)
    pointers = base + offsets[:, None] + column_offsets(stride_d, BLOCK_D, UNIT)
    return tl.load(pointers, mask=inside[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(
    cache, scales, x, page, head, position, taken, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    DYNAMIC: tl.constexpr, LARGEST: tl.constexpr, ALIGN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Stores x [BLOCK_R, BLOCK_D] at a page, a head and a position of a cache, where `taken`.

    `cache` is (pointer, stride_page, stride_head, stride_position, stride_d). LARGEST is the largest number of a
    quantised type; 0 if the cache is not quantised. `scales` is (pointer, stride_page, stride_head, stride_position,
    number): the number divides x, or, with a pointer, the number of the head there. With DYNAMIC it is the place for
    one scale per token and head. This function computes that scale: it makes LARGEST of the largest element. A row of
    zeros has scale 1. A row that is not finite has scale NaN.
    """
    base, stride_page, stride_head, stride_position, stride_d = cache
    page, head, position = page.to(tl.int64), head.to(tl.int64), position.to(tl.int64)
    if LARGEST > 0:
        scale_base, scale_page, scale_head, scale_position, number = scales
        x = x.to(tl.float32)
        scale = tl.zeros([x.shape[0]], tl.float32) + number
        if DYNAMIC:
            not_finite = tl.sum(x * 0.0, 1)  # NaN, else 0
            scale = tl.max(tl.abs(x), 1) + not_finite
            scale = tl.div_rn(scale, tl.full(scale.shape, LARGEST, tl.float32))
            scale = tl.where(scale == 0.0, 1.0, scale)
            places = scale_base + page * scale_page + head * scale_head + position * scale_position
            tl.store(places, scale, mask=taken)
        elif scale_base is not None:
            scale = tl.load(scale_base + head * scale_head, mask=taken, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if base.dtype.element_ty == tl.int8:
            x = (x + ROUND) - ROUND  # to the nearest integer, ties to even
    offsets = page * stride_page + head * stride_head + position * stride_position
    offsets = tl.multiple_of(offsets, ALIGN)
    pointers = base + offsets[:, None] + column_offsets(stride_d, BLOCK_D, UNIT)
    mask = taken[:, None] & (tl.arange(0, BLOCK_D)[None, :] < HEAD_DIM)
    tl.store(pointers, x.to(base.dtype.element_ty), mask=mask)


@triton.jit
def append(
    k, v, key, value, k_scale, v_scale, page_table, kv_lens, limits, arrivals,
    k_number, v_number,
    stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    key_page, key_head, key_position, key_d, value_page, value_head, value_position, value_d,
    k_scale_page, k_scale_head, k_scale_position, v_scale_page, v_scale_head, v_scale_position,
    num_tokens, num_kv_heads, num_pages, page_size, max_pages, bounded,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DYNAMIC_K: tl.constexpr, DYNAMIC_V: tl.constexpr, LARGEST: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Appends tokens at `kv_lens`. Grid: (B * cdiv(Hkv * T, BLOCK_R),).

    k [B, Hkv, T, D], v [B, Hkv, T, Dv], key [num_pages, Hkv, page_size, D], value [num_pages, Hkv, page_size, Dv],
    k_scale, k_number, v_scale and v_number as in `store_rows`, page_table [B, max_pages] or None, kv_lens [B]. If
    values are the first columns of keys, v and value are None. Sequence b takes T tokens. If `bounded`, it takes tokens
    only until its length is limits[b]. `arrivals` [B] is 0 before and after.

    All programs of a sequence read its length. The last program to arrive at the end writes the new length, so no
    program reads the new one.
    """
    num_rows = num_tokens * num_kv_heads
    num_programs = tl.cdiv(num_rows, BLOCK_R)
    b = tl.program_id(0) // num_programs
    row = tl.program_id(0) % num_programs * BLOCK_R + tl.arange(0, BLOCK_R)
    head = row // num_tokens
    token = row % num_tokens
    inside = row < num_rows
    new_k = k, stride_kb, stride_kh, stride_kt, stride_kd
    k_rows = load_rows(new_k, b, head, token, inside, HEAD_DIM, BLOCK_D, ALIGN, UNIT)
    v_rows = k_rows
    if v is not None:
        new_v = v, stride_vb, stride_vh, stride_vt, stride_vd
        v_rows = load_rows(new_v, b, head, token, inside, V_HEAD_DIM, BLOCK_DV, ALIGN, UNIT)

    # Wrong lengths on the device must not lead to a write outside the cache.
    capacity = max_pages * page_size
    start = tl.minimum(tl.maximum(tl.load(kv_lens + b), 0), capacity)
    limit = tl.where(bounded != 0, tl.minimum(tl.load(limits + b), capacity), capacity)
    end = tl.maximum(tl.minimum(start + num_tokens, limit), start)
    position = start + token
    taken = inside & (position < end)
    page = tl.zeros([BLOCK_R], tl.int32) + b
    if page_table is not None:
        page = tl.load(page_table + b.to(tl.int64) * max_pages + position // page_size, mask=taken, other=0)
        taken = taken & (page >= 0) & (page < num_pages)
    position = position % page_size
    cache = key, key_page, key_head, key_position, key_d
    scales = k_scale, k_scale_page, k_scale_head, k_scale_position, k_number
    store_rows(cache, scales, k_rows, page, head, position, taken, HEAD_DIM, BLOCK_D, DYNAMIC_K, LARGEST, ALIGN, UNIT)
    if v is not None:
        cache = value, value_page, value_head, value_position, value_d
        scales = v_scale, v_scale_page, v_scale_head, v_scale_position, v_number
        store_rows(
            cache, scales, v_rows, page, head, position, taken, V_HEAD_DIM, BLOCK_DV, DYNAMIC_V, LARGEST, ALIGN, UNIT
        )

    tl.debug_barrier()  # every warp has read the length
    arrived = num_programs - 1
    if num_programs > 1:
        arrived = tl.atomic_add(arrivals + b, 1)
    if arrived == num_programs - 1:
        tl.store(arrivals + b, 0)
        tl.store(kv_lens + b, end)


@triton.jit
def find_sequence(cu_seqlens, token, batch, num_halvings):
    """The sequence that holds each packed token [BLOCK_R]: the last one that begins at the token or before it.

    cu_seqlens [B + 1] ascends, and 2 ** num_halvings >= B.
    """
    low = token * 0
    high = low + batch
    for _ in range(num_halvings):
        middle = (low + high) // 2
        begun = tl.load(cu_seqlens + middle) <= token
        low = tl.where(begun, middle, low)
        high = tl.where(begun, high, middle)
    return low


@triton.jit
def write(
    k, v, key, value, k_scale, v_scale, page_table, slots, starts, ends, cu_seqlens,
    k_number, v_number,
    stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    key_page, key_head, key_position, key_d, value_page, value_head, value_position, value_d,
    k_scale_page, k_scale_head, k_scale_position, v_scale_page, v_scale_head, v_scale_position,
    num_items, num_tokens, num_kv_heads, num_pages, page_size, max_pages, first_sequence, batch, num_halvings,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DYNAMIC_K: tl.constexpr, DYNAMIC_V: tl.constexpr, LARGEST: tl.constexpr,
    ALIGN: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Writes tokens, and changes nothing else. Grid: (cdiv(num_items * Hkv, BLOCK_R),).

    key, value, their scales and page_table are as in `append`. There are three forms of new tokens:

    - slots [num_items], page * page_size + offset: token t of k [1, Hkv, T, D] goes to slot t. A slot that is negative
      or beyond the cache is skipped.
    - cu_seqlens [B + 1]: token t of k [1, Hkv, T, D] belongs to the sequence b with cu_seqlens[b] <= t <
      cu_seqlens[b + 1]. The tokens of a sequence go to its positions from starts[b] to ends[b].
    - neither: k [num_items // num_tokens, Hkv, num_tokens, D] has tokens of the sequences from `first_sequence` on,
      which go to the same positions.
    """
    row = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    item = row // num_kv_heads
    head = row % num_kv_heads
    inside = item < num_items
    b = item // num_tokens
    token = item % num_tokens
    new_k = k, stride_kb, stride_kh, stride_kt, stride_kd
    k_rows = load_rows(new_k, b, head, token, inside, HEAD_DIM, BLOCK_D, ALIGN, UNIT)
    v_rows = k_rows
    if v is not None:
        new_v = v, stride_vb, stride_vh, stride_vt, stride_vd
        v_rows = load_rows(new_v, b, head, token, inside, V_HEAD_DIM, BLOCK_DV, ALIGN, UNIT)

    if slots is not None:
        slot = tl.load(slots + item, mask=inside, other=-1)
        taken = (slot >= 0) & (slot < num_pages * page_size)
        slot = slot.to(tl.int32)  # a cache has fewer than 2^31 slots
        page = slot // page_size
        position = slot % page_size
    else:
        taken = inside
        if cu_seqlens is not None:
            b = find_sequence(cu_seqlens, item, batch, num_halvings)
            taken = taken & (item < tl.load(cu_seqlens + batch))
            token = item - tl.load(cu_seqlens + b)
        else:
            b = b + first_sequence
        position = tl.load(starts + b, mask=taken, other=0) + token
        taken = taken & (position >= 0) & (position < tl.load(ends + b, mask=taken, other=0))
        taken = taken & (position < max_pages * page_size)
        page = b
        if page_table is not None:
            page = tl.load(page_table + b.to(tl.int64) * max_pages + position // page_size, mask=taken, other=-1)
            taken = taken & (page >= 0) & (page < num_pages)
        position = position % page_size
    cache = key, key_page, key_head, key_position, key_d
    scales = k_scale, k_scale_page, k_scale_head, k_scale_position, k_number
    store_rows(cache, scales, k_rows, page, head, position, taken, HEAD_DIM, BLOCK_D, DYNAMIC_K, LARGEST, ALIGN, UNIT)
    if v is not None:
        cache = value, value_page, value_head, value_position, value_d
        scales = v_scale, v_scale_page, v_scale_head, v_scale_position, v_number
        store_rows(
            cache, scales, v_rows, page, head, position, taken, V_HEAD_DIM, BLOCK_DV, DYNAMIC_V, LARGEST, ALIGN, UNIT
        )
