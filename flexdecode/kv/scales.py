"""The scales of a quantised cache."""

from __future__ import annotations

from numbers import Real

import torch

from ..call.inputs import QUANTISED


def make_scale(name: str, given: float | torch.Tensor | None, key: torch.Tensor) -> torch.Tensor | None:
    """The scales of keys or values, for a new cache.

    Args:
        name: the argument, for errors.
        given: as the caller gave it.
        key: the keys of the cache, `[..., Hkv, tokens, D]`; five dimensions if it has layers.

    Returns:
        None without quantisation; ones of the shape `key.shape[:-1]`, one for each token and head; or the given scales
        as float32 `[Hkv]`, with layers `[L, Hkv]`.

    Raises:
        ValueError: they are not for this cache, not positive or not finite.
    """
    heads, layers = key.shape[-3], list(key.shape[:1]) if key.dim() == 5 else []
    if key.dtype not in QUANTISED:
        if given is not None:
            raise ValueError(f"`{name}` is for caches in float8 or int8, but `dtype` is {key.dtype}")
        return None
    if given is None:
        return torch.ones(key.shape[:-1], dtype=torch.float32, device=key.device)
    if isinstance(given, torch.Tensor) and given.dim():
        if given.dtype != torch.float32 or list(given.shape) not in ([heads], [*layers, heads]):
            expected = f"a number or a float32 tensor [Hkv] = [{heads}]"
            if layers:
                expected += f" or [num_layers, Hkv] = [{layers[0]}, {heads}]"
            raise ValueError(f"`{name}` must be {expected}, got {given.dtype} {list(given.shape)}")
        scales = given.detach().to(key.device)
    else:
        given = given.item() if isinstance(given, torch.Tensor) else given
        is_number = isinstance(given, Real) and not isinstance(given, bool)
        scales = torch.tensor([float(given) if is_number else 0.0] * heads, dtype=torch.float32, device=key.device)
    if not ((scales > 0) & scales.isfinite()).all():
        raise ValueError(f"`{name}` must be positive and finite, got {given}")
    return scales.expand(*layers, heads).clone()
