"""Kinds of LoRA that begin from the base weights: PiSSA and OLoRA.

Meng et al. 2024, arXiv:2404.02948; Büyükakyüz 2024, arXiv:2406.01775. Both put a part of each weight W into the adapter
and leave the rest in the base: W = (W - s B0 A0) + s B0 A0. A pack has one base for all its trials, so here W stays
whole, and each forward takes the start's update away again:

    y = x W.T + s x (B A - B0 A0).T

The start is PEFT's own, and what is saved is what PEFT makes of it for sharing: plain LoRA of twice the rank.
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
from rankscope.lora.adapters import adapter_key, lora_layers

FROM_WEIGHTS = ("pissa", "olora")
"""Kinds of adapter that begin so."""


class Start(NamedTuple):
    """What an adapter of one layer began with; not trained."""

    a: Tensor  # (R, D)
    b: Tensor  # (O, R)


def start_of(layer: LoraLayer, key: str) -> Start | None:
    """The layer's start under PEFT's name of the adapter; None where it began with an update of zero."""
    starts: dict[str, Start] = layer.__dict__.get("rankscope_starts", {})
    return starts.get(key)


def begin_from_weights(model: nn.Module, adapter: str, kind: str) -> None:
    """Gives an adapter that was injected the start of `kind`. The base weights are left as they are.

    Raises:
        StudyError: a layer is of a type that PEFT has no such start for.
    """
    key = adapter_key(adapter)
    for name, layer in lora_layers(model):
        if key not in layer.lora_A:
            continue
        base = layer.get_base_layer()
        if not isinstance(base, nn.Linear) and (kind == "olora" or not isinstance(base, Conv1D)):
            raise StudyError(f"variants: {kind} has no start for {name}, a {type(base).__name__}", "Leave it out.")
        weight = base.weight.data
        base.weight.data = weight.clone()  # PEFT takes the start out of it
        if kind == "pissa":
            layer.pissa_init(key, "pissa")  # type: ignore[no-untyped-call]
        else:
            layer.olora_init(key)  # type: ignore[no-untyped-call]
        base.weight.data = weight
    note_start(model, adapter)


def note_start(model: nn.Module, adapter: str) -> None:
    """Takes the adapter's weights as they are now for its start."""
    key = adapter_key(adapter)
    for _, layer in lora_layers(model):
        if key not in layer.lora_A:
            continue
        if "rankscope_starts" not in layer.__dict__:
            layer.__dict__["rankscope_starts"] = {}  # no buffers: the model's own tensors stay those that it came with
            assert isinstance(layer, nn.Module)  # for mypy: PEFT's class is mixed into one
            layer.register_forward_hook(_without_start)
        weights: tuple[Any, Any] = (layer.lora_A[key].weight, layer.lora_B[key].weight)
        layer.__dict__["rankscope_starts"][key] = Start(*(weight.detach().clone() for weight in weights))


def _without_start(layer: Any, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
    """After PEFT's own forward; the packed one (`rankscope.lora.packed`) has taken the start away itself."""
    if "forward" in layer.__dict__ or layer.disable_adapters:
        return None
    for key in layer.active_adapters:
        start = start_of(layer, key)
        if start is not None:
            hidden = F.linear(args[0].to(start.a.dtype), start.a)
            out = out - layer.scaling[key] * F.linear(hidden, start.b).to(out.dtype)
    return out


def all_starts(model: nn.Module) -> Iterator[Tensor]:
    """The tensors of all starts."""
    for _, layer in lora_layers(model):
        for start in layer.__dict__.get("rankscope_starts", {}).values():
            yield from start


def starts(model: nn.Module, adapter: str) -> dict[str, Tensor]:
    """The adapter's start under PEFT's saved names; empty where it has none."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_layers(model):
        start = start_of(layer, adapter_key(adapter))
        if start is not None:
            found[f"base_model.model.{name}.lora_A.weight"] = start.a
            found[f"base_model.model.{name}.lora_B.weight"] = start.b
    return found


def exported(
    weights: Mapping[str, Tensor], start: Mapping[str, Tensor], config: LoraConfig
) -> tuple[dict[str, Tensor], LoraConfig]:
    """An adapter as it is saved: over the base model as it came, hence with its start taken away, at twice the rank."""
    if not start:
        return dict(weights), config
    tensors = {
        name: torch.cat([weight, start[name]]) if ".lora_A." in name else torch.cat([weight, -start[name]], dim=1)
        for name, weight in weights.items()
    }
    config = copy(config)
    config.r *= 2
    config.lora_alpha *= math.sqrt(2) if config.use_rslora else 2  # type: ignore[assignment]  # a float is fine
    return tensors, config
