"""Calls that come again: what is remembered of them never decides for a call that differs."""

import contextlib
import random
import types
from operator import itemgetter
from unittest import mock

import pytest
import torch
from support import make_inputs

import flexdecode
from flexdecode import DecodeOptions, cache_info, clear_cache, flex_decode, mods
from flexdecode.call.device import KNOWN_DEVICES
from flexdecode.codegen.arguments import ARGUMENTS, PLACES
from flexdecode.frontend.captures import Simple, read, same_layouts
from flexdecode.frontend.captures import quick as quick_module
from flexdecode.runtime import prepare, run
from flexdecode.runtime.identity import _quick, identify

TRITON = DecodeOptions(backend="triton")
B, HQ, HKV, N, D = 2, 4, 2, 64, 64
H200, _ = KNOWN_DEVICES["H200"]


class Pass:
    """Stands for a compiled pass; keeps what it was compiled from and what it was launched with."""

    block_dv, of_small = 64, False

    def __init__(self, log, *of):
        self.log, self.of, self.run = log, of, self
        names = ["out", "partial_out", "kv_lens", "stride_ob", "num_splits"]
        self.pick = itemgetter(*[PLACES[name] for name in names])

    def __call__(self, grid, stream, arguments):
        self.log.append((self.of, grid, stream, (*arguments,)))

    def encode_descriptors(self, key, value):
        return "key", key.base.data_ptr(), "value", value.base.data_ptr()


@pytest.fixture
def launched(monkeypatch):
    """What calls launch, which go the way of an H200 up to that: a function of a call that gives its launches."""
    log = []
    monkeypatch.setattr(prepare, "device_facts", lambda _: H200)
    monkeypatch.setattr(prepare, "find_kernel", lambda spec, facts, proven: Pass(log, spec, proven.text))
    monkeypatch.setattr(prepare, "find_combine", lambda spec, facts: Pass(log, spec))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def launches(call):
        log.clear()
        results = call()
        named = results if isinstance(results, tuple) else (results,)
        known = {x.data_ptr(): f"result {i}" for i, x in enumerate(named)}
        return [(of, grid, stream, [known.get(x, x) if x else x for x in given]) for of, grid, stream, given in log]

    clear_cache()
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch._C, "_cuda_getCurrentRawStream", lambda _: 7, create=True))
        yield launches
    clear_cache()


# --- The layouts of tensors -------------------------------------------------------------------------------------------

CHANGES = {
    "shape": lambda x: x[:1],
    "strides": lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
    "dtype": lambda x: x.half(),
    "rank": lambda x: x[0],
    "device": lambda x: x.to("meta"),
    "layout": lambda x: x.to_sparse(),
    "class": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "gradient": lambda x: x.clone().requires_grad_(),
    "no tensor": lambda x: None,
}


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("place", [0, 1])
def test_another_layout_is_seen(name, place):
    tensors = [torch.randn(2, 3), torch.zeros(2, 3)]
    same = same_layouts(tensors)
    assert same(*tensors) and same(torch.ones(2, 3), tensors[1])
    tensors[place] = CHANGES[name](tensors[place])
    assert not same(*tensors)


def test_a_layout_that_is_changed_in_place_is_seen():
    x = torch.randn(2, 3)
    same = same_layouts([x])
    x.transpose_(0, 1)
    assert not same(x)
    x.transpose_(0, 1)
    assert same(x)
    x.data = x.data.half()
    assert not same(x)


def test_steps_of_dimensions_of_size_1_are_compared_where_they_are_asked_for():
    x = torch.randn(2, 1, 3)
    others = x.as_strided(x.shape, (3, 7, 1)), x.as_strided(x.shape, (3, 0, 1))
    exact, free = same_layouts([x]), same_layouts([x], single_steps=False)
    assert exact(x) and not any(exact(other) for other in others)
    assert free(x) and all(free(other) for other in others)
    assert not free(torch.zeros(2, 3, 3)[:, :1]) and not free(torch.zeros(2, 1, 1).expand(2, 1, 3))
    assert not free(torch.zeros(2, 2, 3)) and not free(torch.zeros(2, 1, 4))


def test_what_pytorch_cannot_compare_is_read_each_time(monkeypatch, launched):
    class Sub(torch.Tensor):
        pass

    assert same_layouts([torch.zeros(2).as_subclass(Sub)]) is None
    monkeypatch.setattr(quick_module, "_Guards", None)
    assert same_layouts([torch.zeros(2)]) is None
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    alibi = mods.alibi(HQ)
    call = lambda: flex_decode(query, key, value, alibi, options=TRITON)
    first = launched(call)
    assert all(launched(call) == first for _ in range(4)) and not run._recent


def test_layers_that_take_turns_are_all_remembered(launched):
    calls = [make_inputs(B, HQ, HKV, 1, length, D) for length in (N, 2 * N, 3 * N, N // 2)]
    for _ in range(5):
        for call in calls:
            flex_decode(*call, options=TRITON)
    (known,) = run._recent.values()
    assert len(known) == len(calls) == run.MAX_RECENT
    before = cache_info()
    with mock.patch.object(run, "_layouts", side_effect=AssertionError("layouts were read")):
        for call in calls:
            flex_decode(*call, options=TRITON)
    assert cache_info().hits == before.hits + len(calls)


# --- Simple functions -------------------------------------------------------------------------------------------------

number, table, flag, name = 3, torch.randn(4), True, "a"


def simple(score, b, h, q_idx, kv_idx):
    return torch.where(q_idx > number, score + table[h], score) if flag and name else score


def test_a_simple_function_is_read_as_the_walk_reads_it(monkeypatch):
    key, leaves, _ = read(simple)
    found = Simple.of(simple)
    assert [id(x) for x in found.read(simple)] == [id(x) for x in leaves]
    for variable, other, is_same in (
        ("number", 4, True), ("number", 4.0, False), ("number", True, False), ("number", float("inf"), False),
        ("table", torch.randn(4), True), ("table", torch.randn(5), False), ("table", torch.randn(4).half(), False),
        ("table", torch.randn(4, 1), False), ("flag", False, False), ("name", "b", False), ("flag", 1, False),
        ("table", [1.0], False), ("number", torch.randn(4), False), ("torch", mods, False),
    ):  # fmt: skip
        with monkeypatch.context() as patch:
            patch.setitem(globals(), variable, other)
            again = found.read(simple)
            assert (again is not None) == is_same, (variable, other)
            if is_same:
                walked = read(simple)
                assert walked[0] == key and [id(x) for x in again] == [id(x) for x in walked[1]]


def test_functions_that_are_not_simple():
    config = type("Config", (), {"window": 3})()

    def with_default(b, h, q_idx, kv_idx, window=3):
        return q_idx - kv_idx < window

    def with_attribute(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    def with_import(b, h, q_idx, kv_idx):
        import math

        return q_idx - kv_idx < math.pi

    with_attribute.window = 3
    one, other = table, table
    for mod in (
        with_default, with_attribute, with_import, mods.and_masks(mods.causal(), mods.causal()),
        lambda b, h, q, k: q - k < config.window, lambda b, h, q, k: q - k < getattr(config, "window"),  # noqa: B009
        lambda b, h, q, k: one[h] < other[h], lambda b, h, q, k: mods.causal()(b, h, q, k), mods.causal,
    ):  # fmt: skip
        read(mod)
        assert Simple.of(mod) is None
    window = 3
    complete = lambda b, h, q, k: q - k < window
    read(complete)
    assert Simple.of(complete) is not None
    lacking = types.FunctionType(complete.__code__, globals(), closure=(types.CellType(),))
    assert Simple.of(lacking) is None and Simple.of(complete).read(lacking) is None


def test_two_names_of_one_tensor_are_another_mod(launched):
    """The graph with two tensors would read the right ones; that with one would not, if they differ later."""
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    one, other = torch.ones(HQ), torch.ones(HQ)
    mod = lambda s, b, h, q, k: s * one[h] + other[h]
    for _ in range(4):
        identify("score_mod", mod)
        flex_decode(query, key, value, mod, options=TRITON)
    quick = identify("score_mod", mod)
    assert quick.frame is not None
    other = one
    assert identify("score_mod", mod).frame is None and identify("score_mod", mod).place != quick.place


def test_a_number_that_is_a_constant_of_the_graph(launched):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    period = 3
    mod = lambda b, h, q, k: k // period == 0
    call = lambda: flex_decode(query, key, value, None, mod, options=TRITON)
    texts = {}
    for _ in range(4):
        for period in (3, 5):
            texts.setdefault(period, set()).add(launched(call)[0][0][1])
    assert len(texts[3]) == len(texts[5]) == 1 and texts[3] != texts[5]
    assert cache_info().traces == 2


def test_a_capture_that_requires_grad_is_refused_once_gradients_are_on(launched):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    slopes = torch.ones(HQ)
    call = lambda: flex_decode(query, key, value, lambda s, b, h, q, k: s * slopes[h], options=TRITON)
    for _ in range(4):
        call()
    slopes = slopes.clone().requires_grad_()
    for _ in range(4):
        with torch.no_grad():
            call()
        with pytest.raises(ValueError, match="captured by score_mod requires grad"):
            call()


def test_a_forgotten_mod_is_read_anew(launched):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D)
    mod = mods.alibi(HQ)
    for _ in range(3):
        for _ in range(4):
            flex_decode(query, key, value, mod, options=TRITON)
        assert _quick and run._recent
        clear_cache()
        assert not _quick and not run._recent


# --- Whole calls ------------------------------------------------------------------------------------------------------


class Drawn:
    """Draws calls. Each has its own tensors, which a second call with the same arguments reads again."""

    def __init__(self, seed):
        self.random = random.Random(seed)
        self.window, self.cap, self.slopes = 30, 20.0, torch.randn(HQ)

    def tensor(self, *shape, dtype=torch.float16):
        """Zeros, with other strides or another alignment now and then."""
        kind = self.random.randrange(6)
        if kind == 0 and len(shape) == 4:
            return torch.zeros(shape[0], shape[2], shape[1], shape[3], dtype=dtype).transpose(1, 2)
        if kind == 1:
            return torch.zeros(2 * torch.Size(shape).numel() + 1, dtype=dtype)[1:][: torch.Size(shape).numel()].view(
                shape
            )
        return torch.zeros(shape, dtype=dtype)

    def draw(self):
        """The arguments of a call."""
        tokens, length = self.random.choice([1, 1, 2]), self.random.choice([N, N, 2 * N])
        key = self.tensor(B, HKV, length, D)
        value = self.random.choice([key, self.tensor(B, HKV, length, D), key[..., : D // 2]])
        arguments = {"query": self.tensor(B, HQ, tokens, D), "key": key, "value": value, "options": TRITON}
        optional = {
            "kv_lens": lambda: self.random.choice([5, 9, torch.tensor([3, 4]), torch.tensor([3, 4]).int()]),
            "sinks": lambda: torch.zeros(HQ),
            "scale": lambda: self.random.choice([0.5, 1.0]),
            "q_offset": lambda: self.random.choice([3, 7, torch.tensor([3, 4])]),
            "out": lambda: self.tensor(B, HQ, tokens, value.shape[3]),
            "return_lse": lambda: True,
            "score_mod": lambda: self.random.choice([self.softcap, self.alibi]),
            "mask_mod": lambda: self.sliding,
        }
        names = self.random.sample([*optional], self.random.choice([0, 1, 2, 3]))
        return arguments | {name: optional[name]() for name in names}

    def softcap(self, s, b, h, q, k):
        return torch.tanh(s / self.cap) * self.cap

    def change(self):
        """Binds the variables of the mods anew."""
        cap, slopes, window = self.random.choice([20.0, 30.0]), torch.randn(self.random.choice([HQ, HQ + 1])), 20
        self.softcap = lambda s, b, h, q, k: torch.tanh(s / cap) * cap
        self.alibi = lambda s, b, h, q, k: s - slopes[h] * (q - k)
        self.sliding = lambda b, h, q, k: q - k < window


@pytest.mark.parametrize("seed", range(8))
def test_a_call_that_comes_again_launches_what_a_first_call_launches(seed, launched):
    """Whatever came before it."""
    drawn = Drawn(seed)
    calls = []
    for _ in range(12):
        drawn.change()
        arguments = drawn.draw()
        clear_cache()
        calls.append((arguments, launched(lambda arguments=arguments: flex_decode(**arguments))))
    clear_cache()
    for _ in range(60):
        arguments, expected = drawn.random.choice(calls)
        found = launched(lambda arguments=arguments: flex_decode(**arguments))
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert one[:3] == other[:3]
            assert _without_workspace(one[3]) == _without_workspace(other[3])
    assert run._recent


def _without_workspace(given, others=()):
    """Arguments without the addresses of the workspace, which grows, and without those of some other names."""
    names = ("partial_out", "partial_max", "partial_sum", "item_parts", *others)
    shift = len(given) - len(ARGUMENTS)  # descriptors are several arguments
    if shift < 0:  # of the second pass
        return [x for i, x in enumerate(given) if i != 1]
    return [x for i, x in enumerate(given) if i - shift not in [PLACES[name] for name in names]]


@pytest.mark.parametrize("seed", range(8))
def test_a_prepared_call_launches_what_flex_decode_launches(seed, launched):
    """But for the stride over one token, which no address depends on."""
    drawn = Drawn(100 + seed)
    for _ in range(10):
        drawn.change()
        arguments = drawn.draw()
        expected = launched(lambda arguments=arguments: flex_decode(**arguments))
        out = arguments.pop("out", None)
        step = flexdecode.prepare(**arguments)
        free = ["stride_om"] if arguments["query"].shape[2] == 1 else []
        for _ in range(3):
            found = launched(lambda: step(arguments["query"], out=out))
            assert len(found) == len(expected)
            for one, other in zip(found, expected, strict=True):
                assert one[:3] == other[:3]
                assert _without_workspace(one[3], free) == _without_workspace(other[3], free)


def shifted(x):
    """The same, not aligned to 16 bytes."""
    return torch.empty(x.numel() + 1, dtype=x.dtype)[1:].view(x.shape).copy_(x)


def pairs():
    """Calls that differ in one thing, on which a plan or a launch depends: what it is, and arguments of both."""
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D, dtype=torch.float16)
    out, starts = torch.empty_like(query), torch.tensor([0, 100, 200], dtype=torch.int32)
    packed = torch.zeros(200, HQ, D, dtype=torch.float16)
    table, large = torch.zeros(HQ, N), torch.zeros(HQ, N - 1)

    def biased(bias):
        return lambda s, b, h, q, k: s + bias[h, k]

    def windowed(window):
        return lambda s, b, h, q, k: torch.where(q - k < window, s + table[h, q - k], s)

    of = {"query": query, "key": key, "value": value}
    return {
        "values in the memory of keys": (of | {"value": key[:]}, of),
        "one tensor for both": (of | {"value": key}, of),
        "alignment of the query": (of, of | {"query": shifted(query)}),
        "alignment of keys": (of, of | {"key": shifted(key)}),
        "alignment of values": (of, of | {"value": shifted(value)}),
        "alignment of the output": (of | {"out": out}, of | {"out": shifted(out)}),
        "one length": (of | {"kv_lens": 50}, of | {"kv_lens": 7}),
        "a length": (of | {"kv_lens": 50}, of | {"kv_lens": torch.tensor([50, 50])}),
        "a hint": (
            {"query": packed, "key": key, "value": value, "cu_seqlens_q": starts, "max_q_len": 1},
            {"query": packed, "key": key, "value": value, "cu_seqlens_q": starts, "max_q_len": 100},
        ),
        "scale": (of | {"scale": 0.5}, of | {"scale": 0.25}),
        "a size that proofs use": (of | {"score_mod": biased(table)}, of | {"score_mod": biased(large)}),
        "strides of a capture": (of | {"score_mod": biased(table)}, of | {"score_mod": biased(table.T.contiguous().T)}),
        "a number that proofs use": (of | {"score_mod": windowed(5)}, of | {"score_mod": windowed(N + 5)}),
        "the log-sum-exp": (of, of | {"return_lse": True}),
    }


@pytest.mark.parametrize("name", pairs())
@pytest.mark.parametrize("is_backward", [False, True], ids=["", "backward"])
def test_one_difference_is_seen(name, is_backward, launched):
    first, second = pairs()[name][:: -1 if is_backward else 1]
    call = lambda arguments: launched(lambda: flex_decode(**arguments, options=TRITON))
    expected = call(second)
    clear_cache()
    call(first)
    for _ in range(3):
        assert call(first) != expected
    for _ in range(4):
        found = call(second)
        assert [one[:3] for one in found] == [one[:3] for one in expected]
        for one, other in zip(found, expected, strict=True):
            assert _without_workspace(one[3]) == _without_workspace(other[3])


def test_a_prepared_call_follows_memory_that_is_replaced(launched):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D, dtype=torch.float16)
    lens, slopes = torch.tensor([5, 6]), torch.rand(HQ)
    mod = lambda s, b, h, q, k: s - slopes[h] * (q - k)
    arguments = {"key": key, "value": value, "score_mod": mod, "kv_lens": lens, "options": TRITON}
    step = flexdecode.prepare(query, **arguments)
    before = launched(lambda: step(query))
    kept = [query, *[x.clone() for x in (key, value, lens, slopes)]]  # so that no address is used again
    for new, old in zip(kept[1:], (key, value, lens, slopes), strict=True):
        old.set_(new)
        expected = launched(lambda: flex_decode(query, **arguments))
        for _ in range(2):
            found = launched(lambda: step(query))
            assert found != before
            for one, other in zip(found, expected, strict=True):
                assert _without_workspace(one[3]) == _without_workspace(other[3])
        before = found


def test_a_prepared_call_refuses_an_output_in_the_memory_of_others(launched):
    query, key, value = make_inputs(B, HQ, HKV, 1, N, D, dtype=torch.float16)
    slopes, both = torch.rand(B, HQ, 1, D).half(), torch.zeros(B, HQ, 1, 2 * D, dtype=torch.float16)
    step = flexdecode.prepare(query, key, value, lambda s, b, h, q, k: s * slopes[b, h, q, 0], options=TRITON)
    for name, out in (
        ("`query`", query), ("`key`", key.view(-1)[: query.numel()].view(query.shape)),
        ("a tensor that score_mod captures", slopes),
    ):  # fmt: skip
        for _ in range(2):
            with pytest.raises(ValueError, match=f"`out` must not share memory with {name}"):
                step(query, out=out)
    beside = flexdecode.prepare(both[..., :D], key, value, options=TRITON)
    for _ in range(2):  # interleaved
        assert len(launched(lambda: beside(both[..., :D], out=both[..., D:]))) > 0
