"""Which graph a mod stands for: traced once, then recognised by what its callable consists of."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch

from . import cache
from .captures import pins, walk
from .graph import Graph, Source
from .trace import trace

_constants = cache.Bounded(limit=4096)  # (kind, walk key) -> the captured numbers whose value is part of the identity
_graphs = cache.Bounded(limit=4096)  # (kind, device, identity) -> graph, and the objects whose ids are in the identity


class Mod(NamedTuple):
    """A mod as it is now: what identifies its graph, and what it captures."""

    function: Callable | None
    identity: tuple | None
    leaves: list


def identify(kind: str, mod: Callable | None) -> Mod:
    """Reads what a mod captures now.

    Raises:
        TypeError: it is not callable.
    """
    if mod is None:
        return Mod(None, None, [])
    if not callable(mod):
        raise TypeError(f"`{kind}` must be a callable or None, got {type(mod).__name__}")
    key, leaves = walk(mod)
    constants = _constants.get((kind, key))
    if constants:
        key = (key, *(_value(source, leaves) for source in constants))
    return Mod(mod, key, leaves)


def _value(source: Source, leaves: list) -> int | float:
    leaf = leaves[source.leaf]
    return leaf.shape[source.dim] if source.dim >= 0 else leaf


def graph_of(kind: str, mod: Mod, device: torch.device) -> tuple[Graph | None, Mod]:
    """The traced graph of a mod, and the mod with the identity that tracing found.

    Raises:
        TraceError, TypeError: the mod cannot be traced.
    """
    if mod.function is None:
        return None, mod
    found = _graphs.get((kind, device, mod.identity))
    if found is not None:
        return found[0], mod
    with cache.lock:
        traced = trace(mod.function, kind, mod.leaves, device)
        cache.counters.traces += 1
        key, _ = walk(mod.function)
        known = _constants.get((kind, key), ())
        _constants.add((kind, key), tuple(sorted(traced.constants.union(known))))
        kept = pins(mod.function)
        mod = identify(kind, mod.function)
        _graphs.add((kind, device, mod.identity), (traced.graph, kept))
    return traced.graph, mod


def constants_of(kind: str, mod: Mod) -> tuple[Source, ...]:
    """The captured numbers of a traced mod whose value is a constant of its graph."""
    return () if mod.function is None else _constants.get((kind, walk(mod.function)[0]), ())


def forget_graphs() -> None:
    """Drops every trace."""
    _constants.clear()
    _graphs.clear()
