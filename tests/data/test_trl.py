"""Tokens and labels are those of TRL's SFTTrainer, row by row, apart from the exceptions listed here.

`benchmarks/trl_tokens.py` wrote TRL's into trl/reference.json and says what it holds.
"""

import json
from collections.abc import Callable
from copy import copy
from fnmatch import fnmatchcase
from functools import cache
from io import BytesIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from transformers import PreTrainedTokenizerBase

from rankscope.data.conversations import with_chat_template
from rankscope.data.records import load_records
from rankscope.data.tokenize import RowReader, _example
from rankscope.errors import RankscopeError
from rankscope.model.load import load_tokenizer
from rankscope.spec.models import DataSpec, ModelSpec

FOLDER = Path(__file__).with_name("trl")
CASES: dict[str, dict[str, Any]] = {
    case["name"]: case for case in json.loads((FOLDER / "reference.json").read_text(encoding="utf-8"))["cases"]
}


class Sequence(NamedTuple):
    """One row as the model reads it."""

    ids: list[int]
    labels: set[int]  # positions with a loss; never the first, which nothing predicts


class Difference(NamedTuple):
    """Rows of which rankscope makes something else than TRL."""

    cases: str  # a pattern of the cases' names
    rows: tuple[int, ...] | None  # None: all
    reason: str
    refused: str | None = None  # where rankscope leaves the row out or refuses it: part of the message


_BLANK = "A blank answer teaches to say nothing: rankscope leaves it out and counts it."
_NO_END = "TRL fails too, by accident: `endswith` of None."
_ROLES = "human and gpt are user and assistant. TRL writes the names as they are, which no model has seen as roles."
_LINE_BREAK = "TRL's own template for Qwen2.5 begins the answer with the line break after the word assistant."
_THOUGHTS = "TRL's own template for Qwen3 keeps the thoughts of all answers; the model's drops those of earlier ones."
_EMPTY_THOUGHT = "TRL's own template for Qwen3 writes an empty thought before a call, too; the model's does not."

_BORDER = "A prompt is tokenised as at inference; TRL merges its end with the answer's beginning."
_UNANSWERED = "A conversation without its last answer is probably cut: it is named, and --skip-bad-rows leaves it out."

EXCEPTIONS = [
    *(
        Difference(f"prompt_completion-{name}", (2, 3), _BORDER)
        for name in ("plain", "chatml", "nobos", "spm", "spm-ll")
    ),
    Difference("prompt_completion-mistral-zephyr", (2, 3, 10), _BORDER),
    Difference("user_last-*", None, _UNANSWERED, refused="ends with the role 'user'"),
    Difference("long-*-assistant_only_loss", (0,), "A conversation is cut at the last answer that fits whole."),
    Difference("prompt_completion-*", (5,), _BLANK, refused="blank"),
    Difference("text-*", (4,), _BLANK, refused="blank"),
    Difference("messages-*", (4,), _BLANK, refused="blank"),
    Difference("conversational-*", (4,), _BLANK, refused="blank"),
    Difference(
        "prompt_completion-addseos", (0, 1, 2, 3, 4, 6, 7, 8, 9, 10), "The tokenizer adds an end; TRL adds a second."
    ),
    Difference("text-addseos", (0, 1, 2, 3), "The tokenizer adds an end; TRL adds a second."),
    Difference(
        "prompt_completion-byt5",
        (9, 10),
        "TRL adds the end as text, and ByT5 strips white space before it: the answer loses what it ends in.",
    ),
    Difference("text-byt5", (1,), "As with prompt and completion."),
    Difference("prompt_completion-noeos", (0, 1, 2, 3, 4, 6, 7, 8, 9, 10), _NO_END, refused="no end-of-sequence token"),
    Difference("text-noeos", (0, 1, 2, 3), _NO_END, refused="no end-of-sequence token"),
    Difference("messages-plain", (0, 1, 2, 3, 5), "TRL refuses too.", refused="no chat template"),
    Difference("system-nosystem", None, "TRL refuses too.", refused="System role not supported"),
    Difference("parts-*", None, "Parts of a text are one text. TRL writes the list as Python does: `[{'type': ...`."),
    Difference("weight-*", None, "An answer with weight 0 is not learned. TRL does not read the weight."),
    Difference("sharegpt-*", None, _ROLES),
    Difference("roles-*", (0,), _ROLES),
    Difference("conversations-*", None, "TRL reads this column with from and value only, and fails."),
    Difference("sharegpt_roles-*-assistant_only_loss", None, "TRL looks for messages before it renames the column."),
    Difference("system_column-*", None, "The system prompt is the conversation's. TRL does not read it."),
    Difference(
        "messages-chatml-assistant_only_loss",
        (0, 1, 2, 3, 5),
        "TRL refuses a template without generation markers that is none of those it knows; rankscope masks by prefixes",
    ),
    Difference("messages-*qwen2_5*", (0, 1, 2, 3, 5), _LINE_BREAK),
    Difference("system-*qwen2_5*", None, _LINE_BREAK),
    Difference("think-*qwen2_5*", None, _LINE_BREAK),
    Difference("reasoning-*qwen2_5*", None, _LINE_BREAK),
    Difference("tools-*qwen2_5*", None, _LINE_BREAK),
    Difference("tools_completion-*qwen2_5*", (0,), _LINE_BREAK),
    Difference("conversational-*qwen2_5*-assistant_only_loss", (6,), _LINE_BREAK),
    Difference("messages-*qwen3*", (1,), _THOUGHTS),
    Difference("system-*qwen3*", (1,), _THOUGHTS),
    Difference("conversational-*qwen3*-assistant_only_loss", (1, 6), _THOUGHTS),
    Difference("think-*qwen3*", (1,), _THOUGHTS),
    Difference("reasoning-*qwen3*", (1,), _THOUGHTS),
    Difference("tools-*qwen3*", (0, 1), _EMPTY_THOUGHT),
    Difference("tools_completion-*qwen3*", (0, 2), _EMPTY_THOUGHT),
]


@cache
def tokenizer_of(model: Path) -> PreTrainedTokenizerBase:
    return load_tokenizer(ModelSpec(id=str(model)))


def ours(model: Path, row: dict[str, Any], folder: Path, **fields: Any) -> Sequence:
    """Tokens and labels that rankscope makes of `row`; `folder` takes a file of it."""
    path = folder / "row.json"
    path.write_text(json.dumps([row]))
    spec = DataSpec(id=str(path), **fields)
    tokenizer = copy(tokenizer_of(model))
    with_chat_template(tokenizer, spec.chat_template)
    [found] = RowReader(spec, tokenizer, BytesIO()).encoded(load_records(spec).located())
    example = _example(*found, spec.max_length)
    return Sequence(example.ids.tolist(), set(example.is_label.nonzero()[0].tolist()))


def fields_of(case: dict[str, Any]) -> dict[str, Any]:
    """rankscope's fields for TRL's options."""
    options = {"max_length": 256, **case["options"]}
    if template := options.pop("template", None):
        options["chat_template"] = (FOLDER / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    has_prompt = case["rows"] in ("prompt_completion", "conversational", "tools_completion", "long_completion")
    learned = "completion" if options.pop("completion_only_loss", has_prompt) else "all"
    return {"loss_on": "assistant" if options.pop("assistant_only_loss", False) else learned, **options}


def rows_of(case: dict[str, Any]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (FOLDER / f"{case['rows']}.jsonl").read_text(encoding="utf-8").splitlines()]


def theirs(case: dict[str, Any]) -> dict[int, Sequence]:
    """TRL's sequences by row, without those that it drops."""
    return {
        found["row"]: Sequence(
            found["input_ids"], {position for span in found["labels"] for position in range(*span)} - {0}
        )
        for found in case.get("sequences", ())
    }


def difference(name: str, row: int) -> Difference | None:
    found = [
        exception
        for exception in EXCEPTIONS
        if fnmatchcase(name, exception.cases) and (exception.rows is None or row in exception.rows)
    ]
    assert len(found) < 2, found
    return found[0] if found else None


@pytest.mark.parametrize("name", CASES)
def test_equal_to_trl(name: str, case_model: Callable[[str], Path], tmp_path: Path) -> None:
    case = CASES[name]
    expected = theirs(case)
    for number, row in enumerate(rows_of(case)):
        exception = difference(name, number)
        found: Sequence | str
        try:
            found = ours(case_model(case["model"]), row, tmp_path, **fields_of(case))
        except RankscopeError as error:
            found = str(error)
        if exception and exception.refused:
            assert isinstance(found, str), f"row {number} is not refused"
            assert exception.refused in found, f"row {number}"
        elif exception:
            assert isinstance(found, Sequence), f"row {number}"
            assert found != expected.get(number), f"row {number} is no exception: {exception.reason}"
        elif number in expected:
            assert found == expected[number], f"row {number}"
        else:  # TRL drops what has no label within max_length
            assert isinstance(found, Sequence), f"row {number}"
            assert not found.labels, f"row {number}"


def test_every_exception_is_of_a_case() -> None:
    rows = [(name, number) for name, case in CASES.items() for number in range(len(rows_of(case)))]
    met = {difference(name, number) for name, number in rows}
    assert [exception for exception in EXCEPTIONS if exception not in met] == []


def test_where_trl_fails_is_an_exception() -> None:
    failing = [
        (name, number) for name, case in CASES.items() if "error" in case for number in range(len(rows_of(case)))
    ]
    assert [name for name, number in failing if difference(name, number) is None] == []


def test_answers_found_by_prefixes_are_those_of_generation_markers(
    case_model: Callable[[str], Path], tmp_path: Path
) -> None:
    """The templates of chatml and generation write the same text; TRL masks the latter by its markers."""
    case = CASES["messages-generation-assistant_only_loss"]
    expected = theirs(case)
    for number, row in enumerate(rows_of(case)):
        if not row["messages"][-1]["content"]:
            continue
        assert ours(case_model("chatml"), row, tmp_path, **fields_of(case)) == expected[number]
