"""The attention backend of vLLM for layers that keep latents (multi-head latent attention, MLA)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.model_executor.layers.attention.mla_attention import (
    MLACommonBackend,
    MLACommonDecodeMetadata,
    MLACommonImpl,
    MLACommonMetadata,
    MLACommonMetadataBuilder,
    QueryLenSupport,
)
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, AttentionLayer, MultipleOf

from ...kv.slots import write_kv
from .attend import LayerAttention, OfModel, Step, as_hint
from .backend import FlexDecodeBackend
from .layers import prepare_layers
from .limits import CACHE_DTYPES, read_options, refuse_what_is_missing


class FlexDecodeMLABackend(MLACommonBackend):
    """flexdecode as a backend of vLLM for layers that keep latents."""

    supported_dtypes: ClassVar[list[torch.dtype]] = FlexDecodeBackend.supported_dtypes
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's list of backends that stands for this one."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlexDecodeMLAImpl]:
        """The attention of a layer."""
        return FlexDecodeMLAImpl

    @staticmethod
    def get_builder_cls() -> type[FlexDecodeMLAMetadataBuilder]:
        """What makes the metadata of a step."""
        return FlexDecodeMLAMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a page. Every number is right; short pages take more time."""
        return [MultipleOf(16)]

    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        """All sizes of latents."""
        return []

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether latents may have this size."""
        return FlexDecodeBackend.supports_head_size(head_size)

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and later."""
        return FlexDecodeBackend.supports_compute_capability(capability)


@dataclass
class FlexDecodeMLADecodeMetadata(MLACommonDecodeMetadata):
    """The sequences of a step that `forward_mqa` computes.

    Attributes:
        step: their lengths and pages, on the device.
    """

    step: Step


class FlexDecodeMLAMetadataBuilder(MLACommonMetadataBuilder[MLACommonMetadata]):
    """Makes the metadata of a step.

    vLLM computes prompts with the kernels that it has for them. They know no mods. So if a layer has mods of the user,
    all tokens count as decoded ones, which flexdecode computes.
    """

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    query_len_support: ClassVar[QueryLenSupport] = QueryLenSupport.VARLEN

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        """Makes the mods of the layers, and tries each of them.

        Raises:
            NotImplementedError: there are mods, and a sequence is divided among ranks.
            TypeError, ValueError, RuntimeError: the mods of a layer cannot be made, or not be used.
        """
        if prepare_layers(layer_names, vllm_config, device):
            if vllm_config.parallel_config.decode_context_parallel_size > 1:
                raise NotImplementedError(
                    "flexdecode inside vLLM has no mods with decode context parallelism, because a rank does not have "
                    "the positions of its keys"
                )
            self.reorder_batch_threshold = vllm_config.scheduler_config.max_num_batched_tokens
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def _build_decode(
        self,
        block_table_tensor: torch.Tensor,
        seq_lens_device: torch.Tensor,
        max_seq_len: int,
        query_start_loc_cpu: torch.Tensor,
        query_start_loc_device: torch.Tensor,
        num_decode_tokens: int,
        max_query_len: int,
        dcp_tot_seq_lens_device: torch.Tensor | None,
    ) -> FlexDecodeMLADecodeMetadata:
        step = Step(query_start_loc_device, seq_lens_device, block_table_tensor, as_hint(max_query_len))
        return FlexDecodeMLADecodeMetadata(block_table_tensor, seq_lens_device, dcp_tot_seq_lens_device, step)


class FlexDecodeMLAImpl(MLACommonImpl[MLACommonMetadata]):
    """The attention of one layer over its latents.

    Attributes:
        attention: the attention itself.
    """

    can_return_lse_for_decode = True
    supports_dcp = True
    supports_pcp = False

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None,
        attn_type: str,
        kv_sharing_target_layer_name: str | None,
        **latents: Any,
    ) -> None:
        """Takes what vLLM knows of the layer.

        Raises:
            NotImplementedError: the layer needs what flexdecode lacks; the message names it.
        """
        given = {"alibi_slopes": alibi_slopes, "sliding_window": sliding_window, "logits_soft_cap": logits_soft_cap}
        others = given | {"indexer": latents.get("indexer"), "q_pad_num_heads": latents.get("q_pad_num_heads")}
        config = get_current_vllm_config()
        refuse_what_is_missing(config, head_size, kv_cache_dtype, attn_type, others, is_mla=True)
        super().__init__(
            num_heads, head_size, scale, num_kv_heads, alibi_slopes, sliding_window, kv_cache_dtype, logits_soft_cap,
            attn_type, kv_sharing_target_layer_name, **latents,
        )  # fmt: skip
        self.supports_quant_query_input = False  # queries stay in their dtype beside latents in float8
        self.attention = LayerAttention(OfModel(self.scale), CACHE_DTYPES[kv_cache_dtype], read_options(config))

    def cache_shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The shape of a cache of the layer."""
        return num_pages, page_size, self.head_size

    def views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys `[num_pages, 1, page_size, D]` of the cache of the layer, and values, which are their first columns."""
        cache = self.attention.as_numbers(kv_cache)
        return cache[:, None], cache[:, None, :, : self.kv_lora_rank]

    def do_kv_cache_update(
        self,
        kv_c_normed: torch.Tensor,
        k_pe: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
        kv_cache_dtype: str,
        k_scale: torch.Tensor,
    ) -> None:
        """Writes the latents of new tokens into the cache of a layer.

        Args:
            kv_c_normed: `[T, kv_lora_rank]`.
            k_pe: `[T, 1, qk_rope_head_dim]`.
            kv_cache: `[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]`.
            slot_mapping: int64, a negative slot is no place.
            kv_cache_dtype: vLLM's name of it.
            k_scale: what quantised latents are multiplied by, 0-d float32.
        """
        if not kv_cache.numel():
            return
        if not current_platform.is_cpu():  # vLLM's own kernel takes the two parts as they are
            super().do_kv_cache_update(kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale)
            return
        latents = torch.cat([kv_c_normed, k_pe.squeeze(1)], -1)[:, None]
        scale = None if self.attention.quantised is None else k_scale
        write_kv(latents, None, self.views(kv_cache)[0], None, slot_mapping.flatten(), scale)

    def forward_mqa(
        self,
        q: torch.Tensor | tuple[torch.Tensor, torch.Tensor],
        kv_c_and_k_pe_cache: torch.Tensor,
        attn_metadata: MLACommonMetadata,
        layer: AttentionLayer,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Computes the attention of the decoded tokens over latents.

        Args:
            q: `[T, Hq, kv_lora_rank + qk_rope_head_dim]`, or its two parts.
            kv_c_and_k_pe_cache: `[num_pages, page_size, kv_lora_rank + qk_rope_head_dim]`.
            attn_metadata: of the step.
            layer: it has the scale of a quantised cache.

        Returns:
            `[T, Hq, kv_lora_rank]`, and the natural log of the sum of exponentials, float32 `[T, Hq]`, where ranks have
            parts of a sequence.
        """
        assert isinstance(attn_metadata.decode, FlexDecodeMLADecodeMetadata)
        query = torch.cat(q, -1) if isinstance(q, tuple) else q
        instead, scales = getattr(layer, "logical_mask_mod", None), (layer._k_scale, layer._k_scale)
        with_lse = self.need_to_return_lse_for_decode
        result: Any = self.attention.compute(
            query, *self.views(kv_c_and_k_pe_cache), attn_metadata.decode.step, instead, scales, return_lse=with_lse
        )
        return result if with_lse else (result, None)
