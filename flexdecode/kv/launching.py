"""Launches the kernels of `templates/append.py`. The host does as little as it can, because every layer launches one.

A launch is prepared once for tensors of one layout and kept. After that, only addresses are read.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch

from ..call.device import device_facts
from ..call.inputs import QUANTISED
from ..codegen.arguments import TYPE_NAMES
from ..codegen.template import template_folder
from ..memos import Bounded
from ..switch import check_allowed
from ..triton_api import Launch, compile_ahead, standalone_kernel

Tensors = tuple[torch.Tensor | None, ...]

_TILE = 2048  # elements of a key or value that a program holds
_WITH_STRIDES = 6  # the first tensors: k, v, key, value, k_scale, v_scale
_prepared = Bounded.memo(limit=4096)


class Sizes(NamedTuple):
    """What a launch needs besides its tensors.

    Attributes:
        scales: the numbers that divide keys and values where there are no scales on the device.
        groups: the programs share out the rows of each of so many groups.
        num_rows: rows of a group.
        last: the last arguments of the kernel.
    """

    scales: tuple[float, float]
    groups: int
    num_rows: int
    last: tuple[int, ...]


class _Prepared(NamedTuple):
    """A launch but for the addresses. `numbers` follow the tensors."""

    launch: Callable[[tuple[int, int], int, tuple], None]
    grid: tuple[int, int]
    numbers: tuple


def is_dynamic(scale: torch.Tensor | None) -> TypeGuard[torch.Tensor]:
    """Whether every token and head has a scale of its own."""
    return scale is not None and scale.dim() == 3


def largest(dtype: torch.dtype) -> float:
    """The largest number of a quantised type; 0 of another type. The range of int8 is symmetric."""
    if dtype not in QUANTISED:
        return 0.0
    return 127.0 if dtype == torch.int8 else torch.finfo(dtype).max


def launch(kernel: str, tensors: Tensors, flags: tuple, sizes: Callable[[], Sizes]) -> None:
    """Launches a kernel on the current stream; returns at once.

    Args:
        kernel: `append` or `write`.
        tensors: its first arguments.
        flags: Python values that `sizes` depends on besides the dtypes, shapes, strides and devices of the tensors.
        sizes: checks the tensors and gives the other arguments. It is called for a launch that is not prepared yet.
    """
    try:
        layouts = [None if x is None else (x.dtype, x.shape, x.stride(), x.get_device()) for x in tensors]
        addresses = [None if x is None else x.data_ptr() for x in tensors]
    except (AttributeError, RuntimeError):  # what is no dense tensor has none of these
        sizes()
        raise
    aligned = not any(x is not None and x % 16 for x in addresses[:4])
    in_one_place = addresses[2] == addresses[3], addresses[4] == addresses[5]  # what `sizes` may refuse
    known = (kernel, aligned, in_one_place, flags, *layouts)
    found = _prepared.get(known)
    if found is None:
        found = _prepare(kernel, tensors, aligned, sizes())
        _prepared.add(known, found)
    if not found.grid[0]:
        return
    device = layouts[2][3]  # type: ignore[index]  # a cache has keys
    if device < 0:
        found.launch(found.grid, 0, (*tensors, *found.numbers))
    elif device == torch.cuda.current_device():
        stream = torch._C._cuda_getCurrentRawStream(device)
        found.launch(found.grid, stream, (*addresses, *found.numbers))
    else:
        with torch.cuda.device(device):
            stream = torch._C._cuda_getCurrentRawStream(device)
            found.launch(found.grid, stream, (*addresses, *found.numbers))


def _prepare(kernel: str, tensors: Tensors, aligned: bool, sizes: Sizes) -> _Prepared:
    _, _, key, value, k_scale, v_scale = tensors[:_WITH_STRIDES]
    assert key is not None
    strides = [_strides(x) for x in tensors[:4]]
    of_scales = [_scale_strides(scale) for scale in (k_scale, v_scale)]
    outer = [stride for four in strides for stride in four[:3]]
    align = next((n for n in (16, 8) if aligned and not any(stride % n for stride in outer)), 1)
    widths = [x.shape[-1] if x is not None else 1 for x in (key, value)]
    blocks = [1 << (width - 1).bit_length() for width in widths]
    block_r = max(1, _TILE // max(blocks))
    constants = {
        "HEAD_DIM": widths[0], "V_HEAD_DIM": widths[1], "BLOCK_R": block_r, "BLOCK_D": blocks[0],
        "BLOCK_DV": blocks[1], "DYNAMIC_K": is_dynamic(k_scale), "DYNAMIC_V": is_dynamic(v_scale),
        "LARGEST": largest(key.dtype), "ALIGN": align, "UNIT": all(four[3] == 1 for four in strides),
    }  # fmt: skip
    numbers = (*sizes.scales, *[stride for four in (*strides, *of_scales) for stride in four], *sizes.last)
    pointers = tuple([None if x is None else "*" + TYPE_NAMES[x.dtype] for x in tensors])
    grid = sizes.groups * -(-sizes.num_rows // block_r), 1
    if not key.is_cuda:
        return _Prepared(_interpreted(kernel, constants), grid, numbers)
    with torch.cuda.device(key.device):
        return _Prepared(_compiled(kernel, pointers, tuple(constants.items()), key.device), grid, numbers)


def _strides(x: torch.Tensor | None) -> list[int]:
    """Strides in elements; 0 for dimensions of size 1, so that the number of tokens decides no divisibility.

    Those of packed tokens `[T, Hkv, D]` are of the form `[1, Hkv, T, D]`.
    """
    if x is None:
        return [0, 0, 0, 1]
    *outer, last = [stride if size > 1 else 0 for stride, size in zip(x.stride(), x.shape, strict=True)]
    last = x.stride(-1)
    return [*outer, last] if len(outer) == 3 else [0, outer[1], outer[0], last]


def _scale_strides(scale: torch.Tensor | None) -> list[int]:
    """Strides over pages, heads and positions."""
    if is_dynamic(scale):
        return list(scale.stride())
    return [0, 0 if scale is None or scale.numel() == 1 else scale.stride(0), 0]


def _interpreted(name: str, constants: dict[str, Any]) -> Callable[[tuple[int, int], int, tuple], None]:
    """A function like `Launch` for Triton's interpreter, which takes the tensors themselves."""
    kernel = standalone_kernel(template_folder() / "append.py", name)

    def run(grid: tuple[int, int], stream: int, arguments: tuple) -> None:
        kernel[grid](*arguments, **constants)

    return run


@functools.lru_cache(maxsize=1024)
def _compiled(
    name: str, pointers: tuple[str | None, ...], constants: tuple[tuple[str, Any], ...], device: torch.device
) -> Launch:
    """A kernel for the current device; `pointers` has the Triton types of its first arguments."""
    remedy = "Call it once before flexdecode.forbid_compilation(): folders of kernels do not have this one."
    check_allowed(f"the kernel {name} of append.py", "", remedy)
    facts = device_facts(device)
    return Launch(compile_kernel(name, pointers, dict(constants), (facts.backend, facts.arch)), len(constants))


def compile_kernel(
    name: str, pointers: tuple[str | None, ...], constants: dict[str, Any], target: tuple[str, int | str]
) -> Any:
    """Compiles `append` or `write` for a backend and an architecture.

    Args:
        name: of the kernel.
        pointers: Triton types of the tensors, its first arguments; None where there is no tensor.
        constants: its compile-time arguments.
        target: backend and architecture; no GPU is needed.

    Returns:
        Triton's compiled kernel.
    """
    function = standalone_kernel(template_folder() / "append.py", name)
    types: dict[str, Any] = {}
    known, places = dict(constants), dict[tuple[int, ...], list]()
    for i, argument in enumerate(function.arg_names):
        pointer = pointers[i] if i < len(pointers) else None
        types[argument] = pointer or _type_of(argument)
        if i < len(pointers) and pointer is None:
            types[argument], known[argument] = "constexpr", None
        elif i < 4 and constants["ALIGN"] > 1:
            places[i,] = [["tt.divisibility", 16]]
    backend, arch = target
    options = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}
    return compile_ahead(function, types, known, places, (backend, arch, 64 if backend == "hip" else 32), options)


def _type_of(argument: str) -> str:
    """The Triton type of an argument that is no tensor. Strides are 64 bits wide, because offsets may pass 2^31."""
    if argument.isupper():
        return "constexpr"
    if argument in ("k_number", "v_number"):
        return "fp32"
    is_stride = argument.startswith(("stride_", "key_", "value_", "k_scale_", "v_scale_"))
    return "i64" if is_stride else "i32"
