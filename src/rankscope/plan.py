"""What would run: which trials train together, and what is still missing of a study."""

import random
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from rankscope.files import read_json
from rankscope.spec import Candidate, TrainingSpec, Trial
from rankscope.study import Study

BYTES_PER_PARAMETER = 16
"""Of an adapter in training: weight, gradient and AdamW's two moments, in float32."""

SHARE_OF_FREE_MEMORY = 0.4
"""What the adapters of one pack may take; the rest is for the base model and activations."""

FINISHED = ("done", "diverged")
"""Statuses that are results. Everything else is trained again."""


class ProfileJob(NamedTuple):
    """One repeat of one candidate's profile."""

    candidate: Candidate
    repeat: int


def most_per_pack(training: TrainingSpec) -> int | None:
    """How many trials may train together at most; None means as many as memory allows.

    With the base's own dropout kept, trials draw from one random stream, so only one at a time is independent.
    """
    return 1 if training.isolated or training.base_dropout == "keep" else training.trials_per_pack


def divide_into_packs(
    trials: Sequence[Trial], params: Mapping[str, int], free_bytes: int, most: int | None
) -> list[list[Trial]]:
    """Consecutive trials that train together: at most `most`, and no more than memory holds adapters for.

    `params` gives trainable parameters by candidate name. The tokens of a step need no care here: a pack divides
    its steps into forwards that fit.
    """
    room = free_bytes * SHARE_OF_FREE_MEMORY
    packs: list[list[Trial]] = []
    used = 0.0
    for trial in trials:
        needed = params[trial.candidate.name] * BYTES_PER_PARAMETER
        if not packs or len(packs[-1]) == most or used + needed > room:
            packs.append([])
            used = 0.0
        packs[-1].append(trial)
        used += needed
    return packs


def missing_trials(study: Study) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if study.trial_record(trial)["status"] not in FINISHED]


def missing_profiles(study: Study) -> list[ProfileJob]:
    """Repeats not yet measured: repeat by repeat, the candidates of each in a random order.

    Interleaved, so that a drift of the machine does not look like an effect of rank; the order is the same each time
    for one study.
    """
    if not study.spec.measure.profiles:
        return []
    jobs = []
    for repeat in range(study.spec.measure.repeats):
        candidates = study.spec.candidates()
        random.Random(repeat).shuffle(candidates)
        jobs += [ProfileJob(candidate, repeat) for candidate in candidates if repeat >= _repeats_done(study, candidate)]
    return jobs


def _repeats_done(study: Study, candidate: Candidate) -> int:
    file = study.profile_file(candidate)
    return len(read_json(file)["repeats"]) if file.exists() else 0
