"""General text to measure forgetting on: a text file, or data with a `text` column.

text -> token ids -> sequences of at most max_length tokens, every token a label

Each row begins a sequence; a text file is one row. Every sequence begins with the tokenizer's leading special tokens,
which are no labels.
"""

import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from rankscope.data.conversations import Tokenizer
from rankscope.data.prompts import special_tokens_in_front, token_ids
from rankscope.data.readers import Part, file_type, read_text
from rankscope.data.records import Records, load_records
from rankscope.data.sources import Source
from rankscope.data.tokens import Example, TokenizedData, Tokens, check_ids
from rankscope.errors import DataError
from rankscope.files import no_such
from rankscope.spec.models import DataSpec

_ROWS_PER_SEQUENCE = 16  # rows read per sequence needed: a row with text gives at least one, but many are blank
_CHARACTERS_PER_TOKEN = 16  # characters tokenised per token needed: a large file takes no longer than a small one


def with_general_text(
    data: TokenizedData, id: str, most: int, tokenizer: Tokenizer, vocab_size: int, commits: Mapping[str, str]
) -> TokenizedData:
    """Copy of `data` with the first `most` sequences of the general text `id`, truncated as its rows are; one from the
    hub is read at its commit in `commits`. Raises DataError: the text cannot be read, has no `text` column, or no token
    to predict; ModelError: the tokenizer gives ids that are not in the model's vocabulary."""
    try:
        records = _records(DataSpec(id=id, format="text", max_rows=_ROWS_PER_SEQUENCE * most, commits=dict(commits)))
    except DataError as error:
        todo = "Give a .txt file, or data whose rows have a `text` column."
        raise DataError(f"measure.forgetting: {error.what}", todo) from None
    tokens = _tokens(records, most, data.facts["max_length"], tokenizer)
    if not len(tokens):
        what = f"measure.forgetting: {id} has no token to predict within data.max_length {data.facts['max_length']}"
        raise DataError(what, "Give a text of at least a few sentences.")
    check_ids(int(tokens.ids.max()), tokenizer, vocab_size)
    facts = {
        "general_text": id,
        "general_text_revision": records.revision,
        "general_sequences": len(tokens),
        "general_label_tokens": int(tokens.is_label.sum()),
    }
    return TokenizedData(data.train, data.eval, data.facts | facts, tokens)


def _records(spec: DataSpec) -> Records:
    """Rows that have a `text`; a text file is one."""
    path = Path(os.path.expanduser(spec.name))
    if file_type(path) != ".txt":
        return load_records(spec)
    if not path.is_file():
        raise DataError(no_such(spec.name, "file"))
    text = read_text(path)
    part = Part(str(path), lambda _: iter([(None, {"text": text})]))
    return load_records(spec, [Source(spec.name, (part,))])


def _tokens(records: Records, most: int, max_length: int, tokenizer: Tokenizer) -> Tokens:
    front = special_tokens_in_front(tokenizer)
    room = max_length - len(front)
    examples: list[Example] = []
    for _, row in records.located():
        (ids,) = token_ids([row["text"][: _CHARACTERS_PER_TOKEN * most * max_length]], tokenizer)
        for start in range(0, len(ids), room) if room > 0 else ():
            sequence = np.array([*front, *ids[start : start + room]], dtype=np.int32)
            is_label = np.ones(len(sequence), dtype=np.bool_)
            is_label[: max(1, len(front))] = False
            if is_label.any():
                examples.append(Example(sequence, is_label))
        if len(examples) >= most:
            break
    return Tokens.from_examples(examples[:most])
