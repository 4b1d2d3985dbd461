"""Records: rows of one known format, checked once, with a fingerprint.

| format            | columns                                   | what is learned                       |
|-------------------|-------------------------------------------|---------------------------------------|
| alpaca            | instruction, output (input is optional)   | output                                |
| prompt_completion | prompt, completion (text, or messages)    | completion                            |
| messages          | messages, the last one by the assistant   | the last message; the others are read |
"""

import hashlib
import json
from typing import Any, Literal, NamedTuple

from rankscope.data.sources import Table, kind, listed, read_table
from rankscope.errors import DataError, shortened
from rankscope.spec.models import DataSpec

Format = Literal["alpaca", "prompt_completion", "messages"]

REQUIRED: dict[Format, tuple[str, ...]] = {
    "alpaca": ("instruction", "output"),
    "prompt_completion": ("prompt", "completion"),
    "messages": ("messages",),
}


class Records(NamedTuple):
    """Checked rows, in the order of the source."""

    rows: list[dict[str, Any]]  # only the columns of the format; alpaca: `input` is "" if absent
    format: Format
    fingerprint: str  # sha256 of the rows, whatever kind of file they came from
    id: str
    revision: str | None  # see `Table`


def load_records(spec: DataSpec) -> Records:
    """Read `spec.id` and check every row.

    A null or absent `input` means no input; columns that the format does not use are ignored.

    Raises:
        DataError: the source cannot be read, its columns fit no format or several, every answer is blank, or rows are
            wrong: null, a number or a list instead of text, broken Unicode, a conversation that does not end with the
            assistant. The message names file, line, row and field.
    """
    table = read_table(spec)
    empty = DataError(f"{table.name}: no rows", "Give data with at least a few dozen rows.")
    if not table.rows and not table.columns:
        raise empty
    format = _resolve_format(spec.format, table)
    if not table.rows:
        raise empty
    rows, problems = [], []
    for index, raw in enumerate(table.rows):
        try:
            rows.append(_canonical(raw, format))
        except WrongRowError as error:
            problems.append(f"{table.where(index)}: {error}")
    if problems:
        shown = "\n".join(f"  - {problem}" for problem in problems[:3])
        count = "1 row is" if len(problems) == 1 else f"{len(problems):,} rows are"
        more = "\n  - ..." if len(problems) > 3 else ""
        raise DataError(f"{count} wrong, read as {format}:\n{shown}{more}", "Correct or remove these rows.")
    if not any(_answer(row).strip() for row in rows):
        raise DataError(
            f"{table.name}: every row's {REQUIRED[format][-1]} is blank: there is nothing to learn",
            "Put the answers there, or set data.format to another one that the columns fit.",
        )
    digest = hashlib.sha256()
    for row in rows:
        digest.update(canonical_text(row).encode() + b"\n")
    return Records(rows, format, digest.hexdigest(), spec.id, table.revision)


def canonical_text(row: dict[str, Any]) -> str:
    """JSON of a row with sorted keys, which is equal for equal rows only."""
    return json.dumps(row, sort_keys=True, ensure_ascii=False, separators=(",", ":"))


def _resolve_format(asked: Format | Literal["auto"], table: Table) -> Format:
    fitting = [name for name, columns in REQUIRED.items() if set(columns) <= set(table.columns)]
    what = f"{table.name}: found the columns {listed(table.columns)}"
    if asked != "auto":
        if asked in fitting:
            return asked
        raise DataError(f"{what}; the format {asked} needs {_needs(asked)}", "Rename the columns, or set data.format.")
    if len(fitting) > 1:
        raise DataError(f"{what}, which fit {' and '.join(fitting)}", "Set data.format to the one you mean.")
    if not fitting:
        needs = "; ".join(f"{name} needs {_needs(name)}" for name in REQUIRED)
        raise DataError(f"{what}, which fit no format: {needs}", "Rename the columns.")
    return fitting[0]


def _needs(name: Format) -> str:
    return " and ".join(REQUIRED[name]) + (" (input is optional)" if name == "alpaca" else "")


class WrongRowError(ValueError):
    """Fault of one row; the message begins with the field."""


def _canonical(raw: dict[str, Any], format: Format) -> dict[str, Any]:
    for field in REQUIRED[format]:
        if field not in raw:
            raise WrongRowError(f"`{field}` is missing (found {listed(raw)})")
    if format == "alpaca":
        given = raw.get("input")
        return {
            "instruction": checked_text(raw["instruction"], "instruction"),
            "input": "" if given is None else checked_text(given, "input"),
            "output": checked_text(raw["output"], "output"),
        }
    if format == "messages":
        messages = _messages(raw["messages"], "messages")
        if len(messages) < 2:
            raise WrongRowError("`messages` needs at least two: something to answer, and the answer")
        return {"messages": _ended_by_assistant(messages, "messages")}
    prompt, completion = raw["prompt"], raw["completion"]
    if isinstance(prompt, list) and isinstance(completion, list):  # TRL's conversational form
        answer = _ended_by_assistant(_messages(completion, "completion"), "completion")
        return {"prompt": _messages(prompt, "prompt"), "completion": answer}
    if isinstance(prompt, list) and isinstance(completion, str):
        raise WrongRowError("`completion` is text but `prompt` is a list of messages: both must be the same")
    return {"prompt": checked_text(prompt, "prompt"), "completion": checked_text(completion, "completion")}


def _answer(row: dict[str, Any]) -> str:
    """Text of a row that the model learns."""
    answer: Any = row.get("output", row.get("completion", row.get("messages")))
    return answer if isinstance(answer, str) else str(answer[-1]["content"])


def checked_text(value: Any, field: str) -> str:
    """Return `value` if it is text that UTF-8 can encode; raise WrongRowError otherwise."""
    if not isinstance(value, str):
        raise WrongRowError(f"`{field}` is {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WrongRowError(f"`{field}` holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def _messages(value: Any, field: str) -> list[dict[str, str]]:
    if not isinstance(value, list):
        raise WrongRowError(f"`{field}` is {kind(value)}, expected a list of messages with role and content")
    if not value:
        raise WrongRowError(f"`{field}` is an empty list")
    messages = []
    for index, message in enumerate(value):
        if not isinstance(message, dict):
            raise WrongRowError(f"`{field}[{index}]` is {kind(message)}, expected an object with role and content")
        parts = {part: checked_text(message.get(part), f"{field}[{index}].{part}") for part in ("role", "content")}
        messages.append(parts)
    return messages


def _ended_by_assistant(messages: list[dict[str, str]], field: str) -> list[dict[str, str]]:
    if messages[-1]["role"] != "assistant":
        role = shortened(repr(messages[-1]["role"]))
        raise WrongRowError(f"`{field}` ends with the role {role}, expected assistant")
    return messages
