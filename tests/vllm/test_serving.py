"""What servers do: chunks, shared prefixes, drafts, quantised caches, compiled models, steps that prepare nothing."""

import pytest
import torch

import flexdecode
from flexdecode.integrations.vllm import LayerMods
from flexdecode.runtime.run import _calls as calls
from tests.vllm import factories
from tests.vllm.engine import check, named, run, run_alone
from tests.vllm.test_models import PROMPTS, equal
from tests.vllm.tiny import make_prompts

MODS = factories.distance_by_head
MANY = make_prompts(3, 90, 17, 140, 5, 61, 33, 8, 120, 2, 77, 29, seed=1)


@pytest.mark.parametrize(
    "engine",
    [
        {"max_num_batched_tokens": 32, "enable_chunked_prefill": True},
        {"block_size": 16},
        {"max_num_seqs": 3},
        {"enforce_eager": False},
    ],
    ids=["chunked_prefill", "block_size", "staggered", "dynamo"],
)
def test_ways_of_serving(models, engine):
    folder = models("llama")
    check(folder, run(folder, MANY, factory=MODS, **engine), MODS)


def test_drafts(models):
    """In its own process: vLLM starts only once where the compiler of its lookup was loaded."""
    folder = models("llama")
    drafts = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3}
    answers, said = run_alone(folder, MANY, factory=named(MODS), speculative_config=drafts)
    assert answers is not None, said[-3000:]
    check(folder, answers, MODS)


def test_windows_in_some_layers_in_chunks(models):
    """vLLM frees the pages before a window, also in the middle of a prompt."""
    folder = models("gemma2")
    sizes = {"max_num_batched_tokens": 32, "enable_chunked_prefill": True, "block_size": 16, "max_num_seqs": 4}
    check(folder, run(folder, MANY, factory=MODS, **sizes), MODS)


def test_shared_prefixes(models):
    folder = models("llama")
    shared = make_prompts(150, seed=2)[0]
    prompts = [shared + more for more in make_prompts(3, 40, 17, seed=3)] * 2
    sizes = {"enable_prefix_caching": True, "block_size": 32, "max_num_seqs": 2}
    check(folder, run(folder, prompts, factory=MODS, **sizes), MODS)


def test_two_ranks(models):
    """Each has half of the heads."""
    folder = models("llama")
    several = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    answers, said = run_alone(folder, PROMPTS[:2], several, factory=named(MODS), max_tokens=8, tensor_parallel_size=2)
    assert answers is not None, said[-3000:]
    check(folder, answers, MODS)


@pytest.mark.parametrize("kind", ["llama", "deepseek"])
def test_bfloat16(models, kind):
    """Rounding decides close choices, so the first tokens and their log-probabilities are compared."""
    folder = models(kind)
    ours = run(folder, PROMPTS, dtype="bfloat16", max_tokens=1)
    exact = run(folder, PROMPTS, max_tokens=1)
    theirs = run(folder, PROMPTS, backend=None, dtype="bfloat16", max_tokens=1)
    error, of_vllm = (
        max(abs(x.logprobs[0] - y.logprobs[0]) for x, y in zip(some, exact, strict=True) if x.tokens == y.tokens)
        for some in (ours, theirs)
    )
    assert sum(x.tokens == y.tokens for x, y in zip(ours, exact, strict=True)) >= 3
    assert error <= 2 * of_vllm + 1e-2


def test_a_float8_cache(models, monkeypatch):
    """Against the definition with keys and values that are rounded in the same way.

    A number beside the middle between two numbers of float8 may be rounded otherwise in float32 than in float64. It is
    then 1/16 of itself apart, and so are a few answers.
    """
    from tests.vllm import engine

    exact = engine.dense_attention

    def rounded(module, query, key, value, *others, **named):
        key, value = (x.float().to(torch.float8_e4m3fn).double() for x in (key, value))
        return exact(module, query, key, value, *others, **named)

    folder = models("llama")
    answers = run(folder, PROMPTS, factory=MODS, kv_cache_dtype="fp8")
    monkeypatch.setattr(engine, "dense_attention", rounded)
    largest = check(folder, answers, MODS, atol=2e-2)
    assert sum(apart < 2e-4 for apart in largest) >= len(answers) // 2


def test_a_mask_of_a_layer(models):
    """`layer.logical_mask_mod` takes the place of the causal mask, as in vLLM's own backend for FlexAttention."""
    mask_of = {1: factories.prefix_of_eight(None).mask_mod}

    def set_mask(llm):
        layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for name, layer in layers.items():
            if ".layers.1." in name:
                layer.logical_mask_mod = mask_of[1]

    def same(layer):
        return LayerMods(mask_mod=mask_of[1], causal=False) if layer.index == 1 else None

    folder, prompts = models("llama"), make_prompts(8, 40, 100)
    check(folder, run(folder, prompts, look=set_mask), same)


def test_a_warm_server_prepares_nothing(models):
    """Other numbers of sequences, tokens and pages need no new traces, plans or kernels."""
    counts = []

    def serve_twice(llm):
        from vllm import SamplingParams

        for seed in (1, 2, 3):
            prompts = make_prompts(*[5 + 7 * (i * seed % 13) for i in range(4 + 3 * seed)], seed=seed)
            llm.generate([{"prompt_token_ids": x} for x in prompts], SamplingParams(max_tokens=20), use_tqdm=False)
            counts.append((flexdecode.cache_info(), sum(len(known.prepared) for known in calls.values())))

    run(models("llama"), PROMPTS, factory=MODS, look=serve_twice)
    (first, prepared), *others = counts
    calls_of_all = [info.calls for info, _ in counts]
    assert calls_of_all[0] < calls_of_all[1] < calls_of_all[2]
    assert all((info.traces, number) == (first.traces, prepared) for info, number in others)


def test_mods_from_the_environment(models, monkeypatch):
    monkeypatch.setenv("FLEXDECODE_VLLM_MODS", named(MODS))
    folder = models("llama")
    answers = run(folder, PROMPTS)
    check(folder, answers, MODS)
    equal(answers, run(folder, PROMPTS, factory=MODS))
