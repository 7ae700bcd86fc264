"""Proves which indices into captured tensors are in range, from what the host knows when a call is prepared.

The host knows the sizes of the call and of the captured tensors, and the captured numbers from which an index is
computed. They are part of what identifies a prepared call. A kernel depends only on the result: which indices it
checks.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from ..frontend.build import make, remake
from ..frontend.graph import Graph, Node, Source, const, loops_around, rewrite, topological
from ..frontend.ops import INT_LIMITS
from ..frontend.ranges import IntRange
from ..memos import Bounded
from .analyze import (
    MAX_KV_LEN,
    MAX_KV_OFFSET,
    MAX_QUERIES,
    Analysis,
    Rule,
    analyze,
    analyze_graph,
    find_ranges,
    rules_of,
)
from .intervals import at_most, find_extent


class IndexCheck(NamedTuple):
    """What a load checks of one index. What it does not check is proven."""

    below: bool  # may be negative: counts from the end
    outside: bool  # may lie outside the tensor, which then reads as 0


class LoadCheck(NamedTuple):
    """What a load checks.

    Attributes:
        indices: the check of each index.
        attending: the indices are in range wherever the mask is true, so the mask serves as the check.
    """

    indices: tuple[IndexCheck, ...]
    attending: bool = False


Checks = tuple[LoadCheck, ...]  # for the loads of a graph, in the order of `Graph.nodes()`


class CallSizes(NamedTuple):
    """Sizes of a call that bound its indices: sequences, query heads, keys, and whether there is one query token.

    `shifted`: the caller gives kv_offset, so that sizes do not bound positions.
    """

    batch: int
    num_q_heads: int
    one_token: bool
    max_kv_len: int
    shifted: bool = False


def proof_sources(graph: Graph) -> tuple[Source, ...]:
    """What the proofs of a graph use: sizes of its tensors, and captured numbers from which indices are computed."""
    found: dict[Source, None] = {}
    for node in graph.nodes():
        if node.op == "load" and node.args:
            leaf = graph.tensors[node.attr]
            sizes = [Source(leaf, dim) for dim in range(len(node.args))] if leaf >= 0 else []
            numbers = [graph.numbers[n.attr] for n in topological(*node.args) if _is_integer(n)]
            found |= dict.fromkeys([*sizes, *numbers])
    return tuple(found)


class DirectRead(NamedTuple):
    """A dimension `dim` of captured tensor `leaf` that is indexed by `h` or `b` itself, without a guard."""

    leaf: int
    dim: int
    by: str


_GUARDS = ("where", "logical_and", "logical_or")  # what may throw away a value that was read out of range


def direct_reads(graph: Graph) -> tuple[DirectRead, ...]:
    """The dimensions of captured tensors that a graph indexes by `h` or `b` itself, and reads for every pair."""
    reads = [
        DirectRead(graph.tensors[node.attr], dim, index.attr)
        for node in topological(graph.output, within=lambda node: node.op not in _GUARDS)
        if node.op == "load" and graph.tensors[node.attr] >= 0
        for dim, index in enumerate(node.args)
        if index.op == "index" and index.attr in ("h", "b")
    ]
    return tuple(dict.fromkeys(reads))


def captured_integers(graph: Graph) -> tuple[Source, ...]:
    """The captured integers of a graph."""
    return tuple(graph.numbers[n.attr] for n in graph.nodes() if _is_integer(n))


def _is_integer(node: Node) -> bool:
    return node.op == "number" and not node.dtype.is_floating_point


def unproven(load: Node, analysis: Analysis) -> LoadCheck:
    """The checks of a load if nothing is known of the call."""
    return LoadCheck(tuple(IndexCheck(analysis.ranges[index][0] < 0, True) for index in load.args))


def find_checks(
    graph: Graph, leaves: list, sizes: CallSizes, q_idx_given: bool, mask: tuple[Graph, list] | None = None
) -> Checks:
    """Finds what each load of a graph has to check in a call.

    Args:
        graph: a traced mod.
        leaves: its captures.
        sizes: of the call.
        q_idx_given: whether q_idx may be any int64.
        mask: for a score_mod, the graph and the captures of the mask.
    """
    loads = _loads_of(graph)
    if not loads.below:
        return tuple(LoadCheck(()) for _ in loads.all)
    known = _index_ranges(loads.below, sizes, q_idx_given)
    known |= {node: (value, value) for node, value in _numbers(loads.below, graph, leaves).items()}
    ranges = find_ranges(loads.rules, known)
    checks = []
    for load in loads.all:
        leaf = graph.tensors[load.attr]
        shape = (leaves[leaf] if leaf >= 0 else graph.frozen[-1 - leaf]).shape
        found = LoadCheck(tuple([_check(ranges[i], size) for i, size in zip(load.args, shape, strict=True)]))
        if mask is not None and load in loads.in_loop:
            outside = tuple((i, n) for i, n, c in zip(load.args, shape, found.indices, strict=True) if c.outside)
            if outside and _attend_inside(outside, (graph, leaves), mask, sizes, q_idx_given):
                # Where the mask is true, an index without another proof is neither negative nor too large.
                found = LoadCheck(tuple(IndexCheck(i.below and not i.outside, False) for i in found.indices), True)
        checks.append(found)
    return tuple(checks)


def _check(index: IntRange, size: int) -> IndexCheck:
    low, high = index
    return IndexCheck(low < 0, not (-size <= low and high < size))


class _Loads(NamedTuple):
    """The loads of a graph.

    Attributes:
        all: in the order of `Graph.nodes()`.
        in_loop: those that depend on kv_idx but not on the score, and that are in no loop of the mod.
        below: the nodes from which their indices are computed, operands first.
        rules: how the ranges of these nodes are found.
    """

    all: tuple[Node, ...]
    in_loop: frozenset[Node]
    below: tuple[Node, ...]
    rules: list[tuple[Node, Rule]]


def depends_on_length(graph: Graph) -> bool:
    """Whether the checks of a graph may change with the longest sequence alone."""
    return any(node.op == "index" and node.attr in ("kv_idx", "q_idx") for node in _loads_of(graph).below)


_known_loads = Bounded.memo(limit=1024)  # text of a graph -> its `_Loads`


def _loads_of(graph: Graph) -> _Loads:
    found = _known_loads.get(graph.text)
    if found is None:
        analysis = analyze_graph(graph, q_idx_given=True)
        loops = loops_around(analysis.nodes)
        loads = tuple(node for node in analysis.nodes if node.op == "load")
        in_loop = frozenset(load for load in loads if load in analysis.on_kv - analysis.on_score and not loops[load])
        below = tuple(topological(*(index for load in loads for index in load.args)))
        found = _Loads(loads, in_loop, below, rules_of(below))
        _known_loads.add(graph.text, found)
    return found


def _index_ranges(nodes: Iterable[Node], sizes: CallSizes, q_idx_given: bool) -> dict[Node, IntRange]:
    """The ranges that the indices among `nodes` have in a call."""
    first, last = 0, max(0, sizes.max_kv_len - 1)  # a range must not be empty
    if sizes.shifted:
        first, last = first - MAX_KV_OFFSET, last + MAX_KV_OFFSET
    ranges = {
        "b": (0, max(0, sizes.batch - 1)), "h": (0, max(0, sizes.num_q_heads - 1)), "kv_idx": (first, last),
        "q_idx": INT_LIMITS[torch.int64] if q_idx_given else (first - (1 if sizes.one_token else MAX_QUERIES), last),
    }  # fmt: skip
    return {node: ranges[node.attr] for node in nodes if node.op == "index"}


def _numbers(nodes: Iterable[Node], graph: Graph, leaves: list) -> dict[Node, int]:
    """The values of the captured integers among some nodes of a graph."""
    values = {node: known_value(graph.numbers[node.attr], leaves) for node in nodes if _is_integer(node)}
    return {node: int(value) for node, value in values.items() if value is not None}


def known_value(source: Source, leaves: list) -> int | float | None:
    """The value of a captured number; None on the meta device."""
    return None if source.dim < 0 and getattr(leaves[source.leaf], "is_meta", False) else source.read(leaves)


# The results of proofs by a mask: the greatest max_kv_len with a proof, and the smallest one without. The key is
# everything else that a proof depends on.
_reaches = Bounded.memo(limit=1024)
_UNTRIED = -1, MAX_KV_LEN + 1


_Indices = tuple[tuple[Node, int], ...]  # indices, each with the size of its dimension


def _attend_inside(
    indices: _Indices, score: tuple[Graph, list], mask: tuple[Graph, list], sizes: CallSizes, q_idx_given: bool
) -> bool:
    """Whether some indices of a score_mod are in range and not negative wherever the mask is true.

    A proof also holds for shorter sequences, so the results for other lengths are remembered.
    """
    numbers = [_numbers(graph.nodes(), graph, leaves) for graph, leaves in (score, mask)]
    values = [tuple([(node.attr, value) for node, value in known.items()]) for known in numbers]
    key = score[0].text, indices, mask[0].text, *values, *sizes[:3], sizes.shifted, q_idx_given

    def proves(max_kv_len: int) -> bool:
        try:
            bad_pairs = _attending_outside(indices, mask[0].output, *numbers)
        except (ArithmeticError, ValueError):  # PyTorch's arithmetic refuses these captured integers
            return False
        return _is_never(bad_pairs, sizes._replace(max_kv_len=max_kv_len), q_idx_given)

    length = sizes.max_kv_len
    proven, unproven = reach = _reaches.get(key, _UNTRIED)
    if not proven < length < unproven:
        return length <= proven
    further = 1 << max(length - 1, 0).bit_length()
    if reach != _UNTRIED and further < unproven and proves(further):  # this is the second length, so more will follow
        proven = further
    elif proves(length):
        proven = length
    else:
        unproven = length
    _reaches.add(key, (proven, unproven))
    return length <= proven


def _is_never(mask: Node, sizes: CallSizes, q_idx_given: bool) -> bool:
    """Whether the live intervals of a mask show that it is false for every pair of a call."""
    known = _index_ranges(topological(mask), sizes, q_idx_given)
    live = find_extent(mask, analyze([mask], q_idx_given, known, sizes.shifted)).live
    return all(lo is not None and hi is not None and at_most(hi, lo) for lo, hi in live)


def _attending_outside(
    indices: _Indices, attends: Node, score_numbers: Mapping[Node, int], mask_numbers: Mapping[Node, int]
) -> Node:
    """A mask that is true for pairs that attend although one of the indices is out of range or negative."""
    outside = const(False, torch.bool)
    for index, size in indices:
        index = _with_constants(index, score_numbers, "score")
        beyond = make("logical_or", make("lt", index, const(0)), make("le", const(size), index))
        outside = make("logical_or", outside, beyond)
    return make("logical_and", _with_constants(attends, mask_numbers, "mask"), outside)


def _with_constants(output: Node, numbers: Mapping[Node, int], kind: str) -> Node:
    """A value with its captured integers filled in. `kind` marks its other captures, because the two mods differ."""

    def visit(node: Node, args: tuple[Node, ...]) -> Node:
        if node in numbers:
            return Node("const", (), node.dtype, numbers[node], node.weak)
        if node.op in ("load", "number"):
            return Node(node.op, args, node.dtype, (kind, node.attr), node.weak)
        return remake(node, args)

    return rewrite(output, visit)
