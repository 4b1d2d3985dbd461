"""Held-out rows as questions: the prompt, the row's own answer, and the choices that it may have.

A row's choices are its column `choices`, `options` or `endings`: a list of texts, or `{"text": [...], "label": [...]}`,
which may be written as JSON. Its own answer, which is trained on, says which is right: it is a choice's text, or a
choice's label (its own, or A, B, C, ...), and then the labels are compared. An answer that is neither goes with the
label or number (from 0) in the column `label`, `answer`, `answerKey`, `gold` or `answer_index`.
"""

from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import islice, takewhile
from string import ascii_uppercase
from typing import Any, NamedTuple

import numpy as np

from rankscope.data.conversations import Tokenizer, with_chat_template
from rankscope.data.messages import WrongRowError, parse_json
from rankscope.data.records import rows_with_columns
from rankscope.data.sources import resolve_sources
from rankscope.data.tokenize import RowReader
from rankscope.data.tokens import Example, Tokens
from rankscope.errors import DataError, shortened
from rankscope.spec.models import DataSpec
from rankscope.study.records import ChoicesRecord

_CHOICES = ("choices", "options", "endings")
_GOLD = ("label", "answer", "answerKey", "gold", "answer_index")


class Question(NamedTuple):
    """The prompt of a held-out row, and the row's own answer."""

    example: int
    prompt_ids: list[int]
    reference_ids: list[int]


def questions(held_out: Tokens, count: int, max_length: int) -> list[Question]:
    """Return the first `count` held-out rows; truncated rows come last, since their own answer is not whole."""
    order = np.argsort(held_out.lengths >= max_length, kind="stable")[:count].tolist()
    return [question(held_out, number) for number in order]


def whole_questions(held_out: Tokens, count: int, max_length: int) -> list[Question]:
    """Return the first `count` held-out rows with an answer of their own that is not truncated."""
    fitting = np.flatnonzero(held_out.lengths < max_length).tolist()
    return [question(held_out, n) for n in islice((n for n in fitting if not held_out[n].is_label[1]), count)]


def question(rows: Tokens, number: int) -> Question:
    example = rows[number]
    labels = np.flatnonzero(example.is_label)
    first = int(labels[np.flatnonzero(np.diff(labels, prepend=-2) > 1)[-1]])  # of a conversation, the last answer
    if first == 1:  # the loss is on all of the row, which has no answer of its own: ask for its second half
        first = max(1, len(example.ids) // 2)
    return Question(number, example.ids[:first].tolist(), example.ids[first : labels[-1] + 1].tolist())


def held_out_choices(
    spec: DataSpec, tokenizer: Tokenizer, held_out: Tokens, rows: Sequence[Question], asked: dict[str, Any]
) -> ChoicesRecord:
    """Read the data again, and return the choices of these held-out rows, found by their tokens, each choice in the
    place of the row's own answer. Rows without choices are left out. `spec.max_length` is that of `held_out`. Raises
    DataError: none has choices, those of a row are all the same, or a source cannot be read."""
    with_chat_template(tokenizer, spec.chat_template)
    train, evaluated = resolve_sources(spec)
    read = spec.model_copy(update={"max_rows": None}) if evaluated else spec
    reader = RowReader(spec, tokenizer, BytesIO())
    known, fault = {_key(held_out[one.example]): one.example for one in rows}, ""
    found: dict[int, tuple[int, list[Question], list[int]]] = {}
    for where, row, raw in rows_with_columns(read, evaluated or train):
        if not known:
            break
        if not isinstance(row, dict):
            continue
        example = reader.example(row)
        number = known.pop(_key(example), None) if example else None
        if number is None:
            continue
        try:
            gold, texts = _choices(raw, _answer(row))
            stripped = [text.strip() for text in texts]
            if len(set(stripped)) == 1:
                what = f"measure.task: {where}: all choices are {shortened(repr(texts[0]))}: any answer would be right"
                raise DataError(what, "Correct its choices, or leave the row out of the data.")
            scored = _scored([reader.example(_with_answer(row, text)) for text in texts], spec, tokenizer)
            gold = stripped.index(stripped[gold])  # a model's choice is the first of equal ones, too
            found[number] = gold, scored, [len(text) for text in texts]
        except WrongRowError as error:
            fault = fault or str(error)
    if not found:
        what = f"measure.task: no held-out row of {spec.name} has choices: {fault or 'its rows are not those any more'}"
        raise DataError(what, 'Give each row a column such as "choices": ["Paris", "Rome"], one of them its answer.')
    items = [found[number] for number in sorted(found)]
    return ChoicesRecord(
        asked=asked,
        example=sorted(found),
        gold=[gold for gold, _, _ in items],
        ids=[[one.prompt_ids + one.reference_ids for one in choices] for _, choices, _ in items],
        label_tokens=[[len(one.reference_ids) for one in choices] for _, choices, _ in items],
        characters=[characters for _, _, characters in items],
    )


def _key(example: Example) -> bytes:
    return example.ids.tobytes() + example.is_label.tobytes()


def _scored(examples: Sequence[Example | None], spec: DataSpec, tokenizer: Tokenizer) -> list[Question]:
    """The row with each choice as a question, whose answer ends before the tokens that end it, as in the harness."""
    if any(example is None or len(example.ids) >= spec.max_length for example in examples):
        raise WrongRowError("a choice is longer than data.max_length, or the chat template refuses it")
    rows, ends = Tokens.from_examples([one for one in examples if one]), set(tokenizer.all_special_ids)
    asked = [question(rows, number) for number in range(len(rows))]
    asked = [one._replace(reference_ids=list(takewhile(lambda id: id not in ends, one.reference_ids))) for one in asked]
    if not all(one.reference_ids for one in asked):
        raise WrongRowError("a choice is blank")
    return asked


def _choices(raw: Mapping[str, Any], answer: str) -> tuple[int, list[str]]:
    """Which choice is right, and the texts that are compared. Raises WrongRowError: the row has no choices, or none is
    its answer."""
    name = next((name for name in _CHOICES if raw.get(name)), None)
    if name is None:
        raise WrongRowError(f"no column {', '.join(_CHOICES)}")
    value = parse_json(raw[name], name, "a list of texts") if isinstance(raw[name], str) else raw[name]
    texts, own = (value.get("text"), value.get("label")) if isinstance(value, dict) else (value, None)
    if not isinstance(texts, list) or len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise WrongRowError(f"`{name}` is no list of two texts or more")
    if isinstance(own, list) and len(own) != len(texts):
        raise WrongRowError(f"`{name}` has {len(texts)} texts and {len(own)} labels")
    labels = [str(label) for label in own] if isinstance(own, list) else list(ascii_uppercase)[: len(texts)]
    for compared in (texts, labels):
        if answer.strip() in (stripped := [one.strip() for one in compared]):
            return stripped.index(answer.strip()), compared
    for value in (str(raw[name]) for name in _GOLD if name in raw):
        if value in labels:
            return labels.index(value), texts
        if value.isdigit() and int(value) < len(texts):
            return int(value), texts
    raise WrongRowError(f"the answer of a row is none of its `{name}`, nor a label of one")


def _answer(row: Mapping[str, Any]) -> str:
    """A row's own answer. Raises WrongRowError: it is plain text, and has none."""
    if "messages" in row:
        return str(row["messages"][-1]["content"])
    if "text" in row:
        raise WrongRowError("its rows are plain text, without an answer of their own")
    return str(row.get("output", row.get("completion")))


def _with_answer(row: Mapping[str, Any], text: str) -> dict[str, Any]:
    """The row with another answer."""
    if "messages" in row:
        return {**row, "messages": [*row["messages"][:-1], row["messages"][-1] | {"content": text}]}
    name = "output" if "output" in row else "completion"
    own = row[name]
    return {**row, name: own[: len(own) - len(own.lstrip())] + text.strip()}
