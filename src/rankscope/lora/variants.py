"""Variants of LoRA that initialise the factors from the base weights: PiSSA (Meng et al. 2024, arXiv:2404.02948) and
OLoRA (Büyükakyüz 2024, arXiv:2406.01775).

Both move a part of each weight W into the adapter: W = (W - s B0 A0) + s B0 A0. A pack has one base for all its trials,
so W stays whole here, and each forward subtracts the initial update: y = x W.T + s x (B A - B0 A0).T. The
initialisation is PEFT's own, and what is saved is what PEFT converts it to for sharing: plain LoRA of twice the rank.
"""

import math
from collections.abc import Iterator, Mapping
from copy import copy
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from peft import LoraConfig
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankscope.errors import StudyError
from rankscope.lora.adapters import SAVED_PREFIX, adapter_key, lora_layers

WEIGHT_INIT_VARIANTS = ("pissa", "olora")  # initialised from the base weights, with an initial update to subtract


_INITIAL = "rankscope_initial_factors"


class InitialFactors(NamedTuple):
    """Untrained copies of one layer's factors as they were initialised."""

    a: Tensor  # (R, D)
    b: Tensor  # (O, R)


def initial_factors(layer: LoraLayer, key: str) -> InitialFactors | None:
    """Initial factors of an adapter, by PEFT's name of it; None where the initial update is zero."""
    factors: InitialFactors | None = layer.__dict__.get(_INITIAL, {}).get(key)
    return factors


def init_from_weights(model: nn.Module, adapter: str, variant: str) -> None:
    """Initialise an injected adapter as `variant` does, without changing the base weights. Raises StudyError if PEFT
    has no such initialisation for the type of a layer."""
    key = adapter_key(adapter)
    for name, layer in lora_layers(model):
        if key not in layer.lora_A and key not in layer.lora_embedding_A:
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) and (variant == "olora" or not isinstance(base, Conv1D)):
            raise StudyError(f"variants: {variant} cannot initialise {name}, a {type(base).__name__}", "Leave it out.")
        weight = base.weight.data
        base.weight.data = weight.clone()  # PEFT subtracts the initial update from it
        if variant == "pissa":
            layer.pissa_init(key, "pissa")  # type: ignore[no-untyped-call]
        else:
            layer.olora_init(key)  # type: ignore[no-untyped-call]
        base.weight.data = weight
    record_initial_factors(model, adapter)


def record_initial_factors(model: nn.Module, adapter: str) -> None:
    """Record the adapter's current weights as its initial factors."""
    key = adapter_key(adapter)
    for _, layer in lora_layers(model):
        if key not in layer.lora_A:
            continue
        if _INITIAL not in layer.__dict__:
            layer.__dict__[_INITIAL] = {}  # no buffers, which would join the model's tensors
            assert isinstance(layer, nn.Module)  # for mypy: PEFT's class is mixed into one
            layer.register_forward_hook(_subtract_initial_update)
        factors: tuple[Any, Any] = layer.lora_A[key], layer.lora_B[key]
        layer.__dict__[_INITIAL][key] = InitialFactors(*(factor.weight.detach().clone() for factor in factors))


def _subtract_initial_update(layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """Hook after PEFT's own forward; the packed one (`rankscope.lora.packed`) subtracts the initial update itself."""
    if "forward" in layer.__dict__ or layer.disable_adapters:
        return None
    for key in layer.active_adapters:
        if initial := initial_factors(layer, key):
            hidden = F.linear(args[0].to(initial.a.dtype), initial.a)
            out = out - layer.scaling[key] * F.linear(hidden, initial.b).to(out.dtype)
    return out


def iter_initial_factors(model: nn.Module) -> Iterator[Tensor]:
    """Tensors of all layers' and adapters' initial factors."""
    for _, layer in lora_layers(model):
        for initial in layer.__dict__.get(_INITIAL, {}).values():
            yield from initial


def initial_state_dict(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """Initial factors of the adapter under PEFT's saved names; empty where its initial update is zero."""
    state: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        if initial := initial_factors(layer, adapter_key(adapter)):
            state[f"{SAVED_PREFIX}{name}.lora_A.weight"] = initial.a
            state[f"{SAVED_PREFIX}{name}.lora_B.weight"] = initial.b
    return state


def as_plain_lora(
    weights: Mapping[str, Tensor], initial: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """Weights and configuration of an adapter for the unchanged base model. With `initial` factors the rank doubles:
    [B, -B0] [A; A0] = B A - B0 A0."""
    if not initial:
        return dict(weights), config
    tensors = dict(weights)
    for name in initial.keys() & weights.keys():  # without layers that no token reaches
        is_a, first = ".lora_A." in name, initial[name]
        tensors[name] = torch.cat([weights[name], first if is_a else -first], dim=0 if is_a else 1)
    config = copy(config)
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # type: ignore[assignment]  # a float is fine
    return tensors, config
