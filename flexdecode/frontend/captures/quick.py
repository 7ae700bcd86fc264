"""Reads a simple function again, faster than the walk.

A function is simple if it captures only leaves and constants, as most mods do: tensors, numbers, strings, modules of
libraries. Once it was walked, a `Simple` finds out whether only contents of tensors and values of numbers may differ.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import repeat
from operator import attrgetter, itemgetter
from types import FunctionType, ModuleType
from typing import Any

import torch

from .code import ABSENT, CODES, Absent, Code, opaque

_CONSTANTS = {bool, str, bytes, type(None), type(...), Absent, torch.dtype, torch.device, torch.layout, ModuleType}
_TENSORS = {torch.Tensor, torch.nn.Parameter}
_contents = attrgetter("cell_contents")
# The class with which torch.compile checks its tensors: it compares type, dtype, device, sizes, strides and the need of
# a gradient of several tensors in one call of C, in a quarter of the time that reading these takes.
_Guards: Any = getattr(getattr(getattr(torch._C, "_dynamo", None), "guards", None), "TensorGuards", None)


def same_layouts(tensors: list[torch.Tensor], single_steps: bool = True) -> Callable[..., bool] | None:
    """Makes a function of as many tensors: whether they have the layouts of these. None if PyTorch has no such check.

    If `single_steps` is false, strides of dimensions of size 1 may differ: no address depends on them.

    The answer is also no if a tensor is given twice. For tensors of another class or in another mode of autograd it may
    be no, although the layouts are the same.
    """
    if _Guards is None or not all(type(x) in _TENSORS for x in tensors):
        return None
    sizes = [[*x.shape] for x in tensors]
    strides = [  # None stands for any
        [step if single_steps or size != 1 else None for size, step in zip(x.shape, x.stride(), strict=True)]
        for x in tensors
    ]
    return _Guards(*tensors, dynamic_dims_sizes=sizes, dynamic_dims_strides=strides).check


class Simple:
    """What a simple function captured when it was walked.

    Attributes:
        kinds: types of what it captures.
        constants: places and values of what is neither a tensor nor a number.
        floats: places of floats.
        tensors, leaves: give the tensors, of which there are `num_tensors`, and all leaves.
        same: whether tensors have the layouts of those that were captured.
    """

    def __init__(self, code: Code, children: list) -> None:
        """`children`: what a function with this code captures, see `_captured`; all are leaves or constants."""
        self.code = code
        self.kinds = [*map(type, children)]
        places = [*enumerate(self.kinds)]
        self.constants = [(i, children[i]) for i, kind in places if kind in _CONSTANTS]
        self.floats = [i for i, kind in places if kind is float]
        tensors = [i for i, kind in places if kind in _TENSORS]
        self.num_tensors, self.tensors = len(tensors), _getter(tensors)
        self.leaves = _getter([i for i, kind in places if kind not in _CONSTANTS])
        self.same: Any = same_layouts([*self.tensors(children)])

    @staticmethod
    def of(fn: Any) -> Simple | None:
        """Remembers what a function captures that was walked just now; None if it is not simple."""
        if type(fn) is not FunctionType:
            return None
        known = CODES.get(id(fn.__code__))
        children = None if known is None or known.imports or known.hides else _captured(fn, known.global_names)
        if children is None:
            return None
        assert known is not None
        kinds = {*map(type, children)}
        modules = [x for x in children if type(x) is ModuleType]
        if not kinds <= {*_CONSTANTS, *_TENSORS, int, float} or not all(opaque(x.__name__) for x in modules):
            return None
        simple = Simple(known, children)
        return None if simple.same is None or simple.read(fn) is None else simple

    def read(self, fn: FunctionType) -> list | None:
        """The leaves that a function with the same code captures now.

        None if the walk might give another key than for the function that was walked, or if the layout of a captured
        tensor differs.
        """
        children = _captured(fn, self.code.global_names)
        if children is None or [*map(type, children)] != self.kinds:
            return None
        for i in self.floats:
            if children[i] - children[i] != 0.0:  # inf and nan are no leaves
                return None
        for i, value in self.constants:
            if children[i] != value:
                return None
        if self.num_tensors:
            tensors = self.tensors(children)  # two names of one tensor are another mod, and not the same layouts
            if not self.same(*tensors):
                return None
        return [*self.leaves(children)] if self.constants else children


def _getter(places: list[int]) -> Callable[[list], tuple]:
    """Gives what is at some places, as a tuple."""
    if len(places) > 1:
        return itemgetter(*places)
    return (lambda items: (items[places[0]],)) if places else (lambda items: ())


def _captured(fn: FunctionType, global_names: tuple[str, ...]) -> list | None:
    """What a function captures in cells and globals; None if it may capture more, or if a cell is empty."""
    if fn.__defaults__ or fn.__kwdefaults__ or fn.__dict__:
        return None
    cells = fn.__closure__
    try:
        children = [*map(_contents, cells)] if cells else []
    except ValueError:
        return None
    if global_names:
        children += map(fn.__globals__.get, global_names, repeat(ABSENT))
    return children
