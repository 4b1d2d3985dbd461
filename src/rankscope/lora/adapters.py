"""Adapters on a frozen model, by PEFT: target matching, initialisation, scaling and saving are its own."""

import json
import re
import warnings
from collections.abc import Collection, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from peft.utils.other import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel

from rankscope.errors import StudyError, reason_of
from rankscope.files import published, write_atomic
from rankscope.lora.targets import Targets, find_targets, for_peft
from rankscope.spec.candidates import Candidate, Trial

SAVED_PREFIX = "base_model.model."
"""Prefix of a model's weights in PEFT's files."""


def targets_of(candidate: Candidate, model: nn.Module) -> Targets:
    """What the candidate adapts of this model. Raises StudyError as `find_targets` does."""
    plain = not candidate.lora_dropout and candidate.variant != "dora"
    return find_targets(model, candidate.target_modules, plain)


def lora_config(candidate: Candidate, model: nn.Module) -> LoraConfig:
    """PEFT's configuration of the candidate on this model. Raises StudyError as `find_targets` does."""
    targets, others = targets_of(candidate, model), deepcopy(candidate.peft)
    modules, parameters = for_peft(model, targets)
    parameters += others.pop("target_parameters", [])
    experts = [name for name in parameters if not name.endswith(".weight")]
    if experts and candidate.variant in ("pissa", "olora"):
        raise StudyError(f"variants: {candidate.variant} cannot initialise {experts[0]}, of experts", "Leave it out.")
    ranks = {f"{n}.weight" if f"{n}.weight" in targets.parameters else n: rank for n, rank in candidate.rank_pattern}
    return LoraConfig(
        task_type="CAUSAL_LM",
        r=candidate.rank,
        lora_alpha=candidate.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is fine
        target_modules=modules,
        target_parameters=parameters or None,
        lora_dropout=candidate.lora_dropout,
        use_rslora=candidate.use_rslora,
        use_dora=candidate.variant == "dora",
        rank_pattern=ranks,
        # Every layer keeps the scaling of the candidate's own rank: alpha/r, or alpha/sqrt(r).
        alpha_pattern=others.pop("alpha_pattern", {})
        | {name: candidate.scaling * (rank**0.5 if candidate.use_rslora else rank) for name, rank in ranks.items()},
        init_lora_weights=others.pop("init_lora_weights", candidate.init_lora_weights == "kaiming" or "gaussian"),
        **others,
    )


def inject(config: LoraConfig, model: nn.Module, name: str, empty: bool = False) -> None:
    """Inject an adapter as PEFT does; with `empty` on the meta device. Raises StudyError: a target module matches
    nothing, or cannot carry LoRA."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # many adapters: meant
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT corrects it for Conv1D
        if config.target_parameters:  # whose patterns PEFT follows, and then says that they match nothing
            warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        try:
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty)
        except ValueError as error:
            raise StudyError(f"adapter.target_modules: {reason_of(error, 300)}", "Name other modules.") from None


def add_adapter(model: PreTrainedModel, trial: Trial) -> LoraConfig:
    """Inject the trial's adapter under the trial's name, initialised from the trial's seed alone. The seed is set in a
    fork of the random state, so the other trials of a pack do not change an adapter's initial weights. Raises
    StudyError as `inject` does."""
    config = lora_config(trial.candidate, model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        inject(config, model, adapter_key(trial.name))
    to_float32(model, trial.name)
    for parameter in (*trained, *adapter_parameters(model, trial.name)):
        parameter.requires_grad_(True)  # PEFT enables the active adapter only
    return config


def to_float32(model: nn.Module, adapter: str) -> None:
    """Convert the adapter's weights to float32, as mixed-precision training keeps them over a half-precision base."""
    for parameter in adapter_parameters(model, adapter):
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def remove_adapters(model: PreTrainedModel) -> None:
    """Put every base layer back, so that the model is as it was before the first adapter."""
    _put_back(model, [*outer_layers(model), *wrapped_modules(model)])
    if hasattr(model, "peft_config"):
        del model.peft_config


def remove_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Remove one adapter from the model; a layer that then carries none is the base layer again."""
    key, trained = adapter_key(adapter), [parameter for parameter in model.parameters() if parameter.requires_grad]
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
        for _, layer in lora_layers(model):
            if key in layer.lora_A or key in layer.lora_embedding_A:
                layer.delete_adapter(key)
        for _, wrapper in wrapped_modules(model):
            wrapper.delete_adapter(key, [])  # not PEFT's own function for all, which fails where none is active
    _put_back(model, [one for one in outer_layers(model) if not one[1].lora_A and not one[1].lora_embedding_A])
    _put_back(model, [one for one in wrapped_modules(model) if not one[1]._adapters])
    for parameter in trained:  # PEFT makes another adapter active, and freezes all but that one
        parameter.requires_grad_(True)
    del model.peft_config[key]
    if not model.peft_config:
        del model.peft_config


def _put_back(model: nn.Module, wrappers: Sequence[tuple[str, Any]]) -> None:
    for name, wrapper in wrappers:
        own = wrapper.get_base_layer() if isinstance(wrapper, LoraLayer) else wrapper.original_module
        model.set_submodule(name, own)


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Names and modules of the layers that carry adapters, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def outer_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Layers that carry adapters, each base layer once: PEFT nests one wrapper in another around experts."""
    layers = lora_layers(model)
    inner = {id(layer.base_layer) for _, layer in layers}
    return [(name, layer) for name, layer in layers if id(layer) not in inner]


def wrapped_modules(model: nn.Module) -> list[tuple[str, AuxiliaryTrainingWrapper]]:
    """Names and wrappers of the modules that are trained beside the adapters: modules_to_save, trainable tokens."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, AuxiliaryTrainingWrapper)]


def adapted_modules(model: nn.Module) -> list[Any]:
    """Layers that carry adapters, and wrappers of what is trained beside them."""
    return [layer for _, layer in [*lora_layers(model), *wrapped_modules(model)]]


def activate(model: nn.Module, adapter: str) -> None:
    """Have the model's own forward, by PEFT, go through this adapter alone."""
    for layer in adapted_modules(model):
        layer.set_adapter(adapter_key(adapter))


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Parameters of the adapter under PEFT's saved names: `base_model.model.….lora_A.weight`."""
    key = re.escape(adapter_key(adapter))
    inside = rf"(?:\.modules_to_save|(\.lora_\w+|\.trainable_tokens_delta))\.{key}(?=\.|$)"
    weights: dict[str, nn.Parameter] = {}
    for name, weight in model.named_parameters():
        saved = re.sub(inside, r"\1", name)
        if saved != name:
            saved = re.sub(r"(?<=\.lora_magnitude_vector)\.weight$", "", saved)  # DoRA's
            weights[SAVED_PREFIX + saved] = weight
    return weights


def grows_with_rank(weight: str) -> bool:
    """Whether an adapter's weight of that saved name is a factor, and so has as many parameters as its rank is high."""
    return bool(re.search(r"\.lora_(?:[AB]\.weight|embedding_[AB])$", weight))


def unreached_layers(model: nn.Module, adapter: str, trunk: str | None) -> list[str]:
    """Adapted layers of the `trunk` (None: of all) to which the backward that has just run gave no gradient. Text never
    reaches a vision tower, nor do labels reach what only picks indices. Experts in a list are reached by some tokens
    alone: one that is reached speaks for its siblings."""
    inside = "" if trunk is None else f"{SAVED_PREFIX}{trunk}."
    weights = {name: weight for name, weight in adapter_weights(model, adapter).items() if name.startswith(inside)}
    alive = {_siblings(layer_of(name)) for name, weight in weights.items() if weight.grad is not None}
    layers = dict.fromkeys(filter(None, map(layer_of, weights)))
    return [layer for layer in layers if _siblings(layer) not in alive]


def layer_of(weight: str) -> str:
    """Name of the adapted layer that has the weight of this saved name; empty for what is trained beside adapters."""
    return weight.removeprefix(SAVED_PREFIX).rpartition(".lora_")[0]


def check_reached(weights: Collection[str], unreached: Collection[str]) -> None:
    """Raise StudyError where nothing is left to train beside the layers that get no gradient."""
    if not weights:
        names = ", ".join(sorted({name.rpartition(".")[2] for name in unreached}))
        raise StudyError(
            f"adapter.target_modules: no gradient reaches {names}: text never passes through them, or only "
            "their weights are used",
            "Name other modules, or all-linear.",
        )


def _siblings(layer: str) -> str:
    """Name that the members of a list within one decoder layer share."""
    stack, *rest = re.split(r"(?<=\.)(\d+)(?=\.)", layer, maxsplit=1)
    return stack if not rest else stack + rest[0] + re.sub(r"\.\d+(?=\.|$)", ".*", rest[1])


def leave_out(model: PreTrainedModel, layers: Sequence[str], config: LoraConfig) -> None:
    """Take the adapters off these layers, and note in an adapter's `config` that PEFT is to give them none."""
    _put_back(model, [one for one in outer_layers(model) if one[0] in layers])
    others = config.exclude_modules or []
    if isinstance(others, str):
        config.exclude_modules = "|".join([f"(?:{others})", *map(re.escape, layers)])
    else:
        config.exclude_modules = [*others, *layers]


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Parameters of the adapter, in the model's order."""
    return list(adapter_weights(model, adapter).values())


def save_adapter(weights: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path) -> int:
    """Write PEFT's adapter_model.safetensors and adapter_config.json; return the size of the weights in bytes."""
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with published(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    save_config(config, folder)
    return file.stat().st_size


def save_config(config: LoraConfig, folder: Path) -> None:
    """Write adapter_config.json as PEFT does, but whole or not at all, and with names in order."""
    config.inference_mode = True
    fields: dict[str, Any] = config.to_dict()  # type: ignore[no-untyped-call]
    values = {name: sorted(value) if isinstance(value, set) else value for name, value in fields.items()}
    write_atomic(folder / CONFIG_NAME, json.dumps(values, indent=2, sort_keys=True).encode())


def adapter_key(adapter: str) -> str:
    """PEFT's name of the adapter: module names may not contain a dot, and a learning rate such as 1.5e-4 does."""
    return adapter.replace(".", "_")
