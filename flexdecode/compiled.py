"""Compiled kernels by spec and graphs: found in memory, made of a module on disk, or generated."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from . import cache
from .errors import CompileError
from .kernel import KernelSpec, combine_block_dv, compile_pass, constants
from .lower import lower, lower_bounds
from .program import Program
from .schedule import DeviceFacts
from .template import generate, sources_digest
from .triton_api import Launch, forget_standalone, load_module


class Kernel:
    """The two compiled kernels of one spec.

    Attributes:
        path: the generated module.
        split, combine: run one pass: `run(grid, stream, arguments)`.
        combine_block_dv: output columns per program of the combine pass.
        encode_descriptors: makes launch arguments of Triton's two tensor descriptors; see `Launch`.
    """

    def __init__(self, module: ModuleType, path: Path, spec: KernelSpec, facts: DeviceFacts) -> None:
        self.path = path
        self.facts = facts
        self.encode_descriptors: Callable[[object, object], tuple] = lambda key, value: (key, value)
        self.split = self._pass(module, spec, combine=False)
        self.combine = self._pass(module, spec, combine=True) if spec.tiles.split else None
        self.combine_block_dv = combine_block_dv(spec.tiles)

    def _pass(self, module: ModuleType, spec: KernelSpec, combine: bool) -> Callable[[tuple, int, tuple], None]:
        known = constants(spec, self.facts, combine)
        if self.facts.backend == "cpu":
            function = module.decode_combine if combine else module.decode_split
            return lambda grid, _, arguments: function[grid](*arguments, **known)
        descriptors = 2 if spec.tiles.descriptors and not combine else 0
        launch = Launch(compile_pass(module, spec, self.facts, combine), len(known), descriptors)
        if descriptors:
            self.encode_descriptors = launch.encode_descriptors
        return launch


# Kernels are not forgotten to make room: a CUDA graph may launch one, and Triton unloads what is collected.
_kernels: dict[tuple, Kernel] = {}


def find_kernel(spec: KernelSpec, facts: DeviceFacts, program: Program) -> Kernel:
    """The kernel for a spec and two mods: from memory, from a module on disk, or generated."""
    key = (spec, facts, program.text)
    kernel = _kernels.get(key)
    if kernel is None:
        with cache.lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _build(spec, facts, program)
                _kernels[key] = kernel
    return kernel


def _build(spec: KernelSpec, facts: DeviceFacts, program: Program) -> Kernel:
    path = module_path(program, spec.tiles.descriptors, spec.signature.page_size > 0, spec.tiles.latent)
    try:
        module = load_module(path)
    except ImportError as error:  # Gluon's names change
        raise CompileError(f"{error}\n  source: {path}") from error
    kernel = Kernel(module, path, spec, facts)
    cache.counters.compilations += 1
    return kernel


def module_path(program: Program, descriptors: bool, paged: bool = False, latent: bool = False) -> Path:
    """The file of the module for two mods, found on disk or written there."""
    identity = f"descriptors {descriptors}, paged {paged}, latent {latent}\n{sources_digest()}\n{program.text}"
    return cache.stored_module(identity, lambda: generate_module(program, descriptors, paged, latent))


def generate_module(program: Program, descriptors: bool = False, paged: bool = False, latent: bool = False) -> str:
    """The text of the module for two mods; with `descriptors`, K and V are loaded through tensor descriptors."""
    hooks = [lower_bounds(program)]
    for kind, graph, checks in (
        ("score_mod", program.score, program.score_checks),
        ("mask_mod", program.mask, program.mask_checks),
    ):
        if graph is not None:
            hooks.append(lower(graph, kind, program.q_idx_given, checks))
    files = {
        "kv_descriptor.py": descriptors and not paged,
        "kv_paged.py": paged,
        "kv_paged_descriptor.py": descriptors and paged,
        "block_lists.py": program.block_lists,
        "latent.py": latent,
    }
    text = generate(hooks, [name for name, wanted in files.items() if wanted])
    if latent:  # The first pass is Gluon, which has functions of its own that make tensors.
        first, second = text.split("def decode_combine(")
        text = re.sub(r"\btl\.(arange|full|zeros|zeros_like)\(", r"gl.\1(", first) + "def decode_combine(" + second
    return text


def forget_kernels() -> None:
    """Drops every kernel in memory, those that append and merge too."""
    _kernels.clear()
    forget_standalone()
