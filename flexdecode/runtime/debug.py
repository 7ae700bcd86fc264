"""Part of `DecodeOptions(debug=True)`: finds a mod that no longer computes what it computed when it was traced."""

from __future__ import annotations

import torch

from ..analysis.printing import Names, formula, name_captures
from ..errors import TraceError
from ..frontend.captures import Reads
from ..frontend.graph import Graph
from ..frontend.parse import CanonicalMod
from ..frontend.trace import trace
from .identity import Mod, known_graph, names_of


def check_again(kind: str, mod: Mod, device: torch.device) -> None:
    """Traces a mod again and compares.

    Raises:
        TraceError: its graph differs from the graph that the call runs; the message shows the first difference.
    """
    before = known_graph(kind, mod, device)
    if mod.function is None or before is None or isinstance(mod.function, CanonicalMod):
        return
    now = trace(mod.function, kind, mod.leaves, device, Reads(kind, mod.followed)).graph
    if now == before and all(map(torch.equal, now.frozen, before.frozen)):
        return
    code = getattr(mod.function, "__code__", None)
    place = f"  {code.co_filename}:{code.co_firstlineno}, in {code.co_name}\n" if code is not None else ""
    name = getattr(mod.function, "__name__", type(mod.function).__name__)
    spoken = names_of(mod)
    names = name_captures(before, spoken), name_captures(now, spoken)
    raise TraceError(
        f"{kind} {name!r} computes something else than when it was traced: "
        f"{_difference((before, now), names)}\n{place}"
        f"  then: {formula(before.output, names[0])}\n  now:  {formula(now.output, names[1])}\n"
        "  It reads what Python does not show, such as a clock, random numbers, the environment or a file: read that "
        "outside the mod and capture the number or the tensor."
    )


def _difference(graphs: tuple[Graph, Graph], names: tuple[Names, Names]) -> str:
    """The first difference of two graphs, in words."""
    pairs = [(graphs[0].output, graphs[1].output)]
    while pairs:
        before, now = pairs.pop()
        if before == now:
            continue
        # Common operands may stand in another order: `a * b` is `b * a`.
        old = [operand for operand in before.args if operand not in now.args]
        new = [operand for operand in now.args if operand not in before.args]
        alike = (before.op, before.attr, before.dtype) == (now.op, now.attr, now.dtype)
        if not alike or not old or len(old) != len(new):
            texts = formula(before, names[0]), formula(now, names[1])
            if texts[0] == texts[1] and before.is_const and now.is_const:  # they are equal as float32
                texts = repr(before.attr), repr(now.attr)
            return f"`{texts[0]}` became `{texts[1]}`"
        pairs += reversed([*zip(old, new, strict=True)])
    return "a table that it makes of numbers has other contents"
