"""What the hooks of a kernel are written from."""

from __future__ import annotations

from dataclasses import dataclass
from enum import IntEnum
from functools import cached_property

from ..frontend.graph import Graph
from .analyze import analyze_graph
from .bounds import Bounds, find_bounds
from .proofs import Checks


class Listed(IntEnum):
    """Whether the lists of a BlockMask say which blocks a call visits.

    `ALONE`: its full blocks need no mask. `WITH_MASK`: there is a mask_mod as well, so no block is known to be full.
    """

    NO = 0
    ALONE = 1
    WITH_MASK = 2


@dataclass(frozen=True)
class ProvenMods:
    """The mods of a call, and what is proven of them.

    Attributes:
        score, mask: graphs of the two mods.
        q_idx_given: the caller gives q_offset, so that q_idx may be any int64.
        score_checks, mask_checks: what their loads have to check; None if nothing is known of the call.
        listed: whether the lists of a BlockMask say which blocks are visited.
        shifted: the caller gives kv_offset, so that positions may be negative.
    """

    score: Graph | None = None
    mask: Graph | None = None
    q_idx_given: bool = False
    score_checks: Checks | None = None
    mask_checks: Checks | None = None
    listed: Listed = Listed.NO
    shifted: bool = False

    @property
    def block_lists(self) -> bool:
        """Whether lists say which blocks are visited."""
        return self.listed is not Listed.NO

    @cached_property
    def bounds(self) -> Bounds:
        """Where the call can attend."""
        return find_bounds(self.score, self.mask, self.q_idx_given, self.shifted)

    @property
    def num_full(self) -> int:
        """The number of intervals in which a kernel leaves the mask out; lists count as one."""
        return int(self.listed is Listed.ALONE) if self.block_lists else self.bounds.num_full

    @cached_property
    def fetches(self) -> bool:
        """Whether the score_mod reads captured tensors for every key."""
        if self.score is None:
            return False
        analysis = analyze_graph(self.score, self.q_idx_given, self.shifted)
        return any(node.op == "load" for node in analysis.on_kv - analysis.on_score)

    @cached_property
    def text(self) -> str:
        """Canonical text: equal texts make equal modules."""
        graphs = [graph.text if graph else "None" for graph in (self.score, self.mask)]
        given = f"q_offset {self.q_idx_given}, kv_offset {self.shifted}, block lists {self.block_lists}"
        return "\n".join([given, *graphs, f"{self.score_checks}", f"{self.mask_checks}"])
