"""The columns of the matrix: flexdecode, what PyTorch has, and the peers of `peers.py`.

A column makes, once for a case, what all input sets share (a compiled function, a plan). For each input set that gives
one call without arguments, whose time counts. Layouts that a peer wants are made before that.
"""

import contextlib
import importlib.util
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from . import peers
from .cases import Case, Tensors, naive_attention, totals
from .mod_cases import ModCase
from .peers import Bind, Unsupported, only_plain_caches

__all__ = ["COLUMNS", "Column", "Unsupported", "missing"]


def _flexdecode(case: Case, mod: ModCase, device: torch.device) -> Bind:
    from flexdecode import flex_decode

    given: dict = {}
    if case.cache_scale is not None:
        given |= {"k_scale": case.cache_scale, "v_scale": case.cache_scale}
    if case.q_lens:
        given |= {"cu_seqlens_q": totals(case.q_lens, device), "max_q_len": max(case.q_lens)}
    mods = mod.score_mod, mod.mask_mod
    needs_lens = case.is_ragged or case.page_size or case.q_lens

    def bind(tensors: Tensors) -> Callable[[], torch.Tensor]:
        query, key, value, kv_lens = tensors
        lens = {"kv_lens": kv_lens} if needs_lens else {}
        if case.page_size:
            pages = peers.shuffled_pages(case, tensors)
            lens["page_table"] = pages.table
            key, value = pages.key, pages.value
        return lambda: flex_decode(query, key, value, *mods, **given, **lens)

    return bind


def _naive(case: Case, mod: ModCase, device: torch.device) -> Bind:
    only_plain_caches(case, "naive PyTorch")
    return lambda tensors: lambda: naive_attention(*tensors[:3], mod)


def _sdpa_mask(case: Case, mod: ModCase) -> torch.Tensor | None:
    """The mod as SDPA's `attn_mask`, broadcastable to `[B, Hq, Q, N]`; None where it changes nothing."""
    only_plain_caches(case, "SDPA")
    if mod.cap is not None:
        raise Unsupported("SDPA has no soft-capping: it is neither a bias nor a mask")
    if mod.bias is not None:
        return mod.bias.to(case.torch_dtype).expand(case.batch, -1, -1, -1)
    return None if mod.keep is None or bool(mod.keep.all()) else mod.keep


def _sdpa_with(*backends: str) -> Callable[[Case, ModCase, torch.device], Bind]:
    """SDPA as PyTorch chooses it, or one of its backends, which need a GPU."""

    def make(case: Case, mod: ModCase, device: torch.device) -> Bind:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        if backends and device.type != "cuda":
            raise Unsupported("needs a CUDA device")
        if backends and case.dtype == "float32":
            raise Unsupported("takes float16 and bfloat16 only")
        mask = _sdpa_mask(case, mod)
        if mask is not None and backends == ("FLASH_ATTENTION",):
            mask = _lower_right(case)
        chosen = [getattr(SDPBackend, name) for name in backends]

        def bind(tensors: Tensors) -> Callable[[], torch.Tensor]:
            def call() -> torch.Tensor:
                with sdpa_kernel(chosen) if chosen else contextlib.nullcontext():
                    return functional.scaled_dot_product_attention(*tensors[:3], attn_mask=mask, enable_gqa=True)

            return call

        return bind

    return make


def _lower_right(case: Case) -> torch.Tensor:
    """The causal mask in the one form that flash attention takes; it takes no other."""
    from torch.nn.attention.bias import causal_lower_right

    if case.mod != "causal":
        raise Unsupported("flash attention takes no mask beside the causal one, and no bias")
    return causal_lower_right(case.num_queries, case.max_len)


def _flex_attention(**compiled_with: str) -> Callable[[Case, ModCase, torch.device], Bind]:
    """FlexAttention by torch.compile, with some options of it."""

    def make(case: Case, mod: ModCase, device: torch.device) -> Bind:
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        only_plain_caches(case, "FlexAttention", "ragged lengths")
        lens = torch.tensor(case.lens, device=device) if case.is_ragged else None
        # FlexAttention numbers the queries from 0; in decoding they are the newest tokens of the sequence.
        offset, inner_score_mod, inner_mask_mod = case.max_len - case.num_queries, mod.score_mod, mod.mask_mod

        def score_mod(score, b, h, q_idx, kv_idx):
            return inner_score_mod(score, b, h, q_idx + offset, kv_idx)

        def mask_mod(b, h, q_idx, kv_idx):
            if lens is not None:
                return kv_idx < lens[b]
            return inner_mask_mod(b, h, q_idx + offset, kv_idx) if inner_mask_mod else kv_idx >= 0

        # Without a BlockMask it takes the cache for one block, which it cannot split over the multiprocessors.
        batch = case.batch if mod.differs or lens is not None else None
        block_mask = create_block_mask(mask_mod, batch, None, case.num_queries, case.max_len, device=device)
        keywords = {"enable_gqa": True, "score_mod": score_mod if inner_score_mod else None, "block_mask": block_mask}
        compiled = torch.compile(flex_attention, dynamic=False, **compiled_with)
        return lambda tensors: lambda: compiled(*tensors[:3], **keywords)

    return make


class Column(NamedTuple):
    """A column.

    Attributes:
        title: Its name in tables.
        make: `(case, mod, device) -> (tensors -> call)`; raises `Unsupported` for a case that it cannot run.
        module: What has to be installed for it, as `import` names it; empty for nothing.
        package: How to install that.
        by_default: Whether a run that names no columns has it.
        compiled: Whether torch.compile makes it.
        on_cpu: Whether it runs on a CPU.
    """

    title: str
    make: Callable[[Case, ModCase, torch.device], Bind]
    module: str = ""
    package: str = ""
    by_default: bool = True
    compiled: bool = False
    on_cpu: bool = True


COLUMNS = {
    "flexdecode": Column("flexdecode", _flexdecode),
    "naive": Column("naive PyTorch", _naive),
    "sdpa": Column("SDPA", _sdpa_with()),
    "sdpa_cudnn": Column("SDPA (cuDNN)", _sdpa_with("CUDNN_ATTENTION"), on_cpu=False),
    "flex": Column("FlexAttention", _flex_attention(), compiled=True),
    "flex_best": Column(
        "FlexAttention (best)", _flex_attention(mode="max-autotune-no-cudagraphs"), by_default=False, compiled=True
    ),
    "sdpa_flash": Column("SDPA (flash)", _sdpa_with("FLASH_ATTENTION"), on_cpu=False),
    "flashinfer": Column("FlashInfer", peers.flashinfer, "flashinfer", "flashinfer-python", on_cpu=False),
    "fa3": Column("FlashAttention 3", peers.flash_attention_3, "fa3_fwd_interface", "fa3-fwd", on_cpu=False),
    "xformers": Column("xformers split-K", peers.xformers_split_k, "xformers", "xformers", on_cpu=False),
}


def missing(name: str) -> str | None:
    """Why a column cannot be run on this machine, in one line; None if it can."""
    column = COLUMNS[name]
    if not column.module or importlib.util.find_spec(column.module) is not None:
        return None
    return f"{column.title}: not installed here (pip install {column.package})"
