"""Trials and profiles that a study still lacks."""

import random
from typing import NamedTuple

from rankscope.spec.candidates import CONTROL, AnyTrial, FullTrial, Trial
from rankscope.spec.models import StudySpec
from rankscope.study.folder import AGAIN, FINISHED, StudyFolder

START_SECONDS = 6.0  # of a job's process: Python, libraries and a small model, on two cores


def unfinished(study: StudyFolder) -> list[AnyTrial]:
    """Trials, full fine-tuning included, that did not end as `done`."""
    return [trial for trial in study.all_trials() if study.trial_record(trial).status != "done"]


class ProfileJob(NamedTuple):
    """One repeat of a profile of `StudyFolder.profiled`."""

    profile: str
    repeat: int
    session: int = 0


def missing_trials(study: StudyFolder) -> list[Trial]:
    """Trials without a result yet."""
    return [trial for trial in study.spec.trials() if not is_finished(study, trial)]


def is_finished(study: StudyFolder, trial: AnyTrial) -> bool:
    """Whether a trial has a result. One of full fine-tuning, whose weights are not kept, has none on added rows."""
    record = study.trial_record(trial) if isinstance(trial, FullTrial) else study.saved_record(trial)
    return record.status in FINISHED


def unevaluated(study: StudyFolder) -> list[Trial]:
    """Finished trials whose results are on fewer evaluation rows than the study has by now."""
    return [t for t in study.trials if is_finished(study, t) and study.trial_record(t).status not in FINISHED]


def nothing_missing(study: StudyFolder) -> bool:
    """Whether a run in `study` has nothing to do but to conclude, from its records alone; corrupt ones aside."""
    measure = study.spec.measure
    if not all(study.file(name).exists() for name in ("machine.json", "prediction.json", "data/facts.json")):
        return False
    if study.file(AGAIN).exists() or study.file("profiles/whole").exists() or unfinished(study):
        return False
    if StudyFolder.open(study.path).spec.data != study.spec.data:  # more evaluation rows
        return False
    tokens = {None, study.data_facts["tokens_sha256"]}
    return (
        {study.saved_record(trial).tokens_sha256 for trial in study.all_trials()} <= tokens
        and {candidate.name for candidate in study.spec.candidates()} <= study.prediction["candidates"].keys()
        and not missing_profiles(study.spec, study)
        and not (measure.answers and study.unanswered())
    )


def missing_reference(study: StudyFolder) -> list[FullTrial]:
    """Trials of full fine-tuning without a result yet."""
    return [trial for trial in study.spec.reference_trials() if not is_finished(study, trial)]


def missing_profiles(spec: StudySpec, study: StudyFolder | None, again: bool = False) -> list[ProfileJob]:
    """Repeats not yet measured: repeat by repeat, in each all candidates and the control in a random order.

    They are interleaved, so that a drift of the machine does not look like an effect of rank. What is added when the
    control has all its repeats is measured in a new session, with as many more repeats of the control. The order of one
    study is always the same. With `again` the repeats are those of `StudyFolder.profiled(again=True)`.
    """
    if not spec.measure.profiles:
        return []
    found = {name: study.profile_repeats(name, again) if study else [] for name in spec.profiled()}
    sessions = {name: [int(repeat.get("session", 0)) for repeat in repeats] for name, repeats in found.items()}
    session = max((number for numbers in sessions.values() for number in numbers), default=0)
    tried = study.failures() if study else {}
    added = [name for name, numbers in sessions.items() if name != CONTROL and not numbers and name not in tried]
    if added and sessions[CONTROL].count(session) >= spec.measure.repeats:
        session += 1
    done = {name: len(numbers) for name, numbers in sessions.items()}
    done[CONTROL] = sessions[CONTROL].count(session)
    jobs = []
    for repeat in range(spec.measure.repeats):
        order = random.Random(repeat).sample(list(done), len(done))
        jobs += [ProfileJob(name, repeat, session) for name in order if repeat >= done[name]]
    return jobs
