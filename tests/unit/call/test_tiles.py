"""Tiles of caches that the copy engine loads: programs share the shared memory of a multiprocessor."""

import itertools

import pytest
import torch

from flexdecode import DecodeOptions
from flexdecode.analysis.proven import ProvenMods
from flexdecode.call.device import KNOWN_DEVICES, RESERVED_SHARED
from flexdecode.call.inputs import Inputs
from flexdecode.call.schedule import Scheduler
from flexdecode.call.signature import NO_AUX, describe
from flexdecode.call.tiles import Loads
from flexdecode.codegen.compile import _asked_shared

H200, _ = KNOWN_DEVICES["H200"]


def scheduled(B, N, Hkv, D, *, rows=4, page_size=0, dtype=torch.bfloat16, **options):
    """The schedule of a plain call on an H200."""

    def cache():
        shape = (B * N // page_size, Hkv, page_size, D) if page_size else (B, Hkv, N, D)
        return torch.empty(shape, dtype=dtype, device="meta")

    table = torch.empty(B, N // page_size, dtype=torch.int32, device="meta") if page_size else None
    query = torch.empty(B, rows * Hkv, 1, D, dtype=dtype, device="meta")
    inputs = Inputs(query, cache(), cache(), None, page_table=table)
    options = DecodeOptions(backend="triton", **options)
    return (
        Scheduler(describe(inputs, NO_AUX, options), ProvenMods(), H200, options)
        .choose(inputs, inputs.sizes)[0]
        .schedule
    )


SHAPES = [*itertools.product([1, 7, 24, 33, 48, 96, 230], [150, 700, 2000, 6000], [1, 4, 8], [64, 128, 256])]


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_the_programs_of_a_multiprocessor_fit_into_its_shared_memory(rows):
    """What is on its way, the step that is computed and the query."""
    for B, N, Hkv, D in SHAPES:
        chosen = scheduled(B, N, Hkv, D, rows=rows)
        tiles = chosen.tiles
        assert tiles.loads is Loads.DESCRIPTORS and 1 <= tiles.per_sm <= 4, chosen
        per_key = 2 * D * 2
        kept = (tiles.num_stages - 1) * tiles.block_n * per_key + tiles.block_m * (2 * D + 2 * tiles.block_n)
        assert tiles.per_sm * (kept + RESERVED_SHARED) <= H200.shared_memory + RESERVED_SHARED, chosen
        assert tiles.num_stages <= 5
        assert tiles.block_n <= 128 or 1024 * chosen.num_splits <= N
        # In one wave no multiprocessor has more programs than others need to have.
        if chosen.num_programs <= tiles.per_sm * H200.num_sms:
            assert chosen.num_programs > (tiles.per_sm - 1) * H200.num_sms


@pytest.mark.parametrize("per_sm", [1, 2, 3, 4])
@pytest.mark.parametrize("needed", [10_000, 38_936, 73_752])
def test_a_launch_asks_for_so_much_that_no_more_programs_fit(per_sm, needed):
    asked = _asked_shared(needed, per_sm, H200)
    whole = H200.shared_memory + RESERVED_SHARED
    assert asked >= needed and (per_sm + 1) * (asked + RESERVED_SHARED) > whole
    if per_sm * (needed + RESERVED_SHARED) <= whole:
        assert per_sm * (asked + RESERVED_SHARED) <= whole
    assert _asked_shared(needed, 0, H200) == needed


@pytest.mark.parametrize("rows", [1, 16, 32])
def test_float32_programs_fit_into_a_multiprocessor(rows):
    """The query lies there in two parts, and its registers leave room for three programs at most."""
    for B, N, Hkv, D in SHAPES:
        if rows == 32 and D == 256:  # most_rows gives such a call small tiles
            continue
        tiles = scheduled(B, N, Hkv, D, rows=rows, dtype=torch.float32).tiles
        assert tiles.loads is Loads.DESCRIPTORS and 1 <= tiles.per_sm <= 3
        per_key = 2 * D * 4
        kept = (tiles.num_stages - 1) * tiles.block_n * per_key + tiles.block_m * (per_key + 4 * tiles.block_n)
        assert tiles.per_sm * (kept + RESERVED_SHARED) <= H200.shared_memory + RESERVED_SHARED
        assert tiles.block_n >= 32
        assert tiles.block_n * per_key <= (64 << 10 if tiles.per_sm == 1 or D == 256 else 32 << 10)
        if tiles.block_m == 32:  # more would spill registers
            assert tiles.block_n * per_key <= 32 << 10 and tiles.block_n <= 64


@pytest.mark.parametrize("page_size", [64, 128, 256])
@pytest.mark.parametrize("head_dim", [64, 80, 128, 256])
def test_a_copy_does_not_cross_pages(page_size, head_dim):
    """Where fewer keys a step would do, the copy engine is kept."""
    for B in (1, 33, 256):
        tiles = scheduled(B, 2048, 8, head_dim, page_size=page_size).tiles
        assert tiles.loads is Loads.DESCRIPTORS and page_size % tiles.block_n == 0


@pytest.mark.parametrize("block_n", [16, 32, 64])
def test_a_small_block_of_the_caller_has_few_stages(block_n):
    tiles = scheduled(1, 8192, 8, 64, block_n=block_n).tiles
    assert tiles.block_n == block_n and 2 <= tiles.num_stages <= 5


def test_other_kernels_have_a_limit_of_programs_if_all_run_at_once():
    """Else a launch takes places of the next one unevenly: sliding windows took 6%, documents 30% longer."""
    assert scheduled(1, 8192, 8, 128, page_size=16).tiles.per_sm == 1
    assert scheduled(30, 8192, 8, 128, page_size=16).tiles.per_sm == 2
    assert scheduled(8, 8192, 8, 128, page_size=16, schedule="balanced").tiles.per_sm == 2
    assert scheduled(64, 8192, 8, 128, page_size=16).tiles.per_sm == 0
    assert scheduled(1, 8192, 8, 128, rows=64).tiles.per_sm == 1
    assert scheduled(1, 2048, 8, 128, rows=80).tiles.per_sm == 1  # a prompt


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("head_dim", [24, 80, 96, 112])
def test_a_head_with_fewer_columns_than_a_box_is_copied(head_dim, dtype):
    tiles = scheduled(64, 8192, 8, head_dim, dtype=dtype).tiles
    assert tiles.loads is Loads.DESCRIPTORS and tiles.block_d == tiles.block_dv == 1 << head_dim.bit_length()
    # A key of two parts has no box that holds it.
    assert scheduled(64, 8192, 8, 160, dtype=dtype).tiles.loads is Loads.POINTERS


def test_long_steps_for_many_keys_of_a_quantised_cache():
    """Measured on an H200: 64 sequences of 8192 tokens 286 us with 128 keys, 244 with 256; 48 of 3000 78 and 83 us."""
    for B, N, keys in ((64, 8192, 256), (16, 8192, 256), (48, 3000, 128), (100, 1500, 128)):
        query = torch.empty(B, 32, 1, 128, dtype=torch.bfloat16, device="meta")
        cache = torch.empty(B, 8, N, 128, dtype=torch.float8_e4m3fn, device="meta")
        options = DecodeOptions(backend="triton")
        inputs = Inputs(query, cache, cache, None, k_scale=1.0, v_scale=1.0)
        launches = Scheduler(describe(inputs, NO_AUX, options), ProvenMods(), H200, options).choose(
            inputs, inputs.sizes
        )
        assert launches[0].schedule.tiles.paired and launches[0].schedule.tiles.block_n == keys
