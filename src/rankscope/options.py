"""From a study's file, options and `--set KEY=VALUE` to the study that they ask for."""

import copy
import difflib
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rankscope.errors import StudyError
from rankscope.spec import StudySpec, resolve_spec


def read_study_file(path: Path) -> dict[str, Any]:
    """Reads a study's YAML as a mapping, not yet validated.

    Raises:
        StudyError: the file is missing, is not YAML, or is not a mapping.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file", "Give the path of a .yaml file, or use --model.") from None
    except (OSError, UnicodeDecodeError) as error:
        raise StudyError(f"{path}: cannot be read: {error}", "Check that it is a readable UTF-8 file.") from None
    except yaml.YAMLError as error:
        raise StudyError(f"{path}: not valid YAML: {error}", "Correct the file at that line.") from None
    if not isinstance(values, dict):
        raise StudyError(f"{path}: expected fields such as model and data, found {type(values).__name__}")
    return values


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Applies one `--set training.steps=200` to a nested mapping, in place; the value is read as YAML.

    Raises:
        StudyError: it is not KEY=VALUE, or the value is not YAML.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise StudyError(f"--set {assignment}: expected KEY=VALUE", "For example --set training.steps=200.")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        raise StudyError(f"--set {assignment}: the value is not valid YAML", "Put it in quotes.") from None
    set_field(values, key, value)


def set_field(values: dict[str, Any], key: str, value: Any) -> None:
    """Sets `training.steps` in a nested mapping, in place."""
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        target = target.setdefault(parent, {})
        if not isinstance(target, dict):
            raise StudyError(f"{key}: {parent} is not a group of fields")
    target[last] = value


OPTION_FIELDS = {
    "name": "name",
    "model": "model.id",
    "revision": "model.revision",
    "dtype": "model.dtype",
    "device": "model.device",
    "dataset": "data.id",
    "max_length": "data.max_length",
    "loss_on": "data.loss_on",
    "ranks": "ranks",
    "learning_rates": "learning_rates",
    "seeds": "seeds",
    "alpha": "adapter.alpha",
    "target_modules": "adapter.target_modules",
    "lora_dropout": "adapter.lora_dropout",
    "use_rslora": "adapter.use_rslora",
    "steps": "training.steps",
    "epochs": "training.epochs",
    "batch_size": "training.batch_size",
    "engine": "training.engine",
    "isolated": "training.isolated",
    "max_gpu_memory": "verdict.max_gpu_memory",
    "max_runtime": "verdict.max_runtime",
}
"""The options of the command line and of `rankscope.run`, and the field each one sets."""


def assemble(values: Mapping[str, Any], options: Mapping[str, Any], assignments: Sequence[str] = ()) -> StudySpec:
    """A study from a file's values, options over them (None means not given), and `--set` assignments over both.

    Raises:
        StudyError: an option or field is unknown or wrong.
    """
    merged = copy.deepcopy(dict(values))
    for option, value in options.items():
        if option not in OPTION_FIELDS:
            near = difflib.get_close_matches(option, OPTION_FIELDS, n=1)
            raise StudyError(f"{option}: unknown option" + (f"; did you mean {near[0]}?" if near else ""))
        if value is not None:
            set_field(merged, OPTION_FIELDS[option], value)
    training = merged.get("training")
    if isinstance(training, dict):  # a length given by option replaces the file's
        if options.get("steps") is not None and options.get("epochs") is None:
            training.pop("epochs", None)
        if options.get("epochs") is not None and options.get("steps") is None:
            training.pop("steps", None)
    for assignment in assignments:
        set_value(merged, assignment)
    if "name" not in merged:
        merged["name"] = _default_name(merged)
    return resolve_spec(merged)


def _default_name(values: Mapping[str, Any]) -> str:
    parts = [values.get(group, {}).get("id", "") for group in ("model", "data")]
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(part).stem).strip("-._") for part in parts if isinstance(part, str)]
    return "-".join(word for word in words if word)[:100] or "study"
