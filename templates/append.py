"""Appends the keys and values of new tokens to a KV cache, quantises them on the way, and lengthens its sequences.

This file is a complete Triton module without hooks: it is used as it stands. A contiguous cache counts as a paged one:
sequence b has one page, the page b, which holds as many tokens as the cache.
"""

import triton
import triton.language as tl

ROUND = tl.constexpr(12582912.0)  # 1.5 * 2**23: float32 numbers of this size are integers


@triton.jit
def load_rows(new, b, head, token, inside, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ALIGNED: tl.constexpr):
    """Loads rows of new tokens as [BLOCK_R, BLOCK_D]; zeros where not `inside`. ALIGNED: strides are multiples of 8.

    `new` is (pointer, stride_b, stride_h, stride_t, stride_d).
    """
    base, stride_b, stride_h, stride_t, stride_d = new
    offsets = b.to(tl.int64) * stride_b + head.to(tl.int64) * stride_h + token.to(tl.int64) * stride_t
    if ALIGNED:
        offsets = tl.multiple_of(offsets, 8)
    offs_d = tl.arange(0, BLOCK_D).to(tl.int64)
    pointers = base + offsets[:, None] + offs_d[None, :] * stride_d
    return tl.load(pointers, mask=inside[:, None] & (offs_d[None, :] < HEAD_DIM), other=0.0)


@triton.jit
def store_rows(
    base, scales, x, head, rows, taken, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, DYNAMIC: tl.constexpr,
    LARGEST: tl.constexpr,
):  # fmt: skip
    """Stores x [BLOCK_R, BLOCK_D] as `rows` of a cache where `taken`.

    `scales` is None, or has the numbers [Hkv] that divide x. With DYNAMIC it is the place for one scale per row. This
    function computes that scale: it makes LARGEST of the largest element. A row of zeros has scale 1. A row that is not
    finite has scale NaN.
    """
    if scales is not None:
        x = x.to(tl.float32)
        if DYNAMIC:
            not_finite = tl.sum(x * 0.0, 1)  # NaN, else 0
            scale = tl.max(tl.abs(x), 1) + not_finite
            scale = tl.div_rn(scale, tl.full(scale.shape, LARGEST, tl.float32))
            scale = tl.where(scale == 0.0, 1.0, scale)
            tl.store(scales + rows, scale, mask=taken)
        else:
            scale = tl.load(scales + head, mask=taken, other=1.0)
        x = tl.div_rn(x, tl.broadcast_to(scale[:, None], x.shape))
        x = tl.clamp(x, -LARGEST, LARGEST, propagate_nan=tl.PropagateNan.ALL)
        if base.dtype.element_ty == tl.int8:
            x = (x + ROUND) - ROUND  # to the nearest integer, ties to even
    offs_d = tl.arange(0, BLOCK_D)
    pointers = base + rows[:, None] * HEAD_DIM + offs_d[None, :]
    tl.store(pointers, x.to(base.dtype.element_ty), mask=taken[:, None] & (offs_d[None, :] < HEAD_DIM))


# Only the last strides are specialised, and they are 1. So all lengths have the same kernel.
@triton.jit(
    do_not_specialize=[
        "stride_kb", "stride_kh", "stride_kt", "stride_vb", "stride_vh", "stride_vt", "num_tokens", "num_kv_heads",
        "num_pages", "page_size", "max_pages", "bounded",
    ]
)  # fmt: skip
def append(
    k, v, key, value, k_scale, v_scale, page_table, kv_lens, limits, arrivals,
    stride_kb, stride_kh, stride_kt, stride_kd, stride_vb, stride_vh, stride_vt, stride_vd,
    num_tokens, num_kv_heads, num_pages, page_size, max_pages, bounded,
    HEAD_DIM: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_DV: tl.constexpr, DYNAMIC_K: tl.constexpr, DYNAMIC_V: tl.constexpr, LARGEST: tl.constexpr,
    ALIGNED: tl.constexpr,
):  # fmt: skip
    """Appends tokens at `kv_lens`. Grid: (B * cdiv(Hkv * T, BLOCK_R),).

    k [B, Hkv, T, D], v [B, Hkv, T, Dv], key [num_pages, Hkv, page_size, D], value [num_pages, Hkv, page_size, Dv],
    k_scale and v_scale as in `store_rows`, page_table [B, max_pages] or None, kv_lens [B]. Sequence b takes T tokens.
    If `bounded`, it takes tokens only until its length is limits[b]. `arrivals` [B] is 0 before and after.

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
    new_k, new_v = (k, stride_kb, stride_kh, stride_kt, stride_kd), (v, stride_vb, stride_vh, stride_vt, stride_vd)
    k_rows = load_rows(new_k, b, head, token, inside, HEAD_DIM, BLOCK_D, ALIGNED)
    v_rows = load_rows(new_v, b, head, token, inside, V_HEAD_DIM, BLOCK_DV, ALIGNED)

    # Wrong lengths on the device must not lead to a write outside the cache.
    capacity = max_pages * page_size
    start = tl.minimum(tl.maximum(tl.load(kv_lens + b), 0), capacity)
    limit = tl.where(bounded != 0, tl.minimum(tl.load(limits + b), capacity), capacity)
    end = tl.maximum(tl.minimum(start + num_tokens, limit), start)
    position = start + token
    taken = inside & (position < end)
    page = b
    if page_table is not None:
        page = tl.load(page_table + b.to(tl.int64) * max_pages + position // page_size, mask=taken, other=0)
        taken = taken & (page >= 0) & (page < num_pages)
    rows = (page.to(tl.int64) * num_kv_heads + head) * page_size + position % page_size
    store_rows(key, k_scale, k_rows, head, rows, taken, HEAD_DIM, BLOCK_D, DYNAMIC_K, LARGEST)
    store_rows(value, v_scale, v_rows, head, rows, taken, V_HEAD_DIM, BLOCK_DV, DYNAMIC_V, LARGEST)

    tl.debug_barrier()  # every warp has read the length
    arrived = num_programs - 1
    if num_programs > 1:
        arrived = tl.atomic_add(arrivals + b, 1)
    if arrived == num_programs - 1:
        tl.store(arrivals + b, 0)
        tl.store(kv_lens + b, end)
