"""What a chat template writes, which characters of it are learned, and what is told where the template leaves out."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from data.tokenizers import CHATML, DROPS_SYSTEM, GENERATION, KINDS, MISTRAL, NO_SYSTEM, TOOLS
from rankscope.data.conversations import ChatTemplate, Rendered, with_chat_template
from rankscope.data.prompts import encode
from rankscope.errors import DataError

QWEN3 = (Path(__file__).parent / "trl" / "templates" / "qwen3.jinja").read_text()


def user(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "user", "content": content, **fields}


def said(content: str, **fields: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content, **fields}


def call(city: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


SYSTEM = {"role": "system", "content": "Be brief."}
CHAT = [user("one?"), said("two three"), user("four?"), said("five")]
THOUGHTFUL = [user("one?"), said("two", reasoning_content="hm"), user("three?"), said("four", reasoning_content="well")]
MODES = {"assistant": [1, 3], "last": [3], "completion": [3], None: [1, 3]}
AROUND = {  # what belongs to an answer beside its content
    "r1": (" ", "<|im_end|>"),
    "q35": ("\n</think>\n\n", "<|im_end|>\n"),
    **dict.fromkeys(("spm", "spm-ll", "mistral-zephyr"), ("", "</s>\n")),
    **dict.fromkeys(("spm-llama2", "mistral-llama2"), (" ", " </s>")),
}
CHATTING = [*(name for name, kind in KINDS.items() if kind.template), *MISTRAL]


@pytest.fixture
def tokenizer_with(make_tokenizer: Callable[..., PreTrainedTokenizerFast]) -> Callable[[str], PreTrainedTokenizerFast]:
    def made(template: str) -> PreTrainedTokenizerFast:
        tokenizer = make_tokenizer(after=None)
        tokenizer.chat_template = template
        return tokenizer

    return made


Make = Callable[[str], PreTrainedTokenizerFast]


def learned(rendered: Rendered) -> list[str]:
    return [rendered.text[start:end] for start, end in rendered.learned]


def spans(tokenizer: PreTrainedTokenizerBase, messages: list[Any], loss_on: str = "assistant", **row: Any) -> list[str]:
    return learned(ChatTemplate(tokenizer, loss_on).render({"messages": messages, **row}))


def check_tokens(tokenizer: PreTrainedTokenizerBase, rendered: Rendered, messages: list[Any]) -> None:
    """Ids are those of the whole conversation, and the tokens to learn are the text to learn, and no more."""
    [encoded] = encode([rendered], tokenizer)
    assert encoded.ids == tokenizer.apply_chat_template(messages, return_dict=False)
    assert len(encoded.ends) == len(rendered.learned)
    found, start = [], 0
    for end in encoded.ends:
        first = start + int(encoded.is_label[start:end].argmax())
        assert encoded.is_label[first:end].all()
        found.append("".join(tokenizer.decode(encoded.ids[first:end]).split()))
        start = end
    assert not encoded.is_label[start:].any()
    assert found == ["".join(text.split()) for text in learned(rendered)]


@pytest.mark.parametrize("name", CHATTING)
def test_answers_of_every_template(name: str, case_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_model(name))
    before, after = AROUND.get(name, ("", "<|im_end|>\n"))
    for loss_on, turns in MODES.items():
        rendered = ChatTemplate(tokenizer, loss_on or "assistant").render({"messages": CHAT})
        assert learned(rendered) == [f"{before}{CHAT[turn]['content']}{after}" for turn in turns]
        check_tokens(tokenizer, rendered, CHAT)
    whole = ChatTemplate(tokenizer, "all").render({"messages": CHAT})
    assert learned(whole) == [whole.text]
    assert encode([whole], tokenizer)[0].is_label.all()


def test_a_tokenizer_written_in_python(case_model: Callable[[str], Path]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(case_model("byt5"))
    with_chat_template(tokenizer, "chatml")
    rendered = ChatTemplate(tokenizer, "assistant").render({"messages": CHAT})
    assert learned(rendered) == ["two three</s>\n", "five</s>\n"]
    check_tokens(tokenizer, rendered, CHAT)


def test_chatml_ends_turns_with_a_token_of_the_model(case_model: Callable[[str], Path]) -> None:
    for name, end in (("plain", "<|im_end|>"), ("spm", "</s>")):
        tokenizer = AutoTokenizer.from_pretrained(case_model(name))
        with_chat_template(tokenizer, "chatml")
        assert spans(tokenizer, CHAT) == [f"two three{end}\n", f"five{end}\n"], name
        own = tokenizer.chat_template
        with_chat_template(tokenizer, None)
        assert tokenizer.chat_template == own
        with_chat_template(tokenizer, "{{ messages[0].content }}")
        assert tokenizer.chat_template == "{{ messages[0].content }}"


MARKED = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}BODY{% else %}{{ m.content }}{% endif %}"
    "{% endfor %}"
)
MARKS = {
    "without the end": ("{% generation %}{{ m.content }}{% endgeneration %}</s>", ["two three", "five"]),
    "with dashes": ("{%- generation -%}{{ m.content }}{%- endgeneration -%}</s>", ["two three", "five"]),
    "without blanks": ("{%-generation%}{{ m.content }}{%endgeneration%}</s>", ["two three", "five"]),
    "with a beginning": (": {% generation %}!{{ m.content }}</s>{% endgeneration %}", ["!two three</s>", "!five</s>"]),
}


@pytest.mark.parametrize("case", MARKS)
def test_a_template_s_own_marks_say_what_is_learned(case: str, tokenizer_with: Make) -> None:
    body, answers = MARKS[case]
    tokenizer = tokenizer_with(MARKED.replace("BODY", body))
    for loss_on, found in (("assistant", answers), ("last", answers[1:])):
        rendered = ChatTemplate(tokenizer, loss_on).render({"messages": CHAT})
        assert learned(rendered) == found
        check_tokens(tokenizer, rendered, CHAT)
    assert spans(tokenizer, [*CHAT[:1], said("two three", weight=0), *CHAT[2:]]) == answers[1:]


def test_marks_that_are_not_one_an_answer(tokenizer_with: Make) -> None:
    twice = "{% generation %}{{ m.content }}{% endgeneration %}, {% generation %}</s>{% endgeneration %}"
    tokenizer = tokenizer_with(MARKED.replace("BODY", twice))
    assert spans(tokenizer, CHAT) == ["two three", "</s>", "five", "</s>"]
    with pytest.raises(DataError, match=r"marks 4 parts to learn in a conversation with 2 answers(.|\n)*assistant"):
        spans(tokenizer, CHAT, "last")


def test_answers_without_marks_are_told(tokenizer_with: Make) -> None:
    some = (
        "{% if loop.last %}{% generation %}{{ m.content }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}</s>"
    )
    chat = ChatTemplate(tokenizer_with(MARKED.replace("BODY", some)), "assistant")
    assert learned(chat.render({"messages": CHAT})) == ["five"]
    assert chat.unmarked == 1
    chat.render({"messages": CHAT[:2]})
    assert chat.unmarked == 1


def test_answers_of_weight_0_and_blank_ones_are_read_only(tokenizer_with: Make) -> None:
    for template in (CHATML, GENERATION):
        tokenizer = tokenizer_with(template)
        assert spans(tokenizer, [*CHAT[:3], said("five", weight=0)]) == ["two three<|im_end|>\n"]
        assert spans(tokenizer, [*CHAT[:3], said("five", weight=0)], "last") == []
        assert spans(tokenizer, [user("one?"), said(" "), *CHAT[2:]]) == ["five<|im_end|>\n"]
    [front, back] = spans(tokenizer_with(CHATML), [user("one?"), said("two", weight=0), *CHAT[2:]], "all")
    assert front.endswith("<|im_start|>assistant\n")
    assert back.startswith("<|im_start|>user\nfour?")


def test_of_a_prompt_nothing_is_learned(tokenizer_with: Make) -> None:
    tokenizer, ends = tokenizer_with(CHATML), "<|im_end|>\n"
    several = [*CHAT, user("six?"), said("seven")]
    assert spans(tokenizer, several, "assistant", first=3) == [f"five{ends}", f"seven{ends}"]
    assert spans(tokenizer, several, "last", first=3) == [f"seven{ends}"]
    assert spans(tokenizer, several, "completion", first=3) == [
        f"five{ends}<|im_start|>user\nsix?{ends}<|im_start|>assistant\nseven{ends}"
    ]
    assert spans(tokenizer, [user("one?"), said("two"), said("three")]) == [f"two{ends}", f"three{ends}"]


def test_thoughts_that_the_template_drops_from_history_are_not_learned(tokenizer_with: Make) -> None:
    template = ChatTemplate(tokenizer_with(QWEN3), "assistant")
    rendered = template.render({"messages": THOUGHTFUL})
    assert learned(rendered) == ["two<|im_end|>\n", "<think>\nwell\n</think>\n\nfour<|im_end|>\n"]
    assert "hm" not in rendered.text
    assert template.changed == 1  # the first answer's thought, which is told
    inline = [user("one?"), said("<think>\nhm\n</think>\n\ntwo"), *CHAT[2:]]
    assert learned(template.render({"messages": inline}))[0] == "two<|im_end|>\n"
    assert template.changed == 2  # which is told: the answer is not learned as it stands in the data


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [("reasoning_content", "thinking"), ("thinking", "reasoning_content"), ("reasoning_content", "reasoning")],
)
def test_thoughts_get_the_name_that_the_template_reads(ours: str, theirs: str, tokenizer_with: Make) -> None:
    template = CHATML.replace("{{ m.content }}", f"{{{{ m.{ours} }}}}|{{{{ m.content }}}}")
    template += "{% if enable_thinking %}{% endif %}"  # which is no thought
    for name in (ours, theirs):
        assert spans(tokenizer_with(template), [user("one?"), said("two", **{name: "hm"})]) == ["hm|two<|im_end|>\n"]


def test_a_call_is_learned_as_the_template_writes_it(tokenizer_with: Make) -> None:
    messages = [
        user("Weather?"),
        said("", tool_calls=[call("Paris")]),
        {"role": "tool", "content": "sunny"},
        said("Sun"),
    ]
    tools = [{"type": "function", "function": {"name": "get_weather"}}]
    rendered = ChatTemplate(tokenizer_with(TOOLS), "assistant").render({"messages": messages, "tools": tools})
    assert learned(rendered) == ['<tool_call>get_weather {"city": "Paris"}</tool_call><|im_end|>\n', "Sun<|im_end|>\n"]
    assert rendered.text.startswith('<|im_start|>system\nTools: [{"type": "function", "function": {"name": "get_w')
    with pytest.raises(DataError, match=r"writes no tool calls.*\n.*--chat-template FILE"):
        spans(tokenizer_with(CHATML), messages)


CALLING = (
    "{% for m in messages %}<|{{ m.role }}|>BODY{{ m.content or '' }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CALLS = {
    "arguments as an object": "{% for c in m.tool_calls %}{{ c.function | tojson }}{% endfor %}",
    "arguments as text": '{% for c in m.tool_calls %}{{ \'{"name": "\' + c.function.name + \'", "arguments": \' + '
    "c.function.arguments + '}' }}{% endfor %}",
    "arguments as they come": '{% for c in m.tool_calls %}{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments }}}{% endfor %}",
}


@pytest.mark.parametrize("form", CALLS)
def test_calls_are_given_in_the_form_that_the_template_takes(form: str, tokenizer_with: Make) -> None:
    template = tokenizer_with(CALLING.replace("BODY", CALLS[form]))
    messages = [user("one?"), said("", tool_calls=[call("New York")]), user("two?"), said("three")]
    written = '{"name": "get_weather", "arguments": {"city": "New York"}}'
    assert spans(template, messages) == [f"{written}<|end|>", "three<|end|>"]


def test_a_template_that_writes_one_of_several_calls_is_refused(tokenizer_with: Make) -> None:
    first = "{% if m.tool_calls %}{{ m.tool_calls[0].function | tojson }}{% endif %}"
    tools = [{"type": "function", "function": {"name": "get_weather"}}]  # so the name is written all the same
    template = tokenizer_with("{{ tools | tojson }}" + CALLING.replace("BODY", first))
    with pytest.raises(DataError, match="writes no tool calls, or not all"):
        spans(template, [user("?"), said("", tool_calls=[call("Paris"), call("Rome")])], tools=tools)
    refuses = "{% if m.tool_calls | length > 1 %}{{ raise_exception('one call at once') }}{% endif %}"
    with pytest.raises(DataError, match="refuses the conversation: one call at once"):
        spans(
            tokenizer_with(CALLING.replace("BODY", refuses)), [user("?"), said("", tool_calls=[call("a"), call("b")])]
        )


@pytest.mark.parametrize("content", ["two three", "two <b>", "<|two> three", ""])
def test_an_answer_ends_before_what_ends_a_conversation(content: str, tokenizer_with: Make) -> None:
    """As Phi's templates write it: after the last message comes a token more."""
    body = CALLING.replace("BODY", CALLS["arguments as an object"]).removesuffix("{% endif %}")
    tokenizer = tokenizer_with(body + "{% else %}{{ eos_token }}{% endif %}")
    answer = said(content, tool_calls=[] if content else [call("New York")])
    written = content or '{"name": "get_weather", "arguments": {"city": "New York"}}'
    for next_one in (user("four?"), {"role": "tool", "content": "sunny"}):
        messages = [user("one?"), answer, next_one, said("five")]
        assert spans(tokenizer, messages) == [f"{written}<|end|>", "five<|end|></s>"]


def test_an_answer_begins_where_the_prompt_goes_on_otherwise(tokenizer_with: Make) -> None:
    """As R1's template writes it: a thought begins at once, which the answer has not."""
    tokenizer = tokenizer_with(
        CALLING.replace("BODY", "").replace("<|assistant|>{% endif", "<|assistant|><think>\n{% endif")
    )
    assert spans(tokenizer, CHAT) == ["two three<|end|>", "five<|end|>"]
    assert spans(tokenizer, [user("one?"), said("<b>two")]) == ["<b>two<|end|>"]


def test_a_template_that_always_begins_another_answer_is_refused(tokenizer_with: Make) -> None:
    always = CHATML.replace("{% if add_generation_prompt %}", "").removesuffix("{% endif %}")
    assert always.endswith("<|im_start|>assistant\n")
    with pytest.raises(DataError, match=r"begins another answer after the last one.*\n.*--chat-template"):
        spans(tokenizer_with(always), CHAT)
    never = CHATML.partition("{% if add_generation_prompt %}")[0]
    assert spans(tokenizer_with(never), CHAT[:2]) == ["<|im_start|>assistant\ntwo three<|im_end|>\n"]


def test_a_developer_s_message_is_the_system_s_where_the_template_does_not_write_it(tokenizer_with: Make) -> None:
    messages = [{"role": "developer", "content": "Be brief."}, *CHAT]
    refuses = "{% for m in messages if m.role == 'developer' %}{{ raise_exception('no') }}{% endfor %}" + CHATML
    for template in (refuses, QWEN3):
        chat = ChatTemplate(tokenizer_with(template), "assistant")
        assert "<|im_start|>system\nBe brief.<|im_end|>" in chat.render({"messages": messages}).text
    chatml = ChatTemplate(tokenizer_with(CHATML), "assistant")
    assert "<|im_start|>developer\nBe brief.<|im_end|>" in chatml.render({"messages": messages}).text


def test_arguments_of_the_template_are_passed(tokenizer_with: Make) -> None:
    template = (Path(__file__).parent / "trl" / "templates" / "mood.jinja").read_text()
    rendered = ChatTemplate(tokenizer_with(template), "last").render(
        {"messages": CHAT, "chat_template_kwargs": {"mood": "gay"}, "documents": [{"title": "x"}]}
    )
    assert rendered.text.endswith("assistant (gay): five</s>\n")
    assert learned(rendered) == [" five</s>\n"]
    documents = "{% for d in documents %}{{ d.title }}{% endfor %}"
    assert (
        ChatTemplate(tokenizer_with(documents + CHATML), "all")
        .render({"messages": CHAT, "documents": [{"title": "Book"}]})
        .text.startswith("Book<|im_start|>")
    )


@pytest.mark.parametrize(
    ("template", "rows", "ignored"),
    [
        (CHATML, [[SYSTEM, *CHAT]], {}),
        (DROPS_SYSTEM, [[SYSTEM, *CHAT], CHAT], {"system": 1}),
        (CHATML, [CHAT, THOUGHTFUL, THOUGHTFUL], {"reasoning_content": 2}),
        (QWEN3, [[user("one?"), {"role": "critic", "content": "no"}, said("two")]], {"critic": 1}),
        (TOOLS, [THOUGHTFUL], {}),
        (CHATML, [[user("one?", name="Ann"), said("two")]], {"name": 1}),
        (CHATML.replace("m.role }}", "m.role }} {{ m.name }}"), [[user("one?", name="Ann"), said("two")]], {}),
        (QWEN3, [THOUGHTFUL, [*THOUGHTFUL[:2], *CHAT[2:]]], {}),  # it writes the thoughts of one row
    ],
)
def test_fields_that_no_row_s_text_depends_on_are_told(
    template: str, rows: list[list[Any]], ignored: dict[str, int], tokenizer_with: Make
) -> None:
    chat = ChatTemplate(tokenizer_with(template), "assistant")
    for messages in rows:
        chat.render({"messages": messages})
    assert chat.ignored == ignored


def test_tools_and_arguments_that_are_not_written_are_told(tokenizer_with: Make) -> None:
    row = {"messages": CHAT, "tools": [{"name": "add"}], "chat_template_kwargs": {"mood": 1}, "documents": [{}]}
    chat = ChatTemplate(tokenizer_with(CHATML), "assistant")
    for _ in range(3):
        chat.render(row)
    assert chat.ignored == {"tools": 3, "documents": 3, "mood": 3}


@pytest.mark.parametrize(
    ("template", "problem", "way"),
    [
        (NO_SYSTEM, "refuses the conversation: System role not supported", "chatml"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation", "chatml"),
        ("{{ messages[0].content", "refuses the conversation", "chatml"),
        ("{{ messages | length }} {{ messages[-1].content }}", "not prefix-preserving", "generation"),
    ],
)
def test_a_template_that_cannot_be_used_is_named_with_a_way_out(
    template: str, problem: str, way: str, tokenizer_with: Make
) -> None:
    with pytest.raises(DataError, match=problem) as caught:
        spans(tokenizer_with(template), [SYSTEM, *CHAT])
    assert way in caught.value.todo


def test_a_completion_that_cannot_be_found_in_the_text_is_refused(tokenizer_with: Make) -> None:
    counting = tokenizer_with("{{ messages | length }}" + CHATML)
    with pytest.raises(DataError, match="not prefix-preserving"):
        spans(counting, CHAT, "completion", first=3)


def test_without_a_template_there_is_a_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no chat template\n.*--chat-template chatml.*instruct"):
        spans(tokenizer, CHAT)


def test_rows_of_one_conversation_share_its_beginning(tokenizer_with: Make) -> None:
    def beginning(*messages: Any) -> str:
        return ChatTemplate(tokenizer_with(CHATML), "assistant").render({"messages": list(messages)}).beginning

    assert beginning(*CHAT) == beginning(*CHAT[:2]) == beginning(user("one?"), said("other"))
    assert beginning(*CHAT) not in (beginning(SYSTEM, *CHAT), beginning(*CHAT[2:]))
