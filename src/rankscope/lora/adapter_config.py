"""Reading and checking of the adapter_config.json of a LoRA adapter, possibly made elsewhere."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from peft import LoraConfig
from peft.utils import CONFIG_NAME as CONFIG
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

from rankscope.errors import ModelError, first_line, shortened
from rankscope.model.checks import check_adapter_folder
from rankscope.spec.task import compiled

Value = TypeVar("Value")

MAX_NAME_LENGTH = 500  # characters of a layer's name, and of a key of rank_pattern or alpha_pattern
# Valid names of modules. Others could act where names are shown, or are read as regular expressions by PEFT.
_NAME = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


def checked_name(name: str) -> str:
    """Return `name` if it is a valid module name; raise ValueError otherwise."""
    if len(name) > MAX_NAME_LENGTH or not _NAME.fullmatch(name):
        raise ValueError(f"{shortened(name)!r} is no name of a module: letters, digits, _ and -, with dots between")
    return name


_Alpha = Annotated[float, Field(ge=-1e9, le=1e9)]
_Name = Annotated[str, AfterValidator(checked_name)]


class _CheckedConfig(BaseModel):
    """Fields that affect the factors, or the modules that PEFT takes. All others are passed on to PEFT."""

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
    megatron_config: None = None  # layers that are not read here, and code that PEFT would import


def read_config(folder: Path) -> tuple[LoraConfig, tuple[str, ...]]:
    """Read the configuration, and the names of the options that are set and that PEFT does not know. Raises ModelError:
    it is missing or corrupt, a field has another type than PEFT's, or it is not of LoRA."""
    check_adapter_folder(folder)
    known = {field.name for field in fields(LoraConfig) if field.init}  # a newer PEFT has more
    switches = {field.name for field in fields(LoraConfig) if isinstance(field.default, bool)}
    try:
        values = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        _CheckedConfig.model_validate(values)
        given = {k: v for k, v in values.items() if k in known and not (v is None and k in switches)}
        config = LoraConfig(**given)
    except ValidationError as error:
        wrong = error.errors()[0]
        field, value = shortened(".".join(map(str, wrong["loc"]))) or "it", shortened(repr(wrong["input"]))
        raise ModelError(f"{folder / CONFIG}: {field} is {value}: {wrong['msg']}", "Restore it.") from None
    except Exception as error:  # of the file, and whatever PEFT makes of other fields
        what = f"{folder / CONFIG}: cannot be read: {shortened(first_line(error), 200)}"
        raise ModelError(what, "Restore it.") from None
    # Not numbers, which newer versions of PEFT write for options that are off.
    unknown = [k for k, v in values.items() if k not in known and v and (v is True or not isinstance(v, int | float))]
    return config, tuple(unknown)


_KEY = re.compile(r"(?:\\[dDwW]|\\[^A-Za-z0-9]|\(\?:|\((?!\?)|\{\d+(?:,\d*)?\}|[A-Za-z0-9_.\[\]^$|)*+?-])*")
"""Syntax that has one meaning in Python's `re`, which PEFT uses, and in RE2; whether it is complete is RE2's to say."""


def by_pattern(patterns: Mapping[str, Value] | None, default: Value) -> Callable[[str], Value]:
    """Value of a layer by its name: that of the first matching key of rank_pattern or alpha_pattern, a module's name or
    a regular expression, as PEFT's `get_pattern_key` has it; else `default`.

    PEFT matches the keys with Python's `re`, in which one such as `(a+)+` can take exponential time. RE2 gives the same
    answers in time linear in the layer's name, whatever an adapter from elsewhere asks for. Raises ValueError: a key is
    too long, is no regular expression, or has what RE2 cannot match (backreferences, lookaround) or reads differently
    from `re` (flags, named groups, spaces).
    """
    known = [(_compile_key(key), value) for key, value in (patterns or {}).items()]
    return lambda layer: next((value for pattern, value in known if pattern.match(layer)), default)


def _compile_key(key: str) -> Any:
    if len(key) > MAX_NAME_LENGTH:
        raise ValueError(f"a key has {len(key):,} characters; at most {MAX_NAME_LENGTH} are allowed")
    if not _KEY.fullmatch(key):
        raise ValueError(f"key {key!r}: only names, ., classes, groups, |, ^, $ and repetition are supported")
    try:
        compiled(key)  # else `a)|(b` would be complete in the next line
        return compiled(rf"(.*\.)?({key})$")  # as in peft.utils.other.get_pattern_key
    except ValueError as error:
        raise ValueError(f"key {error}") from None


def ranks_and_alphas(folder: Path, config: LoraConfig) -> tuple[Callable[[str], int], Callable[[str], float]]:
    """Rank and alpha of a layer by its name. Raises ModelError if a key of rank_pattern or alpha_pattern is unsafe."""
    found: list[Any] = []
    for field, default in (("rank_pattern", config.r), ("alpha_pattern", config.lora_alpha)):
        try:
            found.append(by_pattern(getattr(config, field), default))
        except ValueError as error:
            raise ModelError(f"{folder / CONFIG}: {field}: {error}", "Name the modules instead.") from None
    return found[0], found[1]
