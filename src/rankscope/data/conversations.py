"""Conversations as text by a chat template, and which characters of it are learned.

Whole messages go to the template, with tools and all else that they carry. A template that marks the assistant's words
(`{% generation %}`) says itself what to learn; otherwise a turn is what the template adds after its generation prompt,
found by rendering the conversation up to that turn, and checked.
"""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from typing import TYPE_CHECKING, Any, NamedTuple, TypeAlias

from rankscope.data.messages import THOUGHTS, Messages, says_something, shared_length
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
        source = str(tokenizer.chat_template)
        self._marks = re.search(r"\{%-?\s*generation\s*-?%\}", source) is not None
        self._thoughts = [name for name in THOUGHTS if re.search(rf"""[.'"]{name}\b""", source)]  # that it reads
        self._is_checked = False
        self._tried: Counter[str] = Counter()
        self._written: set[str] = set()
        self.with_field: Counter[str] = Counter()  # rows that have a field
        self.unmarked = 0  # rows with answers that the template's own marks leave out
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
        self._rename_developer(messages, given)
        messages, text = self._with_calls(messages, given)
        if not self._is_checked:  # by the first row alone
            self._check_end(messages, given, text)
            self._is_checked = True
        self._look_for_ignored(messages, given, text)
        turns = self._turns(row, messages)
        learned = self._learned(row, messages, given, text, turns)
        if len(learned) == len(turns) and self.loss_on != "all":
            said = ["content", *self._written.intersection(THOUGHTS)]  # others are told as ignored
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
        """Give thoughts the name that the template reads, if it reads one alone."""
        for message in messages if len(self._thoughts) == 1 else ():
            [read] = self._thoughts
            other = next((name for name in THOUGHTS if name in message), None)
            if other and read not in message:
                message[read] = message.pop(other)

    def _rename_developer(self, messages: Messages, given: Mapping[str, Any]) -> None:
        """Make a developer's message the system's where the template does not write it: OpenAI's newer name of one."""
        found = [message for message in messages if message["role"] == "developer"]
        try:
            text = self._text(messages, given) if found else ""
        except DataError:
            text = ""
        for message in found:
            if message["content"].strip() not in text or not text:
                message["role"] = "system"

    def _with_calls(self, messages: Messages, given: Mapping[str, Any]) -> tuple[Messages, str]:
        """Messages in the form in which the template writes every tool call, and what it writes: some take arguments as
        JSON text alone."""
        calls = [call["function"] for message in messages for call in message.get("tool_calls", ())]
        if not calls:
            return messages, self._text(messages, given)
        names = [f"{call['name']}_{number}_" for number, call in enumerate(calls)]  # by which each is found
        as_python = [text for call in calls if (text := repr(call["arguments"])) != _as_json(call["arguments"])]
        found, refused = list[tuple[Messages, str]](), list[DataError]()
        for formed in (messages, [_calling(message, as_text=True) for message in messages]):
            named = iter(names)
            try:
                text = self._text(formed, given)
                marked = self._text([_calling(message, names=named) for message in formed], given)
            except DataError as error:
                refused.append(error)
                continue
            if all(name in marked for name in names):
                found.append((formed, text))
                if not any(python in text for python in as_python):  # arguments as Python prints them
                    return formed, text
        if found:
            return found[0]
        if len(refused) == 2:
            raise refused[0]
        raise DataError(
            "the model's chat template writes no tool calls, or not all, so that an answer that is one would be "
            "learned as an empty answer",
            "Give a template that writes tool_calls (--chat-template FILE), or take a model that calls tools.",
        )

    def _check_end(self, messages: Messages, given: Mapping[str, Any], text: str) -> None:
        """Raise DataError if the template writes the beginning of another answer after the last one, asked or not."""
        try:
            after = self._text([*messages, {"role": "user", "content": _MARK}], given)
            prompt = self._text(messages[:-1], given, prompt=True)
        except DataError:
            return
        rest = text[shared_length(text, after) :]
        if rest and prompt.endswith(rest):
            raise DataError(
                "the model's chat template begins another answer after the last one, which would be learned",
                "Give one that does so only for add_generation_prompt: --chat-template FILE, or chatml.",
            )

    def _look_for_ignored(self, messages: Messages, given: Mapping[str, Any], text: str) -> None:
        """Find out which fields change nothing in what the template writes: by leaving them out."""
        own = {(key, message["role"] == "tool") for message in messages for key in message if key not in _PLUMBING}
        fields = [*given, *sorted({key for key, of_tool in own if key != "name" or not of_tool})]  # a call has its name
        fields += sorted({message["role"] for message in messages} - {"user", "assistant"})
        for name in fields:
            self.with_field[name] += 1
            if name in self._written or self._tried[name] >= _ROWS_TRIED:
                continue
            self._tried[name] += 1
            kept = [message for message in messages if message["role"] != name]
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
            self.unmarked += len(marked) < len(answers)
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
        shared = len(_whole_marks(text[:shared]).removesuffix(" "))  # most tokenizers put a space before its word
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
        shared = shared if shared == len(after) else len(_whole_marks(after[:shared]))
        end += shared
        if alone.count(_MARK) != 1 or end <= start or len(after[shared:].split()) > 1:  # more than a mark that ends all
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


def _calling(message: dict[str, Any], names: Iterator[str] | None = None, as_text: bool = False) -> dict[str, Any]:
    """Copy of a message whose tool calls have other names, or their arguments as JSON text."""
    calls = []
    for call in message.get("tool_calls", ()):
        function = call["function"] | ({"name": next(names)} if names else {})
        function |= {"arguments": _as_json(function["arguments"])} if as_text else {}
        calls.append(call | {"function": function})
    return message | ({"tool_calls": calls} if calls else {})


def _as_json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, default=str)


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


def _whole_marks(text: str) -> str:
    """Text up to its last white space or closing bracket: that two texts go on with "<|" alike says nothing."""
    borders = (at + 1 for at, character in enumerate(text) if character.isspace() or character in ">]")
    return text[: max(borders, default=0)]


def _beginning(messages: Messages) -> str:
    """Messages before the first answer, which all rows have that were made of one conversation."""
    asked = next((number for number, message in enumerate(messages) if message["role"] == "user"), 0)
    answers = (number for number, message in enumerate(messages) if message["role"] == "assistant" and number > asked)
    return repr(messages[: next(answers, len(messages))])
