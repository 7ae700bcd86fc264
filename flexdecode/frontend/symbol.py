"""The stand-in for a tensor inside a traced mod.

A `Symbol` is a lazy tensor: a shape, and a function from an index to the `Node` of that element. Scores and indices are
symbols of rank 0. A captured tensor is a symbol whose elements are loads. Views are index arithmetic. Elementwise
operations run only when they are indexed. So no value of a captured tensor is read while tracing.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, NoReturn

import torch

from ..errors import TraceError, UnsupportedOpError, at_user_line, user_step
from .build import check_constant, remake, sources
from .captures import Reads
from .graph import Node, Source, const, loops_around, rewrite, topological
from .ops import DTYPES, FLOAT8, widened

_NO_BRANCH = (
    "A mod is traced, so it cannot branch on a value: use torch.where(cond, a, b) for if/else, `&`, `|`, `~` for "
    "and/or/not, torch.maximum/torch.minimum for max/min, and (a < b) & (b < c) with its brackets for a < b < c."
)
_NO_NUMBER = (
    "A traced value has no Python number: use the torch function (torch.exp for math.exp), and capture a list, dict or "
    "numpy array as a tensor to index it."
)
_IN = "Compare with each value, `(kv_idx == 1) | (kv_idx == 2)`, or index a captured bool table, `table[kv_idx]`."
_OF_CALLS = {  # Python's functions that need the value, with what to write instead
    "int": "Use `x.long()`, which stays a tensor.",
    "float": "Use `x.float()`, which stays a tensor.",
    "math": "Use the function of torch: torch.exp for math.exp.",
    "range": (
        "A loop runs over Python numbers only: loop over a number that is known outside the mod, and use torch.where "
        "for what depends on a traced value."
    ),
}


_MAX_WAITING = 40  # this many symbols with dimensions compute elements on demand; later ones use `_settled`


class Consumed(BaseException):  # not an Exception: the user's own `except Exception` must not swallow it
    """A mod asked for the Python value of captured numbers. They become constants, and the trace starts again."""

    def __init__(self, found: set[Source]) -> None:
        self.sources = frozenset(found)


@dataclass
class TraceContext:
    """What the symbols of one run share."""

    kind: str
    leaves: list
    device: torch.device
    constants: frozenset[Source]
    functions: Any  # the module torch_functions, which imports this one
    reads: Reads  # notes reads of the mod that the walk does not follow
    tensor_types: dict[int, tuple[torch.dtype, int]] = field(default_factory=dict)
    frozen: list[torch.Tensor] = field(default_factory=list)  # on the CPU, where they can be compared
    own_code: bool = False  # whether PyTorch calls come from the tracer, not from the mod
    num_shaped: int = 0  # symbols made with dimensions
    made: list[weakref.ref[Symbol]] = field(default_factory=list)  # all symbols

    def __post_init__(self) -> None:
        self._leaf_of = {id(leaf): i for i, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)}

    def do(self, name: str, *args: Any) -> Any:
        """Calls a function of `torch_functions` on behalf of a symbol."""
        before, self.own_code = self.own_code, True
        try:
            return getattr(self.functions, name)(self, *args)
        finally:
            self.own_code = before

    def scalar(self, node: Node) -> Symbol:
        """A symbol of rank 0."""
        return Symbol(self, (), lambda _: node, node.dtype)

    def number(self, source: Source) -> Symbol:
        """A captured Python number as a run-time argument."""
        value = self.leaves[source.leaf]
        check_constant(value)
        dtype = torch.float32 if isinstance(value, float) else torch.int64
        return self.scalar(Node("number", (), dtype, source, weak=True))

    def symbol(self, value: Any) -> Symbol:
        """Converts anything that PyTorch would take as an operand."""
        if isinstance(value, Symbol):
            return value
        if isinstance(value, torch.Tensor):
            return self.tensor(value)
        if isinstance(value, (bool, int, float)):
            plain = value if isinstance(value, bool) else (int if isinstance(value, int) else float)(value)
            try:
                check_constant(plain)
            except OverflowError as error:
                raise at_user_line(
                    TraceError, f"{error}, in which a {self.kind} computes", "Use a smaller one: sys.maxsize fits."
                ) from None
            return self.scalar(const(plain))
        if type(value).__module__ == "numpy" and getattr(value, "ndim", 1) == 0:
            return self.symbol(value.item())
        raise at_user_line(
            UnsupportedOpError,
            f"a {type(value).__name__} cannot be an operand in a {self.kind}",
            "Capture it as a torch.Tensor outside the mod.",
        )

    def tensor(self, value: torch.Tensor) -> Symbol:
        """A captured tensor. It is read when the kernel runs."""
        leaf = self._leaf_of.get(id(value))
        if leaf is None and self.reads.entries:  # it is in a large container; it is a leaf of the next trace
            leaf = self._leaf_of[id(value)] = len(self.leaves)
            self.leaves.append(value)
        if leaf is None:
            raise at_user_line(
                TraceError,
                f"the {self.kind} reads a tensor that is in no variable, attribute, list, tuple or dict",
                "Changes of it would go unseen: give it a name outside the mod, `table = ...`, and use that.",
            )
        if value.ndim == 0 and value.device.type == "cpu":
            return self.scalar(Node("number", (), self._widened(value.dtype), Source(leaf)))
        return self._loads(leaf, value, tuple(self._size(Source(leaf, d), n) for d, n in enumerate(value.shape)))

    def freeze(self, value: torch.Tensor) -> Symbol:
        """A tensor on the CPU that the mod makes from numbers."""
        if value.ndim == 0:
            return self.scalar(const(value.item(), self._widened(value.dtype)))
        alike = [k for k, known in enumerate(self.frozen) if known.dtype == value.dtype and torch.equal(known, value)]
        if not alike:
            alike = [len(self.frozen)]
            self.frozen.append(value)
        return self._loads(-1 - alike[0], value, tuple(const(n) for n in value.shape))

    def _loads(self, leaf: int, value: torch.Tensor, shape: tuple[Node, ...]) -> Symbol:
        dtype = self._widened(value.dtype)
        self.tensor_types[leaf] = (value.dtype, value.ndim)
        return Symbol(self, shape, lambda index: Node("load", index, dtype, leaf), dtype, (True,) * value.ndim)

    def _widened(self, dtype: torch.dtype) -> torch.dtype:
        """The type that a mod sees for values stored as `dtype`."""
        if dtype not in (*DTYPES, *FLOAT8):
            raise at_user_line(
                UnsupportedOpError,
                f"a captured tensor of {dtype} cannot be read in a {self.kind}",
                "Convert it outside the mod, e.g. with .float() or .long().",
            )
        return widened(dtype)

    def _size(self, source: Source, size: int) -> Node:
        if source in self.constants:
            return const(size)
        return Node("number", (), torch.int64, source, weak=True)

    def python_int(self, node: Node) -> int:
        """The value of a size. If it is not constant yet, it becomes constant in the next run."""
        if not node.is_const:
            raise Consumed(sources(node))
        return int(node.attr)

    def size_value(self, node: Node) -> int | Symbol:
        """A size as the mod sees it: a number, or a symbol for the size of a captured tensor."""
        return node.attr if node.is_const else self.scalar(node)


def checked_shape(function: Callable[..., Any], *args: Any) -> Any:
    """Calls a function of PyTorch that makes a shape.

    Raises:
        TraceError: PyTorch refuses these sizes.
    """
    try:
        return function(*args)
    except RuntimeError as error:
        raise at_user_line(TraceError, f"{error}", "Check the shapes of the captured tensors.") from None


class Symbol:
    """A lazy tensor inside a traced mod. It behaves like the `torch.Tensor` that the mod would get without tracing.

    Attributes:
        context: the run that it belongs to.
        sizes: one `Node` per dimension.
        dtype: PyTorch's type of the elements.
        guarded: for each dimension, whether an index outside it reads 0 without another check.
    """

    __slots__ = ("__weakref__", "_element", "_known", "context", "dtype", "guarded", "sizes")

    def __init__(
        self,
        context: TraceContext,
        sizes: tuple[Node, ...],
        element: Callable[[tuple[Node, ...]], Node],
        dtype: torch.dtype,
        guarded: tuple[bool, ...] | None = None,
    ) -> None:
        """`element` takes one index node per dimension."""
        self.context = context
        self.sizes = sizes
        self.dtype = dtype
        self.guarded = (False,) * len(sizes) if guarded is None else guarded
        self._known: dict[tuple[Node, ...], Node] = {}
        if sizes:
            context.num_shaped += 1
            if context.num_shaped > _MAX_WAITING:
                element = _settled(element, len(sizes))
        self._element = element
        context.made.append(weakref.ref(self))

    def at(self, index: tuple[Node, ...]) -> Node:
        """The node of one element."""
        node = self._known.get(index)
        if node is None:
            node = self._known[index] = self._element(index)
        return node

    @property
    def rank(self) -> int:
        """Number of dimensions."""
        return len(self.sizes)

    def extents(self) -> list[int]:
        """The sizes as Python numbers. A size that is not constant yet becomes constant in the next run."""
        return [self.context.python_int(n) for n in self.sizes]

    @property
    def node(self) -> Node:
        """The value of a symbol of rank 0."""
        assert not self.sizes
        return self.at(())

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        symbol = next(a for a in (*args, *(kwargs or {}).values()) if isinstance(a, Symbol))
        return symbol.context.do("dispatch", func, args, kwargs or {})

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self.context.do("attribute", self, name)

    def __repr__(self) -> str:
        return f"<traced {self.dtype} of rank {self.rank} in a {self.context.kind}>"

    def __getitem__(self, index: Any) -> Symbol:
        return self.context.do("dispatch", torch.Tensor.__getitem__, (self, index), {})

    def python_value(self, problem: str, remedy: str) -> NoReturn:
        """Refuses to become a Python value. But a captured number becomes a constant."""
        if self.rank == 0 and self.node.weak and (found := sources(self.node)):
            raise Consumed(found)
        operation, text = user_step()
        called = text.partition("(")[0]
        if operation == "CONTAINS_OP":
            problem, remedy = "`in` was applied to a traced value", _IN
        elif operation.startswith("CALL") and called.partition(".")[0] in _OF_CALLS:
            problem, remedy = f"{called}() was applied to a traced value", _OF_CALLS[called.partition(".")[0]]
        raise at_user_line(TraceError, f"{problem} in a {self.context.kind}", remedy)

    def __bool__(self) -> bool:
        self.python_value("the truth of a traced value was asked for", _NO_BRANCH)

    def __index__(self) -> int:
        self.python_value("a traced value was used as a Python integer", _NO_NUMBER)

    __int__ = __index__

    def __float__(self) -> float:
        self.python_value("a traced value was used as a Python float", _NO_NUMBER)

    def __complex__(self) -> complex:
        self.python_value("a traced value was used as a Python number", _NO_NUMBER)

    def __hash__(self) -> int:
        self.python_value("a traced value was used as a dict key or set member", _NO_NUMBER)

    def __array__(self, *_: Any, **__: Any) -> NoReturn:
        self.python_value("a traced value met numpy", _NO_NUMBER)

    def __array_ufunc__(self, ufunc: Any, method: str, *inputs: Any, **options: Any) -> Any:
        """Computes operators with a numpy scalar on the left. Refuses other functions of numpy."""
        name = _NUMPY_TWINS.get(ufunc.__name__, ufunc.__name__)
        row = self.context.functions.ROWS.get(name)
        if row not in (*OPERATORS.values(), *_COMPARISONS) or method != "__call__" or options:
            self._refuse_numpy(ufunc.__name__)
        return self.context.do("elementwise", row, *inputs)

    def __array_function__(self, function: Any, types: Any, args: tuple, kwargs: dict) -> NoReturn:
        """Refuses the functions of numpy."""
        self._refuse_numpy(function.__name__)

    def _refuse_numpy(self, name: str) -> NoReturn:
        twin = name if hasattr(torch, name) else _NUMPY_TWINS.get(name)
        raise at_user_line(
            UnsupportedOpError,
            f"numpy.{name} was applied to a traced value in a {self.context.kind}",
            f"Use torch.{twin}." if twin else "Use PyTorch's functions, or compute it outside the mod.",
        )

    def __len__(self) -> int:
        if not self.sizes:
            self.python_value("len() of a traced number", _NO_NUMBER)
        return self.context.python_int(self.sizes[0])

    def __iter__(self) -> Iterator[Symbol]:
        if not self.sizes:
            self.python_value("a traced value was iterated over", _NO_NUMBER)
        return self.context.do("dispatch", torch.Tensor.__iter__, (self,), {})

    def __contains__(self, _: Any) -> NoReturn:
        self.python_value("`in` was applied to a traced value", _IN)

    def __setitem__(self, *_: Any) -> None:
        self.context.do("refuse_in_place", "__setitem__")

    def __round__(self, digits: int | None = None) -> Symbol:
        return self.context.do("dispatch", torch.round, (self,), {} if digits is None else {"decimals": digits})

    def __matmul__(self, other: Any) -> Symbol:
        return self.context.do("dispatch", torch.matmul, (self, other), {})

    def __rmatmul__(self, other: Any) -> Symbol:
        return self.context.do("dispatch", torch.matmul, (other, self), {})

    def __divmod__(self, other: Any) -> tuple[Symbol, Symbol]:
        return self // other, self % other

    def __pos__(self) -> Symbol:
        return self


def innermost(index: Iterable[Node]) -> int:
    """The innermost loop in which an index changes; 0 if there is none."""
    nodes = topological(*index)
    return max((loop for loops in loops_around(nodes).values() for loop in loops), default=0)


def _settled(element: Callable[[tuple[Node, ...]], Node], rank: int) -> Callable[[tuple[Node, ...]], Node]:
    """Computes an element once, with placeholders for its index. This keeps recursion shallow in long mods."""
    axes = tuple(Node("axis", (), torch.int64, dim) for dim in range(rank))
    body = element(axes)

    def at(index: tuple[Node, ...]) -> Node:
        outer = innermost(index)

        def visit(node: Node, args: tuple[Node, ...]) -> Node:
            if node.op in ("step", "fold"):  # it is now inside the loops of the index
                return Node(node.op, args, node.dtype, (node.attr[0] + outer, *node.attr[1:]))
            return index[node.attr] if node.op == "axis" else remake(node, args)

        return body if index == axes else rewrite(body, visit)

    return at


Symbol.__name__ = "Tensor"  # in Python's own messages: "unsupported operand types: 'Tensor' and 'list'"


def _operator(name: str, reflected: bool) -> Callable:
    def apply(self: Symbol, other: Any) -> Any:
        if not isinstance(other, (Symbol, torch.Tensor, bool, int, float)) and type(other).__module__ != "numpy":
            return NotImplemented
        pair = (other, self) if reflected else (self, other)
        return self.context.do("elementwise", name, *pair)

    return apply


# Python's names of operators with two operands, and their rows of the op table.
OPERATORS = {
    "add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "floordiv": "floor_divide", "mod": "remainder",
    "pow": "pow", "and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "lshift": "bitwise_left_shift",
    "rshift": "bitwise_right_shift",
}  # fmt: skip
_COMPARISONS = ("lt", "le", "gt", "ge", "eq", "ne")
for _name, _op in OPERATORS.items():
    setattr(Symbol, f"__{_name}__", _operator(_op, reflected=False))
    setattr(Symbol, f"__r{_name}__", _operator(_op, reflected=True))
# Functions of numpy that PyTorch has under another name.
_NUMPY_TWINS = {
    "power": "pow",
    "fabs": "abs",
    "cbrt": "pow",
    "rint": "round",
    "invert": "bitwise_not",
    "degrees": "rad2deg",
    "radians": "deg2rad",
    "equal": "eq",
    "left_shift": "bitwise_left_shift",
    "right_shift": "bitwise_right_shift",
}
for _name in _COMPARISONS:
    setattr(Symbol, f"__{_name}__", _operator(_name, reflected=False))
for _name, _op in {"neg": "neg", "abs": "abs", "invert": "bitwise_not"}.items():
    setattr(Symbol, f"__{_name}__", lambda self, _op=_op: self.context.do("elementwise", _op, self))
