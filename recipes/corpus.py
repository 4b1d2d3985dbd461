"""Source text of both recipes: the running interpreter's standard library, divided into three parts by file.

The parts share no file, so the instruction data holds functions that the model was not pretrained on.
"""

from __future__ import annotations

import hashlib
import platform
import sysconfig
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

Part = Literal["pretrain", "pretrain-heldout", "instructions"]

TEST_DIRECTORIES = frozenset({"test", "tests", "idle_test"})
SKIPPED_DIRECTORIES = frozenset(
    {
        "site-packages",
        "__pycache__",
        "encodings",  # generated character tables: a tenth of the library's bytes and no code to learn from
    }
)
# Written when the interpreter is built: they hold the builder's paths, and differ between machines.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")

HELDOUT_PERCENT = 2
INSTRUCTIONS_PERCENT = 33


@dataclass(frozen=True)
class SourceFile:
    """One file of the standard library.

    `path` is relative to the library's folder and written with `/`; `part` says what the file may be used
    for.
    """

    path: str
    text: str
    part: Part


@dataclass(frozen=True)
class Corpus:
    """The standard library's files, in the order of their paths.

    `fingerprint` is the sha256 over every path and text: two corpora with the same one are the same text.
    """

    python_version: str
    fingerprint: str
    files: tuple[SourceFile, ...]

    def part(self, part: Part) -> tuple[SourceFile, ...]:
        """Return the files of one part, in the order of their paths."""
        return tuple(file for file in self.files if file.part == part)


def assign_part(path: str) -> Part:
    """Say which part a file belongs to, from nothing but its relative path (with `/`).

    A hash, not a random draw: the answer does not change when the library gains or loses other files. Test
    files never become instructions, because their functions are rarely documented and say little about the
    library.
    """
    bucket = int.from_bytes(hashlib.sha256(path.encode()).digest()[:8], "big") % 100
    if bucket < HELDOUT_PERCENT:
        return "pretrain-heldout"
    is_test = not TEST_DIRECTORIES.isdisjoint(PurePosixPath(path).parts[:-1])
    if not is_test and bucket < HELDOUT_PERCENT + INSTRUCTIONS_PERCENT:
        return "instructions"
    return "pretrain"


def read_corpus(library: Path | None = None) -> Corpus:
    """Read every `.py` file of `library`, by default the running interpreter's standard library.

    Files that are not UTF-8 (some tests of the decoder) are left out, and so are empty ones.
    """
    library = library or Path(sysconfig.get_paths()["stdlib"])
    digest = hashlib.sha256()
    files: list[SourceFile] = []
    relative_paths = sorted(path.relative_to(library).as_posix() for path in library.rglob("*.py"))
    for relative_path in relative_paths:
        parts = PurePosixPath(relative_path).parts
        if not SKIPPED_DIRECTORIES.isdisjoint(parts) or parts[0].startswith(SKIPPED_PREFIXES):
            continue
        try:
            text = (library / relative_path).read_bytes().decode("utf-8").replace("\r\n", "\n")
        except UnicodeDecodeError:
            continue
        if not text.strip():
            continue
        for field in (relative_path, text):
            digest.update(hashlib.sha256(field.encode()).digest())
        files.append(SourceFile(relative_path, text, assign_part(relative_path)))
    return Corpus(platform.python_version(), digest.hexdigest(), tuple(files))
