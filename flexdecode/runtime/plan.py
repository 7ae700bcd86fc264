"""A planned call: its outputs, the last checks, and the launcher that computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from math import gcd
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..analysis.analyze import MAX_KV_LEN, MAX_QUERIES
from ..call.block_mask import BlockLists
from ..call.candidates import with_full_cache
from ..call.checks import check_all_lens, checked_scale
from ..call.device import autocasts, without_autocast
from ..call.inputs import DecodeOptions, Inputs
from ..call.overlap import extent, share_memory
from ..call.signature import Aux
from ..codegen.arguments import Call
from ..errors import FlexDecodeError, IndexRangeError
from ..frontend.graph import Graph
from . import eager
from .identity import Mod, constants_of, names_of

if TYPE_CHECKING:
    from ..analysis.printing import Names

MAX_APART = 256  # entries of `Plan.apart`
# The tensors of one or two dimensions, which kernels read as contiguous.
LOOSE = (
    "kv_lens", "q_lens", "q_offset", "sinks", "kv_starts", "kv_offset", "page_table", "cu_seqlens_q", "cu_seqlens_k",
)  # fmt: skip


def layout(tensor: object) -> object:
    """Everything of a tensor that a plan depends on; its contents are not part of it."""
    if tensor.__class__ is torch.Tensor:
        try:
            start = tensor.data_ptr()
        except RuntimeError:  # it is not dense, or has no memory that could be read
            pass
        else:
            return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, start & 15, tensor.requires_grad
    if tensor is None or isinstance(tensor, bool):
        return tensor
    if not isinstance(tensor, torch.Tensor):
        return type(tensor)
    place = tensor.data_ptr() & 15 if tensor.layout == torch.strided else None
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.device, place, tensor.requires_grad


def without_memory(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor of the same layout on the meta device. It does not keep the memory of the given one."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")


def any_length(
    batch: int | None,
    query: Any,
    key: Any,
    value: Any,
    table: Any,
    k_scale: Any,
    v_scale: Any,
    out: Any,
    kv_lens: int | None,
) -> tuple | None:
    """What a `Prepared` depends on in some arguments: their layout, without query tokens, N and multiples of these.

    None if the arguments are wrong, or if there is no query or no key.

    Args:
        batch: the number of sequences of packed queries, on which a `Prepared` does not depend either, or None.
        query: the `layout` of the queries.
        key: the `layout` of the keys.
        value: the `layout` of the values.
        table: the `layout` of the page table.
        k_scale: the `layout` of the scales of keys.
        v_scale: the `layout` of the scales of values.
        out: the `layout` of the output.
        kv_lens: the length of all sequences, if it is a number.
    """
    if not (query.__class__ is key.__class__ is value.__class__ is tuple and len(key[0]) == len(value[0]) == 4):
        return None
    tokens = _queries_of_any_number(query, value[0][3], out)
    shape, steps, place = key[0], key[1], key[4]
    capacity = shape[2]
    if table is not None:
        capacity *= table[0][1] if table.__class__ is tuple and len(table[0]) == 2 else 0
    if not 0 < (capacity if kv_lens is None else kv_lens) <= capacity < MAX_KV_LEN or None in (place, value[4]):
        return None
    if tokens is None:
        return None
    if table is not None:
        lines = None if table[0][0] == batch else table[0][0]
        return *tokens, (lines, table[1][1] == 1, *table[2:]), key, value, k_scale, v_scale
    # Scales per token have the shape of the keys.
    scales = [(x[0] == shape[:3], x[2:]) if x.__class__ is tuple and len(x[0]) == 3 else x for x in (k_scale, v_scale)]
    same = shape[2] == value[0][2], steps == value[1]
    return *tokens, *_without_length(key), *_without_length(value), *same, *scales


def _queries_of_any_number(query: tuple, v_head_dim: int, out: Any) -> tuple | None:
    """The part of query and output in `any_length`: one token is not any number of them."""
    shape = query[0]
    if len(shape) not in (3, 4) or query[4] is None or 0 in shape:
        return None
    if shape[-2 if len(shape) == 4 else 0] > MAX_QUERIES or math.prod(shape[:-1]) >= 1 << 31:
        return None
    if out is not None:
        if out.__class__ is not tuple or out[0] != (*shape[:-1], v_head_dim) or not _is_dense(*out[:2]):
            return None  # another `out` is checked
        *steps, last = out[1]
        out = *[gcd(step, 16) for step in steps], last == 1 or gcd(last, 16), *out[2:]
    if len(shape) == 3:
        (_, heads, width), (t, h, d) = query[:2]
        return heads, width, gcd(t, 16), gcd(h, 16), d == 1 or gcd(d, 16), *query[2:], out
    return *_without_length(query), shape[2] == 1, out


def _is_dense(shape: tuple, strides: tuple) -> bool:
    """Whether a tensor with elements fills its memory, in any order of dimensions."""
    step = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
        if size > 1 and stride != step:
            return False
        step *= size
    return True


def _without_length(layout: tuple) -> tuple:
    (batch, heads, _, width), (b, h, n, d), *rest = layout
    return batch, heads, width, gcd(b, 16), gcd(h, 16), gcd(n, 16), d == 1 or gcd(d, 16), *rest


Launcher = Callable[[Call], None]  # writes `out` of a call, and those of `lse` and `max_scores` that are not None


class EagerLauncher:
    """Runs the traced graphs in PyTorch operations."""

    def __init__(self, graphs: tuple[Graph | None, Graph | None], names: tuple[Names | None, ...] | None) -> None:
        """`names` of what the graphs capture are given if indices shall be checked."""
        self.graphs = graphs
        self.names = names

    def __call__(self, call: Call) -> None:
        """Computes the call. It ignores the lists of a BlockMask, because the mask contains them."""
        try:
            with without_autocast() if autocasts() else nullcontext():  # the first one takes longer
                eager.decode(call, self.graphs, self.names is not None)
        except IndexRangeError as error:
            raise FlexDecodeError(self._named(error)) from None

    def _named(self, error: IndexRangeError) -> str:
        """The message for an index out of range, with the user's own names."""
        from ..analysis.printing import formula

        kind = "score_mod" if error.graph is self.graphs[0] else "mask_mod"
        names = self.names[kind == "mask_mod"] if self.names else None
        assert names is not None
        text = f"{kind} reads `{formula(error.load, names)}` out of range: {error.found}"
        return f"{text}\n  Clamp the index, or let the mask rule the pair out."


def name_graphs(graphs: tuple[Graph | None, Graph | None], mods: tuple[Mod, Mod]) -> tuple[Names | None, ...]:
    """The user's names of what the graphs capture. They are strings, so nothing is kept alive."""
    from ..analysis.printing import name_captures

    return tuple(
        None if graph is None or mod.function is None else name_captures(graph, names_of(mod), constants_of(kind, mod))
        for kind, graph, mod in zip(("score_mod", "mask_mod"), graphs, mods, strict=True)
    )


record: Any = tuple.__new__  # makes a named tuple of a tuple, in a third of the time of a call of its class


class Results(NamedTuple):
    """What a call gives: its output, and the numbers of rows that it was asked for, see `Aux`."""

    out: torch.Tensor
    lse: torch.Tensor | None
    max_scores: torch.Tensor | None


class Plan:
    """Allocates the outputs of a call and runs it."""

    def __init__(
        self, launcher: Launcher, checker: Launcher | None, inputs: Inputs, aux: Aux, options: DecodeOptions
    ) -> None:
        self.launcher = launcher
        self.checker = checker
        self.out_shape = inputs.out_shape
        self.like: torch.Tensor | None = None  # a tensor without memory that has the layout of the output
        self.default_scale = 1.0 / math.sqrt(inputs.head_dim)
        self.aux = aux
        self.checks_lens = options.debug or inputs.query.device.type == "cpu"
        self.options = options
        self.empty = inputs.is_empty
        self.loose = [  # tensors that have to be made contiguous for the kernels
            name
            for name in LOOSE
            if isinstance(tensor := getattr(inputs, name), torch.Tensor) and tensor.stride(-1) != 1
        ]
        self.numbers = [name for name in ("k_scale", "v_scale") if _is_number(getattr(inputs, name))]

        self.is_settled = True  # whether later calls shall use it: one that was not measured may be replaced
        self.extents: list[tuple[int, int]] = []  # place among the inputs, and bytes, of each tensor that is read
        self.apart: set[tuple[int, int]] = set()  # places and distances from `out` at which they share no memory

    def launched_by(self, launcher: Launcher, inputs: Inputs, is_settled: bool = True) -> Plan:
        """The same plan for another length, or another number of query tokens."""
        other = Plan.__new__(Plan)
        other.__dict__.update(self.__dict__)
        other.launcher, other.out_shape, other.extents, other.apart = launcher, inputs.out_shape, [], set()
        other.like, other.is_settled = None, is_settled
        return other

    def rehearsal(self, inputs: Inputs, score: Mod, mask: Mod, lists: BlockLists | None) -> Call:
        """A call of this layout whose sequences fill the cache, with results in memory of its own."""
        out = inputs.query.new_empty_strided(inputs.out_shape, inputs.out_strides)
        lse, max_scores = (
            out.new_empty(inputs.out_shape[:-1], dtype=torch.float32) if is_asked else None for is_asked in self.aux
        )
        scale = self.default_scale if inputs.scale is None else checked_scale(inputs.scale)
        filled = self.for_kernels(with_full_cache(inputs))
        return Call(filled, out, lse, max_scores, score.leaves, mask.leaves, scale, lists, (score.frame, mask.frame))

    def for_kernels(self, inputs: Inputs) -> Inputs:
        """The call with the scales that are numbers as checked floats, and with tensors that the kernels can read.

        Raises:
            ValueError: a scale is not finite.
        """
        if self.numbers:
            inputs = self.with_numbers(inputs)
        if self.loose:
            inputs = inputs._replace(**{name: getattr(inputs, name).contiguous() for name in self.loose})
        return inputs

    def with_numbers(self, inputs: Inputs) -> Inputs:
        """The call with its scales that are numbers as checked floats.

        Raises:
            ValueError: one is not finite.
        """
        scales: dict[str, Any] = {name: checked_scale(getattr(inputs, name), name) for name in self.numbers}
        return inputs._replace(**scales)

    def check_out(self, inputs: Inputs, out: torch.Tensor) -> None:
        """Refuses an `out` that would overwrite an input.

        Raises:
            ValueError: it shares memory with an input.
        """
        if not self.extents:
            read = [(place, x) for place, x in enumerate(inputs[:-1]) if isinstance(x, torch.Tensor)]
            self.extents = [(place, extent(x)) for place, x in read] + [(len(inputs) - 1, extent(out))]
        start = out.data_ptr()
        end = start + self.extents[-1][1]
        for place, size in self.extents[:-1]:
            tensor: Any = inputs[place]
            at = tensor.data_ptr()
            if at < end and start < at + size and (place, at - start) not in self.apart:
                if share_memory(out, tensor):
                    name = inputs._fields[place]
                    raise ValueError(f"`out` must not share memory with `{name}`: it is written while `{name}` is read")
                if len(self.apart) >= MAX_APART:
                    self.apart.clear()
                self.apart.add((place, at - start))

    def run(self, inputs: Inputs, score: Mod, mask: Mod, lists: BlockLists | None = None) -> Results:
        """Runs the call on tensors of the layout that the plan was made for."""
        score_leaves, mask_leaves = score.leaves, mask.leaves
        out, lse, max_scores = inputs.out, None, None
        if out is None:
            out = self.new_out(inputs.query)
        else:
            self.check_out(inputs, out)
            if score_leaves or mask_leaves:
                check_captured_out(out, score_leaves, mask_leaves)
        if self.aux.lse:
            lse = self.new_numbers(inputs.query)
        if self.aux.max_scores:
            max_scores = self.new_numbers(inputs.query)
        if self.checks_lens:
            check_all_lens(inputs, self.options)
        if self.empty:  # the tokens of a packed query may belong to no sequence
            out.zero_()
            for numbers in (lse, max_scores):
                if numbers is not None:
                    numbers.fill_(-math.inf)
        else:
            scale = self.default_scale if inputs.scale is None else checked_scale(inputs.scale)
            if self.numbers or self.loose:
                inputs = self.for_kernels(inputs)
            if self.checker is not None:
                self.checker(Call(inputs, torch.empty_like(out), None, None, score_leaves, mask_leaves, scale))
            frames = score.frame, mask.frame
            call = inputs, out, lse, max_scores, score_leaves, mask_leaves, scale, lists, frames
            self.launcher(record(Call, call))
        return record(Results, (out, lse, max_scores))

    def new_out(self, query: torch.Tensor) -> torch.Tensor:
        """A new contiguous output."""
        if query.__class__ is not torch.Tensor:
            return query.new_empty(self.out_shape)
        if self.like is None:
            self.like = query.new_empty(self.out_shape)
            self.like.untyped_storage().resize_(0)  # PyTorch copies a layout faster than it reads a tuple of sizes
        return torch.empty_like(self.like)

    def new_numbers(self, query: torch.Tensor) -> torch.Tensor:
        """New numbers of rows."""
        return query.new_empty(self.out_shape[:-1], dtype=torch.float32)


def _is_number(scale: object) -> bool:
    return scale is not None and not isinstance(scale, (torch.Tensor, bool))


def check_captured_out(out: torch.Tensor, score_leaves: list, mask_leaves: list) -> None:
    """Refuses an `out` that would overwrite a tensor that a mod captures.

    Raises:
        ValueError: it shares memory with one.
    """
    start, size = out.data_ptr(), extent(out)
    for kind, leaves in (("score_mod", score_leaves), ("mask_mod", mask_leaves)):
        for leaf in leaves:
            if not isinstance(leaf, torch.Tensor) or leaf.layout != torch.strided or leaf.device != out.device:
                continue
            if leaf.data_ptr() < start + size and start < leaf.data_ptr() + extent(leaf) and share_memory(out, leaf):
                raise ValueError(
                    f"`out` must not share memory with a tensor that {kind} captures: it is written while that is read"
                )
