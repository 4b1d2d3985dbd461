"""AdamW, with its states in float32 or by bitsandbytes in 8 bits; the states' size, and how they are kept."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankscope.errors import StudyError
from rankscope.model.quantized import require_bitsandbytes
from rankscope.spec.models import TrainingSpec

SMALLEST_IN_8_BITS = 4096
"""Weights of a tensor: bitsandbytes keeps the states of smaller ones in float32."""

STATE_BLOCK = 256
"""Values of an 8-bit state that share a scale."""

_CODES = ("qmap1", "qmap2")
"""Among bitsandbytes' states: what the 256 values stand for, the same for all."""


def check_optimizer(training: TrainingSpec, device: torch.device) -> None:
    """Sees to it that `training.optim` can be had.

    Raises:
        StudyError: it pages, and the device is a CPU.
        MissingExtraError: bitsandbytes is not installed.
    """
    if training.optim == "adamw_torch_fused":
        return
    if training.optim.startswith("paged") and device.type == "cpu":
        raise StudyError(
            f"training.optim: {training.optim} moves states from a GPU to the CPU's memory; on a CPU there is nothing "
            "to move",
            "Use adamw_8bit, or adamw_torch_fused.",
        )
    require_bitsandbytes(f"training.optim: {training.optim}")


def make_optimizer(weights: Mapping[float, Sequence[nn.Parameter]], training: TrainingSpec) -> Optimizer:
    """AdamW for weights by their learning rate. Weight decay leaves out biases, norms and DoRA's magnitudes, as
    transformers' Trainer has it."""
    groups: list[dict[str, Any]] = []
    for rate, parameters in weights.items():
        groups.append({"params": [p for p in parameters if p.dim() > 1], "lr": rate})
        groups.append({"params": [p for p in parameters if p.dim() <= 1], "lr": rate, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    options: dict[str, Any] = {
        "betas": (training.adam_beta1, training.adam_beta2),
        "eps": training.adam_epsilon,
        "weight_decay": training.weight_decay,
    }
    if training.optim == "adamw_torch_fused":
        return AdamW(groups, fused=True, **options)
    from bitsandbytes.optim.adamw import AdamW as AdamWOfBitsandbytes

    bits = 32 if training.optim.endswith("32bit") else 8
    paged = training.optim.startswith("paged")
    made: Optimizer = AdamWOfBitsandbytes(
        groups, optim_bits=bits, is_paged=paged, min_8bit_size=SMALLEST_IN_8_BITS, **options
    )
    return made


def state_sizes(optim: str, count: int) -> list[int]:
    """Bytes of each state of a tensor of `count` weights. Those that can be paged are counted: while there is room for
    them they are on the GPU, and every step needs them there."""
    if not optim.endswith("8bit") or count < SMALLEST_IN_8_BITS:
        return [4 * count, 4 * count]
    return [count, count, *[4 * -(-count // STATE_BLOCK)] * 2]


def step_bytes(optim: str, count: int, device: str) -> int:
    """What a step on a tensor of `count` weights takes for a moment: bitsandbytes' 8-bit step on a CPU makes both
    states, the gradient and two more tensors in float32. On a GPU it is one kernel, which takes nothing."""
    return 20 * count if device == "cpu" and optim.endswith("8bit") and count >= SMALLEST_IN_8_BITS else 0


def saved_state(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """The states of one weight, to be kept; empty where no gradient came."""
    state = optimizer.state.get(weight, {})
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in state.items()
        if name not in _CODES
    }


def restore_state(optimizer: Optimizer, weight: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """Gives one weight the states that `saved_state` kept."""
    if not saved:
        return
    if isinstance(optimizer, AdamW):
        optimizer.state[weight] = {name: value.to(weight.device) for name, value in saved.items()}
        return
    own: Any = optimizer
    for number, group in enumerate(optimizer.param_groups):
        for place, parameter in enumerate(group["params"]):
            if parameter is weight:
                own.init_state(group, weight, number, place)
    state = optimizer.state[weight]
    for name, value in saved.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = int(value)
