"""A prepared call: everything that stays the same while mods, shapes, strides and options do."""

from __future__ import annotations

import copy
import math
import warnings
from dataclasses import replace
from math import gcd
from typing import TYPE_CHECKING, Any, Protocol

import torch

from . import eager
from .analyze import MAX_KV_LEN
from .arguments import Call, KernelSpec
from .block_mask import BlockLists
from .captures import leaf_names
from .compiled import Kernel, find_kernel
from .descriptor import Matrix, as_matrices, as_matrix
from .device import device_facts, without_autocast
from .errors import CompileError, FlexDecodeError, IndexRangeError, SharedMemoryError
from .graph import Graph
from .identity import Mod, constants_of, graph_of, watch
from .inputs import (
    DEFAULT_OPTIONS,
    DecodeOptions,
    Inputs,
    Sizes,
    check_all_lens,
    check_inputs,
    checked_scale,
)
from .kernel import capture_types, rounds_to_half
from .launch import TritonLauncher
from .overlap import extent, share_memory
from .program import Program
from .proofs import CallSizes, Checks, depends_on_length, find_checks, integers
from .schedule import DeviceFacts, Schedule, Tiles, has_latent_kernel, next_power_of_2, schedule, smaller
from .signature import Signature, all_strides, describe, packed

if TYPE_CHECKING:
    from .printing import Names


MAX_APART = 256  # distances that a plan remembers


def layout(tensor: object) -> object:
    """What a plan depends on in a tensor: all but its contents."""
    if not isinstance(tensor, torch.Tensor):
        return tensor if tensor is None else type(tensor)
    place = tensor.data_ptr() & 15 if tensor.layout == torch.strided else None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, place, tensor.requires_grad


def any_length(key: Any, value: Any, table: Any, k_scale: Any, v_scale: Any, kv_lens: int | None) -> tuple | None:
    """What a `Prepared` depends on in key, value, page table and scales: their layout without N and multiples of it.

    None where that cannot be said: wrong arguments, and caches without a key.

    Args:
        key: its `layout`, like all that follows except `kv_lens`.
        value: of the values.
        table: of the page table.
        k_scale: of the scales of keys.
        v_scale: of the scales of values.
        kv_lens: the length of all sequences, if it is a number.
    """
    if not (key.__class__ is value.__class__ is tuple and len(key[0]) == len(value[0]) == 4):
        return None
    shape, steps, place = key[0], key[1], key[4]
    capacity = shape[2]
    if table is not None:
        capacity *= table[0][1] if table.__class__ is tuple and len(table[0]) == 2 else 0
    if not 0 < (capacity if kv_lens is None else kv_lens) <= capacity < MAX_KV_LEN or None in (place, value[4]):
        return None
    if table is not None:
        return (table[0][0], table[1][1] == 1, *table[2:]), key, value, k_scale, v_scale
    # Scales per token have the shape of the keys.
    scales = [(x[0] == shape[:3], x[2:]) if x.__class__ is tuple and len(x[0]) == 3 else x for x in (k_scale, v_scale)]
    same = shape[2] == value[0][2], steps == value[1]
    return *_without_length(key), *_without_length(value), *same, *scales


def _without_length(layout: tuple) -> tuple:
    (batch, heads, _, width), (b, h, n, d), *rest = layout
    return batch, heads, width, gcd(b, 16), gcd(h, 16), gcd(n, 16), d == 1 or gcd(d, 16), *rest


class Launcher(Protocol):
    """Runs one call on given outputs."""

    def __call__(self, call: Call) -> None:
        """Writes `call.out` [B, Hq, Q, Dv] and, unless it is None, `call.lse` [B, Hq, Q]."""
        ...


class EagerLauncher:
    """Runs the traced graphs in PyTorch operations."""

    def __init__(self, graphs: tuple[Graph | None, Graph | None], names: tuple[Names | None, ...] | None) -> None:
        """Names of what the graphs capture are given where indices shall be checked."""
        self.graphs = graphs
        self.names = names

    def __call__(self, call: Call) -> None:
        """As in `Launcher`; the mask says all that lists say."""
        score, mask = (self.graphs[0], call.score_leaves), (self.graphs[1], call.mask_leaves)
        try:
            with without_autocast():
                eager.decode(call.inputs, call.out, call.lse, score, mask, call.scale, self.names is not None)
        except IndexRangeError as error:
            raise FlexDecodeError(self._named(error)) from None

    def _named(self, error: IndexRangeError) -> str:
        """An index out of range in the user's own names."""
        from .printing import formula

        kind = "score_mod" if error.graph is self.graphs[0] else "mask_mod"
        names = self.names[kind == "mask_mod"] if self.names else None
        assert names is not None
        text = f"{kind} reads `{formula(error.load, names)}` out of range: {error.found}"
        return f"{text}\n  Clamp the index, or let the mask rule the pair out."


def _names(graphs: tuple[Graph | None, Graph | None], mods: tuple[Mod, Mod]) -> tuple[Names | None, ...]:
    """What the graphs capture, in the user's names: strings, so that nothing is kept alive."""
    from .printing import name_captures

    return tuple(
        None
        if graph is None or mod.function is None
        else name_captures(graph, leaf_names(mod.function, mod.followed), constants_of(kind, mod))
        for kind, graph, mod in zip(("score_mod", "mask_mod"), graphs, mods, strict=True)
    )


class Plan:
    """Allocates the outputs of a call and runs it."""

    def __init__(
        self, launcher: Launcher, checker: Launcher | None, inputs: Inputs, return_lse: bool, options: DecodeOptions
    ) -> None:
        self.launcher = launcher
        self.checker = checker
        self.out_shape = inputs.out_shape
        self.default_scale = 1.0 / math.sqrt(inputs.query.shape[3])
        self.return_lse = return_lse
        self.checks_lens = options.debug or inputs.query.device.type == "cpu"
        self.options = options
        self.empty = 0 in self.out_shape
        self.loose = [  # what the kernels want contiguous
            name
            for name in ("kv_lens", "q_lens", "q_offset", "sinks", "page_table")
            if isinstance(tensor := getattr(inputs, name), torch.Tensor) and tensor.stride(-1) != 1
        ]
        scales = ("k_scale", inputs.k_scale), ("v_scale", inputs.v_scale)
        self.number_scales = [n for n, x in scales if x is not None and not isinstance(x, torch.Tensor)]

        self.extents: list[tuple[int, int]] = []  # place among the inputs, and bytes, of each tensor that is read
        self.apart: set[tuple[int, int]] = set()  # places and distances from `out` at which they share no memory

    def launched_by(self, launcher: Launcher) -> Plan:
        """The same plan for another length."""
        other = copy.copy(self)
        other.launcher, other.extents, other.apart = launcher, [], set()
        return other

    def check_out(self, inputs: Inputs, out: torch.Tensor) -> None:
        """Refuses an `out` that is written over what is read.

        Raises:
            ValueError: it shares memory with an input.
        """
        if not self.extents:
            read = [(place, x) for place, x in enumerate(inputs[:-1]) if isinstance(x, torch.Tensor)]
            self.extents = [(place, extent(x)) for place, x in read] + [(len(inputs) - 1, extent(out))]
        start = out.data_ptr()
        end = start + self.extents[-1][1]
        for place, size in self.extents[:-1]:
            at = inputs[place].data_ptr()  # type: ignore[union-attr]
            if at < end and start < at + size and (place, at - start) not in self.apart:
                if share_memory(out, inputs[place]):  # type: ignore[arg-type]
                    name = inputs._fields[place]
                    raise ValueError(f"`out` must not share memory with `{name}`: it is written while `{name}` is read")
                if len(self.apart) >= MAX_APART:
                    self.apart.clear()
                self.apart.add((place, at - start))

    def run(
        self, inputs: Inputs, score_leaves: list, mask_leaves: list, lists: BlockLists | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Runs the call on tensors of the layout that the plan was made for."""
        out = inputs.query.new_empty(self.out_shape) if inputs.out is None else inputs.out
        lse = inputs.query.new_empty(self.out_shape[:3], dtype=torch.float32) if self.return_lse else None
        if inputs.out is not None:
            self.check_out(inputs, out)
            check_captured_out(out, score_leaves, mask_leaves)
        if self.checks_lens:
            check_all_lens(inputs, self.options)
        if not self.empty:
            scale = self.default_scale if inputs.scale is None else checked_scale(inputs.scale)
            if self.number_scales:
                numbers: dict[str, Any] = {
                    name: checked_scale(getattr(inputs, name), name) for name in self.number_scales
                }
                inputs = inputs._replace(**numbers)
            if self.loose:
                inputs = inputs._replace(**{name: getattr(inputs, name).contiguous() for name in self.loose})
            if self.checker is not None:
                self.checker(Call(inputs, torch.empty_like(out), None, score_leaves, mask_leaves, scale))
            self.launcher(Call(inputs, out, lse, score_leaves, mask_leaves, scale, lists))
        return out if lse is None else (out, lse)


def check_captured_out(out: torch.Tensor, score_leaves: list, mask_leaves: list) -> None:
    """Refuses an `out` that is written over a tensor that a mod captures.

    Raises:
        ValueError: it shares memory with one.
    """
    start, size = out.data_ptr(), extent(out)
    for kind, leaves in (("score_mod", score_leaves), ("mask_mod", mask_leaves)):
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.device != out.device:
                continue
            if leaf.data_ptr() < start + size and start < leaf.data_ptr() + extent(leaf) and share_memory(out, leaf):
                raise ValueError(
                    f"`out` must not share memory with a tensor that {kind} captures: it is written while that is read"
                )


class Prepared:
    """A checked and traced call with a cache of any length: calls that differ in nothing else share it.

    A cache that grows by `torch.cat` has another N, and with it other strides, for every token. `plan` does what
    depends on them: which indices are in range, the numbers of the schedule, and what is launched.
    """

    def __init__(
        self,
        inputs: Inputs,
        graphs: tuple[Graph | None, Graph | None],
        mods: tuple[Mod, Mod],
        return_lse: bool,
        options: DecodeOptions,
        listed: bool,
        combined: bool,
    ) -> None:
        self.graphs = graphs
        self.options = options
        self.listed = listed
        self.combined = combined
        out = inputs.query.new_empty(inputs.out_shape) if inputs.out is None else inputs.out
        self.out_strides = out.stride()
        self.signature = describe(inputs, out, return_lse, options)
        check_backend(self.signature, options)
        names = _names(graphs, mods) if options.debug else None
        self.eager = EagerLauncher(graphs, names)
        self.plan_of_any = Plan(self.eager, self.eager if options.debug else None, inputs, return_lse, options)
        self.facts: DeviceFacts | None = None
        if self.signature.backend == "triton" and 0 not in inputs.out_shape:
            self.facts = device_facts(self.signature.device)
            check_device(self.signature, self.facts)
        self.programs: dict[tuple, _Loaded] = {}  # by what the loads of both mods check
        self.is_proof_of_length = any(graph is not None and depends_on_length(graph) for graph in graphs)
        # What the last proofs rest on, what they gave, and from which length to which.
        self.last: tuple[tuple, _Loaded | None, int, int] = (), None, 0, 0
        self.num_watched = -1  # numbers of the mask_mod, where the proofs of the score_mod rest on them, too

    def plan(self, inputs: Inputs, mods: tuple[Mod, Mod]) -> tuple[Plan, Mod]:
        """Plans a call.

        Args:
            inputs: checked, and of the layout that this was made for, apart from lengths.
            mods: the score_mod and the mask_mod as they are now.

        Returns:
            The plan, and the mask_mod with the numbers that the proofs rest on.
        """
        if self.facts is None:
            return self.plan_of_any if inputs.out is None else self.plan_of_any.launched_by(self.eager), mods[1]
        batch, num_kv_heads = len(inputs.query), inputs.key.shape[1]
        sizes = Sizes(batch, num_kv_heads, inputs.max_kv_len)
        score, mask = mods
        present, loaded, first, end = self.last
        if loaded is None or not first <= sizes.max_kv_len <= end or present != (score.present, mask.present):
            loaded, mask = self._reach(mods, sizes)
        return self.plan_of_any.launched_by(loaded.launcher(inputs, sizes, self.options)), mask

    def _reach(self, mods: tuple[Mod, Mod], sizes: Sizes) -> tuple[_Loaded, Mod]:
        """Proves what can be proven of a call, and notes up to which length it stays so."""
        score, mask = mods
        repeated = self.last[0] == (score.present, mask.present)
        loaded, mask = self._load(mods, sizes)
        end = sizes.max_kv_len if self.is_proof_of_length else MAX_KV_LEN
        if repeated and end == sizes.max_kv_len:
            # What is proven, and what is not, for a longer sequence as well as for this one is so for all between.
            further = next_power_of_2(end)
            end = further if self._load((score, mask), sizes._replace(max_kv_len=further))[0] is loaded else end
        self.last = (score.present, mask.present), loaded, sizes.max_kv_len, end
        return loaded, mask

    def _load(self, mods: tuple[Mod, Mod], sizes: Sizes) -> tuple[_Loaded, Mod]:
        """Proves what can be proven of a call, and finds the kernels that leave it out."""
        assert self.facts is not None
        watched = len(mods[1].present) == self.num_watched
        score_checks, mask_checks, mask = find_proofs(self.graphs, mods, self.signature, sizes, watched)
        if mask is not mods[1]:
            self.num_watched = len(mask.present)
        loaded = self.programs.get((score_checks, mask_checks))
        if loaded is None:
            q_idx_given = self.signature.q_offset is not None
            program = Program(*self.graphs, q_idx_given, score_checks, mask_checks, self.listed, self.combined)
            loaded = _Loaded(program, self.signature, self.facts, self.out_strides)
            self.programs[score_checks, mask_checks] = loaded
        return loaded, mask


class _Loaded:
    """The kernels of a program, by their tiles."""

    def __init__(
        self, program: Program, signature: Signature, facts: DeviceFacts, out_strides: tuple[int, ...]
    ) -> None:
        self.program = program
        self.out_strides = out_strides
        self.signature = signature
        self.facts = facts
        self.kernels: dict[Tiles, tuple[KernelSpec, Kernel, bool]] = {}  # true: its tiles are smaller than asked for

    def launcher(self, inputs: Inputs, sizes: Sizes, options: DecodeOptions) -> TritonLauncher:
        """Chooses a schedule and finds the kernel.

        Triton calls Gluon experimental: where a release does not compile the kernel for latents, the general one runs.
        """
        program, signature, facts = self.program, self.signature, self.facts
        try:
            cut, matrices = cut_call(signature, sizes, inputs, program, facts, options)
            spec, kernel, is_smaller = self.kernels.get(cut.tiles) or self._find(cut, options)
        except CompileError as error:
            if not cut.tiles.latent:
                raise
            _refuse_latents(error)
            cut, matrices = cut_call(signature, sizes, inputs, program, facts, options, latent=False)
            spec, kernel, is_smaller = self.kernels.get(cut.tiles) or self._find(cut, options)
        if is_smaller:
            cut = replace(cut, tiles=spec.tiles)
        strides = all_strides(packed(inputs) if cut.tiles.packed else inputs, self.out_strides)
        return TritonLauncher(kernel, spec, sizes, cut, strides, matrices, facts.backend != "cpu", program)

    def _find(self, cut: Schedule, options: DecodeOptions) -> tuple[KernelSpec, Kernel, bool]:
        """Finds the kernel of a schedule; one that is too large for the device is cut smaller."""
        program, tiles = self.program, cut.tiles
        while True:
            spec = KernelSpec(
                self.signature,
                tiles,
                capture_types(program.score),
                capture_types(program.mask),
                num_live=program.bounds.num_live,
                num_full=program.num_full,
                fp_fusion=not (rounds_to_half(program.score) or rounds_to_half(program.mask)),
                block_lists=program.block_lists,
            )
            try:
                self.kernels[cut.tiles] = spec, find_kernel(spec, self.facts, program), tiles is not cut.tiles
                return self.kernels[cut.tiles]
            except SharedMemoryError:
                smaller_tiles = None if tiles.latent or options.block_n else smaller(tiles)
                if smaller_tiles is None:
                    raise
                tiles = smaller_tiles


def prepare(
    inputs: Inputs,
    score: Mod,
    mask: Mod,
    return_lse: bool,
    options: DecodeOptions | None,
    listed: bool = False,
    combined: bool = False,
) -> tuple[Prepared, Plan, Mod, Mod]:
    """Checks a call and makes its plan: trace, describe, schedule, and find the kernel.

    Returns:
        What calls of other lengths share, the plan, and both mods with the identities that tracing found.

    Raises:
        TypeError, ValueError, TraceError: as `flex_decode`.
    """
    options = DEFAULT_OPTIONS if options is None else options
    check_inputs(inputs, options)
    device = inputs.query.device
    score_graph, score = graph_of("score_mod", score, device)
    mask_graph, mask = graph_of("mask_mod", mask, device)
    check_captures("score_mod", score_graph, score, device)
    check_captures("mask_mod", mask_graph, mask, device)
    graphs = score_graph, mask_graph
    prepared = Prepared(inputs, graphs, (score, mask), return_lse, options, listed, combined)
    plan, mask = prepared.plan(inputs, (score, mask))
    return prepared, plan, score, mask


def make_program(
    graphs: tuple[Graph | None, Graph | None],
    mods: tuple[Mod, Mod],
    signature: Signature,
    sizes: Sizes,
    listed: bool = False,
    combined: bool = False,
) -> tuple[Program, Mod]:
    """Proves what can be proven of the indices of a call.

    Args:
        graphs: of the score_mod and the mask_mod.
        mods: what they capture.
        signature: of the call.
        sizes: of the call.
        listed: whether the mask is that of a BlockMask.
        combined: whether another mask holds beside it.

    Returns:
        The program, and the mask_mod with the numbers that the proofs rest on.
    """
    score_checks, mask_checks, mask = find_proofs(graphs, mods, signature, sizes)
    q_idx_given = signature.q_offset is not None
    return Program(*graphs, q_idx_given, score_checks, mask_checks, listed, combined), mask


def find_proofs(
    graphs: tuple[Graph | None, Graph | None],
    mods: tuple[Mod, Mod],
    signature: Signature,
    sizes: Sizes,
    watched: bool = False,
) -> tuple[Checks | None, Checks | None, Mod]:
    """What the loads of both mods have to check in a call, and the mask_mod with the numbers that this rests on.

    Args:
        graphs: of the score_mod and the mask_mod.
        mods: what they capture.
        signature: of the call.
        sizes: of the call.
        watched: the mask_mod has all these numbers already.
    """
    (score, mask), (score_mod, mask_mod), q_idx_given = graphs, mods, signature.q_offset is not None
    heads = sizes.num_kv_heads * signature.group_size
    bounded = CallSizes(sizes.batch, heads, signature.num_queries, sizes.max_kv_len)
    mask_checks = None if mask is None else find_checks(mask, mask_mod.leaves, bounded, q_idx_given)
    score_checks = None
    if score is not None:
        score_checks = find_checks(score, score_mod.leaves, bounded, q_idx_given)
        if mask is not None and any(index.outside for load in score_checks for index in load.indices):
            mask_mod = mask_mod if watched else watch("mask_mod", mask_mod, integers(mask))
            by_mask = mask, mask_mod.leaves
            score_checks = find_checks(score, score_mod.leaves, bounded, q_idx_given, by_mask)
    return score_checks, mask_checks, mask_mod


_refusals: list[str] = []  # of the kernel for latents: it is not tried again


def _refuse_latents(error: CompileError) -> None:
    """Goes on without the kernel for latents, and says so once."""
    _refusals.append(str(error))  # the error itself would keep the tensors of its call alive
    text = f"flexdecode's kernel for latents did not compile, a slower one takes its place: {error}"
    warnings.warn(text, RuntimeWarning, stacklevel=2)


def check_backend(signature: Signature, options: DecodeOptions) -> None:
    """Refuses what a backend cannot do.

    Raises:
        ValueError: batch invariance in PyTorch operations.
    """
    if signature.backend == "torch" and options.batch_invariant:
        raise ValueError(
            '`options.batch_invariant=True` needs backend="triton": PyTorch\'s products depend on the batch'
        )


def check_device(signature: Signature, facts: DeviceFacts) -> None:
    """Refuses what Triton has no type for on a device.

    Raises:
        ValueError: float8_e4m3fn caches on a GPU without that type.
    """
    known = facts.backend == "cpu" or (facts.backend == "cuda" and isinstance(facts.arch, int) and facts.arch >= 89)
    if signature.kv_dtype == torch.float8_e4m3fn and not known:
        raise ValueError(
            f"float8_e4m3fn caches need an NVIDIA GPU of compute capability 8.9 or later, got {facts.backend} "
            f"{facts.arch}: use float8_e5m2 or int8"
        )


def cut_call(
    signature: Signature,
    sizes: Sizes,
    inputs: Inputs,
    program: Program,
    facts: DeviceFacts,
    options: DecodeOptions,
    latent: bool = True,
) -> tuple[Schedule, tuple[Matrix, Matrix] | None]:
    """Chooses the schedule of a call, and the matrices of its caches if it loads them through descriptors.

    The kernel for latents, if it is allowed and fits, sees the keys through two descriptors.
    """
    # Where the mask is evaluated, zeroing the dead rows of V costs more than descriptors gain.
    bounds = program.bounds
    caches = inputs.format.owners(inputs)
    # Whether there are matrices may depend on the batch, and with it the tiles.
    hopeful = not options.batch_invariant
    latent = latent and hopeful and not _refusals and not program.block_lists
    if latent and has_latent_kernel(signature, facts, options):
        latents = as_matrix(inputs.key, caches)
        if latents is not None:
            cut = schedule(signature, sizes, facts, options, is_bounded=bounds.is_bounded, latent=True)
            return cut, (latents, latents)
    # The blocks of lists may all be partial.
    hopeful = hopeful and program.num_full > 0 and not program.block_lists
    cut = schedule(signature, sizes, facts, options, hopeful, bounds.is_bounded, program.fetches)
    matrices = None
    if cut.tiles.descriptors and signature.page_size % cut.tiles.block_n == 0:
        seen = packed(inputs) if cut.tiles.packed else inputs
        matrices = as_matrices(seen.key, seen.value, caches)
    if matrices is None and cut.tiles.descriptors:
        cut = schedule(signature, sizes, facts, options, False, bounds.is_bounded, program.fetches)
    return cut, matrices


def check_captures(kind: str, graph: Graph | None, mod: Mod, device: torch.device | None) -> None:
    """Refuses captured tensors that the kernel cannot read; they may be anywhere if `device` is None.

    Raises:
        ValueError: one is on another device, not dense, or requires grad while grad mode is on.
    """
    if graph is None or mod.function is None:
        return
    for leaf in {*graph.tensors, *(source.leaf for source in graph.numbers)}:
        tensor = mod.leaves[leaf] if leaf >= 0 else None
        if not isinstance(tensor, torch.Tensor):
            continue
        name = leaf_names(mod.function, mod.followed)[leaf]
        if device not in (None, tensor.device) and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
            raise ValueError(
                f"the tensor `{name}` captured by {kind} is on {tensor.device}, but `query` is on {device}: move it "
                f"there before the call, `{name} = {name}.to(query.device)`"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"the tensor `{name}` captured by {kind} must be dense, got layout {tensor.layout}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the tensor `{name}` captured by {kind} requires grad, but flex_decode is forward only: call it under "
                f"torch.no_grad() or capture `{name}.detach()`"
            )
