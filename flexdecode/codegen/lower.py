"""Writes a graph as the Triton text of its hooks: some run once per row, some load per key, some compute per pair."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

import torch

from ..analysis.analyze import Analysis, analyze, analyze_graph
from ..analysis.bounds import nodes_of
from ..analysis.intervals import EVERYWHERE, FAR, MAX_INTERVALS, Region
from ..analysis.proofs import Checks, LoadCheck, unproven
from ..analysis.proven import ProvenMods
from ..frontend.graph import Graph, Node, changing, loops_around, topological
from ..frontend.ops import FLOAT8, HALF, OPS

_TRITON_DTYPES = {
    torch.bool: "tl.int1", torch.uint8: "tl.uint8", torch.int8: "tl.int8", torch.int16: "tl.int16",
    torch.int32: "tl.int32", torch.int64: "tl.int64", torch.float16: "tl.float16", torch.bfloat16: "tl.bfloat16",
    torch.float32: "tl.float32", torch.float64: "tl.float64",
}  # fmt: skip


@dataclass(frozen=True)
class CaptureLayout:
    """Where the captures of one graph stand in the kernel's `captures` tuple.

    The numbers come first. Then each tensor has its pointer, its sizes and its strides (in elements).
    """

    num_numbers: int
    ranks: tuple[int, ...]

    @staticmethod
    def of(graph: Graph) -> CaptureLayout:
        """The layout of a graph."""
        return CaptureLayout(len(graph.numbers), tuple(rank for _, rank in graph.tensor_types))

    def pointer(self, slot: int) -> int:
        """Position of a tensor's address."""
        return self.num_numbers + sum(1 + 2 * rank for rank in self.ranks[:slot])

    def size(self, slot: int, dim: int) -> int:
        """Position of a size."""
        return self.pointer(slot) + 1 + dim

    def stride(self, slot: int, dim: int) -> int:
        """Position of a stride."""
        return self.pointer(slot) + 1 + self.ranks[slot] + dim


def number_dtypes(graph: Graph) -> dict[int, torch.dtype]:
    """The type in which each number slot is passed: int64, float32, or float64 if it is used with float64."""
    found: dict[int, torch.dtype] = {}
    for node in graph.nodes():
        if node.op == "number":
            dtype = node.dtype if node.dtype.is_floating_point else torch.int64
            found[node.attr] = torch.promote_types(found.get(node.attr, dtype), dtype)
    return found


@dataclass(frozen=True)
class Hooks:
    """Bodies of the hook functions of one mod, by name, and the elementwise functions that they call."""

    bodies: dict[str, str]
    functions: frozenset[str]


def lower(
    graph: Graph, kind: str, q_idx_given: bool = False, checks: Checks | None = None, shifted: bool = False
) -> Hooks:
    """Writes the bodies of `score_row`, `score_fetch` and `score_mod`, or of `mask_row` and `mask_mod`.

    Args:
        graph: a traced mod.
        kind: `score_mod` or `mask_mod`.
        q_idx_given: whether q_idx may be any int64.
        checks: what its loads have to check; None if nothing is known of the call.
        shifted: whether positions may be negative, because the caller gives kv_offset.
    """
    writer = _Writer(graph, analyze_graph(graph, q_idx_given, shifted), checks)
    hoisted = writer.hoisted()
    row = writer.body(hoisted, {})
    row.append(f"return ({''.join(writer.names[n] + ', ' for n in hoisted)})")
    known = {node: f"row[{i}]" for i, node in enumerate(hoisted)}
    bodies = {}
    if kind == "score_mod":
        fetched = writer.fetched()
        writer.fetches = frozenset(fetched)
        fetch = writer.body(fetched, known)
        bodies["score_fetch"] = [*fetch, f"return ({''.join(writer.loaded[n] + ', ' for n in fetched)})"]
        known |= {node: writer.widened(node, f"fetched[{i}]") for i, node in enumerate(fetched)}
    pair = writer.body([graph.output], known)
    result = writer.names[graph.output]
    if kind == "score_mod" and Node("score", (), torch.float32) not in graph.nodes():
        result = f"{result} + tl.zeros_like(score)"  # gives the result the shape of the tile
    pair.append(f"return {result}" if kind == "score_mod" else f"return live & {result}")
    bodies |= {f"{kind.removesuffix('_mod')}_row": row, kind: pair}
    return Hooks({name: "\n".join(lines) for name, lines in bodies.items()}, frozenset(writer.functions))


def lower_bounds(proven: ProvenMods) -> Hooks:
    """Writes the body of `kv_bounds`: live and full intervals of kv_idx, four each, with bounds of int64."""
    bounds = proven.bounds
    lines: list[str] = []
    functions: set[str] = set()

    def texts(graph: Graph | None, checks: Checks | None, regions: list[Region], kind: str) -> list[list[_Pair]]:
        """Writes the statements that compute the bounds of each region, and gives the bounds as text."""
        if graph is None:
            return [[(_BELOW, _ABOVE) for _ in region] for region in regions]
        outputs = list(dict.fromkeys(node for region in regions for node in nodes_of(region)))
        analysis = analyze(outputs, proven.q_idx_given, shifted=proven.shifted)
        writer = _Writer(graph, analysis, checks, f"{kind}_captures", kind[0])
        lines.extend(writer.body(outputs, {}))
        functions.update(writer.functions)
        names = {node: f"({writer.names[node]}).to(tl.int64)" for node in outputs}
        return [[(names[lo] if lo else _BELOW, names[hi] if hi else _ABOVE) for lo, hi in region] for region in regions]

    live, full = texts(proven.mask, proven.mask_checks, [bounds.mask_live, bounds.mask_full], "mask")
    (score_live,) = texts(proven.score, proven.score_checks, [bounds.score_live], "score")
    # A block in which no mask is needed may not reach beyond the keys whose pages are looked up.
    if bounds.mask_full == EVERYWHERE:
        full = list(score_live)
    if proven.mask is None:
        live = score_live
    elif bounds.score_live != EVERYWHERE:
        lo, hi = score_live[0] if score_live else (_ABOVE, _BELOW)
        live, full = ([(f"tl.maximum({a}, {lo})", f"tl.minimum({b}, {hi})") for a, b in x] for x in (live, full))
    for region in (live, full):
        region += [(_ABOVE, _BELOW)] * (MAX_INTERVALS - len(region))
    pairs = [", ".join(f"({lo}, {hi})" for lo, hi in region) for region in (live, full)]
    lines.append(f"return ({pairs[0]}), ({pairs[1]})")
    return Hooks({"kv_bounds": "\n".join(lines)}, frozenset(functions))


_Pair = tuple[str, str]
_BELOW, _ABOVE = f"tl.full((), {-FAR}, tl.int64)", f"tl.full((), {FAR}, tl.int64)"


class _Writer:
    """Emits each node once, operands first. Integers are 32-bit if that is proven to be enough."""

    def __init__(
        self, graph: Graph, analysis: Analysis, checks: Checks | None, captures: str = "captures", prefix: str = "v"
    ) -> None:
        self.graph = graph
        self.analysis = analysis
        loads = [node for node in graph.nodes() if node.op == "load"]
        self.checks: dict[Node, LoadCheck] = {} if checks is None else dict(zip(loads, checks, strict=True))
        self.captures = captures
        self.prefix = prefix
        self.layout = CaptureLayout.of(graph)
        self.number_dtypes = number_dtypes(graph)
        self.scalars: set[Node] = set()  # may be one value for the whole tile, because they use neither h nor kv_idx
        for node in analysis.nodes:
            if node.op != "score" and node.attr not in ("h", "kv_idx") and self.scalars.issuperset(node.args):
                self.scalars.add(node)
        self.loops = loops_around(topological(graph.output, *analysis.nodes))
        self.indent = ""
        self.functions: set[str] = set()
        self.names: dict[Node, str] = {}
        self.loaded: dict[Node, str] = {}  # names of loads before they are widened
        self.fetches: frozenset[Node] = frozenset()  # loads in score_fetch

    def hoisted(self) -> list[Node]:
        """The computed values that do not depend on kv_idx, but that a computation per pair uses."""
        # The nodes that are computed for each pair: they depend on kv_idx, or are part of a loop that does.
        beside = set(topological(self.graph.output, within=lambda n: n in self.analysis.on_kv or bool(self.loops[n])))
        operands = [a for node in self.graph.nodes() if node in beside for a in node.args] or [self.graph.output]
        return list(dict.fromkeys(a for a in operands if a not in beside and (a.args or a.op == "load")))

    def fetched(self) -> list[Node]:
        """The loads that depend on kv_idx but not on the score, so they need not wait for the score."""
        per_key = self.analysis.on_kv - self.analysis.on_score
        return [n for n in self.graph.nodes() if n.op == "load" and n in per_key and not self.loops[n]]

    def body(self, outputs: list[Node], known: dict[Node, str]) -> list[str]:
        """Statements that compute `outputs` from the arguments and the `known` names."""
        self.names = dict(known)
        self.lines: list[str] = []
        self._write(topological(*outputs, within=lambda node: node not in known), frozenset())
        return self.lines

    def _write(self, nodes: list[Node], inside: frozenset[int]) -> None:
        """Writes the nodes whose loops are all among `inside`, the loops around this place."""
        for node in nodes:
            if node in self.names or not self.loops[node] <= inside:
                continue
            if node.op == "fold":
                self.names[node] = self._fold(node, inside)
                continue
            text = self._text(node)
            if node.op == "load":
                self.loaded[node] = self._assign(text)
                self.names[node] = self.widened(node, self.loaded[node])
            else:
                self.names[node] = text if node.op in ("score", "index") else self._assign(text)

    def _assign(self, text: str) -> str:
        name = f"{self.prefix}{len(self.lines)}"
        self.lines.append(f"{self.indent}{name} = {text}")
        return name

    def _fold(self, node: Node, inside: frozenset[int]) -> str:
        """Writes a loop. Its first step stands before the loop and gives the result its type and shape."""
        loop, count, name = node.attr
        again = changing(node, self.loops)
        outer = dict(self.names)

        def value(step: str) -> str:
            for n in again:
                if n.op == "step" and n.attr[0] == loop:
                    self.names[n] = self._assign(f"tl.full((), {step}, {self._dtype(n)})")
            self._write(again, inside | {loop})
            return self._as(node.args[0], self._dtype(node))

        total = self._assign(value("0"))
        self.names = dict(outer)
        step = f"{self.prefix}_step{loop}"
        self.lines.append(f"{self.indent}for {step} in range(1, {count}):")
        self.indent += "    "
        text = OPS[name].triton_int if not node.dtype.is_floating_point else None
        text = (text or OPS[name].triton).format(total, value(step))
        self.functions.update(_called(text))
        self.lines.append(f"{self.indent}{total} = {text}")
        self.indent = self.indent[:-4]
        self.names = outer
        return total

    def _dtype(self, node: Node) -> str:
        """The Triton type that holds a node. It is int32 instead of int64 if the range of the node allows it."""
        if node.dtype == torch.int64 and self.analysis.fits_int32(node):
            return "tl.int32"
        if node.dtype in HALF:
            return "tl.float32"  # half types are rounded values held in float32
        return _TRITON_DTYPES[node.dtype]

    def _as(self, node: Node, dtype: str) -> str:
        name = self.names[node]
        return name if self._dtype(node) == dtype else f"{name}.to({dtype})"

    def _text(self, node: Node) -> str:
        if node.op == "score":
            return "score"
        if node.op == "index":
            # The template passes q_idx as int64 if the caller chose it, and all other indices as int32.
            return node.attr
        if node.op == "const":
            value = float(node.attr) if node.dtype.is_floating_point else int(node.attr)
            text = repr(value) if math.isfinite(value) else f'float("{value}")'
            return f"tl.full((), {text}, {self._dtype(node)})"
        write = {"number": self._number, "load": self._load, "cast": self._cast}.get(node.op, self._operation)
        return write(node)

    def _number(self, node: Node) -> str:
        text = f"{self.captures}[{node.attr}]"
        if node.dtype == torch.bool:
            return f"{text} != 0"
        if self.number_dtypes[node.attr] == torch.float64:  # Triton's interpreter passes a Python float
            return f"tl.full((), {text}, {self._dtype(node)})"
        return text if node.dtype == self.number_dtypes[node.attr] else f"{text}.to({self._dtype(node)})"

    def _operation(self, node: Node) -> str:
        op, dtype, operands = OPS[node.op], self._dtype(node), node.args
        given = {self._dtype(a) for a in operands}
        if op.rule == "where":
            types = ["tl.int1", dtype, dtype]
        elif op.rule in ("compare", "predicate", "logical") or op.name == "sign":
            types = [*given] * op.arity if len(given) == 1 else ["tl.int64"] * op.arity
        else:
            types = ["tl.int64" if node.dtype == torch.int64 and "tl.int64" in given else dtype] * op.arity
        integer = not operands[-1].dtype.is_floating_point
        template = op.triton_int if integer and op.triton_int is not None else op.triton
        for position, value, shorter in op.shortcuts:
            if not integer and operands[position].is_const and operands[position].attr == value:
                template = shorter
        text = template.format(*map(self._as, operands, types))
        self.functions.update(_called(text))
        if integer and dtype == "tl.int32" and "tl.int64" in given:
            return f"({text}).to(tl.int32)"
        if op.rule in ("compare", "predicate") and node in self.scalars and not integer:
            return _scalar_condition(text)
        # The result of an operation on half types is rounded, as in PyTorch.
        return f"({text}).to({_TRITON_DTYPES[node.dtype]}).to(tl.float32)" if node.dtype in HALF else text

    def _cast(self, node: Node) -> str:
        (source,) = node.args
        name = self.names[source]
        if node.dtype in HALF:  # through float32, as in PyTorch; Triton's interpreter has no other way to bfloat16
            text = self._as(source, "tl.float32")
            return text if node.weak else f"{text}.to({_TRITON_DTYPES[node.dtype]}).to(tl.float32)"
        dtype = self._dtype(node)
        if source.dtype.is_floating_point and node.dtype in (torch.uint8, torch.int8, torch.int16):
            # Through int32: a value that does not fit must wrap around, but a compiler may assume that it fits.
            return f"{name}.to(tl.int32).to({dtype})"
        return name if self._dtype(source) == dtype else f"{name}.to({dtype})"

    def _load(self, node: Node) -> str:
        """A load. It counts negative indices from the end and reads 0 outside the tensor, unless proven unnecessary."""
        slot = node.attr
        pointer = f"{self.captures}[{self.layout.pointer(slot)}]"
        if not node.args:
            return f"tl.load({pointer})"
        offsets, inside = [], []
        checks = self.checks.get(node) or unproven(node, self.analysis)
        for dim, (operand, check) in enumerate(zip(node.args, checks.indices, strict=True)):
            size = f"{self.captures}[{self.layout.size(slot, dim)}]"
            index = self._as(operand, "tl.int64")
            if check.below:
                index = self._assign(f"tl.where({index} < 0, {index} + {size}, {index})")
            if check.below and check.outside:
                inside.append(f"({index} >= 0)")
            if check.outside:
                inside.append(f"({index} < {size})")
            offsets.append(f"{index} * {self.captures}[{self.layout.stride(slot, dim)}]")
        guard = self._assign(_scalar_condition(" & ".join(inside))) if inside else None
        address = f"{pointer} + ({' + '.join(offsets)})"
        if node in self.fetches:
            return f"fetch({address}, {'live' if checks.attending else guard})"
        return f"tl.load({address}, mask={guard}, other=0)" if inside else f"tl.load({address})"

    def widened(self, node: Node, text: str) -> str:
        """Converts a loaded value to the type that computes: at least float32 for floats, a condition for bool."""
        dtype, _ = self.graph.tensor_types[node.attr]
        if dtype == torch.bool:
            return f"({text} != 0)"
        if dtype in FLOAT8:
            function = str(dtype).removeprefix("torch.")
            self.functions.add(function)
            return f"{function}({text})"
        return f"{text}.to(tl.float32)" if dtype in HALF else text


def _called(text: str) -> list[str]:
    """The names of the elementwise functions that a text calls."""
    return re.findall(r"(?<![.\w])([a-z]\w*)\(", text)


def _scalar_condition(text: str) -> str:
    """Lets a bool that may be a scalar broadcast.

    `True &` changes nothing on a GPU. Without it, Triton's interpreter broadcasts the bool as the compared type.
    """
    return f"tl.full((), True, tl.int1) & ({text})"
