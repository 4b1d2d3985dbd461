"""Readers: one file as an iterator of its rows, with their lines, never whole in memory where its type allows it.

Text files are parsed here rather than by `datasets` or pandas, so that text stays text (`None`, `007`, `2024-05-01`)
and an error can name the line. Nothing from a file is ever executed.

Which shapes of a file are read is in docs/guides/my-own-data.md.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from pathlib import Path, PurePath
from typing import IO, Any, NamedTuple, TypeAlias

from rankscope.errors import DataError, shortened

Numbered: TypeAlias = tuple[int | None, Any]  # line, from 1, on which a row starts (None without lines), and the row

TEXT_TYPES = (".json", ".jsonl", ".ndjson", ".csv", ".tsv")
FILE_TYPES = (*TEXT_TYPES, ".parquet", ".arrow")
_LFS = b"version https://git-lfs"
_BATCH_ROWS = 256  # rows of Parquet or Arrow in Python at a time
_BUFFER_BYTES = 1 << 20  # of a Parquet file, for each column
_BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")
_decoder = json.JSONDecoder()
_CARRIAGE_RETURN = re.compile(r"(?<=\r)(?!\n)")  # by which some spreadsheets end a row


def _zstd(path: Path) -> IO[bytes]:
    import pyarrow as pa  # type: ignore[import-untyped]

    return io.BufferedReader(pa.CompressedInputStream(str(path), "zstd"))


_COMPRESSED: dict[str, tuple[bytes, Callable[[Path], Any]]] = {  # a file's first bytes, and what opens it
    ".gz": (b"\x1f\x8b", gzip.open),
    ".bz2": (b"BZh", bz2.open),
    ".xz": (b"\xfd7zXZ", lzma.open),
    ".zst": (b"\x28\xb5\x2f\xfd", _zstd),
}


def expanded(name: str) -> str:
    """A file's name in lower case, without the ending of a compressed one."""
    return name.lower().removesuffix(next(filter(name.lower().endswith, _COMPRESSED), ""))


def file_type(path: str | PurePath) -> str:
    """Suffix in lower case, without that of a compressed file."""
    return PurePath(expanded(str(path))).suffix


class Part(NamedTuple):
    """A file, or a saved table: what errors call it, and its rows, which can be read again and again. `rows(columns)`
    may leave out other columns than those; `columns()` names all there are, where that needs no pass over the rows
    (else an empty tuple)."""

    name: str
    rows: Callable[[Collection[str]], Iterator[Numbered]]
    columns: Callable[[], tuple[str, ...]] = lambda: ()

    def where(self, line: int | None, index: int) -> str:
        """Name row `index` (from 0) for an error: `data.jsonl, line 7` or `data.json, row 3`."""
        if line is None:
            return f"{self.name}, row {index + 1}"
        return f"{self.name}, line {line}" + ("" if line == index + 1 else f", row {index + 1}")


def file_part(path: Path, name: str | None = None) -> Part:
    """Part of a file whose type is known by its name. Raises DataError for another type."""
    name = name or str(path)
    suffix = file_type(path)
    if suffix not in FILE_TYPES:
        what = f"{name}: unknown file type {suffix or '(no suffix)'}"
        todo = f"Give one of {', '.join(FILE_TYPES)}; those of text may be compressed: {', '.join(_COMPRESSED)}."
        raise DataError(what, todo)
    if suffix in (".parquet", ".arrow"):
        return Part(name, partial(_table_rows, path, name), partial(_table_columns, path, name))
    read = _csv_rows if suffix in (".csv", ".tsv") else _json_rows
    return Part(name, lambda wanted: _objects(name, read(path, name, wanted)))


def read_text(path: Path) -> str:
    """Text of a file, compressed or not. Raises DataError if it cannot be read or is not UTF-8, with the line."""
    return "".join(_text_lines(path, str(path)))


def _objects(name: str, numbered: Iterable[Numbered]) -> Iterator[Numbered]:
    for count, (line, value) in enumerate(numbered, start=1):
        if not isinstance(value, dict):
            where = name if line is None else f"{name}, line {line}"
            what = f"{where}: row {count} is {kind(value)}, expected an object"
            raise DataError(what, 'Write each row as {"instruction": ..., "output": ...}.')
        yield line, value


def listed(names: Iterable[Any]) -> str:
    """Comma-separated names for an error, at most 20; `(none)` if there are none."""
    plain = [str(name).encode(errors="backslashreplace").decode() for name in names]
    shown = [shortened(name if name == " ".join(name.split()) else repr(name)) for name in plain]  # quoted if blanks
    return ", ".join(shown[:20]) + (", ..." if len(shown) > 20 else "") if shown else "(none)"


def kind(value: Any) -> str:
    """Type of a JSON value in plain words."""
    names = {type(None): "null", bool: "true/false", int: "a number", float: "a number", str: "text", list: "a list"}
    return names.get(type(value), "an object" if isinstance(value, dict) else type(value).__name__)


# Text files


def _first_bytes(path: Path, name: str) -> bytes:
    """Beginning of a file. Raises DataError if it cannot be read, or is a pointer to another one."""
    try:
        with path.open("rb") as file:
            start = file.read(len(_LFS))
    except OSError as error:
        raise _unreadable(name, error) from None
    if start == _LFS:
        what = f"{name}: a Git LFS pointer, which stands for a file that was not fetched"
        raise DataError(what, "Fetch it in its repository: git lfs pull")
    return start


def _unreadable(name: str, error: Exception) -> DataError:
    return DataError(f"{name}: cannot be read: {error}", "Check the file, or fetch it again.")


def _text_lines(path: Path, name: str) -> Iterator[str]:
    """Lines of a file, compressed or not, with their ends: line feeds alone, so that U+2028 stays inside a text."""
    start = _first_bytes(path, name)
    try:
        opened = next(
            (way for mark, way in _COMPRESSED.values() if start.startswith(mark)), lambda path: path.open("rb")
        )
        with opened(path) as file:
            for number, line in enumerate(file, start=1):
                try:
                    yield line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    what = f"{name}, line {number}: not valid UTF-8 (byte 0x{error.object[error.start]:02x})"
                    raise DataError(what, "Save the file as UTF-8.") from None
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise _unreadable(name, error) from None


def _json_rows(path: Path, name: str, wanted: Collection[str]) -> Iterator[Numbered]:
    """Rows of JSON of any shape; the content decides, since many .json files hold one object a line."""
    values = _json_values(path, name)
    first, second = next(values, None), next(values, None)
    if first and second:
        yield from chain([first, second], values)
    elif first:
        rows = _rows_within(name, first[1], wanted)
        yield from [first] if rows is None else ((None, row) for row in rows)


def _json_values(path: Path, name: str) -> Iterator[Numbered]:
    """Values of a file, one a line as long as its lines are JSON."""
    lines = _text_lines(path, name)
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            yield from _values_over_lines(name, number, line, "".join(lines))
            return
        yield number, value


def _values_over_lines(name: str, line: int, first: str, rest: str) -> Iterator[Numbered]:
    """Values that follow one another from the line `first` on, over several lines or with commas between."""
    text, next_line, position = first + rest, rest.lstrip(), 0
    begins_list = first.lstrip().startswith("[")
    alone = not begins_list and first.strip() != "{" and next_line[:1] in ("", "{")  # as a row of JSONL is
    while True:
        start = _BETWEEN_VALUES.match(text, position).end()  # type: ignore[union-attr]  # it matches nothing, too
        line += text.count("\n", position, start)
        if start == len(text):
            return
        try:
            value, position = _decoder.raw_decode(text, start)
        except (ValueError, RecursionError) as error:  # also a number of thousands of digits; a list nested too deep
            place, message = line, str(error)
            if isinstance(error, json.JSONDecodeError):
                message = error.msg
                place += 0 if alone and position == 0 else text.count("\n", start, error.pos)
            what = f"{name}, line {place}: not valid JSON: {message}"
            raise DataError(what, "Correct it; expected is one list of objects, or one object a line.") from None
        yield line, value
        line += text.count("\n", start, position)


def _rows_within(name: str, value: Any, wanted: Collection[str]) -> Iterable[Any] | None:
    """Rows of a file that is one value: a list, rows under a key, or columns; None where it is a row itself."""
    if isinstance(value, list):
        return value
    if not isinstance(value, dict) or not value or any(isinstance(value.get(column), str) for column in wanted):
        return None
    cells = list(value.values())
    if {"columns", "data"} <= value.keys() and all(isinstance(value[key], list) for key in ("columns", "data")):
        return (dict(zip(value["columns"], row, strict=False)) for row in value["data"])  # pandas' orient="split"
    if all(isinstance(cell, dict) and cell.keys() == cells[0].keys() for cell in cells):
        if not cells[0].keys().isdisjoint(wanted):
            return cells
        return ({column: value[column][index] for column in value} for index in cells[0])
    are_columns = len(cells) > 1 or not value.keys().isdisjoint(wanted)
    if are_columns and all(isinstance(cell, list) and not _are_objects(cell) for cell in cells):
        if len({len(cell) for cell in cells}) > 1:
            raise DataError(f"{name}: its columns have lists of different lengths", "Give each column a value a row.")
        return (dict(zip(value, row, strict=True)) for row in zip(*cells, strict=True))
    holders = [key for key in value if key not in wanted and _are_objects(value[key])]
    if len(holders) > 1:
        what = f"{name}: lists of objects lie under several keys: {listed(holders)}"
        raise DataError(what, "Write each list to a file of its own; files of a folder may be named by split.")
    return value[holders[0]] if holders else None


def _are_objects(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(row, dict) for row in value)


def _csv_rows(path: Path, name: str, wanted: Collection[str]) -> Iterator[Numbered]:
    line = 1
    previous_limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # the default refuses fields over 128 KiB
    try:
        lines = (part for line in _text_lines(path, name) for part in _CARRIAGE_RETURN.split(line))
        filled = ((n, line) for n, line in enumerate(lines) if line.strip() and not line.startswith("sep="))
        before, first = next(filled, (0, ""))  # lines before the header: blank, or Excel's mark of the delimiter
        marks = "\t,;|" if file_type(path) == ".tsv" else ",;\t|"
        headers = {mark: next(csv.reader([first], delimiter=mark), []) for mark in marks}
        delimiter = max(marks, key=lambda mark: (len(set(headers[mark]) & set(wanted)), len(headers[mark])))
        reader = csv.reader(chain([first], lines), delimiter=delimiter, strict=True)
        header = next(reader, [])
        if twice := [column for column in header if header.count(column) > 1 and column in wanted]:
            what = f"{name}, line {before + 1}: a column is named twice: {listed(header)}"
            raise DataError(what, f"Rename one {twice[0]}.")
        line = before + reader.line_num + 1
        for values in reader:
            if values and len(values) != len(header):
                count = f"{len(values)} value" + "s" * (len(values) != 1)
                what = f"{name}, line {line}: {count} for {len(header)} column" + "s" * (len(header) != 1)
                raise DataError(what, f"Put text that contains {delimiter!r} in double quotes.")
            if values:
                yield line, {column: value for column, value in zip(header, values, strict=True) if column}
            line = before + reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{name}, line {line}: not valid CSV: {error}", "Correct the row that begins there.") from None
    finally:
        csv.field_size_limit(previous_limit)


# Columnar files


def _table_columns(path: Path, name: str) -> tuple[str, ...]:
    with _table(path, name) as (columns, _):
        return tuple(columns)


def _table_rows(path: Path, name: str, wanted: Collection[str]) -> Iterator[Numbered]:
    """Rows of a Parquet or Arrow file. Fields of nested objects that are null were absent, or are of other rows."""
    with _table(path, name) as (columns, read):
        for batch in read(columns=[column for column in columns if column in wanted]):
            for row in batch.to_pylist():
                yield None, {column: _without_nulls(value) for column, value in row.items()}


@contextmanager
def _table(path: Path, name: str) -> Iterator[tuple[list[str], Callable[..., Iterable[Any]]]]:
    """Columns of a Parquet or Arrow file, and what reads some of them in batches."""
    import pyarrow as pa
    import pyarrow.parquet as pq  # type: ignore[import-untyped]

    _first_bytes(path, name)
    try:
        if file_type(path) == ".parquet":
            # So a row group is read page by page: pyarrow's writer puts a million rows in one.
            with pq.ParquetFile(path, buffer_size=_BUFFER_BYTES, pre_buffer=False) as file:
                yield file.schema_arrow.names, partial(file.iter_batches, _BATCH_ROWS, use_threads=False)
            return
        with pa.memory_map(str(path)) as source:
            try:  # a stream, as `datasets` writes it
                batches = reader = pa.ipc.open_stream(source)
            except pa.ArrowInvalid:
                reader = pa.ipc.open_file(source)
                batches = map(reader.get_batch, range(reader.num_record_batches))

            def read(columns: list[str]) -> Iterator[Any]:
                for batch in batches:
                    yield from pa.Table.from_batches([batch]).select(columns).to_batches(_BATCH_ROWS)

            yield reader.schema.names, read
    except (OSError, pa.ArrowException, UnicodeDecodeError) as error:
        here = "Check the file, or fetch it again."
        todo = here if name == str(path) else f"Delete {path.resolve()}, and run again: it is fetched anew."
        what = "Parquet" if file_type(path) == ".parquet" else "Arrow"
        raise DataError(f"{name}: not readable as {what}: {error}", todo) from None


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
