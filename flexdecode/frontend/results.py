"""What a mod may return, and the errors for everything else."""

from __future__ import annotations

import functools
import inspect
import linecache
from collections.abc import Callable
from typing import Any

import torch

from ..errors import TraceError
from .build import cast
from .captures import leaf_names, uncompiled
from .graph import Node, topological
from .symbol import Symbol, TraceContext

_HINTS = {
    "NoneType": " (forgot `return`?)",
    "generator": " (use return, not yield)",
    "async_generator": " (use return, not yield)",
    "coroutine": " (use def, not async def)",
    "tuple": " (return one value)",
    "list": " (return one value)",
}


def checked_result(result: Any, mod: Callable, context: TraceContext) -> Node:
    """Converts what a mod returned into a float32 score or a bool mask.

    Raises:
        TraceError: it is neither; the message has the line of the mod's definition.
    """
    is_mask = context.kind == "mask_mod"
    wanted = "it must return a bool" if is_mask else "it must return a score"

    def refusal(problem: str) -> TraceError:
        name = getattr(mod, "__name__", type(mod).__name__)
        place = definition(mod)
        return TraceError(f"{context.kind} {name!r} returned {problem}" + (f"\n  {place}" if place else ""))

    if type(result).__module__ == "numpy" and getattr(result, "ndim", 1) == 0:
        result = result.item()
    if not isinstance(result, (bool, int, float, torch.Tensor, Symbol)):
        if inspect.iscoroutine(result):
            result.close()  # else Python warns that it was never awaited
        got = "None" if result is None else f"a {type(result).__name__}"
        hint = _HINTS.get(type(result).__name__, "")
        raise refusal(f"{got}; {wanted}{'' if is_mask else ' (a float)'}{hint}")
    symbol = context.symbol(result)
    if symbol.rank:
        names = ", ".join(f"`{name}`" for name in _not_indexed(symbol, mod))
        captured = f"the captured tensor {names}" if names else "the captured tensor"
        raise refusal(
            f"a tensor with {symbol.rank} dimension(s); it must return one value for one (query, key) pair: "
            f"index {captured} with b, h, q_idx or kv_idx"
        )
    if is_mask and symbol.dtype != torch.bool:
        raise refusal(f"{symbol.dtype}; {wanted}: compare it, e.g. `x != 0`")
    if not is_mask and symbol.dtype == torch.bool:
        raise refusal(f"a bool; {wanted}: use torch.where(condition, score, -inf)")
    return cast(symbol.node, torch.bool if is_mask else torch.float32)


def definition(mod: Any) -> str:
    """Where a mod is defined, as `file:line, in function: text`; empty if it has no Python code."""
    mod = uncompiled(mod) or mod
    while isinstance(mod, functools.partial):
        mod = mod.func
    if isinstance(mod, torch.nn.Module):
        mod = mod.forward
    elif not hasattr(mod, "__code__") and not hasattr(mod, "__func__"):
        mod = type(mod).__call__
    code = getattr(getattr(mod, "__func__", mod), "__code__", None)
    if code is None:
        return ""
    text = linecache.getline(code.co_filename, code.co_firstlineno).strip()
    where = f"{code.co_filename}:{code.co_firstlineno}, in {code.co_name}"
    return f"{where}: {text}" if text else where


def _not_indexed(symbol: Symbol, mod: Callable) -> list[str]:
    """The names of the captured tensors that the dimensions of a result come from."""
    axes = tuple(Node("axis", (), torch.int64, dim) for dim in range(symbol.rank))
    loads = (node for node in topological(symbol.at(axes)) if node.op == "load")
    leaves = {load.attr for load in loads if not set(axes).isdisjoint(topological(*load.args))}
    names = leaf_names(mod, symbol.context.reads.followed)
    return [names[leaf].partition(" (in ")[0] for leaf in sorted(leaves) if 0 <= leaf < len(names)]
