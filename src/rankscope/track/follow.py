"""Sync of a study's files to one tracker, called again and again while the study runs.

tracking/NAME.json records what has been sent: a resumed run sends no step twice, even where it went back to a
checkpoint, since repeated steps are bitwise the same.
"""

import hashlib
import json
import math
import secrets
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import pandas as pd

from rankscope.errors import DamagedError
from rankscope.files import JsonlTail, corrupt_on_error, file_sha256, read_json, write_json
from rankscope.spec.candidates import AnyTrial, Candidate, Trial
from rankscope.study import tables
from rankscope.study.folder import NOT_ENDED, StudyFolder
from rankscope.text.verdict import verdict_sentence
from rankscope.track import PROFILE_STEP, RANK, STEP, Point, Tracker

NAMES = {"train_loss": "train/loss", "step_learning_rate": "train/learning_rate"}
"""Names of transformers' Trainer for fields of metrics.jsonl that have other names there: see `metric_name`."""

RESULTS = ("train_loss", "eval_loss", "eval_perplexity", "eval_accuracy", "trainable_params", "adapter_bytes")
"""Fields of a trial's results that its summary has."""

MEMORY = {"rss_bytes": "system/cpu_memory_gb", "gpu_allocated_bytes": "system/gpu_memory_gb"}
"""Columns of `Study.samples` that a trial's run has over the steps of its profile."""

BY_RANK = "by-rank"
"""Name of a study's own run. A later verdict has another, `by-rank-2`: no tool takes a point back."""


class TrackerSync:
    """Sends one study to one tracker. Errors of the client pass through."""

    def __init__(self, study: StudyFolder, tracker: Tracker, name: str) -> None:
        self.study, self.tracker = study, tracker
        self._file = study.file("tracking", f"{name}.json")
        self._destination = _short_hash(tracker.destination)  # a server's address may hold a key
        kept = self._kept()
        self._session: str = kept["session"]
        self._sent: dict[str, dict[str, Any]] = kept["trials"]
        self._verdicts: list[str] = kept.get("verdicts", [])  # hashes of verdict.json; version 0.1 sent none
        self._tails = {t.name: JsonlTail(study.trial_folder(t) / "metrics.jsonl") for t in study.all_trials()}
        self._runs: dict[str, Any] = {}  # the client's, of this session

    def _kept(self) -> dict[str, Any]:
        """What has been sent to the same destination. Where that record is corrupt, everything is sent as new runs."""
        with suppress(DamagedError), corrupt_on_error(self._file):
            kept = read_json(self._file)
            if kept["place"] == self._destination:
                return {**kept, "session": str(kept["session"]), "trials": dict(kept["trials"])}
        return {"session": secrets.token_hex(8), "trials": {}}

    def _keep(self) -> None:
        kept = {"session": self._session, "trials": self._sent, "verdicts": self._verdicts}
        write_json(self._file, {"schema": 1, "place": self._destination, **kept})

    def poll(self) -> None:
        """Send the new steps of all trials."""
        rows = {trial: self._new_rows(trial) for trial in self.study.all_trials()}
        try:
            for trial, new in rows.items():
                if new:
                    self.tracker.log(self._run(trial), [step_point(row) for row in new])
                    self._sent[trial.name]["lines"] += len(new)
        finally:
            if any(rows.values()):
                self._keep()

    def _new_rows(self, trial: AnyTrial) -> list[dict[str, Any]]:
        """Rows that have been neither sent nor read."""
        sent: int = self._sent.get(trial.name, {}).get("lines", 0)
        first, lines = self._tails[trial.name].read()
        return [json.loads(line) for number, line in enumerate(lines, first) if number > sent]

    def finish(self) -> None:
        """Send the rest, costs, summaries and the verdict, and end the runs: called when the study has ended, in
        whatever way."""
        self.poll()
        found, samples = costs(tables.profiles(self.study)), tables.samples(self.study)
        for trial in self.study.all_trials():
            own = found.get(trial.candidate.name, {}) if isinstance(trial, Trial) else {}
            memory = memory_points(samples, trial.candidate) if isinstance(trial, Trial) and own else []
            self._finish(trial, own, memory)
        if verdict := self.study.find_verdict():
            self._conclude(verdict, file_sha256(self.study.file("verdict.json")), found)

    def _finish(self, trial: AnyTrial, found: Mapping[str, float], memory: Sequence[Point]) -> None:
        """End a trial's run, with what it has not been sent: its costs, and the results of its status."""
        record, before = self.study.trial_record(trial), self._sent.get(trial.name, {})
        begun = trial.name in self._runs
        if record.status == "pending" and not begun:
            return
        status = "interrupted" if record.status in NOT_ENDED else record.status
        new_status, new_costs = before.get("status") != status, bool(found) and not before.get("costs")
        if not (new_status or new_costs or begun):
            return
        run, results = self._run(trial), record.results
        if new_costs:
            self.tracker.log(run, memory)
        metrics = {f"final/{name}": getattr(results, name, None) for name in RESULTS} if new_status else {}
        metrics |= {f"cost/{name}": value for name, value in found.items()} if new_costs else {}
        step = int(results.steps or 0) if results else 0
        self.tracker.finish(run, Point(STEP, step, _numbers(metrics)), status)
        self._sent[trial.name] |= {"costs": new_costs or before.get("costs", False), "status": status}
        self._keep()

    def _conclude(self, verdict: Mapping[str, Any], sha256: str, found: Mapping[str, Mapping[str, float]]) -> None:
        """Send the study's own run, unless this verdict has one: its ranks, the verdict's sentence, the report."""
        if sha256 in self._verdicts:
            return
        self._verdicts.append(sha256)
        number = len(self._verdicts)
        run = self._begin(BY_RANK if number == 1 else f"{BY_RANK}-{number}", {}, False)
        losses = tables.results(self.study).groupby("candidate")["train_loss"].mean()
        for row in verdict["comparison"]:
            own = {"train_loss": losses[row["candidate"]], "eval_loss": row["eval_loss"]}
            own |= found.get(row["candidate"], {})
            metrics = {f"by_rank/{name}": float(value) for name, value in own.items()}
            self.tracker.log(run, [Point(RANK, row["rank"], metrics)])
        pages = sorted(self.study.file("report").glob("index*.html"))
        self.tracker.conclude(run, verdict_sentence(verdict), pages)
        self.tracker.finish(run, Point(RANK, max(self.study.spec.ranks), {}), "done")
        self._keep()

    def _run(self, trial: AnyTrial) -> Any:
        """The trial's run, which begins with the first data to send."""
        name = trial.name
        if name not in self._runs:
            self._runs[name] = self._begin(name, trial_config(trial), name in self._sent)
            self._sent.setdefault(name, {"lines": 0, "costs": False, "status": None})
        return self._runs[name]

    def _begin(self, name: str, own: Mapping[str, Any], again: bool) -> Any:
        spec, run_id = self.study.spec, _short_hash(f"{self._session} {name}")
        shared = spec.model_dump(mode="json", include={"model", "data", "training"})
        return self.tracker.begin(name, run_id, spec.name, {"study": spec.name, **own, **shared}, again)


def metric_name(field: str) -> str:
    """transformers' name for a field: `train/grad_norm` for `grad_norm`, `eval/loss` for `eval_loss`."""
    return NAMES.get(field) or (f"eval/{field[5:]}" if field.startswith("eval_") else f"train/{field}")


def step_point(row: Mapping[str, Any]) -> Point:
    """Point of a line of metrics.jsonl. Values that are no finite numbers are None there, and left out."""
    return Point(STEP, row["step"], _numbers({metric_name(name): row[name] for name in row if name != "step"}))


def costs(profiles: pd.DataFrame) -> dict[str, dict[str, float]]:
    """Costs of each candidate alone, by name, where its time is known; GPU figures only where there is a GPU. Means
    over repeats, and of peaks the highest. Memory of training is in GB (1e9 bytes); `train_runtime`, of the whole
    schedule, in seconds."""
    from rankscope.analysis.costs import cpu_memory  # at the end of a study: scipy takes its time

    if profiles.empty:
        return {}
    cpu, timed = cpu_memory(profiles), profiles[~profiles["control"] & profiles["runtime_seconds"].notna()]
    found = timed.groupby("candidate").agg(
        average_cpu_memory_gb=(f"{cpu}_mean_bytes", "mean"),
        peak_cpu_memory_gb=(f"{cpu}_peak_bytes", "max"),
        average_gpu_memory_gb=("gpu_allocated_mean_bytes", "mean"),
        peak_gpu_memory_gb=("gpu_allocated_peak_bytes", "max"),
        train_runtime=("runtime_seconds", "mean"),
        train_tokens_per_second=("tokens_per_second", "mean"),
    )
    found.loc[:, found.columns.str.endswith("_gb")] /= 1e9
    return {str(name): _numbers(row) for name, row in found.to_dict("index").items()}


def memory_points(samples: pd.DataFrame, candidate: Candidate) -> list[Point]:
    """Memory at each step of a candidate's profile, in GB (1e9 bytes): the mean of samples, over all repeats."""
    own = (samples["rank"] == candidate.rank) & (samples["variant"] == candidate.variant)
    rows = samples[own & samples["phase"].isin(("warmup", "train"))].set_index("step")
    means = rows[[*MEMORY]].astype("float64").groupby("step").mean().rename(columns=MEMORY) / 1e9
    rows_by_step = zip(means.index.tolist(), means.to_dict("records"), strict=True)
    return [Point(PROFILE_STEP, step, _numbers(row)) for step, row in rows_by_step]


def trial_config(trial: AnyTrial) -> dict[str, Any]:
    """The candidate's fields at the top level, as Trainer's users know them. Full fine-tuning has rank 0."""
    candidate = {"rank": 0, "learning_rate": getattr(trial, "learning_rate", None)}
    if isinstance(trial, Trial):
        candidate = trial.candidate.model_dump(mode="json")
    return {"trial": trial.name, "seed": trial.seed, **candidate}


def _short_hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    """The values that are numbers."""
    numbers = {str(name): float(value) for name, value in values.items() if isinstance(value, int | float)}
    return {name: value for name, value in numbers.items() if not math.isnan(value)}
