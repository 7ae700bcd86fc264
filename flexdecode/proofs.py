"""Which captured indices are in range, from what the host knows when a call is prepared.

Sizes of the call and of the captured tensors, and captured numbers below an index, are values like any other here; they
belong to what identifies a prepared call. A kernel depends only on the outcome: which index it checks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch

from .analyze import MAX_KV_LEN, Facts, RangeRule, analyze, analyze_graph, apply_rule, range_rule
from .build import make, remake
from .cache import Bounded
from .graph import Graph, Node, Source, const, loops_around, rewrite, topological
from .intervals import at_most, solve_mask
from .ops import INT_LIMITS
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
    indices = _indices_of(graph)
    reached = _reached(indices, graph, leaves, sizes, q_idx_given)
    checks = []
    for load in indices.loads:
        leaf = graph.tensors[load.node.attr]
        shape = (leaves[leaf] if leaf >= 0 else graph.frozen[-1 - leaf]).shape
        found = LoadCheck(tuple([_check(reached[i], size) for i, size in zip(load.indices, shape, strict=True)]))
        if (
            mask is not None
            and load.in_loop
            and any(index.outside for index in found.indices)
            and _is_attending_inside(load.node, shape, found, (graph, leaves), mask, sizes, q_idx_given)
        ):
            # Where the mask is true an index that was unproven is neither negative nor too large.
            found = LoadCheck(tuple(IndexCheck(i.below and not i.outside, False) for i in found.indices), True)
        checks.append(found)
    return tuple(checks)


def _check(reached: Interval, size: int) -> IndexCheck:
    low, high = reached
    return IndexCheck(low < 0, not (-size <= low and high < size))


class _Load(NamedTuple):
    """A load of a graph: the steps that give its indices, and whether its value changes with kv_idx alone."""

    node: Node
    indices: tuple[int, ...]
    in_loop: bool


class _Indices(NamedTuple):
    """How to find the ranges of all indices of a graph, prepared for many calls.

    Attributes:
        loads: in the order of `Graph.nodes()`.
        steps: of each value below an index, operands first: what gives its range, which steps are its operands, and
            the limits of its type. What gives it is the name of an index, the slot of a captured number, or a rule.
    """

    loads: tuple[_Load, ...]
    steps: tuple[tuple[str | int | RangeRule, tuple[int, ...], Interval], ...]


def depends_on_length(graph: Graph) -> bool:
    """Whether the checks of a graph may change with the longest sequence alone."""
    return any(rule in ("kv_idx", "q_idx") for rule, _, _ in _indices_of(graph).steps)


_prepared = Bounded.memo(limit=1024)  # text of a graph -> its `_Indices`


def _indices_of(graph: Graph) -> _Indices:
    found = _prepared.get(graph.text)
    if found is None:
        found = _prepare_indices(graph)
        _prepared.add(graph.text, found)
    return found


def _prepare_indices(graph: Graph) -> _Indices:
    loads = [node for node in graph.nodes() if node.op == "load"]
    nodes = topological(*[index for load in loads for index in load.args])
    places = {node: place for place, node in enumerate(nodes)}
    facts = analyze_graph(graph, q_idx_given=True)
    loops = loops_around(facts.nodes)
    in_loop = {load for load in loads if load in facts.on_kv - facts.on_score and not loops[load]}
    steps = []
    for node in nodes:
        limits = INT_LIMITS.get(node.dtype, (0, 0))  # of a floating value nothing is asked
        rule: str | int | RangeRule = limits
        if node.op == "index" or _is_integer(node):
            rule = node.attr
        elif node.dtype in INT_LIMITS:
            rule = range_rule(node)
        steps.append((rule, tuple(places[arg] for arg in node.args), limits))
    found = [_Load(load, tuple(places[index] for index in load.args), load in in_loop) for load in loads]
    return _Indices(tuple(found), tuple(steps))


def _reached(indices: _Indices, graph: Graph, leaves: list, sizes: CallSizes, q_idx_given: bool) -> list[Interval]:
    """The range of each step in a call, as `analyze` finds it."""
    of_index = _index_ranges(sizes, q_idx_given)
    reached: list[Interval] = []
    for rule, args, limits in indices.steps:
        if isinstance(rule, str):
            found = of_index[rule]
        elif isinstance(rule, int):
            value = known_value(graph.numbers[rule], leaves)
            found = limits if value is None else (int(value), int(value))
        else:
            found = apply_rule(rule, [reached[arg] for arg in args], limits)
        reached.append(found)
    return reached


def _index_ranges(sizes: CallSizes, q_idx_given: bool) -> dict[str, Interval]:
    last = max(0, sizes.max_kv_len - 1)  # an empty range is no range
    return {
        "b": (0, max(0, sizes.batch - 1)), "h": (0, max(0, sizes.num_q_heads - 1)), "kv_idx": (0, last),
        "q_idx": INT_LIMITS[torch.int64] if q_idx_given else (-max(1, sizes.num_queries), last),
    }  # fmt: skip


def _numbers(graph: Graph, leaves: list) -> dict[Node, Node]:
    """The captured integers of a graph as constants."""
    found = {}
    for node in graph.nodes():
        if _is_integer(node) and (value := known_value(graph.numbers[node.attr], leaves)) is not None:
            found[node] = Node("const", (), node.dtype, int(value), node.weak)
    return found


def known_value(source: Source, leaves: list) -> int | float | None:
    """The value of a captured number; None on the meta device."""
    return None if source.dim < 0 and getattr(leaves[source.leaf], "is_meta", False) else source.read(leaves)


class _Reach(NamedTuple):
    """What is known of one proof by a mask, by the longest sequence: proven up to one, not proven from another on."""

    proven: int
    unproven: int


_reaches = Bounded.memo(limit=1024)  # all that such a proof depends on but the longest sequence -> `_Reach`


def _is_attending_inside(
    load: Node,
    shape: torch.Size,
    found: LoadCheck,
    score: tuple[Graph, list],
    mask: tuple[Graph, list],
    sizes: CallSizes,
    q_idx_given: bool,
) -> bool:
    """Whether no pair attends where an unproven index of a load is outside its tensor or negative.

    A proof holds for shorter sequences, too, so what another length has shown is remembered.
    """
    numbers = _numbers(*score), _numbers(*mask)
    values = [tuple([(node.attr, value.attr) for node, value in known.items()]) for known in numbers]
    key = score[0].text, load, shape, found, mask[0].text, *values, *sizes[:3], q_idx_given

    def proves(max_kv_len: int) -> bool:
        try:
            bad_pairs = _attending_outside(load, shape, found, mask[0].output, *numbers)
        except (ArithmeticError, ValueError):  # captured integers that PyTorch's arithmetic refuses
            return False
        return _is_never(bad_pairs, sizes._replace(max_kv_len=max_kv_len), q_idx_given)

    reach, length = _reaches.get(key), sizes.max_kv_len
    if reach is not None and not reach.proven < length < reach.unproven:
        return length <= reach.proven
    proven, unproven = reach or (-1, MAX_KV_LEN + 1)
    further = 1 << max(length - 1, 0).bit_length()
    if reach is not None and further < unproven and proves(further):  # the second length: there will be more
        proven = further
    elif proves(length):
        proven = length
    else:
        unproven = length
    _reaches.add(key, _Reach(proven, unproven))
    return length <= proven


def _is_never(mask: Node, sizes: CallSizes, q_idx_given: bool) -> bool:
    """Whether a mask is false for every pair of a call, as far as its live intervals show it."""
    of_index = _index_ranges(sizes, q_idx_given)
    ranges = {node: of_index[node.attr] for node in topological(mask) if node.op == "index"}
    live = solve_mask(mask, analyze([mask], q_idx_given, ranges)).live
    return all(lo is not None and hi is not None and at_most(hi, lo) for lo, hi in live)


def _attending_outside(
    load: Node,
    shape: torch.Size,
    found: LoadCheck,
    attends: Node,
    score_numbers: Mapping[Node, Node],
    mask_numbers: Mapping[Node, Node],
) -> Node:
    """A mask of the pairs that attend although an unproven index of a load is outside its tensor or negative."""
    outside = const(False, torch.bool)
    for index, size, check in zip(load.args, shape, found.indices, strict=True):
        if check.outside:
            index = _with_constants(index, score_numbers, "score")
            beyond = make("logical_or", make("lt", index, const(0)), make("le", const(size), index))
            outside = make("logical_or", outside, beyond)
    return make("logical_and", _with_constants(attends, mask_numbers, "mask"), outside)


def _with_constants(output: Node, numbers: Mapping[Node, Node], kind: str) -> Node:
    """A value with its captured integers filled in; what else it captures is told apart from that of another mod."""

    def visit(node: Node, args: tuple[Node, ...]) -> Node:
        if node in numbers:
            return numbers[node]
        if node.op in ("load", "number"):
            return Node(node.op, args, node.dtype, (kind, node.attr), node.weak)
        return remake(node, args)

    return rewrite(output, visit)
