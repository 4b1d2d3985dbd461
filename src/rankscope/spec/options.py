"""The study that a file, options and `--set KEY=VALUE` ask for together."""

import copy
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, NamedTuple, Union, get_args, get_origin

import yaml

from rankscope.errors import StudyError, did_you_mean, shortened
from rankscope.spec.candidates import as_list
from rankscope.spec.models import CHATML, StudySpec, is_jinja
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.peft_options import read_adapter_config
from rankscope.spec.resolve import resolve_spec, short_form


class _Yaml(NamedTuple):
    """Values of YAML text, and the line of each field, e.g. of `training.steps`."""

    values: Any
    lines: dict[str, int]


def read_study_file(path: Path) -> dict[str, Any]:
    """Read a study's YAML as a mapping, which is not validated yet. Raises StudyError: the file is missing, is not
    YAML, has a field twice, or is not a mapping."""
    values = _parse_file(path).values
    if not isinstance(values, dict):
        found = "nothing" if values is None else type(values).__name__
        what = f"{path}: expected fields such as model and data, found {found}"
        raise StudyError(what, "studies/ has files to begin with.")
    return values


def _parse_file(path: Path) -> _Yaml:
    if not os.path.exists(path):
        raise StudyError(f"{path}: no such study file", "Give the path of a .yaml file, or use --model.")
    text = _text_of(path, "Give the path of a .yaml file.")
    try:
        return _parse(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise StudyError(f"{path}, line {line}: not valid YAML: {_problem(error)}", "Correct that line.") from None
    except Exception as error:  # YAML's constructors raise what they like: !!int x, a date that does not exist
        raise StudyError(f"{path}: not valid YAML: {_problem(error)}", "Correct the file.") from None


def _text_of(path: Path, todo: str) -> str:
    try:
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        line = error.object.count(b"\n", 0, error.start) + 1
        raise StudyError(f"{path}, line {line}: not valid UTF-8", "Save the file as UTF-8.") from None
    except OSError as error:
        raise StudyError(f"{path}: cannot be read: {error.strerror}", todo) from None


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
    return str(getattr(error, "problem", None) or error or type(error).__name__).split("\n")[0]


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set training.steps=200` to a nested mapping, in place. The value is YAML; that of a text field is
    taken literally, unless it is in quotes, or `null` or `~` for none. Raises StudyError: it is not KEY=VALUE, or the
    value is missing or not YAML."""
    key, equals, text = assignment.partition("=")
    shown = shortened(assignment, 200)
    if not equals or not key:
        raise StudyError(f"--set {shown}: expected KEY=VALUE", "For example --set training.steps=200.")
    try:
        value = _value(text, _types(key))
    except Exception as error:
        what = f"--set {shown}: the value is not valid YAML: {_problem(error)}"
        raise StudyError(what, "Put it in quotes.") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        raise StudyError(f"--set {shown}: no value is given", f"For none, write --set {key}=null.")
    set_field(values, key, value)


def _value(text: str, types: set[Any]) -> Any:
    """Value of an assignment's text for a field of these types; None if nothing is given."""
    stripped = text.strip()
    if str not in types or not types <= {str, _SEVERAL, type(None)} or not stripped:
        return _parse(text).values
    if type(None) in types and stripped.lower() in ("null", "~"):
        return None
    if _QUOTED.fullmatch(stripped):  # a line break in quotes stays one, which YAML reads as a space
        single = stripped.startswith("'")
        return stripped[1:-1].replace("''", "'") if single else _parse(stripped.replace("\n", "\\n")).values
    if _SEVERAL in types:
        with suppress(Exception):
            names = _parse(text).values
            if isinstance(names, list) and all(isinstance(name, str) for name in names):
                return names
    return text


_SEVERAL = tuple[str, ...]
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)


def _types(key: str) -> set[Any]:
    """Types that a field such as `training.steps` takes; None alone for an unknown field."""
    annotation: Any = StudySpec
    for part in key.split("."):
        field = getattr(annotation, "model_fields", {}).get(part)
        annotation = field and field.annotation
    return _members(annotation)


def _members(annotation: Any) -> set[Any]:
    """Types in a union; the type itself if it is none."""
    origin, inner = get_origin(annotation), get_args(annotation)
    if origin in (Union, UnionType):
        return set().union(*map(_members, inner))
    return _members(inner[0]) if origin is Annotated else {annotation}


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
    """Study from a file's values, options over them (None for those not given), and `--set` assignments over both. A
    chat template's file is replaced by its text, so that the study stands alone. Errors name `file`, from which the
    values were read, and the line of a wrong value. Raises StudyError: an option or field is unknown or wrong."""
    merged = copy.deepcopy(dict(values))
    if options.get("alpha") is not None and options.get("alphas") is not None:
        raise StudyError("alpha and alphas are the same field", "Give one of them.")
    if (config := options.get("adapter_config")) is not None:
        if not isinstance(config, str | Path):
            raise StudyError(f"adapter_config: {config!r} is no path", "Give an adapter_config.json, or its folder.")
        for field, value in read_adapter_config(Path(config)).items():
            set_field(merged, field, value)
    for option, value in options.items():
        if option not in OPTIONS:
            what = f"{option}: unknown option{did_you_mean(option, OPTIONS)}"
            raise StudyError(what, f"Known: {', '.join(OPTIONS)}.")
        if value is not None and option != "adapter_config":
            set_field(merged, OPTIONS[option].field, value)
    training = merged.get("training")
    for given, other in (("steps", "epochs"), ("epochs", "steps")):  # a length given by option replaces the file's
        if isinstance(training, dict) and options.get(given) is not None and options.get(other) is None:
            training.pop(other, None)
    verdict = merged.get("verdict")
    if isinstance(verdict, dict) and options.get("margin_of") is not None and options.get("margin") is None:
        verdict.pop("margin", None)  # the file's is a share of something else
    for assignment in assignments:
        set_value(merged, assignment)
    named = "name" in merged
    merged.setdefault("name", _default_name(merged))
    fields = [OPTIONS[option].field for option in options if options[option] is not None]
    fields += [assignment.partition("=")[0] for assignment in assignments]
    over = tuple(f"{field}." for field in fields)
    in_file = file is not None and not "data.chat_template.".startswith(over)
    _read_chat_template(merged, [file.parent, Path()] if file and in_file else [Path()])
    if file is None:
        spec = resolve_spec(merged)
    else:
        lines = {name: line for name, line in _parse_file(file).lines.items() if not f"{name}.".startswith(over)}
        spec = resolve_spec(merged, f"the study {file}", lines)
    if not named:
        spec.model_fields_set.discard("name")  # nobody wrote it: see `rankscope.study.growth`
    return spec


def _read_chat_template(values: dict[str, Any], folders: Sequence[Path]) -> None:
    """Replace a chat template's file, in the first of `folders` that has it, by its text, in place."""
    data = values.get("data")
    given = data.get("chat_template") if isinstance(data, dict) else None
    if not isinstance(data, dict) or not isinstance(given, str) or given == CHATML or is_jinja(given):
        return
    files = (folder / os.path.expanduser(given) for folder in folders)
    if file := next(filter(os.path.isfile, files), None):
        todo = "Give a file that holds a chat template alone."
        text = _text_of(file, todo)
        if file.suffix == ".json" or not is_jinja(text):  # a tokenizer_config.json holds one among other things
            raise StudyError(f"data.chat_template: {file} is no Jinja template", todo)
        data["chat_template"] = text


def _default_name(values: Mapping[str, Any]) -> str:
    groups = [values.get(name) for name in ("model", "data")]
    ids = [as_list(group.get("id")) for group in groups if isinstance(group, dict)]
    parts = [part for several in ids if isinstance(several, list | tuple) for part in several]
    words = [re.sub(r"[^A-Za-z0-9._-]+", "-", Path(part).stem).strip("-._") for part in parts if isinstance(part, str)]
    return "-".join(filter(None, words))[:100] or "study"


def comma_list(name: str, text: str) -> list[Any]:
    """Values of an option's text. Of ranks `4..64` is 4, 8, 16 up to 64; of seeds `0..4` is 0, 1, 2, 3, 4. Raises
    StudyError: the ends of a range are not whole numbers in order."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    if name == "target_modules":
        return parts
    return [number for part in parts for number in (_range(name, part) if ".." in part else [one_number(part)])]


def _range(name: str, text: str) -> Sequence[Any]:
    low, _, high = (one_number(end.strip()) for end in text.partition(".."))
    whole = name in ("ranks", "seeds") and isinstance(low, int) and isinstance(high, int)
    if not whole or not (0 if name == "seeds" else 1) <= low <= high <= low + MOST_IN_RANGE:
        todo = "Ranges are of ranks (8..64) or seeds (0..4): two whole numbers, the lower first."
        raise StudyError(f"--{name.replace('_', '-')} {text}: no such range", todo)
    return doublings(low, high) if name == "ranks" else range(low, high + 1)


MOST_IN_RANGE = 1 << 20  # largest distance between the ends of a range


def doublings(low: int, high: int) -> list[int]:
    """`low` and its products with powers of two, up to `high`."""
    return [low << power for power in range(64) if low << power <= high]


def one_number(text: str) -> Any:
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
