"""The mods of the matrix, each twice: as flexdecode callables, and as the plain bias, mask or cap that peers need.

The two are written independently, so the check before each timing compares two statements of the same mod.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from flexdecode import mods

if TYPE_CHECKING:
    from .cases import Case

__all__ = ["MODS", "ModCase", "make_mod"]

CAP = 30.0  # Gemma 2 caps attention logits at 50; 30 makes random normal inputs feel it more.
MAX_DISTANCE = 128  # T5's number of relative positions that are told apart.
SINKS = 4  # tokens at the start that `streaming` keeps


@dataclasses.dataclass(frozen=True)
class ModCase:
    """One mod on one case.

    Attributes:
        name: One of `MODS`.
        score_mod: `score_mod(score, b, h, q_idx, kv_idx)` for flexdecode and FlexAttention, or None.
        mask_mod: `mask_mod(b, h, q_idx, kv_idx)`, or None.
        bias: float32 `[1 or B, Hq, Q, N]`, added to the scaled logits, or None.
        keep: bool `[1 or B, 1, Q, N]`, True where a key takes part, or None.
        cap: Logits become `cap * tanh(logits / cap)`, or None.
        live_keys: Key positions that any query of their sequence sees, of all sequences together.
    """

    name: str
    score_mod: Callable | None = None
    mask_mod: Callable | None = None
    bias: torch.Tensor | None = None
    keep: torch.Tensor | None = None
    cap: float | None = None
    live_keys: int = 0

    @property
    def differs(self) -> bool:
        """Whether sequences have different masks."""
        return self.keep is not None and self.keep.shape[0] > 1

    def sequence(self, b: int) -> ModCase:
        """The plain statement of sequence `b` alone."""
        bias, keep = (x if x is None or x.shape[0] == 1 else x[b : b + 1] for x in (self.bias, self.keep))
        return dataclasses.replace(self, bias=bias, keep=keep)


def make_mod(case: Case, device: torch.device) -> ModCase:
    """Build the mod of a case; the queries are the newest `Q` tokens of a sequence.

    With packed queries or ragged lengths there is no plain statement for all sequences together: see `Case.alone`.

    Args:
        case: The case, with the name of the mod.
        device: Where captured tensors, bias and mask live.

    Raises:
        ValueError: There is no such mod.
    """
    if case.mod not in _BUILDERS:
        raise ValueError(f"unknown mod {case.mod!r}; choose from {', '.join(MODS)}")
    if case.q_lens or case.is_ragged:
        if case.mod not in ("none", "causal"):
            raise ValueError(f"the mod {case.mod!r} is stated for sequences of one length")
        return ModCase(case.mod, mask_mod=mods.causal() if case.mod == "causal" else None, live_keys=sum(case.lens))
    found = _BUILDERS[case.mod](case, device)
    keep = found.get("keep")
    seen = case.batch * case.max_len
    if keep is not None:
        seen = int(keep.any(2).sum()) * (case.batch if keep.shape[0] == 1 else 1)
    return ModCase(case.mod, live_keys=seen, **found)


def _distance(case: Case, device: torch.device) -> torch.Tensor:
    """`q_idx - kv_idx` as int64 `[1, 1, Q, N]`."""
    kv_idx = torch.arange(case.max_len, device=device)
    return (kv_idx[case.max_len - case.num_queries :, None] - kv_idx[None, :])[None, None]


def _none(case: Case, device: torch.device) -> dict:
    return {}


def _alibi(case: Case, device: torch.device) -> dict:
    heads = case.num_q_heads
    if heads & (heads - 1):
        raise ValueError(f"the plain ALiBi of the benchmark needs a power of two of query heads, got {heads}")
    # Source: Press et al. 2022, "Train Short, Test Long", section 3: slopes 2^(-8 i / heads) for i = 1..heads.
    slopes = 2.0 ** (-8.0 / heads * torch.arange(1, heads + 1, device=device))
    return {"score_mod": mods.alibi(heads, device=device), "bias": -slopes[:, None, None] * _distance(case, device)}


def _softcap(case: Case, device: torch.device) -> dict:
    return {"score_mod": mods.softcap(CAP), "cap": CAP}


def _relative_bias(case: Case, device: torch.device) -> dict:
    generator = torch.Generator(device).manual_seed(1)
    table = torch.randn(case.num_q_heads, 2 * MAX_DISTANCE + 1, device=device, generator=generator)
    column = (-_distance(case, device)).clamp(-MAX_DISTANCE, MAX_DISTANCE) + MAX_DISTANCE
    return {"score_mod": mods.relative_bias(table), "bias": table[:, column[0, 0]][None]}


def _forget_gates(case: Case, device: torch.device) -> dict:
    generator = torch.Generator(device).manual_seed(2)
    shape = case.batch, case.num_q_heads, case.max_len
    gates = torch.rand(shape, device=device, generator=generator).mul_(0.01).add_(0.99)
    summed = gates.log().cumsum(-1)  # float32 [B, Hq, N]

    def forget(score, b, h, q_idx, kv_idx):
        return score + (summed[b, h, q_idx] - summed[b, h, kv_idx])

    # Source: Lin et al. 2025, "Forgetting Transformer", section 3: the sum of the log gates between key and query.
    newest = summed[:, :, case.max_len - case.num_queries :]
    return {"score_mod": forget, "bias": newest[..., None] - summed[:, :, None, :]}


def _causal(case: Case, device: torch.device) -> dict:
    return {"mask_mod": mods.causal(), "keep": _distance(case, device) >= 0}


def _sliding_window(case: Case, device: torch.device) -> dict:
    distance = _distance(case, device)
    return {"mask_mod": mods.sliding_window(case.window), "keep": (distance >= 0) & (distance < case.window)}


def _streaming(case: Case, device: torch.device) -> dict:
    distance, kv_idx = _distance(case, device), torch.arange(case.max_len, device=device)
    keep = (distance >= 0) & ((kv_idx < SINKS) | (distance < case.window))
    return {"mask_mod": mods.streaming(SINKS, case.window), "keep": keep}


def _prefix_lm(case: Case, device: torch.device) -> dict:
    prefix = case.max_len // 2
    keep = (_distance(case, device) >= 0) | (torch.arange(case.max_len, device=device) < prefix)
    return {"mask_mod": mods.prefix_lm(prefix), "keep": keep}


def _documents(case: Case, device: torch.device) -> dict:
    """Each sequence is writing its last document, which begins somewhere in its second half."""
    half = case.max_len // 2
    starts = half + torch.arange(case.batch, device=device) * max(half - case.num_queries, 0) // case.batch
    kv_idx = torch.arange(case.max_len, device=device)
    keep = (_distance(case, device) >= 0) & (kv_idx >= starts[:, None, None, None])
    return {"mask_mod": mods.document_offsets(starts), "keep": keep}


def _chunked(case: Case, device: torch.device) -> dict:
    size = 2 * case.window
    kv_idx = torch.arange(case.max_len, device=device)
    q_idx = kv_idx[case.max_len - case.num_queries :, None]
    keep = (kv_idx <= q_idx) & (kv_idx // size == q_idx // size)
    return {"mask_mod": mods.chunked(size), "keep": keep[None, None]}


_BUILDERS: dict[str, Callable[[Case, torch.device], dict]] = {
    "none": _none,
    "alibi": _alibi,
    "softcap": _softcap,
    "relative_bias": _relative_bias,
    "causal": _causal,
    "sliding_window": _sliding_window,
    "streaming": _streaming,
    "prefix_lm": _prefix_lm,
    "documents": _documents,
    "chunked": _chunked,
    "forget_gates": _forget_gates,
}
MODS = tuple(_BUILDERS)
