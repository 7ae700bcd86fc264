"""The kernel that writes to given places against the PyTorch operations that do the same on a CPU."""

import pytest
import torch

import flexdecode
from flexdecode import KVCache, PagedKVCache
from flexdecode.kv import writing

PAGES, HEADS, SIZE, D, DV = 5, 2, 4, 16, 24
SLOTS = torch.tensor([3, 19, -1, 4, 0, 20, -(1 << 31), 11, (1 << 31) - 1, 12])


def both(monkeypatch, k, v, key, value, slots, *scales):
    """Writes into copies of the same tensors by the kernel and by PyTorch operations; gives both caches with scales."""
    results = []
    for kernel in (True, False):
        copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in scales]
        held = [as_it_lies(x) for x in (key, value)]
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(writing, "by_kernel", lambda key: False)
                patch.setattr(writing, "launch", None)
            flexdecode.write_kv(k, v, *held, slots, *copies)
        results.append([x for x in (*held, *copies) if isinstance(x, torch.Tensor)])
    for x, y in zip(*results, strict=True):
        assert x.isfinite().all() if x.dtype == torch.float32 else True
        assert torch.equal(bits(x), bits(y))
    return results[0]


def as_it_lies(x):
    """A copy with the same strides, or None."""
    return None if x is None else torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x)


def bits(x):
    return x.reshape(-1).view(torch.uint8)


def tokens(num_tokens, dtype=torch.float32, heads=HEADS, D=D, Dv=DV):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(num_tokens, heads, width, generator=generator).to(dtype) for width in (D, Dv)]


def caches(dtype=torch.float32, fill=7.0, heads=HEADS, D=D, Dv=DV):
    return [torch.full((PAGES, heads, SIZE, width), fill).to(dtype) for width in (D, Dv)]


def test_one_tensor_for_keys_and_values_of_a_known_layout():
    """A launch that is prepared looks at addresses only, and sees that two of them are one."""
    (k, v), (key, value) = tokens(3, Dv=D), caches(Dv=D)
    slots = torch.arange(3)
    flexdecode.write_kv(k, v, key, value, slots)
    before = key.clone()
    with pytest.raises(ValueError, match="`value` must have memory of its own, but it shares memory with `key`: leave"):
        flexdecode.write_kv(v, k, key, key, slots)
    assert torch.equal(key, before)


@pytest.mark.parametrize("slot_dtype", [torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("new", [torch.float16, torch.float32], ids=str)
def test_tokens_go_to_their_slots_and_nowhere_else(new, dtype, slot_dtype, monkeypatch):
    k, v = tokens(12, new)  # two rows of padding
    found = both(monkeypatch, k, v, *caches(dtype), SLOTS.to(slot_dtype))
    for new_rows, cache, empty in zip((k, v), found, caches(dtype), strict=True):
        expected = empty.clone()
        for t, slot in enumerate(SLOTS.tolist()):
            if 0 <= slot < PAGES * SIZE:
                expected[slot // SIZE, :, slot % SIZE] = new_rows[t].to(dtype)
        assert torch.equal(cache, expected)


@pytest.mark.parametrize("order", [(0, 1, 2, 3), (0, 2, 1, 3), (1, 0, 2, 3)], ids=["heads", "tokens", "heads first"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_keys_and_values_in_halves_of_one_tensor(dtype, order, monkeypatch):
    """`[num_pages, Hkv, page_size, 2 * D]` in three physical orders, as servers keep it."""
    sizes = [(PAGES, HEADS, SIZE)[i] for i in order[:3]]
    back = [order.index(i) for i in range(4)]
    slots = torch.tensor([3, 19, -1, 4])
    k, v = (x.sign() * 2.0 ** (x * 2).round().clamp(-3, 3) for x in tokens(4, Dv=D))
    scales = {
        torch.int8: (torch.tensor(0.5), 0.25),
        torch.float8_e4m3fn: (torch.tensor([0.5, 2.0]), torch.tensor([2.0])),
    }
    whole = []
    for kernel in (True, False):
        memory = (
            torch.zeros(*sizes, 2 * D, dtype=torch.uint8)
            if dtype.itemsize == 1
            else torch.zeros(*sizes, 2 * D).to(dtype)
        )
        whole.append(memory)
        shown = memory.permute(back).view(dtype) if dtype.itemsize == 1 else memory.permute(back)
        with monkeypatch.context() as patch:
            if not kernel:
                patch.setattr(writing, "by_kernel", lambda key: False)
            flexdecode.write_kv(k, v, shown[..., :D], shown[..., D:], slots, *scales.get(dtype, ()))
    assert torch.equal(bits(whole[0]), bits(whole[1]))
    seen = whole[0].permute(back)
    assert seen[0, :, 3].any() and seen[4, :, 3].any() and seen[1, :, 0].any()
    assert seen[[0, 4, 1], :, [3, 3, 0]].ne(0).sum() == seen.ne(0).sum()


@pytest.mark.parametrize("dtype", [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_scales_of_tokens(dtype, monkeypatch):
    k, v = (x.sign() * 2.0 ** (x * 2).round().clamp(-3, 3) for x in tokens(10))
    most = 127.0 if dtype == torch.int8 else torch.finfo(dtype).max
    k[..., 0], v[..., 0] = most, -2 * most
    wide = torch.full((PAGES, SIZE, HEADS, 2), 3.0)  # scales with strides of their own
    k_scale, v_scale = wide[..., 0].transpose(1, 2), torch.full((PAGES, HEADS, SIZE), 3.0)
    key, _, k_scales, v_scales = both(monkeypatch, k, v, *caches(dtype, 0.0), SLOTS, k_scale, v_scale)
    assert k_scales[0, :, 3].tolist() == [1, 1] and v_scales[0, :, 3].tolist() == [2, 2]
    assert (k_scales == 3).sum() == (PAGES * SIZE - 6) * HEADS
    assert key[0, :, 3].any() and not key[0, :, 1].any()


@pytest.mark.parametrize(("heads", "D", "Dv"), [(1, 1, 1), (3, 72, 40), (5, 17, 33), (8, 128, 128), (1, 576, 512)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_sizes(dtype, heads, D, Dv, monkeypatch):
    k, v = tokens(19, heads=heads, D=D, Dv=Dv)
    scales = (0.02, torch.tensor(0.3)) if dtype == torch.int8 else ()
    slots = torch.randperm(PAGES * SIZE, generator=torch.Generator().manual_seed(1))[:19]
    both(monkeypatch, k, v, *caches(dtype, heads=heads, D=D, Dv=Dv), slots, *scales)


def test_any_strides_of_new_tokens(monkeypatch):
    wide_k, wide_v = tokens(10, D=2 * D, Dv=2 * DV)
    k = wide_k.transpose(0, 1).contiguous().transpose(0, 1)[..., ::2]
    v = wide_v[:, :1, DV:].expand(-1, HEADS, -1)
    both(monkeypatch, k, v, *caches(), SLOTS)
    both(monkeypatch, k, v, *[x.transpose(2, 3).contiguous().transpose(2, 3) for x in caches()], SLOTS)


def test_latents_have_no_values(monkeypatch):
    k, _ = tokens(10, heads=1)
    (key,) = both(monkeypatch, k, None, caches(heads=1)[0], None, SLOTS)
    assert torch.equal(key[0, :, 3], k[0])


@pytest.mark.parametrize("num_tokens", [0, 3])
def test_no_slots_launch_nothing(num_tokens, monkeypatch):
    found = both(monkeypatch, *tokens(num_tokens), *caches(), SLOTS[:0])
    assert all((x == 7).all() for x in found)


# --- Reserved places --------------------------------------------------------------------------------------------------


def filled(dtype, page_size=4, latent=False, **arguments):
    """A cache of three layers or none, with tokens in it, and garbage in all other places."""
    sizes = {"num_kv_heads": HEADS, "head_dim": D, "v_head_dim": D if latent else DV, "latent": latent, "dtype": dtype}
    if page_size is None:
        return KVCache(batch=3, max_kv_len=20, **sizes)
    return PagedKVCache(batch=3, num_pages=60 // page_size, page_size=page_size, **sizes, **arguments)


def by_torch(monkeypatch, call):
    with monkeypatch.context() as patch:
        patch.setattr(writing, "by_kernel", lambda key: False)
        patch.setattr(writing, "launch", None)
        call()


def exact(num_tokens, seed, dtype, latent=False):
    """Tokens that need no rounding, which Triton's interpreter does wrongly for float8."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(3, HEADS, num_tokens, width, generator=generator) for width in (D, DV))
    k, v = (x.sign() * 2.0 ** (x * 2).round().clamp(-3, 3) for x in (k, v))
    for x in (k, v):
        x[..., 0] = 127.0 if dtype == torch.int8 else 448.0 if dtype == torch.float8_e4m3fn else 1.0
    return (k,) if latent else (k, v)


def forms(new, counts):
    """The same tokens in each form that an append of a layer takes."""
    rows = [torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)]) for x in new]
    yield new, {}
    yield rows, {}
    yield [torch.cat([x, torch.full_like(x, 77.0)]) for x in rows], {}


@pytest.mark.parametrize("latent", [False, True])
@pytest.mark.parametrize("page_size", [1, 3, 4, 16])
@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.int8, torch.float8_e4m3fn], ids=str)
def test_layers(dtype, page_size, latent, monkeypatch):
    cache, other = (filled(dtype, page_size, latent, num_layers=3) for _ in range(2))
    for step, counts in enumerate([[5, 0, 2], [1, 1, 1], [0, 4, 0], [0, 0, 0], [1, 0, 3]]):
        for x in (cache, other):
            x.reserve(counts)
        new = exact(5, step, dtype, latent)
        for i, (tokens, more) in enumerate(forms(new, counts)):
            cache.layer(i).append(*tokens, **more)
            by_torch(monkeypatch, lambda i=i: other.layer(i).append(*new))
        if step == 3:
            for x in (cache, other):
                x.fork(0, 2) if not x.lengths[2] else x.truncate(2, 1)
    for name in ("key", "value", "k_scale", "v_scale"):
        own, expected = getattr(cache, name), getattr(other, name)
        assert own is expected is None or torch.equal(bits(own), bits(expected))
    assert torch.equal(bits(cache.key[0]), bits(cache.key[1])) and torch.equal(bits(cache.key[0]), bits(cache.key[2]))


@pytest.mark.parametrize("page_size", [None, 1, 3, 16])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_one_sequence_and_packed_tokens_of_one_layer(dtype, page_size, monkeypatch):
    cache, other = filled(dtype, page_size), filled(dtype, page_size)
    for step, sequence in enumerate([1, 0, 2, 1]):
        k, v = exact(5, step, dtype)
        one = [x[sequence : sequence + 1] for x in (k, v)]
        rows = [x[sequence].transpose(0, 1) for x in (k, v)]
        cache.append(*one, 3, sequence=sequence)
        cache.append(*rows, 1, sequence=sequence)
        cache.append(rows[0][:4], rows[1][:4], [1, 2, 1])
        for given, more in ((one, {"num_tokens": 3}), (rows, {"num_tokens": 1})):
            by_torch(monkeypatch, lambda: other.append(*given, **more, sequence=sequence))
        by_torch(monkeypatch, lambda: other.append(rows[0][:4], rows[1][:4], [1, 2, 1]))
    assert cache.lengths == cache.kv_lens.tolist() == other.lengths
    assert torch.equal(bits(cache.key), bits(other.key)) and torch.equal(bits(cache.value), bits(other.value))


@pytest.mark.parametrize("batch", [1, 2, 7, 64, 65])
def test_many_sequences_find_their_packed_tokens(batch, monkeypatch):
    cache, other = (
        PagedKVCache(
            batch=batch, num_layers=1, num_pages=200, page_size=2, num_kv_heads=1, head_dim=D, dtype=torch.float32
        )
        for _ in range(2)
    )
    counts = torch.randint(0, 4, (batch,), generator=torch.Generator().manual_seed(batch)).tolist()
    k, v = torch.randn(2, sum(counts) + 2, 1, D)
    for x in (cache, other):
        x.reserve(counts)
    cache.layer(0).append(k, v)
    by_torch(monkeypatch, lambda: other.layer(0).append(k, v))
    assert torch.equal(cache.key, other.key) and torch.equal(cache.value, other.value)


@pytest.mark.parametrize("wrong", [-5, 19, 20, 1 << 30, -(1 << 31)])
@pytest.mark.parametrize("packed", [False, True])
def test_whatever_the_device_holds_nothing_is_written_outside(packed, wrong):
    """Keys and values lie in a larger tensor, whose other numbers stay."""
    around, inner = [], []
    for width in (D, DV):
        around.append(torch.full((15 * HEADS * SIZE * width + 4096,), 7.0))
        inner.append(around[-1][2048:-2048].view(15, HEADS, SIZE, width))
    page_table = torch.arange(15, dtype=torch.int32).view(3, 5)
    page_table[0, 4], page_table[1, 4] = -1, 15  # no pages
    starts, ends = (
        torch.tensor([wrong, 0, 3], dtype=torch.int32),
        torch.tensor([1 << 30, wrong, 1 << 30], dtype=torch.int32),
    )
    k, v = (torch.randn(3, HEADS, 25, width) for width in (D, DV))
    if packed:
        k, v = (x.transpose(1, 2).flatten(0, 1) for x in (k, v))
    for totals in ([0, 25, 50, 75], [0, wrong, 50, 75], [wrong, 3, 2, 1], [5, 5, 5, 1 << 30]):
        reserved = writing.Reserved(page_table, starts, ends, torch.tensor(totals, dtype=torch.int32))
        writing.write_reserved(writing.Stored(*inner, None, None), reserved, k, v, lambda: None)
    for memory in around:
        assert (memory[:2048] == 7).all() and (memory[-2048:] == 7).all()


def test_a_replay_without_a_step_writes_nothing_after_a_change(monkeypatch):
    cache = filled(torch.float32, num_layers=1)
    k, v = exact(2, 0, torch.float32)
    cache.reserve([2, 1, 0])
    cache.layer(0).append(k, v)
    cache.fork(0, 2)
    before = cache.key.clone()
    for packed in (False, True):
        rows = [x.transpose(1, 2).flatten(0, 1) for x in (k, v)] if packed else (k, v)
        writing.write_reserved(cache.layer(0)._stored, cache.layer(0)._reserved, *(-x for x in rows), lambda: None)
    assert torch.equal(cache.key, before)
