"""What a mod captures, read afresh at every call in a few microseconds.

`walk` follows everything that the code of a callable can read: closure cells, defaults, `functools.partial` arguments,
the `self` of methods and callable objects, and the globals and attributes that the code names, through functions,
containers, objects and the user's own modules. Tensors and finite numbers are *leaves*; everything else goes into the
*key*. Equal keys mean equal behaviour as a function of the leaves.

    >>> W = 128
    >>> key, leaves = walk(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < W)
    >>> leaves
    [128]

Not seen: attributes whose name the code does not spell (`getattr(cfg, name)`, `vars`; such objects count by identity),
modules imported inside a mod, what C objects (numpy arrays, `lru_cache`, sets, deques, `defaultdict`) hold, and
containers of more than 64 entries. Numbers in there are frozen at the first call, tensors are refused by the tracer.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from .copies import CannotRebuild, _Rebuilder, _Recorder
from .facts import uncompiled
from .scan import _run, _Scan

__all__ = ["CannotRebuild", "leaf_names", "pins", "rebuild", "uncompiled", "walk"]


def walk(fn: Callable) -> tuple[tuple, list]:
    """Reads what `fn` captures.

    Returns:
        The key, a hashable tuple, and the leaves: captured tensors and finite numbers in a deterministic order. The key
        holds ids: whoever stores it also stores `pins(fn)`, so that no id is used again.
    """
    scan = _run(fn, _Scan)
    leaves = scan.leaves
    if len(leaves) > 1:
        # Two names of one tensor are one value to the tracer, and may be two tensors at the next call.
        ids = [id(leaf) for leaf in leaves if leaf.__class__ is not int and leaf.__class__ is not float]
        if len(set(ids)) < len(ids):
            scan.key += ("alias", *map(ids.index, ids))
    return tuple(scan.key), leaves


def pins(fn: Callable) -> list:
    """Returns the objects whose ids are in the key of `fn` (code objects, types, objects that count by identity)."""
    return _run(fn, _Scan).pins


def leaf_names(fn: Callable) -> list[str]:
    """Returns how each leaf is reached, for people: `W`, `self.slope`, `partial argument 0`, `W (in mask_mods[0])`."""
    return _run(fn, _Recorder).leaf_names


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
