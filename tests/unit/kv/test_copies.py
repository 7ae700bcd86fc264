"""Copies of caches and of their layers: by deepcopy, pickle, torch.save and `to`, also in the middle of a step."""

import copy
import io
import pickle

import pytest
import torch
from unit.kv.test_kv_cache import assert_same, contiguous, new_tokens, paged
from unit.kv.test_layers import LATENT, MAKERS, packed, pool

from flexdecode import flex_decode


def saved_and_loaded(x):
    file = io.BytesIO()
    torch.save(x, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = {"deepcopy": copy.deepcopy, "pickle": lambda x: pickle.loads(pickle.dumps(x)), "save": saved_and_loaded}


def tokens_for(kind, seed=0):
    new = new_tokens(3, heads=1, D=24, seed=seed)[:1] if "latents" in kind else new_tokens(3, seed=seed)
    return list(new)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", MAKERS)
def test_a_copy_grows_like_the_original(kind, way):
    """Packed tokens and layers go where the tensors of the step say, which are views of one tensor."""
    cache = MAKERS[kind]()

    def append(cache, counts, seed):
        new = [packed(x, counts) for x in tokens_for(kind, seed)]
        if cache.num_layers is None:
            cache.append(*new, num_tokens=counts)
            return
        cache.reserve(counts)
        for i in range(cache.num_layers):
            cache.layer(i).append(*new)

    append(cache, [3, 0, 1], 0)
    copied = WAYS[way](cache)
    assert_same(cache, copied)
    for step, counts in enumerate([[1, 3, 0], [0, 1, 2]]):
        append(copied, counts, step)
        assert cache.lengths == cache.kv_lens.tolist() == [3, 0, 1]  # of the original
        assert copied.lengths == copied.kv_lens.tolist()
    for step, counts in enumerate([[1, 3, 0], [0, 1, 2]]):
        append(cache, counts, step)
    assert_same(cache, copied)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [x for x in MAKERS if "layers" in x])
def test_a_copy_in_the_middle_of_a_step(kind, way):
    cache = MAKERS[kind]()
    new = tokens_for(kind)
    cache.reserve([3, 0, 2])
    cache.layer(0).append(*new)
    copied = WAYS[way](cache)
    assert copied.cu_seqlens_q.tolist() == [0, 3, 3, 5]
    for x in (cache, copied):
        for i in (1, 2):
            x.layer(i).append(*new)
    assert_same(cache, copied)
    copied.reserve([0, 1, 0])
    assert copied.cu_seqlens_q.tolist() == [0, 0, 1, 1] and copied.layer(1).kv_lens.tolist() == [3, 1, 2]
    assert cache.cu_seqlens_q.tolist() == [0, 3, 3, 5] and cache.kv_lens.tolist() == [3, 0, 2]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("alone", [True, False])
def test_a_copy_of_a_layer_belongs_to_a_copy_of_its_cache(way, alone):
    cache = pool()
    cache.reserve([2, 0, 1])
    cache.layer(1).append(*new_tokens(2))
    if alone:
        layer = WAYS[way](cache.layer(1))
        copied = layer.cache
    else:
        layer, copied, other = WAYS[way]([cache.layer(1), cache, cache.layer(2)])
        assert other is copied.layer(2)
    assert layer is copied.layer(1) is not cache.layer(1) and layer.index == 1
    assert torch.equal(layer.key, cache.layer(1).key) and layer.key.data_ptr() != cache.layer(1).key.data_ptr()
    copied.reserve([1, 0, 0])
    layer.append(*new_tokens(1, seed=1))
    assert layer.lengths == layer.kv_lens.tolist() == [3, 0, 1] and cache.layer(1).lengths == [2, 0, 1]


def test_a_copied_layer_alone_can_be_used():
    """The copy of a layer keeps its cache alive no more than a layer does; it attends and writes to slots."""
    cache = pool()
    cache.reserve(2)
    cache.layer(1).append(*new_tokens(2))
    layer = copy.deepcopy(cache.layer(1))
    query = torch.randn(3, 4, 1, cache.key.shape[-1])
    assert torch.equal(flex_decode(query, cache=layer), flex_decode(query, cache=cache.layer(1)))


def test_a_layer_without_its_cache_is_not_copied():
    layer = pool().layer(0)
    for way in WAYS.values():
        with pytest.raises(RuntimeError, match="the cache of this layer is gone: keep it"):
            way(layer)


def test_a_copied_module_asks_its_own_cache_in_a_region():
    class Block(torch.nn.Module):
        def __init__(self, cache):
            super().__init__()
            self.cache, self.layer = cache, cache.layer(1)

        def forward(self, k, v):
            self.layer.append(k, v)

    block = Block(pool())
    copied = copy.deepcopy(block)
    copied.cache.reserve(2)
    run = torch.compile(copied, backend="eager")
    k, v = new_tokens(2)
    run(k, v)  # the original has no step
    assert torch.equal(copied.layer.key[copied.cache._pages[0][0], :, :2], k[0]) and not block.layer.key.any()


def test_latents_stay_views():
    for way in WAYS.values():
        for cache in (paged(**LATENT), contiguous(**LATENT), pool(**LATENT)):
            copied = way(cache)
            assert copied.value.data_ptr() == copied.key.data_ptr() != cache.key.data_ptr()
