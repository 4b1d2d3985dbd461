"""Every shape of file gives the same rows, text stays text, and an error names the line."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa  # type: ignore[import-untyped]
import pyarrow.parquet as pq  # type: ignore[import-untyped]
import pytest

from rankscope.data.formats import COLUMNS
from rankscope.data.readers import file_part, read_text
from rankscope.errors import DataError

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "007"},
    {"instruction": "Ünïcode, “quotes”; \t| \nand\u2028lines", "input": "None", "output": 'a,b\r\n"2024-05-01"'},
    {"instruction": " NA", "input": "{x}\x0b", "output": "True"},
]


def as_csv(delimiter: str, end: str = "\r\n") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(ROWS[0]), delimiter=delimiter, lineterminator=end)
    writer.writeheader()
    writer.writerows(ROWS)
    return file.getvalue()


def lines(indent: int | None = None, between: str = "\n") -> str:
    return between.join(json.dumps(row, ensure_ascii=False, indent=indent) for row in ROWS)


COLUMNAR = {key: [row[key] for row in ROWS] for key in ROWS[0]}
SHAPES: dict[str, tuple[str, str | bytes, list[int | None]]] = {  # and the lines on which rows start
    "a list": ("a.json", json.dumps(ROWS), [None] * 3),
    "a list over several lines": ("a.json", "\n " + json.dumps(ROWS, indent=2) + "\n", [None] * 3),
    "an object a line": ("a.jsonl", lines(), [1, 2, 3]),
    "an object a line, named .json": ("a.json", lines(), [1, 2, 3]),
    "an object a line, named .NDJSON": ("A.NDJSON", lines(), [1, 2, 3]),
    "blank lines and CRLF": ("a.jsonl", "\n" + lines(between="\r\n\r\n"), [2, 4, 6]),
    "byte-order mark": ("a.jsonl", "\ufeff" + lines(), [1, 2, 3]),
    "commas after objects": ("a.jsonl", lines(between=",\n"), [1, 2, 3]),
    "objects over several lines": ("a.jsonl", lines(indent=1), [1, 6, 11]),
    "objects over several lines with commas": ("a.json", "\n" + lines(indent=1, between=",\n"), [2, 7, 12]),
    "two objects on a line": ("a.jsonl", lines(between=" "), [1, 1, 1]),
    "rows under a key": ("a.json", json.dumps({"version": 1, "data": ROWS}), [None] * 3),
    "rows under a key over several lines": ("a.json", json.dumps({"rows": ROWS, "n": 3}, indent=1), [None] * 3),
    "columns": ("a.json", json.dumps(COLUMNAR, indent=1), [None] * 3),
    "pandas' columns": ("a.json", pd.DataFrame(ROWS).to_json(), [None] * 3),
    "pandas' index": ("a.json", pd.DataFrame(ROWS).to_json(orient="index"), [None] * 3),
    "pandas' split": ("a.json", pd.DataFrame(ROWS).to_json(orient="split"), [None] * 3),
    "pandas' records": ("a.json", pd.DataFrame(ROWS).to_json(orient="records", lines=True), [1, 2, 3]),
    "gzip named .json": ("a.json", gzip.compress(lines().encode()), [1, 2, 3]),
    "gzip named .jsonl.gz": ("a.jsonl.gz", gzip.compress(lines().encode()), [1, 2, 3]),
    "bzip2": ("a.jsonl.bz2", bz2.compress(lines().encode()), [1, 2, 3]),
    "xz": ("a.jsonl.xz", lzma.compress(lines().encode()), [1, 2, 3]),
    "zstd": ("a.csv.zst", pa.compress(as_csv(",").encode(), codec="zstd", asbytes=True), [2, 3, 6]),
    "plain text named .gz": ("a.jsonl.gz", lines(), [1, 2, 3]),
    "csv": ("a.csv", as_csv(","), [2, 3, 6]),
    "csv with semicolons": ("a.csv", as_csv(";", "\n"), [2, 3, 6]),
    "csv with tabs": ("a.csv", as_csv("\t"), [2, 3, 6]),
    "csv with bars": ("a.csv", as_csv("|"), [2, 3, 6]),
    "csv in gzip with a byte-order mark": ("a.CSV.GZ", gzip.compress(("\ufeff" + as_csv(",")).encode()), [2, 3, 6]),
    "csv with columns without a name": (
        "a.csv",
        pd.DataFrame(ROWS).assign(last="").rename(columns={"last": ""}).to_csv(lineterminator="\r\n"),
        [2, 3, 6],
    ),
    "tsv": ("a.tsv", as_csv("\t", "\n"), [2, 3, 6]),
}


def write(folder: Path, name: str, content: str | bytes) -> Path:
    path = folder / name
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def rows(path: Path) -> list[dict[str, Any]]:
    return [row for _, row in file_part(path).rows(COLUMNS)]


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_rows_with_their_lines(shape: str, tmp_path: Path) -> None:
    name, content, starts = SHAPES[shape]
    found = list(file_part(write(tmp_path, name, content)).rows(COLUMNS))
    assert [row for _, row in found] == ROWS
    assert [line for line, _ in found] == starts


NESTED = [{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"b": 1}]}], "n": 1}]


def parquet(path: Path) -> None:
    pd.DataFrame(NESTED).to_parquet(path)


def stream(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_stream(file, pa.Table.from_pylist(NESTED).schema) as writer:
        writer.write_table(pa.Table.from_pylist(NESTED))


def arrow(path: Path) -> None:
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, pa.Table.from_pylist(NESTED).schema) as writer:
        writer.write_table(pa.Table.from_pylist(NESTED))


@pytest.mark.parametrize("write_table", [parquet, stream, arrow])
def test_columnar_files_give_wanted_columns_without_fields_that_are_null(
    write_table: Callable[[Path], None], tmp_path: Path
) -> None:
    path = tmp_path / ("a.parquet" if write_table is parquet else "a.arrow")
    write_table(path)
    assert list(file_part(path).rows(COLUMNS)) == [(None, {"messages": NESTED[0]["messages"]})]
    assert file_part(path).columns() == ("messages", "n")


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"instruction": "a", "output": "b"}, 1),
        ({"messages": [{"role": "user"}], "id": 7}, 1),  # a conversation is no list of rows
        ({"id": 7, "conversations": [{"from": "human"}]}, 1),
        ({"text": ["a", "b", "c"]}, 3),
        ({"messages": [[{"role": "user"}], [{"role": "user"}]]}, 2),
        ({}, 1),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_a_file_of_one_object(value: dict[str, Any], expected: int, indent: int | None, tmp_path: Path) -> None:
    found = rows(write(tmp_path, "a.json", json.dumps(value, indent=indent)))
    assert len(found) == expected
    assert expected > 1 or found == [value]


LAZY = {
    "a.jsonl": "\n".join(['{"text": "a"}'] * 3 + ["{"]).encode(),
    "a.csv": b"text\n" + b"a\n" * 3 + b"a,b\n",
    "a.jsonl.gz": gzip.compress(b'{"text": "a"}\n' * 3) + b"\x1f\x8b\x08junk",
}


@pytest.mark.parametrize("name", LAZY)
def test_only_the_rows_asked_for_are_read(name: str, tmp_path: Path) -> None:
    part = file_part(write(tmp_path, name, LAZY[name]))
    assert [row for _, row in islice(part.rows(COLUMNS), 3)] == [{"text": "a"}] * 3
    with pytest.raises(DataError, match=name):
        list(part.rows(COLUMNS))


def test_only_the_row_groups_asked_for_are_read(tmp_path: Path) -> None:
    path, texts = tmp_path / "a.parquet", [f"number {n}" for n in range(600)]
    pd.DataFrame({"text": texts}).to_parquet(path, row_group_size=300, compression=None)
    path.write_bytes(path.read_bytes().replace(b"number 599", b"\xff" * 10))
    part = file_part(path)
    assert [row["text"] for _, row in islice(part.rows(COLUMNS), 256)] == texts[:256]
    with pytest.raises(DataError, match=r"a.parquet: not readable as Parquet"):
        list(part.rows(COLUMNS))


def test_a_cell_may_be_longer_than_the_default_limit(tmp_path: Path) -> None:
    before = csv.field_size_limit(1000)
    long = "x" * 200_000
    assert rows(write(tmp_path, "a.csv", f"instruction,output\n{long},y\n"))[0]["instruction"] == long
    assert csv.field_size_limit(before) == 1000  # other readers of the process keep theirs


JSONL = lines()
BAD_JSON = "not valid JSON"
POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
MALFORMED: dict[str, tuple[str, str | bytes, str]] = {
    "unknown type": ("a.xlsx", "x", "a.xlsx: unknown file type .xlsx"),
    "pickle": ("a.pkl", b"\x80\x04", "a.pkl: unknown file type .pkl"),
    "no type": ("data", "x", "unknown file type (no suffix)"),
    "bad UTF-8": ("a.jsonl", JSONL.encode() + b'\n{"x": "\xe4"}', "a.jsonl, line 4: not valid UTF-8 (byte 0xe4)"),
    "bad UTF-8 in gzip": ("a.csv.gz", gzip.compress(b"text\na\n\xe4"), "line 3: not valid UTF-8 (byte 0xe4)"),
    "UTF-16": ("a.json", JSONL.encode("utf-16"), "a.json, line 1: not valid UTF-8"),
    "bad UTF-8 in a torn gzip": ("a.csv", gzip.compress(b"\xe4")[:-4], "a.csv: cannot be read"),
    "torn gzip": ("a.json", gzip.compress(JSONL.encode())[:-9], "a.json: cannot be read"),
    "torn bzip2": ("a.jsonl.bz2", bz2.compress(JSONL.encode())[:-9], "a.jsonl.bz2: cannot be read"),
    "torn xz": ("a.jsonl.xz", lzma.compress(JSONL.encode())[:-9], "a.jsonl.xz: cannot be read"),
    "damaged xz": ("a.jsonl.xz", b"\xfd7zXZ junk junk", "a.jsonl.xz: cannot be read"),
    "torn zstd": (
        "a.jsonl.zst",
        pa.compress(JSONL.encode(), codec="zstd", asbytes=True)[:-9],
        "a.jsonl.zst: cannot be read",
    ),
    "damaged gzip": ("a.json", b"\x1f\x8b\x08\x00junkjunkjunk", "a.json: cannot be read"),
    "bad line": ("a.jsonl", JSONL + "\n{'a': 1}", "a.jsonl, line 4: " + BAD_JSON),
    "bad line between others": ("a.jsonl", "{}\n{\n{}", "a.jsonl, line 3: " + BAD_JSON),
    "text after an object": ("a.jsonl", "{} x", "a.jsonl, line 1: not valid JSON: "),
    "bad row of a list": ("a.json", '[\n {"instruction": "a",\n "output": }\n]', "a.json, line 3: " + BAD_JSON),
    "bad row of a list that begins beside it": ("a.json", '[{"a": 1},\n{"a": }]', "a.json, line 2: " + BAD_JSON),
    "list not closed": ("a.json", '\n[\n{"a": 1}\n', "a.json, line 4: not valid JSON: Expecting ',' delimiter"),
    "object not closed": ("a.json", '{"a": 1}\n{\n"a": 1', "a.json, line 3: not valid JSON: Expecting ',' delimiter"),
    "missing comma": ("a.json", '[\n{"a": 1}\n{"a": 2}]', "a.json, line 3: not valid JSON: Expecting ',' delimiter"),
    "trailing comma": ("a.json", '[\n{"a": 1},\n]', "a.json, line 3: " + BAD_JSON),
    "text after the list": ("a.json", '[\n{"a": 1}]\n\n]', "a.json, line 4: " + BAD_JSON),
    "nested too deep": ("a.json", "[" * 100_000, "a.json, line 1: " + BAD_JSON),
    "number too long": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl, line 1: " + BAD_JSON),
    "number too long in a list": ("a.json", '[{"a": ' + "9" * 5000 + "}]", "a.json, line 1: " + BAD_JSON),
    "a list of texts": ("a.json", '[{},\n"x"]', "a.json: row 2 is text, expected an object"),
    "a line that is a number": ("a.jsonl", "{}\n7", "a.jsonl, line 2: row 2 is a number, expected an object"),
    "lists under two keys": ("a.json", '{"a": [{}], "b": [{}]}', "lists of objects lie under several keys: a, b"),
    "columns of two lengths": ("a.json", '{"a": [1], "b": [1, 2]}', "its columns have lists of different lengths"),
    "csv row too long": ("a.csv", 'instruction,output\n"a\n1",b\na,b,c\n', "a.csv, line 4: 3 values for 2 columns"),
    "csv row too short": ("a.csv", "instruction;output\na\n", "a.csv, line 2: 1 value for 2 columns"),
    "csv of one column": ("a.csv", "text\na,b\n", "a.csv, line 2: 2 values for 1 column\n"),
    "csv column twice": ("a.csv", "output,output\na,b\n", "a.csv, line 1: a column is named twice"),
    "csv after Excel's mark": ("a.csv", "sep=;\n\ninstruction;output\na\n", "a.csv, line 4: 1 value for 2 columns"),
    "csv quote not closed": ("a.csv", 'instruction,output\n"a,b\nc,d\n', "a.csv, line 2: not valid CSV"),
    "not parquet": ("a.parquet", "PAR1 no", "a.parquet: not readable as Parquet"),
    "not arrow": ("a.arrow", "ARROW1 no", "a.arrow: not readable as Arrow"),
    **{name: (name, POINTER, "a Git LFS pointer") for name in ("a.json", "a.csv.gz", "a.arrow", "a.parquet")},
}


@pytest.mark.parametrize("case", MALFORMED)
def test_a_malformed_file_is_refused_with_the_place_and_a_way_out(case: str, tmp_path: Path) -> None:
    name, content, problem = MALFORMED[case]
    with pytest.raises(DataError) as caught:
        rows(write(tmp_path, name, content))
    assert problem in str(caught.value)
    assert caught.value.todo


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet", "a.arrow", "a.txt"])
def test_a_file_that_is_gone_is_an_error_of_the_data(name: str, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=f"{name}: "):
        read_text(tmp_path / name) if name == "a.txt" else rows(tmp_path / name)


def test_a_column_of_one_name_may_come_twice_if_it_is_not_read(tmp_path: Path) -> None:
    assert rows(write(tmp_path, "a.csv", "note,text,note\na,b,c\n"))[0]["text"] == "b"
    assert rows(write(tmp_path, "a.tsv", "text\na, b\n")) == [{"text": "a, b"}]


def test_a_row_group_is_read_page_by_page(tmp_path: Path) -> None:
    """pyarrow's writer puts a million rows in one row group, which may be gigabytes."""
    path = tmp_path / "a.parquet"
    noise = random.Random(0).randbytes(10_000_000).hex()
    pq.write_table(pa.table({"text": [noise[start : start + 2000] for start in range(0, len(noise), 2000)]}), path)
    assert pq.ParquetFile(path).metadata.num_row_groups == 1
    before = pa.total_allocated_bytes()
    read = file_part(path).rows(COLUMNS)
    assert next(read)[1]["text"] == noise[:2000]
    assert pa.total_allocated_bytes() - before < 8_000_000
