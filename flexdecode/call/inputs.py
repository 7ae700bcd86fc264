"""The arguments and the options of a call, in one common form. `checks` refuses wrong ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from numbers import Integral
from operator import mul
from typing import Any, NamedTuple

import torch

from ..analysis.analyze import MAX_KV_LEN, MAX_KV_OFFSET
from ..memos import hashed_once
from .formats import CONTIGUOUS, PACKED, PAGED, Contiguous
from .packing import rows_of_sequences

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*DTYPES, torch.float64)  # the last one on the torch backend only
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
MAX_HEAD_DIM = 1024  # of keys and of values
MANY_TOKENS = 256  # more tokens of a sequence than small tiles are for
MAX_PROGRAMS = 65535  # programs that share one head: a limit of CUDA's grids


@hashed_once
@dataclass(frozen=True)
class DecodeOptions:
    """How a call is executed. The default of every field is right for most calls.

    Attributes:
        backend: `triton` (generated kernel) or `torch` (the traced graph in PyTorch operations). The default is
            `triton` for CUDA tensors and `torch` for CPU tensors.
        num_splits: how many programs share the KV cache of one head. With the balanced schedule, how many share the
            whole cache. The default fills the GPU.
        block_n: keys per step of the kernel, a power of two from 16.
        num_warps: warps per program.
        num_stages: depth of the software pipeline.
        schedule: `split` divides every sequence into equal shares. `balanced` gives every program the same number of
            live blocks, even if lengths differ. The default depends on what the host knows.
        batch_invariant: the other sequences of the batch do not change a bit of a sequence's result. Each sequence is
            then divided as if it were alone.
        debug: checks on every call what is otherwise trusted: that `kv_lens` are within the cache, that captured
            indices are in range at attending pairs, and that mods compute the same as when they were traced. The
            checks synchronise the host and compute the call a second time, which is slow.
        autotune: measures a few schedules on the GPU at the first call of its kind and uses the fastest from then on,
            also in other processes. What is given of `num_splits`, `block_n`, `num_warps`, `num_stages` and `schedule`
            stays. It changes nothing where no kernel is launched on a GPU.

    Raises:
        ValueError: a field has an impossible value.
    """

    backend: str | None = None
    num_splits: int | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None
    schedule: str | None = None
    batch_invariant: bool = False
    debug: bool = False
    autotune: bool = False

    def __post_init__(self) -> None:
        if self.backend not in (None, "triton", "torch"):
            raise ValueError(f'`options.backend` must be "triton", "torch" or None, got {self.backend!r}')
        for name, low in (("num_splits", 1), ("block_n", 16), ("num_warps", 1), ("num_stages", 1)):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < low):
                raise ValueError(f"`options.{name}` must be an integer of at least {low}, got {value!r}")
            if name in ("block_n", "num_warps") and value is not None and value & (value - 1):
                raise ValueError(f"`options.{name}` must be a power of two, got {value}")
        if self.schedule not in (None, "split", "balanced"):
            raise ValueError(f'`options.schedule` must be "split", "balanced" or None, got {self.schedule!r}')
        for name in ("batch_invariant", "debug", "autotune"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`options.{name}` must be a bool, got {getattr(self, name)!r}")
        if self.schedule == "balanced" and self.batch_invariant:
            raise ValueError('`options.schedule="balanced"` and `options.batch_invariant=True` exclude one another')
        if self.autotune and self.batch_invariant:
            raise ValueError("`options.autotune=True` and `options.batch_invariant=True` exclude one another")
        if self.num_splits is not None and self.num_splits > MAX_PROGRAMS:
            raise ValueError(f"`options.num_splits` must be at most {MAX_PROGRAMS}, got {self.num_splits}")


DEFAULT_OPTIONS = DecodeOptions()


class Inputs(NamedTuple):
    """The tensors and numbers of a call, as `flex_decode` describes them, in the forms that `same_for_all` gives."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    kv_lens: int | torch.Tensor | None = None
    q_lens: torch.Tensor | None = None
    q_offset: int | torch.Tensor | None = None
    page_table: torch.Tensor | None = None
    k_scale: float | torch.Tensor | None = None
    v_scale: float | torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    cu_seqlens_q: torch.Tensor | None = None
    cu_seqlens_k: torch.Tensor | None = None
    kv_starts: torch.Tensor | None = None
    kv_offset: int | torch.Tensor | None = None
    max_q_len: int | None = None
    scale: float | None = None
    out: torch.Tensor | None = None

    @property
    def format(self) -> Contiguous:
        """How keys and values lie in memory."""
        if self.cu_seqlens_k is not None:
            return PACKED
        return CONTIGUOUS if self.page_table is None else PAGED

    @property
    def table(self) -> torch.Tensor | None:
        """What says where the keys of a sequence lie: `page_table`, `cu_seqlens_k` or nothing."""
        return getattr(self, self.format.table)

    @property
    def capacity(self) -> int:
        """The longest sequence that the cache can hold."""
        return self.format.capacity(self.key, self.page_table)

    @property
    def max_kv_len(self) -> int:
        """The longest sequence that the call can have: `kv_lens` if it is a number, else the capacity."""
        return self.kv_lens if isinstance(self.kv_lens, int) else self.capacity

    @property
    def packed(self) -> bool:
        """Whether the query is `[T, Hq, D]`, the tokens of all sequences one after another."""
        return self.cu_seqlens_q is not None

    @property
    def batch(self) -> int:
        """Sequences of the call."""
        return self.query.shape[0] if self.cu_seqlens_q is None else self.cu_seqlens_q.shape[0] - 1

    @property
    def num_q_heads(self) -> int:
        """Query heads. They are the second dimension of both forms of a query."""
        return self.query.shape[1]

    @property
    def num_tokens(self) -> int:
        """The most query tokens that a sequence can have: Q, or T of a packed query."""
        return self.query.shape[0 if self.packed else 2]

    @property
    def head_dim(self) -> int:
        """D."""
        return self.query.shape[-1]

    @property
    def out_shape(self) -> tuple[int, ...]:
        """[B, Hq, Q, Dv], or [T, Hq, Dv] of a packed query. The log-sum-exp has the same without Dv."""
        return *self.query.shape[:-1], self.value.shape[3]

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to compute: no element of the output, or no sequence that has one."""
        return 0 in self.out_shape or self.batch == 0

    @property
    def shares_keys(self) -> bool:
        """Whether all sequences have one contiguous cache."""
        return self.table is None and len(self.key) != self.batch

    @property
    def given_kv_lens(self) -> int | torch.Tensor:
        """Keys of the sequences, as the call says it: a number for all, or [B], which may exceed the capacity."""
        if self.cu_seqlens_k is not None:
            return rows_of_sequences(self.cu_seqlens_k, self.capacity)[1]
        return self.max_kv_len if self.kv_lens is None else self.kv_lens

    @property
    def given_q_lens(self) -> int | torch.Tensor:
        """Query tokens of the sequences, as the call says it: a number for all, or [B]."""
        if self.cu_seqlens_q is not None:
            return rows_of_sequences(self.cu_seqlens_q, self.num_tokens)[1]
        return self.num_tokens if self.q_lens is None else self.q_lens

    @property
    def sizes(self) -> Sizes:
        """Run-time sizes, which change without a new kernel."""
        return Sizes(self.batch, self.key.shape[1], self.max_kv_len, self.num_tokens, self.max_q_len)

    def only_shapes(self) -> Inputs:
        """If the query is on the meta device, the same with all tensors there: then they may have been anywhere.

        Query, key and value stay as they are, because key and value may share memory.
        """
        if not getattr(self.query, "is_meta", False):
            return self
        moved = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in self[3:])
        return Inputs._make([*self[:3], *moved])

    @property
    def out_strides(self) -> tuple[int, ...]:
        """Strides of the output."""
        return contiguous_strides(self.out_shape) if self.out is None else self.out.stride()


def contiguous_strides(shape: Sequence[int]) -> tuple[int, ...]:
    """Strides of a contiguous tensor that has elements."""
    return tuple(accumulate(shape[:0:-1], mul, initial=1))[::-1]


def strides_in_order(shape: Sequence[int], of_query: Sequence[int]) -> tuple[int, ...]:
    """Strides of a dense output whose rows lie in memory in the order of those of the query.

    Args:
        shape: of the output, `[B, Hq, Q, Dv]`.
        of_query: strides of the query.

    Source: torch/_higher_order_ops/flex_attention.py, `_permute_strides`.
    """
    strides, step = [0, 0, 0, 1], shape[3]
    for dim in sorted((2, 1, 0), key=of_query.__getitem__):  # of dimensions with equal strides, the last one is inner
        strides[dim] = step
        step *= shape[dim]
    return tuple(strides)


class Sizes(NamedTuple):
    """Run-time sizes: they change without a new kernel."""

    batch: int
    num_kv_heads: int
    max_kv_len: int
    num_queries: int = 1
    max_q_len: int | None = None


def same_for_all(numbers: Any, query: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Any:
    """Lengths or positions, possibly one for all sequences: a number becomes an int, a 0-d tensor a tensor [B].

    A 0-d tensor on the CPU is read as a number. Anything else stays as it is and is checked later.
    """
    if numbers is None:
        return None
    if isinstance(numbers, torch.Tensor):
        if numbers.dim() or numbers.dtype not in (torch.int32, torch.int64):
            return numbers
        if numbers.device.type == "cpu":
            return int(numbers)
        batch = _batch(query, cu_seqlens_q)
        return numbers.view(1) if batch == 1 else numbers.expand(batch)
    is_integer = isinstance(numbers, Integral) and not isinstance(numbers, bool)
    return int(numbers) if is_integer else numbers


def per_sequence(lengths: Any, query: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Any:
    """As `same_for_all`, but a number also becomes a tensor [B]. One that is too large for all queries stays so."""
    lengths = same_for_all(lengths, query, cu_seqlens_q)
    if type(lengths) is int and isinstance(query, torch.Tensor):
        lengths = max(-(1 << 31), min(lengths, 1 << 31))
        place = "cpu" if query.is_meta else query.device  # `explain` reads the lengths
        return torch.full((_batch(query, cu_seqlens_q),), lengths, dtype=torch.int64, device=place)
    return lengths


def _batch(query: object, cu_seqlens_q: object) -> int:
    """Sequences of a query that is not checked yet."""
    if isinstance(cu_seqlens_q, torch.Tensor):
        return max(cu_seqlens_q.numel() - 1, 0)
    return len(query) if isinstance(query, torch.Tensor) and query.dim() else 1


def as_hint(max_q_len: Any, cu_seqlens_q: torch.Tensor | None) -> int:
    """`max_q_len` as an int. A call that is known already does not check it again, so it is checked here.

    Above `MANY_TOKENS` all hints mean the same, so that calls with them share a plan.

    Raises:
        TypeError: it is not an integer.
        ValueError: it is less than 1, or the query is not packed.
    """
    if isinstance(max_q_len, bool) or not isinstance(max_q_len, Integral):
        raise TypeError(f"`max_q_len` must be an integer or None, got {type(max_q_len).__name__}")
    if max_q_len < 1:
        raise ValueError(f"`max_q_len` must be at least 1, got {max_q_len}")
    if cu_seqlens_q is None:
        raise ValueError("`max_q_len` is for a packed query: it needs `cu_seqlens_q`")
    return min(int(max_q_len), MANY_TOKENS)


def with_packed_keys(inputs: Inputs) -> Inputs:
    """The call with its packed keys and values as views `[1, Hkv, Tk, D]`: a cache in which each sequence has a part.

    Raises:
        ValueError: `cu_seqlens_k` is given with what it excludes, or the keys are not packed.
    """
    for name in ("kv_lens", "kv_starts", "page_table"):
        if getattr(inputs, name) is not None:
            raise ValueError(
                f"`{name}` and `cu_seqlens_k` exclude one another: `cu_seqlens_k` says where the keys of a sequence lie"
            )
    if inputs.cu_seqlens_q is None:
        raise ValueError("`cu_seqlens_k` needs `cu_seqlens_q`, which says where the query tokens of a sequence lie")
    views: dict[str, Any] = {}
    for name, form in (("key", "D"), ("value", "Dv")):
        tensor = getattr(inputs, name)
        if not isinstance(tensor, torch.Tensor):
            continue
        if tensor.dim() != 3:
            raise ValueError(
                f"`{name}` must have shape {PACKED.form.format(form)} beside `cu_seqlens_k`, got {list(tensor.shape)}; "
                "a cache [B, Hkv, N, D] takes `kv_lens` instead"
            )
        views[name] = tensor.transpose(0, 1)[None]
    return inputs._replace(**views)


def as_kv_starts(starts: Any, query: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Any:
    """As `per_sequence`. A number beyond all caches means the same as one at their ends."""
    starts = same_for_all(starts, query, cu_seqlens_q)
    starts = min(max(starts, 0), MAX_KV_LEN) if type(starts) is int else starts
    return per_sequence(starts, query, cu_seqlens_q)


def as_q_offset(offset: Any, query: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Any:
    """As `same_for_all`. A number is checked here, because a plan does not depend on it.

    Raises:
        ValueError: a number does not fit into int64.
    """
    offset = same_for_all(offset, query, cu_seqlens_q)
    if type(offset) is int and not -(1 << 63) <= offset < 1 << 63:
        raise ValueError(f"`q_offset` must fit into int64, got {offset}")
    return offset


def as_kv_offset(offset: Any, query: torch.Tensor, cu_seqlens_q: torch.Tensor | None) -> Any:
    """As `same_for_all`. A number is checked here, because a plan does not depend on it.

    Raises:
        ValueError: a number is beyond +-MAX_KV_OFFSET.
    """
    offset = same_for_all(offset, query, cu_seqlens_q)
    if type(offset) is int and abs(offset) > MAX_KV_OFFSET:
        raise ValueError(f"`kv_offset` must lie between {-MAX_KV_OFFSET} and {MAX_KV_OFFSET}, got {offset}")
    return offset


def as_scale(scale: Any, query: torch.Tensor) -> Any:
    """`k_scale` or `v_scale`. If the query is not on the CPU, a 0-d tensor on the CPU is read as a number."""
    if scale is not None and isinstance(scale, torch.Tensor) and not scale.dim() and scale.device.type == "cpu":
        return scale if getattr(query, "is_cpu", True) else scale.item()
    return scale
