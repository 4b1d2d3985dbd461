"""Sync of a study's files to one tracker, called again and again while the study runs.

tracking/NAME.json records what has been sent: a resumed run sends no step twice, even where it went back to a
checkpoint, since repeated steps are bitwise the same.
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
from rankscope.study.tables import times
from rankscope.track import PROFILE_STEP, RANK, STEP, Point, Run, Tracker

GB = 1e9
NAMES = {"train_loss": "train/loss", "step_learning_rate": "train/learning_rate"}
"""Names of transformers' Trainer for fields of metrics.jsonl that have other names there: see `metric_name`."""

RESULTS = ("train_loss", "eval_loss", "eval_perplexity", "eval_accuracy", "trainable_params", "adapter_bytes")
"""Fields of a trial's results that its summary has."""


class TrackerSync:
    """Sends one study to one tracker. Errors of the client pass through."""

    def __init__(self, study: StudyFolder, tracker: Tracker, name: str) -> None:
        self.study, self.tracker = study, tracker
        self._file = study.file("tracking", f"{name}.json")
        self._destination = _short_hash(tracker.destination)  # a server's address may hold a key
        kept = self._kept()
        self._session: str = kept["session"]
        self._sent: dict[str, dict[str, Any]] = kept["trials"]
        self._tails = {t.name: JsonlTail(study.trial_folder(t) / "metrics.jsonl") for t in study.all_trials()}
        self._runs: dict[str, Run] = {}

    def poll(self) -> None:
        """Send the new steps of all trials."""
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
        """Send the rest, costs and summaries, and end the runs: called when the study has ended, in whatever way."""
        self.poll()
        for trial in self.study.all_trials():
            self._finish(trial)

    def _finish(self, trial: AnyTrial) -> None:
        record, before = self.study.trial_record(trial), self._sent.get(trial.name, {})
        if record.status == "pending" and trial.name not in self._runs:
            return
        status = "interrupted" if record.status in NOT_ENDED else record.status
        points = self._cost_points(trial)
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
        """Return what has been sent to the same destination. Where that record is corrupt, everything is sent as new
        runs."""
        with suppress(DamagedError), corrupt_on_error(self._file):
            kept = read_json(self._file)
            if kept["place"] == self._destination:
                return {"session": str(kept["session"]), "trials": dict(kept["trials"])}
        return {"session": secrets.token_hex(8), "trials": {}}

    def _new_rows(self, trial: AnyTrial) -> list[dict[str, Any]]:
        """Return the rows that have been neither sent nor read."""
        sent: int = self._sent.get(trial.name, {}).get("lines", 0)
        first, lines = self._tails[trial.name].read()
        return [json.loads(line) for number, line in enumerate(lines, first) if number > sent]

    def _keep(self) -> None:
        kept = {"place": self._destination, "session": self._session, "trials": self._sent}
        write_json(self._file, {"schema": SCHEMA, **kept})

    def _run(self, trial: AnyTrial) -> Run:
        """Return the trial's run, which begins with the first data to send."""
        name = trial.name
        if name not in self._runs:
            run_id = _short_hash(f"{self._session} {name}")
            config = trial_config(self.study, trial)
            self._runs[name] = self.tracker.begin(name, run_id, self.study.spec.name, config, name in self._sent)
            self._sent.setdefault(name, {"lines": 0, "costs": False, "status": None})
        return self._runs[name]

    def _cost_points(self, trial: AnyTrial) -> list[Point]:
        """Return the points of the candidate's profile; none for an unfinished profile, or full fine-tuning."""
        if not isinstance(trial, Trial):
            return []
        repeats, spec = self.study.profile_repeats(trial.candidate.profile_name), self.study.spec
        timed = times(self.study).get(trial.candidate.profile_name, {})
        if len(repeats) < spec.measure.repeats or "runtime_seconds" not in repeats[0]["summary"] | timed:
            return []
        found = costs(repeats, timed, spec.training.effective_batch_size)
        return [*memory_points(repeats), Point(RANK, trial.candidate.rank, found)]


def metric_name(field: str) -> str:
    """Return transformers' name for a field: `train/grad_norm` for `grad_norm`, `eval/loss` for `eval_loss`."""
    return NAMES.get(field) or (f"eval/{field[5:]}" if field.startswith("eval_") else f"train/{field}")


def step_point(row: Mapping[str, Any]) -> Point:
    """Return the point of a line of metrics.jsonl. Values that are no finite numbers are None there, and left out."""
    return Point(STEP, row["step"], _numbers({metric_name(name): row[name] for name in row if name != "step"}))


def memory_points(repeats: Sequence[Mapping[str, Any]]) -> list[Point]:
    """Return memory at each step of a profile, in GB (1e9 bytes): the mean of samples, over all repeats."""
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


def costs(repeats: Sequence[Mapping[str, Any]], timed: Mapping[str, Any], examples: int) -> dict[str, float]:
    """Return the cost of a rank alone, for steps of `examples` examples; GPU figures only where there is a GPU. They
    are means over repeats, and for peaks the highest, or `timed` side by side with the other ranks'. Memory of training
    is in GB (1e9 bytes); `train_runtime`, of the whole schedule, in seconds."""
    summaries = [repeat["summary"] | dict(timed) for repeat in repeats]
    found: dict[str, float] = {}
    cpu = "private" if all(summary.get("private_mean_bytes") is not None for summary in summaries) else "rss"
    for name, column in (("cpu", cpu), ("gpu", "gpu_allocated")):
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
    """Return the candidate's fields at the top level, as Trainer's users know them, and the rest as in study.yaml."""
    names = {"study": study.spec.name, "trial": trial.name, "seed": trial.seed}
    candidate = {"rank": 0, "learning_rate": getattr(trial, "learning_rate", None)}
    if isinstance(trial, Trial):
        candidate = trial.candidate.model_dump(mode="json")
    return names | candidate | study.spec.model_dump(mode="json", include={"model", "data", "training"})


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items() if isinstance(value, int | float)}
