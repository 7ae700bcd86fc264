"""Every ready mod against its definition in plain Python, position by position."""

import functools
import math
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.attention import flex_attention as flex

from flexdecode import mods
from flexdecode.reference import evaluate_mod

B, H, N = 2, 3, 13


def grid(q_start=0, num_q=N, num_kv=N):
    return torch.arange(B), torch.arange(H), q_start + torch.arange(num_q), torch.arange(num_kv)


def check_mask(mask_mod, definition, positions=None):
    """Compares a mask_mod with `definition(b, h, q, k)` on Python numbers."""
    positions = grid() if positions is None else positions
    actual = evaluate_mod(mask_mod, positions).tolist()
    axes = [axis.tolist() for axis in positions]
    expected = [[[[bool(definition(b, h, q, k)) for k in axes[3]] for q in axes[2]] for h in axes[1]] for b in axes[0]]
    assert actual == expected


def check_score(score_mod, definition, positions=None):
    """Compares a score_mod with `definition(score, b, h, q, k)` on Python numbers, at random scores."""
    positions = grid() if positions is None else positions
    score = 4 * torch.randn([len(axis) for axis in positions], dtype=torch.float64)
    actual = evaluate_mod(score_mod, positions, score)
    b, h, q, k = torch.meshgrid(*positions, indexing="ij")
    numbers = zip(*(x.flatten().tolist() for x in (score, b, h, q, k)), strict=True)
    expected = torch.tensor([definition(*n) for n in numbers], dtype=torch.float64).reshape(score.shape)
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-12)


def test_public_names():
    assert mods.__all__ == [
        "alibi",
        "alibi_slopes",
        "and_masks",
        "causal",
        "chunked",
        "compose",
        "dilated",
        "document",
        "document_offsets",
        "not_mask",
        "or_masks",
        "prefix_lm",
        "relative_bias",
        "sliding_window",
        "softcap",
        "streaming",
        "t5_bias",
        "tree",
    ]
    assert all(callable(getattr(mods, name)) for name in mods.__all__)


# --- Masks ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("q_start", [-3, 0, 4])
def test_causal(q_start):
    check_mask(mods.causal(), lambda b, h, q, k: k <= q, grid(q_start))


@pytest.mark.parametrize("window", [1, 2, 5, 100, sys.maxsize])
@pytest.mark.parametrize("q_start", [-3, 0, 4])
def test_sliding_window(window, q_start):
    check_mask(mods.sliding_window(window), lambda b, h, q, k: q - window < k <= q, grid(q_start))


@pytest.mark.parametrize("sink, window", [(0, 1), (1, 3), (4, 2), (20, 1), (2, sys.maxsize), (sys.maxsize, 1)])
@pytest.mark.parametrize("q_start", [-3, 0, 4])
def test_streaming(sink, window, q_start):
    check_mask(mods.streaming(sink, window), lambda b, h, q, k: k <= q and (k < sink or q - k < window), grid(q_start))


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_prefix_lm(dtype):
    check_mask(mods.prefix_lm(4), lambda b, h, q, k: k < 4 or k <= q)
    lens = [0, 7]
    check_mask(mods.prefix_lm(torch.tensor(lens, dtype=dtype)), lambda b, h, q, k: k < lens[b] or k <= q)


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 50, sys.maxsize])
@pytest.mark.parametrize("q_start", [-3, 0, 4])
def test_chunked(chunk_size, q_start):
    check_mask(
        mods.chunked(chunk_size), lambda b, h, q, k: k <= q and q // chunk_size == k // chunk_size, grid(q_start)
    )


@pytest.mark.parametrize("window, dilation", [(1, 1), (3, 1), (2, 3), (5, 2), (100, 4), (2**40, 2**40)])
def test_dilated(window, dilation):
    visible = {i * dilation for i in range(min(window, 100))}
    check_mask(mods.dilated(window, dilation), lambda b, h, q, k: q - k in visible)


def test_dilated_by_one_is_a_sliding_window():
    expected = evaluate_mod(mods.sliding_window(4), grid())
    assert torch.equal(evaluate_mod(mods.dilated(4, 1), grid()), expected)


DOCUMENTS = [[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2, 2], [5, 5, 5, 3, 3, 3, 3, 3, 3, 4, 4, 5, 5]]


def test_document():
    ids = torch.tensor(DOCUMENTS, dtype=torch.int32)
    check_mask(mods.document(ids), lambda b, h, q, k: DOCUMENTS[b][q] == DOCUMENTS[b][k])
    check_mask(mods.document(ids[0]), lambda b, h, q, k: DOCUMENTS[0][q] == DOCUMENTS[0][k])


def test_document_offsets():
    starts = [[0, 0, 0, 0, 4, 4, 4, 7, 7, 7, 7, 7, 7], [0, 0, 0, 3, 3, 3, 3, 3, 3, 9, 9, 11, 11]]
    check_mask(mods.document_offsets(torch.tensor(starts)), lambda b, h, q, k: starts[b][q] <= k <= q)
    # Of one packed row with cumulative lengths, as the docstring says.
    offsets = torch.tensor([0, 4, 7, 13])
    table = torch.repeat_interleave(offsets[:-1], offsets.diff()).expand(B, -1)
    assert table.tolist() == [starts[0]] * B
    same_document = mods.and_masks(mods.causal(), mods.document(torch.tensor(DOCUMENTS[0])))
    expected = evaluate_mod(same_document, grid())
    assert torch.equal(evaluate_mod(mods.document_offsets(table), grid()), expected)
    # While decoding only the start of the current document is known, and enough.
    current = [7, 11]
    check_mask(mods.document_offsets(torch.tensor(current)), lambda b, h, q, k: current[b] <= k <= q, grid(12, 1))


@pytest.mark.parametrize("prefix", [0, 6, [3, 8]])
@pytest.mark.parametrize("batched", [False, True])
def test_tree(prefix, batched):
    T = 4
    ancestors = torch.eye(T, dtype=torch.bool).repeat(B, 1, 1)
    ancestors[0, 2, 0] = ancestors[0, 3, 0] = ancestors[0, 3, 2] = True
    ancestors[1, 1, 0] = ancestors[1, 2, 1] = ancestors[1, 2, 0] = ancestors[1, 3, 0] = True
    ancestors = ancestors if batched else ancestors[0]
    mask_mod = mods.tree(ancestors, torch.tensor(prefix) if isinstance(prefix, list) else prefix)
    for b in range(B):
        start = prefix[b] if isinstance(prefix, list) else prefix
        rows = (ancestors[b] if batched else ancestors).tolist()
        positions = torch.tensor([b]), torch.arange(H), start + torch.arange(T), torch.arange(N)
        check_mask(
            mask_mod,
            lambda b, h, q, k: k < start or (k < start + T and rows[q - start][k - start]),
            positions,
        )


# --- Scores -----------------------------------------------------------------------------------------------------------


def test_alibi():
    check_score(mods.alibi(H), lambda s, b, h, q, k: s - mods.alibi_slopes(H)[h].item() * (q - k))
    slopes = torch.tensor([0.1, 0.0, -2.0], dtype=torch.bfloat16)
    check_score(mods.alibi(slopes), lambda s, b, h, q, k: s - slopes[h].item() * (q - k), grid(-2))


@pytest.mark.parametrize(
    "num_heads, exponents",
    [
        (1, [-8]),
        (2, [-4, -8]),
        (8, [-1, -2, -3, -4, -5, -6, -7, -8]),
        (16, [-0.5 * i for i in range(1, 17)]),
        (3, [-4, -8, -2]),
        (6, [-2, -4, -6, -8, -1, -3]),
        (12, [-1, -2, -3, -4, -5, -6, -7, -8, -0.5, -1.5, -2.5, -3.5]),
    ],
)
def test_standard_slopes(num_heads, exponents):
    slopes = mods.alibi_slopes(num_heads)
    assert slopes.dtype == torch.float32
    torch.testing.assert_close(slopes, torch.tensor([2.0**e for e in exponents]))


@given(st.integers(1, 200))
def test_standard_slopes_follow_the_published_recursion(num_heads):
    def published(n):
        if math.log2(n).is_integer():
            start = 2.0 ** -(2.0 ** -(math.log2(n) - 3))
            return [start * start**i for i in range(n)]
        lower = 2 ** math.floor(math.log2(n))
        return published(lower) + published(2 * lower)[0::2][: n - lower]

    torch.testing.assert_close(mods.alibi_slopes(num_heads), torch.tensor(published(num_heads)))


@pytest.mark.parametrize("cap", [0.5, 20, 50.0])
def test_softcap(cap):
    check_score(mods.softcap(cap), lambda s, b, h, q, k: cap * math.tanh(s / cap))


@pytest.mark.parametrize("max_distance", [0, 1, 4, 30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_relative_bias(max_distance, dtype):
    bias = torch.randn(H, 2 * max_distance + 1).to(dtype)
    rows = bias.tolist()

    def definition(score, b, h, q, k):
        return score + rows[h][max(-max_distance, min(k - q, max_distance)) + max_distance]

    check_score(mods.relative_bias(bias), definition, grid(-2))


def t5_bucket(distance, num_buckets, max_distance, bidirectional):
    """T5's bucket of `distance = kv_idx - q_idx`, in exact integer arithmetic."""
    first = 0
    if bidirectional:
        num_buckets //= 2
        first = num_buckets if distance > 0 else 0
        near = abs(distance)
    else:
        near = max(-distance, 0)
    exact = num_buckets // 2
    if near < exact:
        return first + near
    # floor(log(near / exact) / log(max_distance / exact) * steps) counts the powers that `near` has reached.
    steps = num_buckets - exact
    reached = [i for i in range(steps) if near**steps * exact**i >= max_distance**i * exact**steps]
    return first + exact + max(reached)


@pytest.mark.parametrize("bidirectional", [False, True])
@pytest.mark.parametrize("num_buckets, max_distance", [(32, 128), (8, 20), (4, 3), (16, 64)])
def test_t5_bias(num_buckets, max_distance, bidirectional):
    table = torch.randn(num_buckets, H)
    rows = table.tolist()

    def definition(score, b, h, q, k):
        return score + rows[t5_bucket(k - q, num_buckets, max_distance, bidirectional)][h]

    positions = torch.arange(1), torch.arange(H), torch.tensor([0, 75, 149, 10**6]), torch.arange(150)
    check_score(mods.t5_bias(table, max_distance, bidirectional), definition, positions)


def test_t5_buckets_are_the_published_ones():
    table = torch.arange(32.0)[:, None]
    score_mod = mods.t5_bias(table)
    positions = (
        torch.arange(1),
        torch.arange(1),
        torch.tensor([200]),
        torch.tensor([200, 185, 184, 150, 100, 72, 0, 199]),
    )
    buckets = evaluate_mod(score_mod, positions, torch.zeros(1, 1, 1, 8))
    assert buckets.flatten().tolist() == [0, 15, 16, 24, 30, 31, 31, 1]


def test_tables_are_read_when_the_mod_is_called():
    table, bias, slopes = torch.zeros(8, H), torch.zeros(H, 5), torch.zeros(H)
    for tensor, score_mod in (
        (table, mods.t5_bias(table)),
        (bias, mods.relative_bias(bias)),
        (slopes, mods.alibi(slopes)),
    ):
        tensor += 1.0
        assert (evaluate_mod(score_mod, grid(20, 2), torch.zeros(B, H, 2, N)) != 0).all()


# --- Combinations -----------------------------------------------------------------------------------------------------


def test_combined_masks():
    causal, odd, everything = mods.causal(), (lambda b, h, q, k: k % 2 == 1), (lambda b, h, q, k: True)
    check_mask(mods.and_masks(causal, odd), lambda b, h, q, k: k <= q and k % 2 == 1)
    check_mask(mods.or_masks(causal, odd), lambda b, h, q, k: k <= q or k % 2 == 1)
    check_mask(mods.not_mask(odd), lambda b, h, q, k: k % 2 == 0)
    check_mask(mods.and_masks(causal), lambda b, h, q, k: k <= q)
    check_mask(mods.and_masks(everything, causal, everything), lambda b, h, q, k: k <= q)
    check_mask(
        mods.or_masks(causal, mods.not_mask(mods.or_masks(causal, odd))), lambda b, h, q, k: k <= q or k % 2 == 0
    )


def test_no_masks_and_constant_masks():
    everything, nothing = (lambda b, h, q, k: True), (lambda b, h, q, k: False)
    for mask_mod in (mods.and_masks(), mods.or_masks(nothing, everything), mods.not_mask(nothing), everything):
        check_mask(mask_mod, lambda b, h, q, k: True)
    for mask_mod in (mods.or_masks(), mods.and_masks(nothing, everything), mods.not_mask(everything), nothing):
        check_mask(mask_mod, lambda b, h, q, k: False)


def test_compose_applies_from_left_to_right():
    double, cap = (lambda s, b, h, q, k: 2 * s), mods.softcap(3.0)
    check_score(mods.compose(double, cap), lambda s, b, h, q, k: 3 * math.tanh(2 * s / 3))
    check_score(mods.compose(cap, double), lambda s, b, h, q, k: 6 * math.tanh(s / 3))
    check_score(mods.compose(), lambda s, b, h, q, k: s)


def test_mods_work_with_pytorchs_create_mask():
    mask_mod = mods.and_masks(mods.causal(), mods.document(torch.tensor(DOCUMENTS)), mods.not_mask(mods.dilated(2, 3)))
    expected = evaluate_mod(mask_mod, grid())
    assert torch.equal(flex.create_mask(mask_mod, B, H, N, N, device="cpu"), expected)


# --- Names and arguments ----------------------------------------------------------------------------------------------


def test_mods_have_names():
    ids = torch.zeros(N, dtype=torch.int64)
    named = {
        "causal": mods.causal(),
        "sliding_window_8": mods.sliding_window(8),
        "streaming_4_8": mods.streaming(4, 8),
        "prefix_lm": mods.prefix_lm(3),
        "chunked_8": mods.chunked(8),
        "dilated_4_2": mods.dilated(4, 2),
        "document": mods.document(ids),
        "document_offsets": mods.document_offsets(ids),
        "tree": mods.tree(torch.eye(2, dtype=torch.bool), 5),
        "alibi": mods.alibi(4),
        "softcap_50": mods.softcap(50.0),
        "relative_bias": mods.relative_bias(torch.zeros(4, 3)),
        "t5_bias": mods.t5_bias(torch.zeros(32, 4)),
        "and(causal, or(chunked_8, not(document)))": mods.and_masks(
            mods.causal(), mods.or_masks(mods.chunked(8), mods.not_mask(mods.document(ids)))
        ),
        "compose(alibi, softcap_0.5, partial)": mods.compose(
            mods.alibi(4), mods.softcap(0.5), functools.partial(lambda s, *_: s)
        ),
    }
    for name, mod in named.items():
        assert mod.__name__ == name


@pytest.mark.parametrize(
    "make, error, message",
    [
        (lambda: mods.sliding_window(0), ValueError, "`window` must be from 1 to sys.maxsize, got 0"),
        (
            lambda: mods.sliding_window(2**63),
            ValueError,
            "`window` must be from 1 to sys.maxsize, got 9223372036854775808",
        ),
        (lambda: mods.sliding_window(4.0), TypeError, "`window` must be an integer, got float"),
        (lambda: mods.sliding_window(True), TypeError, "`window` must be an integer, got bool"),
        (lambda: mods.sliding_window(torch.tensor(4)), TypeError, "`window` must be an integer, got Tensor"),
        (lambda: mods.streaming(-1, 4), ValueError, "`sink` must be from 0 to sys.maxsize, got -1"),
        (lambda: mods.streaming(1, 0), ValueError, "`window` must be from 1 to sys.maxsize, got 0"),
        (lambda: mods.chunked(0), ValueError, "`chunk_size` must be from 1 to sys.maxsize, got 0"),
        (lambda: mods.dilated(1, 0), ValueError, "`dilation` must be from 1 to sys.maxsize, got 0"),
        (lambda: mods.prefix_lm("3"), TypeError, "`prefix_lens` must be an integer, got str"),
        (
            lambda: mods.prefix_lm(torch.ones(2)),
            TypeError,
            "`prefix_lens` must be an integer tensor, got torch.float32",
        ),
        (lambda: mods.prefix_lm(torch.ones(2, 2).int()), ValueError, "`prefix_lens` must have shape [B], got [2, 2]"),
        (lambda: mods.document([0, 1]), TypeError, "`document_ids` must be a tensor [N] or [B, N], got list"),
        (
            lambda: mods.document(torch.zeros(1, 1, 1).int()),
            ValueError,
            "`document_ids` must have shape [N] or [B, N], got [1, 1, 1]",
        ),
        (
            lambda: mods.document(torch.ones(3).bool()),
            TypeError,
            "`document_ids` must be an integer tensor, got torch.bool",
        ),
        (lambda: mods.document_offsets(4), TypeError, "`starts` must be a tensor [B] or [B, N], got int"),
        (lambda: mods.tree(torch.eye(3), 0), TypeError, "`ancestors` must be a bool tensor, got torch.float32"),
        (
            lambda: mods.tree(torch.ones(2, 3).bool(), 0),
            ValueError,
            "`ancestors` must have as many rows as columns, got [2, 3]",
        ),
        (
            lambda: mods.tree(torch.ones(2).bool(), 0),
            ValueError,
            "`ancestors` must have shape [T, T] or [B, T, T], got [2]",
        ),
        (lambda: mods.alibi(0), ValueError, "`num_heads` must be from 1 to sys.maxsize, got 0"),
        (lambda: mods.alibi([0.5]), TypeError, "`slopes` must be a tensor [Hq] or the number of query heads, got list"),
        (lambda: mods.alibi(torch.ones(2, 2)), ValueError, "`slopes` must have shape [Hq], got [2, 2]"),
        (lambda: mods.alibi(torch.ones(2).int()), TypeError, "`slopes` must be a floating tensor, got torch.int32"),
        (
            lambda: mods.alibi(torch.ones(2), device="cpu"),
            ValueError,
            "`device` goes with a number of heads; a `slopes` tensor has its own",
        ),
        (lambda: mods.softcap(0), ValueError, "`cap` must be finite and above 0, got 0.0"),
        (lambda: mods.softcap(math.inf), ValueError, "`cap` must be finite and above 0, got inf"),
        (lambda: mods.softcap(math.nan), ValueError, "`cap` must be finite and above 0, got nan"),
        (lambda: mods.softcap("50"), TypeError, "`cap` must be a number, got str"),
        (
            lambda: mods.relative_bias(torch.zeros(4, 6)),
            ValueError,
            "`bias` must have an odd number of columns, 2 * max_distance + 1, got [4, 6]",
        ),
        (lambda: mods.t5_bias(torch.zeros(1, 4)), ValueError, "`table` must have at least 2 rows, got [1, 4]"),
        (
            lambda: mods.t5_bias(torch.zeros(7, 4), bidirectional=True),
            ValueError,
            "`table` must have at least 4 rows and an even number of them, got [7, 4]",
        ),
        (
            lambda: mods.t5_bias(torch.zeros(32, 4), max_distance=16),
            ValueError,
            "`max_distance` must be above 16 with 32 buckets, got 16",
        ),
        (lambda: mods.and_masks(mods.causal(), True), TypeError, "and_masks takes functions, got bool"),
        (lambda: mods.or_masks([]), TypeError, "or_masks takes functions, got list"),
        (lambda: mods.not_mask(None), TypeError, "not_mask takes functions, got NoneType"),
        (lambda: mods.compose(None), TypeError, "compose takes functions, got NoneType"),
    ],
)
def test_bad_arguments(make, error, message):
    with pytest.raises(error) as raised:
        make()
    assert str(raised.value) == message
