"""Runs a mod once on symbols and records what it computes.

The symbols stand for the score, the four indices and every captured number. A `TorchFunctionMode` catches operations on
captured tensors, so no value of a captured tensor is read while tracing.
"""

from __future__ import annotations

import dis
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.overrides import TorchFunctionMode

from ..errors import FlexDecodeError, TraceError, raised, user_line
from . import factories, joins, reductions, views  # noqa: F401 (they register their functions)
from . import torch_functions as tf
from .build import remake
from .captures import CannotRebuild, Reads, copy_for_trace, uncompiled
from .graph import INDEX_NAMES, Graph, Node, Source, const, rewrite
from .leaks import check_leaks
from .parameters import check_parameters
from .results import checked_result
from .symbol import Consumed, Symbol, TraceContext


@dataclass(frozen=True)
class Traced:
    """The result of `trace`: the graph, and the run-time numbers whose values it depends on."""

    graph: Graph
    constants: frozenset[Source]


class TraceMode(TorchFunctionMode):
    """Sends every PyTorch call inside a mod to the table of `torch_functions`."""

    def __init__(self, context: TraceContext) -> None:
        super().__init__()
        self.context = context

    def __torch_function__(self, func: Any, types: Iterable, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self.context.own_code:
            return func(*args, **(kwargs or {}))
        return tf.dispatch(self.context, func, args, kwargs or {})


def trace(mod: Callable, kind: str, leaves: list, device: torch.device, reads: Reads | None = None) -> Traced:
    """Traces a mod.

    Args:
        mod: the user's callable.
        kind: `score_mod` or `mask_mod`.
        leaves: captured tensors and numbers, in the order of `captures.walk(mod)`.
        device: the device that the mod sees as `score.device`.
        reads: notes reads of the mod that the walk does not follow. The leaves are those of the walk with
            `reads.followed`.

    Raises:
        TraceError: the mod cannot be traced; the message has the user's line and the remedy.
        UnsupportedOpError: it calls an operation that flexdecode does not have.
        TypeError: the mod takes the wrong number of parameters.
    """
    check_parameters(mod, kind)
    _check_assignments(mod, kind)
    tracer = _Tracer(mod, kind, leaves, device, Reads(kind) if reads is None else reads)
    real = tracer.run(frozenset(), ())
    check_leaks(real.context, lambda: tracer.run(frozenset(), ()).context)
    return tracer.run_on_symbols(real)


class _Run(NamedTuple):
    graph: Graph
    output: Node
    constants: frozenset[Source]
    context: TraceContext


class _Tracer(NamedTuple):
    """The arguments of `trace`."""

    mod: Callable
    kind: str
    leaves: list
    device: torch.device
    reads: Reads

    def run(self, constants: frozenset[Source], symbolic: Iterable[int]) -> _Run:
        """Runs the mod. If it asks for the value of a size or number, makes that a constant and runs it again."""
        while True:
            context = TraceContext(self.kind, [*self.leaves], self.device, constants, tf, self.reads)
            numbers = {i: context.number(Source(i)) for i in symbolic if Source(i) not in constants}
            try:
                output = run_mod(copy_for_trace(self.mod, numbers, self.reads), context)
                frozen = [tensor.to(self.device) for tensor in context.frozen]
                return _Run(Graph.build(output, context.tensor_types, frozen), output, constants, context)
            except Consumed as consumed:
                constants |= consumed.sources

    def run_on_symbols(self, real: _Run) -> Traced:
        """Runs the mod on symbols for numbers. Numbers that decide the mod's control flow become constants.

        It tries all numbers at once. If the mod then computes something else than with their values, it tries each
        half.

        Args:
            real: the run on their values. The sizes that it asked for are also constants here.
        """
        numbers = [i for i, leaf in enumerate(self.leaves) if not isinstance(leaf, torch.Tensor)]
        kept: list[int] = []
        run = real
        parts = [numbers]
        while parts:
            part = parts.pop()
            try:
                attempt = self.run(run.constants, [*kept, *part])
                taken = _same(attempt, real, self.leaves)
            except (CannotRebuild, FlexDecodeError, OverflowError):  # OverflowError: no 64-bit type holds the number
                taken = False
            if taken:
                kept += part
                run = attempt
            elif len(part) > 1:
                middle = len(part) // 2
                parts += [part[middle:], part[:middle]]
        return Traced(run.graph, run.constants | {Source(n) for n in numbers if n not in kept})


def run_mod(mod: Callable, context: TraceContext) -> Node:
    """Runs a mod on symbols; gives the node of its result.

    Raises:
        TraceError: the mod raised, or gave no score or mask.
        Consumed: it asked for the value of a captured number.
    """
    arguments = [Node("index", (), torch.int64, name) for name in INDEX_NAMES]
    if context.kind == "score_mod":
        arguments.insert(0, Node("score", (), torch.float32))
    raised.error = None
    try:
        with _as_it_was_written(), TraceMode(context):
            result = mod(*map(context.scalar, arguments))
        if raised.error is not None:  # an `except` of the mod caught it
            raise raised.error
    except (FlexDecodeError, Consumed):
        raise
    except Exception as error:  # any error of the user's code; the message names its line
        raise TraceError(
            f"{context.kind} raised {type(error).__name__}: {error}\n  {user_line(error.__traceback__)}\n"
            f"  {_remedy_for(error)}"
        ) from error
    return checked_result(result, mod, context)


def _remedy_for(error: Exception) -> str:
    """What to do about an error of the user's own code."""
    if isinstance(error, NameError):
        return "Define the name before the call, or correct it."
    if isinstance(error, AttributeError) and isinstance(error.obj, Symbol):
        return "Correct the name: the page Operations of the docs lists the methods of tensors."
    if isinstance(error, AttributeError):
        return "Correct the name of the attribute."
    return (
        "A mod is run on symbols that stand for 0-d tensors of any value: use PyTorch's functions and operators on "
        "tensors and numbers, and compute everything else outside the mod."
    )


def _as_it_was_written() -> AbstractContextManager:
    """Makes functions compiled by `torch.compile` run as plain Python, if `torch.compile` was ever used."""
    return torch.compiler.set_stance("force_eager") if "torch._dynamo" in sys.modules else nullcontext()


def _check_assignments(mod: Callable, kind: str) -> None:
    """Refuses a function that assigns to variables outside it, because they would hold symbols after the trace."""
    mod = uncompiled(mod) or mod
    code: Any = getattr(getattr(mod, "__func__", mod), "__code__", None)
    for step in dis.get_instructions(code) if code is not None else ():
        if step.opname == "STORE_GLOBAL" or (step.opname == "STORE_DEREF" and step.argval in code.co_freevars):
            raise TraceError(
                f"{kind} assigns to `{step.argval}`, a variable outside of it\n"
                f"  {code.co_filename}:{code.co_firstlineno}, in {code.co_name}\n"
                "  A mod is run on symbols when it is traced, not at every call: use a variable of its own, and "
                "compute what shall stay outside the mod."
            )


def _same(symbolic: _Run, real: _Run, leaves: list) -> bool:
    """Whether the graph of symbols, with the values of the numbers filled in, is the graph of the real values."""

    def substitute(node: Node, args: tuple[Node, ...]) -> Node:
        if node.op == "number" and node.attr.dim < 0 and not isinstance(leaves[node.attr.leaf], torch.Tensor):
            return const(leaves[node.attr.leaf], None if node.weak else node.dtype)
        return remake(node, args)

    try:
        return rewrite(symbolic.output, substitute) == rewrite(real.output, remake)
    except (ArithmeticError, ValueError, TypeError):  # Python refuses some arithmetic that PyTorch allows: 1 / 0
        return False
