"""BlockMasks: their tables, the positions that they cover, and what is refused."""

import gc
import weakref

import pytest
import torch
from support import assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

import flexdecode
from flexdecode import flex_decode, mods
from flexdecode.analysis.proven import Listed
from flexdecode.call.block_mask import BlockLists

CPU = torch.device("cpu")


def dense(tables, num_blocks):
    """Each row of the tables as text: F for full blocks, P for partial ones; in which order they are listed."""
    rows = []
    for row in tables.view(-1, tables.shape[-1]).tolist():
        before = row[: num_blocks + 1], row[num_blocks + 1 : 2 * num_blocks + 2]
        orders = row[2 * num_blocks + 2 : 3 * num_blocks + 2], row[3 * num_blocks + 2 :]
        kinds = ["."] * num_blocks
        for counts, order, letter in zip(before, orders, "FP", strict=True):
            listed = order[: counts[-1]]
            assert listed == sorted(listed)
            assert [sum(i < j for i in listed) for j in range(num_blocks + 1)] == counts
            for block in listed:
                kinds[block] = letter
        rows.append("".join(kinds))
    return rows


def lists_of(mask_mod, length, size, heads=None, num_q_heads=4):
    block_mask = create_block_mask(mask_mod, None, heads, length, length, device="cpu", BLOCK_SIZE=size)
    return BlockLists(block_mask, 1, num_q_heads, CPU)


def test_tables_of_a_causal_mask():
    lists = lists_of(mods.causal(), 64, 16)
    assert dense(lists.tables(2, 16, Listed.ALONE), 4) == ["P...", "FP..", "FFP.", "FFFP"]
    assert dense(lists.tables(2, 16, Listed.WITH_MASK), 4) == ["P...", "PP..", "PPP.", "PPPP"]


@pytest.mark.parametrize("block_n", [8, 16, 24, 32, 64])
def test_blocks_of_another_size_than_the_kernel_has(block_n):
    """Columns of 12 keys: full, dead, partial, full, full, full."""
    mask_mod = lambda b, h, q, k: (k < 12) | (k >= 36) | ((k >= 24) & (k % 2 == 0))
    lists = lists_of(mask_mod, 72, (72, 12))
    num_blocks = lists.num_blocks(block_n)
    (row,) = dense(lists.tables(2, block_n, Listed.ALONE), num_blocks)
    at = torch.arange(num_blocks * block_n)
    live = mask_mod(0, 0, 0, at) & (at < 72)
    kinds = ["F" if part.all() else "P" if part.any() else "." for part in live.view(num_blocks, block_n)]
    for found, exact in zip(row, kinds, strict=True):
        assert found == exact or (found, exact) in {("P", "."), ("P", "F")}, (row, kinds)
    assert "F" in row or block_n > 24


@pytest.mark.parametrize("block_n", [16, 24])
def test_tables_for_offsets(block_n):
    """A block of slots is live if a block of positions that it meets is, and full if all are."""
    mask_mod = lambda b, h, q, k: (k < 12) | (k >= 36) | ((k >= 24) & (k % 2 == 0))
    lists = lists_of(mask_mod, 72, (72, 12))
    num_blocks = lists.num_blocks(block_n)
    (plain,) = dense(lists.tables(2, block_n, Listed.ALONE), num_blocks)
    tables = lists.tables(2, block_n, Listed.ALONE, shifted=True)
    assert tables.shape[-1] == 2 * (4 * (num_blocks + 1) + 2)
    aligned, others = (dense(part.contiguous(), num_blocks + 1) for part in tables.chunk(2, -1))
    # The last block of 16 ends at position 80: the mask does not cover its end.
    covered = "." + (plain if 72 % block_n == 0 else plain[:-1] + plain[-1].replace("F", "P"))
    assert aligned == [covered]
    pairs = zip(covered, covered[1:] + ".", strict=True)
    assert others == ["".join("." if a == b == "." else "F" if a == b == "F" else "P" for a, b in pairs)]


def test_heads_that_share_a_cache_visit_the_blocks_of_all():
    lists = lists_of(lambda b, h, q, k: k // 16 == h, 64, (64, 16), heads=4)
    assert dense(lists.tables(2, 16, Listed.ALONE), 4) == ["PP..", "..PP"]
    assert dense(lists.tables(4, 16, Listed.ALONE), 4) == ["F...", ".F..", "..F.", "...F"]


def test_lists_without_full_blocks_and_with_rubbish_behind_their_end():
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[2, 99, -5], [0, 1, 99]]]])
    block_mask = BlockMask.from_kv_blocks(
        counts, indices, BLOCK_SIZE=(16, 16), seq_lengths=(32, 48), compute_q_blocks=False
    )
    lists = BlockLists(block_mask, 1, 2, CPU)
    assert dense(lists.tables(1, 16, Listed.ALONE), 3) == ["..P", "PP."]


@pytest.mark.parametrize("name, number", [("kv_indices", 3), ("kv_indices", -1), ("full_kv_indices", 7)])
def test_a_block_outside_of_the_mask(name, number):
    counts, indices = torch.tensor([[[1, 2]]]), torch.tensor([[[[2, 0, 1], [0, 1, 2]]]])
    lists = {"kv_indices": indices, "full_kv_indices": indices.clone()}
    lists[name][0, 0, 1, 1] = number
    block_mask = BlockMask.from_kv_blocks(
        counts, lists["kv_indices"], counts, lists["full_kv_indices"],
        BLOCK_SIZE=(16, 16), seq_lengths=(32, 48), compute_q_blocks=False,
    )  # fmt: skip
    message = f"`block_mask.{name}` lists block {number}, but its 48 keys in blocks of 16 are blocks 0 to 2"
    with pytest.raises(ValueError, match=message):
        BlockLists(block_mask, 1, 2, CPU)


def test_changes_of_the_lists_are_seen():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    mask_mod = lambda b, h, q, k: k // 16 == 1
    block_mask = create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=mask_mod)
    block_mask.full_kv_indices.fill_(2)
    other = lambda b, h, q, k: k // 16 == 2
    assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=other)


def blocks_of_16(first):
    """A mask of one block of keys, and a BlockMask for it."""
    mask_mod = lambda b, h, q, k: k // 16 == first
    return mask_mod, create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)


def test_lists_that_are_reassigned_in_each_step():
    """The memory of the old list is used again for the new one."""
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    _, block_mask = blocks_of_16(0)
    block_mask.mask_mod = mods.and_masks(lambda b, h, q, k: k >= 0)
    for step in range(20):
        block_mask.full_kv_indices = torch.full_like(block_mask.full_kv_indices, step % 4)
        expected = lambda b, h, q, k, block=step % 4: k // 16 == block
        assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=expected)


def test_lists_that_trade_their_storage():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    _, block_mask = blocks_of_16(0)
    stores = [torch.full_like(block_mask.full_kv_indices, block) for block in range(4)]
    for block in (0, 1, 2, 3, 1, 0):
        block_mask.full_kv_indices.data = stores[block]
        expected = lambda b, h, q, k, block=block: k // 16 == block
        assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=expected)


def test_memory_of_old_lists_is_bounded():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    _, block_mask = blocks_of_16(0)
    alive = []
    for _ in range(30):
        block_mask.kv_indices = block_mask.kv_indices.clone()
        alive.append(weakref.ref(block_mask.kv_indices))
        flex_decode(*inputs, block_mask=block_mask)
    gc.collect()
    assert sum(reference() is not None for reference in alive) <= 8
    del block_mask
    gc.collect()
    assert not any(reference() for reference in alive)


def test_lengths_that_grow():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    _, block_mask = blocks_of_16(1)
    for length in (60, 61, 64):
        block_mask.seq_lengths = (length, length)
        kv_lens = torch.tensor([length])
        out = flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens)
        expected = lambda b, h, q, k: k // 16 == 1
        assert_close_to_reference(out, None, *inputs, mask_mod=expected, kv_lens=kv_lens)
    block_mask.seq_lengths = (60, 60)
    with pytest.raises(ValueError, match="covers query positions 0 to 59, but the call has 63 to 63"):
        flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens)


def test_another_block_size():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    _, block_mask = blocks_of_16(1)
    assert_close_to_reference(
        flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=lambda b, h, q, k: k // 16 == 1
    )
    block_mask.BLOCK_SIZE = (32, 32)
    assert_close_to_reference(
        flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=lambda b, h, q, k: k // 32 == 1
    )


def test_another_mask_mod():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    block_mask = create_block_mask(mods.causal(), None, None, 64, 64, device="cpu", BLOCK_SIZE=64)
    for window in (3, 9):
        block_mask.mask_mod = mods.sliding_window(window)
        out = flex_decode(*inputs, block_mask=block_mask)
        assert_close_to_reference(out, None, *inputs, mask_mod=mods.sliding_window(window))


def test_a_part_of_its_sequences_and_heads():
    mask_mod = lambda b, h, q, k: k // 16 == (b + h) % 4
    whole = create_block_mask(mask_mod, 3, 4, 64, 64, device="cpu", BLOCK_SIZE=16)
    inputs = make_inputs(2, 1, 1, 1, 64, 16)
    part = whole[1:3, 2:3]
    with pytest.raises(ValueError, match=r"a part of another one, which has no `mask_mod`: set it"):
        flex_decode(*inputs, block_mask=part)
    part.mask_mod = lambda b, h, q, k: mask_mod(b + 1, h + 2, q, k)
    assert_close_to_reference(flex_decode(*inputs, block_mask=part), None, *inputs, mask_mod=part.mask_mod)


def test_made_under_inference_mode():
    """Its tensors count no versions."""
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    with torch.inference_mode():
        mask_mod, block_mask = blocks_of_16(2)
    for _ in range(2):
        assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=mask_mod)


@pytest.mark.parametrize("change", ["transposed", "expanded", "no full lists", "narrow", "moved"])
def test_odd_lists(change):
    mask_mod = lambda b, h, q, k: (k // 16 == q // 16) & (k % 3 > 0)
    block_mask = create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    counts, indices = block_mask.kv_num_blocks, block_mask.kv_indices
    if change == "transposed":
        block_mask.kv_indices = indices.mT.contiguous().mT
    elif change == "expanded":
        block_mask.kv_num_blocks, block_mask.kv_indices = counts.expand(2, 4, -1), indices.expand(2, 4, -1, -1)
        block_mask.full_kv_num_blocks = block_mask.full_kv_num_blocks.expand(2, 4, -1)
        block_mask.full_kv_indices = block_mask.full_kv_indices.expand(2, 4, -1, -1)
    elif change == "no full lists":
        block_mask = BlockMask.from_kv_blocks(counts, indices, None, None, (16, 16), mask_mod, (64, 64))
    elif change == "narrow":  # rows list one block at most
        block_mask = BlockMask.from_kv_blocks(
            counts, indices[..., :1], None, None, (16, 16), mask_mod, (64, 64), compute_q_blocks=False
        )
    else:
        block_mask = block_mask.to("cpu")
    inputs = make_inputs(2, 4, 2, 3, 64, 16)
    assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=mask_mod)


def test_a_new_block_mask_each_step_is_neither_a_trace_nor_kept_alive():
    inputs = make_inputs(1, 4, 2, 1, 64, 16)
    flexdecode.clear_cache()
    alive = []
    for step in range(5):
        mask_mod = lambda b, h, q, k, first=step: k >= first
        block_mask = create_block_mask(mask_mod, None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
        assert_close_to_reference(flex_decode(*inputs, block_mask=block_mask), None, *inputs, mask_mod=mask_mod)
        alive.append(weakref.ref(block_mask))
    assert flexdecode.cache_info().traces == 1
    del block_mask
    gc.collect()
    assert not any(reference() for reference in alive)


def test_explain_says_where_the_blocks_come_from():
    block_mask = create_block_mask(mods.causal(), None, None, 64, 64, device="cpu", BLOCK_SIZE=16)
    text = str(flexdecode.explain(*make_inputs(1, 4, 2, 1, 64, 16), block_mask=block_mask, device="H200"))
    assert "the lists of `block_mask` say which blocks are read" in text


# --- What is refused --------------------------------------------------------------------------------------------------


@pytest.fixture
def block_mask():
    return create_block_mask(mods.causal(), None, None, 64, 64, device="cpu", BLOCK_SIZE=16)


def test_no_block_mask():
    with pytest.raises(TypeError, match=r"`block_mask` must be a torch\.nn.*\.BlockMask, got function"):
        flex_decode(*make_inputs(1, 4, 2, 1, 64, 16), block_mask=lambda b, h, q, k: q >= k)


def test_as_a_mask_mod(block_mask):
    with pytest.raises(
        TypeError, match="`mask_mod` must be a callable or None, got BlockMask; pass it as `block_mask`"
    ):
        flex_decode(*make_inputs(1, 4, 2, 1, 64, 16), mask_mod=block_mask)


@pytest.mark.parametrize("B, H", [(3, None), (None, 2), (None, 8)])
def test_other_sequences_or_heads(B, H):
    block_mask = create_block_mask(mods.causal(), B, H, 64, 64, device="cpu", BLOCK_SIZE=16)
    with pytest.raises(ValueError, match=r"`block_mask` is for .* but the call has 2 and 4: make it with B=2 or None"):
        flex_decode(*make_inputs(2, 4, 2, 1, 64, 16), block_mask=block_mask)


def test_a_longer_cache(block_mask):
    inputs = make_inputs(2, 4, 2, 1, 65, 16)
    with pytest.raises(ValueError, match="`block_mask` covers 64 keys, but the cache has 65"):
        flex_decode(*inputs, block_mask=block_mask)
    kv_lens = torch.tensor([64, 3])
    out = flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens)
    assert_close_to_reference(out, None, *inputs, mask_mod=mods.causal(), kv_lens=kv_lens)


@pytest.mark.parametrize("q_offset", [63, -1, 64, torch.tensor([0, 63])])
def test_positions_outside_of_its_rows(block_mask, q_offset):
    inputs = make_inputs(2, 4, 2, 2, 64, 16)
    with pytest.raises(ValueError, match=r"covers query positions 0 to 63, but the call has .* pass q_offset=0"):
        flex_decode(*inputs, block_mask=block_mask, q_offset=q_offset)


def test_rows_of_the_newest_tokens_need_an_offset():
    block_mask = create_block_mask(lambda b, h, q, k: k < 40, None, None, 1, 64, device="cpu", BLOCK_SIZE=16)
    inputs = make_inputs(2, 4, 2, 1, 64, 16)
    with pytest.raises(ValueError, match="covers query positions 0 to 0, but the call has 63 to 63"):
        flex_decode(*inputs, block_mask=block_mask)
    out = flex_decode(*inputs, block_mask=block_mask, q_offset=0)
    assert_close_to_reference(out, None, *inputs, mask_mod=lambda b, h, q, k: k < 40)


def test_tokens_before_the_start_of_a_short_sequence_attend_nowhere(block_mask):
    inputs = make_inputs(2, 4, 2, 3, 64, 16)
    kv_lens = torch.tensor([1, 0])
    out, lse = flex_decode(*inputs, block_mask=block_mask, kv_lens=kv_lens, return_lse=True)
    assert (lse[0, :, :2] == -torch.inf).all() and (lse[1] == -torch.inf).all() and lse[0, :, 2].isfinite().all()
    assert (out[1] == 0).all()


@pytest.mark.parametrize("rows", [3, slice(0, 2), slice(2, 4)])
def test_a_part_of_its_rows(block_mask, rows):
    inputs = make_inputs(2, 4, 2, 1, 64, 16)
    part = block_mask[:, :, rows]
    part.mask_mod, part.seq_lengths = block_mask.mask_mod, block_mask.seq_lengths  # newer PyTorch shortens the lengths
    number = 1 if rows == 3 else 2
    pattern = (
        rf"has lists for {number} row\(s\) of blocks, but its `seq_lengths` of 64 query positions .* need 4\. A slice"
    )
    with pytest.raises(ValueError, match=pattern):
        flex_decode(*inputs, block_mask=part)
    with pytest.raises(ValueError, match=pattern):
        flexdecode.explain(*inputs, block_mask=part)


def test_a_row_for_the_newest_tokens(block_mask):
    inputs = make_inputs(2, 4, 2, 1, 64, 16)
    part = block_mask[:, :, 3]
    part.seq_lengths = (16, 64)
    part.mask_mod = lambda b, h, q, k: k <= q + 60
    out = flex_decode(*inputs, block_mask=part, q_offset=0)
    assert_close_to_reference(out, None, *inputs, mask_mod=lambda b, h, q, k: k <= 60)


def test_lists_that_do_not_belong_together(block_mask):
    inputs = make_inputs(2, 4, 2, 1, 64, 16)
    block_mask.full_kv_indices = block_mask.full_kv_indices[:, :, :2]
    with pytest.raises(
        ValueError, match=r"`block_mask.full_kv_indices` must have a row .*\[1, 1, 4\], got \[1, 1, 2, 4\]"
    ):
        flex_decode(*inputs, block_mask=block_mask)
    block_mask.full_kv_indices = None
    with pytest.raises(ValueError, match="has only one of `full_kv_num_blocks` and `full_kv_indices`"):
        flex_decode(*inputs, block_mask=block_mask)
