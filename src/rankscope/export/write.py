"""What is exported: its files, and the model that transformers and PEFT load from them, without rankscope's forward."""

import copy
import shutil
import warnings
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import SAFETENSORS_WEIGHTS_NAME as WEIGHTS
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils.hub import CHAT_TEMPLATE_FILE

from rankscope.data.conversations import with_chat_template
from rankscope.data.formats import has_conversations
from rankscope.data.tokens import Tokens
from rankscope.errors import ModelError, lacks_memory
from rankscope.lora.adapters import save_config
from rankscope.lora.saved import SavedAdapter, load_by_peft, read_adapter
from rankscope.model import checks
from rankscope.model.checks import loading_error, location
from rankscope.model.device import resolve_device
from rankscope.model.load import fingerprint, load_config, load_tokenizer, resolve_dtype
from rankscope.model.quantized import quantization_config
from rankscope.spec.models import ModelSpec
from rankscope.study.folder import StudyFolder
from rankscope.train.engine import ExampleLosses, PeftEngine

DTYPES = {"float32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORMS = (*DTYPES, "nf4", "int8")


class Exported(NamedTuple):
    folder: Path
    merged: str | None  # type of a merged model's weights; None of an adapter
    adapter: SavedAdapter
    config: LoraConfig  # as it was written
    own_template: bool  # whether the chat template is the study's, not the base's


def write_files(study: StudyFolder, adapter: Path, merged: str | None, sha256: str | None, folder: Path) -> Exported:
    """Fill `folder` from the adapter in another. Raises as `load_plain` and `merged_model`."""
    spec, data, saved = study.spec.model, study.spec.data, read_adapter(adapter)
    config, tokenizer = portable_config(saved, spec), load_tokenizer(spec)
    own_template = data.chat_template is not None and has_conversations(study.data_facts.get("format", ""))
    with_chat_template(tokenizer, data.chat_template if own_template else None)
    if merged:
        if spec.quantization:
            load_plain(spec, spec.quantization, sha256)  # merged is the base before it was quantized: no hash of it
        merged_model(load_plain(spec, own_form(spec), sha256), adapter, merged).save_pretrained(folder)
    else:
        shutil.copyfile(adapter / WEIGHTS, folder / WEIGHTS)
        save_config(config, folder)
    # To a larger tokenizer beside an adapter PEFT would enlarge the model, by random rows, which take probability.
    if merged or len(tokenizer) <= load_config(spec).get_text_config().vocab_size:
        tokenizer.save_pretrained(folder)
    elif own_template:
        (folder / CHAT_TEMPLATE_FILE).write_text(str(tokenizer.chat_template), "utf-8")
    return Exported(folder, merged, saved, config, own_template)


def portable_config(saved: SavedAdapter, spec: ModelSpec) -> LoraConfig:
    """The adapter's configuration with a base that is found from any folder, and without rsLoRA, which llama.cpp does
    not read, where alpha over rank says the same."""
    config, base = copy.copy(saved.config), Path(location(spec))
    config.base_model_name_or_path = str(base.resolve()) if base.exists() else spec.id
    config.revision = spec.commit or spec.revision
    if config.use_rslora and not config.rank_pattern and not config.alpha_pattern:
        config.use_rslora, config.lora_alpha = False, config.lora_alpha * config.r**0.5
    return config


def merged_model(base: PreTrainedModel, adapter: Path, form: str) -> PreTrainedModel:
    """The base with an adapter merged into it: added in float32, and rounded once. An output layer that shares the
    embedding's weight gets its own where either carries an adapter, whose update would change both; PEFT notes it in
    the configuration. Raises ModelError: a weight is beyond the range of `form`."""
    nn.Module.to(base, torch.float32)  # in place
    loaded: Any = load_by_peft(base, adapter)
    ends: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    inner: list[Any] = [end.get_base_layer() if isinstance(end, BaseTunerLayer) else end for end in ends]
    if inner != ends and None not in inner and inner[0].weight is inner[1].weight:
        inner[1].weight = nn.Parameter(inner[1].weight.detach().clone(), requires_grad=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of tied embeddings
        merged: PreTrainedModel = loaded.merge_and_unload().to(DTYPES[form])
    for name, weight in merged.named_parameters():
        if not weight.isfinite().all():
            raise ModelError(f"--merge {form}: {name} is beyond its range", "Use --merge bf16.")
    return merged


def own_form(spec: ModelSpec) -> str:
    """Type in which the study multiplied."""
    dtype = resolve_dtype(spec, resolve_device(spec.device))
    return next(form for form in DTYPES if DTYPES[form] == dtype)


def load_plain(spec: ModelSpec, form: str, sha256: str | None, folder: Path | None = None) -> PreTrainedModel:
    """The base, or the merged model in `folder`. `sha256` is the study's fingerprint of the base. Raises ModelError: it
    cannot be loaded, would not be safe to load, or is another base."""
    device = resolve_device(spec.device)
    options: dict[str, Any] = {"dtype": DTYPES.get(form) or resolve_dtype(spec, device), "device_map": {"": device}}
    if form not in DTYPES:
        options["quantization_config"] = quantization_config(form, options["dtype"])
    if folder is not None:
        spec = spec.model_copy(update={"id": str(folder), "revision": None, "commit": None})
    try:
        checks.fetch_weights(spec)
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
            config=load_config(spec), use_safetensors=not checks.is_gguf(spec), **options, **checks.source(spec)
        )
    except Exception as error:
        if isinstance(error, ModelError) or lacks_memory(error):
            raise
        raise loading_error(spec, "model", error) from error
    layer: Any
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # a kernel of bitsandbytes that takes whole blocks alone
            layer.support_avx512bf16_for_cpu = False
    comparable = folder is None and form == (spec.quantization or own_form(spec))
    if comparable and sha256 and fingerprint(model) != sha256:
        todo = "Give the one that it began with: --model, or the commit in machine.json."
        raise ModelError(f"model {spec.id}: not the weights that the study was trained on", todo)
    model.eval()
    return model


def measure(spec: ModelSpec, form: str, sha256: str | None, made: Exported, rows: Tokens) -> ExampleLosses:
    """Loss of every row by what was exported, one row in a forward, so that nothing is padded. Raises as `load_plain`;
    ModelError: a loss is not a finite number."""
    model = load_plain(spec, form, sha256, made.folder if made.merged else None)
    if not made.merged:
        model = load_by_peft(model, made.folder).get_base_model()  # type: ignore[assignment]
    (losses,) = PeftEngine(model, batch_size=1).evaluate(rows, ["default"])
    if not np.isfinite(losses.loss).all():
        raise ModelError(f"loaded as {form}, its held-out loss is not a finite number", "Use another type: bf16.")
    return losses
