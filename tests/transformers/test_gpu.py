"""Tokens on a GPU, where transformers compiles the steps of a static cache by itself, with CUDA graphs."""

import pytest
import torch
from support import OF_INDUCTOR

from flexdecode import mods
from flexdecode.integrations.transformers import set_mods
from tests.transformers.models import CONFIGS, by_eager, greedy, make, prompts

pytestmark = [pytest.mark.gpu, OF_INDUCTOR]


def on_gpu(inputs):
    return {name: x.cuda() for name, x in inputs.items()}


@pytest.mark.parametrize("length", [20, 100])
@pytest.mark.parametrize("cache", [None, "static"])
@pytest.mark.parametrize("name", CONFIGS)
def test_tokens_are_those_of_eager(name, cache, length):
    inputs = on_gpu(prompts(length=length))
    options = {} if cache is None else {"cache_implementation": cache}
    expected = by_eager(name, inputs, num_tokens=24, disable_compile=True, **options)
    torch._dynamo.reset()
    assert torch.equal(greedy(make(CONFIGS[name]()).cuda(), inputs, num_tokens=24, **options), expected)


def test_a_window_of_the_user():
    inputs = on_gpu(prompts())
    expected = greedy(make(CONFIGS["mistral"](), "eager").cuda(), inputs)
    model = make(CONFIGS["llama"]()).cuda()
    set_mods(model, mask_mod=mods.sliding_window(16))
    for options in ({}, {"cache_implementation": "static"}):
        torch._dynamo.reset()
        assert torch.equal(greedy(model, inputs, **options), expected)
