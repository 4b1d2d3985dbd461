"""`adapter.peft`: fields of PEFT's LoraConfig that a study hands on; `--adapter-config` reads them from a file.

PEFT, which imports torch, is imported only where a study has such fields.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rankscope.errors import StudyError, did_you_mean, first_line, reason_of, shortened

OWN = {
    "r": "ranks",
    "lora_alpha": "adapter.alpha",
    "target_modules": "adapter.target_modules",
    "lora_dropout": "adapter.lora_dropout",
    "use_rslora": "adapter.use_rslora",
    "use_dora": "variants (dora)",
    "rank_pattern": "adapter.rank_pattern",
    "base_model_name_or_path": "model.id",
    "revision": "model.revision",
}
"""Fields that a study sets itself, by its own."""

_WRITTEN = ("peft_type", "task_type", "inference_mode", "auto_mapping", "peft_version")  # of what an adapter is

_START = "belongs to a start that looks at data or changes the base, which all trials share"
_REFUSED = {
    "bias": "trains the base's own biases, which all trials share",
    "layer_replication": "makes another base model, which all trials share",
    "alora_invocation_tokens": "needs PEFT's own generation",
    "arrow_config": "mixes other adapters",
    "megatron_config": "names code to import",
    "megatron_core": "names code to import",
    **dict.fromkeys(("loftq_config", "eva_config", "corda_config", "lora_ga_config"), _START),
}
"""Fields that no study can have, with the reason."""

_STARTS = (True, "gaussian", "orthogonal")  # values of init_lora_weights by which an adapter begins as no change


def checked_options(options: Any) -> dict[str, Any]:
    """Return the fields of `adapter.peft`. Raises ValueError: a field is the study's own, is unknown, cannot be had in
    a study, or has a value that PEFT refuses."""
    if not isinstance(options, Mapping):
        raise ValueError("expected a mapping of fields of PEFT's LoraConfig, such as layers_to_transform: [0, 1]")
    for name in options:
        if name in OWN:
            raise ValueError(f"{name} is the study's own: give {OWN[name]}")
        if name in _REFUSED or name in _WRITTEN:
            raise ValueError(f"{name}: {_REFUSED.get(name, 'PEFT writes it, and nobody chooses it')}; leave it out")
    if not options:
        return {}
    from peft import LoraConfig, __version__

    known = _defaults()
    for name in options:
        if name not in known:
            near = did_you_mean(str(name), known)
            raise ValueError(f"{shortened(str(name))}: LoraConfig of PEFT {__version__} has no such field{near}")
    if options.get("init_lora_weights", True) not in _STARTS:
        start = shortened(str(options["init_lora_weights"]))
        todo = f"give {', '.join(map(str, _STARTS))}; variants has pissa and olora"
        raise ValueError(f"init_lora_weights: {start}: {_START}; {todo}")
    try:
        LoraConfig(**dict(options))
    except Exception as error:  # whatever PEFT makes of a value
        raise ValueError(shortened(first_line(error), 200)) from None
    return dict(options)


def _defaults() -> dict[str, Any]:
    from peft import LoraConfig

    defaults: dict[str, Any] = LoraConfig().to_dict()  # type: ignore[no-untyped-call]
    return defaults


def read_adapter_config(file: Path) -> dict[str, Any]:
    """Fields of a study, such as `adapter.alpha`, from the adapter_config.json of an adapter or in its folder. Its rank
    is left out: ranks are what a study is about. Raises StudyError: it cannot be read, is not of LoRA, or has ranks or
    alphas of single layers."""
    file = file / "adapter_config.json" if file.is_dir() else file
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.get("peft_type", "LORA") != "LORA":
            raise ValueError("not of a LoRA adapter")
    except (OSError, ValueError, RecursionError) as error:
        what = f"--adapter-config {file}: cannot be read: {reason_of(error)}"
        raise StudyError(what, "Give the adapter_config.json of a LoRA adapter.") from None
    modules = found.get("target_modules")
    if isinstance(modules, str) and modules != "all-linear":
        what = f"--adapter-config {file}: target_modules is the regular expression {shortened(modules)}"
        raise StudyError(what, "Put the names of the modules there, as a list.")
    modules = sorted(modules, key=str) if isinstance(modules, list) else modules
    values: dict[str, Any] = {"adapter.target_modules": modules}
    values |= {OWN[name]: found.get(name) for name in ("lora_alpha", "lora_dropout")}
    values["adapter.use_rslora"] = found.get("use_rslora") or None
    values["variants"] = ["dora"] if found.get("use_dora") else None
    taken = {*OWN, *_WRITTEN} - {"rank_pattern"}
    defaults = _defaults()
    rest = {name: value for name, value in found.items() if name not in taken and value != defaults.get(name)}
    if rest.get("init_lora_weights") == "gaussian":
        values["adapter.init_lora_weights"] = rest.pop("init_lora_weights")
    values["adapter.peft"] = {name: value for name, value in rest.items() if value or name in defaults}
    return {field: value for field, value in values.items() if value is not None}
