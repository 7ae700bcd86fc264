"""How many programs share the keys of one item, and how many of them run on a multiprocessor at once.

A model of the time of a launch decides. Its numbers were fitted to times on an H200; docs/schedules.md has them, and
shows how far from the best the choices are.
"""

from __future__ import annotations

from typing import NamedTuple

from .device import BYTES_PER_US

MAX_SPLITS = 1024
MAX_WAVES = 4
LAST = 0.2  # where items differ, so much of the time of a longest item is spent in waiting for it, with others gone


class Speeds(NamedTuple):
    """What the model knows about kernels, most of it by programs per multiprocessor.

    Attributes:
        reached: the share of the bandwidth that a full wave reaches.
        wave_us: microseconds to start and to end the programs of a wave.
        unfilled: what a last wave that is not full costs, over its bytes. Other programs end later than it begins, and
            leave it the bandwidth.
        alone, together: what a multiprocessor can read with one program and with more, over an equal share of the
            bandwidth.
        combine_us: what merging costs.
    """

    reached: dict[int, float]
    wave_us: dict[int, float]
    unfilled: dict[int, float]
    alone: float
    together: float
    combine_us: float


HALF_SPEEDS = Speeds(
    reached={1: 0.985, 2: 0.985, 3: 0.97, 4: 0.92},
    wave_us={1: 1.3, 2: 1.9, 3: 2.5, 4: 1.8},
    unfilled={1: 0.55, 2: 0.2, 3: 0.2, 4: 0.2},
    alone=1.15,
    together=1.05,
    combine_us=1.0,
)
# A product of float32 numbers is three products, so a program alone is slower than the memory.
FLOAT32_SPEEDS = Speeds(
    reached={1: 0.805, 2: 0.913, 3: 0.905},
    wave_us={1: 4.3, 2: 5.0, 3: 7.4},
    unfilled={1: 0.88, 2: 0.66, 3: 0.3},
    alone=0.86,
    together=1.0,
    combine_us=1.9,
)


class Work(NamedTuple):
    """What a launch has to do.

    Attributes:
        num_items: (row tile of a sequence, KV head) pairs.
        num_blocks: the blocks of the longest item, which cannot be divided.
        total_bytes: of all keys and values that are read.
        num_sms: multiprocessors of the device.
        waits: whether programs wait for memory in every step, so that a multiprocessor needs two of them.
        items_differ: whether items may have fewer keys than the longest one.
        mean_share: what an item has on average of the bytes of the longest one. A program that ends early makes room
            for one of a later wave.
        long_waves: whether several waves of fewer programs than a multiprocessor can have are worth trying.
        speeds: of the kernel.
    """

    num_items: int
    num_blocks: int
    total_bytes: int
    num_sms: int
    waits: bool = False
    items_differ: bool = False
    mean_share: float = 1.0
    long_waves: bool = False
    speeds: Speeds = HALF_SPEEDS


class Division(NamedTuple):
    """How a launch is divided.

    Attributes:
        num_splits: programs per item.
        per_sm: programs that run on one multiprocessor at once.
    """

    num_splits: int
    per_sm: int


def microseconds(work: Work, division: Division) -> float:
    """The modelled time of a launch.

    In one wave, the multiprocessors with the most programs end last. With more waves, one program starts where another
    one ends.
    """
    splits, per_sm = division
    speeds = work.speeds
    programs, places = work.num_items * splits, per_sm * work.num_sms
    waves = -(-programs // places)
    time = work.total_bytes / BYTES_PER_US
    if waves > 1:
        time *= work.mean_share
        time *= (1 + speeds.unfilled[per_sm] * (waves * places / programs - 1)) / speeds.reached[per_sm]
        if work.items_differ:  # programs on one multiprocessor share what it can read
            time += LAST * per_sm * work.num_sms * work.total_bytes / programs / BYTES_PER_US
    elif work.waits:
        time /= speeds.reached[per_sm] * programs / max(places, 2 * work.num_sms)
    else:
        most = -(-programs // work.num_sms)  # on one multiprocessor
        evenly = programs / (most * work.num_sms)
        time /= min(speeds.reached[per_sm], (speeds.alone if per_sm == 1 else speeds.together) * evenly)
    return time + speeds.wave_us[per_sm] * waves + (speeds.combine_us if splits > 1 else 0.0)


def divide(work: Work, fit: int, num_splits: int | None = None) -> Division:
    """The division with the shortest modelled time.

    Args:
        work: of the launch.
        fit: how many programs a multiprocessor can have at once.
        num_splits: if they are given.
    """
    items = work.num_items
    if items == 0:
        return Division(num_splits or 1, 1)
    tried = []
    for per_sm in range(1, fit + 1):
        places = per_sm * work.num_sms
        # More programs are better until a wave is full. So the best number fills a wave, or is the largest possible.
        most = max(1, min(work.num_blocks, MAX_SPLITS, MAX_WAVES * places // items))
        filling = {1, most, *[min(max(1, waves * places // items), most) for waves in range(1, MAX_WAVES)]}
        for splits in {num_splits} if num_splits else sorted(filling):
            is_needed = per_sm == 1 or items * splits > places - work.num_sms
            is_enough = per_sm == fit or items * splits <= places or work.long_waves
            if is_needed and is_enough:
                tried.append(Division(splits, per_sm))
    return min(tried, key=lambda division: microseconds(work, division))
