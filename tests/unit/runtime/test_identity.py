"""Which mods share a graph, and what makes a new one: the counters of `cache_info()` on the torch backend."""

import functools

import pytest
import torch
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, TraceError, cache_info, clear_cache, flex_decode, mods
from flexdecode.frontend.graph import Source
from flexdecode.runtime import identity
from flexdecode.runtime.identity import add_sources, constants_of, graph_of, identify

B, Hq, N, Q = 2, 4, 19, 2
QUERY, KEY, VALUE = make_inputs(B, Hq, 2, Q, N, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def empty_cache():
    clear_cache()


def run(score_mod=None, mask_mod=None):
    out, lse = flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod, return_lse=True)
    assert_close_to_reference(out, lse, QUERY, KEY, VALUE, score_mod, mask_mod)


def traces():
    return cache_info().traces


def window_mask(window):
    return lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window


# --- No new trace -----------------------------------------------------------------------------------------------------


def test_recreated_lambdas_hit():
    for step in range(10):
        run(lambda s, b, h, q, k: s * 2, window_mask(step))
    info = cache_info()
    assert (info.calls, info.traces, info.hits) == (10, 2, 9)
    assert (info.generations, info.compilations, info.disk_hits) == (0, 0, 0)


def test_a_number_changes_in_a_cell():
    cap = 1.0
    mod = lambda s, b, h, q, k: cap * torch.tanh(s / 3) + cap * h
    for value in (1.0, 2.5, -7.0, 0.0, 1e20):
        cap = value
        run(mod)
    assert traces() == 1


SLOPE = 0.5


def test_a_number_changes_in_a_global(monkeypatch):
    def mod(score, b, h, q_idx, kv_idx):
        return score - SLOPE * (q_idx - kv_idx)

    for value in (0.5, 0.25, 3.0):
        monkeypatch.setitem(globals(), "SLOPE", value)
        run(mod)
    assert traces() == 1


def test_a_number_changes_in_a_default_a_partial_and_an_object():
    class Scale:
        def __init__(self, factor):
            self.factor = factor

        def __call__(self, score, b, h, q_idx, kv_idx):
            return score * self.factor

    def scaled(score, b, h, q_idx, kv_idx, factor):
        return score * factor

    def make_default(value):
        return lambda s, b, h, q, k, factor=value: s * factor

    one_object = Scale(1.0)
    for kind in (make_default, lambda f: functools.partial(scaled, factor=f), Scale, lambda f: one_object):
        before = traces()
        for factor in (1.0, 2.0, 3.0):
            one_object.factor = factor
            run(kind(factor))
        assert traces() == before + (1 if kind(1.0) is not one_object else 0)


def test_tensors_change_their_contents_strides_and_shapes():
    table = torch.randn(Hq, N)
    mod = lambda s, b, h, q, k: s + table[h, k]
    for replacement in (
        table,
        table.mul_(2),
        torch.randn(Hq, N),
        torch.randn(N, Hq).T,
        torch.randn(Hq, 3),
        torch.zeros(0, 0),
    ):
        table = replacement
        run(mod)
    assert traces() == 1


def test_a_0d_tensor_changes():
    cap = torch.tensor(2.0)
    mod = lambda s, b, h, q, k: s * cap
    for value in (cap, torch.tensor(3.0), cap.add_(1)):
        cap = value
        run(mod)
    assert traces() == 1


def test_a_size_that_is_only_used_in_comparisons():
    table = torch.randn(Hq, 5)
    mod = lambda s, b, h, q, k: torch.where(k < table.shape[1], s + table[h, k], s)
    for columns in (5, 7, 3):
        table = torch.randn(Hq, columns)
        run(mod)
    assert traces() == 1


def test_other_inputs_use_the_same_trace():
    mod = lambda s, b, h, q, k: s * 2
    for lens in (None, torch.tensor([3, 7]), torch.tensor([5, 0], dtype=torch.int32)):
        flex_decode(QUERY, KEY, VALUE, mod, kv_lens=lens)
    flex_decode(QUERY.double().half(), KEY.half(), VALUE.half(), mod)
    flex_decode(QUERY[:1], KEY[:1, :, :7], VALUE[:1, :, :7], mod, scale=2.0, q_offset=3, return_lse=True)
    assert traces() == 1


def test_the_same_function_as_two_kinds_is_two_traces():
    anything = lambda *arguments: arguments[-1] >= 0
    run(None, anything)
    with pytest.raises(TraceError):
        run(anything)


# --- A new trace ------------------------------------------------------------------------------------------------------


def test_a_consumed_number_makes_a_trace_for_each_value():
    for step, period in enumerate((2, 3, 2, 3)):
        run(lambda s, b, h, q, k: s + k // period)
        assert traces() == min(step + 1, 2)


def test_a_branch_on_a_value_is_followed():
    """A number may be free on one side of a branch and consumed on the other."""
    for window, slope, expected in [
        (9, 1, 1),
        (9, 2, 1),
        (2, 2, 2),
        (2, 3, 2),
        (1, 4, 3),
        (1, 5, 4),
        (9, 9, 5),
        (2, 9, 6),
    ]:

        def mod(score, b, h, q_idx, kv_idx):
            if window > 5:
                return score * 2
            return score + slope * h if window > 1 else score + h % slope

        run(mod)
        assert traces() <= expected


@pytest.mark.parametrize("values", [(True, False), (1, 1.0, True), (None, 2.0), (float("inf"), 1.0, float("nan"))])
def test_types_of_numbers(values):
    for value in (*values, *values):
        run(lambda s, b, h, q, k: s if value is None else torch.where(k < 3, s * value, s))
    assert traces() == len(values)


def test_strings_retrace():
    for kind in ("tanh", "sigmoid", "tanh"):
        run(lambda s, b, h, q, k: getattr(torch, kind)(s))
    assert traces() == 2


def test_rank_and_dtype_of_a_tensor_retrace():
    for table in (torch.randn(Hq), torch.randn(Hq).half(), torch.randn(Hq, 1), torch.arange(Hq)):
        run(lambda s, b, h, q, k: s + (table[h] if table.ndim == 1 else table[h, 0]))
    assert traces() == 4


def test_a_consumed_size_makes_a_trace_for_each_value():
    for columns in (3, 5, 3):
        table = torch.randn(Hq, columns)
        run(lambda s, b, h, q, k: s + table[h, k % table.shape[1]])
    assert traces() == 2


def test_another_helper_retraces():
    for helper in (torch.tanh, torch.sigmoid, lambda x: x * 2):
        run(lambda s, b, h, q, k: helper(s))
    assert traces() == 3


def test_requires_grad_is_seen():
    table = torch.randn(Hq)
    mod = lambda s, b, h, q, k: s + table[h]
    run(mod)
    table = torch.randn(Hq, requires_grad=True)
    with pytest.raises(ValueError, match="the tensor `table` captured by score_mod requires grad"):
        run(mod)
    with torch.no_grad():
        run(mod)
    with pytest.raises(ValueError, match="requires grad"):
        run(mod)


# --- What proofs rest on ----------------------------------------------------------------------------------------------


def prepared():
    """Calls that had to be prepared."""
    return cache_info().calls - cache_info().hits


def test_a_shape_makes_a_new_plan_and_no_new_trace():
    """What is proven of an index holds for one shape; the wrong plan would read outside the smaller table."""
    mod = lambda s, b, h, q, k: s + table[h, k]
    for shape, plans in (((Hq, N), 1), ((Hq, N + 5), 2), ((Hq, N), 2), ((Hq, 3), 3), ((Hq, N + 5), 3), ((0, N), 4)):
        table = torch.randn(shape)
        run(mod)
        assert (traces(), prepared()) == (1, plans)


def test_other_contents_and_strides_make_no_new_plan():
    mod = lambda s, b, h, q, k: s + table[h, k]
    wide = torch.randn(Hq, 2 * N)
    for replacement in (torch.randn(Hq, N), torch.randn(N, Hq).T, wide[:, ::2], wide[:1, :1].expand(Hq, N)):
        table = replacement
        run(mod)
    assert (traces(), prepared()) == (1, 1)


def test_a_number_below_an_index_makes_a_new_plan_and_no_new_trace():
    table = torch.randn(N)
    mod = lambda s, b, h, q, k: s + table[k + W]
    for value, plans in ((0, 1), (3, 2), (0, 2), (-N, 3), (-2, 4), (2**62, 5), (3, 5)):
        W = value
        run(mod)
        assert (traces(), prepared()) == (1, plans)


def test_a_0d_tensor_below_an_index_makes_a_new_plan():
    """Also where it is written in place."""
    table, shift = torch.randn(N), torch.tensor(0)
    mod = lambda s, b, h, q, k: s + table[k + shift]
    for value, plans in ((0, 1), (3, 2), (0, 2)):
        shift.fill_(value)
        run(mod)
        assert (traces(), prepared()) == (1, plans)


def test_a_number_below_an_index_of_an_inner_gather():
    rows, table = torch.randint(0, 5, (N,)), torch.randn(5)
    for step, W in enumerate((0, 3, 7), start=1):
        run(lambda s, b, h, q, k: s + table[rows[k + W]])
        assert (traces(), prepared()) == (1, step)


def test_a_size_below_an_index_makes_a_new_plan():
    """Of a tensor that is not read itself."""
    table = torch.randn(N)
    for step, columns in enumerate((4, 9, N + 3), start=1):
        ruler = torch.randn(columns)
        run(lambda s, b, h, q, k: s + table[k.clamp(max=ruler.shape[0] - 1)])
        assert (traces(), prepared()) == (1, step)


def test_a_number_beside_an_index_makes_no_new_plan():
    table = torch.randn(Hq, N)
    score_mod = lambda s, b, h, q, k: s * cap + table[h, k] * h * step
    mask_mod = lambda b, h, q, k: (k <= q) & (q - k < window)
    for values in ((1.0, 2, 3), (2.0, 3, 5), (-1.0, 4, 2**40)):
        cap, step, window = values
        run(score_mod, mask_mod)
    assert (traces(), prepared(), cache_info().hits) == (2, 1, 2)


def test_mods_of_one_code_share_a_plan_if_their_shapes_agree():
    def make(size, W):
        table = torch.randn(size)
        return lambda s, b, h, q, k: s + table[k + W]

    for size, W in 3 * ((N, 0), (N - 1, 0), (N, 1)):
        run(make(size, W))
    assert (traces(), prepared()) == (1, 3)


def test_the_mask_of_one_score_under_another():
    """The window is part of proofs from the first score on that needs it, also for earlier plans."""
    near, far = torch.randn(4), torch.randn(Hq)
    for window in (3, 4, 5, 9):
        run(lambda s, b, h, q, k: s + far[h], mods.sliding_window(window))
        run(lambda s, b, h, q, k: s + near[q - k], mods.sliding_window(window))
    assert traces() == 3


# --- The decode loop --------------------------------------------------------------------------------------------------


def test_a_decode_loop_traces_once():
    """The length grows, the window and the cap change, the lambdas are made anew in each step."""
    bias = torch.randn(Hq)
    options = DecodeOptions(backend="torch")
    lengths = range(1, N + 1)
    for length in lengths:
        window, cap = 3 + length % 5, 10.0 + length
        score_mod = lambda s, b, h, q, k: cap * torch.tanh(s / 2) + bias[h] * (q - k)
        mask_mod = lambda b, h, q, k: (k <= q) & (q - k < window)
        lens = torch.tensor([length, max(1, length - 3)])
        out, lse = flex_decode(
            QUERY[:, :, :1], KEY, VALUE, score_mod, mask_mod, kv_lens=lens, return_lse=True, options=options
        )
        assert_close_to_reference(out, lse, QUERY[:, :, :1], KEY, VALUE, score_mod, mask_mod, kv_lens=lens)
    info = cache_info()
    assert (info.traces, info.calls, info.hits) == (2, len(lengths), len(lengths) - 1)
    assert (info.generations, info.compilations) == (0, 0)


def test_clear_cache():
    mod = lambda s, b, h, q, k: s * 2
    run(mod)
    clear_cache()
    assert cache_info() == type(cache_info())()
    run(mod)
    assert traces() == 1


def test_counters_are_a_copy():
    info = cache_info()
    info.calls = 99
    assert cache_info().calls == 0


# --- Parts ------------------------------------------------------------------------------------------------------------


def test_identity_of_no_mod():
    mod = identify("mask_mod", None)
    assert mod.function is None and mod.identity is None and mod.leaves == []
    assert graph_of("mask_mod", mod, CPU) == (None, mod)


def test_identities_hash_and_name_the_leaves():
    window = 5
    mod = identify("mask_mod", lambda b, h, q, k: q - k < window)
    again = identify("mask_mod", lambda b, h, q, k: q - k < window)
    assert isinstance(hash(mod.identity), int)
    assert mod.leaves == again.leaves == [5]
    assert mod.identity != again.identity, "two different lines of code"


def test_a_graph_is_found_again():
    def make(period):
        return identify("score_mod", lambda s, b, h, q, k: s + k % period)

    graph, mod = graph_of("score_mod", make(3), CPU)
    assert mod.identity != make(2).identity  # the period is known to matter now
    assert mod.identity == make(3).identity
    assert graph_of("score_mod", make(3), CPU)[0] is graph
    assert graph_of("score_mod", make(2), CPU)[0] != graph
    assert traces() == 2


def test_what_is_present():
    """Nothing before the trace, then the sizes and numbers that proofs look at, as they are now."""
    table, W, cap = torch.zeros(3, 4), 5, 6
    mod = lambda s, b, h, q, k: s * cap + table[h, k + W]
    assert identify("score_mod", mod).proof_values == ()
    _, traced = graph_of("score_mod", identify("score_mod", mod), CPU)
    assert sorted(traced.proof_values) == [3, 4, 5]
    table, W, cap = torch.zeros(7, 8), 9, 10
    now = identify("score_mod", mod)
    assert sorted(now.proof_values) == [7, 8, 9] and now.identity == traced.identity


def test_a_graph_that_another_thread_traced():
    """Who finds the graph of a mod that it did not know before needs the values that proofs use as well."""
    table = torch.zeros(3, 4)
    mod = lambda s, b, h, q, k: s + table[h, k]
    early = identify("score_mod", mod)
    assert early.proof_values == ()
    graph, traced = graph_of("score_mod", identify("score_mod", mod), CPU)
    again, late = graph_of("score_mod", early, CPU)
    assert again is graph and late.proof_values == traced.proof_values == (3, 4)


def test_a_mod_that_was_forgotten(monkeypatch):
    """Its graph may outlive what is known of its captures; a shape still makes a new plan."""
    monkeypatch.setattr(identity._known, "limit", 1)
    mod = lambda s, b, h, q, k: s + table[h, k]
    other = lambda s, b, h, q, k: s + table[h, 0]
    for shape in ((Hq, N), (Hq, N + 1), (Hq, 3)):
        table = torch.randn(shape)
        before = prepared()
        run(mod)
        assert prepared() == before + 1, shape
        run(other)


def test_watching_more():
    window, cap = 5, 2
    mod = lambda b, h, q, k: (q - k < window) & (k * cap < 99)
    graph, traced = graph_of("mask_mod", identify("mask_mod", mod), CPU)
    assert traced.proof_values == ()
    place = traced.leaves.index(5)
    more = add_sources("mask_mod", traced, [Source(place)])
    assert more.proof_values == (5,) and more.identity == traced.identity
    window, cap = 7, 3
    assert identify("mask_mod", mod).proof_values == (7,)
    assert sorted(add_sources("mask_mod", more, [Source(traced.leaves.index(2))]).proof_values) == [3, 7]
    assert graph_of("mask_mod", identify("mask_mod", mod), CPU)[0] is graph
    nothing = identify("mask_mod", None)
    assert add_sources("mask_mod", nothing, [Source(0)]) == nothing


def test_watching_keeps_the_constants():
    def make(period, window):
        return identify("mask_mod", lambda b, h, q, k: (k // period == 0) & (q - k < window))

    _, traced = graph_of("mask_mod", make(3, 5), CPU)
    more = add_sources("mask_mod", traced, [Source(traced.leaves.index(5))])
    assert more.identity == traced.identity == make(3, 9).identity != make(4, 5).identity
    assert (make(3, 9).proof_values, make(4, 5).proof_values) == ((9,), (5,))


@pytest.mark.parametrize(
    "parts", [lambda x: x.unbind(1)[0], lambda x: x.split(2, 1)[0][:, 0], lambda x: x.chunk(2, 1)[0][:, 0]]
)
def test_taking_a_tensor_apart_fixes_one_size(parts):
    """The other sizes stay arguments: a table that grows in them needs no new kernel."""
    table = torch.zeros(4, 6, 8)
    graph, mod = graph_of("score_mod", identify("score_mod", lambda s, b, h, q, k: s + parts(table)[h, k]), CPU)
    assert graph is not None and [source.dim for source in constants_of("score_mod", mod)] == [1]
