"""A user's mods of `set_mods`, against eager attention with a dense bias."""

import pytest
import torch

from flexdecode import TraceError, mods
from flexdecode.integrations.transformers import set_mods
from tests.transformers.models import CONFIGS, SMALL, cache_of, greedy, make, prompts

LOWEST = torch.finfo(torch.float32).min
SLOPES = mods.alibi_slopes(SMALL["num_attention_heads"])
BY_POSITION = torch.randn(4, 100, generator=torch.Generator().manual_seed(1))


def window(b, h, q_idx, kv_idx):
    return q_idx - kv_idx < 6


def alibi(score, b, h, q_idx, kv_idx):
    return score - SLOPES[h] * (q_idx - kv_idx)


def by_position(score, b, h, q_idx, kv_idx):
    return score + BY_POSITION[h, kv_idx] - 0.1 * q_idx * (kv_idx == 2)


def dense_bias(score_mod, mask_mod, live):
    """What mods add to logits `[B, H, N, N]`, for a padding mask `[B, N]`; positions count from its first token."""
    N = live.shape[1]
    first = live.long().argmax(1)[:, None, None, None]
    h, q, k = torch.arange(4)[None, :, None, None], torch.arange(N)[:, None], torch.arange(N)
    q, k = q - first, (k - first).clamp(min=0)  # keys before the first token are masked
    bias = torch.zeros(len(live), 4, N, N) if score_mod is None else score_mod(torch.zeros(()), 0, h, q, k)
    allowed = (q >= k) & live.bool()[:, None, None, :] & (k >= 0)
    allowed = allowed if mask_mod is None else allowed & mask_mod(0, h, q, k)
    return torch.where(allowed, bias, LOWEST)


def eager_tokens(config, inputs, num_tokens, score_mod=None, mask_mod=None, layers=(0, 1)):
    """Greedy tokens of eager attention, with the dense bias of the mods in some layers."""
    model, ids = make(config, "eager"), inputs["input_ids"]
    live = torch.cat([inputs["attention_mask"], torch.ones(len(ids), num_tokens, dtype=torch.long)], 1)
    biased, plain = dense_bias(score_mod, mask_mod, live), dense_bias(None, None, live)
    at = 0

    def give_bias(module, args, kwargs):
        whole = biased if module.layer_idx in layers else plain
        Q = kwargs["hidden_states"].shape[1]
        return args, {**kwargs, "attention_mask": whole[:, :, at : at + Q, : at + Q]}

    for layer in model.model.layers:
        layer.self_attn.register_forward_pre_hook(give_bias, with_kwargs=True)
    positions = (live.cumsum(1) - 1).clamp(min=0)
    new, kept = ids, {}
    with torch.no_grad():
        while len(ids[0]) < len(live[0]):
            end = at + new.shape[1]
            output = model(new, attention_mask=live[:, :end], position_ids=positions[:, at:end], **kept)
            at, kept, new = end, cache_of(output), output.logits[:, -1:].argmax(-1)
            ids = torch.cat([ids, new], 1)
    return ids


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("length", [20, 80], ids=["short prompt", "long prompt"])
@pytest.mark.parametrize(
    "user", [(alibi, None), (None, window), (by_position, window)], ids=["alibi", "window", "positions"]
)
def test_mods_are_a_dense_bias(user, length, cache):
    inputs = prompts(length=length)
    expected = eager_tokens(CONFIGS["llama"](), inputs, 16 if length > 64 else 64, *user)
    model = make(CONFIGS["llama"]())
    options = {"cache_implementation": "static"} if cache == "static" else {}
    num_tokens = expected.shape[1] - length
    plain = greedy(model, inputs, num_tokens, **options)
    set_mods(model, *user)
    assert torch.equal(greedy(model, inputs, num_tokens, **options), expected)
    assert not torch.equal(plain, expected)
    set_mods(model)
    assert torch.equal(greedy(model, inputs, num_tokens, **options), plain)


def test_mods_of_some_layers():
    inputs = prompts()
    model = make(CONFIGS["llama"]())
    set_mods(model, alibi, layers=[1])
    assert torch.equal(greedy(model, inputs, 32), eager_tokens(CONFIGS["llama"](), inputs, 32, alibi, layers=[1]))
    set_mods(model, mask_mod=window, layers=[0])
    set_mods(model, layers=[1])
    assert torch.equal(greedy(model, inputs, 32), eager_tokens(CONFIGS["llama"](), inputs, 32, None, window, [0]))


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss"])
def test_mods_in_the_compiled_path(name):
    from transformers import CompileConfig

    model = make(CONFIGS[name]())
    set_mods(model, by_position, window)
    expected = greedy(model, prompts())
    torch._dynamo.reset()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True
    tokens = greedy(model, prompts(), cache_implementation="static", compile_config=config)
    assert torch.equal(tokens, expected)


def test_a_window_is_that_of_the_model():
    """The mask of a user and that of a model mean the same: Mistral is Llama with a window."""
    llama = make(CONFIGS["llama"]())
    set_mods(llama, mask_mod=mods.sliding_window(16))
    assert torch.equal(greedy(llama, prompts()), greedy(make(CONFIGS["mistral"](), "eager"), prompts()))


def test_mods_come_after_the_soft_cap():
    """As a float mask, which eager attention adds to capped logits."""
    config, ids = CONFIGS["gemma2"](), prompts(batch=2, padding=(0, 0))["input_ids"][:, :12]
    bias = dense_bias(alibi, None, torch.ones(2, 12, dtype=torch.long))
    model, eager = make(config), make(config, "eager")
    set_mods(model, alibi)
    with torch.no_grad():
        expected, got = eager(ids, attention_mask=bias).logits, model(ids).logits
    assert torch.equal(got.argmax(-1), expected.argmax(-1))


def test_modules_and_decoders():
    """A mod may be a module; of an encoder-decoder model, only the decoder's self-attention gets it."""

    class Alibi(torch.nn.Module):
        def forward(self, score, b, h, q_idx, kv_idx):
            return alibi(score, b, h, q_idx, kv_idx)

    model = make(CONFIGS["bart"]())
    keys = set(model.state_dict())
    set_mods(model, Alibi())
    assert set(model.state_dict()) == keys
    changed = greedy(model, prompts())
    set_mods(model, alibi)
    assert torch.equal(greedy(model, prompts()), changed)
    with_mods = [name for name, module in model.named_modules() if hasattr(module, "_flexdecode_mods")]
    assert with_mods == [f"model.decoder.layers.{i}.self_attn" for i in range(2)]


def test_mod_that_cannot_be_traced():
    model = make(CONFIGS["llama"]())
    set_mods(model, lambda score, b, h, q_idx, kv_idx: score if q_idx > kv_idx else -score)
    with pytest.raises(TraceError, match=r"(?s)test_user_mods.py.*score if q_idx > kv_idx.*torch\.where"):
        greedy(model, prompts())


def test_mod_that_cannot_be_traced_in_a_region():
    model = make(CONFIGS["llama"]())
    set_mods(model, lambda score, b, h, q_idx, kv_idx: score + SLOPES[h].item())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with (
        pytest.raises(Exception, match=r"(?s)\(\.item\(\)\).*test_user_mods.py.*SLOPES\[h\]\.item\(\)"),
        torch.no_grad(),
    ):
        compiled(**prompts())
    torch._dynamo.reset()


def test_wrong_mods_and_layers():
    model = make(CONFIGS["llama"]())
    with pytest.raises(TypeError, match="`score_mod` must be a callable or None, got float"):
        set_mods(model, 1.0)
    with pytest.raises(TypeError, match=r"`mask_mod` must take 4 positional parameters \(b, h, q_idx, kv_idx\)"):
        set_mods(model, mask_mod=alibi)
    for layers in (1, [1.0], [True]):
        with pytest.raises(TypeError, match=r"`layers` must be a list of integers, such as \[0, 2\], got"):
            set_mods(model, alibi, layers=layers)
    with pytest.raises(TypeError, match="`model` must be a model of transformers, got NoneType"):
        set_mods(None, alibi)
    with pytest.raises(ValueError, match=r"`layers` must be among \[0, 1\] \(those of LlamaForCausalLM\), got \[2\]"):
        set_mods(model, alibi, layers=[1, 2])
    eager = make(CONFIGS["llama"](), "eager")
    with pytest.raises(ValueError, match=r'runs with attn_implementation="eager".*set_attn_implementation'):
        set_mods(eager, alibi)
    eager.set_attn_implementation("flexdecode")
    set_mods(eager, alibi)


def test_mask_without_positions():
    model = make(CONFIGS["llama"]())
    set_mods(model, alibi)
    ids = prompts()["input_ids"]
    with pytest.raises(ValueError, match=r"beside a mask of shape \[1, 1, 20, 20\].*a padding mask"), torch.no_grad():
        model(ids, attention_mask=torch.zeros(1, 1, 20, 20))
