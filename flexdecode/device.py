"""Facts of the devices at hand."""

from __future__ import annotations

import os

import torch

from .schedule import DeviceFacts

_facts: dict[torch.device, DeviceFacts] = {}


def interpreting() -> bool:
    """Whether Triton interprets kernels on the CPU (`TRITON_INTERPRET=1`)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def device_facts(device: torch.device) -> DeviceFacts:
    """Facts of a device, asked for once."""
    facts = _facts.get(device)
    if facts is None:
        facts = _facts[device] = _ask_device(device)
    return facts


def _ask_device(device: torch.device) -> DeviceFacts:
    if device.type != "cuda":
        if not interpreting():
            raise ValueError(
                f'`options.backend="triton"` needs CUDA tensors, got tensors on {device}; on a CPU use '
                'backend="torch", or set TRITON_INTERPRET=1 before Python starts'
            )
        return DeviceFacts("cpu", "interpreter", num_sms=4, shared_memory=227 * 1024)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        arch: int | str = properties.gcnArchName.split(":")[0]
        return DeviceFacts("hip", arch, properties.multi_processor_count, 64 * 1024)
    arch = properties.major * 10 + properties.minor
    shared_memory: int = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return DeviceFacts("cuda", arch, properties.multi_processor_count, shared_memory)
