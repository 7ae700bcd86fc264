"""The validated description of a call: what a kernel is specialised to, and the sizes that it runs on.

This is the only place where inputs are checked.
"""

from __future__ import annotations

import math
import numbers
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .analyze import MAX_KV_LEN

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_HEAD_DIM, MAX_HEAD_DIM = 16, 256
MAX_HEADS = 1 << 20
MAX_QUERIES = 1 << 20  # query tokens of one sequence in one call
UNIT = 0  # the class of a stride that is known to be 1


@dataclass(frozen=True)
class DecodeOptions:
    """How a call is executed; every field has a default that is right for most calls.

    Attributes:
        backend: `triton` (generated kernel) or `torch` (the traced graph in PyTorch operations); by default the
            former for CUDA tensors and the latter for CPU tensors.
        num_splits: how many programs share the KV cache of one head; by default chosen to fill the GPU.
        block_n: keys per step of the kernel, a power of two from 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        debug: checks on every call what is otherwise trusted, at the price of host synchronisation and of a
            slow second computation: `kv_lens` within the cache, captured indices in range at attending pairs.

    Raises:
        ValueError: a field has an impossible value.
    """

    backend: str | None = None
    num_splits: int | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    debug: bool = False

    def __post_init__(self) -> None:
        if self.backend not in (None, "triton", "torch"):
            raise ValueError(f'`options.backend` must be "triton", "torch" or None, got {self.backend!r}')
        for name, low in (("num_splits", 1), ("block_n", 16), ("num_warps", 1), ("num_stages", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise ValueError(f"`options.{name}` must be an integer of at least {low}, got {value!r}")
        if type(self.debug) is not bool:
            raise ValueError(f"`options.debug` must be a bool, got {self.debug!r}")
        for name in ("block_n", "num_warps"):
            value = getattr(self, name)
            if value is not None and value & (value - 1):
                raise ValueError(f"`options.{name}` must be a power of two, got {value}")


DEFAULT_OPTIONS = DecodeOptions()


class Sizes(NamedTuple):
    """Run-time sizes: they change without a new kernel."""

    batch: int
    num_kv_heads: int
    max_kv_len: int


@dataclass(frozen=True)
class Signature:
    """What one kernel is specialised to.

    Attributes:
        backend: `triton` or `torch`.
        device: device of all tensors.
        dtype: type of query, key, value and output.
        num_queries, group_size, head_dim, v_head_dim: sizes known at compile time.
        kv_lens, q_offset: type of the tensor, None if absent, `int` for a Python number.
        return_lse: whether the log-sum-exp is written.
        aligned: whether query, key, value and output all start at a multiple of 16 bytes.
        strides: 16 stride classes, four for each of query, key, value, output: `UNIT` for a last stride of 1, else
            the greatest common divisor with 16.
    """

    backend: str
    device: torch.device
    dtype: torch.dtype
    num_queries: int
    group_size: int
    head_dim: int
    v_head_dim: int
    kv_lens: torch.dtype | None
    q_offset: torch.dtype | type | None
    return_lse: bool
    aligned: bool
    strides: tuple[int, ...]


def check_inputs(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    kv_lens: torch.Tensor | None,
    q_offset: int | torch.Tensor | None,
    scale: float | None,
    out: torch.Tensor | None,
    options: DecodeOptions,
) -> Sizes:
    """Checks the tensors of a call, without reading any of them on a GPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes or devices do not fit together; the message says what was expected.
    """
    if not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        _check_tensor(name, tensor, query)
    batch, num_q_heads, num_queries, head_dim = query.shape
    _check_shape("key", key, (batch, None, None, head_dim), "[B, Hkv, N, D]", f"D = {head_dim} (from query)")
    _, num_kv_heads, max_kv_len, _ = key.shape
    source = f"Hkv = {num_kv_heads} and N = {max_kv_len} (from key)"
    _check_shape("value", value, (batch, num_kv_heads, max_kv_len, None), "[B, Hkv, N, Dv]", source)
    v_head_dim = value.shape[3]
    for name, size in (("query", head_dim), ("value", v_head_dim)):
        if not MIN_HEAD_DIM <= size <= MAX_HEAD_DIM:
            raise ValueError(
                f"the head dimension of `{name}` must be between {MIN_HEAD_DIM} and {MAX_HEAD_DIM}, got {size}"
            )
    if (num_kv_heads == 0 and num_q_heads) or (num_kv_heads and num_q_heads % num_kv_heads):
        raise ValueError(
            f"`query` must have a multiple of the heads of `key`, got Hq = {num_q_heads} and Hkv = {num_kv_heads}; "
            "a [B, N, H, D] cache is passed as its view `cache.transpose(1, 2)`"
        )
    if max_kv_len >= MAX_KV_LEN:
        raise ValueError(f"`key` must have fewer than {MAX_KV_LEN} positions, got N = {max_kv_len}")
    if num_q_heads > MAX_HEADS:
        raise ValueError(f"`query` must have at most {MAX_HEADS} heads, got Hq = {num_q_heads}")
    if num_queries > MAX_QUERIES:
        raise ValueError(f"`query` must have at most {MAX_QUERIES} tokens, got Q = {num_queries}")
    if batch * num_q_heads * num_queries >= 1 << 31:
        raise ValueError(f"`query` must have fewer than 2**31 rows, got {tuple(query.shape)}")
    _check_per_sequence("kv_lens", kv_lens, query)
    if kv_lens is not None and (kv_lens.device.type == "cpu" or options.debug):
        check_lens(kv_lens, max_kv_len)
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.Tensor, type(None))):
        raise TypeError(f"`q_offset` must be an int or an integer tensor [B], got {type(q_offset).__name__}")
    if isinstance(q_offset, torch.Tensor):
        _check_per_sequence("q_offset", q_offset, query)
    elif q_offset is not None and not -(1 << 63) <= q_offset < 1 << 63:
        raise ValueError(f"`q_offset` must fit into int64, got {q_offset}")
    if scale is not None:
        checked_scale(scale)
    if out is not None:
        _check_tensor("out", out, query)
        if out.shape != (batch, num_q_heads, num_queries, v_head_dim):
            expected = [batch, num_q_heads, num_queries, v_head_dim]
            raise ValueError(f"`out` must have shape [B, Hq, Q, Dv] = {expected}, got {list(out.shape)}")
        if any(stride == 0 and size > 1 for stride, size in zip(out.stride(), out.shape, strict=True)):
            raise ValueError("`out` must have a place of its own for each element, but it is an expanded tensor")
    return Sizes(batch, num_kv_heads, max_kv_len)


def _check_tensor(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got shape {list(tensor.shape)}")
    if tensor.dtype != query.dtype:
        raise ValueError(f"`{name}` must have the dtype of `query`, {query.dtype}, got {tensor.dtype}")
    if tensor.dtype not in DTYPES:
        raise ValueError(f"`{name}` must be float16, bfloat16 or float32, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"`{name}` must be on the device of `query`, {query.device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"`{name}` must be a dense tensor, got layout {tensor.layout}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"`{name}` requires grad, but flex_decode is forward only: call it under torch.no_grad() or detach `{name}`"
        )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple, form: str, source: str) -> None:
    batch, *rest = expected
    fits = all(want is None or want == got for want, got in zip(rest, tensor.shape[1:], strict=True))
    if not fits:
        raise ValueError(f"`{name}` must have shape {form} with {source}, got {list(tensor.shape)}")
    if tensor.shape[0] not in (batch, 1):
        raise ValueError(
            f"`{name}` must have shape {form} with B = {batch} (from query) or 1 to broadcast, got {list(tensor.shape)}"
        )


def _check_per_sequence(name: str, tensor: torch.Tensor | None, query: torch.Tensor) -> None:
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be an int32 or int64 tensor [B], got {type(tensor).__name__}")
    if tensor.shape != query.shape[:1]:
        raise ValueError(f"`{name}` must have shape [B] = [{query.shape[0]}], got {list(tensor.shape)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
    if tensor.device != query.device:
        raise ValueError(f"`{name}` must be on the device of `query`, {query.device}, got {tensor.device}")


def checked_scale(scale: object) -> float:
    """The factor of the dot product as a float.

    Raises:
        TypeError: it is no number.
        ValueError: it is not finite.
    """
    if isinstance(scale, bool) or not isinstance(scale, numbers.Real):
        raise TypeError(f"`scale` must be a number or None, got {type(scale).__name__}")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"`scale` must be finite, got {value}")
    return value


def check_lens(kv_lens: torch.Tensor, max_kv_len: int) -> None:
    """Reads the lengths, which on a GPU waits for it.

    Raises:
        ValueError: a length is negative or beyond the cache.
    """
    if kv_lens.numel() and (int(kv_lens.max()) > max_kv_len or int(kv_lens.min()) < 0):
        raise ValueError(
            f"`kv_lens` must lie between 0 and N = {max_kv_len} (from key), got {int(kv_lens.min())} to "
            f"{int(kv_lens.max())}"
        )


def describe(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    kv_lens: torch.Tensor | None,
    q_offset: int | torch.Tensor | None,
    return_lse: bool,
    options: DecodeOptions,
) -> Signature:
    """Makes the signature of checked inputs."""
    tensors = (query, key, value, out)
    return Signature(
        backend=options.backend or ("triton" if query.device.type == "cuda" else "torch"),
        device=query.device,
        dtype=query.dtype,
        num_queries=query.shape[2],
        group_size=query.shape[1] // max(key.shape[1], 1),
        head_dim=query.shape[3],
        v_head_dim=value.shape[3],
        kv_lens=None if kv_lens is None else kv_lens.dtype,
        q_offset=q_offset.dtype if isinstance(q_offset, torch.Tensor) else None if q_offset is None else int,
        return_lse=return_lse,
        aligned=all(t.data_ptr() % 16 == 0 for t in tensors),
        strides=tuple(c for t in tensors for c in _stride_classes(kernel_strides(t, query.shape[0]))),
    )


def kernel_strides(tensor: torch.Tensor, batch: int) -> tuple[int, int, int, int]:
    """Strides in elements; a broadcast batch dimension has stride 0."""
    b, h, n, d = tensor.stride()
    return (b if tensor.shape[0] == batch else 0), h, n, d


def _stride_classes(strides: tuple[int, ...]) -> tuple[int, ...]:
    return (*(math.gcd(s, 16) for s in strides[:-1]), UNIT if strides[-1] == 1 else math.gcd(strides[-1], 16))
