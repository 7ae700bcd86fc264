"""The table that maps names of PyTorch's functions, methods and attributes to what they do with symbols."""

from __future__ import annotations

import difflib
import functools
from collections.abc import Callable
from typing import Any, NoReturn

import torch

from ..errors import UnsupportedOpError, at_user_line
from .graph import topological
from .ops import GROUPS as GROUPS_OF_ROWS
from .ops import OPS
from .symbol import Symbol, TraceContext

Handler = Callable[..., Any]

HANDLERS: dict[str, Handler] = {}
# The heading under which the docs list a name, if its module does not decide it; None for names that are only refused.
GROUPS: dict[str, str | None] = {}
_GROUPS_OF_MODULES = {
    "activations": "Activation functions",
    "factories": "Factories",
    "joins": "Joining tensors",
    "reductions": "Reductions",
    "torch_functions": "Types and attributes",
    "views": "Views and indexing",
}

# The rows of the op table by their names in PyTorch.
ROWS = {name: op.name for op in OPS.values() for name in (op.name, *op.names)}
ROWS |= {"gt": "gt", "greater": "gt", "ge": "ge", "greater_equal": "ge"}
GROUPS |= {name: GROUPS_OF_ROWS.get(row, GROUPS_OF_ROWS["lt"]) for name, row in ROWS.items()}


def handles(*names: str) -> Callable[[Handler], Handler]:
    """Registers a function under PyTorch's names."""

    def register(handler: Handler) -> Handler:
        HANDLERS.update(dict.fromkeys(names, handler))
        return handler

    return register


def of_symbol(*names: str) -> Callable[[Handler], Handler]:
    """Registers a function whose first operand is a `Symbol`. It takes no context, because the symbol has it."""

    def register(function: Handler) -> Handler:
        @functools.wraps(function)
        def handler(context: TraceContext, x: Any, *args: Any, **kwargs: Any) -> Any:
            return function(context.symbol(x), *args, **kwargs)

        handles(*names)(handler)
        return function

    return register


def handlers_of(group: str | None) -> Callable[..., Callable[[Handler], Handler]]:
    """A decorator like `handles`, for functions that the docs list in one group."""

    def in_group(*names: str) -> Callable[[Handler], Handler]:
        GROUPS.update(dict.fromkeys(names, group))
        return handles(*names)

    return in_group


def group_of(name: str) -> str | None:
    """The heading under which the docs list a name; None for a name that is only refused."""
    if name in GROUPS:
        return GROUPS[name]
    return _GROUPS_OF_MODULES.get(HANDLERS[name].__module__.rpartition(".")[2], "Other")


def spelled(name: str) -> str | None:
    """How a user writes an operation, for example `torch.special.entr`; None if PyTorch does not have the name."""
    for space in ("special", "linalg"):
        if hasattr(getattr(torch, space), short := name.removeprefix(f"{space}_")) and short != name:
            return f"torch.{space}.{short}"
    spaces = {"torch": torch, "torch.Tensor": torch.Tensor, "torch.nn.functional": torch.nn.functional,
              "torch.special": torch.special, "torch.linalg": torch.linalg}  # fmt: skip
    return next((f"{space}.{name}" for space, module in spaces.items() if hasattr(module, name)), None)


def nearest(name: str) -> str | None:
    """The supported operation whose name is most similar to `name`, as a user writes it."""
    known: dict[str, str] = {}
    for other in (*ROWS, *HANDLERS):
        if group_of(other) and (text := spelled(other)):
            known.setdefault(text.rpartition(".")[2], text)
    found = difflib.get_close_matches(name.removeprefix("special_").removeprefix("linalg_"), known, n=1, cutoff=0.85)
    return known[found[0]] if found else None


_RANDOM = {
    "rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like", "bernoulli", "multinomial",
    "normal", "poisson", "binomial", "dropout", "dropout1d", "dropout2d", "dropout3d", "alpha_dropout",
    "feature_alpha_dropout", "feature_dropout", "gumbel_softmax",
}  # fmt: skip


def refuse(context: TraceContext, name: str) -> NoReturn:
    """Raises the error for an unsupported operation."""
    remedy = (
        "Write it with supported operations (the page Operations of the docs lists them), or compute it outside the "
        "mod and capture the result as a tensor."
    )
    if name in _RANDOM:
        remedy = "A mod has no random numbers: draw them outside the mod, and capture them as a tensor."
    text = spelled(name) or f"torch.{name}"
    raise at_user_line(UnsupportedOpError, f"{text} is not supported in {context.kind}", remedy)


def refuse_score(symbol: Symbol, name: str) -> None:
    """Raises the error for a function of a whole row, if it is given the score, which is one number."""
    if symbol.rank == 0 and any(node.op == "score" for node in topological(symbol.node)):
        raise at_user_line(
            UnsupportedOpError,
            f"torch.{name} of the score in a {symbol.context.kind}",
            "A mod sees one pair of query and key: there is no row of scores to reduce. The softmax, which subtracts "
            "the maximum of the row, comes after the mod.",
        )


def refuse_in_place(context: TraceContext, name: str) -> NoReturn:
    """Raises the error for a write."""
    raise at_user_line(
        UnsupportedOpError,
        f"{name} writes in place, which a {context.kind} must not do",
        "Use the operation that returns a new value (x = x + y, torch.where for a masked write).",
    )
