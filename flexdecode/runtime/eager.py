"""The torch backend: runs a traced graph in PyTorch operations, over chunks of the KV cache.

It gives the same results as the generated kernel, on any device. It needs memory for one chunk of scores.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import NamedTuple

import torch

from ..analysis.analyze import MAX_KV_OFFSET
from ..call.formats import Gather
from ..call.inputs import Inputs
from ..call.packing import rows_of_sequences
from ..codegen.arguments import Call
from ..errors import IndexRangeError
from ..frontend.graph import Graph, Node, changing, loops_around, topological
from ..frontend.ops import FLOAT8, HALF, OPS

CHUNK_ELEMENTS = 1 << 21  # scores in memory at one time


def decode(call: Call, graphs: tuple[Graph | None, Graph | None], check_indices: bool = False) -> None:
    """Computes attention by an online softmax over chunks, in float32, or in float64 if an input is float64.

    Args:
        call: checked; its `out`, `lse` and `max_scores` are written.
        graphs: of the score_mod and the mask_mod.
        check_indices: raise if the result of an attending pair depends on a read out of range of a captured tensor, or
            if an entry of the page table names no page. On a CPU, such an entry always raises.

    Raises:
        IndexRangeError: `check_indices` found an index out of range.
    """
    inputs = call.inputs
    batch = _packed_rows(inputs) if inputs.packed else _padded_rows(inputs)
    if batch.place is None:
        query = inputs.query
    else:
        query = inputs.query[batch.place.clamp(max=inputs.num_tokens - 1)].transpose(1, 2)
    computed = _attend(call, graphs, query, batch, check_indices)
    results = call.out, call.lse, call.max_scores
    for part, result, empty in zip(computed, results, (0.0, -torch.inf, -torch.inf), strict=True):
        if result is None:
            continue
        if batch.place is None:
            result.copy_(part)
        else:
            # One row more than the output takes what belongs to no token.
            whole = part.new_full((inputs.num_tokens + 1, *result.shape[1:]), empty)
            result.copy_(whole.index_copy(0, batch.place.flatten(), part.transpose(1, 2).flatten(0, 1))[:-1])


class _Rows(NamedTuple):
    """Query tokens as a batch of R rows of W tokens: the padded form, or pieces of the sequences of a packed query.

    Attributes:
        owner: the sequence of each row, int64 [R]; None if each sequence has one row.
        lens, starts: slots up to the last key of each row, and before its first one, int64 [R].
        shift: position of slot 0 of each row, int64 [R].
        q_idx: position of each token, int64 [R, W]. A token past the last one of its sequence has the position of that
            one, so that mods see only positions of the sequence.
        live: which tokens there are, bool [R, W].
        place: row of the packed query and its output for each token, int64 [R, W]; T where there is no token. None if
            the query is padded.
    """

    owner: torch.Tensor | None
    lens: torch.Tensor
    starts: torch.Tensor
    shift: torch.Tensor
    q_idx: torch.Tensor
    live: torch.Tensor
    place: torch.Tensor | None = None


class _Sequences(NamedTuple):
    """Of each sequence, int64 [B]: `lens`, `starts` and `shift` as in `_Rows`, tokens, position of the first one."""

    lens: torch.Tensor
    starts: torch.Tensor
    shift: torch.Tensor
    tokens: torch.Tensor
    first: torch.Tensor


def _sequences(inputs: Inputs) -> _Sequences:
    """What a call says of its sequences."""
    batch, device = inputs.batch, inputs.query.device
    lens, tokens = (
        torch.as_tensor(given, device=device).long().expand(batch).clamp(0, most)
        for given, most in ((inputs.given_kv_lens, inputs.max_kv_len), (inputs.given_q_lens, inputs.num_tokens))
    )
    starts, shift, first = (
        torch.as_tensor(0 if given is None else given, device=device).long().expand(batch)
        for given in (inputs.kv_starts, inputs.kv_offset, inputs.q_offset)
    )
    shift = shift.clamp(-MAX_KV_OFFSET, MAX_KV_OFFSET)  # as in the kernel, which cannot refuse it
    first = shift + lens - tokens if inputs.q_offset is None else first
    return _Sequences(lens, starts, shift, tokens, first)


def _padded_rows(inputs: Inputs) -> _Rows:
    """Each sequence is a row."""
    lens, starts, shift, tokens, first = _sequences(inputs)
    token = torch.arange(inputs.num_tokens, device=lens.device)
    live = token < tokens[:, None]
    q_idx = first[:, None] + token.minimum(tokens.clamp(min=1)[:, None] - 1)
    return _Rows(None, lens, starts, shift, q_idx, live)


def _packed_rows(inputs: Inputs) -> _Rows:
    """Cuts the sequences of a packed query into rows of about the mean of their tokens.

    There are as many rows as any division of T tokens among B sequences needs. So nothing is read from a GPU.
    """
    assert inputs.cu_seqlens_q is not None
    lens, starts, shift, tokens, first = _sequences(inputs)
    start, _ = rows_of_sequences(inputs.cu_seqlens_q, inputs.num_tokens)
    width = 1 << (-(-inputs.num_tokens // inputs.batch) - 1).bit_length()
    rows = -(-tokens // width)
    ends = rows.cumsum(0)
    row = torch.arange(inputs.num_tokens // width + inputs.batch, device=lens.device)
    owner = torch.searchsorted(ends, row, right=True).clamp(max=inputs.batch - 1)
    token = (row - (ends - rows)[owner])[:, None] * width + torch.arange(width, device=lens.device)
    live = token < tokens[owner][:, None]
    place = torch.where(live, start[owner][:, None] + token, inputs.num_tokens)
    token = token.minimum(tokens.clamp(min=1)[owner][:, None] - 1)
    q_idx = first[owner][:, None] + token
    return _Rows(owner, lens[owner], starts[owner], shift[owner], q_idx, live, place)


def _attend(
    call: Call,
    graphs: tuple[Graph | None, Graph | None],
    query: torch.Tensor,
    batch: _Rows,
    check_indices: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The attention of rows of query tokens.

    Args:
        call: checked.
        graphs: of the score_mod and the mask_mod.
        query: the tokens, [R, Hq, W, D].
        batch: what they are.
        check_indices: as for `decode`.

    Returns:
        Output [R, Hq, W, Dv], log-sum-exp and largest score [R, Hq, W], in the type of the arithmetic.
    """
    inputs, device = call.inputs, query.device
    dtype = torch.float64 if torch.float64 in (query.dtype, inputs.key.dtype, inputs.value.dtype) else torch.float32
    score, mask = zip(graphs, (call.score_leaves, call.mask_leaves), strict=True)
    rows = (*query.shape[:3],)
    b = torch.arange(len(query), device=device) if batch.owner is None else batch.owner
    indices = {
        "b": b.view(-1, 1, 1, 1),
        "h": torch.arange(rows[1], device=device).view(1, -1, 1, 1),
        "q_idx": batch.q_idx[:, None, :, None],
    }
    shared = (rows[0], inputs.key.shape[1], -1)  # the rows of one KV head are together
    grouped = (query.to(dtype) * call.scale).reshape(*shared, inputs.head_dim)
    row_live = batch.live[:, None].expand(rows)
    softmax = _Softmax.of(rows, inputs, row_live, dtype)
    end = int(batch.lens.max()) if device.type == "cpu" else inputs.max_kv_len
    step = max(16, CHUNK_ELEMENTS // max(1, math.prod(rows)))
    for start in range(0, end, step):
        kv = torch.arange(start, min(start + step, end), device=device)
        indices["kv_idx"] = kv.view(1, 1, 1, -1)
        if inputs.kv_offset is not None:
            indices["kv_idx"] = indices["kv_idx"] + batch.shift.view(-1, 1, 1, 1)
        inside = kv < batch.lens[:, None]
        if inputs.kv_starts is not None:
            inside = inside & (kv >= batch.starts[:, None])
        live = inside[:, None, None] & row_live[..., None]
        live = live if mask[0] is None else live & _Evaluation(mask, indices, None, live, check_indices, dtype).result()
        # Keys that no row of their head attends to may hold anything, and their page entries may be invalid.
        read = live.expand(*rows, -1).reshape(*shared, len(kv)).any(2)
        gather = inputs.format.gather(inputs.key, inputs.table, kv, read, check_indices, batch.owner)
        k = _read(inputs.key, inputs.k_scale, gather, read, batch.owner, dtype)
        s = (grouped @ k.transpose(-1, -2)).view(*rows, len(kv))
        if score[0] is not None:
            s = _Evaluation(score, indices, s, live, check_indices, dtype).result()
        s = torch.where(live, s, -torch.inf)
        v = _read(inputs.value, inputs.v_scale, gather, read, batch.owner, dtype)
        softmax.add(s, v)
    out, lse = softmax.result()
    return torch.where(row_live[..., None], out, 0.0), lse, softmax.largest  # 0 * NaN would be NaN


@dataclass
class _Softmax:
    """The online softmax of rows: largest scores and sums [R, Hq, W], and sums of values [R, Hq, W, Dv].

    `m_i` includes the sinks, `largest` does not.
    """

    largest: torch.Tensor
    m_i: torch.Tensor
    l_i: torch.Tensor
    acc: torch.Tensor

    @classmethod
    def of(cls, rows: tuple[int, ...], inputs: Inputs, live: torch.Tensor, dtype: torch.dtype) -> _Softmax:
        """Before the first key. Rows that are `live` begin with the sink of their head."""
        device = live.device
        largest = m_i = torch.full(rows, -torch.inf, dtype=dtype, device=device)
        l_i = torch.zeros(rows, dtype=dtype, device=device)
        acc = torch.zeros(*rows, inputs.value.shape[3], dtype=dtype, device=device)
        if inputs.sinks is not None:
            m_i = m_i.where(~live, inputs.sinks.to(dtype).view(1, -1, 1))
            l_i = (m_i != -torch.inf).to(dtype)
        return cls(largest, m_i, l_i, acc)

    def add(self, s: torch.Tensor, v: torch.Tensor) -> None:
        """Adds keys with scores [R, Hq, W, n] and values [R or 1, Hkv, n, Dv]."""
        self.largest = torch.maximum(self.largest, s.amax(-1))
        m_new = torch.maximum(self.m_i, self.largest)
        m_safe = torch.where(m_new == -torch.inf, 0.0, m_new)
        p = torch.exp(s - m_safe[..., None])
        alpha = torch.exp(self.m_i - m_safe)
        self.l_i = self.l_i * alpha + p.sum(-1)
        partial = p.reshape(len(s), v.shape[1], -1, s.shape[-1]) @ v
        self.acc = self.acc * alpha[..., None] + partial.view_as(self.acc)
        self.m_i = m_new

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and its log-sum-exp. A row without a key is 0 and -inf."""
        m_i, l_i = self.m_i, self.l_i
        out = self.acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
        return out, torch.where(m_i == torch.inf, m_i, m_i + torch.log(l_i))


def _read(
    cache: torch.Tensor,
    scale: float | torch.Tensor | None,
    gather: Gather,
    read: torch.Tensor,
    owner: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of keys or values in the type of the arithmetic [R, Hkv, n, D]; 0 where `read` [R, Hkv, n] is false."""
    rows = _indexed(cache, gather).to(dtype)
    if isinstance(scale, torch.Tensor):
        if scale.dim() == 2 and owner is not None:
            scale = scale[owner]
        per_token = scale.dim() == 3
        rows = rows * (gather(scale)[..., None] if per_token else scale[..., None, None]).to(dtype)
    elif scale is not None:
        rows = rows * scale
    if read.device.type == "cpu" and bool(read.all()):
        return rows
    return torch.where(read[..., None], rows, 0.0)


def _indexed(tensor: torch.Tensor, index: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """Some elements of a tensor. Float8 numbers are taken as bytes: PyTorch 2.9 cannot index them on a CPU."""
    return index(tensor.view(torch.uint8)).view(tensor.dtype) if tensor.dtype in FLOAT8 else index(tensor)


def evaluate(
    outputs: Sequence[Node], graph: Graph, leaves: list, indices: dict[str, torch.Tensor]
) -> list[torch.Tensor]:
    """Computes nodes of a graph or of its captures, such as the bounds of a mask, on index tensors that broadcast."""
    anywhere = torch.ones((), dtype=torch.bool, device=indices["b"].device)
    return _Evaluation((graph, leaves), indices, None, anywhere, check_indices=False).values(outputs)


@dataclass
class _Evaluation:
    """One run of a graph over broadcast tensors [R, Hq, W, n]."""

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
        found = _indexed(tensor, itemgetter(tuple(places)))
        return torch.where(inside, found.to(node.dtype), torch.zeros((), dtype=node.dtype, device=self.device))
