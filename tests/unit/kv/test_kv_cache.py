"""KV caches on the CPU, by PyTorch operations, against plain lists of tokens. No Triton runs here."""

import copy

import pytest
import torch
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from flexdecode.errors import FlexDecodeError
from flexdecode.kv import cache as cache_module
from flexdecode.kv.kv_cache import KVCache
from flexdecode.kv.paged import OutOfPagesError, PagedKVCache

HEADS, D, DV = 2, 16, 24
QUANTISED = [torch.int8, torch.float8_e4m3fn, torch.float8_e5m2]


def contiguous(batch=3, max_kv_len=20, **arguments):
    sizes = {"num_kv_heads": HEADS, "head_dim": D, "v_head_dim": DV, "dtype": torch.float32}
    return KVCache(batch=batch, max_kv_len=max_kv_len, **(sizes | arguments))


def paged(batch=3, num_pages=10, page_size=4, **arguments):
    sizes = {"num_kv_heads": HEADS, "head_dim": D, "v_head_dim": DV, "dtype": torch.float32}
    return PagedKVCache(batch=batch, num_pages=num_pages, page_size=page_size, **(sizes | arguments))


def new_tokens(num_tokens, batch=3, seed=0, dtype=torch.float32, device="cpu", heads=HEADS, D=D, Dv=DV):
    """Random keys `[batch, heads, num_tokens, D]` and values, the same ones on every device."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch, heads, num_tokens, width, generator=generator).to(dtype) for width in (D, Dv))
    return k.to(device), v.to(device)


def contents(cache, sequence):
    """What a sequence holds: keys `[Hkv, n, D]`, values `[Hkv, n, Dv]`, as they are stored."""
    length = int(cache.kv_lens[sequence])
    if cache.page_table is None:
        return cache.key[sequence, :, :length], cache.value[sequence, :, :length]
    position = torch.arange(length, device=cache.key.device)
    page = cache.page_table[sequence, position // cache.key.shape[2]]
    found = []
    for tensor in (cache.key, cache.value):  # PyTorch 2.9 indexes no float8 on a CPU
        stored = tensor.view(torch.uint8) if tensor.dtype.itemsize == 1 else tensor
        found.append(stored[page, :, position % cache.key.shape[2]].transpose(0, 1).view(tensor.dtype))
    return tuple(found)


def state(cache):
    """Everything that a cache holds, as bytes and numbers."""
    tensors = (cache.key, cache.value, cache.k_scale, cache.v_scale, cache.kv_lens, cache.page_table)
    held = [x.cpu().contiguous().view(torch.uint8) for x in tensors if x is not None]
    return held, list(cache.lengths), getattr(cache, "num_free_pages", None)


def assert_same(cache, other):
    """Two caches, perhaps on different devices, are the same to the last bit, unused places included."""
    (held, *numbers), (other_held, *other_numbers) = state(cache), state(other)
    assert numbers == other_numbers
    for x, y in zip(held, other_held, strict=True):
        assert torch.equal(x, y)


def captured(cache):
    """The cache as it is after a CUDA graph has captured an append of it."""
    cache._captured = True
    return cache


class Model:
    """Sequences as lists of tokens; every token is a key `[Hkv, D]` and a value `[Hkv, Dv]`."""

    def __init__(self, batch=3):
        self.tokens = [[] for _ in range(batch)]

    def append(self, k, v, counts=None):
        for b, tokens in enumerate(self.tokens):
            count = k.shape[2] if counts is None else counts[b]
            tokens += [(k[b, :, t], v[b, :, t]) for t in range(count)]

    def check(self, cache):
        assert cache.lengths == cache.kv_lens.tolist() == [len(tokens) for tokens in self.tokens]
        for sequence, tokens in enumerate(self.tokens):
            for which, held in enumerate(contents(cache, sequence)):
                if tokens:
                    assert torch.equal(held, torch.stack([token[which] for token in tokens], 1))


MAKERS = {
    "contiguous": contiguous,
    "pages of 1": lambda: paged(num_pages=60, page_size=1),
    "pages of 3": lambda: paged(num_pages=20, page_size=3),
    "pages of 16": lambda: paged(num_pages=10, page_size=16),
}
CACHES = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


# --- Tokens -----------------------------------------------------------------------------------------------------------


@CACHES
def test_tokens_come_out_as_they_went_in(make):
    cache, model = make(), Model()
    for step, num_tokens in enumerate([5, 1, 1, 0, 3, 1]):
        k, v = new_tokens(num_tokens, seed=step)
        cache.append(k, v)
        model.append(k, v)
        model.check(cache)


@CACHES
def test_every_sequence_takes_as_many_tokens_as_it_is_told(make):
    cache, model = make(), Model()
    for step, counts in enumerate([[4, 0, 1], [0, 0, 0], [2, 5, 0], (1, 1, 1)]):
        k, v = new_tokens(5, seed=step)
        cache.append(k, v, num_tokens=counts)
        model.append(k, v, counts)
        model.check(cache)


@CACHES
def test_tokens_are_read_with_any_strides(make):
    cache, model = make(), Model()
    wide_k, wide_v = new_tokens(5, D=2 * D, Dv=2 * DV)
    k = wide_k.transpose(1, 2).contiguous().transpose(1, 2)[..., ::2]
    v = wide_v[:, :1, :, DV:].expand(-1, HEADS, -1, -1)
    cache.append(k, v)
    model.append(k, v)
    model.check(cache)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("new", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_tokens_are_rounded_to_the_type_of_the_cache(new, dtype):
    cache = paged(dtype=dtype)
    k, v = new_tokens(6, dtype=new)
    cache.append(k, v)
    for sequence in range(3):
        key, value = contents(cache, sequence)
        assert torch.equal(key, k[sequence].to(dtype)) and torch.equal(value, v[sequence].to(dtype))


@CACHES
def test_truncate_free_and_reset(make):
    cache, model = make(), Model()
    k, v = new_tokens(9)
    cache.append(k, v)
    model.append(k, v)
    cache.truncate(0, 5)
    cache.truncate(2, 8)
    cache.truncate(2, 8)
    cache.free(1)
    model.tokens = [model.tokens[0][:5], [], model.tokens[2][:8]]
    model.check(cache)
    k, v = new_tokens(2, seed=1)
    cache.append(k, v)
    model.append(k, v)
    model.check(cache)
    cache.reset()
    assert cache.lengths == cache.kv_lens.tolist() == [0, 0, 0]
    cache.append(*new_tokens(3))


def test_attributes_of_a_contiguous_cache():
    cache = KVCache(batch=2, num_kv_heads=3, max_kv_len=10, head_dim=16)
    assert cache.key.shape == cache.value.shape == (2, 3, 10, 16)
    assert cache.key.dtype == torch.bfloat16
    assert cache.page_table is None and cache.k_scale is None and cache.v_scale is None
    assert cache.kv_lens.dtype == torch.int32 and cache.kv_lens.shape == (2,)


def test_attributes_of_a_paged_cache():
    cache = paged(max_pages=7, dtype=torch.int8, v_scale=0.5)
    assert cache.key.shape == (10, HEADS, 4, D) and cache.value.shape == (10, HEADS, 4, DV)
    assert cache.page_table.dtype == torch.int32 and cache.page_table.shape == (3, 7)
    assert cache.k_scale.shape == (10, HEADS, 4) and cache.v_scale.tolist() == [0.5, 0.5]
    assert (cache.page_size, cache.num_free_pages) == (4, 10)


def test_kv_lens_and_page_table_stay_where_they_are():
    """A CUDA graph holds their addresses."""
    cache = paged()
    before = cache.kv_lens.data_ptr(), cache.page_table.data_ptr(), cache.key.data_ptr(), cache._limits.data_ptr()
    cache.append(*new_tokens(5), num_tokens=[5, 0, 1])
    cache.fork(0, 1)
    captured(cache).reserve(1)
    cache.truncate(0, 2)
    cache.reset()
    after = cache.kv_lens.data_ptr(), cache.page_table.data_ptr(), cache.key.data_ptr(), cache._limits.data_ptr()
    assert before == after


# --- Pages ------------------------------------------------------------------------------------------------------------


def test_pages_are_taken_when_they_are_needed_and_given_back():
    cache = paged()
    free = []
    for _ in range(5):
        cache.append(*new_tokens(1))
        free.append(cache.num_free_pages)
    assert free == [7, 7, 7, 7, 4]
    cache.truncate(0, 4)
    assert cache.num_free_pages == 5
    cache.truncate(0, 3)
    assert cache.num_free_pages == 5
    cache.free(1)
    cache.free(1)
    assert cache.num_free_pages == 7
    cache.reset()
    assert cache.num_free_pages == 10


def test_a_fork_copies_nothing_until_it_is_written_into():
    cache, model = paged(), Model()
    k, v = new_tokens(6)
    cache.append(k, v, num_tokens=[6, 0, 0])
    stored = cache.key.clone()
    cache.fork(0, 1)
    cache.fork(1, 2)
    assert torch.equal(cache.key, stored) and cache.num_free_pages == 8
    model.append(k, v, [6, 0, 0])
    model.tokens = [list(model.tokens[0]) for _ in range(3)]
    model.check(cache)

    k, v = new_tokens(1, seed=1)
    cache.append(k, v, num_tokens=[0, 1, 0])
    model.append(k, v, [0, 1, 0])
    model.check(cache)
    assert cache.num_free_pages == 7
    first, second = cache.page_table[:, 0].tolist(), cache.page_table[:, 1].tolist()
    assert len(set(first)) == 1 and second[0] == second[2] != second[1]

    k, v = new_tokens(1, seed=2)
    cache.append(k, v)  # 0 gets a copy, 2 is the last owner and keeps the page
    model.append(k, v)
    model.check(cache)
    assert cache.num_free_pages == 6


def test_a_fork_at_the_end_of_a_page_copies_nothing():
    cache = paged()
    cache.append(*new_tokens(4), num_tokens=[4, 0, 0])
    cache.fork(0, 1)
    cache.append(*new_tokens(1), num_tokens=[1, 1, 0])
    assert cache.num_free_pages == 10 - 3


def test_shared_pages_outlive_one_owner():
    cache, model = paged(), Model()
    k, v = new_tokens(6)
    cache.append(k, v, num_tokens=[6, 0, 0])
    cache.fork(0, 1)
    cache.free(0)
    assert cache.num_free_pages == 8
    cache.append(*new_tokens(8, seed=1), num_tokens=[8, 0, 8])
    model.append(k, v, [6, 0, 0])
    key, value = contents(cache, 1)
    assert torch.equal(key, k[0]) and torch.equal(value, v[0])


def test_a_prefix_is_shared_by_a_fork_that_is_cut():
    cache, model = paged(), Model()
    k, v = new_tokens(11)
    cache.append(k, v, num_tokens=[11, 0, 0])
    cache.fork(0, 1)
    cache.truncate(1, 6)
    model.append(k, v, [11, 0, 0])
    model.tokens[1] = model.tokens[0][:6]
    k, v = new_tokens(3, seed=1)
    cache.append(k, v, num_tokens=[0, 3, 0])
    model.append(k, v, [0, 3, 0])
    model.check(cache)
    assert cache.num_free_pages == 10 - 3 - 2


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_scales_are_copied_with_their_page(dtype):
    cache, alone = paged(dtype=dtype), paged(dtype=dtype)
    cache.append(*new_tokens(6), num_tokens=[6, 0, 0])
    cache.fork(0, 1)
    one = new_tokens(1, seed=1)
    cache.append(*one, num_tokens=[1, 1, 0])
    k, v = new_tokens(6)
    alone.append(k[[0, 0, 0]], v[[0, 0, 0]], num_tokens=[6, 6, 0])
    alone.append(*one, num_tokens=[1, 1, 0])
    position = torch.arange(7)
    for sequence in (0, 1):
        for name in ("key", "value", "k_scale", "v_scale"):
            held, expected = (
                getattr(x, name).view(torch.uint8)[x.page_table[sequence, position // 4], :, position % 4]
                for x in (cache, alone)
            )
            assert torch.equal(held, expected)


# --- Room -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["append", "reserve"])
def test_out_of_pages_changes_nothing(call):
    cache = paged(batch=4, num_pages=7)
    cache.append(*new_tokens(9, batch=4), num_tokens=[6, 9, 0, 0])
    cache.fork(0, 2)
    before = state(cache)
    # One copy of a shared page, and one page more for the sequences 1 and 3 each.
    counts = [1, 4, 1, 1]
    message = "3 more pages of 4 tokens are needed, but 2 of 7 are free, and nothing was changed; free()"
    with pytest.raises(OutOfPagesError, match=message.replace("(", r"\(").replace(")", r"\)")):
        if call == "append":
            cache.append(*new_tokens(4, batch=4, seed=1), num_tokens=counts)
        else:
            captured(cache).reserve(counts)
    after = state(cache)
    assert before[1:] == after[1:]
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    cache.append(*new_tokens(4, batch=4, seed=1), num_tokens=[1, 4, 1, 0])
    assert cache.num_free_pages == 0


def test_out_of_pages_is_one_of_our_errors():
    assert issubclass(OutOfPagesError, FlexDecodeError)


@pytest.mark.parametrize(
    ("make", "remedy"), [(lambda: contiguous(max_kv_len=8), "max_kv_len"), (lambda: paged(max_pages=2), "max_pages")]
)
def test_a_sequence_too_long_changes_nothing(make, remedy):
    cache = make()
    cache.append(*new_tokens(7), num_tokens=[1, 7, 0])
    before = state(cache)
    with pytest.raises(ValueError, match=f"sequence 1 has 7 tokens, and 2 more do not fit.*holds 8 tokens.*`{remedy}`"):
        cache.append(*new_tokens(2))
    with pytest.raises(ValueError, match="sequence 1 has 7 tokens, and 5 more do not fit"):
        captured(cache).reserve([1, 5, 0])
    after = state(cache)
    assert before[1:] == after[1:]
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    cache.append(*new_tokens(1))


def test_reserve_takes_pages_and_lengthens_the_host_only():
    cache = paged()
    cache.append(*new_tokens(3))
    captured(cache).reserve([1, 2, 0])
    assert cache.lengths == [4, 5, 3] and cache.num_free_pages == 6
    assert cache.kv_lens.tolist() == [3, 3, 3] and cache._limits.tolist() == [4, 5, 3]
    assert cache.page_table[1, :2].tolist() == cache._pages[1]


def test_truncate_takes_back_what_was_reserved():
    cache = paged()
    cache.append(*new_tokens(3))
    captured(cache).reserve(5)
    cache.truncate(0, 6)
    cache.truncate(1, 2)
    assert cache.kv_lens.tolist() == [3, 2, 3] and cache._limits.tolist() == [6, 2, 8]


@pytest.mark.parametrize("make", [contiguous, paged])
def test_a_reservation_that_nothing_can_take_is_refused(make, monkeypatch):
    """The next append would lengthen the host's sequences a second time, and the device's once."""
    cache, tokens = make(), new_tokens(1)
    cache.append(*tokens)
    before = state(cache)

    def refused(x):
        with pytest.raises(RuntimeError, match=r"no CUDA graph has captured an append of this cache.*num_layers=1"):
            x.reserve(1)

    refused(cache)
    after = state(cache)
    assert before[1:] == after[1:]
    assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
    monkeypatch.setattr(cache_module.Cache, "_capturing", lambda self: True)
    monkeypatch.setattr(cache_module, "append_rows", lambda *given: None)
    cache.append(*tokens)
    monkeypatch.undo()
    cache.reserve(1)
    assert cache.lengths == [2, 2, 2]
    refused(copy.deepcopy(cache))  # no graph writes into it
    refused(make())


# --- Against the model ------------------------------------------------------------------------------------------------


class Operations(RuleBasedStateMachine):
    """Random operations on a cache and on the model."""

    batch = 4

    @initialize(
        page_size=st.sampled_from([None, 1, 3, 4, 16]), num_pages=st.integers(1, 12), max_pages=st.integers(1, 8)
    )
    def start(self, page_size, num_pages, max_pages):
        self.model, self.seed, self.page_size = Model(self.batch), 0, page_size
        if page_size is None:
            self.cache = contiguous(self.batch, max_kv_len=num_pages)
            self.limit = num_pages
        else:
            self.cache = paged(self.batch, num_pages, page_size, max_pages=max_pages)
            self.limit = max_pages * page_size

    @rule(counts=st.lists(st.integers(0, 6), min_size=4, max_size=4))
    def append(self, counts):
        self.seed += 1
        k, v = new_tokens(max(counts), self.batch, self.seed)
        before = state(self.cache)
        too_long = any(len(t) + n > self.limit for t, n in zip(self.model.tokens, counts, strict=True))
        missing = 0 if too_long or self.page_size is None else self.missing_pages(counts)
        try:
            self.cache.append(k, v, num_tokens=counts)
        except (OutOfPagesError, ValueError) as error:
            assert too_long if isinstance(error, ValueError) else missing > 0
            after = state(self.cache)
            assert before[1:] == after[1:]
            assert all(torch.equal(x, y) for x, y in zip(before[0], after[0], strict=True))
        else:
            assert not too_long and missing <= 0
            self.model.append(k, v, counts)

    def missing_pages(self, counts):
        """How many pages too few are free, by counting those that are in use afterwards."""
        pages, size = self.cache._pages, self.page_size
        lengths = [len(t) for t in self.model.tokens]
        kept, written = set(), []
        for b, count in enumerate(counts):
            writes = count > 0 and lengths[b] % size != 0
            kept |= set(pages[b][:-1] if writes else pages[b])
            written += [pages[b][-1]] if writes else []
        # A page that others keep needs a copy for each writer; else one of the writers has the page itself.
        fresh = sum(-(-(n + c) // size) - -(-n // size) for n, c in zip(lengths, counts, strict=True))
        return len(kept) + len(written) + fresh - len(self.cache._owners)

    @rule(sequence=st.integers(0, 3))
    def free(self, sequence):
        self.cache.free(sequence)
        self.model.tokens[sequence] = []

    @rule(sequence=st.integers(0, 3), share=st.floats(0, 1))
    def truncate(self, sequence, share):
        length = int(share * len(self.model.tokens[sequence]))
        self.cache.truncate(sequence, length)
        self.model.tokens[sequence] = self.model.tokens[sequence][:length]

    @precondition(lambda self: self.page_size is not None)
    @rule(pair=st.tuples(st.integers(0, 3), st.integers(0, 3)))
    def fork(self, pair):
        source, target = pair
        if source == target or self.model.tokens[target]:
            with pytest.raises(ValueError, match="`target` must be another, empty sequence"):
                self.cache.fork(source, target)
        else:
            free = self.cache.num_free_pages
            self.cache.fork(source, target)
            assert self.cache.num_free_pages == free
            self.model.tokens[target] = list(self.model.tokens[source])

    @rule()
    def reset(self):
        self.cache.reset()
        self.model.tokens = [[] for _ in range(self.batch)]

    @invariant()
    def cache_is_the_model(self):
        if not hasattr(self, "cache"):
            return
        self.model.check(self.cache)
        if self.page_size is not None:
            used = {page for pages in self.cache._pages for page in pages}
            assert self.cache.num_free_pages == len(set(self.cache._free)) == len(self.cache._owners) - len(used)
            for tokens, pages in zip(self.model.tokens, self.cache._pages, strict=True):
                assert len(pages) == -(-len(tokens) // self.page_size)


TestOperations = Operations.TestCase
TestOperations.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)


# --- Quantisation -----------------------------------------------------------------------------------------------------


def half_step(dtype, magnitude):
    """Half the distance between representable numbers at a magnitude, in units of the scale."""
    if dtype == torch.int8:
        return torch.full_like(magnitude, 0.5)
    mantissa, smallest = (3, 2.0**-6) if dtype == torch.float8_e4m3fn else (2, 2.0**-14)
    return magnitude.clamp(min=smallest).log2().floor().exp2() * 2.0 ** -(mantissa + 1)


def largest(dtype):
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


@pytest.mark.parametrize("make", [contiguous, paged])
@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("new", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_a_scale_for_each_token_and_head(new, dtype, make):
    cache = make(batch=1, dtype=dtype)
    k, v = new_tokens(7, batch=1, dtype=new)
    k[:, 0, 3] = 0
    v[:, 1, 2] *= 1000
    cache.append(k, v)
    scales = cache.k_scale, cache.v_scale
    if make is paged:
        scales = tuple(x[cache._pages[0]].transpose(0, 1).flatten(1, 2) for x in scales)
    for x, stored, scale in zip((k, v), contents(cache, 0), scales, strict=True):
        x, scale = x[0].double(), scale.reshape(HEADS, -1)[:, :7]
        expected = x.abs().amax(-1) / largest(dtype)
        expected = expected.where(expected != 0, 1.0)
        assert torch.equal(scale, (x.abs().amax(-1).float() / largest(dtype)).where(expected != 1.0, 1.0))
        units = x / scale.double()[..., None]
        assert ((stored.double() - units).abs() <= half_step(dtype, units.abs()) * (1 + 1e-5)).all()
        assert (stored.float().abs().amax(-1) == largest(dtype)).sum() == (x != 0).any(-1).sum()
    assert (stored.isnan() if dtype.is_floating_point else stored != stored).sum() == 0


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_static_scales(dtype):
    given = torch.tensor([0.25, 2.0])
    cache = contiguous(dtype=dtype, k_scale=given, v_scale=0.5)
    k, v = new_tokens(4)
    cache.append(k, v)
    assert torch.equal(cache.k_scale, given) and cache.v_scale.tolist() == [0.5, 0.5]
    for x, stored, scale in ((k, cache.key, given), (v, cache.value, torch.tensor([0.5, 0.5]))):
        units = x / scale[:, None, None]
        difference = (stored[:, :, :4].float() - units).abs()
        assert (difference <= half_step(dtype, units.abs()) * (1 + 1e-5)).all() and difference.any()
        assert not stored[:, :, 4:].view(torch.uint8).any()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_what_is_too_large_for_a_static_scale_saturates(dtype):
    cache = contiguous(batch=1, dtype=dtype, k_scale=1.0, v_scale=1.0)
    k, v = new_tokens(1, batch=1)
    most = largest(dtype)
    k[0, 0, 0, :6] = torch.tensor([most, most * 1.4, -most * 2, 1e30, torch.inf, -torch.inf])
    cache.append(k, v)
    assert cache.key[0, 0, 0, :6].float().tolist() == [most, most, -most, most, most, -most]


def test_int8_rounds_ties_to_even():
    cache = contiguous(batch=1, dtype=torch.int8, k_scale=0.5, v_scale=1.0)
    k, v = new_tokens(1, batch=1)
    k[0, 0, 0, :8] = torch.tensor([0.5, 1.5, 2.5, -0.5, -1.5, -2.5, 0.49, 126.5]) * 0.5
    cache.append(k, v)
    assert cache.key[0, 0, 0, :8].tolist() == [0, 2, 2, 0, -2, -2, 0, 126]


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, -torch.inf])
def test_a_row_that_is_not_finite_stays_not_finite(wrong, dtype):
    cache = contiguous(batch=1, dtype=dtype)
    k, v = new_tokens(2, batch=1)
    k[0, 1, 1, 3] = wrong
    cache.append(k, v)
    assert cache.k_scale[0, :, :2].isnan().tolist() == [[False, False], [False, True]]
    assert cache.v_scale.isfinite().all()


@pytest.mark.parametrize("dtype", QUANTISED, ids=str)
def test_the_smallest_rows_have_a_scale_that_divides(dtype):
    cache = contiguous(batch=1, dtype=dtype)
    k, v = new_tokens(1, batch=1)
    cache.append(k * 1e-45, v * 1e-38)
    for stored, scale in ((cache.key, cache.k_scale), (cache.value, cache.v_scale)):
        restored = stored.float() * scale[..., None]
        assert restored.isfinite().all() and (scale > 0).all() and restored.abs().max() < 1e-37


# --- Wrong arguments --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "`batch` must be an integer of at least 1, got 0"),
        ({"num_kv_heads": 2.0}, "`num_kv_heads` must be an integer of at least 1, got 2.0"),
        ({"page_size": 0}, "`page_size` must be an integer of at least 1, got 0"),
        ({"num_pages": -1}, "`num_pages` must be an integer of at least 1, got -1"),
        ({"max_pages": 0}, "`max_pages` must be an integer of at least 1, got 0"),
        ({"max_pages": 1 << 28}, "must have fewer than 1073741824 tokens, got room for 1073741824"),
        ({"head_dim": 0}, "`head_dim` must be an integer between 1 and 1024, got 0"),
        ({"v_head_dim": 1025}, "`v_head_dim` must be an integer between 1 and 1024, got 1025"),
        ({"dtype": torch.float64}, "`dtype` must be one of float16, .*, int8, got torch.float64"),
        ({"k_scale": 1.0}, "`k_scale` is for caches in float8 or int8, but `dtype` is torch.float32"),
        ({"dtype": torch.int8, "k_scale": 0.0}, "`k_scale` must be positive and finite, got 0.0"),
        ({"dtype": torch.int8, "v_scale": "one"}, "`v_scale` must be positive and finite, got one"),
        ({"dtype": torch.int8, "v_scale": torch.tensor([1.0, torch.nan])}, "`v_scale` must be positive and finite"),
        (
            {"dtype": torch.int8, "v_scale": torch.ones(3)},
            r"`v_scale` must be a number or a float32 tensor \[Hkv\] = \[2\], got torch.float32 \[3\]",
        ),
    ],
)
def test_impossible_caches(change, message):
    with pytest.raises(ValueError, match=message):
        paged(**change)


def test_arguments_are_named():
    with pytest.raises(TypeError):
        KVCache(2, 3, 10, 16)


@pytest.mark.parametrize(
    ("change", "kind", "message"),
    [
        ({"k": [1.0]}, TypeError, "`k` must be a torch.Tensor, got list"),
        ({"k": torch.ones(3, HEADS, 2)}, ValueError, r"`k` must have shape \[T, Hkv, D\] = \[T, 2, 16\], got"),
        ({"v": torch.ones(3, HEADS, 2, D)}, ValueError, r"`v` must have shape \[B, Hkv, T, Dv\] = \[3, 2, T, 24\]"),
        ({"v": torch.ones(3, HEADS, 1, DV)}, ValueError, "`v` must have as many tokens as `k`, T = 2, got 1"),
        ({"k": torch.ones(2, HEADS, 2, D)}, ValueError, r"got \[2, 2, 2, 16\]"),
        ({"k": torch.ones(3, HEADS, 2, D).double()}, ValueError, "`k` must be float16, .* got torch.float64"),
        ({"k": torch.ones(3, HEADS, 2, D, device="meta")}, ValueError, "`k` must be a dense tensor on cpu, got.*meta"),
        ({"v": torch.ones(3, HEADS, 2, DV, requires_grad=True)}, ValueError, "`v` requires grad"),
        ({"num_tokens": 1.0}, TypeError, "`num_tokens` must be an integer or a list of 3, got float"),
        ({"num_tokens": torch.ones(3)}, TypeError, "`num_tokens` must be an integer or a list of 3, got Tensor"),
        ({"num_tokens": [1, 2]}, ValueError, r"`num_tokens` must have B = 3 integers of at least 0, got \[1, 2\]"),
        ({"num_tokens": [1, -1, 0]}, ValueError, "integers of at least 0"),
        ({"num_tokens": [1, True, 0]}, ValueError, "integers of at least 0"),
        ({"num_tokens": [1, 3, 0]}, ValueError, r"`num_tokens` must be at most T = 2 \(from k\), got \[1, 3, 0\]"),
    ],
)
def test_impossible_appends_change_nothing(change, kind, message):
    cache = paged()
    k, v = new_tokens(2)
    with pytest.raises(kind, match=message):
        cache.append(**({"k": k, "v": v} | change))
    assert_same(cache, paged())


def test_impossible_sequences_and_lengths():
    cache = paged()
    cache.append(*new_tokens(2))
    for call in (lambda: cache.free(3), lambda: cache.truncate(-1, 0), lambda: cache.fork(3, 0)):
        with pytest.raises(ValueError, match="must be between 0 and B - 1 = 2, got"):
            call()
    for length in (3, -1, 1.0):
        with pytest.raises(ValueError, match="`length` must be between 0 and 2, the length of sequence 1, got"):
            cache.truncate(1, length)
    with pytest.raises(ValueError, match=r"sequence 1 has 2 tokens: free\(1\) first"):
        cache.fork(0, 1)
    with pytest.raises(ValueError, match="sequence 1 is `source`"):
        cache.fork(1, 1)
    with pytest.raises(TypeError, match="`num_tokens` must be an integer or a list of 3, got NoneType"):
        captured(cache).reserve(None)
    with pytest.raises(ValueError, match="integers of at least 0, got -1"):
        captured(cache).reserve(-1)


def test_what_a_graph_cannot_record_is_refused(monkeypatch):
    cache = paged()
    monkeypatch.setattr(cache_module.Cache, "_capturing", lambda self: True)
    calls = {
        "reserve": lambda: cache.reserve(1),
        "truncate": lambda: cache.truncate(0, 0),
        "free": lambda: cache.free(0),
        "reset": cache.reset,
        "fork": lambda: cache.fork(0, 1),
    }
    for name, call in calls.items():
        with pytest.raises(RuntimeError, match=f"^{'truncate' if name == 'free' else name}.. works on the host"):
            call()
    with pytest.raises(ValueError, match=r"give it to `reserve\(\)` before each replay"):
        cache.append(*new_tokens(1), num_tokens=[1, 1, 1])


def test_repr():
    sizes = {"num_kv_heads": 2, "head_dim": 16}
    tokens = torch.zeros(2, 2, 5, 16)
    cache = KVCache(batch=2, max_kv_len=12, **sizes)
    cache.append(tokens, tokens, num_tokens=[5, 3])
    assert repr(cache) == "<KVCache: bfloat16 on cpu, 0.0 MB, lengths [5, 3], up to 12 each>"
    pages = PagedKVCache(batch=2, num_pages=6, page_size=4, dtype=torch.int8, **sizes)
    pages.append(tokens, tokens, num_tokens=[5, 3])
    assert repr(pages) == "<PagedKVCache: int8 on cpu, 0.0 MB, lengths [5, 3], 3 of 6 pages free>"
    many = PagedKVCache(batch=9, num_pages=20, page_size=4, **sizes)
    assert repr(many) == "<PagedKVCache: bfloat16 on cpu, 0.0 MB, 9 sequences with 0 tokens, 20 of 20 pages free>"
