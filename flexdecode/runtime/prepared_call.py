"""A call of `flex_decode` that was checked once and runs again and again with new queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..call.checks import check_inputs
from ..call.inputs import DEFAULT_OPTIONS, DecodeOptions, Inputs
from ..call.signature import Aux
from ..frontend.captures import same_layouts
from ..memos import counters
from .bound import BoundPlan
from .identity import NO_MOD, Mod, identify
from .plan import Plan, Results, layout
from .request import Request, read_request
from .run import find_plan, run_request

_NUMBERS = ("kv_lens", "q_lens", "q_offset", "kv_starts", "kv_offset", "k_scale", "v_scale")
IN_REGION = (
    "a prepared call works on the host: in a region that torch.compile or torch.export traces, call "
    "flexdecode.flex_decode, which becomes one operation there"
)
_address = torch.Tensor.data_ptr
_REMEDY = "prepare the call again: flexdecode.prepare(...)"


class _Ready(NamedTuple):
    """All that a call needs whose arguments have the layouts of an earlier one.

    Attributes:
        run: computes the call. The addresses of fixed tensors are filled in.
        score_mark, mask_mark, proofs: of its mods; with others, the call may need another plan.
        grad: whether gradients were on.
        addresses: of the fixed tensors.
        same: whether query, fixed tensors and `out` have the layouts of those.
    """

    run: Callable[..., Results]
    score_mark: object
    mask_mark: object
    proofs: tuple
    grad: bool
    addresses: list[int]
    same: Callable[..., bool]


class PreparedCall:
    """A call of `flex_decode` that `prepare` has checked, planned and compiled: `step(query)` runs it.

        >>> step = flexdecode.prepare(query, key, value, score_mod=alibi, kv_lens=kv_lens)
        >>> out = step(query)

    Several threads may call it at the same time, each on a stream of its own.
    """

    def __init__(
        self,
        inputs: Inputs,
        score_mod: Callable | None,
        mask_mod: Callable | None,
        block_mask: Any,
        aux: Aux,
        options: DecodeOptions | None,
    ) -> None:
        """Checks the call and finds its plan and kernels, with and without `out`. The arguments are as in `Request`.

        Args:
            inputs: as the caller gave them, with the tensors of a cache in their places.
            score_mod: as in `flex_decode`, like all that follows.
            mask_mod: likewise.
            block_mask: likewise.
            aux: the numbers of rows that each call gives beside its output.
            options: likewise.

        Raises:
            TypeError, ValueError, TraceError, UnsupportedOpError, CompileError: as `flex_decode`.
        """
        self._inputs, self._mods, self._block_mask = inputs._replace(out=None), (score_mod, mask_mod), block_mask
        self._aux, self._options = aux, options
        request = self._request(inputs.query, None)
        # A plan that is known already does not check again what may differ between calls.
        check_inputs(request.inputs, DEFAULT_OPTIONS if options is None else options)
        find_plan(request, aux, options)
        out = inputs.out
        if out is None:
            out = inputs.query.new_empty(request.inputs.out_shape)
        with_out = self._request(inputs.query, out)
        find_plan(with_out, aux, options)
        tensors = {name: x for name, x in self._inputs._asdict().items() if isinstance(x, torch.Tensor)}
        first = {id(x): name for name, x in reversed(tensors.items())}  # a tensor may be given twice
        self._layouts: dict[str, Any] = {name: layout(x) for name, x in tensors.items() if first[id(x)] == name}
        self._fixed = [tensors[name] for name in self._layouts if name != "query"]
        # Such a number may change the plan, or is read on the host. A BlockMask and the debug option need more work.
        numbers = [getattr(inputs, name) for name in _NUMBERS]
        self._is_fixed = block_mask is None and not (options is not None and options.debug)
        self._is_fixed &= not any(isinstance(x, torch.Tensor) and x.is_cpu and not x.ndim for x in numbers)
        self._ready: dict[bool, _Ready] = {}
        for given in (request, with_out):
            self._keep(given, *find_plan(given, aux, options))

    def __call__(
        self, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes attention for new query tokens, on the current stream; returns at once.

        Everything is read again: lengths, caches, pages and scales in the tensors that were given to `prepare`, and
        what the mods capture. The result is that of `flex_decode`.

        Args:
            query: with the shape, strides, dtype and device of the query that was given to `prepare`.
            out: tensor `[B, Hq, Q, Dv]`, packed `[T, Hq, Dv]`, to write to; by default a new one.

        Returns:
            The output, and the log-sum-exp if `prepare` was asked for it.

        Raises:
            ValueError: the layout of the query, or of a tensor that was given to `prepare`, has changed.
            TypeError, ValueError, TraceError: as `flex_decode`, for `out` and for what the mods capture now.
            RuntimeError: it is called in a region that torch.compile traces.
        """
        if torch.compiler.is_compiling():
            raise RuntimeError(IN_REGION)
        ready = self._ready.get(out is not None)
        score_mod, mask_mod = self._mods
        if ready is None:
            return self._run_anew(query, out)
        run, score_mark, mask_mark, proofs, grad, addresses, same = ready
        tensors = (query, *self._fixed) if out is None else (query, *self._fixed, out)
        if not same(*tensors) or [*map(_address, self._fixed)] != addresses or query.data_ptr() & 15:
            return self._run_anew(query, out)
        score = NO_MOD if score_mod is None else identify("score_mod", score_mod)
        mask = NO_MOD if mask_mod is None else identify("mask_mod", mask_mod)
        if (
            score.mark != score_mark
            or mask.mark != mask_mark
            or (score.proof_values, mask.proof_values) != proofs
            or torch.is_grad_enabled() is not grad
            or (out is not None and out.data_ptr() & 15)
        ):
            return self._run_anew(query, out)
        counters.calls += 1
        counters.hits += 1
        result, lse, _ = run(query, out, score, mask)
        return result if lse is None else (result, lse)

    def __repr__(self) -> str:
        """What it computes, in a line."""
        query, key = self._inputs.query, self._inputs.key
        names = [name for name in Inputs._fields[3:] if getattr(self._inputs, name) is not None]
        mods = [getattr(mod, "__name__", type(mod).__name__) for mod in self._mods if mod is not None]
        more = [*mods, *names, *["block_mask"] * (self._block_mask is not None), *["return_lse"] * self._aux.lse]
        dtype = str(query.dtype).removeprefix("torch.")
        text = f"query {dtype} {list(query.shape)} on {query.device}, key {list(key.shape)}"
        return f"<PreparedCall: {', '.join([text, *more])}>"

    def _request(self, query: torch.Tensor, out: torch.Tensor | None) -> Request:
        """The call as `flex_decode` reads it."""
        inputs = self._inputs._replace(query=query, out=out)
        return read_request(inputs, *self._mods, self._block_mask, options=self._options)

    def _run_anew(self, query: torch.Tensor, out: torch.Tensor | None) -> Any:
        """Runs the call as `flex_decode` does, and keeps what it finds."""
        self._check_layouts(query)
        counters.calls += 1
        request = self._request(query, out)
        if self._is_fixed:
            plan, score, mask = find_plan(request, self._aux, self._options)
            self._keep(request, plan, score, mask)
            result, lse, _ = plan.run(request.inputs, score, mask)
        else:
            result, lse, _ = run_request(request, self._aux, self._options)
        return result if lse is None else (result, lse)

    def _keep(self, request: Request, plan: Plan, score: Mod, mask: Mod) -> None:
        """Keeps a call and its plan, so that the next one that is alike is quick."""
        inputs = request.inputs
        own = [inputs.query] if inputs.out is None else [inputs.query, inputs.out]
        if not self._is_fixed or any(x.data_ptr() & 15 for x in own):  # a plan depends on the alignment
            return
        given = [inputs.query, *self._fixed, *own[1:]]
        same = same_layouts(given)
        if same is None or not same(*given):
            return
        self._ready[inputs.out is not None] = _Ready(
            BoundPlan(plan, inputs, score, mask).run, score.mark, mask.mark, (score.proof_values, mask.proof_values),
            torch.is_grad_enabled(), [*map(_address, self._fixed)], same,
        )  # fmt: skip

    def _check_layouts(self, query: object) -> None:
        """Refuses a query, or a tensor that was given to `prepare`, that has another layout now.

        Raises:
            TypeError: the query is no tensor.
            ValueError: the message says what has changed.
            RuntimeError: the query has no values, because a region is traced.
        """
        if query.__class__ is FakeTensor:
            raise RuntimeError(IN_REGION)
        if not isinstance(query, torch.Tensor):
            raise TypeError(f"`query` must be a torch.Tensor, got {type(query).__name__}")
        fixed = [name for name in self._layouts if name != "query"]
        for name, tensor in (("query", query), *zip(fixed, self._fixed, strict=True)):
            before, now = self._layouts[name][:4], (tensor.shape, tensor.stride(), tensor.dtype, tensor.device)
            if now != before:
                raise ValueError(f"`{name}` was prepared with {_words(*before)}, and has {_words(*now)} now: {_REMEDY}")


def _words(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """A layout in words."""
    return f"shape {list(shape)}, strides {list(strides)}, {dtype} on {device}"
