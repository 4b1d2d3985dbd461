"""Adapters in folders, in PEFT's format, possibly made elsewhere: reading, writing, and attaching to a model."""

import copy
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from peft import LoraConfig, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rankscope.data.sources import HUB_ID
from rankscope.errors import ModelError, StudyError
from rankscope.lora.adapter_config import PatternKeys, checked_name, pattern_keys, read_config
from rankscope.lora.adapters import adapter_key, inject, remove_adapters, save_adapter, to_float32

_PLAIN = re.compile(r"[\w.^$\\-]*")  # names, also with escaped dots: they take linear time as regular expressions
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")


class Factors(NamedTuple):
    """Factors of one layer's update, `scaling * b @ a`, in float32."""

    layer: str  # name in the base model
    a: Tensor  # (R, D); a convolution's D is channels times kernel
    b: Tensor  # (O, R)
    scaling: float
    keys: tuple[str, str]  # names of `a` and `b` in the file
    kernel: tuple[int, ...] = ()  # channels and kernel of a convolution, saved as (R, *kernel) and (O, R, 1, ...)
    dtype: torch.dtype = torch.float32  # in the file

    @property
    def rank(self) -> int:
        return self.a.shape[0]


class SavedAdapter(NamedTuple):
    """LoRA adapter as it is saved."""

    config: LoraConfig
    layers: list[Factors]  # by name, blocks by number
    others: dict[str, Tensor]  # the file's other tensors: biases, DoRA's magnitudes, modules saved whole
    unknown: tuple[str, ...] = ()  # options that are set and that the installed PEFT does not know


def find_adapter(name: str, revision: str | None = None) -> Path:
    """Folder of an adapter: `name` itself, or the downloaded folder of a hub id.

    Raises:
        ModelError: no such adapter, or a revision is given for a folder.
    """
    folder = Path(name)
    if os.path.isdir(folder) or not HUB_ID.fullmatch(name):
        if revision is not None:
            raise ModelError(f"adapter {name}: --revision {revision}, but a folder has no revision", "Leave it out.")
        return folder
    try:
        config, _ = (hf_hub_download(name, file, revision=revision) for file in (CONFIG, WEIGHTS))
    except Exception as error:  # the hub's client raises its own errors, httpx's and the file system's
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            raise ModelError(
                f"adapter {name}: the hub has it, but without {CONFIG} or {WEIGHTS}",
                "Give a LoRA adapter in PEFT's format; its weights are read from a safetensors file only.",
            ) from None
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"adapter {name}: no such folder, and not on the hub: {reason}", "Give a folder, or a hub id."
        ) from None
    return Path(config).parent


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter. Nothing of it is executed: its configuration is JSON, its weights are safetensors.

    Raises:
        ModelError: a file is missing or corrupt, it is no LoRA adapter, a factor has no counterpart or is not finite,
            its rank differs from the configuration, or a name is no valid module name.
    """
    config, unknown = read_config(folder)
    (ranks, alphas), file = pattern_keys(folder, config), folder / WEIGHTS
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        raise ModelError(f"{file}: missing", "Weights are read from safetensors files only.") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: corrupt or incomplete: {error}", "Restore it.") from None
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _FACTOR.fullmatch(key):
            try:
                checked_name(match[1])
            except ValueError as error:
                raise ModelError(f"{file}: {error}", "Use an adapter that PEFT has saved.") from None
            other = keys.setdefault(match[1], {}).setdefault(match[2][-1], key)
            if other != key:
                raise ModelError(f"{file}: {other} and {key} are one factor", "Remove one of them.")
    pairs = {name: {part: (key, tensors.pop(key)) for part, key in both.items()} for name, both in keys.items()}
    layers = [_layer(file, name, pairs[name], config, ranks, alphas) for name in sorted(pairs, key=_order)]
    if not layers:
        raise ModelError(f"{file}: holds no LoRA factors", "Give an adapter in PEFT's format.")
    return SavedAdapter(config, layers, tensors, unknown)


def write_adapter(adapter: SavedAdapter, folder: Path) -> int:
    """Write PEFT's two files; return the size of the weights' file in bytes. Raises StudyDirectoryError on failure."""
    return save_adapter(_tensors(adapter), adapter.config, folder)


def _tensors(adapter: SavedAdapter) -> dict[str, Tensor]:
    """Tensors of the adapter as in the file."""
    tensors = dict(adapter.others)
    for layer in adapter.layers:
        a, b = layer.a.to(layer.dtype), layer.b.to(layer.dtype)
        if layer.kernel:
            a, b = a.reshape(-1, *layer.kernel), b.reshape(*b.shape, *[1] * (len(layer.kernel) - 1))
        tensors[layer.keys[0]], tensors[layer.keys[1]] = a, b
    return tensors


def attach(model: PreTrainedModel, name: str, adapter: SavedAdapter) -> None:
    """Add the adapter to `model` under `name`, with float32 weights, beside any that it has.

    Raises:
        ModelError: the adapter does not fit the model.
    """
    key, config = adapter_key(name), _by_name(adapter)
    todo = "Give the model that the adapter was trained on."
    try:
        inject(config, model, key, embeddings=True)
        to_float32(model, name)
        tensors = _tensors(adapter)
        for other in adapter.others:  # PEFT expects modules saved whole under their names in this model
            tensors[other.removeprefix("base_model.model.")] = tensors.pop(other)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=key)
    except (StudyError, RuntimeError, ValueError, KeyError, re.error) as error:
        reason = str(error).strip().splitlines()[-1]
        raise ModelError(f"the adapter does not fit the model: {reason}", todo) from None
    missing = [other for other in result.missing_keys if ".lora_" in other and f".{key}" in other]
    if result.unexpected_keys or missing:
        odd = (result.unexpected_keys + missing)[0]
        raise ModelError(f"the adapter does not fit the model: {odd} is of one and not of the other", todo)


@contextmanager
def attached(model: PreTrainedModel, name: str, adapter: SavedAdapter) -> Iterator[None]:
    """Attach the adapter to `model`, which has none, while the body runs, with the file's other tensors too."""
    biases = {key: bias.clone() for key, bias in model.named_parameters() if key.endswith("bias")}
    try:
        attach(model, name, adapter)
        yield
    finally:
        remove_adapters(model)
        for key, module in list(model.named_modules()):
            if isinstance(module, AuxiliaryTrainingWrapper):
                model.set_submodule(key, module.original_module)
        for key, bias in biases.items():  # which are the base model's own parameters
            model.get_parameter(key).data.copy_(bias)


def _by_name(adapter: SavedAdapter) -> LoraConfig:
    """Configuration with the file's layers by name. `PatternKeys` resolves foreign patterns, and PEFT receives none.

    Raises:
        ModelError: the adapter is of experts, which PEFT only matches by patterns, and its configuration has patterns.
    """
    config = copy.copy(adapter.config)
    if config.target_parameters:
        keys = [*(config.rank_pattern or ()), *(config.alpha_pattern or ())]
        for wide in [keys, config.target_modules, config.exclude_modules, config.layers_pattern]:
            names = [wide] if isinstance(wide, str) else wide or []
            if not all(_PLAIN.fullmatch(name) for name in names):
                raise ModelError(
                    f"an adapter of experts with patterns in its {CONFIG}", "Name its modules without patterns."
                )
        return config
    alphas = PatternKeys(config.alpha_pattern or {})
    config.target_modules = [layer.layer for layer in adapter.layers]
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    by_key = {f"^{re.escape(layer.layer)}": layer for layer in adapter.layers}
    config.rank_pattern = {key: layer.rank for key, layer in by_key.items() if layer.rank != config.r}
    by_layer = {key: alphas.get(layer.layer, config.lora_alpha) for key, layer in by_key.items()}
    config.alpha_pattern = {key: alpha for key, alpha in by_layer.items() if alpha != config.lora_alpha}
    return config


def _layer(
    file: Path,
    name: str,
    pair: dict[str, tuple[str, Tensor]],
    config: LoraConfig,
    ranks: PatternKeys[int],
    alphas: PatternKeys[float],
) -> Factors:
    tensors = {part: tensor for part, (_, tensor) in sorted(pair.items())}
    shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in tensors.items())
    whole = tensors.keys() == {"A", "B"} and all(tensor.dim() >= 2 and tensor.numel() for tensor in tensors.values())
    if whole and tensors["B"].dim() > 2 and tensors["A"].shape[0] > tensors["B"].shape[1]:
        raise ModelError(f"{file}: {name} has {shapes}: of a grouped convolution", "Its update is no product of two.")
    if not whole or tensors["A"].shape[0] != tensors["B"].shape[1]:
        raise ModelError(f"{file}: {name} has {shapes}: no pair of LoRA factors", "Restore it.")
    a, b = tensors["A"], tensors["B"]
    if not (a.is_floating_point() and b.is_floating_point()):
        raise ModelError(f"{file}: {name} is of {a.dtype} and {b.dtype}", "Factors are floating point.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelError(f"{file}: {name} holds NaN or infinity", "Its training diverged: take another.")
    rank, expected = a.shape[0], ranks.get(name, config.r)
    if rank != expected and not config.target_parameters:  # the factors of experts are stacked
        wrong = f"{file}: {name} has rank {rank}, but {CONFIG} says {expected}"
        raise ModelError(wrong, "Restore the file that was changed.")
    scaling = alphas.get(name, config.lora_alpha) / (rank**0.5 if config.use_rslora else rank)
    keys, kernel = (pair["A"][0], pair["B"][0]), tuple(a.shape[1:]) if a.dim() > 2 else ()
    return Factors(name, a.flatten(1).float(), b.flatten(1).float(), scaling, keys, kernel, a.dtype)


def _order(name: str) -> list[tuple[int, str]]:
    """Sort key by which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
