"""A case of the matrix: what is decoded, in plain numbers; its tensors; and its result by plain attention."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch

from .mod_cases import ModCase, make_mod

__all__ = ["Case", "Pages", "Tensors", "attend_plain", "into_pages", "make_tensors", "naive_attention", "totals"]

SEED = 2024
CACHE_SCALES = {"float8_e4m3fn": 1.0, "int8": 1 / 32}  # what a stored number is multiplied by


@dataclasses.dataclass(frozen=True)
class Case:
    """One decode step.

    Attributes:
        label: The name of the case.
        lens: Tokens in the cache of each sequence, `[B]`.
        num_q_heads: Query heads.
        num_kv_heads: KV heads.
        head_dim: Columns of a query and of a key.
        latent_dim: Where keys are latents (MLA): the values are so many first columns of the keys. 0: values of their
            own, `head_dim` columns each.
        dtype: Name of the torch dtype of query and result, and of the cache unless `cache_dtype` is given.
        mod: One of `mod_cases.MODS`.
        window: Keys that `sliding_window` and `streaming` see, and half of the chunk of `chunked`, in tokens.
        num_queries: Query tokens of each sequence.
        q_lens: Query tokens of each sequence, `[B]`, where the query is packed; empty where it is not.
        page_size: Tokens in a page of the cache; 0 where the cache is contiguous.
        cache_dtype: Name of the torch dtype of an 8-bit cache; empty for `dtype`.
        columns: The columns that apply, beside flexdecode.
        row: What a record holds about the shape; see `shape`.
    """

    label: str
    lens: tuple[int, ...]
    num_q_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    latent_dim: int = 0
    dtype: str = "bfloat16"
    mod: str = "none"
    window: int = 1024
    num_queries: int = 1
    q_lens: tuple[int, ...] = ()
    page_size: int = 0
    cache_dtype: str = ""
    columns: tuple[str, ...] = ()
    row: dict | None = None

    @property
    def batch(self) -> int:
        """Sequences."""
        return len(self.lens)

    @property
    def max_len(self) -> int:
        """Tokens of the longest sequence."""
        return max(self.lens)

    @property
    def is_ragged(self) -> bool:
        """Whether sequences have caches of different lengths."""
        return min(self.lens) < self.max_len

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of query and result."""
        return getattr(torch, self.dtype)

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the cache."""
        return getattr(torch, self.cache_dtype or self.dtype)

    @property
    def cache_scale(self) -> float | None:
        """What a stored number is multiplied by; None where the cache is not quantised."""
        return CACHE_SCALES[self.cache_dtype] if self.cache_dtype else None

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token in the cache of one sequence, over all KV heads."""
        columns = self.head_dim if self.latent_dim else 2 * self.head_dim
        return self.num_kv_heads * columns * self.stored_dtype.itemsize

    @property
    def query_bytes(self) -> int:
        """Bytes of the query and of the result."""
        tokens = sum(self.q_lens) or self.batch * self.num_queries
        return (
            tokens * self.num_q_heads * (self.head_dim + (self.latent_dim or self.head_dim)) * self.torch_dtype.itemsize
        )

    @property
    def shape(self) -> dict:
        """What a record holds about the shape, by the names of xformers' benchmark; `Mkv` is the longest length."""
        return self.row or {
            "B": self.batch, "Mq": max(self.q_lens, default=self.num_queries), "Mkv": self.max_len,
            "Hq": self.num_q_heads, "Hkv": self.num_kv_heads, "K": self.head_dim, "dtype": self.dtype,
            "pytorch_us": None, "optimized_us": None,
        }  # fmt: skip

    def alone(self, b: int) -> "Case":
        """The case of one of its sequences, with a query that is not packed."""
        num_queries = self.q_lens[b] if self.q_lens else self.num_queries
        return dataclasses.replace(self, lens=self.lens[b : b + 1], num_queries=num_queries, q_lens=())


class Pages(NamedTuple):
    """A cache in pages: `key` and `value` `[pages, Hkv, page_size, D]`, `table` int32 `[B, pages of a sequence]`."""

    key: torch.Tensor
    value: torch.Tensor
    table: torch.Tensor


class Tensors(NamedTuple):
    """The inputs of a case.

    Attributes:
        query: `[B, Hq, Q, D]`, or `[T, Hq, D]` if packed.
        key: `[B, Hkv, N, D]`, in the dtype of the cache.
        value: `[B, Hkv, N, Dv]`; of latents, a view of `key`.
        kv_lens: int32 `[B]`.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_lens: torch.Tensor


def totals(lengths: Sequence[int], device: torch.device | str) -> torch.Tensor:
    """The totals `[B + 1]` of lengths, int32, from 0 on."""
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32, device=device)


def into_pages(cache: torch.Tensor, page_size: int, order: torch.Tensor) -> torch.Tensor:
    """The pages of a cache, in a given order.

    Args:
        cache: `[B, H, N, D]`; `page_size` divides N.
        page_size: Tokens in a page.
        order: Where each page lies, integers `[B * N / page_size]`.

    Returns:
        `[pages, H, page_size, D]`.
    """
    batch, heads, tokens, head_dim = cache.shape
    pages = cache.view(batch, heads, tokens // page_size, page_size, head_dim).transpose(1, 2)
    result = torch.empty(order.numel(), heads, page_size, head_dim, dtype=cache.dtype, device=cache.device)
    result[order] = pages.reshape(result.shape)
    return result


def make_tensors(case: Case, device: torch.device, number: int = 0) -> Tensors:
    """Random normal inputs, never zeros: data moves at another speed when it is all zeros.

    Args:
        case: The case.
        device: Where they lie.
        number: Other inputs for each number.
    """
    generator = torch.Generator(device).manual_seed(SEED + number)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=case.torch_dtype, device=device, generator=generator)

    def stored() -> torch.Tensor:
        x = normal(case.batch, case.num_kv_heads, case.max_len, case.head_dim)
        if case.cache_dtype == "int8":
            x = (x / case.cache_scale).round_().clamp_(-127, 127)
        return x.to(case.stored_dtype)

    rows = case.num_q_heads, case.head_dim
    query = normal(sum(case.q_lens), *rows) if case.q_lens else normal(case.batch, rows[0], case.num_queries, rows[1])
    key = stored()
    value = key[..., : case.latent_dim] if case.latent_dim else stored()
    return Tensors(query, key, value, torch.tensor(case.lens, dtype=torch.int32, device=device))


def naive_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mod: ModCase, scale: float | None = None
) -> torch.Tensor:
    """Plain PyTorch attention in the dtype of its inputs: matmul, bias or mask, softmax, matmul.

    The query heads of a group are packed as rows of one product, so K and V are not expanded.

    Args:
        query: `[B, Hq, Q, D]`.
        key: `[B, Hkv, N, D]`.
        value: `[B, Hkv, N, Dv]`.
        mod: The mod, as bias, mask or cap.
        scale: Factor of the logits; default `1 / sqrt(D)`.

    Returns:
        The output `[B, Hq, Q, Dv]`.
    """
    batch, num_q_heads, num_queries, head_dim = query.shape
    num_kv_heads, num_keys = key.shape[1], key.shape[2]
    grouped = query.reshape(batch, num_kv_heads, -1, head_dim) * (scale or head_dim**-0.5)
    logits = (grouped @ key.mT).view(batch, num_q_heads, num_queries, num_keys)
    if mod.cap is not None:
        logits = mod.cap * torch.tanh(logits / mod.cap)
    if mod.bias is not None:
        logits = logits + mod.bias.to(logits.dtype)
    if mod.keep is not None:
        logits = logits.masked_fill(~mod.keep, float("-inf"))
    weights = torch.softmax(logits, dim=-1).view(batch, num_kv_heads, -1, num_keys)
    return (weights @ value).view(*query.shape[:3], value.shape[3])


def attend_plain(case: Case, mod: ModCase, tensors: Tensors, dtype: torch.dtype) -> torch.Tensor:
    """The result of a case by plain attention in some dtype, one sequence at a time.

    Args:
        case: The case.
        mod: Its mod.
        tensors: Its inputs.
        dtype: What is computed in; float64 for what is right.

    Returns:
        The output, shaped as that of `flex_decode`: `[B, Hq, Q, Dv]`, or `[T, Hq, Dv]` if the query is packed.
    """
    results, device = [], tensors.query.device
    starts = [0, *itertools.accumulate(case.q_lens)]
    for b, length in enumerate(case.lens):
        of_mod = make_mod(case.alone(b), device) if case.is_ragged or case.q_lens else mod.sequence(b)
        if case.q_lens:
            query = tensors.query[starts[b] : starts[b + 1]].transpose(0, 1)[None]
        else:
            query = tensors.query[b : b + 1]
        cache = [x[b : b + 1, :, :length].to(dtype) * (case.cache_scale or 1) for x in (tensors.key, tensors.value)]
        result = naive_attention(query.to(dtype), *cache, of_mod)
        results.append(result[0].transpose(0, 1) if case.q_lens else result)
    return torch.cat(results)
