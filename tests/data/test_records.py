"""Every source and format gives the same rows; every malformed input says where it is wrong."""

import csv
import gzip
import hashlib
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import datasets  # type: ignore[import-untyped]
import pandas as pd
import pytest
from datasets.packaged_modules.parquet.parquet import Parquet  # type: ignore[import-untyped]

from rankscope.data.records import load_records
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec

ROWS = [
    {"instruction": "Say hi", "input": "", "output": "hi"},
    {"instruction": "Ünïcode, “quotes”\nand\u2028lines", "input": "{x}, 'y'", "output": 'a,b\n"c"'},
]
FINGERPRINT = hashlib.sha256(
    '{"input":"","instruction":"Say hi","output":"hi"}\n'
    '{"input":"{x}, \'y\'","instruction":"Ünïcode, “quotes”\\nand\u2028lines",'
    '"output":"a,b\\n\\"c\\""}\n'.encode()
).hexdigest()
CHAT = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
Write = Callable[..., DataSpec]


def as_csv(rows: list[dict[str, str]]) -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    return file.getvalue()


JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
TEXTS: dict[str, tuple[str, str | bytes]] = {
    "json list": ("a.json", json.dumps(ROWS)),
    "json list, indented": ("a.json", "\n " + json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n"),
    "json that is one object a line": ("a.json", JSONL),
    "jsonl": ("a.jsonl", JSONL + "\n"),
    "jsonl with blank lines and CRLF": ("a.jsonl", "\n" + JSONL.replace("\n", "\r\n\r\n")),
    "byte-order mark": ("a.jsonl", "\ufeff" + JSONL),
    "gzip named .json": ("a.json", gzip.compress(json.dumps(ROWS).encode())),
    "jsonl.gz": ("a.jsonl.gz", gzip.compress(JSONL.encode())),
    "csv": ("a.csv", as_csv(ROWS)),
    "null input": ("a.jsonl", JSONL.replace('"input": ""', '"input": null')),
    "absent input": ("a.jsonl", JSONL.replace('"input": "", ', "")),
    "unknown columns": ("a.jsonl", JSONL.replace('"input"', '"score": [1.5, null], "input"')),
}


@pytest.mark.parametrize("case", TEXTS)
def test_every_text_file_gives_the_same_rows_and_fingerprint(case: str, spec: Write) -> None:
    records = load_records(spec(*TEXTS[case]))
    assert records.rows == ROWS
    assert records.format == "alpaca"
    assert records.fingerprint == FINGERPRINT
    assert records.revision is None


def test_parquet_and_folders_give_the_same_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    pd.DataFrame(ROWS).assign(extra=1).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(ROWS).to_parquet(tmp_path / "folder" / "train.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    found = [load_records(DataSpec(id=str(tmp_path / name))) for name in ("a.parquet", "folder", "saved")]
    assert [records.rows for records in found] == [ROWS] * 3
    assert len({records.fingerprint for records in found}) == 1


def test_saved_data_give_the_split_asked_for(tmp_path: Path) -> None:
    saved = {"train": datasets.Dataset.from_list(ROWS[:1]), "test": datasets.Dataset.from_list(ROWS[1:])}
    datasets.DatasetDict(saved).save_to_disk(tmp_path / "saved")
    assert load_records(DataSpec(id=str(tmp_path / "saved"), split="test")).rows == ROWS[1:]
    with pytest.raises(DataError, match=r"saved: cannot be loaded: .* the splits train, test"):
        load_records(DataSpec(id=str(tmp_path / "saved"), split="validation"))


def test_hub_data_is_asked_for_as_the_spec_says_and_its_commit_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / commit)
    [arrow] = (tmp_path / commit).glob("*.arrow")
    asked: dict[str, Any] = {}

    class Builder(Parquet):
        def __init__(self) -> None:
            self.config = SimpleNamespace(data_files={"test": [f"hf://datasets/owner/name@{commit}/a.parquet"]})

        def download_and_prepare(self) -> None:
            asked["prepared"] = True

        def as_dataset(self, split: str) -> datasets.Dataset:
            assert asked["prepared"]
            asked["split"] = split
            return datasets.Dataset.from_file(str(arrow))

    def load_dataset_builder(path: str, **options: Any) -> Builder:
        asked.update(path=path, **options)
        return Builder()

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    spec = DataSpec(id="owner/name", config="code", split="test", revision="main", max_rows=1)
    records = load_records(spec)
    del asked["prepared"]
    assert asked == {"path": "owner/name", "name": "code", "split": "test", "revision": "main"}
    assert records.rows == ROWS[:1]
    assert (records.id, records.revision) == ("owner/name", commit)


def test_hub_failure_says_what_to_check(monkeypatch: pytest.MonkeyPatch) -> None:
    def load_dataset_builder(path: str, **options: Any) -> datasets.DatasetBuilder:
        raise ConnectionError("Couldn't reach 'owner/name' on the Hub")

    monkeypatch.setattr(datasets, "load_dataset_builder", load_dataset_builder)
    with pytest.raises(DataError, match=r"owner/name: cannot be loaded: ConnectionError: Couldn't.*\n.*local file"):
        load_records(DataSpec(id="owner/name"))


def test_max_rows_takes_the_first(spec: Write) -> None:
    assert load_records(spec("a.jsonl", JSONL + "\nnot json", max_rows=2)).rows == ROWS


def test_prompt_completion_texts_and_messages(spec: Write) -> None:
    rows = [{"prompt": "1+1=", "completion": "2"}, {"prompt": CHAT[:1], "completion": CHAT[1:]}]
    records = load_records(spec("a.json", json.dumps(rows)))
    assert records.format == "prompt_completion"
    assert records.rows == rows


def test_messages_keep_role_and_content(spec: Write) -> None:
    records = load_records(spec("a.json", json.dumps([{"messages": [{**m, "weight": 1} for m in CHAT]}])))
    assert records.format == "messages"
    assert records.rows == [{"messages": CHAT}]


def test_csv_fields_may_be_longer_than_the_default_limit(spec: Write) -> None:
    before = csv.field_size_limit()
    rows = [{"instruction": "x" * 200_000, "output": "y"}]
    assert load_records(spec("a.csv", as_csv(rows))).rows[0]["instruction"] == "x" * 200_000
    assert csv.field_size_limit() == before


def one(**fields: Any) -> str:
    return json.dumps([{"instruction": "q", "output": "a"}, {"instruction": "q", "output": "a", **fields}])


def chat(*messages: Any) -> str:
    return json.dumps([{"messages": CHAT}, {"messages": list(messages)}])


NAMED, BAD_JSON = "a.json", "not valid JSON"
MALFORMED: dict[str, tuple[str, str | bytes, str]] = {
    "empty file": (NAMED, "", "a.json: no rows"),
    "only blanks": ("a.jsonl", "\n \n", "a.jsonl: no rows"),
    "empty list": (NAMED, "[]", "a.json: no rows"),
    "csv without rows": ("a.csv", "instruction,output\n", "a.csv: no rows"),
    "unknown type": ("a.xlsx", "x", "a.xlsx: unknown file type .xlsx"),
    "pickle": ("a.pkl", b"\x80\x04", "a.pkl: unknown file type .pkl"),
    "no type": ("data", "x", "unknown file type (no suffix)"),
    "bad UTF-8": (
        "a.jsonl",
        JSONL.encode() + b'\n{"x": "\xe4"}',
        "a.jsonl, line 3: not valid UTF-8 (byte 0xe4)",
    ),
    "UTF-16": ("a.json", JSONL.encode("utf-16"), "a.json, line 1: not valid UTF-8"),
    "torn gzip": (NAMED, gzip.compress(JSONL.encode())[:-9], "a.json: cannot be read"),
    "damaged gzip": (NAMED, b"\x1f\x8b\x08\x00junkjunkjunk", "a.json: cannot be read"),
    "bad line": ("a.jsonl", JSONL + "\n{'a': 1}", "a.jsonl, line 3: " + BAD_JSON),
    "two objects on a line": ("a.jsonl", "{} {}", "a.jsonl, line 1: not valid JSON: Extra data"),
    "bad row of a list": (NAMED, '[\n {"instruction": "a",\n "output": }\n]', "a.json, line 3: " + BAD_JSON),
    "list not closed": (
        NAMED,
        '[\n{"instruction": "a"}\n',
        "a.json, line 3: not valid JSON: Expecting ',' delimiter",
    ),
    "missing comma": (NAMED, '[\n{"a": 1}\n{"a": 2}]', "a.json, line 3: not valid JSON: Expecting ',' delimiter"),
    "trailing comma": (NAMED, '[\n{"a": 1},\n]', "a.json, line 3: " + BAD_JSON),
    "text after the list": (NAMED, '[\n{"a": 1}]\n\n]', "a.json, line 4: not valid JSON: Extra data"),
    "nested too deep": (NAMED, "[" * 100_000, "a.json: " + BAD_JSON),
    "number too long": ("a.jsonl", '{"a": ' + "9" * 5000 + "}", "a.jsonl, line 1: " + BAD_JSON),
    "number too long in a list": (NAMED, '[{"a": ' + "9" * 5000 + "}]", "a.json: " + BAD_JSON),
    "one indented object": (
        NAMED,
        '{\n"instruction": "a"}',
        "expected is one list of objects, or one object a line",
    ),
    "a list of texts": (NAMED, '[{},\n"x"]', "a.json: row 2 is text, expected an object"),
    "a line that is a number": ("a.jsonl", "{}\n7", "a.jsonl, line 2: row 2 is a number, expected an object"),
    "columns of no format": (
        NAMED,
        '[{"q": "x", "a": "y"}]',
        "found the columns q, a, which fit no format: alpaca",
    ),
    "columns of two formats": (
        NAMED,
        '[{"instruction": "", "output": "", "messages": []}]',
        "which fit alpaca and messages",
    ),
    "null output": (NAMED, one(output=None), "a.json, row 2: `output` is null, expected text"),
    "null instruction": (NAMED, one(instruction=None), "row 2: `instruction` is null"),
    "number for text": (NAMED, one(output=7), "row 2: `output` is a number, expected text"),
    "truth for text": (NAMED, one(output=True), "row 2: `output` is true/false"),
    "list for input": (NAMED, one(input=["a"]), "row 2: `input` is a list"),
    "NaN for text": (NAMED, one(output=float("nan")), "row 2: `output` is a number"),
    "half a surrogate": (
        NAMED,
        one(output="a\ud800"),
        "row 2: `output` holds half of a surrogate pair at character 2",
    ),
    "field missing in one row": (
        "a.jsonl",
        JSONL + '\n{"instruction": "q"}',
        "a.jsonl, line 3: `output` is missing (found instruction)",
    ),
    "csv row too long": (
        "a.csv",
        'instruction,output\n"a\n1",b\na,b,c\n',
        "a.csv, line 4: 3 values for 2 columns",
    ),
    "csv row too short": ("a.csv", "instruction,output\na\n", "a.csv, line 2: 1 value for 2 columns"),
    "csv column twice": ("a.csv", "output,output\na,b\n", "a.csv, line 1: a column is named twice"),
    "csv quote not closed": ("a.csv", 'instruction,output\n"a,b\n', "a.csv, line 2: not valid CSV"),
    "not parquet": ("a.parquet", "PAR1 no", "a.parquet: not readable as Parquet"),
    "messages are text": (
        NAMED,
        '[{"messages": "hi"}]',
        "row 1: `messages` is text, expected a list of messages",
    ),
    "no message": (NAMED, chat(), "row 2: `messages` is an empty list"),
    "one message": (NAMED, chat(CHAT[1]), "row 2: `messages` needs at least two"),
    "user speaks last": (NAMED, chat(*CHAT, CHAT[0]), "row 2: `messages` ends with the role 'user'"),
    "content is null": (NAMED, chat({"role": "user", "content": None}), "`messages[0].content` is null"),
    "content is parts": (NAMED, chat({"role": "user", "content": []}), "`messages[0].content` is a list"),
    "role missing": (NAMED, chat({"content": "x"}), "`messages[0].role` is null"),
    "message is text": (NAMED, chat("hi"), "`messages[0]` is text, expected an object with role and content"),
    "prompt is a list": (
        NAMED,
        json.dumps([{"prompt": CHAT, "completion": "x"}]),
        "`completion` is text but `prompt` is a list of messages",
    ),
    "completion is a list": (
        NAMED,
        json.dumps([{"prompt": "x", "completion": CHAT}]),
        "`completion` is a list, expected text",
    ),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_input_is_refused_with_the_place_and_a_way_out(case: str, spec: Write) -> None:
    name, content, expected = MALFORMED[case]
    with pytest.raises(DataError) as caught:
        load_records(spec(name, content))
    assert expected in str(caught.value)
    assert caught.value.todo
    assert caught.value.exit_code == 3


def test_the_first_wrong_rows_are_shown_and_all_are_counted(spec: Write) -> None:
    content = "\n".join(['{"instruction": "a", "output": 1}'] * 1200)
    with pytest.raises(DataError, match="1,200 rows are wrong") as caught:
        load_records(spec("a.jsonl", content))
    assert [line in str(caught.value) for line in ("line 1:", "line 3:", "line 4:")] == [True, True, False]


def test_parquet_columns_of_no_format_are_named(tmp_path: Path) -> None:
    pd.DataFrame({"question": ["a"], "answer": ["b"]}).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(DataError, match="found the columns question, answer, which fit no format"):
        load_records(DataSpec(id=str(tmp_path / "a.parquet")))


def test_a_format_that_the_columns_do_not_fit_says_what_it_needs(spec: Write) -> None:
    with pytest.raises(DataError, match="found the columns instruction, output; the format messages needs messages"):
        load_records(spec("a.json", one(), format="messages"))


@pytest.mark.parametrize("missing", ["no.json", "./no", "a/b/c", "/no/where", "no.jsonl.gz", "C:\\data"])
def test_a_missing_file_is_not_looked_for_on_the_hub(missing: str) -> None:
    with pytest.raises(DataError, match=re.escape(f"{missing}: no such file or folder")):
        load_records(DataSpec(id=missing))


@pytest.mark.parametrize(("field", "value"), [("split", "test"), ("config", "x"), ("revision", "main")])
def test_a_file_has_no_split_config_or_revision(field: str, value: str, spec: Write) -> None:
    with pytest.raises(DataError, match=f"data.{field} is '{value}', but local data has no {field}"):
        load_records(spec("a.json", one(), **{field: value}))


def test_a_folder_with_a_loading_script_is_not_executed(tmp_path: Path) -> None:
    folder = tmp_path / "trap"
    folder.mkdir()
    (folder / "trap.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(DataError, match="scripts are no longer supported"):
        load_records(DataSpec(id=str(folder)))
    assert not (tmp_path / "ran").exists()


def test_a_folder_without_the_split_says_which_there_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "train.jsonl").write_text(JSONL)
    with pytest.raises(DataError, match=r"Unknown split .test.\. Should be one of \['train'\]"):
        load_records(DataSpec(id=str(tmp_path / "folder"), split="test"))
