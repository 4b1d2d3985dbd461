"""The rule by which `rankscope resize` chooses ranks. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankscope.errors import StudyError


class Rule(NamedTuple):
    """Choice of ranks: the name of the option, and its value."""

    name: str
    value: float


def choose_rule(options: Mapping[str, Any]) -> Rule:
    """The only option with a value; the others are None. Raises StudyError: none or several are given, the rank is
    below 1, or the share not between 0 and 1."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        found, all_options = " and ".join(map(option_name, given)) or "none", ", ".join(map(option_name, options))
        raise StudyError(f"one rule is needed, {found} given", f"Give exactly one of {all_options}.")
    ((name, value),) = given.items()
    if isinstance(value, int) and value < 1:
        raise StudyError(f"{option_name(name)} {value}: not a rank", "Give 1 or more.")
    return Rule(name, value if isinstance(value, int) else _share(option_name(name), value))


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def _share(option: str, text: str) -> float:
    """`0.5%` or `0.005`."""
    try:
        value = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    except ValueError:
        value = 0.0
    if not 0 < value < 1:
        raise StudyError(f"{option} {text}: not a share between 0 and 1", f"For example {option} 0.95, or 95%.")
    return value
