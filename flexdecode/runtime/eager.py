"""The torch backend: runs a traced graph in PyTorch operations, over chunks of the KV cache.

It gives the same results as the generated kernel, on any device. It needs memory for one chunk of scores.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..analysis.analyze import MAX_KV_OFFSET
from ..analysis.bounds import find_bounds
from ..call.formats import CONTIGUOUS, Gather
from ..call.inputs import Inputs
from ..call.packing import rows_of_sequences
from ..codegen.arguments import Call
from ..frontend.graph import Graph
from .evaluation import Evaluation, indexed
from .parts import Part, Rows, find_parts

CHUNK_ELEMENTS = 1 << 21  # scores in memory at one time
CONVERTED_ELEMENTS = 1 << 17  # of keys that are converted at one time, so that they stay in a cache of the CPU


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
    step = _step(rows, inputs)
    for part in _parts(call, graphs, batch, indices, check_indices):
        for start in range(part.start, part.end, step):
            kv = torch.arange(start, min(start + step, part.end), device=device)
            indices["kv_idx"] = kv.view(1, 1, 1, -1)
            if inputs.kv_offset is not None:
                indices["kv_idx"] = indices["kv_idx"] + batch.shift.view(-1, 1, 1, 1)
            live = read = None
            if not part.whole:
                live = _live(mask, indices, kv, batch, row_live, check_indices, dtype)
                # Keys that no row of their head attends to may hold anything, and their page entries may be invalid.
                read = live.expand(*rows, -1).reshape(*shared, len(kv)).any(2)
                if device.type == "cpu" and bool(read.all()):
                    read = None
            gather = inputs.format.gather(inputs.key, inputs.table, kv, read, check_indices, batch.owner)
            k = _read(inputs.key, inputs.k_scale, gather, read, batch.owner, dtype)
            s = (grouped @ k.transpose(-1, -2)).view(*rows, len(kv))
            if score[0] is not None:
                among = row_live[..., None] if live is None else live
                s = Evaluation(score, indices, s, among, check_indices, dtype).result()
            s = s.expand(*rows, len(kv)) if live is None else torch.where(live, s, -torch.inf)
            softmax.add(s, _read(inputs.value, inputs.v_scale, gather, read, batch.owner, dtype))
    out, lse = softmax.result()
    return torch.where(row_live[..., None], out, 0.0), lse, softmax.largest  # 0 * NaN would be NaN


def _step(rows: tuple[int, ...], inputs: Inputs) -> int:
    """Keys of a chunk: so many that scores stay within a limit, and keys that are converted within a cache."""
    step = CHUNK_ELEMENTS // max(1, math.prod(rows))
    if not inputs.key.dtype.is_floating_point or inputs.key.dtype.itemsize < 4:
        caches, heads = inputs.key.shape[:2]
        owners = rows[0] if inputs.format is not CONTIGUOUS or caches > 1 else 1
        step = min(step, max(256, CONVERTED_ELEMENTS // (owners * heads * inputs.head_dim)))
    return max(16, step)


def _parts(
    call: Call,
    graphs: tuple[Graph | None, Graph | None],
    batch: _Rows,
    indices: dict[str, torch.Tensor],
    check_indices: bool,
) -> list[Part]:
    """The parts of the cache that are read. On a GPU all of it, because nothing there may be waited for.

    Where indices are checked, all of the sequences is read, because bounds may come from a read out of range.
    """
    inputs = call.inputs
    if batch.lens.device.type != "cpu":
        return [Part(0, inputs.max_kv_len, False)]
    if check_indices:
        return [Part(0, int(batch.lens.max()), False)]
    bounds = find_bounds(*graphs, inputs.q_offset is not None, inputs.kv_offset is not None)
    starts, lens, shift = (x[:, None, None] for x in (batch.starts.clamp(min=0), batch.lens, batch.shift))
    rows = Rows(batch.live[:, None], starts, lens, shift, indices)
    return find_parts(call, graphs, bounds, rows)


def _live(
    mask: tuple[Graph | None, list],
    indices: dict[str, torch.Tensor],
    kv: torch.Tensor,
    batch: _Rows,
    row_live: torch.Tensor,
    check_indices: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Which rows attend to which of some slots `kv`, bool that broadcasts to [R, Hq, W, n]."""
    inside = (kv < batch.lens[:, None]) & (kv >= batch.starts[:, None])
    live = inside[:, None, None] & row_live[..., None]
    if mask[0] is None:
        return live
    return live & Evaluation(mask, indices, None, live, check_indices, dtype).result()


@dataclass
class _Softmax:
    """The online softmax of rows: largest scores and sums [R, Hq, W], and sums of values [R, Hq, W, Dv].

    `m_i` includes the sinks, `largest` does not.
    """

    largest: torch.Tensor
    m_i: torch.Tensor
    l_i: torch.Tensor
    acc: torch.Tensor
    is_new: bool = True

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
        p = _exp(s - m_safe[..., None])
        alpha = torch.exp(self.m_i - m_safe)
        self.l_i = self.l_i * alpha + p.sum(-1)
        partial = (p.reshape(len(s), v.shape[1], -1, s.shape[-1]) @ v).view_as(self.acc)
        self.acc = partial if self.is_new else self.acc * alpha[..., None] + partial
        self.m_i, self.is_new = m_new, False

    def result(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The output and its log-sum-exp. A row without a key is 0 and -inf."""
        m_i, l_i = self.m_i, self.l_i
        out = self.acc / torch.where(l_i == 0, 1.0, l_i)[..., None]
        return out, torch.where(m_i == torch.inf, m_i, m_i + torch.log(l_i))


def _exp(x: torch.Tensor) -> torch.Tensor:
    """The exponential; 0 near and below the smallest normal number, where CPUs are a hundred times slower."""
    least = math.ceil(math.log(torch.finfo(x.dtype).tiny))
    return torch.exp(x.clamp(min=least)).sub_(1.001 * math.exp(least)).relu_()


def _read(
    cache: torch.Tensor,
    scale: float | torch.Tensor | None,
    gather: Gather,
    read: torch.Tensor | None,
    owner: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Rows of keys or values in the type of the arithmetic [R, Hkv, n, D]; 0 where `read` [R, Hkv, n] is false."""
    rows = indexed(cache, gather).to(dtype)
    if isinstance(scale, torch.Tensor):
        if scale.dim() == 2 and owner is not None:
            scale = scale[owner]
        per_token = scale.dim() == 3
        rows = rows * (gather(scale)[..., None] if per_token else scale[..., None, None]).to(dtype)
    elif scale is not None:
        rows = rows * scale
    return rows if read is None else torch.where(read[..., None], rows, 0.0)
