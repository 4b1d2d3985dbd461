"""What would run: which trials train together, and what is still missing of a study."""

import random
from collections.abc import Sequence
from typing import NamedTuple

from rankscope.data.tokens import Tokens
from rankscope.spec import FullTrial, TrainingSpec, Trial
from rankscope.study import Study
from rankscope.train.memory import FULL_STEP_TOKENS, Prediction
from rankscope.train.pack import effective_batch_size

SHARE_OF_FREE_MEMORY = 0.9
"""What a pack may take of the memory that is free: the prediction is not exact."""

FINISHED = ("done", "diverged")
"""Statuses that are results. Everything else is trained again."""


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
    trials: Sequence[Trial], prediction: Prediction, free: int, training: TrainingSpec, tokens: Tokens
) -> list[list[Trial]]:
    """Consecutive trials that train together: no more than fit in `free` bytes, nor more than fill the device.

    A trial that does not fit even alone is a pack all the same: the prediction is no proof, and its step is divided
    down to single sequences.
    """
    step_tokens = float(tokens.lengths.mean()) * effective_batch_size(training)
    filled = max(1, int(FULL_STEP_TOKENS[prediction.device] / step_tokens))
    most = most_per_pack(training) or filled
    longest = int(tokens.lengths.max())
    packs: list[list[Trial]] = []
    for trial in trials:
        grown = [*packs[-1], trial] if packs else []
        needed = prediction.fixed_bytes(grown) + longest * prediction.bytes_per_token(grown)
        if grown and len(grown) <= most and needed <= free * SHARE_OF_FREE_MEMORY:
            packs[-1] = grown
        else:
            packs.append([trial])
    return packs


def missing_trials(study: Study) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if study.trial_record(trial)["status"] not in FINISHED]


def missing_reference(study: Study) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if study.trial_record(trial)["status"] not in FINISHED]


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
