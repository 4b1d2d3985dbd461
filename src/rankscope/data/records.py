"""Records: rows of a source in one known form, checked, with a fingerprint.

A row is one of four forms, each with all that carries meaning:

- alpaca: `instruction`, `input` ("" for none), `output`; `system` and `history` where the row has them;
- prompt_completion: `prompt`, `completion`, both texts;
- messages: `messages` (see `rankscope.data.messages`) and `first`, the index of the first that may be learned; `tools`,
  `documents`, `chat_template_kwargs` where the row has them. Conversational prompts and completions become this form;
- text: `text`.
"""

import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from typing import Any, NamedTuple

from rankscope.data.formats import COLUMNS, IS_WANTED, MEDIA, Layout, resolve_layout
from rankscope.data.messages import (
    Messages,
    WrongRowError,
    checked_text,
    parse_json,
    parse_messages,
    parse_tools,
    says_something,
    shared_length,
)
from rankscope.data.readers import Part, kind, listed
from rankscope.data.sources import Source, resolve_sources
from rankscope.errors import DataError, shortened
from rankscope.spec.models import DataSpec

_ROWS_FOR_COLUMNS = 1000  # first rows of a part whose fields are its columns, where no header names them


@dataclass
class Records:
    """Rows of one or several sources, in order. They are read anew each time; rows left out are left out again."""

    sources: Sequence[Source]
    parts: list[tuple[Part, Layout]]  # of all sources
    spec: DataSpec
    fingerprint: str = ""  # sha256 of the rows, whatever kind of file they came from
    rows_read: int = 0
    left_out: Counter[str] = field(default_factory=Counter)  # `bad`, `blank`, `unwanted`
    unread_columns: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)

    @property
    def id(self) -> str:
        return " + ".join(source.name for source in self.sources)

    @property
    def revision(self) -> str | None:
        """Commits on the hub, None for local data."""
        return " + ".join(filter(None, (source.revision for source in self.sources))) or None

    @property
    def format(self) -> str:
        """Formats of the sources, such as `messages` or `alpaca + text`."""
        return " + ".join(dict.fromkeys(layout.format for _, layout in self.parts))

    def located(self) -> Iterator[tuple[str, dict[str, Any]]]:
        """Rows with their place, e.g. `data.jsonl, line 7`."""
        return ((where, row) for where, row, _ in _checked(self.parts, self.spec, {}) if isinstance(row, dict))

    @property
    def rows(self) -> list[dict[str, Any]]:
        return [row for _, row in self.located()]


def load_records(spec: DataSpec, sources: Sequence[Source] | None = None) -> Records:
    """Check every row of the sources (default: those to train on), of which the first `spec.max_rows` are used.

    A null or absent `input` means no input. Rows whose answer, or whose every field, is blank are left out and counted.
    Raises DataError: a source cannot be read, its columns fit no format or several, every answer is blank, or rows are
    wrong and not to be skipped: null, a number or a list instead of text, broken Unicode, a conversation that does not
    end with the assistant. The message names file, line, row and field.
    """
    if sources is None:
        sources, _ = resolve_sources(spec)
    unread: dict[str, None] = {}
    parts, notes = list[tuple[Part, Layout]](), [note for source in sources for note in source.notes]
    for source in sources:
        own = _with_layouts(source, spec, unread)
        parts += own
        notes += dict.fromkeys(layout.describe(source.name) for _, layout in own if layout.guessed)
    records = Records(sources, parts, spec, notes=notes)
    digest = hashlib.sha256()
    problems: list[str] = []
    for where, row, _ in _checked(parts, spec, unread):
        records.rows_read += 1
        if isinstance(row, WrongRowError):
            records.left_out["bad"] += 1
            problems += [f"  - {where}: {row}"] if len(problems) < 3 else []
        elif isinstance(row, str):
            records.left_out[row] += 1
        else:  # as JSON that is equal for equal rows only; `default` is for the dates of Parquet
            text = json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
            digest.update(text.encode() + b"\n")
    bad, unwanted = records.left_out["bad"], records.left_out["unwanted"]
    shown = "\n".join([*problems, *["  - ..."] * (bad > 3)])
    if bad and not (spec.skip_bad_rows and bad < records.rows_read):
        count = "1 row is" if bad == 1 else f"{bad:,} rows are"
        what = f"{count} wrong, read as {records.format}:\n{shown}"
        raise DataError(what, "Correct or remove these rows, or leave them out: --skip-bad-rows.")
    if bad:
        notes.append(f"{bad:,} bad row{'s' * (bad > 1)} left out, of which the first:\n{shown}")
    if unwanted == records.rows_read:
        what = f"{records.id}: every row says that its answer is not wanted: `{'` or `'.join(IS_WANTED)}` is false"
        raise DataError(what, "Rename the column if it means something else.")
    if records.rows_read == sum(records.left_out.values()):
        answer = {"alpaca": "output", "prompt_completion": "completion"}.get(records.format, records.format)
        what = f"{records.id}: every row's {answer} is blank: there is nothing to learn"
        raise DataError(what, "Put the answers there, or say which column holds them: --columns OURS=THEIRS.")
    records.fingerprint, records.unread_columns = digest.hexdigest(), tuple(unread)
    return records


class CheckedRow(NamedTuple):
    where: str  # for an error
    row: dict[str, Any] | WrongRowError | str  # as it is used; its fault if it is wrong; `blank`, `unwanted`
    columns: dict[str, Any]  # as its source has it


def rows_with_columns(spec: DataSpec, sources: Sequence[Source]) -> Iterator[CheckedRow]:
    """Every row of the sources, as `load_records` takes it, with all columns of its source."""
    parts = [part for source in sources for part in _with_layouts(source, spec, {})]
    return _checked(parts, spec, {}, every_column=True)


def _with_layouts(source: Source, spec: DataSpec, unread: dict[str, None]) -> list[tuple[Part, Layout]]:
    """Parts of a source with their layouts, all of one format; those that are not read have the first one's. Columns
    that no format reads go to `unread`."""
    wanted = COLUMNS.union(spec.columns.values())
    found: dict[str, Layout] = {}  # by name of the part
    left = spec.max_rows or sys.maxsize
    for part in source.parts:
        first = [row for _, row in islice(part.rows(wanted), min(_ROWS_FOR_COLUMNS, left))]
        left -= len(first)
        if first:
            columns = part.columns() or tuple(dict.fromkeys(chain(*first)))
            name = part.name if len(source.parts) > 1 else source.name
            found[part.name] = layout = resolve_layout(spec, columns, name, next(filter(None, first), first[0]))
            read = {"", *layout.columns.values(), *_judging(layout)}
            unread.update((column, None) for column in columns if column not in read)
        if left == 0:
            break  # the parts that follow are not read
    if not found:
        raise DataError(f"{source.name}: no rows", "Give data with at least a few dozen rows.")
    if len({layout.format for layout in found.values()}) > 1:
        examples = {layout.format: name for name, layout in found.items()}
        formats = ", ".join(f"{name} is {format}" for format, name in examples.items())
        what = f"{source.name}: its files are of several formats: {formats}"
        raise DataError(what, "Give each kind of file as a --dataset of its own.")
    default = next(iter(found.values()))
    return [(part, found.get(part.name, default)) for part in source.parts]


def _checked(
    parts: Sequence[tuple[Part, Layout]], spec: DataSpec, unread: dict[str, None], every_column: bool = False
) -> Iterator[CheckedRow]:
    """The first `spec.max_rows` rows. Columns that no format reads are not loaded where that saves time, unless
    `every_column` is wanted; those that a row has go to `unread`."""
    left = spec.max_rows or sys.maxsize
    for part, layout in parts:
        if left == 0:
            return  # before a further file is fetched
        read, judging = set(layout.columns.values()), _judging(layout)
        wanted = {*COLUMNS, *spec.columns.values(), *(part.columns() if every_column else ())}
        for index, (line, raw) in enumerate(islice(part.rows(wanted), left)):
            left -= 1
            read.update(name for name in judging if isinstance(raw.get(name), bool))
            unread.update((column, None) for column in raw if column not in read)
            row: dict[str, Any] | WrongRowError | str = "unwanted"
            if not any(raw.get(name) is False for name in judging):
                try:
                    row = _canonical(raw, layout) or "blank"
                except WrongRowError as error:
                    row = error
            yield CheckedRow(part.where(line, index), row, raw)


def _judging(layout: Layout) -> list[str]:
    """Columns that say whether an answer is wanted."""
    read = layout.columns.values()
    return [name for name, formats in IS_WANTED.items() if layout.format in formats and name not in read]


def _canonical(raw: dict[str, Any], layout: Layout) -> dict[str, Any] | None:
    """Row in its form, or None if its answer or the whole of it is blank. Raises WrongRowError: a field is missing or
    of a wrong type."""
    values = {name: raw[column] for name, column in layout.columns.items() if column in raw}
    if all(value is None or (isinstance(value, str) and not value.strip()) for value in raw.values()):
        return None
    for name in MEDIA:
        if raw.get(name):
            raise WrongRowError(f"`{name}` is not empty, and a text model does not read it")
    for name, column in layout.columns.items():
        if name not in values and name in ("instruction", "output", "completion", "messages", "text", "prompt"):
            raise WrongRowError(f"`{column}` is missing (found {listed(raw)})")
    if layout.format == "text":
        text = checked_text(values["text"], layout.columns["text"])
        return {"text": text} if text.strip() else None
    if layout.format == "alpaca":
        return _alpaca(values, layout)
    if layout.format == "messages":
        name = layout.columns["messages"]
        messages = _with_system(parse_messages(values["messages"], name), values)
        if len(messages) < 2:
            raise WrongRowError(f"`{name}` needs at least two: something to answer, and the answer")
        return _conversation(messages, 0, values, name)
    return _pair(values, layout)


def _alpaca(values: dict[str, Any], layout: Layout) -> dict[str, Any] | None:
    text = {
        name: "" if values.get(name) is None and name in ("input", "system") else checked_text(values[name], column)
        for name, column in layout.columns.items()
        if name != "history"
    }
    row: dict[str, Any] = {name: text.get(name, "") for name in ("instruction", "input", "output")}
    if text.get("system", "").strip():
        row["system"] = text["system"]
    history = values.get("history") or []
    if isinstance(history, str):
        history = parse_json(history, "history", "a list of pairs of question and answer") if history.strip() else []
    if history:
        turns = history if isinstance(history, list) else [None]
        if any(not isinstance(turn, list | tuple) or len(turn) != 2 for turn in turns):
            raise WrongRowError("`history` holds something else than pairs of question and answer")
        row["history"] = [[checked_text(text, "history") for text in turn] for turn in history]
    return row if row["output"].strip() else None


def _pair(values: dict[str, Any], layout: Layout) -> dict[str, Any] | None:
    """Prompt and completion: texts, or messages, which become a conversation whose prompt is not learned."""
    completion, name = values["completion"], layout.columns["completion"]
    prompt = values.get("prompt")
    if "rejected" in layout.columns:  # no prompt of its own: what both answers begin with, as in TRL
        chosen = checked_text(completion, name)
        same = shared_length(chosen, checked_text(values.get("rejected"), "rejected"))
        same -= chosen[:same].endswith(" ")
        prompt, completion = chosen[:same], chosen[same:]
    prompt_name = layout.columns.get("prompt", "prompt")
    if isinstance(prompt, list) or (isinstance(completion, list) and name == "chosen"):
        if isinstance(completion, str) and name != "chosen":
            raise WrongRowError(f"`{name}` is text but `{prompt_name}` is a list of messages: both must be the same")
        answer = [{"role": "assistant", "content": completion}] if isinstance(completion, str) else completion
        asked = prompt if isinstance(prompt, list) else [{"role": "user", "content": prompt}]
        before, after = parse_messages(asked, prompt_name), parse_messages(answer, name)
        repeated = next((at for at, message in enumerate(after[:-1], 1) if message == before[-1]), 0)
        if name == "chosen" and repeated:  # the chosen conversation is whole, perhaps with a system message
            before, after = after[:repeated], after[repeated:]
        elif after[: len(before)] == before:  # some data repeat the prompt
            after = after[len(before) :] or after
        first = len(_with_system(before, values))
        return _conversation(_with_system(before + after, values), first, values, name)
    if other := next((key for key in ("tools", "documents") if values.get(key)), None):
        raise WrongRowError(f"`{other}` is for conversations: give prompt and completion as lists of messages")
    pair = {"prompt": checked_text(prompt, prompt_name), "completion": checked_text(completion, name)}
    if system := values.get("system"):
        pair["prompt"] = f"{checked_text(system, 'system')}\n{pair['prompt']}"
    return pair if pair["completion"].strip() else None


def _with_system(messages: Messages, values: dict[str, Any]) -> Messages:
    """Messages that begin with the row's own `system`, if it has one."""
    system = values.get("system")
    if system is None or (isinstance(system, str) and not system.strip()):
        return messages
    [own] = parse_messages([{"role": "system", "content": system}], "system")
    if messages[0]["role"] != "system":
        return [own, *messages]
    if messages[0]["content"] != own["content"]:
        raise WrongRowError("`system` is not what the system message of the conversation says")
    return messages


def _conversation(messages: Messages, first: int, values: dict[str, Any], name: str) -> dict[str, Any] | None:
    if messages[-1]["role"] != "assistant":
        role = shortened(repr(messages[-1]["role"]))
        raise WrongRowError(f"`{name}` ends with the role {role}, expected assistant")
    row: dict[str, Any] = {"messages": messages}
    if first:
        row["first"] = first
    if tools := parse_tools(values.get("tools"), "tools"):
        row["tools"] = tools
    for key in ("documents", "chat_template_kwargs"):
        if given := values.get(key):
            row[key] = parse_json(given, key, "an object or a list") if isinstance(given, str) else given
    if not isinstance(row.get("chat_template_kwargs", {}), dict):
        raise WrongRowError(f"`chat_template_kwargs` is {kind(row['chat_template_kwargs'])}, expected an object")
    checked_text(json.dumps(row, ensure_ascii=False, default=str), name)  # also what is deep inside a call
    answers = [message for message in messages[first:] if message["role"] == "assistant"]
    return row if any(map(says_something, answers)) else None
