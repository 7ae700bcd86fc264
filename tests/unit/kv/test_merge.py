"""Merging attention over parts of the keys by PyTorch operations; the cases that the kernel must pass too."""

import itertools
import math

import pytest
import torch
from support import assert_close_to_reference, make_inputs

from flexdecode import flex_decode
from flexdecode.kv import merge
from flexdecode.kv.merge import merge_attention
from flexdecode.reference import reference_decode

DTYPES = [torch.float16, torch.bfloat16, torch.float32]
CUTS = {"one": [], "two": [7], "with_empty": [0, 7, 7, 33], "nine": [1, 2, 4, 8, 12, 16, 24, 32]}  # of 33 keys
LAYOUTS = ["contiguous", "bmhd", "hbmd", "strided", "expanded", "mixed"]


# --- Shared with the other tiers --------------------------------------------------------------------------------------


def decode_parts(query, key, value, score_mod, mask_mod, cuts, kv_lens):
    """Attention over each run of keys between two cuts, at the positions of the whole: outputs and lses."""
    Q, N = query.shape[2], key.shape[2]

    def attend(start, end):
        return flex_decode(
            query,
            key[:, :, start:end],
            value[:, :, start:end],
            lambda s, b, h, q, k: score_mod(s, b, h, q, k + start),
            lambda b, h, q, k: mask_mod(b, h, q, k + start),
            kv_lens=(kv_lens - start).clamp(0, end - start),
            q_offset=kv_lens - Q,
            return_lse=True,
        )

    return zip(*(attend(*run) for run in itertools.pairwise([0, *cuts, N])), strict=True)


def check_parts_make_the_whole(cuts, dtype, device):
    inputs = make_inputs(3, 4, 2, 2, 33, 16, 24, dtype=dtype, device=device)
    slopes = torch.tensor([1.0, 0.5, 0.25, 0.125], device=device)
    mods = (lambda s, b, h, q, k: s - slopes[h] * (q - k), lambda b, h, q, k: k <= q)
    kv_lens = torch.tensor([33, 5, 0], device=device)
    out, lse = merge_attention(*decode_parts(*inputs, *mods, cuts, kv_lens))
    assert out.dtype == dtype and lse.dtype == torch.float32 and out.device == lse.device == inputs[0].device
    assert_close_to_reference(out, lse, *inputs, *mods, kv_lens=kv_lens)


def check_a_sink_of_one_part(place, device):
    query, key, value = make_inputs(2, 4, 2, 1, 12, 16, dtype=torch.float16)
    sinks, kv_lens = torch.tensor([0.0, 2.0, -3.0, -math.inf]), torch.tensor([12, 0])
    parts = [
        reference_decode(
            query,
            key[:, :, 4 * i : 4 * i + 4],
            value[:, :, 4 * i : 4 * i + 4],
            kv_lens=(kv_lens - 4 * i).clamp(0, 4),
            sinks=sinks if i == place else None,
            return_lse=True,
        )
        for i in range(3)
    ]
    outs, lses = zip(*parts, strict=True)
    out, lse = merge_attention([x.half().to(device) for x in outs], [x.float().to(device) for x in lses])
    assert_close_to_reference(out, lse, query, key, value, kv_lens=kv_lens, sinks=sinks)


def random_parts(num_parts, shape, dtype=torch.float32, device="cpu"):
    """Stacked outputs `[S, *shape]` and lses, of which a quarter are -inf beside NaN outputs; row 0 has no live key."""
    generator = torch.Generator().manual_seed(0)
    outs = torch.randn(num_parts, *shape, generator=generator).to(dtype)
    lses = 3 * torch.randn(num_parts, *shape[:-1], generator=generator)
    lses[torch.rand(lses.shape, generator=generator) < 0.25] = -math.inf
    lses.flatten(1)[:, 0] = -math.inf
    outs[lses == -math.inf] = math.nan
    return outs.to(device), lses.to(device)


def in_layout(parts, layout):
    """The same numbers as a list of tensors that lie in memory differently."""
    order = list(range(parts[0].ndim))
    swapped = {"bmhd": [0, 2, 1, 3], "hbmd": [1, 0, 2, 3]}.get(layout, order)[: len(order)]
    wide = [torch.full((*p.shape[:-1], 2 * p.shape[-1] + 1), math.nan, dtype=p.dtype, device=p.device) for p in parts]
    if layout == "expanded":
        return [parts[0][:1].expand_as(parts[0])] * len(parts)
    if layout == "strided":
        return [w[..., 1::2].copy_(p) for w, p in zip(wide, parts, strict=True)]
    if layout == "mixed":
        ways = itertools.cycle(["contiguous", "bmhd", "strided"])
        return [in_layout([p], next(ways))[0] for p in parts]
    return [p.permute(swapped).contiguous().permute(swapped) for p in parts]


def assert_merged(out, lse, outs, lses):
    """Asserts that what was merged is as good as the exact result rounded to the dtype: at most 2x its error + 1e-5."""
    outs, lses = (torch.stack(tuple(x)).cpu() for x in (outs, lses))
    exact_lse = lses.double().logsumexp(0)
    weights = (lses.double() - exact_lse.where(exact_lse != -math.inf, 0.0)).exp()
    parts = outs.double() * weights[..., None]
    exact = parts.where(lses[..., None] != -math.inf, 0.0).sum(0)
    for actual, expected, dtype in ((out, exact, outs.dtype), (lse, exact_lse, torch.float32)):
        assert actual.dtype == dtype and actual.shape == expected.shape and actual.is_contiguous()
        actual, finite = actual.cpu().double(), expected.isfinite()
        torch.testing.assert_close(actual[~finite], expected[~finite], equal_nan=True, rtol=0, atol=0)
        if not finite.any():
            continue
        actual, expected = actual[finite], expected[finite]
        allowed = 2 * (expected.to(dtype).double() - expected).abs().max() + 1e-5
        assert (actual - expected).abs().max() <= allowed
    empty = exact_lse == -math.inf
    assert (out.cpu()[empty] == 0).all()


def check_numbers(num_parts, v_head_dim, dtype, device):
    outs, lses = random_parts(num_parts, (2, 3, 3, v_head_dim), dtype, device)
    before = outs.clone(), lses.clone()
    out, lse = merge_attention(outs, lses)
    assert_merged(out, lse, outs, lses)
    for now, then in zip((outs, lses), before, strict=True):
        torch.testing.assert_close(now, then, equal_nan=True, rtol=0, atol=0)


def check_layouts(layout, num_parts, device):
    outs, lses = (in_layout(x.unbind(0), layout) for x in random_parts(num_parts, (2, 4, 3, 16), device=device))
    assert_merged(*merge_attention(outs, lses), outs, lses)


def check_packed(layout, num_parts, v_head_dim, dtype, device):
    """Parts `[T, Hq, Dv]` of packed queries, also stacked, are those of T sequences with one token."""
    outs, lses = random_parts(num_parts, (7, 3, v_head_dim), dtype, device)
    swapped = {"thd": [0, 1, 2], "htd": [1, 0, 2]}.get(layout)
    if swapped is not None:
        outs = [x.permute(swapped).contiguous().permute(swapped) for x in outs]
    if layout == "htd":
        lses = [x.t().contiguous().t() for x in lses]
    if layout == "strided":
        outs = in_layout(outs.unbind(0), "strided")
    out, lse = merge_attention(outs, lses)
    assert out.shape == (7, 3, v_head_dim) and lse.shape == (7, 3)
    assert_merged(out, lse, outs, lses)
    padded = merge_attention([x[:, :, None] for x in outs], [x[:, :, None] for x in lses])
    assert torch.equal(out, padded[0][:, :, 0]) and torch.equal(lse, padded[1][:, :, 0])


PACKED = list(itertools.product(["stacked", "thd", "htd", "strided"], [1, 3, 10], [16, 20]))


def check_special_values(device):
    """Four rows: a NaN output whose weight rounds to 0, a NaN lse, a NaN lse beside -inf, and a lse of +inf."""
    inf, nan = math.inf, math.nan
    outs = torch.ones(2, 1, 1, 4, 16, device=device)
    outs[1, 0, 0, 0] = nan
    lses = torch.tensor([[0.0, 0.0, -inf, 0.0], [-500.0, nan, nan, inf]], device=device).reshape(2, 1, 1, 4)
    for order in ([0, 1], [1, 0], [0, 1] + [0] * 9):
        out, lse = merge_attention([outs[i] for i in order], [lses[i] for i in order])
        assert out.isnan().all()
        assert lse[0, 0, 0].item() == pytest.approx(math.log(order.count(0)), abs=1e-6)
        assert not lse[0, 0, 1:].isfinite().any() and not (lse == -inf).any()


def check_magnitudes(device):
    """Weights come from differences of lses, so their size does not matter."""
    outs = torch.stack([torch.zeros(1, 1, 1, 16), torch.ones(1, 1, 1, 16)]).to(device)
    for base in (-3e38, -1e4, 0.0, 1e4, 3e38):
        lses = torch.full((2, 1, 1, 1), base, device=device)
        out, lse = merge_attention(outs, lses)
        assert (out == 0.5).all()
        assert lse.item() == pytest.approx(base + math.log(2), rel=1e-6)


# --- The PyTorch operations -------------------------------------------------------------------------------------------


def test_two_parts_by_hand():
    outs = [torch.full((1, 1, 1, 2), x) for x in (3.0, 7.0)]
    lses = [torch.full((1, 1, 1), math.log(x)) for x in (1.0, 3.0)]
    out, lse = merge_attention(outs, lses)
    torch.testing.assert_close(out, torch.full((1, 1, 1, 2), 6.0))
    torch.testing.assert_close(lse, torch.full((1, 1, 1), math.log(4)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cuts", CUTS.values(), ids=CUTS)
def test_parts_make_the_whole(cuts, dtype):
    check_parts_make_the_whole(cuts, dtype, "cpu")


@pytest.mark.parametrize("place", [0, 2])
def test_a_sink_of_one_part(place):
    check_a_sink_of_one_part(place, "cpu")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("num_parts", [1, 2, 8, 9, 17])
def test_numbers(num_parts, dtype):
    check_numbers(num_parts, 20, dtype, "cpu")


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout):
    check_layouts(layout, 3, "cpu")


def test_special_values():
    check_special_values("cpu")


def test_magnitudes():
    check_magnitudes("cpu")


def test_lists_tuples_and_stacked_tensors_are_the_same():
    outs, lses = random_parts(3, (2, 2, 1, 16))
    expected = merge_attention(outs, lses)
    for pair in ((list(outs), list(lses)), (tuple(outs), lses), (outs, tuple(lses))):
        assert all(map(torch.equal, merge_attention(*pair), expected))


@pytest.mark.parametrize(("layout", "num_parts", "v_head_dim"), PACKED)
def test_packed(layout, num_parts, v_head_dim):
    check_packed(layout, num_parts, v_head_dim, torch.float32, "cpu")


@pytest.mark.parametrize("shape", [(0, 2, 1, 16), (2, 2, 0, 16), (2, 2, 1, 0), (0, 2, 16), (3, 0, 16), (3, 2, 0)])
def test_empty_sizes(shape):
    outs, lses = torch.zeros(2, *shape), torch.zeros(2, *shape[:-1])
    out, lse = merge_attention(outs, lses)
    assert out.shape == shape and lse.shape == shape[:-1]
    torch.testing.assert_close(lse, torch.full(shape[:-1], math.log(2)))


def test_one_part_loses_what_has_no_live_key():
    out, lse = merge_attention([torch.full((1, 2, 1, 16), math.nan)], [torch.full((1, 2, 1), -math.inf)])
    assert (out == 0).all() and (lse == -math.inf).all()


# --- Errors -----------------------------------------------------------------------------------------------------------

OUT, LSE = torch.zeros(1, 2, 1, 16), torch.zeros(1, 2, 1)


@pytest.mark.parametrize(
    ("outs", "lses", "error", "message"),
    [
        ([], [], ValueError, "`outs` must have at least one part, got none"),
        (torch.zeros(0, 1, 2, 1, 16), torch.zeros(0, 1, 2, 1), ValueError, "`outs` must have at least one part"),
        ([OUT, OUT], [LSE], ValueError, "`outs` and `lses` must have as many parts, got 2 and 1"),
        (
            OUT[0],
            [LSE],
            ValueError,
            "`outs` must be a list of tensors or have shape [S, B, Hq, Q, Dv] or [S, T, Hq, Dv], got [2, 1, 16]",
        ),
        (
            [OUT],
            LSE[0],
            ValueError,
            "`lses` must be a list of tensors or have shape [S, B, Hq, Q] or [S, T, Hq], got [2, 1]",
        ),
        (OUT, [LSE], ValueError, "`lses[0]` must have shape [T, Hq] = [2, 1] (from `outs[0]`), got [1, 2, 1]"),
        ([OUT], LSE, ValueError, "`lses[0]` must have shape [B, Hq, Q] = [1, 2, 1] (from `outs[0]`), got [2, 1]"),
        (
            None,
            [LSE],
            TypeError,
            "`outs` must be a list of tensors or one tensor [S, B, Hq, Q, Dv] or [S, T, Hq, Dv], got NoneType",
        ),
        (
            [OUT],
            {1: LSE},
            TypeError,
            "`lses` must be a list of tensors or one tensor [S, B, Hq, Q] or [S, T, Hq], got dict",
        ),
        ([OUT, 1.0], [LSE, LSE], TypeError, "`outs[1]` must be a torch.Tensor, got float"),
        ([OUT, OUT], [LSE, None], TypeError, "`lses[1]` must be a torch.Tensor, got NoneType"),
        (
            [OUT[0, 0]],
            [LSE],
            ValueError,
            "`outs[0]` must have shape [B, Hq, Q, Dv] or [T, Hq, Dv], got [1, 16]",
        ),
        (
            [OUT[0], OUT],
            [LSE[0], LSE[0]],
            ValueError,
            "`outs[1]` must have shape [T, Hq, Dv] = [2, 1, 16] (from `outs[0]`), got [1, 2, 1, 16]",
        ),
        (
            [OUT, OUT[..., :8]],
            [LSE, LSE],
            ValueError,
            "`outs[1]` must have shape [B, Hq, Q, Dv] = [1, 2, 1, 16] (from `outs[0]`), got [1, 2, 1, 8]",
        ),
        (
            [OUT],
            [LSE[..., 0]],
            ValueError,
            "`lses[0]` must have shape [B, Hq, Q] = [1, 2, 1] (from `outs[0]`), got [1, 2]",
        ),
        ([OUT.double()], [LSE], ValueError, "`outs[0]` must be float16, bfloat16 or float32, got torch.float64"),
        (
            [OUT, OUT.half()],
            [LSE, LSE],
            ValueError,
            "`outs[1]` must be torch.float32 (from `outs[0]`), got torch.float16",
        ),
        ([OUT.half()], [LSE.half()], ValueError, "`lses[0]` must be torch.float32, got torch.float16"),
        (
            [OUT, OUT.to("meta")],
            [LSE, LSE],
            ValueError,
            "`outs[1]` must be on the device of `outs[0]`, cpu, got meta",
        ),
        ([OUT.to_sparse()], [LSE], ValueError, "`outs[0]` must be a dense tensor, got layout torch.sparse_coo"),
    ],
)
def test_what_does_not_fit_is_refused(outs, lses, error, message):
    with pytest.raises(error) as caught:
        merge_attention(outs, lses)
    assert str(caught.value).startswith(message)


@pytest.mark.parametrize("name", ["outs", "lses"])
@pytest.mark.parametrize("stacked", [False, True])
def test_gradients_are_refused(name, stacked):
    given = {"outs": [OUT, OUT.clone()], "lses": [LSE, LSE.clone()]}
    if stacked:
        given = {key: torch.stack(parts) for key, parts in given.items()}
        given[name].requires_grad_()
    else:
        given[name][1].requires_grad_()
    with pytest.raises(ValueError, match=rf"`{name}\[\d\]` requires grad, but merge_attention is forward only"):
        merge_attention(**given)
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out, _ = merge_attention(**given)
        assert not out.requires_grad


def test_this_tier_takes_the_pytorch_operations(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(merge, "_launch", None)
    assert (merge_attention([OUT], [LSE])[0] == 0).all()
