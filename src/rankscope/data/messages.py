"""Messages: conversations of every common form as those that chat templates read, with all that they carry.

OpenAI's, ShareGPT's (`from`, `value`) and TRL's forms; content as text, null beside a tool call, or a list of text
parts; tool calls with their arguments as JSON text; messages as JSON text, since a CSV file has no other way.
"""

import ast
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from rankscope.data.readers import kind
from rankscope.errors import shortened

ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "function_call": "assistant", "observation": "tool", "function": "tool",
    "system": "system", "user": "user", "assistant": "assistant", "tool": "tool", "developer": "developer",
}  # fmt: skip
"""Roles of chat templates by the names that ShareGPT's descendants use."""

Messages: TypeAlias = list[dict[str, Any]]  # as chat templates read them: see `parse_messages`
_ARGUMENTS = ("parameters", "args", "input")  # other dialects' names of a call's arguments
_LEARN = ("weight", "train", "training", "loss")  # of OpenAI, Axolotl and ms-swift: whether an answer is learned
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # names of an answer's thoughts
_TEXT_PARTS = ("text", "input_text", "output_text")


def shared_length(one: Sequence[Any], other: Sequence[Any]) -> int:
    """Number of equal items at the beginning of both."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((at for at, pair in pairs if pair[0] != pair[1]), min(len(one), len(other)))


def says_something(message: Mapping[str, Any]) -> bool:
    """Whether a message has a text, a thought or a tool call."""
    texts = (message.get(key) for key in ("content", *THOUGHTS))
    return bool(message.get("tool_calls")) or any(isinstance(text, str) and text.strip() for text in texts)


class WrongRowError(ValueError):
    """Fault of one row; the message begins with the field."""


def checked_text(value: Any, field: str) -> str:
    """Return `value` if it is text that UTF-8 can encode; raise WrongRowError otherwise."""
    if not isinstance(value, str):
        raise WrongRowError(f"`{field}` is {kind(value)}, expected text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise WrongRowError(f"`{field}` holds half of a surrogate pair at character {error.start + 1}") from None
    return value


def parse_messages(value: Any, field: str) -> Messages:
    """Messages with `role`, `content` as text, and every other field that is not null. A message that is not to be
    learned has `weight` 0; no other weight is left. Raises WrongRowError: it is no list of messages, a role or content
    is missing, a part is no text, a weight is neither 0 nor 1."""
    if isinstance(value, str):
        value = parse_json(value, field, "a list of messages")
    if isinstance(value, dict) and all(isinstance(items, list) for items in value.values()):  # a Sequence of `datasets`
        if len({len(items) for items in value.values()}) > 1:
            raise WrongRowError(f"`{field}` has lists of different lengths")
        value = [dict(zip(value, items, strict=True)) for items in zip(*value.values(), strict=True)]
    if not isinstance(value, list):
        raise WrongRowError(f"`{field}` is {kind(value)}, expected a list of messages with role and content")
    if not value:
        raise WrongRowError(f"`{field}` is an empty list")
    return [_message(message, f"{field}[{index}]") for index, message in enumerate(value)]


def parse_json(value: str, field: str, expected: str) -> Any:
    """Value of JSON text, or of a Python literal, which pandas writes to CSV; nothing is executed."""
    for parse in (json.loads, ast.literal_eval):
        try:
            parsed = parse(checked_text(value, field))
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            continue
        if isinstance(parsed, list | dict):
            return parsed
    raise WrongRowError(f"`{field}` is text, expected {expected}, which may be written as JSON")


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise WrongRowError(f"`{field}` is {kind(message)}, expected an object with role and content")
    found = {key: value for key, value in message.items() if value is not None}
    shared = "role" not in found and "from" in found
    role = checked_text(found.pop("from" if shared else "role", None), f"{field}.{'from' if shared else 'role'}")
    if shared and role.lower() not in ROLES:
        raise WrongRowError(f"`{field}.from` is {shortened(role)!r}, expected one of {', '.join(ROLES)}")
    where = "value" if shared and "content" not in found else "content"
    content = found.pop(where, None)
    if isinstance(content, dict) and ROLES.get(role.lower()) == "tool":  # what a tool gives is any value
        content = json.dumps(content, ensure_ascii=False, default=str)
    if role == "function_call":
        content, found["function_call"] = None, content
    calls = _tool_calls(found, field)
    parsed: dict[str, Any] = {
        "role": ROLES.get(role.lower(), role),
        "content": _content(content, found, bool(calls), f"{field}.{where}"),
    }
    weights = [found.pop(key) for key in _LEARN if key in found]
    if wrong := [weight for weight in weights if weight not in (0, 1)]:
        raise WrongRowError(f"`{field}.weight` is {wrong[0]!r}, expected 0 or 1")
    if calls:
        parsed["tool_calls"] = calls
    parsed |= {key: value for key, value in found.items() if value not in ("", [], {})}
    return parsed | ({"weight": 0} if 0 in weights else {})


def _content(value: Any, message: dict[str, Any], has_calls: bool, field: str) -> str:
    """Text of a message; parts of thought become its `reasoning_content`."""
    if value is None and (has_calls or any(map(message.get, THOUGHTS))):
        return ""
    if not isinstance(value, list):
        return checked_text(value, field)
    texts = []
    for number, part in enumerate(value):
        where = f"{field}[{number}]"
        form = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text" if form in _TEXT_PARTS else form) if isinstance(part, dict) else part
        if form in ("thinking", "reasoning"):
            known = checked_text(message.get("reasoning_content", ""), f"{field}: reasoning_content")
            message["reasoning_content"] = known + checked_text(text, where)
        elif form in _TEXT_PARTS:
            texts.append(checked_text(text, where))
        else:
            raise WrongRowError(f"`{where}` is of type {shortened(str(form))}, and only text is read")
    return "".join(texts)


def _tool_calls(message: dict[str, Any], field: str) -> list[dict[str, Any]]:
    """Tool calls taken out of a message, each with its function's name and its arguments as an object."""
    calls = message.pop("tool_calls", None) or []
    if legacy := message.pop("function_call", None):
        calls = [legacy]
    several = _entries(calls, f"{field}.tool_calls", "a list of tool calls", "a tool call")
    return [_tool_call(one, where) for where, call in several for one in (call if isinstance(call, list) else [call])]


def _entries(value: Any, field: str, several: str, one: str) -> Iterator[tuple[str, Any]]:
    """Entries of a list, with their places, or the one there is; the list and each entry may be JSON text."""
    value = parse_json(value, field, several) if isinstance(value, str) else value
    for number, entry in enumerate(value if isinstance(value, list) else [value]):
        where = f"{field}[{number}]"
        yield where, parse_json(entry, where, one) if isinstance(entry, str) else entry


def _tool_call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise WrongRowError(f"`{where}` has no function with a name")
    if other := next((name for name in _ARGUMENTS if "arguments" not in function and name in function), None):
        function = {("arguments" if key == other else key): value for key, value in function.items()}
    arguments = function.get("arguments", {})
    if isinstance(arguments, str) and arguments.strip():
        arguments = parse_json(arguments, f"{where}.function.arguments", "an object")
    outer = {key: value for key, value in call.items() if key != "function"} if "function" in call else {}
    return {"type": "function", **outer, "function": {**function, "arguments": arguments or {}}}


def parse_tools(value: Any, field: str) -> list[dict[str, Any]]:
    if value is None or (isinstance(value, str) and not value.strip()):
        return []
    tools = []
    for where, tool in _entries(value, field, "a list of tools", "a tool"):
        if not isinstance(tool, dict):
            raise WrongRowError(f"`{where}` is {kind(tool)}, expected a tool: an object with a function")
        tools.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return tools
