"""Warns of captured tensors that have too few entries for the query heads or the sequences of a call."""

from __future__ import annotations

from ..analysis.proofs import DirectRead, direct_reads
from ..errors import warn_user
from ..frontend.graph import Graph
from .identity import Mod, names_of


class ShortTables:
    """The reads of a prepared call that are as long as its heads or sequences, and of which it has warned."""

    def __init__(self, graphs: tuple[Graph | None, Graph | None]) -> None:
        self.reads = [() if graph is None else direct_reads(graph) for graph in graphs]
        self.told: set[tuple[str, DirectRead]] = set()

    def warn(self, mods: tuple[Mod, Mod], num_q_heads: int, batch: int) -> None:
        """Warns once of each captured tensor that is indexed by `h` or `b` beyond its end.

        Args:
            mods: the score_mod and the mask_mod as they are now.
            num_q_heads: query heads of the call.
            batch: its sequences.
        """
        for kind, mod, reads in zip(("score_mod", "mask_mod"), mods, self.reads, strict=True):
            for read in reads:
                size = mod.leaves[read.leaf].shape[read.dim]
                last = (num_q_heads if read.by == "h" else batch) - 1
                if size <= last and (kind, read) not in self.told:
                    self.told.add((kind, read))
                    name = names_of(mod)[read.leaf].partition(" (in ")[0]
                    warn_user(_text(kind, name, read, size, last))


def _text(kind: str, name: str, read: DirectRead, size: int, last: int) -> str:
    entries = f"{size} {'entry' if size == 1 else 'entries'}"
    return (
        f"{kind}: `{name}` has {entries} in dimension {read.dim}, which is indexed by `{read.by}` from 0 to {last}; "
        "reads out of range give 0. Make it longer, or guard the read with torch.where."
    )
