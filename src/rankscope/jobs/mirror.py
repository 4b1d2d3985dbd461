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

from rankscope.files import inside, published, refuse_links_out, writing

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
    stat: tuple[int, int, int]  # inode, size and time of the last change
    tail: bytes = b""  # of a growing file, what was last sent


class Mirror:
    def __init__(self, root: Path) -> None:
        """Take the files that exist now as known."""
        self._root, self._seen = root, dict[str, _Seen]()
        for name in self._names():
            with (root / name).open("rb") as file:
                stat = _stat(file)
                file.seek(max(0, stat[1] - _TAIL_BYTES))
                self._seen[name] = _Seen(stat, file.read() if name.endswith(GROWING) else b"")

    def changes(self) -> Iterator[Change]:
        """Yield the changes since the last call, in the order in which they must be applied."""
        # Vouching files are read first and applied last: the files they vouch for exist before the others are listed.
        vouching = [change for name in self._names() if _vouches(name) for change in self._send(name)]
        names = self._names()
        for name in names:
            if not _vouches(name):
                yield from self._send(name)
        yield from vouching
        for name in sorted(self._seen.keys() - set(names), key=_vouches, reverse=True):
            del self._seen[name]
            yield Change(name)

    def _names(self) -> list[str]:
        """All files but hidden ones, which are still being written."""
        return _below(self._root, self._root)

    def _send(self, name: str) -> Iterator[Change]:
        """Yield the pieces of a file that is new or changed: all of it, or the new end of one that has grown."""
        with suppress(FileNotFoundError), (self._root / name).open("rb") as file:
            stat, before = _stat(file), self._seen.get(name, _Seen((0, 0, 0)))
            if stat == before.stat:
                return
            growing, start, tail = name.endswith(GROWING), 0, b""
            if growing and stat[0] == before.stat[0] and stat[1] >= before.stat[1]:
                file.seek(before.stat[1] - len(before.tail))
                start, tail = (before.stat[1], before.tail) if file.read(len(before.tail)) == before.tail else (0, b"")
            for piece in _pieces(name, file, start, stat[1]):
                tail = (tail + (piece.data or b""))[-_TAIL_BYTES:] if growing else b""
                yield piece._replace(appended=growing)
            self._seen[name] = _Seen(stat, tail)


def _stat(file: BinaryIO) -> tuple[int, int, int]:
    found = os.fstat(file.fileno())
    return found.st_ino, found.st_size, found.st_mtime_ns


def _vouches(name: str) -> bool:
    return name.rpartition("/")[2] in VOUCHING


class Replica:
    """Applies changes from jobs' folders to the study's directory."""

    def __init__(self, root: Path) -> None:
        """Raise StudyDirectoryError where a symbolic link leads out of `root`."""
        refuse_links_out(root)
        self._root, self._grown = root, set[Path]()

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
            else:
                # Of the names that `leftovers` knows; a file is published with its last piece.
                arriving = path.with_name(f".{path.name}.arriving.tmp")
                _append(arriving, change.data, change.offset)
                if change.last:
                    if _vouches(change.name):
                        self._flush()
                    with published(path) as file:
                        arriving.replace(file)

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


def _below(root: Path, folder: Path) -> list[str]:
    """Return the files in `folder` and below it, as names below `root`, without hidden ones."""
    return [
        str(Path(place, name).relative_to(root))
        for place, _, names in os.walk(folder)
        for name in names
        if not name.startswith(".")
    ]


def _pieces(name: str, file: BinaryIO, start: int, end: int) -> Iterator[Change]:
    """Yield the bytes of a file from `start` to `end`: at least one piece."""
    file.seek(start)
    for offset in range(start, max(end, start + 1), PIECE_BYTES):
        data = file.read(min(PIECE_BYTES, end - offset))
        yield Change(name, data, offset, offset + PIECE_BYTES >= end)


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
