"""Caches and calls on the CPU while PyTorch's default device is another one: nothing goes to that device."""

import pytest
import torch
from unit.kv.test_kv_cache import D, assert_same, contiguous, new_tokens, paged
from unit.kv.test_layers import packed, pool

from flexdecode import flex_decode, merge_attention, mods, write_kv

CPU = {"device": "cpu"}


@pytest.fixture(autouse=True)
def default_device():
    torch.set_default_device("meta")
    yield
    torch.set_default_device(None)


def tokens(num_tokens, seed=0):
    with torch.device("cpu"):
        return new_tokens(num_tokens, seed=seed)


def on_cpu(does):
    """The same without another default device."""
    with torch.device("cpu"):
        return does()


def each_way(make, dtype, scales):
    cache = make(dtype=dtype, **CPU, **scales)
    k, v = tokens(3)
    cache.append(k, v, [3, 0, 1])
    cache.append(packed(k, [1, 2, 0]), packed(v, [1, 2, 0]), [1, 2, 0])
    cache.append(k[:1], v[:1], 2, sequence=2)
    cache.append(k[0].transpose(0, 1), v[0].transpose(0, 1), 1, sequence=0)
    if make is paged:
        cache.free(1)
        cache.fork(0, 1)
        cache.append(k[:, :, :1], v[:, :, :1])
    cache.truncate(0, 2)
    return cache


@pytest.mark.parametrize("make", [contiguous, paged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_a_cache_of_one_layer(make, dtype):
    for scales in ({}, {"k_scale": 0.5, "v_scale": 2.0}) if dtype == torch.int8 else ({},):
        assert_same(each_way(make, dtype, scales), on_cpu(lambda scales=scales: each_way(make, dtype, scales)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_layers(dtype):
    def does():
        cache = pool(dtype=dtype, **CPU)
        k, v = tokens(3)
        for counts in ([3, 0, 1], [1, 2, 1]):
            cache.reserve(counts)
            cache.layer(0).append(k, v)
            cache.layer(1).append(packed(k, counts), packed(v, counts))
            cache.layer(2).append(k[:1], v[:1], sequence=2)
        return cache

    cache = does()
    assert_same(cache, on_cpu(does))
    assert cache.to("cpu") is cache


@pytest.mark.parametrize("scale", [None, 0.5])
def test_slots_attention_and_merging(scale):
    k, v = tokens(4)
    slots = torch.tensor([9, -1, 2, 30], **CPU)
    query = torch.randn(3, 4, 1, D, **CPU)

    def does():
        dtype = torch.float8_e4m3fn if scale else torch.float32
        pages = [torch.zeros(10, 2, 4, x.shape[-1], **CPU).to(dtype) for x in (k, v)]
        write_kv(*(x[0].transpose(0, 1) for x in (k, v)), *pages, slots, scale, scale)
        cache = contiguous(**CPU)
        cache.append(k, v)
        out, lse = flex_decode(query, cache=cache, mask_mod=mods.causal(), return_lse=True)
        return [x.float() for x in pages] + [*merge_attention([out, out], [lse, lse])]

    assert all(torch.equal(x, y) for x, y in zip(does(), on_cpu(does), strict=True))


@pytest.mark.skipif(
    torch.__version__ < "2.11", reason="Dynamo of torch 2.9 itself reads numbers from the default device"
)
def test_numbers_of_a_region_stay_on_the_cpu():
    """A number that changes is a tensor of the region, which the op reads on the host."""
    with torch.device("cpu"):
        query, key, value = torch.randn(1, 2, 1, D), *torch.randn(2, 1, 2, 8, D)

    def decode(factor, scale):
        return flex_decode(query, key, value, lambda score, b, h, i, j: score * factor, scale=scale)

    run = torch.compile(decode, backend="aot_eager", dynamic=True)
    for factor in (1.5, 2.5, 3.5):
        out = run(factor, factor / 2)
        assert torch.equal(out, on_cpu(lambda factor=factor: decode(factor, factor / 2)))
