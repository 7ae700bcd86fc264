"""What a person who starts a server is told when something is wrong."""

import os
import subprocess
import sys

import pytest

from flexdecode.integrations.vllm import Layer, LayerMods
from tests.vllm import factories
from tests.vllm.conftest import QUIET
from tests.vllm.engine import FACTORIES, check, named, run
from tests.vllm.tiny import make_prompts

PROMPTS = make_prompts(5, 12)


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        (
            factories.raises,
            RuntimeError,
            r"raises raised KeyError for layer model.layers.0.*no table for model.layers.0",
        ),
        (factories.gives_a_function, TypeError, r"LayerMods or None, got function; put the function into it"),
        (factories.gives_three_parameters, TypeError, r"wrong score_mod: .*takes 3|wrong score_mod"),
        (factories.gives_wrong_sinks, ValueError, r"sinks \[num_heads\] = \[4\], got torch.float32 \[5\]"),
        (factories.cannot_be_traced, RuntimeError, r"layer model.layers.0.*TraceError: (.|\n)*factories.py"),
        (f"{FACTORIES}:not_callable", TypeError, r"must be a function from a layer to its mods, got str"),
        (f"{FACTORIES}:absent", ValueError, r"has no 'absent' to make mods with; it has .*alibi_by_layer"),
        ("no_such_module:mods", ValueError, r"there is no module 'no_such_module'.*PYTHONPATH"),
        ("no/such/file.py:mods", ValueError, r"there is no file no/such/file.py"),
        ("my_mods", ValueError, r'must be named "module:function", got \'my_mods\''),
    ],
)
def test_factories(models, name, error, text):
    with pytest.raises(error, match=text):
        run(models("llama"), PROMPTS, factory=name)


@pytest.mark.parametrize(
    ("config", "error", "text"),
    [
        ({"mod": "a:b"}, ValueError, r'has the key "mods" only, got \[\'mod\'\]'),
        ({"mods": 3}, TypeError, r'"mods" in the additional config must be a text'),
        ("a:b", TypeError, r"must be an object, got 'a:b'"),
    ],
)
def test_the_configuration(models, config, error, text):
    with pytest.raises(error, match=text):
        run(models("llama"), PROMPTS, additional_config={"flexdecode": config})


@pytest.mark.parametrize(
    ("engine", "text"),
    [
        ({"kv_cache_dtype": "int8_per_token_head"}, "no the KV cache type int8_per_token_head"),
    ],
)
def test_what_is_missing_is_named_at_the_start(models, engine, text):
    with pytest.raises(NotImplementedError, match=text):
        run(models("llama"), PROMPTS, **engine)


def test_nothing_is_lost_by_an_error(models):
    """The same process serves with right mods afterwards."""
    folder = models("llama")
    with pytest.raises(RuntimeError):
        run(folder, PROMPTS, factory=factories.cannot_be_traced)
    check(folder, run(folder, PROMPTS, factory=factories.alibi_by_layer), factories.alibi_by_layer)


def test_an_installed_plugin_changes_no_other_run(models):
    """`run` checks that flexdecode did not run."""
    run(models("llama"), PROMPTS, backend=None)


_IN_ITS_PROCESSES = """
import sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, kv_cache_memory_bytes=64 << 20, max_model_len=512,
              attention_config={"backend": "CUSTOM"})
    for output in llm.generate([{"prompt_token_ids": [5, 6, 7]}], SamplingParams(temperature=0, max_tokens=8)):
        print("tokens", *output.outputs[0].token_ids)
"""


def in_its_processes(folder, factory, tmp_path):
    """Runs an engine with vLLM's default processes; the mods come from the environment."""
    script = tmp_path / "script.py"
    script.write_text(_IN_ITS_PROCESSES)
    environment = os.environ | QUIET | {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "FLEXDECODE_VLLM_MODS": named(factory)}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    return subprocess.run(
        [sys.executable, script, folder], capture_output=True, text=True, env=environment, timeout=300
    )


def test_an_engine_in_its_default_processes(models, tmp_path):
    folder = models("llama")
    ran = in_its_processes(folder, factories.distance_by_head, tmp_path)
    assert ran.returncode == 0, ran.stderr[-3000:]
    tokens = next(line for line in ran.stdout.splitlines() if line.startswith("tokens")).split()[1:]
    (answer,) = run(folder, [[5, 6, 7]], factory=factories.distance_by_head, max_tokens=8)
    assert [*map(int, tokens)] == answer.tokens


def test_an_error_reaches_the_person_who_starts_an_engine(models, tmp_path):
    """The mods are tried in another process, before a request comes."""
    ran = in_its_processes(models("llama"), factories.cannot_be_traced, tmp_path)
    assert ran.returncode != 0
    said = ran.stdout + ran.stderr
    assert "TraceError" in said and "in by_branch: return score if q_idx > kv_idx" in said
    assert "torch.where" in said


def test_a_factory_knows_its_layer(models, monkeypatch):
    import flexdecode.integrations.vllm.factory as module

    seen = []
    monkeypatch.setattr(module, "find_factory", lambda name: lambda layer: seen.append(layer))
    run(models("gemma2"), PROMPTS, factory="any:name")
    assert [layer.index for layer in sorted(seen, key=lambda layer: layer.index)] == [0, 1, 2, 3]
    first = min(seen, key=lambda layer: layer.index)
    assert isinstance(first, Layer) and (first.num_heads, first.num_kv_heads, first.head_dim) == (4, 2, 32)
    assert first.first_head == 0 and first.window == 24 and first.device.type == "cpu"
    assert LayerMods() == LayerMods(None, None, None, True)
