"""Division of trials into packs, and the order in which packs start on several devices."""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rankscope.data.tokens import Tokens
from rankscope.plan.costs import CostModel
from rankscope.spec.candidates import Trial
from rankscope.spec.models import TrainingSpec

FULL_STEP_TOKENS = {"cpu": 1536, "cuda": 1 << 14, "mps": 1 << 13}
"""Tokens of a step that keep the device busy: more trials in its pack take memory and gain no time. On a CPU measured,
docs/lab-notes.md; on a GPU not yet."""

MIN_MAKESPAN_GAIN = 1.05
"""Factor by which smaller packs must shorten the makespan on several devices to be worth more processes. The search for
smaller packs ends once the makespan is within this factor of devices that are never idle."""


def divide_into_packs(
    trials: Sequence[Trial],
    prediction: CostModel,
    fits_memory: Callable[[Sequence[Trial]], bool],
    training: TrainingSpec,
    tokens: Tokens,
    devices: int = 1,
) -> list[list[Trial]]:
    """Divide trials into packs: no more trials together than fit a device (`fits_memory`), nor than fill it, or than
    `training.trials_per_pack` where it is set.

    On one device a pack has as many consecutive trials as that allows. On several packs are smaller, so that all
    devices are busy to the end: see `_spread_over_devices`. Trials that cannot train in a pack come last, each alone.
    So is a trial that does not fit even alone: the prediction is no proof, and its step is divided down to single
    sequences.
    """
    step_tokens = float(tokens.lengths.mean()) * training.effective_batch_size
    most = training.trials_per_pack or max(1, int(FULL_STEP_TOKENS[prediction.device] / step_tokens))
    if training.isolated or training.base_dropout == "keep":  # whose trials would draw from one random stream
        most = 1
    candidates = {id(trial): trial.candidate.name for trial in trials}  # names are made anew each time
    known: dict[tuple[str, ...], bool] = {}

    def fits(pack: Sequence[Trial]) -> bool:
        if len(pack) > most:
            return False
        names = tuple(candidates[id(trial)] for trial in pack)
        if names not in known:
            known[names] = fits_memory(pack)
        return known[names]

    packs: list[list[Trial]] = []
    for trial in (trial for trial in trials if trial.candidate.packable):
        if packs and fits([*packs[-1], trial]):
            packs[-1].append(trial)
        else:
            packs.append([trial])
    alone = [[trial] for trial in trials if not trial.candidate.packable]
    return [*(packs if devices == 1 else _spread_over_devices(packs, alone, prediction, fits, devices)), *alone]


def _spread_over_devices(
    packs: Sequence[Sequence[Trial]],
    alone: Sequence[Sequence[Trial]],
    prediction: CostModel,
    fits: Callable[[Sequence[Trial]], bool],
    devices: int,
) -> list[list[Trial]]:
    """Divide the trials of `packs` into more packs, for several devices that also train the trials of `alone`.

    Packs take equally long, by the FLOPs of their candidates: the longest trials are dealt out first, each to the pack
    with the least work. Rounds of packs, one pack for each device, are added until the makespan is within
    `MIN_MAKESPAN_GAIN` of the time in which the devices are never idle: each pack costs the start of a process, and a
    pack of few trials fills no device. Where no number of packs comes near, the best division is returned.
    """
    trials = {trial.name: trial for pack in packs for trial in pack}
    work = {name: work_of(trial, prediction) for name, trial in trials.items()}
    others = {trial.name: work_of(trial, prediction) for (trial,) in alone}
    order, bound = longest_first(work), lower_bound(work | others, devices)
    best: list[list[str]] = []
    least, rounds = math.inf, math.ceil(len(packs) / devices)
    while trials and rounds:
        number = min(rounds * devices, len(trials))
        dealt, dealt_packs = simulate(order, work, number).devices, [list[str]() for _ in range(number)]
        for name in trials:
            dealt_packs[dealt[name]].append(name)
        if all(len(pack) == 1 or fits([trials[name] for name in pack]) for pack in dealt_packs):
            jobs = {pack[0]: sum(work[name] for name in pack) for pack in dealt_packs} | others
            makespan = simulate(longest_first(jobs), jobs, devices).makespan
            if MIN_MAKESPAN_GAIN * makespan < least:  # a little less is not worth more processes
                best, least = dealt_packs, makespan
        if least <= MIN_MAKESPAN_GAIN * bound or number == len(trials):
            break
        rounds = max(rounds + 1, rounds * 5 // 4)  # a few dozen times at most, however many trials there are
    return [[trials[name] for name in pack] for pack in best]


def work_of(trial: Trial, prediction: CostModel) -> float:
    """Relative time of a trial, by its FLOPs; the same for all trials where they are not known."""
    cost = prediction.costs.get(trial.candidate.name)
    return float(cost.flops_per_token) if cost else 1.0


class DeviceSchedule(NamedTuple):
    """Jobs of one queue on equal devices."""

    devices: dict[str, int]  # of each job, from 0, in the order in which they start
    makespan: float  # time from the start of the first job to the end of the last; 0 without jobs


def longest_first(seconds: Mapping[str, float]) -> list[str]:
    """Return the names of jobs in the order in which they should start: by falling time, then by name."""
    return sorted(seconds, key=lambda name: (-seconds[name], name))


def simulate(order: Iterable[str], seconds: Mapping[str, float], devices: int) -> DeviceSchedule:
    """Schedule jobs in this order, each taking its `seconds`, on the device that is free first. The order may come from
    other times than `seconds`, such as predicted ones."""
    free = [(0.0, device) for device in range(devices)]  # equal, in order: a heap
    on = {}
    for name in order:
        start, on[name] = free[0]
        heapq.heapreplace(free, (start + seconds[name], on[name]))
    return DeviceSchedule(on, max(free)[0])


def lower_bound(seconds: Mapping[str, float], devices: int) -> float:
    """Return a time that no schedule beats: all devices always busy, or the longest job, which is not divided."""
    return max(sum(seconds.values()) / devices, max(seconds.values(), default=0.0))
