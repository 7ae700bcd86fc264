"""Runs requests: finds the plan of a call, or makes it and remembers it."""

from __future__ import annotations

from operator import itemgetter

import torch

from ..call.inputs import DecodeOptions, Inputs
from ..call.signature import Aux
from ..memos import Bounded, counters
from .debug import check_again
from .identity import Mod, pins_of
from .plan import Plan, Results, any_length, layout
from .prepare import prepare
from .request import Request

_calls = Bounded.memo(limit=512)  # all that identifies a call but its numbers of keys and query tokens -> `_Lengths`

# The arguments whose layouts change with these numbers, in the order of `any_length`, and the others.
_LONG = ("query", "key", "value", "page_table", "k_scale", "v_scale", "out")
_long = itemgetter(*[Inputs._fields.index(name) for name in _LONG])
_others = itemgetter(*[place for place, name in enumerate(Inputs._fields) if name not in (*_LONG, "max_q_len")])


class _Lengths:
    """The plans of a call by the length of its cache, its number of query tokens and `max_q_len`.

    Attributes:
        plans: by layouts of query, caches and output, and by the values that proofs about indices use.
        prepared: what plans share, by the same without these numbers and their multiples.
        kept: the objects whose ids are in the key of the call.
    """

    def __init__(self, kept: list) -> None:
        self.plans = Bounded(limit=64)
        self.prepared = Bounded(limit=16)
        self.kept = kept


def run_request(request: Request, aux: Aux, options: DecodeOptions | None) -> Results:
    """Runs a request on the current stream.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`.
    """
    plan, score, mask = find_plan(request, aux, options)
    inputs = request.inputs
    if plan.options.debug:
        check_again("score_mod", score, inputs.query.device)
        check_again("mask_mod", mask, inputs.query.device)
    return plan.run(inputs, score.leaves, mask.leaves, request.lists)


def find_plan(request: Request, aux: Aux, options: DecodeOptions | None) -> tuple[Plan, Mod, Mod]:
    """Finds the plan of a request, or makes it; nothing is computed.

    Returns:
        The plan, and both mods with what tracing found of them.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`.
    """
    inputs, score, mask, _, listed = request
    length = inputs.kv_lens if inputs.kv_lens.__class__ is int else None
    try:
        call = (
            score.identity, mask.identity, *[None if x is None else layout(x) for x in _others(inputs)],
            _same_start(inputs.key, inputs.value), aux, options, torch.is_grad_enabled(), listed,
        )  # fmt: skip
        lengths = (
            score.proof_values, mask.proof_values, inputs.max_q_len,
            *[None if x is None else layout(x) for x in _long(inputs)], length,
        )  # fmt: skip
    except RuntimeError as error:  # a tensor has no memory that could be read
        raise ValueError(
            f"flex_decode needs tensors with memory of their own: {error}\n"
            "  In torch.vmap and torch.func, make the mapped dimension part of the batch."
        ) from None
    if options is not None and not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    known = _calls.get(call)
    plan = None if known is None else known.plans.get(lengths)
    if plan is None:
        return _make_plan(known, request, call, lengths)
    counters.hits += 1
    return plan, score, mask


def _make_plan(known: _Lengths | None, request: Request, call: tuple, lengths: tuple) -> tuple[Plan, Mod, Mod]:
    """Makes the plan of a call and keeps it; where only the length of the cache is new, from what is prepared.

    Returns:
        The plan, and both mods with what tracing found of them.
    """
    inputs, score, mask, _, listed = request
    free = any_length(*lengths[3:])
    shared = None
    if known is not None and free is not None:
        shared = known.prepared.get((len(score.proof_values), len(mask.proof_values), free))
    if known is not None and shared is not None:
        plan, mask = shared.plan(inputs, (score, mask))
    else:
        if getattr(inputs.query, "is_meta", False):
            raise ValueError(
                "flex_decode needs tensors with values, got the meta device; flexdecode.explain takes shapes, and so "
                "do flexdecode.warmup and flexdecode.save_kernels"
            )
        *_, aux, options, _, _ = call
        prepared, plan, (score, mask) = prepare(inputs, (score, mask), aux, options, listed)
        call = (score.identity, mask.identity, *call[2:])
        known = _calls.get(call)
        if known is None:
            known = _Lengths([pins_of(mod) for mod in (score, mask)])
            _calls.add(call, known)
        if free is not None:
            known.prepared.add((len(score.proof_values), len(mask.proof_values), free), prepared)
    known.plans.add((score.proof_values, mask.proof_values, *lengths[2:]), plan)
    return plan, score, mask


def _same_start(key: object, value: object) -> bool:
    """Whether values may be the first columns of keys: not part of the layouts, but of a plan."""
    if not (isinstance(key, torch.Tensor) and isinstance(value, torch.Tensor)):
        return False
    return key.layout == value.layout == torch.strided and key.data_ptr() == value.data_ptr()
