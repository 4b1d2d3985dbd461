"""1,000 rows of each kind of file, read by our readers and by `datasets`: equal but for text that `datasets` converts.

There the file's text is right: what a model is to answer may be `007`, `None` or `2024-05-01`.
"""

import csv
import gzip
import json
import random
from collections.abc import Callable
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import datasets  # type: ignore[import-untyped]
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from rankscope.data.formats import COLUMNS
from rankscope.data.sources import resolve_sources
from rankscope.spec.models import DataSpec

Row: TypeAlias = dict[str, Any]

COUNT = 1000
PIECES = [
    *("word", "a", " ", "  ", "\t", "\n", "\r\n", "\r", "\x0b", "\x00", "\x85", "\u2028", "\xa0", "\ufeff"),
    *('"', '""', "'", ",", ";", "|", "\\", "\\n", "#", "{x}", "</s>", "%s", "<!--", "1.50"),
    *("naïve", "e\u0301", "한국어", "日本", "עברית", "😀", "👩\u200d👧"),
]
MISSING = ("None", "NA", "N/A", "#N/A", "NaN", "nan", "null", "NULL", "")
"""Texts that pandas, by which `datasets` reads CSV, takes for a missing value."""
KEPT = ("007", "2024-05-01", "True", "1e5", "-0", "-", "Null", "TRUE ", " NA")
"""Texts that stay text among others, for `datasets` too."""


def _text(draw: random.Random) -> str:
    return "".join(draw.choices(PIECES, k=draw.randint(1, 12)))


@cache
def text_rows() -> list[Row]:
    """Rows of text, with texts that look like something else in known places, and three columns of nothing else."""
    draw = random.Random(0)
    rows = [
        {
            "instruction": _text(draw),
            "input": _text(draw),
            "output": _text(draw),
            "question": f"{number:05d}",
            "answer": str(number % 3 == 0),
            "context": f"2024-05-{1 + number % 28:02d}",
        }
        for number in range(COUNT)
    ]
    for number, text in enumerate((*MISSING, *KEPT)):
        rows[10 * number]["input"] = rows[10 * number + 1]["output"] = text
    rows[7]["output"] = 'a long cell, with "quotes"\n' * 10_000
    return rows


@cache
def rows_with_conversations() -> list[Row]:
    """The same, and in every fifth row a conversation, of whose fields each message and each tool call has others."""
    draw = random.Random(1)
    return [row if number % 5 else row | _conversation(number, draw) for number, row in enumerate(text_rows())]


def _conversation(number: int, draw: random.Random) -> Row:
    arguments = {"city": _text(draw), "days": number} if number % 2 else {"place": {"zip": f"{number:05d}"}}
    call = {"id": f"c{number}", "type": "function", "function": {"name": "weather", "arguments": arguments}}
    messages: list[Row] = [
        {"role": "user", "content": _text(draw), "name": "Ana"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "content": draw.choice(KEPT), "tool_call_id": f"c{number}"},
        {"role": "assistant", "content": draw.choice(MISSING), "reasoning_content": _text(draw)},
    ]
    tools = [{"type": "function", "function": {"name": "weather", "description": _text(draw)}}]
    return {"messages": messages[: 4 if number % 3 else 2], "tools": tools}


def _write_lines(path: Path, rows: list[Row]) -> None:
    content = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)


def _write_list(path: Path, rows: list[Row], indent: int | None = None) -> None:
    path.write_text(json.dumps(rows, indent=indent))


def _write_columns(path: Path, rows: list[Row]) -> None:
    path.write_text(json.dumps({column: [row.get(column) for row in rows] for column in rows[0]}))


def _write_csv(path: Path, rows: list[Row], delimiter: str) -> None:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)


def _write_parquet(path: Path, rows: list[Row]) -> None:
    pq.write_table(pa.Table.from_pylist(rows), path)


def _write_arrow(path: Path, rows: list[Row], writer: Callable[..., Any]) -> None:
    table = pa.Table.from_pylist(rows)
    with writer(str(path), table.schema) as file:
        file.write_table(table)


def _write_saved(path: Path, rows: list[Row]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(path, num_shards=3)


def _write_shards(path: Path, rows: list[Row], end: str, write: Callable[[Path, list[Row]], None]) -> None:
    path.mkdir()
    for shard in range(4):
        write(path / f"train-{shard:05d}-of-00004{end}", rows[shard * COUNT // 4 : (shard + 1) * COUNT // 4])


def _load(kind: str, path: Path, **options: Any) -> list[Row]:
    found: list[Row] = datasets.load_dataset(
        kind, data_files=str(path), split="train", cache_dir=path.parent / "cache", **options
    ).to_list()
    return found


def _load_folder(path: Path) -> list[Row]:
    found: list[Row] = datasets.load_dataset(str(path), split="train", cache_dir=path.parent / "cache").to_list()
    return found


def _load_saved(path: Path) -> list[Row]:
    found: list[Row] = datasets.load_from_disk(str(path)).to_list()
    return found


def _load_columns(path: Path) -> list[Row]:
    """`load_dataset` makes one row of them, `from_dict` rows."""
    found: list[Row] = datasets.Dataset.from_dict(json.loads(path.read_text())).to_list()
    return found


class Kind(NamedTuple):
    """A kind of file: how it is written, how `datasets` reads it, and what it converts, by column ("" for others)."""

    name: str
    write: Callable[[Path, list[Row]], None]
    load: Callable[[Path], list[Row]]
    converts: dict[str, Callable[[str], Any]]
    nests: bool = True


AS_CSV: dict[str, Callable[[str], Any]] = {
    "question": int,
    "answer": "True".__eq__,
    "": lambda text: None if text in MISSING else text,
}
AS_JSON: dict[str, Callable[[str], Any]] = {"context": datetime.fromisoformat}
KINDS = [
    Kind("a list.json", _write_list, partial(_load, "json"), AS_JSON),
    Kind("a list with indents.json", partial(_write_list, indent=2), partial(_load, "json"), AS_JSON),
    Kind("lines.jsonl", _write_lines, partial(_load, "json"), AS_JSON),
    Kind("gzipped lines.jsonl.gz", _write_lines, partial(_load, "json"), AS_JSON),
    Kind("columns.json", _write_columns, _load_columns, {}),
    Kind("commas.csv", partial(_write_csv, delimiter=","), partial(_load, "csv"), AS_CSV, False),
    Kind("semicolons.csv", partial(_write_csv, delimiter=";"), partial(_load, "csv", sep=";"), AS_CSV, False),
    Kind("tabs.tsv", partial(_write_csv, delimiter="\t"), partial(_load, "csv", sep="\t"), AS_CSV, False),
    Kind("a.parquet", _write_parquet, partial(_load, "parquet"), {}),
    Kind("stream.arrow", partial(_write_arrow, writer=pa.ipc.new_stream), partial(_load, "arrow"), {}),
    Kind("file.arrow", partial(_write_arrow, writer=pa.ipc.new_file), partial(_load, "arrow"), {}),
    Kind("saved", _write_saved, _load_saved, {}),
    Kind("shards of lines", partial(_write_shards, end=".jsonl", write=_write_lines), _load_folder, AS_JSON),
    Kind("shards of parquet", partial(_write_shards, end=".parquet", write=_write_parquet), _load_folder, {}),
]


def _read(path: Path) -> list[Row]:
    [source], _ = resolve_sources(DataSpec(id=str(path)))
    return [row for part in source.parts for _, row in part.rows(COLUMNS)]


def _without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _assert_equal(found: list[Row], expected: list[Row]) -> None:
    """Compare row by row: pytest would take minutes to show where long lists differ."""
    assert len(found) == len(expected)
    for number, (one, other) in enumerate(zip(found, expected, strict=True)):
        assert _without_nulls(one) == _without_nulls(other), number


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_rows_equal_those_of_datasets_but_for_what_it_converts(kind: Kind, tmp_path: Path) -> None:
    """Nulls are left out: `datasets` gives each object, and each row, the fields of all others."""
    rows, path = rows_with_conversations() if kind.nests else text_rows(), tmp_path / kind.name
    kind.write(path, rows)
    _assert_equal(_read(path), rows)
    unchanged = kind.converts.get("", lambda value: value)
    converted = [{name: kind.converts.get(name, unchanged)(value) for name, value in row.items()} for row in rows]
    _assert_equal(kind.load(path), converted)
