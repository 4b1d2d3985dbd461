"""Files of one trial: metrics.jsonl while it trains, the held-out losses and the adapter at its end, and trial.json,
which vouches for them."""

import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from rankscope.data.tokens import TokenizedData
from rankscope.files import file_hashes
from rankscope.spec.candidates import AnyTrial
from rankscope.study.folder import FINISHED, OF_HELD_OUT, TRIAL_FILES
from rankscope.study.metrics import read_rows
from rankscope.study.records import EvalRecord, Examples, TrialRecord
from rankscope.train.engine import Engine, ExampleLosses
from rankscope.train.step import StepMetrics, TrainState, load_trained_adapter

COLUMNS = ("train_loss", "grad_norm", "step_learning_rate", "tokens", "label_tokens")
"""Names of the fields of `StepMetrics` in metrics.jsonl."""


class TrialFiles(NamedTuple):
    """A trial's folder, and the facts that its trial.json shares with the others of its pack."""

    trial: AnyTrial
    folder: Path
    facts: Mapping[str, Any]

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def is_done(self) -> bool:
        record = TrialRecord.find(self.folder / "trial.json")
        return record is not None and record.status == "done"

    def clear(self) -> None:
        """Remove the files of an earlier run."""
        for name in ("trial.json", "metrics.jsonl", "eval.json", "untrained.json"):
            (self.folder / name).unlink(missing_ok=True)
        shutil.rmtree(self.folder / "adapter", ignore_errors=True)

    def history(self) -> list[StepMetrics]:
        """Training steps recorded in metrics.jsonl."""
        rows = [row for row in read_rows(self.metrics) if "train_loss" in row]
        return [StepMetrics(*(row[column] for column in COLUMNS)) for row in rows]

    def record(self, status: str, reason: str | None = None, **results: Any) -> None:
        """Write trial.json; `results` are further fields of `TrialRecord`."""
        files = file_hashes(self.folder, TRIAL_FILES) if status in FINISHED else {}
        known: dict[str, Any] = {"status": status, "reason": reason, "files": files, "results": None, **results}
        record = TrialRecord(trial=self.trial.name, **known, **self.facts, **self.trial.model_dump(mode="json"))
        record.write(self.folder / "trial.json")


def write_losses(file: Path, step: int, losses: ExampleLosses) -> None:
    """Write the held-out loss of each example after so many steps."""
    examples = Examples(
        example=list(range(len(losses.loss))),
        loss=losses.loss.tolist(),
        label_tokens=losses.label_tokens.tolist(),
        correct_tokens=losses.correct_tokens.astype(int).tolist(),
    )
    EvalRecord(step=step, examples=examples).write(file)


def metrics_row(step: int, epoch: float, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
    """Line of metrics.jsonl for one step."""
    return {"step": step, "epoch": epoch, **dict(zip(COLUMNS, metrics, strict=True)), "step_seconds": seconds}


def training_results(state: TrainState, history: Sequence[StepMetrics], step_seconds: float) -> dict[str, Any]:
    """What a trial's steps come to: the loss is the mean of the last tenth, in nats a label token."""
    tail, tokens = history[-max(1, len(history) // 10) :], sum(step.tokens for step in history)
    return {
        "steps": len(history),
        "tokens": tokens,
        "trainable_params": sum(parameter.numel() for parameter in state.parameters),
        "train_loss": sum(step.loss for step in tail) / len(tail),
        "train_seconds": step_seconds,
        "tokens_per_second": tokens / step_seconds,
    }


def held_out_results(losses: ExampleLosses) -> dict[str, float]:
    """Loss of all held-out rows, in nats a label token, with its perplexity, and the accuracy."""
    perplexity = math.exp(min(losses.mean, 700.0))
    return {"eval_loss": losses.mean, "eval_perplexity": perplexity, "eval_accuracy": losses.accuracy}


def evaluate_anew(
    engine: Engine, state: TrainState, folder: Path, data: TokenizedData, untrained: ExampleLosses
) -> None:
    """Replace the held-out losses of a trial that has ended, in `folder`, by those on the rows of `data`. `untrained`
    has the base model's. trial.json, with the hash of `data`, comes last. metrics.jsonl stays."""
    record, found = TrialRecord.find(folder / "trial.json"), dict[str, Any]()
    assert record is not None  # the trial has ended
    write_losses(folder / "untrained.json", 0, untrained)
    if record.results is not None:
        load_trained_adapter(state, folder / "adapter")
        (losses,) = engine.evaluate(data.eval, [state.trial.name])
        if math.isfinite(losses.mean):
            write_losses(folder / "eval.json", int(record.results.steps or 0), losses)
            found = {"results": record.results.model_copy(update=held_out_results(losses))}
        else:
            found = {"status": "diverged", "reason": "held-out loss not finite on added rows", "results": None}
    files = (record.files or {}) | file_hashes(folder, OF_HELD_OUT)
    record.model_copy(update=found | {"files": files, "tokens_sha256": data.sha256}).write(folder / "trial.json")
