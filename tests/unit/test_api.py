"""`flex_decode` as a user meets it: the public names, threads, capture errors, and the composition of features."""

import gc
import inspect
import threading
import weakref

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import MODS, assert_close_to_reference, make_inputs

import flexdecode
from flexdecode import DecodeOptions, FlexDecodeError, cache_info, clear_cache, flex_decode, mods

QUERY, KEY, VALUE = make_inputs(2, 4, 2, 2, 19, 16)
LENS = torch.tensor([19, 11])


def refused(error, message, score_mod=None, mask_mod=None):
    with pytest.raises(error) as caught:
        flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod)
    assert str(caught.value) == message


# --- The package ------------------------------------------------------------------------------------------------------


def test_public_names():
    for name in flexdecode.__all__:
        assert hasattr(flexdecode, name)
    assert {"flex_decode", "DecodeOptions", "mods", "cache_info", "clear_cache", "TraceError"} <= set(
        flexdecode.__all__
    )
    assert flexdecode.__version__.count(".") == 2


def test_the_signature_is_flex_attentions_and_more():
    parameters = inspect.signature(flex_decode).parameters
    assert [*parameters][:5] == ["query", "key", "value", "score_mod", "mask_mod"]
    keywords = {p.name for p in parameters.values() if p.kind is p.KEYWORD_ONLY}
    assert keywords >= {"kv_lens", "q_offset", "scale", "return_lse", "out", "options"}
    assert all(p.default is None or p.default is False for p in [*parameters.values()][3:])


def test_every_public_name_has_a_docstring():
    for name in set(flexdecode.__all__) - {"__version__"}:
        assert inspect.getdoc(getattr(flexdecode, name)), name


# --- Captured tensors that cannot be read -----------------------------------------------------------------------------

bias = torch.randn(4)


def test_a_capture_on_another_device():
    there = bias.to("meta")
    refused(
        ValueError,
        "the tensor `there` captured by score_mod is on meta, but `query` is on cpu: move it there before the call, "
        "`there = there.to(query.device)`",
        lambda s, b, h, q, k: s + there[h],
    )
    refused(
        ValueError,
        "the tensor `there` captured by mask_mod is on meta, but `query` is on cpu: move it there before the call, "
        "`there = there.to(query.device)`",
        mask_mod=lambda b, h, q, k: there[h] > 0,
    )


def test_a_capture_that_is_not_dense():
    sparse = bias.to_sparse()
    message = "the tensor `sparse` captured by score_mod must be dense, got layout torch.sparse_coo"
    refused(ValueError, message, lambda s, b, h, q, k: s + sparse[h])


LEARNED = [bias.clone().requires_grad_(), torch.nn.Parameter(bias), torch.tensor(0.5, requires_grad=True)]


@pytest.mark.parametrize("capture", LEARNED)
def test_a_capture_that_requires_grad(capture):
    mod = lambda s, b, h, q, k: s + (capture[h] if capture.ndim else capture)
    refused(
        ValueError,
        "the tensor `capture` captured by score_mod requires grad, but flexdecode is forward only: call it under "
        "torch.no_grad(), or capture the tensor's .detach()",
        mod,
    )
    with torch.no_grad():
        out = flex_decode(QUERY, KEY, VALUE, mod)
    assert not out.requires_grad
    with torch.inference_mode():
        assert torch.equal(flex_decode(QUERY, KEY, VALUE, mod), out)


def test_captures_are_named_as_the_user_reaches_them():
    class Mod(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(bias.clone())

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.weight[h]

    with pytest.raises(ValueError, match=r"the tensor `self.weight` captured by score_mod requires grad"):
        flex_decode(QUERY, KEY, VALUE, Mod())


def test_a_capture_that_the_mod_does_not_read_may_be_anything():
    there, unused = bias.to("meta"), bias.clone().requires_grad_()

    def mod(score, b, h, q_idx, kv_idx):
        if there.device.type == "cpu" and unused.ndim:
            return score + there[h]
        return score * 2

    assert_close_to_reference(flex_decode(QUERY, KEY, VALUE, mod), None, QUERY, KEY, VALUE, lambda s, b, h, q, k: s * 2)


# --- Calls ------------------------------------------------------------------------------------------------------------


def test_calls_are_counted():
    clear_cache()
    for _ in range(3):
        flex_decode(QUERY, KEY, VALUE, mods.softcap(2.0))
    flex_decode(QUERY[:1], KEY[:1], VALUE[:1], mods.softcap(3.0))
    info = cache_info()
    assert (info.calls, info.hits, info.traces) == (4, 2, 1)


def test_a_failed_call_leaves_nothing_behind():
    clear_cache()
    for _ in range(2):
        with pytest.raises(FlexDecodeError):
            flex_decode(QUERY, KEY, VALUE, lambda s, b, h, q, k: s.item())
    assert (cache_info().calls, cache_info().hits, cache_info().traces) == (2, 0, 0)


def test_captures_that_change_between_calls():
    """Sizes and captured integers below an index make a new plan, because proofs rest on them; nothing else does."""
    clear_cache()

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * cap + table[h, kv_idx + shift]

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    seen = set()
    for values in (
        (19, 0, 1.0, 5), (19, 0, 2.0, 9), (19, 1, 2.0, 9), (20, 1, 0.5, 2), (20, 2, 0.5, 3), (19, 0, 1.0, 40),
        (0, 0, 1.0, 5), (20, 1, 3.0, 7),
    ):  # fmt: skip
        columns, shift, cap, window = values
        table = torch.randn(4, columns)
        out, lse = flex_decode(QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS, return_lse=True)
        assert_close_to_reference(out, lse, QUERY, KEY, VALUE, score_mod, mask_mod, kv_lens=LENS)
        seen.add((columns, shift))
        assert (cache_info().traces, cache_info().calls - cache_info().hits) == (2, len(seen))


def test_inputs_are_not_changed():
    copies = [x.clone() for x in (QUERY, KEY, VALUE, LENS)]
    flex_decode(QUERY, KEY, VALUE, mods.alibi(4), mods.causal(), kv_lens=LENS)
    assert all(torch.equal(x, y) for x, y in zip(copies, (QUERY, KEY, VALUE, LENS), strict=True))


def test_the_result_takes_no_part_in_autograd():
    assert flex_decode(QUERY, KEY, VALUE).grad_fn is None


def test_options_do_not_change_the_result():
    expected = flex_decode(QUERY, KEY, VALUE, mods.alibi(4), mods.causal())
    for options in (
        DecodeOptions(),
        DecodeOptions(backend="torch", num_splits=3, block_n=32),
        DecodeOptions(debug=True),
    ):
        assert torch.equal(flex_decode(QUERY, KEY, VALUE, mods.alibi(4), mods.causal(), options=options), expected)


def test_threads():
    """Threads with mods of their own, traced and run at the same time."""

    def make(number):
        if number % 2:
            return lambda s, b, h, q, k: s + h // (number + 1)
        return lambda s, b, h, q, k: s * number

    def decode(number):
        return flex_decode(QUERY, KEY, VALUE, make(number), mods.sliding_window(number + 1))

    def work():
        try:
            for _ in range(5):
                assert all(torch.equal(decode(number), expected[number]) for number in range(4))
        except BaseException as error:
            failures.append(error)

    expected = [decode(number) for number in range(4)]
    clear_cache()
    failures = []
    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_whose_tables_have_other_shapes():
    """One code, one trace, and a plan for each shape."""

    def make(size):
        table = torch.arange(4.0 * size).reshape(4, size).sin()
        return lambda s, b, h, q, k: s + table[h, k]

    def work(size):
        try:
            for _ in range(5):
                assert torch.equal(flex_decode(QUERY, KEY, VALUE, make(size)), expected[size])
        except BaseException as error:
            failures.append(error)

    sizes = (1, 18, 19, 30)
    expected = {size: flex_decode(QUERY, KEY, VALUE, make(size)) for size in sizes}
    clear_cache()
    failures = []
    threads = [threading.Thread(target=work, args=(size,)) for size in sizes]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_a_call_inside_a_mod():
    """It is refused, because a mod computes elementwise, and does not disturb the trace around it."""
    inner = flex_decode

    def decoding(score, b, h, q_idx, kv_idx):
        return score + inner(QUERY, KEY, VALUE)[b, h, 0, 0]

    with pytest.raises(FlexDecodeError):
        flex_decode(QUERY, KEY, VALUE, decoding)
    out = flex_decode(QUERY, KEY, VALUE, mods.softcap(2.0))
    assert_close_to_reference(out, None, QUERY, KEY, VALUE, mods.softcap(2.0))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_the_default_dtype_does_not_matter(dtype):
    """Programs that load a model in half precision set it."""
    mod = lambda s, b, h, q, k: torch.where(k < 3, s * 0.1, s - torch.exp(bias[h]) / 3) + torch.zeros_like(s)
    expected = flex_decode(QUERY, KEY, VALUE, mod, mods.causal(), return_lse=True)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        clear_cache()
        actual = flex_decode(QUERY, KEY, VALUE, mod, mods.causal(), return_lse=True)
    finally:
        torch.set_default_dtype(default)
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == e.dtype and torch.equal(a, e)


# --- All together -----------------------------------------------------------------------------------------------------


@settings(max_examples=60)
@given(
    B=st.integers(1, 3), Hkv=st.integers(1, 3), group=st.integers(1, 5), Q=st.integers(1, 4), N=st.integers(0, 40),
    D=st.sampled_from([16, 17, 40]), Dv=st.sampled_from([16, 33]), layout=st.sampled_from(["bhnd", "bnhd", "strided"]),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]), score=st.sampled_from(MODS),
    mask=st.sampled_from(MODS), data=st.data(),
)  # fmt: skip
def test_random_calls(B, Hkv, group, Q, N, D, Dv, layout, dtype, score, mask, data):
    """Two families, shapes, strides, lengths and offsets at random."""
    Hq = Hkv * group
    query, key, value = make_inputs(B, Hq, Hkv, Q, N, D, Dv, dtype=dtype, layout=layout)
    if data.draw(st.booleans()):
        key = key[:1]
    score_mod = score.make_score_mod(B, Hq, N, Q, "cpu")
    mask_mod = mask.make_mask_mod(B, Hq, N, Q, "cpu")
    lens = st.lists(st.integers(0, N), min_size=B, max_size=B).map(torch.tensor)
    arguments = {
        "kv_lens": data.draw(st.none() | lens),
        "q_offset": data.draw(st.none() | st.integers(-3, 50) | lens),
        "scale": data.draw(st.none() | st.sampled_from([0.1, 1.0])),
    }
    out, lse = flex_decode(query, key, value, score_mod, mask_mod, return_lse=True, **arguments)
    assert_close_to_reference(out, lse, query, key, value, score_mod, mask_mod, **arguments)


# --- Captures that change what they are -------------------------------------------------------------------------------

QKV = (1, 2, 1, 1, 64, 16)


def check_now(inputs, score_mod):
    assert_close_to_reference(flex_decode(*inputs, score_mod), None, *inputs, score_mod)


def test_two_names_of_one_tensor_may_become_two_tensors_and_one_again():
    inputs = make_inputs(*QKV)
    a = c = torch.zeros(2)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score * (1 + a[h]) + c[h] * (q_idx - kv_idx)

    check_now(inputs, score_mod)
    a = torch.ones(2)
    check_now(inputs, score_mod)
    c = torch.full((2,), 0.3)
    check_now(inputs, score_mod)
    a = c
    check_now(inputs, score_mod)


def test_two_numbers_in_one_tensor_may_become_two():
    inputs = make_inputs(*QKV)
    a = c = torch.tensor(0.5)
    score_mod = lambda score, b, h, q_idx, kv_idx: score * (1 + a) + c * (q_idx - kv_idx)
    check_now(inputs, score_mod)
    a = torch.tensor(3.0)
    check_now(inputs, score_mod)


@pytest.mark.parametrize("make", [torch.nn.ParameterList, lambda x: torch.nn.ParameterDict({"0": x[0], "1": x[1]})])
def test_containers_of_parameters(make):
    inputs = make_inputs(*QKV)
    held = make([torch.nn.Parameter(torch.zeros(2), requires_grad=False) for _ in range(2)])
    one, two = (0, 1) if isinstance(held, torch.nn.ParameterList) else ("0", "1")
    score_mod = lambda score, b, h, q_idx, kv_idx: score + held[one][h] * kv_idx - held[two][h]
    check_now(inputs, score_mod)
    held[two].add_(0.5)
    check_now(inputs, score_mod)
    held[one] = torch.nn.Parameter(torch.tensor([0.1, 0.2]), requires_grad=False)
    check_now(inputs, score_mod)


def test_a_tensor_that_becomes_sparse():
    inputs = make_inputs(*QKV)
    table = torch.ones(2)
    score_mod = lambda score, b, h, q_idx, kv_idx: score + table[h]
    check_now(inputs, score_mod)
    table = torch.ones(2).to_sparse()
    with pytest.raises(ValueError, match="must be dense"):
        flex_decode(*inputs, score_mod)


# --- Arguments of the wrong kind --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"return_lse": "no"}, "`return_lse` must be a bool, got str"),
        ({"return_lse": [1]}, "`return_lse` must be a bool, got list"),
        ({"scale": 2**2000}, "`scale` must be finite, got inf"),
        ({"scale": float("nan")}, "`scale` must be finite, got nan"),
        ({"q_offset": 2**63}, "`q_offset` must fit into int64"),
        ({"out": torch.empty(1, 1, 1, 1).expand(1, 2, 1, 16)}, "`out` must have a place of its own"),
    ],
)
def test_refused_arguments(arguments, message):
    with pytest.raises((TypeError, ValueError), match=message):
        flex_decode(*make_inputs(*QKV), **arguments)


@pytest.mark.parametrize("options", [{"debug": "yes"}, {"num_splits": True}])
def test_refused_options(options):
    with pytest.raises(ValueError, match=r"`options\.(debug|num_splits)` must be"):
        DecodeOptions(**options)


@pytest.mark.parametrize("debug", [False, True])
def test_a_prepared_call_keeps_no_captured_tensor_alive(debug):
    inputs, table = make_inputs(*QKV), torch.ones(2)
    alive = weakref.ref(table)

    def call(table):
        flex_decode(*inputs, lambda score, b, h, q_idx, kv_idx: score + table[h], options=DecodeOptions(debug=debug))

    call(table)
    del table
    gc.collect()
    assert alive() is None


def test_explain_shows_the_parameters_of_a_call():
    shown = inspect.signature(flexdecode.explain).parameters
    assert [*shown] == [*inspect.signature(flexdecode.flex_decode).parameters, "device"]
    with pytest.raises(TypeError, match=r"explain\(\) got an unexpected keyword argument 'sink'"):
        flexdecode.explain(torch.zeros(1, 1, 1, 16), sink=None)
