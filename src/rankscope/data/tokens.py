"""Tokens: sequences laid end to end, those of a study, and the file that keeps them."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
from safetensors import numpy as numpy_file

from rankscope.data.conversations import Tokenizer
from rankscope.errors import ModelError
from rankscope.files import corrupt_on_error, damaged_error, file_sha256, published, read_json, reading, write_json

TOKENS_VERSION = 5  # increase it when the same rows give other tokens or facts, to invalidate the cache


class Example(NamedTuple):
    """Sequence of n tokens."""

    ids: npt.NDArray[np.int32]  # (n,)
    is_label: npt.NDArray[np.bool_]  # (n,)


@dataclass(frozen=True, eq=False)
class Tokens:
    """S sequences laid end to end, N tokens in all."""

    ids: npt.NDArray[np.int32]  # (N,)
    is_label: npt.NDArray[np.bool_]  # (N,), whether the token is a target; never a sequence's first token
    offsets: npt.NDArray[np.int64]  # (S + 1,), sequence i is `ids[offsets[i]:offsets[i + 1]]`

    @classmethod
    def from_examples(cls, examples: Sequence[Example]) -> Self:
        ids = np.concatenate([np.empty(0, np.int32), *(example.ids for example in examples)])
        is_label = np.concatenate([np.empty(0, np.bool_), *(example.is_label for example in examples)])
        return cls(ids, is_label, np.cumsum([0, *(len(example.ids) for example in examples)], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, index: int) -> Example:
        index = range(len(self))[index]  # raises IndexError, and counts negative indices from the end
        span = slice(int(self.offsets[index]), int(self.offsets[index + 1]))
        return Example(self.ids[span], self.is_label[span])

    def __iter__(self) -> Iterator[Example]:
        return (self[index] for index in range(len(self)))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Length of each sequence in tokens, (S,)."""
        return np.diff(self.offsets)

    @cached_property
    def label_counts(self) -> npt.NDArray[np.int64]:
        """Number of label tokens of each sequence, (S,)."""
        counts = (np.count_nonzero(self.is_label[first:end]) for first, end in pairwise(self.offsets.tolist()))
        return np.fromiter(counts, np.int64, len(self))


@dataclass(frozen=True, eq=False)
class TokenizedData:
    """Tokens that every trial of a study is trained and evaluated on."""

    train: Tokens
    eval: Tokens
    facts: dict[str, Any]  # data/facts.json: see `rankscope.data.tokenize`
    general: Tokens | None = None  # general text to measure forgetting on, every token a label
    sha256: str = ""  # of the file that it was loaded from; empty before it is saved


def check_ids(highest: int, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ModelError if the highest token id is not below `vocab_size`, the number of rows of the embedding."""
    if highest >= vocab_size:
        raise ModelError(
            f"model {tokenizer.name_or_path}: the tokenizer gives token id {highest}, but the model's vocabulary has "
            f"{vocab_size} entries (vocab_size in config.json)",
            "Use the tokenizer that belongs to the model.",
        )


def save(data: TokenizedData, folder: Path) -> None:
    """Write `folder/tokens.safetensors`, then `folder/facts.json` with its hash: facts imply complete tokens. The
    tensors are `train.ids`, `train.is_label`, `train.offsets`, and the same for `eval` and, if present, `general`."""
    with published(folder / "tokens.safetensors") as temporary:
        numpy_file.save_file(_tensors(data), temporary)
        sha256 = file_sha256(temporary)
    write_json(folder / "facts.json", {**data.facts, "tokens_sha256": sha256})


def sha256_of(data: TokenizedData) -> str:
    """Hash, in hex, of the file in which `save` keeps the tokens."""
    return data.sha256 or hashlib.sha256(numpy_file.save(_tensors(data))).hexdigest()


def _tensors(data: TokenizedData) -> dict[str, npt.NDArray[Any]]:
    return {
        f"{side}.{name}": np.ascontiguousarray(getattr(tokens, name))
        for side, tokens in (("train", data.train), ("eval", data.eval), ("general", data.general))
        if tokens is not None
        for name in ("offsets", "ids", "is_label")
    }


def load(folder: Path) -> TokenizedData:
    """Read the tokens that `save` wrote. Raises DamagedError: a file is missing, or facts and tokens do not belong
    together; StudyDirectoryError: a file cannot be read."""
    facts = read_json(folder / "facts.json")
    path = folder / "tokens.safetensors"
    sha256 = file_sha256(path)
    if sha256 != facts.pop("tokens_sha256", None):
        raise damaged_error(path, "not the tokens that facts.json was written for")
    with corrupt_on_error(path), reading(path):
        tensors = numpy_file.load_file(path)
        train, heldout, general = (
            Tokens(*(tensors[f"{side}.{name}"] for name in ("ids", "is_label", "offsets")))
            if f"{side}.ids" in tensors
            else None
            for side in ("train", "eval", "general")
        )
    if train is None or heldout is None:
        raise damaged_error(path, "holds no rows to train on or to hold out")
    return TokenizedData(train, heldout, facts, general, sha256)
