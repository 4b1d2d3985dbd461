"""What columns mean: by their own names, by a guess that is said, or as the study says; never by chance."""

from typing import Any

import pytest

from rankscope.data.formats import COLUMNS, OPTIONAL, REQUIRED, Layout, resolve_layout
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec


def layout(names: str, sample: dict[str, Any] | None = None, **fields: Any) -> Layout:
    return resolve_layout(DataSpec(id="d", **fields), names.split(), "rows.csv", sample or {})


def renamed(found: Layout) -> str:
    """Fields that another column holds, e.g. `instruction=question`."""
    return " ".join(f"{field}={column}" for field, column in sorted(found.columns.items()) if field != column)


@pytest.mark.parametrize(
    ("columns", "format"),
    [
        ("instruction output", "alpaca"),
        ("id output input instruction system", "alpaca"),
        ("prompt completion", "prompt_completion"),
        ("messages", "messages"),
        ("messages tools source", "messages"),
        ("text", "text"),
        ("text url", "text"),
        ("instruction output text", "alpaca"),  # text is the row as it was rendered
        ("prompt completion text", "prompt_completion"),
        ("messages text", "messages"),
        ("prompt messages prompt_id", "messages"),  # ultrachat's
    ],
)
def test_a_format_s_own_names(columns: str, format: str) -> None:
    found = layout(columns)
    assert (found.format, found.guessed, renamed(found)) == (format, False, "")
    assert set(found.columns) == {*REQUIRED[found.format], *OPTIONAL[found.format]}  # later rows may have any of them


@pytest.mark.parametrize(
    ("columns", "format", "fields"),
    [
        ("conversations", "messages", "messages=conversations"),
        ("id conversation", "messages", "messages=conversation"),
        ("dialogue functions", "messages", "messages=dialogue tools=functions"),
        ("question answer", "alpaca", "instruction=question output=answer"),
        ("query response", "alpaca", "instruction=query output=response"),
        ("problem solution", "alpaca", "instruction=problem output=solution"),
        ("prompt response", "alpaca", "instruction=prompt output=response"),
        ("instruction response", "alpaca", "output=response"),
        ("question completion", "alpaca", "instruction=question output=completion"),
        ("input output", "alpaca", "instruction=input"),
        ("instruction context response category", "alpaca", "input=context output=response"),  # dolly
        ("question context answer", "alpaca", "input=context instruction=question output=answer"),
        ("system question answer", "alpaca", "instruction=question output=answer"),
        ("id system_prompt question response", "alpaca", "instruction=question output=response system=system_prompt"),
        ("conversations system_message", "messages", "messages=conversations system=system_message"),
        ("prompt chosen rejected", "prompt_completion", "completion=chosen"),
        ("prompt chosen", "prompt_completion", "completion=chosen"),
        ("chosen rejected", "prompt_completion", "completion=chosen"),
    ],
)
def test_guesses_are_made_where_only_one_is_possible_and_are_said(columns: str, format: str, fields: str) -> None:
    found = layout(columns)
    assert (found.format, found.guessed, renamed(found)) == (format, True, fields)
    said = found.describe("rows.csv")
    assert said.startswith(f"rows.csv is read as {format}: ")
    assert all(f"`{pair.split('=')[1]}` as {pair.split('=')[0]}" in said for pair in fields.split())


def test_token_ids_are_refused() -> None:
    with pytest.raises(DataError, match=r"its rows are token ids already\n.*the text"):
        layout("input_ids attention_mask labels")
    assert layout("input_ids text").format == "text"


def test_chosen_conversations_are_whole() -> None:
    found = layout("chosen rejected", {"chosen": [{"role": "user"}]})
    assert (found.format, renamed(found)) == ("messages", "messages=chosen")
    assert "rejected" not in found.columns
    assert "rejected" in layout("chosen rejected", {"chosen": "text"}).columns  # the prompt is what both begin with


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ("instruction output messages", "which fit alpaca and messages"),
        ("instruction output prompt completion", "which fit alpaca and prompt_completion"),
        ("question answer response", "can be read in several ways"),
        ("question query answer", "can be read in several ways"),
        ("conversations question answer", "can be read in several ways"),
        ("conversations dialogue", "can be read in several ways"),
        ("q a", "fit no format: alpaca needs instruction and output"),
        ("instruction", "fit no format"),
        ("answer", "fit no format"),
        ("Text", "fit no format"),
        ("context answer", "fit no format"),
        ("", r"found the columns \(none\), which fit no format"),
    ],
)
def test_ambiguous_columns_are_refused_with_their_names(columns: str, problem: str) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        layout(columns)
    assert f"rows.csv: found the columns {', '.join(columns.split()) or '(none)'}" in caught.value.what
    assert "--columns" in caught.value.todo or "data.format" in caught.value.todo


@pytest.mark.parametrize(
    ("columns", "fields", "format", "expected"),
    [
        ("q a", {"prompt": "q", "completion": "a"}, "prompt_completion", "completion=a prompt=q"),
        ("q a i", {"instruction": "q", "output": "a", "input": "i"}, "alpaca", "input=i instruction=q output=a"),
        ("question answer", {"prompt": "question", "completion": "answer"}, "prompt_completion",
         "completion=answer prompt=question"),
        ("chat", {"messages": "chat"}, "messages", "messages=chat"),
        ("chat apis", {"messages": "chat", "tools": "apis"}, "messages", "messages=chat tools=apis"),
        ("body text", {"text": "body"}, "text", "text=body"),
        ("instruction reply", {"output": "reply"}, "alpaca", "output=reply"),
        ("instruction output text", {"text": "text"}, "text", ""),  # what the study names comes first
        ("instruction output better", {"output": "better"}, "alpaca", "output=better"),
        ("instruction output", {"instruction": "output", "output": "instruction"}, "alpaca",
         "instruction=output output=instruction"),
    ],
)  # fmt: skip
def test_the_study_says_what_columns_mean(columns: str, fields: dict[str, str], format: str, expected: str) -> None:
    found = layout(columns, columns=fields)
    assert (found.format, found.guessed, renamed(found)) == (format, False, expected)


@pytest.mark.parametrize(
    ("columns", "given", "problem"),
    [
        ("q a", {"columns": {"prompt": "question"}}, "no column question, which data.columns names; found q, a"),
        ("q a", {"columns": {"prompt": "q"}}, "fit no format"),
        ("question answer", {"columns": {"prompt": "question"}}, "fit no format"),  # no guess beside what is said
        (
            "instruction output",
            {"format": "messages"},
            "found the columns instruction, output; the format messages needs messages",
        ),
        ("text", {"format": "alpaca"}, r"needs instruction and output \(input is optional\)"),
        ("question answer", {"format": "prompt_completion"}, "needs prompt and completion"),
    ],
)
def test_a_study_that_does_not_fit_the_columns_is_refused(columns: str, given: dict[str, Any], problem: str) -> None:
    with pytest.raises(DataError, match=problem):
        layout(columns, **given)


@pytest.mark.parametrize("format", REQUIRED)
def test_the_study_s_format_decides_between_several(format: str) -> None:
    everything = "instruction output prompt completion messages text"
    assert layout(everything, format=format).format == format
    with pytest.raises(DataError, match="fit alpaca and prompt_completion and messages"):
        layout(everything)


def test_every_column_that_a_format_reads_is_loaded() -> None:
    assert set().union(*REQUIRED.values(), *OPTIONAL.values()) <= COLUMNS
    for columns in ("question context answer", "dialogue functions", "chosen rejected"):
        assert set(layout(columns).columns.values()) <= COLUMNS
