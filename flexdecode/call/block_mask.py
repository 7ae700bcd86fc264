"""PyTorch's BlockMask as input: its mask becomes a mask_mod, its lists of blocks become tables for a kernel."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.functional import pad

from ..analysis.proven import Listed
from ..memos import Bounded
from .device import may_keep_memory
from .inputs import Inputs

DEAD, PARTIAL, FULL = 0, 1, 2
BLOCK_LISTS_TYPES = ("*i32", *["i64"] * 5)  # Triton types of `BlockLists.arguments`

LISTS = ("kv_num_blocks", "kv_indices", "full_kv_num_blocks", "full_kv_indices")

# The `BlockLists` of the last versions of each BlockMask. They live as long as the BlockMask, because a CUDA graph may
# hold addresses of their tables.
_known: weakref.WeakKeyDictionary[Any, Bounded] = weakref.WeakKeyDictionary()


class BlockLists:
    """The lists of a BlockMask for the heads and sequences of a call.

    Attributes:
        lists: the tensors that this was made of. They are kept alive, so that no other tensor gets their ids.
        kinds: int8 `[B, Hq, rows, columns]`, DEAD, PARTIAL or FULL; sequences and heads may share the memory.
        num_q, num_kv: positions that the mask covers.
        q_block, kv_block: positions per row and column.
    """

    def __init__(self, block_mask: Any, batch: int, num_q_heads: int, device: torch.device) -> None:
        partial, full = block_mask.kv_num_blocks, block_mask.full_kv_num_blocks
        shape = tuple(partial.shape)
        if len(shape) != 3 or shape[0] not in (1, batch) or shape[1] not in (1, num_q_heads):
            raise ValueError(
                f"`block_mask` is for {list(shape[:2])} sequences and heads, but the call has {batch} and "
                f"{num_q_heads}: make it with B={batch} or None and H={num_q_heads} or None"
            )
        if partial.device != device:
            raise ValueError(
                f"`block_mask` must be on the device of `query`, {device}, got {partial.device}: move it there, "
                f'`block_mask = block_mask.to("{device}")`'
            )
        self.lists = [getattr(block_mask, name) for name in LISTS]
        self.q_block, self.kv_block = block_mask.BLOCK_SIZE
        self.num_q, self.num_kv = block_mask.seq_lengths
        _check_shapes(block_mask, -(-self.num_q // self.q_block))
        columns = -(-self.num_kv // self.kv_block)
        # Not int8: PyTorch's CUDA kernel for this reads whole words, so it would read past the end of the tensor.
        kinds = torch.zeros(*shape, columns, dtype=torch.int32, device=device)
        for name, counts, indices, kind in (
            ("kv_indices", partial, block_mask.kv_indices, PARTIAL),
            ("full_kv_indices", full, block_mask.full_kv_indices, FULL),
        ):
            if counts is not None:
                listed = torch.arange(indices.shape[-1], device=device) < counts[..., None]
                outside = listed & ((indices < 0) | (indices >= columns))
                if device.type == "cpu" and outside.any():  # on a GPU this would wait, so such blocks are left out
                    raise ValueError(
                        f"`block_mask.{name}` lists block {int(indices[outside][0])}, but its {self.num_kv} keys in "
                        f"blocks of {self.kv_block} are blocks 0 to {columns - 1}"
                    )
                listed &= ~outside
                kinds.scatter_reduce_(-1, indices.clamp(0, columns - 1).long(), (listed * kind).to(torch.int32), "amax")
        self.own = kinds.to(torch.int8)
        self.kinds = self.own.expand(batch, num_q_heads, -1, -1)
        self._tables: dict[tuple[int, int, Listed, bool], torch.Tensor] = {}

    def mask_mod(self, inner: Callable, shifted: bool = False) -> Callable:
        """The mask of the blocks. It is true in full blocks, and in partial blocks where `inner` is true.

        If the call has `kv_offset` (`shifted`), it is false at positions that the BlockMask does not cover.
        """
        return mask_of_blocks(self.kinds, (self.q_block, self.kv_block), (self.num_q, self.num_kv), inner, shifted)

    def check_positions(self, inputs: Inputs) -> None:
        """Refuses positions that the mask does not cover, as far as the host knows them.

        Raises:
            ValueError: a position is outside.
        """
        lens, tokens, q_offset = inputs.given_kv_lens, inputs.given_q_lens, inputs.q_offset
        shift = 0 if inputs.kv_offset is None else inputs.kv_offset
        if inputs.kv_lens is None and isinstance(lens, int) and isinstance(shift, int) and shift + lens > self.num_kv:
            keys = f"keys to position {shift + lens - 1}" if shift else f"{lens}"
            raise ValueError(f"`block_mask` covers {self.num_kv} keys, but the cache has {keys}")
        start = shift + lens - tokens if q_offset is None else q_offset
        ends = start + tokens
        if any(isinstance(x, torch.Tensor) and not (x.is_cpu and x.numel()) for x in (start, ends)):
            return
        start, ends = (torch.as_tensor(x, device="cpu") for x in (start, ends))
        first, last = int(start.min()), int(ends.max()) - 1
        # Without `q_offset`, a sequence shorter than the query has tokens at negative positions, which attend nowhere.
        if inputs.num_tokens and (last >= self.num_q or (first < 0 and q_offset is not None)):
            raise ValueError(
                f"`block_mask` covers query positions 0 to {self.num_q - 1}, but the call has {first} to {last}: make "
                "it for the whole sequence, as in training, or pass q_offset=0 if its rows are the newest tokens"
            )

    def tables(self, num_kv_heads: int, block_n: int, listed: Listed, shifted: bool = False) -> torch.Tensor:
        """The tables of `templates/block_lists.py`, `[B, Hkv, rows, ...]` int32, without waiting for a GPU.

        Args:
            num_kv_heads: heads of the cache; query heads that share a KV head visit the blocks of all of them.
            block_n: keys per block of the kernel.
            listed: `ALONE` or `WITH_MASK`.
            shifted: whether the call has `kv_offset`. Then the last dimension is `2 * (4 * (blocks + 1) + 2)`, else it
                is `4 * blocks + 2`.
        """
        key = (num_kv_heads, block_n, listed, shifted)
        found = self._tables.get(key)
        if found is not None:
            return found
        batch, heads, rows, columns = self.own.shape
        grouped = self.own.view(batch, 1 if heads == 1 else num_kv_heads, -1, rows, columns)
        live, full = (grouped > DEAD).any(2), (grouped == FULL).all(2)
        start = torch.arange(self.num_blocks(block_n), device=self.own.device) * block_n
        first, last = start // self.kv_block, (start + block_n - 1) // self.kv_block
        covered = pad(torch.stack([live, full]).int().cumsum(-1, dtype=torch.int32), (1, 0))
        num_live, num_full = covered[..., last.clamp(max=columns - 1) + 1] - covered[..., first]
        full = (num_full == last - first + 1) & (listed is Listed.ALONE)
        live = num_live > 0
        if shifted:
            full &= start + block_n <= self.num_kv
            live, full = pad(live, (1, 1)), pad(full, (1, 1))
            pairs = (live[..., :-1] | live[..., 1:], full[..., :-1] & full[..., 1:])
            parts = [*_table(live[..., :-1], full[..., :-1]), *_table(*pairs)]
        else:
            parts = _table(live, full)
        self._tables[key] = torch.cat(parts, -1).to(torch.int32)
        return self._tables[key]

    def num_blocks(self, block_n: int) -> int:
        """Blocks of the kernel that the mask covers."""
        return -(-self.own.shape[-1] * self.kv_block // block_n)

    def arguments(self, num_kv_heads: int, block_n: int, listed: Listed, pointers: bool, shifted: bool) -> tuple:
        """The `block_lists` argument of a kernel. The tables live as long as this object."""
        tables = self.tables(num_kv_heads, block_n, listed, shifted)
        stride_b, stride_h = (tables.stride(i) if tables.shape[i] > 1 else 0 for i in (0, 1))
        address = tables.data_ptr() if pointers else tables
        return address, stride_b, stride_h, self.num_q, self.q_block, self.num_blocks(block_n) + shifted


def mask_of_blocks(
    kinds: torch.Tensor, blocks: tuple[int, int], lengths: tuple[int, int], inner: Callable, shifted: bool
) -> Callable:
    """The mask that `BlockLists.mask_mod` gives, from the attributes of the lists."""
    (q_block, kv_block), (num_q, num_kv) = blocks, lengths

    def block_mask(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        kind = kinds[b, h, q_idx // q_block, kv_idx // kv_block]
        inside = (q_idx >= 0) & (q_idx < num_q)
        return inside & ((kind > 1) | ((kind > 0) & inner(b, h, q_idx, kv_idx)))  # FULL, PARTIAL

    def covered(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return (kv_idx >= 0) & (kv_idx < num_kv) & block_mask(b, h, q_idx, kv_idx)

    return covered if shifted else block_mask


class ListsOfOp:
    """The lists of a BlockMask as the custom op gets them; the attributes are PyTorch's. All calls share them."""

    def __init__(self, lists: list[torch.Tensor], sizes: Sequence[int]) -> None:
        self.kv_num_blocks, self.kv_indices = lists[:2]
        full: Sequence[torch.Tensor | None] = lists[2:] or (None, None)
        self.full_kv_num_blocks, self.full_kv_indices = full
        self.BLOCK_SIZE, self.seq_lengths = tuple(sizes[:2]), tuple(sizes[2:])

    @staticmethod
    def of(lists: list[torch.Tensor], sizes: Sequence[int]) -> ListsOfOp:
        """Those of some tensors. They live as long as the first one, because a CUDA graph may read their tables.

        The CUDA graphs of torch.compile compute their own tables again at each replay.
        """
        if not may_keep_memory():
            return ListsOfOp(lists, sizes)
        known = getattr(lists[0], "_flexdecode_lists", None)
        key = *map(id, lists), *sizes
        if known is None or known[0] != key:
            known = key, ListsOfOp(lists, sizes)
            lists[0]._flexdecode_lists = known  # type: ignore[attr-defined]  # tensors take attributes
        return known[1]


class BlockMaskOfOp(NamedTuple):
    """What stands for a BlockMask in one call of the custom op.

    Attributes:
        lists: of blocks.
        mask_mod: the whole mask of the call as text, see `mask_of_blocks`.
        place: the leaf in which it captures the kinds of blocks.
    """

    lists: ListsOfOp
    mask_mod: Any
    place: int


def _table(live: torch.Tensor, full: torch.Tensor) -> list[torch.Tensor]:
    """The four parts of a table for blocks that are live or full, bools [..., blocks]."""
    partial = live & ~full
    before = [pad(kind.cumsum(-1), (1, 0)) for kind in (full, partial)]
    orders = [kind.to(torch.int8).argsort(dim=-1, descending=True, stable=True) for kind in (full, partial)]
    return before + orders


def read_block_mask(block_mask: Any, inputs: Inputs, mask_mod: Callable | None) -> tuple[Callable, BlockLists]:
    """Joins a BlockMask and a mask_mod, for a checked call.

    Args:
        block_mask: as in `flex_decode`.
        inputs: of the call.
        mask_mod: as in `flex_decode`.

    Returns:
        A mask_mod that is true where both are, and the lists of blocks.

    Raises:
        TypeError: `block_mask` is not a BlockMask.
        ValueError: it does not fit the query.
    """
    if isinstance(block_mask, BlockMaskOfOp):
        found = _find_lists(block_mask.lists, inputs)
        block_mask.mask_mod.leaves[block_mask.place] = found.kinds
        return block_mask.mask_mod, found
    if not all(hasattr(block_mask, name) for name in (*LISTS, "BLOCK_SIZE", "mask_mod", "seq_lengths")):
        raise TypeError(
            "`block_mask` must be a torch.nn.attention.flex_attention.BlockMask, got "
            f"{type(block_mask).__name__}; a function goes to `mask_mod`"
        )
    if getattr(block_mask.mask_mod, "__name__", "") == "_sliced_mask_mod_error":
        raise ValueError(
            "`block_mask` is a part of another one, which has no `mask_mod`: set it, `block_mask.mask_mod = ...`, with "
            "one whose `b` and `h` count from the start of the part"
        )
    found = _find_lists(block_mask, inputs)
    return both_masks(found.mask_mod(block_mask.mask_mod, inputs.kv_offset is not None), mask_mod), found


def _find_lists(block_mask: Any, inputs: Inputs) -> BlockLists:
    """The lists of a BlockMask for a call: those of its last versions are known."""
    versions = [_version(getattr(block_mask, name)) for name in LISTS]
    sizes = inputs.batch, inputs.num_q_heads, inputs.query.device
    key = (*versions, *block_mask.BLOCK_SIZE, *block_mask.seq_lengths, *sizes)
    made = _known.get(block_mask) or _known.setdefault(block_mask, Bounded(limit=8))
    found = made.get(key)
    if found is None:
        found = BlockLists(block_mask, *sizes)
        made.add(key, found)
    return found


def _version(tensor: torch.Tensor | None) -> tuple | None:
    """A key of a list. Another tensor has another key. So has the same tensor after a write that PyTorch counts."""
    if tensor is None:
        return None
    return id(tensor), tensor.data_ptr(), None if tensor.is_inference() else tensor._version


def _check_shapes(block_mask: Any, rows: int) -> None:
    """Refuses lists that do not belong together, or that have no row for some positions.

    Raises:
        ValueError: a shape is wrong.
    """
    shape = list(block_mask.kv_num_blocks.shape)
    for name in LISTS[1:]:
        lists = getattr(block_mask, name)
        if lists is not None and list(lists.shape[:3]) != shape:
            raise ValueError(
                f"`block_mask.{name}` must have a row for each row of `kv_num_blocks`, {shape}, got {list(lists.shape)}"
            )
    if (block_mask.full_kv_num_blocks is None) != (block_mask.full_kv_indices is None):
        raise ValueError("`block_mask` has only one of `full_kv_num_blocks` and `full_kv_indices`: set both or none")
    if shape[2] < rows:
        num_q, q_block = block_mask.seq_lengths[0], block_mask.BLOCK_SIZE[0]
        raise ValueError(
            f"`block_mask` has lists for {shape[2]} row(s) of blocks, but its `seq_lengths` of {num_q} query positions "
            f"in blocks of {q_block} need {rows}. A slice of rows keeps the `seq_lengths` of the whole: pass the whole "
            "BlockMask, whose rows are positions in the sequence, or make one for the newest tokens, "
            "`create_block_mask(mask_mod, B, H, Q, N)`, and pass q_offset=0"
        )


def both_masks(one: Callable, other: Callable | None) -> Callable:
    """The mask that is true where both are."""
    if other is None:
        return one

    def both(b: Any, h: Any, q_idx: Any, kv_idx: Any) -> Any:
        return one(b, h, q_idx, kv_idx) & other(b, h, q_idx, kv_idx)

    return both
