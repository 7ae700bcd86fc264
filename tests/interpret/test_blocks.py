"""blocks.py against the generated kernel: each program visits the blocks that it names, in that order."""

import pytest
import torch
import triton.language as tl
from interpret.decoding import decode
from support import MODS, make_inputs

from flexdecode import DecodeOptions, clear_cache, explain
from flexdecode.codegen import kernels as compiled
from flexdecode.report.blocks import FULL, PARTIAL

B, HQ, HKV, N, BLOCK_N = 3, 4, 2, 118, 16
KV_LENS = torch.tensor([118, 37, 0])
# With one token the weights of a balanced kernel are exact here: all heads see the same, and no intervals overlap.
UNIFORM = ["none", "causal", "window", "prefix_lm", "chunked", "masking_score", "no_key"]
OTHERS = ["streaming", "head_window", "combined"]


@pytest.fixture
def visits(monkeypatch):
    """What kernels do, in order: (sequence, KV head, tile), program ids, block, and whether the mask is evaluated."""
    seen = []

    def load_module(path):
        module = real_load_module(path)
        if not hasattr(module, "load_kv"):  # the second pass
            return module
        attend_run, load_kv, mask_mod = module.attend_run, module.load_kv, module.mask_mod
        number = lambda x: int(x.handle.data.min()) if hasattr(x, "handle") else int(x)

        def run(item, *rest):
            seen.append(([number(x) for x in (item.b, item.kv_head, item.tile)], {}))
            return attend_run(item, *rest)

        def visit(start_n, masked):
            key = number(tl.program_id(0)), number(tl.program_id(1)), number(start_n) // BLOCK_N
            seen[-1][1][key] = masked or seen[-1][1].get(key, False)

        def load(cache, block, *rest):
            visit(block.start_n, False)
            return load_kv(cache, block, *rest)

        def mask(live, b, h, q_idx, kv_idx, *rest):
            visit(kv_idx, True)
            return mask_mod(live, b, h, q_idx, kv_idx, *rest)

        module.attend_run, module.load_kv, module.mask_mod = run, load, mask
        return module

    real_load_module = compiled.load_module
    monkeypatch.setattr(compiled, "load_module", load_module)
    clear_cache()
    yield seen
    clear_cache()


def check_visits(visits, schedule, name, HQ, Q, num_splits):
    family = next(family for family in MODS if family.name == name)
    score_mod, mask_mod = (make(B, HQ, N, Q, "cpu") for make in family[1:])
    inputs = make_inputs(B, HQ, HKV, Q, N, 16)
    chosen = {"schedule": schedule, "block_n": BLOCK_N, "num_splits": num_splits}
    options = DecodeOptions(backend="triton", **chosen)
    step = explain(*inputs, score_mod, mask_mod, kv_lens=KV_LENS, options=options).step
    assert step.balanced == (schedule == "balanced")
    decode(*inputs, score_mod, mask_mod, kv_lens=KV_LENS, **chosen)
    found = [[] for _ in range(step.num_items)]
    for (b, kv_head, tile), visited in visits:
        for (first, second, block), masked in visited.items():
            program = first + second * step.num_splits if step.balanced else second
            found[(b * HKV + kv_head) * step.num_tiles + tile].append((program, block, masked))
    for item in range(step.num_items):
        states, programs = step.blocks(item)
        expected = [
            (int(programs[block]), block, state == PARTIAL)
            for state in (FULL, PARTIAL)
            for block in (states == state).nonzero()[:, 0].tolist()
        ]
        assert sorted(found[item], key=lambda visit: visit[0]) == expected
    return step


@pytest.mark.parametrize(("name", "Q"), [(name, (1, 3)[i % 2]) for i, name in enumerate([*UNIFORM, *OTHERS])])
def test_programs_share_the_blocks_of_each_item(visits, name, Q):
    check_visits(visits, "split", name, HQ, Q, 3)


@pytest.mark.parametrize("name", UNIFORM)
def test_workers_share_the_blocks_of_all_items(visits, name):
    check_visits(visits, "balanced", name, HQ, 1, 9)


def test_workers_share_the_blocks_of_several_row_tiles(visits):
    step = check_visits(visits, "balanced", "causal", 2 * 80, 1, 5)
    assert step.num_tiles > 1
