"""Many sizes, lengths and captured values with few kernels, and values that must not spread."""

import random

import pytest
import torch
from support import assert_close_to_reference, make_inputs

import flexdecode
from flexdecode import DecodeOptions, flex_decode, mods
from flexdecode.frontend.ops import DTYPES, FLOAT8
from flexdecode.reference import reference_decode

pytestmark = pytest.mark.gpu


def check(inputs, score_mod=None, mask_mod=None, options=None, **arguments):
    out, lse = flex_decode(*inputs, score_mod, mask_mod, return_lse=True, options=options, **arguments)
    assert_close_to_reference(out, lse, *inputs, score_mod, mask_mod, **arguments)
    return out, lse


# --- What changes from call to call without a new kernel --------------------------------------------------------------


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("masked", [True, False], ids=["pointers", "descriptors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32], ids=str)
def test_random_sizes_lengths_and_captures(dtype, masked, num_splits):
    """Batch, heads, cache length, lengths, window, strides of the cache and of the bias are run-time arguments."""
    rng = random.Random(0)
    options = DecodeOptions(num_splits=num_splits, block_n=32)
    before = flexdecode.cache_info().compilations
    for step in range(25):
        B, Hkv, N = rng.randint(1, 5), rng.randint(1, 3), rng.choice([1, 2, 31, 32, 33, 64, 100, 257, 1000])
        inputs = make_inputs(B, 3 * Hkv, Hkv, 2, N, 64, dtype=dtype, device="cuda", seed=step, layout="bnhd")
        kv_lens = torch.tensor([rng.choice([0, 1, N // 2, N - 1, N]) for _ in range(B)], device="cuda")
        bias = torch.randn(3 * Hkv, N + rng.randint(0, 3)).cuda()
        window = rng.choice([1, 7, 32, 500, 2**40])

        def biased(score, b, h, q_idx, kv_idx, bias=bias):
            return score + bias[h, kv_idx] - b * 0.1

        def windowed(b, h, q_idx, kv_idx, window=window):
            return (q_idx - kv_idx < window) & (kv_idx <= q_idx)

        for b, length in enumerate(kv_lens.tolist()):  # a block also reads what lies past a sequence
            inputs[1][b, :, length:] = torch.nan
            inputs[2][b, :, length:] = torch.nan
        check(inputs, biased, windowed if masked else None, options=options, kv_lens=kv_lens)
    assert flexdecode.cache_info().compilations - before == 1


# --- Values that must stay where they are -----------------------------------------------------------------------------

SPLITS = pytest.mark.parametrize("num_splits", [1, 3])


@SPLITS
def test_nan_and_infinity_of_a_mod_reach_their_rows_only(num_splits):
    """The hardware's maximum passes over NaN; the sum must not."""
    inputs = make_inputs(2, 8, 2, 2, 200, 64, dtype=torch.float16, device="cuda")

    def score_mod(score, b, h, q_idx, kv_idx):
        score = torch.where((h == 1) & (kv_idx == 130) & (q_idx == 199), float("nan"), score)
        score = torch.where((h == 2) & (kv_idx == 3), float("inf"), score)
        score = torch.where((h == 3) & (kv_idx != 64), -float("inf"), score)
        # NaN where nothing else is finite, and where the key is dead.
        return torch.where((h == 5) | (kv_idx == 0), torch.log(score * 0 - 1), score)

    out, _ = check(inputs, score_mod, lambda b, h, q_idx, kv_idx: kv_idx > 0, DecodeOptions(num_splits=num_splits))
    assert out.isnan().any(-1).sum() == 2 * (1 + 2 + 2)


@SPLITS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 128, 200])
def test_infinite_keys_and_values(head_dim, dtype, num_splits):
    """A score of -inf hides its key, +inf has no softmax, and an infinite value reaches its column only."""
    query, key, value = make_inputs(1, 4, 2, 1, 300, head_dim, dtype=dtype, device="cuda")
    query[..., 3], query[:, ::2, :, 3] = -1.3, 1.3  # not numbers that TF32 holds
    key[0, 0, 5, 3], key[0, 0, 290, 3] = -torch.inf, 0.0
    value[0, 1, 7, 2], value[0, 1, 270, 4] = torch.inf, -torch.inf
    options = DecodeOptions(backend="triton", num_splits=num_splits)
    out, lse = flex_decode(query, key, value, return_lse=True, options=options)
    expected, expected_lse = reference_decode(query, key, value, return_lse=True)
    assert expected[0, 0].isfinite().all() and expected[0, 1].isnan().all()
    assert expected[0, 2:].isinf().any() and not expected[0, 2:].isnan().any()
    close = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(out.cpu().double(), expected.cpu(), rtol=close, atol=close, equal_nan=True)
    torch.testing.assert_close(lse.cpu().double(), expected_lse.cpu(), rtol=close, atol=close, equal_nan=True)


@SPLITS
def test_fully_masked_rows(num_splits):
    inputs = make_inputs(2, 8, 2, 2, 200, 64, dtype=torch.float16, device="cuda")

    def mask_mod(b, h, q_idx, kv_idx):
        return (h != 1) & ((q_idx < 199) | (h != 2)) & ((b == 0) | (h < 6))

    _, lse = check(inputs, mask_mod=mask_mod, options=DecodeOptions(num_splits=num_splits))
    assert (lse == -torch.inf).sum() == 2 * 2 + 2 + 2 * 2


def test_captures_of_every_dtype_in_one_mod():
    """Contiguous and transposed, and as 0-d tensors on both sides."""
    inputs = make_inputs(2, 8, 2, 2, 200, 64, dtype=torch.bfloat16, device="cuda")
    tables = [torch.randint(0, 3, (8, 200)).mul(0.6).to(dtype).cuda() for dtype in (*DTYPES, *FLOAT8)]
    tables[::2] = [table.mT.contiguous().mT for table in tables[::2]]
    on_cpu, on_gpu, number = torch.tensor(0.5), torch.tensor(True).cuda(), 3

    def score_mod(score, b, h, q_idx, kv_idx):
        total = score
        for i, table in enumerate(tables):
            total = total + table[h, kv_idx] * (0.1 * (i + 1))
        return torch.where(on_gpu, total * on_cpu, total - number)

    check(inputs, score_mod)


def test_indices_out_of_range_read_zero_and_do_not_fault():
    inputs = make_inputs(2, 8, 2, 1, 200, 64, dtype=torch.float16, device="cuda")
    short, empty = torch.randn(5, 4).cuda(), torch.empty(0).cuda()

    def score_mod(score, b, h, q_idx, kv_idx):
        far = short[kv_idx * 2**40, h] + short[kv_idx - 2**50, -h] + short[kv_idx + 2**32, 0]
        return score + far + short[kv_idx - q_idx, h - 2] + empty[kv_idx]

    check(inputs, score_mod)


# --- Layouts ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["interleaved", "one_for_all", "heads_of_a_larger_cache", "odd_address"])
def test_layouts(layout):
    query, key, value = make_inputs(3, 8, 2, 1, 300, 64, dtype=torch.float16, device="cuda")
    if layout == "interleaved":
        cache = torch.stack([key, value], dim=2)
        key, value = cache[:, :, 0], cache[:, :, 1]
    elif layout == "one_for_all":
        key, value = key[:1], value[:1].expand_as(value)
    elif layout == "heads_of_a_larger_cache":
        key, value = (x.new_full((3, 5, 320, 128), torch.nan)[:, 1:3, :300, 64:].copy_(x) for x in (key, value))
    else:
        key = key.new_empty(key.numel() + 1)[1:].view_as(key).copy_(key)
    check((query, key, value), mods.softcap(2.0), kv_lens=torch.tensor([300, 0, 161], device="cuda"))
