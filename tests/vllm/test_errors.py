"""What a person who starts a server is told when something is wrong."""

import sys

import pytest

from flexdecode.integrations.vllm import Layer
from tests.vllm import factories
from tests.vllm.engine import check, named, run, run_alone
from tests.vllm.tiny import make_prompts

PROMPTS = make_prompts(5, 12)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (factories.raises, RuntimeError, r"raises raised KeyError for layer model.layers.0.*no table for model"),
        (factories.cannot_be_traced, RuntimeError, r"layer model.layers.0.*TraceError: (.|\n)*factories.py"),
        ("no_such_module:mods", ValueError, r"there is no module 'no_such_module'.*PYTHONPATH"),
    ],
)
def test_factories(models, name, error, text):
    """All mistakes are in tests/unit/integrations/test_vllm.py; these are seen by who starts an engine."""
    with pytest.raises(error, match=text):
        run(models("llama"), PROMPTS, factory=name)


def test_the_configuration(models):
    with pytest.raises(ValueError, match=r'has the keys "mods" and "debug", got \[\'mod\'\]'):
        run(models("llama"), PROMPTS, additional_config={"flexdecode": {"mod": "a:b"}})


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({"kv_cache_dtype": "int8_per_token_head"}, "lacks what is needed: the KV cache type int8_per_token_head"),
    ],
)
def test_what_is_missing_is_named_at_the_start(models, engine, text):
    with pytest.raises(NotImplementedError, match=text):
        run(models("llama"), PROMPTS, **engine)


@pytest.fixture
def said(monkeypatch):
    """What flexdecode logs."""
    from flexdecode.integrations.vllm import layers

    lines = []
    for level in ("info", "warning"):
        monkeypatch.setattr(layers._log, level, lambda text, *parts: lines.append(text % parts))
    return lines


def test_the_log_says_what_is_computed(models, said):
    run(models("gemma2"), PROMPTS, factory=factories.alibi_by_layer)
    counts = [line for line in said if line.startswith("flexdecode computes")]
    assert sum(int(line.split()[2]) for line in counts) == 4 and sum(int(line.split()[4]) for line in counts) == 3
    assert not any("gave mods to no layer" in line for line in said)


def test_a_factory_that_gives_mods_to_no_layer_is_named(models, said):
    run(models("llama"), PROMPTS, factory=factories.forgets_to_return)
    assert said[-1].endswith("factories.py:forgets_to_return gave mods to no layer, so the model is served as it is")


def test_a_table_that_is_too_short_is_said_with_its_layer(models, said):
    run(models("llama"), PROMPTS, factory=factories.table_of_two_heads)
    assert any(
        "flexdecode: model.layers.0.self_attn.attn: " in line and "reads out of range give 0" in line for line in said
    )


def test_debug_finds_a_table_that_is_too_short_for_the_sequence(models):
    config = {"flexdecode": {"mods": named(factories.table_of_eight_tokens), "debug": True}}
    with pytest.raises(RuntimeError, match=r"layers.0.*reads `bias\[kv_idx\]` out of range"):
        run(models("llama"), PROMPTS, additional_config=config)


def test_nothing_is_lost_by_an_error(models):
    """The same process serves with right mods afterwards."""
    folder = models("llama")
    with pytest.raises(RuntimeError):
        run(folder, PROMPTS, factory=factories.cannot_be_traced)
    check(folder, run(folder, PROMPTS, factory=factories.alibi_by_layer), factories.alibi_by_layer)


def test_an_installed_plugin_changes_no_other_run(models):
    """`run` checks that flexdecode did not run."""
    run(models("llama"), PROMPTS, backend=None)


def in_its_processes(folder, factory, **arguments):
    """Runs an engine with vLLM's default processes; the mods come from the environment."""
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "FLEXDECODE_VLLM_MODS": named(factory)}
    return run_alone(folder, PROMPTS, environment, **arguments)


def test_an_engine_in_its_default_processes(models):
    folder = models("llama")
    answers, said = in_its_processes(folder, factories.distance_by_head)
    assert answers is not None, said[-3000:]
    check(folder, answers, factories.distance_by_head)


def test_an_error_reaches_the_person_who_starts_an_engine(models):
    """The mods are tried in another process, before a request comes."""
    answers, said = in_its_processes(models("llama"), factories.cannot_be_traced)
    assert answers is None
    assert "TraceError" in said and "in by_branch: return score if q_idx > kv_idx" in said
    assert "torch.where" in said


def test_a_factory_knows_its_layer(models):
    run(models("gemma2"), PROMPTS, factory=factories.remembers)
    seen = sorted(sys.modules["flexdecode_mods_of_factories"].SEEN, key=lambda layer: layer.index)
    assert [layer.index for layer in seen] == [0, 1, 2, 3]
    first, second = seen[:2]
    assert isinstance(first, Layer) and (first.num_heads, first.num_kv_heads, first.head_dim) == (4, 2, 32)
    assert (first.first_head, first.window, second.window, first.device.type) == (0, 24, None, "cpu")
