"""An adapter as it lies in a folder, in PEFT's format: its factors and their scaling. Also one made elsewhere."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download
from peft import LoraConfig
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from rankscope.data.sources import HUB_ID
from rankscope.errors import ModelError

_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")


class Factors(NamedTuple):
    """One layer's update, `scaling * b @ a`, in float32."""

    layer: str
    """The layer's name in the base model."""
    a: Tensor  # (R, D); a convolution's D is channels times kernel
    b: Tensor  # (O, R)
    scaling: float

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class SavedAdapter(NamedTuple):
    """A LoRA adapter."""

    config: LoraConfig
    layers: list[Factors]
    """In the file's order of names, blocks by number."""
    others: list[str]
    """Names of the file's other tensors: biases, DoRA's magnitudes, modules that were saved whole."""


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
    factors: dict[str, dict[str, Tensor]] = {}
    others = []
    for key, tensor in tensors.items():
        found = _FACTOR.fullmatch(key)
        if found:
            factors.setdefault(found[1], {})[found[2][-1]] = tensor.flatten(1).float()
        else:
            others.append(key)
    layers = [
        _layer(folder, name, pair, config) for name, pair in sorted(factors.items(), key=lambda item: _order(item[0]))
    ]
    if not layers:
        raise ModelError(f"{folder / WEIGHTS}: holds no LoRA factors", "Give an adapter in PEFT's format.")
    return SavedAdapter(config, layers, others)


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


def _layer(folder: Path, name: str, pair: dict[str, Tensor], config: LoraConfig) -> Factors:
    if pair.keys() != {"A", "B"} or pair["A"].shape[0] != pair["B"].shape[1]:
        shapes = ", ".join(f"{factor} {list(tensor.shape)}" for factor, tensor in sorted(pair.items()))
        raise ModelError(f"{folder / WEIGHTS}: {name} has {shapes}: no pair of LoRA factors", "Restore it.")
    rank, alphas = pair["A"].shape[0], config.alpha_pattern or {}
    alpha = alphas.get(get_pattern_key(list(alphas), name), config.lora_alpha)
    return Factors(name, pair["A"], pair["B"], alpha / (rank**0.5 if config.use_rslora else rank))


def _order(name: str) -> list[tuple[int, str]]:
    """Block 10 after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
