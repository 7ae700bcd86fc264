"""The attention function that models call: decode steps through `flex_decode`, prompts through PyTorch's SDPA."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from ... import mods
from ...api import flex_decode
from ...call.inputs import DecodeOptions
from .masks import ModelMask, padding_mod, since
from .user_mods import UserMods, mods_of

FEW_TOKENS = 64  # query tokens of a decode step with drafts; more are a prompt, for which SDPA is made
_FOREIGN = ("kernel_options", "indices", "block_indices", "sinks")  # of other attention functions, and not in the mask


class Frame(NamedTuple):
    """Where the positions of a call begin, as `flex_decode` takes it.

    Attributes:
        q_offset: position of the first query token, int64 `[B]`; 0 for all without it.
        kv_offset: position of slot 0, int64 `[B]`; 0 for all without it.
        kv_starts, kv_lens: live slots, int64 `[B]`; None for all.
    """

    q_offset: torch.Tensor | None = None
    kv_offset: torch.Tensor | None = None
    kv_starts: torch.Tensor | None = None
    kv_lens: torch.Tensor | None = None


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: ModelMask | torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    position_bias: torch.Tensor | None = None,
    decode_options: DecodeOptions | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """The attention function that `register` gives to transformers' `AttentionInterface`.

    Args:
        module: the attention module; `set_mods` leaves the user's mods on it.
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, N, D]`: what the cache returns.
        value: `[B, Hkv, N, Dv]`.
        attention_mask: of `model_mask`; or a mask `[B or 1, Hq or 1, Q, N]` that the user made, bool or to be added.
        dropout: probability; only SDPA has it.
        scaling: factor of the dot product; by default `1 / sqrt(D)`.
        is_causal: without a mask, whether the query is a prompt in which no token sees a later one; by default
            what the module says.
        softcap: the largest absolute logit.
        s_aux: attention sinks `[Hq]`.
        position_bias: `[B or 1, Hq or 1, Q, N]`, added to the logits.
        decode_options: what was given to `register`.
        **others: what models pass for other attention functions.

    Returns:
        `[B, Q, Hq, Dv]`, contiguous; and None in place of attention weights.

    Raises:
        ValueError: flexdecode cannot do what is asked, and neither can SDPA.
        TraceError, UnsupportedOpError: a mod cannot be traced.
    """
    for name in _FOREIGN:
        if others.get(name) is not None:
            raise ValueError(_foreign_argument(name, module))
    user = mods_of(module)
    needs = _what_needs_flexdecode(softcap, s_aux, user)
    hinders = _what_hinders_flexdecode(dropout, query, key, value)
    if needs and hinders:
        raise ValueError(
            f"{type(module).__name__} has {needs[0]}, which SDPA cannot compute, and {hinders[0]}, which flexdecode "
            f"cannot: use {hinders[1]}, or {needs[1]}"
        )
    if isinstance(attention_mask, torch.Tensor):
        _check_mask(attention_mask, query, key)
        attention_mask = attention_mask[..., : key.shape[2]]
    if hinders or (not needs and query.shape[2] > FEW_TOKENS):
        if isinstance(attention_mask, ModelMask):
            attention_mask = attention_mask.dense()
        if position_bias is not None:
            others["position_bias"] = position_bias
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, is_causal=is_causal, **others
        )
    if is_causal is None:
        is_causal = getattr(module, "is_causal", True)
    frame, score_mods, mask_mods = _of_model(attention_mask, query, key, is_causal)
    if softcap is not None:
        score_mods.insert(0, mods.softcap(softcap))
    if position_bias is not None:
        score_mods.append(_biased(position_bias, query, frame))
    _add_user_mods(user, attention_mask, score_mods, mask_mods)
    out: Any = flex_decode(
        query, key, value,
        mods.compose(*score_mods) if score_mods else None, mods.and_masks(*mask_mods) if mask_mods else None,
        q_offset=0 if frame.q_offset is None else frame.q_offset, kv_offset=frame.kv_offset,
        kv_starts=frame.kv_starts, kv_lens=frame.kv_lens, scale=scaling, sinks=s_aux, options=decode_options,
    )  # fmt: skip
    return out.transpose(1, 2).contiguous(), None


def _foreign_argument(name: str, module: torch.nn.Module) -> str:
    """The message for an argument that flexdecode does not have."""
    if name == "kernel_options":
        return "`kernel_options` are for flex_attention: flexdecode's own are given as `register(DecodeOptions(...))`"
    return f"{type(module).__name__} passes `{name}`, which flexdecode does not have: use another attn_implementation"


def _what_needs_flexdecode(softcap: float | None, s_aux: torch.Tensor | None, user: UserMods) -> tuple[str, str] | None:
    """What SDPA cannot compute, and what to use in its place, in words; None if it can compute all."""
    if softcap is not None:
        return "a soft cap", '`attn_implementation="eager"`'
    if s_aux is not None:
        return "attention sinks", '`attn_implementation="eager"`'
    return None if user == (None, None) else ("mods of the user", "`set_mods(model)`, which removes them")


def _what_hinders_flexdecode(dropout: float, *inputs: torch.Tensor) -> tuple[str, str] | None:
    """What `flex_decode` cannot compute, and what to use in its place, in words; None if it can compute all."""
    if dropout > 0:
        return "dropout", "`model.eval()`"
    if torch.is_grad_enabled() and any(x.requires_grad for x in inputs):
        return "inputs that require a gradient", "`torch.no_grad()`"
    return None


def _of_model(
    mask: ModelMask | torch.Tensor | None, query: torch.Tensor, key: torch.Tensor, is_causal: bool
) -> tuple[Frame, list[Callable], list[Callable]]:
    """Where positions begin, and what the mask of the model adds: score_mods and mask_mods."""
    if isinstance(mask, ModelMask):
        if mask.padding is None:
            return Frame(mask.q_offset, mask.kv_offset), [], [mask.mask_mod]
        # A few caches return fewer keys than the mask has. As in eager attention, these are the first ones.
        ends, N = mask.padding.ends, key.shape[2]
        ends = ends.clamp(max=N) if mask.kv_length > N else ends
        frame = Frame(mask.q_offset, mask.kv_offset, mask.padding.starts, ends)
        return frame, [], [mask.mask_mod, padding_mod(mask.padding, mask.kv_offset)]
    frame = Frame()
    if mask is None:
        return frame, [], [mods.causal()] if is_causal and query.shape[2] > 1 else []
    if mask.dtype != torch.bool:
        return frame, [_biased(mask, query, frame)], []
    allowed = mask.expand(query.shape[0], query.shape[1], -1, -1)
    return frame, [], [lambda b, h, q_idx, kv_idx: allowed[b, h, q_idx, kv_idx]]


def _check_mask(mask: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> None:
    """Checks the shape of a mask that the user made.

    Raises:
        ValueError: it does not say for each query token which keys it attends to, or has another dtype.
    """
    (B, Hq, Q, _), N = query.shape, key.shape[2]
    shape = mask.shape
    if mask.dim() != 4 or shape[0] not in (1, B) or shape[1] not in (1, Hq) or shape[2] != Q or shape[3] < N:
        raise ValueError(
            f"`attention_mask` must have shape [B or 1, Hq or 1, Q, N] = [{B} or 1, {Hq} or 1, {Q}, {N}] (N is the"
            f" length of the cache), got {list(shape)}"
        )
    if mask.dtype != torch.bool and not mask.is_floating_point():
        raise ValueError(
            f"`attention_mask` of four dimensions must be bool, or float to be added to the scores, got {mask.dtype}"
        )


def _biased(bias: torch.Tensor, query: torch.Tensor, frame: Frame) -> Callable:
    """A score_mod that adds a bias `[B or 1, Hq or 1, Q, N]` of query tokens and slots."""
    bias = bias.expand(query.shape[0], query.shape[1], -1, -1)
    q_offset, kv_offset = frame.q_offset, frame.kv_offset

    def score_mod(score: Any, b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return score + bias[b, h, since(q_offset, b, q_idx), since(kv_offset, b, kv_idx)]

    return score_mod


def _add_user_mods(
    user: UserMods, mask: ModelMask | torch.Tensor | None, score_mods: list[Callable], mask_mods: list[Callable]
) -> None:
    """Adds the user's mods, for which positions count from the first token of a sequence.

    Raises:
        ValueError: the mask does not say which positions the tokens have.
    """
    if user == (None, None):
        return
    if not isinstance(mask, ModelMask):
        what = "without a mask" if mask is None else f"beside a mask of shape {list(mask.shape)}"
        raise ValueError(
            f"mods of `set_mods` cannot be used {what}, because it does not say which positions the tokens have: pass "
            "a padding mask [B, N], and what the mask does as a mod"
        )
    score_mod, mask_mod, first = *user, None if mask.padding is None else mask.padding.first
    if score_mod is not None:
        score_mods.append(
            lambda score, b, h, q_idx, kv_idx: score_mod(score, b, h, since(first, b, q_idx), since(first, b, kv_idx))
        )
    if mask_mod is not None:
        mask_mods.append(lambda b, h, q_idx, kv_idx: mask_mod(b, h, since(first, b, q_idx), since(first, b, kv_idx)))
