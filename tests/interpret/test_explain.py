"""`explain` says which blocks a step reads; here the generated kernel shows which ones it does read."""

import pytest
import torch
from interpret.decoding import decode
from support import MODS, make_inputs

from flexdecode import DecodeOptions, explain
from flexdecode.report.blocks import PARTIAL

B, HQ, HKV, N, BLOCK_N = 2, 4, 2, 64, 16
FAMILIES = ["none", "window", "streaming", "chunked", "tree", "head_window", "no_key", "masking_score", "combined"]


@pytest.mark.parametrize(("name", "Q"), [(name, (1, 3)[i % 2]) for i, name in enumerate(FAMILIES)])
def test_the_kernel_reads_the_blocks_that_explain_names(name, Q):
    family = next(family for family in MODS if family.name == name)
    score_mod, mask_mod = (make(B, HQ, N, Q, "cpu") for make in family[1:])
    query, key, value = make_inputs(B, HQ, HKV, Q, N, 16)
    kv_lens = torch.tensor([N, 37])
    options = DecodeOptions(backend="triton", block_n=BLOCK_N, num_splits=2)
    step = explain(query, key, value, score_mod, mask_mod, kv_lens=kv_lens, options=options).step
    states = torch.stack([step.blocks(item)[0] for item in range(step.num_items)])
    read = torch.zeros_like(states, dtype=torch.bool)
    for block in range(step.num_blocks):
        # A NaN in a value spreads to every row that loads it, whatever the mask says (0 * NaN is NaN).
        poisoned = value.clone()
        poisoned[:, :, block * BLOCK_N : (block + 1) * BLOCK_N] = torch.nan
        out, _ = decode(query, key, poisoned, score_mod, mask_mod, kv_lens=kv_lens, num_splits=2, block_n=BLOCK_N)
        read[:, block] = out.isnan().view(step.num_items, -1).any(1)
    assert torch.equal(read, states >= PARTIAL)
