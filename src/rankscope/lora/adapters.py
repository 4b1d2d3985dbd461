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

from rankscope.errors import StudyError, shortened
from rankscope.files import published, write_atomic
from rankscope.lora.targets import find_targets, for_peft
from rankscope.spec.candidates import Candidate, Trial


def lora_config(candidate: Candidate, model: nn.Module, base: str | None = None) -> LoraConfig:
    """PEFT's configuration of the candidate on this model; `base` is its id or folder, for the saved file.

    Raises StudyError as `find_targets` does.
    """
    plain = not candidate.lora_dropout and candidate.variant != "dora"
    targets = find_targets(model, candidate.target_modules, plain)
    modules, parameters = for_peft(model, targets)
    experts = [name for name in targets.parameters if not name.endswith(".weight")]
    if experts and candidate.variant in ("pissa", "olora"):
        raise StudyError(f"variants: {candidate.variant} cannot initialise {experts[0]}, of experts", "Leave it out.")
    weights = {name: f"{name}.weight" for name, _ in candidate.rank_pattern}
    ranks = {weights[n] if weights[n] in targets.parameters else n: rank for n, rank in candidate.rank_pattern}
    return LoraConfig(
        task_type="CAUSAL_LM",
        base_model_name_or_path=base,
        r=candidate.rank,
        lora_alpha=candidate.lora_alpha,  # type: ignore[arg-type]  # PEFT divides it; a float is fine
        target_modules=modules,
        target_parameters=parameters or None,
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
        StudyError: a target module matches nothing, or cannot carry LoRA.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")  # many adapters: meant
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to False")  # PEFT corrects it for Conv1D
        if config.target_parameters:  # whose patterns PEFT follows, and then says that they match nothing
            warnings.filterwarnings("ignore", message="The following .*_pattern keys did not match")
        try:
            inject_adapter_in_model(config, model, name, low_cpu_mem_usage=empty)
        except ValueError as error:
            reason = shortened(" ".join(str(error).split()), 300)
            raise StudyError(f"adapter.target_modules: {reason}", "Name other modules.") from None
    embedding = next((module for module, layer in lora_layers(model) if name in layer.lora_embedding_A), None)
    if embedding and not embeddings:
        raise StudyError(
            f"adapter.target_modules: {embedding} is an embedding, and rankscope trains no adapters on embeddings",
            f"Leave {embedding.rsplit('.', 1)[-1]} out.",
        )


def add_adapter(model: PreTrainedModel, trial: Trial, base: str | None = None) -> LoraConfig:
    """Inject the trial's adapter under the trial's name, initialised from the trial's seed alone.

    The seed is set in a fork of the random state, so the other trials of a pack do not change an adapter's initial
    weights. Raises StudyError as `inject` does.
    """
    config = lora_config(trial.candidate, model, base)
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
    for name, layer in outer_layers(model):
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
    for name, layer in outer_layers(model):
        if not layer.lora_A:
            model.set_submodule(name, layer.get_base_layer())
    for parameter in trained:  # PEFT makes another adapter active, and freezes all but that one
        parameter.requires_grad_(True)
    del model.peft_config[key]
    if not model.peft_config:
        del model.peft_config


def lora_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Names and modules of the layers that carry adapters, in the model's order."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, LoraLayer)]


def outer_layers(model: nn.Module) -> list[tuple[str, LoraLayer]]:
    """Layers that carry adapters, each base layer once: PEFT nests one wrapper in another around experts."""
    layers = lora_layers(model)
    inner = {id(layer.base_layer) for _, layer in layers}
    return [(name, layer) for name, layer in layers if id(layer) not in inner]


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
    for field in ("target_modules", "target_parameters"):
        if isinstance(getattr(config, field), set):  # its order differs between processes
            setattr(config, field, sorted(getattr(config, field)))
    with TemporaryDirectory() as scratch:  # PEFT writes in place, which is not atomic
        config.save_pretrained(scratch)
        text = Path(scratch, CONFIG_NAME).read_bytes()
    write_atomic(folder / CONFIG_NAME, text)
    return file.stat().st_size


def adapter_key(adapter: str) -> str:
    """PEFT's name of the adapter: module names may not contain a dot, and a learning rate such as 1.5e-4 does."""
    return adapter.replace(".", "_")
