"""Choices of held-out rows, in the columns of common data sets, in the place of the rows' own answers."""

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from folders import prepare
from rankscope.data.conversations import with_chat_template
from rankscope.data.questions import held_out_choices, whole_questions
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec
from rankscope.study.records import ChoicesRecord

TWICE = ["read", "sort", "read"]
TEXTS = ["read", "sort", "loop"]
ARC = {"text": TEXTS, "label": ["1", "2", "3"]}


def choices_of(root: Path, folder: Path, row: dict[str, Any], **spec: Any) -> tuple[ChoicesRecord, list[list[str]]]:
    """Choices of 16 rows like this one, each with a number in its prompt; and the texts that are compared."""
    file, tokenizer = folder / "rows.jsonl", AutoTokenizer.from_pretrained(root / "model")
    lines = [json.dumps(row).replace("NUMBER", str(number)) for number in range(16)]
    file.write_text("\n".join(lines))
    asked = DataSpec(id=str(file), eval_rows=4, **spec)
    with_chat_template(tokenizer, asked.chat_template)
    data = prepare(asked, tokenizer, 300)
    rows = whole_questions(data.eval, 100, 1024)
    found = held_out_choices(asked, tokenizer, data.eval, rows, {"items": 1})
    prompts = {row.example: row.prompt_ids for row in rows}
    for example, own in zip(found.example, found.ids, strict=True):
        assert all(ids[: len(prompts[example])] == prompts[example] for ids in own)
    pairs = zip(found.ids, found.label_tokens, strict=True)
    texts = [
        [tokenizer.decode(ids[len(ids) - count :]) for ids, count in zip(own, counts, strict=True)]
        for own, counts in pairs
    ]
    return found, texts


@pytest.mark.parametrize(
    ("row", "gold", "texts"),
    [
        ({"instruction": "NUMBER", "output": "sort", "choices": TEXTS}, 1, [" read", " sort", " loop"]),
        ({"prompt": "NUMBER ", "completion": "C", "options": TEXTS}, 2, ["A", "B", "C"]),
        ({"prompt": "NUMBER\n", "completion": "2", "choices": ARC}, 1, ["1", "2", "3"]),
        ({"prompt": "NUMBER\n", "completion": "loop", "choices": json.dumps(ARC)}, 2, TEXTS),
        ({"prompt": "NUMBER\n", "completion": "It is sort.", "endings": TEXTS, "label": 1}, 1, TEXTS),
        ({"prompt": "NUMBER\n", "completion": "sort it", "choices": ARC, "answerKey": "2"}, 1, TEXTS),
        ({"prompt": "NUMBER\n", "completion": "Reads.", "endings": TWICE, "label": 2}, 0, TWICE),  # the same text
    ],
)
def test_the_answer_says_which_choice_is_right(
    root: Path, tmp_path: Path, row: dict[str, Any], gold: int, texts: list[str]
) -> None:
    found, compared = choices_of(root, tmp_path, row)
    assert found.example == [0, 1, 2, 3]
    assert set(found.gold) == {gold}
    assert compared == [texts] * 4  # without the token that ends an answer
    assert found.characters == [[len(text.strip()) for text in texts]] * 4


def test_choices_stand_in_the_place_of_a_conversations_last_answer(root: Path, tmp_path: Path) -> None:
    turns = [("user", "NUMBER"), ("assistant", "read"), ("user", "and"), ("assistant", "loop")]
    messages = [{"role": role, "content": content} for role, content in turns]
    found, compared = choices_of(root, tmp_path, {"messages": messages, "choices": TEXTS}, chat_template="chatml")
    assert set(found.gold) == {2}
    assert compared == [TEXTS] * 4


@pytest.mark.parametrize(
    ("row", "what"),
    [
        ({"choices": ["read"]}, "no list of two texts"),
        ({"choices": [1, 2]}, "no list of two texts"),
        ({"choices": ["a", "b"]}, "none of its `choices`"),
        ({"choices": {"text": TEXTS, "label": ["1", "2", "3", "4"]}, "answerKey": "4"}, "3 texts and 4 labels"),
        ({}, "no column choices"),
        ({"choices": ["sort", "sort "]}, r"rows\.jsonl, line \d+: all choices are 'sort': any answer would be right"),
    ],
)
def test_rows_without_choices_are_refused(root: Path, tmp_path: Path, row: dict[str, Any], what: str) -> None:
    with pytest.raises(DataError, match=what):
        choices_of(root, tmp_path, {"prompt": "NUMBER\n", "completion": "sort", **row})
