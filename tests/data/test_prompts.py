"""The prompt is what the template says, no input is dropped, what is learned is exactly the completion."""

from collections.abc import Callable

import pytest
from transformers import ByT5Tokenizer, PreTrainedTokenizerFast

from rankscope.data.prompts import Rendered, encode, render
from rankscope.errors import DataError, ModelError
from rankscope.spec.models import DataSpec

Make = Callable[..., PreTrainedTokenizerFast]
SPEC = DataSpec(id="x")
CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "And 2+2?"},
    {"role": "assistant", "content": "4"},
]


def fill(tokenizer: PreTrainedTokenizerFast, instruction: str, given: str, template: str = SPEC.template) -> str:
    row = {"instruction": instruction, "input": given, "output": "o"}
    return render(row, DataSpec(id="x", template=template), "alpaca", tokenizer).prompt


@pytest.mark.parametrize(
    ("instruction", "given", "prompt"),
    [
        ("Sort.", "[2, 1]", "### Question: Sort.\n[2, 1]\n ### Answer:"),
        ("Sort.", "", "### Question: Sort.\n ### Answer:"),
        ("Sort.", " \n\t", "### Question: Sort.\n ### Answer:"),
        (
            "{input} {0} {",
            "{instruction} \\1",
            "### Question: {input} {0} {\n{instruction} \\1\n ### Answer:",
        ),
    ],
)
def test_the_default_template(instruction: str, given: str, prompt: str, tokenizer: PreTrainedTokenizerFast) -> None:
    assert fill(tokenizer, instruction, given) == prompt


def test_a_line_with_both_placeholders_keeps_the_instruction(tokenizer: PreTrainedTokenizerFast) -> None:
    template = "Q: {instruction} {input}\nInput {input}!\nA:"
    assert fill(tokenizer, "Go", "", template) == "Q: Go \nA:"
    assert fill(tokenizer, "Go", "x", template) == "Q: Go x\nInput x!\nA:"


def test_alpaca_completion_is_a_space_and_the_output(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"instruction": "q", "input": "", "output": "{a}\n"}
    assert render(row, SPEC, "alpaca", tokenizer).completion == " {a}\n"


def test_prompt_completion_is_taken_as_it_is(tokenizer: PreTrainedTokenizerFast) -> None:
    row = {"prompt": "{x} ", "completion": "y"}
    assert render(row, SPEC, "prompt_completion", tokenizer) == Rendered("{x} ", "y", is_chat=False)


def test_messages_learn_the_last_answer_and_its_end_mark(chat_tokenizer: PreTrainedTokenizerFast) -> None:
    found = render({"messages": CHAT}, SPEC, "messages", chat_tokenizer)
    assert found.prompt.endswith("<|assistant|>2</s>\n<|user|>And 2+2?</s>\n<|assistant|>")
    assert found.prompt.count("<s>") == 1
    assert found.completion == "4</s>\n"
    split = {"prompt": CHAT[:-1], "completion": CHAT[-1:]}
    assert render(split, SPEC, "prompt_completion", chat_tokenizer) == found
    [encoded] = encode([found], chat_tokenizer)
    whole = chat_tokenizer.apply_chat_template(CHAT, return_dict=False)
    assert encoded.prompt_ids + encoded.completion_ids == whole


def test_without_a_chat_template_there_is_a_way_out(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(DataError, match=r"no chat template\n.*instruct"):
        render({"messages": CHAT}, SPEC, "messages", tokenizer)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        ("{{ messages | length }} {{ messages[-1].content }}", "not prefix-preserving"),
        ("{{ raise_exception('no system messages') }}", "refuses the conversation: no system messages"),
        ("{{ messages[0].content + 1 }}", "refuses the conversation"),
    ],
)
def test_a_template_that_cannot_be_used_is_named(template: str, problem: str, make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(DataError, match=problem) as caught:
        render({"messages": CHAT}, SPEC, "messages", tokenizer)
    assert caught.value.todo


@pytest.mark.parametrize(
    ("after", "front"),
    [
        (None, ""),
        ("<s> $A", "<s>"),
        ("</s> $A", "</s>"),
        ("$A </s>", ""),
        ("<s> $A </s>", "<s>"),
        ("<s> <s> $A </s> </s>", "<s><s>"),
    ],
)
def test_special_tokens_stand_in_front_and_eos_ends_it_once(
    after: str | None, front: str, make_tokenizer: Make
) -> None:
    tokenizer = make_tokenizer(after)
    prompt = "### Question: Sort.\n ### Answer:"
    ended = Rendered(prompt, " 1, 2</s>", is_chat=False)
    for encoded in encode([Rendered(prompt, " 1, 2", is_chat=False), ended], tokenizer):
        assert tokenizer.decode(encoded.prompt_ids) == front + prompt
        assert tokenizer.decode(encoded.completion_ids) == " 1, 2</s>"
    dressed = tokenizer(prompt)["input_ids"]
    assert dressed[: len(encoded.prompt_ids)] == encoded.prompt_ids


def test_a_tokenizer_written_in_python_works_too() -> None:
    tokenizer = ByT5Tokenizer()  # no files; appends eos
    [encoded] = encode([Rendered("Q: é", " ja", is_chat=False)], tokenizer)
    assert tokenizer.decode(encoded.prompt_ids) == "Q: é"
    assert tokenizer.decode(encoded.completion_ids) == " ja</s>"


def test_texts_and_chats_in_one_call_are_each_treated_as_what_they_are(
    chat_tokenizer: PreTrainedTokenizerFast,
) -> None:
    text, chat = Rendered("a", "b", is_chat=False), Rendered("a", "b", is_chat=True)
    first, second = encode([text, chat], chat_tokenizer)
    assert chat_tokenizer.decode(first.prompt_ids + first.completion_ids) == "<s>ab</s>"
    assert chat_tokenizer.decode(second.prompt_ids + second.completion_ids) == "ab"


def test_a_tokenizer_without_eos_is_refused(make_tokenizer: Make) -> None:
    with pytest.raises(ModelError, match=r"no end-of-sequence token.*\n.*Choose a model"):
        encode([Rendered("a", "b", is_chat=False)], make_tokenizer(eos_token=""))


def test_truncation_saved_with_the_tokenizer_is_not_applied(make_tokenizer: Make) -> None:
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.enable_truncation(2)
    tokenizer.backend_tokenizer.enable_padding(length=50)
    [encoded] = encode([Rendered("Sort the list", " 1, 2, 3", is_chat=False)], tokenizer)
    assert tokenizer.decode(encoded.prompt_ids + encoded.completion_ids) == "<s>Sort the list 1, 2, 3</s>"
