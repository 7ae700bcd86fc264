"""Runs requests: finds the plan of a call, or makes it and remembers it."""

from __future__ import annotations

from typing import Any

import torch

from ..call.inputs import DecodeOptions, Inputs
from ..call.signature import Aux
from ..memos import Bounded, counters
from .debug import check_again
from .identity import Mod
from .plan import Plan, Results, any_length, layout
from .prepare import prepare
from .recent import Recent, kinds_of
from .request import Request

# All that identifies a call but its numbers of keys, query tokens and, if packed, sequences -> `_Lengths`
_calls = Bounded.memo(limit=512)

_recent = Bounded.memo(limit=512)  # the mods of a call and how it is run -> its last `Recent`s
MAX_RECENT = 4


class _Lengths:
    """The plans of a call by its numbers of keys, query tokens and sequences, and `max_q_len`.

    Attributes:
        plans: by layouts of query, caches and output, and by the values that proofs about indices use.
        found: the keys of plans that were found there once. Those that come again become a `Recent`.
        prepared: what plans share, by the same without these numbers and their multiples.
    """

    def __init__(self) -> None:
        self.plans = Bounded(limit=256)
        self.found = Bounded(limit=16)
        self.prepared = Bounded(limit=16)


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
    return plan.run(inputs, score, mask, request.lists)


def find_plan(request: Request, aux: Aux, options: DecodeOptions | None) -> tuple[Plan, Mod, Mod]:
    """Finds the plan of a request, or makes it. Nothing is computed, unless schedules have to be measured.

    Returns:
        The plan, and both mods with what tracing found of them.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`.
    """
    inputs, score, mask, _, listed = request
    if options is not None and not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    grad = torch.is_grad_enabled()
    try:
        site = score.mark, mask.mark, aux, options, grad, listed, kinds_of(inputs)
        recents = _recent.get(site, ())
        for recent in recents:
            if recent.fits(inputs, score, mask):
                counters.hits += 1
                return recent.plan, score, mask
        of_call, of_lengths = _layouts(inputs)
    except RuntimeError as error:  # a tensor has no memory that could be read
        raise ValueError(
            f"flex_decode needs tensors with memory of their own: {error}\n"
            "  In torch.vmap and torch.func, make the mapped dimension part of the batch."
        ) from None
    call = (score.mark, mask.mark, of_call, aux, options, grad, listed)
    lengths = (score.proof_values, mask.proof_values, *of_lengths)
    known = _calls.get(call)
    if known is None:
        return _make_plan(known, request, call, lengths)
    plan = known.plans.get(lengths)
    if plan is None or not plan.is_settled:
        return _make_plan(known, request, call, lengths)
    if lengths not in known.found:
        known.found.add(lengths, True)
    elif (found := Recent.of(plan, inputs, score, mask)) is not None:
        _recent.add(site, (found, *recents[: MAX_RECENT - 1]))
    counters.hits += 1
    return plan, score, mask


def _make_plan(known: _Lengths | None, request: Request, call: tuple, lengths: tuple) -> tuple[Plan, Mod, Mod]:
    """Makes the plan of a call and keeps it; where only the length of the cache is new, from what is prepared.

    Returns:
        The plan, and both mods with what tracing found of them.
    """
    inputs, score, mask, lists, listed = request
    free = any_length(*lengths[3:])
    shared = None
    if known is not None and free is not None:
        shared = known.prepared.get((len(score.proof_values), len(mask.proof_values), free))
    if known is not None and shared is not None:
        plan, mask = shared.plan(inputs, (score, mask), lists)
    else:
        if getattr(inputs.query, "is_meta", False):
            raise ValueError(
                "flex_decode needs tensors with values, got the meta device; flexdecode.explain takes shapes, and so "
                "do flexdecode.warmup and flexdecode.save_kernels"
            )
        *_, aux, options, _, _ = call
        prepared, plan, (score, mask) = prepare(inputs, (score, mask), aux, options, listed, lists)
        call = (score.mark, mask.mark, *call[2:])
        known = _calls.get(call)
        if known is None:
            known = _Lengths()
            _calls.add(call, known)
        if free is not None:
            known.prepared.add((len(score.proof_values), len(mask.proof_values), free), prepared)
    known.plans.add((score.proof_values, mask.proof_values, *lengths[2:]), plan)
    return plan, score, mask


def _layouts(inputs: Inputs) -> tuple[tuple, tuple]:
    """What a plan depends on in the arguments of a call.

    Returns:
        What does not change with the numbers of keys, query tokens and packed sequences; and what does: `max_q_len`,
        and the arguments of `any_length`.

    Raises:
        RuntimeError: a tensor has no memory that could be read.
    """
    (
        query, key, value, kv_lens, q_lens, q_offset, page_table, k_scale, v_scale, sinks, cu_seqlens_q, cu_seqlens_k,
        kv_starts, kv_offset, max_q_len, scale, out,
    ) = inputs  # fmt: skip
    of_key, of_value = layout(key), layout(value)
    # Whether values may be the first columns of keys: not part of the layouts, but of a plan.
    same_start = (
        of_key.__class__ is of_value.__class__ is tuple
        and None not in (of_key[4], of_value[4])
        and key.data_ptr() == value.data_ptr()
    )
    others, batch = None, None
    of_lens = None if kv_lens is None else layout(kv_lens)
    if not (q_lens is q_offset is sinks is cu_seqlens_q is cu_seqlens_k is kv_starts is kv_offset is scale is None):
        others = tuple(
            None if x is None else layout(x)
            for x in (q_lens, q_offset, sinks, cu_seqlens_q, cu_seqlens_k, kv_starts, kv_offset, scale)
        )
        if cu_seqlens_q is not None:
            of_lens, others, batch = _of_any_batch(of_lens, others)
    return (of_lens, others, same_start), (
        max_q_len,
        batch,
        layout(query),
        of_key,
        of_value,
        None if page_table is None else layout(page_table),
        None if k_scale is None else layout(k_scale),
        None if v_scale is None else layout(v_scale),
        None if out is None else layout(out),
        kv_lens if kv_lens.__class__ is int else None,
    )


def _of_any_batch(of_lens: Any, others: tuple) -> tuple[Any, tuple, int | None]:
    """The layouts of arguments with one entry per sequence, without the number of sequences of packed queries.

    Args:
        of_lens: of `kv_lens`.
        others: of `q_lens`, `q_offset`, `sinks`, `cu_seqlens_q`, `cu_seqlens_k`, `kv_starts`, `kv_offset` and `scale`.

    Returns:
        The layouts, and the number of sequences. A tensor of another length keeps its shape, so its call is checked.
    """
    of_q_lens, of_offset, of_sinks, of_cu_q, of_cu_k, of_starts, of_kv_offset, of_scale = others
    if not (of_cu_q.__class__ is tuple and len(of_cu_q[0]) == 1 and of_cu_q[0][0] > 1):
        return of_lens, others, None
    (ends,) = of_cu_q[0]

    def without(of: Any, length: int) -> Any:
        return (None, *of[1:]) if of.__class__ is tuple and of[0] == (length,) else of

    of_lens, of_offset, of_starts, of_kv_offset = (
        without(of, ends - 1) for of in (of_lens, of_offset, of_starts, of_kv_offset)
    )
    of_cu_q, of_cu_k = without(of_cu_q, ends), without(of_cu_k, ends)
    return of_lens, (of_q_lens, of_offset, of_sinks, of_cu_q, of_cu_k, of_starts, of_kv_offset, of_scale), ends - 1
