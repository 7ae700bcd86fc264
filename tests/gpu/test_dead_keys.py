"""On a GPU: keys that no row attends to are not read, whatever loads them; scores may be as large as float32 holds."""

import pytest
import torch
from dead_keys import CACHES, KV_LENS, MASKS, N, dead_keys, make_call
from large_scores import INFINITE, SCORES, SINKS, assert_infinite_rows
from support import assert_close_to_reference, make_inputs

from flexdecode import DecodeOptions, flex_decode, merge_attention, mods

pytestmark = pytest.mark.gpu

SCHEDULES = {
    "one": DecodeOptions(num_splits=1), "split": DecodeOptions(num_splits=3),
    "balanced": DecodeOptions(schedule="balanced", num_splits=5), "default": None,
}  # fmt: skip


def check(call, options=None):
    out, lse = flex_decode(**call, return_lse=True, options=options)
    assert_close_to_reference(out, lse, **call)
    return out, lse


CASES = [
    (mask, cache, [*SCHEDULES][(i + j) % 4], (1, 3)[(i + j) % 2], (torch.float16, torch.bfloat16, torch.float32)[i % 3])
    for i, mask in enumerate(MASKS)
    for j, cache in enumerate(CACHES)
    if (i + j) % 3 == 0 or mask == "sinks_and_window"
]


@pytest.mark.parametrize(("mask", "cache", "schedule", "num_queries", "dtype"), CASES, ids=str)
def test_what_nobody_attends_to_does_not_matter(mask, cache, schedule, num_queries, dtype):
    clean, spoiled = make_call(mask, cache, num_queries, dtype, "cuda", head_dim=64)
    out, lse = check(spoiled, SCHEDULES[schedule])
    expected, expected_lse = flex_decode(**clean, return_lse=True, options=SCHEDULES[schedule])
    assert out.isfinite().all() and torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("mask", ["window", "sinks_and_window", "three_intervals", "nothing"])
@pytest.mark.parametrize("page_size", [None, 64, 128])
def test_latents_that_nobody_attends_to(page_size, mask):
    """The kernel for latents of many heads clears such rows in shared memory."""
    query, key, _ = make_inputs(3, 64, 1, 2, 256, 576, dtype=torch.bfloat16, device="cuda")
    lens = torch.tensor([*KV_LENS], device="cuda")
    dead = torch.ones(3, 1, 256, dtype=torch.bool)
    dead[:, :, :N] = dead_keys(MASKS[mask], KV_LENS, 2, N)[:, :1]
    key[dead.cuda()] = torch.nan
    call = {"query": query, "key": key, "mask_mod": MASKS[mask], "kv_lens": lens}
    if page_size is not None:
        pages = key.unflatten(2, (-1, page_size)).transpose(1, 2)
        gone = dead.unflatten(2, (-1, page_size)).all(3)[:, 0]
        table = torch.full(gone.shape, -1, dtype=torch.int32)
        table[~gone] = torch.arange(int((~gone).sum()), dtype=torch.int32).flip(0)
        pool = pages.new_full((max(1, int((~gone).sum())), 1, page_size, 576), torch.nan)
        pool[table[~gone].long().cuda()] = pages[~gone.cuda()]
        call |= {"key": pool, "page_table": table.cuda()}
    out, _ = check({**call, "value": call["key"][..., :512]})
    assert out.isfinite().all()


def test_descriptors_and_pages_of_whole_blocks():
    """The copy engine reads whole blocks; what it brings of dead keys is zeroed."""
    lens = torch.tensor([1500, 700, 65], device="cuda")
    query, key, value = make_inputs(3, 8, 2, 1, 1536, 128, dtype=torch.float16, device="cuda")
    for b, length in enumerate(lens.tolist()):
        for x in (key, value):
            x[b, :, length:] = torch.nan
            x[b, :, 4 : max(4, length - 300)] = torch.nan
    for page_size in (None, 128):
        call = {"query": query, "key": key, "value": value, "kv_lens": lens, "mask_mod": mods.streaming(4, 300)}
        if page_size:
            pools = [x.unflatten(2, (12, 128)).transpose(1, 2).flatten(0, 1).contiguous() for x in (key, value)]
            table = torch.arange(36, dtype=torch.int32, device="cuda").view(3, 12)
            table[0, 1:9], table[1, 1:3] = -1, 1 << 30
            call |= {"key": pools[0], "value": pools[1], "page_table": table}
        assert check(call)[0].isfinite().all()


@pytest.mark.parametrize("page_size", [1, 16, 128])
def test_an_entry_that_names_no_page_reads_a_page_of_the_pool(page_size):
    query, key, value = make_inputs(1, 8, 2, 1, 512, 128, dtype=torch.float16, device="cuda")
    pools = [x.unflatten(2, (-1, page_size)).transpose(1, 2).flatten(0, 1).contiguous() for x in (key, value)]
    table = torch.arange(len(pools[0]), dtype=torch.int32, device="cuda")[None]
    lens = torch.tensor([500], device="cuda")
    table[0, 1] = 0
    expected = flex_decode(query, *pools, page_table=table, kv_lens=lens)
    for wrong in (-1, len(pools[0]), 1 << 30, -(1 << 31)):
        table[0, 1] = wrong
        assert torch.equal(flex_decode(query, *pools, page_table=table, kv_lens=lens), expected)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("score", SCORES)
def test_large_scores(score, schedule):
    sinks = [*SINKS.values()][len(score) % 3]
    inputs = make_inputs(2, 4, 2, 2, 200, 64, device="cuda")
    sinks = None if sinks is None else sinks.cuda()
    check(
        dict(zip(("query", "key", "value"), inputs, strict=True), score_mod=SCORES[score], sinks=sinks),
        SCHEDULES[schedule],
    )


@pytest.mark.parametrize("score", ["three_at_3e38", "all_at_the_minimum", "nearly_all_at_1e6"])
@pytest.mark.parametrize("schedule", ["one", "split"])
def test_large_scores_of_latents(schedule, score):
    query, key, _ = make_inputs(2, 64, 1, 1, 256, 576, dtype=torch.bfloat16, device="cuda")
    call = {"query": query, "key": key, "value": key[..., :512], "score_mod": SCORES[score]}
    check(call, SCHEDULES[schedule])


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("score", INFINITE)
def test_infinite_scores(score, schedule):
    inputs = make_inputs(2, 4, 2, 2, 200, 64, device="cuda")
    out, lse = flex_decode(*inputs, INFINITE[score], return_lse=True, options=SCHEDULES[schedule])
    assert_infinite_rows(out.cpu(), lse.cpu())


def test_infinite_scores_of_latents():
    query, key, _ = make_inputs(2, 64, 1, 1, 256, 576, dtype=torch.bfloat16, device="cuda")
    out, lse = flex_decode(query, key, key[..., :512], INFINITE["two_far_apart"], return_lse=True)
    assert_infinite_rows(out.cpu(), lse.cpu())


def test_merging_infinite_parts():
    outs, lses = torch.randn(3, 2, 4, 1, 16, device="cuda"), torch.zeros(3, 2, 4, 1, device="cuda")
    lses[1, :, torch.tensor([0, 2, 3])] = torch.inf
    out, lse = merge_attention(outs, lses)
    assert_infinite_rows(out.cpu(), lse.cpu())


def test_debug_refuses_an_entry_that_names_no_page():
    _, call = make_call("window", "pages of 16", device="cuda", head_dim=64)
    call["page_table"][0, -1] = -1
    with pytest.raises(ValueError, match="`page_table` names page -1 within a sequence"):
        flex_decode(**call, options=DecodeOptions(debug=True))
