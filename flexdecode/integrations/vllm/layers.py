"""Makes the mods of vLLM's layers when the server starts, and tries each of them."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from vllm.config import VllmConfig, get_layers_from_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.logger import init_logger
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index

from .attend import NO_MODS, LayerAttention, LayerMods, Step
from .factory import Layer, make_mods, read_settings

_STORED = {"float16": torch.float16, "bfloat16": torch.bfloat16}  # caches of a dtype that the model may not have
_log = init_logger("vllm.flexdecode")  # vLLM shows what its own loggers say


def prepare_layers(layer_names: list[str], config: VllmConfig, device: torch.device) -> bool:
    """Makes the mods of some layers, unless they are made already, and tries them with a few tokens.

    Args:
        layer_names: vLLM's names of the layers.
        config: of vLLM.
        device: of the cache.

    Returns:
        Whether a layer has mods of the user.

    Raises:
        TypeError, ValueError: there is no such factory, or what it gives cannot be the mods of a layer.
        RuntimeError: the factory raised an error, or the mods cannot be used; that error is the cause.
    """
    name = read_settings(config.additional_config).factory
    layers = get_layers_from_vllm_config(config, AttentionLayerBase, layer_names)
    with_mods = 0
    for layer_name, layer in layers.items():
        impl: Any = layer.impl
        attention, instead = impl.attention, getattr(layer, "logical_mask_mod", None)
        if attention.user is None:
            known = _describe(layer_name, impl, config, device)
            attention.user = make_mods(name, known)
            slopes = attention.of_model.alibi_slopes
            if slopes is not None:
                attention.of_model = attention.of_model._replace(alibi_slopes=slopes.to(device))
            _try(known, impl, instead)
            if text := _names(attention.user, instead):
                _log.info("flexdecode: %s has %s", layer_name, text)
        with_mods += attention.user is not NO_MODS or instead is not None
    _log.info("flexdecode computes %d layers, %d with mods%s", len(layers), with_mods, f" of {name}" if name else "")
    if name and not any(_users_of(config)):
        _log.warning("flexdecode: %s gave mods to no layer, so the model is served as it is", name)
    return with_mods > 0


def _users_of(config: VllmConfig) -> list[bool]:
    """Whether each layer that flexdecode computes has mods of the user, or may still get them."""
    layers = get_layers_from_vllm_config(config, AttentionLayerBase).values()
    found = [getattr(getattr(layer, "impl", None), "attention", None) for layer in layers]
    return [attention.user is not NO_MODS for attention in found if isinstance(attention, LayerAttention)]


def _names(user: LayerMods, instead: Any) -> str:
    parts = [
        f"{kind} {getattr(mod, '__name__', type(mod).__name__)}"
        for kind, mod in (("score_mod", user.score_mod), ("mask_mod", user.mask_mod), ("logical_mask_mod", instead))
        if mod is not None
    ]
    parts += ["sinks"] if user.sinks is not None else []
    return ", ".join(parts + ([] if user.causal else ["no causal mask"]))


def _describe(name: str, impl: Any, config: VllmConfig, device: torch.device) -> Layer:
    """What a factory is told of a layer."""
    try:
        index = extract_layer_index(name)
    except (AssertionError, ValueError):
        index = None
    return Layer(
        name, index, impl.num_heads, impl.num_kv_heads, impl.head_size,
        get_tensor_model_parallel_rank() * impl.num_heads, impl.attention.of_model.window, device,
        config.model_config.dtype,
    )  # fmt: skip


def _try(layer: Layer, impl: Any, instead: Any) -> None:
    """Runs the attention of a layer over a few tokens of zeros: one that is decoded, and a prompt.

    So a mod that cannot be used is found before a request comes, and its kernels are there.

    Raises:
        RuntimeError: the attention cannot be computed; the error is the cause.
    """
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", RuntimeWarning)
            _run(layer, impl, instead)
    except Exception as error:  # of a mod, of tracing or of compiling: each ends the start with the layer's name
        raise RuntimeError(
            f"flexdecode cannot compute the attention of layer {layer.name}: {type(error).__name__}: {error}"
        ) from error
    for warning in caught:
        _log.warning("flexdecode: %s: %s", layer.name, warning.message)


def _run(layer: Layer, impl: Any, instead: Any) -> None:
    """Computes the attention of a layer for one token and for a prompt, over a cache of zeros."""
    num_pages, page_size, prompt, device = 4, 16, 40, layer.device
    table = torch.arange(num_pages, dtype=torch.int32, device=device)[None]
    one = torch.ones((), device=device)
    dtype = impl.attention.quantised or _STORED.get(impl.kv_cache_dtype, layer.dtype)
    cache = torch.zeros(impl.cache_shape(num_pages, page_size), device=device).to(dtype)
    for tokens, hint in ((1, 1), (prompt, None)):
        numbers = torch.tensor([0, tokens, prompt], dtype=torch.int32, device=device)
        step = Step(numbers[:2], numbers[2:], table, hint)
        query = torch.zeros(tokens, layer.num_heads, layer.head_dim, dtype=layer.dtype, device=device)
        impl.attention.compute(query, *impl.views(cache), step, instead, (one, one))
