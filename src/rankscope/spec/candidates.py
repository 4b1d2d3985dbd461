"""Candidates and trials, and the types of their fields."""

import re
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from functools import partial
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, PositiveFloat, ValidationInfo, field_validator

from rankscope.errors import StudyError

CONTROL = "control"  # name of the profile that measures the first candidate once more, for the noise of every cost
TIME = "time"  # name of the profile that has the times of all of them, side by side
FULL = "full"  # entry among the ranks for full fine-tuning, the baseline
PLAIN: Literal["lora"] = "lora"

Rank = Annotated[int, Field(gt=0, le=1 << 20)]
Seed = Annotated[int, Field(ge=0, lt=1 << 63)]
Count = Annotated[int, Field(gt=0, lt=1 << 63)]  # a positive number that fits in a signed 64-bit integer
Variant = Literal["rslora", "pissa", "olora", "loraplus", "dora", "pattern"]
"""A LoRA variant: see `rankscope.lora.variants`, and PEFT's documentation of each."""
Column = Literal[
    "instruction", "input", "output", "system", "history", "prompt", "completion", "messages", "text", "tools", "chosen"
]
"""Name of a column that a format reads."""
AllLinear = Literal["all-linear", "all-linear+experts"]
"""Values of adapter.target_modules that are no names: see `rankscope.lora.targets`."""
ALL_LINEAR, ALL_LINEAR_AND_EXPERTS = get_args(AllLinear)


def doublings(low: int, high: int) -> list[int]:
    """`low` and its products with powers of two, up to `high`."""
    return [low << power for power in range(64) if low << power <= high]


def listed(value: Any, between: Callable[[int, int], Sequence[int]] | None = None) -> Any:
    """Values of a field that takes several: one, a list, or text such as `4,16..64`, also in a list. Ranges are what
    `between` makes of their ends. Raises StudyError: a range is none, or the field has none."""
    if isinstance(value, list | tuple):
        return [one for entry in value for one in (listed(entry, between) if isinstance(entry, str) else [entry])]
    if not isinstance(value, str):
        return [value] if isinstance(value, int | float) else value
    parts = [part.strip() for part in value.split(",") if part.strip()]
    return [one for part in parts for one in (_range(part, between) if _RANGE.search(part) else [part])]


def counted(low: int, high: int) -> Sequence[int]:
    return range(low, high + 1)


ranks_of, seeds_of = partial(listed, between=doublings), partial(listed, between=counted)
_RANGE = re.compile(r"\.\.|\d\s*[-:]\s*\d")  # or what another tool would read as one
_MOST_IN_RANGE = 1 << 20  # largest distance between the ends of a range


def _range(text: str, between: Callable[[int, int], Sequence[int]] | None) -> Sequence[Any]:
    unit = "r" * (text.count("r") == 2 and between is doublings)  # alphas that are multiples of the rank
    try:
        low, high = (int(end.strip().removesuffix(unit)) for end in text.split(".."))
        if between is None or not (between is not counted) <= low <= high <= low + _MOST_IN_RANGE:
            raise ValueError
    except ValueError:
        what = f"{text}: no such range; ranges are 8..64 of ranks and alphas, 0..4 of seeds"
        raise StudyError(what) from None
    return [f"{one}{unit}" if unit else one for one in between(low, high)]


def unique(values: tuple[Any, ...]) -> tuple[Any, ...]:
    if duplicates := sorted({str(value) for value in values if values.count(value) > 1}):
        raise ValueError(f"listed twice: {', '.join(duplicates)}")
    return values


def alpha_or_multiple(value: Any) -> Any:
    text = str(value).strip()
    try:
        number = float(text.removesuffix("r"))
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise ValueError("expected a number above 0, or a multiple of the rank such as 2r")
    return f"{repr(number).removesuffix('.0')}r" if text.endswith("r") else number


def alpha_or_alphas(value: Any) -> Any:
    """One alpha, or several different ones as a tuple; a list of one is that one."""
    several = listed(value, doublings)
    alphas = unique(tuple(map(alpha_or_multiple, several if isinstance(several, list | tuple) else [several])))
    if not alphas:
        raise ValueError("expected at least one")
    return alphas if len(alphas) > 1 else alphas[0]


def _names(value: Any, expected: str) -> tuple[str, ...]:
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names or not all(isinstance(name, str) and name for name in names):
        raise ValueError(f"expected {expected}")
    return tuple(names)


def all_linear_or_names(value: Any) -> Any:
    value = [part.strip() for part in value.split(",") if part.strip()] if isinstance(value, str) else value
    names = _names(value, f"{' or '.join(get_args(AllLinear))}, or names of modules such as q_proj")
    return names[0] if len(names) == 1 and names[0] in get_args(AllLinear) else names


def name_or_names(value: Any) -> Any:
    """One name, or several different ones as a tuple; a list of one is that one."""
    names = unique(_names(value, "a name, or a list of names"))
    return names if len(names) > 1 else names[0]


def columns_or_text(value: Any) -> Any:
    """Columns as a mapping, from text such as `prompt=question,completion=answer` or a list of such texts."""
    if isinstance(value, Mapping):
        unique(tuple(value.values()))
        return value
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
        raise ValueError("expected names of columns such as prompt=question,completion=answer")
    pairs = [part.partition("=") for text in texts for part in text.split(",")]
    if wrong := [name for name, equals, _ in pairs if not equals]:
        raise ValueError(f"{wrong[0]!r} is no pair such as prompt=question: the format's name, and the data's")
    names, columns = (tuple(pair[end].strip() for pair in pairs) for end in (0, 2))
    return dict(zip(unique(names), unique(columns), strict=True))


def column_of_a_format(value: Any) -> Any:
    if value not in get_args(Column):
        raise ValueError(f"no format reads a column of that name: expected one of {', '.join(get_args(Column))}")
    return value


class Frozen(BaseModel):
    # Attribute docstrings are the descriptions in the JSON schema.
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_not_one(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `true` for a number, which pydantic accepts. YAML reads a plain `off` as false."""
        values = value if isinstance(value, list | tuple) else [value]
        annotation = cls.model_fields[info.field_name or ""].annotation
        if value is False and "off" in get_args(annotation):
            return "off"
        if annotation is not bool and any(isinstance(one, bool) for one in values):
            raise ValueError("expected another value than true or false")
        return value


class FullTrial(Frozen):
    """Full fine-tuning at one learning rate with one seed."""

    learning_rate: PositiveFloat
    seed: int = Field(ge=0)

    @property
    def candidate_name(self) -> str:
        """A file name such as `full-lr2e-5`."""
        return f"{FULL}-lr{_short(self.learning_rate)}"

    @property
    def name(self) -> str:
        return f"{self.candidate_name}-s{self.seed}"


class Candidate(Frozen):
    """One adapter configuration."""

    rank: Count
    learning_rate: PositiveFloat
    lora_alpha: PositiveFloat
    target_modules: AllLinear | tuple[str, ...]
    lora_dropout: float
    use_rslora: bool
    init_lora_weights: Literal["kaiming", "gaussian"]
    peft: dict[str, Any] = {}
    variant: Literal["lora"] | Variant = PLAIN
    loraplus_lr_ratio: float = 1.0
    rank_pattern: tuple[tuple[str, int], ...] = ()
    alpha_in_name: bool = Field(default=False, exclude=True)  # where alpha is not the study's first

    def __hash__(self) -> int:
        return hash(self.name)  # options of PEFT are a mapping, which has none

    @property
    def name(self) -> str:
        """A file name such as `r008-lr2e-4`, `r008-lr2e-4-a16` or `r008-lr2e-4-pissa`; unique within a study. A study's
        first alpha is not in it, so that trials keep their names when alphas are added."""
        alpha = f"-a{self.lora_alpha:g}" if self.alpha_in_name else ""
        return f"r{self.rank:03d}-lr{_short(self.learning_rate)}{alpha}{self._ending}"

    @property
    def profile_name(self) -> str:
        """`r008`, or `r008-pissa`: cost depends neither on the learning rate nor on alpha."""
        return f"r{self.rank:03d}{self._ending}"

    @property
    def _ending(self) -> str:
        return "" if self.variant == PLAIN else f"-{self.variant}"

    @property
    def packable(self) -> bool:
        """Whether it can train in a pack. DoRA needs PEFT's own forward."""
        return self.variant != "dora"

    @property
    def scaling(self) -> float:
        """The factor of B A x: alpha/rank, or alpha/sqrt(rank) with `use_rslora`."""
        return self.lora_alpha / (self.rank**0.5 if self.use_rslora else self.rank)


class Trial(Frozen):
    """A candidate with one seed."""

    candidate: Candidate
    seed: int = Field(ge=0)

    @property
    def name(self) -> str:
        return f"{self.candidate.name}-s{self.seed}"


AnyTrial = Trial | FullTrial  # a trial of a candidate or of full fine-tuning


def alpha_of(alpha: float | str, rank: int) -> float:
    return float(alpha.removesuffix("r")) * rank if isinstance(alpha, str) else alpha


def divided(value: float, divisor: int) -> float:
    """Quotient in decimal arithmetic: a tenth of 3e-4 is 3e-5, not 2.9999999999999997e-5."""
    return float(Decimal(str(value)) / divisor)


def _short(value: float) -> str:
    """Shortest exact form that is safe in a file name: `0.0002` -> `2e-4`, `0.00015` -> `1.5e-4`."""
    digits = 0
    while float(f"{value:.{digits}e}") != value:
        digits += 1
    mantissa, exponent = f"{value:.{digits}e}".split("e")
    return f"{mantissa}e{int(exponent)}"
