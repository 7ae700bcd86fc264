"""Tiny models with random weights, saved as vLLM and transformers read them."""

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

VOCABULARY = 300
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 1024,
    "initializer_range": 0.15, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    "tie_word_embeddings": False,
}  # fmt: skip
OF_MODEL = {
    "llama": (transformers.LlamaConfig, {}),
    # Soft caps, and a window in every second layer. One scale for all head sizes.
    "gemma2": (
        transformers.Gemma2Config,
        {"sliding_window": 24, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 30.0,
         "query_pre_attn_scalar": 32, "tie_word_embeddings": True},
    ),
    "bloom": (transformers.BloomConfig, {"n_layer": 4, "n_head": 4, "hidden_size": 128, "tie_word_embeddings": True}),
    "mistral": (transformers.MistralConfig, {"sliding_window": 24}),
    "deepseek": (
        transformers.DeepseekV3Config,
        {
            "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 512, "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 32, "v_head_dim": 32, "first_k_dense_replace": 4, "n_routed_experts": 2,
            "num_experts_per_tok": 1, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 32, "head_dim": 64,
        },
    ),
}  # fmt: skip
# vLLM 0.32.0 rotates other numbers than those of the latents on CPUs, with its own backend too, unless PyTorch does it.
ENGINE_OF = {"deepseek": {"compilation_config": {"custom_ops": ["all", "-rotary_embedding"]}}}


def save_model(kind, folder, **changes):
    """Saves a model with random weights in float32 and its tokenizer; returns the folder's name."""
    config_class, special = OF_MODEL[kind]
    torch.manual_seed(0)
    config = config_class(**SIZES | special | changes)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, VOCABULARY)}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    ).save_pretrained(folder)
    return str(folder)


def make_prompts(*lengths, seed=0):
    """Prompts of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator).tolist() for length in lengths]
