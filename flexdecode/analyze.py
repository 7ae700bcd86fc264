"""What a graph says about itself: which values depend on kv_idx, and which integers fit into 32 bits."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from .graph import Node, topological
from .ops import INT_LIMITS, OPS
from .ranges import Interval

MAX_KV_LEN = 1 << 30  # token positions; the launch refuses longer caches, so positions and their differences fit int32
_INDEX_RANGES = {"b": (0, 1 << 30), "h": (0, 1 << 20), "kv_idx": (0, MAX_KV_LEN), "q_idx": (-(1 << 20), MAX_KV_LEN)}
_INT32 = INT_LIMITS[torch.int32]


@dataclass(frozen=True)
class Facts:
    """Facts about the nodes of one graph.

    Attributes:
        nodes: all of them, operands first.
        ranges: integer range of each integer or bool node, of any call.
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
    """Computes the facts of the nodes below `outputs`.

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
            ranges[node] = known.get(node) or _range(node, ranges, q_idx_given)
        if node.op == "score" or (node.op == "index" and node.attr == "kv_idx") or any(a in on_kv for a in node.args):
            on_kv.add(node)
        if node.op == "score" or any(a in on_score for a in node.args):
            on_score.add(node)
    return Facts(nodes, ranges, frozenset(on_kv), frozenset(on_score))


def _range(node: Node, ranges: dict[Node, Interval], q_idx_given: bool) -> Interval:
    limits = INT_LIMITS[node.dtype]
    if node.op == "index" and not (node.attr == "q_idx" and q_idx_given):
        return _INDEX_RANGES[node.attr]
    if node.is_const:
        return int(node.attr), int(node.attr)
    found = limits
    if node.op == "step":
        return 0, node.attr[1] - 1
    if node.op == "fold" and node.args[0] in ranges and node.attr[2] != "mul":
        factor = node.attr[1] if node.attr[2] == "add" else 1
        low, high = ranges[node.args[0]]
        found = factor * low, factor * high
    elif node.op == "cast" and node.args[0] in ranges:
        found = ranges[node.args[0]]
    elif node.op in OPS:
        rule = OPS[node.op].interval
        if rule is not None and all(a in ranges for a in node.args):
            found = rule(*(ranges[a] for a in node.args))
    # Outside its type a value wraps around, so that nothing is known.
    return found if limits[0] <= found[0] and found[1] <= limits[1] else limits
