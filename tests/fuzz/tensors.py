"""The tensors of a case: clean ones for the reference, and the same with NaN in every dead place for the call."""

import math
import re
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from cache_cases import QUANTISED, fill_with_nan, quantise

from flexdecode import KVCache, PagedKVCache, mods
from flexdecode.reference import evaluate_mod

from .case import Case

FAR_PAGES = (-1, None, 1 << 30, 0)  # what dead entries of a page table hold, in turn; None is the number of pages


@dataclass
class Mod:
    """The mods of a case, once with clean and once with spoiled captures."""

    score: object
    mask: object


class Inputs:
    """The arguments of one call.

    Attributes:
        call: arguments of `flex_decode`.
        reference: arguments of `reference_decode`, by name; those of the padded form if the query is packed.
        packed_reference: those of a packed query.
    """

    def __init__(self, case: Case):
        self.case = case
        self.generator = torch.Generator().manual_seed(case.data)
        self.lens = torch.tensor([case.N] * case.B if case.kv_lens is None else case.kv_lens).clamp(max=case.N)
        tokens = torch.tensor([case.Q] * case.B if case.q_lens is None else case.q_lens)
        first = self.lens - tokens
        if case.q_offset is not None:
            first = torch.as_tensor(case.q_offset).expand(case.B)
        self.rows = torch.arange(case.Q) < tokens[:, None]  # [B, Q], query tokens that exist
        token = torch.arange(case.Q).minimum(tokens.clamp(min=1)[:, None] - 1)
        self.q_idx = first[:, None] + token  # [B, Q]
        self.captures = {name: self._capture(x) for name, x in case.captures.items()}
        clean = self._mods(self.captures)
        self.reference = {"score_mod": clean.score, "mask_mod": clean.mask}
        self.call = {"return_lse": case.return_lse}
        self._add_numbers()
        self._add_query()
        self._add_caches()
        self._add_mods()
        self._add_block_mask()
        if case.out_layout is not None:
            out = torch.full((case.B, case.Hq, case.Q, case.Dv), torch.nan, dtype=getattr(torch, case.dtype))
            self.call["out"] = self._place(out, case.out_layout)
        if case.packed is not None:
            self._pack_query()

    # --- Making tensors -----------------------------------------------------------------------------------------------

    def _randn(self, *shape):
        numbers = torch.randn(*shape, generator=self.generator) * self.case.magnitude
        return numbers.to(getattr(torch, self.case.dtype))

    def _place(self, numbers, layout):
        return place(numbers.to(self.case.device), layout)

    def _indices(self, numbers, dtype=None):
        """A small tensor, in the layout for those."""
        numbers = numbers if dtype is None else numbers.to(getattr(torch, dtype))
        if self.case.index_layout == "contiguous":
            return numbers.to(self.case.device)
        filler = torch.nan if numbers.is_floating_point() else 99
        storage = torch.full((*numbers.shape[:-1], 2 * numbers.shape[-1] + 1), filler, dtype=numbers.dtype)
        storage = storage.to(self.case.device)
        storage[..., 1::2] = numbers.to(self.case.device)
        return storage[..., 1::2]

    def _capture(self, x):
        """A captured number, or a tensor without dead places."""
        if isinstance(x, (int, float)):
            return x
        case = self.case
        sizes = {"B": case.B, "Hq": case.Hq, "Hkv": case.Hkv, "N": case.N + 3, "P": case.N + case.Q + 64}
        shape = [sizes.get(axis, axis) for axis in x.axes]
        if x.layout == "expanded" and shape:
            shape[0] = 1
        dtype = getattr(torch, x.dtype)
        if dtype.is_floating_point:
            uniform = torch.rand(shape, generator=self.generator, dtype=torch.float64)
            numbers = (x.low + (x.high - x.low) * uniform).to(dtype)
        else:
            numbers = torch.randint(int(x.low), int(x.high) + 1, shape, generator=self.generator).to(dtype)
        numbers = numbers if x.on_cpu else numbers.to(case.device)
        if x.layout == "expanded" and shape:
            return numbers.expand(sizes.get(x.axes[0], x.axes[0]), *shape[1:])
        if x.layout == "transposed" and len(shape) > 1:
            return numbers.transpose(0, -1).contiguous().transpose(0, -1)
        if x.layout == "strided" and shape:
            storage = numbers.new_zeros(*shape[:-1], 2 * shape[-1] + 1)
            storage[..., 1::2] = numbers
            return storage[..., 1::2]
        return numbers

    # --- Arguments ----------------------------------------------------------------------------------------------------

    def _add_numbers(self):
        case = self.case
        for name in ("kv_lens", "q_lens", "q_offset"):
            given = getattr(case, name)
            if isinstance(given, tuple):
                self.call[name] = self._indices(torch.tensor(given), case.index_dtype)
                self.reference[name] = torch.tensor(given)
            elif given is not None:
                self.call[name] = self.reference[name] = given
        if case.sinks is not None:
            sinks = 2 * torch.randn(case.Hq, generator=self.generator)
            sinks[torch.rand(case.Hq, generator=self.generator) < 0.2] = -torch.inf
            self.reference["sinks"] = sinks.to(getattr(torch, case.sinks))
            self.call["sinks"] = self._indices(self.reference["sinks"])
        if case.scale is not None:
            self.call["scale"] = self.reference["scale"] = case.scale

    def _add_query(self):
        case = self.case
        query = self._randn(case.B, case.Hq, case.Q, case.D)
        self.reference["query"] = query
        if "queries" in case.dead:
            query = query.masked_fill(~self.rows[:, None, :, None], torch.nan)
        self.call["query"] = self._place(query, case.layout)

    def _pack_query(self):
        """Makes a packed query of the padded one, in both calls."""
        case, tokens = self.case, self.rows.sum(1)
        before, after, max_q_len = case.packed
        starts = torch.cat([torch.zeros(1, dtype=torch.long), tokens.cumsum(0)]).to(torch.int32) + before
        self.num_rows = int(starts[-1]) + after
        self.packed_reference = {name: x for name, x in self.reference.items() if name != "q_lens"}
        self.packed_reference |= {"query": self.pack(self.reference["query"], 0.5), "cu_seqlens_q": starts}
        self.call.pop("q_lens", None)
        self.call |= {"cu_seqlens_q": self._indices(starts), "max_q_len": max_q_len}
        # `place` takes [B, H, tokens, D].
        rows = self.pack(self.call["query"], torch.nan if "queries" in case.dead else 0.5)
        self.call["query"] = place(rows.transpose(0, 1)[None], case.layout)[0].transpose(0, 1)
        if "out" in self.call:
            out = torch.full((1, case.Hq, self.num_rows, case.Dv), torch.nan, dtype=getattr(torch, case.dtype))
            self.call["out"] = self._place(out, case.out_layout)[0].transpose(0, 1)

    def pack(self, padded, fill):
        """`[B, Hq, Q, ...]` as rows `[T, Hq, ...]`; those of no sequence hold `fill`."""
        rows = padded.new_full((self.num_rows, self.case.Hq, *padded.shape[3:]), fill)
        found = padded.transpose(1, 2)[self.rows.to(padded.device)]
        rows[self.case.packed[0] :][: len(found)] = found
        return rows

    def _add_mods(self):
        """Spoils what no attending pair reads of the captures."""
        spoiled = dict(self.captures)
        if "captures" in self.case.dead:
            for name, x in self.case.captures.items():
                if getattr(x, "used_in", "") and "N" in x.axes and x.layout != "expanded":
                    spoiled[name] = self._spoiled(spoiled[name], x)
        dirty = self._mods(spoiled)
        self.call |= {"score_mod": dirty.score, "mask_mod": dirty.mask}

    def _spoiled(self, tensor, x):
        """A captured tensor with NaN (integers: 99, bools: the other value) where no attending pair reads it."""
        read = self._attended() if x.used_in == "score" else self._inside()  # [B, Hq, N + 3]
        read = read if "B" in x.axes else read.any(0, True)
        read = read if "Hq" in x.axes else read.any(1, True)
        along = lambda axis: torch.arange(tensor.shape[axis]).view(-1, *[1] * (tensor.ndim - 1 - axis))
        places = [along(x.axes.index(name)) if name in x.axes else 0 for name in ("B", "Hq", "N")]
        dead = ~read[tuple(places)].expand(tensor.shape).to(tensor.device)
        result = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
        result.copy_(tensor)
        if tensor.dtype == torch.bool:
            return result.logical_xor_(dead)
        if tensor.is_floating_point():
            _bits(result)[dead] = 0x7F if tensor.element_size() == 1 else torch.nan
            return result
        return result.masked_fill_(dead, 99)

    def _inside(self):
        """Which positions a sequence has, [B, Hq, N + 3]."""
        inside = torch.arange(self.case.N + 3) < self.lens[:, None]
        return inside[:, None].expand(-1, self.case.Hq, -1)

    def _attended(self):
        """Which positions a head attends to, [B, Hq, N + 3]."""
        attended = self._inside().clone()
        if self.reference["mask_mod"] is None:
            return attended & self.rows.any(1)[:, None, None]
        for b, rows in enumerate(self.rows):
            grid = torch.tensor([b]), torch.arange(self.case.Hq), self.q_idx[b][rows], torch.arange(self.case.N + 3)
            attended[b] &= evaluate_mod(self.reference["mask_mod"], grid)[0].any(1)
        return attended

    def _mods(self, captures):
        case = self.case
        make = lambda text, score: make_mod(text, captures, score, case.holder)
        return Mod(make(case.score_mod, "score, "), make(case.mask_mod, ""))

    # --- Caches -------------------------------------------------------------------------------------------------------

    def _add_caches(self):
        case = self.case
        batch = case.B if case.cache_batch == "own" else 1
        key = self._randn(batch, case.Hkv, case.N, case.D)
        value = key[..., : case.Dv] if case.latent else self._randn(batch, case.Hkv, case.N, case.Dv)
        if case.cache != "tensors":
            return self._add_cache_object(key, value)
        scales = {"k_scale": None, "v_scale": None}
        if case.stored is not None:
            key, scales["k_scale"] = self._quantised(key, case.k_scale)
            if case.latent:
                value, scales["v_scale"] = key[..., : case.Dv], scales["k_scale"]
            else:
                value, scales["v_scale"] = self._quantised(value, case.v_scale)
        if case.page_size is not None and case.shared_pages:
            same = case.shared_pages * case.page_size
            for x in (key, value, *scales.values()):
                if isinstance(x, torch.Tensor) and x.dim() > 2:
                    _bits(x)[:, :, :same] = _bits(x)[:1, :, :same].clone()
        self.reference |= {"key": key, "value": value} | {n: s for n, s in scales.items() if s is not None}
        live = self._live(batch)
        if case.page_size is not None:
            put = self._make_pages(live)
        else:
            put = lambda x, layout=case.cache_layout: self._place(_spoil(x, live), layout)
        placed = put(key)
        if case.cache_batch == "expanded":
            placed = placed.expand(case.B, -1, -1, -1)
        self.call["key"] = placed
        if case.latent:
            self.call["value"] = placed[..., : case.Dv]
        else:
            value = put(value, case.value_layout or case.cache_layout)
            self.call["value"] = value.expand(case.B, -1, -1, -1) if case.cache_batch == "expanded" else value
        for name, scale in scales.items():
            if isinstance(scale, torch.Tensor):
                tokens = scale.dim() == 3
                scale = put(scale[..., None]).squeeze(-1) if tokens else self._indices(scale)
                scale = scale.expand(case.B, -1, -1) if tokens and case.cache_batch == "expanded" else scale
            if scale is not None:
                self.call[name] = scale

    def _quantised(self, cache, form):
        """Stored numbers, and the scale, which for a shared batch is repeated where the call wants one of its own."""
        case = self.case
        if cache.numel() == 0:
            form = "number" if form == "number" else "heads"
            scale = 1.0 if form == "number" else torch.ones(case.Hkv)
            return cache.to(QUANTISED[case.stored]), scale
        stored, scale = quantise(cache, QUANTISED[case.stored], form, getattr(torch, case.scale_dtype))
        if form == "sequences" and len(scale) != case.B:
            scale = scale.expand(case.B, -1).contiguous()
        return stored, scale

    def _live(self, batch):
        """Where rows of the cache must hold numbers, [batch, Hkv, N]."""
        case = self.case
        live = torch.ones(case.B, case.Hkv, case.N, dtype=torch.bool)
        if "lengths" in case.dead or case.page_size is not None:
            live &= (torch.arange(case.N) < self.lens[:, None])[:, None]
        if "mask" in case.dead and case.live and case.Q and case.block_mask is None:
            live &= self._live_by_mask()
        return live if len(live) == batch else live.any(0, keepdim=True)

    def _live_by_mask(self):
        """Inside one of the intervals of the mask, each taken from its first to its last row: [B, Hkv, N]."""
        case = self.case
        numbers = lambda x: x.double().cpu() if isinstance(x, torch.Tensor) else float(x)
        most = lambda *xs: torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, xs))).amax(0)
        least = lambda *xs: torch.stack(torch.broadcast_tensors(*map(torch.as_tensor, xs))).amin(0)
        names = {name: numbers(x) for name, x in self.captures.items()}
        names |= {"b": torch.arange(case.B)[:, None, None], "h": torch.arange(case.Hq)[:, None]}
        names |= {"q_idx": self.q_idx[:, None].double(), "inf": math.inf, "most": most, "least": least}
        live = torch.zeros(case.B, case.Hkv, case.N, dtype=torch.bool)
        position = torch.arange(case.N)
        for bounds in eval(case.live, names):
            lo, hi = (torch.as_tensor(x).double().expand(case.B, case.Hq, case.Q) for x in bounds)
            # A number beyond 2**40 gives no bound, whichever side it is on.
            lo, hi = lo.where(lo.abs() < 2.0**39, -math.inf), hi.where(hi.abs() < 2.0**39, math.inf)
            lo, hi = (x.reshape(case.B, case.Hkv, case.Hq // case.Hkv * case.Q) for x in (lo, hi))
            inside = lo < hi
            lo, hi = lo.where(inside, math.inf).amin(-1, True), hi.where(inside, -math.inf).amax(-1, True)
            live |= (lo <= position) & (position < hi)
        return live

    def _make_pages(self, live):
        """Lays pages out in a random order, among as many of NaN, and gives the function that fills a pool."""
        case, size = self.case, self.case.page_size
        columns = case.N // size
        needed = live.any(1).reshape(case.B, columns, size).any(-1)  # [B, columns]
        order = torch.randperm(2 * case.B * columns + 1, generator=self.generator)
        pages = order[: case.B * columns].reshape(case.B, columns).clone()
        pages[:, : case.shared_pages] = pages[:1, : case.shared_pages]
        far = torch.tensor([len(order) if entry is None else entry for entry in FAR_PAGES])
        table = torch.where(needed, pages, far[torch.arange(pages.numel()) % len(far)].reshape(pages.shape))
        self.call["page_table"] = self._indices(table, case.table_dtype)
        b, h, n = live.nonzero(as_tuple=True)
        page = pages[b, n // size]

        def put(cache, layout=case.cache_layout):
            pool = fill_with_nan(torch.empty(len(order), case.Hkv, size, *cache.shape[3:], dtype=cache.dtype))
            _bits(pool)[page, h, n % size] = _bits(cache)[b, h, n]
            return self._place(pool, layout)

        return put

    def _add_cache_object(self, key, value):
        """Appends the tokens in two steps, and a third one of NaN, which is taken back."""
        case = self.case
        sizes = {"batch": case.B, "num_kv_heads": case.Hkv, "head_dim": case.D, "v_head_dim": case.Dv}
        stored = case.dtype if case.stored is None else str(QUANTISED[case.stored]).removeprefix("torch.")
        sizes |= {"dtype": getattr(torch, stored), "device": case.device}
        if case.stored is not None and case.k_scale == "number":
            sizes |= {"k_scale": 0.03, "v_scale": 0.03}
        if case.cache == "KVCache":
            cache = KVCache(max_kv_len=case.N, **sizes)
        else:
            pages = case.N // case.page_size
            cache = PagedKVCache(num_pages=case.B * pages + 1, page_size=case.page_size, max_pages=pages, **sizes)
        lens = self.lens.tolist()
        first = [length // 2 for length in lens]
        key, value = key.to(case.device), value.to(case.device)
        cache.append(self._part(key, [0] * case.B, first), self._part(value, [0] * case.B, first), first)
        rest = [length - done for length, done in zip(lens, first, strict=True)]
        cache.append(self._part(key, first, rest), self._part(value, first, rest), rest)
        drafts = [min(2, case.N - length) for length in lens]
        if "lengths" in case.dead and max(drafts):
            cache.append(*(torch.full_like(x[:, :, : max(drafts)], torch.nan) for x in (key, value)), drafts)
            for sequence, length in enumerate(lens):
                cache.truncate(sequence, length)
        self.call["cache"] = cache
        self.call.pop("kv_lens", None)
        names = ("key", "value", "page_table", "k_scale", "v_scale")
        self.reference |= {name: getattr(cache, name) for name in names if getattr(cache, name) is not None}

    def _part(self, tokens, starts, counts):
        """From each sequence so many tokens from a start on, with NaN behind them."""
        part = torch.full_like(tokens[:, :, : max([*counts, 0])], torch.nan)
        for to, tokens_of, start, count in zip(part, tokens, starts, counts, strict=True):
            to[:, :count] = tokens_of[:, start : start + count]
        return part

    def _add_block_mask(self):
        case = self.case
        if case.block_mask is None:
            return
        from torch.nn.attention.flex_attention import create_block_mask

        body, rows, columns, own = case.block_mask
        inner = make_mod(body, {})
        covered = max(case.N, int(self.q_idx.max()) + 1 if self.q_idx.numel() else 1, 1)
        batch, heads = (case.B, case.Hq) if own else (None, None)
        lists = create_block_mask(inner, batch, heads, covered, covered, case.device, (rows, columns))
        self.call["block_mask"] = lists
        mask = self.reference["mask_mod"]

        def both(b, h, q_idx, kv_idx):
            inside = inner(b, h, q_idx, kv_idx) & (q_idx >= 0)
            return inside if mask is None else inside & mask(b, h, q_idx, kv_idx)

        self.reference["mask_mod"] = both


def make_mod(text, captures, score="", holder="closure"):
    """The mod of a case, with its captures in a closure, or in something that a closure holds."""
    if text is None:
        return None
    names = {"torch": torch, "mods": mods, "F": torch.nn.functional}
    if text.startswith("mods."):
        return eval(text, names | captures)
    used = [name for name in captures if re.search(rf"\b{name}\b", text)]
    if holder == "closure":
        maker = eval(f"lambda {', '.join(used)}: lambda {score}b, h, q_idx, kv_idx: {text}", names)
        return maker(*(captures[name] for name in used))
    for i, name in enumerate(used):
        place = {"object": f"held.{name}", "dict": f"held[{name!r}]", "list": f"held[{i}]"}[holder]
        text = re.sub(rf"\b{name}\b", place, text)
    held = {name: captures[name] for name in used}
    held = SimpleNamespace(**held) if holder == "object" else list(held.values()) if holder == "list" else held
    return eval(f"lambda held: lambda {score}b, h, q_idx, kv_idx: {text}", names)(held)


def place(numbers, layout):
    """The same numbers `[B, H, N, D]` elsewhere in memory, with NaN between them.

    contiguous; bnhd: contiguous as `[B, N, H, D]`; strided: every other element of a larger tensor; padded: rows with
    8 more elements; shifted: contiguous, but it starts at an odd element.
    """
    if layout == "contiguous":
        return numbers.clone(memory_format=torch.contiguous_format)
    if layout == "bnhd":
        return numbers.transpose(1, 2).contiguous().transpose(1, 2)
    B, H, N, D = numbers.shape
    if layout == "shifted":
        storage = fill_with_nan(numbers.new_empty(numbers.numel() + 1))[1:]
        return storage.view(B, H, N, D).copy_(numbers)
    shape = (B, H, N, D + 8) if layout == "padded" else (B + 1, H + 1, N + 2, 2 * D + 1)
    storage = fill_with_nan(numbers.new_empty(shape))
    view = storage[..., :D] if layout == "padded" else storage[1:, 1:, 1:-1, 1::2]
    return view.copy_(numbers)


def _bits(tensor):
    """Bytes of a type for which PyTorch has few operations."""
    return tensor.view(torch.uint8) if tensor.element_size() == 1 else tensor


def _spoil(cache, live):
    """A copy of `[B, Hkv, N, ...]` with NaN where rows are not live."""
    result = fill_with_nan(torch.empty_like(cache, memory_format=torch.contiguous_format))
    _bits(result)[live] = _bits(cache)[live]
    return result
