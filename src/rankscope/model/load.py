"""Loading of the frozen base model and its tokenizer, from a hub id or a folder."""

import hashlib
import logging
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils.hub import extract_commit_hash

from rankscope.data.conversations import Tokenizer
from rankscope.errors import ModelError, first_line, lacks_memory, require
from rankscope.model import checks
from rankscope.model.checks import CONFIG_NAME, SAFE_WEIGHTS_NAME, loading_error, location
from rankscope.model.device import multiplies_bfloat16, resolve_device
from rankscope.model.mixed import use_mixed_precision
from rankscope.model.quantized import quantization_config, quantize_skeleton, use_dequantized_forward
from rankscope.spec.models import ModelSpec

log = logging.getLogger(__name__)


def load_tokenizer(spec: ModelSpec) -> Tokenizer:
    """Load the model's tokenizer. Raises ModelError without a usable one."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(**checks.source(spec))
    except Exception as error:
        raise loading_error(spec, "tokenizer", error) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # transformers makes an empty one without any file
        raise loading_error(spec, "tokenizer", ValueError("it has no vocabulary"))
    return tokenizer


def load_config(spec: ModelSpec) -> Any:
    """Load and check the model's configuration. Raises ModelError: it is missing or invalid, the model is no causal
    language model, a file of its weights is missing, or loading it would not be safe."""
    checks.check_source(spec)
    folder = Path(location(spec))
    try:
        config = AutoConfig.from_pretrained(**checks.source(spec))
        shards = checks.indexed_files(spec)
        unsafe = checks.unsafe_reason(spec, config, shards)
    except ModelError:
        raise
    except Exception as error:
        raise loading_error(spec, "configuration", error) from error
    if unsafe:
        raise ModelError(f"model {spec.id}: {unsafe}", "Use a plain base model with safetensors weights.")
    if own := getattr(config, "quantization_config", None):
        checks.check_quantized(spec, own)
    elif spec.dequantize:
        raise ModelError(f"model {spec.id}: its weights are not quantized", "Leave --dequantize out.")
    if wrong := checks.config_fault(config):
        raise ModelError(f"model {spec.id}: {CONFIG_NAME}: {wrong}", f"Restore {CONFIG_NAME}, or correct it.")
    missing = [file for file in shards if folder.is_dir() and not (folder / file).is_file()]
    if missing and not (folder / SAFE_WEIGHTS_NAME).is_file():  # which takes precedence over the index
        raise checks.index_error(spec, f"names {missing[0]}, which is not in the folder")
    if not_causal := checks.not_causal_reason(config):
        what = f"model {spec.id}: not a causal language model: {not_causal}"
        raise ModelError(what, "Use a model that predicts each token from those before it, such as a LlamaForCausalLM.")
    text = config.get_text_config().model_type
    if config.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and text != config.model_type:
        todo = f"Save the text model in it, {MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(text, text)}, as a model of its own."
        raise ModelError(f"model {spec.id}: transformers has no causal language model for {config.model_type}", todo)
    for part in (config, config.get_text_config()):  # what a forward returns beside logits is not read
        part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def most_positions(spec: ModelSpec) -> int | None:
    """Most tokens of a row that the model has positions for; None where it has no limit. RoBERTa and its kin count
    positions from the padding id on, so that they have fewer than their table has rows."""
    config = load_config(spec)
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    if config.model_type not in MODEL_FOR_MASKED_LM_MAPPING_NAMES:
        return positions
    if table := offset_positions(skeleton(spec.model_copy(update={"quantization": None}))):
        positions = table.num_embeddings - int(table.padding_idx or 0) - 1
    return positions if positions is not None and positions > 0 else None


def offset_positions(model: nn.Module) -> nn.Embedding | None:
    """Table of positions of which the first is the padding id plus one, as in RoBERTa; None without one."""
    tables = ((name, part) for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    return next((part for name, part in tables if "position" in name and part.padding_idx is not None), None)


def commit(spec: ModelSpec) -> str | None:
    """Commit of the model on the hub, in hex; None for a folder outside of the hub's cache."""
    file = checks.model_file(spec, CONFIG_NAME)
    return extract_commit_hash(str(file) if file else None, None)


WIDE = 512
"""Features from which a CPU's products in bfloat16 save more than the conversions around them take: at 576 a step is
faster (docs/results/speed.md), at 256, the embedded model's, it is not (docs/results/precision.md)."""


def resolve_dtype(spec: ModelSpec, device: torch.device) -> torch.dtype:
    """Type of products. `auto` is bfloat16 where `device` multiplies it, on a CPU for wide models; float32 elsewhere.
    Gain is that of float32 (docs/results/precision.md). Raises as `load_config`."""
    half = spec.dtype == "bfloat16"
    if spec.dtype == "auto" and multiplies_bfloat16(device):
        half = device.type == "cuda" or getattr(load_config(spec).get_text_config(), "hidden_size", 0) >= WIDE
    return torch.bfloat16 if half else torch.float32


def load_model(spec: ModelSpec) -> PreTrainedModel:
    """Load the frozen base model onto its device, in evaluation mode (its own dropout off).

    Raises ModelError: no such model, no safetensors weights, weights missing or of other shapes than config.json says,
    or an architecture unknown to transformers; see also `load_config`. Raises StudyError: the device does not exist.
    Raises MissingExtraError: quantization is on, and bitsandbytes is not installed.
    """
    device = resolve_device(spec.device)
    dtype, config = resolve_dtype(spec, device), load_config(spec)
    options: dict[str, Any] = {"output_loading_info": True, "ignore_mismatched_sizes": True}  # to name them below
    quantization = quantization_of(spec, config, dtype)
    if quantization:  # on the device, tensor by tensor: unquantized it might not fit
        options["device_map"] = {"": device}
    if spec.quantization:
        options["quantization_config"] = quantization
    try:
        checks.fetch_weights(spec)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            config=config, dtype=dtype, use_safetensors=not checks.is_gguf(spec), **options, **checks.source(spec)
        )
    except Exception as error:
        if lacks_memory(error):  # which is no fault of the model's
            raise
        raise loading_error(spec, "model", error) from error
    model, loading = loaded
    missing, left_over = sorted(loading["missing_keys"]), sorted(loading["unexpected_keys"])
    if mismatched := sorted(loading["mismatched_keys"]):
        name, actual, expected = mismatched[0]
        raise ModelError(
            f"model {spec.id}: {len(mismatched)} weights of other shapes than {CONFIG_NAME} says: {name} is "
            f"{list(actual)}, expected {list(expected)}",
            f"Take {CONFIG_NAME} and the weights from the same checkpoint.",
        )
    if missing:
        what = f"model {spec.id}: its files lack {len(missing)} weights, {missing[0]} for one"
        raise ModelError(what, "They would be random numbers; use a complete checkpoint of a causal language model.")
    if left_over:
        log.warning("%s: %d weights are left over: %s", spec.id, len(left_over), ", ".join(left_over))
    model.left_over = left_over
    if quantization:
        use_dequantized_forward(model, dtype)
    else:
        model = model.to(device, dtype) if spec.dequantize else model.to(device)
    return freeze(model, dtype)


def quantization_of(spec: ModelSpec, config: Any, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """How bitsandbytes quantizes the base: as the study asks, or as its checkpoint is already. Raises
    MissingExtraError: bitsandbytes is not installed."""
    if spec.quantization:
        return quantization_config(spec.quantization, dtype)
    own = getattr(config, "quantization_config", None)
    if own is None or spec.dequantize:
        return None
    require("bitsandbytes", "quantization", f"model {spec.id}")
    found: BitsAndBytesConfig = BitsAndBytesConfig.from_dict(own)
    return found


def freeze(model: PreTrainedModel, dtype: torch.dtype) -> PreTrainedModel:
    """Turn off gradients, dropout and the key-value cache; with bfloat16, turn on mixed precision."""
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    if dtype == torch.bfloat16:
        use_mixed_precision(model)
    return model


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 of the names, shapes and up to 4,096 evenly spaced values of every weight, to distinguish checkpoints."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def skeleton(spec: ModelSpec, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    """Model without weights, on the meta device, quantized as by `load_model`. Raises MissingExtraError: quantization
    is on, and bitsandbytes is not installed; ModelError: transformers cannot make a causal language model of this
    configuration."""
    config = load_config(spec)
    try:
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=False)
    except Exception as error:  # a model's code may raise anything for an invalid value in config.json
        what = f"model {spec.id}: none can be made of its config.json: {type(error).__name__}: {first_line(error)}"
        raise ModelError(what, "Use a causal language model that transformers has.") from None
    if quantization := quantization_of(spec, config, dtype):
        quantize_skeleton(model, quantization, dtype)
    return freeze(model, dtype)
