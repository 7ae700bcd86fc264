"""Which graph a mod stands for: traced once, then recognised by what its callable consists of."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple

import torch

from . import cache
from .captures import pins, walk
from .graph import Graph, Source
from .proofs import witnesses
from .trace import trace

_known = cache.Bounded(limit=4096)  # (kind, walk key) -> its `_Sources`
_graphs = cache.Bounded(limit=4096)  # (kind, device, identity) -> graph, and the objects whose ids are in the identity


class Mod(NamedTuple):
    """A mod as it is now.

    Attributes:
        function: the callable.
        identity: what identifies its graph.
        leaves: what it captures.
        present: sizes and numbers on which proofs about its indices rest; another prepared call if they change.
    """

    function: Callable | None
    identity: tuple | None
    leaves: list
    present: tuple = ()


class _Sources(NamedTuple):
    """Host values that matter beside the code of a mod.

    Attributes:
        constants: captured numbers whose value is part of the identity.
        witnesses: of its proofs.
    """

    constants: tuple[Source, ...]
    witnesses: tuple[Source, ...]


def identify(kind: str, mod: Callable | None) -> Mod:
    """Reads what a mod captures now.

    Raises:
        TypeError: it is not callable.
    """
    if mod is None:
        return Mod(None, None, [])
    if not callable(mod):
        hint = "; pass it as `block_mask`" if hasattr(mod, "kv_num_blocks") else ""
        raise TypeError(f"`{kind}` must be a callable or None, got {type(mod).__name__}{hint}")
    key, leaves = walk(mod)
    known = _known.get((kind, key))
    if known is None:
        return Mod(mod, key, leaves)
    constants, witnesses = known
    if constants:
        key = (key, *[source.read(leaves) for source in constants])
    return Mod(mod, key, leaves, tuple([source.read(leaves) for source in witnesses]))


def graph_of(kind: str, mod: Mod, device: torch.device) -> tuple[Graph | None, Mod]:
    """The traced graph of a mod, and the mod with the identity that tracing found.

    Raises:
        TraceError, TypeError: the mod cannot be traced.
    """
    if mod.function is None:
        return None, mod
    found = _graphs.get((kind, device, mod.identity))
    if found is not None:  # traced by another thread, perhaps, or its sources were forgotten
        return found[0], _watch(kind, mod.function, (), witnesses(found[0]))
    with cache.lock:
        traced = trace(mod.function, kind, mod.leaves, device)
        cache.counters.traces += 1
        kept = pins(mod.function)
        mod = _watch(kind, mod.function, traced.constants, witnesses(traced.graph))
        _graphs.add((kind, device, mod.identity), (traced.graph, kept))
    return traced.graph, mod


def watch(kind: str, mod: Mod, sources: Iterable[Source]) -> Mod:
    """Lets proofs rest on more numbers of a traced mod; gives it with their present values."""
    return mod if mod.function is None else _watch(kind, mod.function, (), sources)


def _watch(kind: str, function: Callable, constants: Iterable[Source], witnesses: Iterable[Source]) -> Mod:
    key, _ = walk(function)
    known = _known.get((kind, key), _Sources((), ()))
    merged = (tuple(sorted({*old, *new})) for old, new in zip(known, (constants, witnesses), strict=True))
    _known.add((kind, key), _Sources(*merged))
    return identify(kind, function)


def constants_of(kind: str, mod: Mod) -> tuple[Source, ...]:
    """The captured numbers of a traced mod whose value is a constant of its graph."""
    return () if mod.function is None else _known.get((kind, walk(mod.function)[0]), _Sources((), ())).constants


def forget_graphs() -> None:
    """Drops every trace."""
    _known.clear()
    _graphs.clear()
