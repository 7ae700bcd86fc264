"""Tells transformers the name of the attention."""

from __future__ import annotations

from functools import partial
from importlib import import_module

from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from ...call.inputs import DecodeOptions
from .attention import attention
from .masks import model_mask

# Models that look the name up in a table of their own, and would fail for want of a row before they can be named.
_OWN_TABLES = {"falcon": "FALCON_ATTENTION_CLASSES", "gpt_neo": "GPT_NEO_ATTENTION_CLASSES"}


def register(options: DecodeOptions | None = None) -> None:
    """Makes `attn_implementation="flexdecode"` known to transformers.

    Decode steps, with up to 64 query tokens, go through `flex_decode`. Prompts go through PyTorch's SDPA, unless a soft
    cap, attention sinks or mods of `set_mods` need flexdecode. Models that never call the interface keep their own
    attention, with a warning that names them. Calling `register` again replaces the options.

    Args:
        options: how `flex_decode` executes each call.

    Raises:
        TypeError: the options are not a `DecodeOptions`.
    """
    if options is not None and not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions or None, got {type(options).__name__}")
    function = attention if options is None else partial(attention, decode_options=options)
    AttentionInterface.register("flexdecode", function)
    AttentionMaskInterface.register("flexdecode", model_mask)
    for model, name in _OWN_TABLES.items():
        table = getattr(import_module(f"transformers.models.{model}.modeling_{model}"), name, None)
        if table is not None:
            table.setdefault("flexdecode", table["eager"])
