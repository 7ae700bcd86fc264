"""What all tiers share: inputs, families of mods, and the one rule by which results are compared.

No test picks a tolerance of its own. `assert_close_to_reference` allows twice the error that PyTorch itself makes when
it computes the same attention in the input dtype.
"""

import sys
from typing import NamedTuple

import pytest
import torch

from flexdecode import mods
from flexdecode.frontend.captures import walk
from flexdecode.frontend.trace import trace
from flexdecode.reference import dequantized_rows, evaluate_mod, reference_decode
from flexdecode.runtime.evaluation import Evaluation

# Inductor warns of what PyTorch deprecates, and of settings of the machine.
OF_INDUCTOR = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::FutureWarning")

# --- Inputs -----------------------------------------------------------------------------------------------------------


def make_inputs(B, Hq, Hkv, Q, N, D, Dv=None, dtype=torch.float32, device="cpu", seed=0, layout="bhnd"):
    """Makes a standard normal query `[B, Hq, Q, D]`, key `[B, Hkv, N, D]` and value `[B, Hkv, N, Dv]`.

    The numbers depend on the shapes and the seed only. The layout says where they lie in memory:
        bhnd: contiguous.
        bnhd: contiguous as `[B, N, H, D]`, seen through a transposed view.
        strided: every other element of rows in a larger tensor, whose remaining elements are NaN.
    """
    generator = torch.Generator().manual_seed(seed)

    def make(H, length, width):
        numbers = torch.randn(B, H, length, width, generator=generator).to(device, dtype)
        if layout == "bhnd":
            return numbers
        if layout == "bnhd":
            return numbers.transpose(1, 2).contiguous().transpose(1, 2)
        if layout == "strided":
            storage = torch.full((B + 1, H + 2, length + 3, 2 * width + 1), torch.nan, dtype=dtype, device=device)
            return storage[1:, 1:-1, 2:-1, 1::2].copy_(numbers)
        raise ValueError(f"unknown layout {layout!r}")

    return make(Hq, Q, D), make(Hkv, N, D), make(Hkv, N, D if Dv is None else Dv)


def paged(cache, page_size, seed=0):
    """Cuts `[B, H, N, ...]` into shuffled pages, among as many that no sequence has and that hold NaN (integers: 99).

    Returns:
        The pages `[2 * B * N / page_size, H, page_size, ...]` and the page table `[B, N / page_size]`, int32.
    """
    B, _, N = cache.shape[:3]
    pages = cache.unflatten(2, (N // page_size, page_size)).transpose(1, 2).flatten(0, 1)
    places = torch.randperm(2 * len(pages), generator=torch.Generator().manual_seed(seed))[: len(pages)]
    filler = torch.nan if cache.is_floating_point() else 99
    pool = torch.full((2 * len(pages), *pages.shape[1:]), filler, dtype=cache.dtype, device=cache.device)
    pool[places.to(cache.device)] = pages
    return pool, places.to(cache.device, torch.int32).reshape(B, -1)


# --- The rule of comparison -------------------------------------------------------------------------------------------

SLACK = 1e-5


def pytorch_decode(
    query, key, value, score_mod=None, mask_mod=None, *, kv_lens=None, q_offset=None, scale=None, page_table=None,
    q_lens=None, k_scale=None, v_scale=None, sinks=None, kv_starts=None, kv_offset=None,
):  # fmt: skip
    """Computes the attention as eager PyTorch does in the dtype of the inputs; the yardstick of the tolerance.

    Scores are products in the input dtype (summed in float32, rounded once, as a GPU's matrix product does); mods and
    softmax are float32; the weights are rounded to the dtype of the second product. A product of two dtypes is in the
    promoted one, and one with a quantised cache in that of the query. Scaled keys and values are multiplied in float32
    and rounded to the query dtype before either product. A kernel that scales the products and the weights instead
    rounds less. If an input is float64, float64 takes the place of float32.

    Returns:
        Output `[B, Hq, Q, Dv]` in the dtype of `query`, and lse `[B, Hq, Q]` in float32, both on the CPU.
    """
    query, key, value = (x.detach() for x in (query, key, value))
    query, dtype = query.cpu(), query.dtype
    key_dtype, value_dtype = (
        dtype if x.element_size() == 1 else torch.promote_types(dtype, x.dtype) for x in (key, value)
    )
    wide = torch.float64 if torch.float64 in (dtype, key.dtype, value.dtype) else torch.float32
    (B, Hq, Q, D), (Hkv, N, Dv) = query.shape, value.shape[1:]
    N *= 1 if page_table is None else page_table.shape[1]
    rows = Hq // Hkv * Q
    lens, tokens = (
        torch.as_tensor(most if given is None else given).cpu().long().expand(B).clamp(0, most)
        for given, most in ((kv_lens, N), (q_lens, Q))
    )
    starts, shift = (
        torch.as_tensor(0 if given is None else given).cpu().long().expand(B) for given in (kv_starts, kv_offset)
    )
    first = shift + lens - tokens if q_offset is None else torch.as_tensor(q_offset).cpu().long().expand(B)
    sink = torch.full((Hq,), -torch.inf, dtype=wide) if sinks is None else sinks.detach().cpu().to(wide)
    out, lse = torch.zeros(B, Hq, Q, Dv, dtype=dtype), torch.full((B, Hq, Q), -torch.inf)
    for batch in range(B):
        n, m = int(lens[batch]), int(tokens[batch])
        slots = torch.arange(n)
        grid = torch.tensor([batch]), torch.arange(Hq), first[batch] + torch.arange(Q), shift[batch] + slots
        live = (slots >= starts[batch]).expand(Hq, Q, n)
        if mask_mod is not None:
            live = live & evaluate_mod(mask_mod, grid, dtype=wide)[0]
        read = live[:, :m].reshape(Hkv, Hq // Hkv * m, n).any(1)
        k = dequantized_rows(key, k_scale, batch, n, page_table, wide, read).to(key_dtype).to(wide)
        v = dequantized_rows(value, v_scale, batch, n, page_table, wide, read).to(value_dtype).to(wide)
        products = (query[batch].to(wide).reshape(Hkv, rows, D) @ k.mT).to(key_dtype)
        score = products.to(wide).reshape(Hq, Q, n) * (D**-0.5 if scale is None else scale)
        if score_mod is not None:
            score = evaluate_mod(score_mod, grid, score[None], dtype=wide)[0]
        score = score.where(live, -torch.inf)
        # The sink is one more key, whose value is 0.
        score = torch.cat([score, sink[:, None, None].expand(Hq, Q, 1)], dim=-1)
        total = score.logsumexp(dim=-1)
        weight = score.softmax(dim=-1)[..., :n].where(total[..., None] != -torch.inf, 0.0)
        result = (weight.to(value_dtype).to(wide).reshape(Hkv, rows, n) @ v).reshape(Hq, Q, Dv).to(dtype)
        out[batch, :, :m], lse[batch, :, :m] = result[:, :m], total[:, :m]
    return out, lse


def assert_close_to_reference(out, lse, query, key, value, score_mod=None, mask_mod=None, **kw):
    """Asserts that a result is as good as PyTorch's own in the input dtype, by the rule of `assert_close`.

    Args:
        out: `[B, Hq, Q, Dv]`, any dtype and device.
        lse: `[B, Hq, Q]`, or None where there is none to compare.
        query, key, value, score_mod, mask_mod: what was computed.
        **kw: `kv_lens`, `q_offset`, `scale`, `page_table`, `q_lens`, `k_scale`, `v_scale`, `sinks`,
            `kv_starts`, `kv_offset`.
    """
    expected = reference_decode(query, key, value, score_mod, mask_mod, return_lse=True, **kw)
    assert_close(out, lse, expected, pytorch_decode(query, key, value, score_mod, mask_mod, **kw))


def assert_close(out, lse, expected, measure):
    """The rule of comparison.

    The largest absolute error against the float64 reference is at most 2x that of `pytorch_decode`, plus 1e-5, and the
    mean error at most 1.5x, plus 1e-5; the same for lse. For an output in float64 the 1e-5 shrink as the precision of
    the type does. Rows without a live key are exactly 0, with lse -inf where
    there is no sink, and NaN is where the reference has NaN, only there, and in the whole row.

    Args:
        out: `[..., Dv]`, any dtype and device.
        lse: `[...]`, or None where there is none to compare.
        expected: output and lse of the reference.
        measure: output and lse of `pytorch_decode`.
    """
    (expected, expected_lse), (measure, measure_lse) = expected, measure
    slack = (
        SLACK * torch.finfo(torch.float64).eps / torch.finfo(torch.float32).eps if out.dtype == torch.float64 else SLACK
    )
    out = out.detach().cpu().double()
    assert out.shape == expected.shape, f"out has shape {list(out.shape)}, not {list(expected.shape)}"

    # With a sink the lse of a row without a live key is finite, so the row is told by its output.
    empty, zero = expected_lse == -torch.inf, (expected == 0).all(-1)
    assert (out[zero] == 0).all(), f"out is not 0 in a row without a live key: {_where(out.ne(0).any(-1) & zero)}"
    nan = expected.isnan()
    assert torch.equal(out.isnan(), nan), f"out is NaN in the wrong places: {_where(out.isnan() != nan)}"
    _assert_small_error("out", out, expected, measure.double(), slack)
    if lse is None:
        return
    lse = lse.detach().cpu().double()
    assert lse.shape == expected_lse.shape, f"lse has shape {list(lse.shape)}, not {list(expected_lse.shape)}"
    assert torch.equal(lse == -torch.inf, empty), (
        f"lse is -inf in the wrong rows: {_where((lse == -torch.inf) != empty)}"
    )
    # A score of +inf has no softmax: its row is NaN, and its lse is NaN or +inf, as the arithmetic falls out.
    invalid, expected_invalid = lse.isnan() | (lse == torch.inf), expected_lse.isnan() | (expected_lse == torch.inf)
    assert torch.equal(invalid, expected_invalid), (
        f"lse is NaN in the wrong rows: {_where(invalid != expected_invalid)}"
    )
    _assert_small_error("lse", lse, expected_lse, measure_lse.double())


def _assert_small_error(name, actual, expected, measure, slack=SLACK):
    # An infinity that the input dtype makes (float16 overflow) is PyTorch's right too, not an error to scale by.
    finite = expected.isfinite() & measure.isfinite()
    if not finite.any():
        return
    error, allowance = (actual - expected).abs()[finite], (measure - expected).abs()[finite]
    largest, mean = 2.0 * allowance.max().item() + slack, 1.5 * allowance.mean().item() + slack
    assert error.max() <= largest, (
        f"{name}: largest error {error.max():.3e} > {largest:.3e}, "
        f"at {_where(((actual - expected).abs() == error.max()) & finite)}"
    )
    assert error.mean() <= mean, f"{name}: mean error {error.mean():.3e} > {mean:.3e}"


def assert_max_scores(found, query, key, score_mod=None, mask_mod=None):
    """Asserts that the largest scores of rows `[B, Hq, Q]` are as good as PyTorch's, by the rule of `assert_close`.

    All keys are live, and query positions count from 0. A row without a live key has -inf.
    """
    expected, measure = (_max_scores(query, key, score_mod, mask_mod, x) for x in (torch.float64, torch.float32))
    found = found.detach().cpu().double()
    assert found.shape == expected.shape, f"max_scores has shape {list(found.shape)}, not {list(expected.shape)}"
    for wrong in (found.isnan() != expected.isnan(), (found == -torch.inf) != (expected == -torch.inf)):
        assert not wrong.any(), f"max_scores is NaN or -inf in the wrong rows: {_where(wrong)}"
    _assert_small_error("max_scores", found, expected, measure.double())


def _max_scores(query, key, score_mod, mask_mod, dtype):
    """Computes them in float64, or as PyTorch does: products in the input dtype and all else in float32."""
    query, key = query.detach().cpu(), key.detach().cpu()
    (B, Hq, Q, D), (_, Hkv, N, _) = query.shape, key.shape
    products = query.to(dtype) @ key.to(dtype).expand(B, -1, -1, -1).repeat_interleave(Hq // Hkv, 1).mT
    if dtype == torch.float32:
        products = products.to(torch.promote_types(query.dtype, key.dtype)).to(dtype)
    grid = [torch.arange(n) for n in (B, Hq, Q, N)]
    score = products * D**-0.5
    if score_mod is not None:
        score = evaluate_mod(score_mod, grid, score, dtype=dtype)
    if mask_mod is not None:
        score = score.where(evaluate_mod(mask_mod, grid, dtype=dtype), -torch.inf)
    return score.amax(-1)


def _where(mask):
    places = mask.nonzero().tolist()
    return f"{places[:4]}{' ...' if len(places) > 4 else ''} ({len(places)} in all)"


# --- Traced mods ------------------------------------------------------------------------------------------------------


def trace_mod(mod, kind="score_mod"):
    """Gives the graph of a mod and the leaves of its captures."""
    _, leaves = walk(mod)
    return trace(mod, kind, leaves, torch.device("cpu")).graph, leaves


def evaluate_graph(graph, leaves, score, b, h, q_idx, kv_idx):
    """Computes a graph by the op table's torch column, on tensors that broadcast."""
    indices = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
    return Evaluation((graph, leaves), indices, score, torch.tensor(True), check_indices=False).result()


# Score, b, h, q_idx and kv_idx of some (query, key) pairs, with what floats and decoding have in stock.
POINTS = [
    (0.3, 0, 0, 5, 3),
    (-2.5, 1, 3, 36, 0),
    (1.5, 0, 2, 0, 17),
    (0.5, 1, 1, -2, 5),
    (-0.0, 0, 3, 7, 7),
    (100.0, 1, 0, -1, 1),
    (-100.0, 0, 1, 900, 899),
    (3e38, 0, 0, 1, 2),
    (float("inf"), 1, 2, 3, 4),
    (float("-inf"), 0, 1, 2, 9),
    (float("nan"), 1, 3, 8, 6),
]


def assert_same_as_pytorch(mod, points=POINTS, rtol=0.0):
    """Asserts that the graph of a score_mod gives what the mod itself gives on 0-d tensors, by default to the last bit.

    Captured half-precision tensors are no subject here: a mod sees them widened to float32.
    """
    graph, leaves = trace_mod(mod)
    for point in points:
        tensors = [torch.tensor(x) for x in point]
        expected = torch.as_tensor(mod(*tensors)).to(torch.float32)
        actual = evaluate_graph(graph, leaves, *tensors)
        assert actual.dtype == torch.float32
        assert torch.isclose(actual, expected, rtol=rtol, atol=0.0, equal_nan=True), (
            f"at {point}: {actual.item()!r} instead of {expected.item()!r}, by\n{graph.text}"
        )


# --- Families of mods -------------------------------------------------------------------------------------------------


class Mods(NamedTuple):
    """A family of mods; the makers take `(B, Hq, N, Q, device)` and return a mod or None."""

    name: str
    make_score_mod: object
    make_mask_mod: object


def _nothing(B, Hq, N, Q, device):
    return None


def _randn(*shape, device, seed=1, dtype=torch.float32):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, dtype)


def _randint(high, *shape, device, seed=1, dtype=torch.int64):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, max(high, 1), shape, generator=generator).to(device, dtype)


def _prefix_lm(B, Hq, N, Q, device):
    return mods.prefix_lm(N - _randint(N // 2, B, device=device))


def _document_ids(B, N, device):
    """Four runs of tokens per sequence."""
    return _randint(4, B, N, device=device, dtype=torch.int32).sort(dim=1).values


def _document(B, Hq, N, Q, device):
    return mods.and_masks(mods.causal(), mods.document(_document_ids(B, N, device)))


def _document_offsets(B, Hq, N, Q, device):
    ids = _document_ids(B, N, device)
    return mods.document_offsets(torch.searchsorted(ids, ids).to(torch.int32))


def _document_start(B, Hq, N, Q, device):
    return mods.document_offsets(_randint(N, B, device=device))


def _tree(B, Hq, N, Q, device):
    """Every draft has a random earlier one as parent."""
    ancestors = torch.eye(Q, dtype=torch.bool)
    for draft in range(1, Q):
        ancestors[draft] |= ancestors[int(_randint(draft, 1, device="cpu", seed=draft))]
    return mods.tree(ancestors.to(device), N - Q if N > Q else 0)


def _key_padding(B, Hq, N, Q, device):
    keep = _randint(2, B, N, device=device).bool()

    def mask_mod(b, h, q_idx, kv_idx):
        return keep[b, kv_idx]

    return mask_mod


def _head_window(B, Hq, N, Q, device):
    windows = _randint(N, Hq, device=device, dtype=torch.int32) + 1

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < windows[h])

    return mask_mod


def _neighborhood(B, Hq, N, Q, device):
    """A 2-D window on an image of rows of `width` tokens, as in neighborhood attention."""
    width, radius = max(2, int(N**0.5)), 2

    def mask_mod(b, h, q_idx, kv_idx):
        row = (q_idx // width - kv_idx // width).abs()
        column = (q_idx % width - kv_idx % width).abs()
        return (row <= radius) & (column <= radius)

    return mask_mod


def _block_diffusion(B, Hq, N, Q, device):
    """Tokens see their own block in both directions, and all earlier blocks."""
    block = max(1, N // 5)

    def mask_mod(b, h, q_idx, kv_idx):
        return q_idx // block >= kv_idx // block

    return mask_mod


def _no_key(B, Hq, N, Q, device):
    """Odd heads have no live key."""

    def mask_mod(b, h, q_idx, kv_idx):
        return (h % 2 == 0) & (kv_idx <= q_idx)

    return mask_mod


def _relative_bias(B, Hq, N, Q, device):
    return mods.relative_bias(_randn(Hq, 2 * max(1, N // 2) + 1, device=device))


def _t5(B, Hq, N, Q, device):
    return mods.t5_bias(_randn(32, Hq, device=device), max_distance=128)


def _bias(B, Hq, N, Q, device):
    bias = _randn(B, Hq, N, device=device)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[b, h, kv_idx]

    return score_mod


def _chained_half_bias(B, Hq, N, Q, device):
    """Float16 and a transposed view, indexed one dimension at a time."""
    bias = _randn(N, Hq, B, device=device, dtype=torch.float16).permute(2, 1, 0)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[b][h][kv_idx] * 0.5

    return score_mod


def _nested_gather(B, Hq, N, Q, device):
    """A table of classes indexes a table of biases; indices count from the end, and some lie outside."""
    classes = _randint(7, B, N, device=device, dtype=torch.int32) - 3
    bias = _randn(5, Hq, device=device)

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + bias[classes[b, kv_idx], h] + bias[kv_idx - q_idx, -1]

    return score_mod


def _masking_score(B, Hq, N, Q, device):
    """A window written as a score_mod."""
    window = max(1, N // 3)

    def score_mod(score, b, h, q_idx, kv_idx):
        return torch.where((q_idx - kv_idx < window) & (kv_idx <= q_idx), score, -float("inf"))

    return score_mod


def _decay(B, Hq, N, Q, device):
    """Elementwise functions of the distance, and of the head, with casts."""

    def score_mod(score, b, h, q_idx, kv_idx):
        distance = (q_idx - kv_idx).abs().to(torch.float32)
        return score * torch.sigmoid(score) - torch.log1p(distance) * torch.exp2(-(h % 8).float())

    return score_mod


def _alibi(B, Hq, N, Q, device):
    return mods.alibi(Hq, device=device)


def _combined_score(B, Hq, N, Q, device):
    return mods.compose(mods.softcap(5.0), _alibi(B, Hq, N, Q, device), _bias(B, Hq, N, Q, device))


def _combined_mask(B, Hq, N, Q, device):
    window = mods.or_masks(mods.sliding_window(max(1, N // 4)), _key_padding(B, Hq, N, Q, device))
    return mods.and_masks(mods.causal(), window, mods.not_mask(mods.dilated(2, 3)))


MODS = [
    Mods("none", _nothing, _nothing),
    Mods("causal", _nothing, lambda *_: mods.causal()),
    Mods("window", _nothing, lambda B, Hq, N, Q, device: mods.sliding_window(max(1, N // 3))),
    Mods("no_window", _nothing, lambda *_: mods.sliding_window(sys.maxsize)),
    Mods("streaming", _nothing, lambda B, Hq, N, Q, device: mods.streaming(3, max(1, N // 4))),
    Mods("prefix_lm", _nothing, _prefix_lm),
    Mods("chunked", _nothing, lambda B, Hq, N, Q, device: mods.chunked(max(1, N // 3))),
    Mods("dilated", _nothing, lambda *_: mods.dilated(5, 3)),
    Mods("document", _nothing, _document),
    Mods("document_offsets", _nothing, _document_offsets),
    Mods("document_start", _nothing, _document_start),
    Mods("tree", _nothing, _tree),
    Mods("key_padding", _nothing, _key_padding),
    Mods("head_window", _nothing, _head_window),
    Mods("neighborhood", _nothing, _neighborhood),
    Mods("block_diffusion", _nothing, _block_diffusion),
    Mods("no_key", _nothing, _no_key),
    Mods("alibi", _alibi, _nothing),
    Mods("softcap", lambda *_: mods.softcap(2.0), _nothing),
    Mods("relative_bias", _relative_bias, _nothing),
    Mods("t5", _t5, _nothing),
    Mods("bias", _bias, _nothing),
    Mods("chained_half_bias", _chained_half_bias, _nothing),
    Mods("nested_gather", _nested_gather, _nothing),
    Mods("masking_score", _masking_score, _nothing),
    Mods("decay", _decay, _nothing),
    Mods("combined", _combined_score, _combined_mask),
]
