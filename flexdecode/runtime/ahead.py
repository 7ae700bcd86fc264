"""Prepares calls ahead of time: kernels in folders, and kernels in memory."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import NamedTuple

import torch

from ..ahead.folder import MANIFEST, Entry, MadeWith, add_to_folder, check_files, check_target, read_folder
from ..ahead.loaded import register
from ..call.device import DeviceFacts, check_architecture, device_facts, find_target, interpreting
from ..call.inputs import DEFAULT_OPTIONS, DecodeOptions
from ..call.signature import Aux
from ..codegen.identity import made_with
from ..codegen.kernels import find_combine, find_kernel
from .prepare import Prepared, Target, trace_call
from .request import Request
from .run import find_plan


class SavedKernel(NamedTuple):
    """A kernel in a folder.

    Attributes:
        kernel: `decode_split`, the first pass, or `decode_combine`, which merges the parts of a row.
        signature: what the kernel is for, in words.
        files: the machine code, and the generated module that it was compiled from. None if it did not compile, and
            another kernel takes its place.
        num_bytes: of the machine code.
        was_there: whether the folder had it already.
    """

    kernel: str
    signature: str
    files: tuple[Path, ...]
    num_bytes: int
    was_there: bool


class LoadedKernels(NamedTuple):
    """A folder that `load` registered.

    Attributes:
        folder: its place.
        num_kernels: kernels that calls can find in it.
        device: the architecture that they are for, such as `sm_90`.
        flexdecode, triton, system: versions and the kind of system that it was written with.
    """

    folder: Path
    num_kernels: int
    device: str
    flexdecode: str
    triton: str
    system: str

    def __repr__(self) -> str:
        kernels = "1 kernel" if self.num_kernels == 1 else f"{self.num_kernels} kernels"
        versions = f"flexdecode {self.flexdecode}, Triton {self.triton}, {self.system}"
        return f"<{kernels} for {self.device} in {self.folder} ({versions})>"


def save_request(
    folder: str | PathLike[str],
    request: Request,
    aux: Aux,
    options: DecodeOptions | None,
    device: str | DeviceFacts | None,
) -> list[SavedKernel]:
    """As `flexdecode.save_kernels`, for arguments that are already read."""
    from ..codegen.writer import Writer  # where kernels are only loaded, it is not needed

    options = _for_kernels(DEFAULT_OPTIONS if options is None else options)
    if interpreting():
        raise ValueError("TRITON_INTERPRET=1 replaces Triton's compiler: unset it to write a folder of kernels")
    facts = find_target(request.inputs.query.device, "triton", device).facts
    assert facts is not None
    check_architecture(facts)
    path = Path(folder).resolve()
    here = made_with(facts)
    known: dict[str, Entry] = {}
    has_launcher = (path / MANIFEST).exists()
    if has_launcher:
        found = read_folder(path, here)
        remedy = "write kernels for each architecture into a folder of its own"
        check_target(path, found.made_with, here, remedy)
        check_files(found)
        known = found.entries
    writer = Writer(facts, known, has_launcher)
    _prepare_shapes(request, aux, options, Target(facts, writer.find_kernel, writer.find_combine))
    add_to_folder(path, here, writer.entries, writer.files)
    return [_saved(path, name in known, entry) for name, entry in writer.entries.items()]


def _for_kernels(options: DecodeOptions) -> DecodeOptions:
    """The options of a call that launches kernels.

    Raises:
        ValueError: the torch backend is asked for.
    """
    if options.backend == "torch":
        raise ValueError('`options.backend="torch"` compiles nothing: leave it out to write a folder of kernels')
    return replace(options, backend="triton", autotune=False)  # they are written for GPUs that are not at hand


def _saved(path: Path, was_there: bool, entry: Entry) -> SavedKernel:
    files = () if entry.refusal else (path / entry.binary, path / entry.source)
    num_bytes = files[0].stat().st_size if files else 0
    return SavedKernel(entry.kernel, entry.signature, files, num_bytes, was_there)


def load(folder: str | PathLike[str]) -> LoadedKernels:
    """Registers a folder that `save_kernels` wrote: later calls find their kernels there, by graph and signature.

        >>> flexdecode.load("kernels")
        >>> flexdecode.forbid_compilation()
        >>> out = flexdecode.flex_decode(query, key, value, score_mod=alibi)

    A call that finds its kernels starts no compiler. Kernels that were compiled before stay in use. No source is
    executed: the generated modules in the folder are for people. Loading a folder again reads it again.

    Args:
        folder: its place. Every file is read and compared with its checksum.

    Returns:
        What was registered.

    Raises:
        KernelFolderError: there is no such folder; it is damaged; or it was written by another version of flexdecode
            or Triton, on another kind of system, or for another architecture than that of the current GPU. Without a
            GPU, the architecture is not compared.
        PermissionError: everybody can write to it, and code is loaded from it.
    """
    path = Path(folder).resolve()
    facts = _present_facts()
    here = made_with(facts or DeviceFacts("cuda", 0, 0, 0))
    found = read_folder(path, here)
    if facts is not None:
        check_target(path, found.made_with, here, "compile it again with flexdecode.save_kernels on or for this GPU")
    check_files(found)
    register(found)
    num_kernels = sum(entry.refusal is None for entry in found.entries.values())
    made: MadeWith = found.made_with
    return LoadedKernels(path, num_kernels, made.target, made.flexdecode, made.triton, made.system)


def _present_facts() -> DeviceFacts | None:
    """Facts about the current GPU; None if there is none."""
    if not torch.cuda.is_available():
        return None
    return device_facts(torch.device("cuda", torch.cuda.current_device()))


def warm_request(request: Request, aux: Aux, options: DecodeOptions | None) -> None:
    """As `flexdecode.warmup`, for arguments that are already read."""
    if not getattr(request.inputs.query, "is_meta", False):
        find_plan(request, aux, options)
        return
    options = DEFAULT_OPTIONS if options is None else options
    has_gpu = torch.cuda.is_available()
    place = torch.device("cuda", torch.cuda.current_device()) if has_gpu else torch.device("cpu")
    if has_gpu and options.backend is None:
        options = replace(options, backend="triton")
    target = None
    if options.backend == "triton":
        target = Target(device_facts(place), find_kernel, find_combine)
    _prepare_shapes(request, aux, options, target, place)


def _prepare_shapes(
    request: Request,
    aux: Aux,
    options: DecodeOptions,
    target: Target | None,
    place: torch.device | None = None,
) -> None:
    """Finds the kernels of a call. Only the shapes of its tensors matter.

    Args:
        request: the call; its captured tensors are read, and may be anywhere if it is on the meta device.
        aux: the numbers of rows that the call gives beside its output.
        options: how to execute it.
        target: where the kernels come from; None for the device of the tensors.
        place: the device of the kernels, if it is not that of the tensors.
    """
    captured = torch.device("cpu") if request.inputs.query.is_meta else None
    inputs = request.inputs.only_shapes()
    traced, mods = trace_call(inputs, (request.score, request.mask), aux, options, request.listed, captured)
    if place is not None:
        traced = replace(traced, signature=replace(traced.signature, device=place))
    Prepared(traced, inputs, mods, aux, target).plan(inputs, mods)
