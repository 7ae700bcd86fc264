"""Runs a traced graph in PyTorch operations, on index tensors that broadcast."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter

import torch

from ..errors import IndexRangeError
from ..frontend.graph import Graph, Node, changing, loops_around, topological
from ..frontend.ops import FLOAT8, HALF, OPS


def indexed(tensor: torch.Tensor, index: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Some elements of a tensor. Float8 numbers are taken as bytes: PyTorch 2.9 cannot index them on a CPU."""
    return index(tensor.view(torch.uint8)).view(tensor.dtype) if tensor.dtype in FLOAT8 else index(tensor)


def evaluate(
    outputs: Sequence[Node], graph: Graph, leaves: list, indices: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Computes nodes of a graph or of its captures, such as the bounds of a mask, on index tensors that broadcast."""
    return Evaluation((graph, leaves), indices, None, None, check_indices=False).values(outputs)


@dataclass
class Evaluation:
    """One run of a graph over broadcast tensors [R, Hq, W, n]. `live` says which pairs attend; None means all."""

    mod: tuple[Graph | None, list]
    indices: dict[str, torch.Tensor]
    score: torch.Tensor | None
    live: torch.Tensor | None
    check_indices: bool
    dtype: torch.dtype = torch.float32  # float64 takes the place of float32 for float64 inputs

    def __post_init__(self) -> None:
        graph, self.leaves = self.mod
        assert graph is not None
        self.graph = graph
        self.device = self.indices["b"].device
        # Only with `check_indices`: where each load is out of range, and where a value depends on such a load.
        self.wrong: dict[Node, tuple[list[torch.Tensor], torch.Tensor]] = {}
        self.unknown: dict[Node, torch.Tensor] = {}

    def result(self) -> torch.Tensor:
        """The output of the graph.

        Raises:
            IndexRangeError: indices are checked, and the output of an attending pair depends on one out of range.
        """
        output = self.graph.output
        (found,) = self.values([output])
        for load, (index, wrong) in self.wrong.items():
            bad = self._attending(self.unknown[output] & wrong)
            if bad.any():
                raise IndexRangeError(self.graph, load, self._where(index, bad, self._tensor(load).shape))
        return found

    def _attending(self, pairs: torch.Tensor) -> torch.Tensor:
        """Those of some pairs that attend."""
        return pairs if self.live is None else pairs & self.live

    def values(self, outputs: Sequence[Node]) -> list[torch.Tensor]:
        """Some nodes of the graph."""
        values: dict[Node, torch.Tensor] = {}
        nodes = topological(*outputs)
        self.loops = loops_around(nodes)
        self._fill(values, nodes, frozenset())
        return [values[output] for output in outputs]

    def _fill(self, values: dict[Node, torch.Tensor], nodes: Sequence[Node], inside: frozenset[int]) -> None:
        """Computes the nodes whose loops are all among `inside`, the loops around this place."""
        for node in nodes:
            if node in values or not self.loops[node] <= inside:
                continue
            if node.op == "fold":
                values[node] = self._fold(values, node, inside)
            else:
                values[node] = self._value(node, [values[a] for a in node.args])
                if self.check_indices:
                    self._follow(node, values)

    def _follow(self, node: Node, values: dict[Node, torch.Tensor]) -> None:
        """Notes where a value depends on a read out of range. If one operand decides the value, others do not count."""
        none = torch.zeros((), dtype=torch.bool, device=self.device)
        unknown = [self.unknown.get(a, none) for a in node.args]
        if node.op in ("logical_and", "logical_or"):
            decides = [(values[a] == (node.op == "logical_or")) & ~u for a, u in zip(node.args, unknown, strict=True)]
            found = (unknown[0] | unknown[1]) & ~(decides[0] | decides[1])
        elif node.op == "where":
            found = unknown[0] | torch.where(values[node.args[0]], unknown[1], unknown[2])
        else:
            found = functools.reduce(torch.logical_or, (*unknown, *self.wrong.get(node, ())[1:]), none)
        self.unknown[node] = found

    def _fold(self, values: dict[Node, torch.Tensor], node: Node, inside: frozenset[int]) -> torch.Tensor:
        loop, count, name = node.attr
        (body,) = node.args
        again = changing(node, self.loops)
        steps = [n for n in again if n.op == "step" and n.attr[0] == loop]

        def value(step: int) -> torch.Tensor:
            local = values | dict.fromkeys(steps, torch.tensor(step, device=self.device))
            self._fill(local, again, inside | {loop})
            if body in self.unknown:
                self.unknown[node] = self.unknown[body] | self.unknown.get(node, self.unknown[body])
            return local[body]

        return functools.reduce(OPS[name].torch, map(value, range(count)))

    def _value(self, node: Node, args: list[torch.Tensor]) -> torch.Tensor:
        if node.op == "score":
            assert self.score is not None
            return self.score
        if node.op == "index":
            return self.indices[node.attr]
        # As in the kernel, values of half types are rounded and held in float32. A Python number is not rounded.
        dtype = self.dtype if node.dtype in (*HALF, torch.float32) else node.dtype
        if node.op == "const":
            return torch.tensor(node.attr, dtype=dtype, device=self.device)
        if node.op == "number":
            return torch.as_tensor(self.graph.numbers[node.attr].read(self.leaves), dtype=dtype, device=self.device)
        if node.op == "load":
            return self._load(node, args).to(dtype)
        value = args[0] if node.op == "cast" else OPS[node.op].torch(*args)
        return value.to(node.dtype).to(dtype) if node.dtype in HALF and not node.weak else value.to(dtype)

    def _where(self, index: list[torch.Tensor], wrong: torch.Tensor, shape: torch.Size) -> str:
        """The first pair at which an index is wrong, in words."""
        *spread, wrong = torch.broadcast_tensors(*self.indices.values(), *index, wrong)
        first = int(wrong.flatten().to(torch.uint8).argmax())
        values = [int(x.flatten()[first]) for x in spread]
        pair = ", ".join(f"{name} = {value}" for name, value in zip(self.indices, values, strict=False))
        place = values[len(self.indices) :]
        return f"at {pair}, which attends, the index is {place} in a tensor of shape {list(shape)}"

    def _tensor(self, load: Node) -> torch.Tensor:
        leaf = self.graph.tensors[load.attr]
        return self.leaves[leaf] if leaf >= 0 else self.graph.frozen[-1 - leaf]

    def _load(self, node: Node, args: list[torch.Tensor]) -> torch.Tensor:
        """Reads a captured tensor. Negative indices count from the end; an index out of range reads 0."""
        tensor = self._tensor(node)
        inside = torch.ones((), dtype=torch.bool, device=self.device)
        places = []
        for index, size in zip(args, tensor.shape, strict=True):
            place = torch.where(index < 0, index + size, index)
            inside = inside & (place >= 0) & (place < size)
            places.append(place.clamp(0, max(size - 1, 0)))
        if self.check_indices and self._attending(~inside).any():
            first, wrong = self.wrong.get(node, (args, ~inside))  # an earlier step of a loop may have made an entry
            self.wrong[node] = first, wrong | ~inside
        if tensor.numel() == 0:
            return torch.zeros(inside.shape, dtype=node.dtype, device=self.device)
        found = indexed(tensor, itemgetter(tuple(places)))
        return torch.where(inside, found.to(node.dtype), torch.zeros((), dtype=node.dtype, device=self.device))
