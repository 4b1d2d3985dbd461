"""What would run: which trials train together, and what is still missing of a study."""

import heapq
import math
import os
import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.lora.variants import FROM_WEIGHTS
from rankscope.plan.memory import FULL_STEP_TOKENS, Prediction
from rankscope.schedule import longest_first, lower_bound, simulate
from rankscope.spec.models import AnyTrial, FullTrial, StudySpec, TrainingSpec, Trial
from rankscope.study.folder import FINISHED, Division, Study
from rankscope.train.checkpoint import KEPT
from rankscope.train.step import total_steps

SHARE_OF_FREE_MEMORY = 0.9
"""What a pack may take of the memory that is free: the prediction is not exact."""

LINE_BYTES = 250
"""Of a step in metrics.jsonl."""

NEAR_THE_BOUND = 1.05
"""Packs are made smaller for several devices only where that saves more than this factor, and no more once they are as
near to devices that are never idle."""

REST_BYTES = 30_000_000
"""Of a study's report, profiles and logs: measured 3 to 12 MB."""


class ProfileJob(NamedTuple):
    """One repeat of one of `StudySpec.profiled`."""

    profile: str
    repeat: int


def most_per_pack(training: TrainingSpec) -> int | None:
    """How many trials may train together at most; None means as many as pay and fit.

    With the base's own dropout kept, trials draw from one random stream, so only one at a time is independent.
    """
    return 1 if training.isolated or training.base_dropout == "keep" else training.trials_per_pack


def divide_into_packs(
    trials: Sequence[Trial],
    prediction: Prediction,
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
            known[names] = needed <= free * SHARE_OF_FREE_MEMORY
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
    prediction: Prediction,
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


def work_of(trial: Trial, prediction: Prediction) -> float:
    """How long a trial takes, in any unit; all the same where it is not known."""
    cost = prediction.costs.get(trial.candidate.name)
    return float(cost.flops_per_token) if cost else 1.0


class Disk(NamedTuple):
    """Bytes on the disk, by what takes them."""

    trials: int
    """Adapters and curves, also of the reference."""
    checkpoints: int
    """Of the packs, or the trials of the reference, whose are the largest: they go when these have ended."""
    tokens: int
    rest: int
    """Report, profiles and logs."""

    def beside(self, there: "Disk") -> int:
        """What is still to come where `there` lies already, of the same trials."""
        return sum(max(0, needed - lies) for needed, lies in zip(self, there, strict=True))


NOTHING = Disk(0, 0, 0, 0)


def disk_bytes(
    spec: StudySpec,
    prediction: Prediction,
    packs: Sequence[Sequence[Trial]],
    reference: Sequence[FullTrial],
    data: TokenizedData,
    devices: int = 1,
) -> Disk:
    """What a study writes at most for these packs and trials of full fine-tuning, of which each device trains one at a
    time."""
    steps = total_steps(spec.training, len(data.train))
    trials = [trial for pack in packs for trial in pack]
    # One that starts from the base's weights is saved at twice its rank: see `rankscope.lora.variants.exported`.
    doubled = [trial.candidate.variant in FROM_WEIGHTS for trial in trials]
    adapters = sum(4 * prediction.params[t.candidate.name] * (1 + d) for t, d in zip(trials, doubled, strict=True))
    # Of the reference: weights and two moments, in float32.
    kept = [*map(prediction.checkpoint_bytes, packs), *(12 * prediction.base_params for _ in reference)]
    return Disk(
        trials=adapters + LINE_BYTES * steps * (len(trials) + len(reference)),
        checkpoints=(KEPT + 1) * sum(heapq.nlargest(devices, kept)),
        tokens=5 * (len(data.train.ids) + len(data.eval.ids)),
        rest=REST_BYTES,
    )


def disk_taken(study: Study) -> Disk:
    """What lies there of the trials that have no result yet, and of what all trials share."""
    missing = [study.trial_folder(trial) for trial in study.all_trials() if not _finished(study, trial)]
    kept = [*study.path.glob("packs/*/checkpoints"), *(folder / "checkpoints" for folder in missing)]
    checkpoints = sum(map(_size_of, kept))
    own = sum(map(_size_of, missing)) - sum(_size_of(folder / "checkpoints") for folder in missing)
    rest = sum(_size_of(study.file(name)) for name in ("report", "profiles"))
    return Disk(own, checkpoints, _size_of(study.file("data")), rest)


def _size_of(folder: Path) -> int:
    """Bytes of the files in `folder` and below it; 0 where it is not."""
    return sum(Path(place, name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def open_packs(
    study: Study, prediction: Prediction, free: int, tokens: Tokens, devices: int = 1
) -> dict[str, list[Trial]]:
    """Packs with a trial that has no result yet, in their order; the study is divided into packs, for so many devices,
    where it is not."""
    division = study.division()
    if not division.packs:
        trials = study.spec.trials()
        packs = divide_into_packs(trials, prediction, free, study.spec.training, tokens, devices)
        division = Division(division.named(packs), {})
        study.write_division(division)
    return {pack: trials for pack, trials in division.packs.items() if any(not _finished(study, t) for t in trials)}


def missing_trials(study: Study) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if not _finished(study, trial)]


def _finished(study: Study, trial: AnyTrial) -> bool:
    return study.trial_record(trial)["status"] in FINISHED


def missing_reference(study: Study) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if not _finished(study, trial)]


def missing_profiles(study: Study) -> list[ProfileJob]:
    """Repeats not yet measured: repeat by repeat, in each all candidates and the control in a random order.

    Interleaved, so that a drift of the machine does not look like an effect of rank; the order is the same each time
    for one study.
    """
    if not study.spec.measure.profiles:
        return []
    done = {name: len(study.profile_repeats(name)) for name in study.spec.profiled()}
    jobs = []
    for repeat in range(study.spec.measure.repeats):
        order = random.Random(repeat).sample(list(done), len(done))
        jobs += [ProfileJob(name, repeat) for name in order if repeat >= done[name]]
    return jobs
