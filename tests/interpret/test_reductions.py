"""Reductions, views and joins of captured tensors in the generated kernel."""

import pytest
import torch
from interpret.decoding import check_decode, decode
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode, mods
from flexdecode.frontend import reductions
from flexdecode.memos import forget_memos

GENERATOR = torch.Generator().manual_seed(0)
B, H, N, R = 2, 4, 48, 8
TILES = torch.randint(0, 3, (B, H, 3, 2), generator=GENERATOR)
Q_ROPE, K_ROPE = torch.randn(B, H, N, R, generator=GENERATOR), torch.randn(B, N, R, generator=GENERATOR)
SPANS = torch.tensor([[3, 20], [0, 40]])
OFFSETS = torch.tensor([0, 5, 5, 30, 41])
PLANES = torch.randn(H, 2, 24, generator=GENERATOR)


def video(b, h, q_idx, kv_idx):
    return (TILES[b, h, q_idx // 16] == (kv_idx // 16).unsqueeze(-1)).any(-1)


def rope(score, b, h, q_idx, kv_idx):
    return score + (Q_ROPE[b, h, q_idx] * K_ROPE[b, kv_idx]).sum(-1)


def dot(score, b, h, q_idx, kv_idx):
    return score + torch.dot(Q_ROPE[b, h, q_idx], K_ROPE[b, kv_idx])


def product(score, b, h, q_idx, kv_idx):
    return score + Q_ROPE[b, h, q_idx] @ K_ROPE[b, kv_idx]


def span(b, h, q_idx, kv_idx):
    low, high = SPANS[b]
    return (kv_idx >= low) & (kv_idx < high)


def extremes(score, b, h, q_idx, kv_idx):
    row = K_ROPE[b, kv_idx]
    return score + row.amax() * row.norm() - row.mean() + row.amin() * row[:2].prod()


def flat(score, b, h, q_idx, kv_idx):
    return score + PLANES.flatten(1)[h, kv_idx] + PLANES.view(H, 48)[h][q_idx]


def joined(score, b, h, q_idx, kv_idx):
    return (
        score * torch.stack([score, score * 0.5, torch.ones_like(score)]).sum() + torch.cat([K_ROPE[b, 0], SPANS[b]])[h]
    )


CASES = [
    (None, video), (None, mods.and_masks(video, mods.causal())), (rope, None), (dot, mods.causal()), (product, None),
    (None, span), (extremes, None), (flat, None), (joined, None),
]  # fmt: skip


@pytest.mark.parametrize("unrolled", [1, 8])
@pytest.mark.parametrize("backend", ["triton", "torch"])
@pytest.mark.parametrize(("score_mod", "mask_mod"), CASES)
def test_both_backends_give_the_reference(score_mod, mask_mod, backend, unrolled, monkeypatch):
    monkeypatch.setattr(reductions, "_UNROLLED", unrolled)
    forget_memos()
    inputs = make_inputs(B, H, 2, 2, N, 16)
    if backend == "triton":
        check_decode(*inputs, score_mod, mask_mod)
    else:
        out, lse = flex_decode(*inputs, score_mod, mask_mod, return_lse=True, options=DecodeOptions(backend="torch"))
        assert_close_to_reference(out, lse, *inputs, score_mod, mask_mod)


def searching(score, b, h, q_idx, kv_idx):
    """Which torch.vmap, and so the reference, does not have."""
    found = torch.searchsorted(OFFSETS, kv_idx, right=True) + torch.isin(kv_idx, OFFSETS)
    return score * found + K_ROPE[b, kv_idx].argmax() + torch.gather(PLANES[h], 1, OFFSETS.view(1, -1) // 2)[0, h]


def searched(score, b, h, q_idx, kv_idx):
    found = (kv_idx >= OFFSETS).sum() + (kv_idx == OFFSETS).any()
    largest = (K_ROPE[b, kv_idx] == K_ROPE[b, kv_idx].amax()) * torch.arange(R)
    return score * found + largest.sum() + PLANES[h, 0, OFFSETS[h] // 2]


def test_a_loop_inside_of_a_loop(monkeypatch):
    monkeypatch.setattr(reductions, "_UNROLLED", 1)
    weights = torch.randn(R, R, generator=GENERATOR)

    def score_mod(score, b, h, q_idx, kv_idx):
        projected = (weights * K_ROPE[b, kv_idx]).sum(-1)
        return score + (Q_ROPE[b, h, q_idx] * projected).sum() + projected.amax() * Q_ROPE[b, h, q_idx].mean()

    check_decode(*make_inputs(B, H, 2, 2, N, 16), score_mod)


def test_searches_give_what_comparisons_give():
    inputs = make_inputs(B, H, 2, 2, N, 16)
    out, lse = decode(*inputs, searching)
    expected, expected_lse = decode(*inputs, searched)
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(lse, expected_lse)
