"""The columns of keys and values: how a kernel loads and pads them."""

from __future__ import annotations

from typing import NamedTuple

from .device import DeviceFacts
from .inputs import QUANTISED, DecodeOptions
from .signature import Signature

SMALL_ROWS, LARGE_ROWS = 64, 128  # query rows of a tile: the most for few tokens, and those for a prompt
# Larger heads are computed in parts of so many columns of keys, in a loop, and so many columns of values.
WHOLE_HEAD_DIM, WHOLE_V_HEAD_DIM = 576, 512
WIDE_BLOCK_D, WIDE_BLOCK_DV = 128, 256
# A float32 product is three products of tf32, so its operands fill the registers twice. For more columns they spill.
FLOAT32_HEAD_DIM, FLOAT32_COLUMNS = 256, 256


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least `n`."""
    return 1 << max(n - 1, 0).bit_length()


class Columns(NamedTuple):
    """What a signature says about the columns of tiles.

    Attributes:
        block_d, block_r, block_dv, shared: as in `Tiles`.
        kv_bytes: bytes of one key and its value in memory.
        tile_bytes: the same in a tile, where numbers are converted for the products and columns padded.
        wide: whether columns are computed in parts.
    """

    block_d: int
    block_r: int
    block_dv: int
    shared: bool
    kv_bytes: int
    tile_bytes: int
    wide: bool

    @property
    def loaded(self) -> int:
        """Columns of a key and its value that a step has in registers."""
        return self.block_d + self.block_r + self.block_dv


def find_columns(signature: Signature, facts: DeviceFacts) -> Columns:
    """Divides the columns of keys and values."""
    block_d, block_r = _head_dim_blocks(signature.head_dim)
    block_dv = max(16, next_power_of_2(signature.v_head_dim))
    shared = signature.shared_kv and block_dv == block_d
    columns = block_d + block_r, 0 if shared else block_dv
    stored = signature.key_dtype, signature.value_dtype
    tiled = [x if x in QUANTISED else y for x, y in zip(stored, signature.product_dtypes, strict=True)]
    widths = signature.head_dim, 0 if shared else signature.v_head_dim
    kv_bytes = sum(n * dtype.itemsize for n, dtype in zip(widths, stored, strict=True))
    tile_bytes = sum(n * dtype.itemsize for n, dtype in zip(columns, tiled, strict=True))
    is_float32 = signature.is_float32
    wide = signature.head_dim > WHOLE_HEAD_DIM or signature.v_head_dim > WHOLE_V_HEAD_DIM
    if is_float32:
        wide = max(signature.head_dim, signature.v_head_dim) > FLOAT32_HEAD_DIM
    # Sixteen keys have to fit into the shared memory. Narrow products beside large ones would spill registers.
    wide = wide or 16 * tile_bytes >= facts.shared_memory or (is_narrow(signature) and block_d + block_dv > 256)
    if wide:
        block_r, shared = 0, False
        block_d, block_dv = min(block_d, WIDE_BLOCK_D // (2 if is_float32 else 1)), min(block_dv, WIDE_BLOCK_DV)
    return Columns(block_d, block_r, block_dv, shared, kv_bytes, tile_bytes, wide)


def _head_dim_blocks(head_dim: int) -> tuple[int, int]:
    """Columns of the first and the second load of a key, so that a large key is not padded to a power of two."""
    whole = max(16, next_power_of_2(head_dim))
    rest = head_dim - whole // 2
    if whole <= 128 or rest > whole // 4:
        return whole, 0
    return whole // 2, max(16, next_power_of_2(rest))


def least_columns(block_m: int, paired: bool = False) -> int:
    """The fewest columns of values in a tile with so many rows.

    Triton lets the four warps share the rows of a product that has no more columns than rows. Rows are too few for
    that, and each warp would hold a whole tile of keys.
    """
    return 2 * block_m * (2 if paired else 1) if block_m < SMALL_ROWS else 0


def is_narrow(signature: Signature) -> bool:
    """Whether keys or values have fewer columns than the smallest product, which takes 16."""
    return min(signature.head_dim, signature.v_head_dim) < 16


def is_paired(signature: Signature, facts: DeviceFacts, options: DecodeOptions) -> bool:
    """Whether the columns of a quantised cache are loaded two by two."""
    # Whether a cache is pairable may depend on where in memory a sequence lies, so batch_invariant forbids it.
    if not signature.pairable or not facts.can_unpack or options.batch_invariant:
        return False
    # A product takes at least 16 columns. A paired tile has two products of half the columns each.
    columns = find_columns(signature, facts)
    return columns.block_r == 0 and columns.block_d >= 32 and not columns.wide and not is_narrow(signature)
