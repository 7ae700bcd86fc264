"""Nodes, constants, traversal and the canonical text."""

import dataclasses
import math

import pytest
import torch

from flexdecode.frontend.graph import Graph, Node, Source, const, rewrite, topological


def index(name):
    return Node("index", (), torch.int64, name)


def load(leaf, *indices, dtype=torch.float32):
    return Node("load", indices, dtype, leaf)


def build(output, types=None, frozen=()):
    types = dict.fromkeys(range(-3, 9), (torch.float32, 1)) if types is None else types
    return Graph.build(output, types, list(frozen))


def test_nodes_are_equal_by_content():
    one, other = (Node("add", (index("h"), const(1)), torch.int64) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one is not other
    assert len({one, other}) == 1
    assert one != "add"


@pytest.mark.parametrize(
    "other",
    [
        Node("sub", (index("h"), const(1)), torch.int64),
        Node("add", (const(1), index("h")), torch.int64),
        Node("add", (index("h"), const(2)), torch.int64),
        Node("add", (index("h"), const(1)), torch.int32),
        Node("add", (index("h"), const(1)), torch.int64, weak=True),
        Node("add", (index("h"),), torch.int64),
    ],
)
def test_nodes_differ_in_everything_that_they_hold(other):
    assert Node("add", (index("h"), const(1)), torch.int64) != other


def test_constants_that_python_calls_equal_are_different_nodes():
    assert len({const(1), const(1.0), const(True), const(0.0), const(-0.0), const(0)}) == 6
    assert const(math.nan) == const(math.nan)


def test_nodes_and_graphs_are_immutable():
    graph = build(load(0, index("h")))
    for thing, name in ((graph.output, "op"), (graph, "output")):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(thing, name, None)


def test_constants_take_the_type_that_is_asked_for():
    assert [const(x).dtype for x in (True, 2, 0.5)] == [torch.bool, torch.int64, torch.float32]
    assert const(2).weak and not const(2, torch.int64).weak
    typed = const(3, torch.float32), const(0.0, torch.int8), const(5, torch.bool)
    assert [(type(n.attr), n.attr) for n in typed] == [(float, 3.0), (int, 0), (bool, True)]


def test_operands_come_first_and_once():
    h = index("h")
    shared = Node("mul", (h, h), torch.int64)
    output = Node("add", (shared, Node("neg", (shared,), torch.int64)), torch.int64)
    assert [n.op for n in topological(output)] == ["index", "mul", "neg", "add"]
    assert topological(output, shared) == topological(output)


def test_deep_graphs_need_no_recursion():
    node = index("h")
    for _ in range(5000):
        node = Node("neg", (node,), torch.int64)
    assert len(topological(node)) == 5001
    assert rewrite(node, lambda n, args: Node(n.op, args, n.dtype, n.attr)) == node
    assert build(node).text.count("neg") == 5000


def test_rewrite_visits_a_shared_node_once():
    h = index("h")
    visited = []

    def visit(node, args):
        visited.append(node.op)
        return Node(node.op, args, node.dtype, "b" if node.op == "index" else node.attr)

    result = rewrite(Node("add", (h, h), torch.int64), visit)
    assert visited == ["index", "add"]
    assert result == Node("add", (index("b"), index("b")), torch.int64)


def test_captures_are_numbered_in_order_of_first_use():
    size = Node("number", (), torch.int64, Source(5, dim=0), weak=True)
    number = Node("number", (), torch.float32, Source(1), weak=True)
    output = Node("add", (load(5, size), Node("mul", (number, load(-1, size)), torch.float32)), torch.float32)
    frozen = torch.arange(3.0)
    graph = build(output, frozen=[frozen])
    assert graph.numbers == (Source(5, 0), Source(1))
    assert graph.tensors == (5, -1)
    assert graph.tensor_types == ((torch.float32, 1),) * 2
    assert graph.frozen == (frozen,)


def test_equal_text_means_equal_graphs():
    """The place of a capture among the leaves does not matter, its type does."""
    one = build(load(0, index("h")))
    other = build(load(7, index("h")))
    half = build(load(0, index("h")), {0: (torch.float16, 1)})
    assert one == other and hash(one) == hash(other) and one.text == other.text
    assert one != half and one.text != half.text
    assert one != one.text


def test_text():
    output = Node("add", (Node("score", (), torch.float32), load(3, index("h"))), torch.float32)
    assert build(output).text.splitlines() == [
        "tensor 0: float32 rank 1",
        "%0 = score(): float32",
        "%1 = index('h'): int64",
        "%2 = load(0, %1): float32",
        "%3 = add(%0, %2): float32",
        "return %3",
    ]
    assert "= const(2): int64?" in build(const(2)).text
