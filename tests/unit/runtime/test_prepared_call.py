"""`flexdecode.prepare`: a call that is checked once and repeated gives what `flex_decode` gives."""

import contextlib
import copy
import functools
import gc
import inspect
import operator
import pickle
import re
import threading
import weakref
from unittest import mock

import pytest
import torch
from packed_cases import totals
from support import make_inputs, paged
from torch.nn.attention.flex_attention import create_block_mask

import flexdecode
from flexdecode import DecodeOptions, KVCache, PagedKVCache, PreparedCall, cache_info, clear_cache, flex_decode, mods
from flexdecode.runtime import prepared_call, run

B, HQ, HKV, Q, N, D = 2, 4, 2, 2, 24, 16
QUERY, KEY, VALUE = make_inputs(B, HQ, HKV, Q, N, D)
LENS = torch.tensor([24, 13])


def new_query(seed=1):
    return make_inputs(B, HQ, HKV, Q, N, D, seed=seed)[0]


def assert_same(one, other):
    """Equal results; both may be pairs."""
    pairs = zip(one, other, strict=True) if isinstance(one, tuple) else [(one, other)]
    assert all(torch.equal(x, y) for x, y in pairs)


def given():
    """Arguments of calls, by what they show."""
    int8 = {"key": torch.randint(-9, 9, KEY.shape, dtype=torch.int8), "value": VALUE, "k_scale": torch.rand(HKV)}
    (key, table), (value, _) = paged(KEY, 8), paged(VALUE, 8)
    in_pages = {"key": key, "value": value, "page_table": table, "kv_lens": LENS.clone()}
    blocks = create_block_mask(mods.causal(), None, None, N, N, device="cpu", BLOCK_SIZE=8)
    return {
        "plain": {},
        "kv_lens": {"kv_lens": LENS.clone()},
        "one length": {"kv_lens": 11},
        "a length on the CPU": {"kv_lens": torch.tensor(11)},
        "q_lens": {"kv_lens": LENS.clone(), "q_lens": torch.tensor([2, 1])},
        "q_offset": {"q_offset": 3},
        "an offset on the CPU": {"q_offset": torch.tensor(3), "mask_mod": mods.causal()},
        "starts": {"kv_starts": torch.tensor([1, 3]), "kv_offset": torch.tensor([5, 6]), "mask_mod": mods.causal()},
        "one start": {"kv_starts": 2, "kv_lens": LENS.clone()},
        "scale": {"scale": 0.3},
        "sinks": {"sinks": torch.randn(HQ), "return_lse": True},
        "mods": {"score_mod": mods.alibi(torch.rand(HQ)), "mask_mod": mods.sliding_window(7), "kv_lens": LENS.clone()},
        "int8": int8,
        "pages": in_pages,
        "loose": {"kv_lens": torch.tensor([24, 0, 13])[::2]},
        "block mask": {"block_mask": blocks},
        "debug": {"mask_mod": mods.causal(), "options": DecodeOptions(debug=True)},
        "shared": {"value": KEY[..., :8]},
        "one tensor twice": {"key": (one := KEY.clone()), "value": one},
    }


def arguments_of(name):
    return {"query": QUERY, "key": KEY.clone(), "value": VALUE.clone(), **given()[name]}


def tensors_of(arguments):
    return [x for name, x in arguments.items() if isinstance(x, torch.Tensor) and name != "query"]


@pytest.mark.parametrize("name", given())
def test_it_gives_what_flex_decode_gives(name):
    """Also after the contents of every tensor have changed."""
    arguments = arguments_of(name)
    step = flexdecode.prepare(**arguments)
    for seed in range(3):
        query = new_query(seed)
        assert_same(step(query), flex_decode(**arguments | {"query": query}))
        for x in tensors_of(arguments):
            if x.is_floating_point():
                x.mul_(0.5)
            elif x.dtype == torch.int64 and "page_table" not in arguments:
                x.sub_(1).clamp_(min=0)
    out = torch.empty_like(step(QUERY)[0] if arguments.get("return_lse") else step(QUERY))
    for _ in range(2):
        result = step(QUERY, out=out)
        assert (result[0] if isinstance(result, tuple) else result) is out
        assert_same(result, flex_decode(**arguments))


def test_a_tensor_that_is_given_twice_is_checked_once():
    step = flexdecode.prepare(QUERY, KEY, KEY)
    with mock.patch.object(PreparedCall, "_run_anew", side_effect=AssertionError("the call was read anew")):
        assert_same(step(QUERY), flex_decode(QUERY, KEY, KEY))


def test_packed_queries():
    query, starts = torch.randn(5, HQ, D), totals([3, 2])
    step = flexdecode.prepare(query, KEY, VALUE, cu_seqlens_q=starts, kv_lens=LENS, max_q_len=4)
    assert_same(step(query), flex_decode(query, KEY, VALUE, cu_seqlens_q=starts, kv_lens=LENS))
    starts.copy_(totals([1, 4]))
    assert_same(step(query), flex_decode(query, KEY, VALUE, cu_seqlens_q=starts, kv_lens=LENS))


def test_packed_keys():
    query, key, value, starts = torch.randn(5, HQ, D), torch.randn(9, HKV, D), torch.randn(9, HKV, D), totals([3, 2])
    keys = totals([4, 5])
    step = flexdecode.prepare(query, key, value, cu_seqlens_q=starts, cu_seqlens_k=keys)
    key.mul_(2)
    keys.copy_(totals([7, 2]))
    assert_same(step(query), flex_decode(query, key, value, cu_seqlens_q=starts, cu_seqlens_k=keys))


@pytest.mark.parametrize(
    ("kind", "room"),
    [(KVCache, {"max_kv_len": 64}), (PagedKVCache, {"num_pages": 32, "page_size": 4})],
    ids=["contiguous", "pages"],
)
@pytest.mark.parametrize("options", [None, DecodeOptions(debug=True)], ids=["", "debug"])
def test_a_cache_grows_beneath_it(kind, room, options):
    cache = kind(batch=B, num_kv_heads=HKV, head_dim=D, dtype=torch.float32, **room)
    cache.append(KEY[:, :, :5], VALUE[:, :, :5])
    step = flexdecode.prepare(QUERY, cache=cache, mask_mod=mods.causal(), options=options)
    for n in range(5, N):
        cache.append(KEY[:, :, n : n + 1], VALUE[:, :, n : n + 1])
        assert_same(step(QUERY), flex_decode(QUERY, cache=cache, mask_mod=mods.causal()))
    cache.truncate(0, 3)
    assert_same(step(QUERY), flex_decode(QUERY, cache=cache, mask_mod=mods.causal()))


# --- What the mods capture --------------------------------------------------------------------------------------------

factor = 2.0


def test_captures_are_read_as_flex_decode_reads_them():
    table, cap, use_cap, window = torch.rand(HQ), 20.0, True, 5

    def score_mod(score, b, h, q_idx, kv_idx):
        score = score * table[h] * factor
        return torch.tanh(score / cap) * cap if use_cap else score

    mask_mod = lambda b, h, q_idx, kv_idx: q_idx - kv_idx < window
    step = flexdecode.prepare(QUERY, KEY, VALUE, score_mod, mask_mod)
    seen = []

    def check():
        for _ in range(3):
            assert_same(step(QUERY), flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod))
        seen.append(step(QUERY))
        assert not any(torch.equal(seen[-1], x) for x in seen[:-1])

    check()
    table.mul_(3)
    check()
    table = torch.rand(HQ)
    check()
    table = torch.rand(HQ + 3).double()
    check()
    table = torch.rand(HQ, 2)[:, 1]
    check()
    cap = 1
    check()
    window = 3
    check()
    use_cap = False
    check()
    with mock.patch.dict(globals(), factor=0.5):
        check()
    table = [0.1, 0.2, 0.3, 0.4]
    with pytest.raises(flexdecode.TraceError) as caught:
        flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod)
    with pytest.raises(flexdecode.TraceError, match=re.escape(str(caught.value))):
        step(QUERY)


@pytest.mark.parametrize("kind", ["score_mod", "mask_mod"])
def test_a_mod_of_which_nothing_is_proven_becomes_another_one(kind):
    flag = True

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * 2 if flag else score + kv_idx

    def mask_mod(b, h, q_idx, kv_idx):
        return kv_idx % 2 == 0 if flag else kv_idx % 3 == 0

    arguments = {"query": QUERY, "key": KEY, "value": VALUE, kind: score_mod if kind == "score_mod" else mask_mod}
    step = flexdecode.prepare(**arguments)
    for is_first in (True, False, True, False):
        flag = is_first
        for _ in range(3):
            assert_same(step(QUERY), flex_decode(**arguments))


def test_a_capture_that_cannot_be_read_is_refused():
    slopes = torch.ones(HQ)
    step = flexdecode.prepare(QUERY, KEY, VALUE, lambda s, b, h, q, k: s * slopes[h])
    slopes = torch.ones(HQ, device="meta")
    with pytest.raises(ValueError, match="`slopes` captured by score_mod is on meta"):
        step(QUERY)
    slopes = torch.ones(HQ, requires_grad=True)
    with pytest.raises(ValueError, match="`slopes` captured by score_mod requires grad"):
        step(QUERY)
    with torch.no_grad():
        assert_same(step(QUERY), flex_decode(QUERY, KEY, VALUE))


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "has"),
    [
        (lambda x: x[:1], "shape [1, 4, 2, 16], strides [128, 32, 16, 1], torch.float32 on cpu"),
        (lambda x: x[:, :, :1], "shape [2, 4, 1, 16], strides [128, 32, 16, 1], torch.float32 on cpu"),
        (
            lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
            "shape [2, 4, 2, 16], strides [128, 16, 64, 1], torch.float32 on cpu",
        ),
        (lambda x: x.half(), "shape [2, 4, 2, 16], strides [128, 32, 16, 1], torch.float16 on cpu"),
        (lambda x: x.to("meta"), "shape [2, 4, 2, 16], strides [128, 32, 16, 1], torch.float32 on meta"),
    ],
    ids=["batch", "tokens", "strides", "dtype", "device"],
)
@pytest.mark.parametrize("arguments", [{}, {"kv_lens": torch.tensor(5)}], ids=["", "a length on the CPU"])
def test_a_query_of_another_layout_is_refused(change, has, arguments):
    step = flexdecode.prepare(QUERY, KEY, VALUE, **arguments)
    with pytest.raises(ValueError) as caught:
        step(change(QUERY))
    assert str(caught.value) == (
        "`query` was prepared with shape [2, 4, 2, 16], strides [128, 32, 16, 1], torch.float32 on cpu, and has "
        f"{has} now: prepare the call again: flexdecode.prepare(...)"
    )
    assert_same(step(QUERY), flex_decode(QUERY, KEY, VALUE, **arguments))


@pytest.mark.parametrize("name", ["key", "value", "kv_lens", "sinks"])
@pytest.mark.parametrize("change", [lambda x: x.resize_(1, *x.shape[1:]), lambda x: x.set_(x.cpu().to(torch.bfloat16))])
def test_a_tensor_whose_layout_changes_in_place_is_refused(name, change):
    arguments = {"key": KEY.clone(), "value": VALUE.clone(), "kv_lens": LENS.clone(), "sinks": torch.zeros(HQ)}
    step = flexdecode.prepare(QUERY, **arguments)
    step(QUERY)
    with contextlib.suppress(RuntimeError):
        change(arguments[name])
    if arguments[name].shape[0] != 1:
        arguments[name].data = arguments[name].data.to(torch.bfloat16)
    with pytest.raises(ValueError, match=f"^`{name}` was prepared with shape .*: prepare the call again"):
        step(QUERY)


def test_other_memory_of_the_same_layout_is_read():
    key = KEY.clone()
    step = flexdecode.prepare(QUERY, key, VALUE)
    step(QUERY)
    key.set_(KEY * 2)
    assert_same(step(QUERY), flex_decode(QUERY, KEY * 2, VALUE))
    key.data = KEY * 3
    assert_same(step(QUERY), flex_decode(QUERY, KEY * 3, VALUE))


def test_a_query_of_another_alignment_or_class():
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    shifted = torch.zeros(QUERY.numel() + 1)[1:].view(QUERY.shape).copy_(QUERY)
    expected = flex_decode(QUERY, KEY, VALUE)
    for query in (shifted, torch.nn.Parameter(QUERY, requires_grad=False), QUERY, shifted):
        assert_same(step(query), expected)
    with pytest.raises(TypeError, match=r"`query` must be a torch\.Tensor, got list"):
        step([1.0])


def test_gradients_that_are_switched_on_later():
    learned, slopes = QUERY.clone().requires_grad_(), torch.ones(HQ, requires_grad=True)
    mod = lambda s, b, h, q, k: s * slopes[h]
    with torch.no_grad():
        steps = flexdecode.prepare(learned, KEY, VALUE), flexdecode.prepare(QUERY, KEY, VALUE, mod)
        for step, query in zip(steps, (learned, QUERY), strict=True):
            for _ in range(3):
                assert_same(step(query), flex_decode(QUERY, KEY, VALUE))
    for step, query, name in zip(steps, (learned, QUERY), ("`query`", "`slopes` captured by score_mod"), strict=True):
        with pytest.raises(ValueError, match=f"{name} requires grad"):
            step(query)


def test_gradients_and_inference_mode():
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    expected = flex_decode(QUERY, KEY, VALUE)
    learned = QUERY.clone().requires_grad_()
    with pytest.raises(ValueError, match="`query` requires grad, but flex_decode is forward only"):
        step(learned)
    with torch.no_grad():
        assert_same(step(learned), expected)
    for _ in range(2):
        with torch.inference_mode():
            for _ in range(3):
                out = step(QUERY.clone())
                assert torch.equal(out, expected) and out.is_inference()
        out = step(QUERY)
        assert torch.equal(out, expected) and not out.is_inference()
    with torch.inference_mode():
        inside = flexdecode.prepare(QUERY, KEY, VALUE)
        inside(QUERY)
    out = inside(QUERY)
    assert torch.equal(out, expected) and not out.is_inference()


@pytest.mark.parametrize("debug", [False, True], ids=["", "debug"])
def test_strides_of_dimensions_of_size_1_do_not_matter(debug):
    """The usual query of a decode step is a view of `[B, 1, Hq * D]`."""
    query, key, value = make_inputs(2, HQ, 1, 1, N, D)
    lens, sinks = torch.tensor([24, 13]), torch.zeros(HQ)
    arguments = {"kv_lens": lens, "sinks": sinks, "options": DecodeOptions(debug=debug)}
    step = flexdecode.prepare(query, key, value, **arguments)
    projected = query.flatten(1).unsqueeze(1).view(2, 1, HQ, D).transpose(1, 2)
    assert projected.stride() != query.stride()
    expected = flex_decode(query, key, value, **arguments)
    anew = PreparedCall._run_anew if debug else mock.Mock(side_effect=AssertionError("the call was read anew"))
    with mock.patch.object(PreparedCall, "_run_anew", anew):
        for strange in (projected, query.as_strided(query.shape, (HQ * D, D, 0, 1)), query):
            assert_same(step(strange), expected)
            out = torch.full_like(query, 7).as_strided(query.shape, (HQ * D, D, 5, 1))
            assert step(strange, out=out) is out and torch.equal(out, expected)
        key.as_strided_(key.shape, (N * D, 3, D, 1))
        assert_same(step(projected), expected)
    key.as_strided_(key.shape, (N * D, 3, 1, N))
    with pytest.raises(ValueError, match=r"^`key` was prepared with .* strides \[384, 3, 1, 24\]"):
        step(projected)


def test_a_tensor_that_is_query_and_key():
    both = QUERY[:, :HKV].clone()
    step = flexdecode.prepare(both, both, both)
    query = torch.randn(both.shape)
    for _ in range(2):
        assert_same(step(query), flex_decode(query, both, both))
    both.set_(torch.randn(both.shape))
    assert_same(step(query), flex_decode(query, both, both))
    assert_same(step(both), flex_decode(both, both, both))


def test_the_memory_of_queries_and_outputs_is_not_kept():
    query, out = QUERY.clone(), torch.empty_like(QUERY)
    step = flexdecode.prepare(query, KEY, VALUE)
    step(query, out=out)
    kept = [weakref.ref(x.untyped_storage()) for x in (query, out)]
    gone = [weakref.ref(x) for x in (query, out)]
    del query, out
    gc.collect()
    assert [one() for one in (*gone, *kept)] == [None] * 4
    assert_same(step(QUERY), flex_decode(QUERY, KEY, VALUE))
    assert "query float32 [2, 4, 2, 16] on cpu" in repr(step)


def test_queries_of_both_modes_in_turn():
    """Made in inference mode or outside of it, and computed in either: each is read anew once."""
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    with torch.inference_mode():
        inside = QUERY.clone()
    expected = flex_decode(QUERY, KEY, VALUE)

    def steps():
        for mode in (False, True):
            with torch.inference_mode(mode):
                for query in (QUERY, inside):
                    out = step(query)
                    assert torch.equal(out, expected) and out.is_inference() is mode

    steps()
    with mock.patch.object(PreparedCall, "_run_anew", side_effect=AssertionError("the call was read anew")):
        steps()


# --- The output -------------------------------------------------------------------------------------------------------


def test_each_call_has_an_output_of_its_own():
    step = flexdecode.prepare(QUERY, KEY, VALUE, return_lse=True)
    results = [step(new_query(seed)) for seed in range(3)]
    for seed, (out, lse) in enumerate(results):
        assert_same((out, lse), flex_decode(new_query(seed), KEY, VALUE, return_lse=True))
    assert len({x.data_ptr() for pair in results for x in pair}) == 6


def test_an_output_of_any_layout_and_one_that_does_not_fit():
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    expected = flex_decode(QUERY, KEY, VALUE)
    wide = torch.zeros(B, HQ, Q, 2 * D)
    for out in (wide[..., ::2], wide[..., :D], torch.zeros(expected.shape), wide[..., ::2], wide[..., 1::2]):
        assert step(QUERY, out=out) is out and torch.equal(out, expected)
    with pytest.raises(ValueError, match="`out`"):
        step(QUERY, out=torch.zeros(B, HQ, Q, D + 1))
    with pytest.raises(ValueError, match="`out` must not share memory with `key`"):
        step(QUERY, out=KEY.view(-1)[: expected.numel()].view(expected.shape))
    with pytest.raises(ValueError, match="`out` must not share memory with `query`"):
        step(QUERY, out=QUERY)


# --- What it spares ---------------------------------------------------------------------------------------------------


def test_nothing_is_traced_planned_or_compiled():
    clear_cache()
    lens, table, window = LENS.clone(), torch.rand(HQ), 5
    step = flexdecode.prepare(
        QUERY, KEY, VALUE, lambda s, b, h, q, k: s * table[h], lambda b, h, q, k: q - k < window, kv_lens=lens
    )
    before, plans = cache_info(), [id(plan) for known in run._calls.values() for plan in known.plans.values()]
    steps = 6
    with mock.patch.object(prepared_call, "find_plan", side_effect=AssertionError("a plan was looked for")):
        for n in range(steps):
            lens.sub_(1)
            table, window = table * 2, window + n
            step(new_query(n))
            step(new_query(n), out=torch.empty_like(QUERY))
    after = cache_info()
    assert (after.calls, after.hits) == (before.calls + 2 * steps, before.hits + 2 * steps)
    assert (after.traces, after.generations, after.compilations) == (2, 0, 0)
    assert plans == [id(plan) for known in run._calls.values() for plan in known.plans.values()]


def test_it_survives_clear_cache():
    step = flexdecode.prepare(QUERY, KEY, VALUE, mods.alibi(HQ))
    expected = step(QUERY)
    clear_cache()
    assert_same(step(QUERY), expected)


def test_several_threads():
    lens = torch.tensor([20, 20])
    step = flexdecode.prepare(QUERY, KEY, VALUE, mods.alibi(HQ), mods.causal(), kv_lens=lens, return_lse=True)
    queries = [new_query(seed) for seed in range(8)]
    expected = [
        flex_decode(x, KEY, VALUE, mods.alibi(HQ), mods.causal(), kv_lens=lens, return_lse=True) for x in queries
    ]
    wrong = []

    def work(seed):
        for _ in range(30):
            found = step(queries[seed]), step(queries[seed], out=torch.empty_like(QUERY))
            wrong.extend(seed for one in found if not all(map(torch.equal, one, expected[seed])))

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


# --- How it looks -----------------------------------------------------------------------------------------------------


def test_errors_are_those_of_flex_decode():
    """Also where the plan is known, which checks lengths and scales only when it runs."""
    flex_decode(QUERY, KEY, VALUE, scale=1.0)
    flex_decode(QUERY, KEY, VALUE, kv_lens=LENS)
    with pytest.raises(TypeError, match=r"^prepare\(\) got an unexpected keyword argument 'kv_len'"):
        flexdecode.prepare(QUERY, KEY, VALUE, kv_len=3)
    with pytest.raises(TypeError, match=r"^prepare\(\) takes no `out`: .*, `step\(query, out=\.\.\.\)`$"):
        flexdecode.prepare(QUERY, KEY, VALUE, out=torch.empty_like(QUERY))
    for arguments in (
        {"kv_lens": torch.tensor([1])},
        {"scale": float("nan")},
        {"key": KEY[:, :1, :, :8]},
        {"cache": 3},
        {"return_lse": 1},
        {"return_lse": None},
    ):
        whole = {"query": QUERY, "key": KEY, "value": VALUE, **arguments}
        with pytest.raises((ValueError, TypeError)) as caught:
            flex_decode(**whole)
        with pytest.raises(type(caught.value), match=re.escape(str(caught.value))):
            flexdecode.prepare(**whole)


def test_a_length_that_is_too_large_is_refused_at_the_call():
    lens = LENS.clone()
    step = flexdecode.prepare(QUERY, KEY, VALUE, kv_lens=lens)
    lens.fill_(N + 1)
    with pytest.raises(ValueError, match="`kv_lens` must lie between 0 and N = 24"):
        step(QUERY)


def test_its_signature_and_what_it_shows():
    of_call = inspect.signature(flex_decode).parameters.values()
    assert inspect.signature(flexdecode.prepare) == inspect.Signature([x for x in of_call if x.name != "out"])
    step = flexdecode.prepare(QUERY, KEY, VALUE, mods.alibi(HQ), mods.causal(), kv_lens=LENS, return_lse=True)
    assert isinstance(step, PreparedCall)
    assert repr(step) == (
        "<PreparedCall: query float32 [2, 4, 2, 16] on cpu, key [2, 2, 24, 16], alibi, causal, kv_lens, return_lse>"
    )


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_it_belongs_to_its_process(copied):
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    with pytest.raises(
        TypeError, match=r"^a prepared call cannot be pickled or copied: .* flexdecode\.prepare\(\.\.\.\)"
    ):
        copied(step)


# --- In regions that are traced ---------------------------------------------------------------------------------------


def recording_backend():
    """A backend of torch.compile, and the list of the functions that the graphs call that it gets."""
    traced = []

    def backend(graph, _):
        traced.extend(node.target for node in graph.graph.nodes if node.op.startswith("call"))
        return graph

    return backend, traced


def test_a_region_that_must_be_whole_is_refused_with_what_to_call():
    step = flexdecode.prepare(QUERY, KEY, VALUE)
    for region in (lambda x: step(x) + 1, lambda x: flexdecode.prepare(x, KEY, VALUE)(x)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"flexdecode\.flex_decode, which becomes one operation there"):
            torch.compile(region, backend="eager", fullgraph=True)(QUERY)


def test_a_compiled_region_ends_before_the_call():
    """Nothing of flexdecode is traced, however many prepared calls there are; a warning would be an error."""
    torch._dynamo.reset()
    steps = [flexdecode.prepare(QUERY, KEY, VALUE, scale=0.1 * n) for n in range(12)]
    backend, traced = recording_backend()

    @functools.partial(torch.compile, backend=backend)
    def region(x, step, out=None):
        return step(x * 2, out=out) + 1

    with mock.patch.object(PreparedCall, "_run_anew", side_effect=AssertionError("the call was read anew")):
        for _ in range(2):
            for step in steps:
                assert_same(region(QUERY, step), step(QUERY * 2) + 1)
                assert_same(region(QUERY, step, torch.empty_like(QUERY)), step(QUERY * 2) + 1)
    assert set(traced) == {operator.mul, operator.add}


def test_a_call_is_prepared_in_a_compiled_region():
    torch._dynamo.reset()
    backend, traced = recording_backend()
    alibi = mods.alibi(HQ)

    def region(x):
        return flexdecode.prepare(x, KEY, VALUE, alibi)(x * 2) + 1

    for _ in range(2):
        assert_same(torch.compile(region, backend=backend)(QUERY), region(QUERY))
    assert set(traced) == {operator.mul, operator.add}


@pytest.mark.parametrize("strict", [False, True])
def test_it_cannot_be_exported(strict):
    step = flexdecode.prepare(QUERY, KEY, VALUE)

    class Model(torch.nn.Module):
        def __init__(self, call):
            super().__init__()
            self.call = call

        def forward(self, x):
            return self.call(x)

    for call in (step, lambda x: flexdecode.prepare(x, KEY, VALUE)(x)):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=r"flexdecode\.flex_decode, which becomes one operation there"):
            torch.export.export(Model(call), (QUERY,), strict=strict)
