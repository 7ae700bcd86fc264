"""Random mask and score graphs for property tests, and what they compute at many positions at once.

A graph is read off a string of bytes, one byte for a choice. Hypothesis draws the bytes and shrinks them: where they
end or are 0, every choice is the first and simplest one.
"""

import dataclasses
import random
import sys

import torch
from hypothesis import strategies as st

from flexdecode.frontend.build import cast, make
from flexdecode.frontend.graph import Graph, Node, Source, const, topological
from flexdecode.frontend.ops import INT_LIMITS, OPS
from flexdecode.runtime import evaluation

INTEGERS = tuple(dtype for dtype in INT_LIMITS if dtype != torch.bool)
SMALL = (0, 1, 2, 3, 5, 8, 11, 13, 16, 20, 25, 31, -1, -2, -7)
HUGE = (
    *(sign * 2**40 + step for sign in (1, -1) for step in (-1, 0, 1)),
    *(2**30, -(2**31), 2**31, 2**53 + 1, 2**61, 2**62, -(2**62), sys.maxsize, sys.maxsize - 1, -(2**63), -(2**63) + 1),
)
NARROW = (127, -128, 128, 255, 256, -129, 32767, -32768, 65535)  # where int8, uint8 and int16 end

_INDEX = {name: Node("index", (), torch.int64, name) for name in ("b", "h", "q_idx", "kv_idx")}
_KV = _INDEX["kv_idx"]

# The positions at which a graph is evaluated: rows [R, 1] and keys [1, K], also where narrow types wrap around.
_NARROW_KEYS = [c + step for c in (128, 256, 32768, 65536) for step in (-2, -1, 0, 1)]
KEYS = torch.tensor([*range(34), *_NARROW_KEYS, 2**29, 2**30 - 2, 2**30 - 1])[None, :]
_BATCHES = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1, 2, 0, 1, 5, 2**30])[:, None]
_HEADS = torch.tensor([0, 1, 2, 3, 2, 1, 0, 3, 1, 0, 2, 7, 2**20])[:, None]
_NEAR_QUERIES = torch.tensor([7, 0, 12, 20, 33, 1, 27, 15, 127, 256, -1, -(2**20), 2**30])[:, None]
_FAR_QUERIES = torch.tensor([7, 0, 12, 2**31, -5, 2**40, -(2**40) - 1, 2**62, sys.maxsize, -(2**63), 20, 3, 1])[:, None]
NUM_ROWS = len(_BATCHES)


@dataclasses.dataclass
class Example:
    """A random graph with the leaves of its captures.

    Attributes:
        graph: the graph, as tracing would give it.
        leaves: captured numbers and tensors.
        q_idx_given: the caller chose q_idx, so that it may be any int64.
    """

    graph: Graph
    leaves: list
    q_idx_given: bool

    def __repr__(self):
        tables = [f"leaf {i}: {leaf}" for i, leaf in enumerate(self.leaves)]
        used = [*self.graph.tensors, *self.graph.numbers]
        return "\n".join(["", self.graph.text, f"captures {used}", *tables, f"q_idx_given {self.q_idx_given}"])

    def evaluate(self, *outputs):
        """Values of all nodes below `outputs`, by node, each broadcasting to [R, K]."""
        queries = _FAR_QUERIES if self.q_idx_given else _NEAR_QUERIES
        indices = {"b": _BATCHES, "h": _HEADS, "q_idx": queries, "kv_idx": KEYS}
        score = torch.linspace(-3.0, 3.0, NUM_ROWS * KEYS.numel()).view(NUM_ROWS, -1)
        run = evaluation.Evaluation((self.graph, self.leaves), indices, score, torch.tensor(True), check_indices=False)
        nodes = topological(*outputs)
        return dict(zip(nodes, run.values(nodes), strict=True))


def masks():
    """A strategy for `Example`s of mask_mods."""
    return st.binary(min_size=96, max_size=96).map(lambda tape: _Generator(tape).mask_example())


def scores():
    """A strategy for `Example`s of score_mods."""
    return st.binary(min_size=96, max_size=96).map(lambda tape: _Generator(tape).score_example())


class _Generator:
    """Reads bytes as choices and builds nodes: bools and integers that depend on kv_idx, and values of the row."""

    def __init__(self, tape):
        self.tape = iter(tape)
        self.leaves = []
        self.tensor_types = {}

    def mask_example(self):
        given = self.one_of(False, False, True)
        return self.example(self.mask(self.one_of(1, 2, 2, 3)), given)

    def score_example(self):
        given = self.one_of(False, False, True)
        return self.example(self.score(self.one_of(1, 2, 3)), given)

    def example(self, output, q_idx_given):
        return Example(Graph.build(output, self.tensor_types, []), self.leaves, q_idx_given)

    def one_of(self, *options):
        return options[next(self.tape, 0) % len(options)]

    def call(self, name, *nodes):
        """Applies an operation, or gives its first operand where PyTorch refuses these operands."""
        if name in ("pow", "bitwise_left_shift") and all(node.is_const for node in nodes):
            return nodes[0]  # Python would count on without end
        try:
            node = make(name, *nodes)
            if node.weak and node.is_const and not -(2**63) <= node.attr < 2**63:
                return nodes[0]
            return node
        except (TypeError, ValueError, ZeroDivisionError, OverflowError, RuntimeError):
            return nodes[0]

    # --- Bools --------------------------------------------------------------------------------------------------------

    def mask(self, depth):
        """A bool that most often depends on kv_idx."""
        if depth <= 0:
            return self.comparison(0)
        kind = self.one_of(
            *(self.comparison,) * 8, *(self.combination,) * 10, self.negation, self.choice, self.comparison_of_masks,
            self.comparison_of_masks, self.count_of_masks, self.row_condition, self.unsolvable,
        )  # fmt: skip
        return kind(depth)

    def comparison(self, depth):
        name = self.one_of("le", "lt", "ge", "gt", "lt", "le", "lt", "le", "eq", "ne")
        left = self.position(depth)
        right = self.position(depth - 1) if self.one_of(*(False,) * 6, True) else self.row(1)
        if self.one_of(*(False,) * 7, True):
            left, right = right, left
        if self.one_of(*(False,) * 19, True):
            left = cast(left, self.one_of(torch.float32, torch.float64))
        return self.call(name, left, right)

    def combination(self, depth):
        name = self.one_of(*("logical_and",) * 4, *("logical_or",) * 4, "logical_xor")
        return self.call(name, self.mask(depth - 1), self.mask(depth - 1))

    def negation(self, depth):
        return self.call("logical_not", self.mask(depth - 1))

    def choice(self, depth):
        condition = self.mask(depth - 1) if self.one_of(True, False) else self.row_condition(depth)
        return self.call("where", condition, self.mask(depth - 1), self.mask(depth - 1))

    def comparison_of_masks(self, depth):
        return self.call(self.one_of("eq", "ne", "lt", "le"), self.mask(depth - 1), self.mask(depth - 1))

    def count_of_masks(self, depth):
        """Arithmetic on bools: at least so many of two masks hold."""
        dtype = self.one_of(torch.int64, torch.int32, torch.int8, torch.uint8)
        name = self.one_of("add", "sub", "mul", "maximum", "bitwise_or")
        total = self.call(name, *(cast(self.mask(depth - 1), dtype) for _ in range(2)))
        return self.call(self.one_of("lt", "eq", "ne", "le"), const(self.one_of(0, 1, 2, -1)), total)

    def row_condition(self, depth):
        """A bool of the row alone."""
        if self.one_of(False, False, True):
            return self.table(torch.bool, self.row_index())
        return self.call(self.one_of("lt", "eq", "ne", "ge"), self.row(1), self.row(0))

    def unsolvable(self, depth):
        """A table that kv_idx indexes, or a constant."""
        index = self.one_of(_KV, self.call("sub", _KV, self.row(0)), self.call("floor_divide", _KV, const(4)))
        if self.one_of(*(False,) * 5, True):
            return const(self.one_of(True, False), torch.bool)
        if self.one_of(True, False):
            return self.table(torch.bool, index)
        return self.call("eq", self.table(self.one_of(torch.int64, torch.int32), index), self.row(1))

    # --- Integers that depend on kv_idx -------------------------------------------------------------------------------

    def position(self, depth):
        """An integer that most often depends on kv_idx."""
        if depth <= 0:
            return _KV
        kind = self.one_of(
            *(lambda _: _KV,) * 8, *(self.moved,) * 8, *(self.scaled,) * 3, *(self.divided,) * 6, *(self.bent,) * 6,
            *(self.chosen,) * 2, *(self.converted,) * 3, self.counted, self.looked_up, self.any_operation,
        )  # fmt: skip
        return kind(depth)

    def moved(self, depth):
        operands = self.position(depth - 1), self.row(1) if self.one_of(True, True, False) else self.position(depth - 1)
        return self.call(self.one_of("sub", "add"), *(operands if self.one_of(True, False) else operands[::-1]))

    def scaled(self, depth):
        factor = self.one_of(const(2), const(-1), const(3), const(-2), self.small_or_huge(), self.row(0))
        return self.call("mul", self.position(depth - 1), factor)

    def divided(self, depth):
        name = self.one_of(
            *("floor_divide",) * 4, *("remainder",) * 3, "bitwise_right_shift", "bitwise_and", "bitwise_left_shift",
            "fmod",
        )  # fmt: skip
        options = (4, 8, 2, 3, 7, 16, 1, -3, 64, 1000, 0, self.one_of(*HUGE))
        if name.endswith("shift"):
            options = (2, 1, 3, 0, 5, 31, 40, 63, 64, -1)
        elif name == "bitwise_and":
            options = (7, 3, 15, 1, -1, -4, 6, 255)
        divisor = const(self.one_of(*options)) if self.one_of(*(True,) * 5, False) else self.row(0)
        return self.call(name, self.position(depth - 1), divisor)

    def bent(self, depth):
        name = self.one_of("maximum", "minimum", "abs", "clamp", "neg", "sign")
        x = self.position(depth - 1)
        if name in ("abs", "neg", "sign"):
            return self.call(name, self.call("sub", x, self.row(1)) if self.one_of(True, True, False) else x)
        if name == "clamp":
            return self.call("minimum", self.call("maximum", x, self.row(0)), self.row(1))
        return self.call(name, x, self.row(1) if self.one_of(True, True, False) else self.position(depth - 1))

    def chosen(self, depth):
        condition = self.row_condition(depth) if self.one_of(False, False, True) else self.mask(depth - 1)
        other = self.row(1) if self.one_of(True, False) else self.position(depth - 1)
        return self.call("where", condition, *self.one_of((self.position(depth - 1), other), (other, _KV)))

    def converted(self, depth):
        x = self.position(depth - 1)
        if self.one_of(*(False,) * 5, True):
            through = self.one_of(torch.float32, torch.float64, torch.float16, torch.bool)
            return cast(cast(x, through), torch.int64)
        return cast(x, self.one_of(*INTEGERS))

    def counted(self, depth):
        """A bool as a number."""
        number = cast(self.mask(depth - 1), self.one_of(*INTEGERS))
        return self.call(self.one_of("add", "mul", "sub"), number, self.one_of(_KV, self.row(0)))

    def looked_up(self, depth):
        return self.table(self.one_of(torch.int32, torch.int64), self.position(depth - 1))

    def any_operation(self, depth):
        """Any row of the op table."""
        name = self.one_of(*_UNARY_AND_BINARY)
        operands = [self.position(depth - 1), self.row(1)]
        node = self.call(name, *operands[: OPS[name].arity])
        return cast(node, torch.int64) if node.dtype.is_floating_point else node

    # --- Values of the row --------------------------------------------------------------------------------------------

    def row(self, depth):
        """An integer that does not depend on kv_idx."""
        if depth > 0 and self.one_of(*(False,) * 9, True, True):
            name = self.one_of(
                "sub", "add", "sub", "mul", "floor_divide", "remainder", "maximum", "minimum", "bitwise_and",
                *_UNARY_AND_BINARY,
            )  # fmt: skip
            node = self.call(name, *(self.row(depth - 1), self.row(depth - 1))[: OPS[name].arity])
            return cast(node, torch.int64) if node.dtype.is_floating_point or node.dtype == torch.bool else node
        kind = self.one_of("q_idx", "q_idx", "q_idx", "near_q", "near_q", "const", "const", "number", "table", "table",
                           "narrow", "index")  # fmt: skip
        if kind == "near_q":
            return self.call(self.one_of("add", "sub"), _INDEX["q_idx"], self.small_or_huge())
        if kind == "const":
            return self.small_or_huge()
        if kind == "number":
            return self.number()
        if kind == "table":
            return self.table(self.one_of(torch.int64, torch.int32, torch.int64, torch.int8), self.row_index())
        if kind == "narrow":
            return cast(self.one_of(_INDEX["q_idx"], self.small_or_huge()), self.one_of(*INTEGERS))
        return _INDEX["q_idx" if kind == "q_idx" else self.one_of("h", "b")]

    def row_index(self):
        index = self.one_of("h", "b", "q_idx", "nothing", "moved")
        if index == "nothing":
            return None
        return self.call("sub", _INDEX["q_idx"], const(self.one_of(*SMALL))) if index == "moved" else _INDEX[index]

    def small_or_huge(self):
        value = self.one_of(*self.one_of(*(SMALL,) * 14, NARROW, HUGE))
        return const(value, self.one_of(None, None, None, torch.int64, torch.int32 if abs(value) < 2**31 else None))

    def number(self):
        """A captured Python number."""
        self.leaves.append(self.one_of(*self.one_of(SMALL, SMALL, SMALL, NARROW, HUGE)))
        return Node("number", (), torch.int64, Source(len(self.leaves) - 1), weak=True)

    def table(self, dtype, index):
        """An entry of a captured tensor, of rank 0 where `index` is None."""
        low, high = INT_LIMITS[dtype]
        values = self.one_of(SMALL, SMALL, (*range(0, 30, 3),), SMALL + HUGE + NARROW)
        entries = random.Random(next(self.tape, 0)).choices([v for v in values if low <= v <= high], k=9)
        if dtype == torch.bool:
            entries = [bool(v % 2) for v in entries]
        tensor = torch.tensor(entries, dtype=dtype)
        indices = () if index is None else (cast(index, torch.int64),)
        leaf = len(self.leaves)
        self.leaves.append(tensor if indices else tensor[0])
        self.tensor_types[leaf] = (dtype, len(indices))
        return Node("load", indices, dtype, leaf)

    # --- Scores -------------------------------------------------------------------------------------------------------

    def score(self, depth):
        """A score, most often one that a `where` hides."""
        score = Node("score", (), torch.float32)
        if depth <= 0:
            return self.one_of(score, const(float("-inf")), score, const(0.0), const(float("-inf"), torch.float32))
        kind = self.one_of(*("where",) * 6, "scaled", "converted", "added", "any")
        x = self.score(depth - 1)
        if kind == "where":
            x = self.call("where", self.mask(depth - 1), *self.one_of((x, self.score(0)), (self.score(0), x)))
        elif kind == "scaled":
            x = self.call("mul", x, const(self.one_of(2.0, -1.0, 0.0)))
        elif kind == "converted":
            x = cast(x, self.one_of(torch.float16, torch.float64, torch.int32, torch.bool, torch.bfloat16))
        elif kind == "added":
            x = self.call(self.one_of("add", "sub", "maximum", "minimum"), x, self.one_of(self.score(0), self.row(0)))
        else:
            x = self.call(self.one_of("neg", "abs", "exp", "log", "sqrt", "tanh", "reciprocal"), x)
        return cast(x, torch.float32)


_UNARY_AND_BINARY = tuple(
    name for name, op in OPS.items() if op.arity < 3 and op.rule in ("promote", "integer", "float")
)
