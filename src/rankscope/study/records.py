"""What the files of a study hold, as far as anything relies on it; more may stand there.

Their hashes tell that nobody harmed them. That they are what this version writes is told here, once, as they are read.
"""

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

from rankscope.files import damaged

Number = float | None
"""Bytes, seconds, nats; None where it is not known."""


class Record(BaseModel):
    """A JSON object, whose values are taken as they are: no text for a number."""

    model_config = ConfigDict(strict=True)


class TrialRecord(Record):
    """trial.json. See `Study.trial_record`."""

    status: Literal["pending", "running", "done", "diverged", "oom", "failed", "interrupted"]
    reason: str | None = None
    results: dict[str, Number] | None = None
    files: dict[str, str] | None = None

    @model_validator(mode="after")
    def _done_with_results(self) -> "TrialRecord":
        if self.status == "done" and not {"steps", "trainable_params", "train_loss", "eval_loss"} <= set(
            self.results or ()
        ):
            raise ValueError("it is done, and has no results")
        return self


class EvalRecord(Record):
    """eval.json: one value a held-out example in each list."""

    class Examples(Record):
        example: list[int]
        loss: list[float]
        label_tokens: list[int]
        correct_tokens: list[int]

    examples: Examples


class Model(Record):
    id: str
    parameters: int


class MachineRecord(Record):
    """machine.json."""

    hardware: dict[str, Any]
    versions: dict[str, str | None]
    model: Model


class FactsRecord(Record):
    """data/facts.json."""

    id: str
    rows_train: int
    rows_eval: int
    max_length: int
    truncated: int
    duplicates_dropped: int
    rows_without_label_dropped: int
    mean_length: float


class Predicted(Record):
    parts: dict[str, Number] | None
    peak_bytes: Number
    step_seconds: Number
    runtime_seconds: Number


class PredictionRecord(Record):
    """prediction.json."""

    device: str
    candidates: dict[str, Predicted]


class DivisionRecord(Record):
    """packs/division.json."""

    packs: dict[str, list[str]]
    divided: dict[str, list[str]]


class PackRecord(Record):
    """pack.json."""

    pack: str
    trials: list[str]
    results: dict[str, Number] | None


class ProfileRecord(Record):
    """profiles/NAME.json. Each repeat: see `rankscope.measure.profile.profile_candidate`."""

    repeats: list[dict[str, Any]]


class Summary(Record):
    """Of a repeat: what every table of costs needs."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Number]

    steps: int
    step_seconds_median: float
    step_seconds_mean: float
    tokens_per_second: float
    runtime_seconds: float
    load_seconds: float
    rss_base_bytes: Number
    rss_mean_bytes: Number
    rss_peak_bytes: Number
    gpu_allocated_mean_bytes: Number
    gpu_allocated_peak_bytes: Number


class Samples(Record):
    phase: list[str]
    step: list[int | None]
    seconds: list[float]
    rss_bytes: list[Number]
    gpu_allocated_bytes: list[Number]
    gpu_reserved_bytes: list[Number]
    gpu_nvml_bytes: list[Number]


class Repeat(Record):
    """One of a profile."""

    summary: Summary
    samples: Samples


class AnswersRecord(Record):
    """answers/answers.json."""

    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]


class Cut(Record):
    trial: str
    adapter_sha256: str | None
    rank: int
    recover_steps: int
    kept_energy: float
    eval_loss: Number
    losses: list[float] | None
    label_tokens: list[int] | None


class CurveRecord(Record):
    """curve/curve.json."""

    cuts: list[Cut]


class Failure(Record):
    status: str
    reason: str


class FailuresRecord(Record):
    """failures.json."""

    failures: dict[str, Failure]


class VerdictRecord(Record):
    """verdict.json, as far as every verdict has it: see `rankscope.analysis.verdict.conclude`."""

    outcome: str
    rank: int | None
    candidate: str | None
    best_candidate: str | None
    margin: float
    confidence: float
    seeds: int
    scaling: dict[str, Any]
    undetermined: Any
    comparison: list[dict[str, Any]]
    claims: list[Any]
    caveats: list[str]


class MetricsRow(Record):
    """A line of metrics.jsonl."""

    model_config = ConfigDict(strict=True, extra="allow")
    __pydantic_extra__: dict[str, Number]

    step: int


def checked(record: dict[str, Any], kind: type[Record], path: Path) -> dict[str, Any]:
    """The record itself, once it is one of this kind.

    Raises:
        DamagedError: it is not; the message says which field.
    """
    try:
        kind.model_validate(record)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise damaged(path, f"not as it is written: {where + ': ' if where else ''}{first['msg']}") from None
    return record
