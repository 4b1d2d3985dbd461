"""What the terminal says of the data before training."""

from typing import Any

import pytest

from rankscope.text.catalogue import load
from rankscope.train.prepare import LEFT_OUT, describe_data

FACTS: dict[str, Any] = {
    "id": "rows.jsonl", "rows_train": 8_800, "rows_eval": 320, "mean_length": 35.2, "max_length": 512, "truncated": 0,
    "duplicates_dropped": 0, "rows_without_label_dropped": 0,
}  # fmt: skip
LINE = "Data rows.jsonl: 8,800 rows to train on, 320 held out, 35 tokens a row"
TEXT = load("en")


def test_counts_that_are_zero_are_not_said_nor_those_that_old_facts_lack() -> None:
    assert describe_data(FACTS, TEXT) == LINE


def test_rows_cut_and_left_out_stand_on_the_same_line() -> None:
    counts = {"truncated": 3, "duplicates_dropped": 2, "blank_rows_dropped": 1, "bad_rows_dropped": 4}
    found = describe_data(FACTS | counts, TEXT)
    assert found == f"{LINE}; 3 cut to 512 tokens; rows left out: 2 duplicate, 1 blank, 4 bad"


@pytest.mark.parametrize("key", LEFT_OUT)
def test_every_count_of_rows_left_out_is_said(key: str) -> None:
    assert describe_data(FACTS | {key: 1_234}, TEXT).startswith(f"{LINE}; rows left out: 1,234 ")


def test_notes_and_warnings_follow_each_on_its_own_line() -> None:
    doubtful = {"truncated": 1_140, "answers_cut_off": 7, "rows_eval": 199}
    said = {
        "notes": ["columns not read: id, source", "2 bad rows left out:\n- row 3"],
        "warnings": ["Every row has the same prompt."],
    }
    _, *lines = describe_data(FACTS | doubtful | said, TEXT).splitlines()
    assert lines == [
        "  columns not read: id, source",
        "  2 bad rows left out:",
        "  - row 3",
        "Warning: 12.7% of the rows are cut at 512 tokens; raise data.max_length, or split them.",
        "Warning: A whole answer is cut off in 7 rows; raise data.max_length, or split long rows.",
        "Warning: With only 199 rows held out, small differences in loss may not show; give more data, or raise "
        "data.eval_rows.",
        "Warning: Every row has the same prompt.",
    ]
