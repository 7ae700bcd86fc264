"""The torch backend: runs a traced graph in PyTorch operations, over chunks of the KV cache.

It gives the same results as the generated kernel, on any device. It needs memory for one chunk of scores.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..call.formats import Gather
from ..codegen.arguments import Call
from ..errors import IndexRangeError
from ..frontend.graph import Graph, Node, changing, loops_around, topological
from ..frontend.ops import FLOAT8, HALF, OPS

CHUNK_ELEMENTS = 1 << 21  # scores in memory at one time


def decode(call: Call, graphs: tuple[Graph | None, Graph | None], check_indices: bool = False) -> None:
    """Computes attention by an online softmax over chunks, in float32, or in float64 if an input is float64.

    Args:
        call: checked; its `out` and `lse` are written.
        graphs: of the score_mod and the mask_mod.
        check_indices: raise if the result of an attending pair depends on a read out of range of a captured tensor, or
            if an entry of the page table names no page. On a CPU, such an entry always raises.

    Raises:
        IndexRangeError: `check_indices` found an index out of range.
    """
    inputs, lse, score, mask = call.inputs, call.lse, (graphs[0], call.score_leaves), (graphs[1], call.mask_leaves)
    query, max_kv_len = inputs.query, inputs.max_kv_len
    batch, num_q_heads, num_queries, head_dim = query.shape
    device = query.device
    dtype = torch.float64 if torch.float64 in (query.dtype, inputs.key.dtype, inputs.value.dtype) else torch.float32
    lens = _lengths(inputs.kv_lens, max_kv_len, query)
    tokens = _lengths(inputs.q_lens, num_queries, query)
    first = lens - tokens
    if inputs.q_offset is not None:
        first = torch.as_tensor(inputs.q_offset, device=device).long().expand(batch)
    # Tokens past q_lens get the position of the last token, so that mods see only positions of the sequence.
    token = torch.arange(num_queries, device=device).minimum(tokens.clamp(min=1)[:, None] - 1)
    b, h = (torch.arange(size, device=device) for size in (batch, num_q_heads))
    q_idx = (first[:, None] + token).view(batch, 1, -1, 1)
    indices = {"b": b.view(-1, 1, 1, 1), "h": h.view(1, -1, 1, 1), "q_idx": q_idx}
    grouped = (query.to(dtype) * call.scale).reshape(batch, inputs.key.shape[1], -1, head_dim)
    rows = (batch, num_q_heads, num_queries)
    row_live = (torch.arange(num_queries, device=device) < tokens[:, None]).view(batch, 1, -1).expand(rows)
    m_i = torch.full(rows, -torch.inf, dtype=dtype, device=device)
    l_i = torch.zeros(rows, dtype=dtype, device=device)
    acc = torch.zeros(*rows, inputs.value.shape[3], dtype=dtype, device=device)
    if inputs.sinks is not None:
        m_i = m_i.where(~row_live, inputs.sinks.to(dtype).view(1, -1, 1))
        l_i = (m_i != -torch.inf).to(dtype)
    end = int(lens.max()) if device.type == "cpu" else max_kv_len
    step = max(16, CHUNK_ELEMENTS // max(1, batch * num_q_heads * num_queries))
    for start in range(0, end, step):
        kv = torch.arange(start, min(start + step, end), device=device)
        indices["kv_idx"] = kv.view(1, 1, 1, -1)
        live = (kv < lens[:, None]).view(batch, 1, 1, -1) & row_live[..., None]
        live = live if mask[0] is None else live & _Evaluation(mask, indices, None, live, check_indices, dtype).result()
        # Keys that no row of their head attends to may hold anything, and their page entries may be invalid.
        read = live.expand(*rows, -1).reshape(batch, inputs.key.shape[1], -1, len(kv)).any(2)
        gather = inputs.format.gather(inputs.key, inputs.page_table, kv, read, check_indices)
        k = _read(inputs.key, inputs.k_scale, gather, read, dtype)
        s = (grouped @ k.transpose(-1, -2)).view(*rows, len(kv))
        if score[0] is not None:
            s = _Evaluation(score, indices, s, live, check_indices, dtype).result()
        s = torch.where(live, s, -torch.inf)
        v = _read(inputs.value, inputs.v_scale, gather, read, dtype)
        m_new = torch.maximum(m_i, s.amax(-1))
        m_safe = torch.where(m_new == -torch.inf, 0.0, m_new)
        p = torch.exp(s - m_safe[..., None])
        alpha = torch.exp(m_i - m_safe)
        l_i = l_i * alpha + p.sum(-1)
        partial = (p.reshape(batch, inputs.key.shape[1], -1, len(kv)) @ v).view_as(acc)
        acc = acc * alpha[..., None] + partial
        m_i = m_new
    result = acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
    call.out.copy_(torch.where(row_live[..., None], result, 0.0))  # 0 * NaN would be NaN
    if lse is not None:
        lse.copy_(torch.where(m_i == torch.inf, m_i, m_i + torch.log(l_i)))


def _lengths(lengths: int | torch.Tensor | None, most: int, query: torch.Tensor) -> torch.Tensor:
    if not isinstance(lengths, torch.Tensor):  # a number is the longest sequence
        return torch.full(query.shape[:1], most, device=query.device)
    return lengths.long().clamp(0, most)


def _read(
    cache: torch.Tensor, scale: float | torch.Tensor | None, gather: Gather, read: torch.Tensor, dtype: torch.dtype
) -> torch.Tensor:
    """Rows of keys or values in the type of the arithmetic [B, Hkv, n, D]; 0 where `read` [B, Hkv, n] is false."""
    rows = gather(cache).to(dtype)
    if isinstance(scale, torch.Tensor):
        per_token = scale.dim() == 3
        rows = rows * (gather(scale)[..., None] if per_token else scale[..., None, None]).to(dtype)
    elif scale is not None:
        rows = rows * scale
    if read.device.type == "cpu" and bool(read.all()):
        return rows
    return torch.where(read[..., None], rows, 0.0)


def evaluate(
    outputs: Sequence[Node], graph: Graph, leaves: list, indices: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Computes nodes of a graph or of its captures, such as the bounds of a mask, on index tensors that broadcast."""
    anywhere = torch.ones((), dtype=torch.bool, device=indices["b"].device)
    return _Evaluation((graph, leaves), indices, None, anywhere, check_indices=False).values(outputs)


@dataclass
class _Evaluation:
    """One run of a graph over broadcast tensors [B, Hq, Q, n]."""

    mod: tuple[Graph | None, list]
    indices: dict[str, torch.Tensor]
    score: torch.Tensor | None
    live: torch.Tensor
    check_indices: bool
    dtype: torch.dtype = torch.float32  # float64 takes the place of float32 for float64 inputs

    def __post_init__(self) -> None:
        graph, self.leaves = self.mod
        assert graph is not None
        self.graph = graph
        self.device = self.live.device
        # Only with `check_indices`: where each load is out of range, and where a value depends on such a load.
        self.wrong: dict[Node, tuple[list[torch.Tensor], torch.Tensor]] = {}
        self.unknown: dict[Node, torch.Tensor] = {}

    def result(self) -> torch.Tensor:
        output = self.graph.output
        (found,) = self.values([output])
        for load, (index, wrong) in self.wrong.items():
            bad = self.live & self.unknown[output] & wrong
            if bad.any():
                raise IndexRangeError(self.graph, load, self._where(index, bad, self._tensor(load).shape))
        return found

    def values(self, outputs: Sequence[Node]) -> list[torch.Tensor]:
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
        if self.check_indices and (self.live & ~inside).any():
            first, wrong = self.wrong.get(node, (args, ~inside))  # an earlier step of a loop may have made an entry
            self.wrong[node] = first, wrong | ~inside
        if tensor.numel() == 0:
            return torch.zeros(inside.shape, dtype=node.dtype, device=self.device)
        if tensor.dtype in FLOAT8:  # PyTorch cannot index these on every device
            found = tensor.view(torch.uint8)[tuple(places)].view(tensor.dtype)
        else:
            found = tensor[tuple(places)]
        return torch.where(inside, found.to(node.dtype), torch.zeros((), dtype=node.dtype, device=self.device))
