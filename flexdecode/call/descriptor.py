"""Tensor descriptors of KV caches: which caches can have one, and how it is made."""

from __future__ import annotations

from typing import NamedTuple

import torch

from ..triton_api import tensor_descriptor


class Matrix(NamedTuple):
    """A cache seen as a matrix in which every KV head is a rectangle.

    Attributes:
        rows, columns: size of the matrix; it holds every head.
        pitch: elements from one row to the next, which is the distance of two tokens.
        steps: rows and columns from one sequence to the next, and from one head to the next.
    """

    rows: int
    columns: int
    pitch: int
    steps: tuple[int, int, int, int]


def as_matrix(tensor: torch.Tensor, batch: int) -> Matrix | None:
    """Describes `[B, H, N, D]` as a matrix in which every head is a rectangle; None if that is not possible.

    The bulk copy engine needs a base address and a pitch that are multiples of 16 bytes, and stride 1 in D.
    """
    b, num_heads, num_tokens, head_dim = tensor.shape
    stride_b, stride_h, pitch, stride_d = tensor.stride()
    itemsize = tensor.element_size()
    if tensor.numel() == 0 or stride_d != 1 or pitch < head_dim:
        return None
    if tensor.data_ptr() % 16 or pitch * itemsize % 16 or head_dim < 16:
        return None
    sequence = divmod(stride_b if b == batch and b > 1 else 0, pitch)
    head = divmod(stride_h if num_heads > 1 else 0, pitch)
    rows, columns = (s * (b - 1) + h * (num_heads - 1) for s, h in zip(sequence, head, strict=True))
    if columns + head_dim > pitch or rows + num_tokens >= 1 << 31:
        return None
    return Matrix(rows + num_tokens, columns + head_dim, pitch, (*sequence, *head))


def as_matrices(key: torch.Tensor, value: torch.Tensor, batch: int) -> tuple[Matrix, Matrix] | None:
    """Both caches as matrices, or None if one has no such form."""
    widths = key.shape[3], value.shape[3]
    if any(width & (width - 1) for width in widths):  # one box holds a row
        return None
    one = as_matrix(key, batch)
    alike = (key.shape, key.stride(), key.dtype) == (value.shape, value.stride(), value.dtype)
    other = one if alike and value.data_ptr() % 16 == 0 else as_matrix(value, batch)
    return None if one is None or other is None else (one, other)


class _Address:
    """What Triton's descriptor needs of a tensor. It does not keep the tensor alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


def make_descriptor(address: int, matrix: Matrix, block_shape: list[int], dtype: torch.dtype) -> object:
    """Triton's descriptor of a cache at an address."""
    return tensor_descriptor(_Address(address, dtype), [matrix.rows, matrix.columns], [matrix.pitch, 1], block_shape)
