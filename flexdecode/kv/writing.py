"""Writes new keys and values into a cache on the device: by a kernel, or by PyTorch operations that do the same."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..call.device import without_autocast
from ..call.inputs import DTYPES
from ..codegen.template import template_folder
from ..triton_api import standalone_kernel

_TILE = 2048  # elements of a key or value that a program holds


class Stored(NamedTuple):
    """The tensors of a cache; shapes and dtypes as in `KVCache` and `PagedKVCache`.

    Attributes:
        key, value, k_scale, v_scale, page_table, kv_lens: as `flex_decode` takes them.
        limits: int32 `[B]`, how long each sequence may become by a bounded append.
        arrivals: int32 `[B]`, zeros, with which the programs of a sequence find out which of them is the last.
    """

    key: torch.Tensor
    value: torch.Tensor
    k_scale: torch.Tensor | None
    v_scale: torch.Tensor | None
    page_table: torch.Tensor | None
    kv_lens: torch.Tensor
    limits: torch.Tensor
    arrivals: torch.Tensor


def check_new(k: torch.Tensor, v: torch.Tensor, key: torch.Tensor, value: torch.Tensor, batch: int) -> int:
    """Refuses new keys or values that do not match those in a cache; returns how many tokens there are.

    Raises:
        TypeError: one is no tensor.
        ValueError: a shape, a dtype or a device does not match.
    """
    for name, new, cache in (("k", k, key), ("v", v, value)):
        if not isinstance(new, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(new).__name__}")
        _, heads, _, width = cache.shape
        if new.dim() != 4 or (*new.shape[:2], new.shape[3]) != (batch, heads, width):
            form = f"[B, Hkv, T, {'D' if name == 'k' else 'Dv'}] = [{batch}, {heads}, T, {width}]"
            raise ValueError(f"`{name}` must have shape {form}, got {list(new.shape)}")
        if new.dtype not in DTYPES:
            raise ValueError(f"`{name}` must be float16, bfloat16 or float32, got {new.dtype}")
        if new.device != cache.device or new.layout != torch.strided:
            raise ValueError(f"`{name}` must be a dense tensor on {cache.device}, got {new.layout} on {new.device}")
        if new.requires_grad and torch.is_grad_enabled():
            raise ValueError(f"`{name}` requires grad, but a cache keeps none: append under torch.no_grad()")
    if v.shape[2] != k.shape[2]:
        raise ValueError(f"`v` must have as many tokens as `k`, T = {k.shape[2]}, got {v.shape[2]}")
    return k.shape[2]


def append_by_kernel(stored: Stored, k: torch.Tensor, v: torch.Tensor, bounded: bool) -> None:
    """Appends tokens with the kernel. If `bounded`, a sequence takes tokens only until its length is its limit."""
    strides = [_strides(new) for new in (k, v)]
    (num_pages, heads, page_size, head_dim), v_head_dim = stored.key.shape, stored.value.shape[3]
    block_d, block_dv = (1 << (width - 1).bit_length() for width in (head_dim, v_head_dim))
    block_r = max(1, _TILE // max(block_d, block_dv))
    grid = len(stored.kv_lens) * -(-heads * k.shape[2] // block_r)
    kernel = standalone_kernel(template_folder() / "append.py", "append")
    with torch.cuda.device_of(stored.key):
        kernel[(grid,)](
            k, v, stored.key, stored.value, stored.k_scale, stored.v_scale, stored.page_table, stored.kv_lens,
            stored.limits, stored.arrivals, *strides[0], *strides[1], k.shape[2], heads, num_pages, page_size,
            1 if stored.page_table is None else stored.page_table.shape[1], int(bounded),
            HEAD_DIM=head_dim, V_HEAD_DIM=v_head_dim, BLOCK_R=block_r, BLOCK_D=block_d, BLOCK_DV=block_dv,
            DYNAMIC_K=_is_dynamic(stored.k_scale), DYNAMIC_V=_is_dynamic(stored.v_scale),
            LARGEST=_largest(stored.key.dtype), ALIGNED=all(s % 8 == 0 for three in strides for s in three[:3]),
            enable_fp_fusion=False,
        )  # fmt: skip


@without_autocast()
def append_in_pytorch(stored: Stored, k: torch.Tensor, v: torch.Tensor, counts: list[int]) -> None:
    """Appends tokens with PyTorch operations, like the kernel; `counts` says how many each sequence takes."""
    device = stored.key.device
    added = torch.tensor(counts, dtype=torch.int32, device=device)
    b, token = (torch.arange(k.shape[2], device=device) < added[:, None]).nonzero(as_tuple=True)
    page, position = b, stored.kv_lens[b] + token
    if stored.page_table is not None:
        page_size = stored.key.shape[2]
        page, position = stored.page_table[b, position // page_size], position % page_size
    for new, cache, scale in ((k, stored.key, stored.k_scale), (v, stored.value, stored.v_scale)):
        x = new[b, :, token]
        if scale is not None:
            largest = _largest(cache.dtype)
            x = x.float()
            row_scale = scale
            if _is_dynamic(scale):
                row_scale = (x.abs().amax(-1) + (x * 0).sum(-1)) / largest
                row_scale = row_scale.where(row_scale != 0, 1.0)
                scale[page, :, position] = row_scale
            x = (x / row_scale[..., None]).clamp(-largest, largest)
            x = x.round() if cache.dtype == torch.int8 else x
        cache[page, :, position] = x.to(cache.dtype)
    stored.kv_lens.add_(added)


def _strides(new: torch.Tensor) -> list[int]:
    """Strides in elements; 0 for dimensions of size 1, so that the number of tokens decides no divisibility."""
    *outer, last = new.stride()
    return [stride if size > 1 else 0 for stride, size in zip(outer, new.shape, strict=False)] + [last]


def _is_dynamic(scale: torch.Tensor | None) -> bool:
    """Whether every token has a scale of its own."""
    return scale is not None and scale.dim() == 3


def _largest(dtype: torch.dtype) -> float:
    """The largest number of a quantised type. The range of int8 is symmetric."""
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
