"""`flexdecode.integrations.flex_attention`: what PyTorch's tests of decoding compute, with every value compared."""

import pytest
import torch
import torch._inductor.config
from flex_cases import (
    BOTH,
    CASES,
    SCORE_MODS,
    Sizes,
    Tensors,
    assert_right,
    check,
    check_paged,
    inputs_of,
    paged,
    run_case,
    up_to,
)
from support import assert_close
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import AuxOutput, create_block_mask

from flexdecode.integrations import flex_attention

SIZES = Sizes(B=4, HQ=4, HKV=2, Q=1, N=150, D=16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(8, 1), (8, 2), (4, 4)]
of_score_mods = pytest.mark.parametrize("score_mod", SCORE_MODS.values(), ids=SCORE_MODS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


def sizes_of(heads, **more):
    return SIZES._replace(HQ=heads[0], HKV=heads[1], **more)


def counted(function, backend="aot_eager"):
    """The function as one graph, and a counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def compile_whole(function):
    return counted(function)[0]


# --- PyTorch's list ---------------------------------------------------------------------------------------------------


@of_dtypes
@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", CASES)
def test_cases(name, page_size, dtype):
    run_case(name, SIZES, dtype, page_size=page_size)


@of_heads
@of_dtypes
@of_score_mods
def test_score_mods(score_mod, dtype, heads):
    check(inputs_of(sizes_of(heads), dtype), score_mod)
    check_paged(sizes_of(heads), dtype, score_mod, None, page_size=64)


@of_heads
@of_score_mods
@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_page_sizes(score_mod, heads, page_size):
    check_paged(sizes_of(heads), torch.float32, score_mod, up_to(torch.tensor(19)), page_size=page_size)


@of_dtypes
@of_score_mods
@pytest.mark.parametrize("block_size", [64, 128, (1, 64), (128, 64)], ids=str)
def test_block_sizes(score_mod, dtype, block_size):
    check(inputs_of(SIZES, dtype), score_mod, block_size=block_size)


# Strides and offset of [B, H, N, D] in a larger buffer.
LAYOUTS = {
    "contiguous": lambda B, H, N, D: ((H * N * D, N * D, D, 1), 997),
    "tokens first": lambda B, H, N, D: ((H * D, D, B * H * D, 1), 499),
    "wider rows": lambda B, H, N, D: ((N * (D + 1), B * N * (D + 1), D + 1, 1), 293),
    "overlapping sequences": lambda B, H, N, D: ((1, D, (B + 1) * (H + 1) * D, 1), 97),
}


@of_heads
@pytest.mark.parametrize("of_value", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of_key", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(of_key, of_value, heads):
    B, HQ, HKV, _, N, D = sizes_of(heads)[:6]
    numbers = torch.randn(4 * B * HKV * N * D + 997, generator=torch.Generator().manual_seed(2))
    query = numbers[: B * HQ * D].view(1, HQ, B, D).transpose(0, 2)
    key, value = (numbers.as_strided((B, HKV, N, D), *layout(B, HKV, N, D)) for layout in (of_key, of_value))
    check((query, key, value), SCORE_MODS["alibi"])


@of_heads
@of_score_mods
@pytest.mark.parametrize("batch", [3, 5, 8, 16])
def test_one_cache_for_all_sequences(score_mod, heads, batch):
    check(inputs_of(sizes_of(heads, B=batch, BKV=1), torch.float32), score_mod, block_size=128)


@of_dtypes
@of_score_mods
@pytest.mark.parametrize("widths", [(32, 16), (16, 32)], ids=str)
def test_values_of_another_width(score_mod, dtype, widths):
    sizes = SIZES._replace(D=widths[0], DV=widths[1])
    check(inputs_of(sizes, dtype), score_mod)
    check_paged(sizes, dtype, score_mod, None, page_size=64)


@of_heads
@of_score_mods
def test_masks_of_heads(score_mod, heads):
    sizes = sizes_of(heads)
    mask_mod = CASES["mask_of_heads"].mods(sizes, Tensors("cpu", torch.float32))[1]
    check(inputs_of(sizes, torch.float32), score_mod, mask_mod)
    check_paged(sizes, torch.float32, score_mod, mask_mod, page_size=64)


@pytest.mark.parametrize("head_dim", [4, 17, 24, 94, 121])
def test_head_dims(head_dim):
    """As many queries as keys; also a head dimension that PyTorch's kernel is too wide for."""
    check(inputs_of(SIZES._replace(Q=150, D=head_dim), torch.float32), SCORE_MODS["distance"])


@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
def test_a_mod_that_takes_another_branch(page_size):
    one, branch = torch.ones((), dtype=torch.int32), {}

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + one if branch["adds"] else score * one

    for adds in (True, False, True):
        branch["adds"] = adds
        if page_size is None:
            check(inputs_of(SIZES, torch.float32), score_mod)
        else:
            check_paged(SIZES, torch.float32, score_mod, None, page_size=page_size)


@pytest.mark.parametrize("names", [("distance", "causal"), ("distance", "causal", "distance")], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
def test_several_calls(names, compiled, page_size):
    """One call attends what the call before it gave, with other mods, keys and values."""
    sizes = SIZES._replace(B=1, HQ=4, HKV=4, Q=4)
    given = [inputs_of(sizes, torch.float32, seed=i) for i in range(len(names))]
    score_mods = [SCORE_MODS[name] for name in names]
    calls = [(k, v, score_mod, None) for (_, k, v), score_mod in zip(given, score_mods, strict=True)]
    if page_size is not None:
        calls = [paged(given[0][0], *call, page_size) for call in calls]

    def model(query):
        outs = []
        for key, value, score_mod, block_mask in calls:
            outs.append(flex_attention(query, key, value, score_mod, block_mask, return_aux=BOTH))
            query = outs[-1][0]
        return outs

    query = given[0][0]
    for (out, aux), (_, key, value), score_mod in zip(
        compile_whole(model)(query) if compiled else model(query), given, score_mods, strict=True
    ):
        assert_right(out, aux, (query, key, value), score_mod, None)
        query = out


@pytest.mark.parametrize("page_size", [None, 128], ids=["contiguous", "paged"])
def test_fewer_keys_than_a_block_and_few_heads(page_size):
    sizes = Sizes(B=1, HQ=1, HKV=1, Q=1, N=65, D=16)
    mask_mod = up_to(torch.tensor(192, dtype=torch.int32))
    if page_size is None:
        check(inputs_of(sizes, torch.float32), None, mask_mod)
    else:
        check_paged(sizes, torch.float32, None, mask_mod, page_size=page_size)


def test_a_cache_that_grows_compiles_twice():
    attend, counter = counted(flex_attention)
    for i in range(5):
        query, key, value = inputs_of(SIZES._replace(N=150 + i), torch.float32)
        out, aux = attend(query, key, value, enable_gqa=True, return_aux=BOTH)
        assert_right(out, aux, (query, key, value), None, None)
        assert counter.frame_count == min(i + 1, 2)


def test_lengths_far_below_a_block():
    sizes = Sizes(B=2, HQ=1, HKV=1, Q=2, N=2, D=16)
    for attention in (flex_attention, compile_whole(flex_attention)):
        check(inputs_of(sizes, torch.float32), None, up_to(0), attention=attention)


@of_score_mods
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sequences_of_different_lengths_in_pages(score_mod, compiled):
    """Each sequence has its own number of keys in PyTorch's pages; its query is at position 0, as in PyTorch's test."""
    lens = [5, 98, 47, 130]
    given = [inputs_of(Sizes(B=1, HQ=4, HKV=4, Q=1, N=n, D=16), torch.float32, seed=n) for n in lens]
    pages = PagedAttention(32, 16, 4, device="cpu")
    for capacities in ([100, 30, 50, 20], [130, 98, 60, 130]):
        for b, capacity in enumerate(capacities):
            pages.reserve(torch.tensor(b), torch.tensor(capacity))
    caches = [torch.zeros(1, 4, 32 * 16, 16) for _ in range(2)]
    for b, (n, (_, key, value)) in enumerate(zip(lens, given, strict=True)):
        pages.assign(torch.tensor([b]), torch.arange(n)[None], key, value, *caches)
    mask_mod = up_to(0)
    logical = create_block_mask(mask_mod, 4, 1, 1, 512, device="cpu", BLOCK_SIZE=16)
    block_mask = pages.convert_logical_block_mask(logical)
    attend = compile_whole(flex_attention) if compiled else flex_attention
    out, aux = attend(
        torch.cat([query for query, _, _ in given]), *caches, pages.get_score_mod(score_mod), block_mask,
        return_aux=BOTH,
    )  # fmt: skip
    for b, inputs in enumerate(given):
        part = AuxOutput(aux.lse[b : b + 1], aux.max_scores[b : b + 1])
        assert_right(out[b : b + 1], part, inputs, score_mod, mask_mod)


@of_dtypes
def test_windows_beside_scaled_dot_product_attention(dtype):
    sizes = SIZES._replace(HQ=4, HKV=4, Q=8)
    query, key, value = inputs = inputs_of(sizes, dtype)
    seen = torch.ones(8, 150, dtype=torch.bool).tril(75)
    expected = torch.nn.functional.scaled_dot_product_attention(*[x.double() for x in inputs], attn_mask=seen)
    for name in ("window_by_score", "window_by_mask", "window_by_both"):
        score_mod, mask_mod = CASES[name].mods(sizes, None)
        block_mask = None if mask_mod is None else create_block_mask(mask_mod, 1, 1, 8, 150, device="cpu")
        out = flex_attention(query, key, value, score_mod, block_mask)
        measure = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=seen)
        assert_close(out, None, (expected, expected.new_zeros(4, 4, 8)), (measure, None))


@of_dtypes
@pytest.mark.parametrize("score_mod", [None, SCORE_MODS["causal"]], ids=["plain", "causal"])
def test_a_graph_that_uses_only_the_log_sum_exp(score_mod, dtype):
    inputs = inputs_of(SIZES._replace(HQ=2, Q=2), dtype)

    def model(*inputs):
        _, lse = flex_attention(*inputs, score_mod, return_lse=True)
        return lse * 2

    out, aux = flex_attention(*inputs, score_mod, return_aux=BOTH)
    assert_right(out, aux, inputs, score_mod, None)
    assert aux.lse.dtype == torch.float32
    assert torch.equal(compile_whole(model)(*inputs), aux.lse * 2)


def test_caches_of_another_dtype():
    query, key, value = inputs_of(SIZES._replace(Q=8), torch.float32)
    check((query, key.half(), value.half()), SCORE_MODS["identity"])


def test_inductors_autotuning_changes_nothing():
    score_mod, _ = CASES["captured_in_all_dimensions"].mods(SIZES, Tensors("cpu", torch.float32))
    with torch._inductor.config.patch(max_autotune=True):
        for mod in (score_mod, SCORE_MODS["doubled"]):
            check(inputs_of(SIZES, torch.float32), mod, attention=compile_whole(flex_attention))
            check_paged(SIZES, torch.float32, mod, None, page_size=64, attention=compile_whole(flex_attention))
