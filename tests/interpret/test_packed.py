"""Packed queries through the generated kernels: every cache, mod and schedule, and the grids of others."""

import itertools

import packed_cases as cases
import pytest
import torch
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, KVCache, cache_info, clear_cache, flex_decode, mods

SCHEDULES = {
    "default": DecodeOptions(backend="triton"),
    "splits": DecodeOptions(backend="triton", num_splits=3, block_n=16),
    "balanced": DecodeOptions(backend="triton", schedule="balanced", num_splits=5, block_n=16),
    "invariant": DecodeOptions(backend="triton", batch_invariant=True),
}
TURNS = list(zip(cases.GRID[::2], itertools.cycle(SCHEDULES), strict=False))
STEPS = {
    cases.check_pytorch_varlen: 4,
    cases.check_flash_varlen: 11,
    cases.check_flash_kvcache: 13,
    cases.check_unified: 9,
    cases.check_chunked_prefill: 5,
    cases.check_cascade: 5,
}
PEER_TURNS = list(zip(cases.peer_cases(STEPS), itertools.cycle(SCHEDULES), strict=False))
SMALL = {"Hq": 4, "Hkv": 2, "D": 16}


@pytest.mark.parametrize(("case", "schedule"), TURNS, ids=[f"{case.name}-{name}" for case, name in TURNS])
def test_grid(case, schedule):
    cases.check_case(case, options=SCHEDULES[schedule])


@pytest.mark.parametrize(("case", "schedule"), PEER_TURNS, ids=str)
def test_peers(case, schedule):
    case.check(*case.arguments, options=SCHEDULES[schedule])


@pytest.mark.parametrize("kind", ["contiguous", "paged", "latent", "keys"])
def test_dead_keys(kind):
    for mask, name in zip(cases.DEAD_MASKS, SCHEDULES, strict=True):
        cases.check_dead_keys(mask, kind, options=SCHEDULES[name])


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_properties(schedule):
    """`out`, the hint, totals outside the rows, other splits of the same tensors, and the padded form."""
    options = SCHEDULES[schedule]
    cases.check_out(options=options)
    cases.check_hint(options=options)
    cases.check_packed_is_padded("paged", options=options)
    cases.check_other_splits(
        lambda call: flex_decode(call.query, mask_mod=mods.causal(), return_lse=True, options=options, **call.arguments)
    )


def test_other_numbers_of_tokens_need_no_other_kernel():
    """Short and long sequences in one call, all in small tiles, and one token each: four kernels for any split."""
    clear_cache()
    shapes = [
        ((1, 1, 1), None),
        ((1, 2, 0), 2),
        ((1, 40, 3), None),
        ((9, 1, 70), 70),
        ((1, 1, 1), 1),
        ((3, 2, 35), None),
    ]
    for q_lens, hint in shapes:
        call = cases.draw(q_lens, (9, 70, 33), **SMALL, after=sum(q_lens) % 5)
        cases.check(call, None, mods.causal(), options=SCHEDULES["default"], max_q_len=hint)
    known = cache_info()
    for q_lens, hint in shapes:
        call = cases.draw([q + 1 for q in q_lens], (9, 70, 33), **SMALL, after=3)
        cases.check(call, None, mods.causal(), options=SCHEDULES["default"], max_q_len=hint and hint + 1)
    assert cache_info().compilations == known.compilations <= 4 and cache_info().traces == known.traces


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_lists_of_blocks(schedule):
    """A BlockMask of documents that is made as for training, also over a cache object."""
    B, N, options = 3, 96, SCHEDULES[schedule]
    document = torch.arange(N).repeat(B, 1) // torch.tensor([[7], [40], [96]])
    mask_mod = lambda b, h, q, k: (document[b, q] == document[b, k]) & (k <= q)
    lists = create_block_mask(mask_mod, B, None, N, N, device="cpu", BLOCK_SIZE=16)
    call = cases.draw((1, 20, 5), (96, 61, 40), **SMALL, dtype=torch.float32)
    more = {"return_lse": True, "options": options, **call.arguments}
    out, lse = flex_decode(call.query, block_mask=lists, **more)
    expected = flex_decode(call.query, mask_mod=mask_mod, **more)
    torch.testing.assert_close(out, expected[0]), torch.testing.assert_close(lse, expected[1])


def test_a_cache_object():
    call = cases.draw((1, 6, 0), (20, 9, 4), **SMALL)
    key, value = (call.arguments[name].nan_to_num(0.0) for name in ("key", "value"))
    cache = KVCache(batch=3, num_kv_heads=2, max_kv_len=32, head_dim=16, dtype=torch.float32)
    cache.append(key[:, :, :20], value[:, :, :20], [20, 9, 4])
    out = flex_decode(
        call.query, cache=cache, mask_mod=mods.causal(), cu_seqlens_q=call.arguments["cu_seqlens_q"],
        options=SCHEDULES["default"],
    )  # fmt: skip
    expected = flex_decode(call.query, mask_mod=mods.causal(), options=SCHEDULES["default"], **call.arguments)
    torch.testing.assert_close(out, expected)
