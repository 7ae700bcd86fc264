"""Checks of inputs, word for word, and what a kernel is specialised to."""

import dataclasses
import fractions

import numpy as np
import pytest
import torch
from support import make_inputs

from flexdecode import DecodeOptions, explain, flex_decode
from flexdecode.call.checks import check_inputs, check_lens
from flexdecode.call.inputs import DEFAULT_OPTIONS, Inputs
from flexdecode.call.signature import NO_AUX, ONLY_LSE, UNIT, Aux, describe, kernel_strides

B, Hq, Hkv, Q, N, D, Dv = 2, 4, 2, 3, 9, 16, 32
QUERY, KEY, VALUE = make_inputs(B, Hq, Hkv, Q, N, D, Dv)
LENS = torch.tensor([9, 4])


def call(query=QUERY, key=KEY, value=VALUE, **arguments):
    return flex_decode(query, key, value, **arguments)


def refused(error, message, **arguments):
    with pytest.raises(error) as caught:
        call(**arguments)
    assert str(caught.value) == message


# --- Tensors ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_tensors(name):
    good = {"query": QUERY, "key": KEY, "value": VALUE}[name]
    refused(TypeError, f"`{name}` must be a torch.Tensor, got list", **{name: good.tolist()})
    refused(TypeError, f"`{name}` must be a torch.Tensor, got ndarray", **{name: good.numpy()})
    shape = list(good.shape[1:])
    packed = "a packed query [T, Hq, D] needs `cu_seqlens_q`"
    packed = packed if name == "query" else "packed keys [Tk, Hkv, D] need `cu_seqlens_k`"
    message = f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got shape {shape}; {packed}"
    refused(ValueError, message, **{name: good[0]})
    shape = list(good[0, 0].shape)
    message = f"`{name}` must have 4 dimensions [B, H, tokens, head_dim], got shape {shape}"
    refused(ValueError, message, **{name: good[0, 0]})
    refused(ValueError, f"`{name}` must be a dense tensor, got layout torch.sparse_coo", **{name: good.to_sparse()})
    refused(
        ValueError,
        f"`{name}` requires grad, but flex_decode is forward only: call it under torch.no_grad() or detach `{name}`",
        **{name: good.clone().requires_grad_()},
    )
    with torch.no_grad():
        call(**{name: good.clone().requires_grad_()})


@pytest.mark.parametrize("name", ["key", "value"])
def test_devices_agree(name):
    good = {"key": KEY, "value": VALUE}[name]
    refused(ValueError, f"`{name}` must be on the device of `query`, cpu, got meta", **{name: good.to("meta")})


@pytest.mark.parametrize("dtype", [torch.int64, torch.int8, torch.float8_e4m3fn, torch.complex64])
def test_unsupported_dtypes(dtype):
    message = f"`query` must be float16, bfloat16, float32 or float64, got {dtype}"
    refused(ValueError, message, query=QUERY.to(dtype), key=KEY.to(dtype), value=VALUE.to(dtype))


def test_shapes():
    refused(
        ValueError,
        "`key` must have shape [B, Hkv, N, D] with D = 16 (from query), got [2, 2, 9, 32]",
        key=torch.zeros(2, 2, 9, 32),
    )
    refused(
        ValueError,
        "`value` must have shape [B, Hkv, N, Dv] with Hkv = 2 and N = 9 (from key), got [2, 2, 8, 32]",
        value=VALUE[:, :, :8],
    )
    refused(
        ValueError,
        "`value` must have shape [B, Hkv, N, Dv] with Hkv = 2 and N = 9 (from key), got [2, 1, 9, 32]",
        value=VALUE[:, :1],
    )
    refused(
        ValueError,
        "`key` must have shape [B, Hkv, N, D] with B = 2 (from query) or 1 to broadcast, got [3, 2, 9, 16]",
        key=torch.zeros(3, 2, 9, 16),
    )


def test_heads_divide():
    refused(
        ValueError,
        "`query` must have a multiple of the heads of `key`, got Hq = 3 and Hkv = 2; a [B, N, H, D] cache is passed as "
        "its view `cache.transpose(1, 2)`",
        query=QUERY[:, :3],
    )


@pytest.mark.parametrize("name", ["query", "key", "value"])
def test_the_triton_backend_has_no_float64(name):
    """Also if there is nothing to compute, and on any device."""
    message = (
        f"`{name}` is float64, which the triton backend does not compute: convert it to float32, or pass "
        '`options=DecodeOptions(backend="torch")`'
    )
    tensors = {"query": QUERY, "key": KEY, "value": VALUE}
    for rows in (slice(None), slice(0)):
        wrong = {which: x[rows].double() if which == name else x[rows] for which, x in tensors.items()}
        refused(ValueError, message, **wrong, options=DecodeOptions(backend="triton"))
    with pytest.raises(ValueError) as caught:
        explain(*(tensors | {name: tensors[name].double()}).values(), device="H200")
    assert str(caught.value) == message


@pytest.mark.parametrize("size", [0, 1025])
def test_head_dims(size):
    query, key, value = make_inputs(1, 2, 1, 1, 4, size, 16)
    message = f"the head dimension of `query` must be between 1 and 1024, got {size}"
    refused(ValueError, message, query=query, key=key, value=value)
    query, key, value = make_inputs(1, 2, 1, 1, 4, 16, size)
    message = f"the head dimension of `value` must be between 1 and 1024, got {size}"
    refused(ValueError, message, query=query, key=key, value=value)


def test_sizes_that_indices_do_not_hold():
    row, one = torch.zeros(1, 1, 1, 16), QUERY[:1, :1, :1]
    long = row.expand(1, 1, 1 << 30, 16)
    message = f"`key` must have fewer than {1 << 30} positions, got N = {1 << 30}"
    refused(ValueError, message, query=one, key=long, value=long)
    many = row.expand(1, 1, (1 << 20) + 1, 16)
    message = f"`query` must have at most {1 << 20} tokens, got Q = {(1 << 20) + 1}"
    refused(ValueError, message, query=many, key=row, value=row)
    wide = row.expand(1 << 12, 1 << 12, 1 << 7, 16)
    message = "`query` must have fewer than 2**31 rows, got (4096, 4096, 128, 16)"
    refused(ValueError, message, query=wide, key=row, value=row)


# --- The other arguments ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["kv_lens", "q_offset"])
def test_per_sequence_tensors(name):
    refused(ValueError, f"`{name}` must have shape [B] = [2], got [3]", **{name: torch.tensor([1, 2, 3])})
    refused(ValueError, f"`{name}` must have shape [B] = [2], got [2, 1]", **{name: torch.tensor([[1], [2]])})
    refused(ValueError, f"`{name}` must be int32 or int64, got torch.float32", **{name: torch.tensor([1.0, 2.0])})
    refused(ValueError, f"`{name}` must be int32 or int64, got torch.int16", **{name: LENS.short()})
    refused(ValueError, f"`{name}` must be on the device of `query`, cpu, got meta", **{name: LENS.to("meta")})


def test_kv_lens():
    for wrong in ([9, 4], True, 9.0, np.float64(9), np.array([9, 4])):
        message = f"`kv_lens` must be an integer or an int32 or int64 tensor [B], got {type(wrong).__name__}"
        refused(TypeError, message, kv_lens=wrong)
    for wrong in (10, -1):
        refused(ValueError, f"`kv_lens` must lie between 0 and N = 9 (from key), got {wrong}", kv_lens=wrong)
    for bad in ([10, 4], [9, -1]):
        message = f"`kv_lens` must lie between 0 and N = 9 (from key), got {min(bad)} to {max(bad)}"
        refused(ValueError, message, kv_lens=torch.tensor(bad))
    lens = LENS.clone()
    call(kv_lens=lens)
    lens[0] = 99  # a call that is known already is checked as well
    with pytest.raises(ValueError, match="`kv_lens` must lie between 0 and N = 9"):
        call(kv_lens=lens)
    check_lens("kv_lens", torch.tensor([], dtype=torch.int64), 0, "N = 0")


def test_q_offset():
    refused(TypeError, "`q_offset` must be an integer or an integer tensor [B], got float", q_offset=1.0)
    refused(TypeError, "`q_offset` must be an integer or an integer tensor [B], got bool", q_offset=True)
    refused(TypeError, "`q_offset` must be an integer or an integer tensor [B], got list", q_offset=[1, 2])


def test_scale():
    call()
    call(scale=1.0)  # calls that are known already are checked as well
    refused(TypeError, "`scale` must be a number or None, got str", scale="1")
    refused(TypeError, "`scale` must be a number or None, got bool", scale=True)
    refused(TypeError, "`scale` must be a number or None, got Tensor", scale=torch.tensor(1.0))
    for scale in (1, np.float32(1.0), fractions.Fraction(1)):
        assert torch.equal(call(scale=scale), call(scale=1.0))


def test_out():
    message = "`out` must have shape [B, Hq, Q, Dv] = [2, 4, 3, 32], got [2, 4, 3, 16]"
    refused(ValueError, message, out=torch.zeros(2, 4, 3, 16))
    message = "`out` must have the dtype of `query`, torch.float32, got torch.float16"
    refused(ValueError, message, out=torch.zeros(2, 4, 3, 32).half())
    refused(TypeError, "`out` must be a torch.Tensor, got list", out=[])


def test_unknown_keywords():
    with pytest.raises(TypeError, match="unexpected keyword argument 'causal'"):
        call(causal=True)


def test_options():
    for wrong in ({"backend": "torch"}, "torch", {}):
        refused(TypeError, f"`options` must be a flexdecode.DecodeOptions, got {type(wrong).__name__}", options=wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'num_split'"):
        DecodeOptions(num_split=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        DecodeOptions().debug = True
    assert DecodeOptions() == DEFAULT_OPTIONS and hash(DecodeOptions(num_splits=2)) != hash(DecodeOptions(num_splits=3))


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"backend": "cuda"}, '`options.backend` must be "triton", "torch" or None, got \'cuda\''),
        ({"num_splits": 0}, "`options.num_splits` must be an integer of at least 1, got 0"),
        ({"num_splits": 1.5}, "`options.num_splits` must be an integer of at least 1, got 1.5"),
        ({"block_n": 8}, "`options.block_n` must be an integer of at least 16, got 8"),
        ({"block_n": 48}, "`options.block_n` must be a power of two, got 48"),
        ({"num_warps": 3}, "`options.num_warps` must be a power of two, got 3"),
        ({"num_stages": -1}, "`options.num_stages` must be an integer of at least 1, got -1"),
    ],
)
def test_impossible_options(arguments, message):
    with pytest.raises(ValueError) as caught:
        DecodeOptions(**arguments)
    assert str(caught.value) == message


def test_the_triton_backend_needs_a_gpu(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    message = (
        '`options.backend="triton"` needs CUDA tensors, got tensors on cpu; on a CPU use backend="torch", or set '
        "TRITON_INTERPRET=1 before Python starts"
    )
    refused(ValueError, message, options=DecodeOptions(backend="triton"))


# --- Signatures -------------------------------------------------------------------------------------------------------


def signature(query=QUERY, key=KEY, value=VALUE, kv_lens=None, q_offset=None, aux=NO_AUX, **options):
    options = DecodeOptions(**options)
    inputs = Inputs(query, key, value, kv_lens, q_offset=q_offset)
    check_inputs(inputs, options)
    return describe(inputs, aux, options)


def test_sizes():
    assert Inputs(QUERY, KEY[:1], VALUE[:1]).sizes == (B, Hkv, N, Q, None)


def test_batch_and_length_are_no_part_of_a_signature():
    other = make_inputs(5, Hq, Hkv, Q, 33, D, Dv)
    assert signature() == signature(*other)
    assert hash(signature()) == hash(signature(*other))


@pytest.mark.parametrize(
    "change",
    [
        {"query": QUERY[:, :2]},
        {"query": QUERY[:, :, :1]},
        {"kv_lens": LENS},
        {"kv_lens": LENS.int()},
        {"q_offset": 3},
        {"q_offset": LENS},
        {"q_offset": LENS.int()},
        {"aux": ONLY_LSE},
        {"aux": Aux(max_scores=True)},
        {"backend": "triton"},
        {"key": KEY.half()},
        {"value": VALUE.half()},
        {"key": torch.zeros(B, Hkv, N, 2 * D)[..., ::2]},
        {"value": torch.zeros(B, Hkv, N, Dv + 1)[..., :Dv]},
        {"key": torch.zeros(B * Hkv * N * D + 1)[1:].view_as(KEY)},
    ],
)
def test_what_a_signature_tells_apart(change):
    assert signature(**change) != signature()
    assert signature(**change) == signature(**change)


def test_backends_follow_the_device():
    assert signature().backend == "torch"
    assert signature(backend="triton").backend == "triton"


def test_dtypes_of_products():
    """The promoted types; those of the query for a quantised cache."""
    half, bf16, single, int8 = torch.float16, torch.bfloat16, torch.float32, torch.int8
    for query, key, value, expected in (
        (half, half, half, (half, half)),
        (half, bf16, half, (single, half)),
        (bf16, bf16, single, (bf16, single)),
        (single, half, bf16, (single, single)),
        (bf16, int8, half, (bf16, single)),
        (half, half, int8, (half, half)),
    ):
        inputs = Inputs(QUERY.to(query), KEY.to(key), VALUE.to(value))
        assert describe(inputs, NO_AUX, DEFAULT_OPTIONS).product_dtypes == expected


def test_a_value_of_another_dtype_is_no_part_of_a_key():
    key = KEY.half()
    assert describe(Inputs(QUERY, key, key[..., :8]), NO_AUX, DEFAULT_OPTIONS).shared_kv
    assert not describe(Inputs(QUERY, key, key.view(torch.bfloat16)), NO_AUX, DEFAULT_OPTIONS).shared_kv


def test_strides():
    assert signature().strides == (16, 16, 16, UNIT) * 4
    transposed = torch.zeros(B, N, Hkv, D + 8).transpose(1, 2)[..., :D]
    assert signature(key=transposed).strides[4:8] == (16, 8, 16, UNIT)
    assert kernel_strides(KEY, B) == KEY.stride()
    assert kernel_strides(KEY[:1], B)[0] == 0, "a batch of one serves every sequence"
    assert kernel_strides(KEY[:1], 1)[0] == KEY.stride(0)


def test_an_expanded_head_has_stride_zero():
    shared = KEY[:, :1].expand(B, Hkv, N, D)
    assert kernel_strides(shared, B)[1] == 0
    torch.testing.assert_close(call(key=shared), call(key=shared.contiguous()), rtol=1e-5, atol=1e-5)
