"""Launches a compiled kernel: outputs, workspace, captured values and as little host work as possible."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from . import cache
from .descriptor import DescriptorMaker, Matrix
from .graph import Graph, Source
from .kernel import KernelSpec, capture_types, combine_block_dv, compile_pass, constants, load_module
from .lower import lower
from .schedule import DeviceFacts, Schedule
from .signature import Sizes
from .template import generate, templates_digest

_facts: dict[torch.device, DeviceFacts] = {}
_workspaces = threading.local()


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
    return DeviceFacts("cuda", arch, properties.multi_processor_count, properties.shared_memory_per_block_optin)


class Kernel:
    """The two compiled kernels of one spec.

    Attributes:
        path: the generated module.
        split, combine: run one pass: `run(grid, stream, arguments)`.
    """

    def __init__(self, module: ModuleType, path: Path, spec: KernelSpec, facts: DeviceFacts) -> None:
        self.path = path
        self.facts = facts
        self.split = self._pass(module, spec, combine=False)
        self.combine = self._pass(module, spec, combine=True) if spec.tiles.split else None

        self.combine_block_dv = combine_block_dv(spec.tiles)

    def _pass(self, module: ModuleType, spec: KernelSpec, combine: bool) -> Callable[[tuple, int, tuple], None]:
        known = constants(spec, self.facts, combine)
        if self.facts.backend == "cpu":
            function = module.decode_combine if combine else module.decode_split
            return lambda grid, _, arguments: function[grid](*arguments, **known)
        compiled = compile_pass(module, spec, self.facts, combine)
        run = compiled.run  # loads the machine code
        function, metadata, tail = compiled.function, compiled.packed_metadata, (None,) * len(known)

        def launch(grid: tuple, stream: int, arguments: tuple) -> None:
            run(grid[0], grid[1], 1, stream, function, metadata, None, None, None, *arguments, *tail)

        return launch


_kernels = cache.Bounded(limit=512)


def find_kernel(spec: KernelSpec, facts: DeviceFacts, score: Graph | None, mask: Graph | None) -> Kernel:
    """The kernel for a spec and two graphs: from memory, from a module on disk, or generated."""
    key = (spec, facts, score and score.text, mask and mask.text)
    kernel = _kernels.get(key)
    if kernel is None:
        with cache.lock:
            kernel = _kernels.get(key)
            if kernel is None:
                kernel = _build(spec, facts, score, mask)
                _kernels.add(key, kernel)
    return kernel


def _build(spec: KernelSpec, facts: DeviceFacts, score: Graph | None, mask: Graph | None) -> Kernel:
    q_idx_given = spec.signature.q_offset is not None
    identity = "\n".join([templates_digest(), f"q_offset {q_idx_given}", *(f"{g.text if g else None}" for g in (score, mask))])
    loads = "kv_descriptor.py" if spec.tiles.descriptors else None
    path = cache.stored_module(f"{loads}\n{identity}", lambda: generate_module(score, mask, q_idx_given, loads))
    kernel = Kernel(load_module(path), path, spec, facts)
    cache.counters.compilations += 1
    return kernel


def generate_module(
    score: Graph | None, mask: Graph | None, q_idx_given: bool = False, loads: str | None = None
) -> str:
    """The text of the module for two graphs; `loads` is a template file with other KV loads."""
    hooks = [lower(g, kind, q_idx_given) for g, kind in ((score, "score_mod"), (mask, "mask_mod")) if g is not None]
    return generate(hooks, loads)


def forget_kernels() -> None:
    _kernels.clear()
    _workspaces.__dict__.clear()


class CaptureReader:
    """Reads the current values of a graph's captures from the leaves of its mod, as kernel arguments."""

    def __init__(self, graph: Graph | None, pointers: bool) -> None:
        self.numbers = graph.numbers if graph else ()
        self.tensors = graph.tensors if graph else ()
        self.frozen = graph.frozen if graph else ()
        self.types = capture_types(graph)
        self.pointers = pointers

    def __call__(self, leaves: list) -> tuple:
        if not self.types:
            return ()
        values: list[Any] = [_number(source, leaves) for source in self.numbers]
        for leaf in self.tensors:
            tensor = leaves[leaf] if leaf >= 0 else self.frozen[-1 - leaf]
            values.append(tensor.data_ptr() if self.pointers else tensor)
            values += tensor.shape
            values += tensor.stride()
        return tuple(values)


def _number(source: Source, leaves: list) -> int | float:
    value = leaves[source.leaf]
    if source.dim >= 0:
        return value.shape[source.dim]
    return value.item() if isinstance(value, torch.Tensor) else value


def _addresses(values: tuple) -> tuple:
    """Replaces tensors by their addresses: the launcher takes numbers without asking the driver about them."""
    return tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in values)


class TritonLauncher:
    """Launches a call on tensors of one layout: everything but addresses and captured values is prepared."""

    def __init__(
        self,
        spec: KernelSpec,
        sizes: Sizes,
        cut: Schedule,
        strides: tuple[int, ...],
        matrices: tuple[Matrix | None, Matrix | None],
        facts: DeviceFacts,
        score: Graph | None,
        mask: Graph | None,
    ) -> None:
        self.kernel = find_kernel(spec, facts, score, mask)
        self.on_gpu = facts.backend != "cpu"
        self.read_score = CaptureReader(score, self.on_gpu)
        self.read_mask = CaptureReader(mask, self.on_gpu)
        signature = spec.signature
        self.describe = [
            DescriptorMaker(matrix, [spec.tiles.block_n, width], signature.dtype)
            for matrix, width in zip(matrices, (spec.tiles.block_d, spec.tiles.block_dv), strict=True)
            if spec.tiles.descriptors and matrix is not None
        ]
        num_q_heads = signature.group_size * sizes.num_kv_heads
        self.num_rows = sizes.batch * num_q_heads * signature.num_queries
        parts = self.num_rows * cut.num_splits if cut.tiles.split else 0
        self.lse_size = -(-parts // 4) * 4  # what follows starts at a multiple of 16 bytes
        self.workspace_size = self.lse_size + parts * signature.v_head_dim
        self.device = signature.device
        self.sizes = (sizes.num_kv_heads, sizes.max_kv_len, cut.num_splits)
        key_steps, value_steps = strides[4:6], strides[8:10]
        if spec.tiles.descriptors:
            assert matrices[0] is not None and matrices[1] is not None
            key_steps, value_steps = matrices[0].steps, matrices[1].steps
        self.strides = (*strides[:4], key_steps, *strides[6:8], value_steps, *strides[10:])
        self.combine_tail = (*strides[12:], num_q_heads, cut.num_splits)
        self.grid = (cut.num_items, cut.num_splits)
        self.combine_grid = (self.num_rows, -(-signature.v_head_dim // self.kernel.combine_block_dv))

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor | None,
        kv_lens: torch.Tensor | None,
        q_offset: int | torch.Tensor | None,
        score_leaves: list,
        mask_leaves: list,
        scale: float,
    ) -> None:
        """Launches both passes on the current stream; returns at once."""
        if self.on_gpu and torch.cuda.current_device() != self.device.index:
            with torch.cuda.device(self.device):
                self._launch(query, key, value, out, lse, kv_lens, q_offset, score_leaves, mask_leaves, scale)
        else:
            self._launch(query, key, value, out, lse, kv_lens, q_offset, score_leaves, mask_leaves, scale)

    def _launch(self, query, key, value, out, lse, kv_lens, q_offset, score_leaves, mask_leaves, scale) -> None:  # type: ignore[no-untyped-def]
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.on_gpu else 0
        partial_out = partial_lse = None
        if self.workspace_size:
            workspace = self._workspace(stream)
            partial_lse, partial_out = workspace, workspace[self.lse_size :] if not self.on_gpu else None
        inputs = (query, key, value)
        outputs = (out, lse, partial_out, partial_lse)
        lengths = (kv_lens, q_offset)
        descriptors: tuple = (None, None)
        if self.on_gpu:
            inputs, outputs, lengths = _addresses(inputs), _addresses(outputs), _addresses(lengths)
            if self.workspace_size:
                outputs = (*outputs[:2], outputs[3] + 4 * self.lse_size, outputs[3])
            if self.describe:
                descriptors = (self.describe[0](inputs[1]), self.describe[1](inputs[2]))
        captures = (self.read_score(score_leaves), self.read_mask(mask_leaves))
        self.kernel.split(self.grid, stream, (*inputs, *descriptors, *outputs, *lengths, *captures, scale, *self.strides, *self.sizes))
        if self.kernel.combine is not None:
            self.kernel.combine(self.combine_grid, stream, (*outputs, *self.combine_tail))

    def _workspace(self, stream: int) -> torch.Tensor:
        """Log-sum-exps and outputs of the partials, float32, kept for the next call on the same stream.

        Each thread has its own, because two threads may interleave their passes. While a CUDA graph is captured the
        memory comes from the graph's pool instead: it must live as long as the graph.
        """
        capturing = self.on_gpu and torch.cuda.is_current_stream_capturing()
        kept = None if capturing else _workspaces.__dict__.get((self.device, stream))
        if kept is None or kept.numel() < self.workspace_size:
            kept = torch.empty(self.workspace_size, dtype=torch.float32, device=self.device)
            if not capturing:
                _workspaces.__dict__[self.device, stream] = kept
        return kept
