"""Greedy tokens and their log-probabilities: against vLLM's own backends, and against the definition in float64."""

import pytest
import torch

from tests.vllm import factories
from tests.vllm.engine import check, run
from tests.vllm.tiny import ENGINE_OF, make_prompts

PROMPTS = make_prompts(5, 40, 17, 100)


def equal(answers, others, atol=2e-4):
    for answer, other in zip(answers, others, strict=True):
        assert answer.tokens == other.tokens
        torch.testing.assert_close(torch.tensor(answer.logprobs), torch.tensor(other.logprobs), rtol=0, atol=atol)


@pytest.mark.parametrize("kind", ["llama", "gemma2", "mistral", "bloom", "deepseek"])
def test_a_model_as_it_is(models, kind):
    folder = models(kind)
    engine = ENGINE_OF.get(kind, {})
    answers = run(folder, PROMPTS, **engine)
    equal(answers, run(folder, PROMPTS, backend=None, **engine))
    # Of Bloom, vLLM computes another approximation of GELU than transformers.
    check(folder, answers, atol=2e-3 if kind == "bloom" else 2e-4)


@pytest.mark.parametrize(
    "factory",
    [
        factories.alibi_by_layer, factories.cap_window_first_tokens, factories.window_and_sinks,
        factories.distance_by_head,
    ],
    ids=lambda factory: factory.__name__,
)  # fmt: skip
def test_mods_by_layer(models, factory):
    folder = models("llama")
    check(folder, run(folder, PROMPTS, factory=factory), factory)


def test_a_mask_that_is_not_causal(models):
    """Every token sees the first eight, so the reference needs prompts of eight tokens."""
    folder, factory = models("llama"), factories.prefix_of_eight
    check(folder, run(folder, make_prompts(8, 40, 100), factory=factory), factory)


@pytest.mark.parametrize("factory", [factories.distance_by_head, factories.window_and_sinks])
@pytest.mark.parametrize("kind", ["gemma2", "deepseek"])
def test_mods_beside_what_a_model_does(models, kind, factory):
    """Soft caps and windows; latents, whose prompts flexdecode computes if there are mods."""
    folder = models(kind)
    check(folder, run(folder, PROMPTS, factory=factory, **ENGINE_OF.get(kind, {})), factory)
