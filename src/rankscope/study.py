"""The study directory: open, resume, read results and curves.

    NAME/
      study.yaml                  the question, resolved and complete
      machine.json                hardware, versions, model (its fingerprint is in trial.json, the data's in facts.json)
      data/                       tokens.safetensors, facts.json (what every trial reads)
      prediction.json             memory and time of each candidate, told before anything was trained
      trials/r008-lr2e-4-s0/      trial.json, metrics.jsonl, eval.json, adapter/
      reference/full-lr2e-5-s0/   of full fine-tuning: the same files without weights, and job.json, log.txt
      packs/p000/                 job.json, log.txt
      profiles/r008.json          time and memory of each repeat of a rank's profile, with samples
      profiles/control.json       the same of the lowest rank, measured twice over: the noise of every cost
      verdict.json
      report/                     index.html, report.md, results.csv, results.parquet, figures/

Each file has one writer. The tables below are tidy pandas DataFrames, whose columns are their contract.
"""

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import yaml
from filelock import FileLock, Timeout

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import read_json, read_jsonl, write_atomic, write_json
from rankscope.spec import CONTROL, AnyTrial, Candidate, StudySpec, Trial, resolve_spec, write_yaml

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1


class Evidence(NamedTuple):
    """All that a study knows, as plain data: what the analysis and the report start from."""

    spec: StudySpec
    results: "pd.DataFrame"
    curves: "pd.DataFrame"
    profiles: "pd.DataFrame"
    samples: "pd.DataFrame"
    examples: "pd.DataFrame"
    machine: dict[str, Any]
    data_facts: dict[str, Any]
    reference: "pd.DataFrame"
    """`Study.reference_examples()`: empty where the study has no reference."""
    prediction: Mapping[str, Any] = MappingProxyType({})
    """See `Study.prediction`."""
    reference_results: "pd.DataFrame | None" = None
    """`Study.reference_results()`; None is the same as an empty table."""


class Study:
    """A study's directory. Opening reads nothing but study.yaml; every table is read when it is asked for."""

    def __init__(self, path: Path, spec: StudySpec) -> None:
        self.path = path
        self.spec = spec

    @classmethod
    def create(cls, path: Path, spec: StudySpec) -> Self:
        """Makes the directory, or takes it up again where it holds the same study.

        Raises:
            StudyError: it holds another study; the message shows the difference.
        """
        if (path / "study.yaml").exists():
            study = cls.open(path)
            differences = _differences(study.spec, spec)
            if differences:
                raise StudyError(
                    f"{path} holds another study:\n" + "\n".join(f"  - {line}" for line in differences),
                    "Choose another --out, or run it with the values it has.",
                )
            return study
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise StudyError(f"{path} exists and is not a study", "Choose another --out.")
        try:
            write_atomic(path / "study.yaml", write_yaml(spec))
        except OSError as error:
            raise StudyDirectoryError(f"{path}: cannot be written: {error.strerror}", "Choose another --out.") from None
        return cls(path, spec)

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Opens an existing study.

        Raises:
            StudyDirectoryError: there is none at `path`.
            StudyError: its study.yaml is damaged.
        """
        path = Path(path)
        file = path / "study.yaml"
        if not file.is_file():
            raise StudyDirectoryError(f"{path}: not a study (no study.yaml)", "Give the directory that `run` printed.")
        try:
            values = yaml.safe_load(file.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise StudyError(f"{file}: damaged: {error}", "Restore the file, or run the study anew.") from None
        return cls(path, resolve_spec(values if isinstance(values, dict) else {}, source=str(file)))

    def trial_folder(self, trial: AnyTrial) -> Path:
        return self.path / ("trials" if isinstance(trial, Trial) else "reference") / trial.name

    def profile_file(self, name: str) -> Path:
        return self.path / "profiles" / f"{name}.json"

    def profile_repeats(self, name: str) -> list[dict[str, Any]]:
        """The repeats measured so far: see `rankscope.measure.profile.profile_candidate`."""
        file = self.profile_file(name)
        return list(read_json(file)["repeats"]) if file.exists() else []

    def trial_record(self, trial: AnyTrial) -> dict[str, Any]:
        """trial.json, or `{"status": "pending"}` before the trial has begun.

        A status is one of pending, running, done, diverged, oom, failed, interrupted.
        """
        file = self.trial_folder(trial) / "trial.json"
        return read_json(file) if file.exists() else {"status": "pending"}

    def pack_record(self, pack: str) -> dict[str, Any] | None:
        """pack.json: the pack's trials, and its `results` once it has ended; None before it has begun."""
        file = self.path / "packs" / pack / "pack.json"
        return read_json(file) if file.exists() else None

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Holds the study while a run writes to it. The system lets go of it when the process ends, however it ends.

        Raises:
            StudyDirectoryError: another run holds it; the message says which process.
        """
        holder = self.path / ".lock-holder"
        lock = FileLock(self.path / ".lock", blocking=False)
        try:
            lock.acquire()
        except Timeout:
            raise StudyDirectoryError(
                f"{self.path}: another run is writing to it ({holder.read_text().strip()})",
                "Wait for it to end, or choose another --out.",
            ) from None
        try:
            write_atomic(holder, f"process {os.getpid()} on {platform.node()}\n")
            yield
        finally:
            lock.release()

    def settle(self, trial: AnyTrial, status: str, reason: str, pack: str | None = None) -> None:
        """Ends a trial that did not end by itself: one that is pending or running gets `status` and `reason`."""
        record = self.trial_record(trial)
        if record["status"] not in ("pending", "running"):
            return
        known = {"schema": SCHEMA, "trial": trial.name, "results": None, "pack": pack} | record
        ended = trial.model_dump(mode="json") | {"status": status, "reason": reason}
        write_json(self.trial_folder(trial) / "trial.json", known | ended)

    @property
    def machine(self) -> dict[str, Any]:
        return read_json(self.path / "machine.json")

    @property
    def data_facts(self) -> dict[str, Any]:
        return read_json(self.path / "data" / "facts.json")

    @property
    def prediction(self) -> dict[str, Any]:
        """prediction.json: see `rankscope.forecast.StudyForecast.describe`; empty where there is none."""
        file = self.path / "prediction.json"
        return read_json(file) if file.exists() else {}

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """verdict.json: see `rankscope.analysis.verdict.Verdict`."""
        return read_json(self.path / "verdict.json")

    def results(self) -> "pd.DataFrame":
        """One row a trial: `trial candidate rank learning_rate lora_alpha scaling use_rslora target_modules seed
        status reason engine pack steps tokens trainable_params adapter_bytes train_loss eval_loss eval_perplexity
        eval_accuracy general_loss_before general_loss_after train_seconds eval_seconds tokens_per_second`.

        `train_loss` is the mean over the last tenth of the steps, `eval_loss` the final held-out loss (nats a label
        token); both are NaN for a trial that did not finish. `train_seconds` is the time of its pack's steps,
        `eval_seconds` of its evaluations; loading and saving are in neither. `tokens_per_second` counts the trial's own
        tokens over the time of the pack it shared. `general_loss_…` is the loss on `measure.forgetting` before training
        and after (nats a token); NaN without one.
        """
        import pandas as pd

        rows = [
            {
                **_identity(trial),
                "lora_alpha": trial.candidate.lora_alpha,
                "scaling": trial.candidate.scaling,
                "use_rslora": trial.candidate.use_rslora,
                "target_modules": _modules(trial.candidate),
                **self._outcome(trial),
            }
            for trial in self.spec.trials()
        ]
        return pd.DataFrame(rows).astype(dict.fromkeys(RESULT_FIELDS, "float64"))

    def reference_results(self) -> "pd.DataFrame":
        """The columns of `results()` that say something of full fine-tuning, one row a trial; the rank is 0. Empty
        where the study has no reference.
        """
        import pandas as pd

        rows = [{**_identity(trial), **self._outcome(trial)} for trial in self.spec.reference_trials()]
        frame = pd.DataFrame(rows, columns=[*IDENTITY_FIELDS, *OUTCOME_FIELDS, *RESULT_FIELDS])
        return frame.astype(dict.fromkeys(RESULT_FIELDS, "float64"))

    def _outcome(self, trial: AnyTrial) -> dict[str, Any]:
        record = self.trial_record(trial)
        results = record.get("results") or {}
        return {name: record.get(name) for name in OUTCOME_FIELDS} | {name: results.get(name) for name in RESULT_FIELDS}

    def curves(self) -> "pd.DataFrame":
        """One row a step of a trial: `trial candidate rank learning_rate seed step epoch train_loss eval_loss
        grad_norm step_learning_rate tokens label_tokens step_seconds`; `eval_loss` is NaN between evaluations, and
        step 0 is the evaluation before training.
        """
        import pandas as pd

        columns = [*IDENTITY_FIELDS, *CURVE_FIELDS]
        rows = []
        for trial in self.spec.trials():
            steps: dict[int, dict[str, Any]] = {}
            for row in read_jsonl(self.trial_folder(trial) / "metrics.jsonl"):
                steps.setdefault(row["step"], {}).update(row)
            rows += [{**_identity(trial), **row} for _, row in sorted(steps.items())]
        frame = pd.DataFrame(rows, columns=columns)
        return frame.astype(dict.fromkeys(CURVE_FIELDS[1:], "float64"))

    def examples(self) -> "pd.DataFrame":
        """One row a held-out example of a finished trial: `trial candidate rank learning_rate seed example loss
        label_tokens correct_tokens` (`loss` is the mean over the example's label tokens, in nats).
        """
        return self._examples(self.spec.trials())

    def reference_examples(self) -> "pd.DataFrame":
        """The same of full fine-tuning, whose rank is 0."""
        return self._examples(self.spec.reference_trials())

    def _examples(self, trials: Sequence[AnyTrial]) -> "pd.DataFrame":
        import pandas as pd

        frames = []
        for trial in trials:
            file = self.trial_folder(trial) / "eval.json"
            if file.exists() and self.trial_record(trial)["status"] == "done":
                frames.append(pd.DataFrame({**_identity(trial), **read_json(file)["examples"]}))
        columns = [*IDENTITY_FIELDS, "example", "loss", "label_tokens", "correct_tokens"]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def profiles(self) -> "pd.DataFrame":
        """One row a repeat of a candidate's profile: `candidate rank learning_rate repeat control` and the columns of
        `rankscope.measure.profile.profile_candidate`'s summary; empty where nothing was profiled.

        A rank is profiled once, so that its learning rates have the same numbers. Rows with `control` are those of the
        second profile of the first candidate: what differs between them and its own is noise.
        """
        import pandas as pd

        rows = [
            {**_candidate_identity(candidate), "repeat": number, "control": name == CONTROL, **repeat["summary"]}
            for name, measured in self.spec.profiled().items()
            for candidate in self.spec.candidates()
            if candidate == measured or (candidate.rank == measured.rank and name != CONTROL)
            for number, repeat in enumerate(self.profile_repeats(name))
        ]
        frame = pd.DataFrame(rows)
        numbers = [name for name in frame if str(name).endswith(("_bytes", "_per_token"))]  # None without a GPU
        return frame.astype(dict.fromkeys(numbers, "float64"))

    def samples(self) -> "pd.DataFrame":
        """One row a memory sample: `candidate rank learning_rate repeat phase step seconds rss_bytes
        gpu_allocated_bytes gpu_reserved_bytes gpu_nvml_bytes` (`phase`: load, warmup, train or eval; GPU columns are
        NaN without one). Of each rank the candidate that was measured; the control's are left out.
        """
        import pandas as pd

        frames = [
            pd.DataFrame({**_candidate_identity(candidate), "repeat": number, **repeat["samples"]})
            for name, candidate in self.spec.profiled().items()
            if name != CONTROL
            for number, repeat in enumerate(self.profile_repeats(name))
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def evidence(self) -> Evidence:
        """Reads everything once."""
        return Evidence(
            spec=self.spec,
            results=self.results(),
            curves=self.curves(),
            profiles=self.profiles(),
            samples=self.samples(),
            examples=self.examples(),
            machine=self.machine,
            data_facts=self.data_facts,
            prediction=self.prediction,
            reference=self.reference_examples(),
            reference_results=self.reference_results(),
        )


IDENTITY_FIELDS = ("trial", "candidate", "rank", "learning_rate", "seed")
OUTCOME_FIELDS = ("status", "reason", "engine", "pack")
RESULT_FIELDS = (
    "steps",
    "tokens",
    "trainable_params",
    "adapter_bytes",
    "train_loss",
    "eval_loss",
    "eval_perplexity",
    "eval_accuracy",
    "general_loss_before",
    "general_loss_after",
    "train_seconds",
    "eval_seconds",
    "tokens_per_second",
)
CURVE_FIELDS = (
    "step",
    "epoch",
    "train_loss",
    "eval_loss",
    "grad_norm",
    "step_learning_rate",
    "tokens",
    "label_tokens",
    "step_seconds",
)


def _identity(trial: AnyTrial) -> dict[str, Any]:
    if isinstance(trial, Trial):
        return {"trial": trial.name, **_candidate_identity(trial.candidate), "seed": trial.seed}
    names = {"trial": trial.name, "candidate": trial.candidate_name}
    return names | {"rank": 0, "learning_rate": trial.learning_rate, "seed": trial.seed}


def _candidate_identity(candidate: Candidate) -> dict[str, Any]:
    return {"candidate": candidate.name, "rank": candidate.rank, "learning_rate": candidate.learning_rate}


def _modules(candidate: Candidate) -> str:
    modules = candidate.target_modules
    return modules if isinstance(modules, str) else ",".join(modules)


def _differences(old: StudySpec, new: StudySpec) -> list[str]:
    """Fields that differ, one line each. The device and what is measured beside training may change."""
    before, after = _flatten(old.model_dump(mode="json")), _flatten(new.model_dump(mode="json"))
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} asked for"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def _flatten(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value
    return flat
