"""Trials and profiles that a study still lacks."""

import random
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

from rankscope.spec.candidates import CONTROL, TIME, AnyTrial, FullTrial, Trial
from rankscope.spec.models import MeasureSpec, StudySpec
from rankscope.spec.task import CHOICE, parse_task
from rankscope.study.folder import AGAIN, FINISHED, StudyFolder
from rankscope.study.scores import unscored

# Seconds on two cores:
START_SECONDS = 11.0  # of a job's process: Python, libraries and a small model (docs/first-ten-minutes.md)
ANSWER_SECONDS = 0.005  # of an answer's token at least: the layers' calls
REPORT_SECONDS = 12.0  # of the verdict, the model cards, the figures and the page

ANSWER_ROWS = 1 / 8  # time of an answer's token, in those of a training step's row: it too reads all weights
CHOICES, CHOICE_ROWS = 4, 1 / 3  # of a row, as most have; time of one's forward, in those of a training step's row
TURN_STEPS = 1.5  # time of a step and the evaluation after it, in steps, where candidates take turns
EXTRA_ROUNDS, MAX_EXTRA_SECONDS = 2, 120.0
"""Rounds of time beyond `measure.rounds`: at most as many times as many, for so long. A busy machine takes all."""

T = TypeVar("T", bound=AnyTrial)


def unfinished(study: StudyFolder) -> list[AnyTrial]:
    """Trials, full fine-tuning included, that did not end as `done`."""
    return [trial for trial in study.all_trials() if study.trial_record(trial).status != "done"]


class ProfileJob(NamedTuple):
    """One repeat of a profile of `StudyFolder.profiled`, or of `TIME`, which times its members side by side."""

    profile: str
    members: tuple[str, ...] = ()  # by profile name, the control first


def without_result(study: StudyFolder | None, trials: Sequence[T]) -> list[T]:
    """The trials that have no result yet: all, where there is no study."""
    return [trial for trial in trials if not (study and is_finished(study, trial))]


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
        and not unscored(study)
    )


def missing_profiles(spec: StudySpec, study: StudyFolder | None, again: bool = False) -> list[ProfileJob]:
    """Repeats not yet measured: of memory, repeat by repeat all candidates and the control in a random order; then of
    time, for those that have none yet, beside the control. The order of one study is always the same. With `again` the
    repeats are those of `StudyFolder.profiled(again=True)`."""
    if not spec.measure.profiles:
        return []
    done = {name: len(study.profile_repeats(name, again)) if study else 0 for name in spec.profiled()}
    jobs = []
    for repeat in range(spec.measure.repeats):
        order = random.Random(repeat).sample(list(done), len(done))
        jobs += [ProfileJob(name) for name in order if repeat >= done[name]]
    return jobs + [ProfileJob(TIME, (CONTROL, *names)) for names in _untimed(spec, study, again) if names]


def _untimed(spec: StudySpec, study: StudyFolder | None, again: bool) -> list[list[str]]:
    """Names of the profiles without a time: those that can be packed, and those that cannot."""
    timed = {name for one in (study.profile_repeats(TIME, again) if study else []) for name in one["summaries"]}
    names = {name: candidate for name, candidate in spec.profiled().items() if name != CONTROL and name not in timed}
    if study and all(_has_old_times(study.profile_repeats(name, again)) for name in names):
        return []
    return [[name for name, candidate in names.items() if candidate.packable == packable] for packable in (True, False)]


def _has_old_times(repeats: Sequence[Mapping[str, Any]]) -> bool:
    """Whether a version that timed each candidate by itself has measured them."""
    return bool(repeats) and all("runtime_seconds" in repeat.get("summary", {}) for repeat in repeats)


def profile_seconds(measure: MeasureSpec, job: ProfileJob, steps: Mapping[str, float]) -> float:
    """Seconds of one repeat of a profile, from those of a step by profile name."""
    if job.members:
        turns = (measure.warmup_steps + measure.rounds) * TURN_STEPS
        return START_SECONDS + turns * sum(steps[name] for name in job.members)
    return START_SECONDS + (measure.warmup_steps + measure.steps) * steps[job.profile]


def extra_seconds(spec: StudySpec, steps: Mapping[str, float], jobs: Sequence[ProfileJob]) -> float:
    """Most seconds of the rounds of time beyond `measure.rounds`, from those of a step by candidate."""
    timed = [profile_seconds(spec.measure, job, _by_profile(spec, steps)) for job in jobs if job.members]
    return sum(min(MAX_EXTRA_SECONDS, EXTRA_ROUNDS * seconds) for seconds in timed)


def _by_profile(spec: StudySpec, steps: Mapping[str, float]) -> dict[str, float]:
    return {name: steps[candidate.name] for name, candidate in spec.profiled().items()}


class StudySeconds(NamedTuple):
    """Forecast of a study's work, in seconds, each part by itself."""

    trials: float  # one after the other
    profiles: float
    others: float  # full fine-tuning, as long as the longest candidate; scores on a task; answers; verdict and report


def work_seconds(
    spec: StudySpec,
    steps: Mapping[str, float],
    runtimes: Mapping[str, float],
    left: Mapping[str, float],
    jobs: Sequence[ProfileJob],
    answering: int,
    scoring: float,
) -> StudySeconds:
    """Forecast of what is left, from the seconds of a step and of a whole trial by candidate.

    `left` has the share of each trial's steps that is left, `jobs` the profiles that are missing; `answering` models
    are still to answer, the base model among them, and the scores on the task take `scoring` seconds.
    """
    trials = sum(seconds_of(trial, runtimes) * left[trial.name] for trial in spec.trials())
    whole = [left[trial.name] == 1 for trial in spec.trials()]
    starts = sum(whole) if spec.training.isolated else float(all(whole))
    profiled = _by_profile(spec, steps)
    full = sum((START_SECONDS + seconds_of(one, runtimes)) * left[one.name] for one in spec.reference_trials())
    answer = spec.measure.answers * spec.measure.answer_tokens * _token_seconds(spec, steps)
    return StudySeconds(
        trials=starts * START_SECONDS + trials,
        profiles=sum(profile_seconds(spec.measure, job, profiled) for job in jobs),
        others=full + scoring + (START_SECONDS + answering * answer if answering else 0.0) + REPORT_SECONDS,
    )


def scoring_seconds(spec: StudySpec, steps: Mapping[str, float], facts: Mapping[str, Any], models: float) -> float:
    """Forecast of the scores of so many models on the study's task, whose answers are taken to be as long as those of
    the held-out rows. How many documents a task of the harness has is not known here: `measure.task_items` of them."""
    measure = spec.measure
    if measure.task is None or not models:
        return 0.0
    kind, items = parse_task(measure.task).kind, measure.task_items
    items = items if kind == "lm_eval" else min(items, facts["rows_eval"])
    tokens = min(measure.task_tokens, facts["eval_label_tokens"] / facts["rows_eval"])
    each: float = tokens * _token_seconds(spec, steps)
    if kind == "lm_eval" or kind in CHOICE:
        each = CHOICES * CHOICE_ROWS * min(steps.values()) / spec.training.effective_batch_size
    return START_SECONDS + models * items * each


def _token_seconds(spec: StudySpec, steps: Mapping[str, float]) -> float:
    """Seconds of one token of an answer."""
    return max(ANSWER_SECONDS, ANSWER_ROWS * min(steps.values()) / spec.training.effective_batch_size)


def seconds_of(trial: AnyTrial, runtimes: Mapping[str, float]) -> float:
    """Forecast of a whole trial; full fine-tuning, which has none, is taken to be as long as the longest candidate."""
    return runtimes[trial.candidate.name] if isinstance(trial, Trial) else max(runtimes.values())
