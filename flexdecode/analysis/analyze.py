"""What is known from a graph alone: which values depend on kv_idx, and which integers fit into 32 bits."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

import torch

from ..frontend.graph import Graph, Node, topological
from ..frontend.ops import INT_LIMITS, OPS
from ..frontend.ranges import IntRange
from ..memos import Bounded

MAX_KV_LEN = 1 << 30  # tokens; longer caches are refused, so positions and their differences fit into int32
MAX_KV_OFFSET = 1 << 30  # greatest |kv_offset|; positions still fit into int32, their differences may not
MAX_QUERIES = 1 << 20  # query tokens of one sequence in one call
_INDEX_RANGES = {"b": (0, 1 << 30), "h": (0, 1 << 20), "kv_idx": (0, MAX_KV_LEN), "q_idx": (-MAX_QUERIES, MAX_KV_LEN)}
# The same if the caller gives kv_offset.
_SHIFTED_RANGES = {
    "kv_idx": (-MAX_KV_OFFSET, MAX_KV_OFFSET + MAX_KV_LEN - 1),
    "q_idx": (-MAX_KV_OFFSET - MAX_QUERIES, MAX_KV_OFFSET + MAX_KV_LEN - 1),
}
_INT32 = INT_LIMITS[torch.int32]


@dataclass(frozen=True)
class Analysis:
    """What is known of the nodes of one graph, in any call.

    Attributes:
        nodes: all nodes, operands first.
        ranges: integer range of each integer or bool node.
        on_kv: nodes that depend on kv_idx or on the score, so that they change inside the KV loop.
        on_score: nodes that depend on the score.
        positions: the half-open range of kv_idx.
    """

    nodes: list[Node]
    ranges: dict[Node, IntRange]
    on_kv: frozenset[Node]
    on_score: frozenset[Node]
    positions: IntRange = (0, MAX_KV_LEN)

    def fits_int32(self, node: Node) -> bool:
        """Whether a 32-bit integer always holds the value of an integer node."""
        low, high = self.ranges[node]
        return _INT32[0] <= low and high <= _INT32[1]


def analyze(
    outputs: Sequence[Node],
    q_idx_given: bool,
    known: Mapping[Node, IntRange] = MappingProxyType({}),
    shifted: bool = False,
) -> Analysis:
    """Finds what is known of the nodes below `outputs`.

    Args:
        outputs: nodes of one graph.
        q_idx_given: the caller gives q_offset, so that q_idx may be any int64.
        known: ranges of nodes in one call, if they are narrower than in all calls.
        shifted: the caller gives kv_offset, so that positions may be negative.
    """
    nodes = topological(*outputs)
    within = _INDEX_RANGES | _SHIFTED_RANGES if shifted else _INDEX_RANGES
    bounded = {n: within[n.attr] for n in nodes if n.op == "index" and not (n.attr == "q_idx" and q_idx_given)}
    on_kv: set[Node] = set()
    on_score: set[Node] = set()
    for node in nodes:
        if node.op == "score" or (node.op == "index" and node.attr == "kv_idx") or not on_kv.isdisjoint(node.args):
            on_kv.add(node)
        if node.op == "score" or not on_score.isdisjoint(node.args):
            on_score.add(node)
    ranges = find_ranges(rules_of(nodes), {**bounded, **known})
    return Analysis(nodes, ranges, frozenset(on_kv), frozenset(on_score), within["kv_idx"])


_analyzed = Bounded.memo(limit=1024)  # (text of a graph, q_idx_given, shifted) -> what `analyze` gives


def analyze_graph(graph: Graph, q_idx_given: bool, shifted: bool = False) -> Analysis:
    """As `analyze` for the output of a graph. Graphs with the same text are analysed once."""
    key = graph.text, q_idx_given, shifted
    found = _analyzed.get(key)
    if found is None:
        found = analyze([graph.output], q_idx_given, shifted=shifted)
        _analyzed.add(key, found)
    return found


Rule = IntRange | Callable[..., IntRange]


def rules_of(nodes: Sequence[Node]) -> list[tuple[Node, Rule]]:
    """Integer and bool nodes, each with its range, or with a function from the ranges of its operands to its range."""
    return [(node, _rule(node)) for node in nodes if not node.dtype.is_floating_point]


def _rule(node: Node) -> Rule:
    if node.is_const:
        return int(node.attr), int(node.attr)
    if node.op == "step":
        return 0, node.attr[1] - 1
    if any(a.dtype.is_floating_point for a in node.args):
        return INT_LIMITS[node.dtype]
    if node.op == "cast":
        return lambda operand: operand
    if node.op == "fold" and node.attr[2] != "mul":
        factor = node.attr[1] if node.attr[2] == "add" else 1
        return lambda operand: (factor * operand[0], factor * operand[1])
    return (OPS[node.op].range if node.op in OPS else None) or INT_LIMITS[node.dtype]


def find_ranges(rules: Iterable[tuple[Node, Rule]], known: Mapping[Node, IntRange]) -> dict[Node, IntRange]:
    """Finds the range of each integer and bool.

    Args:
        rules: of the nodes, operands first.
        known: ranges of some of them, such as indices.
    """
    ranges: dict[Node, IntRange] = {}
    for node, rule in rules:
        found = known.get(node, rule)
        if not isinstance(found, tuple):
            low, high = found(*[ranges[a] for a in node.args])
            limits = INT_LIMITS[node.dtype]
            # A value outside its type wraps around, so nothing is known of it.
            found = (low, high) if limits[0] <= low and high <= limits[1] else limits
        ranges[node] = found
    return ranges
