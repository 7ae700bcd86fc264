"""What a mod is called with, and the errors for what cannot be called with it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from .captures import uncompiled
from .graph import INDEX_NAMES

PARAMETERS = {"score_mod": ("score", *INDEX_NAMES), "mask_mod": INDEX_NAMES}
_OTHER = {"score_mod": "mask_mod", "mask_mod": "score_mod"}
_IN_WORDS = {"score_mod": "five", "mask_mod": "four"}
_INDICES_OF_RANK = {1: "kv_idx", 2: "q_idx, kv_idx", 3: "h, q_idx, kv_idx", 4: "b, h, q_idx, kv_idx"}


def not_callable(kind: str, mod: Any) -> TypeError:
    """The error for something that is no function."""
    problem = f"`{kind}` must be a callable or None, got {type(mod).__name__}"
    if hasattr(mod, "kv_num_blocks"):
        problem += "; pass it as `block_mask`"
    elif isinstance(mod, torch.Tensor) and mod.ndim in _INDICES_OF_RANK:
        name = "mask" if kind == "mask_mod" else "bias"
        read = f"{name}[{_INDICES_OF_RANK[mod.ndim]}]"
        body = read if kind == "mask_mod" else f"score + {read}"
        problem += f"\n  Capture it: `{kind}=lambda {', '.join(PARAMETERS[kind])}: {body}`"
    return TypeError(problem)


def check_parameters(mod: Callable, kind: str) -> None:
    """Refuses what cannot be called with the parameters of a mod.

    Raises:
        TypeError: the mod is not callable, or takes other parameters.
    """
    if not callable(mod):
        raise not_callable(kind, mod)
    names = ", ".join(PARAMETERS[kind])
    name = getattr(mod, "__name__", type(mod).__name__)
    called = uncompiled(mod) or mod
    if isinstance(called, torch.nn.Module) and type(called).__call__ is torch.nn.Module.__call__:
        called = called.forward
    remedy = f"Call it in a function that does: `def my_{kind}({names}): ...`"
    try:
        signature = inspect.signature(called)
        signature.bind(*PARAMETERS[kind])
        return
    except ValueError:  # a builtin without a signature
        if not _is_library(called):
            return  # the call itself will show whether it works
        problem = f"{name!r} is a function of numbers"
    except TypeError:
        problem = f"{name!r} has the signature {signature}"
        other = _OTHER[kind]
        if not _is_library(called) and _takes(signature, len(PARAMETERS[other])):
            problem = f"{name!r} has the {_IN_WORDS[other]} parameters of a {other}: {signature}"
            remedy = f"Pass it as `{other}=`."
    raise TypeError(
        f"`{kind}` must take {len(PARAMETERS[kind])} positional parameters ({names}), but {problem}\n  {remedy}"
    )


def _takes(signature: inspect.Signature, count: int) -> bool:
    """Whether a signature can be called with so many positional arguments."""
    try:
        signature.bind(*range(count))
    except TypeError:
        return False
    return True


def _is_library(function: Any) -> bool:
    """Whether a callable without a signature is one of PyTorch, numpy or Python."""
    module = str(getattr(function, "__module__", None) or type(function).__module__)
    return module.partition(".")[0] in ("torch", "numpy", "math", "builtins", "_operator")
