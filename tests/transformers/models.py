"""Small random models of the kinds that transformers has, and prompts for them."""

import copy

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

from flexdecode.integrations.transformers.masks import calls_interface

SMALL = {
    "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None,
    # Far from uniform and not tied, so that a token does not just repeat.
    "initializer_range": 0.3, "tie_word_embeddings": False,
}  # fmt: skip
WINDOW = {"sliding_window": 16}
EXPERTS = {"num_experts_per_tok": 2, "num_local_experts": 4}


def _t5gemma():
    inner = transformers.T5GemmaModuleConfig(**SMALL, **WINDOW, head_dim=16)
    return transformers.T5GemmaConfig(
        encoder=inner.to_dict(),
        decoder=inner.to_dict(),
        vocab_size=100,
        initializer_range=0.3,
        eos_token_id=None,
        tie_word_embeddings=False,
    )


CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SMALL),
    "gpt2": lambda: transformers.GPT2Config(
        vocab_size=100, n_embd=64, n_layer=2, n_head=4, n_positions=128, initializer_range=0.3, pad_token_id=0,
        bos_token_id=1, eos_token_id=None, tie_word_embeddings=False,
    ),
    "qwen3": lambda: transformers.Qwen3Config(**SMALL, head_dim=16),
    "mistral": lambda: transformers.MistralConfig(**SMALL, **WINDOW),
    "gemma2": lambda: transformers.Gemma2Config(**SMALL, **WINDOW, head_dim=16, attn_logit_softcapping=2.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(
        **SMALL, **WINDOW, head_dim=16, layer_types=["sliding_attention", "full_attention"]
    ),
    "deepseek_v3": lambda: transformers.DeepseekV3Config(
        **{**SMALL, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=12, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32,
        first_k_dense_replace=1,
    ),
    "gpt_oss": lambda: transformers.GptOssConfig(**SMALL, **WINDOW, **EXPERTS, head_dim=16),
    "llama4": lambda: transformers.Llama4TextConfig(
        **SMALL, **EXPERTS, head_dim=16, attention_chunk_size=16, intermediate_size_mlp=64, no_rope_layers=[1, 0],
    ),
    "t5gemma": _t5gemma,
    "t5": lambda: transformers.T5Config(
        vocab_size=100, d_model=64, d_kv=16, d_ff=64, num_layers=2, num_heads=4, initializer_factor=5.0,
        decoder_start_token_id=0, pad_token_id=0, eos_token_id=None,
    ),
    "bart": lambda: transformers.BartConfig(
        vocab_size=100, d_model=64, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=128, init_std=1.0,
        pad_token_id=0, bos_token_id=1, eos_token_id=None, forced_eos_token_id=None, decoder_start_token_id=0,
        tie_word_embeddings=False,
    ),
}  # fmt: skip


def make(config, implementation="flexdecode", seed=0):
    """A model in float32 with random weights, the same for each implementation."""
    torch.manual_seed(seed)
    config = copy.deepcopy(config)  # a model writes its implementation into it
    auto = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    return auto.from_config(config, attn_implementation=implementation).float().eval()


def prompts(batch=3, length=20, padding=(7, 0, 3), seed=0):
    """Token ids `[B, length]` and a mask with so much padding on the left."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, 100, (batch, length), generator=generator)
    mask = torch.arange(length) >= torch.tensor(padding)[:batch, None]
    return {"input_ids": torch.where(mask, ids, 0), "attention_mask": mask.long()}


def greedy(model, inputs, num_tokens=64, **options):
    """So many new tokens of each sequence, the most probable ones."""
    return model.generate(**inputs, max_new_tokens=num_tokens, do_sample=False, pad_token_id=0, **options)


def by_eager(name, inputs, num_tokens=64, **options):
    """Tokens of eager attention; where this transformers cannot make them, the test is skipped."""
    if name == "t5" and not calls_interface(transformers.T5Model):
        pytest.skip(f"T5 of transformers {transformers.__version__} never calls the attention interface")
    try:
        return greedy(make(CONFIGS[name](), "eager").to(inputs["input_ids"].device), inputs, num_tokens, **options)
    except (RuntimeError, TypeError, ValueError) as error:
        pytest.skip(f"transformers {transformers.__version__} with eager attention: {error}")


def cache_of(outputs):
    """The cache of a forward pass, as a keyword for the next one; the keyword has changed in transformers 5."""
    name = "cache" if "cache" in outputs else "past_key_values"
    return {name: outputs[name]}
