"""The oracle against plain Python loops, against PyTorch, and on the semantics that everything else is tested by."""

import functools
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from support import MODS, assert_close_to_reference, make_inputs, pytorch_decode
from torch.nn.attention import flex_attention as flex

from flexdecode.reference import evaluate_mod, reference_decode


def loop_decode(query, key, value, score_fn=None, mask_fn=None, kv_lens=None, q_offset=None, scale=None):
    """Attention by the definition, one number at a time; `score_fn` and `mask_fn` take Python numbers."""
    (B, Hq, Q, D), (Bk, Hkv, N, Dv) = query.shape, value.shape
    out, lse = torch.zeros(B, Hq, Q, Dv, dtype=torch.float64), torch.zeros(B, Hq, Q, dtype=torch.float64)
    query, key, value = query.tolist(), key.tolist(), value.tolist()
    for b in range(B):
        length = N if kv_lens is None else max(0, min(kv_lens[b], N))
        k_rows, v_rows = key[b if Bk > 1 else 0], value[b if Bk > 1 else 0]
        for h in range(Hq):
            for m in range(Q):
                position = (length - Q if q_offset is None else q_offset[b]) + m
                live = {}
                for n in range(length):
                    if mask_fn is not None and not mask_fn(b, h, position, n):
                        continue
                    score = sum(x * y for x, y in zip(query[b][h][m], k_rows[h // (Hq // Hkv)][n], strict=True))
                    score *= D**-0.5 if scale is None else scale
                    live[n] = score if score_fn is None else score_fn(score, b, h, position, n)
                total = sum(math.exp(s) for s in live.values())
                lse[b, h, m] = math.log(total) if live else -math.inf
                for n, score in live.items():
                    row = torch.tensor(v_rows[h // (Hq // Hkv)][n], dtype=torch.float64)
                    out[b, h, m] += math.exp(score) / total * row
    return out, lse


def assert_same(actual, expected):
    for a, e in zip(actual, expected, strict=True):
        assert a.dtype == torch.float64 and a.device.type == "cpu"
        torch.testing.assert_close(a, e, rtol=1e-12, atol=1e-12, equal_nan=True)


def lse_of(score_mod=None, mask_mod=None, N=6, B=1, Hq=1, Q=1, **kw):
    """Lse `[B, Hq, Q]` where all dot products are 0."""
    zeros = torch.zeros(B, 1, N, 4)
    return reference_decode(torch.zeros(B, Hq, Q, 4), zeros, zeros, score_mod, mask_mod, return_lse=True, **kw)[1]


# --- Against plain loops ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("Hq, Hkv", [(1, 1), (2, 1), (3, 3), (6, 2), (7, 1)])
@pytest.mark.parametrize("Q, N, Dv", [(1, 1, 4), (2, 5, 3), (4, 3, 5)])
def test_agrees_with_plain_loops(Hq, Hkv, Q, N, Dv):
    query, key, value = make_inputs(2, Hq, Hkv, Q, N, 4, Dv)
    slopes = torch.rand(Hq).tolist()
    actual = reference_decode(
        query,
        key,
        value,
        lambda s, b, h, q, k: 2 * torch.tanh(s) - torch.tensor(slopes)[h] * (q - k),
        lambda b, h, q, k: (k <= q) | (k == 2 * b),
        return_lse=True,
    )
    expected = loop_decode(
        query,
        key,
        value,
        lambda s, b, h, q, k: 2 * math.tanh(s) - slopes[h] * (q - k),
        lambda b, h, q, k: k <= q or k == 2 * b,
    )
    assert_same(actual, expected)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
@pytest.mark.parametrize("kv_lens", [[5, 2, 0], [9, -4, 1]])
@pytest.mark.parametrize("q_offset", [None, 3, [0, 4, -1]])
def test_lengths_and_offsets_agree_with_plain_loops(layout, kv_lens, q_offset):
    query, key, value = make_inputs(3, 4, 2, 2, 5, 3, layout=layout)
    offsets = None if q_offset is None else [q_offset] * 3 if isinstance(q_offset, int) else q_offset
    for dtype in (torch.int32, torch.int64):
        actual = reference_decode(
            query,
            key,
            value,
            lambda s, b, h, q, k: s + 0.1 * q - 0.2 * k,
            lambda b, h, q, k: k <= q,
            kv_lens=torch.tensor(kv_lens, dtype=dtype),
            q_offset=torch.tensor(q_offset, dtype=dtype) if isinstance(q_offset, list) else q_offset,
            scale=0.3,
            return_lse=True,
        )
        expected = loop_decode(
            query,
            key,
            value,
            lambda s, b, h, q, k: s + 0.1 * q - 0.2 * k,
            lambda b, h, q, k: k <= q,
            kv_lens,
            offsets,
            scale=0.3,
        )
        assert_same(actual, expected)


def test_key_and_value_broadcast_over_the_batch():
    query, _, _ = make_inputs(3, 2, 1, 2, 4, 4)
    _, key, value = make_inputs(1, 2, 1, 2, 4, 4, seed=1)
    actual = reference_decode(query, key, value, kv_lens=torch.tensor([4, 1, 2]), return_lse=True)
    assert_same(actual, loop_decode(query, key, value, kv_lens=[4, 1, 2]))


# --- Against PyTorch --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [1, 3, 8])
def test_agrees_with_scaled_dot_product_attention(group):
    query, key, value = make_inputs(2, 2 * group, 2, 4, 4, 16, dtype=torch.float64)
    for causal in (False, True):
        expected = F.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
        actual = reference_decode(query, key, value, None, (lambda b, h, q, k: k <= q) if causal else None)
        torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["softcap", "alibi", "bias", "relative_bias", "t5"])
def test_agrees_with_eager_flex_attention(name):
    family = next(f for f in MODS if f.name == name)
    B, Hq, Q, N = 2, 4, 3, 6
    query, key, value = make_inputs(B, Hq, 2, Q, N, 8, dtype=torch.float64)
    score_mod = family.make_score_mod(B, Hq, N, Q, "cpu")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says that it was not compiled.
        expected, expected_lse = flex.flex_attention(
            query, key, value, score_mod=score_mod, enable_gqa=True, return_lse=True
        )
    out, lse = reference_decode(query, key, value, score_mod, q_offset=0, return_lse=True)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse.double(), rtol=1e-5, atol=1e-5)


def test_takes_pytorchs_own_mask_combinators():
    causal, odd = lambda b, h, q, k: k <= q, lambda b, h, q, k: k % 2 == 1
    both = lse_of(None, flex.and_masks(flex.noop_mask, causal, odd), Q=6)
    either = lse_of(None, flex.or_masks(causal, odd), Q=6)
    assert both[0, 0].exp().round().tolist() == [0, 1, 1, 2, 2, 3]
    assert either[0, 0].exp().round().tolist() == [4, 4, 5, 5, 6, 6]
    assert (lse_of(None, flex.noop_mask).exp() - 6).abs() < 1e-12


# --- Rows without a live key, NaN, empty sizes ------------------------------------------------------------------------


def test_nothing_past_the_length_is_seen():
    query, key, value = make_inputs(2, 2, 1, 1, 6, 4)
    lens = torch.tensor([2, 4])
    expected = reference_decode(query, key, value, lambda s, b, h, q, k: s * (k + 1), kv_lens=lens)
    for b, n in enumerate(lens):
        key[b, :, n:], value[b, :, n:] = math.nan, math.inf
    seen = []

    def score_mod(score, b, h, q_idx, kv_idx):
        seen.append(score.ndim)
        return score * (kv_idx + 1)

    assert torch.equal(reference_decode(query, key, value, score_mod, kv_lens=lens), expected)
    assert seen == [0, 0]  # Once per sequence, on 0-d tensors.


@pytest.mark.parametrize("make_empty", ["mask", "score", "length"])
def test_row_without_live_key_is_zero(make_empty):
    query, key, value = make_inputs(2, 2, 2, 2, 3, 4)
    mods = {
        "mask": (None, lambda b, h, q, k: h == 1),
        "score": (lambda s, b, h, q, k: torch.where(h == 1, s, -torch.inf), None),
        "length": (None, None),
    }[make_empty]
    lens = torch.tensor([0, 3]) if make_empty == "length" else None
    out, lse = reference_decode(query, key, value, *mods, kv_lens=lens, return_lse=True)
    empty = torch.zeros(2, 2, dtype=torch.bool)
    empty[0 if make_empty == "length" else slice(None), slice(None) if make_empty == "length" else 0] = True
    assert (out[empty] == 0).all() and (lse[empty] == -torch.inf).all()
    assert (out[~empty] != 0).all() and lse[~empty].isfinite().all()


def test_nan_of_a_mod_reaches_its_row_unless_masked():
    query, key, value = make_inputs(1, 2, 1, 2, 4, 4)
    nan_mod = lambda s, b, h, q, k: torch.where((h == 1) & (k == 3), torch.nan, s)
    out, lse = reference_decode(query, key, value, nan_mod, return_lse=True)
    assert out[0, 1].isnan().all() and lse[0, 1].isnan().all()
    assert out[0, 0].isfinite().all() and lse[0, 0].isfinite().all()
    out = reference_decode(query, key, value, nan_mod, lambda b, h, q, k: k < 3)
    assert out.isfinite().all()


def test_empty_sizes():
    query, key, value = make_inputs(2, 2, 1, 3, 0, 4)
    mods = (lambda s, b, h, q, k: s + 1, lambda b, h, q, k: k <= q)
    out, lse = reference_decode(query, key, value, *mods, return_lse=True)
    assert out.shape == (2, 2, 3, 4) and (out == 0).all() and (lse == -torch.inf).all()
    query, key, value = make_inputs(2, 2, 1, 0, 5, 4)
    out, lse = reference_decode(query, key, value, *mods, return_lse=True)
    assert out.shape == (2, 2, 0, 4) and lse.shape == (2, 2, 0)


# --- How a mod is called ----------------------------------------------------------------------------------------------


def test_arguments_are_0d_positions_and_scores():
    seen = []

    def score_mod(score, *indices):
        seen.append([(x.ndim, x.dtype) for x in (score, *indices)])
        return score

    lse_of(score_mod, Q=2)
    assert seen == [[(0, torch.float64), *[(0, torch.int64)] * 4]]
    positions = lambda s, b, h, q, k: torch.where(k == 0, 1000.0 * b + 100 * h + q, -torch.inf)
    lse = lse_of(positions, B=2, Hq=2, Q=2)
    assert lse.flatten().tolist() == [4, 5, 104, 105, 1004, 1005, 1104, 1105]


def test_arithmetic_is_float64_and_the_default_dtype_comes_back():
    def score_mod(score, b, h, q_idx, kv_idx):
        third = 1 / (kv_idx + 3)
        assert third.dtype == torch.tensor(0.1).dtype == torch.float64
        return torch.where(kv_idx == 0, third + 1e-12, -torch.inf)

    assert lse_of(score_mod).item() == 1 / 3 + 1e-12
    assert torch.get_default_dtype() == torch.float32
    with pytest.raises(ZeroDivisionError):
        lse_of(lambda *_: 1 / 0)
    assert torch.get_default_dtype() == torch.float32


def test_python_constants_as_results():
    assert (lse_of(lambda *_: 0.5, lambda *_: True) - math.log(6) - 0.5).abs().item() < 1e-12
    assert lse_of(None, lambda *_: False).item() == -math.inf
    with pytest.raises(RuntimeError):
        lse_of(None, lambda *_: None)


def test_python_control_flow_on_an_index_raises():
    with pytest.raises(RuntimeError, match="data-dependent"):
        lse_of(None, lambda b, h, q, k: bool(k > 2))


def test_callables_of_every_kind():
    class Scale(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.tensor([2.0]))

        def forward(self, score, b, h, q_idx, kv_idx):
            return score + self.weight[h]

        def method(self, score, b, h, q_idx, kv_idx):
            return self(score, b, h, q_idx, kv_idx)

    module = Scale()
    bound = functools.partial(lambda bias, score, *indices: score + bias, 2.0)
    for score_mod in (module, module.method, bound):
        lse = lse_of(score_mod)
        assert abs(lse.item() - 2 - math.log(6)) < 1e-12 and not lse.requires_grad


# --- Captured tensors -------------------------------------------------------------------------------------------------


def read(index, table, **kw):
    """The values `index(table, b, h, q_idx, kv_idx)` as a mod reads them, `[B, Hq, Q, N]`."""
    sizes = {"B": 1, "Hq": 1, "Q": 1, "N": 4} | kw
    grid = tuple(torch.arange(sizes[name]) for name in ("B", "Hq", "Q", "N"))
    score = torch.zeros([len(axis) for axis in grid])
    return evaluate_mod(lambda s, *indices: s + index(table, *indices), grid, score)


def test_index_outside_reads_zero_and_negative_counts_from_the_end():
    table = torch.tensor([1.0, 2.0, 3.0])
    positions = lambda t, b, h, q, k: t[k - 5]
    assert read(positions, table, N=10).flatten().tolist() == [0, 0, 1, 2, 3, 1, 2, 3, 0, 0]
    assert read(lambda t, b, h, q, k: t[(k - 1) * 2**62], table, N=3).flatten().tolist() == [0, 1, 0]
    assert read(lambda t, b, h, q, k: t[3] + t[-4] + t[-3], table).flatten().tolist() == [1] * 4
    assert read(lambda t, b, h, q, k: t[k], torch.empty(0)).flatten().tolist() == [0] * 4
    grid = tuple(torch.arange(4) for _ in range(4))
    flags = torch.tensor([True, True])
    assert evaluate_mod(lambda b, h, q, k: flags[k], grid)[0, 0, 0].tolist() == [True, True, False, False]


def test_every_way_of_indexing_agrees():
    table = torch.randn(2, 3, 4, 5)
    sizes = {"B": 2, "Hq": 3, "Q": 4, "N": 5}
    ways = [
        lambda t, b, h, q, k: t[b, h, q, k],
        lambda t, b, h, q, k: t[b][h][q][k],
        lambda t, b, h, q, k: t[b, h][q, k],
        lambda t, b, h, q, k: t[b, :, q][h, k],
        lambda t, b, h, q, k: t[b, ..., k][h, q],
        lambda t, b, h, q, k: t[..., k][b, h][q],
        lambda t, b, h, q, k: t[:, h, None, :, k][b, 0, q],
        lambda t, b, h, q, k: t.transpose(0, 3)[k, h, q, b],
        lambda t, b, h, q, k: t[b.int(), h.to(torch.int16), q.to(torch.uint8), k],
        lambda t, b, h, q, k: t.exp()[b, h, q, k].log(),
    ]
    for way in ways:
        torch.testing.assert_close(read(way, table, **sizes), table.double(), rtol=1e-12, atol=1e-12)


def test_partial_read_outside_is_zero_all_the_way():
    table = torch.ones(2, 3)
    assert read(lambda t, b, h, q, k: t[k][1], table).flatten().tolist() == [1, 1, 0, 0]


def test_nested_gather_with_a_byte_table():
    classes, bias = torch.tensor([2, 0, 1, 2], dtype=torch.uint8), torch.tensor([5.0, 6.0, 7.0])
    assert read(lambda t, b, h, q, k: bias[t[k]], classes).flatten().tolist() == [7, 5, 6, 7]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_floating_captures_widen_before_any_arithmetic(dtype):
    table = torch.tensor([0.1, 0.7, 3.3, 1e-3]).to(dtype)
    exact = [x * (1 / 3) for x in table.tolist()]
    assert read(lambda t, b, h, q, k: t[k] * (1 / 3), table).flatten().tolist() == exact
    assert read(lambda t, b, h, q, k: (t * (1 / 3))[k], table).flatten().tolist() == exact
    number = table[1]
    assert read(lambda t, b, h, q, k: t * (1 / 3), number).flatten().tolist() == [exact[1]] * 4


def test_only_an_explicit_cast_rounds():
    table = torch.tensor([0.1, 0.7, 3.3, 1e-3])
    halves = table.half()
    rounded = (halves * 3.0).tolist()
    for cast in (
        lambda x: x.half(),
        lambda x: x.to(torch.float16),
        lambda x: x.to(halves),
        lambda x: x.type_as(halves),
    ):
        assert read(lambda t, b, h, q, k, cast=cast: cast(t[k]) * 3.0, table).flatten().tolist() == rounded
        assert read(lambda t, b, h, q, k, cast=cast: cast(t)[k] * 3.0, table).flatten().tolist() == rounded
    third = read(lambda t, b, h, q, k: (k + 1).float() / 3, table).flatten().tolist()
    assert third == [(k + 1) / 3 for k in range(4)]


def test_captures_are_read_at_call_time():
    table = torch.zeros(6)
    mod = lambda s, b, h, q, k: s + table[k]
    before = lse_of(mod)
    table += 1.0
    torch.testing.assert_close(lse_of(mod), before + 1.0)


def test_rank_of_an_index_is_checked():
    with pytest.raises(TypeError, match="0-d integer indices"):
        read(lambda t, b, h, q, k: t[torch.arange(2)], torch.ones(4))


@pytest.mark.gpu
def test_captures_and_inputs_on_a_gpu():
    query, key, value = make_inputs(2, 4, 2, 1, 5, 8)
    bias, cap = torch.randn(4, 5), torch.tensor(3.0)
    mod = lambda bias, cap: lambda s, b, h, q, k: cap * torch.tanh(s / cap) + bias[h, k]
    expected = reference_decode(query, key, value, mod(bias, cap))
    on_gpu = [x.cuda() for x in (query, key, value, bias)]
    assert torch.equal(reference_decode(*on_gpu[:3], mod(on_gpu[3], cap)), expected)
    assert torch.equal(reference_decode(*on_gpu[:3], mod(on_gpu[3], cap.cuda())), expected)


# --- The rule of comparison in tests/support.py -----------------------------------------------------------------------


@pytest.mark.parametrize("family", MODS, ids=lambda family: family.name)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_the_yardstick_meets_its_own_rule(family, dtype):
    B, Hq, N, Q = 2, 4, 19, 3
    query, key, value = make_inputs(B, Hq, 2, Q, N, 8, dtype=dtype, layout="bnhd")
    mods = [make(B, Hq, N, Q, "cpu") for make in family[1:]]
    kw = {"kv_lens": torch.tensor([N, 7])}
    out, lse = pytorch_decode(query, key, value, *mods, **kw)
    assert_close_to_reference(out, lse, query, key, value, *mods, **kw)


def test_the_families_have_different_names_and_results():
    B, Hq, N, Q = 2, 4, 40, 3
    inputs = make_inputs(B, Hq, 2, Q, N, 8)
    results = {}
    for family in MODS:
        mods = [make(B, Hq, N, Q, "cpu") for make in family[1:]]
        results[family.name] = reference_decode(*inputs, *mods, q_offset=N // 2)
    assert len(results) == len(MODS)
    same = {frozenset((a, b)) for a in results for b in results if a != b and torch.equal(results[a], results[b])}
    # What these pairs hide, or how they write it, differs; the live keys are the same.
    assert same == {
        frozenset(("causal", "no_window")),
        frozenset(("document", "document_offsets")),
        frozenset(("window", "masking_score")),
    }


def test_the_rule_rejects_wrong_results():
    inputs = make_inputs(2, 2, 1, 1, 6, 4, dtype=torch.float16)
    mods = (lambda s, b, h, q, k: torch.where((h == 1) & (b == 1), torch.nan, s), lambda b, h, q, k: b == 1)
    out, lse = pytorch_decode(*inputs, *mods)
    assert_close_to_reference(out, lse, *inputs, *mods)
    assert_close_to_reference(out, None, *inputs, *mods)

    def rejected(match, out, lse):
        with pytest.raises(AssertionError, match=match):
            assert_close_to_reference(out, lse, *inputs, *mods)

    def changed(tensor, index, number):
        tensor = tensor.clone()
        tensor[index] = number
        return tensor

    rejected("out: largest error", changed(out, (1, 0, 0, 2), 9.0), lse)
    rejected("out is not 0", changed(out, (0, 0, 0, 1), 1e-7), lse)
    rejected("out is NaN in the wrong places", changed(out, (1, 0, 0, 1), math.nan), lse)
    rejected("out is NaN in the wrong places", changed(out, (1, 1, 0, 1), 0.0), lse)
    rejected("out has shape", out[..., :3], lse)
    rejected("lse: largest error", out, changed(lse, (1, 0), 9.0))
    rejected("lse is -inf in the wrong rows", out, changed(lse, (0, 0), -1e30))
    rejected("lse is NaN in the wrong rows", out, changed(lse, (1, 1), 0.0))
    rejected("lse has shape", out, lse[0])


def test_the_rule_bounds_the_mean_error_too():
    inputs = make_inputs(2, 2, 1, 1, 6, 4, dtype=torch.float16)
    exact, measure = reference_decode(*inputs), pytorch_decode(*inputs)[0].double()
    largest = (measure - exact).abs().max()
    assert_close_to_reference(exact, None, *inputs)
    with pytest.raises(AssertionError, match="out: mean error"):
        assert_close_to_reference(exact + 1.9 * largest, None, *inputs)
    with pytest.raises(AssertionError, match="out: largest error"):
        assert_close_to_reference(exact + 2.1 * largest + 1e-5, None, *inputs)


@pytest.mark.parametrize("layout", ["bhnd", "bnhd", "strided"])
def test_layouts_hold_the_same_numbers(layout):
    expected = make_inputs(2, 4, 2, 3, 5, 8, 6)
    actual = make_inputs(2, 4, 2, 3, 5, 8, 6, layout=layout)
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(a, e)
    assert actual[1].is_contiguous() == (layout == "bhnd")
    assert actual[1].transpose(1, 2).is_contiguous() == (layout == "bnhd")
    with pytest.raises(ValueError, match="unknown layout"):
        make_inputs(1, 1, 1, 1, 1, 1, layout="nhd")
