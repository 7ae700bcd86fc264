"""Recognises a call whose arguments have the layouts of an earlier one, faster than its layouts are read."""

from __future__ import annotations

from collections.abc import Callable
from operator import itemgetter
from typing import Any

import torch

from ..call.inputs import Inputs
from ..frontend.captures import same_layouts
from .identity import Mod
from .plan import Plan

# Places of the tensors whose alignment matters to a plan.
_ALIGNED = [Inputs._fields.index(name) for name in ("query", "key", "value", "out")]
_VALUES = ("kv_lens", "max_q_len")  # numbers on whose values a plan depends


class Recent:
    """An earlier call and its plan.

    Attributes:
        plan: of the call.
        score_proofs, mask_proofs: the values that its proofs use.
        tensors: gives the tensors.
        same: whether tensors have the layouts of those of the call.
        numbers: places and values of numbers on whose value the plan depends.
        shares: whether values begin where keys do.
    """

    def __init__(
        self, plan: Plan, inputs: Inputs, proofs: tuple, same: Callable[..., bool], tensors: list[int]
    ) -> None:
        """`tensors`: their places among the inputs. The rest is as in the class."""
        self.plan, self.same = plan, same
        self.score_proofs, self.mask_proofs = proofs
        self.tensors = itemgetter(*tensors)
        self.numbers = [(i, x) for i, x in enumerate(inputs) if isinstance(x, int) and Inputs._fields[i] in _VALUES]
        self.out_given = inputs.out is not None
        self.shares = inputs.key.data_ptr() == inputs.value.data_ptr()

    @staticmethod
    def of(plan: Plan, inputs: Inputs, score: Mod, mask: Mod) -> Recent | None:
        """Remembers a call; None if its layouts have to be read each time."""
        tensors = [i for i, x in enumerate(inputs) if isinstance(x, torch.Tensor)]
        given: list[Any] = [inputs[i] for i in tensors]
        same = same_layouts(given)
        if same is None or not same(*given) or any(inputs[i].data_ptr() & 15 for i in _ALIGNED if i in tensors):  # type: ignore[union-attr]
            return None
        return Recent(plan, inputs, (score.proof_values, mask.proof_values), same, tensors)

    def fits(self, inputs: Inputs, score: Mod, mask: Mod) -> bool:
        """Whether the plan is that of another call with the same marks of its mods and the same `kinds_of`.

        Raises:
            RuntimeError: a tensor has no memory that could be read.
        """
        if not self.same(*self.tensors(inputs)):
            return False
        key, value = inputs[1].data_ptr(), inputs[2].data_ptr()
        places = inputs[0].data_ptr() | key | value
        if self.out_given:
            places |= inputs[-1].data_ptr()  # type: ignore[union-attr]
        if places & 15 or (key == value) is not self.shares:
            return False
        for place, number in self.numbers:
            if inputs[place] != number:
                return False
        return score.proof_values == self.score_proofs and mask.proof_values == self.mask_proofs


def kinds_of(inputs: Inputs) -> tuple:
    """Which arguments there are, and of which types."""
    (
        _, _, _, kv_lens, q_lens, q_offset, page_table, k_scale, v_scale, sinks, cu_seqlens_q, cu_seqlens_k, kv_starts,
        kv_offset, max_q_len, scale, out,
    ) = inputs  # fmt: skip
    if (
        q_lens is q_offset is page_table is k_scale is v_scale is sinks is cu_seqlens_q is cu_seqlens_k is kv_starts
        is kv_offset is max_q_len is scale is None
    ):  # fmt: skip
        return kv_lens.__class__, out.__class__
    return (*map(type, inputs),)
