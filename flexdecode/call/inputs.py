"""The arguments and the options of a call. They are checked only here."""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, NamedTuple

import torch

from ..analysis.analyze import MAX_KV_LEN
from .formats import CONTIGUOUS, PAGED, Contiguous
from .overlap import overlaps_itself

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOATS = (*DTYPES, torch.float64)  # the last one on the torch backend only
QUANTISED = (torch.float8_e4m3fn, torch.float8_e5m2, torch.int8)
MAX_HEAD_DIM = 1024  # of keys and of values
MAX_HEADS = 1 << 20
MAX_PROGRAMS = 65535  # programs that share one head: a limit of CUDA's grids
MAX_QUERIES = 1 << 20  # query tokens of one sequence in one call


@dataclass(frozen=True)
class DecodeOptions:
    """How a call is executed. The default of every field is right for most calls.

    Attributes:
        backend: `triton` (generated kernel) or `torch` (the traced graph in PyTorch operations). The default is
            `triton` for CUDA tensors and `torch` for CPU tensors.
        num_splits: how many programs share the KV cache of one head. With the balanced schedule, how many share the
            whole cache (for each tile of query rows, if a KV head has several). The default fills the GPU.
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
        for name in ("batch_invariant", "debug"):
            if type(getattr(self, name)) is not bool:
                raise ValueError(f"`options.{name}` must be a bool, got {getattr(self, name)!r}")
        if self.schedule == "balanced" and self.batch_invariant:
            raise ValueError('`options.schedule="balanced"` and `options.batch_invariant=True` exclude one another')
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
    scale: float | None = None
    out: torch.Tensor | None = None

    @property
    def format(self) -> Contiguous:
        """How keys and values lie in memory."""
        return CONTIGUOUS if self.page_table is None else PAGED

    @property
    def capacity(self) -> int:
        """The longest sequence that the cache can hold."""
        return self.format.capacity(self.key, self.page_table)

    @property
    def max_kv_len(self) -> int:
        """The longest sequence that the call can have: `kv_lens` if it is a number, else the capacity."""
        return self.kv_lens if isinstance(self.kv_lens, int) else self.capacity

    @property
    def out_shape(self) -> tuple[int, int, int, int]:
        """[B, Hq, Q, Dv]."""
        batch, num_q_heads, num_queries, _ = self.query.shape
        return batch, num_q_heads, num_queries, self.value.shape[3]

    @property
    def sizes(self) -> Sizes:
        """Run-time sizes, which change without a new kernel."""
        return Sizes(self.query.shape[0], self.key.shape[1], self.max_kv_len)

    def only_shapes(self) -> Inputs:
        """If the query is on the meta device, the same with all tensors there: then they may have been anywhere.

        Query, key and value stay as they are, because key and value may share memory.
        """
        if not getattr(self.query, "is_meta", False):
            return self
        moved = (x.to("meta") if isinstance(x, torch.Tensor) else x for x in self[3:])
        return Inputs._make([*self[:3], *moved])

    def make_out(self) -> torch.Tensor:
        """The tensor that the output is written to."""
        return self.query.new_empty(self.out_shape) if self.out is None else self.out


class Sizes(NamedTuple):
    """Run-time sizes: they change without a new kernel."""

    batch: int
    num_kv_heads: int
    max_kv_len: int


def same_for_all(numbers: Any, query: torch.Tensor) -> Any:
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
        batch = _batch(query)
        return numbers.view(1) if batch == 1 else numbers.expand(batch)
    is_integer = isinstance(numbers, Integral) and not isinstance(numbers, bool)
    return int(numbers) if is_integer else numbers


def per_sequence(lengths: Any, query: torch.Tensor) -> Any:
    """As `same_for_all`, but a number also becomes a tensor [B]."""
    lengths = same_for_all(lengths, query)
    if type(lengths) is int and isinstance(query, torch.Tensor):
        place = "cpu" if query.is_meta else query.device  # `explain` reads the lengths
        return torch.full((_batch(query),), lengths, dtype=torch.int64, device=place)
    return lengths


def _batch(query: object) -> int:
    """Sequences of a query that is not checked yet."""
    return len(query) if isinstance(query, torch.Tensor) and query.dim() else 1


def as_scale(scale: Any, query: torch.Tensor) -> Any:
    """`k_scale` or `v_scale`. If the query is not on the CPU, a 0-d tensor on the CPU is read as a number."""
    if scale is not None and isinstance(scale, torch.Tensor) and not scale.dim() and scale.device.type == "cpu":
        return scale if getattr(query, "is_cpu", True) else scale.item()
    return scale


def check_inputs(inputs: Inputs, options: DecodeOptions) -> None:
    """Checks the arguments of a call, without reading any tensor on a GPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes or devices do not match; the message says what was expected.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    _check_tensor("query", query, query, FLOATS)
    for name, cache in (("key", key), ("value", value)):
        _check_tensor(name, cache, query, (*FLOATS, *QUANTISED))
    _check_caches(inputs)
    batch, num_q_heads, num_queries, _ = query.shape
    if num_q_heads > MAX_HEADS:
        raise ValueError(f"`query` must have at most {MAX_HEADS} heads, got Hq = {num_q_heads}")
    if num_queries > MAX_QUERIES:
        raise ValueError(f"`query` must have at most {MAX_QUERIES} tokens, got Q = {num_queries}")
    if batch * num_q_heads * num_queries >= 1 << 31:
        raise ValueError(f"`query` must have fewer than 2**31 rows, got {tuple(query.shape)}")
    _check_kv_lens(inputs)
    _check_per_sequence("q_lens", inputs.q_lens, query, "an integer or ")
    check_all_lens(inputs, options)
    _check_q_offset(inputs.q_offset, query)
    if inputs.scale is not None:
        checked_scale(inputs.scale)
    for name, scale, of in (("k_scale", inputs.k_scale, "key"), ("v_scale", inputs.v_scale, "value")):
        _check_cache_scale(name, scale, of, inputs)
    if inputs.sinks is not None:
        _check_sinks(inputs.sinks, query)
    if inputs.out is not None:
        _check_out(inputs.out, inputs)


def _check_caches(inputs: Inputs) -> None:
    """Checks the shapes of key and value, and the page table."""
    query, key, value, form = inputs.query, inputs.key, inputs.value, inputs.format.form
    batch, num_q_heads, _, head_dim = query.shape
    caches = batch if inputs.page_table is None else None
    _check_shape("key", key, (caches, None, None, head_dim), form.format("D"), f"D = {head_dim} (from query)")
    num_caches, num_kv_heads, rows, _ = key.shape
    source = inputs.format.sizes.format(*key.shape)
    _check_shape("value", value, (caches, num_kv_heads, rows, None), form.format("Dv"), source)
    if caches is None and len(value) != num_caches:
        raise ValueError(f"`value` must have as many pages as `key`, {num_caches}, got {len(value)}")
    for name, size in (("query", head_dim), ("value", value.shape[3])):
        if not 1 <= size <= MAX_HEAD_DIM:
            raise ValueError(f"the head dimension of `{name}` must be between 1 and {MAX_HEAD_DIM}, got {size}")
    if (num_kv_heads == 0 and num_q_heads) or (num_kv_heads and num_q_heads % num_kv_heads):
        raise ValueError(
            f"`query` must have a multiple of the heads of `key`, got Hq = {num_q_heads} and Hkv = {num_kv_heads}; "
            "a [B, N, H, D] cache is passed as its view `cache.transpose(1, 2)`"
        )
    if inputs.page_table is not None:
        _check_page_table(inputs.page_table, inputs)
    capacity = inputs.capacity
    if capacity >= MAX_KV_LEN:
        raise ValueError(f"{inputs.format.limit} fewer than {MAX_KV_LEN} positions, got N = {capacity}")


def _check_page_table(table: torch.Tensor, inputs: Inputs) -> None:
    query, page_size = inputs.query, inputs.key.shape[2]
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"`page_table` must be an int32 or int64 tensor [B, max_pages], got {type(table).__name__}")
    if table.dim() != 2 or table.shape[0] != query.shape[0]:
        expected = f"[B, max_pages] with B = {query.shape[0]} (from query)"
        raise ValueError(f"`page_table` must have shape {expected}, got {list(table.shape)}")
    if table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`page_table` must be int32 or int64, got {table.dtype}")
    check_place("page_table", table, query)
    if page_size == 0:
        raise ValueError("`key` must have pages of at least one token, got page_size = 0")
    if inputs.kv_lens is None:
        raise ValueError("`page_table` needs `kv_lens`: the pages of a sequence do not say where it ends")


def _check_tensor(name: str, tensor: torch.Tensor, query: torch.Tensor, dtypes: tuple[torch.dtype, ...]) -> None:
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != 4:
        raise ValueError(f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got shape {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        wanted = "be float16, bfloat16, float32 or float64"
        if len(dtypes) == 1:
            wanted = f"have the dtype of `query`, {query.dtype}"
        elif torch.int8 in dtypes:
            wanted += ", or quantised in float8_e4m3fn, float8_e5m2 or int8"
        raise ValueError(f"`{name}` must {wanted}, got {tensor.dtype}")
    check_place(name, tensor, query)


def check_place(
    name: str, tensor: torch.Tensor, first: torch.Tensor, owner: str = "query", function: str = "flex_decode"
) -> None:
    """Refuses other devices than that of a `first` tensor, sparse tensors, and gradients.

    Raises:
        ValueError: with the names of the tensor, of the `owner` of the device, and of the called function.
    """
    if tensor.device != first.device:
        raise ValueError(f"`{name}` must be on the device of `{owner}`, {first.device}, got {tensor.device}")
    if tensor.layout != torch.strided:
        raise ValueError(f"`{name}` must be a dense tensor, got layout {tensor.layout}")
    if tensor.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"`{name}` requires grad, but {function} is forward only: call it under torch.no_grad() or detach `{name}`"
        )


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple, form: str, source: str) -> None:
    batch, *rest = expected
    fits = all(want is None or want == got for want, got in zip(rest, tensor.shape[1:], strict=True))
    if not fits:
        raise ValueError(f"`{name}` must have shape {form} with {source}, got {list(tensor.shape)}")
    if batch is not None and tensor.shape[0] not in (batch, 1):
        raise ValueError(
            f"`{name}` must have shape {form} with B = {batch} (from query) or 1 to broadcast, got {list(tensor.shape)}"
        )


def _check_kv_lens(inputs: Inputs) -> None:
    length: Any = inputs.kv_lens
    if type(length) is not int:
        _check_per_sequence("kv_lens", length, inputs.query, "an integer or ")
    elif not 0 <= length <= inputs.capacity:
        raise ValueError(f"`kv_lens` must lie between 0 and {_capacity(inputs)[1]}, got {length}")


def _capacity(inputs: Inputs) -> tuple[int, str]:
    """The longest sequence that the cache can hold, and the same in words."""
    return inputs.capacity, inputs.format.capacity_form.format(inputs.capacity)


def _check_per_sequence(name: str, tensor: torch.Tensor | None, query: torch.Tensor, also: str = "") -> None:
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be {also}an int32 or int64 tensor [B], got {type(tensor).__name__}")
    if tensor.dim() and tensor.shape != query.shape[:1]:
        raise ValueError(f"`{name}` must have shape [B] = [{query.shape[0]}], got {list(tensor.shape)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
    check_place(name, tensor, query)


def checked_scale(scale: object, name: str = "scale") -> float:
    """A factor as a float.

    Raises:
        TypeError: it is not a number.
        ValueError: it is not finite.
    """
    if isinstance(scale, bool) or not isinstance(scale, Real):
        allowed = "a number or None" if name == "scale" else "a number or a tensor"
        raise TypeError(f"`{name}` must be {allowed}, got {type(scale).__name__}")
    try:
        value = float(scale)
    except OverflowError:
        value = math.inf
    if not math.isfinite(value):
        raise ValueError(f"`{name}` must be finite, got {value}")
    return value


def check_all_lens(inputs: Inputs, options: DecodeOptions) -> None:
    """Checks `kv_lens` and `q_lens` if they are on the CPU or if `options.debug` is set, which waits for a GPU.

    Raises:
        ValueError: a length is negative or too large.
    """
    kv_lens, q_lens = inputs.kv_lens, inputs.q_lens
    if isinstance(kv_lens, torch.Tensor) and (kv_lens.device.type == "cpu" or options.debug):
        check_lens("kv_lens", kv_lens, *_capacity(inputs))
    if q_lens is not None and (q_lens.device.type == "cpu" or options.debug):
        most = inputs.query.shape[2]
        check_lens("q_lens", q_lens, most, f"Q = {most} (from query)")


def check_lens(name: str, lengths: torch.Tensor, most: int, limit: str) -> None:
    """Checks lengths.

    Raises:
        ValueError: one is negative or greater than `most`. `limit` describes `most` in words.
    """
    if lengths.numel() and (int(lengths.max()) > most or int(lengths.min()) < 0):
        found = f"{int(lengths.min())} to {int(lengths.max())}"
        raise ValueError(f"`{name}` must lie between 0 and {limit}, got {found}")


def _check_q_offset(q_offset: object, query: torch.Tensor) -> None:
    if isinstance(q_offset, bool) or not isinstance(q_offset, (int, torch.Tensor, type(None))):
        raise TypeError(f"`q_offset` must be an integer or an integer tensor [B], got {type(q_offset).__name__}")
    if isinstance(q_offset, torch.Tensor):
        _check_per_sequence("q_offset", q_offset, query)
    elif q_offset is not None and not -(1 << 63) <= q_offset < 1 << 63:
        raise ValueError(f"`q_offset` must fit into int64, got {q_offset}")


def _check_cache_scale(name: str, scale: object, of: str, inputs: Inputs) -> None:
    """Checks `k_scale` or `v_scale`, the scale `of` key or value. Without a scale, float8 numbers are what they say."""
    key, query, dtype = inputs.key, inputs.query, getattr(inputs, of).dtype
    if scale is None:
        if dtype == torch.int8:
            raise ValueError(f"`{name}` is missing: `{of}` is {dtype}; pass 1.0 if its numbers are not scaled")
        return
    if dtype not in QUANTISED:
        raise ValueError(f"`{name}` is for caches in float8 or int8, but `{of}` is {dtype}")
    if not isinstance(scale, torch.Tensor):
        checked_scale(scale, name)
        return
    heads = key.shape[1]
    shapes = [[heads], [len(query), heads], list(key.shape[:3])]
    form = f"[Hkv], [B, Hkv] or {inputs.format.scale_form}"
    if scale.dim() and list(scale.shape) not in shapes:
        expected = f"{shapes[0]}, {shapes[1]} or {shapes[2]}"
        raise ValueError(f"`{name}` must be a number or have shape {form} = {expected}, got {list(scale.shape)}")
    if scale.dtype not in DTYPES:
        raise ValueError(f"`{name}` must be float32, float16 or bfloat16, got {scale.dtype}")
    check_place(name, scale, query)


def _check_sinks(sinks: torch.Tensor, query: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"`sinks` must be a tensor [Hq], got {type(sinks).__name__}")
    if sinks.shape != query.shape[1:2]:
        raise ValueError(f"`sinks` must have shape [Hq] = [{query.shape[1]}] (from query), got {list(sinks.shape)}")
    if sinks.dtype not in DTYPES:
        raise ValueError(f"`sinks` must be float32, float16 or bfloat16, got {sinks.dtype}")
    check_place("sinks", sinks, query)


def _check_out(out: torch.Tensor, inputs: Inputs) -> None:
    _check_tensor("out", out, inputs.query, (inputs.query.dtype,))
    if out.shape != inputs.out_shape:
        raise ValueError(f"`out` must have shape [B, Hq, Q, Dv] = {list(inputs.out_shape)}, got {list(out.shape)}")
    if overlaps_itself(out):
        found = f"strides {list(out.stride())} for shape {list(out.shape)}"
        raise ValueError(f"`out` must have a place of its own for each element, got {found}")
