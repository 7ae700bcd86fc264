"""Packages of peers that are not installed here, with the parts that the matrix calls.

Each computes what its documents say about its arguments, by plain attention in float64: a layout, a table of pages or a
scale that is given wrongly gives a wrong result.
"""

import types

import torch


def attend(query, key, value, *, scale=None, causal=False, window=-1, cap=0.0, slopes=None):
    """The newest tokens [Q, Hq, D] over [N, Hkv, D] and [N, Hkv, Dv]."""
    group = query.shape[1] // key.shape[1]
    q, k, v = query.double(), key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
    logits = torch.einsum("qhd,nhd->hqn", q, k) * (scale or query.shape[-1] ** -0.5)
    distance = torch.arange(len(k) - len(q), len(k))[:, None] - torch.arange(len(k))
    if slopes is not None:
        logits = logits - slopes[:, None, None] * distance
    if cap:
        logits = cap * torch.tanh(logits / cap)
    if causal:
        logits = logits.masked_fill(distance < 0, -torch.inf)
    if window >= 0:
        logits = logits.masked_fill(distance > window, -torch.inf)
    return torch.einsum("hqn,nhd->qhd", logits.softmax(-1), v).to(query.dtype)


# --- FlashInfer -------------------------------------------------------------------------------------------------------


class Decode:
    """BatchDecodeWithPagedKVCacheWrapper."""

    def __init__(self, workspace, kv_layout="NHD", use_tensor_cores=False):
        assert workspace.dtype == torch.uint8 and not workspace.any() and kv_layout == "HND" and use_tensor_cores

    def plan(
        self, indptr, indices, last_page_len, num_qo_heads, num_kv_heads, head_dim, page_size, *,
        pos_encoding_mode="NONE", window_left=-1, logits_soft_cap=0.0, q_data_type, kv_data_type, q_len_per_req=1,
    ):  # fmt: skip
        assert {x.dtype for x in (indptr, indices, last_page_len)} == {torch.int32} and indptr[-1] == len(indices)
        self.pages = [(indices[a:b], int(n)) for a, b, n in zip(indptr, indptr[1:], last_page_len, strict=False)]
        self.q_lens, self.dtypes, self.page_size = (
            [q_len_per_req] * len(last_page_len),
            (q_data_type, kv_data_type),
            page_size,
        )
        self.shape, self.causal = (num_qo_heads, num_kv_heads, head_dim), q_len_per_req > 1
        slopes = (
            2.0 ** (-8.0 / num_qo_heads * torch.arange(1, num_qo_heads + 1)) if pos_encoding_mode == "ALIBI" else None
        )
        self.given = {"window": window_left, "cap": logits_soft_cap, "slopes": slopes}

    def run(self, q, paged_kv_cache, *, k_scale=1.0, v_scale=1.0):
        heads, kv_heads, head_dim = self.shape
        assert q.is_contiguous() and q.shape == (sum(self.q_lens), heads, head_dim)
        assert all(x.is_contiguous() and x.shape[1:] == (kv_heads, self.page_size, head_dim) for x in paged_kv_cache)
        assert (q.dtype, paged_kv_cache[0].dtype) == self.dtypes
        outputs = []
        for query, (pages, last) in zip(q.split(self.q_lens), self.pages, strict=True):
            length = (len(pages) - 1) * self.page_size + last
            key, value = (x.double()[pages].transpose(1, 2).flatten(0, 1)[:length] for x in paged_kv_cache)
            outputs.append(attend(query, key * k_scale, value * v_scale, causal=self.causal, **self.given))
        return torch.cat(outputs)


class Prefill(Decode):
    """BatchPrefillWithPagedKVCacheWrapper."""

    def __init__(self, workspace, kv_layout="NHD"):
        super().__init__(workspace, kv_layout, True)

    def plan(self, qo_indptr, *of_keys, causal=False, **keywords):
        super().plan(*of_keys, **keywords)
        self.q_lens, self.causal = qo_indptr.diff().tolist(), causal


class Latent:
    """BatchMLAPagedAttentionWrapper."""

    def __init__(self, workspace):
        assert not workspace.any()

    def plan(
        self, *, metadata, num_heads, head_dim_ckv, head_dim_kpe, page_size, causal, sm_scale, q_data_type, kv_data_type
    ):
        self.qo_indptr, self.indptr, self.indices, self.lens = metadata
        self.shape, self.page_size, self.given = (num_heads, head_dim_ckv + head_dim_kpe), page_size, (sm_scale, causal)
        self.columns = head_dim_ckv

    def run(self, *, query, kv_cache):
        assert query.shape[1:] == self.shape and kv_cache.shape[1:] == (self.page_size, self.shape[1])
        outputs, (scale, causal) = [], self.given
        for b, q in enumerate(query.split(self.qo_indptr.diff().tolist())):
            key = kv_cache[self.indices[self.indptr[b] : self.indptr[b + 1]]].flatten(0, 1)[: self.lens[b], None]
            outputs.append(attend(q, key, key[..., : self.columns], scale=scale, causal=causal))
        return torch.cat(outputs)


def flashinfer():
    """The package, and `flashinfer.mla`."""
    metadata = types.SimpleNamespace(csr=lambda *tensors: tensors)
    mla = types.SimpleNamespace(BatchMLAPagedAttentionWrapper=Latent, MLAPlanMetadata=metadata)
    package = types.SimpleNamespace(
        BatchDecodeWithPagedKVCacheWrapper=Decode, BatchPrefillWithPagedKVCacheWrapper=Prefill, mla=mla
    )
    return {"flashinfer": package, "flashinfer.mla": mla}


# --- FlashAttention 3 -------------------------------------------------------------------------------------------------


def flash_attn_with_kvcache(
    q, k_cache, v_cache, *, qv=None, cache_seqlens=None, cu_seqlens_q=None, max_seqlen_q=None, softmax_scale=None,
    causal=False, softcap=0.0,
):  # fmt: skip
    """Over [B, N, Hkv, D]; a query of its own for the latents, if there is one."""
    assert k_cache.stride(-1) == v_cache.stride(-1) == 1 and q.dtype == torch.bfloat16
    packed = cu_seqlens_q is not None
    queries = q.split(cu_seqlens_q.diff().tolist()) if packed else list(q)
    assert not packed or max_seqlen_q == max(map(len, queries))
    outputs = []
    for b, query in enumerate(queries):
        length = k_cache.shape[1] if cache_seqlens is None else int(cache_seqlens[b])
        key, value = k_cache[b, :length], v_cache[b, :length]
        if qv is not None:
            query, key = torch.cat([query, qv[b]], -1), torch.cat([key, value], -1)
        outputs.append(attend(query, key, value, scale=softmax_scale, causal=causal, cap=softcap))
    return torch.cat(outputs) if packed else torch.stack(outputs)


def flash_attention_3():
    """The package."""
    return {"fa3_fwd_interface": types.SimpleNamespace(flash_attn_with_kvcache=flash_attn_with_kvcache)}


# --- xformers ---------------------------------------------------------------------------------------------------------


class GappyKeys:
    """attn_bias.BlockDiagonalGappyKeysMask."""

    causal = False

    @classmethod
    def from_seqlens(cls, q_seqlen, kv_seqstarts, kv_seqlen, *, device=None):
        assert len(kv_seqstarts) == len(kv_seqlen) + 1
        self = cls()
        self.q_lens, self.keys = q_seqlen, list(zip(kv_seqstarts, kv_seqlen, strict=False))
        return self


class CausalGappyKeys(GappyKeys):
    """attn_bias.BlockDiagonalCausalWithOffsetGappyKeysMask."""

    causal = True


def xformers():
    """The package."""
    common = types.SimpleNamespace(_built_with_cuda=False)
    triton_splitk = types.SimpleNamespace(FwOp="split-K")
    attn_bias = types.SimpleNamespace(
        BlockDiagonalGappyKeysMask=GappyKeys, BlockDiagonalCausalWithOffsetGappyKeysMask=CausalGappyKeys
    )

    def forward(query, key, value, bias, op):
        assert common._built_with_cuda and op == "split-K" and query.shape[0] == key.shape[0] == 1
        outputs = []
        for q, (start, length) in zip(query[0].split(bias.q_lens), bias.keys, strict=True):
            kv = (x[0, start : start + length].flatten(1, 2) for x in (key, value))  # [n, Hkv, group, D]
            outputs.append(attend(q.flatten(1, 2), *kv, causal=bias.causal).unflatten(1, q.shape[1:3]))
        return torch.cat(outputs)[None]

    fmha = types.SimpleNamespace(
        attn_bias=attn_bias, common=common, triton_splitk=triton_splitk, memory_efficient_attention_forward=forward
    )
    ops = types.SimpleNamespace(fmha=fmha)
    return {"xformers": types.SimpleNamespace(ops=ops), "xformers.ops": ops, "xformers.ops.fmha": fmha}
