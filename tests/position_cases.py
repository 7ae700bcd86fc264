"""Calls with `kv_starts` and `kv_offset`, for all tiers: frames of positions, masks and caches, crossed."""

import torch
from cache_cases import Pages, fill_with_nan
from support import make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import mods

B, HQ, HKV, N, D = 4, 4, 2, 96, 16
LENS = [90, 33, 96, 40]
Q_LENS = [3, 1, 0, 2]
# Inside a block, at the start of one, at an end, past it; negative counts as 0.
STARTS = {"padded": [7, 32, 41, 45], "number": 20, "none": None, "negative": [-3, 0, 16, -(2**30)]}
# From the first live slot; dropped slots, by whole blocks of 16 or others; the ends of what is allowed.
OFFSETS = {
    "from_start": [-7, -32, -41, -45], "dropped": [100, 16, 33, 0], "blocks": 64, "number": -13, "none": None,
    "ends": [2**30, -(2**30), 0, 1],
}  # fmt: skip
FIRSTS = {"newest": None, "given": [60, 25, 30, -4], "number": 70}


def frames():
    """Pairs of names of STARTS and OFFSETS, with at least one of the two arguments."""
    return [(s, o) for s in STARTS for o in OFFSETS if (s, o) != ("none", "none")]


def bias(length=70, device="cpu"):
    """A score_mod that reads a table by position; some positions are outside, also before it."""
    table = torch.randn(length, generator=torch.Generator().manual_seed(3)).to(device)
    return lambda score, b, h, q, k: score + table[(k - 3).clamp(min=0)] + 0.02 * (q - k)


def squares(b, h, q, k):
    """Dead, partial and full blocks of 24 positions."""
    return ((k // 24 + q // 24 + h) % 3 == 0) | ((k // 24 % 3 == 1) & (k % 5 != 2))


MASKS = {
    "all": None,
    "causal": mods.causal(),
    "window": mods.sliding_window(20),
    "streaming": mods.streaming(5, 18),
    "not_negative": lambda b, h, q, k: k >= 0,
    "between": lambda b, h, q, k: ((k >= -20) & (k < 6)) | ((k >= 30) & (k < 130)),
    "far": lambda b, h, q, k: (k < -(2**30) + 40) | (k > 2**30 - 9) | ((k > 0) & (k < 50)),
    "bits": lambda b, h, q, k: ((k >> 4) + (k & 7)) % 3 != 0,
    "squares": squares,
}  # fmt: skip


def per_sequence(given, dtype=torch.int32, device="cpu"):
    return torch.tensor(given, dtype=dtype, device=device) if isinstance(given, list) else given


def positions(starts, offset, first="newest", dtype=torch.int32, device="cpu"):
    """The arguments of a frame, by names."""
    given = {"kv_starts": STARTS[starts], "kv_offset": OFFSETS[offset], "q_offset": FIRSTS[first]}
    return {name: per_sequence(x, dtype, device) for name, x in given.items() if x is not None}


def spoil_before(tensor, starts):
    """Overwrites the rows before `starts` of `[B, Hkv, N, ...]` with NaN, in place."""
    for row, start in zip(tensor, starts if isinstance(starts, list) else [starts or 0] * len(tensor), strict=True):
        fill_with_nan(row[:, : max(start, 0)])
    return tensor


def cache(starts, page_size=None, num_queries=1, ragged=False, width=D, dtype=torch.float32, device="cpu"):
    """Query, key and value with NaN in all dead slots, and the arguments of the cache.

    With pages, entries of pages without a live slot are -1 where they lie before the first one.
    """
    query, key, value = make_inputs(B, HQ, HKV, num_queries, N, width, dtype=dtype)
    for tensor in (key, value):
        spoil_before(tensor, STARTS[starts])
        for row, length in zip(tensor, LENS, strict=True):
            fill_with_nan(row[:, length:])
    arguments = {"kv_lens": torch.tensor(LENS)}
    if ragged:
        arguments["q_lens"] = torch.tensor(Q_LENS).clamp(max=num_queries)
    if page_size is not None:
        pages = Pages(LENS, page_size, N // page_size)
        key, value = pages.place(key), pages.place(value)
        first = STARTS[starts] if isinstance(STARTS[starts], list) else [STARTS[starts] or 0] * B
        for row, start in zip(pages.table, first, strict=True):
            row[: max(start, 0) // page_size] = -1
        arguments["page_table"] = pages.table
    moved = {name: x.to(device) for name, x in arguments.items()}
    return (query.to(device), key.to(device), value.to(device)), moved


def block_mask(mask_mod, size, length=200, device="cpu"):
    """A BlockMask for positions 0 to `length`, and the mask that it stands for."""
    made = create_block_mask(mask_mod, None, HQ, length, length, device=device, BLOCK_SIZE=size)
    return made, lambda b, h, q, k: (q >= 0) & (q < length) & (k >= 0) & (k < length) & mask_mod(b, h, q, k)
