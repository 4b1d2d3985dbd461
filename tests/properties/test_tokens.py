"""Tokenized data is the same after saving and loading; lengths and labels are those of the examples."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankscope.data.tokens import Example, TokenizedData, Tokens, load, save
from rankscope.errors import StudyDirectoryError

IDS = st.integers(0, 2**31 - 1)
FILES = ["tokens.safetensors", "facts.json"]


def example(pairs: list[tuple[int, bool]]) -> Example:
    ids, is_label = zip(*pairs, strict=True) if pairs else ((), ())
    return Example(np.array(ids, dtype=np.int32), np.array(is_label, dtype=np.bool_))


EXAMPLE = st.lists(st.tuples(IDS, st.booleans()), max_size=12).map(example)
EXAMPLES = st.lists(EXAMPLE, max_size=8)
TEXT = st.text(st.characters(exclude_categories=["Cs"]))
FACTS = st.dictionaries(
    TEXT.map("fact-{}".format), st.none() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | TEXT
)


def same(found: Tokens, expected: Tokens) -> bool:
    return all(
        getattr(found, name).dtype == getattr(expected, name).dtype
        and np.array_equal(getattr(found, name), getattr(expected, name))
        for name in ("ids", "is_label", "offsets")
    )


@given(examples=EXAMPLES)
def test_tokens_are_their_examples(examples: list[Example]) -> None:
    tokens = Tokens.from_examples(examples)
    assert len(tokens) == len(examples)
    for found, expected in zip(tokens, examples, strict=True):
        np.testing.assert_array_equal(found.ids, expected.ids)
        np.testing.assert_array_equal(found.is_label, expected.is_label)
    assert tokens.lengths.tolist() == [len(example.ids) for example in examples]
    assert tokens.label_counts.tolist() == [int(example.is_label.sum()) for example in examples]
    assert len(tokens.ids) == tokens.offsets[-1]


@given(train=EXAMPLES, heldout=EXAMPLES, general=st.none() | EXAMPLES, facts=FACTS)
def test_saving_and_loading_changes_nothing(
    train: list[Example], heldout: list[Example], general: list[Example] | None, facts: dict[str, Any], folder: Path
) -> None:
    third = None if general is None else Tokens.from_examples(general)
    data = TokenizedData(Tokens.from_examples(train), Tokens.from_examples(heldout), facts, third)
    save(data, folder)
    found = load(folder)
    assert same(found.train, data.train)
    assert same(found.eval, data.eval)
    assert found.facts == facts
    if third is None:
        assert found.general is None
    else:
        assert found.general is not None
        assert same(found.general, third)


@given(train=EXAMPLES, name=st.sampled_from(FILES), where=st.floats(0, 1), flipped=st.integers(1, 255))
def test_a_changed_byte_is_detected(train: list[Example], name: str, where: float, flipped: int, folder: Path) -> None:
    data = TokenizedData(Tokens.from_examples(train), Tokens.from_examples([]), {"id": "x", "rows_train": len(train)})
    save(data, folder)
    content = bytearray((folder / name).read_bytes())
    content[int(where * (len(content) - 1))] ^= flipped
    (folder / name).write_bytes(content)
    try:
        found = load(folder)
    except StudyDirectoryError:
        return
    assert name == "facts.json"  # a blank for another: nothing that it says has changed
    assert found.facts == data.facts
    assert same(found.train, data.train)


def test_nothing_saved_is_an_error(folder: Path) -> None:
    with pytest.raises(StudyDirectoryError):
        load(folder / "nothing")
