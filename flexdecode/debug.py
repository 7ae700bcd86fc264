"""What `DecodeOptions(debug=True)` finds: a mod that computes something else than when it was traced."""

from __future__ import annotations

import torch

from .captures import Reads, leaf_names
from .errors import TraceError
from .graph import Graph, Node
from .identity import Mod, known_graph
from .printing import Names, formula, name_captures
from .trace import trace


def check_again(kind: str, mod: Mod, device: torch.device) -> None:
    """Traces a mod again and compares.

    Raises:
        TraceError: it gives another graph than the one that the call runs; the message shows the first difference.
    """
    before = known_graph(kind, mod, device)
    if mod.function is None or before is None:
        return
    now = trace(mod.function, kind, mod.leaves, device, Reads(kind, mod.followed)).graph
    if now == before and all(map(torch.equal, now.frozen, before.frozen)):
        return
    code = getattr(mod.function, "__code__", None)
    place = f"  {code.co_filename}:{code.co_firstlineno}, in {code.co_name}\n" if code is not None else ""
    spoken = leaf_names(mod.function, mod.followed)
    names = name_captures(before, spoken), name_captures(now, spoken)
    raise TraceError(
        f"{kind} {getattr(mod.function, '__name__', type(mod.function).__name__)!r} computes something else than when it "
        f"was traced: {_difference((before, now), names)}\n{place}"
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
        if before.op == now.op and len(before.args) == len(now.args) and before.args:
            pairs += reversed([*zip(before.args, now.args, strict=True)])
            if before.attr == now.attr and before.args != now.args:
                continue
        return f"`{_text(before, names[0])}` became `{_text(now, names[1])}`"
    for before, now in zip(graphs[0].frozen, graphs[1].frozen, strict=True):
        if before.shape != now.shape or not torch.equal(before, now):
            return f"a table of {list(before.shape)} that it makes has other contents"
    return "its captures are used in another order"


def _text(node: Node, names: Names) -> str:
    return formula(node, names)
