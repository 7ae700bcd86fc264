"""`flex_decode` in a region that torch.compile or torch.export traces: every call becomes one custom op.

Dynamo follows the functions of this module line by line. It runs a mod on 0-d tensors without values that stand for the
score and the positions. A `TorchFunctionMode`, which Dynamo follows too, writes down each operation. What the mod did
becomes canonical text while the region is compiled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.fx.experimental.symbolic_shapes import has_static_value
from torch.overrides import TorchFunctionMode

from ..call.block_mask import LISTS, both_masks, mask_of_blocks
from ..call.inputs import DecodeOptions, Inputs
from ..call.signature import Aux
from ..frontend.ops import widened
from ..kv.reading import read_cache
from .canonical import canonical_text, place_of, refuse, refuse_argument, what_it_does
from .ops import OPTION_NAMES, options_text

_OPTIONAL = Inputs._fields[3:-1]
_canonical_text = torch.compiler.assume_constant_result(canonical_text)
_place_of = torch.compiler.assume_constant_result(place_of)
_refuse = torch.compiler.assume_constant_result(refuse)
_refuse_argument = torch.compiler.assume_constant_result(refuse_argument)
_what_it_does = torch.compiler.assume_constant_result(what_it_does)
_options_text = torch.compiler.assume_constant_result(options_text)


def _dynamic(x: float) -> torch.Tensor:
    """The form in which a float stays dynamic. It is on the CPU, whatever the default device: the op reads it there."""
    return torch.zeros((), dtype=torch.float64, device="cpu") + x


class _Recorder(TorchFunctionMode):
    """Writes down what a mod does with the values of its parameters and with captured tensors.

    All of these, and all results, are shown to the mod on the meta device: types and shapes are right, and there are no
    values. So a result that was made unseen is known by its device, and refused.

    Attributes:
        steps, ints, floats: as in `Recording`; the numbers that are not constants of the region.
        values: what the mod sees for its parameters and for the result of each step.
        tensors: captured tensors.
        twins: what stands for these in the computation of shapes.
    """

    def __init__(self, kind: str, like: torch.Tensor) -> None:
        super().__init__()
        self.kind = kind
        self.like = like
        self.steps: list = []
        self.values: list = []
        self.tensors: list = []
        self.twins: list = []
        self.ints: list = []
        self.floats: list = []

    def operand(self, x: Any) -> tuple:
        """How an operand is written, see `Recording`."""
        if isinstance(x, torch.Tensor):
            at = _number_of(x, self.values)
            if at >= 0:
                return ("v", at)
            at = _number_of(x, self.tensors)
            if at < 0:
                if x.device.type == "meta":
                    _refuse(self.kind, "unseen", "")
                self.tensors.append(x)
                self.twins.append(torch.empty(x.shape, dtype=widened(x.dtype), device="meta"))
                at = len(self.tensors) - 1
            return ("t", at)
        if isinstance(x, (tuple, list)):
            return ("l", tuple([self.operand(y) for y in x]))
        if isinstance(x, slice):
            return ("s", (self.operand(x.start), self.operand(x.stop), self.operand(x.step)))
        if isinstance(x, bool):
            return ("c", True if x else False)  # noqa: SIM210 (this makes a constant of it)
        if isinstance(x, int) and not has_static_value(x):
            self.ints.append(x)
            return ("i", len(self.ints) - 1)
        if isinstance(x, float) and not has_static_value(x):
            self.floats.append(_dynamic(x))  # the form in which a float stays dynamic
            return ("f", len(self.floats) - 1)
        return ("c", _constant(x))

    def twin(self, x: Any) -> Any:
        """What stands for an operand in the computation of a shape."""
        if isinstance(x, torch.Tensor):
            at = _number_of(x, self.tensors)
            return x if at < 0 else self.twins[at]
        if isinstance(x, tuple):
            return tuple([self.twin(y) for y in x])
        if isinstance(x, list):
            return [self.twin(y) for y in x]
        if isinstance(x, bool):
            return True if x else False  # noqa: SIM210 (torch 2.9 takes no comparison of numbers that change)
        return x

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        named = kwargs or {}
        does = _what_it_does(func)
        if does == "attribute":  # only torch.export shows attributes
            return self.attribute(func, args[0])
        if does == "random":
            _refuse(self.kind, does, func.__name__)
        if not _has_tensor((*args, *named.values())):
            return func(*args, **named)
        if does in ("read", "write"):
            _refuse(self.kind, does, func.__name__)
        operands = tuple([self.operand(x) for x in args])
        step = (func, operands, tuple([(key, self.operand(x)) for key, x in named.items()]), _place_of())
        seen = self.twin(args)
        if does == "index":
            made = _without_empty(seen[0])[self.at_zero(seen[1])]
        else:
            made = func(*seen, **{key: self.twin(x) for key, x in named.items()})
        if isinstance(made, torch.Tensor):
            if _number_of(made, self.values) >= 0:  # an operation that gives its operand, such as x.float()
                made = made.view(made.shape)
            self.steps.append(step)
            self.values.append(made)
        elif isinstance(made, (tuple, list)) and len(made) > 0 and isinstance(made[0], torch.Tensor):
            self.steps.append(step)
            self.values.append(None)
            whole = len(self.values) - 1
            for i, part in enumerate(made):
                self.steps.append((None, (("v", whole), ("c", i)), (), ""))
                self.values.append(part)
        elif isinstance(made, (bool, int, float)) and does != "metadata":
            _refuse(self.kind, "read", func.__name__)
        return made

    def attribute(self, func: Any, x: torch.Tensor) -> Any:
        """An attribute of a tensor."""
        name = func.__self__.__name__
        if _number_of(x, self.values) < 0:
            return func(x)
        if name in ("device", "is_cuda", "is_cpu", "is_meta"):
            return getattr(self.like, name)
        made = func(x)
        if isinstance(made, torch.Tensor):
            _refuse(self.kind, "unseen", "")
        return made

    def at_zero(self, index: Any) -> Any:
        """An index with 0 in place of each number: the shape is the same, and nothing depends on its value."""
        if isinstance(index, tuple):
            return tuple([self.at_zero(x) for x in index])
        if isinstance(index, torch.Tensor):
            return 0 if index.ndim == 0 and index.dtype != torch.bool else index
        return 0 if isinstance(index, int) and not isinstance(index, bool) else index


def _number_of(x: Any, known: list) -> int:
    """The number of an object in a list; -1 if it is not there."""
    for i, value in enumerate(known):
        if value is x:
            return i
    return -1


def _without_empty(x: torch.Tensor) -> torch.Tensor:
    """The same with one element where a dimension has none, so that an index has a shape."""
    return torch.empty([max(n, 1) for n in x.shape], dtype=x.dtype, device="meta") if 0 in x.shape else x


def _has_tensor(operands: Iterable) -> bool:
    for x in operands:
        if isinstance(x, (tuple, list)):
            if _has_tensor(x):
                return True
        elif isinstance(x, slice):
            if _has_tensor((x.start, x.stop, x.step)):
                return True
        elif isinstance(x, torch.Tensor):
            return True
    return False


def _record(kind: str, mod: Callable | None, query: torch.Tensor) -> tuple:
    """The four arguments of the op for a mod."""
    if mod is None:
        return "", [], [], []
    seen = _Recorder(kind, query)
    if kind == "score_mod":
        seen.values.append(torch.empty((), dtype=torch.float32, device="meta"))
    for _ in range(4):
        seen.values.append(torch.empty((), dtype=torch.int64, device="meta"))
    with seen:
        result = mod(*seen.values[:])
    returned = seen.operand(result)
    if torch.is_grad_enabled():
        for tensor in seen.tensors:
            if tensor.requires_grad:
                _refuse(kind, "captured", "")
    described = tuple([_described(x) for x in seen.tensors])
    constants: tuple = ()
    while True:  # each round finds numbers that have to be constants
        text, needed = _canonical_text(
            kind, getattr(mod, "__name__", "mod"), tuple(seen.steps), returned, len(seen.ints), len(seen.floats),
            described, query.device, constants,
        )  # fmt: skip
        if not needed:
            return text, seen.ints, seen.floats, seen.tensors
        constants = (*constants, *[(leaf, dim, _known_value(seen, leaf, dim)) for leaf, dim in needed])


def _described(tensor: torch.Tensor) -> tuple:
    sizes = tuple([n if has_static_value(n) else None for n in tensor.shape])
    return tensor.dtype, sizes, tensor.device.type


def _known_value(seen: _Recorder, leaf: int, dim: int) -> int:
    """The value of an integer or a size."""
    if dim < 0 and leaf >= len(seen.ints):  # PyTorch has no value of a float while it compiles
        _refuse(seen.kind, "read", "__float__")
    if dim < 0:
        return _constant(seen.ints[leaf])
    return _constant(seen.tensors[leaf - len(seen.ints) - len(seen.floats)].shape[dim])


def _constant(x: Any) -> Any:
    """The value of an integer, for which the region is then compiled; anything else as it is.

    An integer whose value is static already may still be one of PyTorch's symbols.
    """
    return range(x).stop if isinstance(x, int) and not isinstance(x, bool) else x


def _optional(inputs: Inputs) -> tuple[str, list, list]:
    """The arguments that a call may lack: names of tensors and of integers, and these.

    Scales are tensors, because an argument of the op that is a Python float would be a constant of the region.
    """
    names: list = []
    numbered: list = []
    tensors: list = []
    ints: list = []
    for name in _OPTIONAL:
        x = getattr(inputs, name)
        if isinstance(x, torch.Tensor):
            names.append(name)
            tensors.append(x)
        elif x is not None and name in ("k_scale", "v_scale", "scale"):
            if name != "scale" or not has_static_value(x):
                names.append(name)
                tensors.append(_dynamic(x))
        elif x is not None:
            numbered.append(name)
            ints.append(x)
    return " ".join(names) + "|" + " ".join(numbered), tensors, ints


def _check_types(inputs: Inputs, score_mod: Any, mask_mod: Any, block_mask: Any, options: Any) -> None:
    """Refuses arguments of a wrong type, which PyTorch would refuse in words of its own. The op checks the rest."""
    for name, x in (("query", inputs.query), ("key", inputs.key), ("value", inputs.value)):
        if not isinstance(x, torch.Tensor):
            _refuse_argument(f"`{name}` must be a torch.Tensor, got {type(x).__name__}")
    for name, x in (("score_mod", score_mod), ("mask_mod", mask_mod)):
        if x is not None and not callable(x):
            _refuse_argument(f"`{name}` must be a callable or None, got {type(x).__name__}")
    if inputs.scale is not None and not isinstance(inputs.scale, (int, float)):
        _refuse_argument(f"`scale` must be a number or None, got {type(inputs.scale).__name__}")
    for name in _OPTIONAL:
        x = getattr(inputs, name)
        if x is not None and not isinstance(x, (torch.Tensor, int, float)):
            _refuse_argument(f"`{name}` must be a number or a tensor, got {type(x).__name__}")
    if block_mask is not None and not hasattr(block_mask, "kv_num_blocks"):
        _refuse_argument(f"`block_mask` must be a BlockMask, got {type(block_mask).__name__}")
    if options is not None and not isinstance(options, DecodeOptions):
        _refuse_argument(f"`options` must be a flexdecode.DecodeOptions, got {type(options).__name__}")


def _call(
    inputs: Inputs,
    score_mod: Callable | None,
    mask_mod: Callable | None,
    block_mask: Any,
    options: DecodeOptions | None,
) -> tuple:
    """The arguments of the ops for a call."""
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
    query, key, value, scale = inputs.query, inputs.key, inputs.value, inputs.scale
    names, tensors, ints = _optional(inputs)
    if scale is not None and not has_static_value(scale):
        scale = None  # it is among the tensors
    chosen = ""
    if options is not None:
        chosen = _options_text(*[_constant(getattr(options, name)) for name in OPTION_NAMES])
    mask = _record("mask_mod", mask_mod, query)
    if kinds is not None:
        sizes.append(_number_of(kinds, mask[3]))
        sizes.append(int(is_alone))
    return (
        query, key, value, *_record("score_mod", score_mod, query), *mask,
        names, tensors, ints, lists, sizes, scale, chosen,
    )  # fmt: skip


def _refuse_gradients(inputs: Inputs, function: str, why: str) -> None:
    if torch.is_grad_enabled() and (
        inputs.query.requires_grad or inputs.key.requires_grad or inputs.value.requires_grad
    ):
        _refuse(function, why, "")


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
    _check_types(inputs, score_mod, mask_mod, block_mask, options)
    _refuse_gradients(inputs, "flex_decode", "grad")
    call = _call(inputs, score_mod, mask_mod, block_mask, options)
    lse = None
    if return_lse:
        result, lse = torch.ops.flexdecode.decode_with_lse(*call)
    else:
        result = torch.ops.flexdecode.decode(*call)
    if inputs.out is not None:
        inputs.out.copy_(result)
        result = inputs.out
    return (result, lse) if return_lse else result


def attend_in_region(
    inputs: Inputs,
    score_mod: Callable | None,
    mask_mod: Callable | None,
    block_mask: Any,
    aux: Aux,
    options: DecodeOptions | None,
) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """As `run_in_order` for a request of these arguments."""
    _check_types(inputs, score_mod, mask_mod, block_mask, options)
    _refuse_gradients(inputs, "flex_attention", "training")
    call = _call(inputs, score_mod, mask_mod, block_mask, options)
    out, lse, max_scores = torch.ops.flexdecode.flex_attention(*call, aux.lse, aux.max_scores)
    return out, lse if aux.lse else None, max_scores if aux.max_scores else None
