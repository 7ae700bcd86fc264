"""Small calls whose tensors have nothing around them, for all tiers: a read or write outside one of them is found.

On a CPU every tensor ends at a page of memory that must not be touched, so that the process dies there. On a GPU every
tensor is an allocation of its own, for `compute-sanitizer` (CONTRIBUTING.md says how it is run); without it the cases
are ordinary tests.
"""

import ctypes
import mmap
from typing import NamedTuple

import packed_cases
import torch
from cache_cases import QUANTISED, Pages, position_score, quantise, spoil
from support import assert_close_to_reference, make_inputs
from torch.nn.attention.flex_attention import create_block_mask

from flexdecode import DecodeOptions, KVCache, PagedKVCache, flex_decode, merge_attention, mods

LENS = [66, 0, 1, 64, 63, 65]  # next to the borders of blocks and pages


def fenced(tensor, device):
    """A contiguous copy that begins or ends where reading further is an error; on a CPU it ends there."""
    if device != "cpu" or tensor.numel() == 0:
        return tensor.to(device, memory_format=torch.contiguous_format, copy=True)
    page, size = mmap.PAGESIZE, tensor.numel() * tensor.element_size()
    inner = -(-size // page) * page
    region = mmap.mmap(-1, inner + 2 * page)
    start = ctypes.addressof(ctypes.c_char.from_buffer(region))
    for address in (start, start + page + inner):
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed")
    inside = torch.frombuffer(region, dtype=torch.uint8, count=size, offset=page + inner - size)
    return inside.view(tensor.dtype).view(tensor.shape).copy_(tensor)


class Call(NamedTuple):
    """What one case calls.

    Attributes:
        D, Dv, Hq, Hkv, Q, dtype: of the inputs.
        page_size: of a paged cache, whose pool has the live pages only and whose table is -1 elsewhere.
        window: a sliding window; the pages before it are not in the pool.
        stored, scales: type of a quantised cache and the form of its scales.
        latent: value is a view of the first columns of key.
        block_mask: whether there are lists of blocks.
        score: whether there is a score_mod that reads tensors.
        ragged: whether there are `q_lens`, sinks and an `out`.
        options: for `DecodeOptions`.
        runs: what the kernel has to be, fields of its tiles; on a GPU only.
    """

    D: int = 64
    Dv: int = 64
    Hq: int = 4
    Hkv: int = 2
    Q: int = 1
    dtype: str = "float16"
    page_size: int | None = None
    window: int | None = None
    stored: str | None = None
    scales: str = "tokens"
    latent: bool = False
    block_mask: bool = False
    score: bool = False
    ragged: bool = False
    options: dict = {}  # noqa: RUF012 -- never written to
    runs: dict = {}  # noqa: RUF012


ONE, SPLITS, BALANCED = {"num_splits": 1}, {"num_splits": 3}, {"schedule": "balanced"}
POINTERS, DESCRIPTORS = {"descriptors": False}, {"descriptors": True}
MLA = {"D": 576, "Dv": 512, "Hkv": 1, "latent": True}
MANY = MLA | {"Hq": 48}  # rows enough for the kernel for latents

CALLS = {
    # Each template, and each schedule.
    "pointers, one split": Call(D=59, Dv=33, options=ONE, runs=POINTERS | {"split": False}),
    "pointers, splits": Call(D=59, Dv=33, options=SPLITS, runs=POINTERS | {"split": True}),
    "pointers, balanced": Call(D=59, Dv=33, options=BALANCED, runs=POINTERS | {"balanced": True}),
    "pointers, invariant": Call(D=59, Dv=33, options={"batch_invariant": True}, runs=POINTERS),
    "descriptors, one split": Call(options=ONE, runs=DESCRIPTORS | {"split": False}),
    "descriptors, splits": Call(options=SPLITS, runs=DESCRIPTORS | {"split": True}),
    "descriptors, balanced": Call(options=BALANCED, runs=DESCRIPTORS | {"balanced": True}),
    "descriptors, few columns": Call(D=16, Dv=16, options=SPLITS, runs=DESCRIPTORS),
    "descriptors, few columns of both": Call(D=16, Dv=16, latent=True, options=SPLITS, runs=DESCRIPTORS),
    "descriptors, fewer columns than a box": Call(D=80, Dv=48, options=SPLITS, runs=DESCRIPTORS),
    "descriptors, invariant": Call(options={"batch_invariant": True}),
    "small pages": Call(page_size=4, options=SPLITS, runs=POINTERS),
    "pages of one token": Call(page_size=1, options=BALANCED, runs=POINTERS | {"balanced": True}),
    "pages with descriptors": Call(page_size=128, options=SPLITS, runs=DESCRIPTORS),
    "pages of 64 with descriptors": Call(page_size=64, options=SPLITS, runs=DESCRIPTORS),
    "pages with descriptors, balanced": Call(page_size=128, options=BALANCED, runs=DESCRIPTORS | {"balanced": True}),
    "block lists": Call(block_mask=True, options=SPLITS),
    "block lists, balanced": Call(block_mask=True, page_size=16, options=BALANCED),
    "latents": Call(**MANY, options=SPLITS, runs={"latent": True, "split": True}),
    "latents, one split": Call(**MANY, options=ONE, runs={"latent": True, "split": False}),
    "latents, balanced": Call(**MANY, options=BALANCED, runs={"latent": True, "balanced": True}),
    "latents, pages": Call(**MANY, page_size=64, ragged=True, options=SPLITS, runs={"latent": True}),
    "latents, window": Call(**MANY, page_size=64, window=5, options=SPLITS, runs={"latent": True}),
    # Each kind of cache.
    "float32": Call(dtype="float32", Q=3, options=SPLITS),
    "float32, fewer columns than a box": Call(dtype="float32", D=96, Dv=80, options=SPLITS, runs=DESCRIPTORS),
    "few latents": Call(**MLA, page_size=16, options=SPLITS, runs={"latent": False}),
    "int8": Call(stored="int8", options=SPLITS),
    "e5m2, by head": Call(stored="e5m2", scales="heads", options=ONE),
    "int8, by sequence, odd": Call(D=59, Dv=33, stored="int8", scales="sequences", options=BALANCED),
    "int8, pages": Call(stored="int8", page_size=16, options=SPLITS),
    "e4m3, pages": Call(stored="e4m3", page_size=128, options=SPLITS),
    # What else reads and writes.
    "ragged": Call(Q=5, Hq=12, ragged=True, options=SPLITS),
    "ragged, balanced": Call(Q=5, Hq=12, ragged=True, options=BALANCED),
    "mods": Call(score=True, window=20, Q=2, options=SPLITS),
    "window over pages": Call(page_size=4, window=9, Q=2, options=ONE),
    "window over pages, balanced": Call(page_size=16, window=9, options=BALANCED),
    "window over pages, splits": Call(page_size=128, window=3, options=SPLITS),
}  # fmt: skip


def check_call(call, device):
    """Runs a case and compares it with the reference."""
    B, N = len(LENS), max(LENS)
    dtype = getattr(torch, call.dtype)
    query, key, value = make_inputs(B, call.Hq, call.Hkv, call.Q, N, call.D, call.Dv, dtype=dtype)
    q_lens = [1 + b % call.Q for b in range(B)] if call.ragged else [call.Q] * B
    reference = {"kv_lens": torch.tensor(LENS)}
    if call.ragged:
        reference |= {"q_lens": torch.tensor(q_lens), "sinks": torch.linspace(-2, 3, call.Hq)}
        for row, count in zip(query, q_lens, strict=True):
            row[:, count:] = torch.nan
    scales = {}
    if call.stored:
        (key, scales["k_scale"]), (value, scales["v_scale"]) = (
            quantise(x, QUANTISED[call.stored], call.scales) for x in (key, value)
        )
    clean = key, key[..., : call.Dv] if call.latent else value
    given = {name: fenced(x, device) for name, x in reference.items()}
    put = lambda x: fenced(spoil(x.clone(), LENS), device)
    if call.page_size:
        tight = TightPages(call.page_size, call.window, q_lens)
        put = lambda x: fenced(tight.place(x), device)
        given["page_table"] = fenced(tight.table, device)
    for name, scale in scales.items():
        given[name] = put(scale) if call.scales == "tokens" else fenced(scale, device)
    key = put(key)
    value = key[..., : call.Dv] if call.latent else put(value)
    mask_mod = mods.causal() if call.window is None else mods.sliding_window(call.window)
    if call.ragged:
        given["out"] = fenced(torch.full((B, call.Hq, call.Q, call.Dv), torch.nan, dtype=dtype), device)
    if call.block_mask:
        mask_mod = lambda b, h, q, k: (k <= q) & ((k // 16 + q // 16) % 3 != 1)
        given["block_mask"] = create_block_mask(mask_mod, None, None, 96, 96, device, (16, 32))
    full_mask = None if call.block_mask else mask_mod
    score_mod = captured_score(B, call.Hq, N, device) if call.score else None
    found = flex_decode(
        fenced(query, device), key, value, score_mod, full_mask, return_lse=True,
        options=DecodeOptions(backend="triton", **call.options), **given,
    )  # fmt: skip
    assert_close_to_reference(*found, query, *clean, score_mod, mask_mod, **reference, **scales)


class TightPages:
    """Pages in a pool without spare ones; the table is -1 outside of them.

    Args:
        page_size: tokens of a page.
        window: of the mask, or None; pages that lie before it for all queries are not in the pool.
        q_lens: queries of each sequence.
    """

    def __init__(self, page_size, window, q_lens):
        self.pages = Pages(LENS, page_size, dead=(-1,))
        self.used = []
        for row, length, count in zip(self.pages.table, LENS, q_lens, strict=True):
            first = 0 if window is None else max(0, length - count - window + 1) // page_size
            row[:first] = -1
            self.used += row[row >= 0].tolist()
        numbers = torch.full((self.pages.num_pages + 1,), -1, dtype=torch.int32)
        numbers[self.used] = torch.arange(len(self.used), dtype=torch.int32)
        self.table = numbers[self.pages.table]  # -1 stays -1: it reads the last entry

    def place(self, cache):
        pool = self.pages.place(cache).clone()
        as_bytes = pool.view(torch.uint8) if pool.element_size() == 1 else pool
        return as_bytes[self.used].view(pool.dtype)


def captured_score(B, Hq, N, device):
    """Reads tensors at every pair, some of them outside, where it reads 0."""
    bias = fenced(torch.randn(B, Hq, N, generator=torch.Generator().manual_seed(5)), device)
    classes = fenced(torch.randint(-3, 9, (N,), generator=torch.Generator().manual_seed(6)).to(torch.int8), device)
    table = fenced(torch.linspace(-1, 1, 5, dtype=torch.float16), device)
    return lambda score, b, h, q, k: score + bias[b, h, k] + table[classes[k]] + table[k - q]


# --- Packed queries ---------------------------------------------------------------------------------------------------

MIXED = (1, 70, 0, 9, 1), (66, 130, 0, 64, 63)  # lengths of queries and keys: two launches, of small and large tiles
FEW = (1, 2, 0, 3), (65, 30, 4, 64)

PACKED = {  # lengths, kind of cache, options, more for `packed_cases.draw`
    "decodes": ((1, 1, 1), (66, 0, 64), "contiguous", SPLITS, {}),
    "few tokens, one split": (*FEW, "contiguous", ONE, {"D": 59, "Dv": 33}),
    "few tokens, balanced": (*FEW, "paged", BALANCED, {"page_size": 16}),
    "few tokens, int8": (*FEW, "int8", SPLITS, {"D": 64, "scales": "tokens"}),
    "two launches, one split": (*MIXED, "contiguous", ONE, {"D": 64}),
    "two launches, splits": (*MIXED, "paged", SPLITS, {"D": 64, "page_size": 16}),
    "two launches, balanced": (*MIXED, "contiguous", BALANCED, {"D": 64}),
    "two launches, invariant": (*MIXED, "contiguous", {"batch_invariant": True}, {"D": 64}),
    "two launches, descriptors": (*MIXED, "paged", {}, {"D": 64, "page_size": 128}),
    "a prompt": ((130,), (131,), "contiguous", {}, {"D": 128}),
    "packed keys": (*FEW, "keys", SPLITS, {"D": 64}),
    "latents": (*MIXED, "latent", SPLITS, {"D": 512, "Hq": 16, "Hkv": 1}),
}


def check_packed(name, device):
    """Runs a packed call and compares it with the reference."""
    q_lens, kv_lens, kind, options, more = PACKED[name]
    call = packed_cases.draw(q_lens, kv_lens, kind, dtype=torch.float16, before=1, after=2, **({"Hq": 8} | more))
    if kind == "latent":  # 64 more columns than the value has, as the kernel for latents takes them
        call.arguments["key"] = torch.nn.functional.pad(call.arguments["key"], (0, 56))
        call = call._replace(query=torch.nn.functional.pad(call.query, (0, 56)))
    given = {name: fenced(x, device) if isinstance(x, torch.Tensor) else x for name, x in call.arguments.items()}
    if kind == "latent":
        given["value"] = given["key"][..., : more["D"]]
    call = call._replace(query=fenced(call.query, device), arguments=given)
    out = fenced(torch.full((*call.query.shape[:2], given["value"].shape[-1]), torch.nan, dtype=torch.float16), device)
    packed_cases.check(call, None, mods.causal(), out=out, options=DecodeOptions(backend="triton", **options))


# --- Caches that grow, and merging ------------------------------------------------------------------------------------


def check_append(kind, stored, device):
    """Tokens are appended up to the last place of the cache, and decoded with."""
    heads, D, Dv = 2, 72, 40
    sizes = {"batch": 3, "num_kv_heads": heads, "head_dim": D, "v_head_dim": Dv, "dtype": stored, "device": device}
    cache = KVCache(max_kv_len=37, **sizes)
    if kind != "contiguous":
        page_size = int(kind.removeprefix("pages of "))
        pages = -(-37 // page_size)
        cache = PagedKVCache(num_pages=2 * pages + -(-5 // page_size), page_size=page_size, max_pages=pages, **sizes)
        cache.page_table.fill_(-1)
    for name in ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale", "_limits", "_arrivals"):
        tensor = getattr(cache, name)
        if tensor is not None:
            setattr(cache, name, fenced(tensor, device))
    for step, counts in enumerate(([30, 5, 0], [6, 0, 37], [1, 0, 0])):
        k, v = make_inputs(3, heads, heads, max(counts), max(counts), D, Dv, seed=step, dtype=torch.float16)[1:]
        cache.append(fenced(k, device), fenced(v, device), counts)
    query = make_inputs(3, 4, heads, 2, 1, D, dtype=torch.float16)[0]
    options = DecodeOptions(backend="triton", num_splits=2)
    query_dtype = query.dtype if stored.itemsize == 1 else stored
    query = query.to(query_dtype)
    found = flex_decode(
        fenced(query, device), None, None, position_score, mods.causal(), cache=cache, return_lse=True, options=options
    )
    names = ("key", "value", "kv_lens", "page_table", "k_scale", "v_scale")
    arguments = {name: getattr(cache, name).cpu() for name in names if getattr(cache, name) is not None}
    assert_close_to_reference(*found, query, score_mod=position_score, mask_mod=mods.causal(), **arguments)


def check_merge(num_parts, v_head_dim, device):
    """More parts than one launch takes, and columns that fill no block."""
    B, Hq, Q, length = 2, 3, 2, 5
    query, key, value = make_inputs(B, Hq, Hq, Q, num_parts * length, 16, v_head_dim)
    pieces = zip(key.split(length, 2), value.split(length, 2), strict=True)
    options = DecodeOptions(backend="torch")
    parts = [flex_decode(query, *piece, return_lse=True, options=options) for piece in pieces]
    outs, lses = ([fenced(x, device) for x in tensors] for tensors in zip(*parts, strict=True))
    assert_close_to_reference(*merge_attention(outs, lses), query, key, value)
