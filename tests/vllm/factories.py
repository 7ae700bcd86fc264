"""Factories of mods, as a user writes them. The tests name them by this file, and their reference calls them."""

import torch

from flexdecode import mods
from flexdecode.integrations.vllm import LayerMods


def alibi_by_layer(layer):
    """ALiBi, with other slopes in each layer; none in layer 1."""
    if layer.index == 1:
        return None
    slopes = 0.1 * (layer.index + 1) / torch.arange(1, layer.num_heads + 1)
    return LayerMods(score_mod=mods.alibi(slopes))


def cap_window_first_tokens(layer):
    """A soft cap everywhere; in layers 0 and 2 a window, outside of which the first tokens are seen."""
    return LayerMods(mods.softcap(3.0), mods.streaming(4, 16) if layer.index % 2 == 0 else None)


def window_and_sinks(layer):
    """A window and logits that join the softmax."""
    return LayerMods(mask_mod=mods.sliding_window(20), sinks=torch.linspace(-1.0, 2.0, layer.num_heads))


def distance_by_head(layer):
    """Something that no library has: a bias by distance, other for each head of the model and each layer."""

    def score_mod(score, b, h, q_idx, kv_idx):
        return score + 0.5 * torch.cos((q_idx - kv_idx) * (layer.first_head + h + 1) * 0.3 + layer.index)

    return LayerMods(score_mod)


def prefix_of_eight(layer):
    """Every token sees the first eight; else the mask is causal."""
    return LayerMods(mask_mod=lambda b, h, q, kv: (kv <= q) | (kv < 8), causal=False)


def raises(layer):
    raise KeyError(f"no table for {layer.name}")


def cannot_be_traced(layer):
    def by_branch(score, b, h, q_idx, kv_idx):
        return score if q_idx > kv_idx else score + 1.0

    return LayerMods(by_branch)


SEEN = []


def remembers(layer):
    SEEN.append(layer)


def forgets_to_return(layer):
    LayerMods(mods.softcap(3.0))


def table_of_two_heads(layer):
    slopes = torch.tensor([0.1, 0.2])
    return LayerMods(lambda score, b, h, q_idx, kv_idx: score - slopes[h] * (q_idx - kv_idx))


def table_of_eight_tokens(layer):
    bias = torch.linspace(0.0, 1.0, 8)
    return LayerMods(lambda score, b, h, q_idx, kv_idx: score + bias[kv_idx])
