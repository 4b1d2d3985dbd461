"""Doubts about the data: where each begins, its numbers, and its words in both languages."""

from pathlib import Path
from typing import Any

import pytest

from rankscope.data.doubts import DOUBTS, data_warnings, doubts
from rankscope.files import read_json
from rankscope.text.catalogue import LANGUAGES, load

FIXTURE = Path(__file__).parents[1] / "fixtures" / "study-0.1"
SOUND = {"rows_train": 9_800, "rows_eval": 200, "truncated": 500, "answers_cut_off": 0, "max_length": 1024}


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({}, {}),  # exactly 5% of the rows are cut, and exactly 200 are held out
        ({"truncated": 501}, {"rows_cut": {"share": 0.0501, "max_length": 1024}}),
        ({"answers_cut_off": 1}, {"answers_cut_off": {"rows": 1}}),
        ({"rows_eval": 199, "truncated": 0}, {"few_held_out_rows": {"rows": 199}}),
    ],
)
def test_where_a_doubt_begins(changed: dict[str, Any], expected: dict[str, Any]) -> None:
    assert doubts(SOUND | changed) == expected


def test_a_count_that_is_missing_gives_no_doubt() -> None:
    assert doubts({}) == {}
    old = read_json(FIXTURE / "data" / "facts.json")
    assert "answers_cut_off" not in old
    assert doubts(old) == {"few_held_out_rows": {"rows": 8}}
    assert doubts(old | {"truncated": 30}).keys() == {"rows_cut", "few_held_out_rows"}


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_doubt_is_put_in_words_with_its_numbers(language: str) -> None:
    facts = {"rows_train": 3_400, "rows_eval": 180, "truncated": 480, "answers_cut_off": 1_234, "max_length": 2_048}
    assert tuple(doubts(facts)) == DOUBTS
    cut, cut_off, few, own = data_warnings(facts | {"warnings": ["Every row has the same prompt."]}, load(language))
    assert "13.4%" in cut
    assert "2,048" in cut
    assert "1,234" in cut_off
    assert "180" in few
    assert own == "Every row has the same prompt."
    assert ("tokens" in cut) == (language == "en")


def test_one_row_is_not_called_rows() -> None:
    assert data_warnings(SOUND | {"answers_cut_off": 1}, load("en")) == [
        "A whole answer is cut off in 1 row; raise data.max_length, or split long rows."
    ]
