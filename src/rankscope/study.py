"""The study directory: open, resume, read results and curves.

    NAME/
      study.yaml                  the question, resolved and complete
      machine.json                hardware, versions, model (its fingerprint is in trial.json, the data's in facts.json)
      data/                       tokens.safetensors, facts.json (what every trial reads)
      trials/r008-lr2e-4-s0/      trial.json, metrics.jsonl, eval.json, adapter/
      packs/p000/                 job.json, log.txt
      profiles/r008-lr2e-4.json   time and memory of each repeat, with samples
      verdict.json
      report/                     index.html, report.md, results.csv, results.parquet, figures/

Each file has one writer. The tables below are tidy pandas DataFrames, whose columns are their contract.
"""

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import yaml
from filelock import FileLock, Timeout

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import read_json, read_jsonl, write_atomic, write_json
from rankscope.spec import Candidate, StudySpec, Trial, resolve_spec, write_yaml

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

    def trial_folder(self, trial: Trial) -> Path:
        return self.path / "trials" / trial.name

    def profile_file(self, candidate: Candidate) -> Path:
        return self.path / "profiles" / f"{candidate.name}.json"

    def trial_record(self, trial: Trial) -> dict[str, Any]:
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

    def settle(self, trial: Trial, status: str, reason: str, pack: str | None = None) -> None:
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

    @cached_property
    def verdict(self) -> dict[str, Any]:
        """verdict.json: see `rankscope.analysis.verdict.Verdict`."""
        return read_json(self.path / "verdict.json")

    def results(self) -> "pd.DataFrame":
        """One row a trial: `trial candidate rank learning_rate lora_alpha scaling use_rslora target_modules seed
        status reason engine pack steps tokens trainable_params adapter_bytes train_loss eval_loss eval_perplexity
        eval_accuracy train_seconds tokens_per_second`.

        `train_loss` is the mean over the last tenth of the steps, `eval_loss` the final held-out loss (nats a label
        token); both are NaN for a trial that did not finish. `tokens_per_second` counts the trial's own tokens over
        the time of the pack it shared.
        """
        import pandas as pd

        rows = []
        for trial in self.spec.trials():
            record = self.trial_record(trial)
            rows.append(
                {
                    **_identity(trial),
                    "lora_alpha": trial.candidate.lora_alpha,
                    "scaling": trial.candidate.scaling,
                    "use_rslora": trial.candidate.use_rslora,
                    "target_modules": _modules(trial.candidate),
                    "status": record["status"],
                    "reason": record.get("reason"),
                    "engine": record.get("engine"),
                    "pack": record.get("pack"),
                    **{name: (record.get("results") or {}).get(name) for name in RESULT_FIELDS},
                }
            )
        frame = pd.DataFrame(rows)
        return frame.astype(dict.fromkeys(RESULT_FIELDS, "float64"))

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
        import pandas as pd

        frames = []
        for trial in self.spec.trials():
            file = self.trial_folder(trial) / "eval.json"
            if file.exists() and self.trial_record(trial)["status"] == "done":
                frames.append(pd.DataFrame({**_identity(trial), **read_json(file)["examples"]}))
        columns = [*IDENTITY_FIELDS, "example", "loss", "label_tokens", "correct_tokens"]
        return pd.concat(frames, ignore_index=True)[columns] if frames else pd.DataFrame(columns=columns)

    def profiles(self) -> "pd.DataFrame":
        """One row a repeat of a candidate's profile: `candidate rank learning_rate repeat` and the fields of
        `rankscope.measure.profile.ProfileSummary`; empty where nothing was profiled.
        """
        import pandas as pd

        rows = [
            {**_candidate_identity(candidate), "repeat": number, **repeat["summary"]}
            for candidate, number, repeat in self._repeats()
        ]
        return pd.DataFrame(rows)

    def samples(self) -> "pd.DataFrame":
        """One row a memory sample: `candidate rank learning_rate repeat phase step seconds rss_bytes
        gpu_allocated_bytes gpu_reserved_bytes` (`phase`: load, warmup, train or eval; GPU columns are NaN without one).
        """
        import pandas as pd

        frames = [
            pd.DataFrame({**_candidate_identity(candidate), "repeat": number, **repeat["samples"]})
            for candidate, number, repeat in self._repeats()
        ]
        return pd.concat(frames, ignore_index=True) if frames else pd.DataFrame()

    def _repeats(self) -> list[tuple[Candidate, int, dict[str, Any]]]:
        return [
            (candidate, number, repeat)
            for candidate in self.spec.candidates()
            if self.profile_file(candidate).exists()
            for number, repeat in enumerate(read_json(self.profile_file(candidate))["repeats"])
        ]

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
        )


IDENTITY_FIELDS = ("trial", "candidate", "rank", "learning_rate", "seed")
RESULT_FIELDS = (
    "steps",
    "tokens",
    "trainable_params",
    "adapter_bytes",
    "train_loss",
    "eval_loss",
    "eval_perplexity",
    "eval_accuracy",
    "train_seconds",
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


def _identity(trial: Trial) -> dict[str, Any]:
    return {"trial": trial.name, **_candidate_identity(trial.candidate), "seed": trial.seed}


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
