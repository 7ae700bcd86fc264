"""Attention of your own, in one decode step. Change `score_mod` and `mask_mod`, and run this file again."""

import torch

import flexdecode
from flexdecode.reference import reference_decode

device = "cuda" if torch.cuda.is_available() else "cpu"
B, Hq, Hkv, N, D = 4, 16, 2, 4096, 64  # sequences, query heads, KV heads, room in the cache, head dimension
query = torch.randn(B, Hq, 1, D, device=device)  # one new token for each sequence
key, value = torch.randn(2, B, Hkv, N, D, device=device)  # the cache
kv_lens = torch.tensor([4096, 3000, 1500, 200], device=device)  # tokens in it

slopes = torch.exp2(-torch.arange(1, Hq + 1, device=device) / 2)  # one for each head
window, first = 1024, 4


def score_mod(score, b, h, q_idx, kv_idx):
    """Falls with the distance (ALiBi), and never leaves -20 to 20 (a soft cap)."""
    return 20 * torch.tanh((score - slopes[h] * (q_idx - kv_idx)) / 20)


def mask_mod(b, h, q_idx, kv_idx):
    """The newest 1024 tokens, and the first 4."""
    return (kv_idx <= q_idx) & ((q_idx - kv_idx < window) | (kv_idx < first))


if __name__ == "__main__":
    out = flexdecode.flex_decode(query, key, value, score_mod, mask_mod, kv_lens=kv_lens)
    expected = reference_decode(query, key, value, score_mod, mask_mod, kv_lens=kv_lens)  # your functions at every pair
    error = float((out.cpu() - expected.cpu()).abs().max())
    print(f"Largest difference to the reference: {error:.1e}. {'Right.' if error < 1e-5 else 'WRONG.'}")
