"""The blocks of a KV cache that one decode step reads, found on the host as the kernel finds them on the device.

An item is one tile of query rows of one KV head of one sequence. Its work is its proven-full blocks, then its partial
ones, each in ascending order, cut into shares (templates/decode.py has the same steps).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from .bounds import nodes_of
from .captures import leaf_names
from .eager import evaluate
from .graph import Graph, Node, topological
from .identity import Mod
from .inputs import Sizes
from .intervals import FAR, MAX_INTERVALS, Region
from .program import Program
from .schedule import Schedule
from .signature import Signature

UNUSED, DEAD, PARTIAL, FULL = range(4)  # of a block: past the sequence, masked out, mask evaluated, mask not needed

_MAX_POSITION = 1 << 30
_Range = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True)
class Step:
    """The blocks of one decode step.

    Attributes:
        block_n: keys in a block.
        num_splits: programs per item; balanced, workers for each row tile.
        num_kv_heads: KV heads.
        num_tiles: tiles of query rows per KV head.
        kv_lens: keys in use, int64 [B].
        live: disjoint ascending half-open ranges of blocks that are read, int64 [items, 4, 2]; items are numbered by
            sequence, then KV head, then tile.
        full: the proven-full part of each range, int64 [items, 4, 2].
        balanced: whether all items are shared out in equal runs.
    """

    block_n: int
    num_splits: int
    num_kv_heads: int
    num_tiles: int
    kv_lens: torch.Tensor
    live: torch.Tensor
    full: torch.Tensor
    balanced: bool = False

    @property
    def num_items(self) -> int:
        """Items in all."""
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
        used = int((-(-self.kv_lens // self.block_n)).sum()) * self.num_kv_heads * self.num_tiles
        return {DEAD: used - live, PARTIAL: live - full, FULL: full}

    @property
    def work(self) -> torch.Tensor:
        """How many blocks each item reads, int64 [items]."""
        return (self.live[..., 1] - self.live[..., 0]).sum(1)

    def sequence(self, item: int) -> int:
        """The sequence of an item."""
        return item // (self.num_kv_heads * self.num_tiles)

    def keys_read(self, shared: bool = False) -> int:
        """Distinct (KV head, key) pairs that are read; tiles of one KV head read the same keys.

        Args:
            shared: all sequences have one cache (its batch is 1).
        """
        lens = self.kv_lens.repeat_interleave(self.num_kv_heads * self.num_tiles)[:, None, None]
        keys = (self.live * self.block_n).minimum(lens).reshape(len(self.kv_lens), self.num_kv_heads, -1, 2)
        if shared:
            keys = keys.transpose(0, 1).flatten(1, 2)
        starts, order = keys[..., 0].sort(-1)
        reached = keys[..., 1].gather(-1, order).cummax(-1).values
        before = torch.cat([torch.zeros_like(reached[..., :1]), reached[..., :-1]], -1)
        return int((reached - starts.maximum(before)).clamp(min=0).sum())

    def blocks(self, item: int) -> tuple[torch.Tensor, torch.Tensor]:
        """State of each block of an item, and the split that reads it or -1; int64 [num_blocks]."""
        states = torch.full((self.num_blocks,), UNUSED, device="cpu")
        states[: -(-int(self.kv_lens[self.sequence(item)]) // self.block_n)] = DEAD
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
            splits = torch.arange(self.num_splits, device="cpu")
            share, extra = self.work[:, None] // self.num_splits, self.work[:, None] % self.num_splits
            return (share + (splits < extra)).flatten()
        programs = [self._programs(item, int(work)) for item, work in enumerate(self.work)]
        return torch.bincount(torch.cat(programs), minlength=self.num_splits * self.num_tiles)

    @cached_property
    def _slots(self) -> tuple[torch.Tensor, torch.Tensor]:
        """First slot of each KV head of each sequence, and its slots, the same for all row tiles.

        They are as many as the largest item of the sequence has blocks.
        """
        weights = self.work.view(len(self.kv_lens), -1).amax(1).maximum((self.kv_lens > 0).long())
        weights = weights.repeat_interleave(self.num_kv_heads)
        return weights.cumsum(0) - weights, weights

    def _programs(self, item: int, work: int) -> torch.Tensor:
        """The program that visits each block of an item: its number among those of the item, or among all if balanced.

        The kernel's weights look at fewer rows than these, so where heads or tokens differ this is approximate.
        """
        if not self.balanced:
            share, extra = divmod(work, self.num_splits)
            sizes = torch.full((self.num_splits,), share, device="cpu")
            sizes[:extra] += 1
            return torch.arange(self.num_splits, device="cpu").repeat_interleave(sizes)
        starts, weights = self._slots
        head, tile = divmod(item, self.num_tiles)
        weight = int(weights[head])
        share, extra = divmod(int(weights.sum()), self.num_splits)  # the first `extra` workers have one slot more
        ends = torch.arange(weight + 1, device="cpu") * work // max(weight, 1)
        slots = int(starts[head]) + torch.arange(weight, device="cpu")
        later = extra + (slots - extra * (share + 1)) // max(share, 1)
        workers = torch.where(slots < extra * (share + 1), slots // (share + 1), later)
        return (workers + tile * self.num_splits).repeat_interleave(ends.diff())


def find_step(
    program: Program,
    mods: tuple[Mod, Mod],
    kv_lens: torch.Tensor,
    first_token: torch.Tensor,
    num_tokens: torch.Tensor,
    signature: Signature,
    sizes: Sizes,
    cut: Schedule,
) -> Step | str:
    """Evaluates the bounds of a call on the device of `kv_lens`.

    Args:
        program: of the call.
        mods: captures of the score_mod and the mask_mod.
        kv_lens: keys in use, int64 [B], within the cache.
        first_token: position of the first query token, int64 [B].
        num_tokens: query tokens, int64 [B]; later ones stand where the last one stands.
        signature: of the call.
        sizes: of the call.
        cut: its schedule.

    Returns:
        The step; or, where a bound needs a captured tensor that has no values (meta device), the name of that tensor.
    """
    device, block_n = kv_lens.device, cut.tiles.block_n
    num_rows = signature.group_size * signature.num_queries
    num_tiles = -(-num_rows // cut.tiles.block_m)
    rows = torch.arange(num_tiles * cut.tiles.block_m, device=device).clamp(max=num_rows - 1)
    heads = torch.arange(sizes.num_kv_heads, device=device)[:, None] * signature.group_size
    shape = (sizes.batch, sizes.num_kv_heads, num_tiles, cut.tiles.block_m)
    token = (rows % signature.num_queries).minimum(num_tokens.clamp(min=1)[:, None] - 1)
    indices = {
        "b": torch.arange(sizes.batch, device=device).view(-1, 1, 1, 1),
        "h": (heads + rows // signature.num_queries).view(1, *shape[1:]),
        "q_idx": (first_token[:, None] + token).view(shape[0], 1, *shape[2:]),
    }
    lens = kv_lens.view(-1, 1, 1, 1)
    regions: list[list[_Range]] = []
    bounds = program.bounds
    for graph, mod, region in (
        (program.score, mods[0], bounds.score_live),
        (program.mask, mods[1], bounds.mask_live),
        (program.mask, mods[1], bounds.mask_full),
    ):
        leaves = _in_memory(graph, mod, region, device)
        if isinstance(leaves, str):
            return leaves
        nodes = list(dict.fromkeys(nodes_of(region)))
        found = [] if graph is None else evaluate(nodes, graph, leaves, indices)
        known: dict[Node | None, torch.Tensor] = dict(zip(nodes, found, strict=True))
        below, above = (torch.tensor(far, device=device) for far in (-FAR, FAR))
        pairs = [(known.get(lo, below), known.get(hi, above)) for lo, hi in region]
        regions.append([(lo.long().expand(shape), hi.long().expand(shape)) for lo, hi in pairs])
    score, mask, full = regions
    # Beside a mask, a score has at most one interval.
    live = [(lo.maximum(score[0][0]), hi.minimum(score[0][1])) for lo, hi in mask] if len(score) == 1 else score
    ranges = _disjoint([_live_blocks(lo, hi, lens, block_n) for lo, hi in live])
    inside = [_full_blocks(lo, hi, lens, block_n) for lo, hi in full]
    pieces = [_full_part(start, end, inside) for start, end in ranges]
    empty = torch.zeros(shape[:3], dtype=torch.int64, device=device)

    def stacked(pairs: list[_Range]) -> torch.Tensor:
        padded = [torch.stack(pair, -1) for pair in [*pairs, *[(empty, empty)] * (MAX_INTERVALS - len(pairs))]]
        return torch.stack(padded, -2).flatten(0, 2).cpu()

    return Step(
        block_n, cut.num_splits, sizes.num_kv_heads, num_tiles, kv_lens.cpu(), stacked(ranges), stacked(pieces),
        cut.tiles.balanced,
    )  # fmt: skip


def _in_memory(graph: Graph | None, mod: Mod, region: Region, device: torch.device) -> list | str:
    """The captures of a mod, those that the bounds of a region need on `device`; the name of one that has no values."""
    leaves = list(mod.leaves)
    if graph is None or mod.function is None:
        return leaves
    nodes = topological(*nodes_of(region))
    needed = {graph.tensors[node.attr] for node in nodes if node.op == "load"}
    needed |= {graph.numbers[node.attr].leaf for node in nodes if node.op == "number" and not node.weak}
    for leaf in needed:
        if leaf >= 0 and leaves[leaf].is_meta:
            return leaf_names(mod.function, mod.followed)[leaf]
        if leaf >= 0:
            leaves[leaf] = leaves[leaf].to(device)
    return leaves


def _live_blocks(lo: torch.Tensor, hi: torch.Tensor, lens: torch.Tensor, block_n: int) -> _Range:
    """The blocks that meet [lo, hi) in any row of a tile; (0, 0) if none does."""
    lo, hi = lo.clamp(0, _MAX_POSITION), hi.minimum(lens)
    met = lo < hi
    lo, hi = lo.where(met, _MAX_POSITION).amin(-1), hi.where(met, 0).amax(-1)
    return lo.where(lo < hi, 0) // block_n, -(-hi // block_n)


def _full_blocks(lo: torch.Tensor, hi: torch.Tensor, lens: torch.Tensor, block_n: int) -> _Range:
    """The blocks that lie inside [lo, hi) in every row of a tile."""
    lo, hi = lo.clamp(0, _MAX_POSITION).amax(-1), hi.minimum(lens).clamp(min=0).amin(-1)
    return -(-lo // block_n), hi // block_n


def _disjoint(ranges: list[_Range]) -> list[_Range]:
    """The same blocks in ranges that ascend and do not overlap."""
    if not ranges:
        return []
    starts, order = torch.stack([start for start, _ in ranges]).sort(0)
    ends = torch.stack([end for _, end in ranges]).gather(0, order)
    result = [(starts[0], ends[0])]
    for start, end in zip(starts[1:], ends[1:], strict=True):
        start = start.maximum(result[-1][1])
        result.append((start, end.maximum(start)))
    return result


def _full_part(start: torch.Tensor, end: torch.Tensor, inside: list[_Range]) -> _Range:
    """The longest piece that one of the full ranges has inside [start, end); empty if there is none."""
    best = start, start
    for lo, hi in inside:
        lo, hi = lo.maximum(start), hi.minimum(end)
        longer = hi - lo > best[1] - best[0]
        best = lo.where(longer, best[0]), hi.where(longer, best[1])
    return best
