"""Whatever a file holds, reading it gives the rows that were written, or a DataError of a few lines."""

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from rankscope.data.formats import COLUMNS
from rankscope.data.records import Records, load_records
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20) | st.sampled_from(
    ["[", "{}", "\r\n", "\ufeff", '"', ",", "\u2028", "\x00", "null", " x ", "{input}"]
)
ANSWER = TEXT.filter(str.strip)  # a source in which all answers are blank is refused
ALPACA = st.fixed_dictionaries({"instruction": TEXT, "input": TEXT, "output": ANSWER})
PAIR = st.fixed_dictionaries({"prompt": TEXT, "completion": ANSWER})
MESSAGE = st.fixed_dictionaries({"role": TEXT, "content": TEXT})
CHAT = st.builds(
    lambda earlier, answer: {"messages": [*earlier, {"role": "assistant", "content": answer}]},
    st.lists(MESSAGE, min_size=1, max_size=3),
    ANSWER,
)
FLAT = st.one_of(
    st.lists(row, min_size=1, max_size=6) for row in (ALPACA, PAIR, st.fixed_dictionaries({"text": ANSWER}))
)
ROWS = FLAT | st.lists(CHAT, min_size=1, max_size=6)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=6,
)
FIELDS = st.sampled_from(
    [
        *sorted(COLUMNS),
        *("role", "content", "from", "value", "weight", "tool_calls", "function", "name", "arguments", "type"),
    ]
)
NEARLY_ROW = st.dictionaries(FIELDS, JSON | st.lists(st.dictionaries(FIELDS, JSON, max_size=3), max_size=3), max_size=4)
PIECES = st.sampled_from(
    [b"[", b"]", b"{", b"}", b",", b":", b'"', b"\\", b"\\u", b"\n", b"\r", b"\xff", b"\xef\xbb\xbf", b"\x00", b"1e999",
     b"NaN", b"null", b'"instruction"', b'"output"', b"instruction,output\n", b'{"prompt":"a","completion":"b"}',
     b"\x1f\x8b\x08", b"PAR1", b"9" * 5000, b"[" * 2000]
)  # fmt: skip
CONTENT = st.binary(max_size=60) | st.lists(PIECES | st.binary(max_size=3), max_size=12).map(b"".join)


def as_json(rows: list[dict[str, Any]], indent: int | None, ascii: bool) -> str:
    return json.dumps(rows, indent=indent, ensure_ascii=ascii)


def as_jsonl(rows: list[dict[str, Any]], end: str, ascii: bool) -> str:
    return "".join(json.dumps(row, ensure_ascii=ascii) + end for row in rows)


def as_objects(rows: list[dict[str, Any]], indent: int, between: str, ascii: bool) -> str:
    return between.join(json.dumps(row, indent=indent, ensure_ascii=ascii) for row in rows)


def as_csv(rows: list[dict[str, Any]], end: str, delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    returns = any("\r" in text for row in rows for text in row.values())  # which Python 3.11 forgets to quote
    quoting = csv.QUOTE_ALL if returns else csv.QUOTE_MINIMAL
    writer = csv.DictWriter(file, list(rows[0]), delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


ENDS = st.sampled_from(["\n", "\r\n", "\n\n"])


@st.composite
def files(draw: st.DrawFn) -> tuple[list[dict[str, Any]], str, bytes]:
    """Rows, and a file that holds them: its suffix and its bytes."""
    kind = draw(st.sampled_from([".json", ".jsonl", ".csv", ".tsv"]))
    rows: list[dict[str, Any]] = draw(FLAT if kind in (".csv", ".tsv") else ROWS)
    if kind in (".csv", ".tsv"):
        marks = ",;\t|" if len(rows[0]) > 1 else "\t" if kind == ".tsv" else ","  # one column's name does not tell
        text = as_csv(rows, draw(ENDS), draw(st.sampled_from(marks)))
    elif draw(st.booleans()):
        text = as_objects(rows, draw(st.integers(0, 3)), draw(st.sampled_from(["\n", ",\n", " "])), draw(st.booleans()))
    elif kind == ".jsonl" or draw(st.booleans()):
        text = as_jsonl(rows, draw(ENDS), draw(st.booleans()))
    else:
        text = as_json(rows, draw(st.none() | st.integers(0, 3)), draw(st.booleans()))
    content = draw(st.sampled_from([b"", b"\xef\xbb\xbf"])) + text.encode()
    return rows, kind, gzip.compress(content) if draw(st.booleans()) else content


@st.composite
def mutated(draw: st.DrawFn) -> tuple[str, bytes]:
    """A file of which a few bytes are lost, changed, repeated or added."""
    _, kind, content = draw(files())
    for _ in range(draw(st.integers(1, 3))):
        start, stop = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        put = draw(st.just(b"") | CONTENT | st.just(content[start:stop] * 2))
        content = content[:start] + put + content[stop:]
    return kind, gzip.compress(content) if draw(st.booleans()) else content


def read(path: Path, content: bytes) -> Records | None:
    """The records, or None where they are refused as they should be."""
    path.write_bytes(content)
    try:
        return load_records(DataSpec(id=str(path)))
    except DataError as caught:
        error = caught
    shown = str(error).replace(str(path), "FILE").splitlines()
    assert error.todo
    assert 2 <= len(shown) <= 8, shown
    assert max(map(len, shown)) < 500, shown
    assert "FILE" in "".join(shown)
    return None


@given(file=files())
def test_what_is_written_is_read(file: tuple[list[dict[str, Any]], str, bytes], folder: Path) -> None:
    rows, kind, content = file
    records = read(folder / f"a{kind}", content)
    assert records is not None
    assert records.rows == rows


@given(rows=FLAT, end=ENDS)
def test_the_fingerprint_is_of_the_rows(rows: list[dict[str, Any]], end: str, folder: Path) -> None:
    texts = {".json": as_json(rows, 1, False), ".jsonl": as_jsonl(rows, end, True), ".csv": as_csv(rows, end)}
    found = [read(folder / f"a{kind}", text.encode()) for kind, text in texts.items()]
    assert len({records and records.fingerprint for records in found}) == 1


@example(kind=".csv", content=b",," + b"9" * 5000 + b"\n", zipped=False)  # a name that would fill the screen
@example(kind=".csv", content=b'instruction,output\n"a,b', zipped=False)
@example(kind=".json", content=gzip.compress(b"[]")[:-3] + b"xyz", zipped=False)
@given(kind=st.sampled_from([".json", ".jsonl", ".csv", ".parquet"]), content=CONTENT, zipped=st.booleans())
def test_any_bytes_are_read_or_refused(kind: str, content: bytes, zipped: bool, folder: Path) -> None:
    read(folder / f"a{kind}", gzip.compress(content) if zipped else content)


@given(file=mutated())
def test_a_corrupt_file_is_read_or_refused(file: tuple[str, bytes], folder: Path) -> None:
    kind, content = file
    records = read(folder / f"a{kind}", content)
    for row in records.rows if records else ():
        json.dumps(row, ensure_ascii=False).encode()  # no half of a surrogate pair is let through


@example(rows=[{"instruction": "half \ud800", "output": "x"}], valid=[], lines=False)
@given(rows=st.lists(NEARLY_ROW | JSON, max_size=4), valid=st.lists(ALPACA, max_size=1), lines=st.booleans())
def test_any_json_is_read_or_refused(rows: list[Any], valid: list[Any], lines: bool, folder: Path) -> None:
    rows = valid + rows
    text = "\n".join(map(json.dumps, rows)) if lines else json.dumps(rows)
    records = read(folder / "a.json", text.encode())
    for row in records.rows if records else ():
        json.dumps(row, ensure_ascii=False).encode()
