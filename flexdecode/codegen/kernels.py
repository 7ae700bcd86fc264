"""Finds the compiled kernel for a spec and two graphs: in memory, from a module on disk, or newly generated."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..ahead import loaded
from ..ahead.folder import Entry
from ..ahead.loaded import HelperLaunch
from ..analysis.proven import ProvenMods
from ..call.device import DeviceFacts
from ..call.signature import Signature
from ..call.tiles import Tiles
from ..errors import CompileError, SharedMemoryError
from ..memos import counters, lock
from ..switch import check_allowed, is_forbidden
from ..triton_api import Launch, load_module, standalone_kernel
from . import store
from .arguments import PLACES, KernelSpec
from .background import Task, uncollected
from .binaries import Binary, binary_identity, find_binary, keep_binary, launch_of, start_tools
from .compile import argument_types, attributes, combine_block_dv, compile_pass, constants
from .identity import COMBINE, SPLIT, identity_of, signature_text, target_of
from .lower import lower, lower_bounds
from .template import generate, parameters_of, sources_digest, standalone


class Kernel:
    """The compiled first pass of one spec.

    Attributes:
        path: the generated module.
        run: `run(grid, stream, arguments)`; a `Launch` or a `HelperLaunch`, except in the interpreter.
    """

    def __init__(self, path: Path, run: Any) -> None:
        self.path = path
        self.run = run


class Combine:
    """The compiled second pass for some partial results.

    Attributes:
        run: as in `Kernel`.
        pick: picks its arguments from those of a first pass, except `SECOND_ARGUMENTS`.
        block_dv: output columns per program.
        of_small: whether it merges the rows of small tiles only.
    """

    def __init__(self, spec: KernelSpec, run: Any, names: list[str]) -> None:
        """`names`: of the parameters."""
        self.run = run
        self.pick = itemgetter(*[PLACES[n] for n in names if n in PLACES])
        self.block_dv = combine_block_dv(spec)
        self.of_small = spec.of_small


def second_module() -> ModuleType:
    """The module of the second pass."""
    return load_module(store.fixed_module(standalone("combine.py")))


def first_module(proven: ProvenMods, spec: KernelSpec) -> tuple[ModuleType, Path]:
    """The module of a first pass, and its file.

    Raises:
        CompileError: the installed Triton lacks what it imports.
    """
    path = module_path(proven, template_files(proven, spec.signature, spec.tiles))
    try:
        return load_module(path), path
    except ImportError as error:  # Gluon's names change between releases
        raise CompileError(f"{error}\n  source: {path}") from error


def _pass(module: ModuleType, spec: KernelSpec, facts: DeviceFacts, combine: bool) -> Any:
    known = constants(spec, facts, combine)
    if facts.backend == "cpu":
        function = module.decode_combine if combine else module.decode_split
        return lambda grid, _, arguments: function[grid](*arguments, **known)
    descriptors = 2 if spec.tiles.descriptors and not combine else 0
    return Launch(compile_pass(module, spec, facts, combine), len(known), descriptors)


def _gpu(spec: KernelSpec, facts: DeviceFacts) -> int | None:
    """The number of the GPU on which the C helper is to launch a kernel; None if Triton launches it."""
    device = spec.signature.device
    return device.index if facts.backend == "cuda" and device.type == "cuda" else None


def _machine_code(kernel: str, spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods | None) -> Binary | None:
    """The machine code of a kernel, from the disk or compiled; None if the C helper cannot launch it.

    It may run in any thread. It holds no lock, and loads nothing into a device.

    Raises:
        CompileError: it does not compile, or needs more shared memory than the device has.
    """
    if proven is None:
        text = f"{kernel}\n{_combine_key(spec, facts)}"  # many first passes share a second pass
    else:
        text = identity_of(kernel, spec, proven)
    identity = binary_identity(text, facts)
    found = find_binary(identity)
    if found is not None:
        counters.disk_hits += kernel == SPLIT
        return found
    from .entries import entry_of  # where kernels are found, it is not needed

    version = start_tools(facts)
    try:
        with uncollected:  # it would look at all modules of PyTorch and Triton several times
            module = second_module() if proven is None else first_module(proven, spec)[0]
            version.finish()
            compiled = compile_pass(module, spec, facts, kernel == COMBINE, _start_waiting)
    except SharedMemoryError as error:
        keep_binary(identity, Binary(Entry(kernel, "", refusal=(type(error).__name__, str(error))), b""))
        raise
    try:
        found = Binary(*entry_of(compiled, module, spec, kernel, ""))
    except CompileError:
        return None
    keep_binary(identity, found)
    return found


# These memos have no limit: a CUDA graph may launch any kernel, and Triton unloads a kernel that is collected.
_kernels: dict[tuple, Kernel] = {}
_combines: dict[tuple, Combine] = {}
_started: dict[tuple, Task[Binary | None]] = {}  # kernels that are being compiled, or will be, by the same keys


def find_kernel(spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods) -> Kernel:
    """The kernel for a spec and two mods: from memory, from a loaded folder, from the disk, or compiled.

    Raises:
        CompilationForbiddenError: it would have to be compiled, and that is forbidden.
    """
    key = (spec, facts, proven.text)
    task = _started.pop(key, None)
    if task is not None:
        task.finish()  # without the lock, which the task may need
    with lock:
        if key not in _kernels:
            launch = _find_loaded(SPLIT, spec, facts, proven)
            is_loaded = launch is not None
            if launch is None:
                _refuse_compilation(SPLIT, spec, facts)
                code = task.result if task is not None else lambda: _machine_code(SPLIT, spec, facts, proven)
                launch = _launch(_gpu(spec, facts), code)
            if launch is not None:
                _kernels[key] = Kernel(launch.source, launch)
            else:
                module, path = first_module(proven, spec)
                _kernels[key] = Kernel(path, _pass(module, spec, facts, combine=False))
            counters.compilations += not is_loaded
        return _kernels[key]


def _launch(device: int | None, machine_code: Callable[[], Binary | None]) -> HelperLaunch | None:
    """Launches machine code by the C helper; None if Triton has to do it."""
    binary = None if device is None else machine_code()
    return None if device is None or binary is None else launch_of(binary, device)


def find_combine(spec: KernelSpec, facts: DeviceFacts) -> Combine:
    """The second pass for the partial results of a spec. Specs that differ in other things share it.

    Raises:
        CompilationForbiddenError: as for `find_kernel`.
    """
    with lock:
        launch = _find_loaded(COMBINE, spec, facts, None)
        if launch is not None:
            return Combine(spec, launch, launch.entry.arguments)
        key = spec.signature.device, _combine_key(spec, facts)
        if key not in _combines:
            _refuse_compilation(COMBINE, spec, facts)
            task = _started.pop(key, None)
            code = task.result if task is not None else lambda: _machine_code(COMBINE, spec, facts, None)
            run: Any = _launch(_gpu(spec, facts), code)
            if run is None:
                run = _pass(second_module(), spec, facts, combine=True)
            _combines[key] = Combine(spec, run, _combine_names())
        return _combines[key]


def start_kernel(spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods) -> None:
    """Begins to compile a first pass in another thread, if it may be compiled. `find_kernel` waits for it."""
    key = spec, facts, proven.text
    task = _new_task(_kernels, key, spec, facts, lambda: _machine_code(SPLIT, spec, facts, proven))
    if task is not None:
        task.start()


def start_combine(spec: KernelSpec, facts: DeviceFacts) -> None:
    """Lets a second pass be compiled in another thread, if it may be compiled. `find_combine` waits for it.

    The thread begins when Triton has read a first pass (`_start_waiting`). If none has to be compiled, `find_combine`
    finds or compiles the second pass itself.
    """
    key = spec.signature.device, _combine_key(spec, facts)
    _new_task(_combines, key, spec, facts, lambda: _machine_code(COMBINE, spec, facts, None))


def _start_waiting(seconds: float) -> None:
    """Starts the tasks that have no thread, when Triton has read a kernel, which took some seconds.

    Two threads in Python take turns, so a second pass would keep the first one waiting, and it needs much less time.
    Triton needs Python again and again until LLVM begins. This takes about as long as to read, so the tasks wait.
    """
    if not is_forbidden():
        for task in list(_started.values()):
            task.start(delay=seconds)


def _new_task(
    known: dict[tuple, Any], key: tuple, spec: KernelSpec, facts: DeviceFacts, code: Callable[[], Binary | None]
) -> Task[Binary | None] | None:
    """A new task that compiles a kernel; None if the kernel is `known`, has a task or may not be compiled."""
    if _gpu(spec, facts) is None or is_forbidden() or loaded.any_folder():
        return None
    with lock:
        if key in known or key in _started:
            return None
        task = _started[key] = Task(code)
        return task


def _combine_names() -> list[str]:
    """The parameters of the second pass."""
    return list(parameters_of("combine.py", COMBINE))


def _combine_key(spec: KernelSpec, facts: DeviceFacts) -> tuple:
    """What a second pass is compiled from."""
    types = argument_types(spec, _combine_names())
    given, known = attributes(spec, types), constants(spec, facts, combine=True)
    return *known.items(), *types.items(), *map(str, given.items()), spec.fp_fusion, facts


def _find_loaded(kernel: str, spec: KernelSpec, facts: DeviceFacts, proven: ProvenMods | None) -> HelperLaunch | None:
    """A kernel of a loaded folder, on the device of the spec.

    Raises:
        CompileError: it did not compile when the folder was written.
    """
    if facts.backend == "cpu" or not loaded.any_folder():
        return None
    found = loaded.find(target_of(facts), identity_of(kernel, spec, proven))
    if found is None:
        return None
    folder, name = found
    with torch.cuda.device(spec.signature.device):
        launch = folder.launch(name, spec.signature.device.index)
    counters.loads += 1
    return launch


def _refuse_compilation(kernel: str, spec: KernelSpec, facts: DeviceFacts) -> None:
    """Raises if compilations are forbidden; Triton's interpreter compiles nothing."""
    if facts.backend != "cpu":
        remedy = (
            "Write it ahead of time with flexdecode.save_kernels(folder, ...), or prepare the call with "
            "flexdecode.warmup(...) before compilation is forbidden."
        )
        check_allowed(kernel, signature_text(kernel, spec, facts), remedy)


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
    _started.clear()
    standalone_kernel.cache_clear()
