"""Compiles kernels for a folder, instead of for a device of this machine."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import Any

from ..ahead.folder import LAUNCHER, Entry
from ..ahead.helper import build_launcher
from ..ahead.loaded import hash_of
from ..analysis.proven import ProvenMods
from ..call.device import DeviceFacts
from ..errors import CompilationForbiddenError, CompileError
from ..switch import check_allowed
from ..triton_api import triton_release
from .arguments import KernelSpec
from .compile import argument_types, compile_pass, shared_memory
from .identity import COMBINE, SPLIT, identity_of, signature_text
from .kernels import Combine, Kernel, first_module, second_module

# The characters of the C helper for Triton's types, and bytes of each.
CHARACTERS = {"i1": "b", "i8": "b", "u8": "b", "i16": "h", "i32": "i", "i64": "l", "fp32": "f", "fp64": "d"}
BYTES = {"P": 8, "b": 1, "h": 2, "i": 4, "l": 8, "f": 4, "d": 8, "T": 128}
_REMEDY = "Call flexdecode.allow_compilation() to write a folder."


class Writer:
    """Takes the place of `find_kernel` and `find_combine`: it compiles, and nothing can be launched.

    Attributes:
        entries: what a call needs, by name in the manifest.
        files: what belongs to the kernels that were not known.
    """

    def __init__(self, facts: DeviceFacts, known: dict[str, Entry], has_launcher: bool) -> None:
        """`known`: kernels that the folder has already."""
        self.facts, self.known = facts, known
        self.entries: dict[str, Entry] = {}
        self.files: dict[str, bytes] = {} if has_launcher else {LAUNCHER: build_launcher()}

    def find_kernel(self, spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods) -> Kernel:
        """Compiles a first pass.

        Raises:
            CompileError: it did not compile. The folder remembers it, because another kernel may take its place.
        """
        name = hash_of(identity_of(SPLIT, spec, proven))
        entry = self.known.get(name)
        if entry is None:
            text = signature_text(SPLIT, spec, facts)
            check_allowed(SPLIT, text, _REMEDY)
            try:
                module, _ = first_module(proven, spec)
                entry = self._compile(module, spec, SPLIT, text)
            except CompilationForbiddenError:
                raise
            except CompileError as error:
                self.entries[name] = Entry(SPLIT, text, (type(error).__name__, str(error)))
                raise
        self.entries[name] = entry
        entry.check()
        return Kernel(Path(entry.source), None)

    def find_combine(self, spec: KernelSpec, facts: DeviceFacts) -> Combine:
        """Compiles a second pass.

        Raises:
            CompileError: it did not compile.
        """
        name = hash_of(identity_of(COMBINE, spec, None))
        entry = self.known.get(name)
        if entry is None:
            text = signature_text(COMBINE, spec, facts)
            check_allowed(COMBINE, text, _REMEDY)
            entry = self._compile(second_module(), spec, COMBINE, text)
        self.entries[name] = entry
        return Combine(spec, None, entry.arguments)

    def _compile(self, module: Any, spec: KernelSpec, kernel: str, text: str) -> Entry:
        is_second = kernel == COMBINE
        compiled = compile_pass(module, spec, self.facts, is_second)
        metadata = compiled.metadata
        names = [name for name in getattr(module, kernel).arg_names if not name.isupper()]
        types = argument_types(spec, names)
        form = "".join(form_of(kind) for kind in types.values())
        suffix = "cubin" if self.facts.backend == "cuda" else "hsaco"
        image = compiled.asm[suffix]
        source = Path(module.__file__).read_bytes()
        self._check(compiled, form, kernel)
        binary, text_file = f"kernels/{_digest(image)}.{suffix}", f"sources/{_digest(source)}.py"
        self.files |= {binary: image, text_file: source}
        return Entry(
            kernel,
            text,
            None,
            binary,
            text_file,
            form,
            metadata.num_warps * metadata.target.warp_size,
            shared_memory(compiled, spec, self.facts, is_second),
            bool(getattr(metadata, "launch_pdl", False)),
            list(getattr(metadata, "tensordesc_meta", None) or []),
            names,
        )

    def _check(self, compiled: Any, form: str, kernel: str) -> None:
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


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
