"""`write_kv`: new keys and values to slots of pages that somebody else keeps the books of."""

from __future__ import annotations

import math
from typing import Any

import torch

from ..call.checks import check_place, checked_scale
from ..call.inputs import DTYPES, MAX_HEAD_DIM, QUANTISED
from ..call.overlap import extent, overlaps_itself, share_memory
from ..memos import Bounded
from .launching import is_dynamic
from .writing import Stored, check_gradient, check_new, write_to_slots

_apart = Bounded.memo(limit=1024)  # layouts of two tensors that share no memory


def write_kv(
    k: torch.Tensor,
    v: torch.Tensor | None,
    key: torch.Tensor,
    value: torch.Tensor | None,
    slot_mapping: torch.Tensor,
    k_scale: float | torch.Tensor | None = None,
    v_scale: float | torch.Tensor | None = None,
) -> None:
    """Writes new keys and values to slots of a paged cache, on the current stream, in one kernel; returns at once.

    For servers that own their pages, tables and lengths. Nothing else is changed, and no value is read on the host. So
    the call can be captured in a CUDA graph, and it works in compiled regions. `KVCache` and `PagedKVCache` keep the
    books themselves.

        >>> slots = page_table[b, position // page_size] * page_size + position % page_size
        >>> flexdecode.write_kv(k, v, key, value, slots)

    Args:
        k: `[T, Hkv, D]` or more rows, float16, bfloat16 or float32, any strides; rounded to the dtype of the cache.
        v: `[T, Hkv, Dv]`, likewise. None, as `value`, for latents whose values are the first columns of their keys.
        key: `[num_pages, Hkv, page_size, D]`, any strides; float16, bfloat16, float32, float8_e4m3fn, float8_e5m2 or
            int8. Float8 numbers that a server keeps as bytes come as `key.view(torch.float8_e4m3fn)`.
        value: `[num_pages, Hkv, page_size, Dv]`, likewise; of the dtype of `key`. It shares no memory with `key`.
        slot_mapping: int32 or int64 `[T]`, the slot of each token: page * page_size + offset. A token whose slot is
            negative or beyond the pages is skipped. Further rows of k and v are padding. No slot may occur twice.
        k_scale: of a quantised cache, stored = k / k_scale, clamped to the range of the dtype: a number, a float32
            tensor with one number or `[Hkv]`, which is read on the device, or float32 `[num_pages, Hkv, page_size]`.
            Into the latter, the scale with which its largest element just fits is written for every token and head.
            None: 1, for float8 only.
        v_scale: likewise.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes, devices or numbers do not match, or a token would overwrite another one, because
            tensors that are written share memory or are expanded; nothing was written.
        CompilationForbiddenError: the kernel is not compiled yet, and compilation is forbidden.
    """
    if torch.compiler.is_compiling():
        tensors = key, value, _tensor(k_scale), _tensor(v_scale), slot_mapping
        torch.ops.flexdecode.write_kv(k, v, *tensors, _number(k_scale), _number(v_scale))
        return
    check_gradient("k", k)
    check_gradient("v", v)

    def check() -> None:
        _check(k, v, key, value, slot_mapping, k_scale, v_scale)

    if not (_is_cache(key) and _is_scale(k_scale) and _is_scale(v_scale) and is_list(slot_mapping)):
        check()
        slot_mapping = slot_mapping.contiguous()
    numbers = [1.0 if x is None else x for x in (_number(k_scale), _number(v_scale))]
    stored = Stored(key, value, _tensor(k_scale), _tensor(v_scale), *numbers)
    write_to_slots(stored, slot_mapping, k, v, check)


def _is_cache(key: object) -> bool:
    return isinstance(key, torch.Tensor)


def _is_scale(scale: object) -> bool:
    return scale is None or isinstance(scale, (torch.Tensor, int, float))


def is_list(slots: object) -> bool:
    """Whether the kernels can read slots as they lie in memory."""
    return isinstance(slots, torch.Tensor) and slots.dim() == 1 and slots.is_contiguous()


def _tensor(scale: float | torch.Tensor | None) -> torch.Tensor | None:
    return scale if isinstance(scale, torch.Tensor) else None


def _number(scale: float | torch.Tensor | None) -> float | None:
    return None if isinstance(scale, torch.Tensor) else scale


def _check(k: Any, v: Any, key: Any, value: Any, slots: Any, k_scale: Any, v_scale: Any) -> None:
    """Checks the arguments of `write_kv`."""
    caches = [("key", key), ("value", value)] if value is not None else [("key", key)]
    for name, cache in caches:
        D = "D" if name == "key" else "Dv"
        if not isinstance(cache, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(cache).__name__}")
        if cache.dim() != 4 or not 1 <= cache.shape[3] <= MAX_HEAD_DIM:
            form = f"[num_pages, Hkv, page_size, {D}] with {D} from 1 to {MAX_HEAD_DIM}"
            raise ValueError(f"`{name}` must have shape {form}, got {list(cache.shape)}")
        if cache.dtype not in (*DTYPES, *QUANTISED):
            raise ValueError(f"`{name}` must be float16, bfloat16, float32, float8 or int8, got {cache.dtype}")
    if key.shape[0] * key.shape[2] >= 1 << 31:
        raise ValueError(f"`key` must have fewer than 2**31 slots, got {key.shape[0]} pages of {key.shape[2]} tokens")
    if value is not None:
        if value.shape[:3] != key.shape[:3] or value.dtype != key.dtype:
            raise ValueError(
                f"`value` must have the pages, the heads, the page size and the dtype of `key`, {list(key.shape[:3])} "
                f"and {key.dtype}, got {list(value.shape[:3])} and {value.dtype}"
            )
        check_place("value", value, key, "key", "write_kv")
        _check_apart("value", value, key, "key", ": leave out `v` and `value` if values are the first columns of keys")
    for name, cache in caches:
        _check_places(name, cache)
    num_rows = check_new(k, v, key, value, None)
    check_slots(slots, key, num_rows)
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if name == "v_scale" and value is None:
            if scale is not None:
                raise ValueError("`v_scale` must be left out, like `value`: values are the first columns of keys")
            continue
        _check_scale(name, scale, key)
        if isinstance(scale, torch.Tensor) and is_dynamic(scale):
            _check_places(name, scale)
    of_tokens = [x for x in (k_scale, v_scale) if isinstance(x, torch.Tensor) and is_dynamic(x)]
    if len(of_tokens) == 2:
        _check_apart("v_scale", v_scale, k_scale, "k_scale", "")


def _check_places(name: str, tensor: torch.Tensor) -> None:
    """Refuses a tensor to write into of which two elements have the same place."""
    if overlaps_itself(tensor):
        found = f"strides {list(tensor.stride())} for shape {list(tensor.shape)}"
        raise ValueError(f"`{name}` must have a place of its own for each element, got {found}")


def _check_apart(name: str, tensor: torch.Tensor, other: torch.Tensor, of_other: str, remedy: str) -> None:
    """Refuses two tensors to write into that share memory. Interleaved slices of one tensor share none."""
    distance = tensor.data_ptr() - other.data_ptr()
    if distance >= extent(other) or -distance >= extent(tensor):
        return
    layout = (distance, tensor.dtype, tensor.shape, tensor.stride(), other.shape, other.stride())
    if _apart.get(layout):
        return
    if share_memory(tensor, other):
        raise ValueError(f"`{name}` must have memory of its own, but it shares memory with `{of_other}`{remedy}")
    _apart.add(layout, True)


def check_slots(slots: object, key: torch.Tensor, num_rows: int) -> None:
    """Refuses a `slot_mapping` that does not match the cache and the new tokens.

    Raises:
        TypeError: it is no tensor.
        ValueError: its shape, dtype or device does not match.
    """
    if not isinstance(slots, torch.Tensor):
        raise TypeError(f"`slot_mapping` must be a torch.Tensor, got {type(slots).__name__}")
    if slots.dtype not in (torch.int32, torch.int64) or slots.dim() != 1:
        raise ValueError(f"`slot_mapping` must be int32 or int64 [T], got {slots.dtype} {list(slots.shape)}")
    if len(slots) > num_rows:
        raise ValueError(f"`slot_mapping` must have at most T = {num_rows} entries (from k), got {len(slots)}")
    check_place("slot_mapping", slots, key, "key", "write_kv")


def _check_scale(name: str, scale: object, key: torch.Tensor) -> None:
    if key.dtype not in QUANTISED:
        if scale is not None:
            raise ValueError(f"`{name}` is for caches in float8 or int8, but `key` is {key.dtype}")
        return
    if scale is None:
        if key.dtype == torch.int8:
            raise ValueError(f"`{name}` is missing: the cache is int8; pass a number, or a tensor for scales per token")
        return
    if not isinstance(scale, torch.Tensor):
        if not 0 < checked_scale(scale, name) < math.inf:
            raise ValueError(f"`{name}` must be positive, got {scale}")
        return
    heads, pages = key.shape[1], list(key.shape[:3])
    if scale.dtype != torch.float32 or list(scale.shape) not in ([], [1], [heads], pages):
        form = f"a number or float32: one number, [Hkv] = [{heads}] or [num_pages, Hkv, page_size] = {pages}"
        raise ValueError(f"`{name}` must be {form}, got {scale.dtype} {list(scale.shape)}")
    check_place(name, scale, key, "key", "write_kv")
