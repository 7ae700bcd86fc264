"""What a decode step of transformers' models spends in attention: flexdecode against what transformers has, on a GPU.

    python -m benchmarks.transformers_decode --out benchmarks/results/h200
    python -m benchmarks.transformers_decode --read .../transformers_decode.json --page docs/transformers-decode.md

It needs `pip install 'flexdecode[transformers]'`. The first writes transformers_decode.json and transformers_decode.md,
the second makes the page of a recorded run, without a GPU. A model with random weights makes one decode step over a
filled cache. What its layers pass to the attention function is recorded, and these calls are timed. Each is compared
with a float64 result before and inside the timed graph.
"""

import inspect
import statistics
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch

from .recorded import check, goals_reached, median, page, span
from .recorded import main as recorded_main
from .timing import time_graph

COLUMNS = {
    "step": "the model's shape, what its cache holds, and the mask",
    "us": "the kernels inside the attention function of one layer",
    "against": "another attn_implementation, over the same cache, in the same run",
    "times as fast": "the time of what it is compared with over ours",
    "goal": "the smallest number that the project accepts",
}


class Widths(NamedTuple):
    """The widths of a model."""

    hidden_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int


class Setting(NamedTuple):
    """What is measured.

    Attributes:
        device, dtype: of the models.
        llama, gemma: widths of the models.
        layers: of each model.
        batch: sequences.
        context: tokens of the longest sequence, the new one included.
        shortest: tokens of the shortest one, where lengths differ.
        window: of sliding attention, in tokens.
    """

    device: str
    dtype: torch.dtype
    llama: Widths
    gemma: Widths
    layers: int
    batch: int
    context: int
    shortest: int
    window: int


GPU = Setting(
    "cuda", torch.bfloat16, Widths(4096, 32, 8, 128), Widths(3584, 16, 8, 256), 4, 8, 32768, 8192, 4096
)  # Llama 3 8B, Gemma 2 9B
SOFT_CAP = 50.0
SLACK = {"flexdecode": 2.0}  # the largest error over that of rounding the exact result
OTHER_SLACK = 16.0  # eager attention also rounds its scores to bfloat16; with a wrong mask the error is far larger


class Step(NamedTuple):
    """A decode step to be measured.

    Attributes:
        case: its name.
        kind: of model: "llama", "mistral" (with a window) or "gemma2" (with a soft cap).
        cache: "dynamic", "static", or "cropped" to the window.
        padded: whether sequences have different lengths.
        others: the attn_implementations to compare with, and how many times as fast flexdecode has to be.
    """

    case: str
    kind: str
    cache: str
    padded: bool
    others: dict[str, float]


STEPS = (
    Step("Llama 3 8B, equal lengths", "llama", "dynamic", False, {"sdpa": 1.0, "flex_attention": 2.0}),
    Step("Llama 3 8B, padding on the left", "llama", "dynamic", True, {"sdpa": 1.3}),
    Step("Gemma 2 9B, soft cap, equal lengths", "gemma2", "dynamic", False, {"eager": 2.0}),
    Step("Llama 3 8B with a window, static cache of all tokens", "mistral", "static", False, {"sdpa": 3.0}),
    Step("Llama 3 8B with a window, static cache of the window", "mistral", "cropped", False, {"sdpa": 1.0}),
)


def make_config(setting: Setting, kind: str) -> Any:
    """The config of a model with few tokens in its vocabulary, which attention does not see."""
    from transformers import Gemma2Config, LlamaConfig, MistralConfig

    widths = setting.gemma if kind == "gemma2" else setting.llama
    common = dict(
        widths._asdict(), num_hidden_layers=setting.layers, intermediate_size=4 * widths.hidden_size, vocab_size=256,
        max_position_embeddings=setting.context, pad_token_id=0,
    )  # fmt: skip
    if kind == "mistral":
        return MistralConfig(**common, sliding_window=setting.window)
    if kind == "gemma2":
        layer_types = ["full_attention"] * setting.layers
        return Gemma2Config(
            **common, attn_logit_softcapping=SOFT_CAP, query_pre_attn_scalar=widths.head_dim, layer_types=layer_types
        )
    return LlamaConfig(**common)


def make_model(setting: Setting, kind: str, implementation: str) -> Any:
    """A model with random weights, the same for each implementation."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(2024)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(
            make_config(setting, kind), attn_implementation=implementation, dtype=setting.dtype
        )
    return model.eval()


def fill_cache(setting: Setting, kind: str, cache: str) -> Any:
    """A cache with random keys and values of all tokens but the new one, the same for each implementation."""
    from transformers import DynamicCache, StaticCache

    # A cache that knows no window keeps all tokens. Layers with a window take it as well.
    config = make_config(setting, "llama" if kind == "mistral" and cache != "cropped" else kind)
    made = DynamicCache() if cache == "dynamic" else StaticCache(config=config, max_cache_len=setting.context)
    torch.manual_seed(2025)
    shape = setting.batch, config.num_key_value_heads, setting.context - 1, config.head_dim
    for layer in range(setting.layers):
        made.update(*(torch.randn(shape, dtype=setting.dtype, device=setting.device) for _ in range(2)), layer)
    return made


def lengths(setting: Setting, padded: bool) -> torch.Tensor:
    """Tokens of each sequence `[B]`, the new one included."""
    shortest = setting.shortest if padded else setting.context
    return torch.linspace(shortest, setting.context, setting.batch, device=setting.device).long()


class Layer(NamedTuple):
    """What a layer passed to the attention function in a decode step, and the call that gives `[B, 1, Hq, D]`."""

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    call: Callable[[], torch.Tensor]


def record_step(setting: Setting, step: Step, implementation: str) -> list[Layer]:
    """Makes a decode step of a model, and records what its layers pass to the attention function."""
    model = make_model(setting, step.kind, implementation)
    module = sys.modules[type(model).__module__]
    functions = module.ALL_ATTENTION_FUNCTIONS
    function = functions.get_interface(implementation, module.eager_attention_forward)
    layers: list[Layer] = []

    def recording(*arguments: Any, **keywords: Any) -> Any:
        call = partial(function, *arguments, **keywords)
        layers.append(Layer(*arguments[1:4], keywords["scaling"], lambda: call()[0]))
        return call()

    slots = torch.arange(setting.context, device=setting.device)
    mask = (slots >= setting.context - lengths(setting, step.padded)[:, None]).long()
    tokens = torch.ones(setting.batch, 1, dtype=torch.long, device=setting.device)
    cache = fill_cache(setting, step.kind, step.cache)
    functions[implementation] = recording
    try:
        with torch.no_grad():
            model(tokens, attention_mask=mask, **{cache_keyword(model): cache})
    finally:
        del functions[implementation]
    return layers


def cache_keyword(model: Any) -> str:
    """The name of the cache in a model's forward, which has changed in transformers 5."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def in_float64(setting: Setting, step: Step, layer: Layer) -> torch.Tensor:
    """The output `[B, 1, Hq, D]` of a layer by plain attention, KV head by KV head."""
    query, key, value = layer.query, layer.key, layer.value
    N, group = key.shape[2], query.shape[1] // key.shape[1]
    position = torch.arange(N, device=key.device) + setting.context - N
    live = position >= setting.context - lengths(setting, step.padded)[:, None]
    if step.kind == "mistral":
        live &= position >= setting.context - setting.window
    outputs = []
    for head in range(key.shape[1]):
        rows = query[:, head * group : (head + 1) * group, 0].double()
        score = torch.einsum("bgd,bnd->bgn", rows, key[:, head].double()) * layer.scale
        if step.kind == "gemma2":
            score = SOFT_CAP * torch.tanh(score / SOFT_CAP)
        weights = score.masked_fill(~live[:, None], -torch.inf).softmax(-1)
        outputs.append(torch.einsum("bgn,bnd->bgd", weights, value[:, head].double()))
    return torch.cat(outputs, 1)[:, None]


def timed(setting: Setting, step: Step, implementation: str) -> list[float]:
    """Microseconds of the attention function of one layer, checked before and after."""
    layers, slack = record_step(setting, step, implementation), SLACK.get(implementation, OTHER_SLACK)
    with torch.no_grad():
        for layer in layers:
            check(layer.call(), in_float64(setting, step, layer), slack)
        times, output = time_graph([layer.call for layer in layers])
    check(output, in_float64(setting, step, layers[0]), slack)
    del layers, output
    torch.cuda.empty_cache()
    return times


def compare_tokens(setting: Setting, num_tokens: int = 32) -> None:
    """Generates with models in float32, for prompts with padding.

    Raises:
        SystemExit: the tokens are not those of another attention.
    """
    setting = setting._replace(dtype=torch.float32)
    prompts = torch.randint(1, 256, (setting.batch, 100), device=setting.device)
    mask = (
        torch.arange(100, device=setting.device) >= torch.arange(setting.batch, device=setting.device)[:, None]
    ).long()
    for kind, other in (("llama", "sdpa"), ("mistral", "sdpa"), ("gemma2", "eager")):
        tokens = [
            make_model(setting, kind, implementation).generate(
                prompts, attention_mask=mask, max_new_tokens=num_tokens, do_sample=False, eos_token_id=None
            )
            for implementation in ("flexdecode", other)
        ]
        if not torch.equal(*tokens):
            raise SystemExit(f"{kind}: tokens in float32 differ from those of {other}")


def run() -> Iterator[dict]:
    """Records of all steps."""
    import transformers

    from flexdecode.integrations.transformers import register

    transformers.logging.set_verbosity_error()
    register()
    compare_tokens(GPU)
    for step in STEPS:
        times = timed(GPU, step, "flexdecode")
        for other, at_least in step.others.items():
            other_us = statistics.median(timed(GPU, step, other))
            yield {
                "case": step.case, "times_us": times, "against": other, "other_us": other_us, "at_least": at_least,
                "bar_us": other_us / at_least, "transformers": transformers.__version__,
            }  # fmt: skip


def faster(record: dict) -> float:
    """The time of what a record is compared with over ours."""
    return record["other_us"] / median(record)


def found(results: list[dict]) -> str:
    """Three sentences that say what was found."""
    plain = {r["against"]: faster(r) for r in results if r["case"] == STEPS[0].case}
    others = [faster(r) for r in results if r["case"] != STEPS[0].case]
    compared = " and ".join(f"{ratio:.2f} times as fast as with {name}" for name, ratio in plain.items())
    return (
        f"Plain attention over sequences of equal lengths is {compared}. With padding, a soft cap or a window it is"
        f" {span(others, 1)} times as fast as with what transformers has. {goals_reached(results, 'comparisons')}"
    )


def markdown(document: dict) -> str:
    """The page of a run."""
    results = document["results"]
    version = results[0]["transformers"]
    intro = (
        f"Each row is a decode step of a model of transformers {version} with random weights: {GPU.layers} layers,"
        f" {GPU.batch} sequences, bfloat16. Each has {GPU.context} tokens, or from {GPU.shortest} to {GPU.context} with"
        f" padding on the left. Windows have {GPU.window} tokens. In float32, greedy tokens were equal to those of the"
        " other implementation."
    )
    lines = [f"| {' | '.join(COLUMNS)} |", "| --- | ---: | --- | ---: | ---: |"]
    lines += [
        f"| {r['case']} | {median(r):.1f} | {r['against']}, {r['other_us']:.1f} us | {faster(r):.2f}"
        f" | {r['at_least']} |"
        for r in results
    ]
    columns = "\n".join(f"- {name}: {meaning}" for name, meaning in COLUMNS.items())
    short = [
        f"- {r['case']}: {faster(r):.2f} times as fast as with {r['against']}, not {r['at_least']}."
        for r in results
        if faster(r) < r["at_least"]
    ]
    shortcomings = "\n".join(short) or "Nothing: every step reaches its goal."
    parts = [
        found(results),
        intro,
        "\n".join(lines),
        "## What the columns mean",
        columns,
        "## What falls short",
        shortcomings,
    ]
    inputs = "Here the calls of a graph are those of the layers, each with a cache of its own."
    return page(document, "Decode steps of transformers", parts, inputs)


def main(arguments: list[str] | None = None) -> int:
    """Run all steps, which returns 1 if one misses its goal; or make the page of a recorded run."""
    return recorded_main("transformers_decode", __doc__.split("\n")[0], run, markdown, arguments)


if __name__ == "__main__":
    sys.exit(main())
