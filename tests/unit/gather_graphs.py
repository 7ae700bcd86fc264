"""Random calls for property tests: a score_mod with gathers, and a mask that may or may not keep them in range."""

import torch
from hypothesis import strategies as st
from unit import mask_graphs

from flexdecode.analysis.proofs import CallSizes
from flexdecode.frontend.build import cast
from flexdecode.frontend.graph import Graph, Node, Source, const

TAPE = 64  # bytes that a call is read off


def calls():
    """A strategy for `Call`s."""
    return st.binary(min_size=TAPE, max_size=TAPE).map(Call)


_INDEX = {name: Node("index", (), torch.int64, name) for name in ("b", "h", "q_idx", "kv_idx")}
_SMALL = (0, 1, 2, 3, 4, 5, 7, 8, 10, -1, -2, -3, -8)


class Call(mask_graphs._Generator):
    """A random call, read off a string of bytes: sizes, a score_mod with one gather and its mask."""

    def __init__(self, tape):
        super().__init__(tape)
        batch, heads = self.one_of(1, 2, 3, 1, 0), self.one_of(1, 2, 4)
        self.queries = self.one_of(1, 1, 2, 3)
        self.sizes = CallSizes(batch, heads, self.queries == 1, self.one_of(9, 1, 5, 12, 16, 0))
        self.q_idx_given = self.one_of(*(False,) * 5, True)
        core = self.core()
        index = self.curved(self.shifted(core))
        rows = self.one_of((), (), (), (_INDEX["h"],), (_INDEX["b"],), (self.curved(self.core()),))
        indices = tuple(cast(i, torch.int64) for i in (*rows, index))
        self.score_output = self.gather(torch.float32, indices)
        self.score_leaves = list(self.leaves)
        self.mask_output = self.fitting(core, index)
        self.mask_leaves = self.leaves
        if self.one_of(*(False,) * 3, True):  # other values in the same places
            other = lambda x: max(-(2**63), min(x + self.one_of(1, -1, 5), 2**63 - 1))
            self.mask_leaves = [other(x) if isinstance(x, int) else x for x in self.leaves]
        self.sizes = self.sizes._replace(shifted=self.one_of(*(False,) * 5, True))

    def core(self):
        """What an index and a mask have in common."""
        kv, q, h, b = (_INDEX[name] for name in ("kv_idx", "q_idx", "h", "b"))
        sub, add, mul = (lambda *args, name=name: self.call(name, *args) for name in ("sub", "add", "mul"))
        kind = self.one_of(*range(12), 0, 0, 0, 1, 1, 2, 2)
        if kind == 11:
            return self.position(2)
        if kind == 10:
            return self.row(1)
        return (
            sub(q, kv), sub(kv, q), kv, h, b, q, add(kv, h), sub(q, mul(kv, const(2))), sub(mul(h, const(3)), kv),
            add(sub(q, kv), b),
        )[kind]  # fmt: skip

    def small(self):
        """A small number: of the code, captured, or a size of a captured tensor."""
        kind = self.one_of("const", "const", "number", "number", "size")
        if kind == "const":
            return const(self.one_of(*_SMALL))
        if kind == "number":
            self.leaves.append(self.one_of(*_SMALL))
            return Node("number", (), torch.int64, Source(len(self.leaves) - 1), weak=True)
        self.leaves.append(torch.zeros(self.one_of(3, 8, 0, 11)))
        return Node("number", (), torch.int64, Source(len(self.leaves) - 1, 0), weak=True)

    def shifted(self, x):
        return self.call(self.one_of("add", "sub"), x, self.small()) if self.one_of(False, True) else x

    def curved(self, x, depth=1):
        kind = self.one_of(*(None,) * 6, "clamp", "clamp", "minimum", "maximum", "abs", "neg", "floor_divide",
                           "remainder", "where", "cast", "gather", "mul", "bitwise_and")  # fmt: skip
        if kind is None:
            return x
        if kind == "clamp":
            return self.call("minimum", self.call("maximum", x, self.small()), self.small())
        if kind in ("minimum", "maximum"):
            return self.call(kind, x, self.one_of(_INDEX["h"], self.small(), self.core()))
        if kind in ("abs", "neg"):
            return self.call(kind, x)
        if kind in ("floor_divide", "remainder"):
            return self.call(kind, x, const(self.one_of(2, 3, 8, -2)))
        if kind == "where":
            return self.call("where", self.row_condition(1) if self.one_of(True, False) else self.comparison(1), x,
                             self.one_of(self.small(), self.core()))  # fmt: skip
        if kind == "cast":
            return cast(x, self.one_of(torch.int32, torch.int8, torch.uint8))
        if kind == "gather":
            found = self.gather(self.one_of(torch.int64, torch.int32, torch.uint8, torch.int8, torch.bool), (x,))
            found = cast(found, torch.int64)
            return self.curved(found, depth - 1) if depth else found
        return self.call(kind, x, const(self.one_of(2, 3, -1) if kind == "mul" else self.one_of(7, 3, 1)))

    def gather(self, dtype, indices):
        """An entry of a captured tensor whose sizes are near those that matter."""
        batch, heads, _, length, _ = self.sizes
        shape = [self.one_of(8, 9, length, 3, heads, batch, length + self.queries, 16, 5, 17, 1, 0) for _ in indices]
        entries = torch.randint(-3, 9, shape, generator=torch.Generator().manual_seed(self.one_of(*range(9))))
        self.leaves.append(entries.clamp(min=0).to(dtype) if dtype == torch.uint8 else entries.to(dtype))
        leaf = len(self.leaves) - 1
        self.tensor_types[leaf] = (dtype, len(indices))
        return Node("load", tuple(cast(i, torch.int64) for i in indices), dtype, leaf)

    def fitting(self, core, index):
        """A mask that most often bounds what the index is made of."""
        x = self.one_of(core, core, index)
        low = self.call(self.one_of("le", "le", "lt"), self.one_of(const(0), const(0), self.small()), x)
        high = self.call(self.one_of("lt", "lt", "le"), x, self.one_of(const(8), self.small(), const(3), const(7)))
        mask = self.call("logical_and", low, high)
        for _ in range(self.one_of(0, 0, 1)):
            name = self.one_of("logical_and", "logical_and", "logical_or")
            mask = self.call(name, mask, self.one_of(self.comparison(1), self.unsolvable(1), self.row_condition(1)))
        return cast(self.one_of(mask, mask, mask, low, self.call("logical_not", mask)), torch.bool)

    def graphs(self):
        """Both mods with their captures."""
        score, mask = (Graph.build(x, self.tensor_types, []) for x in (self.score_output, self.mask_output))
        return (score, self.score_leaves), (mask, self.mask_leaves)

    def __repr__(self):
        """What a failing test shows."""
        lines = ["", f"{self.sizes}, {self.queries} tokens, q_idx_given {self.q_idx_given}"]
        for (graph, leaves), kind in zip(self.graphs(), ("score", "mask"), strict=True):
            lines += [f"{kind} captures {[*graph.tensors, *graph.numbers]} of {leaves}", graph.text]
        return "\n".join(lines)
