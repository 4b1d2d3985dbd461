"""An adapter as it lies in a folder, in PEFT's format: its factors and their scaling. Also one made elsewhere."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rankscope.data.sources import HUB_ID
from rankscope.errors import ModelError, StudyError
from rankscope.lora.adapters import adapter_key, inject, save_adapter

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")


class Factors(NamedTuple):
    """One layer's update, `scaling * b @ a`, in float32."""

    layer: str
    """The layer's name in the base model."""
    a: Tensor  # (R, D); a convolution's D is channels times kernel
    b: Tensor  # (O, R)
    scaling: float
    keys: tuple[str, str]
    """Names of `a` and `b` in the file."""
    kernel: tuple[int, ...] = ()
    """Of a convolution, with its channels: `a` is saved as (R, *kernel), `b` as (O, R, 1, ...)."""
    dtype: torch.dtype = torch.float32
    """In the file."""

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class SavedAdapter(NamedTuple):
    """A LoRA adapter."""

    config: LoraConfig
    layers: list[Factors]
    """In the file's order of names, blocks by number."""
    others: dict[str, Tensor]
    """The file's other tensors: biases, DoRA's magnitudes, modules that were saved whole."""


def find_adapter(name: str, revision: str | None = None) -> Path:
    """The folder of an adapter: `name` itself, or that of its two files from the hub.

    Raises:
        ModelError: there is none.
    """
    folder = Path(name)
    if folder.is_dir() or not HUB_ID.fullmatch(name):
        return folder
    try:
        config, _ = (hf_hub_download(name, file, revision=revision) for file in (CONFIG, WEIGHTS))
    except Exception as error:  # the hub's client raises of its own, of requests, and of the file system
        reason = str(error).strip().splitlines()[0]
        raise ModelError(
            f"adapter {name}: no such folder, and not on the hub: {reason}", "Give a folder, or a hub id."
        ) from None
    return Path(config).parent


def read_adapter(folder: Path) -> SavedAdapter:
    """Reads an adapter. Nothing of it is executed: its configuration is JSON, its weights are safetensors.

    Raises:
        ModelError: a file is missing or damaged, it is no LoRA adapter, or a factor has no counterpart.
    """
    config = _read_config(folder)
    try:
        tensors = load_file(folder / WEIGHTS)
    except FileNotFoundError:
        raise ModelError(f"{folder / WEIGHTS}: missing", "Weights are read from safetensors files only.") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{folder / WEIGHTS}: damaged or cut short: {error}", "Restore it.") from None
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        if found := _FACTOR.fullmatch(key):
            keys.setdefault(found[1], {})[found[2][-1]] = key
    pairs = {name: {part: (key, tensors.pop(key)) for part, key in both.items()} for name, both in keys.items()}
    layers = [_layer(folder, name, pairs[name], config) for name in sorted(pairs, key=_order)]
    if not layers:
        raise ModelError(f"{folder / WEIGHTS}: holds no LoRA factors", "Give an adapter in PEFT's format.")
    return SavedAdapter(config, layers, tensors)


def write_adapter(adapter: SavedAdapter, folder: Path) -> int:
    """Writes PEFT's two files; returns the size of the weights' file in bytes.

    Raises:
        StudyDirectoryError: a file cannot be written.
    """
    return save_adapter(_tensors(adapter), adapter.config, folder)


def _tensors(adapter: SavedAdapter) -> dict[str, Tensor]:
    """As they stand in the file."""
    tensors = dict(adapter.others)
    for layer in adapter.layers:
        a, b = layer.a.to(layer.dtype), layer.b.to(layer.dtype)
        if layer.kernel:
            a, b = a.reshape(-1, *layer.kernel), b.reshape(*b.shape, *[1] * (len(layer.kernel) - 1))
        tensors[layer.keys[0]], tensors[layer.keys[1]] = a, b
    return tensors


def attach(model: PreTrainedModel, name: str, adapter: SavedAdapter) -> None:
    """Gives `model` the adapter, under `name`, beside what it has; its weights are float32 there.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    key = adapter_key(name)
    try:
        inject(adapter.config, model, key)
        result: Any = set_peft_model_state_dict(model, _tensors(adapter), adapter_name=key)
    except (StudyError, RuntimeError, ValueError, KeyError) as error:
        raise ModelError(f"the adapter does not fit the model: {str(error).strip().splitlines()[-1]}", _OTHER) from None
    missing = [key for key in result.missing_keys if ".lora_" in key and f".{adapter_key(name)}" in key]
    if result.unexpected_keys or missing:
        odd = (result.unexpected_keys + missing)[0]
        raise ModelError(f"the adapter does not fit the model: {odd} is of one and not of the other", _OTHER)


_OTHER = "Give the model that the adapter was trained on."


def _read_config(folder: Path) -> LoraConfig:
    if not (folder / CONFIG).is_file():
        raise ModelError(f"adapter {folder}: no {CONFIG} in the folder", "Give the folder of a PEFT LoRA adapter.")
    known = {field.name for field in fields(LoraConfig) if field.init}  # a newer PEFT has more, not of the factors
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = values.get("peft_type")
        config = LoraConfig(**{name: value for name, value in values.items() if name in known})
    except Exception as error:  # whatever PEFT makes of a damaged file
        raise ModelError(f"{folder / CONFIG}: cannot be read: {error}", "Restore it.") from None
    if kind != "LORA":
        raise ModelError(f"{folder / CONFIG}: peft_type is {kind!r}, not LORA", "Only LoRA has ranks to look at.")
    return config


def _layer(folder: Path, name: str, pair: dict[str, tuple[str, Tensor]], config: LoraConfig) -> Factors:
    tensors = {part: tensor for part, (_, tensor) in sorted(pair.items())}
    whole = tensors.keys() == {"A", "B"} and all(tensor.dim() >= 2 for tensor in tensors.values())
    if not whole or tensors["A"].shape[0] != tensors["B"].shape[1] or not tensors["A"].shape[0]:
        shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
        raise ModelError(f"{folder / WEIGHTS}: {name} has {shapes}: no pair of LoRA factors", "Restore it.")
    a, b = tensors["A"], tensors["B"]
    rank, alphas = a.shape[0], config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return Factors(
        name,
        a.flatten(1).float(),
        b.flatten(1).float(),
        alpha / (rank**0.5 if config.use_rslora else rank),
        (pair["A"][0], pair["B"][0]),
        tuple(a.shape[1:]) if a.dim() > 2 else (),
        a.dtype,
    )


def _order(name: str) -> list[tuple[int, str]]:
    """Block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
