"""A plan with all but query, results and captured values filled in, for calls that are repeated."""

from __future__ import annotations

from typing import Any

import torch

from ..call.checks import check_all_lens, checked_scale
from ..call.inputs import Inputs
from ..call.overlap import extent
from ..codegen.arguments import ARGUMENTS, DESCRIPTORS, PLACES, WORKSPACE, Call
from .identity import Mod
from .launch import FirstPass, Pick, TritonLauncher
from .plan import Plan, Results, check_captured_out, record, without_memory

_QUERY, _OUT, _LSE, _MAX_SCORES = (PLACES[name] for name in ("query", "out", "lse", "max_scores"))
_CAPTURES = ("score_captures", "mask_captures")


class _BoundPass:
    """One launch of the first pass, see `FirstPass`, with the arguments that all calls share."""

    def __init__(self, of: FirstPass, call: Call) -> None:
        form = of.form
        self.run, self.grid, self.on_gpu = form.kernel.run, of.grid, form.on_gpu
        self.arguments = of.arguments.copy()
        for place, at in form.inputs:
            self.arguments[place] = form.at(call.inputs[at])
        for place, value in form.values:
            if ARGUMENTS[place].name not in _CAPTURES:
                self.arguments[place] = value(of, call)
        has = {ARGUMENTS[place].name for place, _ in form.values}
        self.read_score = form.read_score if "score_captures" in has else None
        self.read_mask = form.read_mask if "mask_captures" in has else None
        has_descriptors = of.matrices is not None and self.on_gpu
        self.described = (
            of.descriptors(call.inputs.key.data_ptr(), call.inputs.value.data_ptr()) if has_descriptors else None
        )

    def launch(
        self, results: tuple, mods: tuple[Mod, ...], stream: int, workspace: tuple | None, pick: Pick | None
    ) -> tuple | None:
        """As `FirstPass.launch`. `results` are query, output, log-sum-exp and largest scores, or their addresses."""
        arguments = self.arguments.copy()
        arguments[_QUERY], arguments[_OUT], arguments[_LSE], arguments[_MAX_SCORES] = results
        if workspace is not None:
            arguments[WORKSPACE] = workspace
        if self.read_score is not None:
            arguments[PLACES["score_captures"]] = self.read_score(mods[0].leaves, mods[0].frame)
        if self.read_mask is not None:
            arguments[PLACES["mask_captures"]] = self.read_mask(mods[1].leaves, mods[1].frame)
        picked = None if pick is None else pick(arguments)
        if self.described is not None:
            arguments[DESCRIPTORS] = self.described
        self.run(self.grid, stream, arguments)
        return picked


class BoundPlan:
    """Runs calls that differ from one call in query, results and captured values only.

    Tensors must have the layouts of those of that call, and all but query and output the same addresses. Strides of
    dimensions of size 1 may differ.
    """

    def __init__(self, plan: Plan, inputs: Inputs, score: Mod, mask: Mod) -> None:
        """`inputs`: of that call. Its `out` says whether the others have one."""
        self.plan, self.inputs = plan, inputs._replace(query=without_memory(inputs.query), out=None)
        self.passes: list[_BoundPass] | None = None
        launcher = plan.launcher
        # Otherwise other tensors take the place of inputs at each call, or there is more to do than to launch kernels.
        if isinstance(launcher, TritonLauncher) and not (plan.loose or plan.empty or plan.checker is not None):
            self.launcher = launcher
            fixed = plan.with_numbers(inputs) if plan.numbers else inputs
            scale = plan.default_scale if inputs.scale is None else checked_scale(inputs.scale)
            call = Call(fixed, inputs.query, None, None, score.leaves, mask.leaves, scale)
            self.passes = [_BoundPass(one, call) for one in (launcher.first, *launcher.large)]
        read = [x for x in inputs[1:-1] if isinstance(x, torch.Tensor)]
        starts = [x.data_ptr() for x in read]
        self.spans = [(start, start + extent(x)) for start, x in zip(starts, read, strict=True)]
        self.sizes = extent(inputs.query), 0 if inputs.out is None else extent(inputs.out)

    def run(self, query: torch.Tensor, out: torch.Tensor | None, score: Mod, mask: Mod) -> Results:
        """Runs the call on the current stream, as `Plan.run` does."""
        plan = self.plan
        if self.passes is None:
            return plan.run(record(Inputs, (query, *self.inputs[1:-1], out)), score, mask)
        if out is None:
            out = plan.new_out(query)
        else:
            self._check_out(query, out, score, mask)
        if plan.checks_lens:
            check_all_lens(self.inputs, plan.options)
        lse = plan.new_numbers(query) if plan.aux.lse else None
        max_scores = plan.new_numbers(query) if plan.aux.max_scores else None
        if self.launcher.is_elsewhere():
            with torch.cuda.device(self.launcher.device):
                self._launch(self.passes, query, out, lse, max_scores, score, mask)
        else:
            self._launch(self.passes, query, out, lse, max_scores, score, mask)
        return record(Results, (out, lse, max_scores))

    def _launch(self, passes: list[_BoundPass], query: Any, out: Any, lse: Any, max_scores: Any, *mods: Mod) -> None:
        launcher = self.launcher
        stream, memory, workspace = launcher.begin()  # the memory lives until all passes are launched
        if launcher.on_gpu:
            query, out = query.data_ptr(), out.data_ptr()
            if lse is not None:
                lse = lse.data_ptr()
            if max_scores is not None:
                max_scores = max_scores.data_ptr()
        results = query, out, lse, max_scores
        picked = passes[0].launch(results, mods, stream, workspace, launcher.pick)
        for one in passes[1:]:
            one.launch(results, mods, stream, workspace, None)
        launcher.merge(picked, stream)
        del memory

    def _check_out(self, query: torch.Tensor, out: torch.Tensor, score: Mod, mask: Mod) -> None:
        """Refuses an `out` that would overwrite an input or a captured tensor.

        Raises:
            ValueError: it shares memory with one.
        """
        start, at = out.data_ptr(), query.data_ptr()
        end = start + self.sizes[1]
        is_near = at < end and start < at + self.sizes[0]
        for first, last in self.spans:
            is_near |= first < end and start < last
        if is_near:  # interleaved tensors share no memory
            self.plan.check_out(record(Inputs, (query, *self.inputs[1:-1], out)), out)
        if score.leaves or mask.leaves:
            check_captured_out(out, score.leaves, mask.leaves)
