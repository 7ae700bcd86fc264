"""Compiled regions on the GPU: inductor, CUDA graphs of torch.compile, programs that were exported and loaded."""

import pytest
import torch
from support import OF_INDUCTOR, assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import PagedKVCache, flex_decode, merge_attention, mods

pytestmark = [pytest.mark.gpu, OF_INDUCTOR]

B, HQ, HKV, N, D = 2, 8, 2, 1000, 64
WINDOWS_AND_CAPS = [(20, 30.0), (500, 2.0), (3, 50.0)]


@pytest.fixture
def inputs():
    return make_inputs(B, HQ, HKV, 1, N, D, dtype=torch.bfloat16, device="cuda")


@pytest.fixture
def slopes():
    return torch.rand(HQ, device="cuda")


@pytest.fixture
def lens():
    return torch.tensor([900, N], dtype=torch.int32, device="cuda")


def model(query, key, value, slopes, window, cap, kv_lens):
    def score_mod(score, b, h, q_idx, kv_idx):
        return cap * torch.tanh(score / cap) - slopes[h] * (q_idx - kv_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx - kv_idx < window

    out, lse = flex_decode(query * 0.5, key, value, score_mod, mask_mod, kv_lens=kv_lens, return_lse=True)
    return out + 1, lse


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, **options)


def assert_same(found, expected):
    for part, other in zip(found, expected, strict=True):
        assert torch.equal(part, other)


def test_numbers_that_change(inputs, slopes, lens):
    run = compiled(model)
    for window, cap in WINDOWS_AND_CAPS:
        assert_same(run(*inputs, slopes, window, cap, lens), model(*inputs, slopes, window, cap, lens))


def test_the_result_is_right(inputs, slopes):
    def score_mod(score, b, h, q_idx, kv_idx):
        return 20.0 * torch.tanh(score / 20.0) - slopes[h] * (q_idx - kv_idx)

    run = compiled(lambda *inputs: flex_decode(*inputs, score_mod, mods.causal(), return_lse=True))
    assert_close_to_reference(*run(*inputs), *inputs, score_mod, mods.causal())


def test_cuda_graphs_of_torch_compile(inputs, slopes, lens):
    """One recorded graph serves other values of every tensor that the mods read."""
    run = compiled(model, mode="reduce-overhead")
    window, cap = torch.tensor(20, device="cuda"), torch.tensor(30.0, device="cuda")
    for step in range(8):
        torch.compiler.cudagraph_mark_step_begin()
        window.fill_(20 + 50 * step)
        lens.sub_(step)
        slopes.uniform_()
        given = *(torch.randn_like(tensor) for tensor in inputs), slopes, window, cap, lens
        assert_same(run(*given), model(*given))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_lists_of_a_block_mask_and_pages(mode, inputs):
    block_mask = create_block_mask(lambda b, h, q, k: k // 300 != 1, None, None, N, N, device="cuda")
    sizes = {"batch": B, "num_pages": 200, "page_size": 16, "num_kv_heads": HKV, "head_dim": D}
    cache = PagedKVCache(**sizes, dtype=torch.bfloat16, device="cuda")
    cache.append(*inputs[1:])

    def both(query, key, value):
        first = flex_decode(query, key, value, block_mask=block_mask, return_lse=True)
        second = flex_decode(query, cache=cache, mask_mod=mods.causal(), return_lse=True)
        return merge_attention(*zip(first, second, strict=True))

    run = compiled(both, mode=mode)
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        assert_same(run(*inputs), both(*inputs))


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_append_and_decode(mode, inputs):
    sizes = {"batch": B, "num_pages": 200, "page_size": 16, "num_kv_heads": HKV, "head_dim": D}
    caches = [PagedKVCache(**sizes, dtype=torch.float8_e5m2, device="cuda") for _ in range(2)]
    for cache in caches:
        cache.append(*inputs[1:])

    def step(query, k, v, cache):
        cache.append(k * 2, v)
        return flex_decode(query, mask_mod=mods.sliding_window(500), cache=cache) + 1

    run = compiled(step, mode=mode)
    for _ in range(5):
        torch.compiler.cudagraph_mark_step_begin()
        query, k, v = (torch.randn(B, heads, 1, D, dtype=torch.bfloat16, device="cuda") for heads in (HQ, HKV, HKV))
        assert torch.equal(run(query, k, v, caches[0]), step(query, k, v, caches[1]))
    assert torch.equal(caches[0].kv_lens, caches[1].kv_lens)


def test_an_exported_program(inputs, tmp_path):
    class Attention(torch.nn.Module):
        def forward(self, query, key, value):
            return flex_decode(query, key, value, mods.alibi(HQ, device="cuda"), mods.causal())

    length = torch.export.Dim("length", min=2, max=65536)
    shapes = {"query": None, "key": {2: length}, "value": {2: length}}
    exported = torch.export.export(Attention(), inputs, dynamic_shapes=shapes)
    torch.export.save(exported, tmp_path / "program.pt2")
    loaded = torch.export.load(tmp_path / "program.pt2").module()
    query, key, value = inputs
    for length in (N, 333):
        given = query, key[:, :, :length].contiguous(), value[:, :, :length].contiguous()
        assert torch.equal(loaded(*given), Attention()(*given))
