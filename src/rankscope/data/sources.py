"""Sources of rows: a local file, a local folder, or the hub. Nothing here depends on the meaning of a row.

Text files are parsed here rather than by `datasets`, so that an error can name the line. Nothing from the data is ever
executed: `datasets` (4 and later) has no loading scripts, and only its builders of plain rows are allowed: the one of
.tar files calls `torch.load`.
"""

import csv
import gzip
import io
import json
import os
import re
import sys
import textwrap
import zlib
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rankscope.errors import DataError, shortened
from rankscope.spec.models import DataSpec

COLUMNS = ("instruction", "input", "output", "prompt", "completion", "messages")
"""Columns that any format reads; others are not loaded where that saves time."""

FILE_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".parquet")
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")  # of a model or a data set
_COMMIT = re.compile(r"[0-9a-f]{40}")


class Table(NamedTuple):
    """Unchecked rows of a source."""

    name: str  # file, folder or hub id, for errors
    rows: list[dict[str, Any]]
    columns: tuple[str, ...]  # all columns of the source, in order of appearance
    lines: tuple[int, ...] | None = None  # line, from 1, on which each row starts; None without lines
    revision: str | None = None  # the hub's commit, or the requested revision if it is unknown; None for local data

    def where(self, index: int) -> str:
        """Name row `index` (from 0) for an error: `data.jsonl, line 7` or `data.json, row 3`."""
        if self.lines is None:
            return f"{self.name}, row {index + 1}"
        line = f"{self.name}, line {self.lines[index]}"
        return line if self.lines[index] == index + 1 else f"{line}, row {index + 1}"


def read_table(spec: DataSpec, wanted: Sequence[str] = COLUMNS) -> Table:
    """Read the first `spec.max_rows` rows (default: all) of the file, folder or hub data set `spec.id`.

    A local file or folder of that name takes precedence over the hub. Columns that are not `wanted` may be left out.

    Raises:
        DataError: the source is missing, unreadable, corrupt, or of an unknown type; the message names file and line.
    """
    path = Path(os.path.expanduser(spec.id))
    if os.path.isfile(path):  # unlike Path's own, these return False for a name that is no valid path
        _refuse_hub_fields(spec, "split", "config", "revision")
        return _read_file(path, spec.max_rows, wanted)
    if os.path.isdir(path):
        _refuse_hub_fields(spec, "revision")
        return _read_with_datasets(spec, str(path), wanted, local=True)
    if path.suffix.lower() in (*FILE_TYPES, ".gz") or not HUB_ID.fullmatch(spec.id):
        raise DataError(f"{spec.id}: no such file or folder", "Check the path, or give a hub id such as owner/name.")
    return _read_with_datasets(spec, spec.id, wanted, local=False)


def _refuse_hub_fields(spec: DataSpec, *fields: str) -> None:
    """Raise DataError if a field is set that local data cannot honour, which would select other rows than intended."""
    for field in fields:
        value = getattr(spec, field)
        if value is not None and (field, value) != ("split", "train"):
            raise DataError(f"{spec.id}: data.{field} is {value!r}, but local data has no {field}", "Remove it.")


def _read_file(path: Path, limit: int | None, wanted: Sequence[str]) -> Table:
    name = str(path)
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if suffix not in FILE_TYPES:
        raise DataError(
            f"{name}: unknown file type {suffix or '(no suffix)'}",
            f"Name it by what it holds: {', '.join(FILE_TYPES)} (text may be gzipped).",
        )
    if suffix == ".parquet":
        return _read_parquet(path, limit, wanted)
    text = read_text(path)
    numbered: Iterator[tuple[int | None, Any]]
    if suffix == ".csv":
        numbered = _csv_rows(name, text)
    elif text.lstrip(" \t\r\n").startswith("["):  # by content: many .json files hold one object a line
        numbered = ((None, row) for row in _parse_json(name, text))
    else:  # splitlines would also split at U+2028 inside text
        lines = ((line, content.strip()) for line, content in enumerate(text.split("\n"), start=1))
        numbered = ((line, _parse_json(name, content, line)) for line, content in lines if content)
    return _table(name, islice(numbered, limit))


def read_text(path: Path) -> str:
    """Text of a file, gzipped or not. Raises DataError if it cannot be read or is not UTF-8, with the line."""
    try:
        content = path.read_bytes()
        if content.startswith(b"\x1f\x8b"):  # gzip, whatever the file is called
            content = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path}: cannot be read: {error}", "Check the file, or fetch it again.") from None
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise DataError(
            f"{path}, line {line}: not valid UTF-8 (byte 0x{content[error.start]:02x})", "Save the file as UTF-8."
        ) from None


def _table(name: str, numbered: Iterable[tuple[int | None, Any]]) -> Table:
    """Table of rows that come with their lines, or with None."""
    rows: list[dict[str, Any]] = []
    lines: list[int] = []
    columns: dict[str, None] = {}
    for line, value in numbered:
        if not isinstance(value, dict):
            where = name if line is None else f"{name}, line {line}"
            raise DataError(
                f"{where}: row {len(rows) + 1} is {kind(value)}, expected an object",
                'Write each row as {"instruction": ..., "output": ...}.',
            )
        rows.append(value)
        lines += [] if line is None else [line]
        columns.update(dict.fromkeys(value))
    return Table(name, rows, tuple(columns), tuple(lines) or None)


def listed(names: Iterable[Any]) -> str:
    """Comma-separated names for an error, at most 20; `(none)` if there are none."""
    plain = [str(name).encode(errors="backslashreplace").decode() for name in names]
    shown = [shortened(name if name == " ".join(name.split()) else repr(name)) for name in plain]  # quoted if blanks
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "") if shown else "(none)"


def kind(value: Any) -> str:
    """Type of a JSON value in plain words."""
    names = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


def _parse_json(name: str, text: str, line: int | None = None) -> Any:
    """Value of one line of JSONL, or of a whole file where `line` is None."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line, message = line or error.lineno, error.msg
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; a list nested too deep
        message = str(error)
    raise DataError(
        f"{name}{f', line {line}' if line else ''}: not valid JSON: {message}",
        "Correct it; expected is one list of objects, or one object a line.",
    )


def _csv_rows(name: str, text: str) -> Iterator[tuple[int, Any]]:
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise DataError(f"{name}, line 1: a column is named twice: {listed(header)}", "Rename one of them.")
        line = reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                count = f"{len(values)} value" + "s" * (len(values) != 1)
                raise DataError(
                    f"{name}, line {line}: {count} for {len(header)} columns",
                    "Put text that contains commas in double quotes.",
                )
            if values:
                yield line, dict(zip(header, values, strict=True))
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {reader.line_num}: not valid CSV: {error}", "Correct that line.") from None
    finally:
        csv.field_size_limit(previous_limit)


def _read_parquet(path: Path, limit: int | None, wanted: Sequence[str]) -> Table:
    import pyarrow as pa  # type: ignore[import-untyped]
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    try:
        with pq.ParquetFile(path) as file:
            columns = tuple(file.schema_arrow.names)
            content = file.read(columns=[column for column in columns if column in wanted])
        rows = content.slice(0, limit).to_pylist()
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        raise DataError(f"{path}: not readable as Parquet: {error}", "Check the file, or fetch it again.") from None
    return Table(str(path), rows, columns)


def _read_with_datasets(spec: DataSpec, source: str, wanted: Sequence[str], *, local: bool) -> Table:
    """Load a folder or a hub id by `datasets`, which caches downloads for offline use."""
    import datasets  # type: ignore[import-untyped]

    try:
        if local and any((Path(source) / marker).is_file() for marker in ("state.json", "dataset_dict.json")):
            dataset = _saved_split(datasets.load_from_disk(source), spec)
        else:
            builder = datasets.load_dataset_builder(source, name=spec.config, revision=spec.revision)
            _check_builder(builder, source, local=local)
            builder.download_and_prepare()
            dataset = builder.as_dataset(split=spec.split or "train")
        columns = tuple(dataset.column_names)
        if spec.max_rows is not None:
            dataset = dataset.select(range(min(spec.max_rows, len(dataset))))
        rows = dataset.select_columns([column for column in columns if column in wanted]).to_list()
    except DataError:
        raise
    except Exception as error:  # datasets raises some thirty classes, from its own to pyarrow's and httpx's
        wraps = isinstance(error, datasets.exceptions.DatasetGenerationError)  # its own message says nothing
        if local and wraps:  # raise for the first file that cannot be read: `datasets` names neither file nor line
            for path in sorted(Path(source).rglob("*")):
                if path.is_file() and Path(path.name.removesuffix(".gz")).suffix.lower() in FILE_TYPES:
                    _read_file(path, None, COLUMNS)
        if local and isinstance(error, datasets.data_files.EmptyDatasetError):
            raise DataError(
                f"{source}: the folder holds no data files", f"Give it some: {', '.join(FILE_TYPES)}."
            ) from None
        cause = (error.__cause__ if wraps else None) or error
        todo = "Check the folder's files, and data.config and data.split."
        if not local:
            todo = "Check data.id, config, split and revision, and the connection; or give a local file instead."
        message = textwrap.shorten(str(cause), 500, placeholder=" ...")
        raise DataError(f"{source}: cannot be loaded: {type(cause).__name__}: {message}", todo) from error
    return Table(source, rows, columns, revision=None if local else _commit(dataset) or spec.revision)


def _check_builder(builder: Any, source: str, *, local: bool) -> None:
    """Raise DataError if the builder could do more than parse rows, or would read files elsewhere.

    The README.md of the data chooses the files, and their names choose the builder.
    """
    from datasets.packaged_modules.arrow.arrow import Arrow  # type: ignore[import-untyped]
    from datasets.packaged_modules.cache.cache import Cache  # type: ignore[import-untyped]
    from datasets.packaged_modules.csv.csv import Csv  # type: ignore[import-untyped]
    from datasets.packaged_modules.json.json import Json  # type: ignore[import-untyped]
    from datasets.packaged_modules.parquet.parquet import Parquet  # type: ignore[import-untyped]
    from datasets.packaged_modules.text.text import Text  # type: ignore[import-untyped]

    if not isinstance(builder, Arrow | Cache | Csv | Json | Parquet | Text):  # Cache: Arrow files written earlier
        kind_of_files = type(builder).__module__.rsplit(".", 1)[-1]
        raise DataError(
            f"{source}: holds {kind_of_files} files, which are not read: some of them can run code",
            "Convert the rows to JSON, CSV, Parquet or Arrow, where you trust them.",
        )
    root = f"{os.path.realpath(source)}/" if local else "hf://"
    for files in (builder.config.data_files or {}).values():
        for file in map(str, files):
            if ".." in Path(file).parts or not file.startswith(root):
                raise DataError(f"{source}: names the file {shortened(file)!r}, which is not in it", "Give that file.")


def _saved_split(saved: Any, spec: DataSpec) -> Any:
    """Requested split of data written by `save_to_disk`, which may have several splits or one."""
    splits = dict(saved) if isinstance(saved, dict) else {str(saved.split or "train"): saved}
    wanted = spec.split or "train"
    if spec.config is not None or wanted not in splits:
        raise ValueError(f"saved data have no config, and here the splits {listed(splits)}")
    return splits[wanted]


def _commit(dataset: Any) -> str | None:
    """Hub commit of loaded data: the last folder of its cache path (.../CONFIG/0.0.0/COMMIT/x.arrow)."""
    folders = [Path(file["filename"]).parent.name for file in dataset.cache_files]
    return next((folder for folder in folders if _COMMIT.fullmatch(folder)), None)
