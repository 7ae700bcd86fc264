"""Compiles a generated module: argument types, constants and options of the two kernels, for a target.

Kernels are compiled ahead of time from declared types. So no value specialises a kernel, and no GPU is needed.
"""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

from ..call.device import RESERVED_SHARED, DeviceFacts
from ..call.signature import UNIT
from ..call.tiles import Loads, Tiles
from ..errors import CompileError, SharedMemoryError, TritonVersionError
from ..frontend.graph import Graph
from ..frontend.ops import FLOAT8, HALF
from ..triton_api import ask_for_shared_memory, compile_ahead
from .arguments import ARGUMENTS, SECOND_ARGUMENTS, TYPE_NAMES, CaptureTypes, KernelSpec
from .lower import CaptureLayout, number_dtypes

ROWS = {row.name: row for row in (*ARGUMENTS, *SECOND_ARGUMENTS)}
MOST_SUMS = 16  # weights of a thread that are summed late
REGISTERS = 65536  # of a multiprocessor
COMBINE_TILE = 4096  # partial values that one warp of the combine pass holds


def capture_types(graph: Graph | None) -> CaptureTypes:
    """Triton types of the `captures` tuple of a graph, in the order of `CaptureLayout`."""
    if graph is None:
        return ()
    layout = CaptureLayout.of(graph)
    dtypes = number_dtypes(graph)
    numbers = [TYPE_NAMES[dtypes[i]] for i in range(layout.num_numbers)]
    tensors: list[str] = []
    for dtype, rank in graph.tensor_types:
        stored = torch.uint8 if dtype in FLOAT8 else dtype  # some devices have no float8 types: they read bits
        tensors += ["*" + TYPE_NAMES[stored], *["i64"] * (2 * rank)]
    return (*numbers, *tensors)


def rounds_to_half(graph: Graph | None) -> bool:
    """Whether a mod computes in float16 or bfloat16."""
    return graph is not None and any(node.dtype in HALF for node in graph.nodes())


def combine_block_dv(spec: KernelSpec) -> int:
    """Output columns per program of the combine pass."""
    return min(spec.tiles.block_dv, max(32, COMBINE_TILE // spec.block_s))


def _precision(tiles: Tiles, dtypes: tuple[torch.dtype, torch.dtype], facts: DeviceFacts) -> str:
    """How the two products are computed: for float32 as three TF32 products each, if the tensor cores have TF32.

    The interpreter takes the same way, though its products are exact. Where other numbers or many columns fill the
    registers, Triton's own way needs fewer of them.
    """
    if torch.float32 not in dtypes or facts.backend == "hip":
        return "ieee"
    return "tf32_parts" if dtypes == (torch.float32, torch.float32) and tiles.loads is not Loads.WIDE else "tf32x3"


def _sums_late(tiles: Tiles, dtypes: tuple[torch.dtype, torch.dtype]) -> bool:
    """Whether a program sums weights over keys at the end only.

    That takes a register for every weight of a tile, so it is for kernels of which one or two programs run on a
    multiprocessor. These may use all registers, but float32 products leave few.
    """
    is_float32 = torch.float32 in dtypes
    most = MOST_SUMS // 2 if is_float32 else MOST_SUMS
    sums = tiles.block_m * tiles.block_n // (32 * tiles.num_warps)
    described = tiles.loads is Loads.DESCRIPTORS and not tiles.paired
    return described and sums <= most and (tiles.per_sm in (1, 2) or is_float32)


def constants(spec: KernelSpec, facts: DeviceFacts, combine: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name."""
    signature, tiles = spec.signature, spec.tiles
    with_keys, with_values = (torch.float16, torch.float16) if tiles.paired else signature.product_dtypes
    known = {
        "GROUP_SIZE": signature.group_size,
        "ONE_TOKEN": signature.one_token,
        "V_HEAD_DIM": signature.v_head_dim,
        "BLOCK_M": tiles.block_m,
        "BALANCED": tiles.balanced,
        "PDL": facts.has_pdl,
    }
    if combine:
        known |= {"BLOCK_DV": combine_block_dv(spec), "BLOCK_S": spec.block_s}
        return known | {"LARGE_M": spec.large_m, "OF_SMALL": spec.of_small}
    return known | {
        "HEAD_DIM": signature.head_dim,
        "BLOCK_N": tiles.block_n,
        "BLOCK_D": tiles.block_d,
        "BLOCK_R": tiles.block_r,
        "BLOCK_DV": tiles.block_dv,
        "BLOCK_B": tiles.block_b,
        "MANY": tiles.many,
        "PAGE_SIZE": signature.page_size,
        "SHARED": tiles.shared,
        "PAIRED": TYPE_NAMES[signature.key_dtype] if tiles.paired else None,
        "SPLIT": tiles.split,
        "UNIT_OUT": spec.strides["stride_od"] == UNIT,
        "NUM_LIVE": spec.num_live,
        "NUM_FULL": spec.num_full,
        "KEY_PRODUCT": TYPE_NAMES[with_keys],
        "VALUE_PRODUCT": TYPE_NAMES[with_values],
        "PRECISION": _precision(tiles, (with_keys, with_values), facts),
        "PREFETCH": facts.has_pdl and spec.prefetches,
        "SUMS_LATE": _sums_late(tiles, (with_keys, with_values)),
    }


def argument_types(spec: KernelSpec, names: list[str]) -> dict[str, Any]:
    """The Triton type of each parameter of a kernel; `constexpr` for an absent argument or a stride known to be 1."""
    types = {name: "constexpr" if name.isupper() else ROWS[name].type(spec) for name in names}
    return {name: "constexpr" if kind is None else kind for name, kind in types.items()}


def attributes(spec: KernelSpec, types: dict[str, Any]) -> dict[tuple[int, ...], list]:
    """The divisibility that Triton may assume, by the place of an argument or of an element of an argument."""
    found: dict[tuple[int, ...], list] = {}
    for i, (name, kind) in enumerate(types.items()):
        if kind != "constexpr":
            divisor = ROWS[name].divisor(spec)
            each = {(i, j): d for j, d in enumerate(divisor)} if isinstance(divisor, tuple) else {(i,): divisor}
            found |= {place: [["tt.divisibility", d]] for place, d in each.items() if d > 1}
    return found


def compile_pass(
    module: ModuleType,
    spec: KernelSpec,
    facts: DeviceFacts,
    combine: bool,
    when_read: Callable[[float], None] = lambda _: None,
) -> Any:
    """Compiles one kernel of a generated module for a device.

    Args:
        module: has it.
        spec: what it is compiled from.
        facts: about the device.
        combine: whether it is the second pass.
        when_read: as for `compile_ahead`.

    Returns:
        Triton's compiled kernel.

    Raises:
        CompileError: Triton could not compile it; the message names the source file.
        SharedMemoryError: it needs more shared memory than the device has.
    """
    function = module.decode_combine if combine else module.decode_split
    types = argument_types(spec, function.arg_names)
    known = constants(spec, facts, combine)
    absent = [name for name, kind in types.items() if kind == "constexpr" and name not in known]
    known |= {name: 1 if name.startswith("stride") else None for name in absent}
    target = facts.backend, facts.arch, 64 if facts.backend == "hip" else 32
    options: dict[str, Any] = {
        "num_warps": 1 if combine else spec.tiles.num_warps,
        "num_stages": spec.tiles.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
    }
    if facts.backend == "cuda":
        options["launch_pdl"] = facts.has_pdl
        if not combine and spec.tiles.per_sm > 2 and spec.signature.is_float32:
            # Triton 3.9 would take a few more. Kernels of 16-bit numbers need fewer, and with a limit ptxas takes it.
            options["maxnreg"] = REGISTERS // (32 * spec.tiles.num_warps * spec.tiles.per_sm) // 8 * 8
    try:
        gluon = spec.tiles.latent and not combine
        compiled = compile_ahead(function, types, known, attributes(spec, types), target, options, gluon, when_read)
    except TritonVersionError:
        raise
    except Exception as error:  # Triton raises many kinds; each means that this text did not compile
        reason: BaseException = error  # Triton reports the call that failed; the end of its chain has the reason
        while reason.__cause__ is not None:
            reason = reason.__cause__
        text = str(error) if reason is error else f"{error}\n{reason}"
        raise CompileError(f"{function.__name__} did not compile: {text}\n  source: {module.__file__}") from error
    if compiled.metadata.shared > facts.shared_memory:
        raise SharedMemoryError(
            f"{function.__name__} needs {compiled.metadata.shared} bytes of shared memory, more than the "
            f"{facts.shared_memory} of the device\n  source: {module.__file__}\n"
            "  Choose a smaller `options.block_n` or `options.num_stages`."
        )
    if not combine:
        ask_for_shared_memory(compiled, _asked_shared(compiled.metadata.shared, spec.tiles.per_sm, facts))
    return compiled


def _asked_shared(needed: int, per_sm: int, facts: DeviceFacts) -> int:
    """Bytes of shared memory that a launch asks for: what a program needs, or more to keep other programs away.

    A kernel is made for `per_sm` programs on a multiprocessor. If more fitted, programs of the next launch could begin
    where there is room: some multiprocessors would have many of them, and those would end last.
    """
    whole = facts.shared_memory + RESERVED_SHARED
    return max(needed, whole // (per_sm + 1) + 16 - RESERVED_SHARED) if per_sm else needed
