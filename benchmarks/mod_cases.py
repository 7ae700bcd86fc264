"""The mods of the matrix, each twice: as flexdecode callables, and as the plain bias, mask or cap that peers need.

The two are written independently, so the check before each timing compares two statements of the same mod.
"""

import dataclasses
from collections.abc import Callable

import torch

from .rows import Row

__all__ = ["MODS", "ModCase", "make_case"]

MODS = ("none", "alibi", "softcap", "relative_bias", "causal", "sliding_window")
CAP = 30.0  # Gemma 2 caps attention logits at 50; 30 makes random normal inputs feel it more.
MAX_DISTANCE = 128  # T5's number of relative positions that are told apart.


@dataclasses.dataclass(frozen=True)
class ModCase:
    """One mod on one row.

    Attributes:
        name: One of `MODS`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` for flexdecode and FlexAttention, or None.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)`, or None.
        bias: float32 `[Hq, Mq, Mkv]`, added to the scaled logits, or None.
        keep: bool `[Mq, Mkv]`, True where a key takes part, or None.
        cap: Logits become `cap * tanh(logits / cap)`, or None.
        live_keys: Key positions per sequence that any query of it sees.
    """

    name: str
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    bias: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    cap: float | None = None
    live_keys: int = 0


def make_case(name: str, row: Row, device: torch.device, window: int) -> ModCase:
    """Build the mod `name` for `row`; the queries are the newest `Mq` of `Mkv` tokens.

    Args:
        name: One of `MODS`.
        row: The shape.
        device: Where captured tensors, bias and mask live.
        window: Keys that a query of `sliding_window` sees, itself included.

    Raises:
        ValueError: `name` is unknown.
    """
    builders = {
        "none": lambda row, device, window: {},
        "alibi": _alibi,
        "softcap": _softcap,
        "relative_bias": _relative_bias,
        "causal": _causal,
        "sliding_window": _sliding_window,
    }
    if name not in builders:
        raise ValueError(f"unknown mod {name!r}; choose from {', '.join(MODS)}")
    return ModCase(name, **{"live_keys": row.Mkv, **builders[name](row, device, window)})


def _distance(row: Row, device: torch.device) -> torch.Tensor:
    """`q_idx - kv_idx` as int64 `[Mq, Mkv]`."""
    kv_idx = torch.arange(row.Mkv, device=device)
    return kv_idx[row.Mkv - row.Mq :, None] - kv_idx[None, :]


def _alibi(row: Row, device: torch.device, window: int) -> dict:
    from flexdecode import mods

    if row.Hq & (row.Hq - 1):
        raise ValueError(f"the plain ALiBi of the benchmark needs a power of two of query heads, got {row.Hq}")
    # Source: Press et al. 2022, "Train Short, Test Long", section 3: slopes 2^(-8 i / heads) for i = 1..heads.
    slopes = 2.0 ** (-8.0 / row.Hq * torch.arange(1, row.Hq + 1, device=device))
    return {"score_mod": mods.alibi(row.Hq, device=device), "bias": -slopes[:, None, None] * _distance(row, device)}


def _softcap(row: Row, device: torch.device, window: int) -> dict:
    from flexdecode import mods

    return {"score_mod": mods.softcap(CAP), "cap": CAP}


def _relative_bias(row: Row, device: torch.device, window: int) -> dict:
    from flexdecode import mods

    generator = torch.Generator(device).manual_seed(1)
    table = torch.randn(row.Hq, 2 * MAX_DISTANCE + 1, device=device, generator=generator)
    column = (-_distance(row, device)).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE
    return {"score_mod": mods.relative_bias(table), "bias": table[:, column]}


def _causal(row: Row, device: torch.device, window: int) -> dict:
    from flexdecode import mods

    return {"mask_mod": mods.causal(), "keep": _distance(row, device) >= 0}


def _sliding_window(row: Row, device: torch.device, window: int) -> dict:
    from flexdecode import mods

    distance = _distance(row, device)
    live_keys = min(row.Mkv, window + row.Mq - 1)
    return {
        "mask_mod": mods.sliding_window(window),
        "keep": (distance >= 0) & (distance < window),
        "live_keys": live_keys,
    }
