"""What a graph says about itself: which values depend on kv_idx, and which integers fit into 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType

import torch

from .cache import Bounded
from .graph import Graph, Node, topological
from .ops import INT_LIMITS, OPS
from .ranges import Interval

MAX_KV_LEN = 1 << 30  # token positions; the launch refuses longer caches, so positions and their differences fit int32
_INDEX_RANGES = {"b": (0, 1 << 30), "h": (0, 1 << 20), "kv_idx": (0, MAX_KV_LEN), "q_idx": (-(1 << 20), MAX_KV_LEN)}
_INT32 = INT_LIMITS[torch.int32]


@dataclass(frozen=True)
class Facts:
    """What is known of the nodes of one graph, in any call.

    Attributes:
        nodes: all of them, operands first.
        ranges: integer range of each integer or bool node.
        on_kv: nodes that depend on kv_idx or on the score, so that they change inside the KV loop.
        on_score: nodes that depend on the score.
    """

    nodes: list[Node]
    ranges: dict[Node, Interval]
    on_kv: frozenset[Node]
    on_score: frozenset[Node]

    def fits_int32(self, node: Node) -> bool:
        """Whether a 32-bit integer always holds the value of an integer node."""
        low, high = self.ranges[node]
        return _INT32[0] <= low and high <= _INT32[1]


def analyze(outputs: Sequence[Node], q_idx_given: bool, known: Mapping[Node, Interval] = MappingProxyType({})) -> Facts:
    """Finds what is known of the nodes below `outputs`.

    Args:
        outputs: nodes of one graph.
        q_idx_given: the caller gives q_offset, so that q_idx may be any int64.
        known: ranges of nodes in one call, where they are narrower than those of all calls.
    """
    ranges: dict[Node, Interval] = {}
    on_kv: set[Node] = set()
    on_score: set[Node] = set()
    nodes = topological(*outputs)
    for node in nodes:
        if not node.dtype.is_floating_point:
            ranges[node] = known.get(node) or _range_in_any_call(node, ranges, q_idx_given)
        if node.op == "score" or (node.op == "index" and node.attr == "kv_idx") or any(a in on_kv for a in node.args):
            on_kv.add(node)
        if node.op == "score" or any(a in on_score for a in node.args):
            on_score.add(node)
    return Facts(nodes, ranges, frozenset(on_kv), frozenset(on_score))


def _range_in_any_call(node: Node, ranges: dict[Node, Interval], q_idx_given: bool) -> Interval:
    if node.op == "index" and not (node.attr == "q_idx" and q_idx_given):
        return _INDEX_RANGES[node.attr]
    return apply_rule(range_rule(node), [ranges.get(a) for a in node.args], INT_LIMITS[node.dtype])


_analyzed = Bounded.memo(limit=1024)  # (text of a graph, q_idx_given) -> its facts


def analyze_graph(graph: Graph, q_idx_given: bool) -> Facts:
    """As `analyze` for the output of a graph, once for all graphs of one text."""
    key = graph.text, q_idx_given
    found = _analyzed.get(key)
    if found is None:
        found = analyze([graph.output], q_idx_given)
        _analyzed.add(key, found)
    return found


RangeRule = Interval | Callable[..., Interval]


def range_rule(node: Node) -> RangeRule:
    """The range of an integer node, or a function that computes it from the ranges of the operands.

    Of an index, a captured number and a load only the type is known.
    """
    if node.is_const:
        return int(node.attr), int(node.attr)
    if node.op == "step":
        return 0, node.attr[1] - 1
    if not any(a.dtype.is_floating_point for a in node.args):
        if node.op == "fold" and node.attr[2] == "add":
            return partial(_times, node.attr[1])
        if node.op == "cast" or (node.op == "fold" and node.attr[2] != "mul"):
            return _unchanged
        if node.op in OPS and (rule := OPS[node.op].interval) is not None:
            return rule
    return INT_LIMITS[node.dtype]


def _times(factor: int, operand: Interval) -> Interval:
    return factor * operand[0], factor * operand[1]


def _unchanged(operand: Interval) -> Interval:
    return operand


def apply_rule(rule: RangeRule, operands: Sequence[Interval | None], limits: Interval) -> Interval:
    """Computes a range of which the type has these limits: outside of them a value wraps around."""
    if isinstance(rule, tuple):
        return rule
    low, high = rule(*operands)
    return (low, high) if limits[0] <= low and high <= limits[1] else limits
