"""Reads what a mod captures. Every call does this again; it takes a few microseconds.

A callable goes in. A *key* and a list of *leaves* come out. The leaves are the captured tensors and finite numbers.
Everything else that the code can read goes into the key. Equal keys mean equal behaviour as a function of the leaves.

    >>> W = 128
    >>> key, leaves = walk(lambda b, h, q_idx, kv_idx: q_idx - kv_idx < W)
    >>> leaves
    [128]

The walk visits closure cells, defaults, `functools.partial` arguments, the `self` of methods and callable objects, and
the globals and attributes that the code names. It goes on through functions, containers, objects and the user's own
modules. Of a container with over 64 entries it visits only those that the mod was seen to read (`Followed`). The same
holds for attributes that the mod reads by a computed name, `getattr(cfg, name)`. `copy_for_trace` makes a copy of the
callable that notes such reads. The copy refuses the use of what cannot be followed (generators, large arrays).

The walk does not see state of C code and of the outside world (`os.environ`, files, clocks, random numbers).
"""

from __future__ import annotations

from collections.abc import Callable

from .code import uncompiled
from .copies import CannotRebuild, copy_for_trace, leaf_names
from .quick import Simple, same_layouts
from .reads import Reads
from .scan import NOTHING, Followed, pins, read

__all__ = [
    "NOTHING",
    "CannotRebuild",
    "Followed",
    "Reads",
    "Simple",
    "copy_for_trace",
    "leaf_names",
    "pins",
    "read",
    "same_layouts",
    "uncompiled",
    "walk",
]


def walk(fn: Callable, followed: Followed = NOTHING) -> tuple[tuple, list]:
    """The key and the leaves, as `read` gives them."""
    return read(fn, followed)[:2]
