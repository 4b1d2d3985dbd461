"""Training loop of a pack: reads top to bottom, without callbacks."""

import logging
import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rankscope.data.batches import steps_per_epoch, total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.errors import KilledError, ModelError
from rankscope.files import JsonlWriter, file_hashes, read_jsonl
from rankscope.lora.layout import NotPackable
from rankscope.lora.saved import peft_fault
from rankscope.model.device import free_bytes, synchronize
from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.study.folder import FINISHED, OF_HELD_OUT, TRIAL_FILES
from rankscope.study.records import EvalRecord, Examples, TrialRecord
from rankscope.train.checkpoint import load_checkpoint, save_checkpoint
from rankscope.train.engine import LOGIT_BYTES, Engine, ExampleLosses, PackedEngine, PeftEngine, tokens_per_forward
from rankscope.train.flops import Cost, count_cost
from rankscope.train.optimizer import state_sizes
from rankscope.train.probe import check_causal, make_packable, padding_matters, probe_tokens
from rankscope.train.recompute import recompute_layers
from rankscope.train.step import (
    StepMetrics,
    TrainState,
    eval_steps,
    finite_weights,
    leave_out_unreached,
    load_trained_adapter,
    make_train_state,
    save_trained_adapter,
    train_step,
)
from rankscope.train.stopping import StopRequest

log = logging.getLogger(__name__)


class EngineChoice(NamedTuple):
    """Engine that trains a pack."""

    engine: Engine
    reason: str | None  # why the model cannot be packed
    costs: dict[str, Cost]  # by trial


def choose_engine(model: PreTrainedModel, states: Sequence[TrainState], training: TrainingSpec) -> EngineChoice:
    """Choose the packed engine if the model can be packed, which is probed on the model itself, or else PEFT's. Its
    forwards have as many tokens as the memory that is free after loading allows. Raises ModelError: the model is not
    causal."""
    check_causal(model)
    dropout, reason = training.base_dropout == "keep", None
    names = [state.trial.name for state in states]
    engine: Engine = PeftEngine(model, training.batch_size, dropout)
    if training.engine == "packed":
        try:
            make_packable(model, names)
            engine = PackedEngine(model, 1 << 30, dropout)
        except NotPackable as error:
            name, reason = type(model).__name__, str(error.reason)
            log.warning("%s cannot be packed: %s. Its trials are trained by PEFT's forward.", name, reason)
    if isinstance(engine, PeftEngine):
        if padding_matters(model):
            log.warning("%s gives padded rows other logits: its forwards have one row each", type(model).__name__)
            engine.batch_size = 1
        recompute_layers(model)
    tokens = probe_tokens(model)
    counted = {name: count_cost(model, name, engine.forward, tokens) for name in names}
    costs = {name: found.cost for name, found in counted.items()}
    engine.unreached = sorted(set().union(*(found.unreached for found in counted.values())))
    if engine.unreached:
        log.warning("no gradient reaches %s: their adapters are left out", ", ".join(engine.unreached))
    for state in states:
        leave_out_unreached(model, state, engine.unreached)
        state.optimizer.zero_grad(set_to_none=True)  # which counting left on weights of full fine-tuning
    per_token = max(cost.bytes_per_token for cost in costs.values())
    if isinstance(engine, PeftEngine):
        per_token += LOGIT_BYTES * model.config.get_text_config().vocab_size
    sizes = [parameter.numel() for state in states for parameter in state.parameters]
    pending = sum(4 * size + sum(state_sizes(training.optim, size)) for size in sizes)  # gradients and states
    engine.tokens_per_forward = tokens_per_forward(free_bytes(model.device) - pending, per_token, model.device.type)
    log.info("%s: %.2f MB a token, at most %d a forward", engine.name, per_token / 1e6, engine.tokens_per_forward)
    return EngineChoice(engine, reason, costs)


class PackRun(NamedTuple):
    """Measurements of a pack's training."""

    steps: int
    step_seconds: float  # sum over all steps
    useful_flops: float  # sum over all steps: see `Cost`


@dataclass
class _Tally:
    """Running totals of a pack over all processes that trained it, saved in its checkpoints."""

    step_seconds: float = 0.0
    eval_seconds: float = 0.0
    useful_flops: float = 0.0


def train_pack(
    model: PreTrainedModel,
    spec: StudySpec,
    trials: Sequence[Trial],
    folders: Mapping[str, Path],
    checkpoints: Path,
    data: TokenizedData,
    pack: str,
    weights: str,
    stop: StopRequest,
) -> PackRun:
    """Give each of `trials` an adapter and train them together: see `train_trials`. `weights` is the base model's
    fingerprint."""
    steps = total_steps(spec.training, len(data.train))
    states = [make_train_state(model, trial, spec.training, steps, spec.model.id) for trial in trials]
    choice = choose_engine(model, states, spec.training)
    facts = {
        "pack": pack,
        "engine": choice.engine.name,
        "engine_reason": choice.reason,
        "model_sha256": weights,
        "tokens_sha256": data.sha256,
    }
    return train_trials(model, spec.training, states, choice, folders, checkpoints, data, facts, stop)


def train_trials(
    model: PreTrainedModel,
    training: TrainingSpec,
    states: Sequence[TrainState],
    choice: EngineChoice,
    folders: Mapping[str, Path],
    checkpoints: Path,
    data: TokenizedData,
    facts: Mapping[str, Any],
    stop: StopRequest,
) -> PackRun:
    """Train all trials to their last step, from the newest checkpoint or from the start, and write their files.

    In a trial's folder, trial.json has status, results and `facts`, metrics.jsonl a line for each step, untrained.json
    and eval.json the held-out loss of each example before training and at its end, and adapter/ the adapter in PEFT's
    format (none in full fine-tuning). A trial with a loss or gradient that is not finite is frozen and recorded as
    diverged; the others go on. A trial that is done already takes part again, so that the numbers of the others do not
    change. Raises KilledError: `stop` was requested. The current step is completed and a checkpoint written. Raises
    ModelError: the checkpoint is of another model, or the model's loss is not finite.
    """
    engine, _, costs = choice
    steps = total_steps(training, len(data.train))
    per_epoch = steps_per_epoch(len(data.train), training.effective_batch_size)
    evaluated = eval_steps(training, steps)
    record = _TrialRecorder(folders, facts)
    metrics_files = {name: folder / "metrics.jsonl" for name, folder in folders.items()}
    saved = load_checkpoint(checkpoints, states, metrics_files)
    if saved is None:
        active = [state for state in states if record.status(state.trial) != "done"]
        first, tally, general_before = 0, _Tally(), None
        for state in active:
            _clear(folders[state.trial.name])
    else:
        first, active = saved["step"], [state for state in states if state.trial.name in saved["active"]]
        tally, general_before = _Tally(**saved["tally"]), saved["general_before"]
        if saved["model_sha256"] != facts["model_sha256"]:
            raise ModelError("the model is not the one that this study began with", "Choose another --out.")
        engine.tokens_per_forward = saved["tokens_per_forward"]  # other forwards would round differently
    log.info("from step %d of %d, with %d trials", first, steps, len(active))
    unfinished = [state.trial for state in active if record.status(state.trial) != "done"]
    with ExitStack() as files:
        logs = {}
        for trial in unfinished:
            record(trial, "running")  # before its metrics change: a stopped trial's trial.json has their hash
            lines = saved["lines"][trial.name][0] if saved else None
            logs[trial.name] = files.enter_context(JsonlWriter(metrics_files[trial.name], lines))
        histories = {trial.name: _history(metrics_files[trial.name]) for trial in unfinished}

        if saved is None:
            start, one = time.perf_counter(), [active[0].trial.name]
            (before,) = engine.evaluate(data.eval, one)  # the base model's loss, equal for every trial: B is zero
            tally.eval_seconds += time.perf_counter() - start
            if not math.isfinite(before.mean):
                what = "the model's held-out loss is not finite before training"
                raise ModelError(what, "Its weights hold NaN or infinity, or overflow: try another model.dtype.")
            (general_before,) = _general_losses(engine, data.general, one)
            for name, log_ in logs.items():
                log_.write({"step": 0, "epoch": 0.0, "eval_loss": before.mean})
                EvalRecord(step=0, examples=_examples(before)).write(folders[name] / "untrained.json")

        def save(step: int) -> None:
            for log_ in logs.values():
                log_.sync()
            progress = {
                "trials": [state.trial.name for state in states],
                "tally": asdict(tally),
                "general_before": general_before,
                "lines": {name: [log_.lines, log_.sha256] for name, log_ in logs.items()},
                "tokens_per_forward": engine.tokens_per_forward,
                "model_sha256": facts["model_sha256"],
            }
            save_checkpoint(checkpoints, step, active, progress)

        saved_at, step = time.monotonic(), first
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            metrics = train_step(engine, active, data.train, training, step - 1)
            synchronize(model.device)
            step_seconds = time.perf_counter() - start
            tally.step_seconds += step_seconds
            flops = [costs[s.trial.name].flops(m.tokens, m.label_tokens) for s, m in zip(active, metrics, strict=True)]
            tally.useful_flops += sum(flops)
            for state, result in zip(list(active), metrics, strict=True):
                name = state.trial.name
                if not result.finite:
                    active.remove(state)
                    what = "loss" if not math.isfinite(result.loss) else "gradient"
                    record(state.trial, "diverged", f"{what} not finite at step {step}")
                    continue
                if name not in logs:
                    continue
                histories[name].append(result)
                logs[name].write(_row(step, step / per_epoch, result, step_seconds))
            if not active:
                break
            if step in evaluated and step < steps:
                _evaluate(engine, data.eval, active, logs, step, tally)
            due = time.monotonic() - saved_at >= 60 * training.checkpoint_minutes
            if training.checkpoint_steps:
                due = step % training.checkpoint_steps == 0
            if due or step == steps or stop.made:
                save(step)
                saved_at = time.monotonic()
            if stop.made and step < steps:
                raise KilledError("stopped as asked, with a checkpoint")

        faults: list[str | None] = []  # of the first adapter alone: the names of the others' layers are the same

        def adapter_fault(adapter: Path) -> str | None:
            if not faults:
                faults.append(peft_fault(model, adapter))
            return faults[0]

        if active:
            evals = _evaluate(engine, data.eval, active, logs, steps, tally)
            general = _general_losses(engine, data.general, [state.trial.name for state in active])
            for state, held_out, after in zip(active, evals, general, strict=True):
                if state.trial.name in logs:
                    history, losses = histories[state.trial.name], (general_before, after)
                    _finish(record, state, held_out, history, tally, losses, folders, adapter_fault)
    return PackRun(step, tally.step_seconds, tally.useful_flops)


def _row(step: int, epoch: float, metrics: StepMetrics, seconds: float) -> dict[str, Any]:
    """Line of metrics.jsonl for one step."""
    return {
        "step": step,
        "epoch": epoch,
        "train_loss": metrics.loss,
        "grad_norm": metrics.grad_norm,
        "step_learning_rate": metrics.learning_rate,
        "tokens": metrics.tokens,
        "label_tokens": metrics.label_tokens,
        "step_seconds": seconds,
    }


def _evaluate(
    engine: Engine,
    tokens: Tokens,
    active: Sequence[TrainState],
    logs: Mapping[str, JsonlWriter],
    step: int,
    tally: _Tally,
) -> list[ExampleLosses]:
    """Measure the held-out losses of all active trials, and log a line for those that are not done."""
    start = time.perf_counter()
    evals = engine.evaluate(tokens, [state.trial.name for state in active])
    tally.eval_seconds += time.perf_counter() - start
    for state, held_out in zip(active, evals, strict=True):
        if state.trial.name in logs and math.isfinite(held_out.mean):
            logs[state.trial.name].write({"step": step, "eval_loss": held_out.mean})
    return evals


def _history(file: Path) -> list[StepMetrics]:
    """Training steps recorded in metrics.jsonl."""
    return [
        StepMetrics(row["train_loss"], row["grad_norm"], row["step_learning_rate"], row["tokens"], row["label_tokens"])
        for row in read_jsonl(file)
        if "train_loss" in row
    ]


def _clear(folder: Path) -> None:
    """Remove the files of an earlier run of a trial."""
    for name in ("trial.json", "metrics.jsonl", "eval.json", "untrained.json"):
        (folder / name).unlink(missing_ok=True)
    shutil.rmtree(folder / "adapter", ignore_errors=True)


def _examples(losses: ExampleLosses) -> Examples:
    return Examples(
        example=list(range(len(losses.loss))),
        loss=losses.loss.tolist(),
        label_tokens=losses.label_tokens.tolist(),
        correct_tokens=losses.correct_tokens.astype(int).tolist(),
    )


class _TrialRecorder(NamedTuple):
    """Writer of trial.json."""

    folders: Mapping[str, Path]
    shared: Mapping[str, Any]

    def status(self, trial: AnyTrial) -> str | None:
        """Status in trial.json; None without the file."""
        record = TrialRecord.find(self.folders[trial.name] / "trial.json")
        return record.status if record else None

    def __call__(
        self,
        trial: AnyTrial,
        status: str,
        reason: str | None = None,
        results: Mapping[str, Any] | None = None,
        fault: str | None = None,
    ) -> None:
        folder = self.folders[trial.name]
        files = file_hashes(folder, TRIAL_FILES) if status in FINISHED else {}
        known: dict[str, Any] = {
            "status": status,
            "reason": reason,
            "results": results,
            "files": files,
            "adapter_fault": fault,
        }
        record = TrialRecord(trial=trial.name, **known, **self.shared, **trial.model_dump(mode="json"))
        record.write(folder / "trial.json")


def _general_losses(engine: Engine, tokens: Tokens | None, names: Sequence[str]) -> list[float | None]:
    """Loss on the general text under each adapter, in nats per token; None without a text or if not finite."""
    if tokens is None:
        return [None] * len(names)
    means = [losses.mean for losses in engine.evaluate(tokens, names)]
    return [mean if math.isfinite(mean) else None for mean in means]


def _finish(
    record: _TrialRecorder,
    state: TrainState,
    held_out: ExampleLosses,
    history: Sequence[StepMetrics],
    tally: _Tally,
    general: tuple[float | None, float | None],
    folders: Mapping[str, Path],
    adapter_fault: Callable[[Path], str | None],
) -> None:
    """Write the final files of a trial; trial.json comes last, so that `done` implies that they are complete. `general`
    has the losses on the general text before and after training."""
    trial, folder = state.trial, folders[state.trial.name]
    if not math.isfinite(held_out.mean) or not finite_weights(state):
        record(trial, "diverged", f"held-out loss or weights not finite after step {len(history)}")
        return
    EvalRecord(step=len(history), examples=_examples(held_out)).write(folder / "eval.json")
    adapter_bytes = save_trained_adapter(state, folder / "adapter")
    fault = None if adapter_bytes is None else adapter_fault(folder / "adapter")
    if fault:
        log.warning("%s: PEFT does not read its adapter back: %s", trial.name, fault)
    tail = history[-max(1, len(history) // 10) :]
    tokens = sum(step.tokens for step in history)
    results = {
        "steps": len(history),
        "tokens": tokens,
        "trainable_params": sum(parameter.numel() for parameter in state.parameters),
        "adapter_bytes": adapter_bytes,
        "train_loss": sum(step.loss for step in tail) / len(tail),
        **_held_out_results(held_out),
        "general_loss_before": general[0],
        "general_loss_after": general[1],
        "train_seconds": tally.step_seconds,
        "eval_seconds": tally.eval_seconds,
        "tokens_per_second": tokens / tally.step_seconds,
    }
    record(trial, "done", results=results, fault=fault)


def _held_out_results(losses: ExampleLosses) -> dict[str, float]:
    perplexity = math.exp(min(losses.mean, 700.0))
    return {"eval_loss": losses.mean, "eval_perplexity": perplexity, "eval_accuracy": losses.accuracy}


def evaluate_anew(
    engine: Engine, state: TrainState, folder: Path, data: TokenizedData, untrained: ExampleLosses
) -> None:
    """Replace the held-out losses of a trial that has ended, in `folder`, by those on the rows of `data`. `untrained`
    has the base model's. trial.json, with the hash of `data`, comes last. metrics.jsonl stays."""
    record, found = TrialRecord.find(folder / "trial.json"), dict[str, Any]()
    assert record is not None  # the trial has ended
    EvalRecord(step=0, examples=_examples(untrained)).write(folder / "untrained.json")
    if record.results is not None:
        load_trained_adapter(state, folder / "adapter")
        (losses,) = engine.evaluate(data.eval, [state.trial.name])
        if math.isfinite(losses.mean):
            steps = int(record.results.steps or 0)
            EvalRecord(step=steps, examples=_examples(losses)).write(folder / "eval.json")
            found = {"results": record.results.model_copy(update=_held_out_results(losses))}
        else:
            found = {"status": "diverged", "reason": "held-out loss not finite on added rows", "results": None}
    files = (record.files or {}) | file_hashes(folder, OF_HELD_OUT)
    record.model_copy(update=found | {"files": files, "tokens_sha256": data.sha256}).write(folder / "trial.json")
