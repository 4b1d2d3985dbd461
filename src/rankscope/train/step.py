"""A pack: trials that train together over one frozen base, each with an optimizer and a random stream of its own."""

import hashlib
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from rankscope.data.batches import batch_indices, steps_per_epoch
from rankscope.data.tokens import Tokens
from rankscope.errors import StudyError
from rankscope.lora.adapters import adapter_weights, add_adapter, save_adapter
from rankscope.lora.layout import Slice
from rankscope.lora.variants import FROM_WEIGHTS, begin_from_weights, exported, starts
from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.spec.models import TrainingSpec
from rankscope.train.engine import Engine
from rankscope.train.optimizer import make_optimizer


class StepMetrics(NamedTuple):
    """One optimizer step of one trial."""

    loss: float  # nats a label token, mean over the step's label tokens
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    label_tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Member(NamedTuple):
    """A trial's training state."""

    trial: AnyTrial
    config: LoraConfig | None  # None in full fine-tuning
    weights: dict[str, nn.Parameter]  # what is trained; an adapter's under PEFT's saved names
    optimizer: Optimizer
    scheduler: LambdaLR
    start: Mapping[str, Tensor] = MappingProxyType({})  # what an adapter of PiSSA or OLoRA began with

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    @property
    def lora_dropout(self) -> float:
        return self.config.lora_dropout if self.config else 0.0


def total_steps(training: TrainingSpec, examples: int) -> int:
    """Optimizer steps of the whole schedule.

    Raises:
        StudyError: they are more than `MOST_STEPS`.
    """
    steps: float
    if training.steps is not None:
        steps = training.steps
    else:
        steps = (training.epochs or 1.0) * steps_per_epoch(examples, training.effective_batch_size)
    if steps > MOST_STEPS:
        raise StudyError(
            f"training: {steps:,.6g} optimizer steps a trial, more than {MOST_STEPS:,}", "Lower its steps or epochs."
        )
    return max(1, math.ceil(steps))


MOST_STEPS = 1_000_000
"""A mistake, rather than a fine-tuning; a plan looks at the batch of each."""


def eval_steps(training: TrainingSpec, steps: int) -> set[int]:
    """After which steps the held-out loss is taken: evenly spread, the last one among them."""
    return {math.ceil(steps * (i + 1) / training.evals) for i in range(training.evals)}


def spread(steps: int, count: int) -> list[int]:
    """`count` steps spread evenly over a schedule of `steps`, repeating some where it is shorter."""
    return [i * steps // count for i in range(count)]


def make_member(
    model: PreTrainedModel, trial: Trial, training: TrainingSpec, steps: int, base: str | None = None
) -> Member:
    """Injects the trial's adapter and gives it its optimizer and schedule."""
    config, candidate = add_adapter(model, trial, base), trial.candidate
    if candidate.variant in FROM_WEIGHTS:
        begin_from_weights(model, trial.name, candidate.variant)
    weights = adapter_weights(model, trial.name)
    rates: dict[float, list[nn.Parameter]] = {candidate.learning_rate: []}
    for name, weight in weights.items():
        faster = candidate.loraplus_lr_ratio if ".lora_B." in name else 1.0
        rates.setdefault(candidate.learning_rate * faster, []).append(weight)
    optimizer = make_optimizer(rates, training)
    scheduler = make_scheduler(optimizer, training, steps)
    return Member(trial, config, weights, optimizer, scheduler, starts(model, trial.name))


def save_member(member: Member, folder: Path) -> int | None:
    """Writes a member's adapter as it is shared; the weights' size in bytes. None and nothing in full fine-tuning."""
    if member.config is None:
        return None
    return save_adapter(*exported(member.weights, member.start, member.config), folder)


def make_scheduler(optimizer: Optimizer, training: TrainingSpec, steps: int) -> LambdaLR:
    """The learning rate over the whole schedule, as transformers has it."""
    kind = "constant_with_warmup" if training.lr_scheduler_type == "constant" else training.lr_scheduler_type
    scheduler: LambdaLR = get_scheduler(kind, optimizer, math.ceil(training.warmup_ratio * steps), steps)
    return scheduler


def train_step(
    engine: Engine, members: Sequence[Member], tokens: Tokens, training: TrainingSpec, step: int | Sequence[int]
) -> list[StepMetrics]:
    """One optimizer step of every member. `step` counts from 0 over the whole schedule: one for all members, or each
    member's own.

    A member whose loss or gradient is not finite is left unchanged; the caller reads that from its metrics.
    """
    steps = [step] * len(members) if isinstance(step, int) else step
    if training.base_dropout == "keep":  # the base's own dropout draws from the global stream
        torch.manual_seed(stream_seed(members[0].trial.seed, steps[0], -1))
    slices = [
        step_slice(member.trial, member.lora_dropout, tokens, training, own)
        for member, own in zip(members, steps, strict=True)
    ]
    for member in members:
        member.optimizer.zero_grad(set_to_none=True)
    metrics = []
    for member, batch in zip(members, engine.accumulate(tokens, slices), strict=True):
        norm: torch.Tensor = nn.utils.get_total_norm([p.grad for p in member.parameters if p.grad is not None])
        rate = float(member.scheduler.get_last_lr()[0])
        result = StepMetrics(batch.loss, float(norm), rate, batch.tokens, batch.label_tokens)
        if result.finite:
            if training.max_grad_norm:
                nn.utils.clip_grads_with_norm_(member.parameters, training.max_grad_norm, norm)
            member.optimizer.step()
            member.scheduler.step()
        metrics.append(result)
    return metrics


def step_slice(trial: AnyTrial, lora_dropout: float, tokens: Tokens, training: TrainingSpec, step: int) -> Slice:
    """What `trial` trains on at `step`, with a dropout stream for each example where there is dropout."""
    examples = batch_at(trial, tokens, training, step)
    places = range(len(examples)) if lora_dropout else ()
    return Slice(trial.name, examples, [stream_seed(trial.seed, step, place) for place in places])


def batch_at(trial: AnyTrial, tokens: Tokens, training: TrainingSpec, step: int) -> np.ndarray:
    """The examples that `trial` sees at `step`: the same for every trial with its seed."""
    return batch_indices(len(tokens), training.effective_batch_size, trial.seed, step)


def stream_seed(seed: int, step: int, place: int) -> int:
    """The seed of one example's dropout stream: a hash, so that neighbouring seeds give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}:{step}:{place}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes 63 bits


def finite_weights(member: Member) -> bool:
    """Whether every weight that is trained is a finite number."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in member.parameters)
