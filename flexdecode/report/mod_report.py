"""What is known of one mod of a call, as text: its formula, captures, live keys and loads."""

from __future__ import annotations

import math
from dataclasses import dataclass
from textwrap import indent, wrap
from typing import NamedTuple

from ..analysis.algebra import WHOLE, Ends
from ..analysis.analyze import analyze_graph
from ..analysis.printing import Names, formula, is_guarded, name_captures, region_text
from ..analysis.proofs import Checks, known_value
from ..analysis.proven import ProvenMods
from ..frontend.graph import Graph, Source
from ..runtime.identity import Mod, constants_of, names_of


class Capture(NamedTuple):
    """Something that a mod captures.

    Attributes:
        name: as in the formula.
        value: as text.
        role: `run-time argument`, `constant` (another value needs another kernel) or `tensor` (read at every call).
    """

    name: str
    value: str
    role: str


class Load(NamedTuple):
    """A read of a captured tensor.

    Attributes:
        text: the expression.
        checked: the indices that the kernel checks; none if all are proven.
        by_mask: whether the proof holds only for the keys where the mask is true, so that only these are read.
        per_key: True if it is read for every key, False if once per query row.
    """

    text: str
    checked: tuple[str, ...]
    by_mask: bool
    per_key: bool


@dataclass(frozen=True)
class ModReport:
    """What is known of a mod.

    Attributes:
        kind: `score_mod` or `mask_mod`.
        name: of the function.
        formula: what it computes, in infix form.
        graph: the canonical text of its graph.
        captures: captured numbers and tensors that it depends on.
        loads: reads of captured tensors.
        live: intervals that hold every key whose score is not -inf (score_mod) or that attends (mask_mod).
        live_now: the same with the values that the captured numbers have now.
        full: intervals in which the mask is proven true, so that it is not evaluated; empty for a score_mod.
        solved: whether anything is known of the live or full keys.
        guarded: whether `live` and `full` hold only for captured integers up to 2**40.
        reads_dead_keys: whether keys within `live` are read although the mod rules them out. They must be finite.
    """

    kind: str
    name: str
    formula: str
    graph: str
    captures: tuple[Capture, ...]
    loads: tuple[Load, ...]
    live: tuple[str, ...]
    live_now: tuple[str, ...]
    full: tuple[str, ...]
    solved: bool
    guarded: bool
    reads_dead_keys: bool

    def __str__(self) -> str:
        rows = [("formula", [part for line in self.formula.splitlines() for part in wrap(line, 100)])]
        rows.append(("captures", [f"{c.name} = {c.value}  ({c.role})" for c in self.captures]))
        rows.append(("live", self._live()))
        if self.live_now != self.live:
            rows.append(("now", list(self.live_now) or ["no key"]))
        if self.kind == "mask_mod" and self.solved and self.live:
            rows.append(("full", self._full()))
        if self.guarded:
            rows.append(("", ["(for captured integers up to 2**40; larger ones loosen a bound, and never drop a key)"]))
        if self.reads_dead_keys:
            rows.append(("reads", ["also keys in there that it rules out: they have to be finite, not NaN or inf"]))
        rows.append(("loads", [_load_text(load) for load in self.loads]))
        lines = [f"{self.kind} {self.name}"]
        for label, texts in rows:
            lines += [f"  {label if i == 0 else '':<10}{text}" for i, text in enumerate(texts)]
        return "\n".join([*lines, "  graph", indent(self.graph, "    ")])

    def _live(self) -> list[str]:
        if self.kind == "score_mod":
            return [*self.live, "elsewhere the score is -inf"] if self.solved else ["every key"]
        return (list(self.live) or ["no key"]) if self.solved else ["not solved: evaluated for every key"]

    def _full(self) -> list[str]:
        if not self.full:
            return ["nothing is proven full: the mask is evaluated for every live key"]
        if self.full == self.live:
            return ["the same: the mask is evaluated only in blocks that an end cuts"]
        return [*self.full, "the mask is evaluated in all other live blocks"]


def _load_text(load: Load) -> str:
    proven = "proven in range" + (" wherever the mask is true" if load.by_mask else "")
    checks = f"bounds-checked ({', '.join(load.checked)}): out of range gives 0" if load.checked else proven
    return f"{load.text}  {checks}, read {'for every key' if load.per_key else 'once per row'}"


def report_mod(kind: str, proven: ProvenMods, mod: Mod, ends: Ends = WHOLE) -> ModReport | None:
    """Describes a mod.

    Args:
        kind: `score_mod` or `mask_mod`.
        proven: of the call.
        mod: the function and its captures.
        ends: of the live positions of a sequence, in words.
    """
    bounds, is_mask = proven.bounds, kind == "mask_mod"
    graph, checks = (proven.mask, proven.mask_checks) if is_mask else (proven.score, proven.score_checks)
    if graph is None or mod.function is None:
        return None
    constants = constants_of(kind, mod)
    names = name_captures(graph, names_of(mod), constants)
    live, full = (bounds.mask_live, bounds.mask_full) if is_mask else (bounds.score_live, ())
    live_text, full_text = (tuple(region_text(region, names, ends=ends)) for region in (live, full))
    values = [known_value(source, mod.leaves) for source in graph.numbers]
    drops = any(node.is_const and node.attr == -math.inf for node in graph.nodes())
    return ModReport(
        kind=kind,
        name=getattr(mod.function, "__name__", type(mod.function).__name__),
        formula=formula(graph.output, names),
        graph=graph.text,
        captures=_captures(graph, names, constants, mod.leaves),
        loads=_loads(graph, names, checks or ()),
        live=live_text,
        live_now=tuple(region_text(live, names, values, ends)),
        full=full_text,
        solved=live_text != (ends.everything,) or bool(full),
        guarded=is_guarded((*live, *full)),
        reads_dead_keys=bool(live) and (live_text != full_text if is_mask else drops),
    )


def _captures(graph: Graph, names: Names, constants: tuple[Source, ...], leaves: list) -> tuple[Capture, ...]:
    found = []
    for sources, called, role in (
        (graph.numbers, names.numbers, "run-time argument"),
        (constants, names.constants, "constant: another value makes another kernel"),
    ):
        for source, name in zip(sources, called, strict=True):
            value = known_value(source, leaves)
            found.append(Capture(name, "?" if value is None else repr(value), role))
    for leaf, name in zip(graph.tensors, names.tensors, strict=True):
        tensor = leaves[leaf] if leaf >= 0 else graph.frozen[-1 - leaf]
        role = "read at every call" if leaf >= 0 else "made inside the mod: as it was at the first call"
        found.append(Capture(name, f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}", role))
    return tuple(found)


def _loads(graph: Graph, names: Names, checks: Checks) -> tuple[Load, ...]:
    on_kv = analyze_graph(graph, q_idx_given=True).on_kv
    nodes = (node for node in graph.nodes() if node.op == "load")
    loads = []
    for node, check in zip(nodes, checks, strict=True):
        checked = tuple(
            formula(i, names) for i, c in zip(node.args, check.indices, strict=True) if c.below or c.outside
        )
        loads.append(Load(formula(node, names), checked, check.attending, node in on_kv))
    return tuple(loads)
