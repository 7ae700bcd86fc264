"""The schedules that `options.autotune` tries, and which calls share what was found."""

from __future__ import annotations

from dataclasses import replace
from typing import NamedTuple

import torch

from .columns import next_power_of_2
from .device import DeviceFacts
from .inputs import DecodeOptions, Inputs, Sizes
from .schedule import Schedule, Scheduler, most_splits
from .splits import MAX_SPLITS
from .tiles import Loads

MAX_BLOCK_N = 256  # more keys per step take long to compile, and spill registers
SHORTEST_BLOCK = 64  # keys of the smallest share that is worth a program


class Choice(NamedTuple):
    """Fields of `DecodeOptions` that a measured schedule sets; None leaves one to the scheduler."""

    num_splits: int | None = None
    schedule: str | None = None
    block_n: int | None = None
    num_warps: int | None = None
    num_stages: int | None = None

    def applied_to(self, options: DecodeOptions) -> DecodeOptions:
        """The options with this choice."""
        return replace(options, **{name: x for name, x in self._asdict().items() if x is not None})

    def __str__(self) -> str:
        given = [f"{name}={x!r}" for name, x in self._asdict().items() if x is not None]
        return ", ".join(given) or "the default"


DEFAULT = Choice()


def class_of(sizes: Sizes, packed: bool) -> tuple[int, ...]:
    """What calls with the same best schedule have in common in their sizes.

    A cache that grows has a new length at each token, each prompt has another number of tokens, and packed queries have
    another number of sequences at each step. So these count as the next power of two.
    """
    batch, num_kv_heads, *others = sizes
    rounded = [next_power_of_2(number or 0) for number in others]
    return next_power_of_2(batch) if packed else batch, num_kv_heads, *rounded


def fit(choice: Choice, num_items: int, scheduler: Scheduler, sizes: Sizes) -> Choice:
    """A choice for a call of the same class: as many programs as in the call that was measured.

    Args:
        choice: what was found.
        num_items: `Scheduler.busy_items` of the call that was measured.
        scheduler: of the call.
        sizes: of the call.
    """
    if choice.num_splits is None:
        return choice
    items, blocks = max(scheduler.busy_items(sizes), 1), -(-sizes.max_kv_len // SHORTEST_BLOCK)
    if choice.schedule == "balanced":
        return choice._replace(num_splits=max(1, min(choice.num_splits, items * blocks)))
    return choice._replace(num_splits=max(1, min(choice.num_splits * max(num_items, 1) // items, blocks)))


def with_full_cache(inputs: Inputs) -> Inputs:
    """The call with lengths in the same proportion, of which the longest one fills the cache.

    A schedule serves all lengths that the cache can hold, and the first call often has few keys. What lies past the
    given lengths belongs to the tensors, so it can be read. It may be anything, so the result is of no use. Pages are
    taken in order, because those past the given lengths may be no pages. Where `kv_starts` or `q_offset` say which
    keys attend, lengths stay as they are.
    """
    lens, table, capacity = inputs.kv_lens, inputs.page_table, inputs.capacity
    if not isinstance(lens, torch.Tensor) or inputs.kv_starts is not None or inputs.q_offset is not None:
        return inputs
    longest = int(lens.max())
    if longest >= capacity:
        return inputs
    full = lens.clamp(min=0).double() * (capacity / longest) if longest > 0 else torch.full_like(lens, capacity)
    inputs = inputs._replace(kv_lens=full.round().clamp(max=capacity).to(lens.dtype))
    if table is None:
        return inputs
    pages = torch.arange(table.numel(), device=table.device) % inputs.key.shape[0]
    return inputs._replace(page_table=pages.view(table.shape).to(table.dtype))


class Space:
    """The schedules near another one. What the caller chose stays as it is."""

    def __init__(self, scheduler: Scheduler, sizes: Sizes) -> None:
        """`scheduler`: of the call as the caller gave it."""
        self.sizes = sizes
        self.options: DecodeOptions = scheduler.options
        self.facts: DeviceFacts = scheduler.facts
        self.items = max(scheduler.busy_items(sizes), 1)
        self.v_head_dim = scheduler.signature.v_head_dim
        self.may_balance = (scheduler.lengths_differ or scheduler.bounds_differ) and sizes.batch > 1

    def divisions(self, at: Choice, schedule: Schedule) -> list[Choice]:
        """Other numbers of programs, and the other way to divide the work.

        Splits fill one wave of 1, 2, 3 or 4 programs per multiprocessor. How many of them run at once is part of the
        tiles, which the scheduler chooses for them.

        Args:
            at: the choice to begin from.
            schedule: what it gives.
        """
        if self.options.num_splits is not None:
            return []
        sms, now = self.facts.num_sms, schedule.num_splits
        free = self.options.schedule is None
        if schedule.tiles.balanced:
            other = [at._replace(schedule="split", num_splits=None)] * free
            workers = [n for n in (sms, 2 * sms, 3 * sms) if n != now]
            return other + [at._replace(schedule="balanced", num_splits=n) for n in workers]
        other = [at._replace(schedule="balanced", num_splits=None)] * (free and self.may_balance)
        in_workspace = most_splits(schedule.num_items, schedule.tiles.block_m, self.v_head_dim)
        most = min(-(-self.sizes.max_kv_len // SHORTEST_BLOCK), MAX_SPLITS, in_workspace)
        waves = [programs * sms // self.items for programs in (1, 2, 3, 4)]
        tried = {max(1, min(splits, most)) for splits in (1, now // 2, *waves)} - {now}
        return [at._replace(num_splits=splits) for splits in sorted(tried)] + other

    def neighbours(self, at: Choice, schedule: Schedule) -> list[Choice]:
        """The next smaller and the next larger number of programs, divided in the same way."""
        tried = self.divisions(at, schedule)
        numbers = [choice.num_splits for choice in tried if choice.num_splits is not None]
        fewer = [n for n in numbers if n < schedule.num_splits]
        more = [n for n in numbers if n > schedule.num_splits]
        return [at._replace(num_splits=n) for n in (*fewer[-1:], *more[:1])]

    def block_n(self, at: Choice, schedule: Schedule) -> list[Choice]:
        """Half and twice the keys per step. The scheduler chooses the stages for them."""
        now = schedule.tiles.block_n
        tried = [n for n in (now // 2, 2 * now) if 16 <= n <= MAX_BLOCK_N]
        return [at._replace(block_n=n) for n in tried] * self._is_free("block_n", schedule)

    def num_warps(self, at: Choice, schedule: Schedule) -> list[Choice]:
        """Four warps or eight."""
        tried = [n for n in (4, 8) if n != schedule.tiles.num_warps]
        return [at._replace(num_warps=n) for n in tried] * self._is_free("num_warps", schedule)

    def num_stages(self, at: Choice, schedule: Schedule) -> list[Choice]:
        """A pipeline that is a stage shorter or longer. With one stage, nothing is loaded ahead."""
        now = schedule.tiles.num_stages
        tried = [n for n in (now - 1, now + 1) if n > 1]
        return [at._replace(num_stages=n) for n in tried] * self._is_free("num_stages", schedule)

    def _is_free(self, name: str, schedule: Schedule) -> bool:
        """Whether an option can be varied. The kernel for latents has fixed tiles.

        LLVM ends the whole process where it compiles some tiles for an AMD GPU (block_n 128 and D 128 for gfx942, in
        Triton 3.9). So there only tiles that a default schedule has are tried.
        """
        is_free = getattr(self.options, name) is None and self.facts.backend != "hip"
        return is_free and schedule.tiles.loads is not Loads.LATENTS
