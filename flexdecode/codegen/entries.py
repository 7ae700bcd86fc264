"""What the C helper has to know of a compiled kernel: its arguments, in the form that `launcher.c` reads."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType
from typing import Any

from ..ahead.folder import Entry
from ..errors import CompileError
from ..triton_api import triton_release
from .arguments import KernelSpec
from .compile import argument_types

# The characters of the C helper for Triton's types, and bytes of each.
CHARACTERS = {"i1": "b", "i8": "b", "u8": "b", "i16": "h", "i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
BYTES = {"P": 8, "b": 1, "h": 2, "i": 4, "l": 8, "f": 4, "d": 8, "T": 128}


def entry_of(compiled: Any, module: ModuleType, spec: KernelSpec, kernel: str, text: str) -> tuple[Entry, bytes]:
    """Describes a kernel that Triton compiled.

    Args:
        compiled: Triton's compiled kernel.
        module: that has it.
        spec: what it was compiled from.
        kernel: its name.
        text: the kernel in words.

    Returns:
        Its entry, with the name of the module as its source and no file of the machine code; and the machine code.

    Raises:
        CompileError: the C helper cannot launch it.
    """
    metadata = compiled.metadata
    names = [name for name in getattr(module, kernel).arg_names if not name.isupper()]
    form = "".join(form_of(kind) for kind in argument_types(spec, names).values())
    _check(compiled, form, kernel)
    entry = Entry(
        kernel,
        text,
        source=Path(str(module.__file__)).stem,
        form=form,
        num_threads=metadata.num_warps * metadata.target.warp_size,
        shared=metadata.shared,
        pdl=bool(getattr(metadata, "launch_pdl", False)),
        descriptors=list(getattr(metadata, "tensordesc_meta", None) or []),
        arguments=names,
    )
    return entry, compiled.asm["cubin" if metadata.target.backend == "cuda" else "hsaco"]


def _check(compiled: Any, form: str, kernel: str) -> None:
    """Makes sure that the C helper launches a kernel as Triton does.

    Raises:
        CompileError: the kernel needs what the C helper does not give, or takes other arguments.
    """
    metadata = compiled.metadata
    for name in ("global_scratch_size", "profile_scratch_size", "launch_cooperative_grid"):
        if getattr(metadata, name, 0):
            raise CompileError(f"{kernel} needs `{name}`, which folders of kernels do not support")
    if getattr(metadata, "num_ctas", 1) != 1:
        raise CompileError(f"{kernel} is launched in clusters, which folders of kernels do not support")
    expected = [BYTES[kind] for kind in form if kind in BYTES] + [8, 8]  # and two pointers to scratch memory
    found = parameter_bytes(compiled.asm)
    if found != expected:
        raise CompileError(
            f"Triton {triton_release()} gives {kernel} parameters of {found} bytes, and not {expected}: folders of "
            "kernels do not support this version"
        )


def form_of(kind: Any) -> str:
    """An argument of a kernel as the C helper reads it, from its Triton type.

    Raises:
        CompileError: the C helper cannot read such an argument.
    """
    if isinstance(kind, tuple):
        return f"({''.join(map(form_of, kind))})"
    if kind == "constexpr":
        return "x"
    if kind.startswith("*"):
        return "P"
    if kind.startswith("tensordesc<"):  # the descriptor, its shape and its strides
        return "Tiill"
    if kind not in CHARACTERS:
        raise CompileError(f"folders of kernels do not support arguments of the type {kind}")
    return CHARACTERS[kind]


def parameter_bytes(asm: Any) -> list[int]:
    """The sizes of the parameters of a compiled kernel."""
    if "ptx" in asm:
        head = asm["ptx"].split(".entry", 1)[1].split("{", 1)[0]
        found = re.findall(r"\.param(?:\s+\.align\s+\d+)?\s+\.[a-z]+(\d+)[^,\[\n]*(?:\[(\d+)\])?", head)
        return [int(bits) // 8 * int(count or 1) for bits, count in found]
    arguments = asm["amdgcn"].split(".args:", 1)[1].split(".group_segment", 1)[0]
    kinds = re.findall(r"\.size:\s+(\d+)\s+\.value_kind:\s+(\w+)", arguments)
    return [int(size) for size, kind in kinds if not kind.startswith("hidden")]
