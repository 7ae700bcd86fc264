"""Launches a compiled kernel with its workspace and captured values. The host does as little as possible."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

from ..analysis.proven import ProvenMods
from ..call.descriptor import make_descriptor
from ..call.device import may_keep_memory
from ..call.inputs import Inputs, Sizes
from ..call.schedule import PlannedLaunch
from ..codegen.arguments import ARGUMENTS, DESCRIPTORS, PLACES, SAME, WORKSPACE, Call, CaptureTypes, KernelSpec
from ..codegen.compile import capture_types
from ..codegen.kernels import Combine, Kernel
from ..frontend.graph import Graph
from ..frontend.ops import FLOAT8
from ..memos import Bounded

MAX_DESCRIBED = 1024  # pairs of caches of which a kernel keeps the descriptors: a model has one for each layer


class _Workspaces(threading.local):
    """The workspaces of each thread, by device and stream."""

    def __init__(self) -> None:
        self.kept: dict[tuple[torch.device, int], torch.Tensor] = {}


_workspaces = _Workspaces()


def forget_workspaces() -> None:
    """Frees the workspaces of this thread."""
    _workspaces.kept.clear()


class CaptureReader:
    """Reads the current values of a graph's captures from the leaves of its mod, as kernel arguments."""

    def __init__(self, graph: Graph | None, pointers: bool, types: CaptureTypes | None = None) -> None:
        self.numbers = graph.numbers if graph else ()
        self.tensors = graph.tensors if graph else ()
        self.frozen = graph.frozen if graph else ()
        self.types = capture_types(graph) if types is None else types
        self.pointers = pointers
        # The last frame, and the values for it. Those of numbers and addresses are read again, by their places.
        self.last: tuple[object, list] = None, []
        self.varying = [(place, source) for place, source in enumerate(self.numbers) if source.dim < 0]
        self.addresses: list[tuple[int, int]] = []
        place = len(self.numbers)
        for leaf, (_, rank) in zip(self.tensors, graph.tensor_types if graph else (), strict=True):
            self.addresses += [(place, leaf)] * (leaf >= 0)
            place += 1 + 2 * rank

    def __call__(self, leaves: list, frame: object = None) -> tuple:
        """Gives the `captures` argument of the kernel, in the order of `CaptureLayout`.

        Args:
            leaves: what the mod captures.
            frame: that of the mod.
        """
        if not self.types:
            return ()
        if frame is None or not self.pointers:
            return (*self._read(leaves),)
        last, known = self.last
        if frame is not last:
            known = self._read(leaves)
            self.last = frame, known
            return (*known,)
        values = known.copy()
        for place, source in self.varying:
            value = leaves[source[0]]
            is_float = value.__class__ is float  # of which nothing has to be checked
            values[place] = value if is_float else source.read(leaves)
        for place, leaf in self.addresses:
            values[place] = leaves[leaf].data_ptr()
        return (*values,)

    def _read(self, leaves: list) -> list:
        values: list[Any] = [source.read(leaves) for source in self.numbers]
        for leaf in self.tensors:
            tensor = leaves[leaf] if leaf >= 0 else self.frozen[-1 - leaf]
            if self.pointers:
                values.append(tensor.data_ptr())
            else:
                values.append(tensor.view(torch.uint8) if tensor.dtype in FLOAT8 else tensor)
            values += tensor.shape
            values += tensor.stride()
        return values


class LaunchForm:
    """What launches of one kernel have in common: which arguments there are, and how they are read.

    Attributes:
        at: gives what the kernel takes for a tensor: its address; in the interpreter, the tensor itself.
        inputs: the tensors that are read of the inputs of each call: places among the arguments, and in `Inputs`.
        results: those that a call writes: places among the arguments, and in `Call`.
        values: the other arguments that are read at each call: their places, and the functions that read them.
        listed: what `BlockLists.arguments` needs besides the number of heads.
        block_shape: keys of a block, and columns that a load of keys and of values reads.
        dtypes: as descriptors read keys and values.
        absent: a list of arguments with None or an empty tuple in each place.
        read_score, read_mask: read what the mods capture.
        described: by addresses of caches, their matrices and the launch arguments for the descriptors.
    """

    def __init__(self, kernel: Kernel, spec: KernelSpec, proven: ProvenMods, on_gpu: bool) -> None:
        self.kernel = kernel
        self.spec = spec
        self.on_gpu = on_gpu
        signature, tiles = spec.signature, spec.tiles
        self.listed = tiles.block_n, proven.listed, on_gpu, signature.kind("kv_offset") is not None
        self.format, self.packed, self.latent = signature.format, signature.packed, tiles.latent
        self.block_shape = tiles.block_n, tiles.key_columns, tiles.value_columns
        self.dtypes = (signature.key_dtype, signature.value_dtype) if not tiles.paired else (torch.int16, torch.int16)
        self.at = _address if on_gpu else _itself
        self.read_score = CaptureReader(proven.score, on_gpu, spec.score_captures)
        self.read_mask = CaptureReader(proven.mask, on_gpu, spec.mask_captures)
        types = [row.type(spec) for row in ARGUMENTS]
        self.absent: list = [() if kind == () else None for kind in types]
        asked = [(i, row) for i, row in enumerate(ARGUMENTS) if types[i]]
        tensors = [(i, row.tensor) for i, row in asked if row.tensor is not None]
        self.results = [(i, Call._fields.index(name)) for i, name in tensors if name in Call._fields]
        self.inputs = [(i, Inputs._fields.index(name)) for i, name in tensors if name not in Call._fields]
        self.values = [(i, row.value) for i, row in asked if row.value is not None]
        self.described = Bounded(limit=MAX_DESCRIBED)


Pick = Callable[[list], tuple]  # the arguments of a second pass, from those of a first pass


class FirstPass:
    """One launch of the first pass on tensors of one layout: everything but addresses and captured values is prepared.

    Attributes:
        form: of its kernel.
        chosen: its schedule.
        arguments: in the order of `ARGUMENTS`; what a call gives is still missing.
    """

    def __init__(self, form: LaunchForm, sizes: Sizes, launch: PlannedLaunch) -> None:
        self.form = form
        chosen, strides, matrices = launch
        # The kernel may have smaller tiles than were asked for.
        self.chosen = chosen if form.spec.tiles is chosen.tiles else chosen._replace(tiles=form.spec.tiles)
        self.grid = self.chosen.grid
        self.matrices = matrices
        steps = (strides[4:6], strides[8:10]) if matrices is None else (matrices[0].steps, matrices[1].steps)
        max_weight = max(1, (1 << 30) // max(chosen.num_items, 1))
        row_range = chosen.row_range if form.packed else ()
        self.arguments = form.absent.copy()
        self.arguments[SAME] = [
            *strides[:4], steps[0], *strides[6:8], steps[1], *strides[10:], *sizes[:4], row_range, chosen.num_splits, 0,
            max_weight,
        ]  # fmt: skip

    def begin_at(self, tile: int) -> None:
        """Sets where the partial results of the pass begin in the workspace: after so many of its tiles."""
        self.arguments[PLACES["first_place"]] = tile

    def fill(self, arguments: list, call: Call) -> None:
        """Writes the arguments that a call gives."""
        form, inputs = self.form, call.inputs
        if form.on_gpu:  # the launcher takes addresses as numbers without asking the driver about them
            for place, at in form.inputs:
                arguments[place] = inputs[at].data_ptr()  # type: ignore[union-attr]  # the form knows that it is there
            for place, at in form.results:
                arguments[place] = call[at].data_ptr()  # type: ignore[union-attr]
        else:
            for place, at in form.inputs:
                arguments[place] = inputs[at]
            for place, at in form.results:
                arguments[place] = call[at]
        for place, value in form.values:
            arguments[place] = value(self, call)

    def launch(self, call: Call, stream: int, workspace: tuple | None, pick: Pick | None = None) -> tuple | None:
        """Launches the pass. Returns those of its arguments that `pick` takes."""
        form = self.form
        arguments = self.arguments.copy()
        if workspace is not None:
            arguments[WORKSPACE] = workspace
        self.fill(arguments, call)
        picked = None if pick is None else pick(arguments)  # before each descriptor becomes several arguments
        if self.matrices is not None and form.on_gpu:
            arguments[DESCRIPTORS] = self.descriptors(arguments[PLACES["key"]], arguments[PLACES["value"]])
        form.kernel.run(self.grid, stream, arguments)
        return picked

    def descriptors(self, key: int, value: int) -> tuple:
        """The launch arguments for the descriptors of caches at two addresses. Those of many addresses are kept."""
        assert self.matrices is not None
        form = self.form
        addresses = key, key if form.latent else value
        matrices, described = form.described.get(addresses, (None, ()))
        if matrices != self.matrices:
            block_n, *widths = form.block_shape
            made = [
                make_descriptor(address, matrix, [block_n, width], dtype)
                for address, matrix, width, dtype in zip(addresses, self.matrices, widths, form.dtypes, strict=True)
            ]
            described = form.kernel.run.encode_descriptors(*made)
            form.described.add(addresses, (self.matrices, described))
        return described


class TritonLauncher:
    """Launches a call: its first passes, and the second pass if one of them has partial results."""

    def __init__(self, passes: Sequence[FirstPass], combine: Combine | None, sizes: Sizes) -> None:
        """`passes`: one, or two of which the second one has the larger tiles."""
        first, last = passes[0], passes[-1]
        self.first, self.large = first, [*passes[1:]]
        self.combine = combine
        self.pick = None if combine is None else combine.pick
        signature = first.form.spec.signature
        self.on_gpu = first.form.on_gpu
        self.placed: tuple[int, tuple] = 0, ()  # the last address of the workspace, and the argument for it
        self.device = signature.device
        self.is_one_of_several = self.on_gpu and torch.cuda.device_count() > 1
        self.large_splits = last.chosen.num_splits
        rows = [one.chosen.num_places * one.chosen.tiles.block_m for one in passes]
        self.num_rows = sum(rows)
        # Those of the larger tiles come first, so that all of them start at a whole number of tiles.
        first.begin_at((self.num_rows - rows[0]) // first.chosen.tiles.block_m)
        self.parts_size = 2 * first.chosen.num_items if first.chosen.tiles.balanced else 0
        # The workspace has largest scores, sums, parts of items and outputs. Each starts at a multiple of 16 bytes.
        self.sums_at = -(-self.num_rows // 4) * 4
        self.parts_at = 2 * self.sums_at
        self.outs_at = self.parts_at + -(-self.parts_size // 4) * 4
        self.workspace_size = self.outs_at + self.num_rows * signature.v_head_dim if combine else 0
        num_q_heads = signature.group_size * sizes.num_kv_heads
        if combine is not None:
            rows_of_query = (1 if signature.packed else sizes.batch) * sizes.num_queries * num_q_heads
            rows_of_small = sizes.batch * sizes.num_kv_heads * first.chosen.tiles.block_m
            rows_merged = rows_of_small if combine.of_small else rows_of_query
            self.grid = (rows_merged, -(-signature.v_head_dim // combine.block_dv))

    def __call__(self, call: Call) -> None:
        """Launches all passes on the current stream; returns at once."""
        if self.is_elsewhere():
            with torch.cuda.device(self.device):
                self._launch(call)
        else:
            self._launch(call)

    def is_elsewhere(self) -> bool:
        """Whether the current device is another one."""
        return self.is_one_of_several and torch.cuda.current_device() != self.device.index

    def _launch(self, call: Call) -> None:
        stream, memory, workspace = self.begin()  # the memory lives until all passes are launched
        picked = self.first.launch(call, stream, workspace, self.pick)
        for large in self.large:
            large.launch(call, stream, workspace)
        self.merge(picked, stream)
        del memory

    def begin(self) -> tuple[int, torch.Tensor | None, tuple | None]:
        """The current stream, the memory of the partial results, and the launch argument for it."""
        stream = torch._C._cuda_getCurrentRawStream(self.device.index) if self.on_gpu else 0
        memory = self._memory(stream) if self.workspace_size else None
        return stream, memory, None if memory is None else self._workspace(memory)

    def merge(self, picked: tuple | None, stream: int) -> None:
        """Launches the second pass, if there is one, with arguments that were picked from those of the first pass."""
        if self.combine is not None:
            assert picked is not None
            self.combine.run(self.grid, stream, (*picked, self.large_splits))

    def _memory(self, stream: int) -> torch.Tensor:
        """Memory of the partial results, float32. The next call on the stream reuses it.

        Each thread has its own, because two threads may interleave their passes. While a CUDA graph is captured, the
        memory comes from the graph's pool, because it must live as long as the graph.
        """
        keeps = may_keep_memory() and not (self.on_gpu and torch.cuda.is_current_stream_capturing())
        kept = _workspaces.kept.get((self.device, stream)) if keeps else None
        if kept is None or kept.numel() < self.workspace_size:
            kept = torch.empty(self.workspace_size, dtype=torch.float32, device=self.device)
            if keeps:
                _workspaces.kept[self.device, stream] = kept
        return kept

    def _workspace(self, memory: torch.Tensor) -> tuple:
        """The launch argument `workspace`: outputs, maxima, sums, parts of items."""
        at, has_parts = memory.data_ptr(), self.parts_size > 0
        if self.on_gpu:
            last, argument = self.placed
            if at != last:
                parts_at = at + 4 * self.parts_at if has_parts else None
                argument = at + 4 * self.outs_at, at, at + 4 * self.sums_at, parts_at
                self.placed = at, argument
            return argument
        parts = memory[self.parts_at :].view(torch.int32) if has_parts else None
        return memory[self.outs_at :], memory, memory[self.sums_at :], parts


def _address(value: Any) -> Any:
    return value.data_ptr() if isinstance(value, torch.Tensor) else value


def _itself(value: Any) -> Any:
    return value
