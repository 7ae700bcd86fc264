"""`flex_decode` in a region that torch.compile or torch.export traces: every call becomes one custom op.

Dynamo follows the functions of this module line by line. It runs a mod on 0-d tensors that stand for the score and the
positions. A `TorchFunctionMode`, which Dynamo follows too, writes down each operation on them. Their own results are
never used. What the mod did becomes canonical text while the region is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import TorchFunctionMode

from ..call.block_mask import LISTS, both_masks, mask_of_blocks
from ..call.inputs import DecodeOptions, Inputs
from ..kv.kv_cache import read_cache
from .canonical import canonical_text, place_of, refuse_grad, refuse_read
from .ops import options_text

_MAX_ROUNDS = 8  # in which more and more numbers become constants
_OPTIONAL = Inputs._fields[3:-2]
_canonical_text = torch.compiler.assume_constant_result(canonical_text)
_place_of = torch.compiler.assume_constant_result(place_of)
_refuse_read = torch.compiler.assume_constant_result(refuse_read)
_refuse_grad = torch.compiler.assume_constant_result(refuse_grad)
_options_text = torch.compiler.assume_constant_result(options_text)


# Methods that give a Python value of a tensor, and those that give what is known without its values.
_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__")
_METADATA = (
    "dim", "ndimension", "size", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex",
    "is_signed", "is_contiguous", "get_device", "storage_offset", "__len__",
)  # fmt: skip


class _Recorder(TorchFunctionMode):
    """Writes down what a mod does with the values that stand for its parameters."""

    def __init__(self, kind: str, like: torch.Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.like = like
        self.steps: list = []
        self.values: list = []
        self.tensors: list = []
        self.ints: list = []
        self.floats: list = []

    def find(self, x: Any) -> int:
        for i, value in enumerate(self.values):
            if value is x:
                return i
        return -1

    def knows(self, operands: Iterable) -> bool:
        """Whether a value that stands for a parameter, or comes from one, is among the operands."""
        for x in operands:
            if isinstance(x, (tuple, list)):
                if self.knows(x):
                    return True
            elif isinstance(x, slice):
                if self.knows((x.start, x.stop, x.step)):
                    return True
            elif isinstance(x, torch.Tensor) and self.find(x) >= 0:
                return True
        return False

    def operand(self, x: Any) -> tuple:
        """How an operand is written, see `Recording`."""
        if isinstance(x, torch.Tensor):
            at = self.find(x)
            if at >= 0:
                return ("v", at)
            for i, tensor in enumerate(self.tensors):
                if tensor is x:
                    return ("t", i)
            self.tensors.append(x)
            return ("t", len(self.tensors) - 1)
        if isinstance(x, (tuple, list)):
            return ("l", tuple([self.operand(y) for y in x]))
        if isinstance(x, slice):
            return ("s", (self.operand(x.start), self.operand(x.stop), self.operand(x.step)))
        if isinstance(x, bool):
            return ("c", x)
        if isinstance(x, int) and not has_static_value(x):
            self.ints.append(x)
            return ("i", len(self.ints) - 1)
        if isinstance(x, float) and not has_static_value(x):
            self.floats.append(torch.zeros((), dtype=torch.float64) + x)  # the form in which a float stays dynamic
            return ("f", len(self.floats) - 1)
        return ("c", x)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named = kwargs or {}
        if func.__name__ == "__get__" or not self.knows((*args, *named.values())):
            return func(*args, **named)
        step = (func, tuple([self.operand(x) for x in args]), tuple([(k, self.operand(v)) for k, v in named.items()]))
        if func.__name__ in _READS:
            _refuse_read(self.kind, func.__name__)
        made = self.shown(func, args, named)
        if isinstance(made, torch.Tensor):
            self.steps.append((*step, _place_of()))
            self.values.append(made)
        elif isinstance(made, (tuple, list)) and len(made) > 0 and isinstance(made[0], torch.Tensor):
            self.steps.append((*step, _place_of()))
            self.values.append(None)
            whole = len(self.values) - 1
            for i, part in enumerate(made):
                self.steps.append((None, (("v", whole), ("c", i)), (), ""))
                self.values.append(part)
        elif isinstance(made, (bool, int, float)) and func.__name__ not in _METADATA:
            _refuse_read(self.kind, func.__name__)
        return made

    def shown(self, func: Any, args: tuple, named: dict) -> Any:
        """What the mod sees as the result: its type and shape are right, its values mean nothing."""
        if func.__name__ in ("__getitem__", "getitem"):
            first = args[0][self.at_zero(args[1])]
            wide = torch.float32 if first.dtype.is_floating_point and first.dtype != torch.float64 else first.dtype
            return self.like.new_zeros(first.shape, dtype=wide)
        return func(*args, **named)

    def at_zero(self, index: Any) -> Any:
        """An index with 0 in place of each value of rank 0."""
        if isinstance(index, tuple):
            return tuple([self.at_zero(x) for x in index])
        if isinstance(index, torch.Tensor) and index.ndim == 0 and index.dtype != torch.bool and self.find(index) >= 0:
            return 0
        return index


def _record(kind: str, mod: Callable | None, query: torch.Tensor) -> tuple:
    """The four arguments of the op for a mod."""
    if mod is None:
        return "", [], [], []
    seen = _Recorder(kind, query)
    if kind == "score_mod":
        seen.values.append(query.new_zeros((), dtype=torch.float32))
    for _ in range(4):
        seen.values.append(query.new_zeros((), dtype=torch.int64))
    with seen:
        result = mod(*seen.values[:])
    returned = seen.operand(result)
    described = tuple([_described(x) for x in seen.tensors])
    constants: tuple = ()
    for _ in range(_MAX_ROUNDS):
        text, needed = _canonical_text(
            kind, getattr(mod, "__name__", "mod"), tuple(seen.steps), returned, len(seen.ints), len(seen.floats),
            described, query.device, constants,
        )  # fmt: skip
        if not needed:
            break
        constants = (*constants, *[(leaf, dim, _known_value(seen, leaf, dim)) for leaf, dim in needed])
    return text, seen.ints, seen.floats, seen.tensors


def _described(tensor: torch.Tensor) -> tuple:
    sizes = tuple([n if has_static_value(n) else None for n in tensor.shape])
    return tensor.dtype, sizes, tensor.device.type


def _known_value(seen: _Recorder, leaf: int, dim: int) -> int:
    """The value of an integer or a size. From now on the region is compiled for this value."""
    if dim < 0:
        return range(seen.ints[leaf]).stop
    return range(seen.tensors[leaf - len(seen.ints) - len(seen.floats)].shape[dim]).stop


def decode_in_region(
    given: tuple,
    score_mod: Callable | None,
    mask_mod: Callable | None,
    block_mask: Any,
    cache: Any,
    return_lse: bool,
    options: DecodeOptions | None,
) -> Any:
    """As `flexdecode.flex_decode`. `given` has the fields of `Inputs` as the caller gave them."""
    inputs = Inputs(*given)
    if cache is not None:
        inputs = read_cache(cache, inputs)
    lists: list = []
    sizes: list = []
    kinds = None
    if block_mask is not None:
        lists = [x for x in [getattr(block_mask, name) for name in LISTS] if x is not None]
        kinds = inputs.query.new_zeros((1, 1, 1, 1), dtype=torch.int8)  # the op puts the kinds of blocks in its place
        blocks, lengths = block_mask.BLOCK_SIZE, block_mask.seq_lengths
        whole = mask_of_blocks(kinds, blocks, lengths, block_mask.mask_mod, inputs.kv_offset is not None)
        sizes = [*blocks, *lengths]
        is_alone = mask_mod is None
        mask_mod = both_masks(whole, mask_mod)
    names: list = []
    numbered: list = []
    tensors: list = []
    ints: list = []
    for name in _OPTIONAL:
        x = getattr(inputs, name)
        if isinstance(x, torch.Tensor):
            names.append(name)
            tensors.append(x)
        elif isinstance(x, float) or (isinstance(x, int) and name in ("k_scale", "v_scale")):
            names.append(name)
            tensors.append(torch.zeros((), dtype=torch.float64) + x)
        elif x is not None:
            numbered.append(name)
            ints.append(x)
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    if torch.is_grad_enabled() and (query.requires_grad or key.requires_grad or value.requires_grad):
        _refuse_grad()
    chosen = ""
    if options is not None:
        chosen = _options_text(
            options.backend, options.num_splits, options.block_n, options.num_warps, options.num_stages,
            options.schedule, options.batch_invariant, options.debug,
        )  # fmt: skip
    mask = _record("mask_mod", mask_mod, query)
    if kinds is not None:
        sizes.append([x is kinds for x in mask[3]].index(True))
        sizes.append(int(is_alone))
    call = (
        query, key, value, *_record("score_mod", score_mod, query), *mask,
        " ".join(names) + "|" + " ".join(numbered), tensors, ints, lists, sizes, scale, chosen,
    )  # fmt: skip
    lse = None
    if return_lse:
        result, lse = torch.ops.flexdecode.decode_with_lse(*call)
    else:
        result = torch.ops.flexdecode.decode(*call)
    if inputs.out is not None:
        inputs.out.copy_(result)
        result = inputs.out
    return (result, lse) if return_lse else result
