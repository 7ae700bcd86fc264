"""The substitutes for vLLM's backends on CPUs. vLLM looks a name up here each time that it builds a model."""

from __future__ import annotations

from typing import Any

from vllm.v1.attention.backends.registry import AttentionBackendEnum

from .plugin import chosen_backend


def __getattr__(name: str) -> Any:
    """The backend of the current configuration in the place of vLLM's backend `name`."""
    if name not in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return chosen_backend(AttentionBackendEnum[name].value, is_mla=name != "CPU_ATTN")
