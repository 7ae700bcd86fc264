"""The validated description of a call: what a kernel is specialised to."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..memos import hashed_once
from .formats import Contiguous
from .inputs import QUANTISED, DecodeOptions, Inputs

UNIT = 0  # the class of a stride that is known to be 1
Kind = tuple[torch.dtype | None, int] | None  # of an argument: dtype, None for a number, and rank; or absent
NUMBER: Kind = (None, 0)

OPTIONAL = Inputs._fields[3:-3]  # what a call may lack, apart from `scale`, `out` and the hint `max_q_len`


class Aux(NamedTuple):
    """Which numbers of rows a call gives beside its output, float32 `[B, Hq, Q]`, of packed queries `[T, Hq]`.

    Attributes:
        lse: the natural log of the sum of exponentials.
        max_scores: the largest score that a key has after both mods, in natural-log units; -inf without a live key.
            A sink is no key.
    """

    lse: bool = False
    max_scores: bool = False


NO_AUX, ONLY_LSE = Aux(), Aux(lse=True)


@hashed_once
@dataclass(frozen=True)
class Signature:
    """What one kernel is specialised to.

    Attributes:
        backend: `triton` or `torch`.
        device: device of all tensors.
        dtype: type of query and output.
        key_dtype, value_dtype: types of the caches.
        one_token: whether every sequence has one query token, so that all rows of a tile have one position.
        group_size, head_dim, v_head_dim: sizes known at compile time.
        kinds: of the arguments that a call may lack, in the order of `OPTIONAL`.
        format: how keys and values lie in memory.
        page_size: tokens of a page; 0 without a page table.
        shared_kv: whether each value is the first columns of its key, in the same memory.
        pairable: whether key and value are quantised and can be viewed as int16, two columns in one.
        aux: the numbers of rows that are written.
        aligned: whether query, key, value and output all start at a multiple of 16 bytes.
        strides: 16 stride classes, four for each of query, key, value, output. The class is `UNIT` for a last stride
            of 1, else the greatest common divisor of the stride and 16.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    key_dtype: torch.dtype
    value_dtype: torch.dtype
    one_token: bool
    group_size: int
    head_dim: int
    v_head_dim: int
    kinds: tuple[Kind, ...]
    format: Contiguous
    page_size: int
    shared_kv: bool
    pairable: bool
    aux: Aux
    aligned: bool
    strides: tuple[int, ...]

    @property
    def packed(self) -> bool:
        """Whether the query tokens of all sequences follow one another."""
        return self.kind("cu_seqlens_q") is not None

    def kind(self, name: str) -> Kind:
        """The kind of an argument by its name in `Inputs`."""
        return self.kinds[OPTIONAL.index(name)]

    @property
    def product_dtypes(self) -> tuple[torch.dtype, torch.dtype]:
        """The types in which a kernel multiplies the query by keys, and the weights by values."""
        return product_dtype(self.dtype, self.key_dtype), product_dtype(self.dtype, self.value_dtype)

    @property
    def is_float32(self) -> bool:
        """Whether a kernel multiplies float32 numbers, which takes several products."""
        return torch.float32 in self.product_dtypes


def product_dtype(dtype: torch.dtype, cache_dtype: torch.dtype) -> torch.dtype:
    """The type of products with a cache: the promoted type, or that of the query if the cache is quantised."""
    return dtype if cache_dtype in QUANTISED else torch.promote_types(dtype, cache_dtype)


def describe(inputs: Inputs, aux: Aux, options: DecodeOptions) -> Signature:
    """Makes the signature of checked inputs."""
    query, key, value = inputs.query, inputs.key, inputs.value
    strides = all_strides(inputs, key, value)
    kinds = {name: kind_of(getattr(inputs, name)) for name in OPTIONAL}
    if kinds["kv_lens"] == NUMBER:  # it is the longest sequence, which a kernel always takes
        kinds["kv_lens"] = None
    return Signature(
        backend=options.backend or ("triton" if query.device.type == "cuda" else "torch"),
        device=query.device,
        dtype=query.dtype,
        key_dtype=key.dtype,
        value_dtype=value.dtype,
        one_token=inputs.cu_seqlens_q is None and inputs.num_tokens == 1,
        group_size=inputs.num_q_heads // max(key.shape[1], 1),
        head_dim=inputs.head_dim,
        v_head_dim=value.shape[3],
        kinds=tuple(kinds.values()),
        format=inputs.format,
        page_size=inputs.format.page_size(key),
        shared_kv=shares_storage(key, value),
        pairable=query.dtype != torch.float32
        and key.dtype in QUANTISED
        and key.dtype == value.dtype
        and _in_pairs(key)
        and _in_pairs(value),
        aux=aux,
        aligned=all(t is None or t.data_ptr() % 16 == 0 for t in (query, key, value, inputs.out)),
        strides=tuple(c for i in range(0, 16, 4) for c in _stride_classes(strides[i : i + 4])),
    )


def all_strides(inputs: Inputs, key: torch.Tensor, value: torch.Tensor) -> tuple[int, ...]:
    """The 16 strides of query, key, value and output, as the kernels take them.

    A packed query and its output have stride 0 over sequences.

    Args:
        inputs: of the call.
        key: its cache as the kernel loads it.
        value: likewise.
    """
    caches = inputs.format.owners(inputs.batch, inputs.key)
    query, out = inputs.query.stride(), inputs.out_strides
    if inputs.packed:
        (t, h, d), (out_t, out_h, out_d) = query, out
        query, out = (0, h, t, d), (0, out_h, out_t, out_d)
    return *query, *kernel_strides(key, caches), *kernel_strides(value, caches), *out


def shares_storage(key: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether each value is the first columns of its key (multi-head latent attention, MLA)."""
    same = value.stride() == key.stride() and value.shape[:3] == key.shape[:3] and value.shape[3] <= key.shape[3]
    same = same and value.dtype == key.dtype
    if key.is_meta:
        bases = [t if t._base is None else t._base for t in (key, value)]
        return same and bases[0] is bases[1] and key.storage_offset() == value.storage_offset()
    return same and value.data_ptr() == key.data_ptr() != 0


def _in_pairs(cache: torch.Tensor) -> bool:
    *strides, last = cache.stride()
    return last == 1 and cache.data_ptr() % 16 == 0 and all(n % 2 == 0 for n in (*strides, cache.shape[3]))


def in_pairs(cache: torch.Tensor) -> torch.Tensor:
    """A quantised cache viewed as int16, two columns in one."""
    return cache.view(torch.int16)


def kind_of(argument: float | torch.Tensor | None) -> Kind:
    """What a kernel is specialised to in an argument that a call may lack."""
    if argument is None:
        return None
    return (argument.dtype, argument.dim()) if isinstance(argument, torch.Tensor) else NUMBER


def kernel_strides(tensor: torch.Tensor, batch: int) -> tuple[int, int, int, int]:
    """Strides in elements; a broadcast batch dimension has stride 0."""
    b, h, n, d = tensor.stride()
    return (b if tensor.shape[0] == batch else 0), h, n, d


def _stride_classes(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (*(math.gcd(s, 16) for s in strides[:-1]), UNIT if strides[-1] == 1 else math.gcd(strides[-1], 16))
