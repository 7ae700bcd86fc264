"""The torch backend: runs a traced graph in PyTorch operations, over chunks of the KV cache.

It gives the same results as the generated kernel, on any device. It needs memory for one chunk of scores.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from ..analysis.analyze import MAX_KV_LEN, MAX_KV_OFFSET
from ..analysis.bounds import find_bounds
from ..call.formats import CONTIGUOUS
from ..call.inputs import Inputs
from ..call.packing import rows_of_sequences
from ..codegen.arguments import Call
from ..frontend.graph import Graph
from .evaluation import Evaluation
from .parts import Numbers, Part, Rows, find_parts, spread
from .products import Cached, Chunk, product_dtype, scores, weighted

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
    batch = (_packed_rows if inputs.packed else _padded_rows)(inputs)
    if batch.place is None:
        query = inputs.query
    else:
        query = inputs.query[batch.place.clamp(max=inputs.num_tokens - 1)].transpose(1, 2)
    softmax = _attend(call, graphs, query, batch, check_indices)
    for result, part_of, empty, width in (
        (call.out, softmax.out, 0.0, (inputs.value.shape[3],)),
        (call.lse, softmax.lse, -torch.inf, ()),
        (call.max_scores, softmax.max_scores, -torch.inf, ()),
    ):
        if result is None:
            continue
        part = part_of().reshape(*query.shape[:3], *width)
        if batch.live is not None:
            live = batch.live[:, None]
            part = torch.where(live[..., None] if width else live, part, empty)
        if batch.place is None:
            result.copy_(part)
        else:
            # One row more than the output takes what belongs to no token.
            whole = part.new_full((inputs.num_tokens + 1, *result.shape[1:]), empty)
            result.copy_(whole.index_copy(0, batch.place.flatten(), part.transpose(1, 2).flatten(0, 1))[:-1])


class _Rows(NamedTuple):
    """Query tokens as a batch of R rows of W tokens: the padded form, or pieces of the sequences of a packed query.

    Of `Numbers`, there is one for all rows, or int64 [R].

    Attributes:
        owner: the sequence of each row, int64 [R]; None if each sequence has one row.
        lens, starts: slots up to the last key of each row, and before its first one.
        shift: position of slot 0 of each row.
        tokens: of the sequence of each row.
        first: position of the first token of the sequence of each row.
        before: tokens of its sequence before each row.
        width: W.
        live: which tokens there are, bool [R, W]; None if all.
        place: row of the packed query and its output for each token, int64 [R, W]; T where there is no token. None if
            the query is padded.
    """

    owner: torch.Tensor | None
    lens: Numbers
    starts: Numbers
    shift: Numbers
    tokens: Numbers
    first: Numbers
    before: Numbers
    width: int
    live: torch.Tensor | None
    place: torch.Tensor | None = None

    def q_idx(self, device: torch.device) -> torch.Tensor:
        """Position of each token, int64 [R, W], or [1, W] if it is the same in all rows.

        A token past the last one of its sequence has the position of that one, so that mods see only positions of the
        sequence.
        """
        token = torch.arange(self.width, device=device) + spread(self.before, 2)
        if isinstance(self.tokens, torch.Tensor):
            token = token.minimum(self.tokens.clamp(min=1)[:, None] - 1)
        return (token + spread(self.first, 2)).view(-1, self.width)


class _Sequences(NamedTuple):
    """Of each sequence, a number for all or int64 [B]: as in `_Rows`, tokens, position of the first one."""

    lens: Numbers
    starts: Numbers
    shift: Numbers
    tokens: Numbers
    first: Numbers


def _sequences(inputs: Inputs) -> _Sequences:
    """What a call says of its sequences."""
    device = inputs.query.device
    lens = _within(inputs.given_kv_lens, 0, inputs.max_kv_len, device)
    tokens = _within(inputs.given_q_lens, 0, inputs.num_tokens, device)
    starts = _within(inputs.kv_starts, 0, MAX_KV_LEN, device)
    shift = _within(inputs.kv_offset, -MAX_KV_OFFSET, MAX_KV_OFFSET, device)  # as in the kernel, which cannot refuse it
    first = inputs.q_offset
    if first is None:
        first = shift + lens - tokens
    elif isinstance(first, torch.Tensor):
        first = first.to(device, torch.int64)
    return _Sequences(lens, starts, shift, tokens, first)


def _within(given: Numbers | None, least: int, most: int, device: torch.device) -> Numbers:
    """Numbers of a call, clamped; None counts as 0."""
    if given is None:
        return 0
    if isinstance(given, int):
        return min(max(given, least), most)
    return given.to(device, torch.int64).clamp(least, most)


def _padded_rows(inputs: Inputs) -> _Rows:
    """Each sequence is a row."""
    found, width, live = _sequences(inputs), inputs.num_tokens, None
    if isinstance(found.tokens, torch.Tensor):
        live = torch.arange(width, device=found.tokens.device) < found.tokens[:, None]
    return _Rows(None, *found, 0, width, live)


def _packed_rows(inputs: Inputs) -> _Rows:
    """Cuts the sequences of a packed query into rows of about the mean of their tokens.

    There are as many rows as any division of T tokens among B sequences needs. So nothing is read from a GPU.
    """
    assert inputs.cu_seqlens_q is not None
    found = _sequences(inputs)
    start, tokens = rows_of_sequences(inputs.cu_seqlens_q, inputs.num_tokens)
    width = 1 << (-(-inputs.num_tokens // inputs.batch) - 1).bit_length()
    rows = -(-tokens // width)
    ends = rows.cumsum(0)
    row = torch.arange(inputs.num_tokens // width + inputs.batch, device=tokens.device)
    owner = torch.searchsorted(ends, row, right=True).clamp(max=inputs.batch - 1)
    before = (row - (ends - rows)[owner]) * width
    token = before[:, None] + torch.arange(width, device=tokens.device)
    live = token < tokens[owner][:, None]
    place = torch.where(live, start[owner][:, None] + token, inputs.num_tokens)
    of_rows = _Sequences(*(x[owner] if isinstance(x, torch.Tensor) else x for x in found))
    return _Rows(owner, *of_rows, before, width, live, place)


def _attend(
    call: Call,
    graphs: tuple[Graph | None, Graph | None],
    query: torch.Tensor,
    batch: _Rows,
    check_indices: bool,
) -> _Softmax:
    """The attention of rows of query tokens.

    Args:
        call: checked.
        graphs: of the score_mod and the mask_mod.
        query: the tokens, [R, Hq, W, D].
        batch: what they are.
        check_indices: as for `decode`.
    """
    inputs, device = call.inputs, query.device
    types = query.dtype, inputs.key.dtype, inputs.value.dtype
    dtype = torch.float64 if torch.float64 in types else torch.float32
    of_values = product_dtype(query, inputs.value, dtype)
    score, mask = zip(graphs, (call.score_leaves, call.mask_leaves), strict=True)
    count, heads, width, _ = query.shape
    num_kv_heads = inputs.key.shape[1]
    indices = {}
    if graphs != (None, None):
        b = torch.arange(count, device=device) if batch.owner is None else batch.owner
        indices = {
            "b": b.view(-1, 1, 1, 1),
            "h": torch.arange(heads, device=device).view(1, -1, 1, 1),
            "q_idx": batch.q_idx(device)[:, None, :, None],
        }
    # The rows of one KV head are together.
    grouped = (query.to(dtype) * call.scale).reshape(count, num_kv_heads, -1, inputs.head_dim)
    softmax = _Softmax(grouped, inputs)
    step = max(16, CHUNK_ELEMENTS // max(1, count * heads * width))
    for part in _parts(call, graphs, batch, indices, check_indices):
        for start in range(part.start, part.end, step):
            slots = range(start, min(start + step, part.end))
            if not part.whole or indices:
                kv = torch.arange(slots.start, slots.stop, device=device).view(1, 1, 1, -1)
                indices["kv_idx"] = kv if inputs.kv_offset is None else kv + spread(batch.shift, 4)
            live = read = None
            if not part.whole:
                live = _live(mask, indices, kv, batch, check_indices, dtype)
                # Keys that no row of their head attends to may hold anything, and their page entries may be invalid.
                of_heads = 1 if live.shape[1] == 1 else num_kv_heads
                read = live.reshape(live.shape[0], of_heads, -1, len(slots)).any(2)
                if device.type == "cpu" and bool(read.all()):
                    read = None
            gather = inputs.format.gather(inputs.key, inputs.table, slots, read, check_indices, batch.owner)
            chunk = Chunk(gather, inputs.format is CONTIGUOUS, read, batch.owner, count, len(slots))
            s = scores(grouped, Cached(chunk, inputs.key, inputs.k_scale, dtype))
            if score[0] is not None or live is not None:
                s = s.reshape(count, heads, width, len(slots))
                if score[0] is not None:
                    s = Evaluation(score, indices, s, live, check_indices, dtype).result().expand(s.shape)
                s = s if live is None else torch.where(live, s, -torch.inf)
                s = s.reshape(count, num_kv_heads, -1, len(slots))
            softmax.add(s, Cached(chunk, inputs.value, inputs.v_scale, of_values))
    return softmax


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
    if inputs.query.device.type != "cpu":
        return [Part(0, inputs.max_kv_len, False)]
    if check_indices:
        return [Part(0, batch.lens if isinstance(batch.lens, int) else int(batch.lens.max()), False)]
    bounds = find_bounds(*graphs, inputs.q_offset is not None, inputs.kv_offset is not None)
    live = None if batch.live is None else batch.live[:, None]
    starts, lens, shift = spread(batch.starts, 3), spread(batch.lens, 3), spread(batch.shift, 3)
    return find_parts(call, graphs, bounds, Rows(live, starts, lens, shift, indices))


def _live(
    mask: tuple[Graph | None, list],
    indices: dict[str, torch.Tensor],
    kv: torch.Tensor,
    batch: _Rows,
    check_indices: bool,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Which tokens attend to which of some slots `kv` [1, 1, 1, n], bool that broadcasts to [R, Hq, W, n]."""
    live = (kv < spread(batch.lens, 4)) & (kv >= spread(batch.starts, 4))
    if batch.live is not None:
        live = live & batch.live[:, None, :, None]
    if mask[0] is None:
        return live
    return live & Evaluation(mask, indices, None, live, check_indices, dtype).result()


class _Softmax:
    """The online softmax of M rows for each KV head.

    Attributes:
        largest: the largest score of each row [R, Hkv, M, 1], without its sink; None before the first key.
        state: the same with the sink, the sum of the weights [R, Hkv, M, 1], and that of weighted values
            [R, Hkv, M, Dv]; None before the first key, if there are no sinks.
    """

    def __init__(self, query: torch.Tensor, inputs: Inputs) -> None:
        """Before the first key.

        Args:
            query: the rows [R, Hkv, M, D], in the type of the arithmetic.
            inputs: of the call.
        """
        self.query, self.width = query, inputs.value.shape[3]
        self.largest: torch.Tensor | None = None
        self.state: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None
        if inputs.sinks is not None:
            count, heads, rows, _ = query.shape
            sinks = inputs.sinks.to(query.dtype).view(1, inputs.num_q_heads, 1)
            width = heads * rows // inputs.num_q_heads
            self.state = self._without_keys(sinks.expand(count, -1, width).reshape(count, heads, rows, 1))

    def _without_keys(self, m_i: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return m_i, (m_i != -torch.inf).to(m_i.dtype), self.query.new_zeros(*m_i.shape[:3], self.width)

    def _no_score(self) -> torch.Tensor:
        return self.query.new_full((*self.query.shape[:3], 1), -torch.inf)

    def add(self, s: torch.Tensor, values: Cached) -> None:
        """Adds keys with scores [R, Hkv, M, n]."""
        largest = s.amax(-1, keepdim=True)
        m_i = largest if self.state is None else self.state[0].maximum(largest)
        # A row without a live key keeps -inf; it must not meet -inf - -inf.
        m_safe = m_i.clamp(min=torch.finfo(s.dtype).min)
        p = _exp(s - m_safe)
        l_i = p.sum(-1, keepdim=True)
        acc = weighted(p, l_i, values)
        if self.state is not None:
            m_before, l_before, acc_before = self.state
            alpha = torch.exp(m_before - m_safe)
            l_i, acc = l_i + l_before * alpha, acc + acc_before * alpha
        self.largest = largest if self.largest is None else self.largest.maximum(largest)
        self.state = m_i, l_i, acc

    def out(self) -> torch.Tensor:
        """The output [R, Hkv, M, Dv]: 0 of a row without a key."""
        _, l_i, acc = self.state or self._without_keys(self._no_score())
        return acc / l_i.clamp(min=torch.finfo(acc.dtype).tiny)

    def lse(self) -> torch.Tensor:
        """Log-sum-exp [R, Hkv, M, 1]: -inf of a row without a key or sink."""
        m_i, l_i, _ = self.state or self._without_keys(self._no_score())
        return torch.where(m_i == torch.inf, m_i, m_i + torch.log(l_i))

    def max_scores(self) -> torch.Tensor:
        """The largest scores [R, Hkv, M, 1]: -inf of a row without a key."""
        return self._no_score() if self.largest is None else self.largest


def _exp(x: torch.Tensor) -> torch.Tensor:
    """The exponential, in place; 0 near and below the smallest normal number, where CPUs are a hundred times slower."""
    least, smallest = _LEAST[x.dtype]
    return torch.threshold_(x.clamp_(min=least).exp_(), smallest, 0.0)


def _least(dtype: torch.dtype) -> tuple[int, float]:
    """The least number whose exponential is normal, and a little more than this exponential."""
    least = math.ceil(math.log(torch.finfo(dtype).tiny))
    return least, 1.001 * math.exp(least)


_LEAST = {dtype: _least(dtype) for dtype in (torch.float32, torch.float64)}
