"""The columns of the matrix on a CPU: flexdecode and PyTorch's for real, packages that are not installed by fakes."""

import dataclasses
import importlib.util
import shutil
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import columns, measure, mod_cases, sections
from benchmarks.cases import Case, make_tensors
from benchmarks.mod_cases import make_mod

CPU = torch.device("cpu")
PLAIN = Case("plain", (24, 24), 4, 2, 64)
RAGGED = Case("ragged", (40, 7, 16), 4, 2, 64)
PAGED = Case("paged", (40, 7, 16), 4, 2, 64, page_size=4)
TOKENS = Case("tokens", (24, 24), 4, 2, 64, mod="causal", num_queries=3)
PACKED = Case("packed", (24, 30), 4, 2, 64, mod="causal", q_lens=(1, 4))
STORED = Case("stored", (24, 24), 4, 2, 64, cache_dtype="float8_e4m3fn")
LATENT = Case("latent", (24, 9), 4, 1, 24, latent_dim=16)
LATENT_TOKENS = Case("latent", (24, 24), 4, 1, 24, latent_dim=16, mod="causal", num_queries=2)


def of(case, mod):
    return dataclasses.replace(case, mod=mod, window=5)


@pytest.fixture
def fakes(monkeypatch):
    path = Path(__file__).with_name("fake_peers.py")
    spec = importlib.util.spec_from_file_location("fake_peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    for make in (module.flashinfer, module.flash_attention_3, module.xformers):
        for name, package in make().items():
            monkeypatch.setitem(sys.modules, name, package)
    return module


def run(case, *names):
    """Results and empty cells of a case on the CPU; nothing is timed at length."""
    found = list(measure.measure(case, list(names), ["warm"], CPU))
    return [x for x in found if isinstance(x, measure.Result)], [x for x in found if isinstance(x, measure.EmptyCell)]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measure, "time_cpu", lambda call: [1.0])


def assert_right(case, name):
    (result,), empty = run(case, name)
    assert not empty, empty
    assert result.times_us == {name: [1.0]} and result.turns_us == {name: [1.0, 1.0]}


# --- flexdecode and PyTorch -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("section", sections.SECTIONS)
def test_flexdecode_is_right_in_every_section(section):
    for case in sections.cases_of(section, "bfloat16", small=True):
        assert_right(case, "flexdecode")


@pytest.mark.parametrize("mod", mod_cases.MODS)
def test_plain_statements_of_mods(mod):
    case = of(TOKENS, mod)
    columns_of_mod = ["flexdecode", "naive"] if mod == "softcap" else ["flexdecode", "naive", "sdpa"]
    (result,), empty = run(case, *columns_of_mod)
    assert not empty and list(result.times_us) == columns_of_mod
    keep = make_mod(case, CPU).keep
    assert result.live_kv_bytes == 2 * 2 * 64 * 2 * (48 if keep is None else int(keep.expand(2, 1, 3, 24).any(2).sum()))


compiles = [
    pytest.mark.skipif(not (shutil.which("g++") or shutil.which("c++")), reason="torch.compile needs a C++ compiler"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # torch.compile imports parts of torch that warn
]


@pytest.mark.parametrize("mod", [pytest.param(mod, marks=compiles) for mod in ("none", "documents")])
def test_flex_attention_compiled_on_a_cpu(mod):
    assert_right(Case("flex", (256, 256), 4, 2, 16, dtype="float32", mod=mod), "flex")


@pytest.mark.parametrize("lens", [pytest.param((256, 100), marks=compiles)])
def test_flex_attention_takes_ragged_lengths(lens):
    assert_right(Case("flex", lens, 4, 2, 16, dtype="float32"), "flex")


# --- Packages, by fakes -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "case",
    [
        PLAIN, RAGGED, PAGED, TOKENS, PACKED, STORED, LATENT, LATENT_TOKENS,
        of(PLAIN, "causal"), of(PLAIN, "alibi"), of(PLAIN, "softcap"), of(PLAIN, "sliding_window"),
    ],
    ids=lambda case: f"{case.label}-{case.mod}",
)  # fmt: skip
def test_flashinfer(fakes, case):
    assert_right(case, "flashinfer")


@pytest.mark.parametrize(
    "case", [PLAIN, RAGGED, TOKENS, PACKED, LATENT, LATENT_TOKENS, of(PLAIN, "softcap")],
    ids=lambda case: f"{case.label}-{case.mod}",
)  # fmt: skip
def test_flash_attention_3(fakes, case):
    assert_right(case, "fa3")


@pytest.mark.parametrize("case", [PLAIN, RAGGED, TOKENS, of(PLAIN, "causal")], ids=lambda case: case.label)
def test_xformers(fakes, case):
    assert_right(case, "xformers")


def test_one_plan_serves_all_input_sets(fakes):
    bind = columns.COLUMNS["flashinfer"].make(PAGED, make_mod(PAGED, CPU), CPU)
    plans, plain = [], fakes.Decode.plan
    fakes.Decode.plan = lambda self, *args, **keywords: plans.append(args) or plain(self, *args, **keywords)
    sets = [make_tensors(PAGED, CPU, number) for number in range(2)]
    for tensors in sets:
        bind(tensors)
    assert len(plans) == 1 and not torch.equal(sets[0].key, sets[1].key)


@pytest.mark.parametrize(
    ("name", "case", "reason"),
    [
        ("flashinfer", of(PLAIN, "relative_bias"), "FlashInfer takes relative_bias only as C++ text"),
        ("flashinfer", dataclasses.replace(PLAIN, cache_dtype="int8"), "FlashInfer has no int8 cache"),
        (
            "flashinfer", dataclasses.replace(PLAIN, head_dim=80),
            "FlashInfer's kernels for tensor cores take head dimensions that 64 divides",
        ),
        ("fa3", PAGED, "this build of FlashAttention 3 is not run with pages"),
        ("fa3", of(PLAIN, "sliding_window"), "this build of FlashAttention 3 has no sliding_window"),
        ("fa3", dataclasses.replace(PLAIN, dtype="float16"), "this build of FlashAttention 3 takes bfloat16 only"),
        ("xformers", LATENT, "xformers is not run with latents"),
        ("xformers", of(PLAIN, "alibi"), "xformers' split-K kernel is not run with alibi"),
        ("sdpa", RAGGED, "SDPA is not run with ragged lengths"),
        ("sdpa", of(PLAIN, "softcap"), "SDPA has no soft-capping: it is neither a bias nor a mask"),
        ("sdpa_flash", PLAIN, "needs a CUDA device"),
        ("flex", STORED, "FlexAttention is not run with an 8-bit cache"),
    ],
)  # fmt: skip
def test_why_a_cell_is_empty(fakes, name, case, reason):
    (result,), (cell,) = run(case, name)
    assert (cell.column, cell.reason, cell.wrong, result.times_us) == (name, reason, False, {})


def test_a_wrong_peer_is_shown_as_wrong(fakes):
    plain = fakes.Decode.run
    fakes.Decode.run = lambda self, *args, **keywords: plain(self, *args, **keywords) + 0.1
    (result,), (cell,) = run(PLAIN, "flexdecode", "flashinfer")
    assert (
        cell.wrong
        and cell.reason.startswith("wrong result: relative error ")
        and list(result.times_us) == ["flexdecode"]
    )


def test_a_peer_that_fails_leaves_a_reason(fakes):
    def fail(self, *args, **keywords):
        raise RuntimeError("\n no kernel for it\nmore")

    fakes.Decode.run = fail
    _, (cell,) = run(PLAIN, "flashinfer")
    assert (cell.reason, cell.wrong) == ("RuntimeError: no kernel for it; more", False)


def test_what_is_not_installed(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert columns.missing("sdpa") is None
    assert columns.missing("fa3") == "FlashAttention 3: not installed here (pip install fa3-fwd)"
