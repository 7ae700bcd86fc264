"""The mask of a forward pass as transformers describes it: a function of positions, and which tokens are padding.

No dense mask and no BlockMask is made of it where `flex_decode` attends: it traces the function.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch.nn.attention.flex_attention import BlockMask
from transformers import MODEL_MAPPING
from transformers.masking_utils import causal_mask_function, eager_mask, sdpa_mask


class Padding(NamedTuple):
    """Which slots of the cache hold tokens that are no padding.

    Attributes:
        live: bool `[B, N]`, true for these slots.
        starts: the first of them, int64 `[B]`; N without any.
        ends: the last of them plus 1, int64 `[B]`; 0 without any.
        whole: bool `[B]`, true if there is no padding between the two.
        first: position of the first token of the sequence, int64 `[B]`, also where the cache has dropped it.
    """

    live: torch.Tensor
    starts: torch.Tensor
    ends: torch.Tensor
    whole: torch.Tensor
    first: torch.Tensor


class ModelMask(BlockMask):
    """What a model attends to in a forward pass, shared by its layers of one kind.

    It is a BlockMask by name only, because models pass a BlockMask on to the attention function as it is.

    Attributes:
        given: the arguments of transformers' mask functions.
        mask_mod: transformers' function of the four indices. It knows nothing of padding.
        batch_size, q_length, kv_length: sequences, query tokens, slots of the cache.
        q_offset: position of the first query token, int64 `[B]`.
        kv_offset: position of slot 0, int64 `[B]`; None for 0.
        padding: None if every slot holds a token.
        ndim: 4, by which models recognise a finished mask.
    """

    ndim = 4

    def __init__(self, given: dict[str, Any]) -> None:
        # BlockMask's constructor wants lists of blocks. Of its methods, models use those below.
        tokens = given.get("cache_position")  # the first versions of transformers 5 say with it where the query is
        if tokens is not None:
            q_length, q_offset, device = len(tokens), tokens[0], tokens.device
        else:
            q_length, q_offset, device = given["q_length"], given.get("q_offset", 0), given["device"]
        if isinstance(q_offset, torch.Tensor):
            q_offset = q_offset.clone()  # that of a static cache counts on before the first layer attends
            given = given if tokens is not None else {**given, "q_offset": q_offset}
        live, kv_offset = given.get("attention_mask"), given.get("kv_offset", 0)
        self.given = given
        self.mask_mod = given.get("mask_function", causal_mask_function)
        self.batch_size, self.q_length, self.kv_length = given["batch_size"], q_length, given["kv_length"]
        self.q_offset = _for_all(q_offset, self.batch_size, device)
        self.kv_offset = _for_all(kv_offset, self.batch_size, device) if kv_offset else None
        self.padding = None if live is None else _padding(live, self.batch_size, kv_offset, self.kv_length)
        self._dense: tuple[torch.Tensor | None] | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """`(B, 1, Q, N)`."""
        return self.batch_size, 1, self.q_length, self.kv_length

    def dim(self) -> int:
        """As `ndim`."""
        return self.ndim

    def __repr__(self) -> str:
        return f"ModelMask(shape={self.shape}, mask_mod={getattr(self.mask_mod, '__name__', self.mask_mod)})"

    def __getitem__(self, index: Any) -> Any:
        raise TypeError(
            "this model computes with its attention mask itself, and flexdecode makes no mask of numbers: use "
            'attn_implementation="sdpa" or "eager"'
        )

    def to(self, device: torch.device | str, *_: Any, **__: Any) -> Any:
        """The mask for layers on a device: on another one than that of the tokens, a dense bool mask `[B, 1, Q, N]`."""
        if torch.device(device) == self.q_offset.device:
            return self
        whole: Any = {**self.given, "allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
        mask: Any = sdpa_mask(**whole)
        return mask.to(device)

    def dense(self) -> torch.Tensor | None:
        """The bool mask `[B, 1, Q, N]` that transformers makes for SDPA; None where SDPA needs none."""
        if self._dense is None:
            self._dense = (sdpa_mask(**self.given),)
        return self._dense[0]


def _for_all(position: int | torch.Tensor, batch_size: int, device: torch.device | str) -> torch.Tensor:
    """A position as a tensor `[B]`. A number would be frozen in a CUDA graph."""
    if isinstance(position, torch.Tensor):
        return position.expand(batch_size)
    return torch.full((batch_size,), position, device=device)


def _padding(attention_mask: torch.Tensor, batch_size: int, kv_offset: int, kv_length: int) -> Padding:
    """Reads a padding mask `[B, positions]` on its device; nothing waits for it.

    Positions past its end are padding: a static cache has room for tokens that do not exist yet.
    """
    live = attention_mask[:, kv_offset : kv_offset + kv_length].expand(batch_size, -1)
    if live.shape[1] < kv_length:
        live = torch.nn.functional.pad(live, (0, kv_length - live.shape[1]))
    slots = torch.arange(kv_length, device=live.device)
    starts = torch.where(live, slots, kv_length).amin(1)
    ends = torch.where(live, slots + 1, 0).amax(1)
    whole = live.sum(1) == ends - starts
    # The first maximum of a row is its first token.
    first = attention_mask.to(torch.int32).argmax(1).expand(batch_size) if kv_offset else starts
    return Padding(live, starts, ends, whole, first)


def model_mask(**given: Any) -> ModelMask | torch.Tensor | None:
    """The mask function that `register` gives to transformers' `AttentionMaskInterface`.

    Args:
        **given: what transformers passes to its own mask functions, such as `sdpa_mask`.

    Returns:
        A `ModelMask`. For a model that never calls the attention interface, the mask that its own attention wants.
    """
    config_class: Any = type(given.get("config"))
    if not torch.compiler.is_compiling() and (name := _without_interface(config_class)):
        warnings.warn(
            f'{name} never calls the attention interface of transformers: attn_implementation="flexdecode" has no '
            "effect on it, and it computes its own attention",
            stacklevel=2,
        )
        return eager_mask(**given)
    return ModelMask(given)


@lru_cache
def _without_interface(config_class: Any) -> str | None:
    """The name of the model of a config, if its module does not know transformers' attention functions."""
    if config_class not in MODEL_MAPPING:
        return None
    found: Any = MODEL_MAPPING[config_class]
    model = found[0] if isinstance(found, tuple) else found
    return None if calls_interface(model) else model.__name__


def calls_interface(kind: type) -> bool:
    """Whether the module of a class knows transformers' attention functions."""
    return hasattr(sys.modules[kind.__module__], "ALL_ATTENTION_FUNCTIONS")


def since(offset: torch.Tensor | None, b: Any, position: Any) -> Any:
    """What a mod counts from the offset of sequence b: the slot of a position, say."""
    return position if offset is None else position - offset[b]


def padding_mod(padding: Padding, kv_offset: torch.Tensor | None) -> Callable:
    """The mask_mod of a padding mask. It is to be used within `starts` and `ends`.

    Where these are all that there is to it, no key is looked at: blocks of a whole sequence are proven full.
    """
    live, whole = padding.live, padding.whole
    return lambda b, h, q_idx, kv_idx: whole[b] | live[b, since(kv_offset, b, kv_idx)]
