"""What a mod captures, read afresh at every call in a few microseconds.

`walk` follows everything that the code of a callable can read: closure cells, defaults, `functools.partial` arguments,
the `self` of methods and callable objects, and the globals and attributes that the code names, through functions,
containers, objects and the user's own modules. Tensors and finite numbers are *leaves*; everything else goes into the
*key*. Equal keys mean equal behaviour as a function of the leaves.

    >>> W = 128
    >>> key, leaves = walk(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < W)
    >>> leaves
    [128]

Of containers with over 64 entries the walk follows those that the mod was seen to read (`Followed`), and likewise the
attributes that it reads by a computed name, `getattr(cfg, name)`. `copy_for_trace` makes a copy of the callable that
notes such reads, and that refuses the use of what cannot be followed (generators, large arrays).

Not seen: what C code and the outside world hold (`os.environ`, files, clocks, random numbers).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .copies import CannotRebuild, _Rebuilder, _Recorder
from .facts import uncompiled
from .reads import Reads
from .scan import NOTHING, Followed, _run, _Scan

__all__ = [
    "NOTHING",
    "CannotRebuild",
    "Followed",
    "Reads",
    "copy_for_trace",
    "leaf_names",
    "pins",
    "read",
    "rebuild",
    "uncompiled",
    "walk",
]


def read(fn: Callable, followed: Followed = NOTHING) -> tuple[tuple, list, bool]:
    """Reads what `fn` captures.

    Returns:
        The key, a hashable tuple, and the leaves: captured tensors and finite numbers in a deterministic order. The key
        holds ids: whoever stores it also stores `pins(fn)`, so that no id is used again. And whether `fn` may read more
        than can be told before it runs, see `Followed`.
    """
    scan = _run(fn, _Scan, followed)
    leaves = scan.leaves
    if len(leaves) > 1:
        # Two names of one tensor are one value to the tracer, and may be two tensors at the next call.
        ids = [id(leaf) for leaf in leaves if leaf.__class__ is not int and leaf.__class__ is not float]
        if len(set(ids)) < len(ids):
            scan.key += ("alias", *map(ids.index, ids))
    return tuple(scan.key), leaves, bool(scan.special)


def walk(fn: Callable, followed: Followed = NOTHING) -> tuple[tuple, list]:
    """The key and the leaves of `read`."""
    return read(fn, followed)[:2]


def pins(fn: Callable, followed: Followed = NOTHING) -> list:
    """Returns the objects whose ids are in the key of `fn` (code objects, types, objects that count by identity)."""
    return _run(fn, _Scan, followed).pins


def leaf_names(fn: Callable, followed: Followed = NOTHING) -> list[str]:
    """Returns how each leaf is reached, for people: `W`, `self.slope`, `partial argument 0`, `W (in mask_mods[0])`."""
    return _run(fn, _Recorder, followed).leaf_names


def rebuild(fn: Callable, replacements: Mapping[int, object]) -> Callable:
    """Copies `fn` with some leaves replaced; `fn` itself stays as it is, and parts without a replacement are shared.

    Args:
        fn: the callable.
        replacements: new objects by position among the leaves of `walk(fn)`.

    Raises:
        CannotRebuild: a replacement is not possible where that leaf is held.
        IndexError: there is no such leaf.
    """
    record = _run(fn, _Recorder)
    if any(not 0 <= index < len(record.leaves) for index in replacements):
        raise IndexError(f"leaves {sorted(replacements)} to be replaced, but there are {len(record.leaves)}")
    return _Rebuilder(record.nodes, replacements).build(fn, record.nodes[0] if record.nodes else None)


def copy_for_trace(fn: Callable, replacements: Mapping[int, object], reads: Reads) -> Callable:
    """Copies `fn` with some leaves replaced, and with what notes or refuses reads that the walk does not follow.

    Args:
        fn: the callable.
        replacements: new objects by position among the leaves of `walk(fn, reads.followed)`.
        reads: takes the notes.

    Raises:
        CannotRebuild: a replacement is not possible where that leaf is held.
    """
    record = _run(fn, _Recorder, reads.followed)
    reads.too_far = record.too_far
    reads.known = record.names
    while True:
        try:
            return _Rebuilder(record.nodes, replacements, reads).build(fn, record.nodes[0] if record.nodes else None)
        except CannotRebuild as error:
            position = -1 - error.index
            if position < 0:
                raise
            reads.kept.add(position)
            special = record.nodes[position].special
            if special.startswith("long"):
                reads.note(int(special.split()[1]), ("all", None))
