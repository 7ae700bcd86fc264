"""Mask families of attention-gym, written anew, for caches of 96 keys and for longer ones.

Tensors are made on PyTorch's default device.
"""

import torch

from flexdecode import mods


def causal():
    return lambda b, h, q, k: q >= k


def sliding_window(window=20):
    return lambda b, h, q, k: (q >= k) & (q - k <= window)


def prefix_lm(prefix=24):
    """The prefix in both directions, then causal."""
    return mods.or_masks(lambda b, h, q, k: k < prefix, causal())


def dilated_window(window=40, dilation=3):
    def mask_mod(b, h, q, k):
        distance = (q - k).abs()
        return (distance <= window) & (distance % dilation == 0)

    return mask_mod


def neighborhood(width=12, kernel=5, size=96):
    """NATTEN in two dimensions: a square of keys around the query, moved inside where it would cross a border."""
    height = size // width

    def mask_mod(b, h, q, k):
        q_x, q_y = q // width, q % width
        k_x, k_y = k // width, k % width
        center_x = q_x.clamp(kernel // 2, height - 1 - kernel // 2)
        center_y = q_y.clamp(kernel // 2, width - 1 - kernel // 2)
        return ((center_x - k_x).abs() <= kernel // 2) & ((center_y - k_y).abs() <= kernel // 2)

    return mask_mod


def tiles(width=8, tile=4):
    """A 2-D image stored tile by tile: positions are those of pixels, and a tile sees its neighbours."""
    per_row, area = width // tile, tile * tile

    def pixel(i):
        number, inside = i // area, i % area
        return number // per_row * tile + inside // tile, number % per_row * tile + inside % tile

    def mask_mod(b, h, q, k):
        (q_x, q_y), (k_x, k_y) = pixel(q), pixel(k)
        return ((q_x - k_x).abs() <= 4) & ((q_y - k_y).abs() <= 3)

    return mask_mod


def block_diffusion(block=16):
    """Blocks are denoised one after the other: each sees itself in both directions and the finished ones."""
    return lambda b, h, q, k: (k // block == q // block) | (k // block < q // block)


def documents(lengths=(30, 5, 41, 20)):
    """Packed documents by offsets, causal inside each: positions count from the start of the document."""
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    document = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))

    def mask_mod(b, h, q, k):
        start, end = offsets[document[q]], offsets[document[q] + 1]
        return (k - start >= 0) & (k < end) & (q - start >= k - start)

    return mask_mod


def shared_prefix(prefix=20, suffix=19):
    """Many answers to one prompt in one cache: the prompt is shared, answers do not see each other."""

    def mask_mod(b, h, q, k):
        answer = (q - prefix) // suffix
        return (k <= q) & ((k < prefix) | ((k >= prefix + answer * suffix) & (q >= prefix)))

    return mask_mod


def global_and_window(window=12, global_tokens=5):
    """Longformer: some tokens see all and are seen by all, the others see a window; half of the heads are dense."""
    dense = torch.tensor([True, False])

    def mask_mod(b, h, q, k):
        near = (q - k).abs() <= window
        return torch.where(dense[h], k <= q, near | (k < global_tokens) | (q < global_tokens))

    return mask_mod


def tree(prefix=70):
    """Drafts after a prefix of each sequence, each seeing its ancestors."""
    parents = [0, 0, 0, 1, 1, 2, 3]
    ancestors = torch.eye(len(parents), dtype=torch.bool)
    for draft, parent in enumerate(parents[1:], start=1):
        ancestors[draft] |= ancestors[parent]
    return mods.tree(ancestors, torch.tensor([prefix, prefix - 30, prefix + 4]))


FAMILIES = [
    causal, sliding_window, prefix_lm, dilated_window, neighborhood, tiles, block_diffusion, documents, shared_prefix,
    global_and_window, tree,
]  # fmt: skip

# What makes them interesting in a cache of 3000 keys.
LONG = {
    causal: {}, sliding_window: {"window": 700}, prefix_lm: {"prefix": 600}, dilated_window: {"window": 1000},
    neighborhood: {"width": 60, "kernel": 13, "size": 3000}, tiles: {"width": 64, "tile": 8},
    block_diffusion: {"block": 256}, documents: {"lengths": (900, 5, 1200, 895)},
    shared_prefix: {"prefix": 500, "suffix": 600}, global_and_window: {"window": 300, "global_tokens": 70},
    tree: {"prefix": 2995},
}  # fmt: skip
