"""Which tensors share memory. Writing an output must not change another element of it, or an input."""

from __future__ import annotations

import torch


def extent(tensor: torch.Tensor) -> int:
    """Bytes from the first element of a tensor to the end of its last one."""
    if tensor.is_contiguous():
        return tensor.numel() * tensor.element_size()
    if not tensor.numel():
        return 0
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return (sum((size - 1) * stride for size, stride in steps) + 1) * tensor.element_size()


def overlaps_itself(tensor: torch.Tensor) -> bool:
    """Whether two elements of a tensor have the same place."""
    dims = [(stride, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if size != 1]
    if tensor.numel() and any(stride == 0 for stride, _ in dims):
        return True  # without a list of its places, which may be many
    reached = 0  # the last place that the dimensions with smaller strides reach
    for stride, size in sorted(dims):
        if stride <= reached:
            places = _places(dims)
            return len(places.unique()) < len(places)
        reached += (size - 1) * stride
    return False


def share_memory(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors have a byte in common. Interleaved slices of one storage have none."""
    if not one.numel() or not other.numel():
        return False
    length, places = _runs(one)
    other_length, other_places = _runs(other)
    places = places + (one.data_ptr() - other.data_ptr())
    other_places = other_places.sort().values
    # For each run of `one`: the last run of `other` that starts before its end. Does it reach into the run?
    last = torch.searchsorted(other_places, places + length) - 1
    reaches = other_places[last.clamp(min=0)] + other_length > places
    return bool((reaches & (last >= 0)).any())


def _runs(tensor: torch.Tensor) -> tuple[int, torch.Tensor]:
    """A tensor as runs of bytes: the length of each, and where they start, int64."""
    itemsize = tensor.element_size()
    dims = sorted((stride * itemsize, size) for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    length = itemsize
    rest: list[tuple[int, int]] = []
    for stride, size in dims:
        if size == 1 or stride == 0:
            continue
        if stride == length and not rest:
            length *= size
        else:
            rest.append((stride, size))
    return length, _places(rest)


def _places(dims: list[tuple[int, int]]) -> torch.Tensor:
    """Offsets of all elements, from strides and sizes."""
    places = torch.zeros(1, dtype=torch.int64, device="cpu")
    for stride, size in dims:
        steps = torch.arange(size, dtype=torch.int64, device="cpu") * stride
        places = (places[:, None] + steps).flatten()
    return places
