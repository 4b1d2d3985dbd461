"""Follows a study's files and forwards what is new to one tracker: called again and again while the study runs.

What has been sent is kept in tracking/NAME.json: a run that goes on sends no step twice, also where it went back to a
checkpoint, since the steps that it repeats are bitwise those that were sent.
"""

import hashlib
import json
import secrets
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import suppress
from statistics import fmean
from typing import Any

from rankscope.errors import DamagedError
from rankscope.files import JsonlTail, corrupt_on_error, read_json, write_json
from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.study.folder import NOT_ENDED, SCHEMA, StudyFolder
from rankscope.track import PROFILE_STEP, RANK, STEP, Point, Run, Tracker

GB = 1e9

NAMES = {"train_loss": "train/loss", "step_learning_rate": "train/learning_rate"}
"""Fields of metrics.jsonl under the names of transformers' Trainer, where those differ: see `metric_name`."""

RESULTS = ("train_loss", "eval_loss", "eval_perplexity", "eval_accuracy", "trainable_params", "adapter_bytes")
"""Of a trial's results, what its summary has."""


class Follower:
    """Sends one study to one tracker. Whatever the client raises passes through."""

    def __init__(self, study: StudyFolder, tracker: Tracker, name: str) -> None:
        self.study, self.tracker = study, tracker
        self._file = study.file("tracking", f"{name}.json")
        self._place = hashlib.sha256(tracker.place.encode()).hexdigest()[:16]  # a server's address may hold a key
        kept = self._kept()
        self._session: str = kept["session"]
        self._sent: dict[str, dict[str, Any]] = kept["trials"]
        self._tails = {
            trial.name: JsonlTail(study.trial_folder(trial) / "metrics.jsonl") for trial in study.all_trials()
        }
        self._runs: dict[str, Run] = {}

    def poll(self) -> None:
        """Sends the steps that are new, of all trials."""
        rows = {trial: self._new_rows(trial) for trial in self.study.all_trials()}
        try:
            for trial, new in rows.items():
                if new:
                    self._run(trial).log([step_point(row) for row in new])
                    self._sent[trial.name]["lines"] += len(new)
        finally:
            if any(rows.values()):
                self._keep()

    def finish(self) -> None:
        """Sends the rest, costs and summaries, and ends the runs: called when the study has ended, however it has."""
        self.poll()
        for trial in self.study.all_trials():
            self._finish(trial)

    def _finish(self, trial: AnyTrial) -> None:
        record, before = self.study.trial_record(trial), self._sent.get(trial.name, {})
        status, points = record.status, self._cost_points(trial)
        if status == "pending" and trial.name not in self._runs:
            return
        if status in NOT_ENDED:
            status = "interrupted"
        new_status, new_costs = before.get("status") != status, bool(points) and not before.get("costs")
        if not (new_status or new_costs or trial.name in self._runs):
            return
        run, results = self._run(trial), record.results
        if new_costs:
            run.log(points)
        metrics = _numbers({name: getattr(results, name, None) for name in RESULTS}) if new_status else {}
        run.finish(Point(STEP, int(results.steps or 0) if results else 0, metrics), status)
        self._sent[trial.name] |= {"costs": new_costs or before.get("costs", False), "status": status}
        self._keep()

    def _kept(self) -> dict[str, Any]:
        """What has been sent to the same place. Where that is damaged, all is sent anew, as other runs."""
        with suppress(DamagedError), corrupt_on_error(self._file):
            kept = read_json(self._file)
            if kept["place"] == self._place:
                return {"session": str(kept["session"]), "trials": dict(kept["trials"])}
        return {"session": secrets.token_hex(8), "trials": {}}

    def _new_rows(self, trial: AnyTrial) -> list[dict[str, Any]]:
        """Rows after those that have been sent, as far as they have not been read."""
        sent: int = self._sent.get(trial.name, {}).get("lines", 0)
        first, lines = self._tails[trial.name].read()
        return [json.loads(line) for number, line in enumerate(lines, first) if number > sent]

    def _keep(self) -> None:
        write_json(self._file, {"schema": SCHEMA, "place": self._place, "session": self._session, "trials": self._sent})

    def _run(self, trial: AnyTrial) -> Run:
        """The trial's run, which is begun when there is something to send."""
        name = trial.name
        if name not in self._runs:
            run_id = hashlib.sha256(f"{self._session} {name}".encode()).hexdigest()[:16]
            config = trial_config(self.study, trial)
            self._runs[name] = self.tracker.begin(name, run_id, self.study.spec.name, config, name in self._sent)
            self._sent.setdefault(name, {"lines": 0, "costs": False, "status": None})
        return self._runs[name]

    def _repeats(self, trial: AnyTrial) -> list[dict[str, Any]]:
        """All repeats of the profile of the trial's rank; none where it is not finished, nor of full fine-tuning."""
        if not isinstance(trial, Trial):
            return []
        repeats = self.study.profile_repeats(trial.candidate.profile_name)
        return repeats if len(repeats) >= self.study.spec.measure.repeats else []

    def _cost_points(self, trial: AnyTrial) -> list[Point]:
        repeats = self._repeats(trial)
        if not isinstance(trial, Trial) or not repeats:
            return []
        examples = self.study.spec.training.effective_batch_size
        return [*memory_points(repeats), Point(RANK, trial.candidate.rank, costs(repeats, examples))]


def metric_name(field: str) -> str:
    """`train/grad_norm` of `grad_norm`, `eval/loss` of `eval_loss`: as transformers' Trainer names them."""
    return NAMES.get(field) or (f"eval/{field[5:]}" if field.startswith("eval_") else f"train/{field}")


def step_point(row: Mapping[str, Any]) -> Point:
    """A line of metrics.jsonl. What is not a finite number there is None, and left out."""
    return Point(STEP, row["step"], _numbers({metric_name(name): row[name] for name in row if name != "step"}))


def memory_points(repeats: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Memory at each step of a profile, in GB (1e9 bytes): the mean of its samples, over all repeats."""
    samples: dict[int, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for columns in (repeat["samples"] for repeat in repeats):
        for number, phase in enumerate(columns["phase"]):
            if phase in ("warmup", "train"):
                for name, column in (("cpu", "rss_bytes"), ("gpu", "gpu_allocated_bytes")):
                    if columns[column][number] is not None:
                        samples[columns["step"][number]][name].append(columns[column][number] / GB)
    return [
        Point(PROFILE_STEP, step, {f"system/{name}_memory_gb": fmean(values) for name, values in found.items()})
        for step, found in sorted(samples.items())
    ]


def costs(repeats: Sequence[Mapping[str, Any]], examples: int) -> dict[str, float]:
    """What a rank costs alone, where a step has so many `examples`; without a GPU nothing of one.

    Means over repeats, of peaks the highest. Memory of training is in GB (1e9 bytes); `train_runtime`, of the whole
    schedule, in seconds.
    """
    summaries = [repeat["summary"] for repeat in repeats]
    found: dict[str, float] = {}
    for name, column in (("cpu", "rss"), ("gpu", "gpu_allocated")):
        if all(summary[f"{column}_mean_bytes"] is not None for summary in summaries):
            found[f"average_{name}_memory_gb"] = fmean(summary[f"{column}_mean_bytes"] for summary in summaries) / GB
            found[f"peak_{name}_memory_gb"] = max(summary[f"{column}_peak_bytes"] for summary in summaries) / GB
    steps_per_second = 1 / fmean(summary["step_seconds_mean"] for summary in summaries)
    return found | {
        "train_runtime": fmean(summary["runtime_seconds"] for summary in summaries),
        "train_steps_per_second": steps_per_second,
        "train_samples_per_second": steps_per_second * examples,
        "train_tokens_per_second": fmean(summary["tokens_per_second"] for summary in summaries),
    }


def trial_config(study: StudyFolder, trial: AnyTrial) -> dict[str, Any]:
    """The fields of the candidate beside each other, as Trainer's users have them; the rest as in study.yaml."""
    asked = study.spec.model_dump(mode="json")
    candidate = (
        trial.candidate.model_dump(mode="json")
        if isinstance(trial, Trial)
        else {"rank": 0, "learning_rate": trial.learning_rate}
    )
    kept = {name: asked[name] for name in ("model", "data", "training")}
    names = {"study": study.spec.name, "trial": trial.name, "seed": trial.seed}
    return {**names, **candidate, **kept}


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
