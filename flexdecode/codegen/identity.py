"""What identifies a kernel in every process: its text, and what it is compiled from besides."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

from ..ahead.folder import MadeWith
from ..ahead.helper import system
from ..analysis.proven import ProvenMods
from ..call.device import DeviceFacts
from ..call.signature import NUMBER, OPTIONAL, Signature
from ..triton_api import triton_release
from ..version import __version__
from .arguments import KernelSpec
from .template import sources_digest

SPLIT, COMBINE = "decode_split", "decode_combine"  # names of the kernels of both passes


def made_with(facts: DeviceFacts) -> MadeWith:
    """What a folder of kernels for a device has to be made with, to be used by this installation."""
    return MadeWith(__version__, sources_digest(), triton_release(), system(), facts.backend, facts.arch)


def target_of(facts: DeviceFacts) -> tuple[str, int | str]:
    """The part of the facts that decides which machine code runs."""
    return facts.backend, facts.arch


def identity_of(kernel: str, spec: KernelSpec, proven: ProvenMods | None) -> str:
    """The text that identifies a kernel for one architecture and one version of the library.

    Args:
        kernel: `SPLIT` or `COMBINE`.
        spec: of the kernel. Its device does not matter.
        proven: the mods of a first pass; None for a second pass, which does not depend on them.
    """
    if proven is None:
        spec = replace(spec, score_captures=(), mask_captures=(), num_live=0, num_full=0, unbounded=True)
        spec = replace(spec, block_lists=False)
    signature = plain(spec.signature, without=("device", "format"))
    signature["format"] = type(spec.signature.format).__name__
    others = plain(spec, without=("signature",))
    return f"{kernel}\n{signature}\n{others}\n{proven.text if proven is not None else ''}"


def plain(record: Any, without: tuple[str, ...]) -> dict[str, str]:
    """The fields of a dataclass as text."""
    return {f.name: repr(getattr(record, f.name)) for f in fields(record) if f.name not in without}


def signature_text(kernel: str, spec: KernelSpec, facts: DeviceFacts) -> str:
    """A kernel in one line, for people."""
    signature, tiles = spec.signature, spec.tiles
    target = f"sm_{facts.arch}" if facts.backend == "cuda" else str(facts.arch)
    caches = {_short(signature.key_dtype): "", _short(signature.value_dtype): ""}
    parts = [
        f"{kernel} for {target}",
        f"query {_short(signature.dtype)}",
        f"cache {' and '.join(caches)}",
        f"D {signature.head_dim}, Dv {signature.v_head_dim}",
        f"{signature.group_size} query heads per KV head",
        "one query token" if signature.one_token else "several query tokens",
        *_optional(signature),
        *([f"pages of {signature.page_size}"] if signature.page_size else []),
        *_of_mods(kernel, spec),
        *(name for name, asked in signature.aux._asdict().items() if asked),
        *([] if signature.aligned else ["not aligned"]),
        f"strides {signature.strides}",
        f"tiles of {tiles.block_m} rows and {tiles.block_n} keys, {tiles.loads!r}",
        *(name for name in ("split", "balanced", "shared", "paired") if getattr(tiles, name)),
    ]
    return ", ".join(parts)


def _of_mods(kernel: str, spec: KernelSpec) -> list[str]:
    """What a first pass is specialised to in its mods."""
    if kernel == COMBINE:
        return []
    captures = {"score_mod": spec.score_captures, "mask_mod": spec.mask_captures}
    found = [f"{name} captures {', '.join(types)}" for name, types in captures.items() if types]
    return [*found, *(["a BlockMask"] if spec.block_lists else [])]


def _short(dtype: Any) -> str:
    return str(dtype).removeprefix("torch.")


def _optional(signature: Signature) -> list[str]:
    """The arguments that a call may lack."""
    found = []
    for name, kind in zip(OPTIONAL, signature.kinds, strict=True):
        if kind is not None:
            is_number = kind == NUMBER or kind[0] is None
            found.append(f"{name} a number" if is_number else f"{name} {_short(kind[0])} of rank {kind[1]}")
    return found
