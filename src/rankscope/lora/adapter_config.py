"""The adapter_config.json of a LoRA adapter that somebody else may have made: checked before anything is made of it."""

import json
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal

from peft import LoraConfig
from peft.utils import CONFIG_NAME as CONFIG
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rankscope.errors import ModelError, shortened
from rankscope.lora.pattern_keys import LONGEST, PatternKeys

_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")
"""Of a module. Other names are shown, written as keys of rank_pattern, and read as regular expressions by PEFT."""


def checked_name(name: str) -> str:
    """The name of a module. Raises ValueError where it is none."""
    if len(name) > LONGEST or not _NAME.fullmatch(name):
        raise ValueError(f"{shortened(name)!r} is no name of a module: letters, digits, _ and -, with dots between")
    return name


_Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
_Name = Annotated[str, AfterValidator(checked_name)]


class _Checked(BaseModel):
    """The fields that bear on the factors, or on which modules PEFT takes. The rest are PEFT's own."""

    model_config = ConfigDict(strict=True, extra="ignore")

    peft_type: Literal["LORA"]
    r: Annotated[int, Field(ge=1)] = 8
    lora_alpha: _Alpha = 8
    rank_pattern: dict[str, Annotated[int, Field(ge=1)]] | None = None
    alpha_pattern: dict[str, _Alpha] | None = None
    use_rslora: bool | None = False
    use_dora: bool | None = False
    lora_bias: bool | None = False
    fan_in_fan_out: bool | None = False
    bias: Literal["none", "all", "lora_only"] = "none"
    target_modules: list[str] | str | None = None
    exclude_modules: list[str] | str | None = None
    target_parameters: list[str] | None = None
    modules_to_save: list[_Name] | None = None
    layers_to_transform: list[int] | int | None = None
    layers_pattern: list[str] | str | None = None
    init_lora_weights: bool | str | None = True
    base_model_name_or_path: str | None = None
    revision: str | None = None
    megatron_config: None = None  # of layers that are not read here, and whose code PEFT would import


def read_config(folder: Path) -> tuple[LoraConfig, tuple[str, ...]]:
    """The configuration, and the switches and groups in it that are set and that PEFT does not know.

    Raises:
        ModelError: it is missing or damaged, a field is of another type than PEFT's, or it is not of LoRA.
    """
    if not os.path.isfile(folder / CONFIG):
        raise ModelError(f"adapter {folder}: no {CONFIG} in the folder", "Give the folder of a PEFT LoRA adapter.")
    known = {field.name for field in fields(LoraConfig) if field.init}  # a newer PEFT has more, not of the factors
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{folder / CONFIG}: cannot be read: {error}", "Restore it.") from None
    if values.get("peft_type") != "LORA":
        kind = shortened(repr(values.get("peft_type")))
        raise ModelError(f"{folder / CONFIG}: peft_type is {kind}, not LORA", "Only LoRA has ranks to look at.")
    switches = {field.name for field in fields(LoraConfig) if isinstance(field.default, bool)}
    try:
        _Checked.model_validate(values)
        given = {
            name: value for name, value in values.items() if name in known and not (value is None and name in switches)
        }
        config = LoraConfig(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        field, found = ".".join(map(str, wrong["loc"])), shortened(repr(wrong["input"]))
        raise ModelError(f"{folder / CONFIG}: {shortened(field)} is {found}: {wrong['msg']}", "Restore it.") from None
    except Exception as error:  # whatever PEFT makes of other fields
        reason = shortened(str(error).strip().split("\n")[0], 200)
        raise ModelError(f"{folder / CONFIG}: cannot be read: {reason}", "Restore it.") from None
    unknown = [name for name, value in values.items() if name not in known and value and not _is_number(value)]
    return config, tuple(unknown)


def _is_number(value: Any) -> bool:
    """Such as the size of what is switched off: newer versions write every default."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def pattern_keys(folder: Path, config: LoraConfig) -> tuple[PatternKeys[int], PatternKeys[float]]:
    """Of ranks, and of alphas.

    Raises:
        ModelError: a key is none of those that are read.
    """
    found: list[Any] = []
    for field in ("rank_pattern", "alpha_pattern"):
        try:
            found.append(PatternKeys(getattr(config, field) or {}))
        except ValueError as error:
            raise ModelError(f"{folder / CONFIG}: {field}: {error}", "Name the module in its place.") from None
    return found[0], found[1]
