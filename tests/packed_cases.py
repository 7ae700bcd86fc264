"""Packed queries over every kind of cache, for all tiers: calls, their comparison with the reference, and grids."""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from cache_cases import Pages, fill_with_nan, position_score, quantise, spoil
from support import MODS, assert_close, make_inputs, pytorch_decode

from flexdecode import flex_decode, merge_attention, mods
from flexdecode.reference import evaluate_mod, reference_decode

FAMILIES = {family.name: family for family in MODS}
KINDS = ["contiguous", "shared", "paged", "int8", "paged_e4m3", "latent", "paged_latent", "keys", "keys_int8"]


def totals(lens, start=0, device="cpu"):
    """Where each of some packed sequences begins, int32 [B + 1]."""
    return torch.tensor([start, *itertools.accumulate(lens, initial=start)][1:], dtype=torch.int32, device=device)


class Packed(NamedTuple):
    """A packed call.

    Attributes:
        query: `[T, Hq, D]`.
        arguments: the others, by name.
        q_lens, kv_lens: of the sequences, as lists.
        before: rows of the query that no sequence has, before the first one.
    """

    query: torch.Tensor
    arguments: dict
    q_lens: list
    kv_lens: list
    before: int

    def pack(self, padded, fill):
        """`[B, Hq, Q, ...]` as rows `[T, Hq, ...]`; rows of no sequence hold `fill`."""
        rows = padded.new_full((*self.query.shape[:2], *padded.shape[3:]), fill)
        start = self.before
        for sequence, length in zip(padded, self.q_lens, strict=True):
            rows[start : start + length] = sequence[:, :length].transpose(0, 1)
            start += length
        return rows

    def padded(self):
        """The arguments of the padded call that computes the same, `query`, `key` and `value` among them."""
        arguments = {name: x for name, x in self.arguments.items() if not name.startswith("cu_")}
        arguments["query"] = _padded(self.query, self.q_lens, self.before)
        arguments["q_lens"] = torch.tensor(self.q_lens, dtype=torch.long)
        if "cu_seqlens_k" in self.arguments:
            start = max(int(self.arguments["cu_seqlens_k"][0]), 0)
            for name in ("key", "value"):
                arguments[name] = _padded(arguments[name], self.kv_lens, start)
            arguments["kv_lens"] = torch.tensor(self.kv_lens, dtype=torch.long)
        return arguments


def _padded(rows, lens, start):
    """`[T, H, D]` as `[B, H, longest, D]`, zeros past the lengths; on the CPU."""
    padded = torch.zeros(len(lens), rows.shape[1], max([*lens, 0]), rows.shape[2], dtype=rows.dtype)
    for sequence, length in zip(padded, lens, strict=True):
        sequence[:, :length] = rows[start : start + length].transpose(0, 1).cpu()
        start += length
    return padded


def draw(
    q_lens, kv_lens, kind="contiguous", *, Hq=4, Hkv=2, D=16, Dv=None, dtype=torch.float32, device="cpu", before=0,
    after=2, page_size=4, scales="heads", layout="thd", seed=0,
):  # fmt: skip
    """Draws a packed call. What must not matter is NaN or -1: rows of no sequence, keys past the lengths, pages.

    Args:
        q_lens, kv_lens: of the sequences.
        kind: one of KINDS. `shared`: one cache for all. `keys`: packed keys, with `cu_seqlens_k`.
        Hq, Hkv, D, Dv, dtype, device: of the tensors.
        before, after: rows of the query that no sequence has.
        page_size: tokens of a page.
        scales: their form, if the cache is quantised and not of packed keys.
        layout: of the query in memory. `thd`: contiguous. `htd`: heads first. `strided`: every other element.
        seed: of the numbers.
    """
    B, T, N = len(q_lens), before + sum(q_lens) + after, max([*kv_lens, 0]) + 2
    if kind.endswith("latent"):  # the first D columns of a key are its value
        D, Dv = D + 8, D
    query = make_inputs(1, Hq, 1, T, 0, D, dtype=dtype, device=device, seed=seed)[0][0].transpose(0, 1)
    fill_with_nan(query[:before]), fill_with_nan(query[T - after :])
    if layout == "strided":
        storage = torch.full((T + 1, Hq + 1, 2 * D + 1), math.nan, dtype=dtype, device=device)
        query = storage[1:, :-1, 1::2].copy_(query)
    elif layout == "thd":
        query = query.contiguous()
    _, key, value = make_inputs(max(B, 1), 1, Hkv, 0, N, D, Dv, dtype=dtype, device=device, seed=seed + 1)
    arguments = _cache(kind, key, value, kv_lens, page_size, scales)
    arguments["cu_seqlens_q"] = totals(q_lens, before, device)
    return Packed(query, arguments, list(q_lens), list(kv_lens), before)


def _cache(kind, key, value, kv_lens, page_size, scales):
    """Arguments that say where the keys of some sequences lie. Without a sequence, key and value have one too many."""
    arguments, device, batch = {}, key.device, len(kv_lens)
    if kind in ("int8", "paged_e4m3", "keys_int8"):
        stored = torch.float8_e4m3fn if kind == "paged_e4m3" else torch.int8
        scales = "heads" if kind == "keys_int8" else scales
        (key, k_scale), (value, v_scale) = (quantise(x, stored, scales) for x in (key, value))
        for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
            arguments[name] = scale[:batch] if isinstance(scale, torch.Tensor) and scale.dim() > 1 else scale
    key, value = (x if kind == "shared" else x[:batch] for x in (key, value))
    if kind in ("keys", "keys_int8"):
        starts = totals(kv_lens, 3, device)
        packed = []
        for cache in (key, value):
            rows = [sequence[:, :length].transpose(0, 1) for sequence, length in zip(cache, kv_lens, strict=True)]
            rows = torch.cat([fill_with_nan(cache.new_empty(3, *cache.shape[1::2])), *rows])
            packed.append(torch.cat([rows, rows[:2]]))
        return arguments | {"key": packed[0], "value": packed[1], "cu_seqlens_k": starts}
    if kind == "shared":  # one cache, so only what lies past the longest sequence is read by none
        key, value = (spoil(x[:1].clone(), [max([*kv_lens, 0])]) for x in (key, value))
    else:
        spoil(key, kv_lens), spoil(value, kv_lens)
    arguments["kv_lens"] = torch.tensor(kv_lens, dtype=torch.int32, device=device)
    if kind.startswith("paged"):
        pages = Pages(kv_lens, page_size, device=device)
        arguments["page_table"] = pages.table
        for name in ("k_scale", "v_scale"):
            if isinstance(arguments.get(name), torch.Tensor) and arguments[name].dim() == 3:
                arguments[name] = pages.place(arguments[name])
        key, value = pages.place(key), pages.place(value)
    if kind.endswith("latent"):
        value = key[..., : value.shape[3]]
    return arguments | {"key": key, "value": value}


def check(call, score_mod=None, mask_mod=None, *, options=None, out=None, max_q_len=None, **more):
    """Runs a packed call and compares it with the reference, by the rule of all tests. Returns output and lse."""
    arguments = call.arguments | more
    out, lse = flex_decode(
        call.query, score_mod=score_mod, mask_mod=mask_mod, return_lse=True, options=options, out=out,
        max_q_len=max_q_len, **arguments,
    )  # fmt: skip
    assert out.dtype == call.query.dtype and lse.dtype == torch.float32
    on_cpu = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    expected = reference_decode(call.query.cpu(), score_mod=score_mod, mask_mod=mask_mod, return_lse=True, **on_cpu)
    assert_close(out, lse, expected, yardstick(call, score_mod, mask_mod, **more))
    return out, lse


def yardstick(call, score_mod=None, mask_mod=None, **more):
    """What PyTorch computes in the input dtype, from the padded form, as packed rows."""
    arguments = call.padded() | more
    arguments = {name: x.cpu() if isinstance(x, torch.Tensor) else x for name, x in arguments.items()}
    out, lse = pytorch_decode(score_mod=score_mod, mask_mod=mask_mod, **arguments)
    return call.pack(out, 0.0), call.pack(lse, -math.inf)


# --- The grid: caches x mods x empty sequences x T = 0 x odd lengths x sinks x q_offset -------------------------------


class Case(NamedTuple):
    """One packed call; see `draw`. `family` names mods of `support.MODS`."""

    name: str
    q_lens: tuple
    kv_lens: tuple
    kind: str = "contiguous"
    family: str = "causal"
    more: dict = {}  # noqa: RUF012
    offset: bool = False
    sinks: bool = False
    max_q_len: int | None = None


RAGGED = {
    "decodes": ((1, 1, 1), (9, 30, 1)),
    "mixed": ((1, 7, 1, 3), (21, 12, 5, 33)),
    "odd": ((5, 13, 2), (31, 13, 7)),
    "empty_sequences": ((0, 3, 0, 2, 0), (4, 0, 0, 17, 9)),
    "longer_than_keys": ((4, 6), (2, 3)),
    "one": ((11,), (19,)),
    "nothing": ((0, 0), (5, 0)),
    "no_sequence": ((), ()),
}


def _grid():
    """Every kind of cache with every shape and every family of mods; what else there is to choose rotates."""
    families = itertools.cycle(FAMILIES)
    turns = itertools.count()
    for kind, (shape, lens) in itertools.product(KINDS, RAGGED.items()):
        for _ in range(3):
            turn, family = next(turns), next(families)
            more = {"before": turn % 3, "after": turn % 2 * 3, "layout": ("thd", "htd", "strided")[turn % 3]}
            more |= {"Hq": (4, 6, 5)[turn % 3], "Hkv": (2, 2, 5)[turn % 3], "Dv": (None, 24)[turn % 2]}
            more |= {"scales": ("number", "heads", "sequences", "tokens")[turn % 4], "page_size": (4, 3, 16)[turn % 3]}
            more = more | {"Hkv": 1} if "latent" in kind else more
            yield Case(f"{kind}-{shape}-{family}", *lens, kind, family, more, turn % 4 == 1, turn % 5 == 2)


GRID = list(_grid())


def check_case(case, device="cpu", options=None, dtype=torch.float32):
    """Runs one case of a grid."""
    call = draw(case.q_lens, case.kv_lens, case.kind, dtype=dtype, device=device, **case.more)
    B, Hq = len(case.q_lens), call.query.shape[1]
    sizes = B, Hq, max([*case.kv_lens, 1]), max([*case.q_lens, 1]), device
    score_mod, mask_mod = (make(*sizes) for make in FAMILIES[case.family][1:])
    more = {}
    if case.offset:
        offsets = [max(kv - q - 1, 0) for q, kv in zip(case.q_lens, case.kv_lens, strict=True)]
        more["q_offset"] = torch.tensor(offsets, dtype=torch.long, device=device)
    if case.sinks:
        more["sinks"] = torch.linspace(-2, 3, Hq, device=device)
    check(call, score_mod, mask_mod, options=options, max_q_len=case.max_q_len, **more)


# --- The grids of others, rebuilt: their lengths, heads, masks and caches ---------------------------------------------


def _pytorch_varlen():
    """torch.nn.attention.varlen: windows to the left and right, causal or not, groups of heads, keys of their own."""
    windows = [(-1, -1), (-1, 0), (4, 0), (-1, 4), (0, 0), (1, 0), (0, 1)]
    for i, (window, lens) in enumerate(itertools.product(windows, [(17, 5, 32), (1, 64, 3, 9), (8, 8)])):
        kv_lens = lens if i % 2 else tuple(reversed(lens))
        yield window, lens, kv_lens, [(4, 4), (4, 2), (4, 1)][i % 3], ["keys", "paged", "contiguous"][i % 3]


def window_mask(left, right):
    """A window around the token, -1 for no limit; the last query token is at the last key."""

    def mask_mod(b, h, q_idx, kv_idx):
        inside = kv_idx >= 0
        inside = inside & (kv_idx >= q_idx - left) if left >= 0 else inside
        return inside & (kv_idx <= q_idx + right) if right >= 0 else inside

    return mask_mod


PYTORCH_VARLEN = list(_pytorch_varlen())


def check_pytorch_varlen(window, lens, kv_lens, heads, kind, device="cpu", options=None, dtype=torch.float32):
    call = draw(lens, kv_lens, kind, Hq=heads[0], Hkv=heads[1], dtype=dtype, device=device, seed=2)
    check(call, None, window_mask(*window), options=options)


# FlashAttention's varlen tests: pairs of lengths, odd head dims, causal, local, ALiBi, soft cap, unused rows.
FLASH_LENGTHS = [(1, 147), (113, 203), (128, 217), (113, 211), (108, 256), (64, 128), (128, 64), (127, 128), (128, 127)]
FLASH_DIMS = [32, 40, 59, 64, 80, 96, 111, 128]
FLASH_MASKS = ["full", "causal", "local", "alibi", "softcap"]


def _flash_varlen():
    for i, (lengths, mask) in enumerate(itertools.product(FLASH_LENGTHS, FLASH_MASKS)):
        mode, heads = ("full", "random", "third")[i % 3], [(6, 6), (6, 2), (6, 1)][i % 3]
        yield lengths, mask, mode, heads, FLASH_DIMS[i % len(FLASH_DIMS)]


FLASH_VARLEN = list(_flash_varlen())


def _flash_lens(longest, mode, generator, batch=3):
    """Lengths as its padding masks have them; the first sequence of `random` is empty, as with unused rows."""
    if mode == "full":
        return [longest] * batch
    least = {"random": max(1, longest - 20), "third": max(1, longest // 3)}[mode]
    lens = torch.randint(least, longest + 1, (batch,), generator=generator).tolist()
    return [0, *lens[1:]] if mode == "random" else lens


def flash_mods(name, Hq, device):
    """The score_mod and the mask_mod of one of its options."""
    score_mod = {"alibi": lambda: mods.alibi(Hq, device=device), "softcap": lambda: mods.softcap(5.0)}.get(name)
    mask_mod = {"causal": mods.causal, "local": lambda: window_mask(20, 7), "alibi": mods.causal}.get(name)
    return score_mod and score_mod(), mask_mod and mask_mod()


def check_flash_varlen(lengths, mask, mode, heads, dim, device="cpu", options=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(sum(lengths))
    q_lens, kv_lens = (_flash_lens(longest, mode, generator) for longest in lengths)
    call = draw(q_lens, kv_lens, "keys", Hq=heads[0], Hkv=heads[1], D=dim, dtype=dtype, device=device, seed=3)
    check(call, *flash_mods(mask, heads[0], device), options=options)


# Its tests of a KV cache: few new tokens over a longer cache, contiguous or paged.
FLASH_KVCACHE = list(itertools.product([(1, 128), (1, 339), (3, 400), (64, 80), (16, 256)], FLASH_MASKS, [None, 16]))


def check_flash_kvcache(lengths, mask, page_size, device="cpu", options=None, dtype=torch.float32):
    q_lens, longest = [lengths[0]] * 2, lengths[1]
    kind, more = ("contiguous", {}) if page_size is None else ("paged", {"page_size": page_size})
    call = draw(q_lens, [longest, longest // 3], kind, Hq=6, Hkv=2, D=32, dtype=dtype, device=device, seed=4, **more)
    check(call, *flash_mods(mask, 6, device), options=options)


# vLLM's unified attention: decodes and chunks of prompts in one call, pages of 16, windows and soft caps.
UNIFIED_LENGTHS = [[(1, 328), (5, 18), (129, 463)], [(1, 223), (1, 37), (1, 511)]]
UNIFIED = list(itertools.product(UNIFIED_LENGTHS, [(4, 4), (8, 2), (5, 1)], [None, 64, 128], [None, 50.0]))


def check_unified(lengths, heads, window, cap, device="cpu", options=None, dtype=torch.float32, kind="paged"):
    q_lens, kv_lens = zip(*lengths, strict=True)
    call = draw(
        q_lens, kv_lens, kind, Hq=heads[0], Hkv=heads[1], D=32, dtype=dtype, device=device, page_size=16, seed=5
    )
    mask_mod = mods.causal() if window is None else mods.sliding_window(window)
    check(call, None if cap is None else mods.softcap(cap), mask_mod, options=options)


# Its chunked prefill: prompts with a context of their own, among decodes; windows of 0, few and many tokens.
CHUNKED = list(itertools.product([(4, 4), (8, 2), (8, 1)], [None, 16, 200], ["paged", "paged_e4m3", "int8"]))


def check_chunked_prefill(heads, window, kind, device="cpu", options=None, dtype=torch.float32):
    generator = torch.Generator().manual_seed(7)
    q_lens = [*torch.randint(16, 60, (3,), generator=generator).tolist(), *[1] * 5]
    context = [0, *torch.randint(1, 90, (7,), generator=generator).tolist()]
    kv_lens = [q + c for q, c in zip(q_lens, context, strict=True)]
    call = draw(q_lens, kv_lens, kind, Hq=heads[0], Hkv=heads[1], D=24, dtype=dtype, device=device, page_size=32)
    check(call, None, mods.causal() if window is None else mods.sliding_window(window), options=options)


# Its cascade attention: all sequences begin with one prefix, which is read once; then both parts are merged.
CASCADE_LENGTHS = [([(29, 271), (18, 280), (37, 288), (1, 257)], 224), ([(1, 123)] * 8, 112), ([(5, 40), (0, 33)], 32)]
CASCADE = list(itertools.product(CASCADE_LENGTHS, [(4, 4), (8, 2), (16, 2)], [None, 50.0]))


def check_cascade(lengths, heads, cap, device="cpu", options=None, dtype=torch.float32):
    pairs, prefix = lengths
    q_lens, kv_lens = zip(*pairs, strict=True)
    call = draw(q_lens, kv_lens, Hq=heads[0], Hkv=heads[1], D=32, dtype=dtype, device=device, seed=6)
    key, value, score_mod = call.arguments["key"], call.arguments["value"], None if cap is None else mods.softcap(cap)
    for cache in (key, value):
        cache[1:, :, :prefix] = cache[:1, :, :prefix]
    shared = {"cu_seqlens_q": call.arguments["cu_seqlens_q"], "return_lse": True, "options": options}
    first = flex_decode(call.query, key[:1, :, :prefix], value[:1, :, :prefix], score_mod, **shared)
    own = {"kv_lens": call.arguments["kv_lens"] - prefix} | shared
    rest = flex_decode(call.query, key[:, :, prefix:], value[:, :, prefix:], score_mod, mods.causal(), **own)
    out, lse = merge_attention(*zip(first, rest, strict=True))
    expected = reference_decode(
        call.query.cpu(), score_mod=score_mod, mask_mod=mods.causal(), return_lse=True,
        **{name: x.cpu() for name, x in call.arguments.items()},
    )  # fmt: skip
    assert_close(out, lse, expected, yardstick(call, score_mod, mods.causal()))


GRIDS = {
    check_pytorch_varlen: PYTORCH_VARLEN,
    check_flash_varlen: FLASH_VARLEN,
    check_flash_kvcache: FLASH_KVCACHE,
    check_unified: UNIFIED,
    check_chunked_prefill: CHUNKED,
    check_cascade: CASCADE,
}


class PeerCase(NamedTuple):
    """A case of a grid of others, and what checks it."""

    check: Callable
    arguments: tuple

    def __str__(self):
        return f"{self.check.__name__.removeprefix('check_')}-{self.arguments}"


def peer_cases(steps=None):
    """Every case of the grids of others; with `steps` {check: step}, every `step`-th one of each grid."""
    steps = steps or dict.fromkeys(GRIDS, 1)
    return [PeerCase(check, arguments) for check, grid in GRIDS.items() for arguments in grid[:: steps[check]]]


# --- Single properties ------------------------------------------------------------------------------------------------


DEAD_MASKS = {
    "window": mods.sliding_window(9),
    "sinks_and_window": mods.streaming(2, 9),
    "a_window_for_each_sequence": lambda b, h, q, k: (k <= q) & (q - k < 4 + 9 * b),
    "nothing": lambda b, h, q, k: k > q,
}


def check_dead_keys(mask, kind, device="cpu", options=None):
    """Keys that no token attends to hold NaN, and their pages are gone. These masks are solved, so none is read."""
    mask_mod, q_lens, kv_lens = DEAD_MASKS[mask], [1, 5, 0, 2], [70, 61, 40, 23]
    call = draw(q_lens, kv_lens, kind, device=device, Hkv=1 if "latent" in kind else 2)
    finite = check(call, None, mask_mod, options=options)
    for b, (q, kv) in enumerate(zip(q_lens, kv_lens, strict=True)):
        grid = torch.tensor([b]), torch.arange(1), kv - q + torch.arange(q), torch.arange(kv)
        dead = ~evaluate_mod(mask_mod, grid)[0].flatten(0, 1).any(0).to(device)
        if "page_table" in call.arguments:
            whole = dead[: kv // 4 * 4].view(-1, 4).all(1)
            call.arguments["page_table"][b, : len(whole)][whole] = -1
        for name in ("key", "value"):
            cache = call.arguments[name]
            if kind.startswith("keys"):
                rows = cache[int(call.arguments["cu_seqlens_k"][b]) :][:kv]
                rows[dead] = fill_with_nan(rows[dead])
            elif "page_table" not in call.arguments:
                cache[b, :, :kv][:, dead] = fill_with_nan(cache[b, :, :kv][:, dead])
    spoiled = check(call, None, mask_mod, options=options)
    for one, other in zip(finite, spoiled, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def check_packed_is_padded(kind, device="cpu", options=None):
    """A packed call computes what the padded one does, also through mods of every index."""
    call = draw([3, 0, 5, 1], [12, 4, 9, 1], kind, device=device, before=1, Hkv=1 if "latent" in kind else 2)
    out, lse = check(call, position_score, mods.causal(), options=options)
    padded = {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in call.padded().items()}
    other = flex_decode(score_mod=position_score, mask_mod=mods.causal(), return_lse=True, options=options, **padded)
    torch.testing.assert_close(out, call.pack(other[0], 0.0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, call.pack(other[1], -math.inf), rtol=1e-5, atol=1e-5)


def check_out(device="cpu", options=None):
    """`out` of any strides is written in rows of no sequence too, and nothing around it."""
    call = draw([2, 3], [7, 9], device=device, before=1)
    storage = torch.full((2 * len(call.query), 5, 20), 7.0, device=device)
    out = storage[::2, 1:, 2:18]
    result, _ = check(call, None, mods.causal(), options=options, out=out)
    assert result is out
    storage[::2, 1:, 2:18] = 7.0
    assert (storage == 7.0).all()


def check_hint(device="cpu", options=None):
    """The result does not depend on `max_q_len`, be it right or wrong."""
    call = draw([1, 9, 0, 2], [20, 9, 4, 30], "paged", device=device)
    for hint in (None, 1, 2, 9, 1 << 40):
        check(call, None, mods.causal(), options=options, max_q_len=hint)


def check_clamped(name, device="cpu", options=None):
    """Totals outside of the rows that there are, where nothing checks them. Returns the call."""
    call = draw([2, 0, 3], [5, 4, 7], "keys", device=device)
    arguments = {n: x.nan_to_num(0.5) if x.is_floating_point() else x for n, x in call.arguments.items()}
    call = call._replace(query=call.query.nan_to_num(0.5), arguments=arguments)
    arguments[name].copy_(torch.tensor([-4, 3, 3, 99]))
    if name == "cu_seqlens_q":
        call = call._replace(q_lens=[3, 0, len(call.query) - 3])
    else:
        call = call._replace(kv_lens=[3, 0, len(arguments["key"]) - 3])
    check(call, None, mods.causal(), options=options)
    return call


def check_other_splits(run, device="cpu"):
    """The same tensors with other contents: what a CUDA graph sees when it is replayed.

    Args:
        run: computes `(out, lse)` from the tensors of a call as they are now.
        device: of the call.
    """
    call = draw([3, 1, 4], [9, 6, 12], device=device, after=0)
    starts, lens = call.arguments["cu_seqlens_q"], call.arguments["kv_lens"]
    for new, kv_lens in (
        ([8, 0, 0], [9, 6, 12]),
        ([1, 1, 1], [4, 0, 12]),
        ([0, 0, 0], [9, 6, 12]),
        ([2, 6, 0], [1, 6, 2]),
    ):
        starts.copy_(totals(new)), lens.copy_(torch.tensor(kv_lens))
        expected = reference_decode(
            call.query.cpu(), return_lse=True, mask_mod=mods.causal(),
            **{name: x.cpu() for name, x in call.arguments.items()},
        )  # fmt: skip
        other = Packed(call.query, call.arguments, new, kv_lens, 0)
        assert_close(*run(call), expected, yardstick(other, None, mods.causal()))
