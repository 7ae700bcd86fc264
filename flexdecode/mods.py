"""A catalogue of ready score_mods and mask_mods.

Each function takes its parameters and returns a plain closure with FlexAttention's signature:

    mask_mod(b, h, q_idx, kv_idx) -> bool
    score_mod(score, b, h, q_idx, kv_idx) -> score

`b`, `h` (query head), `q_idx` and `kv_idx` are integers. Positions count tokens from the start of the sequence. Scores
are scaled logits in natural-log units. A mask hides later keys (`kv_idx > q_idx`) only if its text says so. Tensors
must be on the device of the query. They are captured, not copied: the next call sees what is written into them later.
Numbers are captured as numbers, so the same mod with another window or cap needs no other kernel.
"""

from __future__ import annotations

import math
import numbers
import operator
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "alibi",
    "alibi_slopes",
    "and_masks",
    "causal",
    "chunked",
    "compose",
    "dilated",
    "document",
    "document_offsets",
    "not_mask",
    "or_masks",
    "prefix_lm",
    "relative_bias",
    "sliding_window",
    "softcap",
    "streaming",
    "t5_bias",
    "tree",
]

MaskMod = Callable[[Any, Any, Any, Any], Any]
ScoreMod = Callable[[Any, Any, Any, Any, Any], Any]


# --- Masks ------------------------------------------------------------------------------------------------------------


def causal() -> MaskMod:
    """Each token sees itself and earlier tokens: `kv_idx <= q_idx`.

    Returns:
        A mask_mod.

    Source: Vaswani et al. 2017, "Attention Is All You Need", section 3.2.3.
    """

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return kv_idx <= q_idx

    return _named(mask_mod, "causal")


def sliding_window(window: int) -> MaskMod:
    """Each token sees the last `window` tokens, itself included: `q_idx - window < kv_idx <= q_idx`.

    Args:
        window: tokens, at least 1; `sys.maxsize` means no limit.

    Returns:
        A mask_mod.

    Source: Beltagy et al. 2020, "Longformer", section 3.1; Jiang et al. 2023, "Mistral 7B", section 2.
    """
    window = _integer("window", window, least=1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx - kv_idx < window)

    return _named(mask_mod, "sliding_window", window)


def streaming(sink: int, window: int) -> MaskMod:
    """Attention sinks and a sliding window: each token sees the first `sink` and the last `window` tokens up to itself.

    Args:
        sink: tokens at the start of the sequence that stay visible, at least 0.
        window: tokens, at least 1.

    Returns:
        A mask_mod. It uses positions in the sequence and does not renumber the tokens in the cache.

    Source: Xiao et al. 2023, "Efficient Streaming Language Models with Attention Sinks", section 3.2.
    """
    sink, window = _integer("sink", sink, least=0), _integer("window", window, least=1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & ((kv_idx < sink) | (q_idx - kv_idx < window))

    return _named(mask_mod, "streaming", sink, window)


def prefix_lm(prefix_lens: int | Tensor) -> MaskMod:
    """The prefix is visible to every token. The rest is causal: `kv_idx < prefix or kv_idx <= q_idx`.

    Args:
        prefix_lens: tokens in the prefix, one number or an integer tensor `[B]`.

    Returns:
        A mask_mod.

    Source: Raffel et al. 2020, "Exploring the Limits of Transfer Learning" (T5), section 3.2.1.
    """
    prefix = _per_sequence("prefix_lens", prefix_lens)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx < prefix(b)) | (kv_idx <= q_idx)

    return _named(mask_mod, "prefix_lm")


def chunked(chunk_size: int) -> MaskMod:
    """Causal attention inside chunks of `chunk_size` tokens. Position 0 starts the first chunk.

    Args:
        chunk_size: tokens, at least 1.

    Returns:
        A mask_mod.

    Source: Child et al. 2019, "Generating Long Sequences with Sparse Transformers", section 4.3 (fixed attention, its
    local part); Llama 4's local layers.
    """
    chunk_size = _integer("chunk_size", chunk_size, least=1)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return (kv_idx <= q_idx) & (q_idx // chunk_size == kv_idx // chunk_size)

    return _named(mask_mod, "chunked", chunk_size)


def dilated(window: int, dilation: int) -> MaskMod:
    """Each token sees `window` tokens, itself and then every `dilation`-th one before it.

    The distance `q_idx - kv_idx` is 0, `dilation`, ..., `(window - 1) * dilation`.

    Args:
        window: number of visible tokens, at least 1.
        dilation: step in tokens, at least 1; 1 is `sliding_window(window)`.

    Returns:
        A mask_mod.

    Source: Beltagy et al. 2020, "Longformer", section 3.1 (dilated sliding window).
    """
    window, dilation = _integer("window", window, least=1), _integer("dilation", dilation, least=1)
    span = min(window * dilation, sys.maxsize)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        distance = q_idx - kv_idx
        return (distance >= 0) & (distance < span) & (distance % dilation == 0)

    return _named(mask_mod, "dilated", window, dilation)


def document(document_ids: Tensor) -> MaskMod:
    """Packed documents: tokens of the same document see each other.

    It does not hide later tokens; add `causal()` with `and_masks`. The documents may be in any order, so the mask has
    to look at every key. If each document is one run of tokens, `document_offsets` reads only that run.

    Args:
        document_ids: document of every position, an integer tensor `[N]` or `[B, N]`.

    Returns:
        A mask_mod.
    """
    _check_tensor("document_ids", document_ids, ("[N]", "[B, N]"), integer=True)
    if document_ids.ndim == 1:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return document_ids[q_idx] == document_ids[kv_idx]

    else:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return document_ids[b, q_idx] == document_ids[b, kv_idx]

    return _named(mask_mod, "document")


def document_offsets(starts: Tensor) -> MaskMod:
    """Packed documents, each one run of tokens, causal: `start <= kv_idx <= q_idx`.

    The live keys are one interval, so in decoding only the bytes of the current document are read.

    Args:
        starts: where documents begin, in tokens; an integer tensor of one of two shapes.
            `[B]`: the start of the document that sequence `b` is now writing. This is enough for decoding.
            `[B, N]`: the start of the document to which position `n` belongs, for queries anywhere. From the cumulative
            lengths `offsets` of one packed row: `torch.repeat_interleave(offsets[:-1], offsets.diff()).expand(B, -1)`.

    Returns:
        A mask_mod.
    """
    _check_tensor("starts", starts, ("[B]", "[B, N]"), integer=True)
    if starts.ndim == 1:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx >= starts[b]) & (kv_idx <= q_idx)

    else:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return (kv_idx >= starts[b, q_idx]) & (kv_idx <= q_idx)

    return _named(mask_mod, "document_offsets")


def tree(ancestors: Tensor, prefix_lens: int | Tensor) -> MaskMod:
    """Draft tokens of speculative decoding: each draft sees the whole prefix and the drafts that are its ancestors.

    The T draft tokens are the keys at positions `prefix .. prefix + T - 1`. The queries must be among them.

    Args:
        ancestors: bool tensor `[T, T]` or `[B, T, T]`; `ancestors[i, j]` says whether draft i sees draft j. The
            diagonal is true where a draft sees itself.
        prefix_lens: tokens before the drafts, one number or an integer tensor `[B]`.

    Returns:
        A mask_mod.

    Source: Miao et al. 2023, "SpecInfer", section 4.2 (topology-aware causal mask); Cai et al. 2024, "Medusa",
    section 2.1.2 (tree attention).
    """
    _check_tensor("ancestors", ancestors, ("[T, T]", "[B, T, T]"))
    if ancestors.dtype != torch.bool:
        raise TypeError(f"`ancestors` must be a bool tensor, got {ancestors.dtype}")
    if ancestors.shape[-1] != ancestors.shape[-2]:
        raise ValueError(f"`ancestors` must have as many rows as columns, got {list(ancestors.shape)}")
    prefix = _per_sequence("prefix_lens", prefix_lens)
    if ancestors.ndim == 2:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            start = prefix(b)
            return (kv_idx < start) | ancestors[q_idx - start, kv_idx - start]

    else:

        def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            start = prefix(b)
            return (kv_idx < start) | ancestors[b, q_idx - start, kv_idx - start]

    return _named(mask_mod, "tree")


# --- Scores -----------------------------------------------------------------------------------------------------------


def alibi(slopes: int | Tensor, *, device: torch.device | str | None = None) -> ScoreMod:
    """Attention with linear biases: `score - slopes[h] * (q_idx - kv_idx)`.

    Args:
        slopes: one slope per query head, a floating tensor `[Hq]` in logits per token; or the number of query heads,
            for the standard slopes.
        device: device of the standard slopes; it must be the query's.

    Returns:
        A score_mod.

    Source: Press et al. 2022, "Train Short, Test Long: Attention with Linear Biases", section 3.
    """
    if isinstance(slopes, int) and not isinstance(slopes, bool):
        slopes = alibi_slopes(slopes, device=device)
    elif not isinstance(slopes, Tensor):
        raise TypeError(f"`slopes` must be a tensor [Hq] or the number of query heads, got {type(slopes).__name__}")
    elif device is not None:
        raise ValueError("`device` goes with a number of heads; a `slopes` tensor has its own")
    _check_tensor("slopes", slopes, ("[Hq]",), floating=True)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return score - slopes[h] * (q_idx - kv_idx)

    return _named(score_mod, "alibi")


def alibi_slopes(num_heads: int, *, device: torch.device | str | None = None) -> Tensor:
    """Makes the standard ALiBi slopes.

    For a power of two n they are `2 ** (-8 * i / n)`, i = 1 .. n. For another number they are those of the next lower
    power of two, followed by every second slope of the next higher power of two.

    Args:
        num_heads: number of query heads, at least 1.
        device: device of the result.

    Returns:
        Float32 tensor `[num_heads]`, logits per token.

    Source: Press et al. 2022, section 3 and its published code (`get_slopes`).
    """
    num_heads = _integer("num_heads", num_heads, least=1)
    lower = 1 << (num_heads.bit_length() - 1)
    slopes = [2.0 ** (-8 * i / lower) for i in range(1, lower + 1)]
    slopes += [2.0 ** (-4 * i / lower) for i in range(1, 2 * (num_heads - lower), 2)]
    return torch.tensor(slopes, dtype=torch.float32, device=device)


def softcap(cap: float) -> ScoreMod:
    """Soft cap on the logits: `cap * tanh(score / cap)`.

    Args:
        cap: the largest absolute logit, above 0.

    Returns:
        A score_mod.

    Source: Gemma Team 2024, "Gemma 2", section 2 (logit soft-capping).
    """
    if isinstance(cap, bool) or not isinstance(cap, numbers.Real):
        raise TypeError(f"`cap` must be a number, got {type(cap).__name__}")
    cap = float(cap)
    if not 0.0 < cap < math.inf:
        raise ValueError(f"`cap` must be finite and above 0, got {cap}")
    # A product instead of a division, because a captured divisor may become a constant of the kernel.
    inverse_cap = 1.0 / cap

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return cap * torch.tanh(score * inverse_cap)

    return _named(score_mod, "softcap", cap)


def relative_bias(bias: Tensor) -> ScoreMod:
    """Learned bias per head and clipped distance: `score + bias[h, clip(kv_idx - q_idx, -m, m) + m]`.

    Args:
        bias: floating tensor `[Hq, 2 * m + 1]` in logits; m is the largest distance in tokens. Column `m` is for the
            token itself. Columns to its left are for earlier keys.

    Returns:
        A score_mod.

    Source: Shaw et al. 2018, "Self-Attention with Relative Position Representations", section 3.2, with one number per
    clipped distance in place of a vector.
    """
    _check_tensor("bias", bias, ("[Hq, 2 * max_distance + 1]",), floating=True)
    if bias.shape[1] % 2 == 0:
        raise ValueError(f"`bias` must have an odd number of columns, 2 * max_distance + 1, got {list(bias.shape)}")
    max_distance = bias.shape[1] // 2

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        column = torch.clamp(kv_idx - q_idx, -max_distance, max_distance) + max_distance
        return score + bias[h, column]

    return _named(score_mod, "relative_bias")


def t5_bias(table: Tensor, max_distance: int = 128, bidirectional: bool = False) -> ScoreMod:
    """T5's relative position bias. Near distances have a bucket each. Farther distances share logarithmic buckets.

    `score + table[bucket(kv_idx - q_idx), h]`. T5 itself does not scale its scores, so call with `scale=1.0`.

    Args:
        table: floating tensor `[num_buckets, Hq]` in logits, `relative_attention_bias.weight` of a checkpoint.
        max_distance: distance in tokens; this distance and all greater ones are in the last bucket.
        bidirectional: True gives half of the buckets to later keys (encoders). False, as in decoders, gives all buckets
            to earlier keys; later keys are in bucket 0.

    Returns:
        A score_mod.

    Source: Raffel et al. 2020, section 2.1, and its published code (`_relative_position_bucket`).
    """
    _check_tensor("table", table, ("[num_buckets, Hq]",), floating=True)
    num_buckets = table.shape[0] // 2 if bidirectional else table.shape[0]
    max_distance = _integer("max_distance", max_distance, least=1)
    max_exact = num_buckets // 2
    if max_exact < 1 or (bidirectional and table.shape[0] % 2):
        raise ValueError(
            f"`table` must have at least {4 if bidirectional else 2} rows"
            f"{' and an even number of them' if bidirectional else ''}, got {list(table.shape)}"
        )
    if max_distance <= max_exact:
        raise ValueError(f"`max_distance` must be above {max_exact} with {num_buckets} buckets, got {max_distance}")

    # The bucket of every distance up to the largest one. The arithmetic (float32) is that of the published code.
    distance = torch.arange(-max_distance, max_distance + 1, device="cpu")
    near = distance.abs() if bidirectional else (-distance).clamp(min=0)
    ratio = torch.log(near.clamp(min=max_exact).float() / max_exact) / math.log(max_distance / max_exact)
    far = (max_exact + (ratio * (num_buckets - max_exact)).long()).clamp(max=num_buckets - 1)
    buckets = torch.where(near < max_exact, near, far)
    if bidirectional:
        buckets = buckets + num_buckets * (distance > 0)
    buckets = buckets.to(table.device, torch.int32)
    last = table.shape[0] - 1

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        column = torch.clamp(kv_idx - q_idx, -max_distance, max_distance) + max_distance
        bucket = torch.clamp(buckets[column], 0, last)  # changes nothing, but proves that the index is in range
        return score + table[bucket, h]

    return _named(score_mod, "t5_bias")


# --- Combinations -----------------------------------------------------------------------------------------------------


def and_masks(*mask_mods: MaskMod) -> MaskMod:
    """A key is live if every mask is true. Without masks, every key is live.

    Args:
        *mask_mods: mask_mods, called in this order.

    Returns:
        A mask_mod.
    """
    _check_callables("and_masks", mask_mods)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        live = b.new_ones((), dtype=torch.bool)
        for mask in mask_mods:
            live = live & mask(b, h, q_idx, kv_idx)
        return live

    return _named(mask_mod, f"and({_names(mask_mods)})")


def or_masks(*mask_mods: MaskMod) -> MaskMod:
    """A key is live if at least one mask is true. Without masks, no key is live.

    Args:
        *mask_mods: mask_mods, called in this order.

    Returns:
        A mask_mod.
    """
    _check_callables("or_masks", mask_mods)

    def mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        live = b.new_zeros((), dtype=torch.bool)
        for mask in mask_mods:
            live = live | mask(b, h, q_idx, kv_idx)
        return live

    return _named(mask_mod, f"or({_names(mask_mods)})")


def not_mask(mask_mod: MaskMod) -> MaskMod:
    """A key is live if the mask is false.

    Args:
        mask_mod: a mask_mod.

    Returns:
        A mask_mod.
    """
    _check_callables("not_mask", (mask_mod,))
    mask = mask_mod

    def not_mask_mod(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        # `&` makes a tensor first: `~True` on a Python bool would be -2, which counts as true.
        return ~(b.new_ones((), dtype=torch.bool) & mask(b, h, q_idx, kv_idx))

    return _named(not_mask_mod, f"not({_names((mask,))})")


def compose(*score_mods: ScoreMod) -> ScoreMod:
    """Applies score_mods from left to right. Each receives the result of the one before it.

    Args:
        *score_mods: score_mods; without any, the score stays as it is.

    Returns:
        A score_mod.
    """
    _check_callables("compose", score_mods)

    def score_mod(score: Tensor, b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        for mod in score_mods:
            score = mod(score, b, h, q_idx, kv_idx)
        return score

    return _named(score_mod, f"compose({_names(score_mods)})")


# --- Arguments --------------------------------------------------------------------------------------------------------


def _named(mod: Callable[..., Any], name: str, *numbers: Any) -> Callable[..., Any]:
    """Names a mod, with its numbers: `softcap_50`."""
    if not torch.compiler.is_compiling():  # text of a number would make a constant of it in a compiled region
        name = "_".join([name, *[f"{x:g}" if isinstance(x, float) else str(x) for x in numbers]])
    mod.__name__ = name
    return mod


def _names(mods: tuple[Callable[..., Any], ...]) -> str:
    return ", ".join(getattr(mod, "__name__", type(mod).__name__) for mod in mods)


def _per_sequence(name: str, number: int | Tensor) -> Callable[[Any], Any]:
    """The function `b -> number` for one number or a tensor `[B]`."""
    if not isinstance(number, Tensor):
        number = _integer(name, number, least=0)
        return lambda b: number
    _check_tensor(name, number, ("[B]",), integer=True)
    return lambda b: number[b]


def _integer(name: str, number: Any, least: int) -> int:
    if type(number) is not int:  # in a compiled region a number that changes has no attributes to look at
        if isinstance(number, (bool, Tensor)) or not hasattr(number, "__index__"):
            raise TypeError(f"`{name}` must be an integer, got {type(number).__name__}")
        number = operator.index(number)
    if not least <= number <= sys.maxsize:
        raise ValueError(f"`{name}` must be from {least} to sys.maxsize, got {number}")
    return number


def _check_tensor(
    name: str, tensor: Any, shapes: tuple[str, ...], *, integer: bool = False, floating: bool = False
) -> None:
    expected = " or ".join(shapes)
    if not isinstance(tensor, Tensor):
        raise TypeError(f"`{name}` must be a tensor {expected}, got {type(tensor).__name__}")
    if tensor.ndim not in {shape.count(",") + 1 for shape in shapes}:
        raise ValueError(f"`{name}` must have shape {expected}, got {list(tensor.shape)}")
    if floating and not tensor.is_floating_point():
        raise TypeError(f"`{name}` must be a floating tensor, got {tensor.dtype}")
    if integer and (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool):
        raise TypeError(f"`{name}` must be an integer tensor, got {tensor.dtype}")


def _check_callables(name: str, mods: tuple[Any, ...]) -> None:
    for mod in mods:
        if not callable(mod):
            raise TypeError(f"{name} takes functions, got {type(mod).__name__}")
