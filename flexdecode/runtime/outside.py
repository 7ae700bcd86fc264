"""Runs a function outside of the region that torch.compile traces. Only such regions import this module.

PyTorch's `disable` needs `torch._dynamo`, which takes long to import.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..errors import IN_REGION


@torch.compiler.disable(reason=IN_REGION)
def outside(function: Callable, *arguments: Any, **keywords: Any) -> Any:
    """Calls a function. torch.compile ends its region before it and traces nothing of it."""
    return function(*arguments, **keywords)
