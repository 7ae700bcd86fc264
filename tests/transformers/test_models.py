"""Greedy tokens of random models in float32: those of transformers' own eager attention."""

import pytest
import torch
import transformers
from transformers import CompileConfig

import flexdecode
from flexdecode.integrations.transformers import register
from tests.transformers.models import CONFIGS, by_eager, cache_of, greedy, make, prompts

CACHES = {"dynamic": {}, "static": {"cache_implementation": "static"}}


@pytest.fixture(scope="module")
def eager_tokens():
    """Makes the tokens of a model with eager attention, once for each model and cache."""
    known = {}

    def tokens(name, cache="dynamic"):
        if (name, cache) not in known:
            known[name, cache] = by_eager(name, prompts(), **CACHES[cache])
            assert len(known[name, cache][:, -64:].unique()) > 10
        return known[name, cache]

    return tokens


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_eager(name, cache, eager_tokens):
    expected = eager_tokens(name, cache)
    flexdecode.clear_cache()
    assert torch.equal(greedy(make(CONFIGS[name]()), prompts(), **CACHES[cache]), expected)
    assert flexdecode.cache_info().calls >= 63 * 2  # every layer of every step


@pytest.mark.parametrize("name", CONFIGS)
def test_nothing_is_prepared_while_tokens_are_produced(name, eager_tokens):
    eager_tokens(name, "static")  # skips what transformers cannot do
    counts = []
    for num_tokens in (20, 64):
        flexdecode.clear_cache()
        greedy(make(CONFIGS[name]()), prompts(), num_tokens, **CACHES["static"])
        counts.append(flexdecode.cache_info())
    few, many = counts
    assert many.calls > 3 * few.calls
    assert many.traces == few.traces
    assert many.calls - many.hits == few.calls - few.hits


@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "t5"])
def test_compiled_path_of_transformers(name, eager_tokens):
    expected = eager_tokens(name, "static")
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    config = CompileConfig(fullgraph=True, backend="eager", mode=None)
    config._compile_all_devices = True  # also on a CPU
    tokens = greedy(make(CONFIGS[name]()), prompts(), **CACHES["static"], compile_config=config)
    assert torch.equal(tokens, expected)
    # A window that rolls is another graph than one that fills, as with SDPA.
    graphs = {"llama": 1, "t5": 1, "gemma2": 2, "gpt_oss": 2}
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs[name]


def test_without_padding():
    inputs = prompts(padding=(0, 0, 0))
    expected = greedy(make(CONFIGS["gemma2"](), "eager"), inputs)
    assert torch.equal(greedy(make(CONFIGS["gemma2"]()), inputs), expected)
    assert torch.equal(greedy(make(CONFIGS["gemma2"]()), {"input_ids": inputs["input_ids"]}), expected)


def test_padding_between_tokens():
    inputs = prompts()
    inputs["attention_mask"][1, 4:9] = 0
    inputs["attention_mask"][2, 10] = 0
    for name in ("llama", "gemma2", "llama4"):
        expected = greedy(make(CONFIGS[name](), "eager"), inputs)
        for cache in CACHES.values():
            assert torch.equal(greedy(make(CONFIGS[name]()), inputs, **cache), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2", "bart"])
def test_beams(name):
    options = {"num_beams": 3, "num_return_sequences": 2, "length_penalty": 0.5}
    expected = by_eager(name, prompts(), num_tokens=24, **options)
    assert torch.equal(greedy(make(CONFIGS[name]()), prompts(), num_tokens=24, **options), expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt_oss"])
def test_assisted_decoding_and_prompt_lookup(name):
    inputs = prompts(batch=1, padding=(0,))
    inputs["input_ids"] = inputs["input_ids"].repeat(1, 2)  # so that prompt lookup finds something
    inputs["attention_mask"] = inputs["attention_mask"].repeat(1, 2)
    expected = by_eager(name, inputs)
    for other in ({"assistant_model": make(CONFIGS[name](), seed=1)}, {"prompt_lookup_num_tokens": 4}):
        assert torch.equal(by_eager(name, inputs, **other), expected)
        assert torch.equal(greedy(make(CONFIGS[name]()), inputs, **other), expected)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_prompt_in_chunks(name):
    inputs = prompts(length=100)
    expected = by_eager(name, inputs, prefill_chunk_size=8)
    for chunk in (8, 80):  # through flexdecode, and through SDPA
        assert torch.equal(greedy(make(CONFIGS[name]()), inputs, prefill_chunk_size=chunk), expected)


def test_long_prompt_goes_through_sdpa():
    inputs = prompts(length=100)
    expected = greedy(make(CONFIGS["llama"](), "eager"), inputs, num_tokens=8)
    flexdecode.clear_cache()
    assert torch.equal(greedy(make(CONFIGS["llama"]()), inputs, num_tokens=8), expected)
    assert flexdecode.cache_info().calls == 7 * 2  # 7 steps of 2 layers


def test_long_prompt_with_soft_cap_and_sinks():
    inputs = prompts(length=100)
    for name in ("gemma2", "gpt_oss"):
        expected = greedy(make(CONFIGS[name](), "eager"), inputs, num_tokens=8)
        flexdecode.clear_cache()
        assert torch.equal(greedy(make(CONFIGS[name]()), inputs, num_tokens=8), expected)
        assert flexdecode.cache_info().calls == 8 * 2


def test_quantised_cache():
    if not hasattr(transformers.cache_utils, "Fp8QuantizedLayer"):
        pytest.skip("this transformers quantises caches only by other packages")
    options = {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}}
    exact = greedy(make(CONFIGS["llama"](), "eager"), prompts())
    expected = greedy(make(CONFIGS["llama"](), "eager"), prompts(), **options)
    assert not torch.equal(expected, exact)  # it is quantised
    assert torch.equal(greedy(make(CONFIGS["llama"]()), prompts(), **options), expected)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_mask_of_four_dimensions(name, dtype):
    """A mask that the user made, at a prompt and at a draft of three tokens."""
    allowed = torch.rand(3, 1, 13, 13, generator=torch.Generator().manual_seed(0)) < 0.7
    allowed = (allowed | torch.eye(13, dtype=torch.bool)).tril()
    mask = allowed if dtype == torch.bool else torch.where(allowed, torch.rand(13), torch.finfo(dtype).min)
    dense = torch.where(allowed, 0.0, torch.finfo(torch.float32).min) if dtype == torch.bool else mask
    ids = prompts()["input_ids"][:, 7:]
    logits = {}
    with torch.no_grad():
        for implementation, given in (("eager", dense), ("flexdecode", mask)):
            model = make(CONFIGS[name](), implementation)
            start = model(ids[:, :10], attention_mask=given[:, :, :10, :10])
            more = model(ids[:, 10:], attention_mask=given[:, :, 10:], **cache_of(start))
            logits[implementation] = torch.cat([start.logits, more.logits], 1)
        unmasked = model(ids[:, :10]).logits
    assert torch.equal(logits["flexdecode"].argmax(-1), logits["eager"].argmax(-1))
    assert not torch.equal(logits["eager"][:, :10].argmax(-1), unmasked.argmax(-1))


@pytest.mark.parametrize("shape", [(3, 1, 20, 19), (3, 1, 19, 20), (2, 1, 20, 20), (3, 3, 20, 20)])
def test_mask_of_a_wrong_shape(shape):
    model = make(CONFIGS["llama"]())
    message = r"must have shape .* = \[3 or 1, 4 or 1, 20, 20\].*got \[\d, \d, \d+, \d+\]"
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(prompts()["input_ids"], attention_mask=torch.zeros(shape))


def test_region_that_makes_the_mask():
    """A user may compile a whole model: then the mask is made in the region too."""
    torch._dynamo.reset()
    for name in ("llama", "gemma2"):
        model = make(CONFIGS[name]())
        compiled = torch.compile(model, fullgraph=True, backend="eager")
        with torch.no_grad():
            got, expected = compiled(**prompts()).logits, model(**prompts()).logits
        live = prompts()["attention_mask"].bool()
        assert torch.equal(got.argmax(-1)[live], expected.argmax(-1)[live])


def test_options_reach_the_calls():
    register(flexdecode.DecodeOptions(backend="triton"))
    try:
        with pytest.raises(ValueError, match="needs CUDA tensors"):
            greedy(make(CONFIGS["llama"]()), prompts(), num_tokens=4)
    finally:
        register()
