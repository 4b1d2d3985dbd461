"""Trials and profiles that a study still lacks."""

import random
from typing import NamedTuple

from rankscope.spec.candidates import AnyTrial, FullTrial, Trial
from rankscope.study.folder import FINISHED, StudyFolder


def unfinished(study: StudyFolder) -> list[AnyTrial]:
    """Trials, also of the reference, that did not end as `done`."""
    return [trial for trial in study.all_trials() if study.trial_record(trial).status != "done"]


class ProfileJob(NamedTuple):
    """One repeat of one of `StudySpec.profiled`."""

    profile: str
    repeat: int


def missing_trials(study: StudyFolder) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if not finished_trials(study, trial)]


def finished_trials(study: StudyFolder, trial: AnyTrial) -> bool:
    return study.trial_record(trial).status in FINISHED


def missing_reference(study: StudyFolder) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if not finished_trials(study, trial)]


def missing_profiles(study: StudyFolder) -> list[ProfileJob]:
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
