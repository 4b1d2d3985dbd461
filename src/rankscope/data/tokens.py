"""Tokens: sequences laid end to end, those of a study, and the file that keeps them."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Self

import numpy as np
import numpy.typing as npt

from rankscope.data.conversations import Tokenizer
from rankscope.errors import ModelError
from rankscope.files import corrupt_on_error, damaged_error, published, read_json, reading, write_json

TOKENS_VERSION = 3  # increase it when the same rows give other tokens or facts, to invalidate the cache


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
        offsets = np.zeros(len(examples) + 1, dtype=np.int64)
        np.cumsum([len(example.ids) for example in examples], out=offsets[1:])
        return cls(
            ids=np.concatenate([np.empty(0, np.int32), *(example.ids for example in examples)]),
            is_label=np.concatenate([np.empty(0, np.bool_), *(example.is_label for example in examples)]),
            offsets=offsets,
        )

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
    facts: dict[str, Any]
    """Facts for data/facts.json and the report, see `rankscope.data.tokenize`."""
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
    digest = hashlib.sha256()
    with published(folder / "tokens.safetensors") as temporary, temporary.open("wb") as file:
        for piece in _pieces(data):
            digest.update(piece)
            file.write(piece)
    write_json(folder / "facts.json", {**data.facts, "tokens_sha256": digest.hexdigest()})


def sha256_of(data: TokenizedData) -> str:
    """Hash, in hex, of the file in which `save` keeps the tokens."""
    if data.sha256:
        return data.sha256
    digest = hashlib.sha256()
    for piece in _pieces(data):
        digest.update(piece)
    return digest.hexdigest()


def _pieces(data: TokenizedData) -> Iterator[bytes | memoryview]:
    """File in safetensors' format, piece by piece: safetensors' own writer copies all tensors first."""
    tensors = {
        f"{side}.{name}": np.ascontiguousarray(getattr(tokens, name))
        for side, tokens in (("train", data.train), ("eval", data.eval), ("general", data.general))
        if tokens is not None
        for name in ("offsets", "ids", "is_label")
    }
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].itemsize, item[0]))  # each then begins aligned
    header: dict[str, Any] = {}
    position = 0
    for name, tensor in ordered:
        span = [position, position + tensor.nbytes]
        header[name] = {"dtype": _DTYPES[tensor.dtype.str], "shape": list(tensor.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    yield len(text).to_bytes(8, "little") + text
    yield from (tensor.reshape(-1).view(np.uint8).data for _, tensor in ordered)


_DTYPES = {"<i4": "I32", "<i8": "I64", "|b1": "BOOL"}
_DTYPE_OF = {theirs: ours for ours, theirs in _DTYPES.items()}


def load(folder: Path) -> TokenizedData:
    """Read the tokens that `save` wrote. Raises DamagedError: a file is missing, or facts and tokens do not belong
    together; StudyDirectoryError: a file cannot be read."""
    facts = read_json(folder / "facts.json")
    path = folder / "tokens.safetensors"
    with reading(path), path.open("rb") as file:
        sha256 = hashlib.file_digest(file, "sha256").hexdigest()
    if sha256 != facts.pop("tokens_sha256", None):
        raise damaged_error(path, "not the tokens that facts.json was written for")
    with corrupt_on_error(path), reading(path), path.open("rb") as file:
        tensors = _read(file)
        train, heldout, general = (
            Tokens(*(tensors[f"{side}.{name}"] for name in ("ids", "is_label", "offsets")))
            if f"{side}.ids" in tensors
            else None
            for side in ("train", "eval", "general")
        )
    if train is None or heldout is None:
        raise damaged_error(path, "holds no rows to train on or to hold out")
    return TokenizedData(train, heldout, facts, general, sha256)


def _read(file: BinaryIO) -> dict[str, npt.NDArray[Any]]:
    """Tensors of a file in safetensors' format; safetensors' own reader maps the file while it copies it."""
    size = int.from_bytes(file.read(8), "little")
    tensors = {}
    for name, entry in json.loads(file.read(size)).items():
        first, end = entry["data_offsets"]
        file.seek(8 + size + first)
        dtype = np.dtype(_DTYPE_OF[entry["dtype"]])
        tensors[name] = np.fromfile(file, dtype, (end - first) // dtype.itemsize).reshape(entry["shape"])
    return tensors
