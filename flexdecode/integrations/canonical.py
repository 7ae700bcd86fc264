"""Makes the canonical text of a mod from the operations that `region` saw. It runs while a region is compiled."""

from __future__ import annotations

from typing import Any, NamedTuple, NoReturn

import torch

from ..errors import TraceError, is_user_file, lines, user_line
from ..frontend import torch_functions
from ..frontend.captures import Reads
from ..frontend.graph import Graph, Source
from ..frontend.parse import write_graph
from ..frontend.symbol import Consumed, TraceContext
from ..frontend.trace import run_mod

UNKNOWN_SIZE = 7919  # stands for a size that is not known when the region is compiled; nothing may depend on it
Operand = tuple[str, Any]  # how an operand was written: its kind, and a number or a value


class Recording(NamedTuple):
    """What a mod did.

    Attributes:
        kind: `score_mod` or `mask_mod`.
        name: of the mod, for messages.
        steps: each operation: a function of PyTorch, its operands, its keyword arguments, and the user's line.
        result: the operand that it returns.
        num_ints, num_floats: captured numbers.
        tensors: dtype, shape and kind of device of each captured tensor; a size is None if it is not known.
        device: of the query.
        constants: values of sizes and integers that have to be known, with their leaf and dimension.

    An operand is the value of a parameter or an earlier step (`v`), a tensor (`t`), an integer (`i`), a float (`f`), a
    sequence (`l`), a slice (`s`), or a constant (`c`). The leaves are the integers, the floats, and the tensors.
    """

    kind: str
    name: str
    steps: tuple
    result: Operand
    num_ints: int
    num_floats: int
    tensors: tuple
    device: torch.device
    constants: tuple


def place_of() -> str:
    """The user's line that is being compiled, as `file:line, in function: text`."""
    for frame in reversed(torch._guards.TracingContext.extract_stack()):
        if is_user_file(frame.filename):
            where = f"{frame.filename}:{frame.lineno}, in {frame.name}"
            return f"{where}: {frame.line}" if frame.line else where
    return user_line()  # torch.export runs the mod as it is


# Methods that give a Python value of a tensor, and those that give what is known without its values.
_READS = ("item", "tolist", "numpy", "__bool__", "__int__", "__float__", "__complex__", "__index__", "__array__")
_RANDOM = ("rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "poisson", "empty")
_METADATA = (
    "dim", "ndimension", "size", "numel", "nelement", "stride", "element_size", "is_floating_point", "is_complex",
    "is_signed", "is_contiguous", "get_device", "storage_offset", "__len__", "is_same_size",
)  # fmt: skip
_NOT_IN_PLACE = ("__invert__", "__int__", "__index__", "__iter__", "__init__")
_IN_PLACE_OPERATORS = (
    "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "iand", "ior", "ixor", "ilshift", "irshift",
    "imatmul", "setitem", "delitem",
)  # fmt: skip
_REASONS = {
    "read": (
        "the value of a tensor was read in a {kind} (.{name}())",
        "Use the tensor itself, and torch.where for `if`: it is read afresh at every call. A Python number may be "
        "captured outside the mod.",
    ),
    "write": (
        "{name} writes in place, which a {kind} must not do",
        "Use the operation that returns a new value (x = x + y, torch.where for a masked write).",
    ),
    "unseen": (
        "the {kind} uses a value that was computed in a way which torch.compile does not show",
        "Use functions of torch and operators: torch.abs(x) for abs(x), torch.maximum for max(), torch.transpose for "
        "x.T, x[0] and x[1] for iterating over x. A tensor that it captures must have values.",
    ),
    "random": (
        "{name} gives other numbers at each call, and a {kind} is run only once, when it is compiled",
        "Draw the numbers outside of the mod, and capture the tensor.",
    ),
    "grad": (
        "`query`, `key` or `value` requires grad, but {kind} is forward only",
        "Run the compiled model under torch.no_grad(), or detach them.",
    ),
    "captured": (
        "a tensor that the {kind} captures requires grad, but flexdecode is forward only",
        "Run the compiled model under torch.no_grad(), or capture the tensor's .detach().",
    ),
    "training": (
        "`query`, `key` or `value` requires grad, but flexdecode's {kind} is forward only",
        "Call it under torch.no_grad() or torch.inference_mode(), or detach them. To train, use "
        "torch.nn.attention.flex_attention.flex_attention.",
    ),
}


def what_it_does(function: Any) -> str:
    """What a function of PyTorch or Python does, as far as a recorder has to know it."""
    name = getattr(function, "__name__", "")
    if name == "__get__":
        return "attribute"
    if name in ("__getitem__", "getitem"):
        return "index"
    if name in _READS:
        return "read"
    if name in _RANDOM:
        return "random"
    if name in _METADATA:
        return "metadata"
    if getattr(function, "__module__", None) == "_operator":
        return "write" if name in _IN_PLACE_OPERATORS else "call"
    in_place = name.endswith("_") and not name.endswith("__")
    in_place |= name.startswith("__i") and name not in _NOT_IN_PLACE
    return "write" if in_place or name in ("__setitem__", "__delitem__", "__set__") else "call"


def refuse(kind: str, why: str, name: str) -> NoReturn:
    """Refuses something at the line that is being compiled.

    Raises:
        TraceError: always. For gradients it is a ValueError, as without compilation.
    """
    problem, remedy = (text.format(kind=kind, name=name) for text in _REASONS[why])
    error = ValueError if why in ("grad", "captured", "training") else TraceError
    raise error(f"{problem}\n  {place_of()}\n  {remedy}")


def refuse_argument(problem: str) -> NoReturn:
    """Refuses an argument of a call that is being compiled, as a call outside does.

    Raises:
        TypeError: always.
    """
    raise TypeError(f"{problem}\n  {place_of()}")


def canonical_text(*recorded: Any) -> tuple[str, tuple]:
    """The canonical text of a recorded mod, as `write_graph` gives it; takes the fields of a `Recording`.

    Returns:
        The text, and the sizes and integers whose values it depends on, as `(leaf, dim)`. If there are any that
        `constants` lacks, the text is empty.

    Raises:
        TraceError: the mod does something that a mod cannot do; the message has the user's line.
    """
    recording = Recording(*recorded)
    given = {Source(leaf, dim): value for leaf, dim, value in recording.constants}
    leaves: list = [given.get(Source(i), UNKNOWN_SIZE) for i in range(recording.num_ints)]
    leaves += [0.5] * recording.num_floats
    for at, (dtype, shape, device_type) in enumerate(recording.tensors, start=len(leaves)):
        known = [given.get(Source(at, d), UNKNOWN_SIZE) if n is None else n for d, n in enumerate(shape)]
        scalar = not known and device_type == "cpu"
        leaves.append(torch.zeros((), dtype=dtype) if scalar else torch.empty(known, dtype=dtype, device="meta"))
    context = TraceContext(
        recording.kind, leaves, recording.device, frozenset(given), torch_functions, Reads(recording.kind)
    )
    try:
        output = run_mod(_Replay(recording, context), context)
    except Consumed as consumed:
        return "", tuple((leaf, dim) for leaf, dim in sorted(consumed.sources))
    if context.frozen:
        raise TraceError(
            f"the {recording.kind} makes a table of numbers in a compiled region\n  Make the tensor outside the mod."
        )
    return write_graph(Graph.build(output, context.tensor_types, [])), ()


class _Replay:
    """The recorded steps as a mod."""

    def __init__(self, recording: Recording, context: TraceContext) -> None:
        self.recording = recording
        self.context = context
        self.__name__ = recording.name
        self.values: list = []

    def __call__(self, *parameters: Any) -> Any:
        self.values = [*parameters]
        for function, operands, named, line in self.recording.steps:
            with lines.at(line):
                arguments = [self.value(x) for x in operands]
                if function is None:  # an element of a tuple that an earlier step gave
                    made = arguments[0][arguments[1]]
                elif getattr(function, "__module__", None) == "_operator":  # as torch.export sees operators
                    made = function(*arguments)
                else:
                    keywords = {name: self.value(x) for name, x in named}
                    made = self.context.do("dispatch", function, tuple(arguments), keywords)
            self.values.append(made)
        return self.value(self.recording.result)

    def value(self, operand: Operand) -> Any:
        """What an operand stands for."""
        kind, what = operand
        recording, leaves = self.recording, self.context.leaves
        if kind == "v":
            return self.values[what]
        if kind == "t":
            return leaves[recording.num_ints + recording.num_floats + what]
        if kind in ("i", "f"):
            leaf = what if kind == "i" else recording.num_ints + what
            return leaves[leaf] if Source(leaf) in self.context.constants else self.context.number(Source(leaf))
        if kind == "l":
            return tuple(self.value(x) for x in what)
        if kind == "s":
            return slice(*[self.value(x) for x in what])
        return what
