"""The attention backend of vLLM: what it supports, the metadata of a step, and the attention of a layer."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from vllm.config import VllmConfig, get_current_vllm_config
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)
from vllm.v1.kv_cache_layout import KVCacheLayout

from ...call.inputs import MAX_HEAD_DIM
from ...kv.slots import write_kv
from .attend import LayerAttention, OfModel, Step, as_hint
from .layers import prepare_layers
from .limits import CACHE_DTYPES, read_options, refuse_what_is_missing


class FlexDecodeBackend(AttentionBackend):
    """flexdecode as a backend of vLLM for layers that keep keys and values."""

    accept_output_buffer = True
    forward_includes_kv_cache_update = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[Any]] = list(CACHE_DTYPES)

    @staticmethod
    def get_name() -> str:
        """The member of vLLM's list of backends that stands for this one."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[FlexDecodeImpl]:
        """The attention of a layer."""
        return FlexDecodeImpl

    @staticmethod
    def get_builder_cls() -> type[FlexDecodeMetadataBuilder]:
        """What makes the metadata of a step."""
        return FlexDecodeMetadataBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[int | MultipleOf]:
        """Tokens of a page. Every number is right; short pages take more time."""
        return [MultipleOf(16)]

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """All orders of a cache in memory, the fastest first: the tokens of a head lie together."""
        return (KVCacheLayout.LBHNC, *[layout for layout in KVCacheLayout if layout is not KVCacheLayout.LBHNC])

    @classmethod
    def supports_head_size(cls, head_size: int) -> bool:
        """Whether queries and keys may have this size."""
        return 1 <= head_size <= MAX_HEAD_DIM

    @classmethod
    def supports_compute_capability(cls, capability: Any) -> bool:
        """Ampere and later."""
        return capability.major >= 8

    @classmethod
    def supports_sink(cls) -> bool:
        """Logits that join the softmax."""
        return True

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """Windows, also in some layers only."""
        return True

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """Results that do not depend on the other requests of a step."""
        return True


@dataclass
class FlexDecodeMetadata(AttentionMetadata):
    """The sequences of a step.

    Attributes:
        num_actual_tokens: tokens, without those that fill up a CUDA graph.
        step: lengths and pages, on the device.
        slot_mapping: int64 `[T]`, the slot of each token in the cache.
    """

    num_actual_tokens: int
    step: Step
    slot_mapping: torch.Tensor


class FlexDecodeMetadataBuilder(AttentionMetadataBuilder[FlexDecodeMetadata]):
    """Makes the metadata of a step: nothing but references, because the kernels read lengths on the device."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.ALWAYS
    supports_update_block_table = True

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        """Makes the mods of the layers, and tries each of them.

        Raises:
            TypeError, ValueError, RuntimeError: the mods of a layer cannot be made, or not be used.
        """
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        prepare_layers(layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> FlexDecodeMetadata:
        """The metadata of a step.

        Raises:
            NotImplementedError: the step is not causal.
        """
        common = common_attn_metadata
        if common.causal is not True:
            raise NotImplementedError("flexdecode inside vLLM has no attention that is not causal, as this draft needs")
        hint = as_hint(common.max_query_len)
        step = Step(common.query_start_loc, common.seq_lens, common.block_table_tensor, hint)
        return FlexDecodeMetadata(common.num_actual_tokens, step, common.slot_mapping)

    def update_block_table(
        self, metadata: FlexDecodeMetadata, blk_table: torch.Tensor, slot_mapping: torch.Tensor
    ) -> FlexDecodeMetadata:
        """The same step with the pages of another group of layers."""
        other = copy.copy(metadata)
        other.step, other.slot_mapping = metadata.step._replace(page_table=blk_table), slot_mapping
        return other


class FlexDecodeImpl(AttentionImpl[FlexDecodeMetadata]):
    """The attention of one layer that keeps keys and values.

    Attributes:
        attention: the attention itself.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
        **others: Any,
    ) -> None:
        """Takes what vLLM knows of the layer.

        Raises:
            NotImplementedError: the layer needs what flexdecode lacks; the message names it.
        """
        config = get_current_vllm_config()
        refuse_what_is_missing(config, head_size, kv_cache_dtype, attn_type, others, is_mla=False)
        self.num_heads, self.head_size, self.num_kv_heads = num_heads, head_size, num_kv_heads or num_heads
        self.scale = float(scale)
        self.kv_cache_dtype = kv_cache_dtype
        slopes = None if alibi_slopes is None else torch.tensor(alibi_slopes, dtype=torch.float32)
        of_model = OfModel(self.scale, logits_soft_cap or None, slopes, sliding_window, sinks)
        self.attention = LayerAttention(of_model, CACHE_DTYPES[kv_cache_dtype], read_options(config))

    def cache_shape(self, num_pages: int, page_size: int) -> tuple[int, ...]:
        """The shape of a cache of the layer."""
        return num_pages, self.num_kv_heads, page_size, 2 * self.head_size

    def views(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of the cache of the layer, `[num_pages, Hkv, page_size, D]`."""
        cache = self.attention.as_numbers(kv_cache)
        return cache[..., : self.head_size], cache[..., self.head_size :]

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Writes the new tokens of a layer into its cache, in one kernel.

        Args:
            layer: it has the scales of a quantised cache.
            key: `[T, Hkv, D]`, possibly with more rows than `slot_mapping`.
            value: `[T, Hkv, D]`, likewise.
            kv_cache: `[num_pages, Hkv, page_size, 2 * D]`.
            slot_mapping: int64, a negative slot is no place.
        """
        scales = (None, None) if self.attention.quantised is None else (layer._k_scale, layer._v_scale)
        write_kv(key, value, *self.views(kv_cache), slot_mapping, *scales)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: FlexDecodeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the attention of all tokens of a step.

        Args:
            layer: it has the scales of a quantised cache.
            query: `[T, Hq, D]`.
            key: not read: `do_kv_cache_update` has put it into the cache.
            value: not read.
            kv_cache: `[num_pages, Hkv, page_size, 2 * D]`.
            attn_metadata: None while vLLM measures memory.
            output: `[T, Hq, D]` to write to.
            output_scale: must be None.
            output_block_scale: must be None.

        Raises:
            NotImplementedError: the output shall be quantised.
        """
        if output_scale is not None or output_block_scale is not None:
            raise NotImplementedError("flexdecode inside vLLM has no outputs that are quantised on the way")
        if attn_metadata is None:
            return output.fill_(0)
        tokens, keys_and_values = attn_metadata.num_actual_tokens, self.views(kv_cache)
        instead, scales = getattr(layer, "logical_mask_mod", None), (layer._k_scale, layer._v_scale)
        self.attention.compute(query[:tokens], *keys_and_values, attn_metadata.step, instead, scales, output[:tokens])
        return output
