"""The state of a study while it runs, read from the files that the run writes.

`rankscope run` and `rankscope watch` show the same state; neither needs a channel to the processes that train.
"""

import json
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from rankscope.data.batches import total_steps
from rankscope.files import JsonlTail, corrupt_on_error
from rankscope.spec.candidates import TIME, AnyTrial, Trial
from rankscope.study.folder import AGAIN, FINISHED, NOT_ENDED, StudyFolder
from rankscope.study.missing import ProfileJob, missing_profiles, profile_seconds
from rankscope.study.question import Holder
from rankscope.text.catalogue import Catalogue
from rankscope.text.formats import loss

SMOOTHING = 0.2  # weight of a new step's loss in the smoothed training loss


class MetricsTail:
    """Progress of one trial, from the lines that its metrics.jsonl gains."""

    def __init__(self, path: Path) -> None:
        self._tail = JsonlTail(path)
        self._reset()

    def _reset(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.train_loss: float | None = None  # smoothed
        self.eval_loss: float | None = None

    def read(self) -> None:
        """Read the lines that are new since the last call. Raises DamagedError: a line is not one of metrics.jsonl."""
        first, lines = self._tail.read()
        if first == 1:
            self._reset()
        with corrupt_on_error(self._tail.path):
            for line in lines:
                self._add(json.loads(line))

    def _add(self, row: dict[str, Any]) -> None:
        self.step = max(self.step, row["step"])
        self.eval_loss = row.get("eval_loss", self.eval_loss)
        if "train_loss" in row:
            new, old = row["train_loss"], self.train_loss
            self.train_loss = new if old is None else (1 - SMOOTHING) * old + SMOOTHING * new
            self.seconds += row["step_seconds"]


class TrialState(NamedTuple):
    name: str
    rank: int  # 0 for full fine-tuning
    status: str  # see `Study.trial_record`
    step: int
    train_loss: float | None
    eval_loss: float | None


class State(NamedTuple):
    doing: str  # train, reference, profile, answer, conclude, curve, done or stopped
    training: dict[str, list[TrialState]]  # trials in training, by pack or by the name of a full fine-tuning trial
    packs: list[str]  # names of all packs
    results: dict[str, dict[str, Any]]  # results of the packs that this run has ended, see pack.json
    trials: list[TrialState]
    steps: int  # per trial
    profile: str | None  # candidate whose cost is being measured
    profiles_done: int
    profiles: int
    seconds_left: float | None  # for all training and measuring; None without a prediction
    rss_bytes: int | None  # of the working process; None without one, or on another machine

    @property
    def pack(self) -> str | None:
        return ", ".join(name for name in self.training if name in self.packs) or None


class LiveStudy:
    """Reader of a study's state, again and again, while a run writes it. Raises StudyDirectoryError: the study has no
    data yet."""

    def __init__(self, study: StudyFolder) -> None:
        self.study = study
        self.steps = total_steps(study.spec.training, study.data_facts["rows_train"])
        self._trials = {trial.name: trial for trial in study.all_trials()}
        self._tails = {name: MetricsTail(study.trial_folder(t) / "metrics.jsonl") for name, t in self._trials.items()}
        self._read_to_end: set[str] = set()
        self._began = math.inf  # when the last run that was seen began

    def read(self) -> State:
        """State of the whole study. Reads the record of every trial."""
        study, holder = self.study, self.study.holder()
        statuses = {name: study.trial_record(trial).status for name, trial in self._trials.items()}
        self._read_tails(statuses)
        self._began = began = _modified(study.file(".lock-holder")) or self._began
        training = self._training(statuses, began)
        names = (*study.spec.profiled(), TIME) if study.spec.measure.profiles else ()
        again = study.file(AGAIN).exists()
        measured = sum(len(study.profile_repeats(name, again)) for name in names)
        missing = missing_profiles(study.spec, study, again)
        profiles = measured + len(missing)
        return State(
            doing=self._doing(statuses, training, measured < profiles, holder is not None, began),
            training={name: [self._trial(one, statuses) for one in members] for name, members in training.items()},
            packs=list(study.division().packs),
            results=self._results(began),
            trials=[self._trial(name, statuses) for name in self._trials],
            steps=self.steps,
            profile=self._profile(began),
            profiles_done=measured,
            profiles=profiles,
            seconds_left=self._seconds_left(statuses, missing, max(1, len(training))),
            rss_bytes=_rss(holder),
        )

    def refresh(self, state: State) -> State:
        """`state` with the latest steps of the trials in training. Reads nothing but their new metrics."""
        statuses = {trial.name: trial.status for trials in state.training.values() for trial in trials}
        self._read_tails(statuses)
        training = {name: [self._trial(t.name, statuses) for t in trials] for name, trials in state.training.items()}
        return state._replace(training=training)

    def _read_tails(self, statuses: Mapping[str, str]) -> None:
        """Read new metrics, except of trials that have ended and were read since."""
        for name in statuses.keys() - self._read_to_end:
            self._tails[name].read()
        finished = {name for name, status in statuses.items() if status in FINISHED}
        self._read_to_end = self._read_to_end - statuses.keys() | finished  # a corrupt trial is trained again

    def _trial(self, name: str, statuses: Mapping[str, str]) -> TrialState:
        tail, trial = self._tails[name], self._trials[name]
        rank = trial.candidate.rank if isinstance(trial, Trial) else 0
        return TrialState(name, rank, statuses[name], tail.step, tail.train_loss, tail.eval_loss)

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
        if any(self._is_due(trial, statuses, began) for trial in study.trials):
            return "train"
        if any(_modified(job) >= began for job in study.file("curve").rglob("job.json")):
            return "curve"  # on several devices each trial has a job
        if _modified(answers / "job.json") >= began:
            return "conclude" if answered else "answer"
        if any(trial.name in training for trial in study.reference_trials):
            return "reference"
        if unmeasured:
            return "profile"
        if any(self._is_due(trial, statuses, began) for trial in study.reference_trials):
            return "reference"
        return "conclude" if answered or not study.spec.measure.answers else "answer"

    def _is_due(self, trial: AnyTrial, statuses: Mapping[str, str], began: float) -> bool:
        """Whether this run still trains the trial. One that failed in an earlier run is trained again."""
        status = statuses[trial.name]
        return status in NOT_ENDED or (status not in FINISHED and self._recorded(trial) < began)

    def _profile(self, began: float) -> str | None:
        """Name of the profile being measured: the last that this run began, until its repeat is recorded."""
        jobs = {folder.name: _modified(folder / "job.json") for folder in self.study.file("profiles", "jobs").glob("*")}
        name = max(jobs, key=jobs.__getitem__, default=None)
        recorded = [_modified(self.study.profile_file(name, again)) for again in (False, True)] if name else []
        return name if name and jobs[name] >= max(began, *recorded) else None

    def _seconds_left(self, statuses: Mapping[str, str], jobs: Sequence[ProfileJob], devices: int) -> float | None:
        """Predicted time of the steps and evaluations left, divided among the devices in use, and of the profiles left.
        Both are scaled by how much longer the steps so far took than predicted."""
        known, spec = self.study.prediction.get("candidates", {}), self.study.spec
        predicted = {name: found["runtime_seconds"] for name, found in known.items()}
        if not predicted or None in predicted.values():
            return None
        steps = {name: found["step_seconds"] for name, found in known.items()}
        taken = expected = left = 0.0
        for members in self.study.division().packs.values():
            for trial in members:
                share = self._tails[trial.name].step / self.steps
                expected += steps[trial.candidate.name] * self._tails[trial.name].step
                if statuses[trial.name] not in FINISHED:
                    left += predicted[trial.candidate.name] * (1 - share)
            taken += max(self._tails[trial.name].seconds for trial in members)
        slower = taken / expected if expected and taken else 1.0
        own = {name: steps[candidate.name] * slower for name, candidate in spec.profiled().items()}
        return left * slower / devices + sum(profile_seconds(spec.measure, job, own) for job in jobs)


def trial_rows(trials: list[TrialState], steps: int, text: Catalogue) -> list[list[str]]:
    """Name, status, step, training loss (smoothed) and held-out loss of each trial, as words and numbers."""

    rows = []
    for trial in trials:
        losses = [text("none") if value is None else loss(value) for value in (trial.train_loss, trial.eval_loss)]
        rows.append([trial.name, text(f"status.{trial.status}"), f"{trial.step:,} / {steps:,}", *losses])
    return rows


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
