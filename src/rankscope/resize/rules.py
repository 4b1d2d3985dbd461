"""The rule by which `rankscope resize` chooses ranks. Imports nothing heavy."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from rankscope.errors import StudyError
from rankscope.text.formats import parse_share


class Rule(NamedTuple):
    """Choice of ranks: the name of the option, and its value."""

    name: str
    value: float


def choose_rule(options: Mapping[str, Any]) -> Rule:
    """The only option with a value; the others are None. Raises StudyError: none or several are given, the rank is
    below 1, or the share not between 0 and 1."""
    given = {name: value for name, value in options.items() if value is not None}
    if len(given) != 1:
        found, known = " and ".join(map(option_name, given)) or "none", ", ".join(map(option_name, options))
        raise StudyError(f"one rule is needed, {found} given", f"Give exactly one of {known}.")
    ((name, value),) = given.items()
    option = option_name(name)
    if isinstance(value, int):
        if value < 1:
            raise StudyError(f"{option} {value}: not a rank", "Give 1 or more.")
        return Rule(name, value)
    try:
        share = parse_share(value)
    except ValueError:
        share = 1.0
    if share >= 1:
        raise StudyError(f"{option} {value}: not a share between 0 and 1", f"For example {option} 0.95, or 95%.")
    return Rule(name, share)


def option_name(name: str) -> str:
    return f"--{name.replace('_', '-')}"
