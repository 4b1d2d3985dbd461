"""One optimizer step of a pack: trials over one frozen base, each with its own optimizer and random stream."""

import hashlib
import math
import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, get_scheduler

from rankscope.data.batches import batch_indices
from rankscope.data.tokens import Tokens
from rankscope.lora.adapters import adapter_weights, add_adapter, check_reached, layer_of, leave_out, save_adapter
from rankscope.lora.layout import Slice
from rankscope.lora.variants import WEIGHT_INIT_VARIANTS, as_plain_lora, init_from_weights, initial_state_dict
from rankscope.spec.candidates import AnyTrial, Trial
from rankscope.spec.models import ModelSpec, TrainingSpec
from rankscope.train.engine import Engine
from rankscope.train.optimizer import make_optimizer


class StepMetrics(NamedTuple):
    """Measurements of one optimizer step of one trial."""

    loss: float  # nats a label token, mean over the step's label tokens
    grad_norm: float  # before clipping
    learning_rate: float
    tokens: int
    label_tokens: int

    @property
    def finite(self) -> bool:
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class TrainState(NamedTuple):
    """Weights, optimizer and schedule of a trial in training."""

    trial: AnyTrial
    config: LoraConfig | None  # None in full fine-tuning
    weights: dict[str, nn.Parameter]  # trained weights, those of an adapter under PEFT's saved names
    optimizer: Optimizer
    scheduler: LambdaLR
    initial: Mapping[str, Tensor] = MappingProxyType({})  # initial factors of PiSSA and OLoRA

    @property
    def parameters(self) -> list[nn.Parameter]:
        return list(self.weights.values())

    @property
    def lora_dropout(self) -> float:
        return self.config.lora_dropout if self.config else 0.0


def evenly_spaced(steps: int, count: int) -> list[int]:
    """Indices of `count` steps spread evenly over a schedule of `steps`, repeated where it is shorter."""
    return [i * steps // count for i in range(count)]


def make_train_state(
    model: PreTrainedModel, trial: Trial, training: TrainingSpec, steps: int, base: ModelSpec | None = None
) -> TrainState:
    """Inject the trial's adapter and make its optimizer and schedule. An adapter that is saved names its `base`."""
    config, candidate = add_adapter(model, trial), trial.candidate
    if base is not None:
        config.base_model_name_or_path, config.revision = base.id, base.commit or base.revision
    if candidate.variant in WEIGHT_INIT_VARIANTS:
        init_from_weights(model, trial.name, candidate.variant)
    weights = adapter_weights(model, trial.name)
    rates: dict[float, list[nn.Parameter]] = {candidate.learning_rate: []}
    for name, weight in weights.items():
        faster = candidate.loraplus_lr_ratio if re.search(r"\.lora_(embedding_)?B", name) else 1.0
        rates.setdefault(candidate.learning_rate * faster, []).append(weight)
    optimizer = make_optimizer(rates, training)
    scheduler = make_scheduler(optimizer, training, steps)
    return TrainState(trial, config, weights, optimizer, scheduler, initial_state_dict(model, trial.name))


def leave_out_unreached(model: PreTrainedModel, state: TrainState, unreached: Collection[str]) -> None:
    """Take a trial's adapter off layers that get no gradient: it would stay zero there, and be counted and saved.
    Raises StudyError: nothing would be left to train."""
    dead = [name for name in state.weights if layer_of(name) in unreached]
    if not dead or state.config is None:
        return
    layers = list(dict.fromkeys(map(layer_of, dead)))
    for name in dead:
        del state.weights[name]
    check_reached(state.weights, layers)
    left = {id(weight) for weight in state.parameters}
    for group in state.optimizer.param_groups:
        group["params"] = [weight for weight in group["params"] if id(weight) in left]
    leave_out(model, layers, state.config)


def save_trained_adapter(state: TrainState, folder: Path) -> int | None:
    """Write a trial's adapter as plain LoRA, and return the size of its weights in bytes. Full fine-tuning writes
    nothing and returns None."""
    if state.config is None:
        return None
    return save_adapter(*as_plain_lora(state.weights, state.initial, state.config), folder)


def load_trained_adapter(state: TrainState, folder: Path) -> None:
    """Fill a trial's weights, and the initial ones that it has, from what `save_trained_adapter` wrote."""
    for name, tensor in load_file(folder / SAFETENSORS_WEIGHTS_NAME).items():  # without layers that no token reaches
        if name in state.initial:  # see `as_plain_lora`
            is_a = ".lora_A." in name
            tensor, initial = tensor.chunk(2, dim=0 if is_a else 1)
            state.initial[name].copy_(initial if is_a else -initial)
        state.weights[name].data.copy_(tensor)


def make_scheduler(optimizer: Optimizer, training: TrainingSpec, steps: int) -> LambdaLR:
    """Learning rate over the whole schedule, by transformers."""
    kind = "constant_with_warmup" if training.lr_scheduler_type == "constant" else training.lr_scheduler_type
    scheduler: LambdaLR = get_scheduler(kind, optimizer, math.ceil(training.warmup_ratio * steps), steps)
    return scheduler


def train_step(
    engine: Engine, states: Sequence[TrainState], tokens: Tokens, training: TrainingSpec, step: int | Sequence[int]
) -> list[StepMetrics]:
    """Take one optimizer step of every trial. `step` counts from 0 over the whole schedule, for all trials or for each.
    A trial with a loss or gradient that is not finite is left unchanged; the caller reads that from its metrics."""
    steps = [step] * len(states) if isinstance(step, int) else step
    if training.base_dropout == "keep":  # the base's own dropout draws from the global stream
        torch.manual_seed(stream_seed(states[0].trial.seed, steps[0], -1))
    slices = [
        step_slice(state.trial, state.lora_dropout, tokens, training, own)
        for state, own in zip(states, steps, strict=True)
    ]
    trained = zip(states, slices, engine.accumulate(tokens, slices), strict=True)
    # A CPU takes trial after trial, so that the gradients of all never exist at once; a GPU would wait for each.
    chunks = ([one] for one in trained) if engine.model.device.type == "cpu" else [list(trained)]
    return [metrics for chunk in chunks for metrics in _update(chunk, tokens, training)]


def _update(
    trained: Sequence[tuple[TrainState, Slice, Tensor]], tokens: Tokens, training: TrainingSpec
) -> list[StepMetrics]:
    """Step the optimizers of trials whose gradients are complete, and drop those."""
    metrics = []
    states, slices, losses = zip(*trained, strict=True)
    norms = [nn.utils.get_total_norm([p.grad for p in state.parameters if p.grad is not None]) for state in states]
    read = torch.cat([*losses, *(norm.to(losses[0].device).view(1) for norm in norms)]).cpu().double()  # waits, once
    *parts, lengths = read.split([*map(len, losses), len(norms)])
    for state, slice_, own, norm, length in zip(states, slices, parts, norms, lengths.tolist(), strict=True):
        rate, labels = float(state.scheduler.get_last_lr()[0]), int(tokens.label_counts[slice_.examples].sum())
        result = StepMetrics(
            float(own.sum()) / labels, length, rate, int(tokens.lengths[slice_.examples].sum()), labels
        )
        if result.finite:
            if training.max_grad_norm:
                nn.utils.clip_grads_with_norm_(state.parameters, training.max_grad_norm, norm)
            state.optimizer.step()
            state.scheduler.step()
        state.optimizer.zero_grad(set_to_none=True)
        metrics.append(result)
    return metrics


def step_slice(trial: AnyTrial, lora_dropout: float, tokens: Tokens, training: TrainingSpec, step: int) -> Slice:
    """Examples of `trial` at `step`, with a dropout seed for each where LoRA dropout is on."""
    examples = batch_at(trial, tokens, training, step)
    positions = range(len(examples)) if lora_dropout else ()
    return Slice(trial.name, examples, [stream_seed(trial.seed, step, position) for position in positions])


def batch_at(trial: AnyTrial, tokens: Tokens, training: TrainingSpec, step: int) -> np.ndarray:
    """Indices of the examples of `trial` at `step`, equal for all trials with the same seed."""
    return batch_indices(len(tokens), training.effective_batch_size, trial.seed, step)


def stream_seed(seed: int, step: int, position: int) -> int:
    """Seed of one example's dropout stream: a hash, so that neighbouring seeds give unrelated streams."""
    digest = hashlib.blake2b(f"{seed}:{step}:{position}".encode(), digest_size=8).digest()
    return int.from_bytes(digest) >> 1  # torch takes 63 bits


def finite_weights(state: TrainState) -> bool:
    """Whether all trained weights are finite."""
    return all(bool(torch.isfinite(parameter).all()) for parameter in state.parameters)
