"""`flex_decode` and `explain`: from arguments to a plan that is known or made."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .call.inputs import DecodeOptions, Inputs
from .call.schedule import DeviceFacts, forget_schedules
from .codegen.kernels import forget_kernels
from .frontend.captures import pins
from .kv.kv_cache import KVCache, PagedKVCache
from .memos import Bounded, CacheInfo, counters, forget_memos, lock, reset, snapshot
from .report.explanation import Explanation, explain_request
from .runtime.debug import check_again
from .runtime.identity import Mod, forget_graphs
from .runtime.launch import forget_workspaces
from .runtime.plan import Plan, any_length, layout
from .runtime.prepare import prepare
from .runtime.request import read_request

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_calls = Bounded(limit=512)  # all that identifies a call but the length of its cache -> its `_Lengths`


class _Lengths:
    """The plans of a call by the length of its cache.

    Attributes:
        plans: by layouts of the caches, and by the values that proofs about indices use.
        prepared: what plans share, by the same without N and its multiples.
        kept: the objects whose ids are in the key of the call.
    """

    def __init__(self, kept: list) -> None:
        self.plans = Bounded(limit=64)
        self.prepared = Bounded(limit=16)
        self.kept = kept


def flex_decode(
    query: torch.Tensor,
    key: torch.Tensor | None = None,
    value: torch.Tensor | None = None,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    kv_lens: int | torch.Tensor | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    block_mask: BlockMask | None = None,
    page_table: torch.Tensor | None = None,
    q_lens: int | torch.Tensor | None = None,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
    sinks: torch.Tensor | None = None,
    cache: KVCache | PagedKVCache | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    options: DecodeOptions | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends the newest query tokens to a KV cache, with attention written as two Python functions.

        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score - slopes[h] * (q_idx - kv_idx)
        >>> out = flex_decode(query, key, value, score_mod=alibi)

    Args:
        query: `[B, Hq, Q, D]`, float16, bfloat16 or float32, any strides; D from 16 to 576.
        key: `[B, Hkv, N, D]`; `Hq` is a multiple of `Hkv`. The batch may be 1 to serve every sequence. In the dtype of
            the query, or float8_e4m3fn, float8_e5m2 or int8 with scales.
        value: `[B, Hkv, N, Dv]`. Where it is a view of the first columns of `key` (MLA), memory is read once.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`. `score` is the scaled logit in natural-log units,
            `h` the query head; positions are absolute token positions in the sequence.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, true where the query attends to the key.
        kv_lens: live keys of each sequence, int32 or int64 `[B]`, or one number for all (an integer or a 0-d tensor);
            by default N.
        q_offset: position of the first query token, int32 or int64 `[B]`, or one number for all; by default
            `kv_lens[b] - Q`, because the queries are the newest tokens.
        scale: factor of the dot product; by default `1 / sqrt(D)`.
        block_mask: PyTorch's BlockMask, for masks that only lists of blocks describe; holds beside `mask_mod`. Its
            rows are query positions as everywhere here: one for training fits as it is, one that was made for the
            newest tokens needs `q_offset=0`. Positions outside its rows attend to nothing, and are refused where the
            host knows them.
        page_table: pages of each sequence, int32 or int64 `[B, max_pages]`. Then `key` is
            `[num_pages, Hkv, page_size, D]` and `value` `[num_pages, Hkv, page_size, Dv]`, `kv_lens` is required, and
            N is `max_pages * page_size`. Mods see positions in the sequence, never pages. Entries past the last page
            of a sequence are not read.
        q_lens: query tokens of each sequence, int32 or int64 `[B]`, or one number for all; by default Q. What lies
            past them gives 0 with a log-sum-exp of -inf. The newest token is then token `q_lens[b] - 1`.
        k_scale: what a stored key is multiplied by: a number or a 0-d tensor, or a tensor per head `[Hkv]`, per
            sequence and head `[B, Hkv]`, or per token `[B, Hkv, N]` (paged: `[num_pages, Hkv, page_size]`).
        v_scale: the same for values.
        sinks: a logit for each query head, floating `[Hq]`, in natural-log units, that joins the softmax without a
            value.
        cache: a KVCache or PagedKVCache, in place of key, value, kv_lens, page_table, k_scale and v_scale.
        return_lse: also return the natural log of the sum of exponentials, float32 `[B, Hq, Q]`.
        out: tensor `[B, Hq, Q, Dv]` to write to, any strides; it shares no memory with an input.
        options: how to execute the call.

    Returns:
        `[B, Hq, Q, Dv]` in the dtype of `query`, and the log-sum-exp if asked for. A row without a live key is 0 with
        a log-sum-exp of -inf, or of its sink.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
        TraceError: a mod cannot be traced; the message has its line and the remedy.
        UnsupportedOpError: a mod calls an operation that flexdecode does not have.
    """
    counters.calls += 1
    if return_lse is not True and return_lse is not False:
        raise TypeError(f"`return_lse` must be a bool, got {type(return_lse).__name__}")
    inputs, score, mask, lists, listed = read_request(
        query, key, value, score_mod, mask_mod, kv_lens, q_offset, scale, block_mask, page_table, q_lens, k_scale,
        v_scale, sinks, cache, out, options,
    )  # fmt: skip
    if lists is not None:
        lists.check_positions(inputs)
    query, key, value = inputs[:3]
    call = (
        score.identity, mask.identity, layout(query), layout(inputs.kv_lens), layout(inputs.q_lens),
        layout(inputs.q_offset), layout(sinks), layout(out), _same_start(key, value), return_lse, options,
        torch.is_grad_enabled(), listed,
    )  # fmt: skip
    lengths = (
        score.proof_values, mask.proof_values, layout(key), layout(value), layout(inputs.page_table),
        layout(inputs.k_scale), layout(inputs.v_scale), inputs.kv_lens if inputs.kv_lens.__class__ is int else None,
    )  # fmt: skip
    if options is not None and not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    known = _calls.get(call)
    plan = None if known is None else known.plans.get(lengths)
    if plan is None:
        plan, score, mask = _make_plan(known, inputs, score, mask, call, lengths)
    else:
        counters.hits += 1
    if plan.options.debug:
        check_again("score_mod", score, query.device)
        check_again("mask_mod", mask, query.device)
    return plan.run(inputs, score.leaves, mask.leaves, lists)


def explain(*arguments: Any, device: str | DeviceFacts | None = None, **keywords: Any) -> Explanation:
    """Says what `flex_decode` does with the same arguments; nothing is compiled or launched.

        >>> print(explain(query, key, value, mask_mod=mods.sliding_window(1024), device="H200"))

    Query, key and value may be on the meta device (`torch.empty(..., device="meta")`): only their shapes matter, and
    lengths and captured tensors may then be anywhere. These are read, so on a GPU the call waits for it.

    Args:
        arguments: those of `flex_decode`, by place.
        device: the GPU to explain for, where it is not that of the tensors: `"H200"`, or the facts of another one.
        keywords: those of `flex_decode`, by name. Which blocks a `block_mask` lists is not reported, and the contents
            of a `page_table` do not matter.

    Returns:
        The parts of the report as fields; its text by `str`, a picture by `save_picture`.

    Raises:
        TypeError, ValueError, TraceError, UnsupportedOpError: as `flex_decode`; also if the device is not known.
    """
    try:
        given = inspect.signature(flex_decode).bind(*arguments, **keywords)
    except TypeError as error:
        raise TypeError(f"explain() {error}") from None
    given.apply_defaults()
    asked = given.arguments
    del asked["return_lse"]
    return explain_request(read_request(**asked), asked["options"], device)


def _make_plan(
    known: _Lengths | None, inputs: Inputs, score: Mod, mask: Mod, call: tuple, lengths: tuple
) -> tuple[Plan, Mod, Mod]:
    """Makes the plan of a call and keeps it; where only the length of the cache is new, from what is prepared.

    Returns:
        The plan, and both mods with what tracing found of them.
    """
    free = any_length(*lengths[2:])
    shared = None
    if known is not None and free is not None:
        shared = known.prepared.get((len(score.proof_values), len(mask.proof_values), free))
    if known is not None and shared is not None:
        plan, mask = shared.plan(inputs, (score, mask))
    else:
        if getattr(inputs.query, "is_meta", False):
            raise ValueError(
                "flex_decode needs tensors with values, got the meta device; flexdecode.explain takes shapes"
            )
        *_, return_lse, options, _, listed = call
        prepared, plan, (score, mask) = prepare(inputs, (score, mask), return_lse, options, listed)
        call = (score.identity, mask.identity, *call[2:])
        known = _calls.get(call)
        if known is None:
            known = _Lengths([pins(mod.function, mod.followed) for mod in (score, mask) if mod.function is not None])
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


def cache_info() -> CacheInfo:
    """Counts of what was traced, generated, compiled and found since the start or the last `clear_cache()`."""
    return snapshot()


def clear_cache() -> None:
    """Forgets every plan, graph and kernel in memory and resets the counters; the disk cache stays.

    From Triton 3.8 on this unloads the kernels from the GPU. A CUDA graph that holds one must not be replayed after it.
    """
    with lock:
        _calls.clear()
        forget_memos()
        forget_schedules()
        forget_graphs()
        forget_kernels()
        forget_workspaces()
        reset()
