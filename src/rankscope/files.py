"""Files that are whole or absent: JSON published by rename, JSONL that survives a torn last line."""

import hashlib
import json
import os
import stat
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from safetensors import SafetensorError

from rankscope.errors import RankscopeError, StudyDirectoryError


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """A temporary file beside `path` for the body to fill; then it is flushed to disk and renamed, and so the folder.

    A reader sees the old file or the new one, never a part (the recipe of inspect_ai and of git).

    Raises:
        StudyDirectoryError: the disk is full, or the folder cannot be written.
    """
    with writing(path):
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


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Says of an error in the body that `path` cannot be written, and why."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RankscopeError) or (isinstance(error, SafetensorError) and "I/O error" not in str(error)):
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StudyDirectoryError(
            f"{path}: cannot be written: {reason}",
            "Mend that, or choose another --out, and run again: a study that has begun goes on where it was.",
        ) from error


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
    """Publishes a JSON object, with the hash of all else as its last key, `sha256`. NaN and infinity are refused: they
    are not JSON."""
    write_atomic(path, _json({**value, "sha256": _digest(value)}))


def read_json(path: Path) -> dict[str, Any]:
    """Reads what `write_json` wrote, without the hash.

    Raises:
        StudyDirectoryError: the file is missing, damaged, or not what was written.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise StudyDirectoryError(f"{path}: missing", "Run the study again: only what is missing is done.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise damaged(path, str(error)) from None
    if not isinstance(value, dict):
        raise damaged(path, f"expected a JSON object, found {type(value).__name__}")
    if value.pop("sha256", None) != _digest(value):
        raise damaged(path, "its content does not match its sha256")
    return value


def damaged(path: Path, how: str) -> StudyDirectoryError:
    """The error of a file that is not what was written."""
    return StudyDirectoryError(f"{path}: damaged: {how}", "Run the study again: what is damaged is made again.")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def file_sha256(path: Path) -> str:
    """The hash of a file's bytes."""
    with path.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def file_hashes(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """The hash of each file in `folder` that a pattern matches, by its name there."""
    files = sorted(file for pattern in patterns for file in folder.glob(pattern))
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in files}


def inside(root: Path, *parts: str) -> Path:
    """`root/PARTS`, which lies in `root` wherever names in a file, or symbolic links, would lead.

    `root` itself may be reached by a link.

    Raises:
        StudyDirectoryError: a part is absolute, has `..` or a NUL, or a link leads out of `root`.
    """
    name, path = Path(*parts), root.joinpath(*parts)
    if name.is_absolute() or ".." in name.parts or "\0" in str(name):
        raise StudyDirectoryError(
            f"{root}: {str(name)!r} is no name of a file in it", "Use the study only if you know who changed it."
        )
    try:
        stays = path.resolve().is_relative_to(root.resolve())
    except (OSError, RuntimeError):  # links in a circle
        stays = False
    if not stays:
        raise StudyDirectoryError(
            f"{path}: a symbolic link that leads out of {root}",
            "If you know who made it, put a copy of what it points to in its place; else remove it.",
        )
    return path


def refuse_links_out(root: Path) -> None:
    """Looks at everything under `root` before any of it is read or written through.

    Raises:
        StudyDirectoryError: there is a symbolic link that leads out of `root`, or something that is neither a file nor
            a folder, such as a pipe, which would be waited for without end.
    """
    for folder, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = Path(folder, name)
            try:
                mode = path.lstat().st_mode
            except FileNotFoundError:  # a temporary file, published since
                continue
            if stat.S_ISLNK(mode):
                inside(root, str(path.relative_to(root)))
            elif not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                raise StudyDirectoryError(
                    f"{path}: neither a file nor a folder", "Remove it: no study has such things."
                )


class JsonlWriter:
    """Appends one JSON object a line. What a kill left behind is cut off first: a torn last line, and where `keep` is
    given all after so many lines. `lines` and `sha256` are of the whole file."""

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            lines = path.read_bytes().splitlines(keepends=True)
            whole = [line for line in lines[:keep] if line.endswith(b"\n")]
            os.truncate(path, sum(map(len, whole)))
        else:
            whole = []
        self.lines, self._hash = len(whole), hashlib.sha256(b"".join(whole))
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: Mapping[str, Any]) -> None:
        line = json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n"
        with writing(self._path):
            self._file.write(line)
            self._file.flush()
        self.lines += 1
        self._hash.update(line.encode())

    @property
    def sha256(self) -> str:
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Writes all lines so far to disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        if not self._file.closed:
            self.sync()
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JsonlTail:
    """The whole lines of a JSONL file that grows, and that may be cut back or begun anew meanwhile."""

    def __init__(self, path: Path) -> None:
        self._path, self._offset, self._lines = path, 0, 0

    def read(self) -> tuple[int, list[bytes]]:
        """What is new since the last call, and the number of its first line: 1 where it is the whole file."""
        try:
            with self._path.open("rb") as file:
                file.seek(max(0, self._offset - 1))
                if self._offset and file.read(1) != b"\n":  # cut back or begun anew, and perhaps grown since
                    self._offset = self._lines = 0
                    file.seek(0)
                content = file.read()
        except FileNotFoundError:
            content = b""
        whole = content[: content.rfind(b"\n") + 1]
        first, lines = self._lines + 1, whole.splitlines()
        self._offset += len(whole)
        self._lines += len(lines)
        return first, lines


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
            raise damaged(path, f"line {number}: {error}") from None
        rows.append(row)
    return rows
