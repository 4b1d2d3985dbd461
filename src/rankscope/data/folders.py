"""Folders of data files, on disk or on the hub: which files belong to which split.

The README.md of a hub repository may name them. Otherwise a file is of the split that it or its folder is named by
(`test.jsonl`, `data/train-00000-of-00002.parquet`, `dev/rows.csv`), or by which its name differs from another's
(`code_test.jsonl` beside `code_train.jsonl`); every other file is to train on (`unit_test_questions.jsonl`).
"""

import re
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, NamedTuple

import yaml

from rankscope.data.readers import FILE_TYPES, expanded, file_type, listed
from rankscope.errors import DataError

SPLITS = {
    "train": "train", "training": "train",
    "validation": "validation", "valid": "validation", "val": "validation", "dev": "validation",
    "eval": "validation", "evaluation": "validation",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Splits by the names that files have."""

_HIDDEN = re.compile(r"(^|/)(\.|__)")  # a file, or a folder that it lies in
_DESCRIPTION = re.compile(r"(dataset_infos?|dataset_dict|state|config|generation_config|tokenizer_config)\.json")
_UNREMARKABLE = re.compile(
    rf"(readme|license|licence|notice|citation|changelog|contributing)\b.*|.*\.(md|py|png|jpe?g|svg)|{_DESCRIPTION.pattern}"
)
_BY_NAME = ""  # split of a configuration whose files are divided by their names
_SHARD = re.compile(r"-\d+-of-\d+(-[0-9a-f]+)?$|[-_.]\d+$")
_WORD = re.compile(rf"(?<![a-z])({'|'.join(SPLITS)})(?![a-z])")


class Folder(NamedTuple):
    """Files of each split, as paths below the folder, and what to say about the others."""

    splits: dict[str, list[str]]
    notes: list[str]


def divide(files: Sequence[str], readme: str, config: str | None, name: str) -> Folder:
    """Files by split; `files` are paths below the folder, with forward slashes. Raises DataError: README.md has several
    configurations and none is chosen, or it names no file that is there; there is no data file at all."""
    plain = sorted(file for file in files if not _HIDDEN.search(file))
    names = {file: PurePosixPath(file).name for file in plain}
    data = [file for file in plain if file_type(file) in FILE_TYPES and not _DESCRIPTION.fullmatch(names[file])]
    named = [file for file in plain if file not in data and not _UNREMARKABLE.fullmatch(names[file].lower())]
    notes = [f"{name}: no rows, not read: {listed(named)}"] if named else []
    configs, default = _configs(readme)
    if config is not None and config not in configs and (configs or config not in _folders_of_splits(data)):
        raise DataError(f"{name}: no configuration {config!r}, only {listed(configs)}", "Correct data.config.")
    if configs:
        chosen = config or default
        if chosen is None:
            what = f"{name}: has several configurations: {listed(configs)}"
            raise DataError(what, f"Choose one: data.config={next(iter(configs))}")
        splits = {split: [file for file in data if _matches(file, globs)] for split, globs in configs[chosen].items()}
        if splits.keys() == {_BY_NAME}:
            return Folder(_by_name(splits[_BY_NAME]), notes)
        named_anywhere = [glob for patterns in configs.values() for globs in patterns.values() for glob in globs]
        if unread := [file for file in data if not _matches(file, named_anywhere)]:
            notes.append(f"{name}: README.md does not name, and so not read: {listed(unread)}")
        if empty := [split for split, found in splits.items() if not found]:
            what = f"{name}: README.md names files of the split {empty[0]} that are not there"
            raise DataError(what, "Fetch the whole repository.")
        return Folder(splits, notes)
    if not data:
        more = "; its loading script is not executed" if any(file.endswith(".py") for file in plain) else ""
        todo = f"Give it some: {', '.join(FILE_TYPES)}."
        todo += " The hub may have converted them: data.revision=refs/convert/parquet" if more else ""
        raise DataError(f"{name}: holds no data files{more}" + (f", only {listed(named)}" if named else ""), todo)
    if len(folders := _folders_of_splits(data)) > 1:
        if config not in folders:
            way = f"Choose one: data.config={folders[0]}"
            raise DataError(f"{name}: several folders have splits of their own: {listed(folders)}", way)
        data = [file for file in data if file.startswith(f"{config}/")]
    splits = _by_name(data)
    word = {file: _WORD.search(PurePosixPath(file.lower()).stem) for file in splits.get("train", ())}
    if doubtful := [file for file, found in word.items() if found and SPLITS[found[0]] != "train"]:
        notes.append(f"{name}: trained on, since no other file is named alike: {listed(doubtful)}")
    return Folder(splits, notes)


def _by_name(data: Sequence[str]) -> dict[str, list[str]]:
    splits: dict[str, list[str]] = {}
    stems = set(map(_stem, data))
    for file in data:
        splits.setdefault(_split(file, stems), []).append(file)
    return splits


def _folders_of_splits(data: Sequence[str]) -> list[str]:
    """Folders that have folders named by split, as the hub's converted Parquet has for each configuration; empty unless
    every file lies in one."""
    paths = [PurePosixPath(file) for file in data]
    if not all(len(path.parts) == 3 and path.parts[1].lower() in SPLITS for path in paths):
        return []
    return sorted({path.parts[0] for path in paths})


def _stem(file: str) -> str:
    """Name in lower case, without its type."""
    return expanded(PurePosixPath(file).name).removesuffix(file_type(file))


def _split(file: str, stems: Collection[str]) -> str:
    """Split of a file by its name or its folder's, or by the one of `stems` that differs by the split alone."""
    stem = _stem(file)
    for name in (_SHARD.sub("", stem), *reversed(PurePosixPath(file.lower()).parts[:-1])):
        if name in SPLITS:
            return SPLITS[name]
    for word in _WORD.finditer(stem):
        others = [other for other in SPLITS if SPLITS[other] != SPLITS[word[0]]]
        if any(stem[: word.start()] + other + stem[word.end() :] in stems for other in others):
            return SPLITS[word[0]]
    return "train"


def _configs(readme: str) -> tuple[dict[str, dict[str, list[str]]], str | None]:
    """Patterns of each split of each configuration that the YAML in front of a README names; and the default's name."""
    front = re.match(r"---\s*\n(.*?)\n---\s*(\n|$)", readme, re.DOTALL)
    try:
        values = yaml.safe_load(front[1]) if front else None
    except yaml.YAMLError:
        values = None
    given: Any = values.get("configs") if isinstance(values, dict) else None
    dicts = [one for one in given if isinstance(one, dict)] if isinstance(given, list) else []
    configs = {str(one.get("config_name", "default")): one for one in dicts}
    found = {name: patterns for name, one in configs.items() if (patterns := _patterns(one))}
    default = [name for name in found if configs[name].get("default") is True]
    default += [name for name in found if name == "default" or len(found) == 1]
    return found, next(iter(default), None)


def _patterns(config: Mapping[str, Any]) -> dict[str, list[str]]:
    """Patterns of each split that a configuration names; of `_BY_NAME` where it names a folder alone."""
    folder = str(config.get("data_dir") or "").strip("/")
    files = config.get("data_files") or ({_BY_NAME: "**/*"} if folder else {})
    if isinstance(files, dict):
        named = list(files.items())
    else:
        entries = files if isinstance(files, list) else [files]
        entries = [one if isinstance(one, dict) else {"path": one} for one in entries]
        named = [(one.get("split", "train"), one.get("path")) for one in entries]
    splits: dict[str, list[str]] = {}
    for split, paths in named:
        below = [PurePosixPath(folder, str(path)) for path in (paths if isinstance(paths, list) else [paths])]
        splits.setdefault(str(split), []).extend(map(str, below))
    return splits


def _matches(file: str, patterns: Sequence[str]) -> bool:
    from fsspec.utils import glob_translate  # type: ignore[import-untyped]

    return any(re.match(glob_translate(pattern), file) for pattern in patterns)
