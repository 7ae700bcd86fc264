"""Tells transformers the name of the attention."""

from __future__ import annotations

from functools import partial

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...call.inputs import DecodeOptions
from .attention import attention
from .masks import model_mask


def register(options: DecodeOptions | None = None) -> None:
    """Makes `attn_implementation="flexdecode"` known to transformers.

    Decode steps, with up to 64 query tokens, go through `flex_decode`. Prompts go through PyTorch's SDPA, unless a soft
    cap, attention sinks or mods of `set_mods` need flexdecode. Calling it again replaces the options.

    Args:
        options: how `flex_decode` executes each call.

    Raises:
        TypeError: the options are not a `DecodeOptions`.
    """
    if options is not None and not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions or None, got {type(options).__name__}")
    AttentionInterface.register("flexdecode", attention if options is None else partial(attention, decode_options=options))
    AttentionMaskInterface.register("flexdecode", model_mask)
