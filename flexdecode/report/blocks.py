"""The blocks of a KV cache that one decode step reads. The host finds them here in the same way as the kernel.

An item is one tile of query rows of one KV head of one sequence. Its work is its proven-full blocks and then its
partial blocks, both in ascending order. Programs take equal shares of the work. templates/decode.py and
templates/balanced.py have the same steps. tests/interpret/test_blocks.py compares the blocks of each program.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from ..analysis.bounds import nodes_of
from ..analysis.intervals import EVERYWHERE, FAR, MAX_INTERVALS, Region
from ..analysis.proven import ProvenMods
from ..call.inputs import Sizes
from ..call.schedule import Schedule
from ..call.signature import Signature
from ..frontend.graph import Graph, Node, topological
from ..runtime.evaluation import evaluate
from ..runtime.identity import Mod, names_of

UNUSED, DEAD, PARTIAL, FULL = range(4)  # states: outside the sequence, masked out, mask evaluated, mask not needed

_MAX_SLOT = 1 << 30


@dataclass(frozen=True)
class Step:
    """The blocks of one decode step.

    Attributes:
        block_n: keys in a block.
        num_splits: programs per item; if balanced, workers that share all items.
        num_kv_heads: KV heads.
        num_tiles: tiles of query rows per KV head.
        kv_lens: slots up to the last key in use, int64 [B].
        live: disjoint ascending half-open ranges of blocks that are read, int64 [items, 4, 2]. Items are ordered by
            sequence, then KV head, then tile.
        full: the proven-full part of each range, int64 [items, 4, 2].
        in_use: whether each item has a query token in use, bool [items].
        balanced: whether the work of all items is divided into equal runs.
        kv_starts: slots before the first key in use, int64 [B], at most `kv_lens`; None if there are none.
        shifted: whether positions are other numbers than slots.
    """

    block_n: int
    num_splits: int
    num_kv_heads: int
    num_tiles: int
    kv_lens: torch.Tensor
    live: torch.Tensor
    full: torch.Tensor
    in_use: torch.Tensor
    balanced: bool = False
    kv_starts: torch.Tensor | None = None
    shifted: bool = False

    @property
    def num_items(self) -> int:
        """The number of all items."""
        return len(self.live)

    @property
    def num_blocks(self) -> int:
        """Blocks of the longest sequence."""
        return -(-int(self.kv_lens.max()) // self.block_n) if len(self.kv_lens) else 0

    @property
    def counts(self) -> dict[int, int]:
        """How many blocks of all items are DEAD, PARTIAL and FULL."""
        full = int((self.full[..., 1] - self.full[..., 0]).sum())
        live = int(self.work.sum())
        used = int(self._used.diff().sum()) * self.num_kv_heads * self.num_tiles
        return {DEAD: used - live, PARTIAL: live - full, FULL: full}

    @property
    def share_read(self) -> float | None:
        """The part of the blocks in use that is read, from 0 to 1; None if no block is in use."""
        counts = self.counts
        used = sum(counts.values())
        return (counts[FULL] + counts[PARTIAL]) / used if used else None

    @property
    def work(self) -> torch.Tensor:
        """How many blocks each item reads, int64 [items]."""
        return (self.live[..., 1] - self.live[..., 0]).sum(1)

    @cached_property
    def starts(self) -> torch.Tensor:
        """The first slot of each sequence, int64 [B]."""
        return torch.zeros_like(self.kv_lens) if self.kv_starts is None else self.kv_starts

    @cached_property
    def _used(self) -> torch.Tensor:
        """The half-open range of blocks that each sequence uses, int64 [B, 2]."""
        ends = -(-self.kv_lens // self.block_n)
        return torch.stack([(self.starts // self.block_n).where(self.starts < self.kv_lens, ends), ends], -1)

    def sequence(self, item: int) -> int:
        """The sequence of an item."""
        return item // (self.num_kv_heads * self.num_tiles)

    def keys_read(self, shared: bool = False) -> int:
        """The number of distinct (KV head, key) pairs that are read. Tiles of one KV head may read the same keys.

        Args:
            shared: all sequences have one cache (its batch is 1).
        """
        repeats = self.num_kv_heads * self.num_tiles
        starts, lens = (x.repeat_interleave(repeats)[:, None, None] for x in (self.starts, self.kv_lens))
        keys = (self.live * self.block_n).maximum(starts).minimum(lens)
        keys = keys.reshape(len(self.kv_lens), self.num_kv_heads, -1, 2)
        if shared:
            keys = keys.transpose(0, 1).flatten(1, 2)
        return int(_disjoint(keys).diff().sum())

    def blocks(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        """The state of each block of an item, and the split that reads it, or -1; both int64 [num_blocks]."""
        states = torch.full((self.num_blocks,), UNUSED, device="cpu")
        states[slice(*self._used[self.sequence(item)].tolist())] = DEAD
        for ranges, state in ((self.live, PARTIAL), (self.full, FULL)):
            for start, end in ranges[item].tolist():
                states[start:end] = state
        work = torch.cat([(states == FULL).nonzero()[:, 0], (states == PARTIAL).nonzero()[:, 0]])
        splits = torch.full_like(states, -1)
        splits[work] = self._programs(item, len(work))
        return states, splits

    @cached_property
    def work_of_programs(self) -> torch.Tensor:
        """How many blocks each program visits, int64."""
        if not self.balanced:
            return _shares(self.work[:, None], self.num_splits).flatten()
        programs = [self._programs(item, int(work)) for item, work in enumerate(self.work)]
        return torch.bincount(torch.cat(programs), minlength=self.num_splits)

    @cached_property
    def _units(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The units of each item in the line of `templates/balanced.py`, and the worker of each unit.

        An item has as many units as the largest item of its sequence has blocks; none if it has no query token.
        """
        weights = self.work.view(len(self.kv_lens), -1).amax(1).maximum((self.kv_lens > self.starts).long())
        weights = weights.repeat_interleave(self.num_kv_heads * self.num_tiles) * self.in_use
        return weights, _share_out(weights.sum(), self.num_splits)

    def _programs(self, item: int, work: int) -> torch.Tensor:
        """The program that visits each block of an item: its number in the item, or among all programs if balanced.

        The kernel estimates the units from fewer rows, and counts overlapping intervals twice. So the workers of a
        balanced schedule are approximate if heads or tokens differ, or if intervals overlap.
        """
        if not self.balanced:
            return _share_out(torch.tensor(work, device="cpu"), self.num_splits)
        weights, workers = self._units
        start, weight = int(weights[:item].sum()), int(weights[item])
        ends = torch.arange(weight + 1, device="cpu") * work // max(weight, 1)
        return workers[start : start + weight].repeat_interleave(ends.diff())


def _shares(work: torch.Tensor, num_programs: int) -> torch.Tensor:
    """Equal shares of work [..., 1], int64 [..., num_programs]. The first programs take one more if some is left."""
    return work // num_programs + (torch.arange(num_programs, device="cpu") < work % num_programs)


def _share_out(work: torch.Tensor, num_programs: int) -> torch.Tensor:
    """The program that takes each piece of work (0-d), int64 [work]."""
    return torch.arange(num_programs, device="cpu").repeat_interleave(_shares(work, num_programs))


def find_step(
    proven: ProvenMods,
    mods: tuple[Mod, Mod],
    kv_lens: torch.Tensor,
    first_token: torch.Tensor,
    num_tokens: torch.Tensor,
    signature: Signature,
    sizes: Sizes,
    schedule: Schedule,
    kv_starts: torch.Tensor | None = None,
    kv_offset: torch.Tensor | None = None,
) -> Step | str:
    """Evaluates the bounds of a call on the device of `kv_lens`.

    Args:
        proven: of the call.
        mods: captures of the score_mod and the mask_mod.
        kv_lens: keys in use, int64 [B], within the cache.
        first_token: position of the first query token, int64 [B].
        num_tokens: query tokens, int64 [B]; rows of later ones have the position of the last one.
        signature: of the call.
        sizes: of the call.
        schedule: of the call.
        kv_starts: first live slots, int64 [B], from 0 to `kv_lens`.
        kv_offset: positions of slot 0, int64 [B].

    Returns:
        The step. If a bound needs a captured tensor without values (meta device), the name of that tensor.
    """
    device, tiles, block_n = kv_lens.device, schedule.tiles, schedule.tiles.block_n
    group = signature.group_size
    num_rows = group * sizes.num_queries
    num_tiles = -(-num_rows // tiles.block_m)
    rows = torch.arange(num_tiles * tiles.block_m, device=device).clamp(max=num_rows - 1)
    heads = torch.arange(sizes.num_kv_heads, device=device)[:, None] * group
    shape = (sizes.batch, sizes.num_kv_heads, num_tiles, tiles.block_m)
    token = (rows // group).minimum(num_tokens.clamp(min=1)[:, None] - 1)
    indices = {
        "b": torch.arange(sizes.batch, device=device).view(-1, 1, 1, 1),
        "h": (heads + rows % group).view(1, *shape[1:]),
        "q_idx": (first_token[:, None] + token).view(shape[0], 1, *shape[2:]),
    }
    bounds = proven.bounds
    below, above = (torch.tensor(far, device=device) for far in (-FAR, FAR))
    intervals = []
    for graph, mod, region in (
        (proven.score, mods[0], bounds.score_live),
        (proven.mask, mods[1], bounds.mask_live),
        (proven.mask, mods[1], bounds.mask_full),
    ):
        leaves = _in_memory(graph, mod, region, device)
        if isinstance(leaves, str):
            return leaves
        nodes = list(dict.fromkeys(nodes_of(region)))
        found = [] if graph is None else evaluate(nodes, graph, leaves, indices)
        known: dict[Node | None, torch.Tensor] = dict(zip(nodes, found, strict=True))
        pairs = [(known.get(lo, below), known.get(hi, above)) for lo, hi in region]
        pairs += [(above, below)] * (MAX_INTERVALS - len(region))
        intervals.append([torch.stack([x.long().expand(shape) for x in ends], -1) for ends in zip(*pairs, strict=True)])
    (score_lo, score_hi), *of_mask = intervals
    # If there is a mask, the score has at most one interval.
    (lo, hi), (full_lo, full_hi) = (
        (score_lo, score_hi)
        if region == EVERYWHERE
        else (starts.maximum(score_lo[..., :1]), ends.minimum(score_hi[..., :1]))
        for region, (starts, ends) in zip((bounds.mask_live, bounds.mask_full), of_mask, strict=True)
    )
    shift = 0 if kv_offset is None else kv_offset.view(-1, 1, 1, 1, 1)
    starts, lens = (x.view(-1, 1, 1, 1, 1) for x in (kv_lens * 0 if kv_starts is None else kv_starts, kv_lens))
    in_use = (rows[:: tiles.block_m] < group * num_tokens[:, None])[:, None].expand(shape[:3])
    live = _disjoint(_live_blocks(lo - shift, hi - shift, starts, lens, block_n)) * in_use[..., None, None]
    full = _full_parts(live, _full_blocks(full_lo - shift, full_hi - shift, starts, lens, block_n))
    return Step(
        block_n, schedule.num_splits, sizes.num_kv_heads, num_tiles, kv_lens.cpu(), live.flatten(0, 2).cpu(),
        full.flatten(0, 2).cpu(), in_use.flatten().cpu(), tiles.balanced,
        None if kv_starts is None else kv_starts.cpu(), kv_offset is not None,
    )  # fmt: skip


def _in_memory(graph: Graph | None, mod: Mod, region: Region, device: torch.device) -> list | str:
    """The captures of a mod, with those that a region needs on `device`; or the name of one that has no values."""
    leaves = list(mod.leaves)
    if graph is None or mod.function is None:
        return leaves
    nodes = topological(*nodes_of(region))
    needed = {graph.tensors[node.attr] for node in nodes if node.op == "load"}
    needed |= {graph.numbers[node.attr].leaf for node in nodes if node.op == "number" and not node.weak}
    for leaf in needed:
        if leaf >= 0 and leaves[leaf].is_meta:
            return names_of(mod)[leaf]
        if leaf >= 0:
            leaves[leaf] = leaves[leaf].to(device)
    return leaves


def _live_blocks(
    lo: torch.Tensor, hi: torch.Tensor, starts: torch.Tensor, lens: torch.Tensor, block_n: int
) -> torch.Tensor:
    """The blocks that meet [lo, hi) in any row of a tile; (0, 0) if none does.

    Bounds are int64 [B, Hkv, tiles, rows, intervals], ranges of blocks int64 [B, Hkv, tiles, intervals, 2].
    """
    lo, hi = lo.maximum(starts).clamp(max=_MAX_SLOT), hi.minimum(lens)
    met = lo < hi
    lo, hi = lo.where(met, _MAX_SLOT).amin(-2), hi.where(met, 0).amax(-2)
    return torch.stack([lo.where(lo < hi, 0) // block_n, -(-hi // block_n)], -1)


def _full_blocks(
    lo: torch.Tensor, hi: torch.Tensor, starts: torch.Tensor, lens: torch.Tensor, block_n: int
) -> torch.Tensor:
    """The blocks that lie inside [lo, hi) in every row of a tile; shapes as in `_live_blocks`."""
    lo, hi = lo.maximum(starts).clamp(max=_MAX_SLOT).amax(-2), hi.minimum(lens).clamp(min=0).amin(-2)
    return torch.stack([-(-lo // block_n), hi // block_n], -1)


def _disjoint(ranges: torch.Tensor) -> torch.Tensor:
    """Sorts half-open ranges [..., ranges, 2] and removes overlaps; the numbers in them stay the same."""
    starts, order = ranges[..., 0].sort(-1)
    ends = ranges[..., 1].gather(-1, order).cummax(-1).values
    starts[..., 1:] = starts[..., 1:].maximum(ends[..., :-1])
    return torch.stack([starts, ends.maximum(starts)], -1)


def _full_parts(live: torch.Tensor, full: torch.Tensor) -> torch.Tensor:
    """The longest piece that one of the full ranges has inside each live range; empty if there is none."""
    start, end = live[..., None, :].unbind(-1)
    start, end = full[..., None, :, 0].maximum(start), full[..., None, :, 1].minimum(end)
    longest = (end - start).argmax(-1, keepdim=True)
    start, end = (x.gather(-1, longest)[..., 0] for x in (start, end))
    return torch.stack([start, end], -1).where((start < end)[..., None], live[..., :1])
