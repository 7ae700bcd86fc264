"""Finds the compiled kernel for a spec and two graphs: in memory, from a module on disk, or newly generated."""

from __future__ import annotations

from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

from ..analysis.proven import ProvenMods
from ..call.device import DeviceFacts
from ..call.signature import Signature
from ..call.tiles import Tiles
from ..errors import CompileError
from ..memos import counters, lock
from ..triton_api import Launch, load_module, standalone_kernel
from . import store
from .arguments import PLACES, KernelSpec
from .compile import argument_types, attributes, combine_block_dv, compile_pass, constants
from .lower import lower, lower_bounds
from .template import generate, sources_digest, standalone


class Kernel:
    """The compiled first pass of one spec.

    Attributes:
        path: the generated module.
        run: `run(grid, stream, arguments)`; a `Launch`, except in the interpreter.
    """

    def __init__(self, module: ModuleType, path: Path, spec: KernelSpec, facts: DeviceFacts) -> None:
        self.path = path
        self.run = _pass(module, spec, facts, combine=False)


class Combine:
    """The compiled second pass for some partial results.

    Attributes:
        run: as in `Kernel`.
        pick: picks its arguments from those of a first pass, except `SECOND_ARGUMENTS`.
        block_dv: output columns per program.
        of_small: whether it merges the rows of small tiles only.
    """

    def __init__(self, spec: KernelSpec, facts: DeviceFacts) -> None:
        module = _second_module()
        self.run = _pass(module, spec, facts, combine=True)
        self.pick = itemgetter(*[PLACES[n] for n in module.decode_combine.arg_names if n in PLACES])
        self.block_dv = combine_block_dv(spec)
        self.of_small = spec.of_small


def _second_module() -> ModuleType:
    return load_module(store.fixed_module(standalone("combine.py")))


def _pass(module: ModuleType, spec: KernelSpec, facts: DeviceFacts, combine: bool) -> Any:
    known = constants(spec, facts, combine)
    if facts.backend == "cpu":
        function = module.decode_combine if combine else module.decode_split
        return lambda grid, _, arguments: function[grid](*arguments, **known)
    descriptors = 2 if spec.tiles.descriptors and not combine else 0
    return Launch(compile_pass(module, spec, facts, combine), len(known), descriptors)


# These memos have no limit: a CUDA graph may launch any kernel, and Triton unloads a kernel that is collected.
_kernels: dict[tuple, Kernel] = {}
_combines: dict[tuple, Combine] = {}


def find_kernel(spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods) -> Kernel:
    """The kernel for a spec and two mods: from memory, from a module on disk, or generated."""
    key = (spec, facts, proven.text)
    with lock:
        if key not in _kernels:
            path = module_path(proven, template_files(proven, spec.signature, spec.tiles))
            try:
                module = load_module(path)
            except ImportError as error:  # Gluon's names change between releases
                raise CompileError(f"{error}\n  source: {path}") from error
            _kernels[key] = Kernel(module, path, spec, facts)
            counters.compilations += 1
        return _kernels[key]


def find_combine(spec: KernelSpec, facts: DeviceFacts) -> Combine:
    """The second pass for the partial results of a spec. Specs that differ in other things share it."""
    types = argument_types(spec, _second_module().decode_combine.arg_names)
    given = attributes(spec, types)
    key = *constants(spec, facts, combine=True).items(), *types.items(), *map(str, given.items()), spec.fp_fusion, facts
    with lock:
        if key not in _combines:
            _combines[key] = Combine(spec, facts)
        return _combines[key]


def template_files(proven: ProvenMods, signature: Signature, tiles: Tiles) -> tuple[str, ...]:
    """The template files whose functions take the place of those of `decode.py`; the later ones win."""
    lists = ("block_lists.py",) if proven.block_lists else ()
    balanced = ("balanced.py",) if tiles.balanced else ()
    return (*lists, *balanced, *signature.format.templates, *tiles.loads.value)


def module_path(proven: ProvenMods, files: tuple[str, ...]) -> Path:
    """Finds the file of the module for two mods and some `template_files` on disk, or writes it."""
    identity = f"{files}\n{sources_digest()}\n{proven.text}"
    return store.stored_module(identity, lambda: generate_module(proven, files))


def generate_module(proven: ProvenMods, files: tuple[str, ...] = ()) -> str:
    """The text of the module for two mods and some `template_files`."""
    hooks = [lower_bounds(proven)]
    for kind, graph, checks in (
        ("score_mod", proven.score, proven.score_checks),
        ("mask_mod", proven.mask, proven.mask_checks),
    ):
        if graph is not None:
            hooks.append(lower(graph, kind, proven.q_idx_given, checks, proven.shifted))
    return generate(hooks, files)


def forget_kernels() -> None:
    """Drops every kernel in memory, also those for `append` and `merge_attention`."""
    _kernels.clear()
    _combines.clear()
    standalone_kernel.cache_clear()
