"""Caches with layers, and appends of one sequence and of packed tokens, on the CPU, against plain lists of tokens."""

import copy
import gc
import random
import weakref

import pytest
import torch
from unit.kv.test_kv_cache import DV, HEADS, D, Model, assert_same, contents, contiguous, new_tokens, paged

import flexdecode
from flexdecode import KVCache, OutOfPagesError, PagedKVCache, flex_decode
from flexdecode.kv import cache as cache_module
from flexdecode.reference import reference_decode

LAYERS = 3


def pool(**arguments):
    return paged(**({"num_layers": LAYERS} | arguments))


def packed(x, counts):
    """Tokens `[B, Hkv, T, D]` as `[sum of counts, Hkv, D]`."""
    return torch.cat([x[b, :, :n].transpose(0, 1) for b, n in enumerate(counts)])


def append_to_all(cache, models, counts, seed, form="batch"):
    """One step of a model; the layers get different tokens."""
    cache.reserve(counts)
    for i, model in enumerate(models):
        k, v = new_tokens(max(*counts, 1), batch=cache.batch, seed=LAYERS * seed + i)
        model.append(k, v, counts)
        if form == "packed":
            k, v = packed(k, counts), packed(v, counts)
        cache.layer(i).append(k, v)


def append_to_all_of(cache, num_tokens):
    cache.reserve(num_tokens)
    for i in range(LAYERS):
        cache.layer(i).append(*new_tokens(num_tokens, Dv=cache.value.shape[-1]))


# --- Layers -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["batch", "packed"])
def test_every_layer_keeps_its_own_tokens(form):
    cache, models = pool(num_pages=20), [Model() for _ in range(LAYERS)]
    for step, counts in enumerate([[5, 0, 2], [1, 1, 1], [0, 4, 0], [0, 0, 0], [1, 3, 1]]):
        append_to_all(cache, models, counts, step, form)
        assert cache.cu_seqlens_q.tolist() == [0, *torch.tensor(counts).cumsum(0).tolist()]
        for i, model in enumerate(models):
            model.check(cache.layer(i))


@pytest.mark.parametrize("seed", range(8))
def test_any_order_of_changes(seed):
    """Layers against lists, and the books of pages against those of a cache of one layer."""
    chosen = random.Random(seed)
    size, batch, num_pages = chosen.choice([1, 3, 4, 16]), chosen.choice([1, 3, 5]), chosen.choice([6, 12])
    cache = pool(batch=batch, num_pages=num_pages, page_size=size, max_pages=6)
    single = paged(batch=batch, num_pages=num_pages, page_size=size, max_pages=6)
    models = [Model(batch) for _ in range(LAYERS)]
    for step in range(40):
        sequence, other = chosen.randrange(batch), chosen.randrange(batch)
        does = chosen.choice(["append"] * 3 + ["fork", "truncate", "free", "free" if step % 9 else "reset"])
        if does == "append":
            counts = [chosen.choice([0, 1, 1, 2, size]) for _ in range(batch)]
            k, v = new_tokens(max(*counts, 1), batch=batch)
            try:
                single.append(k, v, counts)
            except (ValueError, OutOfPagesError) as error:
                before = cache.lengths, cache.num_free_pages, cache.kv_lens.tolist()
                with pytest.raises(type(error)):
                    cache.reserve(counts)
                assert before == (cache.lengths, cache.num_free_pages, cache.kv_lens.tolist())
            else:
                append_to_all(cache, models, counts, step, chosen.choice(["batch", "packed"]))
        elif does == "fork" and sequence != other:
            for x in (cache, single):
                x.free(other)
                x.fork(sequence, other)
            for model in models:
                model.tokens[other] = list(model.tokens[sequence])
        elif does == "truncate":
            length = chosen.randint(0, cache.lengths[sequence])
            for x in (cache, single):
                x.truncate(sequence, length)
            for model in models:
                model.tokens[sequence] = model.tokens[sequence][:length]
        elif does == "free":
            for x in (cache, single):
                x.free(sequence)
            for model in models:
                model.tokens[sequence] = []
        elif does == "reset":
            cache.reset(), single.reset()
            models = [Model(batch) for _ in range(LAYERS)]
        assert (cache._pages, cache._owners, cache.lengths) == (single._pages, single._owners, single.lengths)
        for i, model in enumerate(models):
            model.check(cache.layer(i))


@pytest.mark.parametrize("dtype", [torch.float16, torch.int8, torch.float8_e5m2], ids=str)
@pytest.mark.parametrize("scales", [{}, {"k_scale": 0.1, "v_scale": torch.tensor([0.2, 0.3])}], ids=["tokens", "heads"])
def test_a_layer_holds_what_a_cache_of_one_layer_holds(dtype, scales):
    scales = scales if dtype.itemsize == 1 else {}
    cache, single = pool(dtype=dtype, **scales), paged(dtype=dtype, **scales)
    for counts in ([5, 0, 2], [1, 1, 1]):
        k, v = new_tokens(5)
        single.append(k, v, counts)
        cache.reserve(counts)
        cache.layer(1).append(k, v)
    single.fork(2, 1) if not single.lengths[1] else None
    layer = cache.layer(1)
    for name in ("key", "value", "k_scale", "v_scale", "page_table", "kv_lens"):
        own, other = getattr(layer, name), getattr(single, name)
        assert own is other is None or torch.equal(own.float(), other.float())
    assert not cache.layer(0).key.float().any() and not cache.layer(2).value.float().any()
    query = torch.randn(3, 4, 1, D)
    assert torch.equal(flex_decode(query, cache=layer), flex_decode(query, cache=single))
    assert torch.equal(reference_decode(query, cache=layer), reference_decode(query, cache=single))


def test_scales_of_each_layer():
    given = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])
    cache = pool(dtype=torch.int8, k_scale=given, v_scale=0.5)
    assert [cache.layer(i).k_scale.tolist() for i in range(3)] == given.tolist()
    assert cache.layer(2).v_scale.tolist() == [0.5, 0.5]
    with pytest.raises(ValueError, match=r"float32 tensor \[Hkv\] = \[2\] or \[num_layers, Hkv\] = \[3, 2\], got"):
        pool(dtype=torch.int8, k_scale=torch.ones(2, 2))


def test_attributes():
    cache = pool(dtype=torch.int8, batch=2)
    assert cache.key.shape == (LAYERS, 10, HEADS, 4, D) and cache.value.shape == (LAYERS, 10, HEADS, 4, DV)
    assert cache.k_scale.shape == (LAYERS, 10, HEADS, 4)
    layer = cache.layer(2)
    assert layer is cache.layer(2) and isinstance(layer, flexdecode.CacheLayer) and layer.index == 2
    assert layer.key.data_ptr() == cache.key[2].data_ptr() and layer.kv_lens is cache.kv_lens
    assert layer.page_table is cache.page_table and layer.lengths == [0, 0]
    for x in (cache, layer):
        assert (x.device, x.dtype, x.batch) == (torch.device("cpu"), torch.int8, 2)
    assert repr(cache) == "<PagedKVCache: 3 layers, int8 on cpu, 0.0 MB, lengths [0, 0], 10 of 10 pages free>"
    assert repr(layer) == "<CacheLayer 2: int8 on cpu, lengths [0, 0]>"
    large = PagedKVCache(batch=1, num_layers=2, num_kv_heads=4, head_dim=64, num_pages=50, page_size=16)
    assert "2 layers, bfloat16 on cpu, 1.6 MB," in repr(large)


def test_the_tensors_stay_where_they_are():
    """A CUDA graph holds their addresses."""
    cache = pool()
    before = [x.data_ptr() for x in (cache.kv_lens, cache.page_table, cache.cu_seqlens_q, cache.layer(1).key)]
    append_to_all(cache, [Model()] * LAYERS, [5, 0, 1], 0)
    cache.fork(0, 1)
    cache.reserve(1)
    cache.truncate(0, 2)
    cache.reset()
    assert before == [x.data_ptr() for x in (cache.kv_lens, cache.page_table, cache.cu_seqlens_q, cache.layer(1).key)]


def test_an_append_again_writes_the_same_places():
    cache, models = pool(), [Model() for _ in range(LAYERS)]
    append_to_all(cache, models, [2, 1, 0], 0)
    k, v = new_tokens(2, seed=7)
    cache.layer(0).append(k, v)
    model = Model()
    model.append(k, v, [2, 1, 0])
    model.check(cache.layer(0))
    models[1].check(cache.layer(1))


def test_a_step_of_one_sequence():
    cache, models = pool(), [Model() for _ in range(LAYERS)]
    append_to_all(cache, models, [1, 2, 3], 0)
    for form in ("sequence", "packed", "packed sequence", "batch"):
        cache.reserve(3, sequence=1)
        for i, model in enumerate(models):
            k, v = new_tokens(3, seed=i)
            model.append(k, v, [0, 3, 0])
            rows = [x[1].transpose(0, 1) for x in (k, v)]
            if form == "sequence":
                cache.layer(i).append(k[1:2], v[1:2], sequence=1)
            elif form == "batch":
                cache.layer(i).append(k, v)
            else:
                cache.layer(i).append(*rows, sequence=1 if form == "packed sequence" else None)
            model.check(cache.layer(i))


def test_sequences_of_a_step_one_after_another():
    cache, model = pool(), Model()
    k, v = new_tokens(4)
    cache.reserve([4, 1, 2])
    for b in (2, 0, 1):
        cache.layer(0).append(k[b : b + 1], v[b : b + 1], sequence=b)
    model.append(k, v, [4, 1, 2])
    model.check(cache.layer(0))


def test_rows_beyond_the_packed_tokens_are_ignored():
    cache, model = pool(), Model()
    k, v = new_tokens(4)
    counts = [1, 0, 3]
    cache.reserve(counts)
    rest = torch.full((5, HEADS, D), torch.nan), torch.full((5, HEADS, DV), torch.nan)
    cache.layer(0).append(torch.cat([packed(k, counts), rest[0]]), torch.cat([packed(v, counts), rest[1]]))
    model.append(k, v, counts)
    model.check(cache.layer(0))
    assert cache.key.isfinite().all()


def test_packed_queries_of_a_step():
    cache, model = pool(), Model()
    counts = [4, 1, 2]
    append_to_all(cache, [model, model, model], counts, 0)
    query = torch.randn(7, 4, D)
    out = flex_decode(query, cache=cache.layer(0), mask_mod=flexdecode.mods.causal(), cu_seqlens_q=cache.cu_seqlens_q)
    assert out.shape == (7, 4, DV)


def test_a_pool_is_freed_with_its_last_reference():
    cache = pool()
    layer, gone = cache.layer(0), weakref.ref(cache)
    gc.disable()
    try:
        del cache
        assert gone() is None
        assert layer.key.shape == (10, HEADS, 4, D)
    finally:
        gc.enable()


def test_what_takes_a_cache_takes_a_layer():
    cache = pool(dtype=torch.float16, head_dim=16, v_head_dim=16)
    append_to_all_of(cache, 5)
    query, layer = torch.randn(3, 4, 1, D).half(), cache.layer(1)
    report = flexdecode.explain(query, cache=layer, mask_mod=flexdecode.mods.causal(), device="H200")
    assert "key [10, 2, 4, 16]" in str(report) and report.share_of_bytes == 1.0
    flexdecode.warmup(query, cache=layer)
    with pytest.raises(TypeError, match="`key` is a CacheLayer: pass it as `cache=`, without `key` and `value`"):
        flex_decode(query, layer)


# --- Errors -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("index", [-1, 3, 10**30])
def test_layers_that_there_are_not(index):
    with pytest.raises(ValueError, match=r"`index` must be between 0 and num_layers - 1 = 2, got "):
        pool().layer(index)


@pytest.mark.parametrize("index", [True, 1.0, None, torch.tensor(0)])
def test_numbers_of_layers_that_are_none(index):
    with pytest.raises(TypeError, match="`index` must be an integer, got "):
        pool().layer(index)


def test_what_a_pool_does_not_do_itself():
    cache, (k, v) = pool(), new_tokens(2)
    with pytest.raises(ValueError, match=r"`cache` has 3 layers: pass one of them, `cache=cache.layer\(i\)`"):
        flex_decode(torch.zeros(3, 4, 1, D), cache=cache)
    with pytest.raises(ValueError, match=r"`cache` has 3 layers: pass one of them, `cache=cache.layer\(i\)`"):
        reference_decode(torch.zeros(3, 4, 1, D), cache=cache)
    with pytest.raises(
        ValueError, match=r"this cache has layers: call reserve\(\) once for each step, and then append"
    ):
        cache.append(k, v)
    with pytest.raises(ValueError, match="this cache is its only layer itself: make it with `num_layers`"):
        paged().layer(0)
    with pytest.raises(RuntimeError, match="a cache of one layer has no `cu_seqlens_q`"):
        _ = paged().cu_seqlens_q
    with pytest.raises(ValueError, match="`num_layers` must be an integer of at least 1, got 0"):
        pool(num_layers=0)


@pytest.mark.parametrize("end", ["new", "fork", "truncate", "free", "reset", "no pages", "too long", "wrong number"])
def test_an_append_without_a_step(end):
    cache, (k, v) = pool(), new_tokens(2)
    if end != "new":
        cache.reserve([2, 0, 2])
        cache.layer(0).append(k, v)
        does = {
            "fork": lambda: cache.fork(0, 1), "truncate": lambda: cache.truncate(0, 1), "free": lambda: cache.free(2),
            "reset": cache.reset,
        }  # fmt: skip
        if end in does:
            does[end]()
        else:
            counts = {"no pages": 15, "too long": 99, "wrong number": -1}[end]
            with pytest.raises((ValueError, OutOfPagesError)):
                cache.reserve(counts)
    before = cache.key.clone()
    with pytest.raises(RuntimeError, match=r"nothing is reserved: call reserve\(\) of the cache once for each step"):
        cache.layer(0).append(k, v)
    assert torch.equal(cache.key, before)
    assert torch.equal(cache._step.starts, cache._step.ends)  # a replay of a graph writes nothing, either


WRONG = {
    "few": ([3, 0, 0], {}, "`k` has T = 2 tokens, but a sequence takes 3"),
    "few packed": ([3, 0, 0], {"form": "packed"}, "`k` has T = 2 tokens, but the sequences take together 3"),
    "few of one": ([0, 3, 0], {"form": "one", "sequence": 1}, "`k` has T = 2 tokens, but sequence 1 takes 3"),
    "nothing of one": (
        [0, 1, 1],
        {"form": "one", "sequence": 0},
        "`k` has T = 2 tokens for sequence 0, but nothing is reserved for it in this step",
    ),
    "sequence": ([1, 1, 1], {"form": "one", "sequence": 3}, "`sequence` must be between 0 and B - 1 = 2, got 3"),
    "bool": ([1, 1, 1], {"form": "one", "sequence": True}, "`sequence` must be between 0 and B - 1 = 2, got True"),
    "batch": (
        [1, 1, 1],
        {"form": "one"},
        r"`k` must have shape \[B, Hkv, T, D\] = \[3, 2, T, 16\], got \[1, 2,",
    ),
    "all of one": ([1, 1, 1], {"sequence": 0}, r"`k` must have shape \[B, Hkv, T, D\] = \[1, 2, T, 16\], got \[3, 2,"),
}


@pytest.mark.parametrize(("counts", "given", "message"), WRONG.values(), ids=WRONG)
def test_new_tokens_that_do_not_match_a_step(counts, given, message):
    cache = pool()
    k, v = new_tokens(2)
    form, given = given.get("form"), {name: x for name, x in given.items() if name != "form"}
    if form == "packed":
        k, v = (x[0].transpose(0, 1) for x in (k, v))
    elif form == "one":
        k, v = k[:1], v[:1]
    cache.reserve(counts)
    with pytest.raises(ValueError, match=message):
        cache.layer(0).append(k, v, **given)
    assert not cache.key.any() and not cache.value.any()


def test_a_reservation_that_does_not_fit_changes_nothing():
    cache = pool(num_pages=3)
    cache.reserve([4, 4, 0])
    for counts, kind in (([1, 1, 0], OutOfPagesError), ([99, 0, 0], ValueError), ([1, -1, 0], ValueError)):
        with pytest.raises(kind):
            cache.reserve(counts)
        assert cache.lengths == cache.kv_lens.tolist() == [4, 4, 0] and cache.num_free_pages == 1
    with pytest.raises(ValueError, match="`num_tokens` of one sequence must be an integer of at least 0, got"):
        cache.reserve([1, 1, 1], sequence=1)


# --- One sequence, and packed tokens, of caches of one layer ----------------------------------------------------------


@pytest.mark.parametrize("make", [contiguous, paged])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_one_sequence(make, dtype):
    cache, other = make(dtype=dtype), make(dtype=dtype)
    for step, (sequence, count) in enumerate([(1, 5), (0, 2), (1, 1), (2, 3)]):
        k, v = new_tokens(5, seed=step)
        counts = [count if b == sequence else 0 for b in range(3)]
        other.append(k, v, counts)
        one = [x[sequence : sequence + 1] for x in (k, v)]
        if step % 2:
            one = [x[0].transpose(0, 1) for x in one]
        cache.append(*one, num_tokens=count, sequence=sequence)
        assert_same(cache, other)
    cache.append(*new_tokens(1)), other.append(*new_tokens(1))
    assert_same(cache, other)


@pytest.mark.parametrize("make", [contiguous, paged])
def test_packed_tokens(make):
    cache, other = make(), make()
    for step, counts in enumerate([[5, 0, 2], [1, 1, 1], [0, 0, 0], [0, 3, 0]]):
        k, v = new_tokens(5, seed=step)
        other.append(k, v, counts)
        cache.append(packed(k, counts), packed(v, counts), counts)
        assert_same(cache, other)
    cache.append(*(x[0].transpose(0, 1) for x in new_tokens(3)), num_tokens=1)
    assert cache.lengths == [7, 5, 4]


@pytest.mark.parametrize("make", [contiguous, paged])
def test_appends_of_these_forms_that_are_refused(make, monkeypatch):
    cache, (k, v) = make(), new_tokens(2)
    rows = [x[0].transpose(0, 1) for x in (k, v)]
    for call, kind, message in (
        (lambda: cache.append(*rows), ValueError, "packed tokens need `num_tokens`: how many of the T tokens each"),
        (lambda: cache.append(*rows, [1, 1, 1]), ValueError, "`k` has T = 2 tokens, but the sequences take together 3"),
        (lambda: cache.append(*rows, 3, sequence=0), ValueError, "`k` has T = 2 tokens, but sequence 0 takes 3"),
        (lambda: cache.append(k, v, sequence=0), ValueError, r"`k` must have shape .* = \[1, 2, T, 16\], got \[3, 2,"),
        (lambda: cache.append(*rows, [1, 0, 0], sequence=0), ValueError, "`num_tokens` of one sequence must be an"),
        (lambda: cache.append(*rows, sequence=-1), ValueError, "`sequence` must be between 0 and B - 1 = 2, got -1"),
        (lambda: cache.append(rows[0], None, 1, sequence=0), TypeError, "`v` must be a torch.Tensor, got NoneType"),
    ):
        with pytest.raises(kind, match=message):
            call()
        assert cache.lengths == cache.kv_lens.tolist() == [0, 0, 0] and not cache.key.any()
    monkeypatch.setattr(cache_module.Cache, "_capturing", lambda self: True)
    with pytest.raises(ValueError, match=r"a CUDA graph records an append of \[B, Hkv, T, D\] only; in PagedKVCache"):
        cache.append(*rows, sequence=0)


# --- Slots ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_slots_only_write(dtype):
    cache, layers = paged(dtype=dtype), pool(dtype=dtype)
    k, v = (x[0].transpose(0, 1) for x in new_tokens(5))
    slots = torch.tensor([9, -1, 2, 40, 39])
    cache.append(k, v, slot_mapping=slots)
    layers.layer(1).append(k, v, slot_mapping=slots)
    for x in (cache, layers.layer(1)):
        assert x.lengths == x.kv_lens.tolist() == [0, 0, 0]
        written = x.key.ne(0).any(-1).any(1).nonzero().tolist()
        assert written == [[0, 2], [2, 1], [9, 3]]
    assert torch.equal(cache.key, layers.layer(1).key) and torch.equal(cache.value, layers.layer(1).value)
    assert not layers.layer(0).key.any()
    for x in (cache, layers.layer(0)):
        with pytest.raises(ValueError, match="`slot_mapping` says where each token goes: leave out `sequence`"):
            x.append(k, v, slot_mapping=slots, sequence=1)
        with pytest.raises(ValueError, match="`slot_mapping` must have at most T = 5 entries"):
            x.append(k, v, slot_mapping=torch.arange(6))
    with pytest.raises(ValueError, match="leave out `sequence` and `num_tokens`"):
        cache.append(k, v, 1, slot_mapping=slots)


# --- Latents ----------------------------------------------------------------------------------------------------------

LATENT = {"num_kv_heads": 1, "head_dim": 24, "v_head_dim": 16, "latent": True}


@pytest.mark.parametrize("make", [contiguous, paged, pool])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int8], ids=str)
def test_latents(make, dtype):
    cache = make(**LATENT, dtype=dtype)
    layer = cache if make is not pool else cache.layer(1)
    k, _ = new_tokens(5, heads=1, D=24)
    if make is pool:
        cache.reserve([5, 1, 3])
        layer.append(k)
    else:
        cache.append(k, num_tokens=[5, 1, 3])
    assert layer.value.data_ptr() == layer.key.data_ptr() and layer.value.shape[-1] == 16
    assert layer.v_scale is layer.k_scale
    query = torch.randn(3, 4, 1, 24)
    out = flex_decode(query, cache=layer, scale=0.2)
    expected = reference_decode(query, k, k[..., :16], kv_lens=torch.tensor([5, 1, 3]), scale=0.2)
    assert torch.allclose(out.double(), expected, atol=0.05 if dtype == torch.int8 else 1e-5)
    with pytest.raises(ValueError, match="`v` must be left out: the values of this cache are the first columns"):
        layer.append(k, k[..., :16])
    if make is paged:
        cache.fork(0, 1) if not cache.lengths[1] else cache.free(1)
        cache.fork(0, 1)
        cache.append(k[:, :, :1])
        held = contents(cache, 1)
        assert torch.equal(held[1], held[0][..., :16])


def test_latents_that_cannot_be():
    with pytest.raises(ValueError, match=r"with `latent`, values are the first of D = 24 columns of keys: there is"):
        paged(**(LATENT | {"v_head_dim": 25}))
    with pytest.raises(ValueError, match="there is no `v_scale`, because `k_scale` is that of both"):
        paged(**LATENT, dtype=torch.int8, k_scale=1.0, v_scale=1.0)


# --- Copies -----------------------------------------------------------------------------------------------------------


MAKERS = {
    "contiguous": lambda: contiguous(dtype=torch.int8), "pages": paged, "layers": pool,
    "latents": lambda: paged(**LATENT), "layers of latents": lambda: pool(**LATENT),
}  # fmt: skip


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("way", ["deepcopy", "to"])
def test_a_copy_has_books_of_its_own(kind, way, monkeypatch):
    cache = MAKERS[kind]()
    layers = cache.num_layers is not None
    new = (new_tokens(3, heads=1, D=24)[:1]) if "latents" in kind else new_tokens(3)

    def append(cache, counts):
        if layers:
            cache.reserve(counts)
            cache.layer(2).append(*new)
        else:
            cache.append(*new, num_tokens=counts)

    append(cache, [3, 0, 1])
    if way == "to":
        assert cache.to("cpu") is cache and cache.to(torch.device("cpu")) is cache
        monkeypatch.setattr(type(cache), "device", property(lambda self: torch.device("meta")))
        copied = cache.to("cpu")
        monkeypatch.undo()
    else:
        copied = copy.deepcopy(cache)
    assert_same(cache, copied)
    before = [x.clone() for x in (cache.key, cache.value, cache.kv_lens)]
    append(copied, [1, 3, 0])
    copied.truncate(0, 2)
    assert cache.lengths == [3, 0, 1] and copied.lengths == copied.kv_lens.tolist() == [2, 3, 1]
    assert all(torch.equal(x, y) for x, y in zip(before, (cache.key, cache.value, cache.kv_lens), strict=True))
    if layers:
        assert copied.layer(2) is copied.layer(2) is not cache.layer(2)
        assert copied.layer(2).kv_lens is copied.kv_lens and copied.layer(2).lengths == [2, 3, 1]
        assert copied.layer(2).key.data_ptr() == copied.key[2].data_ptr()
    if "latents" in kind:
        assert copied.value.data_ptr() == copied.key.data_ptr() != cache.key.data_ptr()


def test_a_cache_of_another_device():
    moved = paged().to("meta")
    assert moved.device == torch.device("meta") and isinstance(moved, PagedKVCache)
    assert isinstance(contiguous().to("meta"), KVCache)
