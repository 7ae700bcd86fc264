"""`flexdecode.integrations.flex_attention` on the GPU, in the sizes of PyTorch's tests of decoding."""

import pytest
import torch
import torch._inductor.config
from flex_cases import BOTH, CASES, SCORE_MODS, Sizes, assert_right, check, check_paged, inputs_of, run_case, up_to
from support import OF_INDUCTOR
from torch.nn.attention.flex_attention import create_block_mask
from torch.nn.attention.flex_attention import flex_attention as pytorchs

from flexdecode.integrations import flex_attention

pytestmark = [pytest.mark.gpu, OF_INDUCTOR]

SIZES = Sizes(B=4, HQ=16, HKV=8, Q=1, N=2048, D=64)
HEADS = [(16, 1), (8, 2), (16, 16)]
of_dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
of_score_mods = pytest.mark.parametrize("score_mod", SCORE_MODS.values(), ids=SCORE_MODS)
of_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


@of_dtypes
@pytest.mark.parametrize("page_size", [None, 64, 128], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_cases(name, page_size, dtype):
    run_case(name, SIZES, dtype, "cuda", page_size)


@of_heads
@of_dtypes
@of_score_mods
def test_score_mods(score_mod, dtype, heads):
    sizes = SIZES._replace(HQ=heads[0], HKV=heads[1])
    check(inputs_of(sizes, dtype, "cuda"), score_mod)
    check_paged(sizes, dtype, score_mod, None, page_size=128, device="cuda")


@of_score_mods
@pytest.mark.parametrize("block_size", [64, 128, (1, 64), (128, 64)], ids=str)
def test_block_sizes(score_mod, block_size):
    check(inputs_of(SIZES, torch.float16, "cuda"), score_mod, block_size=block_size)


@of_score_mods
@pytest.mark.parametrize("batch", [3, 16])
def test_one_cache_for_all_sequences(score_mod, batch):
    check(inputs_of(SIZES._replace(B=batch, BKV=1), torch.float16, "cuda"), score_mod, block_size=128)


@of_dtypes
@pytest.mark.parametrize("widths", [(64, 32), (32, 64), (128, 128), (256, 256)], ids=str)
def test_widths(dtype, widths):
    check(inputs_of(SIZES._replace(D=widths[0], DV=widths[1]), dtype, "cuda"), SCORE_MODS["alibi"], up_to(1500))


@pytest.mark.parametrize("head_dim", [17, 24, 94, 121])
def test_head_dims(head_dim):
    check(inputs_of(SIZES._replace(B=1, Q=512, N=512, D=head_dim), torch.float16, "cuda"), SCORE_MODS["distance"])


@pytest.mark.parametrize("splits", [1, 4, 33])
def test_the_output_has_the_order_of_the_query(splits):
    query, key, value = inputs_of(SIZES._replace(Q=3), torch.bfloat16, "cuda")
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    out = check((query, key, value), SCORE_MODS["alibi"], up_to(1500), kernel_options={"SPLIT_KV": splits})
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("max_autotune", [False, True])
def test_inductor(max_autotune):
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, fullgraph=True)
    with torch._inductor.config.patch(max_autotune=max_autotune):
        for N in (2048, 2049, 2050):
            inputs = inputs_of(SIZES._replace(N=N, Q=2), torch.bfloat16, "cuda")
            check(inputs, SCORE_MODS["alibi"], up_to(1500), attention=attend)


def test_cuda_graphs_of_torch_compile():
    torch._dynamo.reset()
    attend = torch.compile(flex_attention, fullgraph=True, mode="reduce-overhead")
    inputs = inputs_of(SIZES, torch.bfloat16, "cuda")
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        out, aux = attend(*inputs, SCORE_MODS["alibi"], enable_gqa=True, return_aux=BOTH)
        assert_right(out, aux, inputs, SCORE_MODS["alibi"], None)


@of_dtypes
def test_beside_pytorch(dtype):
    """PyTorch's compiled function: what both return, and how it lies in memory."""
    torch._dynamo.reset()
    query, key, value = inputs_of(SIZES._replace(Q=3), dtype, "cuda")
    query = query.transpose(1, 2).contiguous().transpose(1, 2)
    block_mask = create_block_mask(up_to(1500), None, None, 3, 2048, device="cuda")
    call = query, key, value, SCORE_MODS["alibi"], block_mask
    with torch.no_grad():
        expected, numbers = torch.compile(pytorchs)(*call, enable_gqa=True, return_aux=BOTH)
        out, aux = flex_attention(*call, enable_gqa=True, return_aux=BOTH)
    assert out.dtype == expected.dtype and out.stride() == expected.stride()
    for found, other in zip(aux, numbers, strict=True):
        assert found.dtype == other.dtype and found.stride() == other.stride()
    assert_right(out, aux, call[:3], SCORE_MODS["alibi"], up_to(1500))


def test_autocast():
    inputs = inputs_of(SIZES, torch.float32, "cuda")
    with torch.autocast("cuda", torch.bfloat16):
        out = flex_attention(*inputs, SCORE_MODS["alibi"], enable_gqa=True)
    assert torch.equal(out, flex_attention(*[x.bfloat16() for x in inputs], SCORE_MODS["alibi"], enable_gqa=True))
