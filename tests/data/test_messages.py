"""Messages of every common form are those that chat templates read, with all that they carry."""

import json
from typing import Any

import pytest

from rankscope.data.messages import WrongRowError, parse_json, parse_messages, parse_tools

CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}


def assistant(**fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": "", **fields}


FORMS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # a message, and as templates read it
    "plain": ({"role": "user", "content": "a\n"}, {"role": "user", "content": "a\n"}),
    "another role": ({"role": "ipython", "content": "a"}, {"role": "ipython", "content": "a"}),
    "developer": ({"from": "developer", "value": "a"}, {"role": "developer", "content": "a"}),
    "tool's answer": (
        {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
        {"role": "tool", "content": "3", "tool_call_id": "x", "name": "add"},
    ),
    "fields without a value": (
        {"role": "assistant", "content": "a", "name": None, "audio": [], "refusal": "", "tool_calls": None},
        assistant(content="a"),
    ),
    "thoughts": (assistant(content="a", thinking="hm"), assistant(content="a", thinking="hm")),
    "thoughts alone": (
        {"role": "assistant", "content": None, "reasoning_content": "hm"}, assistant(reasoning_content="hm")
    ),
    "parts": (
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"text": "b"}, "c"]},
        {"role": "user", "content": "abc"},
    ),
    "parts as OpenAI's responses have them": (
        {"role": "user", "content": [{"type": "input_text", "text": "a"}, {"type": "output_text", "text": "b"}]},
        {"role": "user", "content": "ab"},
    ),
    "a tool's answer that is no text": (
        {"role": "tool", "content": {"é": [1, None]}}, {"role": "tool", "content": '{"é": [1, null]}'}
    ),
    "no parts": ({"role": "user", "content": []}, {"role": "user", "content": ""}),
    "parts that are thoughts": (
        {"role": "assistant", "content": [
            {"type": "thinking", "thinking": "h"}, {"type": "reasoning", "reasoning": "m"}, "a"]},
        assistant(content="a", reasoning_content="hm"),
    ),
    "call beside null": ({"role": "assistant", "content": None, "tool_calls": [CALL]}, assistant(tool_calls=[CALL])),
    "call without content": ({"role": "assistant", "tool_calls": [CALL]}, assistant(tool_calls=[CALL])),
    "arguments as text": (
        assistant(tool_calls=[{"id": "x", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}]),
        assistant(tool_calls=[{"id": "x", **CALL}]),
    ),
    "no arguments": (
        assistant(tool_calls=[{"function": {"name": "now", "arguments": ""}}]),
        assistant(tool_calls=[{"type": "function", "function": {"name": "now", "arguments": {}}}]),
    ),
    "call without a function of its own": (
        assistant(tool_calls=[{"name": "add", "arguments": {"a": 1}}]), assistant(tool_calls=[CALL])
    ),
    "calls as text": (assistant(tool_calls=json.dumps([CALL, CALL])), assistant(tool_calls=[CALL, CALL])),
    "each call as text": (assistant(tool_calls=[json.dumps(CALL)]), assistant(tool_calls=[CALL])),
    "one call": (assistant(tool_calls=CALL), assistant(tool_calls=[CALL])),
    "the older form": (
        {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 1}'}},
        assistant(tool_calls=[CALL]),
    ),
    "a call as ShareGPT writes it": (
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 1}}'}, assistant(tool_calls=[CALL])
    ),
    "several calls as ShareGPT writes them": (
        {"from": "function_call", "value": json.dumps([CALL, CALL])}, assistant(tool_calls=[CALL, CALL])
    ),
    "weight 1": (assistant(content="a", weight=1), assistant(content="a")),
    "weight 0": (assistant(content="a", weight=0), assistant(content="a", weight=0)),
    "weight 0.0": (assistant(content="a", weight=0.0), assistant(content="a", weight=0)),
    "not to train": (assistant(content="a", train=False), assistant(content="a", weight=0)),
    "not to train, as ms-swift has it": (assistant(content="a", loss=False), assistant(content="a", weight=0)),
    "to train": (assistant(content="a", training=True), assistant(content="a")),
    "both": (assistant(content="a", weight=1, train=False), assistant(content="a", weight=0)),
    **{
        f"ShareGPT's {theirs}": ({"from": theirs, "value": "a"}, {"role": ours, "content": "a"})
        for theirs, ours in {
            "human": "user", "user": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant",
            "model": "assistant", "system": "system", "observation": "tool", "tool": "tool",
        }.items()
    },
    "roles of ShareGPT in OpenAI's form": ({"role": "gpt", "content": "a"}, assistant(content="a")),
    "from with content": ({"from": "human", "content": "a"}, {"role": "user", "content": "a"}),
}  # fmt: skip


@pytest.mark.parametrize("case", FORMS)
def test_forms(case: str) -> None:
    message, expected = FORMS[case]
    before = json.dumps(message)
    assert parse_messages([message], "messages") == [expected]
    assert json.dumps(message) == before  # rows are read again and again


WRONG: dict[str, tuple[Any, str]] = {
    "text": ("hi", "`messages` is text, expected a list of messages, which may be written as JSON"),
    "number": (7, "`messages` is a number, expected a list of messages"),
    "empty": ([], "`messages` is an empty list"),
    "empty JSON": ("[]", "`messages` is an empty list"),
    "lists of different lengths": ({"from": ["human"], "value": []}, "`messages` has lists of different lengths"),
    "an object": ({"role": "user"}, "`messages` is an object, expected a list"),
    "a text among them": (["hi"], "`messages[0]` is text, expected an object with role and content"),
    "no role": ([{"content": "x"}], "`messages[0].role` is null"),
    "null role": ([{"role": None, "content": "x"}], "`messages[0].role` is null"),
    "no content": ([{"role": "user"}], "`messages[0].content` is null, expected text"),
    "null content": ([{"role": "assistant", "content": None, "tool_calls": []}], "`messages[0].content` is null"),
    "content is a number": ([{"role": "user", "content": 7}], "`messages[0].content` is a number"),
    "null value": ([{"from": "human", "value": None}], "`messages[0].value` is null"),
    "unknown sender": ([{"from": "alice", "value": "x"}], "`messages[0].from` is 'alice', expected one of human, gpt"),
    "image": ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}],
              "`messages[0].content[0]` is of type image_url, and only text is read"),
    "image after text": ([{"role": "user", "content": ["a", {"type": "image"}]}], "content[1]` is of type image"),
    "part without text": ([{"role": "user", "content": [{"type": "text"}]}], "`messages[0].content[0]` is null"),
    "part that is a number": ([{"role": "user", "content": [7]}], "`messages[0].content[0]` is a number"),
    "half of a pair": ([{"role": "user", "content": "\ud800"}], "`messages[0].content` holds half of a surrogate pair"),
    "weight": ([assistant(weight=0.5)], "`messages[0].weight` is 0.5, expected 0 or 1"),
    "weight as text": ([assistant(weight="no")], "`messages[0].weight` is 'no', expected 0 or 1"),
    "call without a name": ([assistant(tool_calls=[{"function": {}}])], "`messages[0].tool_calls[0]` has no function"),
    "call that is a number": ([assistant(tool_calls=[7])], "`messages[0].tool_calls[0]` has no function with a name"),
    "call that is no JSON": ([assistant(tool_calls=["add"])], "tool_calls[0]` is text, expected a tool call"),
    "arguments that are no JSON": (
        [assistant(tool_calls=[{"function": {"name": "f", "arguments": "{a"}}])],
        "`messages[0].tool_calls[0].function.arguments` is text, expected an object",
    ),
    "ShareGPT's call that is no JSON": (
        [{"from": "function_call", "value": "add"}], "`messages[0].tool_calls[0]` is text, expected a tool call"
    ),
}  # fmt: skip


def test_a_sequence_of_datasets_is_a_list() -> None:
    lists = {"from": ["human", "gpt"], "value": ["a", "b"]}
    assert parse_messages(lists, "messages") == [{"role": "user", "content": "a"}, assistant(content="b")]


@pytest.mark.parametrize("case", WRONG)
def test_what_cannot_be_read_is_named(case: str) -> None:
    value, problem = WRONG[case]
    with pytest.raises(WrongRowError) as caught:
        parse_messages(value, "messages")
    assert problem in str(caught.value)


@pytest.mark.parametrize("write", [json.dumps, repr, lambda value: f" {json.dumps(value)}\n"])
def test_messages_may_be_text(write: Any) -> None:
    messages = [{"role": "user", "content": "It's\n“2”"}, assistant(tool_calls=[CALL], content="a")]
    assert parse_messages(write(messages), "messages") == messages


@pytest.mark.parametrize("text", ["__import__('os')", "1", "null", "{1}", "(1,)", "[" * 5000, "[\ud800]", ""])
def test_only_lists_and_objects_are_values_and_nothing_is_executed(text: str) -> None:
    with pytest.raises(WrongRowError, match="`field` "):
        parse_json(text, "field", "a list")


TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (None, []),
        (" ", []),
        ([], []),
        ([TOOL], [TOOL]),
        (TOOL, [TOOL]),
        ([TOOL["function"]], [TOOL]),
        (json.dumps([TOOL["function"]]), [TOOL]),
        ([json.dumps(TOOL)], [TOOL]),
        ([{"type": "web_search"}], [{"type": "web_search"}]),
    ],
)
def test_tools(value: Any, expected: list[Any]) -> None:
    assert parse_tools(value, "tools") == expected


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("add", "`tools` is text, expected a list of tools"),
        ([7], "`tools[0]` is a number, expected a tool: an object with a function"),
        (["add"], "`tools[0]` is text, expected a tool"),
        (7, "`tools[0]` is a number"),
    ],
)
def test_tools_that_cannot_be_read_are_named(value: Any, problem: str) -> None:
    with pytest.raises(WrongRowError) as caught:
        parse_tools(value, "tools")
    assert problem in str(caught.value)
