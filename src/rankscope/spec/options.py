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
from rankscope.files import no_such
from rankscope.spec.models import CHATML, StudySpec, is_jinja
from rankscope.spec.names import INSTEAD, field_of, type_of
from rankscope.spec.option_table import OPTIONS
from rankscope.spec.peft_options import read_adapter_config
from rankscope.spec.resolve import resolve_spec, short_form

_MERGE = "tag:yaml.org,2002:merge"
_SEVERAL = tuple[str, ...]
_QUOTED = re.compile(r"""'(?:[^']|'')*'|"(?:[^"\\]|\\.)*\"""", re.DOTALL)
_REPLACES = (("training", "steps", "epochs"), ("training", "epochs", "steps"), ("verdict", "margin_of", "margin"))
"""Fields of a group that replace another of the file, where they are given by option."""


class _Yaml(NamedTuple):
    """Values of YAML text, and the line of each field, e.g. of `training.steps`."""

    values: Any
    lines: dict[str, int]


def read_study_file(path: Path) -> dict[str, Any]:
    """Read a study's YAML as a mapping, which is not validated yet. Raises StudyError: the file is missing, is not
    YAML, has a field twice, or is not a mapping."""
    values: dict[str, Any] = _parse_file(path).values
    return values


def _parse_file(path: Path) -> _Yaml:
    if not os.path.exists(path):
        raise StudyError(no_such(path, "study file"), "Give the path of a .yaml file, or use --model.")
    text = _text_of(path, "Give the path of a .yaml file.")
    try:
        found = _parse(text)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise StudyError(f"{path}, line {line}: not valid YAML: {_problem(error)}", "Correct that line.") from None
    except Exception as error:  # YAML's constructors raise what they like: !!int x, a date that does not exist
        raise StudyError(f"{path}: not valid YAML: {_problem(error)}", "Correct the file.") from None
    if not isinstance(found.values, dict):
        kind = "nothing" if found.values is None else type(found.values).__name__
        what = f"{path}: expected fields such as model and data, found {kind}"
        raise StudyError(what, "`rankscope init` writes a file to begin with.")
    for name, field in rename(found.values).items():
        below = [line for line in found.lines if f"{line}.".startswith(f"{name}.")]
        found.lines.update({line.replace(name, field, 1): found.lines[line] for line in below})
    return found


def rename(values: dict[str, Any]) -> dict[str, str]:
    """Put what has another name where it belongs, in place (see `rankscope.spec.names`), and return the fields of these
    names. Raises StudyError: a field is there under two names."""
    moved: dict[str, str] = {}
    groups = [(f"{name}.", group) for name, group in values.items() if isinstance(group, dict)]
    for prefix, group in [("", values), *groups]:
        for name in [name for name in group if isinstance(name, str) and "." not in name]:
            field = field_of(f"{prefix}{name}", group[name])
            if field == f"{prefix}{name}":
                continue
            moved[f"{prefix}{name}"], value = field, group.pop(name)
            parent, _, last = field.rpartition(".")
            if isinstance(there := values.get(parent) if parent else values, dict) and there.get(last) is not None:
                raise StudyError(f"{prefix}{name} and {field} are the same field", "Give one of them.")
            set_field(values, field, value)
    return moved


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


def _problem(error: Exception) -> str:
    return str(getattr(error, "problem", None) or error or type(error).__name__).split("\n")[0]


def set_value(values: dict[str, Any], assignment: str) -> None:
    """Apply one `--set training.steps=200` to a nested mapping, in place. The value is YAML; that of a text field is
    taken literally, unless it is in quotes, or `null` or `~` for none. Raises StudyError: it is not KEY=VALUE, or the
    value is missing or not YAML."""
    key, equals, text = assignment.partition("=")
    key, shown = field_of(key), shortened(assignment, 200)
    if not equals or not key:
        raise StudyError(f"--set {shown}: expected KEY=VALUE", "For example --set training.steps=200.")
    try:
        value = _value(text, _members(type_of(key)))
    except Exception as error:
        what = f"--set {shown}: the value is not valid YAML: {_problem(error)}"
        raise StudyError(what, "Put it in quotes.") from None
    if value is None and text.strip().lower() not in ("null", "~"):
        raise StudyError(f"--set {shown}: no value is given", f"For none, write --set {key}=null.")
    set_field(values, field_of(key, value), value)


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
    rename(merged)
    if (config := options.get("adapter_config")) is not None:
        if not isinstance(config, str | Path):
            raise StudyError(f"adapter_config: {config!r} is no path", "Give an adapter_config.json, or its folder.")
        for field, value in read_adapter_config(Path(config)).items():
            set_field(merged, field, value)
    given: dict[str, str] = {}  # option of each field that has one
    for option, value in options.items():
        field = OPTIONS[option].field if option in OPTIONS else field_of(option)
        if not type_of(field):
            hint = f"; {INSTEAD[option]}" if option in INSTEAD else did_you_mean(option, OPTIONS)
            raise StudyError(f"{option}: unknown option{hint}", f"Known: {', '.join(OPTIONS)}.")
        if value is not None and given.setdefault(field, option) != option:
            raise StudyError(f"{given[field]} and {option} are the same field", "Give one of them.")
        if value is not None and option != "adapter_config":
            set_field(merged, field, value)
    for group, one, other in _REPLACES:
        if f"{group}.{one}" in given and f"{group}.{other}" not in given and isinstance(merged.get(group), dict):
            merged[group].pop(other, None)
    for assignment in assignments:
        set_value(merged, assignment)
    over = tuple(f"{field}." for field in [*given, *(field_of(one.partition("=")[0]) for one in assignments)])
    in_file = file is not None and not "data.chat_template.".startswith(over)
    _read_chat_template(merged, [file.parent, Path()] if file and in_file else [Path()])
    if file is None:
        spec = resolve_spec(merged)
    else:
        lines = {name: line for name, line in _parse_file(file).lines.items() if not f"{name}.".startswith(over)}
        spec = resolve_spec(merged, f"the study {file}", lines)
    if "name" not in merged:
        spec = spec.model_copy(update={"name": _default_name(spec)})
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


def _default_name(spec: StudySpec) -> str:
    stems = (Path(id).stem for id in (spec.model.id, *spec.data.ids))
    words = (re.sub(r"[^A-Za-z0-9._-]+", "-", stem).strip("-._") for stem in stems)
    return "-".join(filter(None, words))[:100] or "study"


QUICK_STEPS, QUICK_ROWS = 200, 2000


def quick_look(spec: StudySpec) -> StudySpec:
    """The question as `--quick` asks it: at most three of its ranks (the lowest, a middle one, the highest), two seeds,
    200 steps, one epoch and 2,000 rows, a quarter of them held out at most."""
    ranks, training, data = sorted(spec.ranks), spec.training, spec.data
    rows, length = QUICK_ROWS, dict[str, Any](steps=training.steps and min(training.steps, QUICK_STEPS))
    if training.steps is None:  # no more rows than these steps need
        rows, length = min(rows, QUICK_STEPS * training.effective_batch_size), {"epochs": min(training.epochs or 1, 1)}
    rows = min(rows, data.max_rows or rows)
    held_out = {"eval_rows": max(1, min(data.eval_rows, rows // 4))} if data.eval_rows else {}
    less = {
        "ranks": tuple(dict.fromkeys((ranks[0], ranks[len(ranks) // 2], ranks[-1]))),
        "seeds": spec.seeds[:2],
        "seeds_by_rank": {},
        "training": training.model_copy(update=length),
        "data": data.model_copy(update={"max_rows": rows, **held_out}),
    }
    return spec.model_copy(update=less)
