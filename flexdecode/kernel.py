"""Compiles a generated module: argument types, constants and options of the two kernels, for a target.

Kernels are compiled ahead of time from declared types, so no value ever specialises one, and no GPU is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch

from .block_mask import BLOCK_LISTS_TYPES
from .errors import CompileError, SharedMemoryError, TritonVersionError
from .graph import Graph
from .lower import CaptureLayout, number_dtypes
from .ops import FLOAT8, HALF
from .schedule import DeviceFacts, Tiles
from .signature import UNIT, ScaleType, Signature
from .triton_api import compile_ahead

TYPE_NAMES = {
    torch.bool: "i1", torch.uint8: "u8", torch.int8: "i8", torch.int16: "i16", torch.int32: "i32", torch.int64: "i64",
    torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64",
    torch.float8_e4m3fn: "fp8e4nv", torch.float8_e5m2: "fp8e5",
}  # fmt: skip
COMBINE_TILE = 4096  # partial values that one warp of the combine pass holds

CaptureTypes = tuple[str, ...]


def capture_types(graph: Graph | None) -> CaptureTypes:
    """Triton types of the `captures` tuple of a graph, in the order of `CaptureLayout`."""
    if graph is None:
        return ()
    layout = CaptureLayout.of(graph)
    dtypes = number_dtypes(graph)
    numbers = [TYPE_NAMES[dtypes[i]] for i in range(layout.num_numbers)]
    tensors: list[str] = []
    for dtype, rank in graph.tensor_types:
        stored = torch.uint8 if dtype in FLOAT8 else dtype  # not every device has these types, every one has their bits
        tensors += ["*" + TYPE_NAMES[stored], *["i64"] * (2 * rank)]
    return (*numbers, *tensors)


def rounds_to_half(graph: Graph | None) -> bool:
    """Whether a mod computes in float16 or bfloat16."""
    return graph is not None and any(node.dtype in HALF for node in graph.nodes())


@dataclass(frozen=True)
class KernelSpec:
    """Everything besides its text that a kernel is compiled from.

    Attributes:
        signature: what the inputs look like.
        tiles: compile-time sizes.
        score_captures, mask_captures: Triton types of the captured values of each mod.
        num_live: intervals of kv_idx that can attend.
        num_full: intervals in which no mask is needed.
        fp_fusion: whether a product and a sum may become one operation. A mod that rounds to half precision forbids
            it: LLVM would drop the rounding between them.
        block_lists: whether the blocks to visit come from lists.
    """

    signature: Signature
    tiles: Tiles
    score_captures: CaptureTypes
    mask_captures: CaptureTypes
    num_live: int
    num_full: int
    fp_fusion: bool = True
    block_lists: bool = False


def combine_block_dv(tiles: Tiles) -> int:
    """Output columns per program of the combine pass."""
    return min(tiles.block_dv, max(32, COMBINE_TILE // tiles.block_s))


def _precision(dtype: torch.dtype, facts: DeviceFacts) -> str:
    """How the two products are computed: float32 by three TF32 products each, where the tensor cores have them."""
    return "tf32x3" if dtype == torch.float32 and facts.backend == "cuda" else "ieee"


def constants(spec: KernelSpec, facts: DeviceFacts, combine: bool) -> dict[str, Any]:
    """The compile-time arguments of a kernel, by name."""
    signature, tiles = spec.signature, spec.tiles
    known = {
        "GROUP_SIZE": signature.group_size,
        "NUM_QUERIES": signature.num_queries,
        "V_HEAD_DIM": signature.v_head_dim,
        "BLOCK_M": tiles.block_m,
        "BALANCED": tiles.balanced,
        "PDL": facts.has_pdl,
    }
    if combine:
        return known | {"BLOCK_DV": combine_block_dv(tiles), "BLOCK_S": tiles.block_s}
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
        "PACKED": TYPE_NAMES[signature.kv_dtype] if tiles.packed else None,
        "SPLIT": tiles.split,
        "NUM_LIVE": spec.num_live,
        "NUM_FULL": spec.num_full,
        "PRECISION": _precision(signature.dtype, facts),
    }


def argument_types(spec: KernelSpec, names: list[str]) -> dict[str, Any]:
    """The Triton type of each argument; `constexpr` for what is absent or known to be 1."""
    signature = spec.signature
    offset, tiles = signature.q_offset, spec.tiles
    element, cached = "*" + TYPE_NAMES[signature.dtype], "*" + _cache_type(spec)
    known: dict[str, Any] = {
        "query": element,
        "key": cached,
        "value": cached,
        "out": element,
        "key_descriptor": _descriptor_type(spec, tiles.key_columns),
        "value_descriptor": _descriptor_type(spec, tiles.value_columns),
        "lse": "*fp32" if signature.return_lse else "constexpr",
        "partial_out": "*fp32" if tiles.split else "constexpr",
        "partial_max": "*fp32" if tiles.split else "constexpr",
        "partial_sum": "*fp32" if tiles.split else "constexpr",
        "item_parts": "*i32" if tiles.balanced else "constexpr",
        "kv_lens": _pointer(signature.kv_lens),
        "q_lens": _pointer(signature.q_lens),
        "q_offset": "i64" if offset is int else _pointer(offset),
        "page_table": () if signature.page_table is None else (_pointer(signature.page_table), "i64", "i32"),
        "block_lists": BLOCK_LISTS_TYPES if spec.block_lists else (),
        "key_scales": _scale_types(signature.k_scale),
        "value_scales": _scale_types(signature.v_scale),
        "sinks": _pointer(signature.sinks),
        "score_captures": spec.score_captures,
        "mask_captures": spec.mask_captures,
        "scale": "fp32",
        **dict.fromkeys(("key_steps", "value_steps"), ("i32",) * 4 if tiles.descriptors else ("i64",) * 2),
        **dict.fromkeys(("batch", "num_kv_heads", "max_kv_len", "num_splits", "max_weight"), "i32"),
    }
    for name, stride_class in _strides(spec).items():
        known[name] = "constexpr" if stride_class == UNIT else "i64"
    return {name: "constexpr" if name.isupper() else known[name] for name in names}


def _pointer(dtype: Any) -> str:
    """Triton's type of a tensor's address; `constexpr` for None, which stands for no tensor."""
    return "constexpr" if dtype is None else "*" + TYPE_NAMES[dtype]


def _scale_types(kind: ScaleType | None) -> tuple[str, ...]:
    """Types of what `scale_arguments` gives."""
    if kind is None:
        return ()
    dtype, rank = kind
    return ("fp32",) if dtype is None else (_pointer(dtype), *["i64"] * max(rank, 2))


def scale_arguments(scale: float | torch.Tensor | None, pointers: bool) -> tuple:
    """`key_scales` or `value_scales` of a kernel: (), (number,), or address and strides over b, h and, if any, n."""
    if scale is None:
        return ()
    if not isinstance(scale, torch.Tensor):
        return (float(scale),)
    steps = [0 if size == 1 else step for size, step in zip(scale.shape, scale.stride(), strict=True)]
    return (scale.data_ptr() if pointers else scale, *[0] * (2 - scale.dim()), *steps)


def _descriptor_type(spec: KernelSpec, width: int) -> str:
    if not spec.tiles.descriptors:
        return "constexpr"
    layout = ",NVMMASharedLayout(128, 16)" if spec.tiles.latent else ""
    return f"tensordesc<{_cache_type(spec)}[{spec.tiles.block_n}, {width}]{layout}>"


def _cache_type(spec: KernelSpec) -> str:
    """Triton's type of what is loaded from a cache."""
    return "i16" if spec.tiles.packed else TYPE_NAMES[spec.signature.kv_dtype]


def _strides(spec: KernelSpec) -> dict[str, int]:
    """Class of each stride, in units of what is loaded."""
    names = [f"stride_{t}{d}" for t, dims in (("q", "bhmd"), ("k", "bhnd"), ("v", "bhnd"), ("o", "bhmd")) for d in dims]
    classes = dict(zip(names, spec.signature.strides, strict=True))
    if spec.tiles.packed:
        classes |= {name: c // 2 for name, c in classes.items() if name[-2] in "kv" and c != UNIT}
    return classes


def attributes(spec: KernelSpec, names: list[str]) -> dict[tuple[int, ...], list]:
    """Divisibility that Triton may rely on, by argument position."""
    divisors = _strides(spec)
    if spec.signature.aligned:
        divisors |= dict.fromkeys(("query", "key", "value", "out"), 16)
    divisors |= dict.fromkeys(("partial_out", "partial_max", "partial_sum"), 16)
    types = argument_types(spec, names)
    found: dict[tuple[int, ...], list] = {
        (i,): [["tt.divisibility", divisors[name]]]
        for i, name in enumerate(names)
        if divisors.get(name, 1) > 1 and types[name] != "constexpr"
    }
    if not spec.tiles.descriptors:
        for steps, tensor in (("key_steps", "k"), ("value_steps", "v")):
            for element, dim in enumerate("bh"):
                divisor = divisors[f"stride_{tensor}{dim}"]
                if steps in names and divisor > 1:
                    found[names.index(steps), element] = [["tt.divisibility", divisor]]
    return found


def compile_pass(module: ModuleType, spec: KernelSpec, facts: DeviceFacts, combine: bool) -> Any:
    """Compiles one kernel of a generated module for a device.

    Returns:
        Triton's compiled kernel.

    Raises:
        CompileError: Triton could not compile it; the message names the source file.
        SharedMemoryError: it needs more shared memory than the device has.
    """
    function = module.decode_combine if combine else module.decode_split
    names = function.arg_names
    types = argument_types(spec, names)
    known = constants(spec, facts, combine)
    known |= {n: 1 if n.startswith("stride") else None for n in names if types[n] == "constexpr" and n not in known}
    target = facts.backend, facts.arch, 64 if facts.backend == "hip" else 32
    options: dict[str, Any] = {
        "num_warps": 1 if combine else spec.tiles.num_warps,
        "num_stages": spec.tiles.num_stages,
        "enable_fp_fusion": spec.fp_fusion,
    }
    if facts.backend == "cuda":
        options["launch_pdl"] = facts.has_pdl
    try:
        gluon = spec.tiles.latent and not combine
        compiled = compile_ahead(function, types, known, attributes(spec, names), target, options, gluon)
    except TritonVersionError:
        raise
    except Exception as error:  # Triton raises many kinds; all mean that this text did not compile
        reason: BaseException = error  # Triton reports the call that failed; why is the end of its chain
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
    return compiled
