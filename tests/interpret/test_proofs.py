"""Loads that are proven in range: right results, and no read of what lies around a captured tensor.

Every captured tensor here is a slice of a larger one whose other elements are NaN or huge. A read outside the slice is
recorded, also where the mask discards what was read.
"""

import hypothesis
import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from interpret.decoding import check_decode, decode
from interpret.test_bounds import as_mod
from support import make_inputs
from triton.runtime import interpreter
from unit import gather_graphs

from flexdecode import DecodeOptions, TraceError, cache_info, clear_cache, explain, flex_decode, mods

B, HQ, HKV, N, D = 2, 4, 2, 37, 16
KV_LENS = [None, torch.tensor([20, 0])]
MARGIN = 48  # elements around a slice, more than any wrong index here is off


class Surrounded:
    """Slices of larger tensors, and the reads that missed them."""

    def __init__(self):
        self.tables = []
        self.num_reads = 0

    def __call__(self, table):
        """Copies a table into the middle of a larger tensor and watches it."""
        nothing = torch.nan if table.dtype.is_floating_point else torch.iinfo(table.dtype).max
        storage = torch.full([n + 2 * MARGIN for n in table.shape], nothing, dtype=table.dtype)
        view = storage[tuple(slice(MARGIN, MARGIN + n) for n in table.shape)].copy_(table)
        place = torch.zeros(storage.shape, dtype=torch.bool)
        place[tuple(slice(MARGIN, MARGIN + n) for n in table.shape)] = True
        self.tables.append((storage, storage.data_ptr(), place.flatten().numpy()))
        return view

    def look(self, pointers, mask):
        """Called at every load of the interpreter."""
        addresses = pointers[np.broadcast_to(mask, pointers.shape)].astype(np.int64)
        for storage, start, place in self.tables:
            inside = addresses[(addresses >= start) & (addresses < start + storage.nbytes)]
            hit = place[(inside - start) // storage.element_size()]
            self.num_reads += len(hit)
            assert hit.all(), f"{(~hit).sum()} reads around a tensor of {place.sum()} elements"


@pytest.fixture
def surrounded(monkeypatch):
    """Puts tables into larger tensors; a read around them fails."""
    watch = Surrounded()
    load = interpreter.InterpreterBuilder.create_masked_load

    def watched(self, ptrs, mask, *rest, **options):
        watch.look(ptrs.data, mask.data)
        return load(self, ptrs, mask, *rest, **options)

    monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", watched)
    return watch


def numbers(*shape, seed=3):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def found(inputs, score_mod=None, mask_mod=None, **arguments):
    """For each load: `proven`, `mask` where the mask proves it, or `checked`."""
    options = DecodeOptions(backend="triton")
    report = explain(*inputs, score_mod, mask_mod, options=options, **arguments)
    loads = [load for mod in (report.score_mod, report.mask_mod) if mod is not None for load in mod.loads]
    return ["checked" if load.checked else "mask" if load.by_mask else "proven" for load in loads]


def test_a_read_around_a_table_is_seen(surrounded):
    """The tests below would see nothing if the interpreter loaded by another function."""
    table = surrounded(numbers(N))
    check_decode(*make_inputs(B, HQ, HKV, 1, N, D), lambda s, b, h, q, k: s + table[k])
    assert surrounded.num_reads >= N
    address = np.array([table.data_ptr() - 4, table.data_ptr()])
    surrounded.look(address, np.array([False, True]))
    with pytest.raises(AssertionError, match="1 reads around a tensor of 37 elements"):
        surrounded.look(address, np.array([True, True]))


# --- Tables of just the right size, and one smaller -------------------------------------------------------------------

# For each: the shape of a table that is just large enough for Q queries, the score_mod of a table, and the mask_mod.
CALLS = {
    "heads": (lambda Q: (HQ,), lambda t, Q: lambda s, b, h, q, k: s - t[h] * (q - k), None),
    "sequences": (lambda Q: (B,), lambda t, Q: lambda s, b, h, q, k: s + t[b] * k, None),
    "keys": (lambda Q: (B, HQ, N), lambda t, Q: lambda s, b, h, q, k: s + t[b, h, k], None),
    "keys_in_reverse": (lambda Q: (N,), lambda t, Q: lambda s, b, h, q, k: s + t[N - 1 - k], None),
    "from_the_end": (lambda Q: (N,), lambda t, Q: lambda s, b, h, q, k: s + t[k - N], None),
    "queries": (lambda Q: (N,), lambda t, Q: lambda s, b, h, q, k: s * t[q], None),
    "queries_from_0": (lambda Q: (N + Q,), lambda t, Q: lambda s, b, h, q, k: s * t[q + Q], None),
    "distance": (lambda Q: (N + Q,), lambda t, Q: lambda s, b, h, q, k: s + t[(q - k).abs()], None),
    "clamped": (lambda Q: (HQ, 9), lambda t, Q: lambda s, b, h, q, k: s + t[h, (q - k).clamp(0, 8)], None),
    "blocks_of_keys": (lambda Q: ((N + 4) // 5,), lambda t, Q: lambda s, b, h, q, k: s + t[k // 5], None),
}
BY_MASK = {
    "window": (
        lambda Q: (HQ, 8),
        lambda t, Q: lambda s, b, h, q, k: s + t[h, q - k],
        lambda b, h, q, k: (k <= q) & (q - k < 8),
    ),
    "captured_window": (lambda Q: (8,), lambda t, Q: lambda s, b, h, q, k: s + t[q - k], mods.sliding_window(8)),
    "window_to_both_sides": (
        lambda Q: (13,),
        lambda t, Q: lambda s, b, h, q, k: s + t[k - q + 6],
        lambda b, h, q, k: (q - k).abs() <= 6,
    ),
    "sinks_and_window": (
        lambda Q: (8,),
        lambda t, Q: lambda s, b, h, q, k: s + t[torch.where(k < 4, 0, q - k)],
        mods.streaming(4, 8),
    ),
    "two_ranges_of_keys": (
        lambda Q: (20,),
        lambda t, Q: lambda s, b, h, q, k: s + t[k],
        lambda b, h, q, k: (k < 3) | ((k > 15) & (k < 20)),
    ),
    "window_in_documents": (
        lambda Q: (8,),
        lambda t, Q: lambda s, b, h, q, k: s + t[q - k],
        mods.and_masks(mods.sliding_window(8), mods.document(torch.arange(N).repeat(B, 1) // 10)),
    ),
}
FROM_THE_END = {"from_the_end", "queries"}  # not called proven, but not masked either
FIRST_TOKENS = {"queries_from_0", "distance"}  # not proven for several tokens: how many there are is no part of a proof


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("name", CALLS | BY_MASK)
def test_sizes(surrounded, name, num_queries, num_splits):
    shape, make, mask_mod = (CALLS | BY_MASK)[name]
    inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
    for less in (0, 1):
        *rows, last = shape(num_queries)
        score_mod = make(surrounded(numbers(*rows, last - less)), num_queries)
        unproven = less or name in FROM_THE_END or (num_queries > 1 and name in FIRST_TOKENS)
        expected = "checked" if unproven else "mask" if name in BY_MASK else "proven"
        assert found(inputs, score_mod, mask_mod)[0] == expected
        for kv_lens in KV_LENS:
            check_decode(*inputs, score_mod, mask_mod, num_splits=num_splits, kv_lens=kv_lens)
    assert surrounded.num_reads


@pytest.mark.parametrize("q_offset", [0, 36, -5, 1000, 2**40, torch.tensor([30, -(2**62)])])
def test_positions_of_the_caller(surrounded, q_offset):
    inputs = make_inputs(B, HQ, HKV, 3, N, D)
    by_query, near = surrounded(numbers(N)), surrounded(numbers(8))
    score_mod = lambda s, b, h, q, k: s + by_query[q] + near[q - k] + near[(q - k).clamp(0, 7)]
    check_decode(*inputs, score_mod, mods.sliding_window(8), q_offset=q_offset)
    check_decode(*inputs, score_mod, lambda b, h, q, k: k < 8, q_offset=q_offset)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.int8, torch.int32, torch.uint8], ids=str)
def test_types(surrounded, dtype):
    table = surrounded((numbers(HQ, N) * 3).abs().to(dtype))
    near = surrounded((numbers(HQ, 8) * 3).abs().to(dtype))
    score_mod = lambda s, b, h, q, k: s + table[h, k] + near[h, q - k]
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    assert found(inputs, score_mod, mods.sliding_window(8))[:2] in (["proven", "mask"], ["mask", "proven"])
    check_decode(*inputs, score_mod, mods.sliding_window(8), kv_lens=KV_LENS[1])


def test_bools():
    keep, near = numbers(B, N) > -1, numbers(8) > 0
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    score_mod = lambda s, b, h, q, k: torch.where(near[q - k], s, -s)
    mask_mod = lambda b, h, q, k: (k <= q) & (q - k < 8) & keep[b, k]
    assert found(inputs, score_mod, mask_mod) == ["mask", "proven"]
    check_decode(*inputs, score_mod, mask_mod, kv_lens=KV_LENS[1])


def test_strides(surrounded):
    table = surrounded(numbers(N, HQ)).T
    near = surrounded(numbers(16, 3))[::2, 1].flip(0)[::1]
    one = surrounded(numbers(1)).expand(N)
    check_decode(
        *make_inputs(B, HQ, HKV, 1, N, D), lambda s, b, h, q, k: s + table[h, k] + near[q - k] + one[k],
        mods.sliding_window(8), num_splits=3,
    )  # fmt: skip


def test_tables_of_a_mask(surrounded):
    kinds, limits = surrounded(torch.arange(N).repeat(B, 1) // 9), surrounded(torch.tensor([3, 40, 9, 1]))
    mask_mod = lambda b, h, q, k: (q - k < limits[h]) & (kinds[b, k] == kinds[b, q])
    for num_queries in (1, 3):
        inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
        for kv_lens in KV_LENS:
            check_decode(*inputs, mask_mod=mask_mod, kv_lens=kv_lens, num_splits=3)
    assert surrounded.num_reads


@pytest.mark.parametrize("mask_mod", [mods.sliding_window(8), mods.sliding_window(9), None])
def test_nested_gathers(surrounded, mask_mod):
    """What a load leaves out where the mask is false is no index for the next one."""
    rows, bias = surrounded(torch.tensor([4, 0, -5, 2, 1, -1, 3, 4])), surrounded(numbers(5))
    score_mod = lambda s, b, h, q, k: s + bias[rows[q - k]] + bias[rows[k % 8].clamp(0, 4)]
    check_decode(*make_inputs(B, HQ, HKV, 1, N, D), score_mod, mask_mod, num_splits=3, kv_lens=KV_LENS[1])
    assert surrounded.num_reads


# Of two indices only the one that is the same for a whole tile is checked.
ONE_CHECKED = {
    "sequence_of_a_head": (lambda t: lambda s, b, h, q, k: s + t[b, h] * k, None, (B - 1, HQ)),
    "sequence_of_a_key": (lambda t: lambda s, b, h, q, k: s + t[b, k], None, (B - 1, N)),
    "query_of_a_head": (lambda t: lambda s, b, h, q, k: s + t[q, h] * k, None, (N - 1, HQ)),
    "number_of_a_key": (lambda t: lambda s, b, h, q, k: s + t[3, k], None, (3, N)),
    "in_a_mask": (None, lambda t: lambda b, h, q, k: t[b, k] > 0, (B - 1, N)),
    "in_the_row_of_a_mask": (None, lambda t: lambda b, h, q, k: (t[b, h] > 0) | (k % 2 == 0), (B - 1, HQ)),
    "in_a_bound": (None, lambda t: lambda b, h, q, k: q - k < t[b, h].long() + 5, (B - 1, HQ)),
}


@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("name", ONE_CHECKED)
def test_one_index_is_checked_and_the_other_proven(surrounded, name, num_queries):
    make_score_mod, make_mask_mod, shape = ONE_CHECKED[name]
    table = surrounded(numbers(*shape))
    score_mod = make_score_mod and make_score_mod(table)
    mask_mod = make_mask_mod and make_mask_mod(table)
    check_decode(*make_inputs(B, HQ, HKV, num_queries, N, D), score_mod, mask_mod, num_splits=3)


def test_a_row_beside_the_valid_ones_reads_nothing_else(surrounded):
    """12 rows in a tile of 16."""
    slopes, table = surrounded(numbers(6)), surrounded(numbers(2, N))
    score_mod = lambda s, b, h, q, k: s * slopes[h] + table[b, q.clamp(min=0)]
    inputs = make_inputs(2, 6, 1, 2, N, D)
    assert found(inputs, score_mod) == ["proven", "proven"]
    check_decode(*inputs, score_mod)


def test_empty_calls(surrounded):
    table = surrounded(numbers(0))
    score_mod = lambda s, b, h, q, k: s + table[k] + table[b]
    check_decode(*make_inputs(2, HQ, HKV, 1, 0, D), score_mod)
    check_decode(*make_inputs(0, HQ, HKV, 1, 9, D), score_mod)
    check_decode(*make_inputs(2, HQ, HKV, 1, 9, D), score_mod)


# --- From call to call ------------------------------------------------------------------------------------------------


def test_tables_that_grow_and_shrink(surrounded):
    clear_cache()
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    score_mod = lambda s, b, h, q, k: s + table[h, k] + near[q - k]
    for length, width in ((N, 8), (N + 5, 8), (N - 5, 8), (N, 7), (N, 9), (0, 0), (N, 8), (3, 1)):
        table, near = surrounded(numbers(HQ, length)), surrounded(numbers(width))
        check_decode(*inputs, score_mod, mods.sliding_window(8))
    info = cache_info()
    assert (info.traces, info.calls, info.hits) == (2, 8, 1)
    assert info.compilations == 4, "a kernel depends on which of two indices is proven"


def test_heads_that_come_and_go(surrounded):
    score_mod = lambda s, b, h, q, k: s * slopes[h]
    for heads in (4, 2, 3, 4):
        slopes = surrounded(numbers(heads))
        check_decode(*make_inputs(B, HQ, HKV, 1, N, D), score_mod)


def test_a_cache_that_grows_past_a_table(surrounded):
    table = surrounded(numbers(40))
    for length in (30, 40, 41, 70, 40):
        inputs = make_inputs(B, HQ, HKV, 1, length, D)
        check_decode(*inputs, lambda s, b, h, q, k: s + table[k], num_splits=3)


def test_a_batch_that_grows_past_a_table(surrounded):
    table = surrounded(numbers(3))
    for batch in (1, 3, 4, 2):
        check_decode(*make_inputs(batch, HQ, HKV, 1, N, D), lambda s, b, h, q, k: s + table[b] * k)


def test_more_queries_need_more_of_a_table(surrounded):
    table = surrounded(numbers(N + 1))
    for num_queries in (1, 2, 3, 1):
        inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
        check_decode(*inputs, lambda s, b, h, q, k: s + table[q + 1], kv_lens=torch.tensor([N, 0]))


def test_a_captured_integer_below_an_index_changes(surrounded):
    clear_cache()
    table = surrounded(numbers(N + 3))
    score_mod = lambda s, b, h, q, k: s + table[k + shift]
    for value in (0, 3, 4, -1, -3, 2**62, 1):
        shift = value
        check_decode(*make_inputs(B, HQ, HKV, 1, N, D), score_mod)
    assert (cache_info().traces, cache_info().compilations) == (1, 3), "proven, too large, and from the end"


def test_a_0d_tensor_below_an_index_is_written(surrounded):
    table, shift = surrounded(numbers(N + 3)), torch.tensor(0)
    for value in (0, 3, 4, 0):
        shift.fill_(value)
        check_decode(*make_inputs(B, HQ, HKV, 1, N, D), lambda s, b, h, q, k: s + table[k + shift])


@pytest.mark.parametrize("num_queries", [1, 3])
def test_a_window_that_changes_below_a_bias(surrounded, num_queries):
    clear_cache()
    near = surrounded(numbers(HQ, 8))
    inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
    score_mod = lambda s, b, h, q, k: s + near[h, q - k]
    for window in (5, 8, 9, 3, 40, 2**62, 1, 8):
        assert found(inputs, score_mod, mods.sliding_window(window)) == ["mask" if window <= 8 else "checked"]
        check_decode(*inputs, score_mod, mods.sliding_window(window), num_splits=3)
    assert (cache_info().traces, cache_info().compilations) == (2, 2)


def test_a_window_that_another_score_made_known(surrounded):
    """A plan of the mask alone was prepared before anything rested on its window."""
    clear_cache()
    near, slopes = surrounded(numbers(8)), surrounded(numbers(HQ))
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    for window in (8, 9, 7, 30):
        mask_mod = mods.sliding_window(window)
        check_decode(*inputs, None, mask_mod)
        check_decode(*inputs, lambda s, b, h, q, k: s * slopes[h], mask_mod)
        check_decode(*inputs, lambda s, b, h, q, k: s + near[q - k], mask_mod)
    assert cache_info().traces == 3


def test_arithmetic_on_a_window_that_leaves_int64(surrounded):
    near = surrounded(numbers(8))
    inputs = make_inputs(B, HQ, HKV, 1, N, D)
    for window in (7, 8, 2**63 - 1):
        mask_mod = lambda b, h, q, k, window=window: (k <= q) & (q - k < window - 1 + 1)
        check_decode(*inputs, lambda s, b, h, q, k: s + near[q - k], mask_mod)
    wraps = lambda b, h, q, k: (k <= q) & (q - k < window + 1)
    window = 7
    decode(*inputs, lambda s, b, h, q, k: s + near[q - k], wraps)
    window = 2**63 - 1
    decode(*inputs, lambda s, b, h, q, k: s + near[q - k], wraps)


# --- Random calls -----------------------------------------------------------------------------------------------------


def test_random_calls(surrounded):
    """The generated kernel against the torch backend, which checks every index itself."""

    @hypothesis.settings(max_examples=40, database=None)
    @hypothesis.given(gather_graphs.calls(), st.sampled_from([1, 3]), st.data())
    def check(call, num_splits, data):
        check_random_call(surrounded, call, num_splits, data)

    check()


def check_random_call(surrounded, call, num_splits, data):
    (batch, heads, _, length, shifted), queries = call.sizes, call.queries
    surrounded.tables.clear()
    tensors = (x for x in call.leaves if isinstance(x, torch.Tensor) and x.dtype != torch.bool)
    put = {id(x): surrounded(x) for x in tensors}
    parts = [_Part(graph, [put.get(id(x), x) for x in leaves]) for graph, leaves in call.graphs()]
    bias, mask_mod = map(as_mod, parts)
    score_mod = lambda score, *indices: score + bias(*indices)
    arguments = {"kv_lens": data.draw(st.none() | st.just(torch.arange(batch) % (length + 1)))}
    if call.q_idx_given:
        arguments["q_offset"] = data.draw(st.sampled_from([0, 3, -4, 2**31, -(2**62), 2**63 - 9]))
    if shifted:
        arguments["kv_offset"] = data.draw(st.sampled_from([0, 3, -4, 2**30, -(2**30)]))
    inputs = make_inputs(batch, heads, 1, queries, length, D)
    options = DecodeOptions(backend="torch")
    try:
        expected = flex_decode(*inputs, score_mod, mask_mod, return_lse=True, options=options, **arguments)
    except TraceError:  # a function that takes no numbers
        hypothesis.reject()
    actual = decode(*inputs, score_mod, mask_mod, num_splits=num_splits, **arguments)
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-4, atol=1e-4, equal_nan=True)


class _Part:
    """A graph with its captures, as `as_mod` takes it."""

    def __init__(self, graph, leaves):
        self.graph, self.leaves = graph, leaves
