"""`flex_attention` with the signature and the semantics of PyTorch's, for inference."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

from ..call.device import interpreting
from ..call.inputs import DecodeOptions, Inputs
from ..call.signature import Aux
from ..memos import counters
from ..runtime.request import read_request
from .canonical import refuse
from .ops import run_in_order

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import AuxOutput, AuxRequest, BlockMask

FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
WHOLE = 1 << 30  # PyTorch's block size of a BlockMask that has one block, whatever the lengths
KERNEL_OPTIONS = {"BLOCK_N": "block_n", "SPLIT_KV": "num_splits", "num_warps": "num_warps", "num_stages": "num_stages"}
BACKENDS = {"AUTO": None, "TRITON": "triton", "TRITON_DECODE": "triton"}
# They allow what is not needed here, choose between two kernels that are one here, or are for the backward pass.
WITHOUT_EFFECT = (
    "PRESCALE_QK", "ROWS_GUARANTEED_SAFE", "BLOCKS_ARE_CONTIGUOUS", "FORCE_USE_FLEX_ATTENTION", "WRITE_DQ",
)  # fmt: skip


def flex_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    score_mod: Callable | None = None,
    block_mask: BlockMask | None = None,
    scale: float | None = None,
    enable_gqa: bool = False,
    return_lse: bool = False,
    kernel_options: Mapping[str, Any] | None = None,
    *,
    return_aux: AuxRequest | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None] | tuple[torch.Tensor, AuxOutput]:
    """Takes the place of `torch.nn.attention.flex_attention.flex_attention` where no gradients are needed.

        >>> from flexdecode.integrations import flex_attention
        >>> out = flex_attention(query, key, value, score_mod, block_mask, enable_gqa=True)

    It needs no `torch.compile`, and works inside it. Query positions count from 0, as in PyTorch, and all N keys are
    live. `flexdecode.flex_decode` counts positions in the sequence, and takes lengths, pages and scales.

    Args:
        query: `[B, Hq, Q, D]`, any strides. Also float8: it is widened, and the output is float8.
        key: `[B, Hkv, N, D]`; the batch may be 1 to serve every sequence. Also float8 and int8, as they are.
        value: `[B, Hkv, N, Dv]`, likewise.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx) -> score`.
        block_mask: a BlockMask for Q query positions and N keys.
        scale: factor of the dot product; by default `1 / sqrt(D)`.
        enable_gqa: allows fewer heads of key and value than of the query, a divisor of their number.
        return_lse: also return the natural log of the sum of exponentials, float32 `[B, Hq, Q]`.
        kernel_options: `BLOCK_N`, `SPLIT_KV`, `num_warps`, `num_stages` (also with the prefix `fwd_`) and `BACKEND`
            are honoured, except the backend `FLASH`. Promises about the mask and options of the backward pass have no
            effect. Others are refused.
        return_aux: which numbers of rows to return as an `AuxOutput`: `lse`, and `max_scores`, the largest score of
            each row after score_mod and mask, float32 `[B, Hq, Q]`. Rows without a live key have -inf in both.

    Returns:
        `[B, Hq, Q, Dv]` in the dtype of the query, with dimensions in memory in the order of the query's; under
        autocast in the dtype of autocast. With `return_lse` also the log-sum-exp, with `return_aux` the `AuxOutput`.

    Raises:
        TypeError, ValueError: the arguments do not fit together, or gradients are needed.
        TraceError: a mod cannot be traced; the message has its line and the remedy.
        UnsupportedOpError: a mod calls an operation that flexdecode does not have.
    """
    in_region = torch.compiler.is_compiling() or query.__class__ is FakeTensor
    _check(query, key, value, enable_gqa)
    aux = _aux_of(return_lse, return_aux)
    mask_mod = None
    if block_mask is not None:
        _check_lengths(block_mask, query, key)
        if _is_whole(block_mask):
            mask_mod, block_mask = block_mask.mask_mod, None
    options = None if kernel_options is None else options_of(kernel_options, query.is_cuda)

    query, key, value = _autocast(query, key, value)
    dtype = query.dtype
    if dtype in FLOAT8:
        query = query.half()  # it holds every number of both types
    # PyTorch takes the numbers of an int8 cache as they are.
    k_scale, v_scale = [1.0 if x.dtype == torch.int8 else None for x in (key, value)]
    inputs = Inputs(query, key, value, q_offset=0, k_scale=k_scale, v_scale=v_scale, scale=scale)
    if in_region:
        from .region import attend_in_region

        out, lse, max_scores = attend_in_region(inputs, score_mod, mask_mod, block_mask, aux, options)
    else:
        if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
            refuse("flex_attention", "training", "")
        counters.calls += 1
        request = read_request(inputs, score_mod, mask_mod, block_mask, options=options)
        out, lse, max_scores = run_in_order(request, aux, options)
    if dtype in FLOAT8:
        out = out.to(dtype)
    if return_aux is not None:
        from torch.nn.attention.flex_attention import AuxOutput

        return out, AuxOutput(lse=lse, max_scores=max_scores)
    return (out, lse) if return_lse else out


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool) -> None:
    """Checks what PyTorch's function is stricter in than `flex_decode`, or needs before it.

    Raises:
        TypeError, ValueError: with what was expected.
    """
    for name, tensor in (("query", query), ("key", key), ("value", value)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"`{name}` must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.is_nested or tensor.layout != torch.strided:
            raise ValueError(f"`{name}` must be a dense tensor, got layout {tensor.layout} or a nested tensor")
        if tensor.is_meta:
            raise ValueError(f"`{name}` must have values, got a tensor on the meta device")
        if tensor.dim() != 4:
            raise ValueError(f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got {tensor.dim()}")
    if query.shape[1] != key.shape[1] and not enable_gqa:
        raise ValueError(
            f"`query` has {query.shape[1]} heads and `key` has {key.shape[1]}: pass `enable_gqa=True` if query heads "
            "share those of the key"
        )


def _aux_of(return_lse: bool, return_aux: Any) -> Aux:
    """Which numbers of rows a call asks for.

    Raises:
        TypeError, ValueError: it does so in a wrong way, or in two.
    """
    if return_aux is None:
        return Aux(lse=return_lse)
    if not (hasattr(return_aux, "lse") and hasattr(return_aux, "max_scores")):
        raise TypeError(
            f"`return_aux` must be a torch.nn.attention.flex_attention.AuxRequest, got {type(return_aux).__name__}"
        )
    if return_lse:
        raise ValueError("`return_lse` and `return_aux` exclude one another: use `return_aux=AuxRequest(lse=True)`")
    return Aux(return_aux.lse, return_aux.max_scores)


def _check_lengths(block_mask: Any, query: torch.Tensor, key: torch.Tensor) -> None:
    """Refuses a BlockMask for other lengths, whose rows would be taken for other query positions.

    Raises:
        TypeError: it is no BlockMask.
        ValueError: its lengths are not those of the call.
    """
    if not hasattr(block_mask, "seq_lengths"):
        raise TypeError(
            f"`block_mask` must be a BlockMask, got {type(block_mask).__name__}: make one of a function by "
            "torch.nn.attention.flex_attention.create_block_mask"
        )
    lengths = query.shape[2], key.shape[2]
    if _is_whole(block_mask) or tuple(block_mask.seq_lengths) == lengths:
        return
    raise ValueError(
        f"`block_mask` is for {block_mask.seq_lengths[0]} query positions and {block_mask.seq_lengths[1]} keys, but "
        f"the call has {lengths[0]} and {lengths[1]}. Make one for these lengths. Or call flexdecode.flex_decode, "
        "which takes the BlockMask of the whole sequence: there the queries are the newest tokens"
    )


def _is_whole(block_mask: Any) -> bool:
    """Whether a BlockMask has one block for everything. Then its lengths say nothing."""
    return tuple(block_mask.BLOCK_SIZE) == (WHOLE, WHOLE)


def options_of(kernel_options: Any, on_gpu: bool) -> DecodeOptions:
    """PyTorch's options of kernels as `DecodeOptions`, for inputs on a GPU or elsewhere.

    Raises:
        TypeError: they are no mapping of names.
        ValueError: an option has no counterpart or an impossible value; the message has PyTorch's name of it.
    """
    chosen: dict[str, Any] = {}
    if not isinstance(kernel_options, Mapping) or not all(isinstance(given, str) for given in kernel_options):
        raise TypeError(f"`kernel_options` must be a dict from names to values, got {kernel_options!r}")
    for given, value in kernel_options.items():
        name = given.removeprefix("fwd_")
        if name in KERNEL_OPTIONS:
            chosen[KERNEL_OPTIONS[name]] = value
        elif name == "BACKEND" and isinstance(value, str) and value in BACKENDS:
            # As in PyTorch, there is one backend on a CPU, whatever was chosen.
            chosen["backend"] = BACKENDS[value] if on_gpu or interpreting() else None
        elif name == "BACKEND":
            raise ValueError(f'`kernel_options["{given}"]` must be one of {", ".join(BACKENDS)}, got {value!r}')
        elif name not in WITHOUT_EFFECT and not name.startswith("bwd_"):
            raise ValueError(
                f'`kernel_options["{given}"]` has no counterpart in flexdecode: leave it out. Honoured are '
                f"{', '.join(KERNEL_OPTIONS)} and BACKEND"
            )
    try:
        return DecodeOptions(**chosen)
    except ValueError as error:
        text = str(error)
        for name, field in KERNEL_OPTIONS.items():
            text = text.replace(f"`options.{field}`", f'`kernel_options["{name}"]`')
        raise ValueError(text) from None


def _autocast(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The same in the dtype of autocast, if it is on; float64 stays as it is, like everywhere in autocast."""
    kind = query.device.type
    if not torch.is_autocast_enabled(kind):
        return query, key, value
    dtype = torch.get_autocast_dtype(kind)
    return tuple(
        [x.to(dtype) if x.is_floating_point() and x.dtype != torch.float64 else x for x in (query, key, value)]
    )
