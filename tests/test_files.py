"""Files that are whole or absent."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rankscope.errors import DamagedError, StudyDirectoryError
from rankscope.files import (
    JsonlTail,
    JsonlWriter,
    file_sha256,
    find_json,
    folder_bytes,
    no_such,
    read_json,
    write_atomic,
    write_json,
)
from rankscope.study.metrics import read_rows


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
    assert read_rows(path) == [{"step": 1}]
    with JsonlWriter(path) as writer:
        writer.write({"step": 3})
    assert read_rows(path) == [{"step": 1}, {"step": 3}]


def test_damage_is_reported_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_text('{"step": 1}\n{"step": \n{"step": 3}\n')
    with pytest.raises(StudyDirectoryError, match="line 2"):
        read_rows(path)
    (tmp_path / "x.json").write_text("{")
    with pytest.raises(StudyDirectoryError, match="damaged"):
        read_json(tmp_path / "x.json")
    with pytest.raises(StudyDirectoryError, match="missing"):
        read_json(tmp_path / "y.json")


@pytest.mark.skipif(sys.platform != "linux", reason="/proc is Linux's")
def test_a_file_that_cannot_be_read_is_not_called_damaged(tmp_path: Path) -> None:
    """The first page of a process's memory is not there: reading it gives EIO, as a bad disk does."""
    bad = Path("/proc/self/mem")
    for read in (read_json, find_json, read_rows, file_sha256, JsonlWriter, lambda path: JsonlTail(path).read()):
        with pytest.raises(StudyDirectoryError, match=r"mem: cannot be read: Input/output error") as caught:
            read(bad)
        assert not isinstance(caught.value, DamagedError)
    assert find_json(tmp_path / "nothing" / "x.json") is None
    with pytest.raises(DamagedError, match="missing"):
        file_sha256(tmp_path / "x.json")


def test_a_schema_that_is_no_number_is_damage(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"schema": "2"})
    with pytest.raises(DamagedError, match="schema is '2'"):
        read_json(tmp_path / "x.json", schema=2)


FILL = """
import sys
from pathlib import Path
from rankscope.errors import StudyDirectoryError
from rankscope.study.metrics import read_rows
from rankscope.files import JsonlWriter
from rankscope.study.metrics import read_rows

file, lines = Path(sys.argv[1]) / "metrics.jsonl", 0
try:
    with JsonlWriter(file) as writer:
        while True:
            writer.write({"step": lines, "train_loss": 1.0})
            lines += 1
except BaseException as error:
    assert type(error) is StudyDirectoryError, repr(error)
    assert "metrics.jsonl: cannot be written: " + sys.argv[2] in str(error), error
assert [row["step"] for row in read_rows(file)] == list(range(lines)), "what was written is whole"
assert lines > 5, lines
with_room = JsonlWriter(file)
assert with_room.lines == lines, "a torn line is cut off"
"""

LIMITED = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (300, 300))\n"


def test_a_limit_of_size_is_said_once_and_as_what_it_is(tmp_path: Path) -> None:
    command = [sys.executable, "-c", LIMITED + FILL, str(tmp_path), "File too large"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_full_disk_is_said_once_and_as_what_it_is(tmp_path: Path) -> None:
    """A real one, a tmpfs of 16 kB in a namespace of its own."""
    mount = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")
    mount += (f'mount -t tmpfs -o size=16k none "{tmp_path}" && exec "$@"', "sh")
    if shutil.which("unshare") is None or subprocess.run([*mount, "true"], check=False).returncode:
        pytest.skip("this system lets nobody mount in a namespace of their own")
    command = [*mount, sys.executable, "-c", FILL, str(tmp_path), "No space left on device"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


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


def test_bytes_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "one").write_bytes(b"123")
    (tmp_path / "a" / "b" / "two").write_bytes(b"12345")
    (tmp_path / "a" / "gone").symlink_to("nowhere")  # as long as its target's name
    assert folder_bytes(tmp_path / "a") == 3 + 5 + len("nowhere")
    assert folder_bytes(tmp_path / "none") == 0


def test_what_is_not_there_names_what_is(tmp_path: Path) -> None:
    (tmp_path / "study.yaml").touch()
    assert no_such(tmp_path / "study.yml") == f"{tmp_path}/study.yml: no such file or folder; did you mean study.yaml?"
    assert no_such(tmp_path / "none" / "rows.json", "file") == f"{tmp_path}/none/rows.json: no such file"
