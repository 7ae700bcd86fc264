"""The append kernel against the PyTorch operations that append on a CPU: the same caches, to the last bit."""

import pytest
import torch
from unit.kv.test_kv_cache import Model, assert_same, captured, contiguous, new_tokens, paged

from flexdecode.kv import writing
from flexdecode.kv.cache import Cache
from flexdecode.kv.kv_cache import KVCache
from flexdecode.kv.paged import PagedKVCache
from flexdecode.kv.writing import append_rows

MAKERS = {
    "contiguous": contiguous,
    "pages of 1": lambda **x: paged(num_pages=70, page_size=1, **x),
    "pages of 3": lambda **x: paged(num_pages=25, page_size=3, **x),
    "pages of 16": lambda **x: paged(num_pages=5, page_size=16, **x),
}
CACHES = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def twins(make, monkeypatch, **arguments):
    """A cache that appends by the kernel, and `append_by_torch`, which does the same to another one."""
    cache, other = make(**arguments), make(**arguments)

    def append_by_torch(*tokens, **more):
        with monkeypatch.context() as patch:
            patch.setattr(writing, "by_kernel", lambda key: False)
            patch.setattr(writing, "launch", None)
            other.append(*tokens, **more)

    return cache, other, append_by_torch


def replay(cache, k, v, monkeypatch):
    """What a captured append does at each replay."""
    with monkeypatch.context() as patch:
        patch.setattr(Cache, "_capturing", lambda self: True)
        patch.setattr(writing, "_store", None)
        cache.append(k, v)


# --- Equal to PyTorch -------------------------------------------------------------------------------------------------


@CACHES
def test_tokens_of_all_numbers(make, monkeypatch):
    cache, other, append_by_torch = twins(make, monkeypatch)
    for step, counts in enumerate([None, [4, 0, 1], None, [0, 5, 0], [0, 0, 0], None]):
        k, v = new_tokens(1 if counts is None else 5, seed=step)
        cache.append(k, v, num_tokens=counts)
        append_by_torch(k, v, num_tokens=counts)
        assert_same(cache, other)
        assert not cache._arrivals.any()


@CACHES
@pytest.mark.parametrize(
    "scales", [{}, {"k_scale": torch.tensor([0.02, 0.01]), "v_scale": 0.25}], ids=["rows", "heads"]
)
@pytest.mark.parametrize("new", [torch.float16, torch.float32], ids=str)
def test_int8(new, scales, make, monkeypatch):
    cache, other, append_by_torch = twins(make, monkeypatch, dtype=torch.int8, **scales)
    for step, counts in enumerate([[7, 3, 0], None, None]):
        k, v = new_tokens(7 if counts else 1, seed=step, dtype=new)
        k[:, 1, -1] = 0
        k[:, 0, -1, :4] = torch.tensor([0.5, 1.5, 2.5, -0.5]) * 0.02
        cache.append(k, v, num_tokens=counts)
        append_by_torch(k, v, num_tokens=counts)
        assert_same(cache, other)
    assert cache.key.any() and cache.value.any()


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scales", [{}, {"k_scale": torch.tensor([0.5, 2.0]), "v_scale": 0.25}], ids=["rows", "heads"])
def test_float8(scales, dtype, monkeypatch):
    """Of numbers that need no rounding, which Triton's interpreter does wrongly for this type."""
    cache, other, append_by_torch = twins(paged, monkeypatch, dtype=dtype, **scales)
    k, v = ((x.sign() * 2.0 ** (x * 2).round().clamp(-3, 3)) for x in new_tokens(6))
    most = torch.finfo(dtype).max
    k[:, :, :, 0], v[:, :, :, 0] = most, -2 * most  # a power of two as scale; and out of range of the static ones
    cache.append(k, v)
    append_by_torch(k, v)
    assert_same(cache, other)
    if scales:
        assert (cache.value[cache._pages[0][0], :, :, 0].float() == -most).all()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scales_of_rows_that_are_zero_tiny_or_not_finite(dtype, monkeypatch):
    cache, other, append_by_torch = twins(contiguous, monkeypatch, dtype=dtype)
    k, v = new_tokens(7)
    k[0, 0, :, 0] = torch.tensor([torch.nan, torch.inf, -torch.inf, 0, 0, 0, 0])
    k[0, 0, 4] = 0
    k[0, 0, 5] *= 1e-45
    k[0, 0, 6] *= 1e-39
    cache.append(k, v)
    append_by_torch(k, v)
    assert torch.equal(cache.k_scale.nan_to_num(-1), other.k_scale.nan_to_num(-1))
    assert cache.k_scale[0, 0, :7].isnan().tolist() == [True] * 3 + [False] * 4
    assert cache.k_scale[0, 0, 4:6].tolist() == [1, 1]


@pytest.mark.parametrize(
    ("new", "dtype"),
    [
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
        (torch.float32, torch.float16),
    ],
    ids=str,
)
def test_other_types(new, dtype, monkeypatch):
    cache, other, append_by_torch = twins(paged, monkeypatch, dtype=dtype)
    k, v = new_tokens(5, dtype=new)
    cache.append(k, v)
    append_by_torch(k, v)
    assert_same(cache, other)


@pytest.mark.parametrize(("heads", "D", "Dv"), [(1, 16, 16), (3, 72, 40), (5, 17, 33), (8, 128, 128), (1, 576, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_head_dimensions_and_several_programs_for_a_sequence(dtype, heads, D, Dv, monkeypatch):
    sizes = {"num_kv_heads": heads, "head_dim": D, "v_head_dim": Dv, "dtype": dtype}
    cache, other, append_by_torch = twins(paged, monkeypatch, num_pages=30, **sizes)
    for step, counts in enumerate([[33, 20, 0], None, [3, 0, 7]]):
        k, v = new_tokens(33 if step == 0 else 7 if counts else 1, seed=step, heads=heads, D=D, Dv=Dv)
        cache.append(k, v, num_tokens=counts)
        append_by_torch(k, v, num_tokens=counts)
        assert_same(cache, other)
        assert not cache._arrivals.any()


def test_any_strides(monkeypatch):
    cache, other, append_by_torch = twins(paged, monkeypatch)
    wide_k, wide_v = new_tokens(5, D=32, Dv=48)
    k = wide_k.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
    v = wide_v[:, :1, :, 24:].expand(-1, 2, -1, -1)
    cache.append(k, v)
    append_by_torch(k, v)
    assert_same(cache, other)


def test_shared_pages(monkeypatch):
    cache, other, append_by_torch = twins(paged, monkeypatch, dtype=torch.int8)
    k, v = new_tokens(6)
    for x, append in ((cache, cache.append), (other, append_by_torch)):
        append(k, v, num_tokens=[6, 0, 0])
        x.fork(0, 1)
        x.fork(0, 2)
        append(*new_tokens(3, seed=1))
        x.truncate(1, 2)
        append(*new_tokens(1, seed=2), num_tokens=[0, 1, 1])
    assert_same(cache, other)


# --- Replays of a graph -----------------------------------------------------------------------------------------------


@CACHES
def test_a_replay_appends_what_was_reserved(make, monkeypatch):
    cache, model = captured(make()), Model()
    for step, counts in enumerate([2, 1, [1, 0, 2], [0, 0, 0], 2, [0, 2, 1]]):
        k, v = new_tokens(2, seed=step)
        cache.reserve(counts)
        replay(cache, k, v, monkeypatch)
        model.append(k, v, [counts] * 3 if isinstance(counts, int) else counts)
        model.check(cache)


@CACHES
def test_a_replay_without_a_reservation_appends_nothing(make, monkeypatch):
    cache, model = captured(make()), Model()
    k, v = new_tokens(4)
    cache.append(k, v)
    model.append(k, v)
    before = cache.key.clone()
    replay(cache, k, v, monkeypatch)
    cache.reserve(1)
    cache.truncate(1, 2)
    cache.free(2)
    replay(cache, k[:, :, :1], v[:, :, :1], monkeypatch)
    replay(cache, k, v, monkeypatch)
    model.append(k[:, :, :1], v[:, :, :1])
    model.tokens[1], model.tokens[2] = model.tokens[1][:2], []
    model.check(cache)
    assert (cache.key != before).any(-1).sum() == 2  # one token of two heads


def test_a_replay_between_appends(monkeypatch):
    cache, model = captured(paged()), Model()
    for step in range(6):
        k, v = new_tokens(1, seed=step)
        if step % 2:
            cache.reserve(1)
            replay(cache, k, v, monkeypatch)
        else:
            cache.append(k, v)
        model.append(k, v)
        model.check(cache)


def test_a_replay_does_not_write_into_pages_of_others(monkeypatch):
    cache, model = captured(paged()), Model()
    k, v = new_tokens(6)
    cache.append(k, v, num_tokens=[6, 0, 0])
    cache.fork(0, 1)
    model.append(k, v, [6, 0, 0])
    model.tokens[1] = list(model.tokens[0])
    one = new_tokens(1, seed=1)
    replay(cache, *one, monkeypatch)
    model.check(cache)
    cache.reserve(1)
    replay(cache, *one, monkeypatch)
    model.append(*one)
    model.check(cache)


# --- Nothing outside --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("page_size", [None, 4])
@pytest.mark.parametrize("wrong", [-5, 19, 20, 1 << 30, -(1 << 31)])
def test_whatever_the_length_on_the_device_nothing_is_written_outside(wrong, page_size):
    """Keys and values lie in a larger tensor, whose other numbers stay."""
    sizes = {"num_kv_heads": 2, "head_dim": 16, "dtype": torch.float32}
    if page_size is None:
        cache = KVCache(batch=3, max_kv_len=20, **sizes)
    else:
        cache = PagedKVCache(batch=3, num_pages=15, page_size=4, max_pages=5, **sizes)
    cache.append(*new_tokens(2, Dv=16))
    if page_size is not None:
        cache.page_table[0, 4], cache.page_table[1, 4] = -1, 15  # no pages
    around = {}
    for name in ("key", "value"):
        inner = getattr(cache, name)
        around[name] = torch.full((inner.numel() + 4096,), 7.0)
        setattr(cache, name, around[name][2048:-2048].view(inner.shape).copy_(inner))
    cache.kv_lens.fill_(wrong)
    for k, v in (new_tokens(3, Dv=16), new_tokens(5, Dv=16, seed=1)):
        append_rows(cache._stored(), cache._growing(), k, v, False, [])
        cache._limits.fill_(1 << 30)
        append_rows(cache._stored(), cache._growing(), k, v, True, [])
    for memory in around.values():
        assert (memory[:2048] == 7).all() and (memory[-2048:] == 7).all()
    assert ((cache.kv_lens >= 0) & (cache.kv_lens <= 20)).all()
