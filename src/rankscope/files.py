"""Files that are whole or absent: JSON published by rename, JSONL that survives a torn last line."""

import errno
import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Self

from safetensors import SafetensorError

from rankscope.errors import REPOSITORY, DamagedError, RankscopeError, StudyDirectoryError, StudyError, did_you_mean

_MEND = "Mend that, or choose another --out, and run again: a study that has begun goes on where it was."
_TEMPORARY = re.compile(r"\..+\.[a-z0-9_]{8}\.tmp")  # names of files that `published` has not renamed yet
_DIGEST_AND_END = re.compile(rb'[0-9a-f]{64}"\n}\n')


@contextmanager
def published(path: Path) -> Iterator[Path]:
    """Temporary file beside `path` for the body to fill, which is then flushed to disk and renamed to `path`: a reader
    sees the old file or the new one. Raises StudyDirectoryError: the disk is full, or the folder cannot be written."""
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
def published_folder(path: Path) -> Iterator[Path]:
    """`published` for a folder. Raises also as `check_empty`."""
    with writing(path):
        check_empty(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}.", suffix=".tmp", dir=path.parent) as scratch:
            folder = Path(scratch, path.name)
            folder.mkdir()
            yield folder
            for part in (*folder.rglob("*"), folder):
                _flush(part)
            folder.replace(path)
        _flush(path.parent)


def folder_bytes(folder: Path) -> int:
    """Bytes of the files in `folder` and below it; 0 where there is no such folder. A link counts as itself."""
    return sum(Path(place, name).lstat().st_size for place, _, names in os.walk(folder) for name in names)


def no_such(path: str | Path, what: str = "file or folder") -> str:
    """`x: no such file or folder; did you mean y?`, of what lies beside it."""
    names = list[str]()
    with suppress(OSError):
        names = os.listdir(os.path.dirname(path) or ".")
    return f"{path}: no such {what}{did_you_mean(os.path.basename(path), names)}"


def check_empty(folder: Path) -> None:
    """Raise StudyError where something is at `folder` already: nothing is overwritten."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StudyError(f"{folder} exists and is not empty", "Choose another --out, or remove it.")


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an error of the body into one that says why `path` cannot be written; not a lack of memory."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if isinstance(error, RankscopeError) or (isinstance(error, SafetensorError) and "I/O error" not in str(error)):
            raise
        if isinstance(error, OSError) and error.errno == errno.ENOMEM:
            raise
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise StudyDirectoryError(f"{path}: cannot be written: {reason}", _MEND) from error


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an error of the body into DamagedError where `path` is missing, and into StudyDirectoryError where it cannot
    be read, which does not mean that it is corrupt."""
    try:
        yield
    except FileNotFoundError:
        raise missing_error(path) from None
    except OSError as error:
        if isinstance(error, RankscopeError):
            raise
        what = f"{path}: cannot be read: {error.strerror or error}"
        raise StudyDirectoryError(what, "Mend that and try again: nothing was removed.") from error


@contextmanager
def corrupt_on_error(path: Path) -> Iterator[None]:
    """Turn an error of the body, which uses the content of `path`, into a DamagedError: somebody may have changed both
    content and hash."""
    try:
        yield
    except (KeyError, IndexError, TypeError, ValueError, AttributeError, SafetensorError) as error:
        if isinstance(error, RankscopeError):
            raise
        raise damaged_error(path, f"not as it is written: {type(error).__name__}: {error}") from error


def write_atomic(path: Path, content: bytes | str) -> None:
    with published(path) as temporary:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)


def _flush(path: Path) -> None:
    """Write a file's bytes, or a folder's entries, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Publish a JSON object with the hash of all other keys as its last key, `sha256`. NaN and infinity are refused."""
    write_atomic(path, _json({**value, "sha256": _digest(value)}))


def read_json(path: Path, schema: int = 1) -> dict[str, Any]:
    """What `write_json` wrote, without the hash. `schema` is the newest that the caller knows. Raises DamagedError: the
    file is missing or corrupt; StudyDirectoryError: it cannot be read, or a newer version wrote it."""
    with reading(path):
        content = path.read_bytes()
    return parse_json(content, path, schema)


def parse_json(content: bytes, path: Path, schema: int = 1) -> dict[str, Any]:
    """`read_json` of `content`, which was read from `path` before."""
    try:
        value = json.loads(content.decode())
    except (ValueError, RecursionError) as error:
        raise damaged_error(path, str(error)) from None
    if not isinstance(value, dict):
        raise damaged_error(path, f"expected a JSON object, found {type(value).__name__}")
    sha256 = value.pop("sha256", None)
    if sha256 is None or (sha256 != _digest_as_written(content) and sha256 != _digest(value)):
        raise damaged_error(path, "its content does not match its sha256")
    found = value.get("schema", schema)  # the oldest files have none
    if not isinstance(found, int):
        raise damaged_error(path, f"its schema is {found!r}, no number")
    if found > schema:
        raise StudyDirectoryError(
            f"{path}: made by a newer rankscope: its schema is {found}, and this version knows {schema} at most",
            f"Use that version, from {REPOSITORY}, or choose another --out.",
        )
    return value


def find_json(path: Path, schema: int = 1) -> dict[str, Any] | None:
    """`read_json`, or None where the file does not exist."""
    return read_json(path, schema) if exists(path) else None


def exists(path: Path) -> bool:
    """Whether anything is at `path`. Raises StudyDirectoryError: its folder cannot be read."""
    with reading(path), suppress(FileNotFoundError):
        path.lstat()
        return True
    return False


def missing_error(path: Path) -> DamagedError:
    return DamagedError(f"{path}: missing", "Run the study again: only what is missing is done.")


def damaged_error(path: Path, how: str) -> DamagedError:
    return DamagedError(f"{path}: damaged: {how}", "Run the study again: what is damaged is made again.")


def _json(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _digest(value: Mapping[str, Any]) -> str:
    return hashlib.sha256(_json(value).encode("utf-8", "surrogatepass")).hexdigest()


def _digest_as_written(content: bytes) -> str | None:
    """Digest of a file that `write_json` wrote, from its bytes; None if another program wrote them. Serializing every
    value again to hash it would take most of the time of reading thousands of files."""
    rest, key, end = content.rpartition(b',\n "sha256": "')
    whole = key and _DIGEST_AND_END.fullmatch(end)
    return hashlib.sha256(rest + b"\n}\n").hexdigest() if whole else None


def file_sha256(path: Path) -> str:
    with reading(path), path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_whole(path: Path, sha256: str | None) -> bytes:
    """Bytes of a file. Raises as `reading`; DamagedError: its hash is not `sha256`, where that is given."""
    with reading(path):
        content = path.read_bytes()
    if sha256 is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise unlike_its_hash(path)
    return content


def unlike_its_hash(path: Path) -> DamagedError:
    """Error for a trial's file with another hash than trial.json has."""
    return damaged_error(path, "its content does not match its hash in trial.json")


def file_hashes(folder: Path, patterns: Sequence[str]) -> dict[str, str]:
    """Hash of each file in `folder` that a pattern matches, by relative path, without those of killed writers."""
    found = sorted(file for pattern in patterns for file in folder.glob(pattern) if not file.name.startswith("."))
    return {file.relative_to(folder).as_posix(): file_sha256(file) for file in found}


def leftovers(folder: Path) -> Iterator[Path]:
    """Temporary files in `folder` and below it, of live or killed writers."""
    for parent, _, names in os.walk(folder):
        yield from (Path(parent, name) for name in names if _TEMPORARY.fullmatch(name))


def is_free(folder: Path) -> bool:
    """Whether a study may begin in `folder`: it is missing, or has only what a killed start left behind."""
    with reading(folder), suppress(FileNotFoundError, NotADirectoryError):
        return all(_TEMPORARY.fullmatch(file.name) for file in folder.iterdir())
    return not exists(folder)


def inside(root: Path, *parts: str) -> Path:
    """`root/PARTS`, for names read from a file of the study. Raises StudyDirectoryError: a part is absolute, or has
    `..` or a NUL."""
    name = "/".join(parts)
    if any(map(os.path.isabs, parts)) or ".." in name.split("/") or "\0" in name:
        what = f"{root}: {name!r} is no name of a file in it"
        raise StudyDirectoryError(what, "Use the study only if you know who changed it.")
    return root.joinpath(*parts)


def refuse_links_out(root: Path) -> None:
    """Check everything below `root`, which may be a link itself, before any of it is read or written. Raises
    StudyDirectoryError: a symbolic link leads out of `root`, or something is neither a file nor a folder, such as a
    pipe, which would block its reader forever."""
    for folder, folders, files in os.walk(root):  # a folder that cannot be listed is passed over: reading in it raises
        for path in (os.path.join(folder, name) for name in folders + files):
            if os.path.islink(path):
                leads_out = True
                with suppress(OSError, RuntimeError):  # links in a circle
                    leads_out = not Path(path).resolve().is_relative_to(root.resolve())
                if leads_out:
                    todo = "If you know who made it, put a copy of what it points to in its place; else remove it."
                    raise StudyDirectoryError(f"{path}: a symbolic link that leads out of {root}", todo)
            elif not (os.path.isdir(path) or os.path.isfile(path)) and os.path.lexists(path):  # else published since
                raise StudyDirectoryError(f"{path}: neither a file nor a folder", "Remove it.")


class JsonlWriter:
    """Appends one JSON object per line. A torn last line, and all after the first `keep`, are removed at the start."""

    def __init__(self, path: Path, keep: int | None = None) -> None:
        self._path = path
        lines: list[bytes] = []
        with reading(path), suppress(FileNotFoundError):
            lines = path.read_bytes().splitlines(keepends=True)
        whole = [line for line in lines[:keep] if line.endswith(b"\n")]
        self.lines, self._hash = len(whole), hashlib.sha256(b"".join(whole))
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            # Unbuffered: a buffer that a full disk refused would fail once more when the file is closed.
            self._file = path.open("ab", buffering=0)
            self._file.truncate(sum(map(len, whole)))

    def write(self, row: Mapping[str, Any]) -> None:
        line = (json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n").encode()
        with writing(self._path):
            left = memoryview(line)
            while left:
                left = left[self._file.write(left) :]
        self.lines += 1
        self._hash.update(line)

    @property
    def sha256(self) -> str:
        """Of the whole file."""
        return self._hash.hexdigest()

    def sync(self) -> None:
        """Write all lines so far to disk."""
        with writing(self._path):
            os.fsync(self._file.fileno())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:
            self.sync()


class JsonlTail:
    """Whole lines of a growing JSONL file, which may be truncated or begun anew meanwhile."""

    def __init__(self, path: Path) -> None:
        self.path, self._offset, self._lines = path, 0, 0

    def read(self) -> tuple[int, list[bytes]]:
        """Number of the first new line since the last call (1 where all are new), and these lines."""
        content = b""
        with reading(self.path), suppress(FileNotFoundError), self.path.open("rb") as file:
            file.seek(max(0, self._offset - 1))
            if self._offset and file.read(1) != b"\n":  # truncated or begun anew, and perhaps grown since
                self._offset = self._lines = 0
                file.seek(0)
            content = file.read()
        whole = content[: content.rfind(b"\n") + 1]
        first, lines = self._lines + 1, whole.splitlines()
        self._offset += len(whole)
        self._lines += len(lines)
        return first, lines


def text_or_empty(path: Path) -> str:
    """Text of a file without white space at its ends; empty where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        return ""
