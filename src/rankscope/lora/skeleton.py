"""The model from its configuration alone: nothing is loaded, so that parameters can be counted and memory predicted."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankscope.errors import ModelError
from rankscope.lora.base import freeze, load_config
from rankscope.spec import ModelSpec


def skeleton(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without weights, on the meta device.

    Raises:
        ModelError: transformers has no causal language model of this architecture.
    """
    config = load_config(spec)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
            return freeze(model)
    except ValueError as error:
        raise ModelError(
            f"model {spec.id}: {str(error).splitlines()[0]}", "Use a causal language model that transformers has."
        ) from None
