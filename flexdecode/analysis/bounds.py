"""The KV bounds of a call: the intervals of its mask and of its score, joined for one kernel."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from ..frontend.graph import Graph, Node, topological
from ..memos import Bounded
from .analyze import analyze_graph
from .intervals import EVERYWHERE, Interval, Region, find_extent


@dataclass(frozen=True)
class Bounds:
    """Where a call can attend. The length of the sequence is not considered.

    Attributes:
        mask_live: intervals of the mask, in nodes of its graph.
        mask_full: intervals in which the mask is true everywhere.
        score_live: intervals of the score, in nodes of its graph; at most one if there is a mask.
    """

    mask_live: Region = EVERYWHERE
    mask_full: Region = EVERYWHERE
    score_live: Region = EVERYWHERE

    @cached_property
    def _walked(self) -> Region:
        return self.score_live if self.mask_live == EVERYWHERE else self.mask_live

    @property
    def is_everywhere(self) -> bool:
        """Whether no key is left out."""
        return self._walked == EVERYWHERE

    @cached_property
    def is_bounded(self) -> bool:
        """Whether few keys of a long cache may be live: no interval grows with the position of the query."""
        return all(hi is not None and (lo is not None or _is_fixed(hi)) for lo, hi in self._walked)

    @cached_property
    def differ(self) -> bool:
        """Whether sequences may have other bounds, although they are as long and have as many query tokens."""
        nodes = [node for bound in nodes_of(self._walked) for node in topological(bound)]
        return any((node.op, node.attr) == ("index", "b") for node in nodes)

    @cached_property
    def num_live(self) -> int:
        """The number of intervals that a kernel walks over."""
        return max(1, len(self._walked))

    @property
    def num_full(self) -> int:
        """The number of intervals in which no mask is needed and every key is within the walked ones."""
        return len(self.score_live if self.mask_full == EVERYWHERE else self.mask_full)


_known = Bounded.memo(limit=1024)  # (texts of both graphs, q_idx_given, shifted) -> bounds


def find_bounds(score: Graph | None, mask: Graph | None, q_idx_given: bool, shifted: bool = False) -> Bounds:
    """Finds where a call can attend. It does so once for graphs with the same texts.

    Args:
        score: graph of the score_mod.
        mask: graph of the mask_mod.
        q_idx_given: the caller gives q_offset, so that q_idx may be any int64.
        shifted: the caller gives kv_offset, so that positions may be negative.
    """
    key = score and score.text, mask and mask.text, q_idx_given, shifted
    found = _known.get(key)
    if found is None:
        found = _solve(score, mask, q_idx_given, shifted)
        _known.add(key, found)
    return found


def _solve(score: Graph | None, mask: Graph | None, q_idx_given: bool, shifted: bool) -> Bounds:
    mask_live = mask_full = score_live = EVERYWHERE
    if mask is not None:
        extent = find_extent(mask.output, analyze_graph(mask, q_idx_given, shifted))
        mask_live, mask_full = extent.live, extent.full
    if score is not None:
        score_live = find_extent(score.output, analyze_graph(score, q_idx_given, shifted)).live
        if len(score_live) > 1 and mask is not None:
            score_live = (_common_ends(score_live),)
    return Bounds(mask_live, mask_full, score_live)


def _is_fixed(bound: Node) -> bool:
    """Whether an upper bound does not grow with the position of the query. The solver's far constants do not count."""
    found: dict[Node, bool] = {}
    for node in topological(bound):
        parts = [found[a] for a in node.args]
        if node.op == "const":
            found[node] = node.attr < 1 << 31
        elif node.op == "minimum":
            found[node] = any(parts)
        else:
            found[node] = (node.op, node.attr) != ("index", "q_idx") and all(parts)
    return found[bound]


def _common_ends(region: Region) -> Interval:
    """One interval around all intervals. It has a bound only if all of them share it."""
    los, his = {i.lo for i in region}, {i.hi for i in region}
    return Interval(los.pop() if len(los) == 1 else None, his.pop() if len(his) == 1 else None)


def nodes_of(region: Region) -> list[Node]:
    """The bounds in a region."""
    return [bound for interval in region for bound in interval if bound is not None]
