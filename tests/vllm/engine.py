"""Runs prompts through vLLM, and the same tokens through transformers in float64 with attention by its definition."""

import gc
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

import flexdecode

FACTORIES = Path(__file__).with_name("factories.py")


class Answer(NamedTuple):
    """Greedy tokens after a prompt, and their log-probabilities."""

    prompt: list
    tokens: list
    logprobs: list


def named(factory):
    """How a factory is named in the configuration."""
    return f"{FACTORIES}:{factory.__name__}"


def run(folder, prompts, backend="CUSTOM", factory=None, max_tokens=24, look=None, **engine):
    """The answers of vLLM to prompts, in this process.

    Args:
        folder: of the model.
        prompts: lists of tokens.
        backend: None for vLLM's own.
        factory: of the mods, or its name.
        max_tokens: of each answer.
        look: is called with the engine before it generates.
        **engine: arguments of the engine.
    """
    from vllm import LLM, SamplingParams
    from vllm.distributed import cleanup_dist_env_and_memory

    if backend is not None:
        engine["attention_config"] = {"backend": backend}
    if factory is not None:
        name = factory if isinstance(factory, str) else named(factory)
        engine["additional_config"] = {"flexdecode": {"mods": name}}
    sizes = {"max_model_len": 512, "kv_cache_memory_bytes": 64 << 20, "dtype": "float32", "enforce_eager": True}
    before = flexdecode.cache_info().calls
    llm = LLM(folder, **sizes | {"disable_log_stats": True} | engine)
    try:
        if look is not None:
            look(llm)
        sampling = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True, logprobs=0)
        outputs = llm.generate([{"prompt_token_ids": x} for x in prompts], sampling, use_tqdm=False)
    finally:
        del llm
        gc.collect()
        cleanup_dist_env_and_memory()
    if os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0":
        ran = flexdecode.cache_info().calls > before
        assert ran == (backend == "CUSTOM"), "flexdecode ran" if ran else "flexdecode did not run"
    return [
        Answer(x.prompt_token_ids, list(x.outputs[0].token_ids), [
            at[token].logprob for at, token in zip(x.outputs[0].logprobs, x.outputs[0].token_ids, strict=True)
        ])
        for x in outputs
    ]  # fmt: skip


def run_alone(folder, prompts, environment=None, **named_arguments):
    """As `run`, in a process of its own. Returns what it printed too; its answers are None if it failed."""
    call = json.dumps([str(folder), prompts, named_arguments])
    here = Path(__file__).parents[2]
    variables = os.environ | {"PYTHONPATH": os.pathsep.join([str(here), *sys.path])} | (environment or {})
    ran = subprocess.run(
        [sys.executable, "-m", __name__], input=call, capture_output=True, text=True, env=variables, timeout=300
    )
    said = ran.stdout + ran.stderr
    if ran.returncode:
        return None, said
    last = next(line for line in reversed(ran.stdout.splitlines()) if line.startswith("[["))
    return [Answer(*answer) for answer in json.loads(last)], said


# --- The definition ---------------------------------------------------------------------------------------------------

_mods = {}  # of layers, of the model that runs


def dense_attention(module, query, key, value, attention_mask, scaling=None, softcap=None, sliding_window=None, **_):
    """Attention by its definition, over one whole sequence. It takes the place of transformers' functions."""
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, 1) for x in (key, value))
    score = (query @ key.transpose(2, 3)) * scaling
    if softcap is not None:
        score = torch.tanh(score / softcap) * softcap
    b, h, q, kv = torch.meshgrid(*[torch.arange(size) for size in score.shape], indexing="ij")
    user = _mods.get(module.layer_idx)
    live = torch.ones_like(score, dtype=torch.bool) if user is not None and not user.causal else kv <= q
    if sliding_window is not None:
        live = live & (q - kv < sliding_window)
    sinks = None
    if user is not None:
        score = score if user.score_mod is None else user.score_mod(score, b, h, q, kv)
        live = live if user.mask_mod is None else live & user.mask_mod(b, h, q, kv)
        sinks = user.sinks
    score = score.masked_fill(~live, -torch.inf)
    if sinks is not None:
        column = sinks.to(score.dtype).view(1, -1, 1, 1).expand(*score.shape[:3], 1)
        score = torch.cat([score, column], -1)
    weights = score.softmax(-1)[..., : kv.shape[-1]]
    return (weights @ value).transpose(1, 2).contiguous(), weights


class KnownLayer(NamedTuple):
    """What the factories of the tests read of a layer."""

    index: int
    num_heads: int
    first_head: int = 0
    name: str = "dense"
    device: torch.device = torch.device("cpu")


def check(folder, answers, factory=None, atol=2e-4):
    """Compares answers with the model in float64, which reads each prompt with its answer as a whole.

    Args:
        folder: of the model.
        answers: what vLLM gave.
        factory: of the mods.
        atol: largest difference of log-probabilities, for rounding inside vLLM. A token may be as much less probable
            than the best one: between the two, rounding decides.

    Returns:
        The largest difference of each answer.
    """
    transformers.AttentionInterface.register("dense", dense_attention)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    heads, layers = model.config.num_attention_heads, model.config.num_hidden_layers
    if type(model).__name__.startswith("Bloom"):
        assert factory is None  # its attention is its own
    else:
        model.set_attn_implementation("dense")
    _mods.clear()
    if factory is not None:
        _mods.update({index: factory(KnownLayer(index, heads)) for index in range(layers)})
    largest = []
    for prompt, tokens, logprobs in answers:
        with torch.no_grad():
            logits = model(torch.tensor([prompt + tokens]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        exact = logits.log_softmax(-1)
        chosen = exact.gather(1, torch.tensor(tokens)[:, None])[:, 0]
        behind, apart = (exact.amax(-1) - chosen).max(), (chosen - torch.tensor(logprobs)).abs().max()
        assert behind <= atol and apart < atol, f"{behind:.2g} behind the best token, {apart:.2g} apart"
        largest.append(apart.item())
    return largest


if __name__ == "__main__":
    folder_given, prompts_given, others_given = json.load(sys.stdin)
    print(json.dumps(run(folder_given, prompts_given, **others_given)))
