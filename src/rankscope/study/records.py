"""The JSON files of a study as objects: one pydantic model a file.

A hash in each file shows that it is whole; reading it here checks that its content has the shape that this version
writes. Keys that this version does not know are kept.
"""

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from rankscope.files import damaged_error, find_json, read_json, write_json

Number = int | float | None  # bytes, seconds or nats; None where it is unknown


class Record(BaseModel):
    """A JSON object with values of exact types: text is not taken for a number."""

    model_config = ConfigDict(strict=True, extra="allow")
    schema_version: ClassVar[int] = 1

    @classmethod
    def find(cls, path: Path) -> Self | None:
        """Read a file that `write` wrote; None where it does not exist. Raises DamagedError: it is corrupt; the message
        says which field; StudyDirectoryError: it cannot be read, or a newer version wrote it."""
        value = find_json(path, cls.schema_version)
        return None if value is None else cls.of(value, path)

    @classmethod
    def content(cls, path: Path) -> dict[str, Any]:
        """Checked content of a file with all keys in their order, as the report shows them. Raises as `find` does."""
        value = read_json(path, cls.schema_version)
        cls.of(value, path)
        return value

    @classmethod
    def of(cls, value: dict[str, Any], path: Path) -> Self:
        """Check the content of the file `path`. Raises DamagedError: it has another shape; the message says which
        field."""
        try:
            return cls.model_validate({key: value[key] for key in value if key != "schema"})
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            where = ".".join(map(str, first["loc"]))
            raise damaged_error(path, f"not as it is written: {where + ': ' if where else ''}{first['msg']}") from None

    def write(self, path: Path) -> None:
        """Publish the record, with its schema version as the first key."""
        write_json(path, {"schema": self.schema_version} | self.model_dump(exclude_unset=True))


class TrialResults(Record):
    """Results of a trial that is done. Losses are in nats."""

    steps: Number = None
    tokens: Number = None
    trainable_params: Number = None
    adapter_bytes: Number = None
    train_loss: Number = None
    eval_loss: Number = None
    eval_perplexity: Number = None
    eval_accuracy: Number = None
    general_loss_before: Number = None
    general_loss_after: Number = None
    train_seconds: Number = None
    eval_seconds: Number = None
    tokens_per_second: Number = None

    __pydantic_extra__: dict[str, Number]


class TrialRecord(Record):
    """trial.json: a trial's status and results, and the hashes of its files once it has ended."""

    trial: str | None = None
    status: Literal["pending", "running", "done", "diverged", "oom", "failed", "interrupted"]
    reason: str | None = None
    pack: str | None = None
    engine: str | None = None
    engine_reason: str | None = None
    model_sha256: str | None = None
    tokens_sha256: str | None = None
    weights: str | None = None  # full fine-tuning: why they are not saved
    adapter_fault: str | None = None  # what PEFT does not read back of the saved adapter
    candidate: dict[str, Any] | None = None
    learning_rate: float | None = None  # full fine-tuning
    seed: int | None = None
    results: TrialResults | None = None
    files: dict[str, str] | None = None  # SHA-256 by name

    @model_validator(mode="after")
    def _done_with_results(self) -> Self:
        known = set() if self.results is None else self.results.model_fields_set
        if self.status == "done" and not {"steps", "trainable_params", "train_loss", "eval_loss"} <= known:
            raise ValueError("it is done, and has no results")
        return self

    def sha256(self, name: str) -> str | None:
        """Hash of the trial's file `name`; None before the trial has ended."""
        return (self.files or {}).get(name)


class Examples(Record):
    """Lists with one value per held-out example."""

    example: list[int]
    loss: list[float]  # mean over the example's label tokens, in nats
    label_tokens: list[int]
    correct_tokens: list[int]


class EvalRecord(Record):
    """eval.json."""

    step: int | None = None
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
    eval_id: str | None = None  # the evaluation set, where it is one of its own
    answers_cut_off: int = 0
    notes: list[str] = []
    warnings: list[str] = []


class Predicted(Record):
    parts: dict[str, Number] | None
    peak_bytes: Number
    step_seconds: Number
    runtime_seconds: Number


class PredictionRecord(Record):
    """prediction.json."""

    device: str
    candidates: dict[str, Predicted]
    coverage: dict[str, Any] | None = None  # see `rankscope.lora.coverage`


class DivisionRecord(Record):
    """packs/division.json."""

    packs: dict[str, list[str]]
    divided: dict[str, list[str]]


class PackRecord(Record):
    """pack.json: the pack's trials, and what was measured once it has ended."""

    pack: str
    trials: list[str]
    results: dict[str, Number] | None
    left_over: list[str] = []  # weights of the checkpoint that the model has no place for


class LogEntry(Record):
    """Entry of the log in study.yaml: what a run added to the study, or found changed."""

    when: str  # UTC, ISO 8601
    version: str  # of rankscope
    added: dict[str, list[Any]] = {}  # values by field of the question
    changed: dict[str, dict[str, list[Any]]] = {}  # of `machine` and `versions`: [before, now] by field
    tokens_sha256: list[str] = []  # of the tokens, where evaluation rows were added: [before, now]


class ProfileRecord(Record):
    """profiles/NAME.json, with the repeats of `rankscope.measure.profile.profile_candidate`; profiles/time.json, with
    those of `rankscope.measure.timing.time_candidates`."""

    schema_version: ClassVar[int] = 2

    profile: str | None = None
    candidate: dict[str, Any] | None = None
    repeats: list[dict[str, Any]]


class Summary(Record):
    __pydantic_extra__: dict[str, Number]

    steps: int
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
    summary: Summary
    samples: Samples


BUSY_PRESSURE = 0.1
"""Share of the time in which a program of the machine waited for a processor, from which on measured seconds are those
of a busy machine."""


class Times(Record):
    __pydantic_extra__: dict[str, Number]

    rounds: int
    step_ratio: float
    step_ratio_se: float
    runtime_ratio: float
    runtime_ratio_se: float
    step_seconds_median: float
    step_seconds_mean: float
    tokens_per_second: float
    runtime_seconds: float


class TimeRepeat(Record):
    """Candidates timed side by side in one process, with the control among them."""

    engine: str
    control: str  # candidate that the control is, once more
    clock: str  # wall or cpu: what ratios are of
    cpu_pressure: Number
    summaries: dict[str, Times]


class AnswersRecord(Record):
    """answers/answers.json."""

    questions: list[dict[str, Any]]
    answers: dict[str, list[str]]
    asked: list[int] | None = None  # `measure.answers` and `measure.answer_tokens`; None in earlier versions


class TaskItems(Record):
    """Lists with one value per item of a task."""

    example: list[int]  # the held-out row, or the number of the harness's document
    score: list[Annotated[float, Field(ge=0, le=1)]]
    answer: list[str] | None = None  # None where `measure.answers` is 0, or nothing was generated
    task: list[str] | None = None  # the harness's task; None without the harness

    @model_validator(mode="after")
    def _of_one_length(self) -> Self:
        lists = (self.example, self.score, self.answer, self.task)
        if len({len(values) for values in lists if values is not None}) > 1:
            raise ValueError("its lists are not of one length")
        return self


class TaskRecord(Record):
    """task.json of a trial; task/base.json, of the model without an adapter."""

    task: str  # `measure.task`
    metric: str
    step: int
    asked: dict[str, Any]  # what the scores depend on beside the adapter: `rankscope.study.scores.asked`
    adapter_sha256: str | None
    code_sha256: str | None = None
    items: TaskItems


class ChoicesRecord(Record):
    """task/choices.json: the choices of held-out rows, each list with one value per row."""

    example: list[int]
    gold: list[int]  # which choice is the row's own answer
    ids: list[list[list[int]]]  # tokens of the prompt and each choice
    asked: dict[str, Any]  # as in `TaskRecord`
    label_tokens: list[list[int]]  # how many of these, at the end, are the choice's
    characters: list[list[int]]  # of each choice


class Cut(Record):
    """A trained adapter truncated to a lower rank."""

    trial: str
    adapter_sha256: str | None
    rank: int
    recover_steps: int  # of recovery training
    kept_energy: float  # share of the update's energy
    eval_loss: Number  # over all held-out examples, in nats; None where the recovery diverged
    losses: list[float] | None  # by held-out example, in nats
    label_tokens: list[int] | None


class CurveRecord(Record):
    """curve/curve.json."""

    cuts: list[Cut]


class Failure(Record):
    """How a profile, or the answers, ended when a run last tried them."""

    status: str  # oom, failed or interrupted
    reason: str


class FailuresRecord(Record):
    """failures.json: failures by the name of the profile, or `answers`."""

    failures: dict[str, Failure]


class VerdictRecord(Record):
    """verdict.json: the keys that every verdict has (`rankscope.analysis.verdict.conclude`)."""

    schema_version: ClassVar[int] = 3

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
    rates: dict[str, Any] | None = None  # `rankscope.analysis.rates.judge_rates`
