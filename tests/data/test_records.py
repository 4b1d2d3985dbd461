"""Rows of every source come in one of four forms; every wrong row is named, blank ones are left out and counted."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets  # type: ignore[import-untyped]
import pandas as pd
import pytest

from rankscope.data.records import Records, load_records, rows_with_columns
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
ASKED, SAID = {"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}
CHAT = [ASKED, SAID]
SYSTEM = {"role": "system", "content": "Be brief."}
JSONL = "\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS)
Write = Callable[..., DataSpec]


def test_every_source_gives_the_same_rows_and_fingerprint(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "a.jsonl").write_text(JSONL)
    pd.DataFrame(ROWS).to_csv(tmp_path / "a.csv", index=False)
    pd.DataFrame(ROWS).assign(extra=1).to_parquet(tmp_path / "a.parquet")
    pd.DataFrame(ROWS).to_parquet(tmp_path / "folder" / "train.parquet")
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for name in ("a.jsonl", "a.csv", "a.parquet", "folder", "saved"):
        records = load_records(DataSpec(id=str(tmp_path / name)))
        assert (records.rows, records.fingerprint, records.format) == (ROWS, FINGERPRINT, "alpaca"), name
        assert (records.id, records.revision, records.rows_read) == (str(tmp_path / name), None, 2)
        assert records.unread_columns == (("extra",) if name == "a.parquet" else ())


@pytest.mark.parametrize(
    ("one", "other"),
    [('"input": ""', '"input": null'), ('"input": "", ', ""), ('"input"', '"score": [1.5, null], "input"')],
)
def test_no_input_and_other_columns_change_nothing(one: str, other: str, spec: Write) -> None:
    records = load_records(spec("a.jsonl", JSONL.replace(one, other)))
    assert records.fingerprint == FINGERPRINT
    assert records.unread_columns == (("score",) if "score" in other else ())


def read(spec: Write, *rows: Any, **fields: Any) -> Records:
    return load_records(spec("a.json", json.dumps(rows), **fields))


TOOL: dict[str, Any] = {"type": "function", "function": {"name": "add"}}
FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a row, and its form
    "text": ({"text": " a\n"}, {"text": " a\n"}),
    "pair": ({"prompt": "1+1=", "completion": " 2"}, {"prompt": "1+1=", "completion": " 2"}),
    "pair without prompt": ({"prompt": "", "completion": "2"}, {"prompt": "", "completion": "2"}),
    "messages": ({"messages": CHAT, "id": 1}, {"messages": CHAT}),
    "one answer of two is blank": (
        {"messages": [*CHAT, ASKED, {**SAID, "content": ""}]},
        {"messages": [*CHAT, ASKED, {**SAID, "content": ""}]},
    ),
    "conversational pair": ({"prompt": [ASKED], "completion": [SAID]}, {"messages": CHAT, "first": 1}),
    "completion that repeats its prompt": ({"prompt": [ASKED], "completion": CHAT}, {"messages": CHAT, "first": 1}),
    "completion of several messages": (
        {"prompt": [SYSTEM, ASKED], "completion": [SAID, *CHAT]},
        {"messages": [SYSTEM, *CHAT, *CHAT], "first": 2},
    ),
    "system column": ({"messages": CHAT, "system": "Be brief."}, {"messages": [SYSTEM, *CHAT]}),
    "system column said again": ({"messages": [SYSTEM, *CHAT], "system": "Be brief."}, {"messages": [SYSTEM, *CHAT]}),
    "blank system column": ({"messages": CHAT, "system": " "}, {"messages": CHAT}),
    "system column of a pair": (
        {"prompt": [ASKED], "completion": [SAID], "system": "Be brief."},
        {"messages": [SYSTEM, *CHAT], "first": 2},
    ),
    "tools and more": (
        {"messages": CHAT, "tools": [{"name": "add"}], "chat_template_kwargs": {"a": 1}, "documents": [{"b": 2}]},
        {"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"a": 1}, "documents": [{"b": 2}]},
    ),
    "tools as text": (
        {"messages": CHAT, "tools": json.dumps([TOOL]), "chat_template_kwargs": '{"a": 1}'},
        {"messages": CHAT, "tools": [TOOL], "chat_template_kwargs": {"a": 1}},
    ),
    "no tools": ({"messages": CHAT, "tools": None, "documents": []}, {"messages": CHAT}),
    "no images": ({"messages": CHAT, "images": []}, {"messages": CHAT}),
    "system and history": (
        {"instruction": "q", "output": "a", "system": "Be brief.", "history": [["b", "c"]]},
        {"instruction": "q", "input": "", "output": "a", "system": "Be brief.", "history": [["b", "c"]]},
    ),
    "history as text": (
        {"instruction": "q", "output": "a", "system": " ", "history": "[('b', 'c')]"},
        {"instruction": "q", "input": "", "output": "a", "history": [["b", "c"]]},
    ),
    "no history": (
        {"instruction": "q", "input": "i", "output": "a", "system": None, "history": []},
        {"instruction": "q", "input": "i", "output": "a"},
    ),
    "chosen": ({"prompt": "q", "chosen": "a", "rejected": "b"}, {"prompt": "q", "completion": "a"}),
    "chosen beside a prompt": (
        {"prompt": "1+1?", "chosen": CHAT, "rejected": [ASKED, {**SAID, "content": "3"}]},
        {"messages": CHAT, "first": 1},
    ),
    "chosen without a prompt": ({"chosen": CHAT, "rejected": CHAT}, {"messages": CHAT}),
    "chosen texts that begin alike": (
        {"chosen": "Human: 1+1? Assistant: 2", "rejected": "Human: 1+1? Assistant: 3"},
        {"prompt": "Human: 1+1? Assistant:", "completion": " 2"},
    ),
}


@pytest.mark.parametrize("case", FORMS)
def test_forms(case: str, spec: Write) -> None:
    row, form = FORMS[case]
    assert read(spec, row).rows == [form]


PAIR = {"prompt": "q", "completion": "a"}
QUESTION = {"instruction": "q", "output": "a"}


@pytest.mark.parametrize(
    ("right", "blank"),
    [
        (QUESTION, {"output": "\n"}),
        (QUESTION, {"instruction": None, "input": " ", "output": None}),
        (PAIR, {"completion": " "}),
        (PAIR, {"prompt": CHAT, "completion": [ASKED, {**SAID, "content": ""}]}),
        ({"messages": CHAT}, {"messages": [ASKED, {**SAID, "content": ""}]}),
        ({"messages": CHAT}, {"messages": None}),
        ({"text": "a"}, {"text": " \n"}),
    ],
)
def test_rows_without_an_answer_are_left_out_and_counted(
    right: dict[str, Any], blank: dict[str, Any], spec: Write
) -> None:
    records = read(spec, right, {**right, **blank})
    assert (len(records.rows), records.rows_read, records.left_out) == (1, 2, {"blank": 1})


@pytest.mark.parametrize(
    ("row", "column", "unread"),
    [
        (PAIR, "label", ()),
        ({"prompt": [ASKED], "completion": [SAID]}, "label", ()),
        ({"messages": CHAT}, "kto_tag", ()),
        (ROWS[0], "kto_tag", ()),
        (ROWS[0], "label", ("label",)),  # a class of the row's, as much as we know
    ],
)
def test_answers_called_bad_are_not_learned(
    row: dict[str, Any], column: str, unread: tuple[str, ...], spec: Write
) -> None:
    records = read(spec, {**row, column: True}, {**row, column: False}, {**row, column: None})
    kept = 3 if unread else 2
    assert (len(records.rows), records.rows_read, records.left_out["unwanted"]) == (kept, 3, 3 - kept)
    assert records.unread_columns == unread
    used = [found for found in rows_with_columns(records.spec, records.sources) if isinstance(found.row, dict)]
    assert len(used) == kept
    if not unread:
        with pytest.raises(DataError, match="every row says that its answer is not wanted"):
            read(spec, {**row, column: False})


def test_a_label_that_is_no_judgement_is_named(spec: Write) -> None:
    records = read(spec, {**PAIR, "label": 0}, {**PAIR, "label": 1})
    assert (len(records.rows), records.unread_columns) == (2, ("label",))


WRONG: dict[str, tuple[dict[str, Any], str]] = {
    "null output": ({"output": None}, "`output` is null, expected text"),
    "null instruction": ({"instruction": None}, "`instruction` is null"),
    "number for text": ({"output": 7}, "`output` is a number, expected text"),
    "truth for text": ({"output": True}, "`output` is true/false"),
    "list for input": ({"input": ["a"]}, "`input` is a list"),
    "NaN for text": ({"output": float("nan")}, "`output` is a number"),
    "half a surrogate": ({"output": "a\ud800"}, "`output` holds half of a surrogate pair at character 2"),
    "history without answers": ({"history": ["a"]}, "`history` holds something else than pairs"),
    "history is text": ({"history": "hello"}, "`history` is text, expected a list of pairs"),
    "image": ({"images": ["a.png"]}, "`images` is not empty, and a text model does not read it"),
    "messages are text": ({"messages": "hi"}, "`messages` is text, expected a list of messages"),
    "no message": ({"messages": []}, "`messages` is an empty list"),
    "one message": ({"messages": [SAID]}, "`messages` needs at least two"),
    "user speaks last": ({"messages": [*CHAT, ASKED]}, "`messages` ends with the role 'user', expected assistant"),
    "image in a message": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}, SAID]},
        "`messages[0].content[0]` is of type image_url, and only text is read",
    ),
    "half a surrogate in a call": (
        {"messages": [ASKED, {**SAID, "tool_calls": [{"function": {"name": "f", "arguments": {"a": "\ud800"}}}]}]},
        "`messages` holds half of a surrogate pair",
    ),
    "another system": ({"messages": [SYSTEM, *CHAT], "system": "x"}, "`system` is not what the system message"),
    "arguments of the template": ({"messages": CHAT, "chat_template_kwargs": [1]}, "is a list, expected an object"),
    "tool is a number": ({"messages": CHAT, "tools": [1]}, "`tools[0]` is a number, expected a tool"),
    "prompt is a list": ({"prompt": CHAT}, "`completion` is text but `prompt` is a list of messages"),
    "completion is a list": ({"completion": CHAT}, "`completion` is a list, expected text"),
}


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_row_is_refused_with_the_place_and_may_be_skipped(case: str, spec: Write) -> None:
    fields, problem = WRONG[case]
    right: dict[str, Any] = QUESTION
    if not fields.keys().isdisjoint(("messages", "prompt", "completion")):
        right = {"messages": CHAT} if "messages" in fields else PAIR
    with pytest.raises(DataError) as caught:
        read(spec, right, {**right, **fields})
    assert "1 row is wrong" in caught.value.what
    assert "a.json, row 2: " in caught.value.what
    assert problem in caught.value.what
    assert caught.value.exit_code == 3
    records = read(spec, right, {**right, **fields}, right, skip_bad_rows=True)
    assert (len(records.rows), records.rows_read, records.left_out["bad"]) == (2, 3, 1)
    assert problem in "".join(records.notes)


def test_the_first_wrong_rows_are_shown_and_all_are_counted(spec: Write) -> None:
    content = "\n".join(['{"instruction": "a", "output": 1}'] * 1200)
    for skip in (False, True):  # nothing is left where all are wrong
        with pytest.raises(DataError, match="1,200 rows are wrong") as caught:
            load_records(spec("a.jsonl", content, skip_bad_rows=skip))
        assert [line in str(caught.value) for line in ("line 1:", "line 3:", "line 4:")] == [True, True, False]
        assert "--skip-bad-rows" in caught.value.todo


def test_a_field_that_is_missing_in_one_row_is_named_with_those_found(spec: Write) -> None:
    with pytest.raises(DataError, match=r"a.jsonl, line 3: `output` is missing \(found instruction\)"):
        load_records(spec("a.jsonl", JSONL + '\n{"instruction": "q"}'))


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"instruction": "q", "output": ""}, "output"),
        ({"prompt": "q", "completion": " "}, "completion"),
        ({"messages": [ASKED, {**SAID, "content": "\n"}]}, "messages"),
        ({"text": ""}, "text"),
    ],
)
def test_data_without_any_answer_are_refused(row: dict[str, Any], column: str, spec: Write) -> None:
    with pytest.raises(DataError, match=f"every row's {column} is blank"):
        read(spec, row, row)


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", ""), ("a.jsonl", "\n \n"), ("a.json", "[]"), ("a.csv", "instruction,output\n")],
)
def test_a_file_without_rows_is_refused(name: str, content: str, spec: Write) -> None:
    with pytest.raises(DataError, match=f"{name}: no rows"):
        load_records(spec(name, content))


def test_blank_lines_of_a_table_are_counted(spec: Write) -> None:
    records = load_records(spec("a.csv", "instruction,output\na,b\n,\n,\n"))
    assert (len(records.rows), records.rows_read, records.left_out["blank"]) == (1, 3, 2)


def test_several_sources_are_read_in_order_each_in_its_own_format(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(JSONL)
    (tmp_path / "b.jsonl").write_text(json.dumps({"question": "q", "answer": "a", "topic": "t"}))
    (tmp_path / "c.jsonl").write_text(json.dumps({"messages": CHAT}) + '\n{"id": 1}')
    names = [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "c.jsonl")]
    asked = {"instruction": "q", "input": "", "output": "a"}
    with pytest.raises(DataError, match=r"c.jsonl, line 2: `messages` is missing"):
        load_records(DataSpec(id=tuple(names)))
    for id in (tuple(names), ",".join(names)):  # the command line's list may be one text
        records = load_records(DataSpec(id=id, skip_bad_rows=True))
        assert records.rows == [*ROWS, asked, {"messages": CHAT}]
        assert (records.id, records.format) == (" + ".join(names), "alpaca + messages")
        assert records.unread_columns == ("topic", "id")
        assert any("b.jsonl is read as alpaca: `question` as instruction" in note for note in records.notes)
    assert load_records(DataSpec(id=tuple(names), max_rows=3)).rows == [*ROWS, asked]
    assert load_records(DataSpec(id=tuple(names), max_rows=1)).rows == ROWS[:1]


def test_max_rows_reads_no_further(spec: Write) -> None:
    assert load_records(spec("a.jsonl", JSONL + "\nnot json", max_rows=2)).rows == ROWS


def test_files_of_a_folder_may_differ_in_columns_that_are_not_needed(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}')
    (tmp_path / "b.csv").write_text("id,prompt,completion\n1,q,b\n")
    records = load_records(DataSpec(id=str(tmp_path)))
    assert [row["completion"] for row in records.rows] == ["a", "b"]
    assert records.unread_columns == ("id",)


@pytest.mark.parametrize(
    ("other", "problem"),
    [
        ('{"q": "q", "a": "a"}', r"b.jsonl: found the columns q, a, which fit no format"),
        ('{"text": "q"}', r"several formats: .*a.jsonl is prompt_completion, .*b.jsonl is text"),
    ],
)
def test_files_of_a_folder_that_do_not_fit_together_are_named(other: str, problem: str, tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"prompt": "q", "completion": "a"}')
    (tmp_path / "b.jsonl").write_text(other)
    with pytest.raises(DataError, match=problem):
        load_records(DataSpec(id=str(tmp_path)))


def test_columns_that_first_come_in_a_later_row_are_read_and_named(spec: Write) -> None:
    rows = [{"messages": CHAT}] * 1500 + [{"messages": CHAT, "system": "Be brief.", "source": "x"}]
    records = read(spec, *rows)
    assert records.rows[-1]["messages"] == [SYSTEM, *CHAT]
    assert records.unread_columns == ("source",)
