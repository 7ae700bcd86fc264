"""What is registered, and what flexdecode leaves to others or refuses."""

import inspect
import sys

import pytest
import torch
import transformers

from flexdecode import DecodeOptions, cache_info, clear_cache
from flexdecode.integrations.transformers import register, set_mods
from flexdecode.integrations.transformers.masks import model_mask
from tests.transformers.models import CONFIGS, SMALL, greedy, make, prompts

OWN_ATTENTION = {
    "BloomModel": lambda: transformers.BloomConfig(
        vocab_size=100, hidden_size=64, n_layer=2, n_head=4, initializer_range=0.3, pad_token_id=0, eos_token_id=None
    ),
    "MptModel": lambda: transformers.MptConfig(
        vocab_size=100, d_model=64, n_layers=2, n_heads=4, initializer_range=0.3, pad_token_id=0, eos_token_id=None
    ),
    "GPTNeoModel": lambda: transformers.GPTNeoConfig(
        vocab_size=100, hidden_size=64, num_layers=2, num_heads=4, attention_types=[[["global"], 2]],
        initializer_range=0.3, pad_token_id=0, eos_token_id=None,
    ),
    "FalconModel": lambda: transformers.FalconConfig(
        vocab_size=100, hidden_size=64, num_hidden_layers=2, num_attention_heads=4, initializer_range=0.3,
        pad_token_id=0, eos_token_id=None,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OWN_ATTENTION)
def test_models_with_an_attention_of_their_own(name):
    config = OWN_ATTENTION[name]()
    expected = greedy(make(config, "eager"), prompts(), 16)
    model = make(config)
    if not hasattr(sys.modules[type(model).__module__], "create_causal_mask"):
        pytest.skip(f"{name} of transformers {transformers.__version__} does not even ask for a mask")
    with pytest.warns(UserWarning, match=f"^{name} never calls the attention interface of transformers"):
        tokens = greedy(model, prompts(), 16)
    assert torch.equal(tokens, expected)
    with pytest.raises(ValueError, match=f"{type(model).__name__} has no attention modules that flexdecode knows"):
        set_mods(model, mask_mod=lambda b, h, q_idx, kv_idx: kv_idx > 3)


def test_register_again():
    register()
    known = transformers.AttentionInterface()["flexdecode"]
    register()
    assert transformers.AttentionInterface()["flexdecode"] is known
    with pytest.raises(TypeError, match=r"`options` must be a flexdecode\.DecodeOptions or None, got dict"):
        register({"num_splits": 4})
    with pytest.raises(TypeError, match="num_split"):
        register(DecodeOptions(num_split=4))


def test_gradients_are_those_of_sdpa():
    gradients = {}
    for implementation in ("sdpa", "flexdecode"):
        model = make(CONFIGS["llama"](), implementation)
        model(**prompts(), labels=prompts()["input_ids"]).loss.backward()
        gradients[implementation] = model.model.embed_tokens.weight.grad
    assert gradients["sdpa"].abs().max() > 0
    assert torch.equal(gradients["flexdecode"], gradients["sdpa"])


def test_dropout_is_that_of_sdpa():
    config = CONFIGS["llama"]()
    config.attention_dropout = 0.5
    logits = {}
    for implementation in ("sdpa", "flexdecode"):
        model = make(config, implementation).train()
        torch.manual_seed(3)
        with torch.no_grad():
            logits[implementation] = model(**prompts()).logits
    assert torch.equal(logits["flexdecode"], logits["sdpa"])
    with torch.no_grad():
        assert not torch.equal(model.eval()(**prompts()).logits, logits["sdpa"])


def test_training_with_what_sdpa_lacks():
    model = make(CONFIGS["gemma2"]())
    with pytest.raises(
        ValueError,
        match="Gemma2Attention has a soft cap, which SDPA cannot compute, and inputs that require a gradient, which "
        r'flexdecode cannot: use `torch\.no_grad\(\)`, or `attn_implementation="eager"`',
    ):
        model(**prompts())
    config = CONFIGS["gpt_oss"]()
    config.attention_dropout = 0.5
    with pytest.raises(ValueError, match=r"GptOssAttention has attention sinks.*dropout.*use `model\.eval\(\)`"):
        greedy(make(config).train(), prompts(), 4)
    model = make(CONFIGS["llama"]())
    set_mods(model, lambda score, b, h, q_idx, kv_idx: score * 2)
    with pytest.raises(ValueError, match=r"LlamaAttention has mods of the user.*or `set_mods\(model\)`, which removes"):
        model(**prompts())


def test_arguments_of_other_attention_functions():
    model = make(CONFIGS["llama"]())
    with pytest.raises(ValueError, match=r"`kernel_options` are for flex_attention.*`register\(DecodeOptions"):
        model(**prompts(), kernel_options={"BLOCK_M": 64})


def test_model_that_computes_with_its_mask():
    kind = getattr(transformers, "DeepseekV32Config", None)
    if kind is None:
        pytest.skip(f"transformers {transformers.__version__} has no such model")
    config = kind(
        **{**SMALL, "num_key_value_heads": 4}, q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=16, qk_rope_head_dim=8,
        v_head_dim=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, moe_intermediate_size=32,
        first_k_dense_replace=1, index_n_heads=2, index_head_dim=16, index_topk=8,
    )  # fmt: skip
    with pytest.raises(TypeError, match=r'computes with its attention mask itself.*attn_implementation="sdpa"'):
        greedy(make(config), prompts(), 4)


def test_mask_for_another_device():
    given = {
        "batch_size": 2, "q_length": 3, "kv_length": 5, "q_offset": 2, "device": "cpu", "config": CONFIGS["llama"](),
        "attention_mask": torch.ones(2, 5, dtype=torch.bool),
    }  # fmt: skip
    if "q_length" not in inspect.signature(transformers.masking_utils.sdpa_mask).parameters:
        del given["q_length"], given["q_offset"]
        given["cache_position"] = torch.arange(2, 5)
    mask = model_mask(**given)
    assert mask.to("cpu") is mask
    assert mask.dim() == mask.ndim == 4
    moved = mask.to("meta")
    assert moved.shape == mask.shape == (2, 1, 3, 5)
    assert moved.device.type == "meta"


def test_encoder_without_a_mask():
    """A model that is not causal, with and without padding, short enough for flexdecode."""
    config = transformers.BertConfig(
        vocab_size=100, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        initializer_range=0.3,
    )  # fmt: skip
    states = {}
    for implementation in ("eager", "flexdecode"):
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM._from_config(config, attn_implementation=implementation).float().eval()
        clear_cache()
        with torch.no_grad():
            outputs = [model(**prompts()).logits, model(prompts()["input_ids"]).logits]
        # Tokens of the padding itself attend to what is no padding, as all others do.
        states[implementation] = torch.cat(outputs).argmax(-1)
    assert torch.equal(states["flexdecode"], states["eager"])
    assert cache_info().calls == 2 * 2


@pytest.mark.parametrize("length", [6, 80], ids=["flexdecode", "SDPA"])
def test_masks_of_four_dimensions_that_are_wrong(length):
    model = make(CONFIGS["llama"]())
    ids = prompts(length=length)["input_ids"]
    mask = torch.ones(length, length).tril()[None, None]
    for wrong, message in (
        (mask.long(), "must be bool, or float to be added to the scores, got torch.int64"),
        (mask[:, :, 1:], r"`attention_mask` must have shape \[B or 1, Hq or 1, Q, N\]"),
        (mask.expand(1, 3, -1, -1), r"`attention_mask` must have shape \[B or 1, Hq or 1, Q, N\]"),
    ):
        with torch.no_grad(), pytest.raises(ValueError, match=message):
            model(ids, attention_mask=wrong)


@pytest.mark.parametrize("length", [6, 80], ids=["flexdecode", "SDPA"])
def test_a_mask_that_is_longer_than_the_cache(length):
    model, ids = make(CONFIGS["llama"]()), prompts(length=length)["input_ids"]
    mask = torch.ones(length, length + 9, dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        found, expected = (model(ids, attention_mask=x, use_cache=False).logits for x in (mask, mask[..., :length]))
    assert torch.equal(found, expected)
