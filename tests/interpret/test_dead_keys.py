"""The generated kernel: keys outside the solved intervals of a tile are not read, nor their page entries followed."""

import pytest
import torch
from dead_keys import CACHES, MASKS, N, make_call, make_masked_by_score, two_windows_by_score, window_by_score
from interpret.decoding import check_decode, decode
from torch.nn.attention.flex_attention import create_block_mask

SCHEDULES = {
    "one": {"num_splits": 1},
    "split": {"num_splits": 3},
    "balanced": {"schedule": "balanced", "num_splits": 5},
}
CASES = [
    (mask, cache, [*SCHEDULES][(i + j) % 3], (1, 3)[(i + j) % 2])
    for i, mask in enumerate(MASKS)
    for j, cache in enumerate(CACHES)
    if (i + j) % 4 == 0 or mask == "sinks_and_window"
]


@pytest.mark.parametrize(("mask", "cache", "schedule", "num_queries"), CASES)
def test_what_nobody_attends_to_does_not_matter(mask, cache, schedule, num_queries):
    clean, spoiled = make_call(mask, cache, num_queries)
    out, lse = check_decode(**spoiled, **SCHEDULES[schedule])
    assert out.isfinite().all()
    expected, expected_lse = decode(**clean, **SCHEDULES[schedule])
    assert torch.equal(out, expected) and torch.equal(lse, expected_lse)


@pytest.mark.parametrize("page_size", [4, 64])
def test_an_entry_that_names_no_page_reads_a_page_of_the_pool(page_size):
    """The host does not look at a table on a GPU, so the kernel does."""
    _, call = make_call("the_past", f"pages of {page_size}")
    right = call["page_table"].clone()
    right[0, 0] = 0
    for wrong in (-1, len(call["key"]), 1 << 30, -(1 << 31)):
        call["page_table"][0, 0] = wrong
        out, _ = decode(**call)
        expected, _ = decode(**(call | {"page_table": right}))
        assert torch.equal(out, expected)


@pytest.mark.parametrize("score_mod", [window_by_score, two_windows_by_score])
@pytest.mark.parametrize("num_queries", [1, 3])
@pytest.mark.parametrize("page_size", [4, 16, 128])
def test_a_score_mod_that_ends_a_window_reads_no_other_page(page_size, num_queries, score_mod):
    """A block at the end of its keys is not full: pages of keys beyond are not looked up."""
    call = make_masked_by_score(page_size, num_queries)
    check_decode(**call, score_mod=score_mod, block_n=32)
    check_decode(**call, score_mod=score_mod, mask_mod=lambda b, h, q, k: k >= 0, block_n=32)


def test_full_blocks_of_lists_reach_no_other_page():
    call = make_masked_by_score(16)
    everything = create_block_mask(lambda b, h, q, k: k >= 0, None, None, N, N, device="cpu", BLOCK_SIZE=32)
    out, lse = decode(**call, score_mod=window_by_score, block_mask=everything, block_n=32)
    expected, expected_lse = decode(**call, score_mod=window_by_score, block_n=32)
    torch.testing.assert_close(out, expected), torch.testing.assert_close(lse, expected_lse)
