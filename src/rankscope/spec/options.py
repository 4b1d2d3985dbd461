"""The study that a file, options and `--set KEY=VALUE` ask for together."""

import copy
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from rankscope.errors import StudyError, did_you_mean
from rankscope.spec.candidates import as_list
from rankscope.spec.models import StudySpec
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.resolve import resolve_spec, short_form


class _Yaml(NamedTuple):
    """Values of YAML text, and the line of each field, e.g. of `training.steps`."""

    values: Any
    lines: dict[str, int]


def read_study_file(path: Path) -> dict[str, Any]:
    """Read a study's YAML as a mapping, which is not validated yet.

    Raises:
        StudyError: the file is missing, is not YAML, has a field twice, or is not a mapping.
    """
    values = _parse_file(path).values
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        what = f"{path}: expected fields such as model and data, found {found}"
        raise StudyError(what, "studies/ has files to begin with.")
    return values


def _parse_file(path: Path) -> _Yaml:
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise StudyError(f"{path}: no such study file", "Give the path of a .yaml file, or use --model.") from None
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StudyError(f"{path}, line {line}: not valid UTF-8", "Save the file as UTF-8.") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}", "Give the path of a .yaml file.") from None
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise StudyError(f"{path}, line {line}: not valid YAML: {_problem(error)}", "Correct that line.") from None
    except Exception as error:  # YAML's constructors raise what they like: !!int x, a date that does not exist
        raise StudyError(f"{path}: not valid YAML: {_problem(error)}", "Correct the file.") from None


def _parse(text: str) -> _Yaml:
    """Load YAML safely, with lines. A repeated field is an error: its first value would be lost silently."""
    loader = yaml.SafeLoader(text)
    try:
        node = loader.get_single_node()
        lines: dict[str, int] = {}
        for field, mark in _fields(node, "", set()) if node else ():
            if field in lines:
                raise yaml.MarkedYAMLError(problem=f"{field} is on line {lines[field]} already", problem_mark=mark)
            lines[field] = mark.line + 1
        return _Yaml(loader.construct_document(node) if node else None, lines)
    finally:
        loader.dispose()


def _fields(node: yaml.Node, prefix: str, seen: set[int]) -> Iterator[tuple[str, yaml.Mark]]:
    """All fields below `node` with their positions; a node that aliases repeat is visited once."""
    if id(node) in seen:
        return
    seen.add(id(node))
    inner: list[tuple[str, yaml.Mark, yaml.Node]] = []
    if isinstance(node, yaml.MappingNode):
        inner = [(str(key.value), key.start_mark, value) for key, value in node.value if key.tag != _MERGE]
    elif isinstance(node, yaml.SequenceNode):
        inner = [(str(number), item.start_mark, item) for number, item in enumerate(node.value)]
    for name, mark, value in inner:
        yield prefix + name, mark
        yield from _fields(value, f"{prefix}{name}.", seen)


_MERGE = "tag:yaml.org,2002:merge"


def _problem(error: Exception) -> str:
    """First line of an error's problem."""
    return str(getattr(error, "problem", None) or error or type(error).__name__).split("\n")[0]


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set training.steps=200` to a nested mapping, in place; the value is YAML.

    Raises:
        StudyError: it is not KEY=VALUE, or the value is missing or not YAML.
    """
    key, equals, text = assignment.partition("=")
    if not equals or not key:
        raise StudyError(f"--set {assignment}: expected KEY=VALUE", "For example --set training.steps=200.")
    try:
        value = _parse(text).values
    except Exception as error:
        what = f"--set {assignment}: the value is not valid YAML: {_problem(error)}"
        raise StudyError(what, "Put it in quotes.") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        raise StudyError(f"--set {assignment}: no value is given", f"For none, write --set {key}=null.")
    set_field(values, key, value)


def set_field(values: dict[str, Any], key: str, value: Any) -> None:
    """Set a field such as `training.steps` in a nested mapping, in place."""
    *parents, last = key.split(".")
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            what = f"{key}: {parent} is {short_form(target)}, not a group of fields"
            raise StudyError(what, "Name a field such as model.id.")
    target[last] = value


def assemble(
    values: Mapping[str, Any], options: Mapping[str, Any], assignments: Sequence[str] = (), file: Path | None = None
) -> StudySpec:
    """Study from a file's values, options over them (None for those not given), and `--set` assignments over both.

    Errors name `file`, from which the values were read, and the line of a wrong value.

    Raises:
        StudyError: an option or field is unknown or wrong.
    """
    merged = copy.deepcopy(dict(values))
    for option, value in options.items():
        if option not in OPTIONS:
            raise StudyError(
                f"{option}: unknown option{did_you_mean(option, OPTIONS)}", f"Known: {', '.join(OPTIONS)}."
            )
        if value is not None:
            set_field(merged, OPTIONS[option].field, value)
    training = merged.get("training")
    for given, other in (("steps", "epochs"), ("epochs", "steps")):  # a length given by option replaces the file's
        if isinstance(training, dict) and options.get(given) is not None and options.get(other) is None:
            training.pop(other, None)
    for assignment in assignments:
        set_value(merged, assignment)
    merged.setdefault("name", _default_name(merged))
    if file is None:
        return resolve_spec(merged)
    over = [OPTIONS[option].field + "." for option in options if options[option] is not None]
    over += [assignment.partition("=")[0] + "." for assignment in assignments]
    lines = {name: line for name, line in _parse_file(file).lines.items() if not f"{name}.".startswith(tuple(over))}
    return resolve_spec(merged, f"the study {file}", lines)


def _default_name(values: Mapping[str, Any]) -> str:
    groups = [values.get(name) for name in ("model", "data")]
    ids = [as_list(group.get("id")) for group in groups if isinstance(group, dict)]
    parts = [part for several in ids if isinstance(several, list | tuple) for part in several]
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(part).stem).strip("-._") for part in parts if isinstance(part, str)]
    return "-".join(filter(None, words))[:100] or "study"


def comma_list(name: str, text: str) -> list[Any]:
    parts = [part.strip() for part in text.split(",") if part.strip()]
    return parts if name == "target_modules" else [one_number(part) for part in parts]


def one_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
