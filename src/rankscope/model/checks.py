"""Checks of a model's folder, configuration and files before it is loaded. transformers is imported where it is needed:
what a folder lacks is said at once."""

import json
import logging
import os
from collections.abc import Sequence
from fnmatch import fnmatch
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from rankscope import demo, hub
from rankscope.data.sources import check_local, commits
from rankscope.errors import ModelError, reason_of, require, shortened
from rankscope.hub import HUB_ID
from rankscope.spec.models import EMBEDDED, ModelSpec, StudySpec

NOT_READ = (".bin", ".pt", ".pth", ".gguf")  # weights beside a configuration
CONFIG_NAME, ADAPTER_CONFIG_NAME = "config.json", "adapter_config.json"  # as transformers and PEFT have them
SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME = "model.safetensors", "model.safetensors.index.json"

# Nothing of a model is ever executed: no code from its folder, no pickled weights (design decision 9, SECURITY.md).
SAFE: dict[str, Any] = {"trust_remote_code": False}


def location(spec: ModelSpec) -> str:
    """Hub id or folder of the model; `embedded` is the small model that comes with rankscope."""
    return str(demo.model_path()) if spec.id == EMBEDDED else spec.id


def is_gguf(spec: ModelSpec) -> bool:
    """Whether the model is a GGUF file, which transformers dequantizes and which holds configuration and tokenizer."""
    return spec.id.endswith(".gguf") and Path(spec.id).is_file()


def source(spec: ModelSpec) -> dict[str, Any]:
    """Arguments of transformers' from_pretrained that say where the model is, and that nothing of it is executed."""
    if is_gguf(spec):
        file = Path(spec.id).absolute()
        return {"pretrained_model_name_or_path": str(file.parent), "gguf_file": file.name, **SAFE}
    return {"pretrained_model_name_or_path": location(spec), "revision": spec.commit or spec.revision, **SAFE}


DEQUANTIZED = ("fp8", "mxfp4")
"""Quantizations of checkpoints that transformers can undo while it loads."""


def check_quantized(spec: ModelSpec, own: Any) -> None:
    """Raise ModelError where weights that are quantized already cannot be used as the study asks. `own` is the
    quantization_config of the checkpoint. Those of bitsandbytes are used as they are; FP8 and MXFP4 are dequantized on
    request, which is noted in `own`."""
    method = own.get("quant_method") if isinstance(own, dict) else getattr(own, "quant_method", own)
    method = str(getattr(method, "value", method))
    known = method if isinstance(own, dict) else ""
    what = f"model {spec.id}: its weights are quantized already ({shortened(method)})"
    if spec.quantization:
        raise ModelError(f"{what}, and model.quantization is {spec.quantization}", "Leave it out.")
    if known == "bitsandbytes" and spec.dequantize:
        raise ModelError(f"{what}, which are used as they are", "Leave --dequantize out.")
    if known in DEQUANTIZED and not spec.dequantize:
        raise ModelError(what, "--dequantize loads them as weights of --dtype, which takes more memory.")
    if known in DEQUANTIZED:
        own["dequantize"] = True
    elif known != "bitsandbytes":
        raise ModelError(
            f"{what}, in a form that cannot be trained over here",
            "Give the model that it was made of (base_model on its card), if need be with --quantization nf4 or int8.",
        )


def check_source(spec: ModelSpec) -> None:
    """Raise ModelError if `spec.id` is neither the folder of a model nor a valid hub id."""
    folder, what = Path(location(spec)), f"model {spec.id}:"
    if is_gguf(spec):
        require("gguf", "gguf", f"model {spec.id}")
        for option in ("revision", "dequantize", "quantization"):
            if getattr(spec, option):
                why = f"model.{option} is not for a GGUF file, whose weights are loaded as model.dtype"
                raise ModelError(f"{what} {why}", "Leave it out.")
    elif folder.is_dir():
        if spec.revision is not None:
            why = f"model.revision is {spec.revision!r}, but a folder has no revision"
            raise ModelError(f"{what} {why}", "Remove it.")
        if not (folder / CONFIG_NAME).is_file():
            if (folder / ADAPTER_CONFIG_NAME).is_file():
                raise _is_adapter(spec)
            raise ModelError(f"{what} no {CONFIG_NAME} in the folder", _FOLDER_HOLDS)
    elif folder.is_file():
        raise ModelError(f"{what} a file, not a folder", _FOLDER_HOLDS)
    elif not HUB_ID.fullmatch(spec.id):
        raise ModelError(f"{what} no such folder", "Check the id: a folder, or a hub id such as owner/name.")


def check_inputs(spec: StudySpec, data: bool = True) -> StudySpec:
    """The question of a new study, one with `data`, with the commits of its hub ids: what is launched reads the model's
    configuration at the same. Raises ModelError, DataError: they are not there, or a local one cannot be used."""
    check_folder(spec.model)
    if data:
        check_local(spec.data)
    return pinned(spec) if data else spec


def pinned(spec: StudySpec, begun: StudySpec | None = None) -> StudySpec:
    """The question with the commits of its hub ids, at which all of the study is then read: those that it or `begun`
    has, else where the ids are now. Raises ModelError, DataError: the hub does not have an id, or does not answer and
    it was never fetched."""
    check_source(spec.model)
    commit = begun.model.commit if begun else spec.model.commit
    found = begun.data.commits if begun else commits(spec.data, spec.measure.forgetting)
    if commit is None and not begun and not os.path.exists(location(spec.model)):
        commit = _commit(spec.model)
    model, data = spec.model.model_copy(update={"commit": commit}), spec.data.model_copy(update={"commits": found})
    return spec.model_copy(update={"model": model, "data": data})


def _commit(spec: ModelSpec) -> str:
    """Commit of a model on the hub. Raises ModelError: there is none, or it has no safetensors weights."""
    try:
        commit, files, whole = hub.repository(spec.id, "model", spec.revision, CONFIG_NAME)
    except Exception as error:
        raise loading_error(spec, "configuration", error) from error
    if ADAPTER_CONFIG_NAME in files and CONFIG_NAME not in files:
        raise _is_adapter(spec)
    if whole and CONFIG_NAME not in files:
        raise ModelError(f"model {spec.id}: no {CONFIG_NAME} in it", "Give a model as transformers saves it.")
    if whole and not any(file.endswith(".safetensors") for file in files):
        others = [file for file in files if file.endswith(NOT_READ)]
        what = f"model {spec.id}: no *.safetensors in it" + (f", only {others[0]}, which is not read" if others else "")
        raise ModelError(what, _SAVED_ANEW)
    if whole and not _has_tokenizer(files):
        what = f"model {spec.id}: no file of a tokenizer in it, such as tokenizer.json"
        raise ModelError(what, "Fetch it, save its tokenizer beside it with save_pretrained, and give that folder.")
    return commit


def _is_adapter(spec: ModelSpec) -> ModelError:
    what = f"model {spec.id}: an adapter ({ADAPTER_CONFIG_NAME}), not a model"
    return ModelError(what, "Give the model that it was trained on: base_model_name_or_path in that file.")


def check_folder(spec: ModelSpec) -> None:
    """Raise ModelError for what can be said of a local model without transformers: its folder, a configuration that is
    no JSON, weights that cannot be read, and files of a tokenizer that are missing. A folder without any weights will
    do for a plan."""
    check_source(spec)
    folder = Path(location(spec))
    if not folder.is_dir():
        return
    try:
        config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise loading_error(spec, "configuration", error) from None
    weights = sorted(folder.glob("*.safetensors"))
    own = config.get("transformers_weights") if isinstance(config, dict) else None
    is_whole = any((folder / str(name)).is_file() for name in (own, SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME))
    others = any(path.suffix in NOT_READ for path in folder.iterdir())
    if _corrupt_file(weights) or ((weights or others) and not is_whole):
        why = f"neither {SAFE_WEIGHTS_NAME} nor {SAFE_WEIGHTS_INDEX_NAME} in the folder"
        raise loading_error(spec, "model", FileNotFoundError(why))
    if not _has_tokenizer(os.listdir(folder)):
        raise loading_error(spec, "tokenizer", FileNotFoundError())


_SAVED_ANEW = "Load it where you trust it, save it with save_pretrained, and give that folder."
_FOLDER_HOLDS = "The folder must hold config.json, *.safetensors, and the tokenizer's files such as tokenizer.json."

# File names of tokenizers, in transformers' own format and in those that it converts.
_VOCABULARIES = ("tokenizer.json", "vocab*", "*.model", "*.tiktoken", "tekken.json")


def check_adapter_folder(folder: Path) -> None:
    """Raise ModelError if `folder` has no configuration of an adapter."""
    if not os.path.isfile(folder / ADAPTER_CONFIG_NAME):  # False for a name that is no valid path
        what = f"adapter {folder}: no {ADAPTER_CONFIG_NAME} in the folder"
        raise ModelError(what, "Give the folder of a PEFT LoRA adapter.")


def _has_tokenizer(files: Sequence[str]) -> bool:
    return any("/" not in file and fnmatch(file, kind) for file in files for kind in _VOCABULARIES)


def unsafe_reason(spec: ModelSpec, config: Any, shards: list[str]) -> str | None:
    """Reason why loading the model would not be safe, though transformers would accept it; None if it is safe. Unsafe
    are adapters inside the model, which may be pickles and change the base; weights that are no safetensors files, or
    outside of the model; and attention that is fetched from the hub as code."""
    if model_file(spec, ADAPTER_CONFIG_NAME):
        return f"there is an adapter in it ({ADAPTER_CONFIG_NAME}), which would be loaded with it"
    for file in [*shards, getattr(config, "transformers_weights", None) or SAFE_WEIGHTS_NAME]:
        if not file.endswith(".safetensors") or Path(file).name != file:
            return f"it names {file!r} as its weights, which is no safetensors file beside {CONFIG_NAME}"
    for part in (config, config.get_text_config()):
        if "/" in str(part._attn_implementation):
            return f"{CONFIG_NAME} asks for attention {part._attn_implementation!r}, which is code from the hub"
    return None


def indexed_files(spec: ModelSpec) -> list[str]:
    """Files named in the index of the weights; empty without one. Raises ModelError if it is malformed."""
    index = model_file(spec, SAFE_WEIGHTS_INDEX_NAME)
    if index is None:
        return []
    content = json.loads(index.read_text(encoding="utf-8"))
    weights = content.get("weight_map") if isinstance(content, dict) else None
    named = list(weights.values()) if isinstance(weights, dict) else []
    if not named or not all(isinstance(file, str) for file in named):
        raise index_error(spec, "no weight_map, which says in which file each weight is")
    if not isinstance(content.get("metadata"), dict):
        raise index_error(spec, "no metadata, without which transformers does not read it")
    return named


def index_error(spec: ModelSpec, wrong: str) -> ModelError:
    """Error about the index of the weights."""
    todo = "Fetch the model again, with all of its *.safetensors files, or save it with save_pretrained."
    return ModelError(f"model {spec.id}: {SAFE_WEIGHTS_INDEX_NAME}: {wrong}", todo)


def config_fault(config: Any) -> str | None:
    """Invalid value in the configuration that transformers would accept; None without one."""
    names = config.architectures
    if names is not None and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        return f"architectures is {shortened(repr(names))}, expected a list of names"
    for part in (config, config.get_text_config()):
        positions = getattr(part, "max_position_embeddings", None)
        unlimited = isinstance(getattr(type(part), "max_position_embeddings", None), property)  # XLNet's -1
        if positions is not None and not unlimited and not (isinstance(positions, int) and positions > 0):
            return f"max_position_embeddings is {shortened(repr(positions))}, expected a number of at least 1"
    return None


def not_causal_reason(config: Any) -> str | None:
    """Reason why `AutoModelForCausalLM` would not make a causal decoder of `config`; None if it would. transformers
    also has causal classes for encoders such as BERT, which are causal only if `is_decoder` (XLM: `causal`) is true.
    Those families also have a class for masked tokens; in others (GPT-NeoX) a false `is_decoder` has no meaning."""
    from transformers.models.auto import modeling_auto as auto

    classes = auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()
    causal = {name for names in classes for name in ([names] if isinstance(names, str) else names)}
    asked = ", ".join(config.architectures or ()) or config.model_type
    if config.is_encoder_decoder:
        return None if causal.intersection(config.architectures or ()) else f"{asked} has an encoder besides"
    decides = "causal" if hasattr(config, "causal") else "is_decoder"
    if config.model_type in auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES and not getattr(config, decides, False):
        return f"{asked} is an encoder: {decides} is not true in {CONFIG_NAME}"
    text = config.get_text_config()
    if getattr(text, "attn_type", None) == "bi":  # XLNet
        return f"attn_type is bi in {CONFIG_NAME}: each token sees those after it"
    if getattr(text, "is_causal", None) is False:
        return f"is_causal is false in {CONFIG_NAME}"
    if getattr(text, "use_bidirectional_attention", None) in (True, "all"):  # Gemma 4's `vision` is for images alone
        return f"use_bidirectional_attention is set in {CONFIG_NAME}"
    return None


def model_file(spec: ModelSpec, name: str) -> Path | None:
    """Path of a file of the model, downloaded if necessary; None if it does not exist or is unavailable."""
    from transformers.utils.hub import cached_file

    if is_gguf(spec):
        return None
    lenient = ("missing_entries", "connection_errors", "gated_repo")  # loading has a better message
    options: dict[str, Any] = {f"_raise_exceptions_for_{name}": False for name in lenient}
    file = cached_file(location(spec), name, revision=spec.commit or spec.revision, **options)
    return Path(file) if file else None


def fetch_weights(spec: ModelSpec) -> None:
    """Fetch the weights of a pinned hub id, so that a download which was killed goes on: transformers would begin anew.
    Raises the errors of the hub's client."""
    if spec.commit is None or os.path.exists(location(spec)):
        return
    files = hub.repository(spec.id, "model", spec.commit, CONFIG_NAME).files
    for file in [SAFE_WEIGHTS_NAME] if SAFE_WEIGHTS_NAME in files else dict.fromkeys(indexed_files(spec)):
        hub.fetch(spec.id, "model", spec.commit, file)


def loading_error(spec: ModelSpec, part: str, error: Exception) -> ModelError:
    """Error about a part of the model (configuration, tokenizer, model) that could not be loaded."""
    logging.getLogger(__name__).debug("loading failed", exc_info=error)
    folder = Path(location(spec))
    if not os.path.exists(folder) and (found := hub.explained(spec.id, error)):
        return ModelError(f"model {spec.id}: {found[0]}", found[1] or "Check the id and the revision.")
    files = _files_of(spec)
    corrupt = _corrupt_file(sorted(files.glob("*.json")) + sorted(files.glob("*.safetensors")))
    if corrupt and not folder.is_dir():
        file, fault = corrupt
        todo = f"Delete {file.resolve()}, and run again: it is fetched anew."
        return ModelError(f"model {spec.id}: {file.name} in the hub's cache: {fault}", todo)
    reason = reason_of(error, 300)
    if isinstance(error, LookupError):  # whose text is only the key
        reason = f"{type(error).__name__}: {reason}"
    todo = "Check the id: a folder, or a hub id such as owner/name."
    if folder.is_dir():
        todo = _FOLDER_HOLDS
        others = sorted(path.name for path in folder.iterdir() if path.suffix in NOT_READ)
        if part == "configuration" and (folder / CONFIG_NAME).is_file():
            todo = f"Correct {CONFIG_NAME}, or restore it."
        elif part == "tokenizer":
            todo = "Save it there by tokenizer.save_pretrained, or copy tokenizer.json and tokenizer_config.json."
            if not _has_tokenizer(os.listdir(folder)):
                reason = "there is no file of a tokenizer in the folder, such as tokenizer.json"
            elif any(folder.glob("*.model")) and find_spec("sentencepiece") is None:
                package = "the package sentencepiece, which is not installed: `pip install sentencepiece`"
                reason = f"its tokenizer.model takes {package}"
        elif part == "model" and others and not any(folder.glob("*.safetensors")):
            todo = f"{others[0]} is not read: load the model where you trust it, and save it with save_pretrained."
            if others[0].endswith(".gguf"):
                todo = f"Give the file itself: --model {folder / others[0]}"
    if corrupt:
        reason = f"{corrupt[0]}: {corrupt[1]}"
    if "use_safetensors" in str(error):  # which transformers advises to leave out: it would read pickles
        reason, todo = f"no {SAFE_WEIGHTS_NAME} in it, nor an index of several", _SAVED_ANEW
    if "trust_remote_code" in str(error):  # which transformers advises
        reason = "it needs custom code of its own, which is never run"
    return ModelError(f"{part} of {spec.id} cannot be loaded: {reason}", todo)


def _files_of(spec: ModelSpec) -> Path:
    """Folder with the model's files; of a hub id that of its commit in the cache."""
    from huggingface_hub import try_to_load_from_cache

    folder = Path(location(spec))
    cached = None if folder.exists() else try_to_load_from_cache(spec.id, CONFIG_NAME, revision=spec.commit)
    return Path(cached).parent if isinstance(cached, str) else folder


def _corrupt_file(files: Sequence[Path]) -> tuple[Path, str] | None:
    """First of a model's files that is no valid JSON or safetensors, and its fault; None without one."""
    for file in files:
        try:
            if file.suffix == ".json":
                json.loads(file.read_text(encoding="utf-8"))
            else:
                safe_open(file, framework="numpy")  # reads the header
        except (OSError, ValueError, RecursionError, SafetensorError) as error:
            return file, f"corrupt or incomplete: {error}"
    return None
