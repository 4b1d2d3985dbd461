"""Rows as the tokens of a study.

text -> token ids -> cut to max_length -> duplicates dropped -> split into training and held-out rows

Rows pass one batch at a time, and their tokens wait in a file on disk, so that memory does not grow with the data
beyond the tokens themselves.
"""

import hashlib
import re
import tempfile
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from itertools import compress, pairwise
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from rankscope.data.conversations import ChatTemplate, Rendered, Tokenizer
from rankscope.data.prompts import Encoded, encode, heading_without_input, render_plain
from rankscope.data.readers import listed
from rankscope.data.records import Records
from rankscope.data.split import group_key, held_out
from rankscope.data.tokens import Example, TokenizedData, Tokens, check_ids
from rankscope.errors import DataError
from rankscope.spec.models import DataSpec

_CHARACTERS_PER_CALL = 1 << 19  # of text in one tokenizer call, which needs some hundred bytes a token
_PROBLEMS_SHOWN = 3
_ROWS_CHECKED = 32  # first rows whose learned tokens must decode to the answer
_LENGTH_CHECKED = 10_000  # characters of the longest such row: more say nothing new, and take seconds
FEWEST_ROWS = 8  # rows below which a study must be forced
MOST_OF_A_TEST_SPLIT = 1000  # rows of a test split that the study did not ask for by name


def tokenize(
    records: Records, spec: DataSpec, tokenizer: Tokenizer, vocab_size: int, evaluated: Records | None = None
) -> TokenizedData:
    """Render, tokenise, cut and split records; the same records give the same tokens.

    `vocab_size` is the number of rows of the model's embedding. Rows of `evaluated` are the evaluation set; without it,
    rows are held out.

    The facts are those of `with_source_facts`, `loss_on`, `max_length`, and, of the rows: `rows_read` =
    `bad_rows_dropped` + `blank_rows_dropped` + `unwanted_rows_dropped` + `duplicates_dropped` +
    `rows_without_label_dropped` + `eval_rows_in_train_dropped` + `rows_train` (+ `rows_eval`, where they are held out);
    `truncated` (rows of train and eval cut to max_length) and `answers_cut_off` (rows of which an answer was cut off
    whole). Of the tokens: `train_tokens`, `train_label_tokens`, `eval_tokens`, `eval_label_tokens`, `mean_length` and
    `longest` of the cut rows. With general text `general_text` (its id), `general_text_revision`, `general_sequences`
    and `general_label_tokens`. Raises DataError: the chat template refuses a row, or too few rows remain to train on
    and to hold out; ModelError: the tokenizer has no eos token, or gives ids that are not in the model's vocabulary.
    """
    notes: list[str] = []
    with tempfile.TemporaryFile() as file, tempfile.TemporaryFile() as other_file:
        rows, others = RowReader(spec, tokenizer, file), RowReader(spec, tokenizer, other_file)
        rows.read(records)
        check_ids(rows.highest_id, tokenizer, vocab_size)
        if evaluated is None:
            source, leaked, taken = rows, 0, _hold_out(rows, spec, notes)
            kept = ~taken
        else:
            others.read(evaluated)
            check_ids(others.highest_id, tokenizer, vocab_size)
            source, taken = others, _taken(others.keys, spec, notes)
            kept = ~np.isin(rows.digests, others.digests)
            leaked = int((~kept).sum())
            _check_own_set(rows, int(kept.sum()), others, spec)
        train, heldout = rows.tokens(kept), source.tokens(taken)
        notes += rows.said(_NOTES)
        lengths = np.concatenate([train.lengths, heldout.lengths])
        facts: dict[str, Any] = {
            "loss_on": " + ".join(rows.learned),
            "max_length": spec.max_length,
            "bad_rows_dropped": rows.counts["refused"],
            "duplicates_dropped": rows.duplicates,
            "rows_without_label_dropped": rows.without_label,
            "eval_rows_in_train_dropped": leaked,
            "rows_train": len(train),
            "rows_eval": len(heldout),
            "truncated": int(rows.truncated[kept].sum() + source.truncated[taken].sum()),
            "answers_cut_off": rows.answers_cut_off + others.answers_cut_off,
            "train_tokens": len(train.ids),
            "train_label_tokens": int(train.is_label.sum()),
            "eval_tokens": len(heldout.ids),
            "eval_label_tokens": int(heldout.is_label.sum()),
            "mean_length": float(lengths.mean()),
            "longest": int(lengths.max()),
            "notes": notes,
            "warnings": [*rows.warnings(), *(f"Of the evaluation set: {found}" for found in others.warnings())],
        }
        if evaluated is not None:
            facts |= {"eval_bad_rows_dropped": others.counts["refused"], "eval_duplicates_dropped": others.duplicates}
            facts["eval_without_label"] = others.without_label
            facts["eval_rows_unused"] = int((~taken).sum())
    return TokenizedData(train, heldout, facts)


def with_source_facts(data: TokenizedData, records: Records, evaluated: Records | None) -> TokenizedData:
    """Tokens with the facts of where the rows came from, which do not determine tokens.

    They are `id`, `revision` (the hub's commit; None for local data), `fingerprint` (sha256 of the rows), `format`,
    `rows_read`, `bad_rows_dropped`, `blank_rows_dropped`, `unwanted_rows_dropped`; for people `unread_columns`,
    `notes`, `warnings`; with an evaluation set of its own also `eval_id`, `eval_rows_read`.
    """
    own = data.facts
    unread = [f"columns that are not read: {listed(records.unread_columns)}"] if records.unread_columns else []
    facts = {
        "id": records.id,
        "revision": records.revision,
        "fingerprint": records.fingerprint,
        "format": records.format,
        "rows_read": records.rows_read,
        **own,
        "bad_rows_dropped": own["bad_rows_dropped"] + records.left_out["bad"],
        "blank_rows_dropped": records.left_out["blank"],
        "unwanted_rows_dropped": records.left_out["unwanted"],
        "unread_columns": list(records.unread_columns),
        "notes": list(dict.fromkeys([*records.notes, *unread, *(evaluated.notes if evaluated else ()), *own["notes"]])),
    }
    if evaluated is not None:
        bad = evaluated.left_out["bad"] + own["eval_bad_rows_dropped"]
        left_out = evaluated.left_out | {"bad": bad, "duplicate": own["eval_duplicates_dropped"]}
        left_out["without an answer to learn"] = own["eval_without_label"]
        if said := [f"{count:,} {why}" for why, count in left_out.items() if count]:
            facts["notes"].append(f"of the evaluation set left out: {', '.join(said)}")
        if evaluated.id != records.id:
            facts["notes"].append(f"the evaluation set is {evaluated.id}")
        facts |= {"eval_id": evaluated.id, "eval_rows_read": evaluated.rows_read}
    return TokenizedData(data.train, data.eval, facts, data.general, data.sha256)


_NOTES = {
    "border": "in {:,} of the rows the prompt's end and the answer's beginning would be one token; they are tokenised "
    "apart, as at inference",
    "heading": "prompts of rows without an input ({:,}) keep the line {!r}: give them data.template_without_input",
    "refused": "rows left out, since the chat template refuses them: {:,}; the first: {}",
}
_WARNINGS = {
    "changed": "the chat template writes the answers of {:,} rows otherwise than they stand in the data (it may leave "
    "out their thoughts); another one: --chat-template FILE",
    "unmarked": "the chat template's {{% generation %}} leaves out answers of {:,} rows, which are not learned; give "
    "another one: --chat-template FILE",
    "border of a chat": "in {:,} rows a token lies over the border between what is read and what is learned, where "
    "inference has two",
    "special": "{:,} rows hold a special token of the model as text ({}); it is read as that token",
    "unlike": "the tokens to learn are not the answer's: {1}",
    "endless": "the chat template ends answers without a special token, so that the model does not learn where to "
    "stop; another one: --chat-template FILE",
}
"""What is said of a number of rows, and of an example of them."""


class RowReader:
    """Tokens of rows as they are read, in a temporary file, and what must be known of each."""

    def __init__(self, spec: DataSpec, tokenizer: Tokenizer, file: IO[bytes]) -> None:
        self.spec, self.tokenizer = spec, tokenizer
        # Of each row in the file, in arrays, since a list would need as much memory as the tokens of a short row:
        self._keys = array("Q")  # of the groups, see `rankscope.data.split`
        self._digests = array("Q")  # of the cut tokens and labels: two of a million rows collide once in 4e7 data sets
        self._lengths = array("i")
        self._truncated = array("b")
        # Of the rows that equal none before, once all are read: these rows, and what is above of them, each (S,).
        self._kept = np.zeros(0, dtype=np.int64)
        self.keys, self.digests, self.truncated = np.zeros(0, np.uint64), np.zeros(0, np.uint64), np.zeros(0, np.bool_)
        self.learned: dict[str, None] = {}  # what is learned, of `data.loss_on`
        self.highest_id = self.duplicates = self.without_label = self.answers_cut_off = 0
        self._templates: dict[str, ChatTemplate] = {}
        self.counts: Counter[str] = Counter()  # by what is said of them: see `_NOTES`
        self.examples: dict[str, str] = {}
        self._file = file  # token ids as int32, those to learn as their complements, which are negative
        added = (token.content for token in tokenizer.added_tokens_decoder.values() if token.special)
        self._ends = tuple(filter(str.strip, dict.fromkeys([*tokenizer.all_special_tokens, *added])))
        self._special = re.compile("|".join(map(re.escape, self._ends)) or "(?!)")
        if heading := heading_without_input(spec):
            self.examples["heading"] = heading

    def read(self, records: Records) -> None:
        """Read all rows. Raises DataError with the place of one that cannot be rendered and is not to be skipped."""
        for number, (rendered, encoded) in enumerate(self.encoded(records.located())):
            if number < _ROWS_CHECKED and len(rendered.text) <= _LENGTH_CHECKED:
                self._check(rendered, encoded)
            self._add(rendered, encoded)
        _, first = np.unique(np.asarray(self._digests), return_index=True)
        self._kept = kept = np.sort(first)
        self.keys, self.digests = np.asarray(self._keys)[kept], np.asarray(self._digests)[kept]
        self.truncated = np.asarray(self._truncated)[kept].astype(np.bool_)
        self.duplicates = len(self._digests) - len(first)

    def encoded(self, located: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[tuple[Rendered, Encoded]]:
        for batch in _batches(self._rendered(located)):
            yield from zip(batch, encode(batch, self.tokenizer), strict=True)

    def example(self, row: dict[str, Any]) -> Example | None:
        """Tokens of one row; None where the chat template refuses it."""
        try:
            found = next(self.encoded([("", row)]), None)
        except DataError:
            return None
        return _example(*found, self.spec.max_length) if found else None

    def _rendered(self, located: Iterable[tuple[str, dict[str, Any]]]) -> Iterator[Rendered]:
        problems: list[DataError] = []
        for place, row in located:
            format = "messages" if "messages" in row else "text" if "text" in row else "pair"
            learned = self.spec.loss_on or {"messages": "assistant", "text": "all"}.get(format, "completion")
            self.learned[learned] = None
            try:
                if format == "messages":
                    template = self._templates.setdefault(learned, ChatTemplate(self.tokenizer, learned))
                    rendered = template.render(row)
                else:
                    rendered = render_plain(row, self.spec, learned)
            except DataError as error:
                if not self.tokenizer.chat_template:
                    raise
                if self.spec.skip_bad_rows:
                    self._count("refused", error.what)
                else:
                    problems.append(DataError(f"{place}: {error.what}", error.todo))
                if len(problems) == _PROBLEMS_SHOWN:
                    break
                continue
            self.counts["heading"] += "heading" in self.examples and not row.get("input", "_").strip()
            if found := self._special.search(str(row)):
                self._count("special", found[0])
            yield rendered
        if problems:
            raise DataError("\n".join(dict.fromkeys(problem.what for problem in problems)), problems[0].todo)

    def _count(self, what: str, example: str) -> None:
        self.counts[what] += 1
        self.examples.setdefault(what, example)

    def _add(self, rendered: Rendered, encoded: Encoded) -> None:
        ids, is_label = _example(rendered, encoded, self.spec.max_length)
        length = len(ids)
        self.counts["border of a chat" if rendered.is_chat else "border"] += encoded.spans_border
        answers = pairwise([0, *encoded.ends])
        whole = [encoded.is_label[start:end].any() and not is_label[start:end].any() for start, end in answers]
        self.answers_cut_off += any(whole) and length < len(encoded.ids)
        if not is_label.any():
            self.without_label += 1
            return
        content = np.where(is_label, ~ids, ids).tobytes()
        self._digests.append(int.from_bytes(hashlib.blake2b(content, digest_size=8).digest()))
        self._keys.append(group_key(rendered.beginning, self.spec.split_seed))
        self._lengths.append(length)
        self._truncated.append(length < len(encoded.ids))
        self.highest_id = max(self.highest_id, int(ids.max()))
        self._file.write(content)

    def _check(self, rendered: Rendered, encoded: Encoded) -> None:
        """Warn if the tokens to learn do not decode to the text to learn: the tokenizer hides where they are."""
        text = "".join(rendered.text[start:end] for start, end in rendered.learned)
        learned = list(compress(encoded.ids, encoded.is_label))
        answer = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        end = "" if rendered.is_chat else str(self.tokenizer.eos_token)
        ours, expected = ("".join(str(self.tokenizer.decode(ids)).split()) for ids in (learned, answer))
        if rendered.is_chat and learned and not ours.endswith(self._ends):
            self._count("endless", "")
        if expected not in (ours, ours.removesuffix(end)):
            self._count("unlike", f"{ours[:60]!r} is learned, and the answer is {expected[:60]!r}")

    def tokens(self, wanted: npt.NDArray[np.bool_]) -> Tokens:
        """Tokens of the rows that a mask names, in order."""
        lengths = np.asarray(self._lengths)
        is_used = np.zeros(len(lengths), dtype=np.bool_)
        is_used[self._kept[wanted]] = True
        self._file.flush()
        mapped = np.asarray(np.memmap(self._file, np.int32, mode="r"))  # NumPy 2.0 makes copies of a memmap read-only
        ids = mapped[np.repeat(is_used, lengths)]
        is_label = ids < 0
        np.invert(ids, out=ids, where=is_label)
        return Tokens(ids, is_label, np.concatenate([[0], np.cumsum(lengths[is_used], dtype=np.int64)]))

    def warnings(self) -> list[str]:
        templates = self._templates.values()
        self.counts["changed"] = sum(template.changed for template in templates)
        self.counts["unmarked"] = sum(template.unmarked for template in templates)
        ignored = [
            f"the chat template does not write `{name}`, which {'1 row has' if rows == 1 else f'{rows:,} rows have'}"
            for template in templates
            for name, rows in template.ignored.items()
        ]
        return [*ignored, *self.said(_WARNINGS)]

    def said(self, texts: Mapping[str, str]) -> list[str]:
        found = [what for what in texts if self.counts[what]]
        return [texts[what].format(self.counts[what], self.examples.get(what)) for what in found]


def _batches(rows: Iterator[Rendered]) -> Iterator[list[Rendered]]:
    batch, characters = list[Rendered](), 0
    for row in rows:
        batch.append(row)
        characters += len(row.text)
        if characters >= _CHARACTERS_PER_CALL:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _example(rendered: Rendered, encoded: Encoded, max_length: int) -> Example:
    """A row, cut to `max_length`, or in a conversation to the end of the last answer that fits whole."""
    length = min(len(encoded.ids), max_length)
    fitting = [end for end in encoded.ends if end <= max_length]
    if length < len(encoded.ids) and fitting and rendered.is_chat and len(rendered.learned) > 1:
        length = fitting[-1]
    is_label = encoded.is_label[:length].copy()
    is_label[:1] = False  # nothing predicts it
    return Example(np.array(encoded.ids[:length], dtype=np.int32), is_label)


def _hold_out(rows: RowReader, spec: DataSpec, notes: list[str]) -> npt.NDArray[np.bool_]:
    """Mask of the rows to hold out of those that were read. Raises DataError: too few are left."""
    _check_number(rows, len(rows.keys), spec)
    chosen, divided = held_out(rows.keys, spec.eval_rows)
    if divided:
        notes.append("too few different prompts to keep equal ones together: held out row by row")
    held = int(chosen.sum())
    if len(chosen) - held < 2 or held == 0:
        asked = f"{spec.eval_rows:,} asked to be held out" if spec.eval_rows else f"{held:,} held out"
        what = f"{spec.name}: {len(chosen):,} different rows with {asked} leave fewer than 2 to train on"
        raise DataError(what, "Give more rows, or lower data.eval_rows.")
    return chosen


def _taken(keys: npt.NDArray[np.uint64], spec: DataSpec, notes: list[str]) -> npt.NDArray[np.bool_]:
    """Mask of the rows of an evaluation set to use: all, `eval_rows`, or at most a thousand of a split found beside."""
    asked = spec.eval_dataset is not None or spec.eval_split is not None
    most = spec.eval_rows or (len(keys) if asked else MOST_OF_A_TEST_SPLIT)
    taken = np.zeros(len(keys), dtype=np.bool_)
    taken[np.argsort(keys, kind="stable")[:most]] = True
    if len(keys) > most:
        notes.append(f"{most:,} of the {len(keys):,} rows of the evaluation set are used")
    return taken


def _check_own_set(rows: RowReader, kept: int, others: RowReader, spec: DataSpec) -> None:
    """Raise DataError where too few rows are left to train on, or to evaluate on, with an evaluation set of its own."""
    if len(rows.keys) and not len(others.keys):
        raise DataError(f"{spec.name}: no row to evaluate on has a token to learn", "Raise data.max_length.")
    if len(rows.keys) and kept < 2:
        what = f"{spec.name}: fewer than 2 rows to train on are not in the evaluation set too"
        raise DataError(what, "Give other rows to one of them.")
    _check_number(rows, kept, spec)


def _check_number(rows: RowReader, number: int, spec: DataSpec) -> None:
    """Raise DataError for too few rows: of all that were read, `number` may be trained on or held out."""
    if not len(rows.keys) and rows.counts["refused"] and not rows.without_label:
        raise DataError(f"{spec.name}: no row is left: {rows.examples['refused']}", "Give another --chat-template.")
    if not len(rows.keys) and not rows.answers_cut_off:
        what = f"{spec.name}: no row has an answer to learn ({rows.without_label:,} rows were dropped)"
        todo = "Give answers another weight than 0; a chat template with {% generation %} has to mark them."
        raise DataError(what, todo)
    if not len(rows.keys):
        raise DataError(
            f"{spec.name}: no row has a token to learn within max_length {spec.max_length} "
            f"({rows.without_label:,} rows were dropped)",
            "Raise data.max_length, which is at most the model's positions: the prompts alone fill it.",
        )
    needed = 3 if spec.force else FEWEST_ROWS
    if number < needed:
        dropped = f" ({rows.without_label:,} more had no token to learn)" if rows.without_label else ""
        todo = "Give more rows; a verdict needs hundreds." + " To train all the same: --force." * (number >= 3)
        what = f"{spec.name}: only {number} different row{'s' * (number > 1)}{dropped}; at least {needed} are needed"
        raise DataError(what, todo)
