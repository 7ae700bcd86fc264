"""What was measured of the schedules of a kind of call: remembered in memory and on disk."""

from __future__ import annotations

import contextlib
import json
import math
from pathlib import Path
from typing import Any, NamedTuple

from ..analysis.proven import ProvenMods
from ..call.candidates import DEFAULT, Choice
from ..call.inputs import DecodeOptions
from ..call.signature import Signature
from ..memos import Bounded
from ..triton_api import triton_release
from . import store
from .identity import plain
from .template import sources_digest


class Tuned(NamedTuple):
    """What was measured of a kind of call.

    Attributes:
        choice: the fastest schedule.
        num_items: `Scheduler.busy_items` of the call that was measured.
        default_us, chosen_us: microseconds of the default schedule and of the fastest one, measured in turns.
        tried: every schedule that was measured, in words, and its microseconds in the round that tried it. Empty if
            nothing could be measured.
    """

    choice: Choice
    num_items: int
    default_us: float
    chosen_us: float
    tried: tuple[tuple[str, float], ...]

    def __str__(self) -> str:
        if not self.tried:
            return "the default, because nothing could be measured"
        if self.choice == DEFAULT:
            return f"the default is the fastest of {len(self.tried)} schedules: {self.default_us:.1f} us"
        return (
            f"{self.choice}: {self.chosen_us:.1f} us, the default {self.default_us:.1f} us; "
            f"{len(self.tried)} schedules were measured"
        )


# Identity -> `Tuned`.
_found = Bounded.memo(limit=1024)


def tuned_identity(
    proven: ProvenMods, signature: Signature, options: DecodeOptions, sizes: tuple[int, ...], device: tuple[str, int]
) -> str:
    """The text that identifies a kind of call on a device, in every process.

    Args:
        proven: the mods. What is proven of their indices does not matter.
        signature: of the call. Its device, its results and the alignment of its tensors do not matter.
        options: of the call; only what they fix of the schedule matters.
        sizes: their class, `class_of`.
        device: its name and multiprocessors.
    """
    graphs = [graph.text if graph else "None" for graph in (proven.score, proven.mask)]
    fixed = {name: getattr(options, name) for name in Choice._fields}
    of_signature = plain(signature, without=("device", "format", "aux", "aligned", "backend"))
    of_signature["format"] = type(signature.format).__name__
    made_with = sources_digest(), triton_release(), *device
    return "\n".join([str(made_with), str(sizes), str(fixed), str(of_signature), str(proven.listed), *graphs])


def find_tuned(identity: str) -> Tuned | None:
    """What is known of a kind of call; None if it was not measured, or if its record on disk is damaged."""
    found = _found.get(identity)
    if found is None and (path := store.find("schedules", identity)) is not None:
        found = read_record(path)
        if found is not None:
            _found.add(identity, found)
    return found


def keep_tuned(identity: str, tuned: Tuned, on_disk: bool = True) -> None:
    """Remembers what was measured."""
    _found.add(identity, tuned)
    if on_disk:
        record = {"identity": identity, **tuned._asdict(), "choice": tuned.choice._asdict()}
        store.keep("schedules", identity, json.dumps(record, indent=1).encode())


def read_record(path: Path) -> Tuned | None:
    """Reads a file of the store; None if there is none or if it is damaged."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        record: dict[str, Any] = json.loads(path.read_text())
        choice = Choice(**record["choice"])
        choice.applied_to(DecodeOptions())  # refuses impossible values
        tried = tuple((str(name), float(us)) for name, us in record["tried"])
        times = float(record["default_us"]), float(record["chosen_us"])
        found = Tuned(choice, int(record["num_items"]), *times, tried)
        if all(math.isfinite(us) and us > 0 for us in times):
            return found
    return None
