"""Captured tables of all float8 numbers, for all tiers."""

import torch

FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def finite_numbers(dtype, device="cpu"):
    """All finite numbers of a type [n], and as many tables [2, n] of two of them for a key."""
    bits = torch.arange(256, dtype=torch.uint8)
    numbers = bits[bits.view(dtype).float().isfinite()].view(dtype)
    return numbers.to(device)


def as_scores(table):
    """A score_mod whose score is the number of the key."""
    return lambda score, b, h, q_idx, kv_idx: score * 0.0 + table[kv_idx] * 0.001


def of_scalars(table):
    """The same numbers, read once per row."""
    return lambda score, b, h, q_idx, kv_idx: score + table[h + 60] * (kv_idx % 3) + table[-1 - q_idx % 50]
