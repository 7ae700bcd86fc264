"""Merges attention over disjoint parts of the keys. This file is a complete Triton module, used as it stands.

Source: FlashInfer (Ye et al., arXiv:2501.01005), section 2.2, the attention state and its composition.
"""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        *[f"lse_{i}" for i in range(8)],
        *[f"stride_{tensor}{dim}" for tensor in "ol" for dim in "bhm"],
        *["num_rows", "num_q_heads", "num_queries"],
    ]
)
def merge_parts(
    merged_out, merged_lse, out_0, out_1, out_2, out_3, out_4, out_5, out_6, out_7, lse_0, lse_1, lse_2, lse_3, lse_4,
    lse_5, lse_6, lse_7, stride_ob, stride_oh, stride_om, stride_lb, stride_lh, stride_lm, num_rows, num_q_heads,
    num_queries, NUM_PARTS: tl.constexpr, V_HEAD_DIM: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_DV: tl.constexpr,
    STRIDE_UNIT: tl.constexpr,
):  # fmt: skip
    """Merges the first NUM_PARTS of `out_i` [B, Hq, Q, Dv] and `lse_i` [B, Hq, Q] into contiguous tensors.

    Log-sum-exps are float32, natural-log units. All `out_i` have the same strides, in units of STRIDE_UNIT elements,
    and the last is 1; all `lse_i` have the same strides. num_rows is B * Hq * Q. Rows [T, Hq] of packed queries come as
    B = T sequences with Q = 1.
    Grid: (cdiv(num_rows, BLOCK_M), cdiv(Dv, BLOCK_DV)).
    """
    outs = (out_0, out_1, out_2, out_3, out_4, out_5, out_6, out_7)
    lses = (lse_0, lse_1, lse_2, lse_3, lse_4, lse_5, lse_6, lse_7)
    offs_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    offs_dv = tl.program_id(1) * BLOCK_DV + tl.arange(0, BLOCK_DV)
    valid = offs_m < num_rows
    inside = valid[:, None] & (offs_dv < V_HEAD_DIM)[None, :]
    token = (offs_m % num_queries).to(tl.int64)
    head = (offs_m // num_queries % num_q_heads).to(tl.int64)
    b = (offs_m // num_queries // num_q_heads).to(tl.int64)
    out_row = (b * stride_ob + head * stride_oh + token * stride_om) * STRIDE_UNIT
    lse_row = b * stride_lb + head * stride_lh + token * stride_lm

    m_i = tl.full([BLOCK_M], float("-inf"), tl.float32)
    part_lses = ()
    for i in tl.static_range(NUM_PARTS):
        part_lse = tl.load(lses[i] + lse_row, mask=valid, other=float("-inf"))
        part_lses = part_lses + (part_lse,)  # noqa: RUF005
        m_i = tl.maximum(m_i, part_lse)
    m_safe = tl.where(m_i == float("-inf"), 0.0, m_i)

    l_i = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_DV], tl.float32)
    for i in tl.static_range(NUM_PARTS):
        part = tl.load(outs[i] + out_row[:, None] + offs_dv[None, :], mask=inside, other=0.0).to(tl.float32)
        weight = tl.exp(part_lses[i] - m_safe)
        l_i += weight
        # A part without a live key adds nothing, even if its `out` holds NaN. Where the weight only rounds to 0, NaN
        # still reaches the result.
        empty = part_lses[i] == float("-inf")
        acc += tl.where(empty[:, None], 0.0, part * weight[:, None])

    merged = acc / tl.where(l_i == 0.0, 1.0, l_i)[:, None]
    row = merged_out + offs_m.to(tl.int64)[:, None] * V_HEAD_DIM
    tl.store(row + offs_dv[None, :], merged.to(merged_out.dtype.element_ty), mask=inside)
    if tl.program_id(1) == 0:
        row_lse = tl.where(m_i == float("inf"), m_i, m_safe + tl.log(l_i))
        tl.store(merged_lse + offs_m, row_lse, mask=valid)
