"""The frozen base model and its tokenizer, from a hub id or a folder."""

import ctypes
import hashlib
import json
import logging
import re
import sys
import textwrap
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
)
from transformers.utils import CONFIG_NAME, SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file
from transformers.utils.peft_utils import ADAPTER_CONFIG_NAME

from rankscope import demo
from rankscope.data.sources import HUB_ID
from rankscope.errors import ModelError, StudyError, shortened
from rankscope.model.quantized import quantization_config, use_dequantized_forward
from rankscope.spec.models import EMBEDDED, ModelSpec

# Nothing of a model is ever executed: no code from its folder, no pickled weights (design decision 9, SECURITY.md).
_SAFE: dict[str, Any] = {"trust_remote_code": False}


def location(spec: ModelSpec) -> str:
    """A hub id or a folder; `embedded` is the small model that comes with rankscope."""
    return str(demo.model_path()) if spec.id == EMBEDDED else spec.id


def resolve_device(device: str) -> torch.device:
    """`auto` takes the first GPU, or the CPU.

    Raises:
        StudyError: the device does not exist here.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise StudyError(f"model.device: {device!r} is not a device", "Use auto, cpu, cuda or cuda:1.") from None
    if resolved.type not in ("cpu", "cuda"):
        raise StudyError(f"model.device: {device} is not supported", "Use auto, cpu, cuda or cuda:1.")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise StudyError(
            f"model.device: {device} asked for, but {torch.cuda.device_count()} CUDA devices are visible",
            "Use --device cpu, or see `rankscope doctor`.",
        )
    return resolved


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """`auto` is bfloat16 on a GPU that has it, float32 elsewhere."""
    if dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" and torch.cuda.is_bf16_supported() else torch.float32
    return {"float32": torch.float32, "bfloat16": torch.bfloat16}[dtype]


def load_tokenizer(spec: ModelSpec) -> PreTrainedTokenizerBase:
    """Raises ModelError when there is no usable tokenizer."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(location(spec), revision=spec.revision, **_SAFE)
    except Exception as error:
        raise _cannot_load(spec, "tokenizer", error) from error
    if not tokenizer("a", add_special_tokens=False)["input_ids"]:  # what transformers makes of no file at all
        raise _cannot_load(spec, "tokenizer", ValueError("it has no vocabulary"))
    return tokenizer


def load_config(spec: ModelSpec) -> Any:
    """The model's configuration.

    Raises:
        ModelError: there is none, the model is no causal language model, a file of its weights is missing, or loading
            it would not be safe.
    """
    _check_place(spec)
    folder = Path(location(spec))
    try:
        config = AutoConfig.from_pretrained(location(spec), revision=spec.revision, **_SAFE)
        shards = _shards(spec)
        unsafe = _unsafe(spec, config, shards)
    except ModelError:
        raise
    except Exception as error:
        raise _cannot_load(spec, "configuration", error) from error
    if unsafe:
        raise ModelError(f"model {spec.id}: {unsafe}", "Use a plain base model with safetensors weights.")
    if getattr(config, "quantization_config", None):
        raise ModelError(
            f"model {spec.id}: its weights are quantized already ({_method(config)})",
            "Give the model that it was made of, with model.quantization: nf4 or int8.",
        )
    if wrong := _wrong(config):
        raise ModelError(f"model {spec.id}: {CONFIG_NAME}: {wrong}", f"Restore {CONFIG_NAME}, or correct it.")
    missing = [file for file in shards if folder.is_dir() and not (folder / file).is_file()]
    if missing and not (folder / SAFE_WEIGHTS_NAME).is_file():  # which is taken rather than the index
        raise _wrong_index(spec, f"names {missing[0]}, which is not in the folder")
    if not_causal := _not_causal(config):
        raise ModelError(
            f"model {spec.id}: not a causal language model: {not_causal}",
            "Use a model that predicts each token from those before it, such as a LlamaForCausalLM.",
        )
    return config


def _check_place(spec: ModelSpec) -> None:
    """Raises ModelError where `spec.id` is neither the folder of a model nor an id that the hub could have."""
    folder = Path(location(spec))
    if folder.is_dir():
        if spec.revision is not None:
            raise ModelError(
                f"model {spec.id}: model.revision is {spec.revision!r}, but a folder has no revision", "Remove it."
            )
        if (folder / ADAPTER_CONFIG_NAME).is_file() and not (folder / CONFIG_NAME).is_file():
            raise ModelError(
                f"model {spec.id}: an adapter ({ADAPTER_CONFIG_NAME}), not a model",
                "Give the model that it was trained on: base_model_name_or_path in that file.",
            )
        if not (folder / CONFIG_NAME).is_file():
            raise ModelError(f"model {spec.id}: no {CONFIG_NAME} in the folder", _FOLDER_HOLDS)
        return
    if folder.is_file():
        raise ModelError(f"model {spec.id}: a file, not a folder", _FOLDER_HOLDS)
    if not HUB_ID.fullmatch(spec.id):
        raise ModelError(f"model {spec.id}: no such folder", "Check the id: a folder, or a hub id such as owner/name.")


_FOLDER_HOLDS = "The folder must hold config.json, *.safetensors, and the tokenizer's files such as tokenizer.json."
_TOKENIZER_TOO = (
    "Save it beside the model, tokenizer.save_pretrained(folder), or copy tokenizer.json and tokenizer_config.json."
)

_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")
"""Of tokenizers, in transformers' names and in those of the formats that it converts."""


def commit(spec: ModelSpec) -> str | None:
    """The commit that the hub's files of this model have, in hex; None for a folder that is no copy of the hub's."""
    file = _file(spec, CONFIG_NAME)
    found = re.search(r"/snapshots/([0-9a-f]{40})/", file.as_posix()) if file else None
    return found[1] if found else None


def _unsafe(spec: ModelSpec, config: Any, shards: list[str]) -> str | None:
    """What transformers would accept and we do not: adapters inside the model, which may be pickles and change the
    base; weights that are no safetensors, or lie elsewhere; attention that is fetched from the hub as code.
    """
    if _file(spec, ADAPTER_CONFIG_NAME):
        return f"there is an adapter in it ({ADAPTER_CONFIG_NAME}), which would be loaded with it"
    for file in [*shards, getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_NAME]:
        if not file.endswith(".safetensors") or Path(file).name != file:
            return f"it names {file!r} as its weights, which is no safetensors file beside {CONFIG_NAME}"
    for part in (config, config.get_text_config()):
        if "/" in str(part._attn_implementation):
            return f"{CONFIG_NAME} asks for attention {part._attn_implementation!r}, which is code from the hub"
    return None


def _shards(spec: ModelSpec) -> list[str]:
    """The files that the weights' index names; none where there is no index.

    Raises:
        ModelError: it is not such an index as `save_pretrained` writes.
    """
    index = _file(spec, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    content = json.loads(index.read_text(encoding="utf-8"))
    weights = content.get("weight_map") if isinstance(content, dict) else None
    named = list(weights.values()) if isinstance(weights, dict) else []
    if not named or not all(isinstance(file, str) for file in named):
        raise _wrong_index(spec, "no weight_map, which says in which file each weight is")
    if not isinstance(content.get("metadata"), dict):
        raise _wrong_index(spec, "no metadata, without which transformers does not read it")
    return named


def _wrong_index(spec: ModelSpec, wrong: str) -> ModelError:
    return ModelError(
        f"model {spec.id}: {SAFE_WEIGHTS_INDEX_NAME}: {wrong}",
        "Fetch the model again, with all of its *.safetensors files, or save it with save_pretrained.",
    )


def _wrong(config: Any) -> str | None:
    """What transformers takes, and what cannot be."""
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return f"architectures is {shortened(repr(names))}, expected a list of names"
    for part in (config, config.get_text_config()):
        positions = getattr(part, "max_position_embeddings", None)
        if positions is not None and not (isinstance(positions, int) and positions > 0):
            return f"max_position_embeddings is {shortened(repr(positions))}, expected a number of at least 1"
    return None


def _method(config: Any) -> str:
    """How the weights of a quantized model are, as its configuration says."""
    own = config.quantization_config
    return shortened(str(own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", own)))


_SEES_BOTH_SIDES = (True, "all")
"""Values of `use_bidirectional_attention`; Gemma 4's `vision` concerns images alone."""


def _not_causal(config: Any) -> str | None:
    """Why what `AutoModelForCausalLM` would make of `config` lets a token see those after it, or lacks an encoder.

    transformers gives encoders such as BERT a causal class too, which is causal only where `is_decoder` (XLM: `causal`)
    says so. Their families are those that also have a class for masked tokens; elsewhere (GPT-NeoX) a false
    `is_decoder` says nothing.
    """
    causal: set[str] = set()
    for names in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        causal.update([names] if isinstance(names, str) else names)
    asked = ", ".join(config.architectures or ()) or config.model_type
    if config.is_encoder_decoder:
        return None if causal.intersection(config.architectures or ()) else f"{asked} has an encoder besides"
    decides = "causal" if hasattr(config, "causal") else "is_decoder"
    if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, decides, False):
        return f"{asked} is an encoder, whose {decides} is not true in {CONFIG_NAME}"
    text = config.get_text_config()
    if getattr(text, "is_causal", None) is False:
        return f"is_causal is false in {CONFIG_NAME}"
    if getattr(text, "use_bidirectional_attention", None) in _SEES_BOTH_SIDES:
        return f"use_bidirectional_attention is set in {CONFIG_NAME}"
    return None


def _file(spec: ModelSpec, name: str) -> Path | None:
    """A file of the model, fetched where it has to be; None where there is none of that name, or none can be had."""
    lenient = ("missing_entries", "connection_errors", "gated_repo")  # loading says what is wrong in better words
    options: dict[str, Any] = {f"_raise_exceptions_for_{name}": False for name in lenient}
    found = cached_file(location(spec), name, revision=spec.revision, **options)
    return Path(found) if found else None


def load_model(spec: ModelSpec, attention: str | None = None) -> PreTrainedModel:
    """Loads the frozen base onto its device, in evaluation mode (its own dropout off).

    `attention` names a registered attention implementation; None leaves the model's default.

    Raises:
        ModelError: no such model, no safetensors weights, weights missing or of other shapes than config.json says, or
            an architecture that transformers does not have; see also `load_config`.
        StudyError: the device does not exist.
        MissingExtraError: it is to be quantized, and bitsandbytes is not installed.
    """
    device = resolve_device(spec.device)
    dtype = resolve_dtype(spec.dtype, device)
    config = load_config(spec)
    options: dict[str, Any] = {"attn_implementation": attention} if attention else {}
    if spec.quantization:  # on the device, tensor by tensor: whole it might not fit there
        options["quantization_config"] = quantization_config(spec.quantization, dtype)
        options["device_map"] = {"": device}
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            location(spec),
            config=config,
            revision=spec.revision,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # to name them below
            **options,
            **_SAFE,
        )
    except Exception as error:
        raise _cannot_load(spec, "model", error) from error
    model, loading = loaded
    other_shapes = sorted(loading["mismatched_keys"])
    if other_shapes:
        name, found, expected = other_shapes[0]
        raise ModelError(
            f"model {spec.id}: weights of other shapes than {CONFIG_NAME} says: {name} is {list(found)}, expected "
            f"{list(expected)}" + (f"; and {len(other_shapes) - 1} more" if other_shapes[1:] else ""),
            f"Take {CONFIG_NAME} and the weights from the same checkpoint.",
        )
    missing = sorted(loading["missing_keys"])
    if missing:
        raise ModelError(
            f"model {spec.id}: its files lack {len(missing)} weights, {missing[0]} for one",
            "They would be random numbers; use a complete checkpoint of a causal language model.",
        )
    if spec.quantization:
        use_dequantized_forward(model)
        return freeze(model)
    return freeze(model.to(device))


def freeze(model: PreTrainedModel) -> PreTrainedModel:
    """Turns off gradients, dropout and the key-value cache."""
    model.requires_grad_(False)
    model.eval()
    model.config.use_cache = False
    return model


def free_bytes(device: torch.device) -> int:
    """Memory that this process could still take on `device`: of the GPU, or of the machine (and its cgroup)."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    available = psutil.virtual_memory().available
    cgroup = Path("/sys/fs/cgroup")
    try:
        limit, used = (int((cgroup / name).read_text()) for name in ("memory.max", "memory.current"))
        statistics = dict(line.split() for line in (cgroup / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):  # no cgroup v2, or no limit
        return available
    reclaimable = int(statistics.get("inactive_file", 0))  # the page cache counts as used, and yields when needed
    return max(0, min(available, limit - used + reclaimable))


def give_back_freed(device: torch.device) -> None:
    """Gives the memory that a CPU's tensors have freed, which glibc keeps, back to the system.

    Not for every forward: taking it again costs 10% of a step at opt-350m's size (docs/lab-notes.md).
    """
    if device.type == "cpu" and sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # other C libraries do not have it
        if trim is not None:
            trim(0)


def fingerprint(model: PreTrainedModel) -> str:
    """sha256 over names, shapes and up to 4,096 spread values of every weight: enough to tell checkpoints apart."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.state_dict().items()):
        flat = weight.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // 4096)].float().cpu().contiguous()
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _cannot_load(spec: ModelSpec, part: str, error: Exception) -> ModelError:
    logging.getLogger(__name__).debug("loading failed", exc_info=error)
    folder = Path(location(spec))
    reason = textwrap.shorten(str(error), 300, placeholder=" ...")
    if isinstance(error, LookupError) or not reason:  # whose text is a key alone
        reason = f"{type(error).__name__}: {reason}"
    if part == "tokenizer" and folder.is_dir() and not any(any(folder.glob(kind)) for kind in _VOCABULARIES):
        reason = "there is no file of a tokenizer in the folder, such as tokenizer.json"
    reason = _damaged(folder) or reason
    if "trust_remote_code" in str(error):  # which transformers advises
        reason = "it needs custom code of its own, which is never run"
    todo = "Check the id (hub id or folder), the network, and `hf auth login` for a gated model."
    if folder.is_dir():
        todo = _FOLDER_HOLDS if part != "tokenizer" else _TOKENIZER_TOO
        others = sorted(path.name for kind in ("*.bin", "*.pt", "*.pth", "*.gguf") for path in folder.glob(kind))
        if part == "model" and others and not any(folder.glob("*.safetensors")):
            todo = f"{others[0]} is not read: load the model where you trust it, and save it with save_pretrained."
    return ModelError(f"{part} of {spec.id} cannot be loaded: {reason}", todo)


def _damaged(folder: Path) -> str | None:
    """What is wrong with the first file of a model's folder that is no JSON or no safetensors by itself."""
    for file in sorted(folder.glob("*.json")):
        try:
            json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            return f"{file}: not valid JSON: {error}"
    for file in sorted(folder.glob("*.safetensors")):
        try:
            with safe_open(file, framework="pt"):
                pass
        except (OSError, SafetensorError) as error:
            return f"{file}: damaged or cut short: {error}"
    return None
