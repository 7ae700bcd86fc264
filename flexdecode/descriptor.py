"""Tensor descriptors of KV caches: which caches have one, and what the launcher needs to encode it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch


class Matrix(NamedTuple):
    """A cache seen as a matrix in which every KV head is a rectangle.

    Attributes:
        rows, columns: extent that holds every head.
        pitch: elements from one row to the next, the distance of two tokens.
        steps: rows and columns from one sequence to the next, and from one head to the next.
    """

    rows: int
    columns: int
    pitch: int
    steps: tuple[int, int, int, int]


def as_matrix(tensor: torch.Tensor, batch: int) -> Matrix | None:
    """Describes `[B, H, N, D]` as a matrix in which every head is a rectangle, or gives None.

    The bulk copy engine asks for a base and a pitch of whole 16 bytes, and unit stride in D.
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
    if any(width & (width - 1) for width in widths):  # one box for a row
        return None
    one = as_matrix(key, batch)
    alike = key.shape == value.shape and key.stride() == value.stride() and value.data_ptr() % 16 == 0
    other = one if alike else as_matrix(value, batch)
    return None if one is None or other is None else (one, other)


class _Address:
    """What Triton's descriptor needs of a tensor, without keeping the tensor alive."""

    def __init__(self, address: int, dtype: torch.dtype) -> None:
        self.address = address
        self.dtype = dtype

    def data_ptr(self) -> int:
        return self.address


def make_descriptor(address: int, matrix: Matrix, block_shape: list[int], dtype: torch.dtype) -> object:
    """Triton's descriptor of a cache at an address."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor(_Address(address, dtype), [matrix.rows, matrix.columns], [matrix.pitch, 1], block_shape)


def encoded_descriptors(run: Any) -> Callable[[object, object], tuple] | None:
    """Makes a launcher take descriptors that are encoded already, so that a repeated launch does not encode again.

    Triton's launcher encodes each descriptor at each launch and copies all arguments in Python (about 15 us). Where it
    is built as in Triton 3.5 and 3.6, its inner launch function is used directly.

    Args:
        run: Triton's launcher of a kernel with two descriptors; changed if the result is not None.

    Returns:
        A function from two descriptors to the launch arguments in their place, or None if `run` is built otherwise.
    """
    from triton.backends.nvidia import driver

    encode: Any = getattr(driver, "make_tensordesc_arg", lambda: None)
    parts = inspect.getclosurevars(run.launch).nonlocals if inspect.isfunction(getattr(run, "launch", None)) else {}
    launch, metas = parts.get("launcher"), parts.get("tensordesc_meta")
    if launch is None or metas is None or len(metas) != 2 or len(inspect.signature(encode).parameters) != 2:
        return None
    run.launch = launch
    return lambda key, value: (*encode(key, metas[0]), *encode(value, metas[1]))
