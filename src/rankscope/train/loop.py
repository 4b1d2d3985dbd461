"""Training loop of a pack: reads top to bottom, without callbacks."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

from transformers import PreTrainedModel

from rankscope.data.batches import eval_steps, steps_per_epoch, total_steps
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.errors import KilledError, ModelError
from rankscope.files import JsonlWriter
from rankscope.lora.layout import NotPackable
from rankscope.lora.saved import peft_fault
from rankscope.model.device import free_bytes, synchronize
from rankscope.spec.candidates import Trial
from rankscope.spec.models import StudySpec, TrainingSpec
from rankscope.train.checkpoint import load_checkpoint, save_checkpoint
from rankscope.train.engine import LOGIT_BYTES, Engine, ExampleLosses, PackedEngine, PeftEngine, tokens_per_forward
from rankscope.train.flops import Cost, count_cost
from rankscope.train.optimizer import state_sizes
from rankscope.train.probe import check_causal, make_packable, peft_engine, probe_tokens
from rankscope.train.recompute import recompute_layers
from rankscope.train.results import TrialFiles, held_out_results, metrics_row, training_results, write_losses
from rankscope.train.step import (
    TrainState,
    finite_weights,
    leave_out_unreached,
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
    engine: Engine | None = None
    dropout, reason = training.base_dropout == "keep", None
    names, kind = [state.trial.name for state in states], type(model).__name__
    if training.engine == "packed":
        try:
            make_packable(model, names)
            engine = PackedEngine(model, 1 << 30, dropout)
        except NotPackable as error:
            reason = str(error.reason)
            log.warning("%s cannot be packed: %s. Its trials are trained by PEFT's forward.", kind, reason)
    if engine is None:
        engine = peft_engine(model, training.batch_size, dropout)
        if engine.batch_size < training.batch_size:
            log.warning("%s gives padded rows other logits: its forwards have one row each", kind)
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
    states = [make_train_state(model, trial, spec.training, steps, spec.model) for trial in trials]
    choice = choose_engine(model, states, spec.training)
    facts = {"pack": pack, "engine": choice.engine.name, "engine_reason": choice.reason}
    facts |= {"model_sha256": weights, "tokens_sha256": data.sha256}
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
    evaluated = eval_steps(training, steps) - {steps}
    of = {s.trial.name: TrialFiles(s.trial, folders[s.trial.name], facts) for s in states}
    saved = load_checkpoint(checkpoints, states, {name: own.metrics for name, own in of.items()})
    if saved is None:
        active = [state for state in states if not of[state.trial.name].is_done]
        first, tally = 0, {"step_seconds": 0.0, "eval_seconds": 0.0, "useful_flops": 0.0}
        for state in active:
            of[state.trial.name].clear()
    else:
        first, active = saved["step"], [state for state in states if state.trial.name in saved["active"]]
        tally, general_before = saved["tally"], saved["general_before"]
        if saved["model_sha256"] != facts["model_sha256"]:
            raise ModelError("the model is not the one that this study began with", "Choose another --out.")
        engine.tokens_per_forward = saved["tokens_per_forward"]  # other forwards would round differently
    log.info("from step %d of %d, with %d trials", first, steps, len(active))
    with ExitStack() as files:
        logs: dict[str, JsonlWriter] = {}  # of the trials that are not done
        for name in [state.trial.name for state in active if not of[state.trial.name].is_done]:
            of[name].record("running")  # before its metrics change: a stopped trial's trial.json has their hash
            logs[name] = files.enter_context(JsonlWriter(of[name].metrics, saved["lines"][name][0] if saved else None))

        if saved is None:  # the base model's losses, equal for every trial: B is zero
            (before,) = _evaluate(engine, data.eval, active[:1], {}, 0, tally)
            if not math.isfinite(before.mean):
                what = "the model's held-out loss is not finite before training"
                raise ModelError(what, "Its weights hold NaN or infinity, or overflow: try another model.dtype.")
            (general_before,) = _general_losses(engine, data.general, active[:1])
            for name, log_ in logs.items():
                log_.write({"step": 0, "epoch": 0.0, "eval_loss": before.mean})
                write_losses(of[name].folder / "untrained.json", 0, before)

        saved_at, step = time.monotonic(), first
        for step in range(first + 1, steps + 1):
            start = time.perf_counter()
            metrics = train_step(engine, active, data.train, training, step - 1)
            synchronize(model.device)
            step_seconds = time.perf_counter() - start
            tally["step_seconds"] += step_seconds
            for state, result in zip(list(active), metrics, strict=True):
                name = state.trial.name
                tally["useful_flops"] += costs[name].flops(result.tokens, result.label_tokens)
                if not result.finite:
                    active.remove(state)
                    what = "loss" if not math.isfinite(result.loss) else "gradient"
                    of[name].record("diverged", f"{what} not finite at step {step}")
                elif name in logs:
                    logs[name].write(metrics_row(step, step / per_epoch, result, step_seconds))
            if not active:
                break
            if step in evaluated:
                _evaluate(engine, data.eval, active, logs, step, tally)
            due = time.monotonic() - saved_at >= 60 * training.checkpoint_minutes
            if training.checkpoint_steps:
                due = step % training.checkpoint_steps == 0
            if due or step == steps or stop.made:
                for log_ in logs.values():
                    log_.sync()
                progress = {
                    "trials": list(of),
                    "tally": tally,
                    "general_before": general_before,
                    "lines": {name: [log_.lines, log_.sha256] for name, log_ in logs.items()},
                    "tokens_per_forward": engine.tokens_per_forward,
                    "model_sha256": facts["model_sha256"],
                }
                save_checkpoint(checkpoints, step, active, progress)
                saved_at = time.monotonic()
            if stop.made and step < steps:
                raise KilledError("stopped as asked, with a checkpoint")

        if active:
            evals = _evaluate(engine, data.eval, active, logs, steps, tally)
            general, faults = _general_losses(engine, data.general, active), list[str | None]()
            for state, held_out, after in zip(active, evals, general, strict=True):
                if state.trial.name in logs:
                    _finish(of[state.trial.name], state, held_out, tally, (general_before, after), model, faults)
    return PackRun(step, tally["step_seconds"], tally["useful_flops"])


def _evaluate(
    engine: Engine,
    tokens: Tokens,
    active: Sequence[TrainState],
    logs: Mapping[str, JsonlWriter],
    step: int,
    tally: dict[str, float],
) -> list[ExampleLosses]:
    """Measure the held-out losses of all active trials, and write a line for each that has a log."""
    start = time.perf_counter()
    evals = engine.evaluate(tokens, [state.trial.name for state in active])
    tally["eval_seconds"] += time.perf_counter() - start
    for state, held_out in zip(active, evals, strict=True):
        if state.trial.name in logs and math.isfinite(held_out.mean):
            logs[state.trial.name].write({"step": step, "eval_loss": held_out.mean})
    return evals


def _general_losses(engine: Engine, tokens: Tokens | None, active: Sequence[TrainState]) -> list[float | None]:
    """Loss on the general text under each adapter, in nats per token; None without a text or if not finite."""
    if tokens is None:
        return [None] * len(active)
    means = [losses.mean for losses in engine.evaluate(tokens, [state.trial.name for state in active])]
    return [mean if math.isfinite(mean) else None for mean in means]


def _finish(
    files: TrialFiles,
    state: TrainState,
    held_out: ExampleLosses,
    tally: Mapping[str, float],
    general: tuple[float | None, float | None],
    model: PreTrainedModel,
    faults: list[str | None],
) -> None:
    """Write the final files of a trial; trial.json comes last, so that `done` implies that they are complete. `general`
    has the losses on the general text before and after training, `faults` what PEFT does not read back of the pack's
    first adapter: those of the others have the same names."""
    history = files.history()
    if not math.isfinite(held_out.mean) or not finite_weights(state):
        files.record("diverged", f"held-out loss or weights not finite after step {len(history)}")
        return
    write_losses(files.folder / "eval.json", len(history), held_out)
    adapter_bytes = save_trained_adapter(state, files.folder / "adapter")
    if adapter_bytes is not None and not faults:
        faults.append(peft_fault(model, files.folder / "adapter"))
    fault = None if adapter_bytes is None else faults[0]
    if fault:
        log.warning("%s: PEFT does not read its adapter back: %s", state.trial.name, fault)
    results = training_results(state, history, tally["step_seconds"]) | held_out_results(held_out)
    results |= {"adapter_bytes": adapter_bytes, "eval_seconds": tally["eval_seconds"]}
    results |= {"general_loss_before": general[0], "general_loss_after": general[1]}
    files.record("done", results=results, adapter_fault=fault)
