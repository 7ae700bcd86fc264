"""A call as it arrives: its arguments in one common form, what its mods capture, and the lists of its BlockMask."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..analysis.proven import Listed
from ..call.block_mask import BlockLists, read_block_mask
from ..call.checks import check_inputs
from ..call.inputs import (
    DEFAULT_OPTIONS,
    DecodeOptions,
    Inputs,
    as_hint,
    as_kv_offset,
    as_kv_starts,
    as_q_offset,
    as_scale,
    per_sequence,
    same_for_all,
    with_packed_keys,
)
from ..kv.kv_cache import KVCache
from ..kv.layers import CacheLayer
from ..kv.paged import PagedKVCache
from ..kv.reading import read_cache
from .identity import NO_MOD, Mod, identify


class Request(NamedTuple):
    """The call that `flex_decode` was asked to compute.

    Attributes:
        inputs: tensors and numbers; checked only if there is a BlockMask.
        score, mask: both mods. The mask includes the mask of a BlockMask.
        lists: the lists of the BlockMask, or None.
        listed: whether these lists say which blocks are visited.
    """

    inputs: Inputs
    score: Mod
    mask: Mod
    lists: BlockLists | None
    listed: Listed


def read_request(
    inputs: Any,
    score_mod: Callable | None = None,
    mask_mod: Callable | None = None,
    block_mask: Any = None,
    cache: KVCache | PagedKVCache | CacheLayer | None = None,
    options: DecodeOptions | None = None,
) -> Request:
    """Reads the arguments of `flex_decode`, which are not checked yet.

    Args:
        inputs: an `Inputs` of what the caller gave.
        score_mod: as in `flex_decode`, like all that follows.
        mask_mod: likewise.
        block_mask: likewise.
        cache: likewise.
        options: likewise.

    Raises:
        TypeError, ValueError: they do not say what to attend to.
    """
    if cache is not None:
        inputs = read_cache(cache, inputs)
    if inputs.key.__class__ in (KVCache, PagedKVCache, CacheLayer):
        raise TypeError(f"`key` is a {type(inputs.key).__name__}: pass it as `cache=`, without `key` and `value`")
    if inputs.key is None or inputs.value is None:
        raise TypeError("flex_decode needs `key` and `value`, or a `cache` that has them")
    if inputs.cu_seqlens_k is not None:
        inputs = with_packed_keys(inputs)
    if inputs.max_q_len is not None:
        inputs = inputs._replace(max_q_len=as_hint(inputs.max_q_len, inputs.cu_seqlens_q))
    (
        query, key, value, kv_lens, q_lens, q_offset, page_table, k_scale, v_scale, sinks, cu_seqlens_q, cu_seqlens_k,
        kv_starts, kv_offset, max_q_len, scale, out,
    ) = inputs  # fmt: skip
    are_absent = q_lens is q_offset is k_scale is v_scale is kv_starts is kv_offset is None
    is_settled = kv_lens is None or (kv_lens.__class__ is torch.Tensor and kv_lens.ndim > 0)
    if not (are_absent and is_settled):
        of = query, cu_seqlens_q
        inputs = Inputs(
            query, key, value,
            None if kv_lens is None else same_for_all(kv_lens, *of),
            None if q_lens is None else per_sequence(q_lens, *of),
            None if q_offset is None else as_q_offset(q_offset, *of),
            page_table,
            None if k_scale is None else as_scale(k_scale, query),
            None if v_scale is None else as_scale(v_scale, query),
            sinks, cu_seqlens_q, cu_seqlens_k,
            None if kv_starts is None else as_kv_starts(kv_starts, *of),
            None if kv_offset is None else as_kv_offset(kv_offset, *of),
            max_q_len, scale, out,
        )  # fmt: skip
    lists, listed = None, Listed.NO
    if block_mask is not None:
        check_inputs(inputs.only_shapes(), options or DEFAULT_OPTIONS)
        listed = Listed.ALONE if mask_mod is None else Listed.WITH_MASK
        mask_mod, lists = read_block_mask(block_mask, inputs, mask_mod)
        lists.check_positions(inputs)
    score = NO_MOD if score_mod is None else identify("score_mod", score_mod)
    mask = NO_MOD if mask_mod is None else identify("mask_mod", mask_mod)
    return tuple.__new__(Request, (inputs, score, mask, lists, listed))
