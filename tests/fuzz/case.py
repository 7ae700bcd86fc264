"""One call of `flex_decode` in plain values, which print as Python."""

from dataclasses import dataclass, field, fields

# What may lie in dead places; a case names those of its places that are spoiled.
DEAD = ("lengths", "mask", "queries", "captures")


@dataclass(frozen=True, repr=False)
class Captured:
    """A tensor that a mod captures.

    Attributes:
        axes: sizes, each a number, or the name of what indexes this dimension: "B" for `b`, "Hq" for `h`, "Hkv" for
            the KV head, "N" for `kv_idx`, "P" for a position of the longest sequence and its queries.
        dtype: name of a PyTorch type.
        low, high: values lie between these.
        layout: "contiguous", "transposed" (of two or more dimensions), "strided" or "expanded" (the first dimension).
        used_in: "score" or "mask" where the one read has exactly the indices that `axes` name, so that elements which
            no attending pair reads can be spoiled; else "".
        on_cpu: a 0-d tensor that stays on the CPU beside inputs on a GPU.
    """

    axes: tuple
    dtype: str = "float32"
    low: float = -2
    high: float = 2
    layout: str = "contiguous"
    used_in: str = ""
    on_cpu: bool = False

    def __repr__(self) -> str:
        return f"Captured({_given(self, Captured(self.axes), ', ')})"


@dataclass(frozen=True)
class Case:
    """One call. Lists have one entry for each sequence, types are names, and None is an argument that is not given.

    Attributes:
        data: seed of the contents of all tensors.
        B, Hq, Hkv, Q, N, D, Dv: sizes; with pages N is `max_pages * page_size`.
        dtype: of the query.
        magnitude: standard deviation of query, key and value.
        layout, cache_layout, value_layout, out_layout: where query, key, value (None: as key) and `out` lie (see
            `tensors.place`).
        cache_batch: "own"; "one", a batch of 1 that serves all sequences; "expanded", the same as an expanded view.
        cache: "tensors", or the name of a class, "KVCache" or "PagedKVCache", that the tokens are appended to.
        latent: value is a view of the first columns of key.
        page_size: of a paged cache.
        shared_pages: pages that all sequences begin with together.
        stored: type of a quantised cache, with the forms of its scales (see `cache_cases.SCALES`) and their type.
        kv_lens, q_lens, q_offset: with the type of their tensors; `q_offset` may be a number.
        packed: the query is packed: rows of no sequence before and after the others, and `max_q_len` or None.
        index_layout: whether these, sinks, scales and the page table lie "contiguous" or "strided".
        sinks: type of the sinks.
        mask_mod, score_mod: a body, or an expression that begins with `mods.` and gives the mod.
        live: intervals [(lo, hi), ...] of positions outside of which no key of a row is attended to, as the mask says
            it; "" where that is not known.
        block_mask: body of its mask, positions per row and per column of its blocks, and whether sequences and heads
            have lists of their own.
        captures: by name.
        holder: what the mods find their captures in: "closure", "object", "dict" or "list".
        chunk: scores that the torch backend holds at a time; None: as many as it likes.
        options: for `DecodeOptions`.
        dead: the dead places that hold NaN, out of `DEAD`.
    """

    backend: str = "torch"
    device: str = "cpu"
    data: int = 0
    B: int = 1
    Hq: int = 1
    Hkv: int = 1
    Q: int = 1
    N: int = 16
    D: int = 16
    Dv: int = 16
    dtype: str = "float32"
    magnitude: float = 1.0
    layout: str = "contiguous"
    cache_layout: str = "contiguous"
    value_layout: str | None = None
    out_layout: str | None = None
    cache_batch: str = "own"
    cache: str = "tensors"
    latent: bool = False
    page_size: int | None = None
    table_dtype: str = "int32"
    shared_pages: int = 0
    stored: str | None = None
    k_scale: str = "number"
    v_scale: str = "number"
    scale_dtype: str = "float32"
    kv_lens: tuple | None = None
    q_lens: tuple | None = None
    q_offset: int | tuple | None = None
    packed: tuple | None = None
    index_dtype: str = "int32"
    index_layout: str = "contiguous"
    sinks: str | None = None
    scale: float | None = None
    score_mod: str | None = None
    mask_mod: str | None = None
    live: str = ""
    block_mask: tuple | None = None
    captures: dict = field(default_factory=dict)
    holder: str = "closure"
    chunk: int | None = None
    return_lse: bool = True
    options: dict = field(default_factory=dict)
    dead: tuple = ()

    def source(self) -> str:
        """The case as a program that runs it."""
        imports = "from tests.fuzz.case import Captured, Case\nfrom tests.fuzz.check import check\n\n"
        return imports + f"case = Case(\n    {_given(self, Case(), f',{chr(10)}    ')},\n)\ncheck(case)"


def _given(thing: Case | Captured, plain: Case | Captured, between: str) -> str:
    """The arguments of a dataclass that differ from those of a plain one."""
    values = [(f.name, getattr(thing, f.name), f.name == "axes") for f in fields(thing)]
    return between.join(f"{name}={x!r}" for name, x, needed in values if needed or x != getattr(plain, name))
