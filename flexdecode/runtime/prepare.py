"""Prepares a call: traces its mods, describes it, chooses its schedule and finds its kernel."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..analysis.analyze import MAX_KV_LEN
from ..analysis.bounds import find_bounds
from ..analysis.intervals import EVERYWHERE
from ..analysis.proofs import CallSizes, Checks, captured_integers, depends_on_length, find_checks
from ..analysis.proven import Listed, ProvenMods
from ..call.block_mask import BlockLists
from ..call.checks import check_device, check_inputs
from ..call.columns import next_power_of_2
from ..call.device import DeviceFacts, device_facts
from ..call.inputs import DEFAULT_OPTIONS, DecodeOptions, Inputs, Sizes
from ..call.schedule import PlannedLaunch, Schedule, Scheduler
from ..call.signature import Aux, Signature, describe
from ..call.tiles import Tiles
from ..codegen.arguments import Call, KernelSpec
from ..codegen.compile import capture_types, rounds_to_half
from ..codegen.kernels import Combine, Kernel, find_combine, find_kernel, start_combine, start_kernel
from ..errors import CompilationForbiddenError, CompileError, SharedMemoryError
from ..frontend.graph import Graph
from ..memos import Bounded
from .autotune import Autotuner
from .identity import Mod, add_sources, graph_of, names_of
from .launch import FirstPass, LaunchForm, TritonLauncher
from .plan import EagerLauncher, Plan, name_graphs
from .short_tables import ShortTables

Mods = tuple[Mod, Mod]  # the score_mod and the mask_mod


class Target(NamedTuple):
    """Where kernels come from, if not for the device of the tensors.

    Attributes:
        facts: about the device that they are for.
        find_kernel, find_combine: take the place of those of `codegen.kernels`.
    """

    facts: DeviceFacts
    find_kernel: Callable[[KernelSpec, DeviceFacts, ProvenMods], Kernel]
    find_combine: Callable[[KernelSpec, DeviceFacts], Combine]


@dataclass(frozen=True)
class Traced:
    """A checked call with traced mods, for a cache of any length.

    Attributes:
        graphs: of the score_mod and the mask_mod.
        signature: of the call.
        options: how to execute it.
        listed: whether the lists of a BlockMask say which blocks are visited.
    """

    graphs: tuple[Graph | None, Graph | None]
    signature: Signature
    options: DecodeOptions
    listed: Listed

    def checks(self, mods: Mods, sizes: Sizes, has_sources: bool = False) -> tuple[Checks | None, Checks | None, Mod]:
        """Proves what can be proven of the indices of a call.

        Args:
            mods: what they capture now.
            sizes: of the call.
            has_sources: whether the mask_mod already includes all numbers that proofs of the score_mod use.

        Returns:
            What the loads of both mods have to check, and the mask_mod with these numbers.
        """
        (score, mask), (score_mod, mask_mod) = self.graphs, mods
        q_idx_given = self.signature.kind("q_offset") is not None
        heads = sizes.num_kv_heads * self.signature.group_size
        shifted = self.signature.kind("kv_offset") is not None
        bounded = CallSizes(sizes.batch, heads, self.signature.one_token, sizes.max_kv_len, shifted)
        mask_checks = None if mask is None else find_checks(mask, mask_mod.leaves, bounded, q_idx_given)
        score_checks = None
        if score is not None:
            score_checks = find_checks(score, score_mod.leaves, bounded, q_idx_given)
            if mask is not None and any(index.outside for load in score_checks for index in load.indices):
                mask_mod = mask_mod if has_sources else add_sources("mask_mod", mask_mod, captured_integers(mask))
                by_mask = mask, mask_mod.leaves
                score_checks = find_checks(score, score_mod.leaves, bounded, q_idx_given, by_mask)
        return score_checks, mask_checks, mask_mod

    def proven(self, score_checks: Checks | None, mask_checks: Checks | None) -> ProvenMods:
        """What the hooks of a kernel are written from."""
        q_idx_given, shifted = (self.signature.kind(name) is not None for name in ("q_offset", "kv_offset"))
        score, mask = self.graphs
        listed = self.listed
        if listed is Listed.ALONE and find_bounds(score, mask, q_idx_given, shifted).score_live != EVERYWHERE:
            listed = Listed.WITH_MASK  # a block that the lists call full may reach beyond the keys of the score_mod
        return ProvenMods(score, mask, q_idx_given, score_checks, mask_checks, listed, shifted)


def trace_call(
    inputs: Inputs,
    mods: Mods,
    aux: Aux,
    options: DecodeOptions,
    listed: Listed,
    device: torch.device | None = None,
) -> tuple[Traced, Mods]:
    """Checks a call and traces its mods.

    Args:
        inputs: of the call.
        mods: the score_mod and the mask_mod.
        aux: the numbers of rows that the call gives beside its output.
        options: how to execute it.
        listed: whether the lists of a BlockMask say which blocks are visited.
        device: where captured tensors are read, if they may be on any device; by default all are on the query's device.

    Returns:
        The call, and both mods with the identities that tracing found.

    Raises:
        TypeError, ValueError, TraceError: as `flex_decode`.
    """
    check_inputs(inputs, options)
    traced = []
    for kind, mod in zip(("score_mod", "mask_mod"), mods, strict=True):
        graph, mod = graph_of(kind, mod, device or inputs.query.device)
        _check_captures(kind, graph, mod, None if device else inputs.query.device)
        traced.append((graph, mod))
    graphs, (score, mask) = zip(*traced, strict=True)
    signature = describe(inputs, aux, options)
    if signature.backend == "triton":
        _refuse_float64(inputs)
    elif options.batch_invariant:
        raise ValueError(
            '`options.batch_invariant=True` needs backend="triton": PyTorch\'s products depend on the batch'
        )
    return Traced(graphs, signature, options, listed), (score, mask)


def _refuse_float64(inputs: Inputs) -> None:
    """Refuses what the kernels do not compute.

    Raises:
        ValueError: query, key or value is float64.
    """
    for name in ("query", "key", "value"):
        if getattr(inputs, name).dtype == torch.float64:
            raise ValueError(
                f"`{name}` is float64, which the triton backend does not compute: convert it to float32, or pass "
                '`options=DecodeOptions(backend="torch")`'
            )


def prepare(
    inputs: Inputs,
    mods: Mods,
    aux: Aux,
    options: DecodeOptions | None,
    listed: Listed = Listed.NO,
    lists: BlockLists | None = None,
) -> tuple[Prepared, Plan, Mods]:
    """Checks a call and makes its plan. `lists` are those of its BlockMask.

    Returns:
        What calls of other lengths share, the plan, and both mods with the identities that tracing found.

    Raises:
        TypeError, ValueError, TraceError: as `flex_decode`.
    """
    traced, mods = trace_call(inputs, mods, aux, DEFAULT_OPTIONS if options is None else options, listed)
    prepared = Prepared(traced, inputs, mods, aux)
    plan, mask = prepared.plan(inputs, mods, lists)
    return prepared, plan, (mods[0], mask)


class Prepared:
    """A traced call with any length of the cache, number of query tokens and, if packed, number of sequences.

    Calls that differ in these share it.

    A cache that grows by `torch.cat` has another N and other strides for every token. `plan` does what depends on
    them: it finds which indices are in range, the numbers of the schedule, and what is launched.
    """

    def __init__(self, traced: Traced, inputs: Inputs, mods: Mods, aux: Aux, target: Target | None = None) -> None:
        self.traced, self.target = traced, target
        options = traced.options
        names = name_graphs(traced.graphs, mods) if options.debug else None
        self.eager = EagerLauncher(traced.graphs, names)
        self.plan_of_any = Plan(self.eager, self.eager if options.debug else None, inputs, aux, options)
        self.short_tables = ShortTables(traced.graphs)
        self.facts: DeviceFacts | None = None
        if traced.signature.backend == "triton" and not inputs.is_empty:
            self.facts = device_facts(traced.signature.device) if target is None else target.facts
            check_device(inputs, self.facts)
        self.autotuner: Autotuner | None = None
        if options.autotune and self.facts is not None:
            self.autotuner = Autotuner(traced.signature, options, self.facts)
        self.loaded: dict[tuple, _Loaded] = {}  # the key: what the loads of both mods check
        self.is_proof_of_length = any(graph is not None and depends_on_length(graph) for graph in traced.graphs)
        # What the last proofs used: the number of sequences and values of the mods. Their result, and the shortest and
        # the longest length it holds for.
        self.last: tuple[tuple, _Loaded | None, int, int] = (), None, 0, 0
        self.num_proof_values = -1  # numbers of the mask_mod if proofs of the score_mod also use them

    def plan(self, inputs: Inputs, mods: Mods, lists: BlockLists | None = None) -> tuple[Plan, Mod]:
        """Plans a call. Nothing is computed, unless schedules have to be measured.

        Args:
            inputs: checked; they have the layout that this was made for, except lengths.
            mods: the score_mod and the mask_mod as they are now.
            lists: those of a BlockMask; only a measurement reads them.

        Returns:
            The plan, and the mask_mod with the numbers that the proofs use.
        """
        self.short_tables.warn(mods, inputs.num_q_heads, inputs.batch)
        if self.facts is None:
            same = inputs.out is None and inputs.out_shape == self.plan_of_any.out_shape
            return self.plan_of_any if same else self.plan_of_any.launched_by(self.eager, inputs), mods[1]
        sizes = inputs.sizes
        score, mask = mods
        used, loaded, first, end = self.last
        now = sizes.batch, score.proof_values, mask.proof_values
        if loaded is None or not first <= sizes.max_kv_len <= end or used != now:
            loaded, mask = self._reach(mods, sizes)
        if self.autotuner is None:
            return self.plan_of_any.launched_by(loaded.launcher(inputs, sizes), inputs), mask
        call: list[Call] = []  # made when it is needed

        def rehearse(launcher: TritonLauncher) -> Callable[[], None]:
            if not call:
                call.append(self.plan_of_any.rehearsal(inputs, score, mask, lists))
            return lambda: launcher(call[0])

        chosen, is_settled = self.autotuner.launcher(loaded, inputs, rehearse)
        return self.plan_of_any.launched_by(chosen, inputs, is_settled), mask

    def _reach(self, mods: Mods, sizes: Sizes) -> tuple[_Loaded, Mod]:
        """Proves what can be proven of a call, and notes up to which length the result holds."""
        score, mask = mods
        repeated = self.last[0] == (sizes.batch, score.proof_values, mask.proof_values)
        loaded, mask = self._load(mods, sizes)
        end = sizes.max_kv_len if self.is_proof_of_length else MAX_KV_LEN
        if repeated and end == sizes.max_kv_len:
            # If a longer sequence gives the same result, all lengths between the two give it as well.
            further = next_power_of_2(end)
            end = further if self._load((score, mask), sizes._replace(max_kv_len=further))[0] is loaded else end
        self.last = (sizes.batch, score.proof_values, mask.proof_values), loaded, sizes.max_kv_len, end
        return loaded, mask

    def _load(self, mods: Mods, sizes: Sizes) -> tuple[_Loaded, Mod]:
        """Proves what can be proven of a call, and finds the kernels without the checks that this makes needless."""
        assert self.facts is not None
        score_checks, mask_checks, mask = self.traced.checks(
            mods, sizes, len(mods[1].proof_values) == self.num_proof_values
        )
        key = score_checks, mask_checks
        if mask is not mods[1]:
            self.num_proof_values = len(mask.proof_values)
        loaded = self.loaded.get(key)
        if loaded is None:
            target = self.target or Target(self.facts, find_kernel, find_combine)
            loaded = _Loaded(self.traced, self.traced.proven(*key), target)
            self.loaded[key] = loaded
        return loaded, mask


class _Loaded:
    """The kernels of one `ProvenMods`, by their tiles."""

    def __init__(self, traced: Traced, proven: ProvenMods, target: Target) -> None:
        self.proven = proven
        self.signature = traced.signature
        self.facts, self.find_kernel, self.find_combine = target
        self.options = traced.options
        self.scheduler = Scheduler(traced.signature, proven, self.facts, traced.options)
        self.schedulers = Bounded(limit=64)  # by other options, of schedules that were measured
        self.forms: dict[Tiles, LaunchForm] = {}  # by the tiles asked for; a kernel may have smaller ones
        self.combines: dict[tuple, Combine] = {}

    def launcher(self, inputs: Inputs, sizes: Sizes, options: DecodeOptions | None = None) -> TritonLauncher:
        """Chooses schedules, by the options of the call or by others, and finds the kernels.

        Gluon is experimental in Triton. If a release does not compile the kernel for latents, the general kernel runs.
        """
        options = self.options if options is None else options
        passes: list[FirstPass] = []
        for launch in self._choose(inputs, sizes, options):
            tiles = launch.schedule.tiles
            try:
                form = self.forms.get(tiles) or self._find(tiles, options)
            except CompileError as error:
                if not tiles.latent or isinstance(error, CompilationForbiddenError):
                    raise
                _refusals[self.facts] = str(error)  # the error itself would keep the tensors of its call alive
                text = f"flexdecode's kernel for latents did not compile, a slower one takes its place: {error}"
                warnings.warn(text, RuntimeWarning, stacklevel=2)
                return self.launcher(inputs, sizes, options)
            passes.append(FirstPass(form, sizes, launch))
        return TritonLauncher(passes, self._combine(passes), sizes)

    def start(self, inputs: Inputs, sizes: Sizes, options: DecodeOptions) -> None:
        """Begins to compile in other threads what `launcher` needs for these options."""
        for launch in self._choose(inputs, sizes, options):
            if self.find_kernel is find_kernel and launch.schedule.tiles not in self.forms:
                start_kernel(self._spec(launch.schedule.tiles), self.facts, self.proven)

    def _choose(self, inputs: Inputs, sizes: Sizes, options: DecodeOptions) -> list[PlannedLaunch]:
        """Chooses schedules, and begins to compile the second pass if a first pass has to be compiled."""
        scheduler = self.scheduler if options == self.options else self.schedulers.get(options)
        if scheduler is None:
            scheduler = Scheduler(self.signature, self.proven, self.facts, options)
            self.schedulers.add(options, scheduler)
        launches = scheduler.choose(inputs, sizes, allows_latents(self.facts))
        if self.find_combine is find_combine and any(x.schedule.tiles not in self.forms for x in launches):
            merged = self._merged([x.schedule for x in launches])
            if merged is not None:
                start_combine(self._combine_spec(*merged), self.facts)
        return launches

    def _combine(self, passes: list[FirstPass]) -> Combine | None:
        """The second pass for the partial results of the first passes; None if there are none."""
        merged = self._merged([each.chosen for each in passes])
        if merged is None:
            return None
        found = self.combines.get(merged)
        if found is None:
            found = self.combines[merged] = self.find_combine(self._combine_spec(*merged), self.facts)
        return found

    def _merged(self, chosen: list[Schedule]) -> tuple[int, Tiles, Tiles | None] | None:
        """What a second pass merges: partial results per step, the tiles of the first pass, and those of another one.

        None if nothing is split.
        """
        first, other = chosen[0], chosen[-1]
        if not (first.tiles.split or other.tiles.split):
            return None
        return max(first.block_s, other.block_s), first.tiles, None if len(chosen) == 1 else other.tiles

    def _combine_spec(self, block_s: int, first: Tiles, large: Tiles | None) -> KernelSpec:
        spec = replace(self._spec(first), tiles=replace(first, split=True), block_s=block_s)
        if large is not None:
            spec = replace(spec, large_m=large.block_m if large.split else 0, of_small=not large.split)
        return spec

    def _spec(self, tiles: Tiles) -> KernelSpec:
        """What the first pass with some tiles is compiled from."""
        proven = self.proven
        return KernelSpec(
            self.signature,
            tiles,
            capture_types(proven.score),
            capture_types(proven.mask),
            num_live=proven.bounds.num_live,
            num_full=proven.num_full,
            unbounded=proven.bounds.is_everywhere,
            fp_fusion=not (rounds_to_half(proven.score) or rounds_to_half(proven.mask)),
            block_lists=proven.block_lists,
        )

    def _find(self, wanted: Tiles, options: DecodeOptions) -> LaunchForm:
        """Finds the kernel for some tiles, or for smaller tiles if that kernel is too large for the device."""
        proven, tiles = self.proven, wanted
        while True:
            spec = self._spec(tiles)
            try:
                kernel = self.find_kernel(spec, self.facts, proven)
                self.forms[wanted] = LaunchForm(kernel, spec, proven, self.facts.backend != "cpu")
                return self.forms[wanted]
            except SharedMemoryError:
                if tiles.latent or options.block_n or tiles.block_n <= 16:
                    raise
                tiles = replace(tiles, block_n=tiles.block_n // 2)


# Why the kernel for latents did not compile for a device; then it is not tried again.
_refusals: dict[DeviceFacts, str] = {}


def allows_latents(facts: DeviceFacts) -> bool:
    """Whether the kernel for latents can be tried on a device."""
    return facts not in _refusals


def _check_captures(kind: str, graph: Graph | None, mod: Mod, device: torch.device | None) -> None:
    """Refuses captured tensors that the kernel cannot read. If `device` is None, they may be on any device.

    Raises:
        ValueError: one is on another device, not dense, or requires grad while grad mode is on.
    """
    if graph is None or mod.function is None:
        return
    for leaf in {*graph.tensors, *(source.leaf for source in graph.numbers)}:
        tensor = mod.leaves[leaf] if leaf >= 0 else None
        if not isinstance(tensor, torch.Tensor):
            continue
        name = names_of(mod)[leaf]
        if device not in (None, tensor.device) and not (tensor.dim() == 0 and tensor.device.type == "cpu"):
            raise ValueError(
                f"the tensor `{name}` captured by {kind} is on {tensor.device}, but `query` is on {device}: move it "
                f"there before the call, `{name} = {name}.to(query.device)`"
            )
        if tensor.layout != torch.strided:
            raise ValueError(f"the tensor `{name}` captured by {kind} must be dense, got layout {tensor.layout}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                f"the tensor `{name}` captured by {kind} requires grad, but flexdecode is forward only: call it under "
                "torch.no_grad(), or capture the tensor's .detach()"
            )
