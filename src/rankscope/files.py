"""Files that are whole or absent: JSON published by rename, JSONL that survives a torn last line."""

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rankscope.errors import StudyDirectoryError


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` for the body to fill; then it is flushed to disk and renamed, and so the folder.

    A reader sees the old file or the new one, never a part (the recipe of inspect_ai and of git).
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent)
    os.close(handle)
    temporary = Path(name)
    try:
        yield temporary
        _flush(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _flush(path.parent)  # the rename too survives a power cut


def write_atomic(path: Path, content: bytes | str) -> None:
    """Publishes a file with this content."""
    with published(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _flush(path: Path) -> None:
    """Writes a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publishes a JSON object. NaN and infinity are refused: they are not JSON."""
    write_atomic(path, json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        StudyDirectoryError: the file is missing, damaged, or not an object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyDirectoryError(f"{path}: missing", "Run the study again: only what is missing is done.") from None
    except (OSError, ValueError) as error:
        raise StudyDirectoryError(
            f"{path}: damaged: {error}", "Delete this file and run the study again: only what is missing is done."
        ) from None
    if not isinstance(value, dict):
        raise StudyDirectoryError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


class JsonlWriter:
    """Appends one JSON object a line. A torn last line, left by a kill, is cut off before the first append."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            content = path.read_bytes()
            whole = content.rfind(b"\n") + 1
            if whole < len(content):
                os.truncate(path, whole)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        if not self._file.closed:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """Reads the whole lines of a JSONL file; a torn last line is dropped, a missing file is empty.

    Raises:
        StudyDirectoryError: a line that is not the last is damaged.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    rows = []
    for number, line in enumerate(lines[:-1], start=1):  # what follows the last newline is torn, or empty
        try:
            row = json.loads(line)
        except ValueError as error:
            raise StudyDirectoryError(
                f"{path}, line {number}: damaged: {error}",
                "Delete the trial's folder and run the study again: only what is missing is done.",
            ) from None
        rows.append(row)
    return rows
