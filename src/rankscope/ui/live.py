"""What a study is doing now, by the files that a run writes: for the terminal, and for `rankscope watch`."""

import json
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from rankscope.files import JsonlTail, understood
from rankscope.plan.runtime import START_SECONDS
from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.study.folder import FINISHED, NOT_ENDED, StudyFolder
from rankscope.study.question import Holder


class Follower:
    """Follows one trial's metrics.jsonl: reads only what is new."""

    def __init__(self, path: Path) -> None:
        self._tail = JsonlTail(path)
        self._begin()

    def _begin(self) -> None:
        self.step, self.seconds = 0, 0.0
        self.train_loss: float | None = None
        """Smoothed: a fifth of each new step's."""
        self.eval_loss: float | None = None

    def read(self) -> None:
        """Reads what is new.

        Raises:
            DamagedError: it is no line of metrics.jsonl.
        """
        first, lines = self._tail.read()
        if first == 1:
            self._begin()
        with understood(self._tail.path):
            for line in lines:
                self._take(json.loads(line))

    def _take(self, row: dict[str, Any]) -> None:
        self.step = max(self.step, row["step"])
        self.eval_loss = row.get("eval_loss", self.eval_loss)
        if "train_loss" in row:
            old = self.train_loss
            self.train_loss = row["train_loss"] if old is None else 0.8 * old + 0.2 * row["train_loss"]
            self.seconds += row["step_seconds"]


class TrialState(NamedTuple):
    """One trial now."""

    name: str
    rank: int  # 0 for full fine-tuning
    status: str  # see `Study.trial_record`
    step: int
    train_loss: float | None
    eval_loss: float | None


class State(NamedTuple):
    """A study now."""

    doing: str  # train, reference, profile, answer, conclude, done or stopped
    pack: str | None  # that trains; with several devices several, and commas between them
    trials: list[TrialState]
    steps: int  # of each trial
    profiles_done: int
    profiles: int
    seconds_left: float | None  # of all training and measuring; None before it can be told
    rss_bytes: int | None  # of the process that works; None where there is none, or it cannot be seen from here


class LiveStudy:
    """Reads a study again and again; what a run writes meanwhile does not disturb it."""

    def __init__(self, study: StudyFolder, steps: int) -> None:
        self.study, self.steps = study, steps
        self._read_to_end: set[str] = set()
        self.followers = {
            trial.name: Follower(study.trial_folder(trial) / "metrics.jsonl") for trial in study.all_trials()
        }

    def read(self) -> State:
        """The state now."""
        study, holder = self.study, self.study.holder()
        statuses = {trial.name: study.trial_record(trial)["status"] for trial in study.all_trials()}
        self._follow(statuses)
        packs = self._packs()
        trials = [self._trial(trial, statuses[trial.name]) for trial in study.all_trials()]
        names = list(study.spec.profiled()) if study.spec.measure.profiles else []
        measured = sum(min(len(study.profile_repeats(name)), study.spec.measure.repeats) for name in names)
        profiles = len(names) * study.spec.measure.repeats
        return State(
            doing=self._doing(statuses, measured < profiles, holder),
            pack=", ".join(packs) or None,
            trials=trials,
            steps=self.steps,
            profiles_done=measured,
            profiles=profiles,
            seconds_left=self._seconds_left(statuses, profiles - measured, max(1, len(packs))),
            rss_bytes=_rss(holder),
        )

    def _follow(self, statuses: dict[str, str]) -> None:
        """Reads what is new of all trials but those that were read when they had ended."""
        for name, status in statuses.items():
            if name not in self._read_to_end:
                self.followers[name].read()
            if status in FINISHED:
                self._read_to_end.add(name)
            else:
                self._read_to_end.discard(name)  # it was damaged, and is made again

    def _trial(self, trial: AnyTrial, status: str) -> TrialState:
        follower = self.followers[trial.name]
        rank = trial.candidate.rank if isinstance(trial, Trial) else 0
        return TrialState(trial.name, rank, status, follower.step, follower.train_loss, follower.eval_loss)

    def _doing(self, statuses: dict[str, str], unmeasured: bool, holder: Holder | None) -> str:
        spec = self.study.spec
        if holder is None:
            complete = set(statuses.values()) <= set(FINISHED) and not unmeasured
            return "done" if complete and self.study.file("verdict.json").exists() else "stopped"
        if any(statuses[trial.name] in NOT_ENDED for trial in spec.trials()):
            return "train"
        if unmeasured:
            return "profile"
        if any(statuses[trial.name] in NOT_ENDED for trial in spec.reference_trials()):
            return "reference"
        answered = not spec.measure.answers or self.study.file("answers", "answers.json").exists()
        return "conclude" if answered else "answer"

    def _packs(self) -> list[str]:
        """Those that train."""
        begun = [record for pack in self.study.division().packs if (record := self.study.pack_record(pack))]
        return [str(record["pack"]) for record in begun if record["results"] is None]

    def _seconds_left(self, statuses: dict[str, str], profiles: int, devices: int) -> float | None:
        """What was predicted of the steps that are left, shared by the devices that train now, and of the profiles,
        times how much longer the steps so far took than predicted."""
        predicted = {
            name: found["runtime_seconds"] for name, found in self.study.prediction.get("candidates", {}).items()
        }
        if not predicted or None in predicted.values():
            return None
        taken = expected = left = 0.0
        division = self.study.division().packs.values()
        for members in division:
            for trial in members:
                share = self.followers[trial.name].step / self.steps
                expected += predicted[trial.candidate.name] * share
                if statuses[trial.name] not in FINISHED:
                    left += predicted[trial.candidate.name] * (1 - share)
            taken += max(self.followers[trial.name].seconds for trial in members)
        left /= devices
        measure = self.study.spec.measure
        runtimes = [predicted[candidate.name] for candidate in self.study.spec.profiled().values()]
        if runtimes:
            share = (measure.warmup_steps + measure.steps) / self.steps
            left += profiles * (START_SECONDS + sum(runtimes) / len(runtimes) * share)
        return left * (taken / expected if expected and taken else 1.0)


def _rss(holder: Holder | None) -> int | None:
    """Resident memory of the process that the holder has started."""
    if holder is None or not holder.is_here:
        return None
    try:
        sizes = [child.memory_info().rss for child in psutil.Process(holder.pid).children()]
    except psutil.Error:
        return None
    return max(sizes, default=None)
