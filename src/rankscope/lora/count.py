"""How many parameters an adapter has, from the model's configuration alone: nothing is loaded."""

from collections.abc import Sequence

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankscope.errors import ModelError
from rankscope.lora.adapters import adapter_key, adapter_parameters, inject, lora_config
from rankscope.lora.base import load_config
from rankscope.spec import Candidate, ModelSpec


def skeleton(spec: ModelSpec) -> PreTrainedModel:
    """The model without weights, on the meta device.

    Raises:
        ModelError: transformers has no causal language model of this architecture.
    """
    config = load_config(spec)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
            return model
    except ValueError as error:
        raise ModelError(
            f"model {spec.id}: {str(error).splitlines()[0]}", "Use a causal language model that transformers has."
        ) from None


def base_params(spec: ModelSpec) -> int:
    """Parameters of the base model; tied weights count once."""
    return sum(parameter.numel() for parameter in skeleton(spec).parameters())


def trainable_params(spec: ModelSpec, candidates: Sequence[Candidate]) -> dict[str, int]:
    """Parameters of each candidate's adapter, by the candidate's name.

    Raises:
        StudyError: the target modules match nothing in this model.
    """
    model = skeleton(spec)
    for candidate in candidates:
        inject(lora_config(candidate), model, adapter_key(candidate.name), empty=True)
    return {c.name: sum(p.numel() for p in adapter_parameters(model, c.name)) for c in candidates}
