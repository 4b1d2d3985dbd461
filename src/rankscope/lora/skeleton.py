"""The model from its configuration alone: nothing is loaded, so that parameters can be counted and memory predicted."""

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from rankscope.errors import ModelError
from rankscope.model.load import freeze, load_config
from rankscope.model.quantized import quantize_skeleton
from rankscope.spec.models import ModelSpec


def skeleton(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """The model without weights, on the meta device; quantized as `load_model` would have it.

    Raises:
        MissingExtraError: it is to be quantized, and bitsandbytes is not installed.
        ModelError: transformers has no causal language model of this architecture, or not one of this configuration.
    """
    config = load_config(spec)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a model's code raises what it likes where a value of config.json makes no sense
        reason = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"model {spec.id}: none can be made of its config.json: {type(error).__name__}: {reason}",
            "Use a causal language model that transformers has.",
        ) from None
    if spec.quantization:
        quantize_skeleton(model, spec.quantization, dtype)
    return freeze(model)
