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


def as_matrix(tensor: torch.Tensor, strides: tuple[int, ...]) -> Matrix | None:
    """Describes `[B, H, N, D]` as a matrix in which every head is a rectangle; None if that is not possible.

    The bulk copy engine needs a base address and a pitch that are multiples of 16 bytes, and stride 1 in D.

    Args:
        tensor: of keys or values.
        strides: of it, in elements; 0 over sequences that share one cache.
    """
    batch, num_heads, num_tokens, head_dim = tensor.shape
    stride_b, stride_h, pitch, stride_d = strides
    if stride_d != 1 or head_dim < 16 or pitch < head_dim or not (batch and num_heads and num_tokens):
        return None
    if tensor.data_ptr() % 16 or pitch * tensor.element_size() % 16:
        return None
    rows_b, columns_b = divmod(stride_b if batch > 1 else 0, pitch)
    rows_h, columns_h = divmod(stride_h if num_heads > 1 else 0, pitch)
    rows = rows_b * (batch - 1) + rows_h * (num_heads - 1) + num_tokens
    columns = columns_b * (batch - 1) + columns_h * (num_heads - 1) + head_dim
    if columns > pitch or rows >= 1 << 31:
        return None
    return Matrix(rows, columns, pitch, (rows_b, columns_b, rows_h, columns_h))


def as_matrices(
    key: torch.Tensor, value: torch.Tensor, key_strides: tuple[int, ...], value_strides: tuple[int, ...]
) -> tuple[Matrix, Matrix] | None:
    """Both caches as matrices that a box of one head can be read from; else None. The strides are as in `as_matrix`.

    The number of columns of a box is a power of two. Past the last column of a matrix the copy engine gives zeros. So
    where a head has fewer columns than its box, it must be alone in its rows: a key has no columns of another head.
    """
    one = as_matrix(key, key_strides)
    alike = key_strides == value_strides and key.shape == value.shape and key.dtype == value.dtype
    other = one if alike and value.data_ptr() % 16 == 0 else as_matrix(value, value_strides)
    if one is None or other is None:
        return None
    fits = all(
        width & (width - 1) == 0 or matrix.columns == width
        for width, matrix in ((key.shape[3], one), (value.shape[3], other))
    )
    return (one, other) if fits else None


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
