"""Mask families through the kernel: which keys attend, and which blocks that costs.

Every family is compared with the reference. Where its live region is solved, only the blocks that meet it are loaded,
each once, and the mask is evaluated only in those that are not full.
"""

import hypothesis
import pytest
import torch
from hypothesis import strategies as st
from interpret.decoding import check_decode, decode
from mask_families import (
    FAMILIES,
    block_diffusion,
    causal,
    dilated_window,
    documents,
    neighborhood,
    prefix_lm,
    shared_prefix,
    sliding_window,
    tree,
)
from support import make_inputs, trace_mod
from unit import mask_graphs

from flexdecode import TraceError, clear_cache
from flexdecode.codegen import kernels as compiled
from flexdecode.reference import evaluate_mod
from flexdecode.runtime.evaluation import evaluate

B, HQ, HKV, N, D, BLOCK_N = 3, 2, 1, 96, 16, 16

KV_LENS = {"all": None, "ragged": torch.tensor([96, 51, 7]), "empty": torch.tensor([0, 96, 1])}
CALLS = [(1, 1), (1, 3), (5, 3), (5, 1)]  # query tokens and splits; every other one at a time, to save time
Q_OFFSETS = {"newest": None, "number": 41, "tensor": torch.tensor([72, 3, -2])}


@pytest.mark.parametrize("q_offset", Q_OFFSETS)
@pytest.mark.parametrize("kv_lens", KV_LENS)
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family, kv_lens, q_offset):
    lengths = {"kv_lens": KV_LENS[kv_lens], "q_offset": Q_OFFSETS[q_offset]}
    mask_mod = family()
    for num_queries, num_splits in CALLS[::2] if q_offset == "number" else CALLS[1::2]:
        inputs = make_inputs(B, HQ, HKV, num_queries, N, D)
        check_decode(*inputs, mask_mod=mask_mod, num_splits=num_splits, **lengths)


# --- What is read -----------------------------------------------------------------------------------------------------

SOLVED = [causal, sliding_window, prefix_lm, block_diffusion, documents, shared_prefix]
# Inside a live interval the mask alone knows. The interval of `tiles`, a sum of quotients, is wider than its keys.
BANDS = [dilated_window, neighborhood]


def live_blocks(mask_mod, q_idx):
    """By block: whether a row of the tile of one sequence and KV head attends to a key of it, and whether all do."""
    grid = torch.zeros(1, dtype=torch.long), torch.arange(HQ), q_idx, torch.arange(N)
    mask = evaluate_mod(mask_mod, grid).flatten(0, 2).unflatten(-1, (-1, BLOCK_N))
    return mask.any(-1).any(0), mask.all(-1).all(0)


@pytest.mark.parametrize("num_queries, num_splits", [(1, 3), (5, 1)])
@pytest.mark.parametrize("family", [*SOLVED, *BANDS])
def test_dead_blocks_leave_no_trace(family, num_queries, num_splits):
    """NaN in K and V outside the blocks that the tile attends to: a read would show, because 0 * NaN is NaN."""
    mask_mod, q_offset = family(), 60
    inputs = _, key, value = make_inputs(1, HQ, 1, num_queries, N, D)
    expected = decode(*inputs, mask_mod=mask_mod, q_offset=q_offset, num_splits=num_splits)
    live = live_blocks(mask_mod, q_offset + torch.arange(num_queries))[0]
    if family in BANDS:
        live = live.cummax(0).values & live.flip(0).cummax(0).values.flip(0)
    assert not live.all(), "there is no dead block"
    dead = ~live.repeat_interleave(BLOCK_N)
    key[:, :, dead] = torch.nan
    value[:, :, dead] = torch.nan
    out, lse = decode(*inputs, mask_mod=mask_mod, q_offset=q_offset, num_splits=num_splits)
    assert out.isfinite().all() and torch.equal(out, expected[0]) and torch.equal(lse, expected[1])


@pytest.fixture
def visited(monkeypatch):
    """The blocks that kernels load, and those in which they evaluate the mask, in order."""
    seen = {"loaded": [], "masked": []}

    def load_module(path):
        module = real_load_module(path)
        if not hasattr(module, "load_kv"):  # the second pass
            return module
        load_kv, mask_mod = module.load_kv, module.mask_mod

        def load(cache, block, *rest):
            seen["loaded"].append(int(block.start_n.handle.data.item()) // BLOCK_N)
            return load_kv(cache, block, *rest)

        def mask(live, b, h, q_idx, kv_idx, row, captures):
            seen["masked"].append(int(kv_idx.handle.data.min()) // BLOCK_N)
            return mask_mod(live, b, h, q_idx, kv_idx, row, captures)

        module.load_kv, module.mask_mod = load, mask
        return module

    real_load_module = compiled.load_module
    monkeypatch.setattr(compiled, "load_module", load_module)
    clear_cache()
    yield seen
    clear_cache()


@pytest.mark.parametrize("num_splits", [1, 3])
@pytest.mark.parametrize("num_queries", [1, 5])
@pytest.mark.parametrize("family", SOLVED)
def test_live_blocks_are_read_once_and_full_ones_without_the_mask(visited, family, num_queries, num_splits):
    mask_mod = family()
    q_offset = 72
    decode(*make_inputs(1, HQ, 1, num_queries, N, D), mask_mod=mask_mod, q_offset=q_offset, num_splits=num_splits)
    live, full = live_blocks(mask_mod, q_offset + torch.arange(num_queries))
    # Each block is loaded twice: its keys and its values.
    assert sorted(visited["loaded"]) == sorted(2 * live.nonzero().flatten().tolist())
    assert sorted(visited["masked"]) == (live & ~full).nonzero().flatten().tolist()


def test_the_prefix_of_a_tree_is_read_without_the_mask(visited):
    decode(*make_inputs(1, 2, 1, 5, N, D), mask_mod=tree(), q_offset=70)
    assert sorted(visited["masked"]) == [4, 5], "the prefix ends in block 4"
    assert sorted(visited["loaded"]) == sorted(2 * [*range(6)])


# --- Random masks -----------------------------------------------------------------------------------------------------

QUERIES = {False: None, True: torch.tensor([40, 2**63 - 4, -(2**40) - 1])}


def as_mod(example):
    """A mask_mod that computes a random graph in PyTorch's functions."""
    nodes, leaves = example.graph.nodes(), example.leaves
    tensors, numbers = example.graph.tensors, [leaves[source.leaf] for source in example.graph.numbers]

    def mask_mod(b, h, q_idx, kv_idx):
        indices = {"b": b, "h": h, "q_idx": q_idx, "kv_idx": kv_idx}
        values = {}
        for node in nodes:
            args = [values[a] for a in node.args]
            if node.op == "index":
                value = indices[node.attr]
            elif node.op == "const":
                value = node.attr if node.weak else torch.tensor(node.attr, dtype=node.dtype)
            elif node.op == "number":
                value = numbers[node.attr]
            elif node.op == "load":
                value = leaves[tensors[node.attr]]
                value = value[tuple(args)] if args else value
            elif node.op == "cast":
                value = torch.as_tensor(args[0]).to(node.dtype)
            else:
                function = getattr(torch, node.op, None) or getattr(torch.special, node.op)
                try:
                    value = function(torch.as_tensor(args[0]), *args[1:])
                except (TypeError, TraceError):  # some functions take no numbers
                    value = function(*map(torch.as_tensor, args))
            values[node] = value
        return values[example.graph.output]

    return mask_mod


def test_random_masks():
    """All scores are 0 and the values tell the blocks apart, so that the output counts the live keys of each block."""
    blocks = N // BLOCK_N
    query, key = torch.zeros(B, HQ, 1, D), torch.zeros(B, HKV, N, D)
    value = torch.eye(blocks, D).repeat_interleave(BLOCK_N, dim=0).expand(B, HKV, N, D)

    @hypothesis.settings(max_examples=40, database=None)
    @hypothesis.given(mask_graphs.masks(), st.sampled_from([1, 2]))
    def check(example, num_splits):
        mask_mod, q_offset = as_mod(example), QUERIES[example.q_idx_given]
        graph, leaves = trace_mod(mask_mod, "mask_mod")
        grid = {
            "b": torch.arange(B).view(-1, 1, 1),
            "h": torch.arange(HQ).view(1, -1, 1),
            "q_idx": (torch.tensor([N - 1] * B) if q_offset is None else q_offset).view(-1, 1, 1),
            "kv_idx": torch.arange(N),
        }
        mask = evaluate([graph.output], graph, leaves, grid)[0].expand(B, HQ, N)
        expected = mask.unflatten(-1, (blocks, BLOCK_N)).sum(-1)
        out, lse = decode(query, key, value, mask_mod=mask_mod, q_offset=q_offset, num_splits=num_splits)
        counts = (out * lse.exp()[..., None]).round().long()
        assert torch.equal(counts[:, :, 0, :blocks], expected)

    check()
