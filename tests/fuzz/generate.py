"""Draws a case from a seed.

Seeds come in runs of `DRAWS`: what becomes part of a kernel is the same in a run, and data (batch, lengths, numbers,
contents) differ, so that one compiled kernel serves many cases.
"""

from random import Random

from .case import DEAD, Case
from .random_mods import Mods

DRAWS = {"torch": 3, "interpret": 5, "gpu": 10}
HEADS = ((1, 1), (1, 1), (2, 1), (4, 2), (4, 4), (3, 1), (6, 2), (5, 5), (8, 2), (7, 1), (10, 2), (16, 1))
LAYOUTS = ("contiguous", "contiguous", "bnhd", "strided", "padded", "shifted")


def random_case(seed: int, backend: str) -> Case:
    """Draws a case.

    Args:
        seed: any integer.
        backend: "torch"; "interpret", the triton backend on the CPU; or "gpu".
    """
    kind, data = Random(f"{backend} {seed // DRAWS[backend]}"), Random(f"{backend} {seed} data")
    chance = lambda p: kind.random() < p
    case = {"backend": "torch" if backend == "torch" else "triton", "device": "cuda" if backend == "gpu" else "cpu"}
    case |= {"data": data.randrange(1 << 30), **_sizes(kind, data, backend)}
    dtypes = ("float32", "float16") if backend == "interpret" else ("float32", "float32", "float16", "bfloat16")
    case |= {"dtype": kind.choice(dtypes), "magnitude": data.choice((1.0, 1.0, 1.0, 3.0, 0.01))}
    case |= {"layout": kind.choice(LAYOUTS), "out_layout": kind.choice(LAYOUTS) if chance(0.25) else None}
    case |= {"index_layout": "strided" if chance(0.2) else "contiguous", "index_dtype": kind.choice(("int32", "int64"))}
    case |= _cache(kind, data, case)
    B, Q, N = case["B"], case["Q"], case["N"]
    paged = case.get("page_size") is not None or case["cache"] != "tensors"
    if paged or chance(0.6):
        case["kv_lens"] = _lengths(data, B, N)
    if chance(0.25):
        case["q_lens"] = tuple(data.choice((0, min(1, Q), Q, data.randint(0, Q))) for _ in range(B))
    offset = kind.random()
    if offset < 0.1:
        case["q_offset"] = data.choice((0, N, N // 2, data.randint(-20, N + 20)))
    elif offset < 0.2:
        case["q_offset"] = tuple(data.randint(-20, N + 20) for _ in range(B))
    if chance(0.2):
        case["sinks"] = kind.choice(("float32", "float16", "bfloat16"))
    if chance(0.2):
        case["scale"] = data.choice((0.0, 1.0, 0.05, -0.3))
    case["return_lse"] = chance(0.7)
    case["options"] = _options(kind, data, backend)
    debug = case["options"].get("debug", False)
    if backend == "gpu" and case["cache"] == "tensors" and "kv_lens" in case and not debug and data.random() < 0.1:
        case["kv_lens"] = tuple(n + data.choice((0, 1, 1000)) for n in case["kv_lens"])  # only a CPU's are checked
    mods = Mods(kind, data, N, allow_outside=not debug)
    if chance(0.6):
        case["score_mod"] = mods.score()
    if chance(0.7):
        case["mask_mod"], case["live"] = mods.mask()
    case["captures"] = mods.captures
    case["holder"] = kind.choice(("closure", "closure", "object", "dict", "list"))
    case["chunk"] = data.choice((None, None, 1, 3000)) if backend == "torch" else None
    if chance(0.05) and B and Q and case.get("q_offset") is None:
        case["block_mask"] = _block_mask(kind)
    if Random(f"{backend} {seed // DRAWS[backend]} packed").random() < 0.3:
        rows = Random(f"{backend} {seed} packed")
        case["packed"] = rows.choice((0, 0, 1, 5)), rows.choice((0, 0, 2)), rows.choice((None, 1, max(Q, 1), 1000))
    case["dead"] = tuple(place for place in DEAD if data.random() < (0.5 if place == "mask" else 0.9))
    return Case(**case)


def _sizes(kind: Random, data: Random, backend: str) -> dict:
    Hq, Hkv = kind.choice(HEADS)
    Q = kind.choice((1, 1, 1, 2, 3, 4, 5, 7, 9)) if kind.random() < 0.97 else kind.choice((33, 33, 0))
    B = data.choice((1, 1, 1, 2, 2, 2, 3, 4, 5)) if data.random() < 0.98 else data.choice((17, 40, 0))
    D, Dv = kind.choice((16, 16, 16, 32, 64, 17, 24, 33, 59, 80)), None
    if kind.random() < 0.08:
        D = kind.choice((1, 2, 7, 96, 128, 192, 256, 300, 576, 577, 640, 1024))
    if kind.random() < 0.2:
        Dv = kind.choice((1, 5, 16, 17, 32, 40, 64, 128, 512, 600))
    Dv = D if Dv is None else Dv
    small, large = (60, 130) if backend == "interpret" else (130, 700)
    N = data.randint(0, small) if data.random() < 0.85 else data.randint(0, large)
    if backend == "gpu" and data.random() < 0.5:
        N = data.randint(0, 3000)
    if DRAWS[backend] > 1:  # what divides the strides is part of a kernel
        N = N // 16 * 16 + kind.randrange(16)
    if backend == "interpret":  # about 40 ms for each program, one after the other
        B, Hq, Hkv = min(B, 3), *((Hq, Hkv) if Hkv < 4 else (4, 2))
    return {"B": B, "Hq": Hq, "Hkv": Hkv, "Q": Q, "N": N, "D": D, "Dv": Dv}


def _cache(kind: Random, data: Random, case: dict) -> dict:
    """How the cache lies in memory."""
    chance = lambda p: kind.random() < p
    found: dict = {"cache": "tensors", "cache_layout": kind.choice(LAYOUTS), "N": case["N"]}
    if case["B"] and case["Q"] and chance(0.08):
        found["cache"] = kind.choice(("KVCache", "PagedKVCache"))
    found["value_layout"] = kind.choice(LAYOUTS) if chance(0.3) else None
    found["latent"] = found["cache"] == "tensors" and case["Dv"] <= case["D"] and chance(0.12)
    if chance(0.25):
        found["stored"] = kind.choice(("int8", "e4m3", "e5m2"))
        forms = ("number", "heads", "sequences", "tokens")
        found |= {"k_scale": kind.choice(forms), "v_scale": kind.choice(forms)}
        found["scale_dtype"] = kind.choice(("float32", "float32", "float16", "bfloat16"))
    if found["cache"] == "PagedKVCache" or (found["cache"] == "tensors" and chance(0.35)):
        page_size = kind.choice((1, 2, 3, 4, 5, 8, 16, 16, 24, 32, 64, 128))
        found |= {"page_size": page_size, "N": -(-max(case["N"], 1) // page_size) * page_size}
        found |= {"table_dtype": kind.choice(("int32", "int64")), "shared_pages": data.choice((0, 0, 0, 1, 2))}
    elif found["cache"] == "KVCache":
        found["N"] = max(case["N"], 1)
    elif chance(0.12):
        found["cache_batch"] = kind.choice(("one", "expanded"))
    return found


def _lengths(data: Random, B: int, N: int) -> tuple:
    return tuple(
        data.choice((0, min(1, N), N, N, data.randint(0, N), data.randint(0, N), max(N - 1, 0))) for _ in range(B)
    )


def _options(kind: Random, data: Random, backend: str) -> dict:
    options: dict = {}
    chance = lambda p: kind.random() < p
    if chance(0.08):
        options["debug"] = True
    if backend == "torch":
        return options
    if chance(0.25):
        options["batch_invariant"] = True
    elif chance(0.4):
        options["schedule"] = kind.choice(("split", "balanced"))
    if chance(0.5):
        most = (1, 2, 3, 3, 5) if backend == "interpret" else (1, 2, 3, 7, 150)
        options["num_splits"] = kind.choice(most)
    if chance(0.5):
        options["block_n"] = kind.choice((16, 16, 32, 64))
    if backend == "gpu" and chance(0.1):
        options["num_warps"] = kind.choice((1, 2, 8))
    if backend == "gpu" and chance(0.1):
        options["num_stages"] = kind.choice((1, 2))
    return options


def _block_mask(kind: Random) -> tuple:
    body = kind.choice((
        "q_idx >= kv_idx", "(kv_idx // 8 + q_idx // 8) % 3 != 1", "(q_idx >= kv_idx) & (q_idx - kv_idx < 20)",
        "((kv_idx // 16 + h + b) % 2 == 0) & (kv_idx % 5 != 2)", "kv_idx < 0",
    ))  # fmt: skip
    return body, kind.choice((8, 16, 32)), kind.choice((8, 16, 24, 64)), kind.random() < 0.5 or "h + b" in body
