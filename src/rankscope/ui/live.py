"""The state of a study while it runs, read from the files that the run writes.

`rankscope run` and `rankscope watch` show the same state; neither needs a channel to the processes that train.
"""

import json
import math
from collections.abc import Collection, Mapping
from itertools import chain
from pathlib import Path
from time import monotonic, perf_counter
from types import MappingProxyType
from typing import Any, NamedTuple

import psutil

from rankscope.data.batches import eval_steps, total_steps
from rankscope.files import JsonlTail, corrupt_on_error, read_json
from rankscope.measure.cores import cpu_pressure, stalled_seconds
from rankscope.spec.candidates import TIME, AnyTrial
from rankscope.spec.task import BASE
from rankscope.study.folder import AGAIN, FINISHED, NOT_ENDED, StudyFolder
from rankscope.study.missing import (
    ProfileJob,
    extra_seconds,
    missing_profiles,
    scoring_seconds,
    seconds_of,
    work_seconds,
)
from rankscope.study.question import Holder
from rankscope.study.records import BUSY_PRESSURE
from rankscope.study.scores import SCORED, task_file
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import loss

SMOOTHING = 0.2  # weight of a new step's loss in the smoothed training loss

TRUSTED_SECONDS = 10.0  # of work: until a run has done so much, it is mostly the forecast that is believed


class MetricsTail:
    """Progress of one trial, from the lines that its metrics.jsonl gains."""

    def __init__(self, path: Path) -> None:
        self._tail = JsonlTail(path)
        self._begin()

    def _begin(self) -> None:
        self.step, self.seconds, self.evaluated = 0, 0.0, -1  # `evaluated`: last step with a held-out loss
        self.train_loss: float | None = None  # smoothed
        self.eval_loss: float | None = None

    def read(self) -> None:
        """Read the lines that are new since the last call. Raises DamagedError: a line is not one of metrics.jsonl."""
        first, lines = self._tail.read()
        if first == 1:
            self._begin()
        with corrupt_on_error(self._tail.path):
            for row in map(json.loads, lines):
                self.step = max(self.step, row["step"])
                if "eval_loss" in row:
                    self.eval_loss, self.evaluated = row["eval_loss"], row["step"]
                if "train_loss" in row:
                    old = row["train_loss"] if self.train_loss is None else self.train_loss
                    self.train_loss = old + SMOOTHING * (row["train_loss"] - old)
                    self.seconds += row["step_seconds"]


class TrialState(NamedTuple):
    name: str
    status: str  # see `Study.trial_record`
    step: int
    train_loss: float | None
    eval_loss: float | None
    evaluating: bool


class State(NamedTuple):
    doing: str  # train, reference, profile, task, answer, conclude, curve, done or stopped
    training: dict[str, list[TrialState]]  # trials in training, by pack or by the name of a full fine-tuning trial
    packs: list[str]  # names of all packs
    results: dict[str, dict[str, Any]]  # results of the packs that this run has ended, see pack.json
    trials: list[TrialState]
    steps: int  # per trial
    profile: str | None  # candidate whose cost is being measured
    profiles_done: int
    profiles: int
    rss_bytes: int | None  # of the working process; None without one, or on another machine
    seconds_left: float | None = None  # for the whole study; None without a prediction
    share: float = 0.0  # of the whole study that is done
    pack_seconds: Mapping[str, float] = MappingProxyType({})  # for each of `training`; empty without a prediction

    @property
    def activity(self) -> str:
        """What is done right now: a key of the catalogue's `live`."""
        if self.doing == "profile":
            return "prepare" if self.profile is None else "timing" if self.profile == TIME else "profile"
        if self.doing not in ("train", "reference"):
            return self.doing
        if not self.training:
            return "prepare" if self.results else "load"
        evaluating = any(trial.evaluating for trials in self.training.values() for trial in trials)
        return "evaluate" if evaluating else self.doing

    @property
    def ended(self) -> int:
        """Number of trials that have ended."""
        return sum(trial.status not in NOT_ENDED for trial in self.trials)


class Pace:
    """How many seconds a forecast second takes, from the forecast of the work that is left, and from the clock."""

    def __init__(self) -> None:
        self.scale: float | None = None
        self._done = self._taken = self._prior = self._changed = 0.0
        self.restart()

    def restart(self) -> None:
        """Count anew, since another run begins, or runs on more devices."""
        self._left = -1.0

    def update(self, left: float, prior: float) -> float:
        """Return the scale, given the forecast of the work left. `prior` is what earlier work suggests."""
        now = monotonic()
        if left > self._left:  # counting begins, or the work has grown
            self._prior = self.scale = self.scale or prior
            self._done, self._taken, self._changed = 0.0, 0.0, now
        elif left < self._left:
            self._done, self._taken = self._done + self._left - left, self._taken + now - self._changed
            self.scale = (TRUSTED_SECONDS * self._prior + self._taken) / (TRUSTED_SECONDS + self._done)
            self._changed = now
        self._left = left
        return self.scale or prior

    def skip(self, seconds: float) -> None:
        """Leave out work of so many forecast seconds, which is not done: a trial diverged or failed."""
        self._left -= seconds

    def passed(self) -> float:
        """Seconds since work was last seen to be done."""
        return monotonic() - self._changed


class LiveStudy:
    """Reader of the state of the study in `path`, again and again, while a run writes it."""

    study: StudyFolder

    def __init__(self, path: Path) -> None:
        self._path = path
        self._tails: dict[str, MetricsTail] = {}  # by trial; empty before the study has begun

    def _open(self) -> None:
        """Follow the study as it now is: it may have grown. Raises StudyDirectoryError: it has no data yet."""
        study = StudyFolder.open(self._path)
        self.steps = total_steps(study.spec.training, study.data_facts["rows_train"])
        self._evaluated = {0, *eval_steps(study.spec.training, self.steps)}
        self._trials = {trial.name: trial for trial in study.all_trials()}
        self._tails = {name: MetricsTail(study.trial_folder(t) / "metrics.jsonl") for name, t in self._trials.items()}
        self._began = math.inf  # when the last run that was seen began
        self._due, self._jobs = set[str](), list[ProfileJob]()  # trials and profiles that this run still has before it
        self._answering, self._scoring, self._devices = 0, 0.0, 1
        self._pace, self._prior, self._watched = Pace(), 1.0, (perf_counter(), stalled_seconds())
        self._step_seconds, self._runtimes = dict[str, float](), dict[str, float]()  # by candidate; empty if not known
        self.study = study  # last: where something above raises, the next read sees the change again

    def read(self) -> State:
        """State of the whole study. Reads the record of every trial. Raises StudyDirectoryError: there is no study yet,
        or it has no data; DamagedError, StudyError: it is corrupt."""
        if not self._tails or self.study.has_changed():
            self._open()
        study, holder = self.study, self.study.holder()
        statuses = {name: study.trial_record(trial).status for name, trial in self._trials.items()}
        for tail in self._tails.values():
            tail.read()
        began = _modified(study.file(".lock-holder")) or self._began
        training = self._training(statuses, began)
        names = (*study.spec.profiled(), TIME) if study.spec.measure.profiles else ()
        again = study.file(AGAIN).exists()
        measured = sum(len(study.profile_repeats(name, again)) for name in names)
        missing = missing_profiles(study.spec, study, again)
        doing = self._doing(statuses, training, bool(missing), holder is not None, began)
        self._count(doing, missing, {name for name in self._trials if self._is_due(name, statuses, began)})
        scored = doing in ("conclude", "done") or _modified(study.file("answers", "job.json")) >= began
        self._scoring = 0.0 if scored else self._still_to_score(statuses, began)
        if began != self._began or len(training) > self._devices:
            self._began, self._devices = began, max(self._devices, len(training))
            self._pace.restart()
        state = State(
            doing=doing,
            training={name: [self._trial(one, statuses) for one in members] for name, members in training.items()},
            packs=list(study.division().packs),
            results=self._results(began),
            trials=[self._trial(name, statuses) for name in self._trials],
            steps=self.steps,
            profile=self._profile(began),
            profiles_done=measured,
            profiles=measured + len(missing),
            rss_bytes=_rss(holder),
        )
        return self._with_times(state)

    def refresh(self, state: State) -> State:
        """`state` with the latest steps of the trials in training. Reads nothing but their new metrics."""
        statuses = {trial.name: trial.status for trials in state.training.values() for trial in trials}
        for name in statuses:
            self._tails[name].read()
        training = {name: [self._trial(t.name, statuses) for t in trials] for name, trials in state.training.items()}
        return self._with_times(state._replace(training=training))

    def _trial(self, name: str, statuses: Mapping[str, str]) -> TrialState:
        tail = self._tails[name]
        evaluating = statuses[name] == "running" and tail.step in self._evaluated and tail.evaluated < tail.step
        return TrialState(name, statuses[name], tail.step, tail.train_loss, tail.eval_loss, evaluating)

    def _training(self, statuses: Mapping[str, str], began: float) -> dict[str, list[str]]:
        """Names of the trials of each pack in training, and of each trial of full fine-tuning in training. A killed run
        leaves records of running trials behind. Those of full fine-tuning count where they were written after this run
        `began`; packs have no pack.json before this run begins them."""
        found = {}
        for pack, members in self.study.division().packs.items():
            names = [trial.name for trial in members]
            if any(statuses[name] == "running" for name in names):
                record = self.study.pack_record(pack)
                if record is not None and record.results is None:
                    found[pack] = names
        full = [trial for trial in self.study.reference_trials if statuses[trial.name] == "running"]
        return found | {trial.name: [trial.name] for trial in full if self._recorded(trial) >= began}

    def _results(self, began: float) -> dict[str, dict[str, Any]]:
        """Results of the packs that have ended since this run `began`."""
        packs = [p for p in self.study.division().packs if _modified(self.study.file("packs", p, "pack.json")) >= began]
        records = {pack: self.study.pack_record(pack) for pack in packs}
        return {pack: record.results for pack, record in records.items() if record and record.results}

    def _recorded(self, trial: AnyTrial) -> float:
        return _modified(self.study.trial_folder(trial) / "trial.json")

    def _doing(
        self, statuses: Mapping[str, str], training: Collection[str], unmeasured: bool, running: bool, began: float
    ) -> str:
        study, answers = self.study, self.study.file("answers")
        answered = _modified(answers / "answers.json") > _modified(answers / "job.json")  # a study that grows has both
        if not running:
            complete = set(statuses.values()) <= set(FINISHED) and not unmeasured
            return "done" if complete and study.file("verdict.json").exists() else "stopped"
        if any(self._is_due(trial.name, statuses, began) for trial in study.trials):
            return "train"
        if any(_modified(job) >= began for job in study.file("curve").rglob("job.json")):
            return "curve"  # on several devices each trial has a job
        scoring = any(self._unscored(job) or (job.parent / SCORED).exists() for job in self._scoring_jobs(began))
        if scoring and _modified(answers / "job.json") < began:
            return "task"
        if _modified(answers / "job.json") >= began:
            return "conclude" if answered else "answer"
        if any(trial.name in training for trial in study.reference_trials):
            return "reference"
        if unmeasured:
            return "profile"
        if any(self._is_due(trial.name, statuses, began) for trial in study.reference_trials):
            return "reference"
        return "conclude" if answered or not study.spec.measure.answers else "answer"

    def _scoring_jobs(self, began: float) -> list[Path]:
        return [job for job in self.study.file("task").glob("*/job.json") if _modified(job) >= began]

    def _unscored(self, job: Path) -> float:
        """Number of models that a job has not scored on the task yet. Those that it scores together count in parts."""
        models, began, scored = _models(job), _modified(job), 0.0
        if _modified(progress := job.parent / SCORED) >= began:
            scored = read_json(progress)["models"]
        written = sum(_modified(task_file(self.study, self._trials.get(name))) >= began for name in models)
        return len(models) - min(written + scored, len(models))

    def _still_to_score(self, statuses: Mapping[str, str], began: float) -> float:
        """Number of models that this run still scores."""
        if not self.study.spec.measure.task:
            return 0.0
        jobs = self._scoring_jobs(began)
        named = {name for job in jobs for name in _models(job)}
        able = (trial.name for trial in self.study.trials if statuses[trial.name] in ("done", *NOT_ENDED))
        others = {BASE, *able} - named
        lacking = sum(not task_file(self.study, self._trials.get(name)).exists() for name in others)
        return lacking + sum(map(self._unscored, jobs))

    def _is_due(self, name: str, statuses: Mapping[str, str], began: float) -> bool:
        """Whether this run still trains the trial. One that failed in an earlier run is trained again."""
        status = statuses[name]
        return status in NOT_ENDED or (status not in FINISHED and self._recorded(self._trials[name]) < began)

    def _profile(self, began: float) -> str | None:
        """Name of the profile being measured: the last that this run began, until its repeat is recorded."""
        jobs = {folder.name: _modified(folder / "job.json") for folder in self.study.file("profiles", "jobs").glob("*")}
        name = max(jobs, key=jobs.__getitem__, default=None)
        recorded = [_modified(self.study.profile_file(name, again)) for again in (False, True)] if name else []
        return name if name and jobs[name] >= max(began, *recorded) else None

    def _unanswered(self) -> int:
        """Number of models that are still to answer: the base model answers whenever a candidate does."""
        kept, study = self.study.kept_answers(), self.study
        answered = {trial.candidate.name for trial in study.trials if trial.name in kept}
        lacking = len(study.spec.candidates()) - len(answered)
        return lacking + 1 if study.spec.measure.answers and lacking else 0

    def _count(self, doing: str, missing: list[ProfileJob], due: set[str]) -> None:
        """Note what this run still has before it, the forecast times, if all are known, and by how much longer the
        steps took that are done."""
        given_up = sum(self._left(name) for name in self._due - due) if self._runtimes else 0.0
        self._pace.skip(given_up / self._devices)
        self._due, self._jobs = due, missing if doing in ("train", "profile") else []
        self._answering = 0 if doing in ("conclude", "done") else self._unanswered()
        found = self.study.prediction.get("candidates", {})
        known = {one.name: found.get(one.name, {}).get("runtime_seconds") for one in self.study.spec.candidates()}
        if None in known.values():
            return
        self._runtimes, self._step_seconds = known, {name: found[name]["step_seconds"] for name in known}
        taken = expected = 0.0
        for members in self.study.division().packs.values():
            expected += sum(self._step_seconds[one.candidate.name] * self._tails[one.name].step for one in members)
            taken += max(self._tails[one.name].seconds for one in members)
        self._prior = taken / expected if expected and taken else 1.0

    def _left(self, name: str) -> float:
        """Forecast seconds of the steps and evaluations that the trial lacks."""
        return seconds_of(self._trials[name], self._runtimes) * (1 - self._tails[name].step / self.steps)

    def _with_times(self, state: State) -> State:
        """`state` with the time that is left and the share that is done.

        What counts is the forecast that the study began with, of training, evaluation, profiles, scores, answers and
        the report; by how much longer this run took than it for what it has done, the rest is taken to take longer too.
        """
        spec, runtimes, steps = self.study.spec, self._runtimes, self._step_seconds
        if state.doing == "done":
            return state._replace(seconds_left=0.0, share=1.0)
        if not runtimes or state.doing == "curve":
            parts = sum(tail.step / self.steps for tail in self._tails.values()) + state.profiles_done
            return state._replace(share=parts / (len(self._tails) + state.profiles))
        left = {name: 1 - self._tails[name].step / self.steps if name in self._due else 0.0 for name in self._trials}
        scoring = scoring_seconds(spec, steps, self.study.data_facts, self._scoring)
        work = work_seconds(spec, steps, runtimes, left, self._jobs, self._answering, scoring)
        ahead = work.trials / self._devices + work.profiles + work.others
        scale = self._pace.update(ahead, self._prior)
        busy = (cpu_pressure(*self._watched) or 0.0) > BUSY_PRESSURE
        extra = busy * extra_seconds(spec, {name: scale * one for name, one in steps.items()}, self._jobs)
        seconds = max(scale * ahead + extra - self._pace.passed(), 0.0)
        scores = scoring_seconds(spec, steps, self.study.data_facts, 1 + len(spec.trials()))
        everything = dict.fromkeys(left, 1.0), missing_profiles(spec, None), 1 + len(spec.candidates()), scores
        whole = scale * max(ahead, sum(work_seconds(spec, steps, runtimes, *everything))) + extra
        packs = {
            name: scale * sum(self._left(one.name) for one in pack if one.name in self._due)
            for name, pack in state.training.items()
        }
        return state._replace(seconds_left=seconds, share=max(0.0, 1 - seconds / whole), pack_seconds=packs)


def trial_rows(trials: list[TrialState], steps: int, text: Catalogue) -> list[list[str]]:
    """Name, status, step, training loss (smoothed) and held-out loss of each trial, as words and numbers."""
    rows = []
    for trial in trials:
        losses = [text("none") if value is None else loss(value) for value in (trial.train_loss, trial.eval_loss)]
        rows.append([trial.name, text(f"status.{trial.status}"), f"{trial.step:,} / {steps:,}", *losses])
    return rows


def _models(job: Path) -> list[str]:
    """Names of the models that a job scores."""
    return list(chain(*read_json(job)["parts"]))


def _modified(file: Path) -> float:
    """Time of a file's last change, in seconds since 1970; 0 without the file."""
    try:
        return file.stat().st_mtime
    except OSError:
        return 0.0


def _rss(holder: Holder | None) -> int | None:
    """Resident memory of the largest child process of the study's holder, in bytes."""
    if holder is None or not holder.is_here:
        return None
    try:
        sizes = [child.memory_info().rss for child in psutil.Process(holder.pid).children()]
    except psutil.Error:
        return None
    return max(sizes, default=None)
