"""Conversations as text by a chat template, and which characters of it are learned.

Whole messages go to the template, with tools and all else that they carry. A template that marks the assistant's words
(`{% generation %}`) says itself what to learn; otherwise a turn is what the template adds after its generation prompt,
found by rendering the conversation up to that turn, and checked.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rankscope.data.messages import Messages, says_something, shared_length
from rankscope.errors import DataError
from rankscope.spec.models import CHATML

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Tokenizer: TypeAlias = "PreTrainedTokenizerBase"

_CHATML = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n{{ message.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
_END = "<|im_end|>"
_MARK = "\U0001d54a\U0001d557"  # stands for an answer's end where a template rewrites earlier turns
_ROWS_TRIED = 50  # rows in which the template may write a field before it counts as one that it ignores
_PLUMBING = ("role", "content", "tool_call_id")  # fields that are no text of their own
_THOUGHTS = ("reasoning_content", "thinking")


Spans: TypeAlias = list[tuple[int, int]]  # of characters, in order


class Rendered(NamedTuple):
    text: str
    learned: Spans  # characters of each answer to learn, in order
    beginning: str  # what rows of one conversation or question share, for the split
    is_chat: bool = True  # written by a chat template, with its special tokens


def with_chat_template(tokenizer: Tokenizer, template: str | None) -> None:
    """Give the tokenizer the study's own chat template, if it has one. `chatml` ends a turn with `<|im_end|>`, or with
    the tokenizer's own end of sequence where that is no token of it."""
    if template == CHATML:
        template = _CHATML
        if _END not in tokenizer.get_vocab():
            template = template.replace(_END, "{{ eos_token }}")
    if template is not None:
        tokenizer.chat_template = template


class ChatTemplate:
    """The tokenizer's chat template at work on one study's rows."""

    def __init__(self, tokenizer: Tokenizer, loss_on: str) -> None:
        self.tokenizer = tokenizer
        self.loss_on = loss_on
        self._source = str(tokenizer.chat_template)
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", self._source) is not None
        self._tried: Counter[str] = Counter()
        self._written: set[str] = set()
        self.with_field: Counter[str] = Counter()  # rows that have a field
        self.changed = 0  # answers that the template does not write as they are

    @property
    def ignored(self) -> dict[str, int]:
        """Rows with each field that the template wrote in none of them."""
        return {name: rows for name, rows in self.with_field.items() if name not in self._written}

    def render(self, row: Mapping[str, Any]) -> Rendered:
        """Render a conversation. Raises DataError: there is no template, it refuses the conversation, writes no tool
        calls, or an answer cannot be found in what it writes."""
        if not self.tokenizer.chat_template:
            todo = "Give one: --chat-template chatml, or a file with a Jinja template; or take a chat (instruct) model."
            raise DataError("the rows are conversations, but the model's tokenizer has no chat template", todo)
        messages = [{key: value for key, value in message.items() if key != "weight"} for message in row["messages"]]
        self._rename_thoughts(messages)
        given = {key: row[key] for key in ("tools", "documents") if key in row}
        given |= row.get("chat_template_kwargs", {})
        text = self._text(messages, given)
        self._look_for_ignored(messages, given, text)
        calls = [call["function"]["name"] for message in messages for call in message.get("tool_calls", ())]
        if calls and ("tool_calls" not in self._written or any(name not in text for name in calls)):
            raise DataError(
                "the model's chat template writes no tool calls, or not all, so that an answer that is one would be "
                "learned as an empty answer",
                "Give a template that writes tool_calls (--chat-template FILE), or take a model that calls tools.",
            )
        turns = self._turns(row, messages)
        learned = self._learned(row, messages, given, text, turns)
        if len(learned) == len(turns) and self.loss_on != "all":
            said = ["content", *self._written.intersection(_THOUGHTS)]  # others are told as ignored
            pairs = zip(turns, learned, strict=True)
            self.changed += any(not _stands_in(messages[turn], said, text[start:end]) for turn, (start, end) in pairs)
        return Rendered(text, learned, _beginning(messages))

    def _turns(self, row: Mapping[str, Any], messages: Messages) -> list[int]:
        """Indices of the messages to learn."""
        given = row["messages"]
        answers = [n for n in range(row.get("first", 0), len(given)) if given[n]["role"] == "assistant"]
        if self.loss_on in ("last", "completion"):
            answers = answers[-1:]
        return [n for n in answers if given[n].get("weight", 1) != 0 and says_something(messages[n])]

    def _learned(
        self, row: Mapping[str, Any], messages: Messages, given: Mapping[str, Any], text: str, turns: list[int]
    ) -> Spans:
        """Characters of each turn; or all after the prompt, without the answers of weight 0."""
        first = row.get("first", 0)
        if self.loss_on == "all" or (self.loss_on == "completion" and first):
            begin = 0 if self.loss_on == "all" else self._start(messages[:first], given, text)
            unlearned = [number for number, message in enumerate(row["messages"]) if message.get("weight", 1) == 0]
            borders = [0, *chain(*(self._span(messages, number, given, text) for number in unlearned)), len(text)]
            spans = zip(borders[::2], borders[1::2], strict=True)
            return [(max(start, begin), end) for start, end in spans if end > begin]
        if self._marks:
            return self._marked(messages, given, turns)
        return [self._span(messages, number, given, text) for number in turns]

    def _text(self, messages: Messages, given: Mapping[str, Any], prompt: bool = False) -> str:
        try:
            text: Any = self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt, **given
            )
        except Exception as error:  # a template is a program and may raise anything
            raise DataError(
                f"the model's chat template refuses the conversation: {error}",
                "Give a template that takes it (--chat-template chatml, or a file), put a system message's text into "
                "the first question, or leave such rows out: --skip-bad-rows.",
            ) from None
        return str(text)

    def _rename_thoughts(self, messages: Messages) -> None:
        """Give thoughts the name that the template reads, if it reads only the other one."""
        read = [name for name in _THOUGHTS if name in self._source]
        for message in messages if len(read) == 1 else ():
            [other] = {*_THOUGHTS} - {*read}
            if other in message and read[0] not in message:
                message[read[0]] = message.pop(other)

    def _look_for_ignored(self, messages: Messages, given: Mapping[str, Any], text: str) -> None:
        """Find out which fields change nothing in what the template writes: by leaving them out."""
        own = {(key, message["role"] == "tool") for message in messages for key in message if key not in _PLUMBING}
        fields = [*given, *sorted({key for key, of_tool in own if key != "name" or not of_tool})]  # a call has its name
        fields += ["system"] if any(message["role"] == "system" for message in messages) else []
        for name in fields:
            self.with_field[name] += 1
            if name in self._written or self._tried[name] >= _ROWS_TRIED:
                continue
            self._tried[name] += 1
            kept = [message for message in messages if name != "system" or message["role"] != "system"]
            without = [{key: value for key, value in message.items() if key != name} for message in kept]
            try:
                other = self._text(without, {key: value for key, value in given.items() if key != name})
            except DataError:  # the template cannot do without it, so it reads it
                other = None
            if other != text:
                self._written.add(name)

    def _marked(self, messages: Messages, given: Mapping[str, Any], turns: list[int]) -> Spans:
        """Characters that the template itself marks as the assistant's: of the turns to learn, where it marks every
        answer once."""
        from transformers.utils.chat_template_utils import render_jinja_template

        rendered: Any = render_jinja_template(
            conversations=[messages],
            chat_template=self.tokenizer.get_chat_template(tools=given.get("tools")),
            return_assistant_tokens_mask=True,
            **{"tools": None, "documents": None} | dict(given) | self.tokenizer.special_tokens_map,
        )
        marked = [(start, end) for start, end in rendered[1][0] if end > start]
        answers = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if len(marked) == len(answers):
            return [marked[answers.index(number)] for number in turns]
        if turns == answers:
            return marked
        raise DataError(
            f"the model's chat template marks {len(marked)} parts to learn in a conversation with {len(answers)} "
            "answers, so that one answer cannot be left out",
            "Learn all of them: data.loss_on=assistant, and no message with weight 0.",
        )

    def _start(self, before: Messages, given: Mapping[str, Any], text: str) -> int:
        """Where the answer after these messages begins: after the generation prompt, or what the text has of it."""
        prompt = self._text(before, given, prompt=True)
        if text.startswith(prompt):
            return len(prompt)
        shared = shared_length(prompt, text)
        shared = len(_whole_words(text[:shared]).removesuffix(" "))  # most tokenizers put a space before its word
        if shared < len(self._text(before, given)):
            raise _not_found()
        return shared

    def _first(self, messages: Messages, given: Mapping[str, Any], text: str) -> int:
        """Where the answer begins that opens a conversation: no messages come before it, and templates want some."""
        greeting = messages[0] | {"content": _MARK + messages[0]["content"]}
        return _place_of_mark(self._text([greeting, *messages[1:]], given), text)

    def _span(self, messages: Messages, number: int, given: Mapping[str, Any], text: str) -> tuple[int, int]:
        """Characters of one answer, its end mark included."""
        start = self._start(messages[:number], given, text) if number else self._first(messages, given, text)
        until = text if number == len(messages) - 1 else self._text(messages[: number + 1], given)
        if text.startswith(until) and len(until) > start:
            return start, len(until)
        # Once a question follows, some templates leave out the thoughts of earlier answers: look for this answer's end.
        marked = [*messages[:number], _with_mark(messages[number]), *messages[number + 1 :]]
        end = _place_of_mark(self._text(marked, given), text)
        alone = self._text(marked[: number + 1], given)
        after = alone.partition(_MARK)[2]
        shared = shared_length(after, text[end:])
        end += shared if shared == len(after) else len(_whole_words(after[:shared]))
        if alone.count(_MARK) != 1 or end <= start:
            raise _not_found()
        return start, end


def _place_of_mark(marked: str, text: str) -> int:
    """Where a text has a mark that is all in which it differs from `text`."""
    if marked.count(_MARK) != 1 or marked.replace(_MARK, "") != text:
        raise _not_found()
    return marked.index(_MARK)


def _not_found() -> DataError:
    return DataError(
        "the model's chat template is not prefix-preserving: it writes earlier messages differently once an answer "
        "follows, so that the answers cannot be found in the text",
        "Learn the last answer alone (data.loss_on=last), or give another template: --chat-template chatml, or a "
        "file that marks answers with {% generation %}.",
    )


def _stands_in(message: Mapping[str, Any], fields: Sequence[str], text: str) -> bool:
    """Whether a text holds what a message says in these fields."""
    said = (message.get(name) for name in fields)
    return all(part.strip() in text for part in said if isinstance(part, str))


def _with_mark(message: dict[str, Any]) -> dict[str, Any]:
    """Copy of a message with a mark in the last text of it that a template writes: a call's name, or the content."""
    if not message.get("tool_calls"):
        return message | {"content": message["content"] + _MARK}
    *calls, last = message["tool_calls"]
    function = last["function"] | {"name": last["function"]["name"] + _MARK}
    return message | {"tool_calls": [*calls, last | {"function": function}]}


def _whole_words(text: str) -> str:
    """Text up to its last white space: that two texts go on with "<" alike says nothing."""
    return text[: max((at + 1 for at, character in enumerate(text) if character.isspace()), default=len(text))]


def _beginning(messages: Messages) -> str:
    """Messages before the first answer, which all rows have that were made of one conversation."""
    asked = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    answers = (number for number, message in enumerate(messages) if message["role"] == "assistant" and number > asked)
    return repr(messages[: next(answers, len(messages))])
