"""A user's mods, as attributes of the attention modules of a model."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch

from ...frontend.parameters import check_parameters
from .masks import calls_interface

_NAME = "_flexdecode_mods"


class UserMods(NamedTuple):
    """A user's mods of one layer."""

    score_mod: Callable | None = None
    mask_mod: Callable | None = None


_NONE = UserMods()


def mods_of(module: torch.nn.Module) -> UserMods:
    """The user's mods of an attention module."""
    return getattr(module, _NAME, _NONE)


def set_mods(
    model: Any,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    layers: Iterable[int] | None = None,
) -> None:
    """Adds a score_mod and a mask_mod to the self-attention of a model that runs with flexdecode.

        >>> set_mods(model, score_mod=mods.alibi(32))
        >>> set_mods(model, mask_mod=mods.sliding_window(1024), layers=range(0, 32, 2))
        >>> set_mods(model)  # as it was

    A key is live if the model's mask and `mask_mod` allow it. The score_mod comes after the model's soft cap and
    position bias. Positions count from the first token of each sequence that is no padding. Of an encoder-decoder
    model, only the causal self-attention of the decoder gets the mods.

    Args:
        model: a model of transformers with `attn_implementation="flexdecode"`.
        score_mod: as in `flex_decode`; None for none. It replaces what was set before.
        mask_mod: likewise.
        layers: numbers of the layers; by default all. The other layers keep what they have.

    Raises:
        TypeError: a mod is not callable or takes other parameters, `layers` are no integers, or `model` is no module.
        ValueError: the model does not run with flexdecode, or has no such layer.
    """
    for kind, mod in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if mod is not None:
            check_parameters(mod, kind)
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"`model` must be a model of transformers, got {type(model).__name__}")
    modules = _attention_modules(model)
    known = sorted({module.layer_idx for module in modules})
    if layers is not None and (isinstance(layers, int) or any(type(layer) is not int for layer in layers)):
        raise TypeError(f"`layers` must be a list of integers, such as [0, 2], got {layers!r}")
    chosen = known if layers is None else list(layers)
    if unknown := [layer for layer in chosen if layer not in known]:
        raise ValueError(f"`layers` must be among {known} (those of {type(model).__name__}), got {unknown}")
    for module in modules:
        if module.layer_idx in chosen:
            setattr(module, _NAME, UserMods(score_mod, mask_mod))


def _attention_modules(model: Any) -> list[Any]:
    """The causal self-attention of each layer.

    Raises:
        ValueError: there is none that runs with flexdecode.
    """
    modules = [module for module in model.modules() if _is_causal_self_attention(module)]
    name = type(model).__name__
    if not modules:
        raise ValueError(
            f"{name} has no attention modules that flexdecode knows: they have `is_causal` and `layer_idx`, and call "
            "the attention interface of transformers"
        )
    for module in modules:
        used = module.config._attn_implementation
        if used != "flexdecode":
            raise ValueError(
                f'{name} runs with attn_implementation="{used}", so mods would have no effect: call `register()` and '
                '`model.set_attn_implementation("flexdecode")` first'
            )
    return modules


def _is_causal_self_attention(module: Any) -> bool:
    """Whether a module is the self-attention of a decoder layer and calls the attention interface."""
    if not getattr(module, "is_causal", False) or getattr(module, "layer_idx", None) is None:
        return False
    return any(calls_interface(kind) for kind in type(module).__mro__)
