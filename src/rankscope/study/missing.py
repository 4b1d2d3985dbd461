"""Trials and profiles that a study still lacks."""

import random
from typing import NamedTuple

from rankscope.spec.candidates import AnyTrial, FullTrial, Trial
from rankscope.spec.models import StudySpec
from rankscope.study.folder import FINISHED, StudyFolder


def unfinished(study: StudyFolder) -> list[AnyTrial]:
    """Trials, full fine-tuning included, that did not end as `done`."""
    return [trial for trial in study.all_trials() if study.trial_record(trial).status != "done"]


class ProfileJob(NamedTuple):
    """One repeat of a profile of `StudySpec.profiled`."""

    profile: str
    repeat: int


def missing_trials(study: StudyFolder) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if not is_finished(study, trial)]


def is_finished(study: StudyFolder, trial: AnyTrial) -> bool:
    """Whether a trial has a result."""
    return study.trial_record(trial).status in FINISHED


def missing_reference(study: StudyFolder) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if not is_finished(study, trial)]


def missing_profiles(spec: StudySpec, study: StudyFolder | None) -> list[ProfileJob]:
    """Repeats not yet measured: repeat by repeat, in each all candidates and the control in a random order.

    They are interleaved, so that a drift of the machine does not look like an effect of rank. The order of one study is
    always the same.
    """
    if not spec.measure.profiles:
        return []
    done = {name: len(study.profile_repeats(name)) if study else 0 for name in spec.profiled()}
    jobs = []
    for repeat in range(spec.measure.repeats):
        order = random.Random(repeat).sample(list(done), len(done))
        jobs += [ProfileJob(name, repeat) for name in order if repeat >= done[name]]
    return jobs
