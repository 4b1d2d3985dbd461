"""Sources: files, folders, patterns, URLs and hub ids as the rows to train on and those to evaluate on.

A folder, data on the hub and a single file are read by the same readers. Nothing from the data is ever executed: there
are no loading scripts, and only files of plain rows are read.
"""

import functools
import glob
import hashlib
import json
import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from rankscope import hub
from rankscope.data.folders import SPLITS, divide
from rankscope.data.readers import FILE_TYPES, Part, expanded, file_part, file_type, listed
from rankscope.errors import DataError, reason_of
from rankscope.files import no_such, published
from rankscope.hub import HUB_ID
from rankscope.spec.models import EMBEDDED, DataSpec

_SAVED_FILE = re.compile(r"(\w[\w.-]*)?/\w[\w.-]*\.arrow")  # split/file of data saved by `save_to_disk`


class Source(NamedTuple):
    """Rows of one split of a file, a folder or a hub data set."""

    name: str  # as the study names it, for errors
    parts: tuple[Part, ...]
    revision: str | None = None  # the hub's commit; None for local data
    notes: tuple[str, ...] = ()


class Splits(NamedTuple):
    """All splits of a source. Files on the hub are fetched when their rows are asked for."""

    name: str
    parts: Mapping[str, Sequence[Part]]  # by split
    revision: str | None = None
    notes: tuple[str, ...] = ()
    named: bool = True  # whether the data have splits; False for a file or a pattern without


def resolve_sources(spec: DataSpec) -> tuple[list[Source], list[Source]]:
    """Sources to train on and to evaluate on; the second is empty where rows are to be held out.

    A local file or folder takes precedence over the hub. Where the data have a split `validation` or `test` beside
    `train`, and the study names neither a split nor an evaluation set, that split is evaluated on. Raises DataError: a
    source is missing, of an unknown type, has no such split, or cannot be fetched.
    """
    every = [_splits(id, spec) for id in _each(spec.ids)]
    chosen = [_chosen(found, spec) for found in every]
    others: list[str | None] = [None] * len(every)
    if spec.eval_split is not None:
        others = [_named_split(found, spec.eval_split, "data.eval_split") for found in every]
    elif spec.split is None and not spec.eval_dataset and set(chosen) == {"train"}:
        beside = [_first_of(found, "validation", "test") for found in every]
        others = beside if all(beside) else others  # of a mixture every part must be held out
    pairs = list(zip(every, chosen, others, strict=True))
    train = [_source(found, split, other, say=spec.split is None) for found, split, other in pairs]
    evaluated = [_source(found, other, say=False) for found, _, other in pairs if other]
    for id in _each(spec.eval_ids):
        found = _splits(id, _of_evaluation(spec))
        split = next(iter(found.parts)) if len(found.parts) == 1 else _first_of(found, "test", "validation", "train")
        if split is None:
            raise _no_split(found, "test", "Choose one of them: data.eval_dataset.")
        evaluated.append(_source(found, split, say=len(found.parts) > 1))
    return train, evaluated


def _first_of(found: Splits, *names: str) -> str | None:
    return next((name for name in names if name in found.parts), None)


def _of_evaluation(spec: DataSpec) -> DataSpec:
    """Settings by which an evaluation set of its own is read."""
    return spec.model_copy(update={"config": None, "revision": None})


def check_local(spec: DataSpec) -> None:
    """Raise DataError where a local source is missing, of an unknown type, or of splits that cannot be told apart:
    all that takes neither the network nor a row."""
    for ids, own in ((spec.ids, spec), (spec.eval_ids, _of_evaluation(spec))):
        for id in _each(ids):
            if id != EMBEDDED and not _is_url(id) and not _is_on_hub(id):
                _splits(id, own)


def _is_url(id: str) -> bool:
    return id.startswith(("http://", "https://"))


def _is_here(id: str) -> bool:
    return os.path.exists(os.path.expanduser(id))  # unlike Path's own, False for a name that is no valid path


def _is_on_hub(id: str) -> bool:
    """Whether an id of data, or of general text, can be that of a data set on the hub."""
    is_file = file_type(id) in (*FILE_TYPES, ".txt") or expanded(id) != id.lower()
    return not (id == EMBEDDED or is_file or _is_here(id)) and HUB_ID.fullmatch(id) is not None


def _each(ids: Sequence[str]) -> Iterator[str]:
    """Ids one by one; one that names no file may be several, separated by commas."""
    for id in ids:
        yield from [id] if _is_here(id) else filter(None, (part.strip() for part in id.split(",")))


def _source(found: Splits, split: str, other: str | None = None, *, say: bool) -> Source:
    """Source of a split, or of several with + between them; where `say`, with a note on what stays unread, or was taken
    though nobody asked for it."""
    chosen = split.split("+")
    if wrong := [one for one in chosen if one not in found.parts]:
        todo = "Name whole splits, with + between several; data.max_rows takes the first rows."
        raise _no_split(found, wrong[0], todo)
    notes = list(found.notes)
    if say and found.named:
        unread = [name for name in found.parts if name not in (split, other)]
        notes += [f"{found.name}: the split {other} is the evaluation set"] if other else []
        notes += [f"{found.name}: not read: the split{'s' * (len(unread) > 1)} {listed(unread)}"] if unread else []
        notes += [f"{found.name}: its only split is {split}"] if split != "train" and len(found.parts) == 1 else []
    parts = chain.from_iterable(found.parts[one] for one in chosen)
    return Source(found.name, tuple(parts), found.revision, tuple(notes))


def _chosen(found: Splits, spec: DataSpec) -> str:
    """Split to train on. Raises DataError if there is no such split, or none is meant."""
    if spec.split not in (None, "train") and not found.named:  # studies of earlier versions name `train`
        raise DataError(f"{found.name}: data.split is {spec.split!r}, but local data has no split", "Remove it.")
    if spec.split is None and len(found.parts) == 1:
        return next(iter(found.parts))
    if spec.split not in found.parts and re.search(r"[+\[]", spec.split or ""):
        return str(spec.split)
    return _named_split(found, spec.split or "train", "data.split")


def _named_split(found: Splits, name: str, field: str) -> str:
    split = _first_of(found, name, SPLITS.get(name, name))
    if split is None:
        raise _no_split(found, name, f"Choose one of them: {field}.")
    return split


def _no_split(found: Splits, name: str, todo: str) -> DataError:
    return DataError(f"{found.name}: no split {name}, only {listed(found.parts)}", todo)


def _splits(id: str, spec: DataSpec) -> Splits:
    path = Path(os.path.expanduser(id))
    if os.path.isfile(path):
        _refuse_hub_fields(id, spec, "config", "revision")
        return Splits(str(path), {"train": [file_part(path)]}, named=False)
    if os.path.isdir(path):
        _refuse_hub_fields(id, spec, "revision")
        return _saved(path, id, spec) or _folder(path, id, spec)
    if _is_url(id):
        return Splits(id, {"train": [file_part(_downloaded(id), id)]}, named=False)
    if glob.has_magic(id):
        files = sorted(file for file in glob.glob(os.path.expanduser(id), recursive=True) if os.path.isfile(file))
        if not files:
            raise DataError(f"{id}: no file matches this pattern", "Check the path; quote the pattern.")
        common = os.path.commonpath([os.path.dirname(os.path.abspath(file)) for file in files])
        below = {Path(os.path.relpath(file, common)).as_posix(): Path(file) for file in files}
        return _divided(id, list(below), "", spec, lambda file: file_part(below[file]))
    if not _is_on_hub(id):
        raise DataError(no_such(id), "Check the path, or give a hub id such as owner/name.")
    return _hub(id, spec)


def _refuse_hub_fields(id: str, spec: DataSpec, *fields: str) -> None:
    """Raise DataError if a field is set that local data cannot honour, which would select other rows than intended."""
    for field in fields:
        if (value := getattr(spec, field)) is not None:
            raise DataError(f"{id}: data.{field} is {value!r}, but local data has no {field}", "Remove it.")


def _folder(path: Path, id: str, spec: DataSpec) -> Splits:
    files = [file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file()]
    readme = path / "README.md"
    text = readme.read_text(encoding="utf-8", errors="replace") if readme.is_file() else ""
    return _divided(id, files, text, spec, lambda file: file_part(path / file))


def _divided(
    name: str, files: Sequence[str], readme: str, spec: DataSpec, part: Callable[[str], Part], commit: str | None = None
) -> Splits:
    splits, notes = divide(files, readme, spec.config, name)
    return Splits(name, {split: list(map(part, own)) for split, own in splits.items()}, commit, tuple(notes))


def _saved(path: Path, id: str, spec: DataSpec) -> Splits | None:
    """Data written by `save_to_disk`, which are one split or several; None for another folder."""
    several, lone = path / "dataset_dict.json", path / "state.json"
    if not several.is_file() and not lone.is_file():
        return None
    _refuse_hub_fields(id, spec, "config")
    splits: dict[str, list[str]] = {}
    try:
        for name in json.loads(several.read_text("utf-8"))["splits"] if several.is_file() else [""]:
            state = json.loads((path / name / "state.json").read_text("utf-8"))
            splits[name or state["_split"] or "train"] = [f"{name}/{file['filename']}" for file in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise _not_loaded(id, error, "Save it again with save_to_disk.") from error
    if away := [file for own in splits.values() for file in own if not _SAVED_FILE.fullmatch(file)]:
        raise DataError(f"{id}: names the file {away[0]}, which is not in it", "Save it again with save_to_disk.")
    return Splits(id, {split: [file_part(path / file.lstrip("/")) for file in own] for split, own in splits.items()})


def _downloaded(url: str) -> Path:
    """Fetch a URL to the hub's cache, anew each time: what is there may have changed."""
    import huggingface_hub as hub

    key = hashlib.sha256(url.encode()).hexdigest()[:16]
    folder = Path(hub.cached_assets_path("rankscope", "urls", key))
    path = folder / PurePosixPath(re.sub(r"[?#].*", "", url)).name
    if file_type(path) not in FILE_TYPES:  # not worth fetching
        todo = f"Give one of {', '.join(FILE_TYPES)}, or a hub id such as owner/name."
        raise DataError(f"{url}: not the address of a file of data", todo)
    try:
        with hub.get_session().stream("GET", url, follow_redirects=True) as answer, published(path) as temporary:
            answer.raise_for_status()
            with temporary.open("wb") as file:
                file.writelines(answer.iter_bytes())
    except Exception as error:  # of httpx, of the disk
        raise _not_loaded(url, error, "Check the address and the connection, or give a local file.") from error
    return path


def commits(spec: DataSpec, general: str | None = None) -> dict[str, str]:
    """Commit of each id of data on the hub, `general` text among them: as `spec` has it, else as it is now. Raises
    DataError: the hub does not have it, or does not answer and it was never fetched."""
    ids = dict.fromkeys([*_each(spec.eval_ids), *_each([general] if general else ())], None)
    ids |= dict.fromkeys(_each(spec.ids), spec.revision)
    on_hub = {id: revision for id, revision in ids.items() if _is_on_hub(id)}
    return {id: spec.commits.get(id) or _repository(id, revision).commit for id, revision in on_hub.items()}


def _repository(id: str, revision: str | None) -> hub.Repository:
    try:
        return hub.repository(id, "dataset", revision, "README.md")
    except Exception as error:
        raise _not_fetched(id, error) from error


def _hub(id: str, spec: DataSpec) -> Splits:
    """Data on the hub; its files are fetched once, split by split, and read from the cache offline."""
    commit, files, _ = _repository(id, spec.commits.get(id) or spec.revision)

    @functools.cache
    def path(file: str) -> Path:
        try:
            return hub.fetch(id, "dataset", commit, file)  # of one commit, whatever is pushed meanwhile
        except Exception as error:
            raise _not_fetched(id, error) from error

    def part(file: str) -> Part:
        name = f"{id}/{file}"
        read = functools.partial(file_part, name=name)
        return Part(name, lambda wanted: read(path(file)).rows(wanted), lambda: read(path(file)).columns())

    readme = path("README.md").read_text(encoding="utf-8", errors="replace") if "README.md" in files else ""
    return _divided(id, files, readme, spec, part, commit)


def _not_fetched(id: str, error: Exception) -> DataError:
    if found := hub.explained(f"datasets/{id}", error):
        return DataError(f"data set {id}: {found[0]}", found[1] or "Check data.id, config, split and revision.")
    return _not_loaded(id, error, "Check data.id, config, split and revision; or give a local file instead.")


def _not_loaded(name: str, error: Exception, todo: str) -> DataError:
    return DataError(f"{name}: cannot be loaded: {type(error).__name__}: {reason_of(error, 500)}", todo)
