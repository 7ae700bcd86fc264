"""A call of `flex_decode` that was checked once and runs again and again with new queries."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..call.checks import check_inputs
from ..call.inputs import DEFAULT_OPTIONS, DecodeOptions, Inputs
from ..call.signature import Aux
from ..errors import IN_REGION
from ..frontend.captures import same_layouts
from ..memos import counters
from .bound import BoundPlan
from .identity import NO_MOD, Mod, identify
from .plan import Plan, Results, layout, without_memory
from .request import Request, read_request
from .run import find_plan, run_request

_NUMBERS = ("kv_lens", "q_lens", "q_offset", "kv_starts", "kv_offset", "k_scale", "v_scale")
_address = torch.Tensor.data_ptr
_REMEDY = "prepare the call again: flexdecode.prepare(...)"
MAX_READY = 4  # tensors made in and outside of inference mode, each in a call in and outside of it


class _Ready(NamedTuple):
    """All that a call needs whose arguments have the layouts of an earlier one.

    Attributes:
        run: computes the call. The addresses of fixed tensors are filled in.
        score_mark, mask_mark, proofs: of its mods; with others, the call may need another plan.
        grad: whether gradients were on.
        addresses: of the fixed tensors.
        same: whether query, fixed tensors and `out` have the layouts of those, and the same mode of autograd. Strides
            of dimensions of size 1 may differ.
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
            inputs: as the caller gave them, with the tensors of a cache in their places, and without `out`.
            score_mod: as in `flex_decode`, like all that follows.
            mask_mod: likewise.
            block_mask: likewise.
            aux: the numbers of rows that each call gives beside its output.
            options: likewise.

        Raises:
            TypeError, ValueError, TraceError, UnsupportedOpError, CompileError: as `flex_decode`.
        """
        self._inputs, self._mods, self._block_mask = inputs, (score_mod, mask_mod), block_mask
        self._aux, self._options = aux, options
        request = self._request(inputs.query, None)
        # A plan that is known already does not check again what may differ between calls.
        check_inputs(request.inputs, DEFAULT_OPTIONS if options is None else options)
        find_plan(request, aux, options)
        with_out = self._request(inputs.query, inputs.query.new_empty(request.inputs.out_shape))
        find_plan(with_out, aux, options)
        tensors = {name: x for name, x in inputs._asdict().items() if isinstance(x, torch.Tensor) and name != "query"}
        first = {id(x): name for name, x in reversed(tensors.items())}  # a tensor may be given twice
        fixed = {name: x for name, x in tensors.items() if first[id(x)] == name}
        self._fixed = [*fixed.values()]
        self._layouts: dict[str, Any] = {name: layout(x) for name, x in {"query": inputs.query, **fixed}.items()}
        self._inputs = inputs._replace(query=without_memory(inputs.query))
        # Such a number may change the plan, or is read on the host. A BlockMask and the debug option need more work.
        numbers = [getattr(inputs, name) for name in _NUMBERS]
        self._is_fixed = block_mask is None and not (options is not None and options.debug)
        self._is_fixed &= not any(isinstance(x, torch.Tensor) and x.is_cpu and not x.ndim for x in numbers)
        self._ready: dict[bool, tuple[_Ready, ...]] = {False: (), True: ()}  # by whether there is an `out`
        for given in (request, with_out):
            self._keep(given, *find_plan(given, aux, options))

    def __call__(
        self, query: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Computes attention for new query tokens, on the current stream; returns at once.

        Everything is read again: lengths, caches, pages and scales in the tensors that were given to `prepare`, and
        what the mods capture. The result is that of `flex_decode`.

        Args:
            query: with the shape, strides, dtype and device of the query that was given to `prepare`. Strides of
                dimensions of size 1 do not matter.
            out: tensor `[B, Hq, Q, Dv]`, packed `[T, Hq, Dv]`, to write to; by default a new one.

        Returns:
            The output, and the log-sum-exp if `prepare` was asked for it.

        Raises:
            ValueError: the layout of the query, or of a tensor that was given to `prepare`, has changed.
            TypeError, ValueError, TraceError: as `flex_decode`, for `out` and for what the mods capture now.
            RuntimeError: it is called in a region that torch.export traces. Where torch.compile traces, the region
                ends before the call and another one begins after it; with `fullgraph=True`, that is an error of
                torch.compile.
        """
        if torch.compiler.is_dynamo_compiling():
            from .outside import outside

            return outside(self, query, out)
        tensors = (query, *self._fixed) if out is None else (query, *self._fixed, out)
        for ready in self._ready[out is not None]:
            if ready.same(*tensors):
                break
        else:
            return self._run_anew(query, out)
        run, score_mark, mask_mark, proofs, grad, addresses, _ = ready
        if [*map(_address, self._fixed)] != addresses or query.data_ptr() & 15:
            return self._run_anew(query, out)
        score_mod, mask_mod = self._mods
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
        (shape, _, query_dtype, device, *_), key = self._layouts["query"], self._inputs.key
        names = [name for name in Inputs._fields[3:] if getattr(self._inputs, name) is not None]
        mods = [getattr(mod, "__name__", type(mod).__name__) for mod in self._mods if mod is not None]
        more = [*mods, *names, *["block_mask"] * (self._block_mask is not None), *["return_lse"] * self._aux.lse]
        dtype = str(query_dtype).removeprefix("torch.")
        text = f"query {dtype} {list(shape)} on {device}, key {list(key.shape)}"
        return f"<PreparedCall: {', '.join([text, *more])}>"

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Refuses to be pickled or copied.

        Raises:
            TypeError: the message has the remedy.
        """
        raise TypeError(
            "a prepared call cannot be pickled or copied: it holds kernels and addresses of its process. Prepare "
            "another one where it is needed, with the same arguments: flexdecode.prepare(...)"
        )

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
        if not (self._is_fixed and plan.is_settled):
            return
        if any(x.data_ptr() & 15 for x in own):  # a plan depends on the alignment
            return
        given = [inputs.query, *self._fixed, *own[1:]]
        same = same_layouts(given, single_steps=False)
        if same is None or not same(*given):
            return
        ready = _Ready(
            BoundPlan(plan, inputs, score, mask).run, score.mark, mask.mark, (score.proof_values, mask.proof_values),
            torch.is_grad_enabled(), [*map(_address, self._fixed)], same,
        )  # fmt: skip
        # It takes the place of the one that was found for such tensors, and did not fit.
        others = [one for one in self._ready[inputs.out is not None] if not one.same(*given)]
        self._ready[inputs.out is not None] = (ready, *others[: MAX_READY - 1])

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
            if _that_matters(*now) != _that_matters(*before):
                raise ValueError(f"`{name}` was prepared with {_words(*before)}, and has {_words(*now)} now: {_REMEDY}")


def _that_matters(shape: tuple[int, ...], strides: tuple[int, ...], *rest: object) -> tuple:
    """A layout without the strides of dimensions of size 1: no address depends on them."""
    return shape, [step for size, step in zip(shape, strides, strict=True) if size != 1], *rest


def _words(shape: tuple[int, ...], strides: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> str:
    """A layout in words."""
    return f"shape {list(shape)}, strides {list(strides)}, {dtype} on {device}"
