"""A study's question on disk, and the lock on its directory."""

import hashlib
import math
import os
import platform
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import yaml
from filelock import FileLock, Timeout

from rankscope.errors import StudyDirectoryError, StudyError
from rankscope.files import inside, reading, text_or_empty, write_atomic, writing
from rankscope.text.catalogue import flatten

_QUESTION_HASH = "# sha256 of all lines above: "


class Holder(NamedTuple):
    pid: int
    host: str

    @property
    def is_here(self) -> bool:
        return self.host == platform.node()

    def began(self) -> float:
        """Start of the process, in seconds since 1970; infinity if it has ended. Only valid where `is_here`."""
        try:
            return psutil.Process(self.pid).create_time()
        except psutil.Error:
            return math.inf


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def differences_of(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    before, after = flatten(old), flatten(new)
    return [
        f"{key}: {before.get(key)!r} there, {after.get(key)!r} asked for"
        for key in before | after
        if before.get(key) != after.get(key)
    ]


def write_question(file: Path, question: str) -> None:
    """Publish YAML with the hash of its text in the last line."""
    write_atomic(file, f"{question}{_QUESTION_HASH}{_sha256(question)}\n")


def read_question(file: Path) -> dict[str, Any]:
    """Read what `write_question` wrote. Raises StudyError: it is corrupt, or was changed."""
    with reading(file):
        content = file.read_bytes()
    try:
        question, _, sha256 = content.decode("utf-8").partition(_QUESTION_HASH)
        values = yaml.safe_load(question)
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise StudyError(f"{file}: damaged: {error}", "Restore the file, or run the study anew.") from None
    if sha256.strip() != _sha256(question):
        what = f"{file}: damaged, or changed since the study began: it does not match the hash in its last line"
        raise StudyError(what, "Restore it; to ask something else, give it to `rankscope run` with another --out.")
    return values if isinstance(values, dict) else {}


@contextmanager
def lock_folder(path: Path) -> Iterator[None]:
    """Hold a study's directory while a run writes to it; the system releases it however the process ends. Raises
    StudyDirectoryError: another run holds it; the message names the process."""
    holder = inside(path, ".lock-holder")
    lock = FileLock(inside(path, ".lock"), blocking=False)
    with writing(path / ".lock"):
        try:
            lock.acquire()
        except Timeout:
            what = f"{path}: another run is writing to it ({text_or_empty(holder) or 'it has just begun'})"
            raise StudyDirectoryError(what, "Wait for it to end, or choose another --out.") from None
    try:
        write_atomic(holder, f"process {os.getpid()} on {platform.node()}\n")
        yield
    finally:
        with suppress(OSError):  # a stale file is known by the start of its process
            holder.unlink()
        lock.release()
