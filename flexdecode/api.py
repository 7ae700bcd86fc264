"""`flex_decode`: the pipeline, readable in one screen."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from . import cache
from .block_mask import read_block_mask
from .cache import CacheInfo
from .captures import pins
from .compiled import forget_kernels
from .identity import forget_graphs, identify
from .launch import forget_workspaces
from .plan import layout, prepare
from .signature import DEFAULT_OPTIONS, DecodeOptions, check_inputs

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

_plans = cache.Bounded(limit=1024)  # all that identifies a call -> its plan, and the objects whose ids are in there


def flex_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    *,
    kv_lens: torch.Tensor | None = None,
    q_offset: int | torch.Tensor | None = None,
    scale: float | None = None,
    block_mask: BlockMask | None = None,
    return_lse: bool = False,
    out: torch.Tensor | None = None,
    options: DecodeOptions | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attends the newest query tokens to a KV cache, with attention written as two Python functions.

        >>> def alibi(score, b, h, q_idx, kv_idx):
        ...     return score - slopes[h] * (q_idx - kv_idx)
        >>> out = flex_decode(query, key, value, score_mod=alibi)

    Args:
        query: `[B, Hq, Q, D]`, float16, bfloat16 or float32, any strides; D from 16 to 256.
        key: `[B, Hkv, N, D]`; `Hq` is a multiple of `Hkv`. The batch may be 1 to serve every sequence.
        value: `[B, Hkv, N, Dv]`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`. `score` is the scaled logit in natural-log units,
            `h` the query head; positions are absolute token positions in the sequence.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx) -> bool`, true where the query attends to the key.
        kv_lens: live keys of each sequence, int32 or int64 `[B]`; by default N.
        q_offset: position of the first query token, a number or an integer tensor `[B]`; by default
            `kv_lens[b] - Q`, because the queries are the newest tokens.
        scale: factor of the dot product; by default `1 / sqrt(D)`.
        block_mask: PyTorch's BlockMask, for masks that only lists of blocks describe; holds beside `mask_mod`. Its
            rows are query positions as everywhere here: one for training fits as it is, one that was made for the
            newest tokens needs `q_offset=0`. Positions outside its rows attend to nothing, and are refused where the
            host knows them.
        return_lse: also return the natural log of the sum of exponentials, float32 `[B, Hq, Q]`.
        out: tensor `[B, Hq, Q, Dv]` to write to, any strides.
        options: how to execute the call.

    Returns:
        `[B, Hq, Q, Dv]` in the dtype of `query`, and the log-sum-exp if asked for. A row without a live key is 0 with
        a log-sum-exp of -inf.

    Raises:
        TypeError, ValueError: the arguments do not fit together.
        TraceError: a mod cannot be traced; the message has its line and the remedy.
        UnsupportedOpError: a mod calls an operation that flexdecode does not have.
    """
    cache.counters.calls += 1
    if return_lse is not True and return_lse is not False:
        raise TypeError(f"`return_lse` must be a bool, got {type(return_lse).__name__}")
    lists, combined = None, block_mask is not None and mask_mod is not None
    if block_mask is not None:
        check_inputs(query, key, value, kv_lens, q_offset, scale, out, options or DEFAULT_OPTIONS)
        mask_mod, lists = read_block_mask(block_mask, query, mask_mod)
        lists.check_positions(query.shape[2], key.shape[2], kv_lens, q_offset)
    score = identify("score_mod", score_mod)
    mask = identify("mask_mod", mask_mod)
    call = (
        score.identity, mask.identity, score.present, mask.present, layout(query), layout(key), layout(value),
        layout(out), layout(kv_lens), layout(q_offset), return_lse, options, torch.is_grad_enabled(),
        lists is not None, combined,
    )  # fmt: skip
    try:
        found = _plans.get(call)
    except TypeError:  # options that are no DecodeOptions: the checks of inputs say so
        found = None
    if found is None:
        plan, score, mask = prepare(
            query, key, value, score, mask, kv_lens, q_offset, scale, return_lse, out, options, lists is not None,
            combined,
        )  # fmt: skip
        kept = [pins(mod.function) for mod in (score, mask) if mod.function is not None]
        _plans.add((score.identity, mask.identity, score.present, mask.present, *call[4:]), (plan, kept))
    else:
        cache.counters.hits += 1
        plan = found[0]
    return plan.run(query, key, value, kv_lens, q_offset, scale, out, score.leaves, mask.leaves, lists)


def cache_info() -> CacheInfo:
    """Counts of what was traced, generated, compiled and found since the start or the last `clear_cache()`."""
    return cache.snapshot()


def clear_cache() -> None:
    """Forgets every plan, graph and kernel in memory and resets the counters; the disk cache stays."""
    with cache.lock:
        _plans.clear()
        forget_graphs()
        forget_kernels()
        forget_workspaces()
        cache.reset()
