"""The generated kernel: keys outside the solved intervals of a tile are not read, nor their page entries followed."""

import pytest
import torch
from dead_keys import CACHES, MASKS, make_call
from interpret.decoding import check_decode, decode

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
