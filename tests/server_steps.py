"""Steps of a server over vLLM's caches, without vLLM: for the interpreter and for GPUs.

A cache of vLLM is one tensor `[num_pages, Hkv, page_size, 2 * D]` for each layer, in one of several orders in memory,
and a part of a larger tensor. A step writes the new tokens of some sequences by their slots, and computes their
attention. Places that no sequence has hold NaN.
"""

from typing import NamedTuple

import torch
from support import assert_close_to_reference

from flexdecode.integrations.vllm.attend import LayerAttention, LayerMods, OfModel, Step, as_hint
from flexdecode.kv.slots import write_kv

# The physical order of pages, heads and tokens of a layer, and the place of the layers: of vLLM's enumeration.
ORDERS = {"LBHNC": (0, 1, 2, 3), "LBNHC": (0, 1, 3, 2), "LHBNC": (0, 2, 1, 3), "BLNHC": (1, 0, 3, 2)}
Hq, Hkv, D, PAGE, PAGES, LAYERS = 8, 2, 32, 16, 24, 2
DTYPES = {"float8_e4m3fn": torch.float8_e4m3fn, "float8_e5m2": torch.float8_e5m2}


class Turn(NamedTuple):
    """New tokens by the number of a sequence, in the order of the batch; 0 tokens fill up a batch."""

    tokens: dict
    padding: int = 0  # rows of the tensors that belong to no sequence


TURNS = [
    Turn({0: 5, 1: 40, 2: 17}),
    Turn({0: 1, 1: 1, 2: 1}),
    Turn({0: 1, 2: 1, 1: 1, 3: 33}, padding=3),
    Turn({3: 1, 0: 4, 1: 0, 2: 1}, padding=2),
    Turn({1: 1, 4: 70}),
    Turn({0: 1, 1: 1, 2: 1, 3: 1, 4: 1, 5: 0, 6: 0}, padding=2),
]


class CacheOfLayer:
    """The cache of one layer, the pages of its sequences, and what they should hold."""

    def __init__(self, order, dtype, device, quantised=None, seed=0):
        sizes = LAYERS, PAGES, Hkv, PAGE
        shape = [sizes[axis] for axis in ORDERS[order]]
        place = [ORDERS[order].index(axis) for axis in range(4)]
        self.quantised = DTYPES.get(quantised)
        pool = torch.full((*shape, 2 * D), torch.nan, dtype=dtype, device=device)
        if self.quantised is not None:
            pool = torch.full((*shape, 2 * D), 0x7F, dtype=torch.uint8, device=device)  # NaN in both types
        self.pool = pool
        self.kv_cache = pool.permute(*place, 4)[1]
        self.device, self.dtype = device, dtype
        self.generator = torch.Generator().manual_seed(seed)
        self.free = torch.randperm(PAGES, generator=self.generator).tolist()
        self.pages, self.rows = {}, {}
        self.scales = None
        if self.quantised is not None:
            self.scales = torch.tensor(0.25, device=device), torch.tensor(0.5, device=device)

    def numbers(self, *shape):
        return torch.randn(*shape, generator=self.generator).to(self.device, self.dtype)

    def new_rows(self, count, place):
        """New keys (0) or values (1) `[count, Hkv, D]` that the cache can hold; the interpreter does not round."""
        rows = self.numbers(count, Hkv, D)
        if self.quantised is None:
            return rows
        scale = self.scales[place]
        return ((rows.float() / scale).to(self.quantised).float() * scale).to(self.dtype)

    def take(self, sequence, count):
        """The slots of new tokens, with new pages where they are needed."""
        pages, length = self.pages.setdefault(sequence, []), self.length(sequence)
        while len(pages) * PAGE < length + count:
            pages.append(self.free.pop())
        return [pages[at // PAGE] * PAGE + at % PAGE for at in range(length, length + count)]

    def length(self, sequence):
        return self.rows[sequence][0].shape[1] if sequence in self.rows else 0

    def add(self, sequence, key, value):
        """Keeps what the cache should hold of new tokens `[T, Hkv, D]`."""
        new = [x.transpose(0, 1) for x in (key, value)]
        if self.quantised is not None:
            new = [(x.float() / scale).to(self.quantised) for x, scale in zip(new, self.scales, strict=True)]
        old = self.rows.get(sequence)
        self.rows[sequence] = new if old is None else [_join(x, y) for x, y in zip(old, new, strict=True)]

    def table(self, sequences):
        """The page table of a batch; entries past the last page mean nothing."""
        width = PAGES
        lines = [self.pages.get(x, []) + [-1] * (width - len(self.pages.get(x, []))) for x in sequences]
        return torch.tensor(lines, dtype=torch.int32, device=self.device)


def _join(old, new):
    if old.element_size() > 1:
        return torch.cat([old, new], 1)
    return torch.cat([old.view(torch.uint8), new.view(torch.uint8)], 1).view(old.dtype)


def take_turn(cache, attention, turn):
    """Writes the tokens of a turn and computes their attention; returns what `compare` compares."""
    sequences, counts = list(turn.tokens), list(turn.tokens.values())
    total = sum(counts)
    query = cache.numbers(total + turn.padding, Hq, D)
    key, value = (cache.new_rows(total + turn.padding, place) for place in (0, 1))
    slots = [slot for sequence, count in turn.tokens.items() for slot in cache.take(sequence, count)]
    slots = torch.tensor(slots + [-1] * turn.padding, dtype=torch.int64, device=cache.device)
    kv = attention.as_numbers(cache.kv_cache)
    keys, values = kv[..., :D], kv[..., D:]
    write_kv(key, value, keys, values, slots, *(cache.scales or ()))
    starts = torch.tensor([0, *counts], dtype=torch.int32).cumsum(0, dtype=torch.int32)
    for sequence, begin, end in zip(sequences, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end > begin:
            cache.add(sequence, key[begin:end], value[begin:end])
    lens = torch.tensor([cache.length(x) for x in sequences], dtype=torch.int32, device=cache.device)
    step = Step(starts.to(cache.device), lens, cache.table(sequences), as_hint(max(counts)))
    out = torch.full((total + turn.padding, Hq, D), torch.nan, dtype=cache.dtype, device=cache.device)
    attention.compute(query[:total], keys, values, step, scales=cache.scales, out=out[:total])
    return query, out, starts


def compare(cache, turn, query, out, starts, score_mod, mask_mod, **model):
    """Compares the outputs of a turn, sequence by sequence, by the rule of all tests."""
    for sequence, begin, end in zip(turn.tokens, starts[:-1].tolist(), starts[1:].tolist(), strict=True):
        if end > begin:
            key, value = (x[None].cpu() for x in cache.rows[sequence])
            rows = out[begin:end].transpose(0, 1)[None]
            if cache.scales is not None:
                model = model | dict(zip(("k_scale", "v_scale"), (x.item() for x in cache.scales), strict=True))
            assert_close_to_reference(
                rows, None, query[begin:end].transpose(0, 1)[None].cpu(), key, value, score_mod, mask_mod, **model
            )
    assert out[starts[-1] :].isnan().all()


def check_turns(order, dtype, device, options, quantised=None):
    """A model with a soft cap, ALiBi, a window and sinks, and a user's bias, over all turns."""
    slopes = torch.arange(1, Hq + 1, device=device) * 0.05
    sinks = torch.linspace(-1.0, 1.0, Hq, device=device, dtype=dtype)

    def bias(score, b, h, q_idx, kv_idx):
        return score + 0.25 * torch.cos((q_idx - kv_idx) * (h + 1) * 0.3)

    cache = CacheOfLayer(order, dtype, device, quantised)
    attention = LayerAttention(OfModel(D**-0.5, 4.0, slopes, 24, sinks), cache.quantised, options)
    attention.user = LayerMods(bias)
    on_cpu = slopes.cpu()

    def score_mod(score, b, h, q_idx, kv_idx):
        return bias(torch.tanh(score / 4.0) * 4.0 - on_cpu[h] * (q_idx - kv_idx), b, h, q_idx, kv_idx)

    def mask_mod(b, h, q_idx, kv_idx):
        return (kv_idx <= q_idx) & (q_idx - kv_idx < 24)

    for turn in TURNS:
        query, out, starts = take_turn(cache, attention, turn)
        compare(cache, turn, query, out, starts, score_mod, mask_mod, sinks=sinks.cpu())
    return cache
