"""Checks the arguments of a call. Each error says what was expected, and of which argument."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any

import torch

from ..analysis.analyze import MAX_KV_LEN, MAX_KV_OFFSET, MAX_QUERIES
from .device import DeviceFacts
from .inputs import DTYPES, FLOATS, MAX_HEAD_DIM, QUANTISED, DecodeOptions, Inputs
from .overlap import overlaps_itself
from .packing import check_ascending

MAX_HEADS = 1 << 20


def check_inputs(inputs: Inputs, options: DecodeOptions) -> None:
    """Checks the arguments of a call, without reading any tensor on a GPU.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: shapes, dtypes or devices do not match; the message says what was expected.
    """
    query, key, value = inputs.query, inputs.key, inputs.value
    if not isinstance(options, DecodeOptions):
        raise TypeError(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")
    _check_query(inputs)
    for name, cache in (("key", key), ("value", value)):
        also = "; packed keys [Tk, Hkv, D] need `cu_seqlens_k`" if getattr(cache, "ndim", 0) == 3 else ""
        _check_tensor(name, cache, query, (*FLOATS, *QUANTISED), also=also)
    _check_caches(inputs)
    if inputs.num_q_heads > MAX_HEADS:
        raise ValueError(f"`query` must have at most {MAX_HEADS} heads, got Hq = {inputs.num_q_heads}")
    if inputs.num_tokens > MAX_QUERIES:
        raise ValueError(f"`query` must have at most {MAX_QUERIES} tokens, got {_tokens(inputs)}")
    if math.prod(query.shape[:-1]) >= 1 << 31:
        raise ValueError(f"`query` must have fewer than 2**31 rows, got {tuple(query.shape)}")
    _check_kv_lens(inputs)
    _check_per_sequence("q_lens", inputs.q_lens, inputs, "an integer or ")
    _check_per_sequence("kv_starts", inputs.kv_starts, inputs, "an integer or ")
    _check_positions("q_offset", inputs.q_offset, inputs)
    _check_positions("kv_offset", inputs.kv_offset, inputs)
    check_all_lens(inputs, options)
    if inputs.scale is not None:
        checked_scale(inputs.scale)
    for name, scale, of in (("k_scale", inputs.k_scale, "key"), ("v_scale", inputs.v_scale, "value")):
        _check_cache_scale(name, scale, of, inputs)
    if inputs.sinks is not None:
        _check_sinks(inputs.sinks, query)
    if inputs.out is not None:
        _check_out(inputs.out, inputs)


def check_device(inputs: Inputs, facts: DeviceFacts) -> None:
    """Refuses dtypes that the kernels for a device do not compute.

    Raises:
        ValueError: the query is bfloat16 in Triton's interpreter, or the cache is float8_e4m3fn on an older GPU.
    """
    interpreted = facts.backend == "cpu"
    if interpreted and inputs.query.dtype == torch.bfloat16:
        raise ValueError(
            "`query` is bfloat16, which Triton's interpreter computes wrongly: convert it to float16 or "
            'float32, or pass `options=DecodeOptions(backend="torch")`'
        )
    if torch.float8_e4m3fn in (inputs.key.dtype, inputs.value.dtype) and not (interpreted or facts.can_unpack):
        raise ValueError(
            "float8_e4m3fn caches need an NVIDIA GPU of compute capability 8.9 or later, got "
            f"{facts.backend} {facts.arch}: use float8_e5m2 or int8"
        )


def _check_query(inputs: Inputs) -> None:
    """Checks the query, and what says where its tokens lie if it is packed."""
    query, dim = inputs.query, getattr(inputs.query, "ndim", 0)
    if inputs.cu_seqlens_q is None:
        also = "; a packed query [T, Hq, D] needs `cu_seqlens_q`"
        _check_tensor("query", query, query, FLOATS, also=also if dim == 3 else "")
        return
    also = "; `query.transpose(1, 2).flatten(0, 1)` packs [B, Hq, Q, D], and without `cu_seqlens_q` it passes as it is"
    form = "3 dimensions [T, Hq, D] beside `cu_seqlens_q`"
    _check_tensor("query", query, query, FLOATS, form, also if dim == 4 else "")
    if inputs.q_lens is not None:
        raise ValueError(
            "`q_lens` and `cu_seqlens_q` exclude one another: `cu_seqlens_q` says which tokens a sequence has"
        )
    _check_cu_seqlens("cu_seqlens_q", inputs.cu_seqlens_q, query)
    if inputs.cu_seqlens_k is not None:
        _check_cu_seqlens("cu_seqlens_k", inputs.cu_seqlens_k, query)
        if inputs.cu_seqlens_k.shape != inputs.cu_seqlens_q.shape:
            expected = f"[B + 1] = {list(inputs.cu_seqlens_q.shape)} (from cu_seqlens_q)"
            raise ValueError(f"`cu_seqlens_k` must have shape {expected}, got {list(inputs.cu_seqlens_k.shape)}")


def _check_cu_seqlens(name: str, tensor: torch.Tensor, query: torch.Tensor) -> None:
    """Checks where the rows of packed sequences begin, without reading it."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be an int32 tensor [B + 1], got {type(tensor).__name__}")
    if tensor.dim() != 1 or not len(tensor):
        raise ValueError(f"`{name}` must have shape [B + 1], at least one entry, got {list(tensor.shape)}")
    if tensor.dtype != torch.int32:
        raise ValueError(f"`{name}` must be int32, got {tensor.dtype}: convert it, `{name}.to(torch.int32)`")
    check_place(name, tensor, query)


def _tokens(inputs: Inputs) -> str:
    """The number of query tokens, in words."""
    return f"{'T' if inputs.packed else 'Q'} = {inputs.num_tokens}"


def _batch_source(inputs: Inputs) -> str:
    """The argument that says how many sequences there are."""
    return "cu_seqlens_q" if inputs.packed else "query"


def _check_caches(inputs: Inputs) -> None:
    """Checks the shapes of key and value, and the page table."""
    key, value, form = inputs.key, inputs.value, inputs.format.form
    num_q_heads, head_dim = inputs.num_q_heads, inputs.head_dim
    caches = inputs.batch if inputs.table is None else None
    _check_shape("key", inputs, (caches, None, None, head_dim), form.format("D"), f"D = {head_dim} (from query)")
    num_caches, num_kv_heads, rows, _ = key.shape
    source = inputs.format.sizes.format(*key.shape)
    _check_shape("value", inputs, (caches, num_kv_heads, rows, None), form.format("Dv"), source)
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
    page_size = inputs.key.shape[2]
    if not isinstance(table, torch.Tensor):
        raise TypeError(f"`page_table` must be an int32 or int64 tensor [B, max_pages], got {type(table).__name__}")
    if table.dim() != 2 or table.shape[0] != inputs.batch:
        expected = f"[B, max_pages] with B = {inputs.batch} (from {_batch_source(inputs)})"
        raise ValueError(f"`page_table` must have shape {expected}, got {list(table.shape)}")
    if table.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`page_table` must be int32 or int64, got {table.dtype}")
    check_place("page_table", table, inputs.query)
    if page_size == 0:
        raise ValueError("`key` must have pages of at least one token, got page_size = 0")
    if inputs.kv_lens is None:
        raise ValueError("`page_table` needs `kv_lens`: the pages of a sequence do not say where it ends")


def _check_tensor(
    name: str,
    tensor: torch.Tensor,
    query: torch.Tensor,
    dtypes: tuple[torch.dtype, ...],
    form: str = "4 dimensions [B, H, tokens, head_dim]",
    also: str = "",
) -> None:
    """Checks the type and the dtype of a tensor, and that it has as many dimensions as its `form` says."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != int(form[0]):
        raise ValueError(f"`{name}` must have {form}, got shape {list(tensor.shape)}{also}")
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


def _check_shape(name: str, inputs: Inputs, expected: tuple, form: str, source: str) -> None:
    """Checks the shape of key or value; None among the `expected` sizes stands for any size."""
    tensor, (batch, *rest) = getattr(inputs, name), expected
    found = inputs.format.shown_shape(tensor)
    fits = all(want is None or want == got for want, got in zip(rest, tensor.shape[1:], strict=True))
    if not fits:
        raise ValueError(f"`{name}` must have shape {form} with {source}, got {found}")
    if batch is not None and tensor.shape[0] not in (batch, 1):
        owner = _batch_source(inputs)
        raise ValueError(
            f"`{name}` must have shape {form} with B = {batch} (from {owner}) or 1 to broadcast, got {found}"
        )


def _check_kv_lens(inputs: Inputs) -> None:
    length: Any = inputs.kv_lens
    if type(length) is not int:
        _check_per_sequence("kv_lens", length, inputs, "an integer or ")
    elif not 0 <= length <= inputs.capacity:
        raise ValueError(f"`kv_lens` must lie between 0 and {_capacity(inputs)[1]}, got {length}")


def _capacity(inputs: Inputs) -> tuple[int, str]:
    """The longest sequence that the cache can hold, and the same in words."""
    return inputs.capacity, inputs.format.capacity_form.format(inputs.capacity)


def _check_per_sequence(name: str, tensor: torch.Tensor | None, inputs: Inputs, also: str = "") -> None:
    if tensor is None:
        return
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"`{name}` must be {also}an int32 or int64 tensor [B], got {type(tensor).__name__}")
    if tensor.dim() and list(tensor.shape) != [inputs.batch]:
        raise ValueError(f"`{name}` must have shape [B] = [{inputs.batch}], got {list(tensor.shape)}")
    if tensor.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"`{name}` must be int32 or int64, got {tensor.dtype}")
    check_place(name, tensor, inputs.query)


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
    """Checks lengths and `kv_offset` if they are on the CPU or if `options.debug` is set, which waits for a GPU.

    Raises:
        ValueError: a length is negative or too large, an offset is too large, or `cu_seqlens_q` or `cu_seqlens_k` does
            not ascend.
    """
    kv_lens, q_lens, kv_offset = inputs.kv_lens, inputs.q_lens, inputs.kv_offset
    if isinstance(kv_lens, torch.Tensor) and (kv_lens.device.type == "cpu" or options.debug):
        check_lens("kv_lens", kv_lens, *_capacity(inputs))
    if q_lens is not None and (q_lens.device.type == "cpu" or options.debug):
        check_lens("q_lens", q_lens, inputs.num_tokens, f"{_tokens(inputs)} (from query)")
    for name in ("cu_seqlens_q", "cu_seqlens_k"):
        cu_seqlens = getattr(inputs, name)
        if cu_seqlens is None or cu_seqlens.is_meta:  # `explain` knows shapes only
            continue
        if cu_seqlens.device.type == "cpu" or options.debug:
            of_query = inputs.num_tokens, f"{_tokens(inputs)} (from query)"
            check_lens(name, cu_seqlens, *(of_query if name == "cu_seqlens_q" else _capacity(inputs)))
            check_ascending(name, cu_seqlens)
    if isinstance(kv_offset, torch.Tensor) and (kv_offset.device.type == "cpu" or options.debug):
        check_lens("kv_offset", kv_offset, MAX_KV_OFFSET, str(MAX_KV_OFFSET), least=-MAX_KV_OFFSET)


def check_lens(name: str, lengths: torch.Tensor, most: int, limit: str, least: int = 0) -> None:
    """Checks lengths or offsets.

    Raises:
        ValueError: one is less than `least` or greater than `most`. `limit` describes `most` in words.
    """
    if lengths.numel() and (int(lengths.max()) > most or int(lengths.min()) < least):
        found = f"{int(lengths.min())} to {int(lengths.max())}"
        raise ValueError(f"`{name}` must lie between {least} and {limit}, got {found}")


def _check_positions(name: str, positions: object, inputs: Inputs) -> None:
    if isinstance(positions, bool) or not isinstance(positions, (int, torch.Tensor, type(None))):
        raise TypeError(f"`{name}` must be an integer or an integer tensor [B], got {type(positions).__name__}")
    if isinstance(positions, torch.Tensor):
        _check_per_sequence(name, positions, inputs)


def _check_cache_scale(name: str, scale: object, of: str, inputs: Inputs) -> None:
    """Checks `k_scale` or `v_scale`, the scale `of` key or value. Without a scale, float8 numbers are what they say."""
    key, dtype = inputs.key, getattr(inputs, of).dtype
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
    shapes = [[heads], [inputs.batch, heads], list(key.shape[:3])]
    form, expected = f"[Hkv], [B, Hkv] or {inputs.format.scale_form}", f"{shapes[0]}, {shapes[1]} or {shapes[2]}"
    if inputs.cu_seqlens_k is not None:
        shapes, form, expected = shapes[:1], "[Hkv]", f"{shapes[0]}"
    if scale.dim() and list(scale.shape) not in shapes:
        raise ValueError(f"`{name}` must be a number or have shape {form} = {expected}, got {list(scale.shape)}")
    if scale.dtype not in DTYPES:
        raise ValueError(f"`{name}` must be float32, float16 or bfloat16, got {scale.dtype}")
    check_place(name, scale, inputs.query)


def _check_sinks(sinks: torch.Tensor, query: torch.Tensor) -> None:
    if not isinstance(sinks, torch.Tensor):
        raise TypeError(f"`sinks` must be a tensor [Hq], got {type(sinks).__name__}")
    if sinks.shape != query.shape[1:2]:
        raise ValueError(f"`sinks` must have shape [Hq] = [{query.shape[1]}] (from query), got {list(sinks.shape)}")
    if sinks.dtype not in DTYPES:
        raise ValueError(f"`sinks` must be float32, float16 or bfloat16, got {sinks.dtype}")
    check_place("sinks", sinks, query)


def _check_out(out: torch.Tensor, inputs: Inputs) -> None:
    form = "[T, Hq, Dv]" if inputs.packed else "[B, Hq, Q, Dv]"
    dimensions = f"3 dimensions {form}" if inputs.packed else "4 dimensions [B, H, tokens, head_dim]"
    _check_tensor("out", out, inputs.query, (inputs.query.dtype,), dimensions)
    if out.shape != inputs.out_shape:
        raise ValueError(f"`out` must have shape {form} = {list(inputs.out_shape)}, got {list(out.shape)}")
    if overlaps_itself(out):
        found = f"strides {list(out.stride())} for shape {list(out.shape)}"
        raise ValueError(f"`out` must have a place of its own for each element, got {found}")
