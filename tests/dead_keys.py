"""Keys that no row attends to, as servers leave them: NaN in keys, values and scales, and pages that are gone.

For all tiers. The masks are solved exactly, for one query token and for several: every key that no row attends to lies
outside the intervals, so that a kernel must not read it.
"""

import torch
from cache_cases import QUANTISED, Pages, fill_with_nan, quantise
from support import make_inputs

from flexdecode import mods
from flexdecode.reference import evaluate_mod

B, HQ, HKV, N, D = 3, 4, 2, 200, 16
KV_LENS = (200, 141, 33)
STARTS = torch.tensor([0, 3, 60, 130])

MASKS = {
    "window": mods.sliding_window(20),
    "narrow_window": mods.sliding_window(1),
    "sinks_and_window": mods.streaming(4, 20),
    "two_intervals_in_one_block": lambda b, h, q, k: (k < 3) | ((k > 7) & (k < 12)),
    "three_intervals": lambda b, h, q, k: (k < 2) | ((k > 20) & (k < 31)) | ((k > q - 7) & (k <= q)),
    "chunks": mods.chunked(64),
    "documents": None,  # captures a tensor: `mask_of` makes it for a device
    "the_past": lambda b, h, q, k: k < q - 9,
    "a_window_for_each_sequence": lambda b, h, q, k: (k <= q) & (q - k < 5 + 30 * b),
    "nothing": lambda b, h, q, k: k > q,
}
CACHES = ["contiguous", "pages of 1", "pages of 4", "pages of 16", "pages of 64", "latents", *QUANTISED]


def mask_of(name, device="cpu"):
    """The mask_mod of a name in `MASKS`."""
    if name == "documents":
        return mods.and_masks(mods.document_offsets(STARTS.expand(B, -1).contiguous().to(device)), mods.causal())
    return MASKS[name]


def dead_keys(mask_mod, lens, num_queries, max_kv_len):
    """Which keys no row attends to, bool [B, Hkv, max_kv_len]."""
    dead = torch.ones(len(lens), HKV, max_kv_len, dtype=torch.bool)
    for b, length in enumerate(lens):
        grid = (
            torch.tensor([b]),
            torch.arange(HQ),
            length - num_queries + torch.arange(num_queries),
            torch.arange(length),
        )
        live = evaluate_mod(mask_mod, grid)[0].reshape(HKV, -1, length).any(1)
        dead[b, :, :length] = ~live
    return dead


def make_call(mask, cache, num_queries=1, dtype=torch.float32, device="cpu", head_dim=D):
    """The arguments of a call whose dead keys hold numbers, and those of the same call whose dead keys hold NaN.

    Returns:
        Two dicts: query, key, value, mask_mod, kv_lens and what the cache needs.
    """
    if cache == "latents":
        head_dim, v_head_dim = 160, 128
    query, key, value = make_inputs(B, HQ, HKV, num_queries, N, head_dim, dtype=dtype)
    dead = dead_keys(mask_of(mask), KV_LENS, num_queries, N)
    call = {"mask_mod": mask_of(mask, device), "kv_lens": torch.tensor(KV_LENS)}
    if cache in QUANTISED:
        (key, k_scale), (value, v_scale) = (quantise(x, QUANTISED[cache], "tokens") for x in (key, value))
        call |= {"k_scale": k_scale, "v_scale": v_scale}
    if cache == "latents":
        value = key[..., :v_head_dim]
    clean = {"query": query, "key": key, "value": value, **call}
    spoiled = dict(clean)
    for name in ("key", "value", "k_scale", "v_scale"):
        if name in clean and not (cache == "latents" and name == "value"):
            spoiled[name] = clean[name].clone()
            rows = spoiled[name].view(torch.uint8) if clean[name].element_size() == 1 else spoiled[name]
            rows[dead] = 0x7F if clean[name].element_size() == 1 else torch.nan
    if cache == "latents":
        spoiled["value"] = spoiled["key"][..., :v_head_dim]
    if cache.startswith("pages"):
        clean, spoiled = (_in_pages(some, dead, int(cache.split()[-1])) for some in (clean, spoiled))
    return tuple(
        {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in some.items()}
        for some in (clean, spoiled)
    )


def _in_pages(call, dead, page_size):
    """The call with its caches in pages. A page without a live key of any head is not in the pool: its entry is -1."""
    max_pages = -(-N // page_size)
    gone = torch.nn.functional.pad(dead.all(1), (0, max_pages * page_size - N), value=True)
    gone = gone.unflatten(1, (max_pages, page_size)).all(2)
    table = torch.full((B, max_pages), -1, dtype=torch.int32)
    table[~gone] = torch.randperm(int((~gone).sum()), generator=torch.Generator().manual_seed(0)).to(torch.int32)
    table[gone] = torch.tensor([-1, 1 << 30, -(1 << 31)], dtype=torch.int32).repeat(gone.sum())[: gone.sum()]
    paged = dict(call, page_table=table)
    for name in ("key", "value"):
        rows = torch.nn.functional.pad(call[name], (0, 0, 0, max_pages * page_size - N))
        pages = rows.unflatten(2, (max_pages, page_size)).transpose(1, 2)  # [B, max_pages, Hkv, page_size, D]
        pool = fill_with_nan(torch.empty(max(1, int((~gone).sum())), *pages.shape[2:], dtype=rows.dtype))
        pool[table[~gone].long()] = pages[~gone]
        paged[name] = pool
    return paged


def make_masked_by_score(page_size, num_queries=1, device="cpu", dtype=torch.float32):
    """A call whose score_mod ends its window by -inf, over pages; page 0 is of no sequence and holds NaN.

    The keys outside of the window are numbers: a kernel may read them, but no other page in their place.
    """
    query, key, value = make_inputs(B, HQ, HKV, num_queries, N, D, dtype=dtype)
    pages = Pages(KV_LENS, page_size)
    caches = []
    for cache in (key, value):
        placed = pages.place(cache)
        caches.append(torch.cat([torch.full_like(placed[:1], torch.nan), placed]).to(device))
    call = {"query": query.to(device), "key": caches[0], "value": caches[1], "kv_lens": torch.tensor(KV_LENS)}
    call["page_table"] = pages.table.where(pages.table < 0, pages.table + 1)
    return {name: x.to(device) for name, x in call.items()}


def window_by_score(score, b, h, q_idx, kv_idx):
    return torch.where((q_idx - kv_idx < 20) & (kv_idx <= q_idx), score, -float("inf"))


def two_windows_by_score(score, b, h, q_idx, kv_idx):
    return torch.where((q_idx - kv_idx < 20) | (kv_idx < 3), score, -float("inf"))
