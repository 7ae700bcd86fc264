"""`options.autotune`: measures schedules of a call on the GPU and remembers the fastest."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from ..analysis.proven import ProvenMods
from ..call.candidates import DEFAULT, Choice, Space, class_of, fit
from ..call.device import DeviceFacts
from ..call.inputs import DecodeOptions, Inputs, Sizes
from ..call.schedule import Schedule, Scheduler
from ..call.signature import Signature
from ..codegen.tuned import Tuned, find_tuned, keep_tuned, tuned_identity
from ..errors import CompileError
from ..memos import Bounded
from ..switch import is_forbidden
from .launch import TritonLauncher
from .timing import Run, time_launches

MARGIN = 0.02  # a schedule takes the place of another one if it is faster by more than this share: the rest is noise
ROUNDS, LAST_ROUNDS = 25, 75  # the most measurements of each schedule while they are tried, and of the last two
_logger = logging.getLogger("flexdecode")
_measuring = threading.RLock()  # two measurements at a time would disturb one another


class Trial(NamedTuple):
    """A schedule that can be measured.

    Attributes:
        schedule: of its first launch.
        run: launches the call.
    """

    schedule: Schedule
    run: Run


Clock = Callable[[list[Run], int], list[float]]  # as `time_launches`, on one device


Rehearse = Callable[[TritonLauncher], Run]  # makes what launches a call and writes its result to memory of its own


def can_measure(query: torch.Tensor) -> bool:
    """Whether schedules can be measured now: a GPU is there, compilation is allowed, and no CUDA graph is captured."""
    return _is_on_gpu(query) and not is_forbidden() and not _is_capturing()


def _is_on_gpu(query: torch.Tensor) -> bool:
    return query.is_cuda


def _is_capturing() -> bool:
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _device_name(device: torch.device) -> str | None:
    """The name of a GPU; None for other devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else None


def identity_of_call(
    proven: ProvenMods,
    signature: Signature,
    options: DecodeOptions,
    sizes: Sizes,
    facts: DeviceFacts,
    device: torch.device,
) -> str | None:
    """The text that identifies what is measured for a call; None on a device where nothing is."""
    name = _device_name(device)
    if name is None or facts.backend == "cpu":
        return None
    return tuned_identity(proven, signature, options, class_of(sizes, signature.packed), (name, facts.num_sms))


class Known(NamedTuple):
    """What `options.autotune` means for a call, without measuring anything.

    Attributes:
        options: of the call, with the schedule that was chosen.
        tuned: what was measured; None if nothing is known.
        text: the same in words.
    """

    options: DecodeOptions
    tuned: Tuned | None
    text: str


def known_choice(scheduler: Scheduler, proven: ProvenMods, sizes: Sizes, device: torch.device | None) -> Known:
    """Finds what was measured of a call.

    Args:
        scheduler: of the call as the caller gave it.
        proven: its mods.
        sizes: its sizes.
        device: the GPU that it runs on; None if it is not at hand.
    """
    options = scheduler.options
    if len(scheduler.parts(sizes)) > 1:
        return Known(options, None, "a call of two launches has the default schedules")
    identity = None
    if device is not None:
        identity = identity_of_call(proven, scheduler.signature, options, sizes, scheduler.facts, device)
    if identity is None:
        return Known(options, None, "only the present GPU can be measured: this is the default schedule")
    tuned = find_tuned(identity)
    if tuned is None:
        return Known(options, None, "not measured yet: this is the default schedule")
    return Known(fit(tuned.choice, tuned.num_items, scheduler, sizes).applied_to(options), tuned, str(tuned))


class Autotuner:
    """Finds the launchers of calls that differ in sizes and addresses only."""

    def __init__(self, signature: Signature, options: DecodeOptions, facts: DeviceFacts) -> None:
        self.signature, self.options, self.facts = signature, options, facts
        self.identities = Bounded(limit=256)  # texts or None, by the mods and the class of the sizes

    def launcher(self, loaded: Any, inputs: Inputs, rehearse: Rehearse) -> tuple[TritonLauncher, bool]:
        """Finds the fastest launcher of a call. Measures it if that was not done and can be done now.

        Args:
            loaded: the kernels of the call, `runtime.prepare._Loaded`.
            inputs: of the call.
            rehearse: makes a launcher measurable.

        Returns:
            The launcher, and whether it is to stay. While a CUDA graph is captured, nothing can be measured: then it is
            the default one until another call can.
        """
        sizes = inputs.sizes
        scheduler = loaded.scheduler
        if len(scheduler.parts(sizes)) > 1:  # two launches have other tiles each, which options cannot choose
            return loaded.launcher(inputs, sizes), True
        key = loaded.proven.text, class_of(sizes, self.signature.packed)
        identity = self.identities.get(key, "")
        if identity == "":
            of_call = loaded.proven, self.signature, self.options, sizes, self.facts, self.signature.device
            identity = identity_of_call(*of_call)
            self.identities.add(key, identity)
        if identity is None:
            return loaded.launcher(inputs, sizes), True
        tuned = find_tuned(identity)
        if tuned is None and can_measure(inputs.query):
            with _measuring:  # another thread may have measured it meanwhile
                tuned = find_tuned(identity) or self._measure(loaded, inputs, identity, rehearse)
        if tuned is None:
            return loaded.launcher(inputs, sizes), not _is_capturing()
        return self._chosen(loaded, inputs, tuned), True

    def _chosen(self, loaded: Any, inputs: Inputs, tuned: Tuned) -> TritonLauncher:
        """The launcher of a choice; the default one if its kernel is not at hand and may not be compiled."""
        sizes = inputs.sizes
        options = fit(tuned.choice, tuned.num_items, loaded.scheduler, sizes).applied_to(self.options)
        try:
            return loaded.launcher(inputs, sizes, options)
        except CompileError as error:
            if tuned.choice == DEFAULT:
                raise
            _logger.info("autotune: %s: the default takes its place: %s", tuned.choice, error)
            return loaded.launcher(inputs, sizes)

    def _measure(self, loaded: Any, inputs: Inputs, identity: str, rehearse: Rehearse) -> Tuned:
        """Measures the schedules of a call and remembers the result."""
        sizes, device = inputs.sizes, self.signature.device
        space = Space(loaded.scheduler, sizes)

        def make(choice: Choice) -> Trial:
            launcher = loaded.launcher(inputs, sizes, choice.applied_to(self.options))
            return Trial(launcher.first.chosen, rehearse(launcher))

        def start(choice: Choice) -> None:
            with contextlib.suppress(Exception):  # `make` raises it again
                loaded.start(inputs, sizes, choice.applied_to(self.options))

        def clock(runs: list[Run], rounds: int) -> list[float]:
            return time_launches(runs, rounds, device)

        _logger.info("autotune: measuring schedules of a call of %s", sizes)
        try:
            tuned, on_disk = search(space, start, make, clock), True
        except torch.OutOfMemoryError as error:
            _logger.warning("autotune: too little memory to measure, the default schedule is used: %s", error)
            tuned, on_disk = Tuned(DEFAULT, space.items, 0.0, 0.0, ()), False
        _logger.info("autotune: %s", tuned)
        keep_tuned(identity, tuned, on_disk)
        return tuned


def search(space: Space, start: Callable[[Choice], None], make: Callable[[Choice], Trial], clock: Clock) -> Tuned:
    """Finds the fastest schedule: first the number of programs, then keys per step, warps and stages, one at a time.

    Args:
        space: the schedules.
        start: begins to compile what one needs. Those of a step are compiled at once.
        make: makes one ready; an exception drops it, except the default.
        clock: measures.
    """
    best, trials, tried = DEFAULT, {DEFAULT: make(DEFAULT)}, {str(DEFAULT): 0.0}
    for vary in (space.divisions, space.block_n, space.num_warps, space.num_stages, space.neighbours):
        known = {trial.schedule for trial in trials.values()}
        choices: list[Choice] = []
        varied = [choice for choice in vary(best, trials[best].schedule) if choice not in trials]
        for choice in varied:
            start(choice)
        for choice in varied:
            trial = _try(choice, make)
            if trial is not None and trial.schedule not in known:
                known.add(trial.schedule)
                trials[choice] = trial
                choices.append(choice)
        if not choices:
            continue
        times = clock([trials[choice].run for choice in (best, *choices)], ROUNDS)
        if tried[str(best)] == 0.0:  # the first round
            tried[str(best)] = times[0]
        tried |= {str(choice): time for choice, time in zip(choices, times[1:], strict=True)}
        fastest, choice = min(zip(times[1:], choices, strict=True), key=lambda pair: pair[0])
        if fastest < (1.0 - MARGIN) * times[0]:
            best = choice
    default_us = tried[str(DEFAULT)] or clock([trials[DEFAULT].run], ROUNDS)[0]  # it alone, if nothing can be varied
    tried[str(DEFAULT)] = chosen_us = default_us
    if best != DEFAULT:
        default_us, chosen_us = clock([trials[DEFAULT].run, trials[best].run], LAST_ROUNDS)
        if chosen_us >= (1.0 - MARGIN) * default_us:
            best, chosen_us = DEFAULT, default_us
    return Tuned(best, space.items, default_us, chosen_us, tuple(tried.items()))


def _try(choice: Choice, make: Callable[[Choice], Trial]) -> Trial | None:
    """Makes a schedule ready and runs it once; None if that fails."""
    try:
        trial = make(choice)
        trial.run()
    except Exception as error:  # of whatever kind: the call itself can be computed, by the default schedule
        _logger.info("autotune: %s is left out: %s", choice, str(error).partition("\n")[0])
        return None
    return trial
