"""The sections of the matrix beyond the 60 seed rows: one table of cases for each kind of call that servers make."""

import dataclasses
import random
from collections.abc import Iterator

from .cases import Case

__all__ = ["SCALED_DOWN", "SECTIONS", "cases_of", "shrink"]

SCALED_DOWN = ", scaled down"  # at the end of a label

ANY_SHAPE = ("sdpa", "sdpa_cudnn", "sdpa_flash", "flex", "flashinfer", "fa3", "xformers")
ANY_MOD = (*ANY_SHAPE, "flex_best")

SHAPES = (
    # B,      N, Hq, Hkv,   D
    (48, 2048, 32, 8, 64),
    (256, 1024, 32, 8, 64),
    (16, 8192, 8, 8, 64),
    (8, 16384, 64, 8, 64),
    (1, 65536, 32, 8, 64),
    (33, 1999, 32, 8, 64),
    (1, 8192, 32, 8, 128),
    (1, 131072, 32, 8, 128),
    (16, 8192, 32, 8, 128),
    (64, 8192, 32, 8, 128),
    (256, 1024, 32, 8, 128),
    (8, 32768, 64, 8, 128),
    (64, 4096, 64, 4, 128),
    (16, 4096, 32, 32, 128),
    (32, 4096, 40, 8, 128),
    (24, 6000, 28, 4, 128),
    (128, 2000, 24, 8, 128),
    (7, 3333, 48, 4, 128),
    (5, 12345, 32, 8, 128),
    (96, 777, 16, 2, 128),
    (16, 4096, 8, 4, 256),
    (16, 4096, 16, 8, 256),
    (4, 32768, 16, 1, 256),
    (32, 4096, 32, 8, 96),
    (16, 4096, 32, 32, 96),
    (16, 4096, 32, 32, 80),
    (32, 2048, 40, 8, 80),
)

# Caches of 256 MB and more, where a mod that costs nothing takes no time beside the bytes.
MODS = (
    #  B,     N, mod
    (16, 8192, "none"),
    (16, 8192, "alibi"),
    (16, 8192, "softcap"),
    (16, 8192, "relative_bias"),
    (16, 8192, "documents"),
    (16, 8192, "forget_gates"),
    (1, 65536, "none"),
    (1, 65536, "alibi"),
    (1, 65536, "softcap"),
    (1, 65536, "relative_bias"),
    (1, 65536, "forget_gates"),
    (64, 8192, "none"),
    (64, 8192, "alibi"),
    (64, 8192, "softcap"),
    (64, 8192, "forget_gates"),
)

MASKS = (
    #  B,      N, mask, window
    (8, 8192, "sliding_window", 1024),
    (8, 32768, "sliding_window", 1024),
    (64, 32768, "sliding_window", 1024),
    (8, 32768, "streaming", 1024),
    (8, 32768, "prefix_lm", 0),
    (8, 32768, "causal", 0),
    (8, 32768, "documents", 0),
    (8, 32768, "chunked", 2048),
)


def _between(count: int, low: int, high: int) -> tuple[int, ...]:
    """Lengths drawn evenly, the same in each run."""
    draw = random.Random(2024)
    return tuple(draw.randint(low, high) for _ in range(count))


RAGGED = {
    "1 of 32768 and 15 of 512 tokens": (32768, *[512] * 15),
    "1 of 131072 and 63 of 1024 tokens": (131072, *[1024] * 63),
    "16 lengths, 512 x 1.32^i": tuple(int(512 * 1.32**i) for i in range(16)),
    "128 lengths, 200 to 8000": _between(128, 200, 8000),
    "256 lengths, 64 to 1024": _between(256, 64, 1024),
}

PAGED = (
    # lengths, tokens in a page
    ((8192,) * 16, 16),
    ((8192,) * 16, 64),
    ((8192,) * 16, 256),
    ((8192,) * 16, 1),
    (RAGGED["128 lengths, 200 to 8000"], 16),
    (RAGGED["256 lengths, 64 to 1024"], 64),
)

QUANTISED = (
    #  B,    N, dtype of the cache
    (16, 8192, "float8_e4m3fn"),
    (64, 8192, "float8_e4m3fn"),
    (1, 65536, "float8_e4m3fn"),
    (16, 8192, "int8"),
    (64, 8192, "int8"),
)

MLA = (
    #  B,    N, query heads, query tokens
    (64, 8192, 128, 1),
    (128, 4096, 128, 1),
    (8, 8192, 128, 2),
    (64, 8192, 16, 1),
)

TOKENS = (
    #  B,     N, query tokens
    (16, 8192, 2),
    (16, 8192, 4),
    (16, 8192, 8),
    (16, 8192, 16),
    (1, 32768, 4),
    (1, 32768, 8),
)

PACKED = {  # of 8192 tokens each
    "64 sequences, tokens of each: 1 to 8": tuple(1 + 5 * i % 8 for i in range(64)),
    "8 sequences, tokens of each: 1 to 8": tuple(1 + 5 * i % 8 for i in range(8)),
    "64 decodes and a chunk of 512": (*[1] * 64, 512),
}


def _shapes() -> Iterator[Case]:
    for batch, tokens, q_heads, kv_heads, head_dim in SHAPES:
        label = f"{batch} x {tokens}, {q_heads}/{kv_heads}, D={head_dim}"
        yield Case(label, (tokens,) * batch, q_heads, kv_heads, head_dim, columns=ANY_SHAPE)


def _mods() -> Iterator[Case]:
    for batch, tokens, mod in MODS:
        yield Case(f"{batch} x {tokens}, {mod}", (tokens,) * batch, mod=mod, columns=ANY_MOD)


def _masks() -> Iterator[Case]:
    for batch, tokens, mod, window in MASKS:
        label = f"{batch} x {tokens}, {mod}" + (f" of {2 * window if mod == 'chunked' else window}" if window else "")
        yield Case(label, (tokens,) * batch, mod=mod, window=window, columns=ANY_MOD)


def _ragged() -> Iterator[Case]:
    for label, lens in RAGGED.items():
        yield Case(label, lens, columns=("flex", "flashinfer", "fa3", "xformers"))


def _paged() -> Iterator[Case]:
    for lens, size in PAGED:
        name = next((name for name, of in RAGGED.items() if of == lens), f"{len(lens)} x {lens[0]}")
        yield Case(f"{name}, pages of {size}", lens, page_size=size, columns=("flashinfer",))


def _quantised() -> Iterator[Case]:
    for batch, tokens, dtype in QUANTISED:
        yield Case(f"{batch} x {tokens}, {dtype}", (tokens,) * batch, cache_dtype=dtype, columns=("flashinfer",))


def _mla() -> Iterator[Case]:
    for batch, tokens, heads, num_queries in MLA:
        label = f"{batch} x {tokens}, {heads} heads" + (f", {num_queries} tokens" if num_queries > 1 else "")
        yield Case(
            label, (tokens,) * batch, heads, 1, 576, latent_dim=512, num_queries=num_queries,
            mod="causal" if num_queries > 1 else "none", columns=("flashinfer", "fa3"),
        )  # fmt: skip


def _tokens() -> Iterator[Case]:
    for batch, tokens, num_queries in TOKENS:
        label = f"{batch} x {tokens}, {num_queries} tokens"
        yield Case(label, (tokens,) * batch, mod="causal", num_queries=num_queries, columns=ANY_SHAPE)


def _packed() -> Iterator[Case]:
    for label, q_lens in PACKED.items():
        lens = (8192,) * len(q_lens)
        yield Case(label, lens, mod="causal", q_lens=q_lens, columns=("flashinfer", "fa3"))


# name -> (title, what is measured, cases)
SECTIONS = {
    "shapes": ("Shapes", "Plain attention at shapes of servers, and at some that nobody tuned for.", _shapes),
    "mods": ("Mods", "Score mods and documents over caches of 256 MB and more.", _mods),
    "masks": ("Masks", "Masks that leave a part of the keys, or all of them.", _masks),
    "ragged": ("Ragged lengths", "Sequences of different lengths in one call.", _ragged),
    "paged": ("Pages", "Pages in random order.", _paged),
    "quantised": ("8-bit caches", "Keys and values of 8 bits with one scale, queries of 16 bits.", _quantised),
    "mla": ("Latents (MLA)", "Latents of 576 columns, of which the first 512 are the values.", _mla),
    "tokens": ("Several query tokens", "Causal query tokens of each sequence.", _tokens),
    "packed": ("Packed queries", "Query tokens of all sequences one after another, causal, 8192 keys each.", _packed),
}


def cases_of(section: str, dtype: str, small: bool) -> list[Case]:
    """The cases of a section.

    Args:
        section: One of `SECTIONS`.
        dtype: Name of the torch dtype of queries.
        small: Whether they are scaled to a CPU.
    """
    cases = [dataclasses.replace(case, dtype=dtype) for case in SECTIONS[section][2]()]
    return [shrink(case) for case in cases] if small else cases


def shrink(case: Case) -> Case:
    """The case scaled to a CPU: 1/64 of the tokens, 1/8 of the columns of a row, at most 4 sequences."""
    fewest = 2 * max(case.num_queries, min(max(case.q_lens, default=1), 8))
    lens, q_lens = (x if len(x) <= 4 else (*x[:3], x[-1]) for x in (case.lens, case.q_lens))
    return dataclasses.replace(
        case,
        label=case.label + SCALED_DOWN,
        lens=tuple(max(n // 64, fewest) for n in lens),
        q_lens=tuple(min(n, 8) for n in q_lens),
        head_dim=max(case.head_dim // 8, 16),
        latent_dim=case.latent_dim // 8,
        window=max(case.window // 64, 1),
        page_size=min(case.page_size, 4),
    )
