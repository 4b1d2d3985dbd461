"""General text to measure forgetting on: a text file, or data with a `text` column.

text -> token ids -> sequences of at most max_length tokens, every token a label

Each row begins a sequence; a text file is one row. Every sequence begins with the tokenizer's leading special tokens,
which are no labels.
"""

import os
from collections.abc import Mapping
from itertools import islice
from pathlib import Path
from types import MappingProxyType

import numpy as np

from rankscope.data.conversations import Tokenizer
from rankscope.data.messages import WrongRowError, checked_text
from rankscope.data.prompts import special_tokens_in_front, token_ids
from rankscope.data.readers import Part, listed, read_text
from rankscope.data.sources import Source, resolve_sources
from rankscope.data.tokens import Example, TokenizedData, Tokens, check_ids
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec

_COLUMN = "text"
_ROWS_PER_SEQUENCE = 16  # rows read per sequence needed: a row with text gives at least one, but many are blank
_CHARACTERS_PER_TOKEN = 16  # characters tokenised per token needed: a large file takes no longer than a small one


def with_general_text(
    data: TokenizedData,
    id: str,
    most: int,
    tokenizer: Tokenizer,
    vocab_size: int,
    commits: Mapping[str, str] = MappingProxyType({}),
) -> TokenizedData:
    """Copy of `data` with the first `most` sequences of the general text `id`, truncated as its rows are; one from the
    hub is read at its commit in `commits`. Raises DataError: the text cannot be read, has no `text` column, or no token
    to predict; ModelError: the tokenizer gives ids that are not in the model's vocabulary."""
    try:
        source = _source(id, commits)
        tokens = _tokens(source, id, most, data.facts["max_length"], tokenizer, vocab_size)
    except DataError as error:
        raise DataError(f"measure.forgetting: {error.what}", error.todo) from None
    facts = {
        "general_text": id,
        "general_text_revision": source.revision,
        "general_sequences": len(tokens),
        "general_label_tokens": int(tokens.is_label.sum()),
    }
    return TokenizedData(data.train, data.eval, data.facts | facts, tokens)


def _tokens(source: Source, id: str, most: int, max_length: int, tokenizer: Tokenizer, vocab_size: int) -> Tokens:
    front = special_tokens_in_front(tokenizer)
    room = max_length - len(front)
    examples: list[Example] = []
    rows = ((part, index, *row) for part in source.parts for index, row in enumerate(part.rows((_COLUMN,))))
    for part, index, line, row in islice(rows, _ROWS_PER_SEQUENCE * most):
        try:
            text = checked_text(row.get(_COLUMN), _COLUMN)
        except WrongRowError as error:
            if _COLUMN not in row:
                raise _unfit(f"{part.name}: found the columns {listed(row)}, but no `{_COLUMN}`") from None
            raise DataError(f"{part.where(line, index)}: {error}", "Correct or remove it.") from None
        if not text.strip():
            continue
        (ids,) = token_ids([text[: _CHARACTERS_PER_TOKEN * most * max_length]], tokenizer)
        for start in range(0, len(ids), room) if room > 0 else ():
            sequence = np.array([*front, *ids[start : start + room]], dtype=np.int32)
            is_label = np.ones(len(sequence), dtype=np.bool_)
            is_label[: max(1, len(front))] = False
            if is_label.any():
                examples.append(Example(sequence, is_label))
        if len(examples) >= most:
            break
    if not examples:
        what = f"{id} has no token to predict within data.max_length {max_length}"
        raise DataError(what, "Give a text of at least a few sentences.")
    check_ids(max(int(example.ids.max()) for example in examples[:most]), tokenizer, vocab_size)
    return Tokens.from_examples(examples[:most])


def _source(id: str, commits: Mapping[str, str]) -> Source:
    """Data with a `text` column, or a text file as one row."""
    path = Path(os.path.expanduser(id))
    if path.name.lower().endswith((".txt", ".txt.gz")):
        if not path.is_file():
            raise _unfit(f"{id}: no such file")
        return Source(id, (Part(str(path), lambda _: iter([(None, {_COLUMN: read_text(path)})])),))
    try:
        [source], _ = resolve_sources(DataSpec(id=id, commits=dict(commits)))
    except DataError as error:
        raise _unfit(error.what) from None
    return source


def _unfit(what: str) -> DataError:
    return DataError(what, f"Give a .txt file, or data whose rows have a `{_COLUMN}` column.")
