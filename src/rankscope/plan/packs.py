"""What would run: which trials train together, and what is still missing of a study."""

import heapq
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from rankscope.data.tokens import Tokens
from rankscope.plan.memory import FULL_STEP_TOKENS, CostModel
from rankscope.spec.candidates import Trial
from rankscope.spec.models import TrainingSpec
from rankscope.study.folder import Division, StudyFolder
from rankscope.study.missing import finished_trials

MAX_PACK_MEMORY_FRACTION = 0.9
"""What a pack may take of the memory that is free: the prediction is not exact."""

NEAR_THE_BOUND = 1.05
"""Packs are made smaller for several devices only where that saves more than this factor, and no more once they are as
near to devices that are never idle."""


def most_per_pack(training: TrainingSpec) -> int | None:
    """How many trials may train together at most; None means as many as pay and fit.

    With the base's own dropout kept, trials draw from one random stream, so only one at a time is independent.
    """
    return 1 if training.isolated or training.base_dropout == "keep" else training.trials_per_pack


def divide_into_packs(
    trials: Sequence[Trial],
    prediction: CostModel,
    free: int,
    training: TrainingSpec,
    tokens: Tokens,
    devices: int = 1,
) -> list[list[Trial]]:
    """Trials that train together: no more than fit in `free` bytes, nor more than fill the device. Trials that cannot
    train in a pack come last, each alone.

    On one device they are consecutive trials, as many as that allows. On several, which have `free` bytes each, packs
    are smaller, so that all devices are busy to the end: see `_spread`.

    A trial that does not fit even alone is a pack all the same: the prediction is no proof, and its step is divided
    down to single sequences.
    """
    step_tokens = float(tokens.lengths.mean()) * training.effective_batch_size
    filled = max(1, int(FULL_STEP_TOKENS[prediction.device] / step_tokens))
    most = most_per_pack(training) or filled
    longest = int(tokens.lengths.max())

    candidates = {id(trial): trial.candidate.name for trial in trials}  # names are made anew each time
    known: dict[tuple[str, ...], bool] = {}

    def fits(pack: Sequence[Trial]) -> bool:
        if len(pack) > most:
            return False
        names = tuple(candidates[id(trial)] for trial in pack)
        if names not in known:
            needed = prediction.fixed_bytes(pack) + longest * prediction.bytes_per_token(pack)
            known[names] = needed <= free * MAX_PACK_MEMORY_FRACTION
        return known[names]

    packs: list[list[Trial]] = []
    for trial in trials:
        if not trial.candidate.packable:
            continue
        grown = [*packs[-1], trial] if packs else []
        if grown and fits(grown):
            packs[-1] = grown
        else:
            packs.append([trial])
    alone = [[trial] for trial in trials if not trial.candidate.packable]
    return [*(packs if devices == 1 else _spread(packs, alone, prediction, fits, devices)), *alone]


def _spread(
    packs: Sequence[Sequence[Trial]],
    alone: Sequence[Sequence[Trial]],
    prediction: CostModel,
    fits: Callable[[Sequence[Trial]], bool],
    devices: int,
) -> list[list[Trial]]:
    """The trials of `packs` in more packs, for several devices that also train those of `alone`.

    Packs take equally long, by the FLOPs of their candidates: the longest trials are dealt out first, each to the pack
    that has least. As many rounds of packs are made, one a device, as are needed to come within `NEAR_THE_BOUND` of
    the time in which the devices are never idle, and no more: each pack is a process that starts, and where it has few
    trials it fills no device. Where no number of packs comes near, it is the best that was found.
    """
    trials = {trial.name: trial for pack in packs for trial in pack}
    work = {name: work_of(trial, prediction) for name, trial in trials.items()}
    others = {trial.name: work_of(trial, prediction) for (trial,) in alone}
    order, bound = longest_first(work), lower_bound(work | others, devices)
    best: list[list[str]] = []
    least, rounds = math.inf, math.ceil(len(packs) / devices)
    while trials and rounds:
        number = min(rounds * devices, len(trials))
        dealt, spread = simulate(order, work, number).jobs, [list[str]() for _ in range(number)]
        for name in trials:
            spread[dealt[name].device].append(name)
        if all(len(pack) == 1 or fits([trials[name] for name in pack]) for pack in spread):
            jobs = {pack[0]: sum(work[name] for name in pack) for pack in spread} | others
            makespan = simulate(longest_first(jobs), jobs, devices).makespan
            if NEAR_THE_BOUND * makespan < least:  # a little less is not worth more processes
                best, least = spread, makespan
        if least <= NEAR_THE_BOUND * bound or number == len(trials):
            break
        rounds = max(rounds + 1, rounds * 5 // 4)  # a few dozen times at most, however many trials there are
    return [[trials[name] for name in pack] for pack in best]


def work_of(trial: Trial, prediction: CostModel) -> float:
    """How long a trial takes, in any unit; all the same where it is not known."""
    cost = prediction.costs.get(trial.candidate.name)
    return float(cost.flops_per_token) if cost else 1.0


def open_packs(
    study: StudyFolder, prediction: CostModel, free: int, tokens: Tokens, devices: int = 1
) -> dict[str, list[Trial]]:
    """Packs with a trial that has no result yet, in their order; the study is divided into packs, for so many devices,
    where it is not."""
    division = study.division()
    if not division.packs:
        trials = study.spec.trials()
        packs = divide_into_packs(trials, prediction, free, study.spec.training, tokens, devices)
        division = Division(division.named(packs), {})
        study.write_division(division)
    return {
        pack: trials for pack, trials in division.packs.items() if any(not finished_trials(study, t) for t in trials)
    }


class Placed(NamedTuple):
    """Where and when a job runs."""

    device: int
    """From 0."""
    start: float
    """In seconds after the first."""
    end: float


class Schedule(NamedTuple):
    """What a queue makes of jobs on `devices` equal devices. Times are in seconds."""

    devices: int
    jobs: dict[str, Placed]
    """By name, in the order in which they begin."""

    @property
    def makespan(self) -> float:
        """From the beginning to the end of the last job; 0 without jobs."""
        return max((job.end for job in self.jobs.values()), default=0.0)

    @property
    def busy_seconds(self) -> float:
        """Of all devices together."""
        return sum(job.end - job.start for job in self.jobs.values())


def longest_first(seconds: Mapping[str, float]) -> list[str]:
    """Names of jobs in the order in which they are to begin: by falling time, then by name."""
    return sorted(seconds, key=lambda name: (-seconds[name], name))


def simulate(order: Iterable[str], seconds: Mapping[str, float], devices: int) -> Schedule:
    """Runs jobs in this order, each taking its `seconds`, on the device that is free first; of several the first.

    The order may have been made by other times, such as predicted ones.
    """
    free = [(0.0, device) for device in range(devices)]  # equal, in order: a heap
    jobs = {}
    for name in order:
        start, device = free[0]
        end = start + seconds[name]
        heapq.heapreplace(free, (end, device))
        jobs[name] = Placed(device, start, end)
    return Schedule(devices, jobs)


def lower_bound(seconds: Mapping[str, float], devices: int) -> float:
    """What no schedule is shorter than: all devices busy all the time, and the longest job, which is not divided."""
    return max(sum(seconds.values()) / devices, max(seconds.values(), default=0.0))
