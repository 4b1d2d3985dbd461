"""Fields of a study by their names, and by those that other tools have for them: names.yaml."""

from importlib import resources
from typing import Any

import yaml

from rankscope.spec.models import StudySpec

_KNOWN = yaml.safe_load((resources.files("rankscope.spec") / "names.yaml").read_text(encoding="utf-8"))
_FIELDS: dict[str, str] = {name: field for field, names in _KNOWN["fields"].items() for name in names.split()}
INSTEAD: dict[str, str] = {name: told for names, told in _KNOWN["instead"].items() for name in names.split()}


def type_of(field: str) -> Any:
    """Type of a field such as `training.steps`, of a group its model; None where there is no such field."""
    found: Any = StudySpec
    for part in field.split("."):
        known = getattr(found, "model_fields", {}).get(part)
        found = known and known.annotation
    return found


def description_of(field: str) -> str:
    """The words of a field such as `training.steps`, which has to exist."""
    group, _, name = field.rpartition(".")
    model = type_of(group) if group else StudySpec
    return str(model.model_fields[name].description)


def field_of(name: str, value: Any = None) -> str:
    """The field that a name means: its own, that of another tool's name in any group, or outside groups (`batch_size`)
    that of the only group that has one; else the name itself. A model or data with text for a `value` is its id."""
    group, _, last = name.rpartition(".")
    field = name
    if not type_of(name) and "." not in group and last not in INSTEAD:
        groups = [f"{other}.{last}" for other in StudySpec.model_fields if type_of(f"{other}.{last}") and not group]
        field = _FIELDS.get(last) or (groups[0] if len(groups) == 1 else name)
    return f"{field}.id" if isinstance(value, str | list) and type_of(f"{field}.id") else field
