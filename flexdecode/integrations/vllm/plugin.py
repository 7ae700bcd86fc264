"""Tells vLLM of the backend. vLLM calls `register` in each of its processes."""

from __future__ import annotations

from typing import Any

_HERE = __name__.rpartition(".")[0]
_BACKEND = f"{_HERE}.backend.FlexDecodeBackend"


def register() -> None:
    """Makes `CUSTOM` stand for flexdecode in vLLM; nothing is computed by flexdecode unless it is chosen.

    On GPUs, vLLM honours `--attention-backend CUSTOM` itself. On CPUs it knows no choice of backends. There, its own
    backends get a substitute that looks at the configuration: it gives flexdecode where the configuration says
    `CUSTOM`, and else what vLLM has.

    Raises:
        ImportError: there is no vLLM, or it is too old.
    """
    try:
        from vllm.platforms import current_platform
        from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
    except ImportError as error:
        raise ImportError("flexdecode.integrations.vllm needs vLLM 0.32 or later") from error

    register_backend(AttentionBackendEnum.CUSTOM, _BACKEND)
    if current_platform.is_cpu():
        for name in ("CPU_ATTN", "CPU_MLA", "AMX_MLA"):
            register_backend(AttentionBackendEnum[name], f"{_HERE}.on_cpu.{name}")


def chosen_backend(own: str, is_mla: bool) -> type[Any]:
    """The backend of a model that runs on a CPU: flexdecode's if the configuration says `CUSTOM`, else vLLM's own.

    Args:
        own: where vLLM has its own, `module.Class`.
        is_mla: whether layers keep latents.
    """
    from vllm.config import get_current_vllm_config
    from vllm.logger import init_logger
    from vllm.utils.import_utils import resolve_obj_by_qualname
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    config = get_current_vllm_config()
    if config.attention_config.backend is not AttentionBackendEnum.CUSTOM:
        if isinstance(config.additional_config, dict) and "flexdecode" in config.additional_config:
            init_logger("vllm.flexdecode").warning(
                "flexdecode: the additional config names mods, but without --attention-backend CUSTOM they do nothing"
            )
        return resolve_obj_by_qualname(own)
    return resolve_obj_by_qualname(f"{_HERE}.mla.FlexDecodeMLABackend" if is_mla else _BACKEND)
