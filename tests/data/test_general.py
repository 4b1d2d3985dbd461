"""General text as sequences: their cut, their labels, where they come from, what is wrong with them."""

import gzip
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from rankscope.data.general import with_general_text
from rankscope.data.tokens import Example, TokenizedData, Tokens, load, save
from rankscope.errors import DataError, ModelError

TEXT = "The list is sorted. Write a function that adds two numbers, and returns them.\n" * 20


def sequences(path: Path, tokenizer: PreTrainedTokenizerFast, most: int = 64, max_length: int = 32) -> Tokens:
    return general(path, most, max_length, tokenizer, len(tokenizer))


def general(path: Path, most: int, max_length: int, tokenizer: PreTrainedTokenizerFast, vocab_size: int) -> Tokens:
    row = Tokens.from_examples([Example(np.array([1, 2], np.int32), np.array([False, True]))])
    data = TokenizedData(row, row, {"max_length": max_length})
    tokens = with_general_text(data, str(path), most, tokenizer, vocab_size, {}).general
    assert tokens is not None
    return tokens


def test_a_text_file_is_cut_and_every_token_is_a_label(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT)
    tokens = sequences(path, tokenizer)
    bos = tokenizer.bos_token_id
    assert all(ids[0] == bos for ids, _ in tokens)
    assert all(is_label.tolist() == [False] + [True] * (len(ids) - 1) for ids, is_label in tokens)
    assert (tokens.lengths[:-1] == 32).all()
    assert tokens.lengths[-1] <= 32
    joined = np.concatenate([ids[1:] for ids, _ in tokens])
    assert joined.tolist() == tokenizer(TEXT, add_special_tokens=False)["input_ids"]


def test_without_a_token_in_front_the_first_is_no_label(
    tmp_path: Path, make_tokenizer: Callable[..., PreTrainedTokenizerFast]
) -> None:
    path = tmp_path / "book.txt"
    path.write_text("a b")
    (example,) = sequences(path, make_tokenizer(None))
    assert example.is_label.tolist() == [False] + [True] * (len(example.ids) - 1)


def test_only_the_first_sequences_are_kept(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    path = tmp_path / "book.txt"
    path.write_text(TEXT * 1000)
    tokens = sequences(path, tokenizer, most=3)
    assert tokens.lengths.tolist() == [32, 32, 32]
    (first, *_) = sequences(path, tokenizer)
    assert first.ids.tolist() == tokens[0].ids.tolist()


def test_rows_with_a_text_column_are_sequences_of_their_own(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"text": "one two", "id": 1}, {"text": " \n", "id": 2}, {"text": "three", "id": 3}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pd.DataFrame(rows).to_csv(tmp_path / "rows.csv", index=False)
    pd.DataFrame(rows).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_list(rows).save_to_disk(str(tmp_path / "folder"))
    with gzip.open(tmp_path / "text.txt.gz", "wt") as file:
        file.write("one two")
    expected = [tokenizer(text)["input_ids"] for text in ("one two", "three")]
    for name in ("rows.jsonl", "rows.csv", "rows.parquet", "folder"):
        assert [ids.tolist() for ids, _ in sequences(tmp_path / name, tokenizer)] == expected, name
    assert [ids.tolist() for ids, _ in sequences(tmp_path / "text.txt.gz", tokenizer)] == expected[:1]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.txt", " \n\n", "empty.txt: every row's text is blank"),
        ("missing.txt", None, "missing.txt: no such file"),
        ("missing.jsonl", None, "missing.jsonl: no such file or folder"),
        ("rows.jsonl", '{"content": "a"}', "found the columns content; the format text needs text"),
        ("rows.jsonl", '{"text": 7}', "line 1: `text` is a number, expected text"),
        ("rows.jsonl", '{"text": "a"', "line 1: not valid JSON"),
        ("latin.txt", b"\xff", "line 1: not valid UTF-8"),
        ("book.docx", "x", "unknown file type .docx"),
    ],
)
def test_errors_name_the_field_and_the_place(
    name: str, content: str | bytes | None, message: str, tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content.encode() if isinstance(content, str) else content)
    with pytest.raises(DataError) as caught:
        sequences(tmp_path / name, tokenizer)
    assert message in str(caught.value)
    assert "measure.forgetting" in str(caught.value)


def test_nothing_fits_in_one_token(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    with pytest.raises(DataError, match="max_length 1"):
        sequences(tmp_path / "book.txt", tokenizer, max_length=1)


def test_ids_that_the_model_lacks(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    with pytest.raises(ModelError, match="vocabulary has 10"):
        general(tmp_path / "book.txt", 4, 32, tokenizer, 10)


def test_it_is_stored_with_the_study_s_tokens(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    tokens = sequences(tmp_path / "book.txt", tokenizer)
    bare = TokenizedData(tokens, tokens, {"max_length": 32})
    data = with_general_text(bare, str(tmp_path / "book.txt"), 2, tokenizer, len(tokenizer), {})
    assert data.facts["general_sequences"] == 2
    assert data.facts["general_label_tokens"] == 62
    for name, stored in (("bare", bare), ("general", data)):
        save(stored, tmp_path / name)
        found = load(tmp_path / name)
        assert found.facts == stored.facts
        assert (found.general is None) == (stored.general is None)
    assert found.general is not None
    np.testing.assert_array_equal(found.general.ids, tokens.ids[:64])
    np.testing.assert_array_equal(found.general.label_counts, [31, 31])
