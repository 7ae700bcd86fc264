"""The columns of the matrix: each makes one callable `(query, key, value) -> output` for a row and a mod."""

import math
from collections.abc import Callable

import torch
from torch.nn import functional

from .mod_cases import ModCase
from .rows import Row

__all__ = ["COLUMNS", "Unsupported", "naive_attention"]

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


class Unsupported(Exception):
    """The column cannot run this row; the message is the reason printed below the table."""


def naive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, case: ModCase, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch attention in the dtype of its inputs: matmul, bias or mask, softmax, matmul.

    The query heads of a group are packed as rows of one product, so K and V are not expanded.

    Args:
        query: `[B, Hq, Mq, K]`.
        key: `[B, Hkv, Mkv, K]`.
        value: `[B, Hkv, Mkv, K]`.
        case: The mod, as bias, mask or cap.
        scale: Factor of the logits; default `1 / sqrt(K)`.

    Returns:
        The output `[B, Hq, Mq, K]`.
    """
    batch, num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim) * (scale or 1.0 / math.sqrt(head_dim))
    logits = (grouped @ key.mT).view(batch, num_q_heads, num_queries, num_keys)
    if case.cap is not None:
        logits = case.cap * torch.tanh(logits / case.cap)
    if case.bias is not None:
        logits = logits + case.bias.to(logits.dtype)
    if case.keep is not None:
        logits = logits.masked_fill(~case.keep, -math.inf)
    weights = torch.softmax(logits, dim=-1).view(batch, num_kv_heads, -1, num_keys)
    return (weights @ value).view(query.shape)


def _flexdecode(row: Row, case: ModCase, device: torch.device) -> Attention:
    import flexdecode

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        return flexdecode.flex_decode(query, key, value, case.score_mod, case.mask_mod)

    return attend


def _naive(row: Row, case: ModCase, device: torch.device) -> Attention:
    return lambda query, key, value: naive_attention(query, key, value, case)


def _attention_mask(row: Row, case: ModCase) -> torch.Tensor | None:
    """The mod as SDPA's `attn_mask`, broadcastable to `[B, Hq, Mq, Mkv]`, made outside the timing."""
    if case.cap is not None:
        raise Unsupported("SDPA has no soft-capping: it is neither a bias nor a mask")
    if case.bias is not None:
        return case.bias[None].to(row.torch_dtype).expand(row.B, -1, -1, -1)
    return case.keep


def _sdpa(row: Row, case: ModCase, device: torch.device) -> Attention:
    mask = _attention_mask(row, case)
    return lambda query, key, value: functional.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, enable_gqa=True
    )


def _sdpa_cudnn(row: Row, case: ModCase, device: torch.device) -> Attention:
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if device.type != "cuda":
        raise Unsupported("cuDNN needs a CUDA device")
    if row.dtype == "float32":
        raise Unsupported("cuDNN attention takes float16 and bfloat16 only")
    attend_any = _sdpa(row, case, device)

    def attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            return attend_any(query, key, value)

    return attend


def _flex_attention(row: Row, case: ModCase, device: torch.device) -> Attention:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    # FlexAttention numbers the queries from 0; in decoding they are the newest tokens of the sequence.
    offset, inner_score_mod, inner_mask_mod = row.Mkv - row.Mq, case.score_mod, case.mask_mod

    def score_mod(score, b, h, q_idx, kv_idx):
        return inner_score_mod(score, b, h, q_idx + offset, kv_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return inner_mask_mod(b, h, q_idx + offset, kv_idx) if inner_mask_mod else kv_idx >= 0

    # Without a BlockMask it takes the cache for one block, which it cannot split over the multiprocessors.
    block_mask = create_block_mask(mask_mod, None, None, row.Mq, row.Mkv, device=device)
    keywords = {"enable_gqa": True, "score_mod": score_mod if inner_score_mod else None, "block_mask": block_mask}
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda query, key, value: compiled(query, key, value, **keywords)


# name -> (title in the tables, maker)
COLUMNS: dict[str, tuple[str, Callable[[Row, ModCase, torch.device], Attention]]] = {
    "flexdecode": ("flexdecode", _flexdecode),
    "naive": ("naive PyTorch", _naive),
    "sdpa": ("SDPA", _sdpa),
    "sdpa_cudnn": ("SDPA (cuDNN)", _sdpa_cudnn),
    "flex": ("FlexAttention", _flex_attention),
}
