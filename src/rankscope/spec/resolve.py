"""Studies from mappings, with errors that name every wrong field, and studies as YAML."""

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import yaml
from pydantic import BaseModel, ValidationError

from rankscope.errors import StudyError, shortened
from rankscope.spec.models import StudySpec
from rankscope.spec.names import INSTEAD, type_of

MAX_ERRORS_SHOWN = 5  # wrong fields in one message
LOG = "log"  # field of study.yaml in a study's directory: what was added, and when


def resolve_spec(
    values: Mapping[str, Any], source: str = "the study", lines: Mapping[str, int] | None = None
) -> StudySpec:
    """Validate a nested mapping. The `log` of a study's directory is no part of the question. Errors name its `source`,
    and the line of a field where `lines` has it. Raises StudyError: a field is unknown, missing or wrong; the message
    names each, and the nearest valid name."""
    try:
        return StudySpec.model_validate({name: value for name, value in values.items() if name != LOG})
    except ValidationError as error:
        found = list(dict.fromkeys(_explain(dict(detail), values, lines or {}) for detail in error.errors()))
        shown = [f"  - {line}" for line in found[:MAX_ERRORS_SHOWN]] + ["  - ..."] * (len(found) > MAX_ERRORS_SHOWN)
        todo = "Correct these fields and run again; `rankscope run --help` and `rankscope schema` show valid ones."
        raise StudyError(f"{source} is wrong:\n" + "\n".join(shown), todo) from None


def _explain(detail: dict[str, Any], values: Any, lines: Mapping[str, int]) -> str:
    path = [str(part) for part in detail["loc"] if part != "[key]"]
    field = _place(detail["loc"], values) or "study"
    parents = (".".join(path[:length]) for length in range(len(path), 0, -1))  # `training.steps`, `training`
    line = next((lines[name] for name in parents if name in lines), None)
    where = f"line {line}, {field}" if line else field
    if detail["type"] == "extra_forbidden":
        return f"{where}: unknown field; {_suggestion(path)}"
    message = str(detail["msg"]).removeprefix("Value error, ")
    if detail["type"] == "model_type":
        message = f"expected a group of the fields {', '.join(_fields(path))}"
    elif detail["type"] == "too_short":
        message = "expected at least one"
    given = detail.get("input")
    shown = "" if detail["type"] == "missing" or isinstance(given, dict | BaseModel) else f" (got {short_form(given)})"
    return f"{where}: {message}{shown}"


def _place(path: Sequence[str | int], values: Any) -> str:
    """Where `values` have what pydantic complains of: `training.steps`, or `ranks, 2nd value`."""
    place = ""
    for part in path:
        if isinstance(part, int) and not isinstance(values, Mapping):
            nth = part + 1
            ending = {1: "st", 2: "nd", 3: "rd"}.get(nth % (100 if nth % 100 < 20 else 10), "th")
            place += f", {nth}{ending} value"
        elif part != "[key]":  # pydantic's sign of a mapping's wrong key
            name = str(part)
            place += "." * bool(place) + (name if name.isprintable() and len(name) < 60 else short_form(name))
        values = values.get(part) if isinstance(values, Mapping) else None
    return place


def short_form(value: Any) -> str:
    """A value for an error message: one line, truncated."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no number of more than 4,300 digits
        text = "a number of thousands of digits"
    return shortened(text, 80)


def _suggestion(path: Sequence[str]) -> str:
    """Hint at the nearest field of the same group, else of any group."""
    *group, name = path
    if name in INSTEAD:
        return INSTEAD[name]
    known = _fields(group)
    elsewhere = {field: field for field in _fields([]) if group}
    elsewhere |= {f"{other}.{field}": field for other in _fields([]) if [other] != group for field in _fields([other])}
    same_name = [full for full, field in elsewhere.items() if field == name]
    near = difflib.get_close_matches(name, known, n=1)
    near_elsewhere = difflib.get_close_matches(name, elsewhere.values(), n=1)
    fitting = same_name or near or [full for full, field in elsewhere.items() if field in near_elsewhere]
    return f"did you mean {' or '.join(fitting)}?" if fitting else f"known: {', '.join(known)}"


def _fields(path: Sequence[str]) -> list[str]:
    """Names of a group's fields, the study's own for an empty path; empty for an unknown group."""
    return sorted(getattr(type_of(".".join(path)) if path else StudySpec, "model_fields", ()))


def write_yaml(spec: BaseModel, log: Sequence[Mapping[str, Any]] = ()) -> str:
    """YAML text of a complete study; `resolve_spec(yaml.safe_load(text))` gives the same study."""
    values = spec.model_dump(mode="json") | ({LOG: list(log)} if log else {})
    return yaml.dump(values, Dumper=YamlDumper, sort_keys=False, allow_unicode=True)


class YamlDumper(yaml.SafeDumper):
    """Dumper that quotes U+0085, which PyYAML writes bare and reads as the end of a line."""

    def represent_str(self, text: str) -> yaml.ScalarNode:
        return self.represent_scalar("tag:yaml.org,2002:str", text, style='"' if "\x85" in text else None)


YamlDumper.add_representer(str, YamlDumper.represent_str)
