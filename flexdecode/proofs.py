"""Which captured indices are in range, from what the host knows when a call is prepared.

Sizes of the call and of the captured tensors, and captured numbers below an index, are values like any other here; they
belong to what identifies a prepared call. A kernel depends only on the outcome: which index it checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .analyze import Facts, analyze
from .build import make, remake
from .graph import Graph, Node, Source, const, rewrite, topological
from .intervals import solve_mask
from .ranges import Interval


class IndexCheck(NamedTuple):
    """What a load does about one index; what it does not check is proven."""

    below: bool  # may be negative: counts from the end
    outside: bool  # may lie outside the tensor, which then reads as 0


class LoadCheck(NamedTuple):
    """What a load checks.

    Attributes:
        indices: of each index.
        attending: the indices lie in the tensor wherever the mask is true, so that the mask is the check.
    """

    indices: tuple[IndexCheck, ...]
    attending: bool = False


Checks = tuple[LoadCheck, ...]  # of the loads of a graph, in the order of `Graph.nodes()`


class CallSizes(NamedTuple):
    """Sizes of a call that bound its indices: sequences, query heads, query tokens and keys."""

    batch: int
    num_q_heads: int
    num_queries: int
    max_kv_len: int


def witnesses(graph: Graph) -> tuple[Source, ...]:
    """What proofs about a graph look at: the sizes of its tensors, and the captured numbers below their indices."""
    found: dict[Source, None] = {}
    for node in graph.nodes():
        if node.op == "load" and node.args:
            leaf = graph.tensors[node.attr]
            sizes = [Source(leaf, dim) for dim in range(len(node.args))] if leaf >= 0 else []
            numbers = [graph.numbers[n.attr] for n in topological(*node.args) if _is_integer(n)]
            found |= dict.fromkeys([*sizes, *numbers])
    return tuple(found)


def integers(graph: Graph) -> tuple[Source, ...]:
    """The captured integers of a graph."""
    return tuple(graph.numbers[n.attr] for n in graph.nodes() if _is_integer(n))


def _is_integer(node: Node) -> bool:
    return node.op == "number" and not node.dtype.is_floating_point


def unproven(load: Node, facts: Facts) -> LoadCheck:
    """The checks of a load where nothing is known of the call."""
    return LoadCheck(tuple(IndexCheck(facts.ranges[index][0] < 0, True) for index in load.args))


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
    if not any(node.op == "load" and node.args for node in graph.nodes()):
        return tuple(LoadCheck(()) for node in graph.nodes() if node.op == "load")
    known = _numbers(graph, leaves)
    facts = analyze([graph.output], q_idx_given, _known_ranges(graph.nodes(), known, sizes, q_idx_given))
    checks = []
    for node in graph.nodes():
        if node.op != "load":
            continue
        leaf = graph.tensors[node.attr]
        shape = (leaves[leaf] if leaf >= 0 else graph.frozen[-1 - leaf]).shape
        found = LoadCheck(tuple(_check(facts.ranges[i], size) for i, size in zip(node.args, shape, strict=True)))
        if (
            mask is not None
            and node in facts.on_kv - facts.on_score
            and any(index.outside for index in found.indices)
            and _attends_inside(node, shape, found, known, mask, sizes, q_idx_given)
        ):
            # Where the mask is true an index that was unproven is neither negative nor too large.
            found = LoadCheck(tuple(IndexCheck(i.below and not i.outside, False) for i in found.indices), True)
        checks.append(found)
    return tuple(checks)


def _check(reached: Interval, size: int) -> IndexCheck:
    low, high = reached
    return IndexCheck(low < 0, not (-size <= low and high < size))


def _numbers(graph: Graph, leaves: list) -> dict[Node, Node]:
    """The captured integers of a graph as constants."""
    found = {}
    for node in graph.nodes():
        source = graph.numbers[node.attr] if _is_integer(node) else None
        if source is not None and (source.dim >= 0 or not getattr(leaves[source.leaf], "is_meta", False)):
            found[node] = Node("const", (), node.dtype, int(source.read(leaves)), node.weak)
    return found


def _known_ranges(
    nodes: list[Node], numbers: Mapping[Node, Node], sizes: CallSizes, q_idx_given: bool
) -> dict[Node, Interval]:
    batch, num_q_heads, num_queries, max_kv_len = (max(1, size) for size in sizes)  # an empty range is no range
    ranges = {
        "b": (0, batch - 1), "h": (0, num_q_heads - 1), "kv_idx": (0, max_kv_len - 1),
        "q_idx": (-num_queries, max_kv_len - 1),
    }  # fmt: skip
    known = {n: ranges[n.attr] for n in nodes if n.op == "index" and not (n.attr == "q_idx" and q_idx_given)}
    return known | {number: (value.attr, value.attr) for number, value in numbers.items()}


def _attends_inside(
    load: Node,
    shape: torch.Size,
    found: LoadCheck,
    numbers: Mapping[Node, Node],
    mask: tuple[Graph, list],
    sizes: CallSizes,
    q_idx_given: bool,
) -> bool:
    """Whether no pair attends where an unproven index of a load is outside its tensor or negative."""
    try:
        both = _attending_outside(load, shape, found, numbers, mask)
    except (ArithmeticError, ValueError):  # captured integers that PyTorch's arithmetic refuses
        return False
    ranges = _known_ranges(topological(both), {}, sizes, q_idx_given)
    live = solve_mask(both, analyze([both], q_idx_given, ranges)).live
    return all(lo is not None and hi is not None and _at_least(lo, hi) for lo, hi in live)


def _attending_outside(
    load: Node, shape: torch.Size, found: LoadCheck, numbers: Mapping[Node, Node], mask: tuple[Graph, list]
) -> Node:
    """A mask of the pairs that attend although an unproven index of a load is outside its tensor or negative."""
    graph, leaves = mask
    outside = const(False, torch.bool)
    for index, size, check in zip(load.args, shape, found.indices, strict=True):
        if check.outside:
            index = _with_constants(index, numbers, "score")
            beyond = make("logical_or", make("lt", index, const(0)), make("le", const(size), index))
            outside = make("logical_or", outside, beyond)
    return make("logical_and", _with_constants(graph.output, _numbers(graph, leaves), "mask"), outside)


def _with_constants(output: Node, numbers: Mapping[Node, Node], kind: str) -> Node:
    """A value with its captured integers filled in; what else it captures is told apart from that of another mod."""

    def visit(node: Node, args: tuple[Node, ...]) -> Node:
        if node in numbers:
            return numbers[node]
        if node.op in ("load", "number"):
            return Node(node.op, args, node.dtype, (kind, node.attr), node.weak)
        return remake(node, args)

    return rewrite(output, visit)


def _at_least(a: Node, b: Node) -> bool:
    """Whether a >= b wherever they are evaluated."""
    if a.op == "minimum":
        return all(_at_least(part, b) for part in a.args)
    if b.op == "maximum":
        return all(_at_least(a, part) for part in b.args)
    if a.op == "maximum" and any(_at_least(part, b) for part in a.args):
        return True
    if b.op == "minimum" and any(_at_least(a, part) for part in b.args):
        return True
    return _at_most_zero(make("sub", b, a))


def _at_most_zero(node: Node) -> bool:
    """Whether the terms of a sum cancel and leave a constant of at most 0."""
    terms: dict[Node, int] = {}
    constant, pending = 0, [(node, 1)]
    while pending:
        node, factor = pending.pop()
        if node.is_const:
            constant += factor * int(node.attr)
        elif node.op in ("add", "sub") and node.dtype == torch.int64:  # narrower sums may wrap around
            pending += [(node.args[0], factor), (node.args[1], factor if node.op == "add" else -factor)]
        elif node.op == "neg" and node.dtype == torch.int64:
            pending.append((node.args[0], -factor))
        else:
            terms[node] = terms.get(node, 0) + factor
    return constant <= 0 and not any(terms.values())
