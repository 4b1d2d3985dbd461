"""Files that are whole or absent."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankscope.errors import StudyDirectoryError
from rankscope.files import JsonlTail, JsonlWriter, read_json, read_jsonl, write_atomic, write_json


def test_json_round_trip_leaves_no_temporary_file(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "x.json", {"b": 1, "ü": "é"})
    assert read_json(tmp_path / "a" / "x.json") == {"b": 1, "ü": "é"}
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["x.json"]


def test_a_refused_value_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}


def test_a_kill_while_writing_leaves_the_old_file(tmp_path: Path) -> None:
    """The child kills itself between writing the temporary file and the rename."""
    path = tmp_path / "x.json"
    write_atomic(path, "old")
    code = (
        "import os, signal, sys, pathlib, rankscope.files as files\n"
        "os.replace = lambda *a: os.kill(os.getpid(), signal.SIGKILL)\n"
        "files.write_atomic(pathlib.Path(sys.argv[1]), 'new')"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], check=False)
    assert done.returncode == -signal.SIGKILL
    assert path.read_text() == "old"


def test_jsonl_drops_and_cuts_a_torn_last_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    with JsonlWriter(path) as writer:
        writer.write({"step": 1})
        writer.write({"step": 2})
    os.truncate(path, path.stat().st_size - 4)
    assert read_jsonl(path) == [{"step": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 3})
    assert read_jsonl(path) == [{"step": 1}, {"step": 3}]


def test_damage_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"a": 1}\n{"a": \n{"a": 3}\n')
    with pytest.raises(StudyDirectoryError, match="line 2"):
        read_jsonl(path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StudyDirectoryError, match="damaged"):
        read_json(tmp_path / "x.json")
    with pytest.raises(StudyDirectoryError, match="missing"):
        read_json(tmp_path / "y.json")


def test_lines_are_read_once_also_from_a_file_that_is_cut_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    whole = [b'{"step": %d, "train_loss": %s}\n' % (step, b"1" * (step + 1)) for step in range(8)]
    tail = JsonlTail(path)
    assert tail.read() == (1, [])
    seen: list[int] = []

    def read(content: list[bytes], torn: bytes = b"") -> None:
        path.write_bytes(b"".join(content) + torn)
        known = len(seen)
        first, lines = tail.read()
        seen.extend(json.loads(line)["step"] for number, line in enumerate(lines, first) if number > known)

    read(whole[:2], torn=whole[2][:9])
    assert seen == [0, 1]
    read(whole[:4])
    read(whole[:1])  # a checkpoint
    assert seen == [0, 1, 2, 3]
    read(whole[:3])
    assert seen == [0, 1, 2, 3]
    read(whole[:2])
    read(whole[:7])  # cut back and grown again between two looks
    assert seen == [0, 1, 2, 3, 4, 5, 6]
    read(whole)
    assert seen == list(range(8))
