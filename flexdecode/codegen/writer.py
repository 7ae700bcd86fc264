"""Compiles kernels for a folder, instead of for a device of this machine."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..ahead.folder import LAUNCHER, Entry
from ..ahead.helper import build_launcher
from ..ahead.loaded import hash_of
from ..analysis.proven import ProvenMods
from ..call.device import DeviceFacts
from ..errors import CompilationForbiddenError, CompileError
from ..switch import check_allowed
from .arguments import KernelSpec
from .compile import compile_pass
from .entries import entry_of
from .identity import COMBINE, SPLIT, identity_of, signature_text
from .kernels import Combine, Kernel, first_module, second_module

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
        compiled = compile_pass(module, spec, self.facts, kernel == COMBINE)
        entry, image = entry_of(compiled, module, spec, kernel, text)
        source = Path(module.__file__).read_bytes()
        suffix = "cubin" if self.facts.backend == "cuda" else "hsaco"
        binary, text_file = f"kernels/{_digest(image)}.{suffix}", f"sources/{_digest(source)}.py"
        self.files |= {binary: image, text_file: source}
        return replace(entry, binary=binary, source=text_file)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]
