"""KV caches to decode with: contiguous, or in pages that sequences share.

>>> cache = PagedKVCache(batch=4, num_kv_heads=8, head_dim=128, num_pages=1024, page_size=16, device="cuda")
>>> cache.append(k, v)
>>> out = flex_decode(query, cache=cache)

The device holds keys, values, scales, lengths and the page table. The host holds the same lengths and knows which
sequences own each page. The host checks each change and never waits for the device.

**CUDA graphs.** A graph cannot record what the host does. A captured `append` records only the kernel. Before each
replay, `reserve` does the work of the host:

>>> cache.append(k, v)  # the prompt; this also compiles the kernel
>>> with torch.cuda.graph(graph):
...     cache.append(new_k, new_v)
...     out = flex_decode(query, cache=cache)
>>> for _ in range(100):
...     ...  # write into new_k, new_v and query
...     cache.reserve(1)  # or a list: [1, 0, 1, 1] appends nothing to sequence 1
...     graph.replay()

A captured append takes as many of its tokens as were reserved, so a replay without a reservation appends nothing. The
graph reads and writes the tensors of the cache, so keep the cache as long as the graph.

**Compiled regions.** In `torch.compile`, `append` does all that it does outside, the work of the host too.
"""

from __future__ import annotations

import torch

from .cache import Cache, check_sizes


class KVCache(Cache):
    """A contiguous cache: every sequence has its own place for `max_kv_len` tokens.

    Args:
        batch: number of sequences B; all start empty.
        num_kv_heads: heads Hkv.
        max_kv_len: tokens N that each sequence can hold.
        head_dim: D.
        v_head_dim: Dv, by default D.
        latent: whether the value of a token is the first Dv columns of its key (multi-head latent attention, MLA).
            Memory is kept once, and `append` takes no v.
        dtype: of what is stored: float16, bfloat16, float32, or quantised: float8_e4m3fn, float8_e5m2, int8. New tokens
            of another dtype are rounded to it, also float32 ones to the default.
        device: of all tensors, by default PyTorch's.
        k_scale: of a quantised cache: a positive number (also a 0-d tensor), or float32 `[Hkv]`; by default every token
            gets the scale with which its largest element just fits.
        v_scale: likewise; not with `latent`.

    Attributes:
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`; with `latent`, a view of `key`.
        kv_lens: int32 `[B]`, tokens of each sequence, on the device.
        page_table: None.
        k_scale, v_scale: None without quantisation; else float32, value = stored * scale: `[B, Hkv, N]`, one per token
            and head, or the given `[Hkv]`.
        lengths: tokens of each sequence, on the host; a copy.

    Raises:
        ValueError: an argument has an impossible value.
    """

    def __init__(
        self,
        *,
        batch: int,
        num_kv_heads: int,
        max_kv_len: int,
        head_dim: int,
        v_head_dim: int | None = None,
        latent: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        k_scale: float | torch.Tensor | None = None,
        v_scale: float | torch.Tensor | None = None,
    ) -> None:
        check_sizes(batch=batch, num_kv_heads=num_kv_heads, max_kv_len=max_kv_len)
        shape = (batch, num_kv_heads, max_kv_len)
        super().__init__(shape, batch, max_kv_len, head_dim, v_head_dim, latent, dtype, device, k_scale, v_scale)
