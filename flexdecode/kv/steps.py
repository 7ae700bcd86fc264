"""A step of a batch: which tokens each sequence takes, known to the host and to the device."""

from __future__ import annotations

import itertools

import torch

from ..analysis.analyze import MAX_KV_LEN


def send(numbers: list[int], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
    """Makes a tensor of numbers on a device, without waiting for the device."""
    pinned = torch.tensor(numbers, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return pinned.to(device, non_blocking=True)


def _part(batch: int) -> int:
    """Where the second of the tensors of a step begins."""
    return -(-batch // 4) * 4


class Step:
    """Where the new tokens of the sequences go. The tensors are int32 and stay where they are.

    Attributes:
        starts, ends: `[B]`, the positions of the new tokens of each sequence.
        cu_seqlens: `[B + 1]`, where each sequence begins among the packed new tokens, and how many there are.
        counts: tokens of each sequence, on the host; None if nothing is reserved.
    """

    def __init__(self, batch: int, device: torch.device) -> None:
        numbers = torch.zeros(2 * _part(batch) + batch + 1, dtype=torch.int32, device=device)
        self.__setstate__((batch, numbers, None))

    def __getstate__(self) -> tuple[int, torch.Tensor, list[int] | None]:
        return len(self.ends), self._all, self.counts

    def __setstate__(self, state: tuple[int, torch.Tensor, list[int] | None]) -> None:
        """Makes the three views anew: pickle would make a copy of each, which no step fills."""
        batch, self._all, self.counts = state
        # The three lie in one tensor, which one copy fills. Each begins at a multiple of 16 bytes.
        part = _part(batch)
        self.ends, self.starts = (self._all[at : at + batch] for at in (0, part))
        self.cu_seqlens = self._all[2 * part :]

    def begin(self, lengths: list[int], counts: list[int]) -> None:
        """Sends a step to the device, in one copy; `lengths` are those after the step."""
        padding = [0] * (_part(len(lengths)) - len(lengths))
        starts = [length - count for length, count in zip(lengths, counts, strict=True)]
        numbers = [*lengths, *padding, *starts, *padding, *itertools.accumulate(counts, initial=0)]
        pinned = torch.tensor(numbers, dtype=torch.int32, device="cpu", pin_memory=self._all.is_cuda)
        self._all.copy_(pinned, non_blocking=True)
        self.counts = counts

    def to(self, device: torch.device) -> Step:
        """The same step on another device."""
        moved = Step.__new__(Step)
        moved.__setstate__((len(self.ends), self._all.to(device, copy=True), self.counts))
        return moved

    def end(self) -> None:
        """Forgets the step: an append by the device writes nothing until the next one."""
        self.starts.copy_(self.ends)
        self.counts = None


def check_tokens(offered: int, counts: list[int], packed: bool, sequence: int | None = None) -> None:
    """Refuses fewer new tokens than a step has.

    Args:
        offered: the tokens that there are: of each sequence, or packed.
        counts: tokens that each sequence takes.
        packed: whether the tokens of all sequences follow one another.
        sequence: the only sequence that they are of.

    Raises:
        ValueError: there are too few.
    """
    if sequence is not None:
        needed, what = counts[sequence], f"sequence {sequence} takes"
    elif packed:
        needed, what = sum(counts), "the sequences take together"
    else:
        needed, what = max(counts), "a sequence takes"
    if offered < needed:
        raise ValueError(f"`k` has T = {offered} tokens, but {what} {needed}")


def check_capacity(max_kv_len: int) -> None:
    """Refuses sequences whose positions would not fit into the kernels' numbers.

    Raises:
        ValueError: they are too long.
    """
    if max_kv_len >= MAX_KV_LEN:
        raise ValueError(f"a sequence must have fewer than {MAX_KV_LEN} tokens, got room for {max_kv_len}")
