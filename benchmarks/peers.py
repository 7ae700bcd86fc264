"""The peers that are packages of their own, called as their documents advise.

Layouts and plans are made before a call is timed. A peer that cannot run a case raises `Unsupported` with the reason.
"""

from collections.abc import Callable

import torch

from .cases import Case, Pages, Tensors, into_pages, totals
from .mod_cases import CAP, ModCase

__all__ = [
    "Bind", "Unsupported", "flash_attention_3", "flashinfer", "only_plain_caches", "shuffled_pages", "xformers_split_k",
]  # fmt: skip

Call = Callable[[], torch.Tensor]
Bind = Callable[[Tensors], Call]

WORKSPACE_BYTES = 128 * 2**20  # what FlashInfer's documents recommend
FLASHINFER_PAGE = 16  # tokens; where the case has no pages of its own


class Unsupported(Exception):
    """The column cannot run this case; the message is the reason printed below the table."""


def only_plain_caches(case: Case, title: str, *but: str) -> None:
    """Refuses a case with a cache or queries that a column does not take.

    Args:
        case: The case.
        title: Name of the column.
        but: What it does take, by the names used here.

    Raises:
        Unsupported: the case needs something else.
    """
    has = {
        "ragged lengths": case.is_ragged, "pages": case.page_size, "an 8-bit cache": case.cache_dtype,
        "latents": case.latent_dim, "packed queries": case.q_lens,
    }  # fmt: skip
    for what, is_so in has.items():
        if is_so and what not in but:
            raise Unsupported(f"{title} is not run with {what}")


def shuffled_pages(case: Case, tensors: Tensors) -> Pages:
    """The cache in pages of the case's size, in random order, as in a server that has run for a while."""
    size = case.page_size
    length = -(-case.max_len // size) * size
    key, value = (torch.nn.functional.pad(x, (0, 0, 0, length - case.max_len)) for x in (tensors.key, tensors.value))
    generator = torch.Generator(key.device).manual_seed(0)
    order = torch.randperm(case.batch * length // size, device=key.device, generator=generator)
    return Pages(into_pages(key, size, order), into_pages(value, size, order), order.view(case.batch, -1).int())


# --- FlashInfer -------------------------------------------------------------------------------------------------------


def _live_pages(case: Case, tensors: Tensors) -> Pages:
    """The pages of live tokens alone, one sequence after another: `table` is flat, int32 `[pages]`."""
    size = case.page_size or FLASHINFER_PAGE
    if case.page_size:
        pages = shuffled_pages(case, tensors)
        used = [pages.table[b, : -(-n // size)] for b, n in enumerate(case.lens)]
        return pages._replace(table=torch.cat(used))
    pools = []
    for cache in (tensors.key,) if case.latent_dim else (tensors.key, tensors.value):
        parts = []
        if case.cache_dtype:
            cache = cache.view(torch.uint8)  # PyTorch moves bytes everywhere, float8 numbers only in later versions
        for b, n in enumerate(case.lens):
            x = torch.nn.functional.pad(cache[b, :, :n], (0, 0, 0, -n % size))
            parts.append(x.unflatten(1, (-1, size)).transpose(0, 1))
        pools.append(torch.cat(parts).contiguous().view(case.stored_dtype))
    return Pages(pools[0], pools[-1], torch.arange(len(pools[0]), dtype=torch.int32, device=tensors.key.device))


def _of_flashinfer(case: Case, mod: ModCase) -> dict:
    """The mod as arguments of `plan`."""
    if mod.name == "sliding_window":
        return {"window_left": case.window - 1}
    known = {"none": {}, "causal": {}, "softcap": {"logits_soft_cap": CAP}, "alibi": {"pos_encoding_mode": "ALIBI"}}
    if mod.name not in known:
        raise Unsupported(f"FlashInfer takes {mod.name} only as C++ text")
    return known[mod.name]


def flashinfer(case: Case, mod: ModCase, device: torch.device) -> Bind:
    """FlashInfer over pages `[pages, Hkv, size, D]`: decode on tensor cores, prefill for packed queries."""
    import flashinfer as package

    if case.latent_dim:
        return _flashinfer_latent(case, mod, device)
    only_plain_caches(case, "FlashInfer", "ragged lengths", "pages", "packed queries", "an 8-bit cache")
    if case.cache_dtype == "int8":
        raise Unsupported("FlashInfer has no int8 cache")
    if case.head_dim % 64:
        raise Unsupported("FlashInfer's kernels for tensor cores take head dimensions that 64 divides")
    if case.num_queries > 1 and mod.name != "causal":
        raise Unsupported("FlashInfer's several query tokens are causal")
    size = case.page_size or FLASHINFER_PAGE
    num_pages = [-(-n // size) for n in case.lens]
    last = torch.tensor([n - size * (p - 1) for n, p in zip(case.lens, num_pages, strict=True)], dtype=torch.int32)
    heads = case.num_q_heads, case.num_kv_heads, case.head_dim, size
    plan = _of_flashinfer(case, mod) | {"q_data_type": case.torch_dtype, "kv_data_type": case.stored_dtype}
    workspace = torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device)
    scales = {} if case.cache_scale is None else {"k_scale": case.cache_scale, "v_scale": case.cache_scale}
    if case.q_lens:
        wrapper = package.BatchPrefillWithPagedKVCacheWrapper(workspace, "HND")
        first, plan = (totals(case.q_lens, device),), plan | {"causal": mod.name == "causal"}
    else:
        wrapper = package.BatchDecodeWithPagedKVCacheWrapper(workspace, "HND", use_tensor_cores=True)
        first, plan = (), plan | {"q_len_per_req": case.num_queries}
    planned = False

    def bind(tensors: Tensors) -> Call:
        nonlocal planned
        pages = _live_pages(case, tensors)
        if not planned:  # the pages of all input sets have the same table
            wrapper.plan(*first, totals(num_pages, device), pages.table, last.to(device), *heads, **plan)
            planned = True
        query = tensors.query if case.q_lens else tensors.query.transpose(1, 2).flatten(0, 1).contiguous()
        cache = pages.key, pages.value

        def call() -> torch.Tensor:
            out = wrapper.run(query, cache, **scales)
            return out if case.q_lens else out.unflatten(0, (case.batch, -1)).transpose(1, 2)

        return call

    return bind


def _flashinfer_latent(case: Case, mod: ModCase, device: torch.device) -> Bind:
    from flashinfer.mla import BatchMLAPagedAttentionWrapper, MLAPlanMetadata

    only_plain_caches(case, "FlashInfer's MLA", "latents", "pages", "ragged lengths")
    if mod.name not in ("none", "causal"):
        raise Unsupported("FlashInfer's MLA takes no mod")
    size = case.page_size or FLASHINFER_PAGE
    num_pages = [-(-n // size) for n in case.lens]
    wrapper = BatchMLAPagedAttentionWrapper(torch.zeros(WORKSPACE_BYTES, dtype=torch.uint8, device=device))
    planned = False

    def bind(tensors: Tensors) -> Call:
        nonlocal planned
        pages = _live_pages(case, tensors)
        if not planned:
            starts = totals([case.num_queries] * case.batch, device)
            wrapper.plan(
                metadata=MLAPlanMetadata.csr(starts, totals(num_pages, device), pages.table, tensors.kv_lens),
                num_heads=case.num_q_heads, head_dim_ckv=case.latent_dim, head_dim_kpe=case.head_dim - case.latent_dim,
                page_size=size, causal=mod.name == "causal", sm_scale=case.head_dim**-0.5,
                q_data_type=case.torch_dtype, kv_data_type=case.stored_dtype,
            )  # fmt: skip
            planned = True
        query, cache = tensors.query.transpose(1, 2).flatten(0, 1).contiguous(), pages.key[:, 0]

        def call() -> torch.Tensor:
            return wrapper.run(query=query, kv_cache=cache).unflatten(0, (case.batch, -1)).transpose(1, 2)

        return call

    return bind


# --- FlashAttention 3 -------------------------------------------------------------------------------------------------


def flash_attention_3(case: Case, mod: ModCase, device: torch.device) -> Bind:
    """FlashAttention 3's decode with a cache, in the forward-only build: bfloat16, no pages, no windows."""
    from fa3_fwd_interface import flash_attn_with_kvcache

    only_plain_caches(case, "this build of FlashAttention 3", "ragged lengths", "latents", "packed queries")
    if case.dtype != "bfloat16":
        raise Unsupported("this build of FlashAttention 3 takes bfloat16 only")
    if mod.name not in ("none", "causal", "softcap"):
        raise Unsupported(f"this build of FlashAttention 3 has no {mod.name}")
    given: dict = {"causal": mod.name == "causal", "softcap": mod.cap or 0.0, "softmax_scale": case.head_dim**-0.5}
    if case.q_lens:
        given |= {"cu_seqlens_q": totals(case.q_lens, device), "max_seqlen_q": max(case.q_lens)}
    if case.is_ragged or case.q_lens:
        given["cache_seqlens"] = torch.tensor(case.lens, dtype=torch.int32, device=device)

    def bind(tensors: Tensors) -> Call:
        query = tensors.query if case.q_lens else tensors.query.transpose(1, 2).contiguous()
        key, value = tensors.key.transpose(1, 2), tensors.value.transpose(1, 2)  # [B, N, H, D], of any strides
        more = dict(given)
        if case.latent_dim:  # the latents and the columns with positions are arguments of their own
            more["qv"], query = query[..., : case.latent_dim].contiguous(), query[..., case.latent_dim :].contiguous()
            key = key[..., case.latent_dim :]

        def call() -> torch.Tensor:
            out = flash_attn_with_kvcache(query, key, value, **more)
            return out if case.q_lens else out.transpose(1, 2)

        return call

    return bind


# --- xformers ---------------------------------------------------------------------------------------------------------


def xformers_split_k(case: Case, mod: ModCase, device: torch.device) -> Bind:
    """The split-K kernel of xformers: keys of all sequences one after another, masks as its own classes."""
    from xformers.ops import fmha
    from xformers.ops.fmha import attn_bias, common, triton_splitk

    only_plain_caches(case, "xformers", "ragged lengths")
    # A wheel whose C++ part belongs to another torch says that it has no CUDA. This kernel is Triton's alone.
    common._built_with_cuda = True
    if mod.name not in ("none", "causal"):
        raise Unsupported(f"xformers' split-K kernel is not run with {mod.name}")
    group = case.num_q_heads // case.num_kv_heads
    kind = attn_bias.BlockDiagonalGappyKeysMask
    if mod.name == "causal" and case.num_queries > 1:
        kind = attn_bias.BlockDiagonalCausalWithOffsetGappyKeysMask
    starts = totals(case.lens, "cpu").tolist()
    bias = kind.from_seqlens([case.num_queries] * case.batch, starts, list(case.lens), device=device)

    def flat(cache: torch.Tensor) -> torch.Tensor:
        """`[1, tokens, Hkv, group, D]`: all live tokens, and each KV head shown to its query heads."""
        live = torch.cat([cache[b, :, :n] for b, n in enumerate(case.lens)], 1).transpose(0, 1).contiguous()
        return live[None, :, :, None].expand(-1, -1, -1, group, -1)

    def bind(tensors: Tensors) -> Call:
        query = tensors.query.transpose(1, 2).flatten(0, 1)[None].unflatten(2, (-1, group)).contiguous()
        key, value = flat(tensors.key), flat(tensors.value)

        def call() -> torch.Tensor:
            out = fmha.memory_efficient_attention_forward(query, key, value, bias, op=triton_splitk.FwOp)
            return out[0].flatten(1, 2).unflatten(0, (case.batch, -1)).transpose(1, 2)

        return call

    return bind
