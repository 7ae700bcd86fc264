"""The parts of vLLM's backend that need no vLLM: how mods are found, checked and joined."""

import os
import sys

import pytest
import torch

from flexdecode import merge_attention, mods
from flexdecode.integrations.vllm import Layer, LayerMods, register
from flexdecode.integrations.vllm.attend import NO_MODS, LayerAttention, OfModel, Step, as_hint, combine
from flexdecode.integrations.vllm.factory import VARIABLE, find_factory, make_mods, read_settings

LAYER = Layer("model.layers.3.self_attn.attn", 3, 4, 2, 32, 0, None, torch.device("cpu"), torch.float32)
SOURCE = """
import torch
from flexdecode import merge_attention, mods
from flexdecode.integrations.vllm import LayerMods

class Family:
    def of(layer):
        return LayerMods(mods.alibi(layer.num_heads))

def right(layer):
    return LayerMods(mods.alibi(layer.num_heads), mods.sliding_window(8), torch.zeros(layer.num_heads), causal=False)

def nothing(layer):
    return None

def empty(layer):
    return LayerMods()

def raises(layer):
    raise KeyError("no table")

def a_function(layer):
    return lambda score, b, h, q_idx, kv_idx: score

def a_class(layer):
    return LayerMods

def three(layer):
    return LayerMods(score_mod=lambda score, q_idx, kv_idx: score)

def a_mask_as_score(layer):
    return LayerMods(score_mod=mods.causal())

def not_a_mod(layer):
    return LayerMods(mask_mod=True)

def sinks(layer):
    return LayerMods(sinks=torch.zeros(layer.num_heads + 1))

def whole_sinks(layer):
    return LayerMods(sinks=torch.zeros(layer.num_heads, dtype=torch.int64))

def elsewhere(layer):
    return LayerMods(sinks=torch.zeros(layer.num_heads, device="meta"))

def no_bool(layer):
    return LayerMods(causal=0)

text = "a text"
"""


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "mods_of_a_test.py"
    path.write_text(SOURCE)
    yield path
    for name in ("mods_of_a_test", "flexdecode_mods_of_mods_of_a_test"):
        sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("config", "variable", "name"),
    [
        ({}, None, None),
        (None, None, None),
        ({}, "a:b", "a:b"),
        ({"flexdecode": {"mods": "c:d"}}, None, "c:d"),
        ({"flexdecode": {"mods": "c:d"}}, "a:b", "c:d"),
        ({"flexdecode": {"debug": False}}, "a:b", "a:b"),
        ({"of_others": 1}, "", None),
        (object(), "a:b", "a:b"),
    ],
)
def test_the_name_of_the_factory(config, variable, name, monkeypatch):
    monkeypatch.delenv(VARIABLE, raising=False)
    if variable is not None:
        monkeypatch.setenv(VARIABLE, variable)
    assert read_settings(config) == (name, False)


@pytest.mark.parametrize(
    ("ours", "error", "text"),
    [
        ({"mod": "a:b"}, ValueError, r'has the keys "mods" and "debug", got \[\'mod\'\]; write --additional-config'),
        ({}, ValueError, r'has the keys "mods" and "debug", got none'),
        ({"mods": ""}, TypeError, r'"mods" in the additional config must be a text, "module:function", got \'\''),
        ({"mods": "a:b", "debug": 1}, TypeError, r'"debug" in the additional config must be true or false, got 1'),
        ({"mods": 3}, TypeError, r'"mods" in the additional config must be a text, "module:function", got 3'),
        ("a:b", TypeError, r"must be an object, got 'a:b'; write --additional-config"),
    ],
)
def test_a_wrong_configuration(ours, error, text):
    with pytest.raises(error, match=text):
        read_settings({"flexdecode": ours})


@pytest.mark.parametrize("key", ["flexdecod", "FlexDecode", "flex_decode", "mods"])
def test_a_key_that_is_nearly_right(key):
    with pytest.raises(ValueError, match=f"the additional config has the key {key!r}; write --additional-config"):
        read_settings({key: {"mods": "a:b"}})


def test_checks_can_be_asked_for():
    assert read_settings({"flexdecode": {"mods": "a:b", "debug": True}}) == ("a:b", True)


def test_a_file_that_changed_is_run_again(file):
    assert find_factory(f"{file}:nothing")(LAYER) is None
    file.write_text("def nothing(layer):\n    return 5\n")
    os.utime(file, ns=(1, 1))
    assert find_factory(f"{file}:nothing")(LAYER) == 5


def test_modules_files_and_the_current_folder(file, monkeypatch):
    by_file = find_factory(f"{file}:right")
    assert find_factory(f"{file}:right") is by_file  # the file is run once
    assert by_file(LAYER).score_mod.__name__ == "alibi"
    monkeypatch.chdir(file.parent)
    assert find_factory("mods_of_a_test:nothing")(LAYER) is None
    monkeypatch.syspath_prepend(file.parent)
    assert find_factory("mods_of_a_test:right")(LAYER).causal is False
    assert find_factory("mods_of_a_test:Family.of")(LAYER).mask_mod is None


@pytest.mark.parametrize(
    ("name", "error", "text"),
    [
        ("my_mods", ValueError, r"must be named \"module:function\", got 'my_mods'; write --additional-config"),
        (":mods", ValueError, r"must be named"),
        ("no_such_module:mods", ValueError, r"no module 'no_such_module' .*PYTHONPATH.*path/of/my_mods.py:mods"),
        ("no/such.py:mods", ValueError, r"there is no file no/such.py"),
        ("FILE:absent", ValueError, r"has no 'absent' to make mods with; it has Family, right, nothing"),
        ("FILE:text", TypeError, r"must be a function from a layer to its mods, got str"),
        ("FILE:raises", RuntimeError, r":raises raised KeyError for layer model.layers.3.self_attn.attn: 'no table'"),
        ("FILE:a_function", TypeError, r"LayerMods or None, got function; put the function into it"),
        ("FILE:a_class", TypeError, r"LayerMods or None, got the class LayerMods$"),
        ("FILE:three", TypeError, r"gives a wrong score_mod: .*score_mod"),
        ("FILE:a_mask_as_score", TypeError, r"gives a wrong score_mod"),
        ("FILE:not_a_mod", TypeError, r"gives a wrong mask_mod"),
        ("FILE:sinks", ValueError, r"floating sinks \[num_heads\] = \[4\], got torch.float32 \[5\]"),
        ("FILE:whole_sinks", ValueError, r"floating sinks \[num_heads\] = \[4\], got torch.int64 \[4\]"),
        ("FILE:elsewhere", ValueError, r"must give sinks on cpu, got meta"),
        ("FILE:no_bool", TypeError, r"must give a bool as `causal`, got 0"),
    ],
)
def test_wrong_factories(name, error, text, file):
    with pytest.raises(error, match=text):
        make_mods(name.replace("FILE", str(file)), LAYER)


def test_a_module_that_lacks_another_says_so(tmp_path, monkeypatch):
    (tmp_path / "needs_more_of_a_test.py").write_text("import no_such_package_of_a_test")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="no_such_package_of_a_test"):
        make_mods("needs_more_of_a_test:mods", LAYER)


def test_without_a_factory_nothing_changes(file):
    assert make_mods(None, LAYER) is make_mods(f"{file}:nothing", LAYER) is make_mods(f"{file}:empty", LAYER) is NO_MODS


# --- The model's and the user's ---------------------------------------------------------------------------------------


def evaluate(mod, *first):
    """A mod of all heads and positions, without a batch."""
    h, q, kv = torch.meshgrid(torch.arange(4), torch.arange(12), torch.arange(12), indexing="ij")
    return mod(*first, torch.tensor(0), h, q, kv)


def bias(score, b, h, q_idx, kv_idx):
    return score * 2.0 + h


def even(b, h, q_idx, kv_idx):
    return kv_idx % 2 == 0


def early(b, h, q_idx, kv_idx):
    return kv_idx < 5


def test_scores_come_in_the_order_of_vllm():
    """Soft cap, ALiBi, then the user's."""
    slopes = torch.tensor([0.1, 0.2, 0.3, 0.4])
    score = torch.linspace(-9, 9, 4 * 12 * 12).view(4, 12, 12)
    h, q, kv = torch.meshgrid(torch.arange(4), torch.arange(12), torch.arange(12), indexing="ij")
    capped = 5.0 * torch.tanh(score / 5.0)
    found = combine(OfModel(1.0, 5.0, slopes), LayerMods(bias))
    torch.testing.assert_close(evaluate(found.score_mod, score), (capped - slopes[h] * (q - kv)) * 2.0 + h)
    assert combine(OfModel(1.0)).score_mod is None
    assert combine(OfModel(1.0), LayerMods(bias)).score_mod is bias


@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("mask_mod", [None, even])
@pytest.mark.parametrize("instead", [None, early])
def test_masks_hold_together(window, causal, mask_mod, instead):
    if not (causal or mask_mod or window):
        return
    _, q, kv = torch.meshgrid(torch.arange(4), torch.arange(12), torch.arange(12), indexing="ij")
    expected = torch.ones(4, 12, 12, dtype=torch.bool)
    if causal and instead is None:
        expected &= kv <= q
    if window is not None:
        expected &= q - kv < window
    for mask in (mask_mod, instead):
        if mask is not None:
            expected &= evaluate(mask)
    found = combine(OfModel(1.0, window=window), LayerMods(mask_mod=mask_mod, causal=causal), instead).mask_mod
    assert torch.equal(evaluate(found).expand(4, 12, 12), expected)


def test_without_any_mask_all_keys_are_live():
    found = combine(OfModel(1.0), LayerMods(causal=False)).mask_mod
    assert evaluate(found).all()


def test_sinks_of_both_add_up():
    """The logits of the model may change in place; those of the user may, too."""
    model, user = torch.randn(4), torch.randn(4)
    attention = LayerAttention(OfModel(32**-0.5, sinks=model), None, None)
    attention.user = LayerMods(sinks=user)
    from flexdecode import flex_decode

    query, cache = torch.randn(3, 4, 32), torch.randn(2, 2, 16, 64)
    numbers = torch.tensor([0, 3, 20], dtype=torch.int32)
    step = Step(numbers[:2], numbers[2:], torch.tensor([[1, 0]], dtype=torch.int32), None)
    for _ in range(2):
        out = attention.compute(query, cache[..., :32], cache[..., 32:], step)
        expected = flex_decode(
            query, cache[..., :32], cache[..., 32:], mask_mod=mods.causal(), kv_lens=step.kv_lens,
            page_table=step.page_table, cu_seqlens_q=step.cu_seqlens_q, sinks=(model.exp() + user.exp()).log(),
        )  # fmt: skip
        torch.testing.assert_close(out, expected)
        model += 1.0
        user -= 0.5


def test_hints_are_few():
    assert [as_hint(x) for x in (0, 1, 2, 16, 17, 8192)] == [1, 1, 16, 16, None, None]


def test_register_names_what_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "vllm.platforms", None)
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32 or later"):
        register()


def test_parts_of_a_sequence_on_two_ranks_add_up():
    """Decode context parallelism of latents: each rank has every second token, and gives a log-sum-exp."""
    latents, lens = torch.randn(3, 40, 48), [40, 17, 1]
    query = torch.randn(3, 4, 48)
    attention = LayerAttention(OfModel(32**-0.5), None, None)
    attention.user = LayerMods()

    def of_ranks(ranks, rank):
        mine = [x[rank:length:ranks] for x, length in zip(latents, lens, strict=True)]
        pages = torch.zeros(3, 1, 40, 48)
        for page, rows in zip(pages, mine, strict=True):
            page[0, : len(rows)] = rows
        kv_lens = torch.tensor([len(rows) for rows in mine], dtype=torch.int32)
        step = Step(torch.arange(4, dtype=torch.int32), kv_lens, torch.arange(3, dtype=torch.int32)[:, None], 1)
        return attention.compute(query, pages, pages[..., :32], step, return_lse=True)

    (whole, whole_lse), parts = of_ranks(1, 0), [of_ranks(2, rank) for rank in (0, 1)]
    assert parts[1][1][2].eq(-torch.inf).all()  # the second rank has nothing of the third sequence
    out, lse = merge_attention(*zip(*parts, strict=True))
    torch.testing.assert_close(out, whole)
    torch.testing.assert_close(lse, whole_lse)
