"""`flexdecode.integrations.flex_attention`: what PyTorch's tests of decoding compute, with every value compared."""

import functools
import inspect
import re

import pytest
import torch
import torch._inductor.config
from flex_cases import (
    BOTH,
    CASES,
    SCORE_MODS,
    Sizes,
    Tensors,
    assert_right,
    check,
    check_paged,
    inputs_of,
    paged,
    run_case,
    up_to,
)
from support import assert_close, assert_close_to_reference
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention.experimental._paged_attention import PagedAttention
from torch.nn.attention.flex_attention import (
    AuxOutput,
    AuxRequest,
    FlexKernelOptions,
    _create_empty_block_mask,
    create_block_mask,
)
from torch.nn.attention.flex_attention import flex_attention as pytorchs
from torch.utils._pytree import tree_leaves

from flexdecode import DecodeOptions, TraceError, flex_decode
from flexdecode.integrations import flex_attention
from flexdecode.integrations.drop_in import KERNEL_OPTIONS, WITHOUT_EFFECT, options_of

# PyTorch's own function says so where it is called without torch.compile.
pytestmark = pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
SIZES = Sizes(B=4, HQ=4, HKV=2, Q=1, N=150, D=16)
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
HEADS = [(8, 1), (8, 2), (4, 4)]
of_score_mods = pytest.mark.parametrize("score_mod", SCORE_MODS.values(), ids=SCORE_MODS)
of_dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)
of_heads = pytest.mark.parametrize("heads", HEADS, ids=str)


def sizes_of(heads, **more):
    return SIZES._replace(HQ=heads[0], HKV=heads[1], **more)


def counted(function, backend="aot_eager"):
    """The function as one graph, and a counter of its compilations."""
    torch._dynamo.reset()
    counter = CompileCounterWithBackend(backend)
    return torch.compile(function, fullgraph=True, backend=counter), counter


def compile_whole(function):
    return counted(function)[0]


# --- PyTorch's list ---------------------------------------------------------------------------------------------------


@of_dtypes
@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
@pytest.mark.parametrize("name", CASES)
def test_cases(name, page_size, dtype):
    run_case(name, SIZES, dtype, page_size=page_size)


@of_heads
@of_dtypes
@of_score_mods
def test_score_mods(score_mod, dtype, heads):
    check(inputs_of(sizes_of(heads), dtype), score_mod)
    check_paged(sizes_of(heads), dtype, score_mod, None, page_size=64)


@of_heads
@of_score_mods
@pytest.mark.parametrize("page_size", [16, 32, 128])
def test_page_sizes(score_mod, heads, page_size):
    check_paged(sizes_of(heads), torch.float32, score_mod, up_to(torch.tensor(19)), page_size=page_size)


@of_dtypes
@of_score_mods
@pytest.mark.parametrize("block_size", [64, 128, (1, 64), (128, 64)], ids=str)
def test_block_sizes(score_mod, dtype, block_size):
    check(inputs_of(SIZES, dtype), score_mod, block_size=block_size)


# Strides and offset of [B, H, N, D] in a larger buffer.
LAYOUTS = {
    "contiguous": lambda B, H, N, D: ((H * N * D, N * D, D, 1), 997),
    "tokens first": lambda B, H, N, D: ((H * D, D, B * H * D, 1), 499),
    "wider rows": lambda B, H, N, D: ((N * (D + 1), B * N * (D + 1), D + 1, 1), 293),
    "overlapping sequences": lambda B, H, N, D: ((1, D, (B + 1) * (H + 1) * D, 1), 97),
}


@of_heads
@pytest.mark.parametrize("of_value", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("of_key", LAYOUTS.values(), ids=LAYOUTS)
def test_strides(of_key, of_value, heads):
    B, HQ, HKV, _, N, D = sizes_of(heads)[:6]
    numbers = torch.randn(4 * B * HKV * N * D + 997, generator=torch.Generator().manual_seed(2))
    query = numbers[: B * HQ * D].view(1, HQ, B, D).transpose(0, 2)
    key, value = (numbers.as_strided((B, HKV, N, D), *layout(B, HKV, N, D)) for layout in (of_key, of_value))
    check((query, key, value), SCORE_MODS["alibi"])


@of_heads
@of_score_mods
@pytest.mark.parametrize("batch", [3, 5, 8, 16])
def test_one_cache_for_all_sequences(score_mod, heads, batch):
    check(inputs_of(sizes_of(heads, B=batch, BKV=1), torch.float32), score_mod, block_size=128)


@of_dtypes
@of_score_mods
@pytest.mark.parametrize("widths", [(32, 16), (16, 32)], ids=str)
def test_values_of_another_width(score_mod, dtype, widths):
    sizes = SIZES._replace(D=widths[0], DV=widths[1])
    check(inputs_of(sizes, dtype), score_mod)
    check_paged(sizes, dtype, score_mod, None, page_size=64)


@of_heads
@of_score_mods
def test_masks_of_heads(score_mod, heads):
    sizes = sizes_of(heads)
    mask_mod = CASES["mask_of_heads"].mods(sizes, Tensors("cpu", torch.float32))[1]
    check(inputs_of(sizes, torch.float32), score_mod, mask_mod)
    check_paged(sizes, torch.float32, score_mod, mask_mod, page_size=64)


@pytest.mark.parametrize("head_dim", [4, 17, 24, 94, 121])
def test_head_dims(head_dim):
    """As many queries as keys; also a head dimension that PyTorch's kernel is too wide for."""
    check(inputs_of(SIZES._replace(Q=150, D=head_dim), torch.float32), SCORE_MODS["distance"])


@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
def test_a_mod_that_takes_another_branch(page_size):
    one, branch = torch.ones((), dtype=torch.int32), {}

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + one if branch["adds"] else score * one

    for adds in (True, False, True):
        branch["adds"] = adds
        if page_size is None:
            check(inputs_of(SIZES, torch.float32), score_mod)
        else:
            check_paged(SIZES, torch.float32, score_mod, None, page_size=page_size)


@pytest.mark.parametrize("names", [("distance", "causal"), ("distance", "causal", "distance")], ids=str)
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("page_size", [None, 64], ids=["contiguous", "paged"])
def test_several_calls(names, compiled, page_size):
    """One call attends what the call before it gave, with other mods, keys and values."""
    sizes = SIZES._replace(B=1, HQ=4, HKV=4, Q=4)
    given = [inputs_of(sizes, torch.float32, seed=i) for i in range(len(names))]
    score_mods = [SCORE_MODS[name] for name in names]
    calls = [(k, v, score_mod, None) for (_, k, v), score_mod in zip(given, score_mods, strict=True)]
    if page_size is not None:
        calls = [paged(given[0][0], *call, page_size) for call in calls]

    def model(query):
        outs = []
        for key, value, score_mod, block_mask in calls:
            outs.append(flex_attention(query, key, value, score_mod, block_mask, return_aux=BOTH))
            query = outs[-1][0]
        return outs

    query = given[0][0]
    for (out, aux), (_, key, value), score_mod in zip(
        compile_whole(model)(query) if compiled else model(query), given, score_mods, strict=True
    ):
        assert_right(out, aux, (query, key, value), score_mod, None)
        query = out


@pytest.mark.parametrize("page_size", [None, 128], ids=["contiguous", "paged"])
def test_fewer_keys_than_a_block_and_few_heads(page_size):
    sizes = Sizes(B=1, HQ=1, HKV=1, Q=1, N=65, D=16)
    mask_mod = up_to(torch.tensor(192, dtype=torch.int32))
    if page_size is None:
        check(inputs_of(sizes, torch.float32), None, mask_mod)
    else:
        check_paged(sizes, torch.float32, None, mask_mod, page_size=page_size)


def test_a_cache_that_grows_compiles_twice():
    attend, counter = counted(flex_attention)
    for i in range(5):
        query, key, value = inputs_of(SIZES._replace(N=150 + i), torch.float32)
        out, aux = attend(query, key, value, enable_gqa=True, return_aux=BOTH)
        assert_right(out, aux, (query, key, value), None, None)
        assert counter.frame_count == min(i + 1, 2)


def test_lengths_far_below_a_block():
    sizes = Sizes(B=2, HQ=1, HKV=1, Q=2, N=2, D=16)
    for attention in (flex_attention, compile_whole(flex_attention)):
        check(inputs_of(sizes, torch.float32), None, up_to(0), attention=attention)


@of_score_mods
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_sequences_of_different_lengths_in_pages(score_mod, compiled):
    """Each sequence has its own number of keys in PyTorch's pages; its query is at position 0, as in PyTorch's test."""
    lens = [5, 98, 47, 130]
    given = [inputs_of(Sizes(B=1, HQ=4, HKV=4, Q=1, N=n, D=16), torch.float32, seed=n) for n in lens]
    pages = PagedAttention(32, 16, 4, device="cpu")
    for capacities in ([100, 30, 50, 20], [130, 98, 60, 130]):
        for b, capacity in enumerate(capacities):
            pages.reserve(torch.tensor(b), torch.tensor(capacity))
    caches = [torch.zeros(1, 4, 32 * 16, 16) for _ in range(2)]
    for b, (n, (_, key, value)) in enumerate(zip(lens, given, strict=True)):
        pages.assign(torch.tensor([b]), torch.arange(n)[None], key, value, *caches)
    mask_mod = up_to(0)
    logical = create_block_mask(mask_mod, 4, 1, 1, 512, device="cpu", BLOCK_SIZE=16)
    block_mask = pages.convert_logical_block_mask(logical)
    attend = compile_whole(flex_attention) if compiled else flex_attention
    out, aux = attend(
        torch.cat([query for query, _, _ in given]), *caches, pages.get_score_mod(score_mod), block_mask,
        return_aux=BOTH,
    )  # fmt: skip
    for b, inputs in enumerate(given):
        part = AuxOutput(aux.lse[b : b + 1], aux.max_scores[b : b + 1])
        assert_right(out[b : b + 1], part, inputs, score_mod, mask_mod)


@of_dtypes
def test_windows_beside_scaled_dot_product_attention(dtype):
    sizes = SIZES._replace(HQ=4, HKV=4, Q=8)
    query, key, value = inputs = inputs_of(sizes, dtype)
    seen = torch.ones(8, 150, dtype=torch.bool).tril(75)
    expected = torch.nn.functional.scaled_dot_product_attention(*[x.double() for x in inputs], attn_mask=seen)
    for name in ("window_by_score", "window_by_mask", "window_by_both"):
        score_mod, mask_mod = CASES[name].mods(sizes, None)
        block_mask = None if mask_mod is None else create_block_mask(mask_mod, 1, 1, 8, 150, device="cpu")
        out = flex_attention(query, key, value, score_mod, block_mask)
        measure = torch.nn.functional.scaled_dot_product_attention(*inputs, attn_mask=seen)
        assert_close(out, None, (expected, expected.new_zeros(4, 4, 8)), (measure, None))


@of_dtypes
@pytest.mark.parametrize("score_mod", [None, SCORE_MODS["causal"]], ids=["plain", "causal"])
def test_a_graph_that_uses_only_the_log_sum_exp(score_mod, dtype):
    inputs = inputs_of(SIZES._replace(HQ=2, Q=2), dtype)

    def model(*inputs):
        _, lse = flex_attention(*inputs, score_mod, return_lse=True)
        return lse * 2

    out, aux = flex_attention(*inputs, score_mod, return_aux=BOTH)
    assert_right(out, aux, inputs, score_mod, None)
    assert aux.lse.dtype == torch.float32
    assert torch.equal(compile_whole(model)(*inputs), aux.lse * 2)


def test_caches_of_another_dtype():
    query, key, value = inputs_of(SIZES._replace(Q=8), torch.float32)
    check((query, key.half(), value.half()), SCORE_MODS["identity"])


def test_inductors_autotuning_changes_nothing():
    score_mod, _ = CASES["captured_in_all_dimensions"].mods(SIZES, Tensors("cpu", torch.float32))
    with torch._inductor.config.patch(max_autotune=True):
        for mod in (score_mod, SCORE_MODS["doubled"]):
            check(inputs_of(SIZES, torch.float32), mod, attention=compile_whole(flex_attention))
            check_paged(SIZES, torch.float32, mod, None, page_size=64, attention=compile_whole(flex_attention))


# --- What else PyTorch's function promises ----------------------------------------------------------------------------


def test_the_name_is_a_function_with_the_signature_of_pytorch():
    ours, theirs = (inspect.signature(function).parameters.values() for function in (flex_attention, pytorchs))
    assert [(x.name, x.kind, x.default) for x in ours] == [(x.name, x.kind, x.default) for x in theirs]


ORDERS = [(0, 1, 2, 3), (0, 2, 1, 3), (2, 0, 1, 3), (1, 0, 2, 3), (2, 1, 0, 3)]


def in_order(tensor, order):
    """The same numbers, with the dimensions in this order in memory, the outermost one first."""
    return tensor.permute(order).contiguous().permute([order.index(i) for i in range(4)])


@pytest.mark.parametrize("Q", [1, 3])
@pytest.mark.parametrize("order", ORDERS, ids=str)
def test_the_output_is_what_pytorch_gives(order, Q):
    """Values, dtype and strides; the query's dimensions lie in memory in some order."""
    query, key, value = inputs_of(SIZES._replace(Q=Q, DV=24), torch.float32)
    query = in_order(query, order)
    block_mask = create_block_mask(up_to(40), None, None, Q, 150, device="cpu")
    call = query, key, value, SCORE_MODS["alibi"], block_mask, 0.3
    expected = pytorchs(*call, enable_gqa=True)
    for attention in (flex_attention, compile_whole(flex_attention)):
        out = attention(*call, enable_gqa=True)
        torch.testing.assert_close(out, expected)
        assert out.stride() == expected.stride()


@pytest.mark.parametrize(("order", "strides"), [((0, 1, 3, 2), (288, 72, 24, 1)), ((3, 2, 1, 0), (24, 96, 384, 1))])
def test_rows_of_the_output_are_dense(order, strides):
    """Also those of a query whose rows are not; torch 2.9 differs in this."""
    query, key, value = inputs_of(SIZES._replace(Q=3, DV=24), torch.float32)
    out = check((in_order(query, order), key, value))
    assert out.stride() == strides


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_what_is_returned(compiled):
    attend = compile_whole(flex_attention) if compiled else flex_attention
    inputs = inputs_of(SIZES._replace(HKV=4), torch.float32)
    out, (lse, max_scores) = attend(*inputs, return_aux=BOTH)
    assert lse.is_contiguous() and max_scores.is_contiguous() and lse.dtype == max_scores.dtype == torch.float32
    assert torch.equal(attend(*inputs), out)
    for found, expected in (
        (attend(*inputs, return_lse=True), (out, lse)),
        (attend(*inputs, return_aux=AuxRequest()), (out, AuxOutput())),
        (attend(*inputs, return_aux=AuxRequest(lse=True)), (out, AuxOutput(lse=lse))),
        (attend(*inputs, return_aux=AuxRequest(max_scores=True)), (out, AuxOutput(max_scores=max_scores))),
    ):
        assert type(found) is tuple and type(found[1]) is type(expected[1])
        for x, y in zip(tree_leaves(found), tree_leaves(expected), strict=True):
            assert x is y is None or torch.equal(x, y)


def test_positions_count_from_0():
    query, key, value = inputs_of(SIZES._replace(Q=3), torch.float32)
    assert torch.equal(
        flex_attention(query, key, value, SCORE_MODS["causal"], enable_gqa=True),
        flex_decode(query, key, value, SCORE_MODS["causal"], q_offset=0),
    )


def test_a_block_mask_of_one_block():
    """PyTorch's stand-in for no mask, whose lengths say nothing."""
    inputs = inputs_of(SIZES._replace(HKV=4, Q=3), torch.float32)
    whole = _create_empty_block_mask(*inputs[:2])
    assert torch.equal(flex_attention(*inputs, None, whole), flex_attention(*inputs))
    whole.mask_mod = up_to(40)
    out, aux = flex_attention(*inputs, None, whole, return_aux=BOTH)
    assert_right(out, aux, inputs, None, up_to(40))


def test_a_block_mask_that_is_cropped():
    inputs = inputs_of(SIZES._replace(HKV=4, Q=5), torch.float32)
    block_mask = create_block_mask(up_to(0), None, None, 150, 150, device="cpu", BLOCK_SIZE=32)._adjust(5, 150)
    block_mask.seq_lengths = (5, 150)  # torch before 2.13 leaves them at whole blocks
    out, aux = flex_attention(*inputs, None, block_mask, return_aux=BOTH)
    assert_right(out, aux, inputs, None, up_to(0))


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.float64], ids=str)
def test_autocast(dtype, compiled):
    """The inputs are rounded to the dtype of autocast, and so is the output; not float64."""
    attend = compile_whole(flex_attention) if compiled else flex_attention
    inputs = inputs_of(SIZES._replace(HKV=4), dtype)
    rounded = [x if dtype == torch.float64 else x.bfloat16() for x in inputs]
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(*inputs, SCORE_MODS["alibi"])
    assert out.dtype == rounded[0].dtype
    assert torch.equal(out, flex_attention(*rounded, SCORE_MODS["alibi"]))


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_float8(dtype):
    """The output is float8 if the query is."""
    inputs = [x.to(dtype) for x in inputs_of(SIZES._replace(HKV=4, Q=2), torch.float32)]
    out = flex_attention(*inputs, SCORE_MODS["alibi"])
    wide = [x.float() for x in inputs]
    expected = flex_decode(*wide, SCORE_MODS["alibi"], q_offset=0)
    assert out.dtype == dtype
    step = 2.0 ** (1 - {torch.float8_e4m3fn: 4, torch.float8_e5m2: 3}[dtype])  # from one number to the next
    assert ((out.float() - expected).abs() <= step * expected.abs() + 2.0**-9).all()
    cached = flex_attention(wide[0], *inputs[1:], SCORE_MODS["alibi"])
    assert_close_to_reference(cached, None, wide[0], *inputs[1:], SCORE_MODS["alibi"], q_offset=0)


def test_int8_caches_are_taken_as_they_are():
    query, key, value = inputs_of(SIZES._replace(HKV=4), torch.float32)
    key, value = ((2 * x).to(torch.int8) for x in (key, value))
    torch.testing.assert_close(flex_attention(query, key, value), pytorchs(query, key.float(), value.float()))


def test_float64():
    """In float64 as in PyTorch, but the numbers of rows are float32."""
    query, key, value = inputs_of(SIZES._replace(HKV=4), torch.float64)
    out, aux = flex_attention(query, key, value, SCORE_MODS["alibi"], return_aux=BOTH)
    torch.testing.assert_close(out, pytorchs(query, key, value, SCORE_MODS["alibi"]))
    assert aux.lse.dtype == aux.max_scores.dtype == torch.float32


@pytest.mark.parametrize("sizes", [{"Q": 0}, {"N": 0}, {"B": 0}], ids=str)
def test_nothing_to_attend(sizes):
    sizes = SIZES._replace(HKV=4, **sizes)
    out, aux = flex_attention(*inputs_of(sizes, torch.float32), return_aux=BOTH)
    assert out.shape == (sizes.B, 4, sizes.Q, 16) and (out == 0).all()
    for numbers in aux:
        assert numbers.shape == out.shape[:3] and (numbers == -torch.inf).all()


# --- kernel_options ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {}),
        ({"BLOCK_N": 32, "num_warps": 2, "num_stages": 3}, {"block_n": 32, "num_warps": 2, "num_stages": 3}),
        ({"fwd_BLOCK_N": 64, "fwd_num_warps": 8}, {"block_n": 64, "num_warps": 8}),
        ({"SPLIT_KV": 7}, {"num_splits": 7}),
        ({"BACKEND": "AUTO"}, {}),
        ({"BACKEND": "TRITON"}, {"backend": "triton"}),
        ({"BACKEND": "TRITON_DECODE"}, {"backend": "triton"}),
        ({"PRESCALE_QK": True, "ROWS_GUARANTEED_SAFE": True, "BLOCKS_ARE_CONTIGUOUS": True}, {}),
        ({"FORCE_USE_FLEX_ATTENTION": True, "WRITE_DQ": False, "bwd_BLOCK_M1": 32, "bwd_num_warps": 4}, {}),
    ],
    ids=str,
)
def test_options_with_a_meaning(given, expected):
    assert options_of(given, on_gpu=True) == DecodeOptions(**expected)


def test_every_option_of_pytorch_is_honoured_allowed_or_refused():
    backward = {"BLOCK_M1", "BLOCK_N1", "BLOCK_M2", "BLOCK_N2"}
    refused = {"BLOCK_M", "USE_TMA", "kpack", "matrix_instr_nonkdim", "waves_per_eu", *backward}
    allowed = {*KERNEL_OPTIONS, *WITHOUT_EFFECT, "BACKEND"} - {"SPLIT_KV"}
    assert {*FlexKernelOptions.__annotations__, "BACKEND"} == refused | allowed  # torch 2.9 has no BACKEND
    for name in refused:
        with pytest.raises(ValueError, match=re.escape(f'`kernel_options["{name}"]` has no counterpart')):
            options_of({name: 1}, on_gpu=True)


# --- What is refused --------------------------------------------------------------------------------------------------

QUERY, KEY, VALUE = inputs_of(SIZES, torch.float32)
REFUSED = {
    "heads": ({"enable_gqa": False}, ValueError, "`query` has 4 heads and `key` has 2: pass `enable_gqa=True`"),
    "dimensions": ({"key": KEY[0]}, ValueError, "`key` must have 4 dimensions [B, H, tokens, head_dim], got 3"),
    "no tensor": ({"value": 3}, TypeError, "`value` must be a torch.Tensor, got int"),
    "sparse": ({"value": VALUE.to_sparse()}, ValueError, "`value` must be a dense tensor, got layout torch.sparse_coo"),
    "another width": ({"key": KEY[..., :8]}, ValueError, "`key` must have shape [B, Hkv, N, D] with D = 16"),
    "a mask_mod": ({"block_mask": up_to(0)}, TypeError, "`block_mask` must be a BlockMask, got function: make one"),
    "longer BlockMask": (
        {"block_mask": create_block_mask(up_to(0), None, None, 150, 150, device="cpu")}, ValueError,
        "`block_mask` is for 150 query positions and 150 keys, but the call has 1 and 150",
    ),
    "both": (
        {"return_lse": True, "return_aux": BOTH}, ValueError, "`return_lse` and `return_aux` exclude one another",
    ),
    "no AuxRequest": ({"return_aux": True}, TypeError, "`return_aux` must be a torch.nn.attention.flex_attention.AuxR"),
    "unknown option": (
        {"kernel_options": {"BLOCK_X": 3}}, ValueError,
        '`kernel_options["BLOCK_X"]` has no counterpart in flexdecode: leave it out. Honoured are BLOCK_N, SPLIT_KV,',
    ),
    "bad option": (
        {"kernel_options": {"BLOCK_N": 48}}, ValueError, '`kernel_options["BLOCK_N"]` must be a power of two, got 48',
    ),
    "FLASH": (
        {"kernel_options": {"BACKEND": "FLASH"}}, ValueError,
        "`kernel_options[\"BACKEND\"]` must be one of AUTO, TRITON, TRITON_DECODE, got 'FLASH'",
    ),
    "a branch": (
        {"score_mod": lambda score, b, h, q_idx, kv_idx: score if kv_idx > 3 else -score}, TraceError,
        "A mod is traced, so it cannot branch on a value: use torch.where",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused(name):
    changed, kind, message = REFUSED[name]
    call = {"query": QUERY, "key": KEY, "value": VALUE, "enable_gqa": True} | changed
    with pytest.raises(kind, match=re.escape(message)):
        flex_attention(**call)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_nested_tensors_are_refused():
    ragged = torch.nested.nested_tensor([VALUE[0], VALUE[1, :, :9]])
    with pytest.raises(ValueError, match="`value` must be a dense tensor"):
        flex_attention(QUERY, KEY, ragged, enable_gqa=True)


@pytest.mark.parametrize("name", ["heads", "longer BlockMask", "both", "unknown option", "bad option"])
def test_what_is_refused_in_a_region(name):
    changed, _, message = REFUSED[name]
    call = {"query": QUERY, "key": KEY, "value": VALUE, "enable_gqa": True} | changed
    with pytest.raises(Exception, match=re.escape(message)):
        compile_whole(flex_attention)(**call)


def test_a_mod_that_cannot_be_traced_in_a_region():
    def score_mod(score, b, h, q_idx, kv_idx):
        return score + KEY[b, h, 0, 0].item()

    with pytest.raises(Exception, match=r"the value of a tensor was read in a score_mod .*\n.*test_flex_attention.py"):
        compile_whole(flex_attention)(QUERY, KEY, VALUE, score_mod, enable_gqa=True)


@pytest.mark.parametrize("place", range(3))
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_gradients_are_refused_with_a_remedy(compiled, place):
    inputs = [x.detach() for x in (QUERY, KEY, VALUE)]
    inputs[place] = inputs[place].clone().requires_grad_()
    attend = compile_whole(flex_attention) if compiled else flex_attention
    message = r"requires grad, but flexdecode's flex_attention is forward only[\s\S]*To train, use torch.nn.attention"
    with pytest.raises(Exception, match=message):
        attend(*inputs, enable_gqa=True)
    for without in (torch.no_grad(), torch.inference_mode()):
        with without:
            assert torch.equal(attend(*inputs, enable_gqa=True), flex_attention(QUERY, KEY, VALUE, enable_gqa=True))


# --- Regions ----------------------------------------------------------------------------------------------------------


def test_mods_and_masks_that_change():
    """A mod of a new table, a BlockMask and a scale are arguments of the graph."""

    def model(query, key, value, table, block_mask, scale):
        def score_mod(score, b, h, q_idx, kv_idx):
            return score + table[h, kv_idx]

        return flex_attention(query, key, value, score_mod, block_mask, scale, True, return_aux=BOTH)

    run, counter = counted(model)
    for step in range(5):
        block_mask = create_block_mask(up_to(torch.tensor(20 + step)), None, None, 1, 150, device="cpu", BLOCK_SIZE=16)
        call = QUERY, KEY, VALUE, torch.randn(4, 150), block_mask, 0.1 + step / 7
        for found, expected in zip(tree_leaves(run(*call)), tree_leaves(model(*call)), strict=True):
            assert torch.equal(found, expected)
    assert counter.frame_count <= 2


def test_partials_and_plain_compile():
    """As PyTorch's users write it: without fullgraph, and with the mods bound."""
    torch._dynamo.reset()
    bound = functools.partial(flex_attention, score_mod=SCORE_MODS["alibi"], enable_gqa=True)
    compiled = torch.compile(bound, backend="eager")
    assert torch.equal(compiled(QUERY, KEY, VALUE), bound(QUERY, KEY, VALUE))


def test_export():
    class Model(torch.nn.Module):
        def forward(self, query, key, value):
            return flex_attention(query, key, value, SCORE_MODS["alibi"], enable_gqa=True, return_aux=BOTH)

    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(
        Model(), (QUERY, KEY, VALUE), dynamic_shapes={"query": None, "key": {2: length}, "value": {2: length}}
    )
    call = QUERY, KEY[:, :, :99], VALUE[:, :, :99]
    for found, expected in zip(tree_leaves(exported.module()(*call)), tree_leaves(Model()(*call)), strict=True):
        assert torch.equal(found, expected)


def test_the_op_is_what_pytorch_wants():
    query = QUERY.transpose(1, 2).contiguous().transpose(1, 2)
    nothing = "", [], [], []
    for asked in ((False, False), (True, False), (True, True)):
        call = query, KEY, VALUE, *nothing, *nothing, "|q_offset", [], [0], [], [], None, "", *asked
        torch.library.opcheck(torch.ops.flexdecode.flex_attention.default, call)


def test_tensors_without_values():
    heads_first = QUERY.transpose(0, 1).contiguous().transpose(0, 1)
    with FakeTensorMode() as mode:
        query, key, value = (mode.from_tensor(x) for x in (heads_first, KEY, VALUE))
        out, aux = flex_attention(query, key, value, SCORE_MODS["alibi"], enable_gqa=True, return_aux=BOTH)
    assert out.shape == QUERY.shape and out.stride() == query.stride()
    assert aux.max_scores.shape == QUERY.shape[:3] and aux.lse.dtype == torch.float32
