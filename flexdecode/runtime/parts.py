"""Which parts of the cache the torch backend reads: where the mask of a call can be true, from its solved bounds."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from ..analysis.bounds import Bounds, nodes_of
from ..analysis.intervals import EVERYWHERE, Region
from ..codegen.arguments import Call
from ..frontend.graph import Graph
from .evaluation import evaluate

MIN_WHOLE = 256  # keys; a shorter part without a mask is not worth a step of its own
_FAR = 1 << 40  # beyond every position


Numbers = int | torch.Tensor  # one for each row, or one for all rows


def spread(numbers: Numbers, dims: int) -> Numbers:
    """Numbers of R rows as [R, 1, ...] of some dimensions; a number for all stays one."""
    return numbers if isinstance(numbers, int) else numbers.view(-1, *[1] * (dims - 1))


class Part(NamedTuple):
    """Slots from `start` to `end`. In a `whole` part, every row attends to every key."""

    start: int
    end: int
    whole: bool


class Rows(NamedTuple):
    """Rows of query tokens, as tensors that broadcast to [R, Hq, W], or numbers for all rows.

    Attributes:
        live: which tokens there are; None if all.
        starts, lens: slots before the first key, and up to the last one.
        shift: position of slot 0.
        indices: `b`, `h` and `q_idx`, with one dimension more.
    """

    live: torch.Tensor | None
    starts: Numbers
    lens: Numbers
    shift: Numbers
    indices: dict[str, torch.Tensor]


def find_parts(call: Call, graphs: tuple[Graph | None, Graph | None], bounds: Bounds, rows: Rows) -> list[Part]:
    """Finds the parts of the cache in which a call can attend, in ascending order.

    It reads the tensors, so they are on the CPU.

    Args:
        call: checked.
        graphs: of the score_mod and the mask_mod.
        bounds: of these.
        rows: of the call.
    """
    score, mask = zip(graphs, (call.score_leaves, call.mask_leaves), strict=True)
    of_mask = _ends(mask, bounds.mask_live + bounds.mask_full, rows)
    of_both, of_full = of_mask[: len(bounds.mask_live)], of_mask[len(bounds.mask_live) :]
    if bounds.score_live != EVERYWHERE:
        of_score = _ends(score, bounds.score_live, rows)
        if len(of_score) == 1:  # beside a mask, `Bounds` joins the intervals of a score into one
            ((low, high),) = of_score
            of_both = [(_later(lo, low), _earlier(hi, high)) for lo, hi in of_both]
        elif bounds.mask_live == EVERYWHERE:
            of_both = of_score
    live = sorted(part for lo, hi in of_both if (part := _around(lo, hi, rows.live)))
    whole = [_inside(lo, hi, rows.live) for lo, hi in of_full]
    whole = sorted((start, end) for start, end in whole if end - start >= MIN_WHOLE)
    return list(_cut(_joined(live), _joined(whole)))


def _ends(mod: tuple[Graph | None, list], region: Region, rows: Rows) -> list[tuple[Numbers, Numbers]]:
    """The slots of each interval, within the sequences: two numbers, or int64 tensors that broadcast to [R, Hq, W]."""
    graph, leaves = mod
    nodes = list(dict.fromkeys(nodes_of(region)))
    found = [] if graph is None else evaluate(nodes, graph, leaves, rows.indices)
    slots = {
        node: (x[..., 0] if x.dim() else x).long().clamp(-_FAR, _FAR) - rows.shift
        for node, x in zip(nodes, found, strict=True)
    }
    return [
        (
            rows.starts if lo is None else _later(slots[lo], rows.starts),
            rows.lens if hi is None else _earlier(slots[hi], rows.lens),
        )
        for lo, hi in region
    ]


def _later(a: Numbers, b: Numbers) -> Numbers:
    if isinstance(a, int):
        return max(a, b) if isinstance(b, int) else b.clamp(min=a)
    return a.clamp(min=b)


def _earlier(a: Numbers, b: Numbers) -> Numbers:
    if isinstance(a, int):
        return min(a, b) if isinstance(b, int) else b.clamp(max=a)
    return a.clamp(max=b)


def _around(lo: Numbers, hi: Numbers, live: torch.Tensor | None) -> tuple[int, int] | None:
    """The slots from the first to the last one that any live row has in [lo, hi); None if there is none."""
    if live is None and isinstance(lo, int) and isinstance(hi, int):
        return (lo, hi) if lo < hi else None
    lo, hi = torch.as_tensor(lo, device="cpu"), torch.as_tensor(hi, device="cpu")
    met = lo < hi if live is None else live & (lo < hi)
    start, end = int(torch.where(met, lo, _FAR).min()), int(torch.where(met, hi, -_FAR).max())
    return (start, end) if start < end else None


def _inside(lo: Numbers, hi: Numbers, live: torch.Tensor | None) -> tuple[int, int]:
    """The slots that every row has in [lo, hi): none if a row is not live."""
    if live is not None and not live.all():
        return 0, 0
    return lo if isinstance(lo, int) else int(lo.max()), hi if isinstance(hi, int) else int(hi.min())


def _joined(ranges: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Sorted ranges without overlaps."""
    joined: list[tuple[int, int]] = []
    for start, end in ranges:
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(end, joined[-1][1])
        else:
            joined.append((start, end))
    return joined


def _cut(live: list[tuple[int, int]], whole: list[tuple[int, int]]) -> Iterator[Part]:
    """The live ranges, cut where a whole range begins or ends."""
    for start, end in live:
        for first, last in whole:
            first, last = max(first, start), min(last, end)
            if first < last:
                if start < first:
                    yield Part(start, first, False)
                yield Part(first, last, True)
                start = last
        if start < end:
            yield Part(start, end, False)
