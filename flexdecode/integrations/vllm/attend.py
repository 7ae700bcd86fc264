"""Attention of one layer over vLLM's cache, as one call of `flex_decode`; imports nothing of vLLM.

In: the packed tokens of a step, the cache of a layer, what the model and the user want of its attention.
Out: the outputs, written where vLLM wants them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from ... import mods as catalogue
from ...api import flex_decode
from ...call.inputs import DecodeOptions

_DRAFTS = 16  # query tokens of a sequence up to which a step counts as decoding


class LayerMods(NamedTuple):
    """What a user wants of the attention of one layer, beside what the model does.

    Attributes:
        score_mod: as in `flex_decode`; it comes after the model's soft cap and ALiBi.
        mask_mod: as in `flex_decode`; a key is live if the model's mask and this one allow it.
        sinks: logits that join the softmax without a value, floating `[num_heads]`, beside those of the model.
        causal: whether a token sees only itself and earlier ones. Without it, `mask_mod` alone says so, and a window of
            the model still hides the keys before it.
    """

    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    sinks: torch.Tensor | None = None
    causal: bool = True


class OfModel(NamedTuple):
    """What a model asks of the attention of one layer.

    Attributes:
        scale: factor of the dot product.
        soft_cap: largest absolute logit, or None.
        alibi_slopes: float32 `[num_heads]`, logits per token, or None.
        window: tokens that a token sees, itself included, or None.
        sinks: `[num_heads]`, logits, or None.
    """

    scale: float
    soft_cap: float | None = None
    alibi_slopes: torch.Tensor | None = None
    window: int | None = None
    sinks: torch.Tensor | None = None


class Mods(NamedTuple):
    """The attention of a layer, as `flex_decode` takes it.

    Attributes:
        score_mod, mask_mod: the model's and the user's in one.
        sinks: the tensors whose logits join the softmax: none, the model's, the user's, or both.
    """

    score_mod: Callable | None
    mask_mod: Callable
    sinks: tuple[torch.Tensor, ...]


NO_MODS = LayerMods()


def combine(model: OfModel, user: LayerMods = NO_MODS, mask_in_place_of_causal: Callable | None = None) -> Mods:
    """Joins what a model and a user want of a layer.

    Args:
        model: what the model asks for.
        user: what the user asks for.
        mask_in_place_of_causal: vLLM's `layer.logical_mask_mod`. It takes the place of the causal mask, as in vLLM's
            own backend for FlexAttention; the model's window and the user's mask hold beside it.
    """
    scores: list[Callable] = []
    if model.soft_cap:
        scores.append(catalogue.softcap(model.soft_cap))
    if model.alibi_slopes is not None:
        scores.append(catalogue.alibi(model.alibi_slopes))
    if user.score_mod is not None:
        scores.append(user.score_mod)
    masks: list[Callable] = []
    if user.causal and mask_in_place_of_causal is None:
        masks.append(catalogue.causal() if model.window is None else catalogue.sliding_window(model.window))
    elif model.window is not None:
        masks.append(_not_before(model.window))
    masks += [mask for mask in (mask_in_place_of_causal, user.mask_mod) if mask is not None]
    return Mods(
        None if not scores else scores[0] if len(scores) == 1 else catalogue.compose(*scores),
        masks[0] if len(masks) == 1 else catalogue.and_masks(*masks),
        tuple(sinks for sinks in (model.sinks, user.sinks) if sinks is not None),
    )


def _not_before(window: int) -> Callable:
    """Hides the keys before a window, and no later ones."""

    def window_mask(b: torch.Tensor, h: torch.Tensor, q_idx: torch.Tensor, kv_idx: torch.Tensor) -> torch.Tensor:
        return q_idx - kv_idx < window

    return window_mask


class Step(NamedTuple):
    """The sequences of one step, the same for all layers that share a page table.

    Attributes:
        cu_seqlens_q: int32 `[B + 1]`, where the tokens of each sequence begin.
        kv_lens: int32 `[B]`, tokens of each sequence with those of this step.
        page_table: int32 `[B, max_pages]`.
        max_q_len: the most tokens that a sequence has, or None for any number.
    """

    cu_seqlens_q: torch.Tensor
    kv_lens: torch.Tensor
    page_table: torch.Tensor
    max_q_len: int | None


def as_hint(max_query_len: int) -> int | None:
    """The `max_q_len` of a step: one of three, so that few tilings are compiled."""
    return 1 if max_query_len <= 1 else _DRAFTS if max_query_len <= _DRAFTS else None


class LayerAttention:
    """The attention of one layer.

    Attributes:
        of_model: what the model asks for.
        user: what the user asks for; None until it is known.
        quantised: the dtype of a quantised cache, whose tensor may hold bytes; else None.
        options: how to execute calls.
    """

    def __init__(self, of_model: OfModel, quantised: torch.dtype | None, options: DecodeOptions | None) -> None:
        self.of_model = of_model
        self.user: LayerMods | None = None
        self.quantised = quantised
        self.options = options
        self._instead: Callable | None = None  # the `logical_mask_mod` that `_mods` has
        self._mods: Mods | None = None

    def mods(self, instead: Callable | None) -> Mods:
        """The model's and the user's mods in one; `instead` as in `combine`."""
        assert self.user is not None
        if self._mods is None or instead is not self._instead:
            self._instead, self._mods = instead, combine(self.of_model, self.user, instead)
        return self._mods

    def as_numbers(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """A cache that may hold bytes, as a view with its dtype."""
        return kv_cache if self.quantised is None else kv_cache.view(self.quantised)

    def compute(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        step: Step,
        instead: Callable | None = None,
        scales: tuple[torch.Tensor, torch.Tensor] | None = None,
        out: torch.Tensor | None = None,
        return_lse: bool = False,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes the attention of the layer for all tokens of a step, in one call of `flex_decode`.

        Args:
            query: `[T, Hq, D]`, the tokens of the sequences one after another.
            key: `[num_pages, Hkv, page_size, D]`.
            value: `[num_pages, Hkv, page_size, Dv]`.
            step: the sequences.
            instead: as in `combine`.
            scales: what quantised keys and values are multiplied by, 0-d float32.
            out: `[T, Hq, Dv]` to write to.
            return_lse: also return the natural log of the sum of exponentials, float32 `[T, Hq]`.

        Raises:
            TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`.
        """
        score_mod, mask_mod, all_sinks = self.mods(instead)
        sinks = all_sinks[0] if all_sinks else None
        if len(all_sinks) == 2:  # a softmax has no more than one sink: their exponentials add up
            sinks = torch.logaddexp(*[logits.float() for logits in all_sinks])
        k_scale, v_scale = (None, None) if scales is None or self.quantised is None else scales
        return flex_decode(
            query, key, value, score_mod, mask_mod, kv_lens=step.kv_lens, page_table=step.page_table,
            cu_seqlens_q=step.cu_seqlens_q, max_q_len=step.max_q_len, scale=self.of_model.scale, k_scale=k_scale,
            v_scale=v_scale, sinks=sinks, out=out, return_lse=return_lse, options=self.options,
        )  # fmt: skip
