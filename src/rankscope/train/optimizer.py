"""AdamW with states in float32, or in 8 bits by bitsandbytes; size, saving and restoring of the states."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from rankscope.errors import StudyError, require
from rankscope.spec.models import TrainingSpec

MIN_8BIT_WEIGHTS = 4096  # of the smallest tensor with 8-bit states; bitsandbytes keeps the others in float32
STATE_BLOCK = 256  # values of an 8-bit state that share a scale
_CODEBOOKS = ("qmap1", "qmap2")  # states that map the 256 codes to values, equal for all tensors and not saved


def check_optimizer(training: TrainingSpec, device: torch.device) -> None:
    """Check that `training.optim` is available on `device`. Raises StudyError: the optimizer pages, and the device is a
    CPU; MissingExtraError: bitsandbytes is not installed."""
    if training.optim == "adamw_torch_fused":
        return
    if training.optim.startswith("paged") and device.type != "cuda":
        raise StudyError(
            f"training.optim: {training.optim} moves states from a CUDA GPU to the CPU's memory, and {device.type} has "
            "nothing to move",
            "Use adamw_8bit, or adamw_torch_fused.",
        )
    require("bitsandbytes", "quantization", f"training.optim: {training.optim}")


def make_optimizer(weights: Mapping[float, Sequence[nn.Parameter]], training: TrainingSpec) -> Optimizer:
    """Make AdamW for weights grouped by learning rate. As in transformers' Trainer, weight decay does not apply to
    biases, norms and DoRA's magnitudes."""
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
    from bitsandbytes.optim.adamw import AdamW as BitsandbytesAdamW

    options |= {"optim_bits": 32 if training.optim.endswith("32bit") else 8, "min_8bit_size": MIN_8BIT_WEIGHTS}
    optimizer: Optimizer = BitsandbytesAdamW(groups, is_paged=training.optim.startswith("paged"), **options)
    return optimizer


def state_sizes(optim: str, count: int) -> list[int]:
    """Size of each state of a tensor of `count` weights, in bytes. Paged states count too: they stay on the GPU while
    they fit, and every step needs them there."""
    if not optim.endswith("8bit") or count < MIN_8BIT_WEIGHTS:
        return [4 * count, 4 * count]
    return [count, count, *[4 * -(-count // STATE_BLOCK)] * 2]


def step_bytes(optim: str, count: int, device: str) -> int:
    """Temporary memory of a step on a tensor of `count` weights, in bytes. On a CPU the 8-bit step of bitsandbytes
    makes both states, the gradient and two more tensors in float32. On a GPU it is one kernel without temporary
    memory."""
    return 20 * count if device == "cpu" and optim.endswith("8bit") and count >= MIN_8BIT_WEIGHTS else 0


def saved_state(optimizer: Optimizer, weight: nn.Parameter) -> dict[str, Tensor]:
    """Optimizer states of one weight as tensors to save; empty before its first gradient."""
    state = optimizer.state.get(weight, {})
    return {
        name: value if isinstance(value, Tensor) else torch.tensor(value)
        for name, value in state.items()
        if name not in _CODEBOOKS
    }


def restore_state(optimizer: Optimizer, weight: nn.Parameter, saved: Mapping[str, Tensor]) -> None:
    """Restore the states of one weight that `saved_state` returned."""
    if not saved:
        return
    if isinstance(optimizer, AdamW):
        optimizer.state[weight] = {name: value.to(weight.device) for name, value in saved.items()}
        return
    own: Any = optimizer
    for number, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            if parameter is weight:
                own.init_state(group, weight, number, index)
    state = optimizer.state[weight]
    for name, value in saved.items():
        if isinstance(state[name], Tensor):
            state[name].copy_(value)
        else:
            state[name] = int(value)
