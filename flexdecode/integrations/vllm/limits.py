"""What flexdecode cannot do inside vLLM, said when the server starts."""

from __future__ import annotations

from typing import Any

import torch
import vllm.envs as envs
from vllm.config import VllmConfig
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from ...call.inputs import MAX_HEAD_DIM, DecodeOptions
from .factory import find_factory, read_settings

# vLLM's names of cache types, and what quantised bytes are. `auto` is the dtype of the model.
CACHE_DTYPES: dict[str, torch.dtype | None] = {
    "auto": None,
    "float16": None,
    "bfloat16": None,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
    "fp8_e5m2": torch.float8_e5m2,
}


def refuse_what_is_missing(
    config: VllmConfig, head_dim: int, kv_cache_dtype: str, attn_type: str, others: dict[str, Any], is_mla: bool
) -> None:
    """Refuses a layer that needs what flexdecode lacks.

    Args:
        config: of vLLM.
        head_dim: of queries and keys.
        kv_cache_dtype: vLLM's name of it.
        attn_type: vLLM's name of the kind of attention.
        others: arguments of the layer that only some models give.
        is_mla: whether layers keep latents.

    Raises:
        NotImplementedError: the message names everything that is missing.
    """
    parallel, model = config.parallel_config, config.model_config
    absent = None, False, -1  # what vLLM passes for what a model does not have
    unknown = [name for name, given in others.items() if isinstance(given, torch.Tensor) or given not in absent]
    missing = [
        ("attention of encoders and cross attention", attn_type != AttentionType.DECODER),
        (f"head dimensions above {MAX_HEAD_DIM}", head_dim > MAX_HEAD_DIM),
        (f"the KV cache type {kv_cache_dtype}", kv_cache_dtype not in CACHE_DTYPES),
        (f"the float8 type of {current_platform.device_name}", _has_other_float8(kv_cache_dtype)),
        ("image tokens that see one another (a prefix LM)", model is not None and model.is_mm_prefix_lm),
        ("reference sliding windows", model is not None and getattr(model, "rswa_window", None) is not None),
        ("decode context parallelism without MLA", not is_mla and parallel.decode_context_parallel_size > 1),
        ("prefill context parallelism", parallel.prefill_context_parallel_size > 1),
        ("non-causal attention, as the configuration asks for", config.attention_config.use_non_causal),
        *[(f"layers with the argument {name!r}", True) for name in unknown],
    ]
    if names := [name for name, is_needed in missing if is_needed]:
        raise NotImplementedError(
            f"flexdecode inside vLLM lacks what is needed: {'; '.join(names)}. Choose another --attention-backend"
        )


def _has_other_float8(kv_cache_dtype: str) -> bool:
    """Whether vLLM writes float8 caches of this platform in a type that flexdecode does not read."""
    is_default = CACHE_DTYPES.get(kv_cache_dtype) is torch.float8_e4m3fn
    return is_default and current_platform.fp8_dtype() is not torch.float8_e4m3fn


def read_options(config: VllmConfig) -> DecodeOptions | None:
    """The options of all calls. vLLM's switch for results that do not depend on other requests is one of them.

    This also looks for the factory of mods, so that a wrong name is found before weights are loaded.

    Raises:
        TypeError, ValueError: the configuration is wrong, or there is no such factory.
    """
    settings = read_settings(config.additional_config)
    if settings.factory is not None:
        find_factory(settings.factory)
    if not (settings.debug or envs.VLLM_BATCH_INVARIANT):
        return None
    return DecodeOptions(debug=settings.debug, batch_invariant=envs.VLLM_BATCH_INVARIANT)
