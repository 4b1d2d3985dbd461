"""The pack's training loop: reads top to bottom, without callbacks."""

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedModel

from rankscope.data.batches import steps_per_epoch
from rankscope.data.tokens import TokenizedData, Tokens
from rankscope.files import JsonlWriter, write_json
from rankscope.lora.adapters import save_adapter
from rankscope.lora.base import free_bytes
from rankscope.lora.layout import NotPackable
from rankscope.spec import AnyTrial, StudySpec, TrainingSpec, Trial
from rankscope.train.cost import Cost, Products, count_costs, product_rate
from rankscope.train.engine import Engine, ExampleLosses, PackedEngine, PeftEngine
from rankscope.train.memory import BYTES_PER_PARAMETER, LOGIT_BYTES, tokens_per_forward
from rankscope.train.pack import (
    Member,
    StepMetrics,
    effective_batch_size,
    eval_steps,
    finite_weights,
    make_member,
    total_steps,
    train_step,
)
from rankscope.train.probe import make_packable, probe_tokens

log = logging.getLogger(__name__)


class EngineChoice(NamedTuple):
    """The engine that trains, why it is not the packed one where it is not, and each trial's cost."""

    engine: Engine
    reason: str | None
    costs: dict[str, Cost]


def choose_engine(model: PreTrainedModel, members: Sequence[Member], training: TrainingSpec) -> EngineChoice:
    """The packed engine where the model can be packed (probed on the model itself), PEFT's own elsewhere.

    Its forwards have as many tokens as the memory that is free after loading allows.
    """
    dropout, reason = training.base_dropout == "keep", None
    names = [member.trial.name for member in members]
    engine: PackedEngine | PeftEngine = PeftEngine(model, training.batch_size, dropout)
    if training.engine == "packed":
        try:
            make_packable(model, names)
            engine = PackedEngine(model, 1 << 30, dropout)
        except NotPackable as error:
            reason = str(error)
            log.warning(
                "%s cannot be packed: %s. Its trials are trained by PEFT's forward.", type(model).__name__, error
            )
    costs = count_costs(model, names, engine.forward, probe_tokens(model))
    for member in members:  # what counting left on weights that are no adapter's
        member.optimizer.zero_grad(set_to_none=True)
    per_token = max(cost.bytes_per_token for cost in costs.values())
    if engine.name == "peft":
        per_token += LOGIT_BYTES * model.config.get_text_config().vocab_size
    still_to_come = sum(p.numel() for m in members for p in m.parameters) * (BYTES_PER_PARAMETER - 4)  # but weights
    engine.tokens_per_forward = tokens_per_forward(
        free_bytes(model.device) - still_to_come, per_token, model.device.type
    )
    log.info("%s: %.2f MB a token, at most %d a forward", engine.name, per_token / 1e6, engine.tokens_per_forward)
    return EngineChoice(engine, reason, costs)


class PackRun(NamedTuple):
    """What a pack's training took."""

    steps: int
    step_seconds: float  # of all steps
    useful_flops: float  # of all steps: see `Cost`
    product_rates: tuple[float, float]
    """FLOP/s of plain matrix products of the first step's shapes, timed after the first step and after the last."""


def train_pack(
    model: PreTrainedModel,
    spec: StudySpec,
    trials: Sequence[Trial],
    folders: Mapping[str, Path],
    data: TokenizedData,
    pack: str,
    weights: str,
) -> PackRun:
    """Gives each of `trials` its adapter and trains them together: see `train_members`.

    `weights` is the base model's fingerprint.
    """
    steps = total_steps(spec.training, len(data.train))
    members = [make_member(model, trial, spec.training, steps, spec.model.id) for trial in trials]
    choice = choose_engine(model, members, spec.training)
    facts = {"pack": pack, "engine": choice.engine.name, "engine_reason": choice.reason, "model_sha256": weights}
    return train_members(model, spec.training, members, choice, folders, data, facts)


def train_members(
    model: PreTrainedModel,
    training: TrainingSpec,
    members: Sequence[Member],
    choice: EngineChoice,
    folders: Mapping[str, Path],
    data: TokenizedData,
    facts: Mapping[str, Any],
) -> PackRun:
    """Trains all `members` from their first step to their last, and writes the files of each in its trial's folder.

    trial.json holds status, results and `facts`, metrics.jsonl a line a step, eval.json the final held-out loss of
    each example, adapter/ the adapter in PEFT's format (nothing in full fine-tuning); the folders must be new.
    A trial whose loss or gradient is not finite is frozen where it is and recorded as diverged; the others go on.
    """
    engine, _, costs = choice
    trials = [member.trial for member in members]
    steps = total_steps(training, len(data.train))
    per_epoch = steps_per_epoch(len(data.train), effective_batch_size(training))
    evaluated = eval_steps(training, steps)
    writers: dict[str, JsonlWriter] = {}
    histories: dict[str, list[StepMetrics]] = {}
    seconds = eval_seconds = flops = rate = 0.0
    products = Products()
    for trial in trials:
        writers[trial.name] = JsonlWriter(folders[trial.name] / "metrics.jsonl")
        histories[trial.name] = []
    record = _Recorder(folders, facts)
    for trial in trials:
        record(trial, "running")

    start = time.perf_counter()
    before = engine.evaluate(data.eval, [trials[0].name])[0]  # the base model's own loss for every trial: B is zero
    eval_seconds += time.perf_counter() - start
    (general_before,) = _general_losses(engine, data.general, [trials[0].name])
    for trial in trials:
        writers[trial.name].write({"step": 0, "epoch": 0.0, "eval_loss": before.mean})

    active = list(members)
    for step in range(steps):
        start = time.perf_counter()
        with products if step == 0 else nullcontext():
            metrics = train_step(engine, active, data.train, training, step)
        if model.device.type == "cuda":
            torch.cuda.synchronize()
        step_seconds = time.perf_counter() - start
        seconds += step_seconds
        flops += sum(costs[m.trial.name].step_flops(result) for m, result in zip(active, metrics, strict=True))
        if step == 0:
            rate = product_rate(products.shapes, model.device, model.dtype)
        for member, result in zip(list(active), metrics, strict=True):
            name = member.trial.name
            if not result.finite:
                active.remove(member)
                what = "loss" if not math.isfinite(result.loss) else "gradient"
                record(member.trial, "diverged", f"{what} not finite at step {step + 1}")
                continue
            histories[name].append(result)
            writers[name].write(
                {
                    "step": step + 1,
                    "epoch": (step + 1) / per_epoch,
                    "train_loss": result.loss,
                    "grad_norm": result.grad_norm,
                    "step_learning_rate": result.learning_rate,
                    "tokens": result.tokens,
                    "label_tokens": result.label_tokens,
                    "step_seconds": step_seconds,
                }
            )
        if not active:
            break
        if step + 1 in evaluated:
            start = time.perf_counter()
            evals = engine.evaluate(data.eval, [member.trial.name for member in active])
            eval_seconds += time.perf_counter() - start
            for member, held_out in zip(active, evals, strict=True):
                if math.isfinite(held_out.mean):
                    writers[member.trial.name].write({"step": step + 1, "eval_loss": held_out.mean})
            if step + 1 == steps:
                general = _general_losses(engine, data.general, [member.trial.name for member in active])
                for member, held_out, after in zip(active, evals, general, strict=True):
                    history, times = histories[member.trial.name], (seconds, eval_seconds)
                    _finish(record, member, held_out, history, times, (general_before, after), folders)
    for writer in writers.values():
        writer.close()
    rates = rate, product_rate(products.shapes, model.device, model.dtype)
    return PackRun(step + 1, seconds, flops, rates)


class _Recorder:
    """Writes trial.json."""

    def __init__(self, folders: Mapping[str, Path], shared: Mapping[str, Any]) -> None:
        self.folders = folders
        self.shared = shared

    def __call__(
        self, trial: AnyTrial, status: str, reason: str | None = None, results: Mapping[str, Any] | None = None
    ) -> None:
        write_json(
            self.folders[trial.name] / "trial.json",
            {
                "schema": 1,
                "trial": trial.name,
                "status": status,
                "reason": reason,
                **self.shared,
                **trial.model_dump(mode="json"),
                "results": results,
            },
        )


def _general_losses(engine: Engine, tokens: Tokens | None, names: Sequence[str]) -> list[float | None]:
    """The loss on the general text under each adapter, in nats a token; None where there is no text, or no number."""
    if tokens is None:
        return [None] * len(names)
    means = [losses.mean for losses in engine.evaluate(tokens, names)]
    return [mean if math.isfinite(mean) else None for mean in means]


def _finish(
    record: _Recorder,
    member: Member,
    held_out: ExampleLosses,
    history: Sequence[StepMetrics],
    seconds: tuple[float, float],
    general: tuple[float | None, float | None],
    folders: Mapping[str, Path],
) -> None:
    """Writes a trial's last files; trial.json comes last, so that `done` means that all is there.

    `seconds` are those of the pack's steps, and of its evaluations; `general` are the losses on the general text before
    training and after.
    """
    trial, folder = member.trial, folders[member.trial.name]
    if not math.isfinite(held_out.mean) or not finite_weights(member):
        record(trial, "diverged", f"held-out loss or weights not finite after step {len(history)}")
        return
    examples = {
        "example": list(range(len(held_out.loss))),
        "loss": held_out.loss.tolist(),
        "label_tokens": held_out.label_tokens.tolist(),
        "correct_tokens": held_out.correct_tokens.astype(int).tolist(),
    }
    write_json(folder / "eval.json", {"schema": 1, "step": len(history), "examples": examples})
    adapter_bytes = save_adapter(member.weights, member.config, folder / "adapter") if member.config else None
    tail = history[-max(1, len(history) // 10) :]
    tokens = sum(step.tokens for step in history)
    results = {
        "steps": len(history),
        "tokens": tokens,
        "trainable_params": sum(parameter.numel() for parameter in member.parameters),
        "adapter_bytes": adapter_bytes,
        "train_loss": sum(step.loss for step in tail) / len(tail),
        "eval_loss": held_out.mean,
        "eval_perplexity": math.exp(min(held_out.mean, 700.0)),
        "eval_accuracy": held_out.accuracy,
        "general_loss_before": general[0],
        "general_loss_after": general[1],
        "train_seconds": seconds[0],
        "eval_seconds": seconds[1],
        "tokens_per_second": tokens / seconds[0],
    }
    record(trial, "done", results=results)
