"""Puts a cache into the arguments of a call."""

from __future__ import annotations

import torch

from ..call.inputs import Inputs
from .cache import Cache
from .layers import CacheLayer


def read_cache(cache: object, inputs: Inputs) -> Inputs:
    """Puts a KVCache, a PagedKVCache or a layer of one into the arguments of a call, which are not checked yet.

    Raises:
        TypeError: it is no cache.
        ValueError: what it stands for is given as well, or the query does not fit to the cache.
    """
    cache = checked_cache(cache)
    if inputs.cu_seqlens_k is not None:
        raise ValueError("`cu_seqlens_k` and `cache` exclude one another: `cu_seqlens_k` is for keys without a cache")
    names = ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale")
    for name in names:
        if getattr(inputs, name) is not None:
            raise ValueError(f"`{name}` is given twice: `cache` has it already")
    query: object = inputs.query
    packed = inputs.cu_seqlens_q is not None  # torch.compile of 2.9 knows no properties of records
    if isinstance(query, torch.Tensor) and query.dim() == (3 if packed else 4):
        _check_query(cache, query, inputs.cu_seqlens_q)
    found = {name: getattr(cache, name) for name in names}
    if cache._latent_width is not None and torch.compiler.is_compiling():
        # As an input of the region, the view would be another tensor in the memory of one that an append changes.
        found["value"] = cache.key[..., : cache._latent_width]
    return inputs._replace(**found)


def checked_cache(cache: object) -> Cache | CacheLayer:
    """Refuses what cannot be the `cache` of a call.

    Raises:
        TypeError: it is no cache.
        ValueError: it has layers, and a call needs one of them.
    """
    if not isinstance(cache, (Cache, CacheLayer)):
        raise TypeError(f"`cache` must be a flexdecode.KVCache, PagedKVCache or CacheLayer, got {type(cache).__name__}")
    if isinstance(cache, Cache) and cache.num_layers is not None:
        raise ValueError(f"`cache` has {cache.num_layers} layers: pass one of them, `cache=cache.layer(i)`")
    return cache


def _check_query(cache: Cache | CacheLayer, query: torch.Tensor, cu_seqlens_q: object) -> None:
    """Refuses a query that does not match a cache. Later checks refuse a query that is wrong in itself."""
    batch, (_, heads, _, width) = len(cache.kv_lens), cache.key.shape
    packed = cu_seqlens_q is not None
    if isinstance(cu_seqlens_q, torch.Tensor) and cu_seqlens_q.shape != (batch + 1,):
        form = f"[B + 1] = [{batch + 1}] (from cache)"
        raise ValueError(f"`cu_seqlens_q` must have shape {form}, got {list(cu_seqlens_q.shape)}")
    if not (packed or len(query) == batch) or query.shape[-1] != width or query.shape[1] % heads:
        first = "[T, Hq, D] with" if packed else f"[B, Hq, Q, D] with B = {batch},"
        form = f"{first} Hq a multiple of Hkv = {heads} and D = {width} (from cache)"
        raise ValueError(f"`query` must have shape {form}, got {list(query.shape)}")
    if query.device != cache.key.device:
        raise ValueError(f"`query` must be on the device of `cache`, {cache.key.device}, got {query.device}")
