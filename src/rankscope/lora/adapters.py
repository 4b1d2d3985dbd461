"""Adapters on a frozen model, by PEFT: target matching, initialisation, scaling and saving are its own."""

import warnings
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import LoraLayer
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import save_file
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankscope.errors import StudyError, did_you_mean
from rankscope.files import published, write_atomic
from rankscope.spec.candidates import Candidate, Trial


def lora_config(candidate: Candidate, base: str | None = None) -> LoraConfig:
    """PEFT's configuration of the candidate; `base` is the base model's id or folder, for the saved file."""
    modules, ranks = candidate.target_modules, dict(candidate.rank_pattern)
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=candidate.rank,
        lora_alpha=candidate.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is fine
        target_modules=modules if isinstance(modules, str) else list(modules),
        lora_dropout=candidate.lora_dropout,
        use_rslora=candidate.use_rslora,
        use_dora=candidate.variant == "dora",
        rank_pattern=ranks,
        # Every layer keeps the scaling of the candidate's own rank: alpha/r, or alpha/sqrt(r).
        alpha_pattern={
            name: candidate.scaling * (rank**0.5 if candidate.use_rslora else rank) for name, rank in ranks.items()
        },
        init_lora_weights=True if candidate.init_lora_weights == "kaiming" else "gaussian",
    )


def inject(config: LoraConfig, model: nn.Module, name: str, empty: bool = False, embeddings: bool = False) -> None:
    """Inject an adapter as PEFT does; with `empty` on the meta device.

    `embeddings` allows adapters on embeddings, which saved adapters may have and rankscope does not train.

    Raises:
        StudyError: a target module matches nothing, or cannot carry LoRA; the message names those that can.
    """
    todo = f"Linear modules of this model: {', '.join(linear_names(model))}."
    targets = config.target_modules if isinstance(config.target_modules, set | list) else []
    names = [f".{name}" for name, _ in model.named_modules()]
    for module in sorted(targets):  # PEFT is content where one of them matches
        if not any(name.endswith(f".{module}") for name in names):
            guess = did_you_mean(module, linear_names(model), most=2, cutoff=0.5)
            raise StudyError(f"adapter.target_modules: {module} matches no module of this model{guess}", todo)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # many adapters: meant
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT corrects it for Conv1D
        try:
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty)
        except ValueError as error:
            raise StudyError(f"adapter.target_modules: {str(error).strip().splitlines()[0]}", todo) from None
    embedding = next((module for module, layer in lora_layers(model) if name in layer.lora_embedding_A), None)
    if embedding and not embeddings:
        raise StudyError(
            f"adapter.target_modules: {embedding} is an embedding, and rankscope trains no adapters on embeddings",
            f"Leave {embedding.rsplit('.', 1)[-1]} out. {todo}",
        )


def add_adapter(model: PreTrainedModel, trial: Trial, base: str | None = None) -> LoraConfig:
    """Inject the trial's adapter under the trial's name, initialised from the trial's seed alone.

    The seed is set in a fork of the random state, so the other trials of a pack do not change an adapter's initial
    weights. Raises StudyError as `inject` does.
    """
    config = lora_config(trial.candidate, base)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(trial.seed)
        inject(config, model, adapter_key(trial.name))
    to_float32(model, trial.name)
    for parameter in adapter_parameters(model, trial.name):
        parameter.requires_grad_(True)  # PEFT enables the active adapter only
    return config


def to_float32(model: nn.Module, adapter: str) -> None:
    """Convert the adapter's weights to float32, as mixed-precision training keeps them over a half-precision base."""
    key = adapter_key(adapter)
    factors = [part for _, layer in lora_layers(model) for part in (layer.lora_embedding_A, layer.lora_embedding_B)]
    embeddings = [part[key] for part in factors if key in part]
    for parameter in [*adapter_parameters(model, adapter), *embeddings]:
        parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))


def remove_adapters(model: PreTrainedModel) -> None:
    """Put every base layer back, so that the model is as it was before the first adapter."""
    for name, layer in reversed(lora_layers(model)):  # innermost first: PEFT nests the wrappers of experts
        model.set_submodule(name, layer.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config


def remove_adapter(model: PreTrainedModel, adapter: str) -> None:
    """Remove one adapter from the model; a layer that then carries none is the base layer again."""
    key, trained = adapter_key(adapter), [parameter for parameter in model.parameters() if parameter.requires_grad]
    for _, layer in lora_layers(model):
        if key in layer.lora_A:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", message="Adapter .* was active which is now deleted")
                layer.delete_adapter(key)
    for name, layer in reversed(lora_layers(model)):
        if not layer.lora_A:
            model.set_submodule(name, layer.get_base_layer())
    for parameter in trained:  # PEFT makes another adapter active, and freezes all but that one
        parameter.requires_grad_(True)
    del model.peft_config[key]
    if not model.peft_config:
        del model.peft_config


def linear_names(model: nn.Module) -> list[str]:
    """Last parts of the names of all linear modules, for error messages."""
    return sorted({n.rsplit(".", 1)[-1] for n, m in model.named_modules() if isinstance(m, nn.Linear | Conv1D)})


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Names and modules of the layers that carry adapters, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def adapter_weights(model: nn.Module, adapter: str) -> dict[str, nn.Parameter]:
    """Parameters of the adapter under PEFT's saved names: `base_model.model.….lora_A.weight`."""
    key = adapter_key(adapter)
    weights: dict[str, Any] = {}
    for name, layer in lora_layers(model):
        if key in layer.lora_A:
            weights[f"base_model.model.{name}.lora_A.weight"] = layer.lora_A[key].weight
            weights[f"base_model.model.{name}.lora_B.weight"] = layer.lora_B[key].weight
        if key in layer.lora_magnitude_vector:  # DoRA
            weights[f"base_model.model.{name}.lora_magnitude_vector"] = layer.lora_magnitude_vector[key].weight
    return weights


def adapter_parameters(model: nn.Module, adapter: str) -> list[nn.Parameter]:
    """Parameters of the adapter, in the model's order."""
    return list(adapter_weights(model, adapter).values())


def save_adapter(weights: Mapping[str, torch.Tensor], config: LoraConfig, folder: Path) -> int:
    """Write PEFT's adapter_model.safetensors and adapter_config.json; return the size of the weights in bytes."""
    tensors = {name: weight.detach().cpu().contiguous() for name, weight in weights.items()}
    file = folder / SAFETENSORS_WEIGHTS_NAME
    with published(file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    config.inference_mode = True
    if isinstance(config.target_modules, set):  # its order differs between processes
        config.target_modules = sorted(config.target_modules)
    with TemporaryDirectory() as scratch:  # PEFT writes in place, which is not atomic
        config.save_pretrained(scratch)
        text = Path(scratch, CONFIG_NAME).read_bytes()
    write_atomic(folder / CONFIG_NAME, text)
    return file.stat().st_size


def adapter_key(adapter: str) -> str:
    """PEFT's name of the adapter: module names may not contain a dot, and a learning rate such as 1.5e-4 does."""
    return adapter.replace(".", "_")
