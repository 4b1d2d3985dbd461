"""Tokens: all rows as token ids with their labels, split into train and eval, and stored in one file.

records -> drop duplicates -> prompt and completion -> token ids -> truncate to max_length -> split
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import numpy.typing as npt
import safetensors.numpy

from rankscope.data.prompts import Rendered, Tokenizer, encode, render
from rankscope.data.records import Records, canonical_text
from rankscope.data.split import held_out
from rankscope.errors import DataError, ModelError
from rankscope.files import corrupt_on_error, damaged_error, read_json, reading, write_atomic, write_json
from rankscope.spec.models import DataSpec

_ROWS_PER_CALL = 8192  # rows in one tokenizer call: full speed, and memory that does not grow with the data
TOKENS_VERSION = 1  # increase it when the same rows give other tokens or facts, to invalidate the cache


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
        """Lay examples end to end, in order."""
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
        return np.diff(np.concatenate([[0], np.cumsum(self.is_label)])[self.offsets])


@dataclass(frozen=True, eq=False)
class TokenizedData:
    """Tokens that every trial of a study is trained and evaluated on."""

    train: Tokens
    eval: Tokens
    facts: dict[str, Any]
    """Facts for data/facts.json and the report: `id`, `revision` (the hub's commit; None for local data), `fingerprint`
    (sha256 of the rows read), `format`, `loss_on`, `max_length`; in rows `rows_read` = `duplicates_dropped` +
    `rows_without_label_dropped` + `rows_train` + `rows_eval`, and `truncated` (rows of train and eval truncated to
    max_length); in tokens `train_tokens`, `train_label_tokens`, `eval_tokens`, `eval_label_tokens`, and `mean_length`
    and `longest` of the truncated rows. With general text also `general_text` (its id), `general_text_revision`,
    `general_sequences` and `general_label_tokens`."""
    general: Tokens | None = None  # general text to measure forgetting on, every token a label
    sha256: str = ""  # of the file that it was loaded from; empty before it is saved

    @property
    def longest_row(self) -> int:
        """Length of the longest sequence of any part, in tokens."""
        parts = [self.train, self.eval, *([self.general] if self.general else [])]
        return max(int(part.lengths.max(initial=0)) for part in parts)


def tokenize(records: Records, spec: DataSpec, tokenizer: Tokenizer, vocab_size: int) -> TokenizedData:
    """Render, tokenise, truncate and split records; the same records give the same tokens.

    `vocab_size` is the number of rows of the model's embedding.

    Raises:
        DataError: see `render`; or too few rows remain to train on and to hold out.
        ModelError: the tokenizer has no eos token, or gives ids that are not in the model's vocabulary.
    """
    first: dict[str, int] = {}  # index of the first of equal rows
    for number, row in enumerate(records.rows):
        first.setdefault(canonical_text(row), number)
    numbers = list(first.values())
    prompts: list[str] = []
    examples: list[Example] = []
    truncated = without_label = 0
    for start in range(0, len(numbers), _ROWS_PER_CALL):
        chunk = numbers[start : start + _ROWS_PER_CALL]
        rendered = [_render(records, number, spec, tokenizer) for number in chunk]
        for texts, encoded in zip(rendered, encode(rendered, tokenizer), strict=True):
            example = _example(encoded.prompt_ids, encoded.completion_ids, spec)
            if not example.is_label.any():
                without_label += 1
                continue
            truncated += len(encoded.prompt_ids) + len(encoded.completion_ids) > spec.max_length
            prompts.append(texts.prompt)
            examples.append(example)
    check_ids(examples, tokenizer, vocab_size)
    chosen = held_out(prompts, spec.eval_rows, spec.split_seed)
    _check_split(chosen, without_label, spec)
    train = Tokens.from_examples([example for example, held in zip(examples, chosen, strict=True) if not held])
    heldout = Tokens.from_examples([example for example, held in zip(examples, chosen, strict=True) if held])
    lengths = np.concatenate([train.lengths, heldout.lengths])
    facts = {
        "id": records.id,
        "revision": records.revision,
        "fingerprint": records.fingerprint,
        "format": records.format,
        "loss_on": spec.loss_on or "completion",
        "max_length": spec.max_length,
        "rows_read": len(records.rows),
        "duplicates_dropped": len(records.rows) - len(numbers),
        "rows_without_label_dropped": without_label,
        "rows_train": len(train),
        "rows_eval": len(heldout),
        "truncated": truncated,
        "train_tokens": len(train.ids),
        "train_label_tokens": int(train.is_label.sum()),
        "eval_tokens": len(heldout.ids),
        "eval_label_tokens": int(heldout.is_label.sum()),
        "mean_length": float(lengths.mean()),
        "longest": int(lengths.max()),
    }
    return TokenizedData(train, heldout, facts)


def _render(records: Records, number: int, spec: DataSpec, tokenizer: Tokenizer) -> Rendered:
    try:
        return render(records.rows[number], spec, records.format, tokenizer)
    except DataError as error:
        raise DataError(f"{records.id}, row {number + 1}: {error.what}", error.todo) from None


def _example(prompt: list[int], completion: list[int], spec: DataSpec) -> Example:
    ids = np.array((prompt + completion)[: spec.max_length], dtype=np.int32)
    is_label = np.ones(len(ids), dtype=np.bool_)
    is_label[: 1 if spec.loss_on == "all" else max(1, len(prompt))] = False
    return Example(ids, is_label)


def check_ids(examples: Sequence[Example], tokenizer: Tokenizer, vocab_size: int) -> None:
    """Raise ModelError if a token id is not below `vocab_size`, the number of rows of the model's embedding."""
    highest = max((int(example.ids.max()) for example in examples), default=0)
    if highest >= vocab_size:
        raise ModelError(
            f"model {tokenizer.name_or_path}: the tokenizer gives token id {highest}, but the model's vocabulary has "
            f"{vocab_size} entries (vocab_size in config.json)",
            "Use the tokenizer that belongs to the model.",
        )


def _check_split(chosen: npt.NDArray[np.bool_], without_label: int, spec: DataSpec) -> None:
    rows, held = len(chosen), int(chosen.sum())
    if rows == 0:
        raise DataError(
            f"{spec.id}: no row has a token to learn within max_length {spec.max_length} "
            f"({without_label:,} rows were dropped)",
            "Raise data.max_length, which is at most the model's positions: the prompts alone fill it.",
        )
    dropped = f" ({without_label:,} more had no token to learn)" if without_label else ""
    remain = f"{spec.id}: {rows:,} different rows{dropped} with"
    if rows < 3 or rows - held < 2:
        asked = f" {spec.eval_rows:,} asked to be held out" if spec.eval_rows else f" {held:,} held out"
        raise DataError(f"{remain}{asked} leave fewer than 2 to train on", "Give more rows, or lower data.eval_rows.")
    if held == 0:
        raise DataError(
            f"{remain} too few different prompts to hold one out: rows with the same prompt stay together",
            "Give data with more different prompts, or raise data.eval_rows to the rows of one prompt.",
        )


def save(data: TokenizedData, folder: Path) -> None:
    """Write `folder/tokens.safetensors`, then `folder/facts.json` with its hash: facts imply complete tokens.

    The tensors are `train.ids`, `train.is_label`, `train.offsets`, and the same for `eval` and, if present, `general`.
    """
    content = _serialized(data)
    write_atomic(folder / "tokens.safetensors", content)
    write_json(folder / "facts.json", {**data.facts, "tokens_sha256": hashlib.sha256(content).hexdigest()})


def sha256_of(data: TokenizedData) -> str:
    """Hash, in hex, of the file in which `save` keeps the tokens."""
    return data.sha256 or hashlib.sha256(_serialized(data)).hexdigest()


def _serialized(data: TokenizedData) -> bytes:
    return safetensors.numpy.save(
        {
            f"{side}.{name}": getattr(tokens, name)
            for side, tokens in (("train", data.train), ("eval", data.eval), ("general", data.general))
            if tokens is not None
            for name in ("ids", "is_label", "offsets")
        }
    )


def load(folder: Path) -> TokenizedData:
    """Read the tokens that `save` wrote.

    Raises:
        DamagedError: a file is missing, or facts and tokens do not belong together.
        StudyDirectoryError: a file cannot be read.
    """
    facts = read_json(folder / "facts.json")
    path = folder / "tokens.safetensors"
    with reading(path):
        content = path.read_bytes()
    sha256 = hashlib.sha256(content).hexdigest()
    if sha256 != facts.pop("tokens_sha256", None):
        raise damaged_error(path, "not the tokens that facts.json was written for")
    with corrupt_on_error(path):
        tensors = safetensors.numpy.load(content)
        train, heldout, general = (
            Tokens(tensors[f"{side}.ids"], tensors[f"{side}.is_label"], tensors[f"{side}.offsets"])
            if f"{side}.ids" in tensors
            else None
            for side in ("train", "eval", "general")
        )
    if train is None or heldout is None:
        raise damaged_error(path, "holds no rows to train on or to hold out")
    return TokenizedData(train, heldout, facts, general, sha256)
