"""The run-time arguments of the kernels: one row for each, in the order of `decode_split`.

Types and launches both come from these rows. The second pass takes those arguments that it has parameters for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import gcd
from operator import attrgetter
from typing import Any, NamedTuple

import torch

from ..call.block_mask import BLOCK_LISTS_TYPES, BlockLists
from ..call.inputs import Inputs
from ..call.signature import NUMBER, UNIT, Kind, Signature
from ..call.tiles import Tiles

TYPE_NAMES = {
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
STRIDES = [f"stride_{t}{d}" for t, dims in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("o", "bhmd")) for d in dims]

CaptureTypes = tuple[str, ...]


@dataclass(frozen=True)
class KernelSpec:
    """Everything that a kernel is compiled from, except its text.

    Attributes:
        signature: what the inputs look like.
        tiles: compile-time sizes.
        score_captures, mask_captures: Triton types of the captured values of each mod.
        num_live: intervals of kv_idx that can attend.
        num_full: intervals in which no mask is needed.
        unbounded: whether every key of a sequence is in the one interval.
        fp_fusion: whether a product and a sum may become one operation. It is False if a mod rounds to half precision,
            because LLVM would drop the rounding between them.
        block_lists: whether the blocks to visit come from lists.
        block_s: for a second pass, the partial results that it merges per step.
        large_m: for a second pass, the query rows of the tiles of another launch of the first pass that was split; 0 if
            there is none.
        of_small: for a second pass, whether another launch of the first pass was not split.
    """

    signature: Signature
    tiles: Tiles
    score_captures: CaptureTypes
    mask_captures: CaptureTypes
    num_live: int
    num_full: int
    unbounded: bool
    fp_fusion: bool = True
    block_lists: bool = False
    block_s: int = 0
    large_m: int = 0
    of_small: bool = False

    @property
    def key_type(self) -> str:
        """Triton's type of the elements that are loaded of a key."""
        return "i16" if self.tiles.paired else TYPE_NAMES[self.signature.key_dtype]

    @property
    def value_type(self) -> str:
        """Triton's type of the elements that are loaded of a value."""
        return "i16" if self.tiles.paired else TYPE_NAMES[self.signature.value_dtype]

    @property
    def prefetches(self) -> bool:
        """Whether a program of the first pass asks for its first block of keys before it reads memory.

        It has to know where the block lies. And there have to be other launches before it, or few programs: where many
        programs share a multiprocessor, the next launch was slower (measured on an H200).
        """
        signature, tiles = self.signature, self.tiles
        lengths = ("kv_lens", "kv_starts", "cu_seqlens_k")
        return (
            self.unbounded
            and (tiles.split or tiles.per_sm == 1)
            and not (tiles.balanced or tiles.latent or signature.packed or self.block_lists or signature.page_size)
            and all(signature.kind(name) is None for name in lengths)
        )

    @property
    def strides(self) -> dict[str, int]:
        """The class of each stride, counted in the elements that are loaded."""
        classes = dict(zip(STRIDES, self.signature.strides, strict=True))
        if self.tiles.paired:
            classes |= {name: c // 2 for name, c in classes.items() if name[-2] in "kv" and c != UNIT}
        return classes


class Call(NamedTuple):
    """What one call consists of.

    Attributes:
        inputs: its tensors and numbers.
        out, lse, max_scores: where the results go: `[B, Hq, Q, Dv]`, and float32 `[B, Hq, Q]` or None.
        score_leaves, mask_leaves: what the mods capture.
        scale: factor of the dot product.
        lists: those of a BlockMask, or None.
        frames: of both mods, see `runtime.identity.Mod`.
    """

    inputs: Inputs
    out: torch.Tensor
    lse: torch.Tensor | None
    max_scores: torch.Tensor | None
    score_leaves: list
    mask_leaves: list
    scale: float
    lists: BlockLists | None = None
    frames: tuple[object, object] = (None, None)


class Argument(NamedTuple):
    """One argument.

    Attributes:
        name: of the template's parameter.
        type: Triton's type; a tuple has several; None if a call has no such argument.
        tensor: the field of `Inputs` or `Call` that it is; a kernel takes its address.
        value: reads it from a launcher and a `Call`. The launcher fills in an argument that has neither: descriptors
            and the workspace at each call, the rest once for all calls of one layout.
        divisor: a number that divides the argument, or each element of a tuple.
    """

    name: str
    type: Callable[[KernelSpec], Any]
    tensor: str | None = None
    value: Callable[[Any, Any], Any] | None = None
    divisor: Callable[[KernelSpec], Any] = lambda spec: 1


def _pointer(kind: Kind) -> str | None:
    """Triton's type of a tensor's address; None for no tensor."""
    return None if kind is None or kind[0] is None else "*" + TYPE_NAMES[kind[0]]


def _aligned(spec: KernelSpec) -> int:
    return 16 if spec.signature.aligned else 1


def _row_numbers(name: str) -> Argument:
    """Numbers of rows that a call may ask for."""
    asked = attrgetter(f"signature.aux.{name}")
    return Argument(name, lambda spec: "*fp32" if asked(spec) else None, name)


def _partial(name: str) -> Argument:
    """A part of the workspace of partial results."""
    return Argument(name, lambda s: "*fp32" if s.tiles.split else None, divisor=lambda s: 16)


def _input(name: str) -> Argument:
    """An optional tensor of a call."""
    return Argument(name, lambda spec: _pointer(spec.signature.kind(name)), name)


def _descriptor(name: str, columns: str, element: str) -> Argument:
    """A tensor descriptor for blocks of `columns` columns of the type `element`."""

    def kind(spec: KernelSpec) -> str | None:
        tiles = spec.tiles
        layout = ",NVMMASharedLayout(128, 16)" if tiles.latent else ""
        block = f"{tiles.block_n}, {getattr(tiles, columns)}"
        return f"tensordesc<{getattr(spec, element)}[{block}]{layout}>" if tiles.descriptors else None

    return Argument(name, kind)


def _scales(name: str, source: str) -> Argument:
    """Scales of keys or values: (), (number,), or the address and the strides over b, h and, for scales per key, n."""
    read = attrgetter(f"inputs.{source}")

    def types(spec: KernelSpec) -> tuple:
        kind: Kind = spec.signature.kind(source)
        if kind is None:
            return ()
        pointer = _pointer(kind)
        return ("fp32",) if pointer is None else (pointer, *["i64"] * max(kind[1], 2))

    def value(launch: Any, call: Call) -> tuple:
        scale = read(call)
        if not isinstance(scale, torch.Tensor):
            return (float(scale),)
        steps = [0 if size == 1 else step for size, step in zip(scale.shape, scale.stride(), strict=True)]
        return (launch.form.at(scale), *[0] * (2 - scale.dim()), *steps)

    return Argument(name, types, value=value)


def _stride(name: str) -> Argument:
    """A stride in elements. If it is 1, the kernel knows it at compile time."""
    return Argument(name, lambda s: None if s.strides[name] == UNIT else "i64", divisor=lambda s: s.strides[name])


def _steps(name: str, tensor: str) -> Argument:
    """Steps between sequences and heads of a cache: two strides, or rows and columns in the matrix of a descriptor."""

    def divisors(spec: KernelSpec) -> Any:
        step_b, step_h, pitch = (spec.strides[f"stride_{tensor}{dim}"] for dim in "bhn")
        # Columns are what remains of a stride that is divided by the pitch.
        return (1, gcd(step_b, pitch), 1, gcd(step_h, pitch)) if spec.tiles.descriptors else (step_b, step_h)

    return Argument(name, lambda spec: ("i32",) * 4 if spec.tiles.descriptors else ("i64",) * 2, divisor=divisors)


def _number(name: str) -> Argument:
    """A number that the launcher knows."""
    return Argument(name, lambda spec: "i32")


ARGUMENTS = (
    Argument("query", lambda s: "*" + TYPE_NAMES[s.signature.dtype], "query", divisor=_aligned),
    Argument("key", lambda s: "*" + s.key_type, "key", divisor=_aligned),
    Argument("value", lambda s: "*" + s.value_type, "value", divisor=_aligned),
    _descriptor("key_descriptor", "key_columns", "key_type"),
    _descriptor("value_descriptor", "value_columns", "value_type"),
    Argument("out", lambda s: "*" + TYPE_NAMES[s.signature.dtype], "out", divisor=_aligned),
    _row_numbers("lse"),
    _row_numbers("max_scores"),
    *map(_partial, ("partial_out", "partial_max", "partial_sum")),
    Argument("item_parts", lambda s: "*i32" if s.tiles.balanced else None),
    _input("kv_lens"),
    _input("q_lens"),
    _input("cu_seqlens_q"),
    _input("cu_seqlens_k"),
    Argument(
        "q_offset",
        lambda s: "i64" if s.signature.kind("q_offset") == NUMBER else _pointer(s.signature.kind("q_offset")),
        value=lambda launch, call: launch.form.at(call.inputs.q_offset),
    ),
    _input("kv_starts"),
    Argument(
        "kv_offset",
        lambda s: "i32" if s.signature.kind("kv_offset") == NUMBER else _pointer(s.signature.kind("kv_offset")),
        value=lambda launch, call: launch.form.at(call.inputs.kv_offset),
    ),
    Argument(
        "page_table",
        lambda s: s.signature.format.types(_pointer(s.signature.kind(s.signature.format.table))),
        value=lambda launch, call: launch.form.format.arguments(
            call.inputs.key, getattr(call.inputs, launch.form.format.table), launch.form.at
        ),
    ),
    Argument(
        "block_lists",
        lambda s: BLOCK_LISTS_TYPES if s.block_lists else (),
        value=lambda launch, call: call.lists.arguments(call.inputs.key.shape[1], *launch.form.listed),
    ),
    _scales("key_scales", "k_scale"),
    _scales("value_scales", "v_scale"),
    _input("sinks"),
    Argument(
        "score_captures",
        lambda s: s.score_captures,
        value=lambda launch, call: launch.form.read_score(call.score_leaves, call.frames[0]),
    ),
    Argument(
        "mask_captures",
        lambda s: s.mask_captures,
        value=lambda launch, call: launch.form.read_mask(call.mask_leaves, call.frames[1]),
    ),
    Argument("scale", lambda s: "fp32", value=lambda _, call: call.scale),
    *map(_stride, STRIDES[:4]),
    _steps("key_steps", "k"),
    *map(_stride, STRIDES[6:8]),
    _steps("value_steps", "v"),
    *map(_stride, STRIDES[10:]),
    *map(_number, ("batch", "num_kv_heads", "max_kv_len", "num_queries")),
    Argument("row_range", lambda s: ("i32", "i32") if s.signature.packed else ()),
    *map(_number, ("num_splits", "first_place", "max_weight")),
)
SECOND_ARGUMENTS = (_number("large_splits"),)  # what only the second pass takes, after some of those above
PLACES = {row.name: place for place, row in enumerate(ARGUMENTS)}
DESCRIPTORS = slice(PLACES["key_descriptor"], PLACES["out"])  # a launch takes several values for each
WORKSPACE = slice(PLACES["partial_out"], PLACES["kv_lens"])
SAME = slice(PLACES["stride_qb"], None)  # these stay the same in all calls of one layout
