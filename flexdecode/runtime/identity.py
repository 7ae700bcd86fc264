"""Finds the graph of a mod. A mod is traced once. Later it is recognised by what its callable consists of."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from types import FunctionType
from typing import NamedTuple

import torch

from ..analysis.proofs import proof_sources
from ..errors import FlexDecodeError, TraceError
from ..frontend.captures import NOTHING, Followed, Reads, Simple, leaf_names, pins, read
from ..frontend.graph import Graph, Source
from ..frontend.parameters import not_callable
from ..frontend.parse import CanonicalMod
from ..frontend.trace import trace
from ..memos import Bounded, counters, lock

_known = Bounded.memo(limit=4096)  # (kind, what was read) -> its `Known`
# (kind, id of a code object) -> its `_Quick`; the layouts of what it captured if it was read once; False if not simple
_quick = Bounded.memo(limit=4096)
_followed = Bounded.memo(limit=4096)  # (kind, what was read, constants) -> what to read besides, and those objects
_graphs = Bounded.memo(limit=4096)  # (kind, device, identity) -> graph, and the objects whose ids are in the identity
_MAX_CHANGES, _MAX_ROUNDS = 4, 16  # traces of a mod that changes what it captures, or reads more each time


class Mod(NamedTuple):
    """A mod as it is now.

    Attributes:
        function: the callable.
        identity: what identifies its graph.
        leaves: what it captures.
        proof_values: sizes and numbers that proofs about its indices use. A change of them needs new proofs.
        place: the part of the identity that does not depend on the values of captured numbers.
        followed: what it reads of large containers and by computed names; the leaves include it.
        mark: the same as the identity, in a form that is quick to hash. A mod that was not traced, or that was
            forgotten, has a mark of its own at each call.
        frame: if it is not None, then the captured tensors of all mods with this frame have the same sizes and strides.
    """

    function: Callable | None
    identity: tuple | None
    leaves: list
    proof_values: tuple = ()
    place: tuple = ()
    followed: Followed = NOTHING
    mark: object = None
    frame: object = None


class Known:
    """What is known of a traced mod. It stands for what was read of it, in the keys of plans.

    Attributes:
        constants: captured numbers whose value is part of the identity.
        checked: sizes and numbers on which its proofs depend.
        kept: the objects whose ids are in what was read, so that no id is used again.
    """

    __slots__ = ("checked", "constants", "kept")

    def __init__(self, kept: object) -> None:
        self.constants: tuple[Source, ...] = ()
        self.checked: tuple[Source, ...] = ()
        self.kept = kept


NO_MOD = Mod(None, None, [])


def identify(kind: str, mod: Callable | None) -> Mod:
    """Reads what a mod captures now.

    Raises:
        TypeError: the mod is not callable.
    """
    if mod is None:
        return NO_MOD
    if not callable(mod):
        raise not_callable(kind, mod)
    if mod.__class__ is FunctionType:
        quick = _quick.get((kind, id(mod.__code__)))
        if quick.__class__ is _Quick and (simple := quick.read(mod)) is not None:
            return simple
    if mod.__class__ is CanonicalMod:
        place, leaves, hides = mod.place(), mod.leaves, False
    else:
        place, leaves, hides = read(mod)
    known = _known.get((kind, place))
    if not hides:
        if known is None:
            return Mod(mod, place, leaves, (), place, NOTHING, object())
        _notice(kind, mod, place, leaves, known)
    found = _with_values(known, mod, place, leaves, NOTHING)
    while hides and (more := _followed.get((kind, found.identity))) is not None:
        followed, _ = more  # earlier traces found that it reads this of large containers and by computed names
        place, leaves, _ = read(mod, followed)
        place = found.identity, place
        found = _with_values(_known.get((kind, place)), mod, place, leaves, followed)
    return found


class _Quick:
    """Reads mods with the same code again, as long as they are `Simple`."""

    def __init__(self, simple: Simple, place: tuple, known: Known, leaves: list) -> None:
        self.simple, self.place, self.known = simple, place, known
        # What proofs use, if that is sizes only, and the sources of which these are the values.
        self.proofs: tuple[tuple[Source, ...], tuple] = (), ()
        if all(source.dim >= 0 for source in known.checked):
            self.proofs = known.checked, tuple([source.read(leaves) for source in known.checked])

    def read(self, function: FunctionType) -> Mod | None:
        """As `identify`; None if the function has to be walked."""
        leaves = self.simple.read(function)
        if leaves is None:
            return None
        place, known = self.place, self.known
        if known.constants or known.checked is not self.proofs[0]:
            return _with_values(known, function, place, leaves, NOTHING, self)
        return tuple.__new__(Mod, (function, place, leaves, self.proofs[1], place, NOTHING, known, self))


def _notice(kind: str, function: Callable, place: tuple, leaves: list, known: Known) -> None:
    """Remembers how to read a mod again if it captured tensors of the same layouts twice in a row."""
    if function.__class__ is not FunctionType:
        return
    key = kind, id(function.__code__)
    before = _quick.get(key)
    if before is False:
        return
    layouts = [(x.shape, x.stride()) for x in leaves if isinstance(x, torch.Tensor) and x.layout == torch.strided]
    if before != layouts:
        _quick.add(key, layouts)
        return
    simple = Simple.of(function)
    _quick.add(key, False if simple is None else _Quick(simple, place, known, leaves))


def _with_values(
    known: Known | None, function: Callable, place: tuple, leaves: list, followed: Followed, frame: object = None
) -> Mod:
    """Makes a mod with the values of its constants, and with the values on which proofs depend."""
    if known is None:
        return Mod(function, place, leaves, (), place, followed, object())
    identity: tuple = place
    mark: object = known
    if known.constants:
        values = [source.read(leaves) for source in known.constants]
        identity, mark = (place, *values), (known, *values)
    checked = tuple([source.read(leaves) for source in known.checked])
    return Mod(function, identity, leaves, checked, place, followed, mark, frame)


def graph_of(kind: str, mod: Mod, device: torch.device) -> tuple[Graph | None, Mod]:
    """The traced graph of a mod, and the mod with the identity that tracing found.

    Raises:
        TraceError, TypeError: the mod cannot be traced.
    """
    if mod.function is None:
        return None, mod
    found = _graphs.get((kind, device, mod.identity))
    if found is not None:  # another thread may have traced it, or its sources were forgotten
        return found[0], add_sources(kind, mod, proof_sources(found[0]))
    with lock:
        if isinstance(mod.function, CanonicalMod):
            graph = mod.function.graph(kind)
        else:
            graph, mod = _trace(kind, mod.function, mod, device)
        kept = pins_of(mod)
        mod = add_sources(kind, mod, proof_sources(graph))
        _graphs.add((kind, device, mod.identity), (graph, kept))
    return graph, mod


def _trace(kind: str, function: Callable, mod: Mod, device: torch.device) -> tuple[Graph, Mod]:
    """Traces a mod. Traces it again each time that it read something that its code does not show."""
    changes, problem = 0, "reads something else each time that it is run"
    for _ in range(_MAX_ROUNDS):
        reads = Reads(kind, mod.followed)
        traced = None
        try:
            traced = trace(function, kind, mod.leaves, device, reads)
        except FlexDecodeError:
            if not reads.pending:
                raise
        now = add_sources(kind, mod, (), traced.constants if traced is not None else ())
        if now.place != mod.place:  # the mod changed something that it captures, or imported a module
            changes += 1
            if changes == _MAX_CHANGES:
                problem = "changes what it captures"
                break
        elif reads.pending:
            _followed.add((kind, now.identity), (reads.more(), pins(function, mod.followed)))
            now = identify(kind, function)
        elif traced is not None:
            counters.traces += 1
            if reads.too_far:
                text = (
                    f"the {kind} reaches more than can be read again at each call: changes of `{reads.too_far}`, and "
                    "of what lies beyond, go unseen. Give it what it reads in variables of its own."
                )
                warnings.warn(text, RuntimeWarning, stacklevel=2)
            return traced.graph, now
        mod = now
    raise TraceError(
        f"{kind} {getattr(function, '__name__', type(function).__name__)!r} {problem}\n"
        "  A mod is run on symbols when it is traced, not at every call: compute what shall change outside the mod."
    )


def known_graph(kind: str, mod: Mod, device: torch.device) -> Graph | None:
    """The graph of a mod; None if it was not traced."""
    found = None if mod.function is None else _graphs.get((kind, device, mod.identity))
    return None if found is None else found[0]


def add_sources(kind: str, mod: Mod, sources: Iterable[Source] = (), constants: Iterable[Source] = ()) -> Mod:
    """Adds captured sizes and numbers to those that are read at each call, and reads the mod again.

    Args:
        kind: `score_mod` or `mask_mod`.
        mod: a traced mod, or none.
        sources: what proofs about its indices depend on.
        constants: what its graph depends on.
    """
    if mod.function is not None:
        with lock:
            known = _known.get((kind, mod.place))
            if known is None:
                known = Known(pins_of(mod))
                _known.add((kind, mod.place), known)
            if not {*constants} <= {*known.constants}:
                known.constants = tuple(sorted({*known.constants, *constants}))
            if not {*sources} <= {*known.checked}:
                known.checked = tuple(sorted({*known.checked, *sources}))
    return identify(kind, mod.function)


def pins_of(mod: Mod) -> object:
    """The objects whose ids are in the identity of a mod. What stores the identity must keep them."""
    if mod.function is None or isinstance(mod.function, CanonicalMod):
        return None
    return pins(mod.function, mod.followed)


def names_of(mod: Mod) -> list[str]:
    """How a mod reaches each of its leaves, for people."""
    if isinstance(mod.function, CanonicalMod):
        return [f"capture {i} of {mod.function.__name__}" for i in range(len(mod.leaves))]
    assert mod.function is not None
    return leaf_names(mod.function, mod.followed)


def constants_of(kind: str, mod: Mod) -> tuple[Source, ...]:
    """The captured numbers of a traced mod whose value is a constant of its graph."""
    known = _known.get((kind, mod.place))
    return () if known is None else known.constants
