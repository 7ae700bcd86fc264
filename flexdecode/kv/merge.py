"""`merge_attention`: one softmax from attention over disjoint parts of the keys."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..call.checks import check_place
from ..call.device import interpreting, without_autocast
from ..call.inputs import DTYPES
from ..codegen.template import template_folder
from ..triton_api import standalone_kernel

MAX_PARTS = 8  # parts that one launch merges
BLOCK_M = 4  # rows of one program, a warp each
MAX_BLOCK_DV = 256  # output columns of one program

Parts = tuple[torch.Tensor, ...]


def merge_attention(
    outs: Sequence[torch.Tensor] | torch.Tensor, lses: Sequence[torch.Tensor] | torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges attention over disjoint parts of the keys into attention over all of them.

        >>> shared = flex_decode(query, prefix_key, prefix_value, return_lse=True)
        >>> own = flex_decode(query, key, value, return_lse=True)
        >>> out, lse = merge_attention(*zip(shared, own))

    The scores must be those of one softmax: mods that use `q_idx` or `kv_idx` see the positions within a part. Give
    attention sinks to one part only.

    Args:
        outs: the output of each part, `[B, Hq, Q, Dv]`, or `[T, Hq, Dv]` of packed queries, of one dtype (float16,
            bfloat16 or float32), any strides; or all stacked, `[S, B, Hq, Q, Dv]` or `[S, T, Hq, Dv]`. Parts in the
            same memory layout are read in place.
        lses: their log-sum-exps, float32 `[B, Hq, Q]` or `[T, Hq]`, natural-log units; or all stacked.

    Returns:
        The output in the shape of a part and the dtype of `outs`, and its log-sum-exp, float32, both contiguous.
        A part with lse -inf adds nothing, even if its output is NaN. If all parts have -inf, the output is 0 and lse
        -inf. A NaN of any other part makes its row NaN.
        A part with lse +inf makes its row NaN, with lse +inf.

        Accuracy: `lses` are float32. Around 1e5 they determine the weights to 1%, around 1e7 not at all. A single call
        of `flex_decode` has no such limit.

    Raises:
        TypeError: `outs` or `lses` is neither a tensor nor a list or tuple of tensors.
        ValueError: there is no part, the tensors do not match, or one requires grad; the message says which.

    Source: FlashInfer (Ye et al., arXiv:2501.01005), section 2.2; float32 arithmetic.
    """
    parts = (
        _parts("outs", outs, "[S, B, Hq, Q, Dv] or [S, T, Hq, Dv]", (5, 4)),
        _parts("lses", lses, "[S, B, Hq, Q] or [S, T, Hq]", (4, 3)),
    )
    _check(*parts)
    first = parts[0][0]
    if torch.compiler.is_compiling() or first.__class__ is FakeTensor:
        return torch.ops.flexdecode.merge_attention(*map(list, parts))
    if not first.numel() or not (first.is_cuda or interpreting()):
        return _merge_in_pytorch(*parts)
    if first.is_cuda and first.device.index != torch.cuda.current_device():
        with torch.cuda.device(first.device):
            return _merge_in_rounds(*parts)
    return _merge_in_rounds(*parts)


def _parts(name: str, parts: object, form: str, dims: tuple[int, ...]) -> Parts:
    """The tensors of all parts; `form` is the shape of a stacked tensor, `dims` how many dimensions it may have."""
    if isinstance(parts, torch.Tensor):
        if parts.dim() not in dims:
            raise ValueError(f"`{name}` must be a list of tensors or have shape {form}, got {list(parts.shape)}")
        return parts.unbind(0)
    if not isinstance(parts, (list, tuple)):
        raise TypeError(f"`{name}` must be a list of tensors or one tensor {form}, got {type(parts).__name__}")
    for i, part in enumerate(parts):
        if not isinstance(part, torch.Tensor):
            raise TypeError(f"`{name}[{i}]` must be a torch.Tensor, got {type(part).__name__}")
    return tuple(parts)


def _check(outs: Parts, lses: Parts) -> None:
    """Checks all tensors without reading their values."""
    if len(outs) != len(lses):
        raise ValueError(f"`outs` and `lses` must have as many parts, got {len(outs)} and {len(lses)}")
    if not outs:
        raise ValueError("`outs` must have at least one part, got none")
    shape, dtype = outs[0].shape, outs[0].dtype
    if len(shape) not in (3, 4):
        raise ValueError(f"`outs[0]` must have shape [B, Hq, Q, Dv] or [T, Hq, Dv], got {list(shape)}")
    rows = "B, Hq, Q" if len(shape) == 4 else "T, Hq"
    if dtype not in DTYPES:
        raise ValueError(f"`outs[0]` must be float16, bfloat16 or float32, got {dtype}")
    for name, parts, form, want, want_dtype, source in (
        ("outs", outs, f"[{rows}, Dv]", shape, dtype, " (from `outs[0]`)"),
        ("lses", lses, f"[{rows}]", shape[:-1], torch.float32, ""),
    ):
        for i, part in enumerate(parts):
            if part.shape != want:
                raise ValueError(
                    f"`{name}[{i}]` must have shape {form} = {list(want)} (from `outs[0]`), got {list(part.shape)}"
                )
            if part.dtype != want_dtype:
                raise ValueError(f"`{name}[{i}]` must be {want_dtype}{source}, got {part.dtype}")
            check_place(f"{name}[{i}]", part, outs[0], "outs[0]", "merge_attention")


@without_autocast()
def _merge_in_pytorch(outs: Parts, lses: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges any number of parts by PyTorch operations."""
    stacked = torch.stack(lses)
    m_i = stacked.amax(0)
    m_safe = torch.where(m_i == -torch.inf, 0.0, m_i)
    weights = torch.exp(stacked - m_safe)
    l_i = weights.sum(0)
    acc = torch.zeros(outs[0].shape, dtype=torch.float32, device=outs[0].device)
    for out, lse, weight in zip(outs, lses, weights, strict=True):
        acc += torch.where((lse == -torch.inf)[..., None], 0.0, out.float() * weight[..., None])
    merged = acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
    return merged.to(outs[0].dtype), torch.where(m_i == torch.inf, m_i, m_safe + torch.log(l_i))


def _merge_in_rounds(outs: Parts, lses: Parts) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges by launches of the kernel. Results between launches are float32."""
    dtype = outs[0].dtype
    while len(outs) > MAX_PARTS:
        out, lse = _launch(outs[:MAX_PARTS], lses[:MAX_PARTS], torch.float32)
        outs, lses = (out, *outs[MAX_PARTS:]), (lse, *lses[MAX_PARTS:])
    return _launch(outs, lses, dtype)


def _launch(outs: Parts, lses: Parts, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Merges up to MAX_PARTS parts on the current stream; returns at once."""
    *sizes, v_head_dim = outs[0].shape
    outs, (*out_strides, _) = _same_strides(outs, rows=True)
    lses, lse_strides = _same_strides(lses, rows=False)
    if len(sizes) == 2:  # for the kernel, a row of a packed output is a sequence with one token
        sizes, out_strides, lse_strides = [*sizes, 1], [*out_strides, 0], (*lse_strides, 0)
    # If strides are multiples of 8 elements, the kernel can read 16 bytes at a time.
    unit = 1 if any(stride % 8 for stride in out_strides) else 8
    merged_out = outs[0].new_empty(outs[0].shape, dtype=dtype)
    merged_lse = lses[0].new_empty(lses[0].shape)
    absent = MAX_PARTS - len(outs)  # the first part takes their place and is not read again
    block_dv = min(MAX_BLOCK_DV, 1 << (v_head_dim - 1).bit_length())
    kernel = standalone_kernel(template_folder() / "merge.py", "merge_parts")
    num_rows = math.prod(sizes)
    kernel[-(-num_rows // BLOCK_M), -(-v_head_dim // block_dv)](
        merged_out, merged_lse, *outs, *outs[:1] * absent, *lses, *lses[:1] * absent,
        *[stride // unit for stride in out_strides], *lse_strides, num_rows, *sizes[1:], len(outs), v_head_dim,
        BLOCK_M, block_dv, unit, num_warps=BLOCK_M, enable_fp_fusion=True,
    )  # fmt: skip
    return merged_out, merged_lse


def _same_strides(parts: Parts, rows: bool) -> tuple[Parts, tuple[int, ...]]:
    """The parts in one memory layout, and its strides in elements. Parts with different layouts are copied.

    Args:
        parts: tensors of one shape.
        rows: whether the elements of the last dimension must be contiguous.
    """
    strides = parts[0].stride()
    if (strides[-1] == 1 or not rows) and all(part.stride() == strides for part in parts):
        return parts, strides
    # The strides of the copies may be arbitrary in a dimension of size 1, so they are computed here.
    contiguous = tuple(math.prod(parts[0].shape[i + 1 :]) for i in range(len(strides)))
    return tuple(part.contiguous() for part in parts), contiguous
