"""One layer of a cache in pages: what `flex_decode` and `append` see of it."""

from __future__ import annotations

import itertools
import weakref
from typing import Any, NamedTuple

import torch

from .cache import Cache
from .slots import check_slots, is_list
from .steps import Step, check_tokens
from .writing import (
    Reserved,
    Stored,
    check_gradient,
    check_new,
    has_tokens,
    is_packed,
    write_reserved,
    write_to_slots,
)

_numbers = itertools.count()
# The layers by their numbers, by which the custom op of a compiled region finds their steps.
_layers: weakref.WeakValueDictionary[int, CacheLayer] = weakref.WeakValueDictionary()


class LayerTensors(NamedTuple):
    """The tensors of a layer. Those that all layers share are the cache's own; shapes and dtypes as in `CacheLayer`."""

    key: torch.Tensor
    value: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    page_table: torch.Tensor
    kv_lens: torch.Tensor


class CacheLayer:
    """One layer of a `PagedKVCache` with layers, from `PagedKVCache.layer`. `flex_decode` takes it as `cache=`.

    A layer does not keep its cache alive. A copy of a layer, by `copy.deepcopy` or `pickle`, is the same layer of a
    copy of the cache, and keeps that cache.

    Attributes:
        index: the number of the layer.
        key: `[num_pages, Hkv, page_size, D]`, the keys of this layer.
        value: `[num_pages, Hkv, page_size, Dv]`, its values; with latents, a view of `key`.
        k_scale, v_scale: None without quantisation; else float32 `[num_pages, Hkv, page_size]`, one per token and head,
            or the given `[Hkv]`.
        page_table: int32 `[B, max_pages]`, that of all layers.
        kv_lens: int32 `[B]`, the lengths, those of all layers.
    """

    def __init__(self, cache: Cache, index: int, tensors: LayerTensors, latent: bool) -> None:
        self._cache, self.index = weakref.ref(cache), index
        self._kept: Cache | None = None
        self.key, self.value, self.k_scale, self.v_scale, self.page_table, self.kv_lens = tensors
        self._latent_width = self.value.shape[3] if latent else None
        step = cache._step
        self._step, self._lengths = step, cache._lengths
        self._reserved = Reserved(self.page_table, step.starts, step.ends, step.cu_seqlens)
        of_values = (None, None) if latent else (self.value, self.v_scale)
        self._stored = Stored(self.key, of_values[0], self.k_scale, of_values[1])
        number = next(_numbers)
        self._number = torch.tensor(number, device="cpu")  # a Python number would be a constant of a compiled region
        _layers[number] = self

    def __reduce__(self) -> tuple:
        return _copied_layer, (self.cache, self.index)

    def __repr__(self) -> str:
        dtype = str(self.key.dtype).removeprefix("torch.")
        lengths, total = self._lengths, sum(self._lengths)
        tokens = f"lengths {lengths}" if len(lengths) <= 8 else f"{len(lengths)} sequences with {total} tokens"
        return f"<CacheLayer {self.index}: {dtype} on {self.key.device}, {tokens}>"

    @property
    def cache(self) -> Cache:
        """The `PagedKVCache` that the layer is of.

        Raises:
            RuntimeError: nothing keeps the cache any more.
        """
        cache = self._cache()
        if cache is None:
            raise RuntimeError("the cache of this layer is gone: keep it as long as its layers")
        return cache

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence, as the host knows them. The list is a copy."""
        return list(self._lengths)

    @property
    def device(self) -> torch.device:
        """The device of all tensors."""
        return self.key.device

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of keys and values."""
        return self.key.dtype

    @property
    def batch(self) -> int:
        """The number of sequences B."""
        return len(self._lengths)

    def append(
        self,
        k: torch.Tensor,
        v: torch.Tensor | None = None,
        *,
        sequence: int | None = None,
        slot_mapping: torch.Tensor | None = None,
    ) -> None:
        """Writes the tokens of the present step, on the current stream, in one kernel; returns at once.

        `reserve` of the cache has begun the step, and has lengthened all layers. So an append advances nothing, and
        the same append again writes the same places. It can be captured in a CUDA graph. Call `reserve` before each
        replay. A replay without it writes the places of the last step again, and nothing after a `fork`, `truncate`,
        `free` or `reset`, which end the step.

        Args:
            k: `[B, Hkv, T, D]`, float16, bfloat16 or float32, any strides; rounded to the dtype of the cache. A
                sequence takes the first of its T tokens, as many as are reserved. Or the tokens of all sequences one
                after another, packed: `[T, Hkv, D]`. Rows after the last one are ignored.
            v: `[B, Hkv, T, Dv]` or `[T, Hkv, Dv]`, likewise; None if the cache has latents.
            sequence: the only sequence that takes tokens, from `[1, Hkv, T, D]` or `[T, Hkv, D]`.
            slot_mapping: int32 or int64 `[T]`, slots of the pages, page * page_size + offset, for packed tokens. They
                take the place of what is reserved, and of `sequence`. A slot that is negative or beyond the pages is
                skipped. The caller keeps the books.

        Raises:
            TypeError: an argument has the wrong type.
            ValueError: shapes, dtypes or devices do not match, there are fewer tokens than are reserved, or there are
                tokens of one `sequence` for which nothing is reserved.
            RuntimeError: nothing is reserved, and no graph is captured; or the cache was made in inference mode and is
                used outside of it.
        """
        if torch.compiler.is_compiling():
            if slot_mapping is not None:
                torch.ops.flexdecode.write_kv(k, v, *self._stored[:4], slot_mapping)
            else:
                torch.ops.flexdecode.write_reserved(k, v, *self._stored[:4], *self._reserved, self._number, sequence)
        elif slot_mapping is not None:
            append_to_slots(self._stored, k, v, slot_mapping, sequence)
        else:
            write_step(self._stored, self._reserved, self._step, k, v, sequence)


def _copied_layer(cache: Any, index: int) -> CacheLayer:
    """The layer of a copied cache."""
    layer: CacheLayer = cache.layer(index)
    layer._kept = cache  # nobody else may have the cache of a layer that was copied alone
    return layer


def write_step(
    stored: Stored,
    reserved: Reserved,
    step: Step,
    k: torch.Tensor,
    v: torch.Tensor | None,
    sequence: int | None,
) -> None:
    """Writes the tokens of a step into a layer.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the new tokens do not match, are too few, or are of a sequence that takes none.
        RuntimeError: nothing is reserved.
    """
    packed = is_packed(k)
    batch = len(reserved.starts)
    if sequence is not None and (type(sequence) is not int or not 0 <= sequence < batch):
        raise ValueError(f"`sequence` must be between 0 and B - 1 = {batch - 1}, got {sequence!r}")
    check_gradient("k", k)
    check_gradient("v", v)

    def check() -> None:
        check_new(k, v, stored.key, stored.value, None if packed else batch if sequence is None else 1)
        check_writable(stored.key)

    if not has_tokens(k):
        check()
    num_tokens = k.shape[0 if packed else 2]
    if not (stored.key.is_cuda and torch.cuda.is_current_stream_capturing()):
        if step.counts is None:
            raise RuntimeError("nothing is reserved: call reserve() of the cache once for each step, before its layers")
        check_tokens(num_tokens, step.counts, packed, sequence)
        if sequence is not None and num_tokens and not step.counts[sequence]:
            raise ValueError(
                f"`k` has T = {num_tokens} tokens for sequence {sequence}, but nothing is reserved for it in this "
                "step: leave out the append, or reserve() for this sequence"
            )
    write_reserved(stored, reserved, k, v, check, sequence)


def append_to_slots(
    stored: Stored, k: torch.Tensor, v: torch.Tensor | None, slots: torch.Tensor, sequence: int | None
) -> None:
    """Writes packed tokens to slots of a cache in pages.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: the tensors do not match, or a sequence is given.
    """
    if sequence is not None:
        raise ValueError("`slot_mapping` says where each token goes: leave out `sequence` and `num_tokens`")
    check_gradient("k", k)
    check_gradient("v", v)

    def check() -> None:
        check_slots(slots, stored.key, check_new(k, v, stored.key, stored.value, None))
        check_writable(stored.key)

    if not is_list(slots):
        check()
        slots = slots.contiguous()
    write_to_slots(stored, slots, k, v, check)


def check_writable(tensor: torch.Tensor) -> None:
    """Refuses a tensor that PyTorch would refuse to write into.

    Raises:
        RuntimeError: it was made in inference mode.
    """
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise RuntimeError("the cache was made in torch.inference_mode(): use it there, or make it outside")


def write_step_in_region(
    k: torch.Tensor, v: torch.Tensor | None, stored: Stored, reserved: Reserved, number: int, sequence: int | None
) -> None:
    """Writes the tokens of a step into the layer of a number. Its tensors may be copies.

    Raises:
        RuntimeError: there is no such layer.
    """
    layer = _layers.get(number)
    if layer is None:
        raise RuntimeError("the cache of this compiled region is gone: keep it as long as the region is called")
    write_step(stored, reserved, layer._step, k, v, sequence)
