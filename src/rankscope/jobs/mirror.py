"""Replication of a job's files from another machine into the study's directory, without a shared file system.

The job works in a folder of its own, which starts with the files that it needs. `Mirror` yields the changes there since
its last call, and `Replica` applies them to the study's directory. A reader of that directory sees the same order of
events as with a local job: a file that vouches for others (trial.json, a checkpoint's manifest) arrives after them.
Of a file that grows, such as metrics.jsonl, only the new end is sent.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rankscope.files import inside, published, refuse_links_out, write_atomic, writing

PIECE_BYTES = 32 << 20  # size of the pieces in which a file is sent
VOUCHING = ("trial.json", "pack.json", "manifest.json", "error.json")
"""Names of files whose presence means that other files are complete."""

GROWING = (".jsonl", ".txt")  # suffixes of files that are appended to
_TAIL_BYTES = 4096


class Change(NamedTuple):
    name: str  # below the study's directory
    data: bytes | None = None  # None: the file is removed
    offset: int = 0
    last: bool = True  # whether the file ends with this piece
    appended: bool = False  # whether the piece is appended to the first `offset` bytes of the existing file


class _Seen(NamedTuple):
    inode: int
    size: int
    changed_ns: int
    tail: bytes = b""  # of a growing file, what was last sent


class Mirror:
    def __init__(self, root: Path) -> None:
        """Take the files that exist now as known."""
        self._root = root
        self._seen = {name: self._look(name) for name in self._names()}

    def changes(self) -> Iterator[Change]:
        """Yield the changes since the last call, in the order in which they must be applied."""
        # Vouching files are read first and applied last: the files they vouch for exist before the others are listed.
        new = [name for name in filter(_vouches, self._names()) if self._is_new(name)]
        vouching = [change for name in new for change in self._send(name)]
        names = self._names()
        for name in names:
            if not _vouches(name) and self._is_new(name):
                yield from self._send(name)
        yield from vouching
        for name in sorted(self._seen.keys() - set(names), key=_vouches, reverse=True):
            del self._seen[name]
            yield Change(name)

    def _names(self) -> list[str]:
        """All files but hidden ones, which are still being written."""
        return _below(self._root, self._root)

    def _stat(self, name: str) -> _Seen | None:
        try:
            found = (self._root / name).stat()
        except FileNotFoundError:
            return None
        return _Seen(found.st_ino, found.st_size, found.st_mtime_ns)

    def _is_new(self, name: str) -> bool:
        known = self._seen.get(name)
        return self._stat(name) != (known and known._replace(tail=b""))

    def _look(self, name: str) -> _Seen:
        seen = self._stat(name)
        assert seen is not None  # nobody writes yet
        if not name.endswith(GROWING):
            return seen
        with (self._root / name).open("rb") as file:
            file.seek(max(0, seen.size - _TAIL_BYTES))
            return seen._replace(tail=file.read(_TAIL_BYTES))

    def _send(self, name: str) -> Iterator[Change]:
        """Yield the pieces of a file: all of it, or the new end of one that grows."""
        seen = self._stat(name)
        if seen is None:
            return
        with suppress(FileNotFoundError), (self._root / name).open("rb") as file:
            offset = self._sent(name, seen, file.fileno())
            tail = self._seen[name].tail if offset else b""
            growing = name.endswith(GROWING)
            for piece in _pieces(name, file, offset, seen.size):
                data = piece.data or b""
                if growing:
                    tail = (tail + data)[-_TAIL_BYTES:]
                yield piece._replace(appended=growing)
                offset += len(data)
            self._seen[name] = seen._replace(size=offset, tail=tail)

    def _sent(self, name: str, now: _Seen, descriptor: int) -> int:
        """Number of bytes of a growing file that were sent; 0 where it was truncated or replaced."""
        before = self._seen.get(name)
        if before is None or not name.endswith(GROWING) or before.inode != now.inode or before.size > now.size:
            return 0
        same = os.pread(descriptor, len(before.tail), before.size - len(before.tail)) == before.tail
        return before.size if same else 0


def _vouches(name: str) -> bool:
    return name.rpartition("/")[2] in VOUCHING


class Replica:
    """Applies changes from jobs' folders to the study's directory."""

    def __init__(self, root: Path) -> None:
        """Raise StudyDirectoryError where a symbolic link leads out of `root`."""
        refuse_links_out(root)
        self._root = root
        self._grown: set[Path] = set()

    def apply(self, changes: Iterable[Change]) -> None:
        """Apply changes. Raise StudyDirectoryError where a file cannot be written, or would lie outside."""
        for change in changes:
            path = inside(self._root, change.name)
            if change.data is None:
                self._grown.discard(path)
                self._remove(path)
            elif change.appended:
                _append(path, change.data, change.offset)
                self._grown.add(path)
            elif change.last and not change.offset:
                if _vouches(change.name):
                    self._flush()
                write_atomic(path, change.data)
            else:
                _put(path, change)

    def _remove(self, path: Path) -> None:
        """Remove a file, and the folders that are empty then."""
        with writing(path):
            path.unlink(missing_ok=True)
        for folder in path.parents:
            if folder == self._root:
                break
            with suppress(OSError):  # others are in it, or it is gone
                folder.rmdir()

    def _flush(self) -> None:
        """Flush appended data to disk before a file that vouches for it."""
        while self._grown:
            path = self._grown.pop()
            with writing(path), path.open("rb") as file:
                os.fsync(file.fileno())


def _append(path: Path, data: bytes, offset: int) -> None:
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            file.truncate(offset)
            file.write(data)


def _put(path: Path, change: Change) -> None:
    """Write a piece of a large file, which is published with its last piece."""
    assert change.data is not None  # for mypy
    partial = path.with_name(f".{path.name}.arriving.tmp")  # of the names that `leftovers` knows
    _append(partial, change.data, change.offset)
    if change.last:
        with published(path) as file:
            partial.replace(file)


def _below(root: Path, folder: Path) -> list[str]:
    """Return the files in `folder` and below it, as names below `root`, without hidden ones."""
    return [
        str(Path(place, name).relative_to(root))
        for place, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]


def _pieces(name: str, file: BinaryIO, offset: int, size: int) -> Iterator[Change]:
    """Yield an open file's bytes from `offset` to `size`, or to its end: at least one piece."""
    file.seek(offset)
    last = False
    while not last:
        data = file.read(min(PIECE_BYTES, size - offset))
        last = offset + len(data) >= size or not data
        yield Change(name, data, offset, last)
        offset += len(data)


def pieces(root: Path, name: str) -> Iterator[Change]:
    with (root / name).open("rb") as file:
        yield from _pieces(name, file, 0, os.fstat(file.fileno()).st_size)


def collect(root: Path, names: Iterable[str]) -> list[str]:
    """Return the existing files among `names`, which are files and folders below `root`."""
    found: list[str] = []
    for name in names:
        path = inside(root, name)
        if path.is_dir():
            found += sorted(_below(root, path))
        elif path.is_file():
            found.append(name)
    return found
