"""Following a file that another process writes, cuts back and begins anew."""

import json
from pathlib import Path

from rankscope.progress import Follower


def lines(first: int, last: int, width: int = 1) -> str:
    rows = ({"step": step, "train_loss": float(step), "step_seconds": 0.1} for step in range(first, last + 1))
    return "".join(json.dumps(row) + " " * width + "\n" for row in rows)


def test_only_whole_lines_are_read(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    follower = Follower(file)
    follower.read()
    assert follower.step == 0
    text = lines(1, 3)
    file.write_text(text[:-5])
    follower.read()
    assert follower.step == 2
    file.write_text(text)
    follower.read()
    assert follower.step == 3


def test_a_file_that_was_begun_anew_is_read_from_its_start(tmp_path: Path) -> None:
    """Also where it is longer by now than it was, and its lines end elsewhere."""
    file = tmp_path / "metrics.jsonl"
    for length in range(1, 12):
        follower = Follower(file)
        file.write_text(lines(1, 4))
        follower.read()
        file.write_text(lines(1, length, width=3))
        follower.read()
        assert follower.step == max(4, length)
