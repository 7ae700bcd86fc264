"""Packed queries and keys on a GPU: both backends, all schedules, prompts, graphs, and what a step may cost."""

import itertools
import random

import packed_cases as cases
import pytest
import torch
from packed_cases import draw, totals

from flexdecode import DecodeOptions, cache_info, flex_decode, mods
from flexdecode.runtime import launch

pytestmark = pytest.mark.gpu

SCHEDULES = {
    "default": DecodeOptions(),
    "splits": DecodeOptions(num_splits=3, block_n=32),
    "balanced": DecodeOptions(schedule="balanced"),
    "invariant": DecodeOptions(batch_invariant=True),
}
TURNS = list(zip(cases.GRID[::3], itertools.cycle(SCHEDULES), strict=False))
BACKENDS = {"torch": DecodeOptions(backend="torch"), "triton": DecodeOptions(backend="triton")}


@pytest.fixture(params=BACKENDS.values(), ids=BACKENDS)
def options(request):
    return request.param


@pytest.mark.parametrize(("case", "schedule"), TURNS, ids=[f"{case.name}-{name}" for case, name in TURNS])
def test_grid(case, schedule):
    cases.check_case(case, "cuda", SCHEDULES[schedule])


@pytest.mark.parametrize("case", cases.GRID[::9], ids=lambda case: case.name)
def test_grid_on_the_torch_backend(case):
    cases.check_case(case, "cuda", BACKENDS["torch"])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", cases.KINDS)
def test_half_types(kind, dtype, options):
    call = draw([1, 6, 0, 3], [14, 6, 2, 20], kind, dtype=dtype, device="cuda", Hkv=1 if "latent" in kind else 2)
    cases.check(call, mods.softcap(2.0), mods.causal(), options=options)


@pytest.mark.parametrize("arguments", cases.UNIFIED[::5], ids=str)
def test_unified(arguments, options):
    cases.check_unified(*arguments, "cuda", options, torch.bfloat16)


@pytest.mark.parametrize("arguments", cases.CASCADE[::5], ids=str)
def test_cascade(arguments, options):
    cases.check_cascade(*arguments, "cuda", options)


@pytest.mark.parametrize("kind", ["contiguous", "paged", "paged_e4m3", "paged_latent", "keys"])
@pytest.mark.parametrize("mask", cases.DEAD_MASKS)
def test_dead_keys(mask, kind):
    cases.check_dead_keys(mask, kind, "cuda", BACKENDS["triton"])


@pytest.mark.parametrize("kind", cases.KINDS)
def test_packed_is_padded(kind):
    cases.check_packed_is_padded(kind, "cuda")


def test_out_and_hint(options):
    cases.check_out("cuda", options)
    cases.check_hint("cuda", options)


def test_other_splits(options):
    cases.check_other_splits(
        lambda call: flex_decode(
            call.query, mask_mod=mods.causal(), return_lse=True, options=options, **call.arguments
        ),
        "cuda",
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_a_graph_sees_other_splits(schedule):
    """Captured once. Which sequences are short is found anew by each replay."""
    graphs = {}

    def run(call):
        def compute():
            return flex_decode(
                call.query, mask_mod=mods.causal(), return_lse=True, options=SCHEDULES[schedule], **call.arguments
            )

        if not graphs:
            compute()
            torch.cuda.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                results = compute()
            graphs[graph] = results
        ((graph, results),) = graphs.items()
        graph.replay()
        return results

    cases.check_other_splits(run, "cuda")


@pytest.mark.parametrize("name", ["cu_seqlens_q", "cu_seqlens_k"])
def test_totals_outside_are_clamped(name, options):
    """Their values are not checked on a GPU, except for debug."""
    call = cases.check_clamped(name, "cuda", options)
    with pytest.raises(ValueError, match=f"`{name}` must lie between 0 and"):
        flex_decode(call.query, **call.arguments, options=DecodeOptions(backend=options.backend, debug=True))


# --- Prompts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_lens", [(513, 1, 77), (1, 300, 0, 1, 1, 129)], ids=str)
@pytest.mark.parametrize("kind", ["contiguous", "paged", "paged_e4m3", "keys"])
@pytest.mark.parametrize("mask", [mods.causal(), mods.sliding_window(70)], ids=["causal", "window"])
def test_prompts_among_decodes(mask, kind, q_lens):
    """Large tiles of 128 rows beside small ones, of odd lengths."""
    kv_lens = [q + 100 * i for i, q in enumerate(q_lens)]
    call = draw(q_lens, kv_lens, kind, Hq=8, D=64, dtype=torch.bfloat16, device="cuda", page_size=16)
    cases.check(call, mods.alibi(8, device="cuda"), mask)


@pytest.mark.parametrize("Q", [33, 200, 515])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_padded_prompts(Q, dtype):
    call = draw([Q], [Q + 77], Hq=8, D=128, dtype=dtype, device="cuda", after=0)
    query = call.query.transpose(0, 1)[None]
    arguments = {name: x for name, x in call.arguments.items() if name != "cu_seqlens_q"}
    out, lse = flex_decode(query, mask_mod=mods.causal(), return_lse=True, **arguments)
    packed_out, packed_lse = cases.check(call, None, mods.causal())
    tolerance = {"rtol": 2e-2, "atol": 2e-2} if dtype == torch.bfloat16 else {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out[0].transpose(0, 1), packed_out, **tolerance)
    torch.testing.assert_close(lse[0].transpose(0, 1), packed_lse, rtol=1e-5, atol=1e-5)


# --- What a step may cost ---------------------------------------------------------------------------------------------


def test_a_thousand_steps_compile_nothing_new():
    """Other numbers of tokens, other splits and other draft lengths at each step, as in an engine."""
    generator = random.Random(0)
    B, N = 6, 700
    key, value = (torch.randn(B, 2, N, 64, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    compiled = []
    before = cache_info().compilations
    for step in range(1000):
        drafts = generator.randint(1, 8)
        q_lens = [generator.choice((1, drafts, drafts, 0)) for _ in range(B)]
        if step % 3 == 0:
            q_lens[generator.randrange(B)] = generator.randint(9, 300)
        query = torch.randn(sum(q_lens) + generator.randint(0, 9), 8, 64, device="cuda", dtype=torch.bfloat16)
        lens = torch.tensor([generator.randint(300, N) for _ in q_lens], device="cuda", dtype=torch.int32)
        arguments = {"cu_seqlens_q": totals(q_lens, device="cuda"), "kv_lens": lens, "max_q_len": max([*q_lens, 1])}
        flex_decode(query, key, value, None, mods.causal(), **arguments)
        compiled.append(cache_info().compilations - before)
    assert compiled[-1] <= 8 and compiled[-1] == compiled[100], compiled[100::100]


def test_a_sequence_alone_and_among_others_has_the_same_bits():
    options = DecodeOptions(batch_invariant=True)
    q_lens, kv_lens = [1, 7, 300, 0, 40, 1], [3000, 900, 2000, 5, 41, 77]
    call = draw(q_lens, kv_lens, Hq=8, D=64, dtype=torch.bfloat16, device="cuda", after=3)
    together = cases.check(call, None, mods.causal(), options=options)
    starts = [0, *itertools.accumulate(q_lens)]
    for b, (start, q_len) in enumerate(zip(starts, q_lens, strict=False)):
        arguments = {name: call.arguments[name][b : b + 1] for name in ("key", "value", "kv_lens")}
        alone = flex_decode(
            call.query[start : start + q_len], mask_mod=mods.causal(), return_lse=True, options=options,
            cu_seqlens_q=totals([q_len], device="cuda"), max_q_len=5, **arguments,
        )  # fmt: skip
        for one, all_of_them in zip(alone, together, strict=True):
            assert torch.equal(one, all_of_them[start : start + q_len])


def test_the_workspace_of_many_tokens_is_small():
    launch.forget_workspaces()
    query = torch.randn(8192, 32, 128, device="cuda", dtype=torch.bfloat16)
    key = torch.randn(256, 8, 512, 128, device="cuda", dtype=torch.bfloat16)
    q_lens = [8192 - 255, *[1] * 255]
    kv_lens = torch.full((256,), 512, device="cuda", dtype=torch.int32)
    for hint in (None, 8192, 1):
        flex_decode(
            query, key, key, None, mods.causal(), cu_seqlens_q=totals(q_lens, device="cuda"), kv_lens=kv_lens,
            max_q_len=hint,
        )  # fmt: skip
    sizes = [workspace.numel() * 4 for workspace in launch._workspaces.kept.values()]
    assert sum(sizes) <= 64 << 20
