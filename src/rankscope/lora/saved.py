"""Adapters in folders, in PEFT's format, possibly made elsewhere: reading, writing, and attaching to a model."""

import copy
import os
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import CONFIG_NAME as CONFIG
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedModel

from rankscope import hub
from rankscope.errors import ModelError, StudyError, first_line, reason_of, shortened
from rankscope.hub import HUB_ID
from rankscope.lora import adapters
from rankscope.lora.adapter_config import by_pattern, checked_name, ranks_and_alphas, read_config

_WRAPPED = re.compile(r"(?<![^.])(?:_orig_mod|_fsdp_wrapped_module)\.")  # names that torch.compile and FSDP add
_FACTOR = re.compile(r"(?:base_model\.model\.)?(.+)\.(lora_A|lora_B|lora_embedding_A|lora_embedding_B)(?:\.weight)?")


class Factors(NamedTuple):
    """Factors of one layer's update, `scaling * b @ a`, in float32; of one expert's where they lie in one tensor."""

    layer: str  # name in the base model; of an expert `….experts.3.gate_up_proj`
    a: Tensor  # (R, D); a convolution's D is channels times kernel
    b: Tensor  # (O, R)
    scaling: float
    keys: tuple[str, str]  # names of `a` and `b` in the file
    kernel: tuple[int, ...] = ()  # channels and kernel of a convolution, saved as (R, *kernel) and (O, R, 1, ...)
    dtype: torch.dtype = torch.float32  # in the file
    parameter: str | None = None  # name of the adapted parameter, where PEFT wraps one: target_parameters

    @property
    def rank(self) -> int:
        return self.a.shape[0]

    @property
    def target(self) -> str:
        """Name by which PEFT's configuration knows it; experts in one tensor share it."""
        return self.parameter or self.layer

    @property
    def of_experts(self) -> bool:
        """Whether its tensors are of experts, beside whose factors these lie."""
        return self.parameter is not None and self.parameter != f"{self.layer}.weight"


class SavedAdapter(NamedTuple):
    """LoRA adapter as it is saved."""

    config: LoraConfig
    layers: list[Factors]  # by name, blocks by number
    others: dict[str, Tensor]  # the file's other tensors: biases, DoRA's magnitudes, modules saved whole
    unknown: tuple[str, ...] = ()  # options that are set and that the installed PEFT does not know
    foreign: str | None = None  # key of the file under which PEFT finds no layer


def find_adapter(name: str, revision: str | None = None) -> Path:
    """Folder of an adapter: `name` itself, or the downloaded folder of a hub id. Raises ModelError: no such adapter, or
    a revision is given for a folder."""
    folder = Path(name)
    if os.path.isdir(folder) or not HUB_ID.fullmatch(name):
        if revision is not None:
            raise ModelError(f"adapter {name}: --revision {revision}, but a folder has no revision", "Leave it out.")
        return folder
    try:
        commit, files, _ = hub.repository(name, "model", revision, CONFIG)
        found = [hub.fetch(name, "model", commit, file) for file in (CONFIG, WEIGHTS) if file in files]
    except Exception as error:  # the hub's client raises its own errors, httpx's and the file system's
        reason, todo = hub.explained(name, error) or (first_line(error), "")
        what = f"adapter {name}: no such folder, and not from the hub: {reason}"
        raise ModelError(what, todo or "Give a folder, or a hub id.") from None
    if len(found) < 2:
        todo = "Give an adapter in PEFT's format; its weights are read from one safetensors file, not from shards."
        raise ModelError(f"adapter {name}: the hub has it, but without {CONFIG} or {WEIGHTS}", todo)
    return found[0].parent


def read_adapter(folder: Path) -> SavedAdapter:
    """Read an adapter. Nothing of it is executed: its configuration is JSON, its weights are safetensors. Raises
    ModelError: a file is missing or corrupt, it is no LoRA adapter, a factor has no counterpart or is not finite, its
    rank differs from the configuration, or a name is no valid module name."""
    config, unknown = read_config(folder)
    (rank_of, alpha_of), file = ranks_and_alphas(folder, config), folder / WEIGHTS
    try:
        tensors = load_file(file)
    except FileNotFoundError:
        others = [path.name for path in sorted(folder.glob("adapter_model*"))]
        what = f"{file}: missing" + (f": {others[0]} is not read" if others else "")
        todo = "Weights are read from one safetensors file, not from shards or pickles, which could execute code: save "
        raise ModelError(what, f"{todo}it where you trust it, by save_pretrained.") from None
    except (OSError, SafetensorError) as error:
        raise ModelError(f"{file}: corrupt or incomplete: {error}", "Restore it.") from None
    keys = _factor_keys(file, tensors)
    foreign = next((key for both in keys.values() for key in both.values() if _canonical(key) != key), None)
    pairs = {name: {part: tensors.pop(key) for part, key in sorted(both.items())} for name, both in keys.items()}
    layers: list[Factors] = []
    for name in sorted(pairs, key=_order):
        parameter = _parameter(file, name, pairs, config, rank_of(name))
        rank, alpha = rank_of(parameter or name), alpha_of(parameter or name)
        scaling = alpha / (rank**0.5 if config.use_rslora else rank)
        a, b = _checked_pair(f"{file}: {name}", pairs[name], rank, parameter is not None)
        names = _canonical(keys[name]["A"]), _canonical(keys[name]["B"])
        kernel = tuple(a.shape[1:]) if a.dim() > 2 else ()
        one = Factors(name, a.flatten(1).float(), b.flatten(1).float(), scaling, names, kernel, a.dtype, parameter)
        layers += [one] if len(a) == rank else _by_expert(one, rank)
    return SavedAdapter(config, layers, tensors, unknown, foreign)


def _factor_keys(file: Path, tensors: Mapping[str, Tensor]) -> dict[str, dict[str, str]]:
    """Keys of the factors in the file, by layer and by part, A or B."""
    keys: dict[str, dict[str, str]] = {}
    for key in tensors:
        if match := _FACTOR.fullmatch(key):
            name = _WRAPPED.sub("", match[1])
            try:
                checked_name(name)
            except ValueError as error:
                raise ModelError(f"{file}: {error}", "Use an adapter that PEFT has saved.") from None
            other = keys.setdefault(name, {}).setdefault(match[2][-1], key)
            if other != key:
                raise ModelError(f"{file}: {other} and {key} are one factor", "Remove one of them.")
    if not keys:
        found = f"; a key of it is {shortened(next(iter(tensors)), 100)}" if tensors else ""
        what = f"{file}: holds no LoRA factors under PEFT's names{found}"
        raise ModelError(what, "Save it with PEFT's save_pretrained; adapters of kohya and others are not read.")
    return keys


def _checked_pair(where: str, pair: Mapping[str, Tensor], rank: int, several: bool) -> tuple[Tensor, Tensor]:
    """Factors A (R, D) and B (O, R) of a layer; with `several` A may be of experts, (E R, D), and B (O, R E)."""
    shapes = ", ".join(f"{part} {list(tensor.shape)}" for part, tensor in pair.items())
    whole = pair.keys() == {"A", "B"} and all(tensor.dim() >= 2 and tensor.numel() for tensor in pair.values())
    if not whole or pair["A"].shape[0] != pair["B"].shape[1]:
        todo = "Restore it; factors of a grouped convolution are not read."
        raise ModelError(f"{where} has {shapes}: no pair of LoRA factors", todo)
    a, b = pair["A"], pair["B"]
    if not all(part.is_floating_point() and part.element_size() > 1 for part in (a, b)):
        raise ModelError(f"{where} is of {a.dtype} and {b.dtype}, which is not read", "Save it in float32 or bfloat16.")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise ModelError(f"{where} holds NaN or infinity", "Its training diverged: take another.")
    if len(a) % rank or (len(a) != rank and not several):
        wrong = f"{where} has rank {len(a)}, but {CONFIG} says {rank}"
        raise ModelError(wrong, "Restore the file that was changed.")
    return a, b


def _by_expert(one: Factors, rank: int) -> list[Factors]:
    """Factors of each of E experts, of which PEFT stacks A as (E R, D), and B as (O, R E)."""
    block, _, leaf = str(one.parameter).rpartition(".")
    ending = "" if leaf == "weight" else f".{leaf}"
    experts = len(one.a) // rank
    parts = zip(one.a.view(experts, rank, -1), one.b.view(len(one.b), rank, experts).unbind(-1), strict=True)
    return [one._replace(layer=f"{block}.{number}{ending}", a=a, b=b) for number, (a, b) in enumerate(parts)]


def _canonical(key: str) -> str:
    """PEFT's key of a factor."""
    match = _FACTOR.fullmatch(key)
    if match is None:
        return key
    ending = "" if "embedding" in match[2] else ".weight"
    return f"{adapters.SAVED_PREFIX}{_WRAPPED.sub('', match[1])}.{match[2]}{ending}"


def _parameter(
    file: Path, name: str, pairs: Mapping[str, Mapping[str, Tensor]], config: LoraConfig, rank: int
) -> str | None:
    """Name of the parameter that the layer `name` of the file adapts; None where it adapts a module. PEFT nests the
    wrappers of two parameters of one module, the first that the module defines innermost, as `experts.base_layer` in
    `experts`. The file has no more than that: which is which is known of transformers' experts."""
    targets = config.target_parameters or ()
    if f"{name}.weight" in targets or any(f"{name}.weight".endswith(f".{t}") and "." in t for t in targets):
        return f"{name}.weight"
    module = name.removesuffix(".base_layer").removesuffix(".base_layer")
    tensor = pairs[name].get("A")
    nested = name != module or f"{name}.base_layer" in pairs
    if not targets or tensor is None or (not nested and len(tensor) == rank):
        return None
    leaves = {target.rpartition(".")[2] for target in targets}
    own = [leaf for leaf in leaves if any(f"{module}.{leaf}".endswith(f".{target}") for target in targets)]
    own.sort(key=lambda leaf: (leaf.startswith("down"), leaf))  # defined after gate_up_proj, or up_proj
    wrappers = [wrapped for wrapped in (f"{module}.base_layer", module) if wrapped in pairs]
    clear = len(own) == 1 or (len(own) == 2 and own[1].startswith("down"))
    if not clear or len(own) != len(wrappers):
        what = f"{file}: {name} is of experts, and of which of their parameters cannot be told"
        raise ModelError(what, f"Name them in target_parameters of {CONFIG} as PEFT has saved them.")
    return f"{module}.{own[wrappers.index(name)]}"


def write_adapter(adapter: SavedAdapter, folder: Path) -> int:
    """Write PEFT's two files; return the size of the weights' file in bytes. Raises StudyDirectoryError on failure."""
    return adapters.save_adapter(_tensors(adapter), adapter.config, folder)


def _tensors(adapter: SavedAdapter) -> dict[str, Tensor]:
    """Tensors of the adapter as in the file."""
    tensors = dict(adapter.others)
    for _, group in groupby(adapter.layers, key=lambda layer: layer.keys):
        layers = list(group)  # several of experts in one tensor
        a, b = torch.cat([layer.a for layer in layers]), torch.stack([layer.b for layer in layers], dim=-1).flatten(1)
        one = layers[0]
        a, b = a.to(one.dtype), b.to(one.dtype)
        if one.kernel:
            a, b = a.reshape(-1, *one.kernel), b.reshape(*b.shape, *[1] * (len(one.kernel) - 1))
        tensors[one.keys[0]], tensors[one.keys[1]] = a, b
    return tensors


def attach(model: PreTrainedModel, name: str, adapter: SavedAdapter) -> None:
    """Add the adapter to `model` under `name`, with float32 weights, beside any that it has. Raises ModelError: the
    adapter does not fit the model."""
    key, tensors = adapters.adapter_key(name), {_canonical(key): tensor for key, tensor in _tensors(adapter).items()}
    try:
        adapters.inject(_by_name(adapter), model, key)
        adapters.to_float32(model, name)
        weights = adapters.adapter_weights(model, name)
        direct = weights.keys() <= tensors.keys()  # PEFT would rename some as the checkpoint's, and lose them
        for weight in filter(adapters.layer_of, weights) if direct else ():
            if weights[weight].shape != tensors[weight].shape:
                raise ValueError(f"{weight} is {list(tensors[weight].shape)}, not {list(weights[weight].shape)}")
            weights[weight].data.copy_(tensors.pop(weight))
        for other in adapter.others.keys() & tensors.keys():  # PEFT wants modules saved whole by this model's names
            tensors[other.removeprefix(adapters.SAVED_PREFIX)] = tensors.pop(other)
        result: Any = set_peft_model_state_dict(model, tensors, adapter_name=key)
        missing = [other for other in result.missing_keys if ".lora_" in other and f".{key}" in other and not direct]
        if odd := [*result.unexpected_keys, *missing]:
            raise ValueError(f"{odd[0]} is of one and not of the other")
    except (StudyError, RuntimeError, ValueError, KeyError, re.error) as error:
        todo = "Give the model that the adapter was trained on."
        raise ModelError(f"the adapter does not fit the model: {reason_of(error)}", todo) from None


def peft_fault(model: PreTrainedModel, folder: Path) -> str | None:
    """What PEFT does not read back of an adapter that was saved for `model`; None where it finds a place for all of it.
    PEFT itself loads it, into a model without weights. Some architectures of transformers rename keys while they load,
    and adapters' with them."""
    with torch.device("meta"):
        base = type(model)(copy.deepcopy(model.config))
    try:
        load_by_peft(base, folder, empty=True)
    except Exception as error:  # whatever PEFT raises for what it does not understand
        return reason_of(error)
    return None


def load_by_peft(base: PreTrainedModel, folder: Path, empty: bool = False) -> PeftModel:
    """Load an adapter as PEFT itself does, with `empty` on the meta device. Raises ModelError: PEFT finds no place for
    a tensor, or misses one; and what PEFT raises."""
    tensors = load_file(folder / WEIGHTS)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what is found out below
        loaded: Any = get_peft_model(base, LoraConfig.from_pretrained(str(folder)), low_cpu_mem_usage=empty)
        result: Any = set_peft_model_state_dict(loaded, tensors)
    missing, odd = ([key for key in keys if ".lora_" in key] for keys in (result.missing_keys, result.unexpected_keys))
    if lost := [key.replace(".default", "") for key in missing or odd]:
        raise ModelError(
            f"{len(lost)} of {len(tensors)} tensors are lost, {lost[0]} for one", "PEFT does not read them."
        )
    return loaded  # type: ignore[no-any-return]


@contextmanager
def attached(model: PreTrainedModel, name: str, adapter: SavedAdapter) -> Iterator[None]:
    """Attach the adapter to `model`, which has none, while the body runs, with the file's other tensors too."""
    biases = {key: bias.clone() for key, bias in model.named_parameters() if key.endswith("bias")}
    try:
        attach(model, name, adapter)
        yield
    finally:
        adapters.remove_adapters(model)
        for key, bias in biases.items():  # which are the base model's own parameters
            model.get_parameter(key).data.copy_(bias)


def _by_name(adapter: SavedAdapter) -> LoraConfig:
    """Configuration with the file's layers by name. `by_pattern` resolves foreign patterns, and PEFT receives none."""
    config, alpha_of = copy.copy(adapter.config), by_pattern(adapter.config.alpha_pattern, adapter.config.lora_alpha)
    layers = {layer.target: layer for layer in adapter.layers}
    config.target_modules = [target for target, layer in layers.items() if layer.parameter is None]
    config.target_parameters = [target for target, layer in layers.items() if layer.parameter] or None
    config.exclude_modules = config.layers_to_transform = config.layers_pattern = None
    config.rank_pattern = {f"^{re.escape(t)}": layer.rank for t, layer in layers.items() if layer.rank != config.r}
    by_layer = {f"^{re.escape(target)}": alpha_of(target) for target in layers}
    config.alpha_pattern = {key: alpha for key, alpha in by_layer.items() if alpha != config.lora_alpha}
    return config


def _order(name: str) -> list[tuple[int, str]]:
    """Sort key by which block 10 comes after block 9."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]
